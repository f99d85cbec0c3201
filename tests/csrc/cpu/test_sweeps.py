"""The sweeps in a program without torch: it runs where torch does not, as in an emulator. There the
kernels run twice, with the instructions of the processor and with plain lanes."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrnn import cells
from fastrnn.cells import Cell
from fastrnn.compiler.derive import derive
from fastrnn.compiler.emit_cpp import header
from tests.support import derivations, programs
from tests.support.operands import by_reference, converted, doubled, operands, run
from tests.support.tolerance import assert_matches

SIZES = STEPS, BATCH, INPUTS, HIDDEN = 8, 3, 5, 9
DIRECTIONS = 2
CELLS = {
    cell.name: cell
    for cell in (
        *(cells.get(name) for name in ("rnn_tanh", "lstm", "gru", "gru_reset_before")),
        *(cell for cell in derivations.USERS if cell.name == "learned"),
    )
}
# Format, storage: numbers of the enumerations of csrc/core/storage.h.
DTYPES = {torch.float32: (0, 0), torch.float64: (1, 0), torch.bfloat16: (0, 1)}
# The layout of weights, and threads for recurrences, sequences and units.
PLANS = [(0, 1, 1, 1), (1, 2, 1, 1), (2, 1, 3, 1), (2, 1, 1, 2)]
# Without this macro no file chooses the instructions of the processor.
LANES = {"own": (), **({"plain": (f"-U__{programs.EMULATED}__",)} if programs.EMULATED else {})}

pytestmark = pytest.mark.compiles


@functools.cache
def program_of(name: str, lanes: str, folder: Path) -> tuple[str, ...]:
    """The program of one cell: compiling one takes half a minute."""
    return compiled(CELLS[name], folder, flags=LANES[lanes])


def compiled(cell: Cell, folder: Path, **how: Any) -> tuple[str, ...]:
    (folder / "cells.gen.h").write_text(header([derive(cell)]))
    source = Path(__file__).with_name("sweeps.cpp")
    return programs.compiled(source, folder, "cpu/kernels.cpp", "cpu/memory.cpp", **how)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    pairs = itertools.product(CELLS, LANES)
    return {pair: tmp_path_factory.mktemp("_".join(pair)) for pair in pairs}


def per_unit(params: list[Tensor], hidden: int) -> list[Tensor]:
    """The parameters of one recurrence, with a number for each unit and gate."""
    return [param.expand(max(param.numel(), hidden)) for param in params]


def numbers_of(cell: Cell, given: dict[str, Any], dy: Tensor, dlast: list[Tensor]) -> str:
    """What the program reads."""
    every, count = [given["x"]], len(cell.params)
    for p in range(DIRECTIONS):
        every += [given[name][p] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
        every += per_unit(given["params"][p * count : (p + 1) * count], given["s0"][0].size(-1))
        every += [state[p] for state in given["s0"]]
    every += [dy, *(d[p] for p in range(DIRECTIONS) for d in dlast)]
    return " ".join(str(n) for tensor in every for n in tensor.double().flatten().tolist())


def results_of(cell: Cell, text: str, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results of the program, named and shaped as those of `run`."""
    numbers = torch.tensor([float(n) for n in text.split()], dtype=torch.float64)
    kinds = ("w_ih", "w_hh", "b_ih", "b_hh", "params", "s0")
    groups = ["y", "state", "gradient of x", *(f"gradient of {kind}" for kind in kinds)]
    sizes = [sum(v.numel() for n, v in like.items() if n.startswith(g)) for g in groups]
    sizes[-2] += len(numbers) - sum(sizes)  # one for each unit, where all share a parameter
    y, last, dx, dw_ih, dw_hh, db_ih, db_hh, dp, ds = numbers.split(sizes)
    states, each = len(cell.states), itertools.count()
    params = [len(rows) * HIDDEN for rows in cell.param_rows().values()]
    found = {"y": y, "gradient of x 0": dx}
    for kind, group in (("state {}", last), ("gradient of s0 {}", ds)):
        for s, state in enumerate(group.view(DIRECTIONS, states, BATCH, HIDDEN).unbind(1)):
            found[kind.format(s)] = state
    for name, group in (("w_ih", dw_ih), ("w_hh", dw_hh), ("b_ih", db_ih), ("b_hh", db_hh)):
        for p, gradient in enumerate(group.chunk(DIRECTIONS)):
            found[f"gradient of {name} {p}"] = gradient
    for own in dp.chunk(DIRECTIONS):
        for gradient in own.split(params):
            name = f"gradient of params {next(each)}"
            found[name] = gradient.sum(0, True) if like[name].numel() == 1 else gradient
    return {name: found[name].view(value.shape).to(value.dtype) for name, value in like.items()}


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("name", CELLS)
def test_results_and_gradients_are_those_of_the_reference(
    name: str,
    lanes: str,
    dtype: torch.dtype,
    plan: tuple[int, ...],
    folders: dict[tuple[str, str], Path],
) -> None:
    torch.manual_seed(0)
    program = program_of(name, lanes, folders[name, lanes])
    cell = CELLS[name]
    # Numbers that every dtype has, so that no weight is rounded.
    given = converted(operands(cell, *SIZES, DIRECTIONS, dtype=torch.bfloat16), dtype)
    exact = run(by_reference, cell, doubled(given))
    theirs = run(by_reference, cell, given)
    generator = torch.Generator().manual_seed(1)  # as `run` weighs the results
    outputs = [value for what, value in exact.items() if not what.startswith("gradient")]
    dy, *dlast = [torch.randint(-2, 3, y.shape, generator=generator) for y in outputs]
    sizes = map(str, (*DTYPES[dtype], *plan, *SIZES))
    text = programs.run(*program, name, *sizes, text=numbers_of(cell, given, dy, dlast))
    assert_matches(results_of(cell, text, theirs), theirs, exact, gradients=True)


@pytest.mark.takes(30)
@pytest.mark.parametrize("name", ["lstm", "gru_reset_before", "layer_norm_lstm"])
def test_threads_that_share_units_do_not_race(name: str, tmp_path: Path) -> None:
    """And their results have the bits of those of one thread."""
    torch.manual_seed(0)
    cell = cells.get(name)
    # A team breaks up if a thread is late: not even a busy machine makes them so late.
    program = compiled(cell, tmp_path, sanitizer="thread", flags=["-DFASTRNN_PATIENCE=1000"])
    sizes = (5, 3, 5, 130)  # three blocks of units, of which the last is not full
    given = operands(cell, *sizes, DIRECTIONS, dtype=torch.float32)
    states = [torch.randn(DIRECTIONS, sizes[1], sizes[3]) for _ in cell.states]
    dy = torch.randn(sizes[0], sizes[1], DIRECTIONS * sizes[3])
    text = numbers_of(cell, given, dy, states)

    def printed(*plan: int) -> str:
        numbers = *DTYPES[torch.float32], *plan, *sizes
        return programs.run(*program, name, *map(str, numbers), text=text)

    right = printed(0, 1, 1, 1)
    assert right.count("\n") > 1000
    for plan in ((0, 1, 1, 2), (1, 1, 1, 3), (2, 1, 1, 2)):
        assert printed(*plan) == right, plan
