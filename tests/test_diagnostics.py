"""The gradients of states, against loops of torch operations."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn.diagnostics import GradientFlow, gradient_flow
from tests.support.paths import ROOT
from tests.support.shared import peepholes
from tests.support.tensors import flatten, weights_like

F64 = torch.float64
T, B, IN, H = 7, 3, 4, 5
LAYERS: dict[str, Callable[..., Any]] = {
    "rnn": fastrnn.RNN,
    "lstm": fastrnn.LSTM,
    "gru": fastrnn.GRU,
    "torch.rnn": nn.RNN,
    "torch.lstm": nn.LSTM,
    "torch.gru": nn.GRU,
}
MORE: dict[str, Callable[..., Any]] = {
    **LAYERS,
    "projected": lambda *sizes, **options: fastrnn.LSTM(*sizes, **(options | {"proj_size": 3})),
    "torch.projected": lambda *sizes, **options: nn.LSTM(*sizes, **(options | {"proj_size": 3})),
    "custom": lambda *sizes, **options: fastrnn.Recurrent(peepholes, *sizes, **options),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
every_kind = pytest.mark.parametrize("name", MORE)


def made(name: str, layers: int = 1, **options: Any) -> Any:
    return MORE[name](IN, H, layers, **{"dtype": F64, **options})


def total(result: Any) -> Tensor:
    """A loss to which every output and every final state counts differently."""
    parts = [(t * weights_like(t)).sum() for t in flatten(result)]
    return torch.stack(parts).sum()


def step(name: str, x: Tensor, states: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """One step by the formulas of torch.nn's documentation."""
    w_ih, w_hh, b_ih, b_hh = weights
    u, v = x @ w_ih.T + b_ih, states[0] @ w_hh.T + b_hh
    if name.endswith("rnn"):
        return [torch.tanh(u + v)]
    if name.endswith("gru"):
        (ur, uz, un), (vr, vz, vn) = u.chunk(3, -1), v.chunk(3, -1)
        z = torch.sigmoid(uz + vz)
        return [(1 - z) * torch.tanh(un + torch.sigmoid(ur + vr) * vn) + z * states[0]]
    i, f, g, o = (u + v).chunk(4, -1)
    c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
    return [torch.sigmoid(o) * torch.tanh(c), c]


def loop(name: str, layer: Any, x: Tensor) -> tuple[Any, dict[str, list[Tensor]]]:
    """The result of a layer of torch.nn or fastrnn, and every state, which retains its gradient."""
    retained: dict[str, list[Tensor]] = {}
    finals: list[list[Tensor]] = []
    for number in range(layer.num_layers):
        outputs = []
        for suffix in ("", "_reverse")[: 1 + layer.bidirectional]:
            kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            weights = [getattr(layer, f"{kind}_l{number}{suffix}") for kind in kinds]
            states = [torch.zeros(x.size(1), H, dtype=F64)] * (2 if name.endswith("lstm") else 1)
            steps: list[list[Tensor]] = [[] for _ in x]
            for t in range(T)[:: -1 if suffix else 1]:
                # A clone stands for the state as the next step and the output read it.
                states = [s.clone() for s in step(name, x[t], states, weights)]
                for s in states:
                    s.retain_grad()
                steps[t] = states
            for k, state in enumerate("hc"[: len(states)]):
                retained[f"l{number}{suffix}.{state}"] = [after[k] for after in steps]
            outputs.append(torch.stack([after[0] for after in steps]))
            finals.append(states)
        x = torch.cat(outputs, -1)
    last = tuple(torch.stack(s) for s in zip(*finals, strict=True))
    return (x, last if len(last) > 1 else last[0]), retained


def norms(retained: list[Tensor]) -> Tensor:
    return torch.stack([torch.zeros(()) if s.grad is None else s.grad.norm() for s in retained])


@every_layer
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_norms_are_those_of_a_loop(name: str, layers: int, bidirectional: bool) -> None:
    layer, x = made(name, layers, bidirectional=bidirectional), torch.randn(T, B, IN, dtype=F64)
    result, retained = loop(name, layer, x)
    loss = total(result)
    loss.backward()
    flow = gradient_flow(layer, x, total)
    assert flow.loss == pytest.approx(loss.item())
    assert flow.names == list(retained) and not flow.skipped
    for key, states in retained.items():
        torch.testing.assert_close(flow[key], norms(states))


@every_layer
def test_a_loss_of_the_last_step_reaches_the_first(name: str) -> None:
    layer, x = made(name), torch.randn(T, B, IN, dtype=F64)
    result, retained = loop(name, layer, x)
    result[0][-1].sum().backward()
    flow = gradient_flow(layer, x, lambda result: result[0][-1].sum())
    for key, states in retained.items():
        torch.testing.assert_close(flow[key], norms(states))
    assert (flow["l0.h"] > 0).all()


def same_result(layer: Any, *arguments: Any, **keywords: Any) -> GradientFlow:
    """Checks values and gradients of a call that is watched against the call that is not."""
    given = [t for t in flatten(arguments) if t.requires_grad and t.is_leaf]
    wanted = [*layer.parameters(), *given]
    found: list[Any] = []

    def run() -> Tensor:
        torch.manual_seed(3)
        result = layer(*arguments, **keywords)
        loss = total(result)
        found.append((result, torch.autograd.grad(loss, wanted, retain_graph=True)))
        return loss

    run()
    flow = gradient_flow(layer, run)
    (one_call, _), (stepwise, _) = found
    assert type(stepwise[0]) is type(one_call[0]) and type(stepwise[1]) is type(one_call[1])
    for one, other in zip(flatten(found[1]), flatten(found[0]), strict=True):
        torch.testing.assert_close(one, other)
    return flow


def states(layer: Any, *batch: int) -> Any:
    count = layer.num_layers * (1 + layer.bidirectional)
    width = getattr(layer, "proj_size", 0) or H
    one, other = (torch.randn(count, *batch, n, dtype=F64, requires_grad=True) for n in (width, H))
    return (one, other) if layer.mode in ("LSTM", "peepholes") else one


@every_kind
@pytest.mark.parametrize("form", ["time first", "batch first", "unbatched", "packed", "sorted"])
def test_results_are_those_of_one_call(name: str, form: str) -> None:
    options = {"bidirectional": True, "dropout": 0.5, "batch_first": form == "batch first"}
    layer = made(name, 2, **options)
    x: Any = torch.randn(T, B, IN, dtype=F64, requires_grad=True)
    hx = states(layer, *([] if form == "unbatched" else [B]))
    if form == "batch first":
        x = x.detach().transpose(0, 1).contiguous().requires_grad_()
    elif form == "unbatched":
        x = x.detach()[:, 0].requires_grad_()
    elif form in ("packed", "sorted"):
        lengths = [3, 7, 5] if form == "packed" else [7, 5, 2]
        x = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=form == "sorted")
    layer.eval() if form == "unbatched" else layer.train()
    for given in ((x,), (x, hx)):
        flow = same_result(layer, *given)
        assert len(flow.states) == 4 * (2 if isinstance(hx, tuple) else 1)
        assert all(len(entry.norms) == T for entry in flow.states)


@pytest.mark.parametrize("name", ["rnn", "lstm", "gru", "projected", "custom"])
def test_what_torch_nn_does_not_have(name: str) -> None:
    layer, x = made(name, 2, bidirectional=True), torch.randn(T, B, IN, dtype=F64)
    resets = torch.rand(T, B) < 0.3
    lengths = [4, 0, 7]
    flow = same_result(layer, x, states(layer, B), lengths=lengths, return_states=True)
    same_result(layer, x, states(layer, B), resets=resets)
    same_result(layer, x, states(layer, B), resets=resets, reset_states=states(layer, 1))
    same_result(layer, x, lengths=lengths, resets=resets, return_states=True)
    packed = pack_padded_sequence(x, torch.tensor([7, 2, 4]), enforce_sorted=False)
    flags = pack_padded_sequence(resets, torch.tensor([7, 2, 4]), enforce_sorted=False)
    same_result(layer, packed, resets=flags)
    same_result(layer, packed, resets=flags, reset_states=states(layer, B))
    alone = gradient_flow(layer, lambda: total(layer(x[:4, :1], lengths=[4])))
    alone_longer = gradient_flow(layer, lambda: total(layer(x[:, :1], lengths=[4])[1]))
    assert alone_longer["l0.h"][4:].sum() == 0, "past the end there are no steps"
    assert len(alone["l0.h"]) == 4 and len(flow["l0.h"]) == T


@pytest.mark.parametrize("kind", [fastrnn.LSTM, fastrnn.GRU])
def test_heads(kind: Any) -> None:
    layer = kind(IN, 6, 2, heads=2, bidirectional=True, dtype=F64)
    same_result(layer, torch.randn(T, B, IN, dtype=F64))


def test_an_episode_that_begins_ends_the_gradient() -> None:
    layer, x = fastrnn.LSTM(IN, H), torch.randn(T, B, IN)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[4] = True
    flow = gradient_flow(layer, lambda: layer(x, resets=resets)[0][-1].sum())
    for key in ("l0.h", "l0.c"):
        assert not flow[key][:4].any()
    assert flow["l0.h"][4:].all()


class Model(nn.Module):
    def __init__(self, lstm: nn.Module, cell: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = lstm, cell
        self.out = nn.Linear(H, 2)

    def forward(self, x: Tensor, steps: int) -> Tensor:
        _, (h, c) = self.encoder(x)
        state, outputs = (h[-1], c[-1]), []
        for _ in range(steps):
            state = self.decoder(x[0], state)
            outputs.append(self.out(state[0]))
        return torch.stack(outputs)


def test_cells_in_a_loop_of_the_model() -> None:
    """Two implementations of an LSTM, and a layer that runs the same steps, agree."""
    torch.manual_seed(1)
    ours = Model(fastrnn.LSTM(IN, H, 2, dtype=F64), fastrnn.LSTMCell(IN, H, dtype=F64)).double()
    theirs = Model(nn.LSTM(IN, H, 2, dtype=F64), nn.LSTMCell(IN, H, dtype=F64)).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(T, B, IN, dtype=F64)
    flows = [gradient_flow(model, (x, 6), torch.sum) for model in (ours, theirs)]
    wanted = [f"encoder.l{k}.{s}" for k in range(2) for s in "hc"]
    assert flows[0].names == [*wanted, "decoder.l0.h", "decoder.l0.c"]
    for key in flows[0].names:
        torch.testing.assert_close(flows[0][key], flows[1][key])
    layer = fastrnn.LSTM(IN, H, dtype=F64)
    layer.load_state_dict({f"{n}_l0": p for n, p in ours.decoder.named_parameters()})
    state = tuple(s[-1:].detach() for s in ours.encoder(x)[1])
    alone = gradient_flow(layer, lambda: ours.out(layer(x[:1].expand(6, B, IN), state)[0]).sum())
    for key in "hc":
        torch.testing.assert_close(flows[0][f"decoder.l0.{key}"], alone[f"l0.{key}"])


def test_a_layer_that_is_called_twice() -> None:
    layer, x = nn.GRU(IN, H), torch.randn(T, B, IN)

    def run() -> Tensor:
        first, h = layer(x)
        return first.sum() + layer(x[:3], h)[0].sum()

    flow = gradient_flow(layer, run)
    assert flow.names == ["l0.h", "l0.h (call 2)"]
    assert [len(entry.norms) for entry in flow.states] == [T, 3]
    with pytest.raises(
        KeyError, match=r"no state is named 'h'; there are: l0\.h, l0\.h \(call 2\)"
    ):
        flow["h"]


@every_layer
def test_nothing_changes(name: str) -> None:
    model = nn.Sequential(made(name, 2, dropout=0.5))
    x = torch.randn(T, B, IN, dtype=F64)
    total(model(x)).backward()
    before = [(p, p.detach().clone(), p.grad, p._version) for p in model.parameters()]
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    names = set(vars(model[0]))
    gradient_flow(model, x, total)
    for p, (same, value, grad, version) in zip(model.parameters(), before, strict=True):
        assert p is same and torch.equal(p, value) and p.grad is grad and p._version == version
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad is not None and torch.equal(p.grad, grad)
    assert set(vars(model[0])) == names and not model[0]._forward_hooks
    copy.deepcopy(model)


def test_nothing_changes_after_an_error() -> None:
    model = Model(nn.LSTM(IN, H), nn.LSTMCell(IN, H))
    with pytest.raises(ZeroDivisionError):
        gradient_flow(model, lambda: 1 / 0)
    assert "forward" not in vars(model.encoder) and not model.decoder._forward_hooks


def test_frozen_weights_have_a_flow() -> None:
    model = nn.Sequential(fastrnn.LSTM(IN, H), fastrnn.GRU(IN, H)).requires_grad_(False)
    x = torch.randn(T, B, IN)
    flow = gradient_flow(model, lambda: model[0](x)[0][-1].sum())
    assert flow["0.l0.h"].all() and flow["0.l0.c"][:-1].all() and not flow["0.l0.c"][-1]
    assert flow.names == ["0.l0.h", "0.l0.c"], "the other layer did not run"
    fastrnn.freeze(model)
    same = gradient_flow(model, lambda: model[0](x)[0][-1].sum())
    torch.testing.assert_close(same["0.l0.h"], flow["0.l0.h"])


@pytest.mark.takes(5)
def test_a_compiled_model_runs_as_it_is_written() -> None:
    model, x = nn.Sequential(fastrnn.LSTM(IN, H)), torch.randn(T, B, IN)
    compiled: Any = torch.compile(model, backend="eager")
    expected = total(compiled(x))
    flow = gradient_flow(compiled, x, total)
    assert flow.names == ["0.l0.h", "0.l0.c"] and flow.loss == pytest.approx(expected.item())
    torch.testing.assert_close(flow["0.l0.h"], gradient_flow(model, x, total)["0.l0.h"])
    torch.testing.assert_close(total(compiled(x)), expected)


def test_explosion_and_vanishing_are_seen() -> None:
    x = torch.zeros(50, 2, IN)
    layer: Any = fastrnn.init.identity_(fastrnn.RNN(IN, H, nonlinearity="relu"))
    h = torch.rand(1, 2, H)
    for factor in (0.5, 1.0, 2.0):
        with torch.no_grad():
            layer.weight_hh_l0.copy_(factor * torch.eye(H))
        flow = gradient_flow(layer, lambda: layer(x, h)[0][-1].sum())["l0.h"]
        # The derivative of each step is the matrix.
        torch.testing.assert_close(flow, flow[-1] * factor ** torch.arange(49.0, -1, -1))


class Doubling(nn.GRU):
    def forward(self, input: Any, hx: Any = None) -> Any:
        output, state = super().forward(input, hx)
        return 2 * output, state


def test_what_is_skipped_is_said() -> None:
    quantised = fastrnn.LSTM(H, H)
    fastrnn.quantize_(quantised)
    model = nn.ModuleList([Doubling(IN, H), quantised, fastrnn.RNN(H, H)])
    x = torch.randn(T, B, IN)

    def run() -> Tensor:
        y = model[0](x)[0]
        with torch.no_grad():
            quantised(y)
        return model[2](y)[0].sum()

    flow = gradient_flow(model, run)
    assert flow.names == ["2.l0.h"]
    assert set(flow.skipped) == {"0", "1"}
    assert "0       skipped: Doubling has a forward of its own" in str(flow)
    with pytest.raises(
        ValueError, match=r"ran no recurrent layer .*; model: Doubling has a forward"
    ):
        gradient_flow(model[0], x, lambda result: result[0].sum())


def test_wrong_arguments() -> None:
    layer, x = fastrnn.GRU(IN, H), torch.randn(T, B, IN)
    with pytest.raises(TypeError, match="loss= is missing"):
        gradient_flow(layer, x)
    with pytest.raises(TypeError, match="loss= must be None"):
        gradient_flow(layer, lambda: layer(x)[0].sum(), torch.sum)
    with pytest.raises(ValueError, match=r"one number, got shape \(7, 3, 5\)"):
        gradient_flow(layer, x, lambda result: result[0])
    with pytest.raises(ValueError, match="one number, got float"):
        gradient_flow(layer, x, lambda result: 1.0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="has no gradient"):
        gradient_flow(layer, x, lambda result: result[0].sum().detach())
    with pytest.raises(ValueError, match=r"ran no recurrent layer or cell of this Linear"):
        gradient_flow(nn.Linear(IN, 1), x, torch.sum)


def test_the_table() -> None:
    layer, x = fastrnn.LSTM(IN, H), torch.randn(T, B, IN)
    flow = gradient_flow(layer, x, lambda result: result[0][-1].sum())
    head, h, c = str(flow).splitlines()
    assert head.split() == ["state", "steps", "first", "step", "middle", "last", "step"]
    assert h.split()[:2] == ["l0.h", "7"] and c.split()[-1] == "0"
    assert float(h.split()[2]) == pytest.approx(flow["l0.h"][0].item(), rel=1e-2)


def test_the_plot_has_a_line_for_each_state() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    layer, x = fastrnn.LSTM(IN, H, bidirectional=True), torch.randn(T, B, IN)
    flow = gradient_flow(layer, x, total)
    axes = flow.plot()
    assert [line.get_label() for line in axes.get_lines()] == flow.names
    torch.testing.assert_close(
        torch.as_tensor(axes.get_lines()[0].get_ydata()), flow["l0.h"], check_dtype=False
    )
    assert flow.plot(axes) is axes and len(axes.get_lines()) == 2 * len(flow.names)
    assert axes.get_yscale() == "log"


def test_matplotlib_is_imported_for_a_plot_alone() -> None:
    script = """
import sys, torch, fastrnn
layer = fastrnn.GRU(2, 3)
flow = fastrnn.diagnostics.gradient_flow(layer, torch.randn(4, 1, 2), lambda r: r[0].sum())
assert "matplotlib" not in sys.modules and "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=600)


def test_sixteen_bits_and_autocast() -> None:
    x = torch.randn(T, B, IN, dtype=torch.bfloat16)
    flow = gradient_flow(fastrnn.LSTM(IN, H, dtype=torch.bfloat16), x, lambda r: r[0].sum())
    assert flow["l0.h"].dtype == torch.float32 and flow["l0.h"].all()
    for kind in (fastrnn.GRU, fastrnn.LSTM):
        layer = kind(IN, H)
        with torch.autocast("cpu", torch.bfloat16):
            flow = gradient_flow(layer, x.float(), lambda r: r[0].float().sum())
        assert flow["l0.h"].all()
