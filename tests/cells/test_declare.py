"""Declaring cells: which are refused, with which advice; and that saved cells stay the same."""

from __future__ import annotations

import copy
import functools
import importlib
import os
import pickle
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fastrnn
from fastrnn import cells, kernels
from fastrnn.cells import Cell, Gates
from fastrnn.cells import declare as declaration
from fastrnn.cells.digest import digest_of
from tests.support.paths import ROOT


def leaky(u: Any, v: Any, h: Tensor, rate: float = 0.5) -> Tensor:
    return rate * h + torch.tanh(u.a + v.a)


def step(cell: Cell, value: float = 0.25) -> Tensor:
    x = torch.full((1, 2), value)
    return cell.step([x] * len(cell.gates), [x] * len(cell.gates), [x] * len(cell.states))[0]


# Declaration.


def test_limits_are_those_of_the_kernels() -> None:
    source = (ROOT / "csrc" / "cpu" / "contract.h").read_text()
    limits = dict(re.findall(r"constexpr int (kMax\w+) = (\d+);", source))
    assert int(limits["kMaxGates"]) == cells.MAX_GATES
    assert int(limits["kMaxStates"]) == cells.MAX_STATES
    assert int(limits["kMaxParams"]) == cells.MAX_PARAMS


@pytest.mark.parametrize(("kind", "most"), [("gates", 16), ("states", 8)])
def test_no_more_than_the_kernels_take(kind: str, most: int) -> None:
    letters = "abcdefghijklmnopq"
    options: dict[str, Any] = {"gates": "a", "states": "h"}
    fastrnn.cell(**options | {kind: letters[:most]}, name="largest")(lambda u, v, *s: s)
    with pytest.raises(ValueError, match=f"'larger' has {most + 1} {kind}, .* at most {most};"):
        fastrnn.cell(**options | {kind: letters[: most + 1]}, name="larger")(lambda u, v, *s: s)
    assert "larger" not in cells.names()


def gated(u: Any, v: Any, h: Tensor) -> Tensor:
    return torch.sigmoid(u.a) * h + torch.tanh(v.b)


def with_rows(name: str = "with_rows", **rows: Any) -> Cell:
    return fastrnn.cell(gates="ab", states="h", name=name, **rows)(gated)


def test_gates_with_rows() -> None:
    every = with_rows()
    assert every.inputs == every.recurrent == every.gates and every.has_all_rows
    some = with_rows(inputs=["a"], recurrent="b")
    assert (some.inputs, some.recurrent) == (("a",), ("b",)) and not some.has_all_rows
    assert some != every
    in_order = with_rows(inputs="ba", recurrent="")
    assert (in_order.inputs, in_order.recurrent) == (("a", "b"), ())
    one, other = torch.ones(1, 2), torch.zeros(1, 2)
    (after,) = some.step([one], [other], [one])
    assert torch.equal(after, torch.sigmoid(one))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"inputs": "c"}, "inputs of cell 'wrong' names the gates .* are a, b, got c"),
        ({"recurrent": "aa"}, "recurrent of cell 'wrong' names .* each once.* got a, a"),
        ({"inputs": ""}, "no gate with input rows, so it would not see its input"),
        ({"inputs": "a", "recurrent": "a"}, "gate 'b' of cell 'wrong' has neither .* gates="),
    ],
)
def test_rows_that_cannot_be(rows: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_rows("wrong", **rows)
    assert "wrong" not in cells.names()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"recurrent": "a"},
            "'reading' reads v.b, but its gate 'b' has no recurrent rows: it was declared with "
            "recurrent=\"a\"; add 'b' there, or do without v.b",
        ),
        (
            {"inputs": "b"},
            "'reading' reads u.a, but its gate 'a' has no input rows: it was declared with "
            "inputs=\"b\"; add 'a' there, or do without u.a",
        ),
    ],
)
def test_a_function_that_reads_rows_that_are_not_there(rows: dict[str, str], message: str) -> None:
    """In layers, whichever kernel runs them."""
    layer = fastrnn.Recurrent(with_rows("reading", **rows), 3, 5)
    for kernel in ("cpu", "reference"):
        with kernels.use(kernel), pytest.raises(AttributeError, match=re.escape(message)):
            layer(torch.randn(4, 2, 3))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"recurrent": "b"},
            r"'unread' declares inputs=\"ab\", but its result does not depend on u\.b, so those "
            r"rows of weight_ih would be learned .* write inputs=\"a\", or read u\.b",
        ),
        ({"inputs": "a"}, r"recurrent=\"ab\", .* on v\.a, .* weight_hh .* recurrent=\"b\""),
    ],
)
def test_rows_that_nothing_reads(rows: dict[str, str], message: str) -> None:
    layer = fastrnn.Recurrent(with_rows("unread", **rows), 3, 5)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(4, 2, 3))


def test_torchs_layout_may_have_rows_that_nothing_reads() -> None:
    layer = fastrnn.Recurrent(with_rows("all_rows"), 3, 5)
    with kernels.use("reference"):
        layer(torch.randn(4, 2, 3))
    assert layer.weight_hh_l0.shape == (10, 5)


def test_rows_are_saved_with_a_cell() -> None:
    saved = pickle.dumps(fastrnn.Recurrent(with_rows("rows", inputs="a", recurrent="b"), 3, 5))
    again = with_rows("rows", inputs="a", recurrent="b")
    assert pickle.loads(saved).cell is again
    with_rows("rows")
    with pytest.raises(ValueError, match=r"'rows' declared here is not .* state_dict"):
        pickle.loads(saved)


def test_variants_have_the_rows_of_their_cell() -> None:
    cell = with_rows("varied", inputs="a", recurrent="b")
    for made in (cells.zoneout(cell, 0.1), cells.clip_grad(cell, 1.0), cell.noisy):
        assert (made.inputs, made.recurrent) == (("a",), ("b",))


def test_cell_must_be_called() -> None:
    with pytest.raises(TypeError, match=r'write @fastrnn\.cell\(gates="fn", states="h"\) above'):

        @fastrnn.cell
        def forgotten(u: Any, v: Any, h: Tensor) -> Tensor:
            return h


@pytest.mark.parametrize("missing", ["gates", "states"])
def test_gates_and_states_must_be_given(missing: str) -> None:
    options: dict[str, Any] = {"gates": "a", "states": "h"}
    del options[missing]
    with pytest.raises(ValueError, match=rf"at least one of {missing}: cell\({missing}=...\)"):
        fastrnn.cell(**options)(leaky)


def test_parameters_with_defaults_are_the_functions_own() -> None:
    made = fastrnn.cell(gates="a", states="h")(leaky)
    torch.testing.assert_close(step(made), torch.full((1, 2), 0.125).add(torch.tensor(0.5).tanh()))
    layer = fastrnn.Recurrent(made, 3, 5)
    assert layer(torch.randn(4, 2, 3))[0].shape == (4, 2, 5)


def test_partial_functions() -> None:
    slow = functools.partial(leaky, rate=0.0)
    with pytest.raises(ValueError, match=r"partial objects cannot name .*cell\(name=...\)"):
        fastrnn.cell(gates="a", states="h")(slow)
    made = fastrnn.cell(gates="a", states="h", name="slow")(slow)
    torch.testing.assert_close(step(made), torch.tensor(0.5).tanh().expand(1, 2))
    layer = fastrnn.Recurrent(made, 3, 5)
    assert layer(torch.randn(4, 2, 3))[0].shape == (4, 2, 5)


def test_lambdas_need_a_name() -> None:
    with pytest.raises(ValueError, match=r"a lambda cannot name the cell; pass cell\(name=...\)"):
        fastrnn.cell(gates="a", states="h")(lambda u, v, h: h)
    made = fastrnn.cell(gates="a", states="h", name="keep")(lambda u, v, h: h)
    assert cells.get("keep") is made


def test_only_functions() -> None:
    with pytest.raises(TypeError, match="made from a function, got int"):
        fastrnn.cell(gates="a", states="h")(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "function",
    [lambda u, v: v, lambda u, v, h, c: h, lambda u, v, h, *, rate: h],
    ids=["too few", "too many", "a keyword that nobody gives"],
)
def test_functions_that_cannot_be_called(function: Any) -> None:
    with pytest.raises(ValueError, match=r"'wrong' must be a function of \(u, v, h\), any further"):
        fastrnn.cell(gates="a", states="h", name="wrong")(function)


def test_initial_values_need_a_function_of_two() -> None:
    options: dict[str, Any] = {"gates": "a", "states": "h", "name": "wrong"}
    with pytest.raises(TypeError, match=r"of cell 'wrong' must be a function of \(u, v\), got int"):
        fastrnn.cell(**options, initialize=3)(leaky)  # type: ignore[arg-type]
    for function in (lambda u: None, lambda u, v, w: None):
        with pytest.raises(ValueError, match=r"of \(u, v\), any further .*; got \(u"):
            fastrnn.cell(**options, initialize=function)(leaky)
    assert "wrong" not in cells.names()
    made = fastrnn.cell(**options, initialize=lambda u, v, by=1: None)(leaky)
    assert made.initialize is not None


# Learned parameters.


def scaled(u: Any, v: Any, p: Any, h: Tensor) -> Tensor:
    return p.rate * h + u.a


def with_params(name: str = "learning", **params: Any) -> Cell:
    return fastrnn.cell(gates="a", states="h", name=name, params=params)(scaled)


def test_params_are_of_a_kind() -> None:
    made = with_params(rate="unit", other=fastrnn.Param("one", init=2.0))
    assert made.params == {"rate": fastrnn.Param("unit"), "other": fastrnn.Param("one", 2.0)}
    x = torch.full((1, 2), 3.0)
    assert torch.equal(made.step([x], [x], [x], [x, x])[0], x * x + x)
    for wrong in ("units", 3, fastrnn.Param("gate"), None):
        with pytest.raises(ValueError, match="'rate' of cell 'wrong' must be 'unit'"):
            with_params("wrong", rate=wrong)
    assert "wrong" not in cells.names()


@pytest.mark.parametrize("name", ["ih", "hh", "hr", "a b", "", "lambda"])
def test_params_that_cannot_be_named(name: str) -> None:
    with pytest.raises(ValueError, match="params of cell 'wrong' must be identifiers other than"):
        with_params("wrong", **{name: "unit"})


def test_no_more_params_than_the_kernels_take() -> None:
    many = {f"p{k}": "one" for k in range(33)}
    with pytest.raises(ValueError, match=r"'wrong' has 33 params, .* at most 32;"):
        with_params("wrong", **many)


def test_the_function_takes_params_only_if_there_are_some() -> None:
    with pytest.raises(ValueError, match=r"'wrong' must be a function of \(u, v, p, h\), any"):
        fastrnn.cell(gates="a", states="h", name="wrong", params={"rate": "unit"})(
            lambda u, v, h: h
        )
    with pytest.raises(ValueError, match=r"'wrong' must be a function of \(u, v, h\), any"):
        fastrnn.cell(gates="a", states="h", name="wrong")(scaled)


def test_a_misspelt_parameter_is_named() -> None:
    made = with_params(ratio="unit", bias="one")
    with pytest.raises(
        AttributeError, match="'learning' has no parameter 'rate'; its parameters are: ratio, bias"
    ):
        fastrnn.Recurrent(made, 3, 5)(torch.randn(4, 2, 3))


def test_the_order_of_params_is_part_of_a_cell() -> None:
    """It is the order of compiled code."""
    one, other = with_params(rate="unit", more="unit"), with_params(more="unit", rate="unit")
    assert one != other and one == with_params(rate=fastrnn.Param(init=2.0), more="unit")
    layers: Any = [fastrnn.Recurrent(cell, 3, 5) for cell in (one, other)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(4, 2, 3)
    assert torch.equal(layers[0](x)[0], layers[1](x)[0])


def test_params_are_a_dict() -> None:
    for wrong in (["rate"], "rate"):
        with pytest.raises(TypeError, match="params should be a dict of names and kinds"):
            fastrnn.cell(gates="a", states="h", name="wrong", params=wrong)(scaled)  # type: ignore[arg-type]


def test_a_function_that_forgets_its_params() -> None:
    with pytest.raises(ValueError, match="the third argument is `p`, the learned parameters"):
        fastrnn.cell(gates="a", states="h", name="wrong", params={"rate": "unit"})(
            lambda u, v, h, scale=0.5: h
        )


def test_first_values_are_written_in_place() -> None:
    made = with_params(rate=fastrnn.Param(init=torch.ones_like))
    with pytest.raises(TypeError, match=r"should fill the tensor in place, but .*ones_like"):
        fastrnn.Recurrent(made, 3, 5)

    def replaces(u: Any, v: Any, p: Any) -> None:
        p.rate = torch.ones(5)

    made = fastrnn.cell(
        gates="a", states="h", name="replacing", params={"rate": "unit"}, initialize=replaces
    )(scaled)
    with pytest.raises(TypeError, match=r"replaced p\.rate, .* as p\.rate\.fill_\(1\) does"):
        fastrnn.Recurrent(made, 3, 5)


def test_a_saved_cell_has_the_same_params() -> None:
    saved = pickle.dumps(fastrnn.Recurrent(with_params(rate="unit"), 3, 5))
    again = with_params(rate=fastrnn.Param("unit", init=1.0))  # begins otherwise, computes the same
    assert pickle.loads(saved).cell is again
    for params in ({"rate": "one"}, {"rate": "unit", "more": "unit"}):
        with_params(**params)
        with pytest.raises(
            ValueError, match="its gates, their rows, its states, parameters or function differ"
        ):
            pickle.loads(saved)


# Gates.


def test_a_misspelt_gate_is_named() -> None:
    @fastrnn.cell(gates="fn", states="h")
    def misspelt(u: Any, v: Any, h: Tensor) -> Tensor:
        return h + u.q

    with pytest.raises(AttributeError, match=r"cell 'misspelt' has no gate 'q'; .* are: f, n"):
        step(misspelt)
    with pytest.raises(AttributeError, match="cell 'misspelt' has no gate 'q'"):
        fastrnn.Recurrent(misspelt, 3, 5)(torch.randn(4, 2, 3))


def test_gates_can_be_copied() -> None:
    """`copy` asks an object that has no attributes yet for some."""
    x = torch.randn(2)
    assert torch.equal(copy.copy(Gates(cells.rnn_tanh, [x])).h, x)


def test_gates_are_transparent_to_tracers() -> None:
    x = torch.randn(3)

    def call(x: Tensor) -> Tensor:
        return cells.gru.step([x, 2 * x, 3 * x], [x, x, x], [x])[0]

    wanted = call(x)
    torch.testing.assert_close(make_fx(call)(x)(x), wanted)
    torch.testing.assert_close(torch.func.vmap(call)(x), wanted)
    torch.testing.assert_close(torch.func.vjp(call, x)[0], wanted)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), wanted)


# Copies and saved cells.


def declare(rate: float, name: str = "changing", gates: str = "a") -> Cell:
    @fastrnn.cell(gates=gates, states="h", name=name)
    def changing(u: Any, v: Any, h: Tensor) -> Tensor:
        return rate * h + u.a

    return changing


def test_a_copy_keeps_its_cell() -> None:
    layer = fastrnn.Recurrent(declare(0.5), 3, 5)
    declare(0.25)
    x = torch.randn(4, 2, 3)
    for other in (copy.copy(layer), copy.deepcopy(layer)):
        assert other.cell is layer.cell
        assert torch.equal(other(x)[0], layer(x)[0])


def test_loading_does_not_change_the_cell() -> None:
    saved = pickle.dumps(fastrnn.Recurrent(declare(0.5), 3, 5))
    again = declare(0.5)
    assert pickle.loads(saved).cell is again
    for changed in (lambda: declare(0.25), lambda: declare(0.5, gates="ab")):
        changed()
        with pytest.raises(ValueError, match=r"'changing' declared here is not .* state_dict"):
            pickle.loads(saved)
    del declaration._registry["changing"]
    with pytest.raises(
        ValueError, match=r"no cell named 'changing' .*test_declare, as declare.*declare"
    ):
        pickle.loads(saved)


def test_built_in_cells_are_saved_by_name() -> None:
    """Another version may write their function differently."""
    assert cells.lstm.__reduce__() == (cells.get, ("lstm",))
    impostor = Cell("lstm", ("a",), ("h",), leaky)
    with pytest.raises(ValueError, match="'lstm' declared here is not the one that was saved"):
        pickle.loads(pickle.dumps(impostor))


BASE = """
RATE = 0.5
OTHER = 1
def helper(x, by=3): return x * by
def make(kept):
    def cell(u, v, h):
        '''What it does.'''
        inner = lambda x: x * RATE
        return inner(h) + helper(u.a) * kept + 7 * v.a
    return cell
"""


def digest(source: str, kept: float = 2.0) -> str:
    module = types.ModuleType("written")
    exec(source, vars(module))
    return digest_of(module.make(kept))


def test_the_digest_is_that_of_behaviour() -> None:
    assert digest(BASE) == digest(BASE) != digest(BASE, kept=3.0)
    for old, new in (
        ("What it does.", "What it really does."),
        ("\n", "\n\n"),
        ("OTHER = 1", "OTHER = 2"),
        ("inner", "within"),
    ):
        assert digest(BASE.replace(old, new)) == digest(BASE), new
    for old, new in (
        ("RATE = 0.5", "RATE = 0.25"),
        ("x * by", "x + by"),
        ("by=3", "by=4"),
        ("7 *", "8 *"),
        ("u.a", "u.b"),
        ("x * RATE", "x / RATE"),
    ):
        assert digest(BASE.replace(old, new)) != digest(BASE), new


def test_byte_code_of_another_python_cannot_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.implementation, "cache_tag", "cpython-27")
    saved = pickle.dumps(declare(0.5))
    monkeypatch.undo()
    found = declare(0.25)
    assert pickle.loads(saved) is found
    declare(0.5, gates="ab")
    with pytest.raises(ValueError, match="is not the one that was saved"):
        pickle.loads(saved)


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"},
    )


DECLARATION = """
import torch, fastrnn
@fastrnn.cell(gates="a", states="h")
def elsewhere(u, v, h): return 0.5 * h + u.a + v.a
"""


def test_a_fresh_process_imports_the_module_of_the_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module_of_a_cell.py").write_text(DECLARATION)
    monkeypatch.syspath_prepend(tmp_path)
    layer = fastrnn.Recurrent(importlib.import_module("module_of_a_cell").elsewhere, 2, 3)
    (tmp_path / "saved").write_bytes(pickle.dumps(layer))
    x = torch.ones(3, 2)
    load = "import pickle, torch; layer = pickle.load(open('saved', 'rb'))\n"
    done = run(load + "print(layer(torch.ones(3, 2))[0].double().sum().item())", tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(layer(x)[0].double().sum().item())

    (tmp_path / "module_of_a_cell.py").write_text(DECLARATION.replace("0.5", "0.25"))
    done = run(load, tmp_path)
    assert "the cell 'elsewhere' declared here is not the one that was saved" in done.stderr
    assert "in module module_of_a_cell, as elsewhere" in done.stderr


def test_a_cell_of_a_script_must_be_declared_again(tmp_path: Path) -> None:
    save = "import pickle; pickle.dump(fastrnn.Recurrent(elsewhere, 2, 3), open('saved', 'wb'))"
    done = run(DECLARATION + save, tmp_path)
    assert done.returncode == 0, done.stderr
    saved = (tmp_path / "saved").read_bytes()
    with pytest.raises(ValueError, match=r"no cell named 'elsewhere' .* in the script .* declare"):
        pickle.loads(saved)
    names: dict[str, Any] = {"__name__": "notebook"}
    exec(DECLARATION, names)
    assert pickle.loads(saved).cell is names["elsewhere"]


# Cells sent by value to processes that never saw them.

SENDER = """
import functools, sys
import cloudpickle, torch, fastrnn
RATE = 0.5
def helper(x): return torch.tanh(x) * RATE
def begin(u, v): u.a.bias.fill_(RATE)
@fastrnn.cell(gates="a", states="h", initialize=begin)
def scripted(u, v, h): return 0.5 * h + helper(u.a + v.a)
def declare(kept):
    @fastrnn.cell(gates="a", states="hc")
    def enclosed(u, v, h, c): return helper(kept * h + u.a), scripted.function(u, v, c)
    return enclosed
notebook = {"__name__": "__main__"}
exec('''
import torch, fastrnn
scale = torch.tensor(0.25)
@fastrnn.cell(gates="a", states="h")
def typed(u, v, h): return scale * h + torch.tanh(u.a + v.a)
''', notebook)
partial = fastrnn.cell(gates="a", states="h", name="partial")(
    functools.partial(lambda u, v, h, by: by * h + u.a, by=3.0)
)
cells = [scripted, declare(0.75), notebook["typed"], partial]
x = torch.linspace(-1, 1, 6).view(3, 2)
after = [c.step([x], [2 * x], [x] * len(c.states)) for c in cells]
model = torch.nn.Sequential(torch.nn.Linear(2, 2), fastrnn.Recurrent(scripted, 2, 3))
with open("sent", "wb") as file:
    cloudpickle.dump((cells, after, model, x, model(x)[0].detach()), file)
"""
RECEIVER = """
import pickle, warnings
import cloudpickle, torch, fastrnn
assert not hasattr(cloudpickle.cloudpickle, "scripted")
@fastrnn.cell(gates="a", states="hc")
def enclosed(u, v, h, c): return h, c  # another one of the same name
load = lambda: pickle.load(open("sent", "rb"))
cells, after, model, x, y = load()
assert [c.name for c in cells] == ["scripted", "enclosed", "typed", "partial"]
for cell, wanted in zip(cells, after):
    got = cell.step([x], [2 * x], [x] * len(cell.states))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted)), cell
with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)  # that it is not compiled
    torch.testing.assert_close(model(x)[0], y)
assert model[1].cell is cells[0] is fastrnn.cells.get("scripted")
assert fastrnn.cells.get("enclosed") is enclosed is not cells[1]
# Another load finds the same, so that nothing is derived or compiled for each task.
assert all(a is b for a, b in zip(load()[0], cells))
# So do their initial values.
assert (fastrnn.Recurrent(cells[0], 2, 3).bias_ih_l0 == 0.5).all()
# They are sent on: by value once more, or by the name that they have here now.
again = pickle.loads(cloudpickle.dumps(cells))
assert all(a is b for a, b in zip(again, cells))
assert pickle.loads(pickle.dumps(model))[1].cell is cells[0]
try:
    pickle.loads(pickle.dumps(cells[1]))
except ValueError as error:
    print(error)
with open("back", "wb") as file:
    pickle.dump(cells[0], file)
"""


def test_cloudpickle_takes_cells_along(tmp_path: Path) -> None:
    """Cells of a script, a function and a notebook, with the globals and helpers that they read."""
    pytest.importorskip("cloudpickle")
    done = run(SENDER, tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(RECEIVER, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the cell 'enclosed' declared here is not the one that was saved" in done.stdout
    # A cell that comes back by name is known in the process that declared it.
    home = SENDER + "\nimport pickle\nassert pickle.load(open('back', 'rb')) is scripted"
    done = run(home, tmp_path)
    assert done.returncode == 0, done.stderr


def test_cloudpickle_leaves_cells_of_modules_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It treats cells as functions: it sends them only if the user registered the module for it."""
    cloudpickle = pytest.importorskip("cloudpickle")
    (here := tmp_path / "here").mkdir()
    (there := tmp_path / "there").mkdir()
    (here / "module_of_one_side.py").write_text(DECLARATION)
    monkeypatch.syspath_prepend(here)
    module = importlib.import_module("module_of_one_side")
    assert cloudpickle.loads(cloudpickle.dumps(module.elsewhere)) is module.elsewhere

    (there / "saved").write_bytes(cloudpickle.dumps(module.elsewhere))
    load = "import pickle, torch; c = pickle.load(open('saved', 'rb')); x = [torch.ones(2)]\n"
    done = run(load, there)
    assert "no cell named 'elsewhere' is declared here (No module named" in done.stderr

    cloudpickle.register_pickle_by_value(module)
    try:
        (there / "saved").write_bytes(cloudpickle.dumps(module.elsewhere))
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    done = run(load + "print(c.step(x, x, x)[0].tolist())", there)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[2.5, 2.5]"


def test_the_digest_sees_captured_tensors_and_settings() -> None:
    def capturing(value: Any) -> str:
        def step(u: Any, v: Any, h: Tensor) -> Tensor:
            return value * h + u.a

        return digest_of(step)

    def settings(rate: float) -> types.SimpleNamespace:
        return types.SimpleNamespace(rate=rate)

    for make in (torch.tensor, settings, lambda rate: {"rate": rate}):
        assert capturing(make(0.5)) == capturing(make(0.5)) != capturing(make(0.25)), make
