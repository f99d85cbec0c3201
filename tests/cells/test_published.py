"""Published cells against loops written from their papers, and how they are found."""

from __future__ import annotations

import dataclasses
import functools
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize

import fastrnn
from fastrnn import cells, kernels, ops
from fastrnn.cells import Cell
from fastrnn.cells.published import MODULES
from fastrnn.cells.published.antisymmetric import Antisymmetric
from fastrnn.cells.published.indrnn import long_memory
from fastrnn.cells.published.janet import chrono
from fastrnn.cells.published.slstm import powerlaw
from fastrnn.compiler.emit_cpp import key
from tests.support.derivations import by_autograd, derived_step, inputs
from tests.support.operands import by_reference, operands, run
from tests.support.papers import STEPS, loop
from tests.support.paths import ROOT

every_name = pytest.mark.parametrize("name", MODULES)


def given(cell: Cell, bias: bool = True) -> dict[str, Any]:
    made = operands(cell, steps=5, batch=3, inputs=4, hidden=6, bias=bias)
    if cell.name == "slstm":  # its normalizer is positive
        made["s0"][2] = made["s0"][2].abs() + 0.5
    return made


def assert_same(ours: dict[str, Tensor], paper: dict[str, Tensor]) -> None:
    assert ours.keys() == paper.keys()
    for what, right in paper.items():
        torch.testing.assert_close(ours[what], right, rtol=1e-10, atol=1e-12, msg=what)


# The formulas.


def test_every_cell_has_a_loop() -> None:
    assert STEPS.keys() == MODULES.keys()


@every_name
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_reference_computes_what_the_paper_does(name: str, bias: bool) -> None:
    """Outputs, final states, and gradients of input, weights and initial states."""
    cell = cells.get(name)
    arguments = given(cell, bias)
    assert_same(run(by_reference, cell, arguments), run(loop, cell, arguments))


@every_name
def test_the_derivative_is_that_of_autograd(name: str) -> None:
    cell = cells.get(name)
    groups = inputs(cell)
    after, grads = derived_step(cell, *groups)
    want_after, want_grads = by_autograd(cell, *groups)
    torch.testing.assert_close(after, want_after, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(grads, want_grads, rtol=1e-11, atol=1e-11)


@every_name
@pytest.mark.compiles
@pytest.mark.takes(15)
def test_the_cpu_kernel_computes_what_the_paper_does(name: str) -> None:
    cell = cells.get(name)
    arguments = given(cell)
    with kernels.use("cpu"):
        ours = run(ops.scan, cell, arguments)
    assert_same(ours, run(loop, cell, arguments))


def test_slstm_from_zeros_is_that_of_the_formula_without_stabiliser() -> None:
    """h = o·c/n, with the exponential gates themselves."""
    made = given(cells.slstm)
    made["s0"] = [torch.zeros_like(s) for s in made["s0"]]
    y, (_, c, n, m) = by_reference(cells.slstm, **made)
    rows = [w[0].split(6) for w in (made["w_ih"], made["w_hh"], made["b_ih"], made["b_hh"])]
    h, plain_c, plain_n = (torch.zeros(3, 6, dtype=torch.float64) for _ in range(3))
    for t, x in enumerate(made["x"]):
        i, f, z, o = (x @ w.T + h @ r.T + b + d for w, r, b, d in zip(*rows, strict=True))
        plain_c = f.sigmoid() * plain_c + i.exp() * z.tanh()
        plain_n = f.sigmoid() * plain_n + i.exp()
        h = o.sigmoid() * plain_c / plain_n
        torch.testing.assert_close(y[t], h)
    torch.testing.assert_close(c[0] * m[0].exp(), plain_c)
    torch.testing.assert_close(n[0] * m[0].exp(), plain_n)


@pytest.mark.parametrize("gate", [-400.0, 400.0])
def test_slstm_begins_with_any_gate(gate: float) -> None:
    """The stabiliser takes the first gate as it is, whatever its scale."""
    layer: Any = fastrnn.Recurrent(cells.slstm, 4, 8)
    with torch.no_grad():
        layer.bias_ih_l0[:8] = gate
    x = torch.randn(3, 2, 4)
    with kernels.use("reference"):
        y = layer(x)[0]
        gradients = torch.autograd.grad(y.sum(), list(layer.parameters()))
    assert y[0].abs().max() > 1e-3
    assert all(g.isfinite().all() for g in (y, *gradients))


# How they are found.


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_they_are_found_on_demand() -> None:
    in_a_fresh_process("""
import sys, fastrnn
loaded = lambda: {m.rpartition(".")[2] for m in sys.modules if "fastrnn.cells.published." in m}
assert not loaded()
assert fastrnn.cells.janet is fastrnn.cells.get("janet")
assert loaded() == {"fill", "janet"}
assert not fastrnn.cells.janet.is_built_in
from fastrnn.cells import cfn
assert cfn is fastrnn.cells.get("cfn")
assert not {"janet", "cfn"} & set(fastrnn.cells.names())
assert {"janet", "cfn", "slstm"} <= set(dir(fastrnn.cells))
""")


@every_name
def test_name_and_module(name: str) -> None:
    cell = cells.get(name)
    assert cell is getattr(cells, name)
    assert cell.name == name
    assert cell.function.__module__ == f"fastrnn.cells.published.{MODULES[name]}"
    assert re.search("arXiv:|doi:", cell.function.__doc__ or "")


def test_an_unknown_name_lists_them() -> None:
    with pytest.raises(ValueError, match=r"'jannet'; there are: rnn_tanh, .*, janet, "):
        cells.get("jannet")
    with pytest.raises(AttributeError, match=r"'fastrnn\.cells' has no attribute 'jannet'"):
        cells.jannet  # noqa: B018


DECLARED = """
import fastrnn
@fastrnn.cell(gates="a", states="h")
def janet(u, v, h): return h + u.a
"""


@pytest.mark.parametrize("first", ["", "import fastrnn; fastrnn.cells.janet"])
def test_a_user_may_take_a_name(first: str) -> None:
    """The published cell may be imported before or after."""
    then = """
import pickle
published = fastrnn.cells.janet
assert published is not janet and published.gates == ("f", "c")
assert fastrnn.cells.get("janet") is janet
assert fastrnn.cells.names()[-1] == "janet"
for cell in (janet, published):
    layer = fastrnn.Recurrent(cell, 2, 3)
    assert pickle.loads(pickle.dumps(layer)).cell is cell
"""
    in_a_fresh_process(first + DECLARED + then)


def test_a_fresh_process_loads_a_layer(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.write_bytes(pickle.dumps(fastrnn.Recurrent(cells.star, 2, 3)))
    load = f"import pickle; print(pickle.load(open({str(saved)!r}, 'rb')).cell.name)"
    assert in_a_fresh_process(load) == "star"


def test_an_exported_program_finds_its_cell_by_name() -> None:
    in_a_fresh_process(f"""
from fastrnn.kernels.prepare import cell_of, find
find({key(cells.atr)!r}, "cuda", "float32")
import fastrnn
assert cell_of({key(cells.atr)!r}) is fastrnn.cells.atr
find("atr", "cuda", "float32")
find("unknown-0123abcd", "cuda", "float32")
""")


# Initial values.


def layer_of(cell: Cell, **options: Any) -> Any:
    return fastrnn.Recurrent(cell, 5, 6, **options)


def blocks(layer: Any, gate: str, head: int | None = None) -> list[Tensor]:
    """The rows of a gate in weight_ih, weight_hh, bias_ih and bias_hh of the first layer."""
    found = []
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        names = layer.cell.inputs if kind.endswith("ih") else layer.cell.recurrent
        if gate in names:
            own = getattr(layer, f"{kind}_l0").detach()
            own = own if head is None else own[head]
            found.append(own.chunk(len(names))[names.index(gate)])
    return found


@pytest.mark.parametrize(
    ("name", "gate", "value"),
    [
        *(("janet", "f", 1.0), ("janet", "c", 0.0), ("ugrnn", "g", 1.0), ("irnn", "h", 0.0)),
        *(("cfn", "theta", 1.0), ("cfn", "eta", -1.0), ("cfn", "w", 0.0)),
        *(("antisymmetric_rnn", "h", 0.0), ("nbrc", "a", 0.0), ("nbrc", "n", 0.0)),
        *(("gated_antisymmetric_rnn", gate, 0.0) for gate in "zh"),
        *(("ran", gate, 0.0) for gate in "gif"),
        *((f"layer_norm_{kind}", gate, 0.0) for kind in ("lstm", "lstm_sums") for gate in "ifgo"),
        *(("rms_norm_lstm", gate, 0.0) for gate in "ifgo"),
        *(("layer_norm_gru", gate, 0.0) for gate in "rzn"),
        *(("dreamer_gru", gate, 0.0) for gate in "rnz"),
        *(("slstm", gate, 0.0) for gate in "izo"),
    ],
)
def test_biases(name: str, gate: str, value: float) -> None:
    cell = cells.get(name)
    biases = [b for b in blocks(layer_of(cell), gate) if b.dim() == 1]
    assert len(biases) == (gate in cell.inputs) + (gate in cell.recurrent)
    assert torch.equal(torch.stack(biases).sum(0), torch.full((6,), value))
    assert not hasattr(layer_of(cell, bias=False), "bias_ih_l0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_orthogonal_matrices(dtype: torch.dtype) -> None:
    lstms = ("layer_norm_lstm", "rms_norm_lstm")
    for name, gate in (
        *(("ligru", "z"), ("ligru", "n"), ("star", "k")),
        *((name, gate) for name in lstms for gate in "ifgo"),
        *((name, gate) for name in ("layer_norm_gru", "gru_reset_before") for gate in "rzn"),
    ):
        r = blocks(layer_of(cells.get(name), dtype=dtype), gate)[1].double()
        torch.testing.assert_close(r @ r.T, torch.eye(6).double(), atol=0.05, rtol=0)
    w = blocks(layer_of(cells.star, dtype=dtype), "z")[0].double()
    torch.testing.assert_close(w.T @ w, torch.eye(5).double(), atol=0.05, rtol=0)


def test_indrnn_begins_with_every_memory() -> None:
    layer: Any = fastrnn.Recurrent(cells.indrnn, 3, 400)
    assert not hasattr(layer, "weight_hh_l0")
    u = layer.weight_u_l0.detach()
    assert 0 <= u.min() < 0.1 and 0.9 < u.max() <= 1
    cell = dataclasses.replace(cells.indrnn, initialize=long_memory(100))
    layer = fastrnn.Recurrent(cell, 3, 400)
    u = layer.weight_u_l0.detach()
    assert 0.5 <= u.pow(100).min() < 0.6 and 1.8 < u.pow(100).max() <= 2.001
    assert key(cell) == key(cells.indrnn)
    for steps, change in ((0, 2.0), (5, 1.0)):
        with pytest.raises(ValueError, match="takes steps >= 1 and change > 1"):
            long_memory(steps, change)


def test_irnn_begins_with_the_identity() -> None:
    w, r, *_ = blocks(layer_of(cells.irnn), "h")
    assert torch.equal(r, torch.eye(6))
    assert 0 < w.abs().max() < 0.01


def wide(name: str) -> Any:
    """A layer of which the distribution of its values can be seen."""
    torch.manual_seed(0)
    return fastrnn.Recurrent(cells.get(name), 300, 200)


@pytest.mark.parametrize(
    ("name", "gate", "which", "std"),
    [
        ("gru_reset_before", "r", 0, 0.01),
        ("gru_reset_before", "n", 0, 0.01),
        ("antisymmetric_rnn", "h", 0, 300**-0.5),
        ("gated_antisymmetric_rnn", "z", 0, 300**-0.5),
        ("slstm", "i", 0, (2 / 1500) ** 0.5),
        ("slstm", "o", 0, (2 / 1500) ** 0.5),
    ],
)
def test_normal_matrices(name: str, gate: str, which: int, std: float) -> None:
    w = blocks(wide(name), gate)[which]
    assert abs(w.std() / std - 1) < 0.02 and abs(w.mean()) < 0.02 * std
    assert w.abs().max() > 3.5 * std  # no uniform one reaches that


@pytest.mark.parametrize(
    ("name", "gate", "which", "bound"),
    [
        *(("cfn", gate, which, 0.07) for gate in ("theta", "eta") for which in (0, 1)),
        ("cfn", "w", 0, 0.07),
        *(("nbrc", gate, 0, (6 / 500) ** 0.5) for gate in "acn"),
        *(("nbrc", gate, 1, (6 / 400) ** 0.5) for gate in "ac"),
        *(("dreamer_gru", gate, which, (6 / 1100) ** 0.5) for gate in "rnz" for which in (0, 1)),
    ],
)
def test_uniform_matrices(name: str, gate: str, which: int, bound: float) -> None:
    w = blocks(wide(name), gate)[which]
    assert 0.999 * bound < w.abs().max() <= bound * (1 + 1e-6)
    assert abs(w.std() / (bound / 3**0.5) - 1) < 0.02


def test_gains_and_biases_of_norms() -> None:
    for name in ("layer_norm_lstm", "layer_norm_lstm_sums", "layer_norm_gru", "rms_norm_lstm"):
        layer = layer_of(cells.get(name))
        for param in layer.cell.params:
            found = getattr(layer, f"weight_{param}_l0")
            expected = torch.full_like(found, float(param.startswith("gain")))
            if (name, param) == ("layer_norm_lstm_sums", "bias"):
                expected[6:12] = 1  # what TensorFlow adds to the forget gate
            assert torch.equal(found, expected), (name, param)


@pytest.mark.parametrize("heads", [1, 2])
def test_slstm_begins_as_the_authors_have_it(heads: int) -> None:
    layer = layer_of(cells.slstm, heads=heads)
    count = 6 // heads
    for head in range(heads):
        for gate in "ifzo":
            assert not blocks(layer, gate, head if heads > 1 else None)[1].any()
        _, _, b_ih, b_hh = blocks(layer, "f", head if heads > 1 else None)
        expected = [-(-5.0 + 12.0 * (k / (count - 1)) ** 0.3) for k in range(count)]
        torch.testing.assert_close(b_ih + b_hh, torch.tensor(expected))
    one: Any = fastrnn.Recurrent(cells.slstm, 3, 2, heads=2)  # heads of one unit
    assert torch.equal(one.bias_ih_l0[:, 1], torch.full((2,), 5.0))
    layer_of(cells.slstm, bias=False)


def test_slstm_in_a_stack_of_blocks() -> None:
    for block, blocks_, exponent in ((0, 3, 0.3), (1, 3, 0.95), (2, 3, 1.6), (0, 1, 0.3)):
        cell = dataclasses.replace(cells.slstm, initialize=powerlaw(block, blocks_))
        assert key(cell) == key(cells.slstm)
        _, _, b_ih, b_hh = blocks(layer_of(cell), "f")
        expected = torch.tensor([5 - 12 * (k / 5) ** exponent for k in range(6)])
        torch.testing.assert_close(b_ih + b_hh, expected)
    for block, count in ((1, 1), (-1, 2)):
        with pytest.raises(ValueError, match="takes 0 <= block < blocks"):
            powerlaw(block, count)


PUBLISHED_VALUES = {
    *("antisymmetric_rnn", "cfn", "dreamer_gru", "fast_grnn", "fast_rnn"),
    *("gated_antisymmetric_rnn", "gru_reset_before", "indrnn", "irnn", "janet"),
    *("layer_norm_gru", "layer_norm_lstm", "layer_norm_lstm_sums", "ligru", "nbrc", "ran"),
    *("rms_norm_lstm", "slstm", "star", "ugrnn"),
}


@every_name
def test_the_docstring_says_how_a_cell_begins(name: str) -> None:
    """A cell without values of its own begins as a layer of torch.nn, and says so."""
    cell = cells.get(name)
    text = " ".join((cell.function.__doc__ or "").split())
    assert re.search(r"\bbegins?\b", text)
    own = cell.initialize is not None or any(p.init is not None for p in cell.params.values())
    assert own == (name in PUBLISHED_VALUES)
    if not own:
        assert re.search("(It|All) begins with torch.nn's values", text)
        layer = layer_of(cell)
        bound = layer.hidden_size**-0.5
        assert all(p.abs().max() <= bound for p in layer.parameters())


def test_chrono() -> None:
    """The forget gate's bias gives spans between 1 and the longest dependency."""
    cell = dataclasses.replace(cells.janet, initialize=chrono(784))
    *_, b_ih, b_hh = blocks(fastrnn.Recurrent(cell, 3, 500), "f")
    spans = (b_ih + b_hh).exp()
    assert 1 <= spans.min() < 50 and 700 < spans.max() <= 784
    layer_of(cell, bias=False)
    assert key(cell) == key(cells.janet)
    with pytest.raises(ValueError, match="should have more than 2 steps, got 2"):
        chrono(2)


# Antisymmetric networks.


@pytest.mark.parametrize("name", ["antisymmetric_rnn", "gated_antisymmetric_rnn"])
@pytest.mark.parametrize("heads", [1, 2])
def test_the_antisymmetric_parametrization(name: str, heads: int) -> None:
    layer = layer_of(cells.get(name), heads=heads)
    parametrize.register_parametrization(layer, "weight_hh_l0", Antisymmetric(gamma=0.25))
    assert layer.parametrizations.weight_hh_l0.original.shape == layer.weight_hh_l0.shape
    for head in range(heads):
        matrices = [
            blocks(layer, gate, head if heads > 1 else None)[1] for gate in layer.cell.gates
        ]
        for r in matrices:
            torch.testing.assert_close(r + r.T, -0.5 * torch.eye(6 // heads))
            assert torch.equal(r, matrices[0])


def test_another_step_size() -> None:
    slow = fastrnn.cell(gates="h", states="h", name="slow")(
        functools.partial(cells.antisymmetric_rnn.function, step=0.5)
    )
    one = torch.ones(1, 2)
    (after,) = slow.step([one], [one], [one])
    torch.testing.assert_close(after, 1 + 0.5 * torch.tensor(2.0).tanh().expand(1, 2))
