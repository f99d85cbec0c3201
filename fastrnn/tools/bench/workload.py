"""The cases to time, as plain data: shapes, modes, and their targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastrnn.plan.dtypes import BYTES

__all__ = [
    "BEST_BASELINE",
    "CELLS",
    "GATES",
    "MICROSECONDS",
    "MODES",
    "PEAK",
    "Target",
    "Variant",
    "Workload",
]

CELLS = ("lstm", "gru", "rnn")
GATES = {"lstm": 4, "gru": 3, "rnn": 1}

# inference: a whole sequence without gradients. training: forward and backward pass, gradients of
# input and weights. step: one time step per call, carrying the state. cell: one call of a cell.
MODES = ("inference", "training", "step", "cell")

# A target compares with one of these, or with an implementation of the same row by its name.
BEST_BASELINE = "best baseline"
PEAK = "sgemm peak"
MICROSECONDS = "microseconds"


@dataclass(frozen=True)
class Target:
    """A bound on one number of a row, for each cell; None means no bound.

    Against `BEST_BASELINE` or an implementation, its time divided by ours is at least the bound.
    Against `PEAK`, our GFLOP/s divided by the machine's is at least the bound. Against
    `MICROSECONDS`, our time is at most the bound.

    Attributes:
        of: the implementation that is ours, by its name; by default that which the row is about.
    """

    mode: str
    against: str
    lstm: float | None
    gru: float | None
    rnn: float | None
    of: str | None = None

    @classmethod
    def all(cls, mode: str, against: str, bound: float, of: str | None = None) -> Target:
        """The same bound for every cell."""
        return cls(mode, against, bound, bound, bound, of)

    def bound(self, cell: str) -> float | None:
        return {"lstm": self.lstm, "gru": self.gru, "rnn": self.rnn}[cell]


@dataclass(frozen=True)
class Variant:
    """Our layer, timed once more with other values of some fields of `Workload`."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None


@dataclass(frozen=True)
class Workload:
    """One shape, for every cell.

    Attributes:
        steps, batch, inputs, hidden: T, B, I, H.
        lengths: steps of each sequence of a packed batch, longest first; empty if all have T.
        input_scale: factor of the input. If it is not 1, biases are zero, so that small inputs
            give small states.
        modes: some of `MODES`.
        group: the part of the report to which it belongs.
        quick: whether the suite's short form includes it.
        baselines: names of the baselines to time; empty means all.
        compiled_loop: whether the compiled Python loop is a baseline too. The compiler takes
            seconds for each shape, so most workloads leave it out.
    """

    name: str
    steps: int
    batch: int
    inputs: int
    hidden: int
    about: str = ""
    layers: int = 1
    bidirectional: bool = False
    lengths: tuple[int, ...] = ()
    dtype: str = "float32"
    input_scale: float = 1.0
    modes: tuple[str, ...] = ("inference", "training")
    cells: tuple[str, ...] = CELLS
    group: str = "layers"
    quick: bool = False
    baselines: tuple[str, ...] = ()
    compiled_loop: bool = False
    variants: tuple[Variant, ...] = ()
    targets: tuple[Target, ...] = ()

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.inputs, self.hidden, self.layers) < 1:
            raise ValueError(f"sizes of {self.name!r} must be at least 1")
        if self.dtype not in BYTES:
            raise ValueError(f"dtype must be one of {', '.join(BYTES)}; got {self.dtype!r}")
        if unknown := set(self.modes) - set(MODES):
            raise ValueError(f"modes must be of {', '.join(MODES)}; got {', '.join(unknown)}")
        if self.lengths and (
            len(self.lengths) != self.batch
            or self.lengths[0] != self.steps
            or list(self.lengths) != sorted(self.lengths, reverse=True)
        ):
            raise ValueError(
                f"lengths of {self.name!r} must be {self.batch}, the longest first and {self.steps}"
            )

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def rows(self) -> int:
        """R, the steps of all sequences together, without padding."""
        return sum(self.lengths) if self.lengths else self.steps * self.batch

    def changed(self, changes: Mapping[str, Any]) -> Workload:
        return replace(self, **changes)

    def flops(self, cell: str, mode: str) -> int:
        """Floating-point operations of the matrix products; training runs each three times."""
        width = GATES[cell] * self.hidden * self.directions
        inputs = [self.inputs] + [self.hidden * self.directions] * (self.layers - 1)
        forward = sum(2 * width * (size + self.hidden) * self.rows for size in inputs)
        return forward * (3 if mode == "training" else 1)

    def weight_reads(self, cell: str, mode: str) -> tuple[int, int]:
        """How often weights must be read because a step needs the previous one, and bytes per read.

        Each step of each pass reads one layer's recurrent weights of all directions. A single step
        also reads the input weights, because no other step shares them.
        """
        width = GATES[cell] * self.hidden * self.directions
        columns = self.hidden + (self.inputs if self.steps == 1 else 0)
        passes = self.layers * self.steps * (2 if mode == "training" else 1)
        return passes, width * columns * BYTES[self.dtype]
