"""Cells of a user's own on their way to a kernel: compiled, exported, or left to the reference."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn import cells, jit, kernels, ops, plan, reference
from tests.support import largest_error
from tests.test_kernels import operands, run

ROOT = Path(__file__).resolve().parent.parent


def declared(function: object, name: str, gates: str = "h", states: str = "h") -> cells.Cell:
    return cells.cell(gates=gates, states=states, name=name)(function)  # type: ignore[arg-type]


def test_the_warning_names_the_reason_and_the_callers_line() -> None:
    cell = declared(lambda u, v, h: torch.tanh(u.h + v.h).cumsum(-1), "summing")
    layer = fastrnn.Recurrent(cell, 3, 4)
    with pytest.warns(UserWarning, match=r"'summing' runs as a loop.*cumsum") as caught:
        layer(torch.randn(2, 1, 3))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(2, 1, 3))


@pytest.mark.filterwarnings("ignore:cell")
def test_what_only_the_reference_runs_is_differentiated_as_it_ran() -> None:
    """Randomness is drawn once, and what the cell captured gets its gradient."""
    scale = torch.nn.Parameter(torch.full((6,), 0.5, dtype=torch.float64))

    def zoneout(u, v, h):  # type: ignore[no-untyped-def]
        return torch.where(torch.rand_like(h) < 0.5, h, scale * torch.tanh(u.h + v.h))

    cell = declared(zoneout, "zoneout")
    given = operands(cell, 5, 3, 4, 6)
    found, gradients = [], []
    for scan in (ops.scan, reference.scan):
        torch.manual_seed(0)
        scale.grad = None
        found.append(run(scan, cell, given))
        assert scale.grad is not None
        gradients.append(scale.grad)
    assert torch.equal(*gradients)
    for what, right in found[1].items():
        assert torch.equal(found[0][what], right), what


@pytest.mark.filterwarnings("ignore:cell")
def test_equal_code_with_other_captures_is_another_cell() -> None:
    def made(matrix: Tensor) -> cells.Cell:
        return declared(lambda u, v, h: torch.tanh(u.h + v.h) @ matrix, "captures")

    large = torch.randn(40, 40, dtype=torch.float64)  # too large to be shown in full
    other = large.clone()
    other[20, 20] += 5
    given = operands(made(large), 2, 2, 3, 40)
    first, second = made(large), made(other)
    before, _ = ops.scan(first, **given)
    apart, _ = ops.scan(second, **given)
    again, _ = ops.scan(first, **given)
    assert torch.equal(before, again)
    assert not torch.equal(before, apart)


@pytest.mark.filterwarnings("ignore:cell")
def test_a_kernel_asked_for_by_name_tells_why_it_cannot_run_the_cell() -> None:
    cell = declared(lambda u, v, h: torch.tanh(u.h + v.h).cumsum(-1), "refused")
    with kernels.use("cpu"), pytest.raises(plan.KernelRefused, match=r"'refused'.*cumsum"):
        ops.scan(cell, **operands(cell, 2, 2, 3, 4))
    with kernels.use("reference"):
        ops.scan(cell, **operands(cell, 2, 2, 3, 4))


def test_compiled_from_the_first_call() -> None:
    cell = declared(lambda u, v, h: torch.sin(u.h + v.h), "first_call")
    layer = fastrnn.Recurrent(cell, 3, 4)
    x = torch.randn(5, 2, 3)
    y, _ = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, layer(x)[0])


def test_a_damaged_library_in_the_cache_is_built_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path))
    cell = declared(lambda u, v, h: torch.cos(u.h + v.h), "damaged")
    library = jit.compile_cell(fastrnn.codegen.derive(cell), fastrnn.codegen.key(cell))
    library.write_bytes(b"not a library")
    given = operands(cell, 2, 2, 3, 4)
    ours = run(ops.scan, cell, given)
    for what, right in run(reference.scan, cell, given).items():
        assert largest_error(ours[what], right) < 1e-12


def test_an_exported_program_runs_where_its_cell_is_declared(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            import torch, fastrnn
            @fastrnn.cell(gates="h", states="h")
            def exported(u, v, h):
                return torch.tanh(u.h + v.h) * 0.5
            """
        )
    )
    program = tmp_path / "program.pt2"
    export = f"""
        import torch, fastrnn, mine
        layer = fastrnn.Recurrent(mine.exported, 3, 4)
        x = torch.ones(5, 2, 3)
        torch.export.save(torch.export.export(layer, (x,)), {str(program)!r})
        torch.save(layer(x)[0].detach(), {str(tmp_path / "y.pt")!r})
    """
    load = f"""
        import torch, fastrnn{{also}}
        y = torch.export.load({str(program)!r}).module()(torch.ones(5, 2, 3))[0]
        torch.testing.assert_close(y, torch.load({str(tmp_path / "y.pt")!r}))
    """
    results = []
    for code in (export, load.format(also=", mine"), load.format(also="")):
        results.append(
            subprocess.run(
                [sys.executable, "-c", textwrap.dedent(code)],
                env={"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": "/usr/bin:/bin"},
                cwd=tmp_path,
                capture_output=True,
                text=True,
            )
        )
    assert results[0].returncode == 0, results[0].stderr
    assert results[1].returncode == 0, results[1].stderr
    assert "import the module that declares it" in results[2].stderr


def test_vmap_within_autocast_has_the_dtype_of_a_plain_call() -> None:
    for layer, dtype in [
        (fastrnn.LSTM(3, 4), torch.bfloat16),
        (fastrnn.RNN(3, 4), torch.bfloat16),
        (fastrnn.GRU(3, 4), torch.float32),
    ]:
        x = torch.randn(6, 5, 2, 3)
        with torch.autocast("cpu", torch.bfloat16):
            plain = layer(x[0])[0]
            batched = torch.func.vmap(lambda x, layer=layer: layer(x)[0])(x)
        assert plain.dtype == batched.dtype == dtype
        torch.testing.assert_close(batched[0], plain, atol=2e-2, rtol=2e-2)


NO_COMPILER = """
    import os, warnings
    os.environ |= {"CXX": "no-such-compiler", "FASTRNN_CACHE": "CACHE"}
    import torch
    import fastrnn
    from fastrnn import kernels, plan

    @fastrnn.cell(gates="ab", states="hc")
    def mine(u, v, h, c):
        c = torch.sin(u.a + v.a) + 0.5 * c * v.b
        return torch.tanh(c + u.b), c

    layer = fastrnn.Recurrent(mine, 3, 4)
    x = torch.ones(5, 2, 3)
"""


def without_compiler(code: str, cache: Path, **environment: str) -> None:
    """Run it where there is no C++ compiler."""
    opening = textwrap.dedent(NO_COMPILER).replace("CACHE", str(cache))
    done = subprocess.run(
        [sys.executable, "-c", opening + textwrap.dedent(code)],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_without_a_compiler_a_cell_runs_as_operations_on_a_cpu(tmp_path: Path) -> None:
    without_compiler(
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y, _ = layer(x)
            y.sum().backward()
        assert [str(w.message) for w in caught if "runs as a loop" in str(w.message)], caught
        with kernels.use("cpu"):
            try:
                layer(x)
            except plan.KernelRefused as error:
                assert "no-such-compiler" in str(error)
            else:
                raise AssertionError
        """,
        tmp_path,
    )


def test_elsewhere_no_compiler_is_asked_for(tmp_path: Path) -> None:
    """As on a GPU: the operator knows the cell, and other kernels than the CPU's may run it."""
    without_compiler(
        """
        warnings.simplefilter("error")
        elsewhere = layer.to("meta")
        y, states = elsewhere(x.to("meta"))
        assert y.shape == (5, 2, 4)
        key = kernels.prepare(mine, "cuda")
        assert kernels._C.cell_facts(key) == (2, 2, len(fastrnn.codegen.derive(mine).kept))
        assert not kernels._C.has_code(key)
        """,
        tmp_path,
    )


def test_facts_first_and_code_later() -> None:
    cell = declared(lambda u, v, h: torch.sin(u.h + v.h) * 0.25, "facts_first")
    key = kernels.prepare(cell, "cuda")
    assert key is not None
    assert not kernels._C.has_code(key)
    given = operands(cell, 2, 2, 3, 4)
    rest = [given[k] for k in ("x", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "s0")]
    before, *_ = torch.ops.fastrnn.scan(key, *rest, None, None, None, 0)  # by the reference
    weights = [given[k][0] for k in ("w_ih", "w_hh", "b_ih", "b_hh")]
    with pytest.raises(RuntimeError, match="no compiled code for cell 'facts_first-"):
        kernels._C.pack(key, *weights)
    assert kernels.prepare(cell) == key
    assert kernels._C.has_code(key)
    with kernels.use("cpu"):
        after, *_ = torch.ops.fastrnn.scan(key, *rest, None, None, None, 0)
    torch.testing.assert_close(after, before)
