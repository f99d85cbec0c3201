"""The workloads of the suite and their targets: data and nothing else.

To add one, append it to `WORKLOADS`; `quick=True` puts it into `make bench`.
"""

from __future__ import annotations

from typing import Any

from fastrnn.tools.bench import formats
from fastrnn.tools.bench.workload import (
    BEST_BASELINE,
    MICROSECONDS,
    PEAK,
    Target,
    Variant,
    Workload,
)

__all__ = ["FORMATS", "GPU", "SMOKE", "WORKLOADS"]

ONE_THREAD = "fastrnn, 1 thread"


def ratios(
    inference: tuple[float, float, float] | None = None,
    training: tuple[float, float, float] | None = None,
) -> tuple[Target, ...]:
    """Speed-ups of LSTM, GRU and RNN: inference over the best baseline, training over torch.nn."""
    targets = []
    if inference:
        targets.append(Target("inference", BEST_BASELINE, *inference))
    if training:
        targets.append(Target("training", "torch.nn", *training))
    return tuple(targets)


TWO_THREADS = tuple(Target.all(m, ONE_THREAD, 1.7) for m in ("inference", "training"))
AT_THE_PEAK = (Target.all("inference", PEAK, 0.95),)

STREAMING = (
    Workload(
        "stream-64",
        *(1, 1, 64, 64),
        "one step at a time: a small model on live audio or sensors",
        modes=("step",),
        group="streaming",
        quick=True,
        targets=(Target.all("step", "ONNX Runtime", 5),),
    ),
    Workload(
        "stream-256",
        *(1, 1, 256, 256),
        "one step at a time: a large model on live audio",
        modes=("step",),
        group="streaming",
        quick=True,
        targets=(Target("step", "ONNX Runtime", 2, 2, 3),),
    ),
)

SEQUENCES = (
    Workload(
        "one-row-64",
        *(100, 1, 64, 64),
        "a short sequence, batch 1",
        quick=True,
        compiled_loop=True,
        targets=ratios((2.3, 3.5, 2.3), (4, 60, 33)),
    ),
    Workload(
        "one-row-256",
        *(100, 1, 256, 256),
        "a short sequence, batch 1, weights as large as a core's cache",
        quick=True,
        targets=ratios((1.8, 2.1, 3.4), (2.8, 20, 17)),
    ),
    Workload(
        "one-row-512",
        *(200, 1, 512, 512),
        "batch 1, weights larger than a core's cache",
        quick=True,
        targets=ratios((1.5, 1.7, 3), (1.5, 5.5, 10)),
    ),
    Workload(
        "long-row-128",
        *(1000, 1, 128, 128),
        "a long sequence, batch 1",
        quick=True,
        targets=ratios((2.6, 2.8, 2.7), (2.6, 48, 58)),
    ),
)

BATCHES = (
    Workload(
        "batch-128",
        *(128, 32, 128, 128),
        "a batch of sequences, small layer",
        quick=True,
        compiled_loop=True,
        targets=ratios((1.35, 1.9, 2.4), (1.35, 4.2, 5)),
    ),
    Workload(
        "language-model",
        *(128, 32, 512, 512),
        "a layer of a language model: bound by matrix products",
        targets=(*ratios((1.03, 1.06, 1.3), (1.15, 1.8, 1.8)), *AT_THE_PEAK),
    ),
    Workload(
        "long-batch-256",
        *(512, 16, 256, 256),
        "long sequences in a batch",
        targets=(*ratios((1.03, 1.06, 1.3), (1.15, 1.8, 1.8)), *AT_THE_PEAK),
    ),
    Workload(
        "wide-1024",
        *(64, 128, 1024, 1024),
        "a wide layer and a large batch: matrix products and nothing else",
        modes=("inference",),
        targets=(*ratios((1, 1, 1)), *AT_THE_PEAK),
    ),
    Workload(
        "forecasting",
        *(50, 64, 10, 64),
        "few features, two small layers",
        layers=2,
        quick=True,
        targets=(*ratios((1.5, 2, 2), (1.6, 3.5, 3)), *TWO_THREADS),
    ),
    Workload(
        "speech",
        *(100, 32, 80, 256),
        "a bidirectional stack over filter banks",
        layers=2,
        bidirectional=True,
        quick=True,
        targets=(*ratios((1.1, 1.2, 1.5), (1.2, 2.2, 2.2)), *TWO_THREADS),
    ),
    Workload(
        "speech-one-row",
        *(100, 1, 80, 256),
        "the same stack on one utterance: two directions for two threads",
        layers=2,
        bidirectional=True,
        targets=TWO_THREADS,
    ),
    Workload(
        "rl-rollout",
        *(64, 16, 64, 128),
        "rollouts of 16 environments",
        quick=True,
    ),
)

# Lengths like those of sentences: many short, few long.
LENGTHS: tuple[int, ...] = (120, 91, 83, 74, 66, 60, 55, 50, 46, 43, 40, 37, 34, 32, 30, 28)
LENGTHS += (26, 24, 22, 21, 19, 18, 16, 15, 14, 12, 11, 10, 8, 7, 5, 3)
MEAN_LENGTH = sum(LENGTHS) // len(LENGTHS)

PACKED = (
    Workload(
        "packed",
        *(LENGTHS[0], len(LENGTHS), 128, 256),
        f"32 sentences of 3 to 120 steps as a packed sequence, {sum(LENGTHS)} rows",
        lengths=LENGTHS,
        group="packed",
        quick=True,
        variants=(Variant("fastrnn, dense", {"lengths": (), "steps": MEAN_LENGTH}),),
        targets=tuple(Target.all(m, "fastrnn, dense", 1 / 1.1) for m in ("inference", "training")),
    ),
)


def half(dtype: str) -> Workload:
    """A 16-bit dtype, which must not be slower than float32."""
    return Workload(
        dtype,
        *(128, 32, 128, 128),
        f"batch-128 in {dtype}",
        dtype=dtype,
        group="checks",
        baselines=("torch.nn",),
        variants=(Variant("fastrnn, float32", {"dtype": "float32"}),),
        targets=tuple(Target.all(m, "fastrnn, float32", 1) for m in ("inference", "training")),
    )


CHECKS = (
    Workload(
        "cell-call",
        *(1, 1, 64, 64),
        "one call of a cell: what calling costs",
        modes=("cell",),
        group="checks",
        quick=True,
        targets=(Target("cell", MICROSECONDS, 12, None, None),),
    ),
    Workload(
        "tiny-training",
        *(2, 1, 2, 2),
        "two steps of two units, forward and backward: what calling costs",
        modes=("training",),
        group="checks",
        quick=True,
        baselines=("torch.nn",),
        targets=(Target("training", MICROSECONDS, 40, None, None),),
    ),
    half("bfloat16"),
    half("float16"),
    Workload(
        "denormal",
        *(100, 4, 128, 128),
        "inputs so small that every state is a denormal number: they must cost nothing",
        input_scale=1e-39,
        group="checks",
        quick=True,
        baselines=("torch.nn",),
        variants=(Variant("fastrnn, usual numbers", {"input_scale": 1.0}),),
        targets=tuple(
            Target.all(m, "fastrnn, usual numbers", 0.95) for m in ("inference", "training")
        ),
    ),
    Workload(
        "odd-row",
        *(100, 33, 128, 128),
        "33 batch rows: the odd one may cost no more than its share",
        group="checks",
        quick=True,
        baselines=("torch.nn",),
        variants=(Variant("fastrnn, 32 rows", {"batch": 32}),),
        targets=tuple(
            Target.all(m, "fastrnn, 32 rows", 32 / 33) for m in ("inference", "training")
        ),
    ),
)

LINEAR = Workload(
    "linear-in-time",
    *(4096, 1, 64, 64),
    "4096 steps beside 1024: the cost must grow linearly",
    group="checks",
    quick=True,
    baselines=("torch.nn",),
    variants=(Variant("fastrnn, 1024 steps", {"steps": 1024}),),
    targets=tuple(
        Target.all(m, "fastrnn, 1024 steps", 0.95 / 4) for m in ("inference", "training")
    ),
)

# Each of these baselines is the nearest to ours at some point of each line.
PLOTTED = ("torch.nn", "ONNX Runtime")

SWEEPS = (
    *(
        Workload(
            f"hidden-{n}",
            *(100, 1, n, n),
            "over H: 100 steps, batch 1",
            group="over H",
            baselines=PLOTTED,
        )
        for n in (16, 32, 64, 128, 256, 512, 1024)
    ),
    *(
        Workload(
            f"rows-{n}",
            *(100, n, 128, 128),
            "over B: 100 steps, H = 128",
            group="over B",
            baselines=PLOTTED,
        )
        for n in (1, 2, 4, 8, 16, 32, 64, 128)
    ),
    *(
        Workload(
            f"steps-{n}",
            *(n, 1, 64, 64),
            "over T: batch 1, H = 64; the cost must grow linearly",
            group="over T",
            baselines=PLOTTED,
        )
        for n in (16, 64, 256, 1024, 4096)
    ),
)

WORKLOADS = (*STREAMING, *SEQUENCES, *BATCHES, *PACKED, *CHECKS, LINEAR, *SWEEPS)


def of_formats(
    steps: int, batch: int, hidden: int, int8: float | None, *, quick: bool = False
) -> Workload:
    """One shape in int8 and bfloat16, or single steps of it. `int8` is the speed-up over float32
    that is the target of int8; that of bfloat16 begins where weights fill a core's cache."""
    mode = "step" if steps == 1 else "inference"
    ours, other = formats.name("int8"), formats.name("bfloat16")
    targets = [
        Target(mode, "ONNX Runtime int8", 1.1, None, None, of=ours),
        Target(mode, BEST_BASELINE, None, 1.4, None, of=ours),
        Target.all(mode, "torch.nn bfloat16", 0.95, of=other),
        Target.all(mode, "OpenVINO bfloat16", 0.95, of=other),
    ]
    if int8 is not None:
        targets.append(Target.all(mode, formats.FLOAT32, int8, of=ours))
    if hidden >= 256:
        targets.append(Target.all(mode, formats.FLOAT32, 1.8, of=other))
    return Workload(
        f"formats-{steps}x{batch}x{hidden}",
        *(steps, batch, hidden, hidden),
        "int8 and bfloat16 beside float32",
        modes=(mode,),
        cells=("lstm", "gru"),
        group="low precision",
        quick=quick,
        targets=tuple(targets),
    )


def trained(steps: int, batch: int, hidden: int, bound: float) -> Workload:
    """Training in bfloat16, and the target over torch.nn."""
    return Workload(
        f"bfloat16-{steps}x{batch}x{hidden}",
        *(steps, batch, hidden, hidden),
        "training in bfloat16",
        dtype="bfloat16",
        modes=("training",),
        cells=("lstm",),
        group="low precision",
        baselines=("torch.nn",),
        variants=(Variant(formats.FLOAT32, {"dtype": "float32"}),),
        targets=(Target.all("training", "torch.nn", bound),),
    )


# For `python -m benchmarks.formats`; the suite does not time these.
FORMATS = (
    of_formats(1, 1, 64, None, quick=True),
    of_formats(1, 1, 256, 3.0),
    of_formats(1, 1, 512, 3.0),
    of_formats(100, 1, 64, None, quick=True),
    of_formats(1000, 1, 128, None),
    of_formats(100, 1, 256, 3.0),
    of_formats(200, 1, 512, 3.0),
    of_formats(128, 32, 128, 2.2),
    of_formats(128, 32, 512, 3.2),
    trained(128, 32, 128, 0.95),
    trained(512, 16, 256, 1.1),
    trained(128, 32, 512, 1.1),
)

# (B, H) and the target's speed-up, for a GPU.
GPU_SHAPES = {(16, 256): 6.0, (64, 512): 4.0, (1, 256): 8.0, (64, 1024): 2.3, (128, 2048): 1.4}
GPU_DTYPES = ("bfloat16", "float32", "float16")
GPU_STEPS = 512


def on_gpu(batch: int, hidden: int, dtype: str, **rest: Any) -> Workload:
    """One shape; the float32 row has an implementation in TF32 too."""
    wide = ", both directions" if rest.get("bidirectional") else ""
    return Workload(
        f"gpu-{batch}x{hidden}-{dtype}" + ("-bidirectional" if wide else ""),
        *(GPU_STEPS, batch, hidden, hidden),
        f"{batch} rows of {GPU_STEPS} steps, H = {hidden}, {dtype}{wide}",
        dtype=dtype,
        group="GPU",
        **{"cells": ("lstm", "gru"), **rest},
    )


def of_lengths(steps: int, batch: int, hidden: int, dtype: str) -> Workload:
    """A packed batch whose lengths fall evenly from `steps` to nearly 0."""
    lengths = tuple(max(1, steps * (batch - row) // batch) for row in range(batch))
    return Workload(
        f"gpu-packed-{dtype}",
        *(steps, batch, hidden, hidden),
        f"{batch} sequences of {lengths[-1]} to {steps} steps as a packed sequence, {dtype}",
        dtype=dtype,
        lengths=lengths,
        group="GPU",
        cells=("lstm",),
    )


def gpu_targets(ratio: float, dtype: str) -> tuple[Target, ...]:
    """Targets over torch.nn. cuDNN keeps the weights of a float16 LSTM on the chip, so less is left
    to win there."""
    ratio = max(1.1, ratio / 4) if dtype == "float16" else ratio
    return (Target("inference", "torch.nn", ratio, None, None),)


# The most important workloads come first, because a run may be cut off after some minutes.
GPU = (
    *(
        on_gpu(*shape, dtype, targets=gpu_targets(ratio, dtype))
        for dtype in GPU_DTYPES[:2]
        for shape, ratio in list(GPU_SHAPES.items())[:3]
    ),
    of_lengths(1000, 32, 256, "float32"),
    *(
        on_gpu(*shape, dtype, targets=gpu_targets(ratio, dtype))
        for dtype in GPU_DTYPES[:2]
        for shape, ratio in list(GPU_SHAPES.items())[3:]
    ),
    on_gpu(16, 256, "bfloat16", bidirectional=True),
    *(
        on_gpu(*shape, "float16", targets=gpu_targets(ratio, "float16"))
        for shape, ratio in GPU_SHAPES.items()
    ),
    of_lengths(1000, 32, 256, "bfloat16"),
    on_gpu(64, 512, "bfloat16", bidirectional=True),
    on_gpu(16, 256, "float32", bidirectional=True),
    on_gpu(64, 1024, "bfloat16", bidirectional=True),
    on_gpu(64, 128, "bfloat16", cells=("lstm", "gru", "rnn")),
    on_gpu(64, 128, "float32", cells=("lstm", "gru", "rnn")),
)

# For tests of the suite itself: one of each kind of row and of target, a few seconds in all.
SMOKE = (
    Workload(
        "smoke-layer",
        *(5, 2, 3, 8),
        "a small layer",
        baselines=("torch.nn",),
        targets=(*ratios((1, 1, 1), (1, 1, 1)), *AT_THE_PEAK),
    ),
    Workload(
        "smoke-packed",
        *(5, 3, 3, 8),
        "a small packed stack",
        layers=2,
        bidirectional=True,
        lengths=(5, 2, 1),
        modes=("training",),
        cells=("gru",),
        group="packed",
        baselines=("torch.nn",),
    ),
    Workload(
        "smoke-stream",
        *(1, 1, 3, 8),
        "small single steps",
        modes=("step",),
        cells=("lstm",),
        group="streaming",
        baselines=("torch.nn",),
        targets=(Target.all("step", "ONNX Runtime", 5),),
    ),
    Workload(
        "smoke-cell",
        *(1, 1, 3, 8),
        "a small cell",
        modes=("cell",),
        group="checks",
        baselines=("torch.nn",),
        targets=(Target("cell", MICROSECONDS, 12, None, None),),
    ),
)
