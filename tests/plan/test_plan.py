"""Decisions about any machine, made on this one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastrnn.plan import Device, KernelRefused, Plan, Problem, choose
from fastrnn.plan.dtypes import BYTES

LSTM = Problem("lstm", steps=100, batch=1, inputs=64, hidden=64, gates=4, states=2)
TWO = Device(threads=2, vector_bytes=64)


def split(plan: Plan) -> tuple[int, int, int]:
    return plan.split_lanes, plan.split_slots, plan.split_units


@pytest.mark.parametrize(
    ("problem", "device", "expected"),
    [
        (LSTM, replace(TWO, threads=1), (1, 1, 1)),
        (replace(LSTM, steps=1), TWO, (1, 1, 1)),  # not worth a thread
        (LSTM, TWO, (1, 1, 2)),  # one row: units
        (replace(LSTM, batch=32), TWO, (1, 2, 1)),  # slots need no exchange
        (replace(LSTM, lanes=2), TWO, (2, 1, 1)),  # nor do directions
        (replace(LSTM, lanes=2, batch=32), replace(TWO, threads=8), (2, 4, 1)),
        (replace(LSTM, hidden=256), replace(TWO, threads=8), (1, 1, 8)),
        (replace(LSTM, batch=3, hidden=256), replace(TWO, threads=4), (1, 1, 4)),
        (replace(LSTM, hidden=24), replace(TWO, threads=4), (1, 1, 1)),
    ],
    ids=str,
)
def test_threads(problem: Problem, device: Device, expected: tuple[int, int, int]) -> None:
    plan = choose(problem, device)
    assert split(plan) == expected
    assert plan.threads <= device.threads


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 5, 64])
@pytest.mark.parametrize("hidden", [1, 16, 100, 1024])
@pytest.mark.parametrize("backward", [False, True])
def test_never_more_parts_than_there_are(
    threads: int, lanes: int, batch: int, hidden: int, backward: bool
) -> None:
    problem = replace(LSTM, lanes=lanes, batch=batch, hidden=hidden, backward=backward)
    plan = choose(problem, replace(TWO, threads=threads))
    assert plan.threads <= threads
    assert plan.split_lanes <= lanes
    assert plan.split_slots <= batch
    assert plan.split_units <= -(-hidden // 16)


def test_few_rows_are_not_worth_packing() -> None:
    assert not choose(replace(LSTM, steps=1), TWO).packed_weights
    assert choose(LSTM, TWO).packed_weights
    assert choose(replace(LSTM, steps=1, frozen=True), TWO).packed_weights


@pytest.mark.parametrize("hidden", [1, 64, 512])
def test_a_chunk_stays_in_the_cache_whatever_the_length(hidden: int) -> None:
    for steps in (1, 10_000_000):
        problem = replace(LSTM, steps=steps, hidden=hidden)
        row = 4 * hidden * 4
        assert TWO.l2_bytes / 8 < choose(problem, TWO).chunk_rows * row <= TWO.l2_bytes / 4
        backward = choose(replace(problem, backward=True), TWO)
        assert backward.chunk_rows >= 512
        assert backward.chunk_rows * row <= max(TWO.l2_bytes, 512 * row)


def test_no_numbers_divide_by_zero() -> None:
    for empty in ({"steps": 0}, {"batch": 0}, {"inputs": 0}, {"hidden": 0}, {"rows": 0}):
        for backward in (False, True):
            assert choose(replace(LSTM, backward=backward, **empty), TWO).chunk_rows >= 1


@pytest.mark.parametrize(
    ("problem", "device", "reason"),
    [
        (LSTM, replace(TWO, kind="cuda"), "on cuda"),
        (LSTM, replace(TWO, compiled=False), "no compiled code for cell 'lstm'"),
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


def test_a_kernel_asked_for_by_name_is_used_or_named_wrong() -> None:
    assert choose(LSTM, replace(TWO, forced="reference")).kernel == "reference"
    with pytest.raises(
        ValueError, match=r"no kernel named 'gpu'; there are: cpu, cuda, triton, reference"
    ):
        choose(LSTM, replace(TWO, forced="gpu"))


H200 = Device(kind="cuda", triton=None, shared_bytes=227 << 10)
RTX = replace(H200, shared_bytes=99 << 10)  # sm_86, sm_89, sm_120
MI300 = replace(H200, shared_bytes=64 << 10)
BF16 = replace(LSTM, dtype="bfloat16", batch=64)


@pytest.mark.parametrize(
    ("problem", "device", "reason"),
    [
        (BF16, replace(H200, triton="Triton is not installed"), "not installed"),
        (BF16, replace(H200, kind="mps"), "on GPUs, the tensors are on mps"),
        (BF16, replace(H200, kind="cpu"), "on GPUs, the tensors are on cpu"),
        (replace(BF16, dtype="ComplexFloat"), H200, "not ComplexFloat"),
        (replace(BF16, projected=True, projectable=False), H200, "reads state 0 unit by unit"),
        (BF16, replace(H200, kind="cpu", interpreted=True, forced="triton"), "bfloat16 wrongly"),
    ],
)
def test_what_the_triton_kernel_refuses(problem: Problem, device: Device, reason: str) -> None:
    with pytest.raises(KernelRefused, match=reason):
        choose(problem, replace(device, forced="triton"))
    assert choose(problem, replace(device, forced=None)).kernel != "triton"


def test_triton_on_gpus_and_in_its_interpreter_only_by_name() -> None:
    assert choose(BF16, H200).kernel == "triton"
    assert choose(BF16, replace(H200, kind="xpu")).kernel == "triton"
    here = replace(H200, kind="cpu", interpreted=True)
    assert choose(LSTM, here).kernel == "cpu"
    complex_numbers = replace(LSTM, dtype="ComplexFloat")
    assert choose(complex_numbers, here).kernel == "reference"
    for compiled in (False, True):  # for CPUs: Triton needs none of that
        mine = replace(here, compiled=compiled, forced="triton")
        assert choose(LSTM, mine).kernel == "triton"


@pytest.mark.parametrize(
    ("problem", "device", "resident"),
    [
        (BF16, MI300, True),  # 32 KB of weights
        (replace(BF16, hidden=128), H200, True),  # 128 KB
        (replace(BF16, hidden=128), RTX, False),
        (replace(BF16, hidden=256, gates=1, states=1), H200, True),  # 128 KB
        (replace(BF16, hidden=256), H200, False),
        (replace(LSTM, batch=64), replace(H200, tf32=True), True),
        (replace(LSTM, batch=64), H200, False),  # its parts leave too few registers
        (replace(LSTM, batch=64, hidden=128), H200, False),
        (replace(LSTM, hidden=64), MI300, True),  # one row: in registers
        (replace(LSTM, hidden=32, dtype="float64"), H200, True),
        (replace(LSTM, hidden=100, dtype="float64"), H200, False),
    ],
    ids=str,
)
def test_weights_are_resident_where_they_fit(
    problem: Problem, device: Device, resident: bool
) -> None:
    for backward in (False, True):
        assert choose(replace(problem, backward=backward), device).resident is resident


@pytest.mark.parametrize("device", [H200, RTX, MI300], ids=["H200", "RTX", "MI300"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("hidden", [1, 5, 64, 100, 1000, 4096])
@pytest.mark.parametrize("gates", [1, 3, 4, 16])
def test_tiles_of_triton(device: Device, dtype: str, hidden: int, gates: int) -> None:
    size = BYTES[dtype]
    problem = replace(LSTM, dtype=dtype, hidden=hidden, gates=gates)
    for backward in (False, True):
        kinds = set()
        for batch in (1, 2, 3, 16, 17, 1000):
            for steps in (1, 7, 10_000_000):
                changed = replace(problem, batch=batch, steps=steps, backward=backward)
                chosen = choose(changed, device)
                kinds.add(chosen)
                tile = (chosen.unit_tile, chosen.depth_tile)
                assert all(t >= 16 and t & (t - 1) == 0 for t in tile)
                if chosen.matrix_units:
                    weights = gates * tile[0] * tile[1] * size * max(1, chosen.stages - 1)
                    assert chosen.batch_tile >= 16
                    assert weights <= device.shared_bytes
                if chosen.resident:
                    assert tile[0] == tile[1] >= hidden
        assert len(kinds) <= 2  # one row, or several: nothing is compiled for a length or a batch


HOPPER = Device(
    kind="cuda",
    triton=None,
    cuda=None,
    cuda_cells=("rnn_tanh", "rnn_relu", "lstm", "gru"),
    shared_bytes=227 << 10,
    capability=90,
    multiprocessors=132,
    clusters=((2, 66), (4, 32), (8, 15), (16, 6)),
)
AMPERE = replace(HOPPER, capability=80, multiprocessors=108, shared_bytes=163 << 10, clusters=())
GPUS = {
    "A100": AMPERE,
    "RTX 3090": replace(AMPERE, capability=86, multiprocessors=82, shared_bytes=99 << 10),
    "RTX 4090": replace(AMPERE, capability=89, multiprocessors=128, shared_bytes=99 << 10),
    "H200": HOPPER,
    "B200": replace(
        HOPPER, capability=100, multiprocessors=148, clusters=((2, 74), (4, 36), (8, 17), (16, 7))
    ),
    "RTX 5090": replace(
        HOPPER,
        capability=120,
        multiprocessors=170,
        shared_bytes=99 << 10,
        clusters=((2, 85), (4, 42), (8, 20)),
    ),
    "tiny": replace(AMPERE, capability=87, multiprocessors=8, shared_bytes=99 << 10),
}
LONG = Problem("lstm", 512, 16, 256, 256, gates=4, states=2, dtype="bfloat16")


@pytest.mark.parametrize(
    ("problem", "device", "reason"),
    [
        (LONG, replace(HOPPER, cuda="there is no library"), "there is no library"),
        (LONG, replace(HOPPER, kind="mps"), "on NVIDIA's GPUs, the tensors are on mps"),
        (LONG, replace(HOPPER, kind="cpu"), "on NVIDIA's GPUs, the tensors are on cpu"),
        (replace(LONG, cell="mine-0"), HOPPER, "no code for cell 'mine-0'; triton runs cells of"),
        (replace(LONG, dtype="ComplexFloat"), HOPPER, "not ComplexFloat"),
        (replace(LONG, projected=True), HOPPER, "does not project the output"),
        (replace(LONG, hidden=0), HOPPER, "no hidden units"),
        (replace(LONG, lanes=65), HOPPER, "64 scans side by side at most, not 65"),
        (LONG, replace(HOPPER, capability=75), r"needs compute capability 8\.0, this GPU has 7\.5"),
    ],
)
def test_what_the_cuda_kernel_refuses(problem: Problem, device: Device, reason: str) -> None:
    with pytest.raises(KernelRefused, match=reason):
        choose(problem, replace(device, forced="cuda"))
    assert choose(problem, device).kernel != "cuda"


def test_cuda_comes_before_triton_and_on_cpus_only_by_name() -> None:
    assert choose(LONG, HOPPER).kernel == "cuda"
    assert choose(replace(LONG, cell="mine-0"), HOPPER).kernel == "triton"
    here = replace(HOPPER, kind="cpu", simulated=True)
    assert choose(LONG, here).kernel == "cpu"
    assert dict(choose(replace(LONG, dtype="ComplexFloat"), here).refused)["cuda"].endswith(
        "only when it is asked for by name"
    )
    assert choose(LONG, replace(here, forced="cuda")).kernel == "cuda"


@pytest.mark.parametrize(
    ("problem", "gpu", "regime"),
    [
        (replace(LONG, hidden=64), "H200", "block"),
        (replace(LONG, hidden=64), "RTX 3090", "block"),
        (LONG, "H200", "cluster"),
        (LONG, "A100", "grid"),  # which has no clusters
        (replace(LONG, hidden=768), "H200", "grid"),
        (replace(LONG, batch=64, hidden=512), "H200", "cluster"),
        (replace(LONG, batch=64, hidden=1024), "H200", "grid"),
        (replace(LONG, batch=128, hidden=2048), "H200", "step"),  # more than the chip holds
        (replace(LONG, hidden=1024), "tiny", "step"),
        (replace(LONG, steps=2), "H200", "step"),  # over before weights are loaded
        (replace(LONG, dtype="float64"), "H200", "step"),
        (replace(LONG, batch=0), "H200", "step"),
        (replace(LONG, batch=256), "H200", "cluster"),  # several one after another
        (replace(LONG, batch=4096, hidden=1024), "H200", "step"),  # a product that fills the chip
    ],
    ids=str,
)
def test_where_cuda_keeps_the_weights(problem: Problem, gpu: str, regime: str) -> None:
    assert choose(problem, GPUS[gpu]).regime == regime


@pytest.mark.parametrize(
    ("dtype", "steps", "tf32", "number"),
    [
        ("bfloat16", 512, True, "bfloat16"),
        ("float16", 1, True, "float16"),
        ("float64", 512, True, "float64"),
        ("float32", 512, True, "tf32"),
        ("float32", 512, False, "tf32x3"),
        ("float32", 1, True, "tf32"),
        ("float32", 1, False, "float32"),  # exact, without matrix units
    ],
)
def test_how_cuda_multiplies(dtype: str, steps: int, tf32: bool, number: str) -> None:
    problem = replace(LONG, dtype=dtype, steps=steps)
    for backward in (False, True):
        chosen = choose(replace(problem, backward=backward), replace(HOPPER, tf32=tf32))
        assert chosen.number == number


@pytest.mark.parametrize("device", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("gates", "lanes"), [(1, 1), (3, 1), (4, 2), (4, 24)])
def test_what_must_run_at_once_does(device: Device, dtype: str, gates: int, lanes: int) -> None:
    cell = {1: "rnn_tanh", 3: "gru", 4: "lstm"}[gates]
    problem = replace(LONG, cell=cell, gates=gates, dtype=dtype, lanes=lanes)
    seen = set()
    for hidden in (1, 8, 65, 128, 200, 384, 512, 1000, 1536, 4096):
        for batch in (1, 7, 9, 16, 33, 64, 500):
            for backward in (False, True):
                asked = replace(problem, hidden=hidden, batch=batch, backward=backward)
                chosen = choose(asked, device)
                seen.add(chosen.regime)
                octets = -(-hidden // 8)
                if chosen.regime != "step":
                    assert chosen.batch_tile in (8, 16, 32)
                    assert chosen.blocks <= octets, "each has units"
                if chosen.regime == "grid":
                    assert 0 < chosen.groups * chosen.blocks <= device.multiprocessors
                if chosen.regime == "cluster":
                    assert dict(device.clusters)[chosen.blocks] > 0
                assert (chosen.blocks > 1) == (chosen.regime in ("grid", "cluster"))
                assert chosen.chunk_rows >= 1
                longer = replace(asked, steps=100_000, rows=77, inputs=3, tape=True)
                assert choose(longer, device) == chosen, "no length has a plan of its own"
    assert {"block", "step"} <= seen
    assert ("cluster" in seen) == bool(device.clusters)


@pytest.mark.parametrize(
    ("batch", "hidden", "dtype", "tile"),
    [
        (1, 4096, "float32", 16),
        (16, 64, "float64", 16),
        (17, 4096, "float32", 32),
        (64, 256, "bfloat16", 16),  # larger tiles would leave most multiprocessors without a block
        (128, 2048, "bfloat16", 64),
        (4096, 1024, "float32", 64),
        (4096, 1024, "float64", 32),
    ],
)
def test_tiles_of_a_launch_a_step(batch: int, hidden: int, dtype: str, tile: int) -> None:
    problem = replace(LONG, batch=batch, hidden=hidden, dtype=dtype, steps=1)
    for backward in (False, True):
        chosen = choose(replace(problem, backward=backward), HOPPER)
        assert (chosen.regime, chosen.batch_tile) == ("step", tile)


def test_a_chunk_on_a_gpu_is_of_a_bounded_size() -> None:
    for hidden, lanes in ((64, 1), (1024, 2), (4096, 8)):
        problem = replace(LONG, hidden=hidden, lanes=lanes)
        row = 4 * hidden * lanes * 2
        assert (32 << 20) < choose(problem, HOPPER).chunk_rows * row <= (64 << 20)
