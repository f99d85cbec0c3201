"""The C of cells: names, literals, what is computed at export, and the compiled code against the
reference."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrnn import cells
from fastrnn.cells import Cell
from fastrnn.cells.published import MODULES
from fastrnn.compiler import emit_c
from fastrnn.compiler.derive import derive
from fastrnn.kernels import reference
from fastrnn.kernels.operands import Operands, Weights, side_by_side
from tests.support import derivations, staged
from tests.support.compiled import Stream, library
from tests.support.derivations import make

INPUTS, HIDDEN = 3, 11
ALL = {
    cell.name: cell
    for cell in (*map(cells.get, MODULES), *derivations.ALL, *staged.USERS)  # slstm is in two
}
every_cell = pytest.mark.parametrize("name", ALL)


SCALE = 0.15  # small enough for no cell to magnify the rounding of float32 step by step


def weights_of(cell: Cell, inputs: int, hidden: int) -> Weights:
    """Random weights of one layer."""
    of_u, of_v = len(cell.inputs) * hidden, len(cell.recurrent) * hidden
    w_ih, w_hh = SCALE * torch.randn(of_u, inputs), SCALE * torch.randn(of_v, hidden)
    b_ih, b_hh = SCALE * torch.randn(of_u), SCALE * torch.randn(of_v)
    params = tuple(
        SCALE * torch.randn(param.size(hidden, len(cell.gates))) for param in cell.params.values()
    )
    return Weights(w_ih, w_hh, b_ih, b_hh, None, params)


def written(folder: Path, name: str, cell: Cell, layers: list[Weights]) -> Path:
    source, header = emit_c.stepper(derive(cell), layers, name, f"{cell.name} */", f"{name}.h")
    (folder / f"{name}.h").write_text(header)
    (folder / f"{name}.c").write_text(source)
    return folder / f"{name}.c"


@every_cell
def test_steps_are_those_of_the_reference(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    cell = ALL[name]
    layers = [weights_of(cell, INPUTS, HIDDEN), weights_of(cell, HIDDEN, HIDDEN)]
    x = torch.randn(3, INPUTS) / 2  # few steps: the cell `powers` grows faster than exponentially
    compiled = library([written(tmp_path, name, cell, layers)])
    stream = Stream(compiled, name, 2, HIDDEN, HIDDEN, len(cell.states))
    found = stream.steps(x)
    y, finals = x.double().unsqueeze(1), []
    for weights in layers:
        lists: Any = [[t.double() for t in group] for group in side_by_side([weights])]
        y, last = reference.scan(cell, Operands(y, *lists))
        finals.append([state[0, 0] for state in last])
    pairs = [(found, y[:, 0])]
    pairs += zip(stream.states, map(torch.stack, zip(*finals, strict=True)), strict=True)
    for ours, exact in pairs:
        scale = exact.abs().max().clamp_min(1).item()
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6 * scale)


def pointwise(folder: Path, function: Any, values: Tensor, *flags: str) -> Tensor:
    """A function of one state, computed by a stepper, for all values at once."""
    name = f"pointwise_{len(list(folder.glob('*.c')))}"
    cell = make("a", "hc", lambda u, v, h, c: (function(c), c), name)
    count = len(values)
    zeros = torch.zeros(1)  # expanded: the cell reads no gate, so no weight is written
    weights = Weights(zeros.expand(count, 1), zeros.expand(count, count))
    source = written(folder, name, cell, [weights])
    assert "static const float" not in source.read_text()
    stream = Stream(library([source], *flags), name, 1, count, count, 2)
    stream.states[1][0] = values
    return stream.step(torch.zeros(1))


def every_binade() -> Tensor:
    """Numbers of all sizes and signs, and the borders of exponentials."""
    torch.manual_seed(0)
    sizes = torch.ldexp(1 + torch.rand(277, 40), torch.arange(-149.0, 128).unsqueeze(1)).flatten()
    dense = torch.linspace(-110, 110, 20001)
    borders = torch.tensor([0.0, -0.0, 88.72, 88.73, -87.3, -103.9, -104.1, 9.01, 1e-30])
    return torch.cat([sizes, -sizes, dense, borders])


@pytest.mark.parametrize("flags", [("-O2",), ("-O3", "-fno-trapping-math")], ids=str)
@pytest.mark.parametrize("name", ["exp", "sigmoid", "tanh"])
def test_exponentials_are_as_exact_as_in_the_kernels(
    name: str, flags: tuple[str, ...], tmp_path: Path
) -> None:
    values = every_binade()
    function = getattr(torch, name)
    found = pointwise(tmp_path, function, values, *flags).double()
    exact = function(values.double())
    normal = (exact.abs() >= 2.0**-126) & (exact.abs() < 2.0**128 * (1 - 2.0**-25))
    _, exponent = torch.frexp(exact)
    ulp = torch.ldexp(torch.ones_like(exact), exponent - 24)
    assert ((found - exact).abs() / ulp)[normal].max() < 2.8
    torch.testing.assert_close(found[~normal], exact.float().double()[~normal], rtol=0, atol=2e-38)
    if name == "tanh":
        zeros = values == 0
        assert torch.equal(found[zeros].signbit(), values[zeros].signbit())


@pytest.mark.parametrize("name", ["exp", "sigmoid", "tanh", "relu", "sign", "sqrt", "expm1", "abs"])
def test_infinities_and_nan(name: str, tmp_path: Path) -> None:
    values = torch.tensor([math.inf, -math.inf, math.nan, 1.0])
    function = getattr(torch, name)
    found = pointwise(tmp_path, function, values)
    torch.testing.assert_close(found, function(values), equal_nan=True)


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_nan_wins_a_comparison(name: str, tmp_path: Path) -> None:
    values = torch.tensor([math.nan, 1.0, -2.0, math.inf])
    function = getattr(torch, name)
    for twice in (lambda c: function(c, 0.5 * c), lambda c: function(0 * c + 0.25, c)):
        found = pointwise(tmp_path, twice, values)
        torch.testing.assert_close(found, twice(values), equal_nan=True)


def test_fast_math_falls_back_on_the_c_library(tmp_path: Path) -> None:
    # The macro alone: a library linked with -ffast-math changes the rounding of this whole process.
    values = torch.linspace(-20, 20, 401)
    for function in (torch.tanh, torch.sigmoid, torch.exp):
        found = pointwise(tmp_path, function, values, "-O2", "-D__FAST_MATH__")
        torch.testing.assert_close(found, function(values), rtol=1e-6, atol=1e-9)


def test_weights_are_exact(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1000,), dtype=torch.int64).to(torch.int32)
    random = bits.view(torch.float32)
    special = torch.tensor([0.0, -0.0, 1.0, -3.0, 1e20, 2.0**-149, -(2.0**-127), math.inf])
    numbers = torch.cat([random[random.isfinite()], special, torch.tensor([-math.inf, math.nan])])
    count = len(numbers)
    cell = make("a", "h", lambda u, v, h: u.a, "exact")
    zeros = torch.zeros(1)
    weights = Weights(torch.zeros(count, 1), zeros.expand(count, count), numbers, 0 * numbers)
    stream = Stream(
        library([written(tmp_path, "exact", cell, [weights])]), "exact", 1, count, count, 1
    )
    found = stream.step(torch.zeros(1))
    torch.testing.assert_close(found, numbers, rtol=0, atol=0, equal_nan=True)


def sizes(source: str) -> dict[str, int]:
    """Lengths of the arrays of weights."""
    return {n: int(k) for n, k in re.findall(r"static const float (\w+)\[(\d+)\]", source)}


def texts(cell: Cell, inputs: int = INPUTS, hidden: int = HIDDEN) -> tuple[str, str]:
    torch.manual_seed(0)
    return emit_c.stepper(derive(cell), [weights_of(cell, inputs, hidden)], "m", "title", "m.h")


def test_columns_that_a_cell_does_not_read_are_left_out() -> None:
    h = HIDDEN
    assert sizes(texts(cells.get("gru"))[0]) == {
        "w_ih_l0": 3 * h * INPUTS,
        "w_hh_l0": 3 * h * h,
        "bias_l0": 4 * h,  # u and v of the new gate have a bias each
    }
    assert sizes(texts(cells.get("lstm"))[0])["bias_l0"] == 4 * h
    cfn = sizes(texts(cells.get("cfn"))[0])
    assert cfn["w_ih_l0"] == 3 * h * INPUTS and cfn["w_hh_l0"] == 2 * h * h


def test_what_follows_from_parameters_alone_is_computed_at_export() -> None:
    source, _ = texts(cells.get("fast_rnn"))
    assert sizes(source)["learned_l0"] == 2 and "sigmoid" not in source
    source, _ = texts(cells.get("fast_grnn"))
    assert sizes(source)["learned_l0"] == 2 * HIDDEN + 2


def test_only_functions_that_are_called_are_written() -> None:
    source, _ = texts(cells.get("rnn_relu"))
    assert set(re.findall(r"^static \w+ (\w+)\(", source, re.M)) == {
        "add_product",
        "relu",
        "step_layer",
    }


def test_names_of_states_that_c_refuses() -> None:
    cell = Cell("int", ("für", "while"), ("int", "ä", "fine"), lambda u, v, a, b, c: (b, c, a))
    _, header = texts(cell)
    assert re.findall(r"^  float (\w+)\[", header, re.M) == ["state_0", "state_1", "fine"]


def test_a_title_cannot_end_its_comment() -> None:
    cell = make("a", "h", lambda u, v, h: u.a)
    source, header = emit_c.stepper(
        derive(cell), [weights_of(cell, 1, 1)], "m", "a */ b /* c\n d", "m.h"
    )
    first = "/* a * / b / * c d */"
    assert source.startswith(first) and header.startswith(first)


@pytest.mark.parametrize(
    ("text", "name"), [("gru", "gru"), ("my gru-2", "my_gru_2"), ("_x_", "x"), ("A", "A")]
)
def test_identifiers(text: str, name: str) -> None:
    assert emit_c.identifier(text) == name


@pytest.mark.parametrize("text", ["", "2x", "--", "ü", "while", "class"])
def test_what_gives_no_identifier(text: str) -> None:
    with pytest.raises(ValueError, match="gives no name in C"):
        emit_c.identifier(text)
