"""Models exported by `torch.onnx.export(dynamo=True)`, in ONNX Runtime, with numbers of steps and
sequences that they were not exported with."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

import fastrnn
from fastrnn import cells, kernels
from fastrnn.integrations.onnx import decompositions
from tests.support.derivations import USERS
from tests.support.tensors import flatten, mapped
from tests.support.weights import without_zeros

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.takes(4)


class Given(NamedTuple):
    """What the call of a layer gets besides its input."""

    hx: bool = False
    lengths: bool = False
    resets: bool = False
    begins: bool = False


class Model(nn.Module):
    def __init__(self, layer: nn.Module, **options: Any) -> None:
        super().__init__()
        self.layer, self.options = layer, options

    def forward(
        self,
        x: Tensor,
        hx: Any = None,
        lengths: Tensor | None = None,
        resets: Any = None,
        begins: Any = None,
    ) -> Any:
        options = self.options if begins is None else {**self.options, "reset_states": begins}
        return self.layer(x, hx, lengths=lengths, resets=resets, **options)


def arguments(layer: Any, given: Given, steps: int, batch: int) -> tuple[Any, ...]:
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = [layer.proj_size or layer.hidden_size]
    widths += [layer.hidden_size] * (len(layer._cell().states) - 1)
    states = tuple(torch.randn(count, batch, width) for width in widths)
    shape = (batch, steps) if layer.batch_first else (steps, batch)
    return (
        torch.randn(*shape, layer.input_size),
        (states if len(states) > 1 else states[0]) if given.hx else None,
        torch.randint(0, steps + 1, (batch,)) if given.lengths else None,
        torch.rand(shape) < 0.3 if given.resets else None,
        mapped(states if len(states) > 1 else states[0], torch.tanh) if given.begins else None,
    )


def shapes(layer: Any, given: Given) -> tuple[Any, ...]:
    first = {0: Dim("B"), 1: Dim("T")} if layer.batch_first else {0: Dim("T"), 1: Dim("B")}
    states = tuple({1: Dim("B")} for _ in layer._cell().states)
    return (
        first,
        (states if len(states) > 1 else states[0]) if given.hx else None,
        {0: Dim("B")} if given.lengths else None,
        first if given.resets else None,
        (states if len(states) > 1 else states[0]) if given.begins else None,
    )


def exported(model: Any, args: tuple[Any, ...], dynamic: Any, folder: Path, **more: Any) -> Any:
    """The nodes of a model, counted by name, and a function that runs it in ONNX Runtime."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, args, dynamo=True, dynamic_shapes=dynamic, verbose=False, **more
        )
    assert program is not None
    program.save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [each.name for each in session.get_inputs()]

    def run(*args: Any) -> list[Tensor]:
        given = flatten([a for a in args if a is not None])
        feed = {name: t.numpy() for name, t in zip(names, given, strict=True)}
        return [torch.from_numpy(y) for y in session.run(None, feed)]

    return Counter(node.op_type for node in program.model.graph), run


def assert_same(run: Any, model: nn.Module, args: tuple[Any, ...]) -> None:
    with torch.no_grad(), kernels.use("reference"):
        expected = flatten(model(*args))
    for found, wanted in zip(run(*args), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def check(
    layer: Any, given: Given, folder: Path, *, options: dict[str, Any] | None = None, **more: Any
) -> Counter[str]:
    """Export a layer and run it with other sizes. Returns its nodes."""
    model = Model(layer, **options or {}).eval()
    nodes, run = exported(
        model, arguments(layer, given, 4, 2), shapes(layer, given), folder, **more
    )
    for steps, batch in ((7, 3), (1, 1)):
        assert_same(run, model, arguments(layer, given, steps, batch))
    return nodes


NODES: dict[str, tuple[Any, Given, dict[str, int]]] = {
    "LSTM": (lambda: fastrnn.LSTM(3, 5), Given(), {"LSTM": 1}),
    "GRU": (lambda: fastrnn.GRU(3, 5), Given(), {"GRU": 1}),
    "tanh": (lambda: fastrnn.RNN(3, 5), Given(hx=True), {"RNN": 1}),
    "relu": (lambda: fastrnn.RNN(3, 5, nonlinearity="relu", bias=False), Given(), {"RNN": 1}),
    "states": (lambda: fastrnn.LSTM(3, 5, num_layers=2), Given(hx=True), {"LSTM": 2}),
    "both directions": (
        lambda: fastrnn.LSTM(3, 5, num_layers=2, bidirectional=True, batch_first=True),
        Given(hx=True, lengths=True),
        {"LSTM": 2},
    ),
    "both directions of tanh": (lambda: fastrnn.RNN(3, 5, bidirectional=True), Given(), {"RNN": 1}),
    "lengths": (
        lambda: fastrnn.GRU(3, 5, num_layers=2, bias=False),
        Given(hx=True, lengths=True),
        {"GRU": 2},
    ),
    "heads": (
        lambda: fastrnn.GRU(3, 6, bidirectional=True, heads=2),
        Given(hx=True),
        {"GRU": 4},
    ),
    "dropout": (
        lambda: fastrnn.GRU(3, 5, num_layers=2, dropout=0.5, recurrent_dropout=0.3),
        Given(),
        {"GRU": 2},
    ),
}


@pytest.mark.parametrize("name", NODES)
def test_built_in_cells_are_standard_nodes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, given, wanted = NODES[name]
    nodes = check(make(), given, tmp_path)
    assert {n: nodes[n] for n in ("LSTM", "GRU", "RNN", "Scan") if nodes[n]} == wanted


@fastrnn.cell(gates="a", states="h", name="onnx_mixing")
def mixing(u: Any, v: Any, h: Tensor) -> Tensor:
    """No formula of single units: no other kernel than the reference runs it."""
    return torch.tanh(u.a + v.a - h.cumsum(-1))


SCANS: dict[str, tuple[Any, Given]] = {
    "projected": (lambda: fastrnn.LSTM(3, 5, num_layers=2, proj_size=2), Given(True, True)),
    "projected with norms": (lambda: fastrnn.LayerNormLSTM(3, 5, proj_size=2), Given(True, True)),
    "resets": (lambda: fastrnn.GRU(3, 5, bidirectional=True), Given(lengths=True, resets=True)),
    "cell": (
        lambda: fastrnn.Recurrent(cells.mgu, 3, 5, num_layers=2, bidirectional=True),
        Given(True, True),
    ),
    "parameters": (lambda: fastrnn.Recurrent(cells.fast_grnn, 3, 5), Given()),
    "four states": (lambda: fastrnn.Recurrent(cells.slstm, 3, 5), Given()),
    "batch first": (
        lambda: fastrnn.Recurrent(cells.peephole_lstm, 3, 5, batch_first=True),
        Given(hx=True, resets=True),
    ),
    "episodes": (
        lambda: fastrnn.LSTM(3, 5, num_layers=2, bidirectional=True),
        Given(hx=True, lengths=True, resets=True, begins=True),
    ),
    "norms": (lambda: fastrnn.LayerNormLSTM(3, 5, 2), Given(True, True)),
    "another product": (lambda: fastrnn.GRUResetBefore(3, 5, bidirectional=True), Given()),
    "zoneout": (lambda: fastrnn.LSTM(3, 5, zoneout=(0.1, 0.4)), Given(True, True)),
    "clipped gradients": (lambda: fastrnn.GRU(3, 5, batch_first=True, clip_grad_step=1), Given()),
    "no formula": (lambda: fastrnn.Recurrent(mixing, 3, 5), Given()),
}


@pytest.mark.parametrize("name", SCANS)
def test_all_else_is_a_scan(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, given = SCANS[name]
    layer = without_zeros(make())
    nodes = check(layer, given, tmp_path)
    assert nodes["Scan"] == layer.num_layers * (2 if layer.bidirectional else 1)
    assert nodes["LSTM"] + nodes["GRU"] + nodes["RNN"] == 0


def test_episodes_begin_in_parts_of_one_tensor(tmp_path: Path) -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = fastrnn.LSTM(3, 5)
            self.begins = nn.Parameter(torch.randn(2, 1, 1, 5))

        def forward(self, x: Tensor, resets: Tensor) -> Any:
            return self.layer(x, resets=resets, reset_states=self.begins.unbind())

    model, args = Learned().eval(), (torch.randn(4, 2, 3), torch.rand(4, 2) < 0.5)
    _, run = exported(model, args, None, tmp_path)
    assert_same(run, model, args)


@pytest.mark.takes(35)
def test_every_function_of_a_cell(tmp_path: Path) -> None:
    """In one model, because exporting takes seconds."""
    torch.manual_seed(0)

    class Each(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            names = ("choices", "powers", "steps", "passing", "lacking", "alone")
            chosen = [c for c in USERS if c.name in names]
            assert len(chosen) == 6
            self.layers = nn.ModuleList(fastrnn.Recurrent(c, 3, 5) for c in chosen)

        def forward(self, x: Tensor) -> Any:
            return [layer(0.1 * x) for layer in self.layers]

    model = Each().eval()
    nodes, run = exported(model, (torch.randn(4, 2, 3),), ({0: Dim("T"), 1: Dim("B")},), tmp_path)
    assert nodes["Scan"] == 6
    assert_same(run, model, (torch.randn(3, 3, 3),))


def test_states_after_every_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = fastrnn.LSTM(3, 5, num_layers=2, bidirectional=True)
    nodes = check(layer, Given(lengths=True), tmp_path, options={"return_states": True})
    assert nodes["Scan"] == 4


def test_an_unbatched_sequence_and_a_cell(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.cell = fastrnn.GRU(3, 5), fastrnn.LSTMCell(5, 4)

        def forward(self, x: Tensor) -> Any:
            return self.cell(self.layer(x)[0])

    model = Both().eval()
    _, run = exported(model, (torch.randn(4, 3),), ({0: Dim("T")},), tmp_path)
    assert_same(run, model, (torch.randn(6, 3),))


class Packed(nn.Module):
    """A layer on packed input, of which a program gets the parts."""

    def __init__(self, layer: nn.Module, **options: Any) -> None:
        super().__init__()
        self.layer, self.options = layer, options

    def forward(
        self, data: Tensor, batch_sizes: Tensor, order: Any, restore: Any, hx: Any, resets: Any
    ) -> Any:
        x = PackedSequence(data, batch_sizes, order, restore)
        options = self.options
        if resets is not None:
            options = {**options, "resets": x._replace(data=resets), "reset_states": hx}
        y, last, *steps = self.layer(x, hx, **options)
        return y.data, last, [[part.data for part in layer] for layers in steps for layer in layers]


def parts_of(layer: Any, lengths: list[int], ordered: bool, resets: bool) -> tuple[Any, ...]:
    """Arguments of `Packed`: ordered sequences have no indices."""
    parts = pack_sequence([torch.randn(n, 3) for n in lengths], enforce_sorted=ordered)
    rows, count = parts.data.size(0), len(layer._all_weights)
    hx = tuple(torch.randn(count, len(lengths), 5) for _ in layer._cell().states)
    flags = torch.rand(rows) < 0.3 if resets else None
    return *parts, hx if len(hx) > 1 else hx[0], flags


PACKED: dict[str, tuple[Any, bool, bool, str]] = {
    "LSTM": (lambda: fastrnn.LSTM(3, 5, 2, bidirectional=True), False, False, "LSTM"),
    "in order": (lambda: fastrnn.GRU(3, 5, batch_first=True), True, False, "GRU"),
    "episodes": (lambda: fastrnn.LSTM(3, 5, batch_first=True), False, True, "Scan"),
    "cell": (lambda: fastrnn.LayerNormGRU(3, 5, bidirectional=True), True, False, "Scan"),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_input_is_padded(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, ordered, resets, node = PACKED[name]
    layer = make()
    steps = {"return_states": True} if name == "episodes" else {}
    model = Packed(layer, **steps).eval()
    rows, batch = {0: Dim("R")}, {0: Dim("B")}
    indices = None if ordered else batch
    states = tuple({1: Dim("B")} for _ in layer._cell().states)
    hx = states if len(states) > 1 else states[0]
    dynamic = rows, {0: Dim("T")}, indices, indices, hx, rows if resets else None
    args = parts_of(layer, [4, 2, 1] if ordered else [2, 4, 1], ordered, resets)
    nodes, run = exported(model, args, dynamic, tmp_path)
    assert nodes[node] == layer.num_layers * (2 if node == "Scan" and layer.bidirectional else 1)
    for lengths in ([3, 3, 2], [5, 1, 1]) if ordered else ([1, 6, 3, 6], [2, 3]):
        assert_same(run, model, parts_of(layer, lengths, ordered, resets))


def test_a_packed_sequence_is_an_input_of_fixed_size(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = fastrnn.GRU(3, 5)

        def forward(self, x: PackedSequence) -> Any:
            y, last = self.layer(x)
            return y.data, last

    model, x = Own().eval(), pack_sequence([torch.randn(n, 3) for n in (4, 2)])
    nodes, run = exported(model, (x,), None, tmp_path)
    assert nodes["GRU"] == 1
    with torch.no_grad():
        expected = flatten(model(x))
    for found, wanted in zip(run(x.data, x.batch_sizes), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_torch_exports_no_packing(enforce_sorted: bool) -> None:
    class Packing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = fastrnn.GRU(3, 5)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
            return pad_packed_sequence(self.layer(packed)[0])[0]

    args = torch.randn(4, 2, 3), torch.tensor([4, 2])
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as caught:
        exported(Packing().eval(), args, None, Path())
    assert "lengths= instead" in str(caught.value.__cause__)


@pytest.mark.parametrize("noise", [{"zoneout": 0.1}, {"recurrent_dropout": 0.1}])
def test_random_numbers_are_refused(noise: dict[str, Any]) -> None:
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as caught:
        exported(Model(fastrnn.LSTM(3, 5, **noise)), (torch.randn(4, 2, 3),), None, Path())
    assert "call eval() on the model" in str(caught.value.__cause__)


@pytest.mark.parametrize("prepare", [fastrnn.freeze, fastrnn.quantize_])
def test_frozen_and_quantised_layers(prepare: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model(fastrnn.LSTM(16, 16)).eval()
    prepare(model)
    args = (torch.randn(4, 2, 16),)
    nodes, run = exported(model, args, ({0: Dim("T"), 1: Dim("B")},), tmp_path)
    assert nodes["LSTM"] == 1
    assert_same(run, model, (torch.randn(5, 3, 16),))


@pytest.mark.parametrize(
    ("dtype", "node"), [(torch.float64, "Scan"), (torch.float16, "LSTM")], ids=str
)
def test_other_dtypes(dtype: torch.dtype, node: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model(fastrnn.LSTM(3, 5)).to(dtype).eval()
    x = torch.randn(4, 2, 3, dtype=dtype)
    nodes, run = exported(model, (x,), ({0: Dim("T"), 1: Dim("B")},), tmp_path)
    assert nodes[node] == 1
    x = torch.randn(5, 3, 3, dtype=dtype)
    (y, *_), bound = run(x), 2e-3 if dtype == torch.float16 else 1e-12
    with torch.no_grad():
        torch.testing.assert_close(y, model(x)[0], rtol=bound, atol=bound)


def test_static_sizes_and_an_older_opset(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer: Any = fastrnn.LSTM(3, 5, bidirectional=True)
    model = Model(layer).eval()
    args = (torch.randn(4, 2, 3),)
    nodes, run = exported(model, args, None, tmp_path, opset_version=18)
    assert nodes["LSTM"] == 1
    assert_same(run, model, (torch.randn(4, 2, 3),))


@pytest.mark.parametrize("name", ["LSTM", "projected", "cell"])
def test_a_program_of_torch_export(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    makers: dict[str, Any] = {
        "LSTM": lambda: fastrnn.LSTM(3, 5, num_layers=2, bidirectional=True),
        "projected": lambda: fastrnn.LSTM(3, 5, proj_size=2),
        "cell": lambda: fastrnn.Recurrent(cells.mgu, 3, 5, bias=False),
    }
    layer, given = makers[name](), Given(hx=True, lengths=True)
    model = Model(layer).eval()
    args = arguments(layer, given, 4, 2)[:3]
    program = torch.export.export(model, args, dynamic_shapes=(*shapes(layer, given)[:3],))
    program = program.run_decompositions(decompositions())
    nodes, run = exported(program, (), None, tmp_path)
    assert nodes["Scan" if name != "LSTM" else "LSTM"] == layer.num_layers
    assert_same(run, model, arguments(layer, given, 7, 3))


def test_layers_compute_as_before_afterwards(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = fastrnn.GRU(3, 5)
    x = torch.randn(4, 2, 3)
    before = layer(x)[0]
    exported(Model(layer), (x,), None, tmp_path)
    assert torch.equal(layer(x)[0], before)
    program = torch.export.export(Model(layer), (x,))
    assert any("fastrnn.scan" in str(node.target) for node in program.graph.nodes)
