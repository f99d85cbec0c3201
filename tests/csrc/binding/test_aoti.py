"""Ahead-of-time compilation by inductor: packages that other processes load, Python or C++, and
inductor's C++ wrapper."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.cpp_extension import include_paths, library_paths

import fastrnn
from tests.support.paths import ROOT
from tests.support.tensors import flatten

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.takes(50),
    pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler"),
]

INPUTS, HIDDEN = 4, 6


@fastrnn.cell(gates="zn", states="h")
def light_gru(u, v, h):
    z = torch.sigmoid(u.z + v.z)
    return z * h + (1 - z) * torch.relu(u.n + v.n)


class Everything(nn.Module):
    """All layers, with and without biases and states, in one package: compiling it takes as long as
    compiling one layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for bias in (True, False):
            options: dict[str, Any] = {"bias": bias, "num_layers": 2}
            layers += [
                fastrnn.RNN(INPUTS, HIDDEN, **options),
                fastrnn.GRU(INPUTS, HIDDEN, bidirectional=True, **options),
                fastrnn.LSTM(INPUTS, HIDDEN, bidirectional=True, **options),
                fastrnn.LSTM(INPUTS, HIDDEN, proj_size=3, **options),
                fastrnn.Recurrent(light_gru, INPUTS, HIDDEN, **options),
            ]
        self.layers = nn.ModuleList(layers)
        self.cells = nn.ModuleList(
            [fastrnn.LSTMCell(INPUTS, HIDDEN), fastrnn.GRUCell(INPUTS, HIDDEN, bias=False)]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        results = []
        for layer in self.layers:
            output, states = layer(x)
            again = layer(x, states)
            results += [output, *flatten(states), *flatten(again)]
        for cell in self.cells:
            states = cell(x[0])
            results += [*flatten(states), *flatten(cell(x[0], states))]
        return results


LOAD_IN_PYTHON = """
import sys, torch
from torch._inductor import aoti_load_package
from tests.csrc.binding import test_aoti  # declares the custom cell
package, examples = sys.argv[1:]
run = aoti_load_package(package)
for x, expected in torch.load(examples):
    for got, wanted in zip(run(x), expected, strict=True):
        assert torch.equal(got, wanted), (x.shape, (got - wanted).abs().max())
"""

LOAD_IN_CPP = """
#include <Python.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <iostream>

// The operator plans a call in Python: an interpreter is embedded.
int main(int, char** argv) {
  Py_Initialize();
  if (PyRun_SimpleString("from tests.csrc.binding import test_aoti") != 0) return 2;
  PyThreadState* others = PyEval_SaveThread();
  {
    torch::inductor::AOTIModelPackageLoader loader(argv[1]);
    std::vector<torch::Tensor> x, expected;
    torch::load(x, argv[2]);
    torch::load(expected, argv[3]);
    const auto got = loader.run(x);
    if (got.size() != expected.size()) return 3;
    for (size_t k = 0; k < got.size(); ++k)
      if (!torch::equal(got[k], expected[k])) return 4;
    std::cout << got.size() << " results are equal" << std::endl;
  }
  PyEval_RestoreThread(others);
  std::cout.flush();
  _exit(0);
}
"""


def test_a_package_runs_in_other_processes(tmp_path: Path) -> None:
    model = Everything().eval()
    steps, batch = torch.export.Dim("steps", min=2), torch.export.Dim("batch", min=2)
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.randn(5, 3, INPUTS),), dynamic_shapes={"x": {0: steps, 1: batch}}
        )
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        inputs = [torch.randn(t, b, INPUTS) for t, b in ((5, 3), (17, 9), (2, 2))]
        examples = [(x, model(x)) for x in inputs]
    torch.save(examples, tmp_path / "examples.pt")
    ran = python("-c", LOAD_IN_PYTHON, package, tmp_path / "examples.pt")
    assert ran.returncode == 0, ran.stderr

    x, expected = examples[1]
    for name, tensors in (("x", [x]), ("expected", expected)):
        save_for_cpp(tensors, tmp_path / f"{name}.pt")
    program_file = build(LOAD_IN_CPP, tmp_path)
    ran = subprocess.run(
        [program_file, package, tmp_path / "x.pt", tmp_path / "expected.pt"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, (ran.returncode, ran.stdout, ran.stderr)
    assert f"{len(expected)} results are equal" in ran.stdout


def test_cpp_wrapper() -> None:
    model = Everything()
    x = torch.randn(5, 3, INPUTS)
    # Built apart, the wrapper is compiled at -O1, in a third of the time.
    with torch._inductor.config.patch(cpp_wrapper=True, cpp_wrapper_build_separate=True):
        compiled = torch.compile(model, fullgraph=True)
        results = [run_and_differentiate(m, model, x) for m in (compiled, model)]
    for ours, wanted in zip(*results, strict=True):
        assert torch.equal(ours, wanted)


def run_and_differentiate(
    function: Callable[..., Any], model: nn.Module, x: Tensor
) -> list[Tensor]:
    results = function(x)
    wanted = list(model.parameters())
    loss = sum(y.square().sum() for y in results)
    return [*results, *torch.autograd.grad(loss, wanted)]


def save_for_cpp(tensors: list[Tensor], file: Path) -> None:
    """Writes tensors in the format that `torch::load` reads as a vector."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for k, tensor in enumerate(tensors):
                self.register_buffer(str(k), tensor)

    torch.jit.script(Holder()).save(str(file))


def build(source: str, folder: Path) -> Path:
    (folder / "main.cpp").write_text(source)
    libraries = sysconfig.get_config_var("LIBDIR")
    command: list[str | Path] = [
        "g++",
        "-std=c++20",
        "-O0",
        folder / "main.cpp",
        *(f"-I{p}" for p in (*include_paths(), sysconfig.get_path("include"))),
        *(f"-L{p}" for p in (*library_paths(), libraries)),
        *(f"-Wl,-rpath,{p}" for p in (*library_paths(), libraries)),
        "-Wl,--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        f"-lpython{sysconfig.get_config_var('LDVERSION')}",
        "-o",
        folder / "main",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 and "cannot find -lpython" in done.stderr:
        pytest.skip("this Python cannot be embedded")
    assert done.returncode == 0, done.stderr
    return folder / "main"


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )


def environment() -> dict[str, str]:
    """The environment of this process, with its packages for an embedded interpreter."""
    return {**os.environ, "PYTHONPATH": ":".join(p for p in [str(ROOT), *sys.path] if p)}
