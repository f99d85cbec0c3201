# What csrc/binding/op.cpp shows to Python.

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, dtype
from typing_extensions import Self

built_for: str
most_recurrences: int

class Stepper:
    def __new__(
        cls,
        cell: str,
        like: Tensor,
        layers: Sequence[Sequence[Tensor | None]],
        format: str,
        scales: Sequence[Sequence[Tensor]],
        batch_size: int,
        threads: int,
        release_gil: bool,
    ) -> Self: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def input_size(self) -> int: ...
    @property
    def output_size(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def weights(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    def step(self, x: Any, out: Any = None) -> Any: ...
    def reset(self) -> None: ...
    def _read(self) -> list[Tensor]: ...
    def _write(self, states: Sequence[Tensor]) -> None: ...

class Slots:
    def __new__(
        cls,
        cell: str,
        like: Tensor,
        layers: Sequence[Sequence[Tensor | None]],
        format: str,
        scales: Sequence[Sequence[Tensor]],
        capacity: int,
        threads: int,
        release_gil: bool,
    ) -> Self: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def input_size(self) -> int: ...
    @property
    def output_size(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def weights(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    def __len__(self) -> int: ...
    def __contains__(self, slot: object) -> bool: ...
    def add(self) -> int: ...
    def remove(self, slot: int) -> None: ...
    def reset(self, slot: int) -> None: ...
    def step(self, x: Any, slots: Any, out: Any = None) -> Any: ...
    def run(self, x: Any, slots: Any, out: Any = None) -> Any: ...
    def _read(self, slot: int) -> list[Tensor]: ...
    def _write(self, slot: int, states: Sequence[Tensor]) -> None: ...

def scan(
    cell: str,
    x: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    b_ih: Sequence[Tensor],
    b_hh: Sequence[Tensor],
    w_hr: Sequence[Tensor],
    params: Sequence[Tensor],
    s0: Sequence[Tensor],
    reset_states: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    noise: Tensor | None,
    reverse: int,
    recompute: bool,
) -> tuple[Tensor, list[Tensor]]: ...
def step(
    cell: str,
    input: Tensor,
    before: tuple[Tensor, ...],
    weights: tuple[Any, ...],
    packed: tuple[Sequence[Tensor], Tensor, str] | None,
) -> tuple[Tensor, ...] | None: ...
def layers(
    cell: str,
    input: Any,
    hx: Any,
    weights: Sequence[tuple[Any, ...]],
    check: Callable[[Any, Any, Any, Tensor], None],
    lengths: Any,
    resets: Any,
    thresholds: Sequence[int],
    noise: Callable[[], Tensor] | None,
    ways: tuple[bool, int, bool, bool, float],
    packed: Sequence[tuple[Sequence[Tensor], Tensor, str] | None],
) -> tuple[Any, ...] | None: ...
def transposed(y: Tensor) -> Tensor: ...
def scan_packed(
    cell: str,
    x: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    b_ih: Sequence[Tensor],
    b_hh: Sequence[Tensor],
    w_hr: Sequence[Tensor],
    params: Sequence[Tensor],
    s0: Sequence[Tensor],
    reset_states: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    noise: Tensor | None,
    reverse: int,
    packed: Sequence[Tensor],
    expected: Tensor,
    format: str,
) -> tuple[Tensor, list[Tensor]]: ...
def pack(
    cell: str,
    format: str,
    weights: Sequence[Tensor | None],
    scales: Sequence[Tensor],
) -> Tensor: ...
def fingerprint(tensors: Sequence[Tensor]) -> Tensor: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def keep_launch(
    *inputs: Any,
    backward: bool,
    run: int | None,
    error: int | None,
    capturing: int | None,
    plan: Sequence[int],
    workspace: int,
    steps: tuple[int, int],
    epoch: int,
) -> bool: ...
def vector_bytes() -> int: ...
def forget_plans() -> None: ...
def plans_forgotten() -> int: ...
def contended() -> bool: ...
def late_peer() -> None: ...
def end_contention() -> None: ...
def add_cell_facts(
    name: str,
    *,
    gates: int,
    states: int,
    saved: int,
    params: int,
    summed: int,
    shared_params: int,
    projectable: bool,
    gate_params: int = 0,
    stages: int = 1,
    rows: int = 0,
    draws: int = 0,
    input_gates: int = -1,
    recurrent_gates: int = -1,
) -> None: ...
def has_code(name: str, format: str = "float32") -> bool: ...
def formats() -> list[str]: ...
def format_of(x: Tensor) -> str: ...
def load_cells(path: str, symbol: str) -> None: ...
def cell_facts(
    name: str, projected: bool = False
) -> tuple[int, int, int, int] | Any: ...  # None for an unknown cell
def autocast_dtype(cell: str, x: Tensor, s0: Sequence[Tensor]) -> dtype: ...
def set_callbacks(
    *,
    plan: Callable[..., Any],
    find: Callable[[str, str, str], None],
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    reference_backward: Callable[..., Any],
    tables: Callable[..., tuple[Tensor, int]],
    significant_bits: int,
) -> None: ...
