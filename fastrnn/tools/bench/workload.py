"""What is timed, as plain data: shapes, modes, and the targets that are set for them."""

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

# inference: a whole sequence without gradients. training: forward and backward, gradients of input
# and weights. step: one time step after the other, the state carried. cell: one call of a cell.
MODES = ("inference", "training", "step", "cell")

# What a target may be set against, besides the name of an implementation of the same row.
BEST_BASELINE = "best baseline"
PEAK = "sgemm peak"
MICROSECONDS = "microseconds"


@dataclass(frozen=True)
class Target:
    """A bound on one figure of a row, for each cell; None sets none.

    Against `BEST_BASELINE` or an implementation: its time divided by ours is at least the bound.
    Against `PEAK`: so is our GFLOP/s divided by the machine's. Against `MICROSECONDS`: our time is
    at most the bound.
    """

    mode: str
    against: str
    lstm: float | None
    gru: float | None
    rnn: float | None

    @classmethod
    def all(cls, mode: str, against: str, bound: float) -> Target:
        """The same bound for every cell."""
        return cls(mode, against, bound, bound, bound)

    def bound(self, cell: str) -> float | None:
        return {"lstm": self.lstm, "gru": self.gru, "rnn": self.rnn}[cell]


@dataclass(frozen=True)
class Variant:
    """Our layer once more, timed beside itself with other values of some fields of `Workload`."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None


@dataclass(frozen=True)
class Workload:
    """One shape, for every cell in turn.

    Attributes:
        steps, batch, inputs, hidden: T, B, I, H.
        lengths: steps of each row of a packed batch, longest first; empty where all have T.
        input_scale: factor of the input; other than 1, biases are zero, so that small inputs make
            small states.
        modes: of `MODES`.
        group: the part of the report it belongs to.
        quick: part of the suite's short form.
        baselines: names of the baselines to time; empty means all.
        compiled_loop: the compiled Python loop is a baseline too; each shape of it takes the
            compiler seconds, so that most workloads go without.
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
        """Steps of all batch rows together, without padding."""
        return sum(self.lengths) if self.lengths else self.steps * self.batch

    def changed(self, changes: Mapping[str, Any]) -> Workload:
        return replace(self, **changes)

    def flops(self, cell: str, mode: str) -> int:
        """Floating-point operations of the matrix products; training does each three times."""
        width = GATES[cell] * self.hidden * self.directions
        inputs = [self.inputs] + [self.hidden * self.directions] * (self.layers - 1)
        forward = sum(2 * width * (size + self.hidden) * self.rows for size in inputs)
        return forward * (3 if mode == "training" else 1)

    def weight_reads(self, cell: str, mode: str) -> tuple[int, int]:
        """How often weights must be read because the next step needs the last, and bytes each time.

        One layer's recurrent weights of all directions, once per step and pass. Of a single step
        the input's weights too, as no other step shares them.
        """
        width = GATES[cell] * self.hidden * self.directions
        columns = self.hidden + (self.inputs if self.steps == 1 else 0)
        passes = self.layers * self.steps * (2 if mode == "training" else 1)
        return passes, width * columns * BYTES[self.dtype]
