"""Plans of the CPU kernel for other machines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fastrnn.plan import FORMATS, CpuFacts, Device, KernelRefused, Plan, Problem, choose
from tests.support.problems import LSTM, TWO, with_threads


def split(plan: Plan) -> tuple[int, int, int]:
    return plan.cpu.split_recurrences, plan.cpu.split_sequences, plan.cpu.split_units


@pytest.mark.parametrize(
    ("problem", "device", "expected"),
    [
        (LSTM, with_threads(1), (1, 1, 1)),
        (replace(LSTM, steps=1), TWO, (1, 1, 1)),  # too small for two threads
        (LSTM, TWO, (1, 1, 2)),  # one row: threads share units
        (replace(LSTM, batch=32), TWO, (1, 2, 1)),  # threads that share sequences exchange nothing
        (replace(LSTM, batch=32, steps=4), TWO, (1, 1, 2)),  # but weights that they packed
        (replace(LSTM, batch=32, steps=4, frozen=True), TWO, (1, 2, 1)),
        (replace(LSTM, batch=32, steps=4, hidden=16), TWO, (1, 2, 1)),  # no work for a meeting
        (replace(LSTM, recurrences=2), TWO, (2, 1, 1)),  # nor do threads that share directions
        (replace(LSTM, recurrences=2, batch=32), with_threads(8), (2, 4, 1)),
        (replace(LSTM, hidden=256), with_threads(8), (1, 1, 8)),
        (replace(LSTM, batch=3, hidden=256), with_threads(4), (1, 1, 4)),
        (replace(LSTM, hidden=24), with_threads(4), (1, 1, 1)),
        # No product with the state, but those that give the gradients.
        (replace(LSTM, batch=32, recurrent_gates=0, backward=True), TWO, (1, 2, 1)),
    ],
    ids=str,
)
def test_threads(problem: Problem, device: Device, expected: tuple[int, int, int]) -> None:
    plan = choose(problem, device)
    assert split(plan) == expected
    assert plan.cpu.threads <= device.cpu.threads


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize("recurrences", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 5, 64])
@pytest.mark.parametrize("hidden", [1, 16, 100, 1024])
@pytest.mark.parametrize("backward", [False, True])
def test_never_more_parts_than_there_are(
    threads: int, recurrences: int, batch: int, hidden: int, backward: bool
) -> None:
    problem = replace(LSTM, recurrences=recurrences, batch=batch, hidden=hidden, backward=backward)
    plan = choose(problem, with_threads(threads))
    assert plan.cpu.threads <= threads
    assert plan.cpu.split_recurrences <= recurrences
    assert plan.cpu.split_sequences <= batch
    assert plan.cpu.split_units <= -(-hidden // 16)


@pytest.mark.parametrize(
    ("steps", "batch", "hidden", "forward", "backward"),
    [
        (1, 8, 16, "unpacked", "unpacked"),
        (1, 9, 16, "panels", "unpacked"),
        (1, 128, 256, "panels", "unpacked"),
        (1, 144, 256, "panels", "prepacked"),
        (4, 2, 512, "unpacked", "unpacked"),
        (2, 5, 512, "prepacked", "unpacked"),
        (5, 1, 512, "prepacked", "prepacked"),  # each step reads the weights again
        (4, 8, 1024, "unpacked", "prepacked"),
        (2, 32, 1024, "panels", "prepacked"),
    ],
)
def test_few_rows_are_not_worth_packing(
    steps: int, batch: int, hidden: int, forward: str, backward: str
) -> None:
    problem = replace(LSTM, steps=steps, batch=batch, hidden=hidden)
    assert choose(problem, TWO).cpu.weights == forward
    assert choose(replace(problem, backward=True), TWO).cpu.weights == backward
    assert choose(replace(problem, frozen=True), TWO).cpu.weights == "prepacked"


@pytest.mark.parametrize(
    ("steps", "batch", "hidden", "inference", "training", "backward"),
    [
        (1, 4, 256, "unpacked", "unpacked", "unpacked"),
        (1, 5, 256, "panels", "panels", "unpacked"),
        (2, 4, 256, "prepacked", "prepacked", "unpacked"),
        (2, 4, 512, "prepacked", "unpacked", "unpacked"),
        (4, 4, 512, "prepacked", "prepacked", "prepacked"),
        (2, 4, 1024, "unpacked", "unpacked", "prepacked"),
        (1, 8, 1024, "panels", "panels", "prepacked"),
        (1, 32, 1024, "panels", "panels", "prepacked"),
        (4, 8, 1024, "prepacked", "prepacked", "prepacked"),
    ],
)
def test_narrow_vectors_have_room_for_fewer_rows(
    steps: int, batch: int, hidden: int, inference: str, training: str, backward: str
) -> None:
    avx2 = replace(TWO, cpu=replace(TWO.cpu, vector_bytes=32))
    problem = replace(LSTM, steps=steps, batch=batch, hidden=hidden)
    assert choose(problem, avx2).cpu.weights == inference
    assert choose(replace(problem, tape=True), avx2).cpu.weights == training
    assert choose(replace(problem, backward=True), avx2).cpu.weights == backward


@pytest.mark.parametrize(
    "format", [f for f, facts in FORMATS.items() if not facts.in_torchs_layout]
)
@pytest.mark.parametrize("steps", [1, 2, 4, 100])
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("hidden", [16, 256, 2048])
def test_a_format_without_a_kernel_for_torchs_layout_is_packed(
    format: str, steps: int, batch: int, hidden: int
) -> None:
    problem = replace(LSTM, steps=steps, batch=batch, hidden=hidden, format=format)
    assert choose(problem, TWO).cpu.weights in ("panels", "prepacked")
    assert choose(replace(problem, backward=True), TWO).cpu.weights == "prepacked"


@pytest.mark.parametrize(
    ("format", "hidden", "units"),
    [("float32", 64, 2), ("bfloat16", 64, 2), ("int8", 64, 1), ("int16", 64, 2), ("int8", 128, 2)],
)
def test_threads_share_units_where_the_products_of_the_format_pay(
    format: str, hidden: int, units: int
) -> None:
    problem = replace(LSTM, hidden=hidden, inputs=hidden, format=format, frozen=True)
    assert split(choose(problem, TWO)) == (1, 1, units)


def test_threads_share_units_where_each_would_read_all_weights() -> None:
    problem = replace(LSTM, steps=1, batch=64, hidden=256)
    assert choose(problem, TWO).cpu.split_units == 2
    assert choose(replace(problem, steps=100), TWO).cpu.split_sequences == 2
    few = replace(LSTM, steps=100, batch=4, hidden=1024, frozen=True)
    assert choose(few, TWO).cpu.split_units == 2
    assert choose(replace(few, batch=8), TWO).cpu.split_sequences == 2
    assert choose(replace(few, hidden=64), TWO).cpu.split_sequences == 2


@pytest.mark.parametrize(
    ("hidden", "rows"), [(64, 192), (128, 768), (256, 1536)]
)  # where both take as long, on two cores of a Zen 4
def test_threads_share_what_takes_fewer_bytes_between_cores(hidden: int, rows: int) -> None:
    problem = replace(LSTM, steps=64, inputs=hidden, hidden=hidden)
    for batch, units in ((rows // 64 - 1, 2), (2 * rows // 64 + 1, 1)):
        assert choose(replace(problem, batch=batch), TWO).cpu.split_units == units, batch
    contended = replace(TWO, cpu=replace(TWO.cpu, contended=True))
    many = replace(problem, batch=8, hidden=1024)
    assert split(choose(many, TWO)) == (1, 1, 2)
    assert split(choose(many, contended)) == (1, 2, 1)


@pytest.mark.parametrize("steps", [5, 16, 64])
@pytest.mark.parametrize("batch", [2, 8, 32])
@pytest.mark.parametrize("hidden", [32, 128, 512])
def test_both_passes_of_training_share_the_same(steps: int, batch: int, hidden: int) -> None:
    problem = replace(LSTM, steps=steps, batch=batch, inputs=hidden, hidden=hidden, tape=True)
    assert split(choose(problem, TWO)) == split(choose(replace(problem, backward=True), TWO))


@pytest.mark.parametrize("hidden", [1, 64, 512])
def test_a_chunk_stays_in_the_cache_whatever_the_length(hidden: int) -> None:
    for steps in (1, 10_000_000):
        problem = replace(LSTM, steps=steps, hidden=hidden)
        row = 4 * hidden * 4
        assert TWO.cpu.l2_bytes / 8 < choose(problem, TWO).chunk_rows * row <= TWO.cpu.l2_bytes / 4
        backward = choose(replace(problem, backward=True), TWO)
        assert backward.chunk_rows >= 384
        assert backward.chunk_rows * row <= max(TWO.cpu.l2_bytes, 384 * row)
        both = choose(replace(problem, backward=True, all_summed=False), TWO)
        assert both.chunk_rows == max(backward.chunk_rows // 2, 384)


def test_no_numbers_divide_by_zero() -> None:
    sizes: list[dict[str, Any]] = [
        {"steps": 0},
        {"batch": 0},
        {"inputs": 0},
        {"hidden": 0},
        {"rows": 0},
    ]
    for empty in sizes:
        for backward in (False, True):
            assert choose(replace(LSTM, backward=backward, **empty), TWO).chunk_rows >= 1


@pytest.mark.parametrize(
    ("problem", "device", "reason"),
    [
        (LSTM, replace(TWO, kind="cuda"), "on cuda"),
        (LSTM, Device(cpu=CpuFacts(compiled=False)), "no compiled code for cell 'lstm'"),
        (replace(LSTM, dtype="ComplexFloat"), TWO, "not ComplexFloat"),
        (replace(LSTM, cell="gru", projected=True, projectable=False), TWO, "'gru' reads state 0"),
    ],
)
def test_what_the_cpu_kernel_refuses(problem: Problem, device: Device, reason: str) -> None:
    plan = choose(problem, device)
    assert plan.kernel == "reference"
    (kernel, why), *others = plan.refused
    assert (kernel, *(name for name, _ in others)) == ("cpu", "cuda", "triton")
    assert reason in why
    with pytest.raises(KernelRefused, match=reason):
        choose(problem, replace(device, forced="cpu"))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 3, 32])
@pytest.mark.parametrize("recurrences", [1, 2])
@pytest.mark.parametrize("hidden", [64, 256, 1024])
def test_without_cores_for_all_no_threads_share_units(
    backward: bool, batch: int, recurrences: int, hidden: int
) -> None:
    problem = replace(
        LSTM, steps=500, batch=batch, hidden=hidden, recurrences=recurrences, backward=backward
    )
    device = with_threads(8)
    contended = replace(device, cpu=replace(device.cpu, contended=True))
    plan = choose(problem, contended)
    assert plan.cpu.split_units == 1
    assert plan.cpu.threads <= choose(problem, device).cpu.threads


def test_without_cores_for_all_long_calls_have_threads() -> None:
    contended = Device(cpu=CpuFacts(threads=2, vector_bytes=64, contended=True))
    short, long = (replace(LSTM, batch=32, hidden=hidden) for hidden in (64, 512))
    assert split(choose(short, contended)) == (1, 1, 1)
    assert split(choose(long, contended)) == (1, 2, 1)
    both_ways = replace(LSTM, recurrences=2)
    assert split(choose(both_ways, contended)) == (1, 1, 1)
    assert split(choose(replace(both_ways, steps=1000, hidden=512), contended)) == (2, 1, 1)


@pytest.mark.parametrize(
    ("recurrences", "batch", "hidden", "split"),
    [
        (1, 1, 256, (1, 1, 2)),
        (1, 1, 64, (1, 1, 1)),
        (1, 2, 256, (1, 1, 2)),
        (1, 2, 128, (1, 2, 1)),
        (1, 64, 256, (1, 2, 1)),
        (2, 1, 256, (2, 1, 1)),
        (2, 8, 256, (2, 1, 1)),
    ],
)
@pytest.mark.parametrize("backward", [False, True])
def test_threads_of_a_step_with_stages_share_units_in_whole_blocks(
    recurrences: int, batch: int, hidden: int, split: tuple[int, int, int], backward: bool
) -> None:
    problem = replace(
        LSTM, recurrences=recurrences, batch=batch, hidden=hidden, stages=2, backward=backward
    )
    config = choose(problem, TWO).cpu
    assert (config.split_recurrences, config.split_sequences, config.split_units) == split
    assert config.weights == "prepacked"
    assert choose(replace(problem, steps=1), TWO).cpu.weights == "prepacked"


def test_each_stage_needs_work_of_its_own_for_threads_to_share_units() -> None:
    """They meet once for each."""
    problem = replace(LSTM, steps=1000, batch=1, hidden=100, gates=1, states=1)
    assert split(choose(problem, TWO)) == (1, 1, 2)
    assert split(choose(replace(problem, stages=3), TWO)) == (1, 1, 1)


def test_an_output_without_units_is_not_projected_by_stages() -> None:
    problem = replace(LSTM, hidden=0, projected=True, stages=2)
    plan = choose(problem, TWO)
    assert plan.kernel == "reference" and "no hidden units" in dict(plan.refused)["cpu"]
