"""Layers in C: the compiled steppers give the numbers of the layers."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastrnn
from fastrnn import cells, kernels
from fastrnn.compiler.derive import Underivable
from tests.support.compiled import STRICT, Stream, compiler, library
from tests.support.paths import ROOT
from tests.support.tensors import flatten
from tests.support.weights import without_zeros


@fastrnn.cell(
    gates="zn",
    states="hc",
    params={"own": "unit", "scale": fastrnn.Param("one", init=0.7)},
    name="exported_with_both_kinds",
)
def both_kinds(u: Any, v: Any, p: Any, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    z = torch.sigmoid(u.z + v.z + p.own * c)
    c = z * c + (1 - z) * torch.tanh(u.n + torch.exp(p.scale) * v.n)
    return torch.tanh(c) * torch.sigmoid(p.scale + p.own), c


@fastrnn.cell(
    gates="abc",
    states="hcd",
    params={"own": "unit", "scale": fastrnn.Param("one", init=0.7)},
    name="exported_with_stages",
)
def in_stages(u: Any, v: Any, p: Any, h: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """Each kind of product and reduction, states that are read after the next are known, and
    reductions of parameters alone, and of what nothing reads."""
    a = torch.softmax(p.scale * (u.a + v(torch.tanh(c)).a), -1)
    b = u.b * v(torch.tanh(c)).b + p.own.var(-1, keepdim=True)
    both = F.layer_norm(torch.cat([a, b], -1), [2 * h.shape[-1]])
    d.sum(-1)
    new = torch.tanh(u.c + v.c + both[..., : h.shape[-1]] * d.amax(-1, keepdim=True))
    spread = new.std(-1, correction=0, keepdim=True) + 1
    return new / spread, 0.5 * c + h.mean(-1, keepdim=True), torch.sin(d + p.own + u.a)


@fastrnn.cell(
    gates="zn",
    states="h",
    params={"gain": fastrnn.Param("gates", init=torch.nn.init.normal_)},
    name="exported_with_gates",
)
def scaled_gates(u: Any, v: Any, p: Any, h: Tensor) -> Tensor:
    z, n = (p.gain * torch.cat([u.z + v.z, u.n + v.n], -1)).chunk(2, -1)
    return h + torch.sigmoid(z) * (torch.tanh(n) - h)


def stream_of(layer: Any, source: Path, name: str = "net") -> Stream:
    """The stepper in C of a layer or cell whose source was written."""
    layers, states = getattr(layer, "num_layers", 1), len(layer._cell().states)
    output = getattr(layer, "proj_size", 0) or layer.hidden_size
    return Stream(library([source]), name, layers, output, layer.hidden_size, states)


def exported(layer: Any, folder: Path) -> Stream:
    source, _ = fastrnn.export_c(layer, folder / "net")
    return stream_of(layer, source)


def expected(layer: Any, x: Tensor) -> list[Tensor]:
    """Output [T, Q] and final states [num_layers, width] of a sequence."""
    with torch.no_grad(), kernels.use("reference"):
        return [t.float() for t in flatten(copy.deepcopy(layer).double().eval()(x.double()))]


def assert_steps(stream: Stream, layer: Any, steps: int = 50) -> None:
    x = torch.randn(steps, layer.input_size)
    y, *states = expected(layer, x)
    torch.testing.assert_close(stream.steps(x), y, rtol=1e-5, atol=2e-6)
    for found, state in zip(stream.states, states, strict=True):
        torch.testing.assert_close(found, state, rtol=1e-5, atol=2e-6)


LAYERS: dict[str, Any] = {
    "lstm": lambda: fastrnn.LSTM(3, 5),
    "gru": lambda: fastrnn.GRU(3, 5),
    "tanh": lambda: fastrnn.RNN(3, 5),
    "relu": lambda: fastrnn.RNN(3, 5, nonlinearity="relu"),
    "lstm of 17": lambda: fastrnn.LSTM(17, 17),
    "gru of 17": lambda: fastrnn.GRU(1, 17, num_layers=3),
    "one unit": lambda: fastrnn.GRU(1, 1),
    "two layers": lambda: fastrnn.LSTM(3, 5, num_layers=2),
    "without bias": lambda: fastrnn.GRU(3, 5, bias=False),
    "projected": lambda: fastrnn.LSTM(3, 17, proj_size=5),
    "projected with norms": lambda: fastrnn.LayerNormLSTM(3, 17, num_layers=2, proj_size=5),
    "two projected": lambda: fastrnn.LSTM(7, 5, num_layers=2, proj_size=3, bias=False),
    "dropout": lambda: fastrnn.GRU(3, 5, num_layers=2, dropout=0.5).eval(),
    "parameters": lambda: fastrnn.Recurrent(both_kinds, 3, 5, num_layers=2),
    "parameters of gates": lambda: fastrnn.Recurrent(scaled_gates, 3, 5),
    **{
        name: lambda name=name: fastrnn.Recurrent(cells.get(name), 3, 5, num_layers=2)
        for name in ("cfn", "fast_grnn", "janet", "ligru", "nas", "nbrc", "peephole_lstm", "slstm")
    },
    "layer norm": lambda: fastrnn.LayerNormLSTM(3, 17, num_layers=2),
    "layer norm of one unit": lambda: fastrnn.LayerNormGRU(1, 1),
    "norms without bias": lambda: fastrnn.LayerNormGRU(3, 8, num_layers=2, bias=False),
    "reset before": lambda: fastrnn.GRUResetBefore(3, 17, num_layers=2),
    "stages": lambda: fastrnn.Recurrent(in_stages, 3, 13, num_layers=2),
    "heads": lambda: fastrnn.GRU(3, 12, num_layers=2, heads=3),
    "heads of lstm": lambda: fastrnn.LSTM(3, 12, num_layers=2, heads=2, bias=False),
    "heads of one unit": lambda: fastrnn.RNN(3, 3, heads=3),
    "heads with parameters": lambda: fastrnn.Recurrent(both_kinds, 3, 8, num_layers=2, heads=4),
    "heads with stages": lambda: fastrnn.Recurrent(in_stages, 3, 26, num_layers=2, heads=2),
    "heads of slstm": lambda: fastrnn.SLSTM(3, 16, heads=4),
    "zoneout": lambda: fastrnn.LSTM(3, 5, num_layers=2, zoneout=(0.1, 0.3)).train(),
    "recurrent dropout": lambda: fastrnn.GRU(3, 5, recurrent_dropout=0.3).train(),
    "clipped gradients": lambda: fastrnn.LSTM(3, 5, clip_grad_step=1.0),
    "batch first": lambda: fastrnn.GRU(3, 5, batch_first=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_steps_are_those_of_the_layer(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = without_zeros(LAYERS[name]())
    assert_steps(exported(layer, tmp_path), layer)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_steps_are_those_of_the_stepper(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = getattr(fastrnn, name)(40, 50, num_layers=2)
    stream, stepper = exported(layer, tmp_path), layer.stream()
    for x in torch.randn(50, 40):
        found = stream.step(x)
        torch.testing.assert_close(found, stepper.step(x), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cell = getattr(fastrnn, name)(3, 5)
    stream, stepper = exported(cell, tmp_path), cell.stream()
    for x in torch.randn(50, 3):
        torch.testing.assert_close(stream.step(x), stepper.step(x), rtol=1e-5, atol=2e-6)


def test_a_reset_and_two_streams(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = fastrnn.LSTM(3, 5, num_layers=2)
    source, _ = fastrnn.export_c(layer, tmp_path / "net")
    one, x, other = stream_of(layer, source), torch.randn(10, 3), torch.randn(10, 3)
    alone = one.steps(x)
    one.reset()
    assert all(not state.any() for state in one.states)
    assert torch.equal(one.steps(x), alone)
    two = stream_of(layer, source)
    one.reset()
    mixed = [(one.step(a), two.step(b)) for a, b in zip(x, other, strict=True)]
    assert torch.equal(torch.stack([a for a, _ in mixed]), alone)
    two.reset()
    assert torch.equal(torch.stack([b for _, b in mixed]), two.steps(other))


def test_states_are_those_of_the_layer_in_both_ways(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = fastrnn.LSTM(3, 5, num_layers=2, proj_size=2)
    stream, x = exported(layer, tmp_path), torch.randn(8, 3)
    with torch.no_grad():
        _, middle = layer(x[:4])
        y, _ = layer(x[4:], middle)
    for member, state in zip(stream.states, middle, strict=True):
        assert member.shape == state.shape
        member.copy_(state)
    torch.testing.assert_close(stream.steps(x[4:]), y, rtol=1e-5, atol=2e-6)


def test_the_output_may_be_the_input(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = fastrnn.GRU(5, 5, num_layers=2)
    stream, x = exported(layer, tmp_path), torch.randn(5, 5)
    wanted = stream.steps(x)
    stream.reset()
    for row, y in zip(x, wanted, strict=True):
        both = row.clone()
        stream.step(both, both)
        assert torch.equal(both, y)


def test_nan_and_infinity_go_where_they_go_in_the_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = fastrnn.GRU(3, 5)
    stream = exported(layer, tmp_path)
    x = torch.randn(4, 3)
    x[1, 0], x[3, 0] = torch.inf, torch.nan
    torch.testing.assert_close(stream.steps(x), expected(layer, x)[0], equal_nan=True)
    assert stream.states[0].isnan().all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: fastrnn.GRU(8, 17, num_layers=2),
        lambda: fastrnn.LSTM(7, 16, proj_size=5),
        lambda: fastrnn.RNN(3, 5, bias=False),
        lambda: fastrnn.Recurrent(both_kinds, 3, 5),
        lambda: fastrnn.GRU(3, 12, num_layers=2, heads=3),
        lambda: fastrnn.GRUResetBefore(3, 17, num_layers=2),
        lambda: fastrnn.Recurrent(in_stages, 3, 26, heads=2),
    ],
    ids=["gru", "projected", "without bias", "parameters", "heads", "reset before", "stages"],
)
@pytest.mark.parametrize("keep_float", [True, False])
@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_a_quantised_layer_has_its_rounded_weights(
    make: Any, keep_float: bool, weights: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    layer = make()
    floats = copy.deepcopy(layer)
    fastrnn.quantize_(layer, weights=weights, keep_float=keep_float)
    source, _ = fastrnn.export_c(layer, tmp_path / "net")
    arrays = re.findall(r"static const (\w+) w_", source.read_text())
    assert set(arrays) == {"int8_t" if weights == "int8" else "float"}
    stream, x = stream_of(floats, source), torch.randn(20, layer.input_size)
    rounded = copy.deepcopy(layer)
    fastrnn.quantize_(rounded, weights=weights, keep_float=False)
    fastrnn.dequantize_(rounded)
    assert not torch.equal(rounded.weight_hh_l0, floats.weight_hh_l0)
    torch.testing.assert_close(stream.steps(x), expected(rounded, x)[0], rtol=1e-5, atol=2e-6)


def test_weights_are_those_of_evaluation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer: Any = fastrnn.GRU(3, 5).train()
    parametrize.register_parametrization(layer, "weight_hh_l0", fastrnn.WeightDrop(0.5))
    assert_steps(exported(layer, tmp_path), layer)
    assert layer.training and layer.parametrizations.weight_hh_l0.training


def test_a_frozen_layer_and_a_subclass(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Own(fastrnn.GRU):
        pass

    layer = fastrnn.freeze(Own(3, 5))
    assert_steps(exported(layer, tmp_path), layer)


def test_paths_and_names(tmp_path: Path) -> None:
    layer = fastrnn.GRU(2, 3)
    cases = [
        ("a", None, ("a.c", "a.h"), "a"),
        ("b.c", None, ("b.c", "b.h"), "b"),
        ("c.h", "other", ("c.c", "c.h"), "other"),
        ("my gru-1.5", None, ("my gru-1.5.c", "my gru-1.5.h"), "my_gru_1_5"),
        (".", None, ("gru.c", "gru.h"), "gru"),
    ]
    for path, name, files, prefix in cases:
        found = fastrnn.export_c(layer, str(tmp_path / path), name=name)
        assert found == tuple(tmp_path / file for file in files)
        source, header = (file.read_text() for file in found)
        assert f'#include "{files[1]}"\n' in source
        assert f"void {prefix}_step(struct {prefix}_state *state" in header
        assert f"#define {prefix.upper()}_OUTPUT_SIZE 3\n" in header
        library([found[0]])
    before = source
    fastrnn.export_c(layer, tmp_path)
    assert (tmp_path / "gru.c").read_text() == before, "the files depend on the layer alone"


def test_two_models_in_one_program(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = {"first": fastrnn.LSTM(3, 5), "second": fastrnn.LSTM(4, 6)}
    sources = [fastrnn.export_c(layer, tmp_path / name)[0] for name, layer in layers.items()]
    compiled = library(sources)
    for name, layer in layers.items():
        assert_steps(Stream(compiled, name, 1, layer.hidden_size, layer.hidden_size, 2), layer)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.LSTM(2, 3), TypeError, "fastrnn.from_torch"),
        (lambda: fastrnn.LSTM(2, 3, bidirectional=True), ValueError, "bidirectional"),
        (lambda: fastrnn.GRU(2, 4).double(), ValueError, r"layer\.float\(\)"),
        (lambda: fastrnn.GRU(2, 4).bfloat16(), ValueError, r"layer\.float\(\)"),
        (lambda: fastrnn.GRU(2, 4, device="meta"), ValueError, "meta"),
    ],
)
def test_what_is_refused(make: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        fastrnn.export_c(make(), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_refused_names_cells_and_folders(tmp_path: Path) -> None:
    layer = fastrnn.GRU(2, 3)
    for name in ("my-gru", "int", "2x", ""):
        with pytest.raises(ValueError, match="name in C"):
            fastrnn.export_c(layer, tmp_path / "x", name=name)
    with pytest.raises(FileNotFoundError):
        fastrnn.export_c(layer, tmp_path / "nowhere" / "x")

    @fastrnn.cell(gates="a", states="h", name="exported_sum")
    def mixing(u: Any, v: Any, h: Tensor) -> Tensor:
        return torch.tanh(u.a + h.cumsum(-1))

    with pytest.raises(Underivable, match="cumsum"):
        fastrnn.export_c(fastrnn.Recurrent(mixing, 2, 3), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_the_program_of_the_page_runs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```c\n(.*?)^```", page, re.M | re.S)
    (command,) = re.findall(r"^cc (-.*) main.c gru.c -lm$", page, re.M)
    layer = fastrnn.GRU(3, 5, num_layers=2)
    fastrnn.export_c(layer, tmp_path / "gru.c")
    (tmp_path / "main.c").write_text(program)
    flags = [flag for flag in command.split() if flag not in ("-o", "main")]
    build = [compiler(), *flags, *STRICT, "main.c", "gru.c", "-lm", "-o", "main"]
    subprocess.run(build, cwd=tmp_path, check=True, timeout=600)
    x = torch.randn(6, 3)
    text = "\n".join(" ".join(map(repr, row)) for row in x.tolist())
    done = subprocess.run(
        [str(tmp_path / "main")],
        input=text,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    found = torch.tensor([[float(n) for n in line.split()] for line in done.stdout.splitlines()])
    torch.testing.assert_close(found, expected(layer, x)[0], rtol=1e-4, atol=1e-5)


def test_the_header_is_for_cxx_too(tmp_path: Path) -> None:
    _, header = fastrnn.export_c(fastrnn.LSTM(2, 3), tmp_path / "net")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    command = [
        compiler,
        "-x",
        "c++",
        "-std=c++11",
        "-Wall",
        "-Werror",
        "-pedantic",
        "-fsyntax-only",
    ]
    subprocess.run([*command, str(header)], check=True, timeout=600)
    assert 'extern "C"' in header.read_text()
