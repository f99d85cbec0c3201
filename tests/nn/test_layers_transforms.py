"""torch's tools around a module: torch.func, higher derivatives, hooks, compilers, exporters."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils import checkpoint

import fastrnn
from tests.support.modules import twins
from tests.support.names import CELLS, LAYERS
from tests.support.tensors import flatten, mapped, sum_of

F64 = torch.float64
NAMES = LAYERS + CELLS


def case(name: str, **options: Any) -> tuple[nn.Module, nn.Module, Tensor, Any]:
    """Our module, torch.nn's, an input (two steps of a batch of two, or one), initial states."""
    if name in LAYERS:
        options = {"num_layers": 2, "bidirectional": True, **options}
    ours, theirs, _ = twins(name, 2, 3, **options)
    shape = (2, 2) if name in LAYERS else (2,)
    x = torch.randn(*shape, 2, dtype=F64)
    h, c = torch.randn(2, *((4, 2) if name in LAYERS else (2,)), 3, dtype=F64)
    return ours, theirs, x, (h, c) if "LSTM" in name else h


def total(module: nn.Module, *args: Any) -> Tensor:
    found: Any = sum(y.square().sum() for y in flatten(module(*args)))
    return found


def assert_same(a: Any, b: Any) -> None:
    assert len(flatten(a)) == len(flatten(b)) > 0
    for mine, wanted in zip(flatten(a), flatten(b), strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_gradients(name: str) -> None:
    """Runs gradgradcheck with respect to input, states and every weight."""
    options = {"num_layers": 1} if name in LAYERS else {}
    ours, _, x, hx = case(name, **options)
    names = [n for n, _ in ours.named_parameters()]
    states = flatten(hx) if name not in LAYERS else [s[:2] for s in flatten(hx)]

    def call(x: Tensor, *rest: Tensor) -> list[Tensor]:
        initial = rest[: len(states)]
        weights = dict(zip(names, rest[len(states) :], strict=True))
        given = initial if len(initial) > 1 else initial[0]
        return flatten(functional_call(ours, weights, (x, given)))

    inputs = [t.detach().clone().requires_grad_() for t in (x, *states, *ours.parameters())]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_penalty(name: str) -> None:
    """A gradient penalty as in WGAN-GP: its gradients reach the weights."""
    ours, theirs, x, hx = case(name)
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(total(module, leaf, hx), leaf, create_graph=True)
        (slope.norm() - 1).square().backward()
    for (what, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=what)


@pytest.mark.parametrize("name", NAMES)
def test_func_grad_and_jacobians(name: str) -> None:
    ours, theirs, x, hx = case(name)
    for transform in (grad, jacrev, jacfwd, hessian):
        assert_same(
            transform(lambda x: total(ours, x, hx))(x), transform(lambda x: total(theirs, x, hx))(x)
        )
    parameters = dict(ours.named_parameters())
    for a, b in zip(
        grad(lambda p: total_of(ours, p, x))(parameters).values(),
        grad(lambda p: total_of(theirs, p, x))(parameters).values(),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def total_of(module: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    found: Any = sum(y.square().sum() for y in flatten(functional_call(module, parameters, (x,))))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode(name: str) -> None:
    ours, theirs, x, hx = case(name)
    tangent = torch.randn_like(x)
    results = [
        jvp(lambda x, m=m: tuple(flatten(m(x, hx))), (x,), (tangent,)) for m in (ours, theirs)
    ]
    assert_same(*results)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        out = torch.autograd.forward_ad.unpack_dual(flatten(ours(dual, hx))[0])
    assert_same([out.primal, out.tangent], [results[1][0][0], results[1][1][0]])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("over", ["inputs", "states", "both"])
def test_vmap_over_inputs_and_states(name: str, over: str) -> None:
    ours, theirs, x, hx = case(name)
    inputs = torch.randn(3, *x.shape, dtype=F64) if over != "states" else x.expand(3, *x.shape)
    states = mapped([hx], lambda t: torch.randn(3, *t.shape, dtype=F64))[0]
    if over == "inputs":
        states = mapped([hx], lambda t: t.expand(3, *t.shape))[0]
    in_dims = (None if over == "states" else 0, None if over == "inputs" else 0)
    arguments = (x if over == "states" else inputs, hx if over == "inputs" else states)
    together = vmap(lambda x, s: tuple(flatten(ours(x, s))), in_dims=in_dims)(*arguments)
    for k in range(3):
        wanted = theirs(inputs[k], mapped([states], partial(Tensor.select, dim=0, index=k))[0])
        assert_same([y[k] for y in together], wanted)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_every_sample(name: str) -> None:
    ours, theirs, _, _ = case(name)
    unbatched = torch.randn(3, *((4, 2) if name in LAYERS else (2,)), dtype=F64)
    parameters = {n: p.detach() for n, p in ours.named_parameters()}
    every = vmap(grad(lambda p, x: total_of(ours, p, x)), in_dims=(None, 0))(parameters, unbatched)
    for k in range(3):
        theirs.zero_grad()
        total(theirs, unbatched[k]).backward()
        for n, p in theirs.named_parameters():
            torch.testing.assert_close(every[n][k], p.grad, msg=n)


@pytest.mark.parametrize("name", LAYERS)
def test_transforms_of_the_extras(name: str) -> None:
    """lengths and resets under vmap and forward mode, in which their values cannot be read."""
    ours, _, _, hx = case(name)
    inputs, lengths = torch.randn(3, 4, 2, 2, dtype=F64), torch.tensor([[4, 1], [0, 2], [3, 3]])
    resets = torch.rand(3, 4, 2) < 0.4
    together = vmap(lambda x, n, r: tuple(flatten(ours(x, hx, lengths=n, resets=r))))(
        inputs, lengths, resets
    )
    for k in range(3):
        wanted = ours(inputs[k], hx, lengths=lengths[k], resets=resets[k])
        assert_same([y[k] for y in together], wanted)
    tangent = torch.randn_like(inputs[0])
    slope = jvp(
        lambda x: ours(x, hx, lengths=lengths[0], resets=resets[0])[0], (inputs[0],), (tangent,)
    )[1]
    step = 1e-6
    ahead, behind = (
        ours(inputs[0] + s * tangent, hx, lengths=lengths[0], resets=resets[0])[0]
        for s in (step, -step)
    )
    torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)


# Autocast.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(name: str, low: torch.dtype) -> None:
    ours, _, x, hx = case(name, dtype=torch.float32)
    x, hx = x.float(), tuple(s.float() for s in flatten(hx))
    hx = hx if len(hx) > 1 else hx[0]
    exact = flatten(ours(x, hx))
    with torch.autocast("cpu", dtype=low):
        results = flatten(ours(x, hx))
        from_low = flatten(ours(x.to(low), hx))
    # torch.nn's GRU on a CPU takes the dtype of its state.
    wanted = torch.float32 if name.startswith("GRU") else low
    assert {y.dtype for y in [*results, *from_low]} == {wanted}
    for y, z in zip([*results, *from_low], exact * 2, strict=True):
        torch.testing.assert_close(y.float(), z, rtol=0, atol=0.03)
    sum_of(y.float().sum() for y in results).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


# Hooks and modes around a call.


@pytest.mark.parametrize("name", NAMES)
def test_hooks(name: str) -> None:
    def backward_pre(log: list[str], *_: object) -> None:
        log.append("backward pre")

    def backward(log: list[str], _: object, inputs: Any, outputs: Any) -> None:
        log.append(f"backward {len(inputs)} {len(outputs)}")

    seen: dict[nn.Module, list[str]] = {}
    ours, theirs, x, hx = case(name)
    for module in (ours, theirs):
        log = seen[module] = []
        module.register_forward_pre_hook(lambda m, a, log=log: log.append(f"pre {len(a)}"))
        module.register_forward_hook(
            lambda m, a, k, out, log=log: log.append(f"forward {sorted(k)} {len(flatten(out))}"),
            with_kwargs=True,
        )
        module.register_full_backward_pre_hook(partial(backward_pre, log))
        module.register_full_backward_hook(partial(backward, log))
        total(module, x.clone().requires_grad_(), hx).backward()
    assert seen[ours] == seen[theirs]
    assert len(seen[ours]) == 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(name: str, reentrant: bool) -> None:
    ours, _, x, hx = case(name)
    leaf = x.clone().requires_grad_()
    plain = torch.autograd.grad(total(ours, leaf, hx), [leaf, *ours.parameters()])
    for p in ours.parameters():
        p.grad = None
    leaf.grad = None
    out = checkpoint.checkpoint(
        lambda x: tuple(flatten(ours(x, hx))), leaf, use_reentrant=reentrant
    )
    sum(y.square().sum() for y in out).backward()
    assert_same([leaf.grad, *(p.grad for p in ours.parameters())], plain)


@pytest.mark.parametrize("name", NAMES)
def test_saved_tensors_may_travel(name: str) -> None:
    ours, _, x, hx = case(name)
    plain = torch.autograd.grad(total(ours, x, hx), list(ours.parameters()))
    with torch.autograd.graph.save_on_cpu(), torch.autograd.detect_anomaly(check_nan=True):
        moved = torch.autograd.grad(total(ours, x, hx), list(ours.parameters()))
    assert_same(moved, plain)


# Compilers and exporters.


def model(name: str, **options: Any) -> nn.Sequential:
    """The module between others, so that a graph break shows."""

    class Take(nn.Module):
        def forward(self, result: Any) -> Tensor:
            return flatten(result)[0]

    module = getattr(fastrnn, name)(4, 5, dtype=F64, **options)
    width = 5 * (2 if options.get("bidirectional") else 1)
    return nn.Sequential(nn.Linear(3, 4, dtype=F64), module, Take(), nn.Linear(width, 2, dtype=F64))


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def shape(name: str, steps: int, batch: int) -> tuple[int, ...]:
    return (steps, batch, 3) if name in LAYERS else (batch, 3)


@pytest.mark.parametrize("name", NAMES)
def test_compile_trains_without_graph_break(name: str) -> None:
    options = {"num_layers": 2, "bidirectional": True, "dropout": 0.5} if name in LAYERS else {}
    net = model(name, **options)
    x = torch.randn(shape(name, 5, 2), dtype=F64)
    results = []
    for call in (net, compiled(net)):
        net.zero_grad()
        torch.manual_seed(1)
        y = call(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in net.parameters())])
    assert_same(*results)


@pytest.mark.parametrize("name", NAMES)
def test_compile_sees_sizes_as_symbols(name: str) -> None:
    """There is no second recompilation for other T and B."""
    net = model(name, **({"num_layers": 2} if name in LAYERS else {}))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    call = torch.compile(net, fullgraph=True, backend=counter)
    for steps, batch in ((5, 2), (6, 3), (9, 4), (4, 7)):
        x = torch.randn(shape(name, steps, batch), dtype=F64, requires_grad=True)
        y = call(x)
        assert_same(y, net(x))
        y.sum().backward()
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", LAYERS)
def test_compile_states_and_extras(name: str) -> None:
    layer = getattr(fastrnn, name)(3, 5, num_layers=2, batch_first=True, dtype=F64)
    hx = torch.randn(2, 2, 5, dtype=F64)
    start = (hx, hx + 1) if name == "LSTM" else hx
    lengths, resets = torch.tensor([3, 5]), torch.rand(2, 5) < 0.4

    def call(x: Tensor) -> Any:
        return (
            layer(x, start, lengths=lengths, resets=resets),
            layer(x[0]),
            layer(x, lengths=[1, 2]),
        )

    x = torch.randn(2, 5, 3, dtype=F64)
    assert_same(compiled(call)(x), call(x))


@pytest.mark.parametrize("name", LAYERS)
def test_compile_packed(name: str) -> None:
    """With given states or a sorted batch, no size depends on data."""
    layer = getattr(fastrnn, name)(3, 5, dtype=F64)
    x = torch.randn(5, 2, 3, dtype=F64)
    packed = nn.utils.rnn.pack_padded_sequence(x, [3, 5], enforce_sorted=False)
    assert_same(compiled(lambda p: tuple(flatten(layer(p))))(packed), tuple(flatten(layer(packed))))


@pytest.mark.parametrize("name", NAMES)
def test_compile_reads_weights_at_the_call(name: str) -> None:
    module = getattr(fastrnn, name)(3, 5, dtype=F64)
    weight = "weight_hh_l0" if name in LAYERS else "weight_hh"
    nn.utils.parametrizations.weight_norm(module, weight)
    x = torch.randn(shape(name, 4, 2), dtype=F64)
    call = compiled(module)
    hx = torch.randn(*((1, 2) if name in LAYERS else (2,)), 5, dtype=F64)
    start = (hx, hx) if "LSTM" in name else hx
    assert_same(call(x, start), module(x, start))
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)
    assert_same(call(x, start), module(x, start))


@pytest.mark.parametrize("name", NAMES)
def test_inductor(name: str) -> None:
    net = model(name).float()
    x = torch.randn(shape(name, 5, 2))
    torch._dynamo.reset()
    y = torch.compile(net, fullgraph=True)(x)
    torch.testing.assert_close(y, net(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_any_length(name: str, strict: bool) -> None:
    net = model(name, **({"num_layers": 2, "bidirectional": True} if name in LAYERS else {}))
    x = torch.randn(shape(name, 5, 2), dtype=F64)
    sizes = dict.fromkeys(range(x.dim() - 1), torch.export.Dim.DYNAMIC)
    program = torch.export.export(net, (x,), dynamic_shapes=(sizes,), strict=strict)
    calls = [n for n in program.graph.nodes if "fastrnn" in str(n.target)]
    assert len(calls) == (2 if name in LAYERS else 1)  # one node per layer, not one per step
    for steps, batch in ((7, 3), (3, 5)):
        x = torch.randn(shape(name, steps, batch), dtype=F64)
        torch.testing.assert_close(program.module()(x), net(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(name: str, mode: Any) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    ours, _, x, hx = case(name)
    graph = make_fx(lambda x: flatten(ours(x, hx)), tracing_mode=mode, _allow_non_fake_inputs=True)(
        x
    )
    assert_same(graph(2 * x), ours(2 * x, hx))


@pytest.mark.parametrize("name", NAMES)
def test_symbolic_trace_keeps_the_module_whole(name: str) -> None:
    net = model(name)
    graph = torch.fx.symbolic_trace(net[:2])
    assert [n.op for n in graph.graph.nodes] == ["placeholder", *["call_module"] * 2, "output"]
    x = torch.randn(shape(name, 5, 2), dtype=F64)
    assert_same(graph(x), net[:2](x))


@pytest.mark.parametrize("name", NAMES)
def test_script(name: str) -> None:
    """A saved trace has torch.nn's own layer, so loading it needs no fastrnn."""
    net = model(name)[:2]
    x = torch.randn(shape(name, 5, 2), dtype=F64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(net)
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
        buffer.seek(0)
        loaded = torch.jit.load(buffer)
    assert "fastrnn" not in re.sub("#.*", "", str(loaded.inlined_graph))  # of paths
    for module in (scripted, loaded):
        assert_same(module(x), net(x))
    assert scripted.state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize("name", NAMES)
def test_trace(name: str) -> None:
    net = model(name)[:2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net, (torch.randn(shape(name, 5, 2), dtype=F64),))
    assert "fastrnn::" not in str(traced.inlined_graph)
    x = torch.randn(shape(name, 7, 3), dtype=F64)
    assert_same(traced(x), net(x))


class Own(fastrnn.LSTM):
    """A subclass, which is in no table of classes."""


def test_trace_of_a_subclass_and_of_parametrized_weights() -> None:
    module = Own(3, 5)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, (torch.randn(4, 2, 3),))
    assert "fastrnn::" not in str(traced.inlined_graph)
    x = torch.randn(6, 1, 3)
    assert_same(traced(x), module(x))


def test_script_of_a_cell_of_ones_own() -> None:
    @fastrnn.cell(gates="h", states="h", name="script_me")
    def script_me(u: Any, v: Any, h: Tensor) -> Tensor:
        return torch.tanh(u.h + v.h)

    with (
        pytest.raises(NotImplementedError, match=r"no layer for the cell 'script_me'"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(fastrnn.Recurrent(script_me, 3, 5))


@pytest.mark.parametrize("name", LAYERS)
def test_onnx_graph_holds_the_standard_node(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.onnx._internal.torchscript_exporter import onnx_proto_utils

    # It would only look for functions in onnxscript, with a package that is not needed here.
    monkeypatch.setattr(onnx_proto_utils, "_add_onnxscript_fn", lambda model, _: model)
    buffer = io.BytesIO()
    net = getattr(fastrnn, name)(3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (torch.randn(4, 2, 3),),
            buffer,  # type: ignore[arg-type]
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": {0: "T"}},
        )
    # The bytes of the field op_type of a NodeProto: its tag, the size of the text, the text.
    assert buffer.getvalue().count(bytes([0x22, len(name)]) + name.encode()) == 1


@pytest.mark.parametrize("name", NAMES)
def test_flop_counter_and_fake_tensors(name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    ours, theirs, x, hx = case(name)
    with FlopCounterMode(display=False):
        result = ours(x, hx)
    assert_same(result, theirs(x, hx))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = flatten(ours(mode.from_tensor(x)))
    assert [y.shape for y in fake] == [y.shape for y in flatten(result)]


@pytest.mark.parametrize("name", LAYERS)
def test_distributed_data_parallel(name: str, tmp_path: Any) -> None:
    ours, theirs, x, hx = case(name)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        total(nn.parallel.DistributedDataParallel(ours), x, hx).backward()
    finally:
        torch.distributed.destroy_process_group()
    total(theirs, x, hx).backward()
    assert_same([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
