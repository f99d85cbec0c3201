"""Copies of cells, and cells that are saved, stay the same."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn import cells
from fastrnn.cells import Cell
from fastrnn.cells import declare as declaration
from tests.support.declarations import leaky, with_params, with_rows
from tests.support.paths import ROOT


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
        ValueError, match=r"no cell named 'changing' .*test_pickling, as declare.*declare"
    ):
        pickle.loads(saved)


def test_rows_are_saved_with_a_cell() -> None:
    saved = pickle.dumps(fastrnn.Recurrent(with_rows("rows", inputs="a", recurrent="b"), 3, 5))
    again = with_rows("rows", inputs="a", recurrent="b")
    assert pickle.loads(saved).cell is again
    with_rows("rows")
    with pytest.raises(ValueError, match=r"'rows' declared here is not .* state_dict"):
        pickle.loads(saved)


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


def test_built_in_cells_are_saved_by_name() -> None:
    """Another version may write their function differently."""
    assert cells.lstm.__reduce__() == (cells.get, ("lstm",))
    impostor = Cell("lstm", ("a",), ("h",), leaky)
    with pytest.raises(ValueError, match="'lstm' declared here is not the one that was saved"):
        pickle.loads(pickle.dumps(impostor))


def test_pickles_of_older_versions_say_less() -> None:
    cell = declare(0.5)
    restore, parts = cell.__reduce__()
    assert restore(*parts[:6]) is cell
    declare(0.25)
    with pytest.raises(ValueError, match="is not the one that was saved"):
        restore(*parts[:6])


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
