"""Checks an installed fastrnn where there is no compiler: `python -I check_install.py`.

It runs on the standard library, torch and what is installed, in any folder but that of the sources.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch

import fastrnn
from fastrnn import extension
from fastrnn.tools import info

COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++")


def main() -> None:
    installed = Path(fastrnn.__file__).parent
    assert "site-packages" in installed.parts, f"fastrnn comes from {installed}"
    assert not any(map(shutil.which, COMPILERS)), "there is a compiler on the path"
    facts = info.collect()
    print(info.text(facts))
    assert facts.self_check.passed
    assert facts.kernels["cpu"] is None
    assert torch.__version__.startswith(f"{facts.binding}.")
    drop_in()
    frozen_and_streamed()
    custom_cell()
    missing_binding()
    print(f"passed: {installed}, torch {torch.__version__}")


def drop_in() -> None:
    """Each built-in cell, forward and backward, beside torch.nn."""
    for name in ("RNN", "LSTM", "GRU"):
        theirs = getattr(torch.nn, name)(12, 20, num_layers=2, bidirectional=True)
        ours = getattr(fastrnn, name)(12, 20, num_layers=2, bidirectional=True)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(9, 5, 12)
        results = []
        for layer in (ours, theirs):
            y = layer(x)[0]
            results.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def frozen_and_streamed() -> None:
    layer, x = fastrnn.GRU(8, 16), torch.randn(6, 1, 8)
    with torch.no_grad():
        right, _ = layer(x)
        stream = layer.stream()
        for t in range(len(x)):
            assert torch.equal(torch.as_tensor(stream.step(x[t])), right[t])


def custom_cell() -> None:
    """Without a compiler the reference runs it, and a warning says so."""

    @fastrnn.cell(gates="fn", states="h")
    def minimal_gated_unit(u, v, h):  # type: ignore[no-untyped-def]
        f = torch.sigmoid(u.f + v.f)
        return (1 - f) * h + f * torch.tanh(u.n + f * v.n)

    layer = fastrnn.Recurrent(minimal_gated_unit, 8, 16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output, _ = layer(torch.randn(7, 3, 8))
    assert output.shape == (7, 3, 16) and output.isfinite().all()
    assert any("no C++ compiler" in str(each.message) for each in caught), [*map(str, caught)]


def missing_binding() -> None:
    try:
        extension.choose("2.0.1")
    except ImportError as error:
        assert "but torch 2.0.1 is installed" in str(error) and "pip install" in str(error)
    else:
        raise AssertionError("a torch without a binding was accepted")


if __name__ == "__main__":
    main()
