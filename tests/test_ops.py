"""The operator: registration, checks, autograd, autocast, memory, threads and processes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fastrnn import _C, GRU, cells, kernels, ops, plan
from fastrnn.kernels.operands import Operands
from fastrnn.kernels.prepare import prepare
from tests.support.kernels import planned
from tests.support.names import BUILT_IN
from tests.support.operands import EVERY_GRADIENT, operands, run
from tests.support.tensors import flatten, mapped

scan = torch.ops.fastrnn.scan.default
scan_backward = torch.ops.fastrnn.scan_backward.default


def call(name: str, grad: bool, **extra: Any) -> tuple[Any, ...]:
    """Positional arguments of the operator: two recurrences, or one for a single step."""
    one_step = "x" in extra and "batch_sizes" not in extra
    recurrences = 1 if one_step else 2
    given = {
        **operands(cells.get(name), 4, 3, 5, 6, recurrences=recurrences, dtype=torch.float32),
        **extra,
    }
    if one_step:
        given["s0"] = [s[0] for s in given["s0"]]

    def leaf(value: Any) -> Any:
        if isinstance(value, list):
            return [leaf(v) for v in value]
        return value.clone().requires_grad_() if isinstance(value, Tensor) and grad else value

    if "resets" in given:
        given["reset_states"] = [torch.randn_like(s) for s in given["s0"]]
    floats = ("x", *Operands._fields[1:9])
    every = Operands(**given)._asdict()
    values = (leaf(value) if name in floats else value for name, value in every.items())
    return prepare(cells.get(name)), *values


LAYOUTS: dict[str, Any] = {
    "dense": lambda: {},
    "lengths": lambda: {"lengths": torch.tensor([2, 0, 4])},
    "resets": lambda: {"resets": torch.rand(4, 3) < 0.5},
    "packed": lambda: {"x": torch.randn(8, 5), "batch_sizes": torch.tensor([3, 3, 1, 1])},
    "one step": lambda: {"x": torch.randn(3, 5)},
}


@pytest.mark.parametrize("name", [*BUILT_IN, "linear_projectable"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(name: str, layout: str) -> None:
    extra = LAYOUTS[layout]()
    for steps in (False, True):
        opcheck(scan, call(name, True, **extra), {"steps": steps})
    arguments = call(name, False, **extra)
    opcheck(scan, arguments)
    y, *states, every, tape = scan(*arguments, tape=True, steps=True)
    dstates = [torch.randn_like(states[0]), *[None] * (len(states) - 1)]
    some, all_ = [False, True, False, True, *[False] * 4], EVERY_GRADIENT
    for dsteps, needs in ((None, all_), (None, some), (torch.randn_like(every), all_)):
        gradients = torch.randn_like(y), dstates, dsteps
        opcheck(scan_backward, (arguments[0], *gradients, *arguments[1:], y, tape, needs))


def test_only_the_gradients_asked_for_are_computed() -> None:
    arguments = call("gru", False)
    y, *_, tape = scan(*arguments, tape=True)
    grads = torch.ones_like(y), [None], None
    full = scan_backward("gru", *grads, *arguments[1:], y, tape, EVERY_GRADIENT)
    assert [tuple(g.shape) for g in full] == [
        (4, 3, 5),
        *[(18, 5)] * 2,
        *[(18, 6)] * 2,
        *[(18,)] * 4,
        (2, 3, 6),
    ]
    only = [False, False, True, False, False, False, True, False]
    part = scan_backward("gru", *grads, *arguments[1:], y, tape, only)
    for ours, right in zip(part, [*full[3:5], full[-1]], strict=True):
        assert torch.equal(ours, right)


@pytest.mark.parametrize("frozen", ["x", "weights", "states"])
def test_gradients_of_some_inputs_only(frozen: str) -> None:
    cell = cells.get("lstm")
    given = operands(cell, 4, 3, 5, 6)
    everything = run(ops.scan, cell, given)
    groups = {"x": ["x"], "weights": ["w_ih", "w_hh", "b_ih", "b_hh"], "states": ["s0"]}
    leaves = {}
    for key, value in given.items():
        tensors = [value] if isinstance(value, Tensor) else value if key != "reverse" else []
        for tensor in tensors:
            tensor.requires_grad_(key not in groups[frozen])
        leaves[key] = value
    y, states = ops.scan(cell, **leaves)
    (y.sum() + sum(s.sum() for s in states)).backward()
    for key in groups[frozen]:
        value = given[key]
        assert all(t.grad is None for t in ([value] if key == "x" else value))
    trained = given["w_hh"][0] if frozen != "weights" else given["x"]
    assert trained.grad is not None and trained.grad.isfinite().all()
    assert everything["y"].shape == y.shape


def test_one_weight_in_two_places_gets_both_gradients() -> None:
    cell = cells.get("gru")
    given = operands(cell, 4, 3, 5, 6, recurrences=2)
    shared = given["w_hh"][0].clone().requires_grad_()
    apart = [shared.detach().clone().requires_grad_() for _ in range(2)]
    for create_graph in (False, True):
        y, _ = ops.scan(cell, **{**given, "w_hh": apart})
        right = sum(torch.autograd.grad(y.square().sum(), apart))
        y, _ = ops.scan(cell, **{**given, "w_hh": [shared, shared]})
        (ours,) = torch.autograd.grad(y.square().sum(), shared, create_graph=create_graph)
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("layout", ["dense", "lengths", "resets", "packed"])
def test_double_backward(name: str, layout: str) -> None:
    arguments = call(name, False, **LAYOUTS[layout]())
    sizes = [len(a) if isinstance(a, (list, tuple)) else 1 for a in arguments[1:10]]
    flat = [t for a in arguments[1:10] for t in (a if isinstance(a, (list, tuple)) else [a])]
    flat = [t.double().requires_grad_() for t in flat]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        groups = [[next(rest) for _ in range(n)] for n in sizes]
        y, *states, _ = scan(name, groups[0][0], *groups[1:], *arguments[10:])
        return y, *states

    assert torch.autograd.gradcheck(function, flat, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, flat, fast_mode=True)


def refused(match: str, **changes: Any) -> None:
    given = {**operands(cells.get("lstm"), 4, 3, 5, 6, dtype=torch.float32), **changes}
    with pytest.raises(RuntimeError, match=match):
        ops.scan(cells.get("lstm"), **given)


def test_operands_that_do_not_fit_are_refused() -> None:
    x = torch.randn(4, 3, 5)
    refused(r"w_ih should be \[24, 7\], got \[24, 5\]", x=torch.randn(4, 3, 7))
    refused(r"x should be", x=torch.randn(5))
    refused(r"w_hh should be \[24, 6\], got \[24, 7\]", w_hh=[torch.randn(24, 7)])
    refused(r"w_ih should hold one tensor per recurrence, 1, got 2", w_ih=[torch.randn(24, 5)] * 2)
    refused(r"b_ih and b_hh come together", b_ih=[])
    refused(r"b_hh should be \[24\], got \[23\]", b_hh=[torch.randn(23)])
    refused(r"w_hh is Double but x is Float", w_hh=[torch.randn(24, 6).double()])
    refused(r"s0 should hold 2 states, got 1", s0=[torch.randn(1, 3, 6)])
    wide = [torch.randn(1, 3, 6), torch.randn(1, 2, 6)]
    refused(r"state 1 of s0 should be \[1, 3, 6\], got", s0=wide)
    refused(r"state 1 of reset_states should be \[1, 3, 6\], got", reset_states=wide)
    refused(
        r"draws 0 random numbers for each unit, and noise is given", noise=torch.zeros(1).long()
    )
    refused(r"resets should be bool", resets=torch.zeros(4, 3))
    refused(r"resets should be bool", resets=torch.zeros(3, 4, dtype=torch.bool))
    refused(r"lengths should be int64 \[3\]", lengths=torch.tensor([1, 2]))
    refused(r"lengths should be in \[0, 4\], got 5", lengths=torch.tensor([1, 5, 2]))
    refused(r"lengths should be in \[0, 4\], got -1", lengths=torch.tensor([1, -1, 2]))
    refused(r"packed x needs s0", x=x.view(12, 5), s0=[], batch_sizes=torch.tensor([6, 6]))
    refused(r"add up to 11 but x has 12", x=x.view(12, 5), batch_sizes=torch.tensor([3, 3, 3, 2]))
    refused(r"should not increase", x=x.view(12, 5), batch_sizes=torch.tensor([3, 2, 3, 4]))
    refused(r"exceed the batch 3", x=x.view(12, 5), batch_sizes=torch.tensor([6, 6]))
    refused(r"batch_sizes should be int64", x=x.view(12, 5), batch_sizes=torch.tensor([12.0]))


def test_operands_on_two_devices_are_refused() -> None:
    for name in ("w_ih", "w_hh", "b_hh", "s0"):
        given = operands(cells.get("lstm"), 4, 3, 5, 6, dtype=torch.float32)
        refused("on meta but x is", **{name: [t.to("meta") for t in given[name]]})


def test_what_the_dispatcher_does_not_see() -> None:
    """It ignores optional lists: a special kind of bias or state must not be misread."""
    given = operands(cells.get("lstm"), 4, 3, 5, 6, dtype=torch.float32)
    negative = [torch._neg_view(t) for t in given["s0"]]
    assert negative[0].is_neg()
    for ours, wanted in zip(
        flatten(ops.scan(cells.get("lstm"), **{**given, "s0": negative})),
        flatten(ops.scan(cells.get("lstm"), **{**given, "s0": [-t for t in given["s0"]]})),
        strict=True,
    ):
        assert torch.equal(ours, wanted)
    with torch.inference_mode():
        inside = {k: mapped(v, torch.clone) if k != "reverse" else v for k, v in given.items()}
    inside["b_ih"] = [b.clone().requires_grad_() for b in given["b_ih"]]
    with pytest.raises(RuntimeError, match="inference tensors, which cannot be saved"):
        ops.scan(cells.get("lstm"), **inside)
    with torch.no_grad():
        ops.scan(cells.get("lstm"), **inside)

    class Wrapper(Tensor):
        @staticmethod
        def __new__(cls: type, inner: Tensor) -> Any:
            return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        @classmethod
        def __torch_dispatch__(cls, function: Any, *rest: Any) -> Any:
            raise NotImplementedError(function)

    for name in ("b_hh", "s0"):
        refused("is a tensor subclass", **{name: [Wrapper(t) for t in given[name]]})


def test_an_unknown_cell_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no cell is registered under 'mystery'"):
        scan("mystery", *call("gru", False)[1:])


def test_backward_refuses_a_foreign_tape() -> None:
    arguments = call("gru", False)
    y, *_, tape = scan(*arguments, tape=True)
    with pytest.raises(RuntimeError, match="tape=True"):
        scan_backward("gru", y, [None], None, *arguments[1:], y, tape[1:], EVERY_GRADIENT)


def test_backward_refuses_gradients_that_do_not_fit() -> None:
    arguments = call("lstm", False)
    y, *states, tape = scan(*arguments, tape=True)
    for dy, dstates, match in [
        (y[:1], [None, None], "dy should be like y"),
        (y, [None], "dstates should hold 2"),
        (y, [states[0][..., :1], None], "gradient of state 0 should be"),
        (y, [None, torch.ones(1, 1, 1)], "gradient of state 1 should be"),
    ]:
        with pytest.raises(RuntimeError, match=match):
            scan_backward("lstm", dy, dstates, None, *arguments[1:], y, tape, EVERY_GRADIENT)


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_within_autocast_is_that_without(layout: str, kernel: str) -> None:
    gradients = []
    for within in (False, True):
        torch.manual_seed(0)
        arguments = call("lstm", True, **LAYOUTS[layout]())
        with kernels.use(kernel):
            y, *_ = scan(*arguments)
            y.mul_(2)
            with torch.autocast("cpu", torch.bfloat16, enabled=within):
                y.sum().backward()
        gradients.append([arguments[1].grad, *(w.grad for w in arguments[3])])
    for plain, ours in zip(*gradients, strict=True):
        assert torch.equal(plain, ours)


@pytest.mark.parametrize("name", BUILT_IN)
def test_batched_gradients(name: str) -> None:
    arguments = call(name, True)
    y, *_ = scan(*arguments)
    leaves = [arguments[1], *arguments[3]]
    directions = torch.randn(3, *y.shape)
    batched = torch.autograd.grad(y, leaves, directions, is_grads_batched=True, retain_graph=True)
    apart = [torch.autograd.grad(y, leaves, d, retain_graph=True) for d in directions]
    for ours, right in zip(batched, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(right), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", BUILT_IN)
def test_autocast_computes_in_its_dtype(name: str) -> None:
    arguments = call(name, True)
    with torch.autocast("cpu", torch.bfloat16):
        y, *states, _ = scan(*arguments)
    # Only torch.nn's GRU stays in the dtype of its state.
    assert y.dtype == (torch.float32 if name == "gru" else torch.bfloat16)
    assert {s.dtype for s in states} == {y.dtype}
    y.sum().backward()
    full, *_ = scan(*call(name, False))
    assert all(t.grad.dtype == torch.float32 for t in arguments[2])
    assert y.shape == full.shape


def peak_bytes(function: Any) -> int:
    """The peak of bytes in live CPU tensors that `function` allocates."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("name", BUILT_IN)
def test_memory(name: str) -> None:
    """Inference allocates its outputs; training allocates y, the tape, and one chunk backward."""
    steps, batch, hidden = 512, 8, 64
    cell = cells.get(name)
    given = operands(cell, steps, batch, 16, hidden, dtype=torch.float32)
    unit = steps * batch * hidden * 4  # bytes of one [T, B, H]
    small = 2 * 4 * len(cell.gates) * hidden * (hidden + 16) + unit // 64
    with torch.no_grad():
        assert peak_bytes(lambda: ops.scan(cell, **given)) <= unit + small
    saved = _C.cell_facts(name)[2]
    for weight in given["w_hh"]:
        weight.requires_grad_()
    results: list[Any] = []
    forward = peak_bytes(lambda: results.append(ops.scan(cell, **given)))
    assert unit * (1 + saved) <= forward <= unit * (1 + saved) + small
    y, _ = results[0]
    gradient = torch.ones_like(y)
    chunk = (1 << 20) * (1 if saved == 0 or name == "lstm" else 2) + (1 << 20)
    backward = peak_bytes(lambda: torch.autograd.grad(y, given["w_hh"], gradient))
    assert backward <= chunk + small


def test_more_elements_than_32_bits_count() -> None:
    """Offsets exceed 2^31; the tape is never accessed for rows that are not live."""
    cell = cells.get("rnn_tanh")
    hidden, batch = 1, 1 << 17
    steps = (1 << 31) // batch + 2
    x = torch.zeros(1, 1, 1).expand(steps, batch, 1)
    lengths = torch.zeros(batch, dtype=torch.long)
    lengths[-1] = steps
    weights: dict[str, Any] = {"w_ih": [torch.ones(1, 1)], "w_hh": [torch.ones(1, 1) / 2]}
    s0 = [torch.full((1, batch, hidden), 0.5)]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    if memory < 16:
        pytest.skip(f"needs a machine with 16 GiB of memory, this has {memory}")
    with torch.no_grad():
        y, (last,) = ops.scan(cell, x, **weights, s0=s0, lengths=lengths)
    assert y.numel() > 1 << 31
    h = torch.tensor(0.5)
    for _ in range(steps):
        h = torch.tanh(h / 2)
    assert abs(y[0, -1, 0] - torch.tanh(torch.tensor(0.25))) < 1e-6
    assert last[0, 0, 0] == 0.5
    assert abs(last[0, -1, 0] - h) < 1e-6
    assert y[-1, -1, 0] == last[0, -1, 0]


def test_results_do_not_alias() -> None:
    cell = cells.get("lstm")
    given = operands(cell, 3, 2, 4, 5)
    y, states = ops.scan(cell, **given)
    before = [t.clone() for t in (y, *states, *given["s0"])]
    y.zero_()
    for s in states:
        s.zero_()
    assert torch.equal(given["s0"][0], before[3]) and torch.equal(given["s0"][1], before[4])
    y, states = ops.scan(cell, **given)
    states[0].zero_()
    assert torch.equal(y, before[0]) and torch.equal(states[1], before[2])


def test_a_forced_kernel_refuses_or_runs() -> None:
    cell = cells.get("gru")
    given = operands(cell, 3, 2, 4, 5, dtype=torch.float32)
    right, _ = ops.scan(cell, **given)
    with kernels.use("reference"):
        y, _ = ops.scan(cell, **given)
    torch.testing.assert_close(y, right)
    complex_given: dict[str, Any] = {
        k: [t.cfloat() for t in v] if isinstance(v, list) else v for k, v in given.items()
    }
    complex_given["x"] = given["x"].cfloat()
    with kernels.use("cpu"), pytest.raises(plan.KernelRefused, match="not ComplexFloat"):
        ops.scan(cell, **complex_given)
    with pytest.raises(ValueError, match="no kernel named"), kernels.use("gpu"):
        pass


def test_each_new_plan_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTRNN_LOG", "plan")
    _C.forget_plans()
    given = operands(cells.get("gru"), 3, 2, 4, 11)
    with planned():
        for _ in range(3):
            ops.scan(cells.get("gru"), **given)
    logged = capsys.readouterr().err
    assert logged.count("kernel='cpu'") == 1
    assert "hidden=11" in logged


def test_ragged_batches_share_plans(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTRNN_LOG", "plan")
    layer = GRU(3, 29)
    for steps in range(40, 80):
        layer(torch.randn(steps, 2, 3), lengths=[steps, steps - 7])
    plans = capsys.readouterr().err.count("Problem(")
    assert 1 <= plans <= 2 * 8


def test_the_log_shows_the_problem_that_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The log has the call's own problem, not the rounded one that shares the plan."""
    monkeypatch.setenv("FASTRNN_LOG", "plan")
    layer = GRU(3, 27)
    for kernel in ("cpu", "reference"):
        with kernels.use(kernel):
            layer(torch.randn(43, 2, 3))
        assert "steps=43, batch=2, " in capsys.readouterr().err


def test_a_kernel_in_python_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass of a shape is planned when it first runs: for C++, which asks for the CPU kernel's
    plan, and for Python. Plans that are forgotten are made again."""
    made = []
    choose = plan.choose

    def counted(problem: plan.Problem, device: plan.Device) -> plan.Plan:
        made.append(choose(problem, device))
        return made[-1]

    monkeypatch.setattr(plan, "choose", counted)
    given = operands(cells.get("lstm"), 3, 2, 4, 11)
    given["x"].requires_grad_()
    with kernels.use("reference"):
        for forget, expected in ((False, 4), (False, 4), (True, 8)):
            if forget:
                _C.forget_plans()
            y, _ = ops.scan(cells.get("lstm"), **given)
            y.sum().backward()
            assert [each.kernel for each in made] == ["reference"] * expected
