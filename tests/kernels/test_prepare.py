"""The preparation of custom cells: compiled, exported, or left to the reference."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn import cells, kernels, ops, plan
from fastrnn.compiler import emit_cpp, jit
from fastrnn.compiler.derive import derive
from fastrnn.extension import _C
from fastrnn.kernels.prepare import prepare
from fastrnn.tools.tolerance import largest_error
from tests.support.operands import by_reference, operands, positional, run
from tests.support.paths import ROOT


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
    """Random numbers are drawn once, and tensors that the cell captured get their gradients."""
    scale = torch.nn.Parameter(torch.full((6,), 0.5, dtype=torch.float64))

    def zoneout(u, v, h):
        return torch.where(torch.rand_like(h) < 0.5, h, scale * torch.tanh(u.h + v.h))

    cell = declared(zoneout, "zoneout")
    given = operands(cell, 5, 3, 4, 6)
    found: list[dict[str, Tensor]] = []
    gradients: list[Tensor] = []
    for scan in (ops.scan, by_reference):
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
    given = operands(cell, 2, 2, 3, 4)
    assert given["x"].dtype == torch.float64
    library = jit.compile_cell(derive(cell), emit_cpp.key(cell), "float64")
    library.write_bytes(b"not a library")
    ours = run(ops.scan, cell, given)
    for what, right in run(by_reference, cell, given).items():
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
                env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
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
    from fastrnn import plan
    from fastrnn.compiler import emit_cpp
    from fastrnn.compiler.derive import derive
    from fastrnn import kernels
    from fastrnn.extension import _C
    from fastrnn.kernels.prepare import prepare

    @fastrnn.cell(gates="ab", states="hc")
    def mine(u, v, h, c):
        c = torch.sin(u.a + v.a) + 0.5 * c * v.b
        return torch.tanh(c + u.b), c

    layer = fastrnn.Recurrent(mine, 3, 4)
    x = torch.ones(5, 2, 3)
"""


def without_compiler(code: str, cache: Path, **environment: str) -> None:
    """Runs a program without a C++ compiler."""
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
    """On other devices the operator knows the cell without a compiler, as on a GPU."""
    without_compiler(
        """
        warnings.simplefilter("error")
        elsewhere = layer.to("meta")
        y, states = elsewhere(x.to("meta"))
        assert y.shape == (5, 2, 4)
        key = prepare(mine, "cuda")
        assert _C.cell_facts(key) == (2, 2, derive(mine).tape_width(False), 0)
        assert not _C.has_code(key)
        """,
        tmp_path,
    )


def test_facts_first_and_code_later() -> None:
    cell = declared(lambda u, v, h: torch.sin(u.h + v.h) * 0.25, "facts_first")
    key = prepare(cell, "cuda")
    assert key is not None
    assert not _C.has_code(key)
    given = operands(cell, 2, 2, 3, 4)
    weights = [given[k][0] for k in ("w_ih", "w_hh", "b_ih", "b_hh")]
    with (
        kernels.use("triton"),
        pytest.raises(
            RuntimeError, match=r"no compiled code for cell 'facts_first-\w+' in float64"
        ),
    ):
        _C.pack(key, "float64", [*weights, None], [])
    assert not _C.has_code(key, "float64")
    with kernels.use("cpu"):
        y, *_ = by_key(key, given)
    torch.testing.assert_close(y, by_reference(cell, **given)[0])
    assert _C.has_code(key, "float64")


def by_key(key: str, given: dict[str, Any]) -> list[Tensor]:
    """Calls the operator as an exported program does, without preparation."""
    return torch.ops.fastrnn.scan(*positional(key, given))


def in_float(given: dict[str, Any]) -> dict[str, Any]:
    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [t.float() for t in value]
        return value.float() if isinstance(value, Tensor) else value

    return {k: convert(v) for k, v in given.items()}


def two_states(name: str) -> cells.Cell:
    def step(u, v, h, c):
        c = torch.sigmoid(u.f * v.f) * c + torch.tanh(u.g + v.g)
        return torch.sin(c) + 0.25 * h, c

    return declared(step, name, "fg", "hc")


@pytest.mark.parametrize("first", [torch.float32, torch.float64], ids=["float", "double"])
def test_each_number_is_compiled_when_it_is_first_used(first: torch.dtype) -> None:
    cell = two_states(f"lazy_{str(first)[-2:]}")
    key, exact = emit_cpp.key(cell), operands(cell, 4, 3, 5, 9)
    given = {torch.float32: in_float(exact), torch.float64: exact}
    second = torch.float64 if first == torch.float32 else torch.float32
    with kernels.use("cpu"):
        ours = {first: run(ops.scan, cell, given[first])}
        assert _C.has_code(key, str(first).removeprefix("torch."))
        assert not _C.has_code(key, str(second).removeprefix("torch."))
        ours[second] = run(ops.scan, cell, given[second])
    assert _C.has_code(key, str(second).removeprefix("torch."))
    exact_results = run(by_reference, cell, exact)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        for what, right in exact_results.items():
            assert ours[dtype][what].dtype == dtype
            assert largest_error(ours[dtype][what], right) < bound, (dtype, what)


def test_the_op_compiles_what_nobody_prepared() -> None:
    """An exported program runs in a dtype new to the cell, or is the first to run the cell."""
    cell = two_states("by_key")
    key, given = emit_cpp.key(cell), operands(cell, 4, 3, 5, 9)
    assert _C.cell_facts(key) is None
    wanted, _ = by_reference(cell, **given)
    with kernels.use("cpu"):
        assert largest_error(by_key(key, in_float(given))[0], wanted) < 1e-5
        assert not _C.has_code(key, "float64")
        assert largest_error(by_key(key, given)[0], wanted) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float", "double"])
def test_frozen_streamed_and_compiled_in_each_number(dtype: torch.dtype) -> None:
    """Each module is the first to use its cell in that dtype."""
    given = [two_states(f"{name}_{str(dtype)[-2:]}") for name in ("frozen", "streamed", "traced")]
    torch.manual_seed(1)
    frozen, streamed, traced = (fastrnn.Recurrent(cell, 5, 9).to(dtype) for cell in given)
    x = torch.randn(4, 1, 5, dtype=dtype)
    for layer in (streamed, traced):
        layer.load_state_dict(frozen.state_dict())
    with torch.no_grad():
        exact, _ = copy.deepcopy(frozen).double()(x.double())
        stepper = streamed.stream()
        steps = torch.stack([torch.as_tensor(stepper.step(row)) for row in x])
        compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")(x)[0]
        fastrnn.freeze(frozen)
        for y in (steps, compiled, frozen(x)[0]):
            assert y.dtype == dtype
            assert largest_error(y, exact) < (1e-12 if dtype == torch.float64 else 1e-5)


SAME_AS_BUILT_IN = """
    import torch, fastrnn
    from fastrnn import kernels
    from fastrnn.extension import _C
    from fastrnn.kernels.prepare import prepare

    built_in = fastrnn.cells.get("lstm")
    mine = fastrnn.cells.Cell("mine", built_in.gates, built_in.states, built_in.function)
    x = torch.randn(7, 3, 5)
    for dtype in (torch.float32, torch.float64):
        layers = [fastrnn.LSTM(5, 33).to(dtype), fastrnn.Recurrent(mine, 5, 33).to(dtype)]
        layers[1].load_state_dict(layers[0].state_dict())
        found = []
        for layer in layers:
            with kernels.use("cpu"):
                y, _ = layer(x.to(dtype))
                y.square().sum().backward()
            found.append([y, *(p.grad for p in layer.parameters())])
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours, theirs), (dtype, (ours - theirs).abs().max())
    print(fastrnn.extension._C.isa())
"""


@pytest.mark.parametrize("isa", _C.isas())
def test_a_custom_cell_gives_the_numbers_of_the_built_in_one(isa: str) -> None:
    """They are equal bit for bit: both are compiled alike, for the same instruction set."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SAME_AS_BUILT_IN)],
        env={**os.environ, "FASTRNN_ISA": isa},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip()) == (0, isa), done.stderr
