"""Plans of the CUDA kernels for any GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fastrnn.plan import (
    CudaConfig,
    CudaFacts,
    Device,
    KernelRefused,
    Plan,
    Problem,
    TritonFacts,
    choose,
)
from fastrnn.plan.cuda import row_group, steps_alike
from tests.support.tables import tables

FACTS = {
    "A100": CudaFacts(capability=80, multiprocessors=108, shared_bytes=163 << 10),
    "RTX 3090": CudaFacts(capability=86, multiprocessors=82, shared_bytes=99 << 10),
    "RTX 4090": CudaFacts(capability=89, multiprocessors=128, shared_bytes=99 << 10),
    "H200": CudaFacts(
        capability=90,
        multiprocessors=132,
        shared_bytes=227 << 10,
        clusters=((2, 66), (4, 32), (8, 15), (16, 6)),
    ),
    "B200": CudaFacts(
        capability=100,
        multiprocessors=148,
        shared_bytes=227 << 10,
        clusters=((2, 74), (4, 36), (8, 17), (16, 7)),
    ),
    "RTX 5090": CudaFacts(
        capability=120,
        multiprocessors=170,
        shared_bytes=99 << 10,
        clusters=((2, 85), (4, 42), (8, 20)),
    ),
    "tiny": CudaFacts(capability=87, multiprocessors=8, shared_bytes=99 << 10),
}


def with_cuda(facts: CudaFacts) -> Device:
    cells = ("rnn_tanh", "rnn_relu", "lstm", "gru")
    triton = TritonFacts(shared_bytes=facts.shared_bytes)
    return Device(kind="cuda", cuda=replace(facts, cells=cells, tables=tables()), triton=triton)


GPUS = {name: with_cuda(facts) for name, facts in FACTS.items()}
HOPPER = GPUS["H200"]
LONG = Problem("lstm", 512, 16, 256, 256, gates=4, states=2, dtype="bfloat16")


@pytest.mark.parametrize(
    ("problem", "device", "reason"),
    [
        (LONG, replace(HOPPER, cuda="there is no library"), "there is no library"),
        (LONG, replace(HOPPER, kind="mps"), "on NVIDIA's GPUs, the tensors are on mps"),
        (LONG, replace(HOPPER, kind="cpu"), "on NVIDIA's GPUs, the tensors are on cpu"),
        (
            replace(LONG, cell="mine-0"),
            HOPPER,
            "no code for cell 'mine-0'; triton runs custom cells",
        ),
        (replace(LONG, dtype="ComplexFloat"), HOPPER, "not ComplexFloat"),
        (replace(LONG, projected=True), HOPPER, "does not project the output"),
        (replace(LONG, every_step=True), HOPPER, "no gradients of the states of every step"),
        (replace(LONG, hidden=0), HOPPER, "no hidden units"),
        (
            LONG,
            with_cuda(CudaFacts(capability=75)),
            r"needs compute capability 8\.0, this GPU has 7\.5",
        ),
    ],
)
def test_what_the_cuda_kernel_refuses(problem: Problem, device: Device, reason: str) -> None:
    with pytest.raises(KernelRefused, match=reason):
        choose(problem, replace(device, forced="cuda"))
    assert choose(problem, device).kernel != "cuda"


def test_cuda_comes_before_triton_and_on_cpus_only_by_name() -> None:
    assert choose(LONG, HOPPER).kernel == "cuda"
    assert choose(replace(LONG, cell="mine-0"), HOPPER).kernel == "triton"
    here = replace(with_cuda(replace(FACTS["H200"], simulated=True)), kind="cpu")
    assert choose(LONG, here).kernel == "cpu"
    assert dict(choose(replace(LONG, dtype="ComplexFloat"), here).refused)["cuda"].endswith(
        "only when it is asked for by name"
    )
    assert choose(LONG, replace(here, forced="cuda")).kernel == "cuda"


@pytest.mark.parametrize(
    ("problem", "gpu", "residency"),
    [
        (replace(LONG, hidden=64), "H200", "block"),
        (replace(LONG, hidden=64), "RTX 3090", "block"),
        (LONG, "H200", "cluster"),
        (LONG, "A100", "grid"),  # this GPU has no clusters
        (replace(LONG, hidden=768), "H200", "grid"),
        (replace(LONG, batch=64, hidden=512), "H200", "cluster"),
        (replace(LONG, batch=64, hidden=1024), "H200", "grid"),
        (replace(LONG, batch=128, hidden=2048), "H200", "step"),  # more than the chip holds
        (replace(LONG, hidden=1024), "tiny", "step"),
        (replace(LONG, steps=2), "H200", "step"),  # done before the weights would be loaded
        (replace(LONG, dtype="float64"), "H200", "step"),
        (replace(LONG, batch=0), "H200", "step"),
        (replace(LONG, batch=256), "H200", "cluster"),  # groups run one after another
        (replace(LONG, batch=4096, hidden=1024), "H200", "step"),  # the product fills the GPU
    ],
    ids=str,
)
def test_where_cuda_keeps_the_weights(problem: Problem, gpu: str, residency: str) -> None:
    assert choose(problem, GPUS[gpu]).cuda.residency == residency


@pytest.mark.parametrize(
    ("dtype", "steps", "tf32", "precision"),
    [
        ("bfloat16", 512, True, "bfloat16"),
        ("float16", 1, True, "float16"),
        ("float64", 512, True, "float64"),
        ("float32", 512, True, "tf32"),
        ("float32", 512, False, "tf32x3"),
        ("float32", 1, True, "tf32"),
        ("float32", 1, False, "float32"),  # exact, because it needs no matrix units
    ],
)
def test_how_cuda_multiplies(dtype: str, steps: int, tf32: bool, precision: str) -> None:
    problem = replace(LONG, dtype=dtype, steps=steps)
    for backward in (False, True):
        chosen = choose(replace(problem, backward=backward), replace(HOPPER, tf32=tf32))
        assert chosen.cuda.precision == precision


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("gates", "recurrences"), [(1, 1), (3, 1), (4, 2), (4, 24)])
def test_what_must_run_at_once_does(gpu: str, dtype: str, gates: int, recurrences: int) -> None:
    cell = {1: "rnn_tanh", 3: "gru", 4: "lstm"}[gates]
    problem = replace(LONG, cell=cell, gates=gates, dtype=dtype, recurrences=recurrences)
    device, facts, seen = GPUS[gpu], FACTS[gpu], set()
    for hidden in (1, 8, 65, 128, 200, 384, 512, 1000, 1536, 4096):
        for batch in (1, 7, 9, 16, 33, 64, 500):
            for backward in (False, True):
                asked = replace(problem, hidden=hidden, batch=batch, backward=backward)
                plan = choose(asked, device)
                chosen = plan.cuda
                seen.add(chosen.residency)
                octets = -(-hidden // 8)
                if chosen.residency != "step":
                    assert chosen.batch_tile in (8, 16, 32)
                    assert chosen.blocks <= octets, "each has units"
                if chosen.residency == "grid":
                    assert 0 < chosen.groups * chosen.blocks <= facts.multiprocessors
                if chosen.residency == "cluster":
                    assert dict(facts.clusters)[chosen.blocks] > 0
                assert (chosen.blocks > 1) == (chosen.residency in ("grid", "cluster"))
                assert plan.chunk_rows >= 1
                longer = replace(asked, steps=100_000, rows=77, inputs=3, tape=True)
                assert choose(longer, device) == plan, "no length has a plan of its own"
    assert {"block", "step"} <= seen
    assert ("cluster" in seen) == bool(facts.clusters)


@pytest.mark.parametrize(
    ("batch", "hidden", "dtype", "tile"),
    [
        (1, 4096, "float32", 16),
        (16, 64, "float64", 16),
        (17, 4096, "float32", 32),
        (64, 256, "bfloat16", 16),  # with larger tiles most multiprocessors would have no block
        (128, 2048, "bfloat16", 64),
        (4096, 1024, "float32", 64),
        (4096, 1024, "float64", 32),
    ],
)
def test_tiles_of_a_launch_a_step(batch: int, hidden: int, dtype: str, tile: int) -> None:
    problem = replace(LONG, batch=batch, hidden=hidden, dtype=dtype, steps=1)
    for backward in (False, True):
        chosen = choose(replace(problem, backward=backward), HOPPER).cuda
        assert (chosen.residency, chosen.batch_tile) == ("step", tile)


@pytest.mark.parametrize("gpu", ["A100", "H200"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_calls_of_other_lengths_that_share_a_plan(batch: int, dtype: str, gpu: str) -> None:
    """And that are one chunk. Their inputs, tapes and packed rows make no difference."""
    device = with_cuda(FACTS[gpu])

    def plan(steps: int, **options: Any) -> Plan:
        problem = Problem("lstm", steps, batch, 8, 1024, 4, 2, dtype=dtype)
        return choose(replace(problem, **options), device)

    for steps in (1, 2, 3, 10):
        own = plan(steps)
        least, most = steps_alike(own, steps, batch)
        assert least <= steps <= most
        for other in {least, (least + most) // 2, most}:
            alike = plan(other, inputs=99, tape=True, rows=other)
            assert alike.config == own.config and alike.chunk_rows == own.chunk_rows
            assert alike.chunk_steps(other, batch) == other
        if most > 2:
            assert own.chunk_steps(most + 1, batch) <= most


def test_a_chunk_on_a_gpu_is_of_a_bounded_size() -> None:
    for hidden, recurrences in ((64, 1), (1024, 2), (4096, 8)):
        problem = replace(LONG, hidden=hidden, recurrences=recurrences)
        row = 4 * hidden * recurrences * 2
        assert (32 << 20) < choose(problem, HOPPER).chunk_rows * row <= (64 << 20)


@pytest.mark.parametrize(
    ("cell", "backward", "residency", "blocks", "hidden", "units"),
    [
        ("lstm", False, "block", 1, 64, 8),
        ("lstm", False, "block", 1, 65, 16),  # nine groups of 8 are more than there are warps
        ("gru", False, "grid", 5, 1000, 16),
        ("rnn_tanh", False, "block", 1, 200, 64),
        ("lstm", True, "cluster", 4, 256, 16),
        ("lstm", True, "grid", 4, 64, 16),
        ("lstm", True, "grid", 4, 65, 32),  # two groups of 16 would read the operand twice
        ("lstm", True, "grid", 2, 1000, 16),  # groups of 32 do not fit either
        ("rnn_tanh", True, "block", 1, 200, 64),
    ],
)
def test_units_of_a_row_group(
    cell: str, backward: bool, residency: str, blocks: int, hidden: int, units: int
) -> None:
    gates, states = {"lstm": (4, 2), "gru": (3, 1), "rnn_tanh": (1, 1)}[cell]
    problem = Problem(cell, 512, 8, 64, hidden, gates, states, backward=backward)
    config = CudaConfig(precision="bfloat16", residency=residency, batch_tile=8, blocks=blocks)
    assert row_group(problem, config, tables()) == units
