"""Plans of the Triton kernels for any GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastrnn.plan import CpuFacts, Device, KernelRefused, Problem, TritonFacts, choose
from fastrnn.plan.dtypes import BYTES
from tests.support.problems import LSTM


def with_triton(kind: str = "cuda", **facts: int) -> Device:
    return Device(kind=kind, triton=TritonFacts(**facts))  # type: ignore[arg-type]


H200 = with_triton(shared_bytes=227 << 10)
RTX = with_triton(shared_bytes=99 << 10)  # sm_86, sm_89, sm_120
MI300 = with_triton(shared_bytes=64 << 10)
INTERPRETED = with_triton("cpu", interpreted=True)
BF16 = replace(LSTM, dtype="bfloat16", batch=64)


@pytest.mark.parametrize(
    ("problem", "device", "reason"),
    [
        (BF16, replace(H200, triton="Triton is not installed"), "not installed"),
        (BF16, replace(H200, kind="mps"), "on GPUs, the tensors are on mps"),
        (BF16, replace(H200, kind="cpu"), "on GPUs, the tensors are on cpu"),
        (replace(BF16, dtype="ComplexFloat"), H200, "not ComplexFloat"),
        (replace(BF16, projected=True, projectable=False), H200, "reads state 0 unit by unit"),
        (BF16, INTERPRETED, "bfloat16 wrongly"),
    ],
)
def test_what_the_triton_kernel_refuses(problem: Problem, device: Device, reason: str) -> None:
    with pytest.raises(KernelRefused, match=reason):
        choose(problem, replace(device, forced="triton"))
    assert choose(problem, replace(device, forced=None)).kernel != "triton"


def test_triton_on_gpus_and_in_its_interpreter_only_by_name() -> None:
    assert choose(BF16, H200).kernel == "triton"
    assert choose(BF16, replace(H200, kind="xpu")).kernel == "triton"
    assert choose(LSTM, INTERPRETED).kernel == "cpu"
    complex_numbers = replace(LSTM, dtype="ComplexFloat")
    assert choose(complex_numbers, INTERPRETED).kernel == "reference"
    for compiled in (False, True):  # `compiled` is about CPUs
        cpu = CpuFacts(compiled=compiled)
        mine = replace(INTERPRETED, cpu=cpu, forced="triton")
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
        (replace(LSTM, batch=64), H200, False),  # the parts of TF32 leave too few registers
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
        assert choose(replace(problem, backward=backward), device).triton.resident is resident


def test_what_is_no_reason_to_refuse() -> None:
    for problem in (
        replace(BF16, draws=2),
        replace(BF16, stages=3),
        replace(BF16, stages=3, projected=True),
        replace(BF16, reset_states=True),
        replace(BF16, backward=True, every_step=True),
    ):
        assert choose(problem, H200).kernel == "triton"


def test_what_a_step_holds_takes_registers() -> None:
    for problem in (
        replace(BF16, hidden=128),
        replace(LSTM, dtype="float64"),  # of one row
        replace(LSTM, hidden=32, batch=64),
        replace(LSTM, hidden=16, batch=64),
    ):
        assert choose(problem, H200).triton.resident
        assert not choose(replace(problem, values=50), H200).triton.resident
    for hidden in (16, 32):
        many = replace(LSTM, hidden=hidden, batch=64, states=4, backward=True)
        assert not choose(many, H200).triton.resident


def test_gradients_of_both_parts_of_a_gate_take_registers() -> None:
    problem = replace(LSTM, hidden=32, batch=64, gates=5, backward=True)
    assert choose(problem, H200).triton.resident
    assert not choose(replace(problem, all_summed=False), H200).triton.resident
    assert choose(replace(problem, all_summed=False, backward=False), H200).triton.resident


def test_many_values_get_smaller_tiles() -> None:
    problem = replace(LSTM, hidden=512, batch=64, backward=True)
    assert choose(problem, H200).triton.depth_tile == 32
    for held in (replace(problem, states=4), replace(problem, values=6)):
        assert choose(held, H200).triton.depth_tile == 16
        assert choose(held, H200).triton.stages == 2
        bf16 = replace(held, dtype="bfloat16")
        assert choose(bf16, H200).triton.depth_tile == 32
    bf16 = replace(problem, dtype="bfloat16")
    assert choose(bf16, H200).triton.depth_tile == 64
    many = replace(problem, values=13)
    for held in (many, replace(many, stages=3)):
        assert choose(held, H200).triton.stages == 1
        bf16 = replace(held, dtype="bfloat16")
        assert choose(bf16, H200).triton.stages == 2
        amd = with_triton(shared_bytes=227 << 10, nvidia=False)
        assert choose(bf16, amd).triton.stages == 4


def test_few_units_take_as_many_registers_as_a_product_of_tiles() -> None:
    for hidden in (16, 32):
        problem = replace(BF16, hidden=hidden, backward=True)
        assert choose(replace(problem, values=20), H200).triton.resident
        assert not choose(replace(problem, values=21), H200).triton.resident


def test_given_states_and_gradients_of_every_step_take_registers() -> None:
    problem = replace(LSTM, hidden=16, batch=64, backward=True, states=4, gates=5)
    tf32 = replace(H200, tf32=True)
    assert choose(problem, tf32).triton.resident
    for one in (replace(problem, reset_states=True), replace(problem, every_step=True)):
        assert choose(one, tf32).triton.resident
    both = replace(problem, reset_states=True, every_step=True)
    assert not choose(both, tf32).triton.resident
    assert choose(replace(both, backward=False), tf32).triton.resident


def test_steps_of_few_values_have_room_for_addresses_in_half_the_registers() -> None:
    problem = replace(BF16, hidden=128, backward=True, gates=1, states=1)  # 7 values
    more = replace(problem, values=2)
    assert choose(replace(problem, reset_states=True), H200).triton.resident
    assert choose(more, H200).triton.resident
    assert not choose(replace(more, reset_states=True), H200).triton.resident
    assert choose(replace(more, reset_states=True, backward=False), H200).triton.resident
    assert choose(replace(more, reset_states=True, hidden=64), H200).triton.resident
    assert choose(replace(problem, hidden=256), H200).triton.resident
    assert not choose(replace(more, hidden=256), H200).triton.resident


def test_stages_get_smaller_tiles() -> None:
    """What crosses between stages, and sums of units, take registers too."""
    problem = replace(BF16, hidden=512, stages=3, values=19)
    for device in (H200, RTX, MI300):
        tiles, others = (choose(p, device).triton for p in (problem, replace(problem, stages=1)))
        assert not tiles.resident
        assert tiles.depth_tile == 32 <= others.depth_tile
    # AMD's compiler needs twice as many registers for a resident step.
    dropout = replace(BF16, backward=True, stages=2, values=3)
    amd = Device(kind="cuda", triton=TritonFacts(False, shared_bytes=64 << 10, warp=64))
    assert choose(dropout, H200).triton.resident
    assert not choose(dropout, amd).triton.resident
    assert choose(replace(dropout, stages=1), amd).triton.resident


@pytest.mark.parametrize("device", [H200, RTX, MI300], ids=["H200", "RTX", "MI300"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("hidden", [1, 5, 64, 100, 1000, 4096])
@pytest.mark.parametrize("gates", [1, 3, 4, 16])
def test_tiles_of_triton(device: Device, dtype: str, hidden: int, gates: int) -> None:
    size = BYTES[dtype]
    assert isinstance(device.triton, TritonFacts)
    problem = replace(LSTM, dtype=dtype, hidden=hidden, gates=gates)
    for backward in (False, True):
        kinds = set()
        for batch in (1, 2, 3, 16, 17, 1000):
            for steps in (1, 7, 10_000_000):
                changed = replace(problem, batch=batch, steps=steps, backward=backward)
                plan = choose(changed, device)
                kinds.add(plan)
                chosen = plan.triton
                tile = (chosen.unit_tile, chosen.depth_tile)
                assert all(t >= 16 and t & (t - 1) == 0 for t in tile)
                if chosen.matrix_units:
                    weights = gates * tile[0] * tile[1] * size * max(1, chosen.stages - 1)
                    assert chosen.batch_tile >= 16
                    assert weights <= device.triton.shared_bytes
                if chosen.resident:
                    assert tile[0] == tile[1] >= hidden
        assert len(kinds) <= 2  # one row, or several: no kernel is compiled for one length or batch
