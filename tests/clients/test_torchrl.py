"""TorchRL's recurrent modules around our layers: same keys and numbers as around its own."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fastrnn
from tests.clients.support import Client, Ratio

tensordict = pytest.importorskip("tensordict")
modules = pytest.importorskip("torchrl.modules")
ours = pytest.importorskip("fastrnn.integrations.torchrl")

CLIENT = Client("torchrl", "LSTMModule 128 and GRUModule 128")

B, T, F, H = 4, 9, 3, 5
STATES = {"LSTM": ["h", "c"], "GRU": ["h"]}


def module(
    kind: str, inputs: int = F, hidden: int = H, package: Any = modules, **options: Any
) -> Any:
    states = STATES[kind]
    return getattr(package, f"{kind}Module")(
        input_size=inputs,
        hidden_size=hidden,
        in_keys=["x", *states],
        out_keys=["y", *(("next", s) for s in states)],
        **options,
    )


def rollout(
    kind: str,
    *shape: int,
    layers: int = 1,
    stored: bool = True,
    begins: float = 0.3,
    inputs: int = F,
    hidden: int = H,
) -> Any:
    random = torch.Generator().manual_seed(1)
    shape = shape or (B, T)
    data = {
        "x": torch.randn(*shape, inputs, generator=random),
        "is_init": torch.rand(*shape, 1, generator=random) < begins,
    }
    for state in STATES[kind]:
        data[state] = torch.randn(*shape, layers, hidden, generator=random) * stored
    return tensordict.TensorDict(data, shape)


@pytest.fixture
def whole() -> Iterator[None]:
    with modules.set_recurrent_mode(True):
        yield


def assert_same(a: Any, b: Any) -> None:
    assert set(a.keys(True, True)) == set(b.keys(True, True))
    for key in a.keys(True, True):
        torch.testing.assert_close(a[key], b[key], atol=1e-6, rtol=1e-5)


def replaced(theirs: Any) -> Any:
    twin = copy.deepcopy(theirs)
    fastrnn.replace_(twin)
    return twin


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("stored", [False, True], ids=["zeros", "stored states"])
@pytest.mark.parametrize("shape", [(T,), (B, T), (2, B, T)], ids=str)
def test_episodes_begin_in_mid_row(
    kind: str, layers: int, stored: bool, shape: tuple[int, ...], whole: None
) -> None:
    theirs = module(kind, num_layers=layers)
    mine = replaced(theirs)
    data = rollout(kind, *shape, layers=layers, stored=stored)
    assert data["is_init"][..., 1:, :].any()
    results = [m(data.clone()) for m in (mine, theirs)]
    assert_same(*results)
    for m, result in zip((mine, theirs), results, strict=True):
        sum((result[key] ** 2).sum() for key in m.out_keys).backward()
    torch.testing.assert_close(
        [p.grad for p in mine.parameters()], [p.grad for p in theirs.parameters()]
    )


@pytest.mark.parametrize("kind", STATES)
def test_it_is_one_call_with_lengths(
    kind: str, whole: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = replaced(module(kind))
    calls = []
    layer = getattr(mine, kind.lower())
    layer.register_forward_pre_hook(lambda m, a, k: calls.append(sorted(k)), with_kwargs=True)
    mine(rollout(kind))
    assert calls == [["lengths"]]


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("begins", [0.0, 0.3, 1.0])
def test_no_episode_some_and_only_episodes_of_one_step(
    kind: str, begins: float, whole: None
) -> None:
    theirs = module(kind)
    data = rollout(kind, begins=begins)
    assert_same(replaced(theirs)(data.clone()), theirs(data.clone()))


@pytest.mark.parametrize("kind", STATES)
def test_without_states(kind: str, whole: None) -> None:
    theirs = module(kind)
    data = rollout(kind).exclude(*STATES[kind])
    assert_same(replaced(theirs)(data.clone()), theirs(data.clone()))


@pytest.mark.parametrize("kind", STATES)
def test_bidirectional(kind: str, whole: None) -> None:
    theirs = module(kind, bidirectional=True)
    data = rollout(kind, layers=2)
    assert_same(replaced(theirs)(data.clone()), theirs(data.clone()))


@pytest.mark.parametrize("kind", STATES)
def test_step_by_step(kind: str) -> None:
    theirs = module(kind)
    data = rollout(kind)[:, 0]
    assert_same(replaced(theirs)(data.clone()), theirs(data.clone()))


@pytest.mark.parametrize("kind", STATES)
def test_a_rollout_as_a_collector_plays_it(kind: str) -> None:
    """Steps one by one, each with the states of the step before, and zeros where an episode begins;
    then all at once, from the states that were stored."""
    mine = replaced(module(kind, num_layers=2))
    data = rollout(kind, layers=2, stored=False)
    steps: list[Any] = []
    for step in data.unbind(1):
        if steps:
            begins = step["is_init"].unsqueeze(-1)
            for state in STATES[kind]:
                step[state] = steps[-1]["next", state].masked_fill(begins, 0)
        steps.append(mine(step.clone()))
    played = torch.stack(steps, 1)
    with modules.set_recurrent_mode(True):
        whole = mine(played.select(*mine.in_keys).clone())
    torch.testing.assert_close(whole["y"], played["y"])
    ends = torch.cat([data["is_init"][:, 1:], torch.ones(B, 1, 1, dtype=torch.bool)], 1).squeeze(-1)
    for state in STATES[kind]:
        torch.testing.assert_close(whole["next", state][ends], played["next", state][ends])
        assert not whole["next", state][~ends].any()


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("backend", ["pad", "scan"])
def test_backends(kind: str, backend: str, whole: None) -> None:
    theirs = module(kind, recurrent_backend=backend)
    data = rollout(kind)
    assert_same(replaced(theirs)(data.clone()), theirs(data.clone()))


@pytest.mark.parametrize("kind", STATES)
def test_compiled(kind: str, whole: None) -> None:
    theirs = module(kind)
    torch._dynamo.reset()
    data = rollout(kind)
    with torch.no_grad():
        compiled = torch.compile(replaced(theirs), backend="eager")(data.clone())
        assert_same(compiled, theirs(data.clone()))


@pytest.mark.parametrize("kind", STATES)
def test_there_and_back(kind: str, whole: None) -> None:
    model = nn.Sequential(nn.Identity(), module(kind))
    wrapper, layer = model[1], getattr(model[1], kind.lower())
    report = fastrnn.replace_(model)
    assert type(model[1]) is getattr(ours, f"{kind}Module")
    assert isinstance(wrapper, getattr(modules, f"{kind}Module"))
    assert getattr(wrapper, kind.lower()) is layer
    assert [(r.name, r.after) for r in report.replaced] == [
        ("1", f"fastrnn.integrations.torchrl.{kind}Module"),
        (f"1.{kind.lower()}", f"fastrnn.{kind}"),
    ]
    data = rollout(kind)
    assert_same(pickle.loads(pickle.dumps(wrapper))(data.clone()), wrapper(data.clone()))
    back = fastrnn.restore_(model)
    assert len(back.replaced) == 2
    assert type(model[1]) is getattr(modules, f"{kind}Module")
    assert type(layer) is getattr(nn, kind)


@pytest.mark.parametrize("kind", STATES)
def test_made_around_a_layer_of_ours(kind: str, whole: None) -> None:
    states = STATES[kind]
    layer = getattr(fastrnn, kind)(F, H, batch_first=True)
    keys = {"in_keys": ["x", *states], "out_keys": ["y", *(("next", s) for s in states)]}
    mine = getattr(ours, f"{kind}Module")(**{kind.lower(): layer}, **keys)
    theirs = getattr(modules, f"{kind}Module")(**{kind.lower(): fastrnn.to_torch(layer)}, **keys)
    data = rollout(kind)
    assert_same(mine(data.clone()), theirs(data.clone()))
    # TorchRL's class takes our layer for its own Python layer until replace_ changes the class.
    plain = getattr(modules, f"{kind}Module")(**{kind.lower(): layer}, **keys)
    with pytest.raises(TypeError, match="mask"):
        plain(data.clone())
    fastrnn.replace_(plain)
    assert_same(plain(data.clone()), theirs(data.clone()))


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bias": False}], ids=str)
def test_made_from_sizes(kind: str, options: dict[str, Any], whole: None) -> None:
    theirs = module(kind, **options)
    mine = module(kind, package=ours, **options)
    layer = getattr(mine, kind.lower())
    assert type(layer) is getattr(fastrnn, kind) and layer.batch_first
    mine.load_state_dict(theirs.state_dict())
    data = rollout(kind, layers=options.get("num_layers", 1))
    assert_same(mine(data.clone()), theirs(data.clone()))
    primers = [m.make_tensordict_primer().primers for m in (mine, theirs)]
    assert primers[0] == primers[1]
    python = getattr(module(kind, package=ours, python_based=True), kind.lower())
    assert type(python) is type(getattr(module(kind, python_based=True), kind.lower()))


def ensemble(kind: str, **options: Any) -> tuple[list[Any], Any]:
    """Modules of TorchRL, and ours with all their parameters stacked: a function of the parameters
    and a rollout."""
    theirs = [module(kind, **options) for _ in range(3)]
    mine = replaced(theirs[0])

    def call(parameters: dict[str, torch.Tensor], data: Any) -> tuple[torch.Tensor, ...]:
        result = torch.func.functional_call(mine, parameters, (data.clone(),))
        return tuple(result[key] for key in mine.out_keys)

    return theirs, call


def assert_members_same(theirs: list[Any], together: Any, rollouts: list[Any]) -> None:
    for k, (member, data) in enumerate(zip(theirs, rollouts, strict=True)):
        result = member(data.clone())
        for value, key in zip(together, member.out_keys, strict=True):
            torch.testing.assert_close(value[k], result[key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("begins", [0.0, 0.3])
def test_an_ensemble_on_one_rollout(kind: str, begins: float, whole: None) -> None:
    theirs, call = ensemble(kind, num_layers=2)
    stacked, _ = torch.func.stack_module_state(theirs)
    data = rollout(kind, layers=2, begins=begins)
    together = torch.vmap(call, (0, None))(stacked, data)
    assert_members_same(theirs, together, [data] * 3)
    sum((value**2).sum() for value in together).backward()
    for k, member in enumerate(theirs):
        result = member(data.clone())
        sum((result[key] ** 2).sum() for key in member.out_keys).backward()
        for name, parameter in member.named_parameters():
            torch.testing.assert_close(stacked[name].grad[k], parameter.grad, msg=name)


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("stored", [None, False, True], ids=["none", "zeros", "stored states"])
@pytest.mark.parametrize("shape", [(T,), (B, T), (2, B, T)], ids=str)
def test_an_ensemble_on_rollouts_of_its_own(
    kind: str, stored: bool | None, shape: tuple[int, ...], whole: None
) -> None:
    theirs, call = ensemble(kind, num_layers=2)
    stacked, _ = torch.func.stack_module_state(theirs)
    rollouts = rollout(kind, 3, *shape, layers=2, stored=bool(stored))
    if stored is None:
        rollouts = rollouts.exclude(*STATES[kind])
    together = torch.vmap(call, (0, 0))(stacked, rollouts)
    assert_members_same(theirs, together, list(rollouts.unbind(0)))


@pytest.mark.parametrize("kind", STATES)
def test_an_ensemble_as_torchrls_losses_run_it(kind: str, whole: None) -> None:
    """They stack the parameters as a TensorDict, and put each into the module."""
    theirs, _ = ensemble(kind)
    mine = replaced(theirs[0])
    parameters = tensordict.TensorDict.from_modules(*theirs, as_module=True)
    data = rollout(kind)

    def call(data: Any, parameters: Any) -> Any:
        with parameters.to_module(mine):
            return mine(data)

    together = torch.vmap(call, (None, 0))(data, parameters)
    for k, member in enumerate(theirs):
        assert_same(together[k], member(data.select(*member.in_keys).clone()))


@pytest.mark.parametrize("kind", STATES)
def test_gradients_of_every_rollout(kind: str, whole: None) -> None:
    """vmap around grad: `is_init` is batched below the level of the gradient."""
    (theirs, *_), call = ensemble(kind)
    rollouts = rollout(kind, 3, B, T)
    parameters = {name: p.detach() for name, p in theirs.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], data: Any) -> Any:
        return sum((value**2).sum() for value in call(parameters, data))

    every = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, rollouts)
    for k, data in enumerate(rollouts.unbind(0)):
        theirs.zero_grad()
        result = theirs(data.clone())
        sum((result[key] ** 2).sum() for key in theirs.out_keys).backward()
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(every[name][k], parameter.grad, msg=name)


@pytest.mark.parametrize("kind", STATES)
def test_torchrls_own_python_layer_is_left_alone(kind: str) -> None:
    theirs = module(kind, python_based=True)
    report = fastrnn.replace_(theirs)
    assert report.replaced == ()
    assert type(theirs) is getattr(modules, f"{kind}Module")


@pytest.mark.parametrize("kind", STATES)
def test_changing_the_layer_later(kind: str, whole: None) -> None:
    theirs = module(kind)
    mine = replaced(theirs)
    mine.make_cudnn_based()
    data = rollout(kind)
    assert_same(mine(data.clone()), theirs(data.clone()))


def test_the_adapter_is_not_imported_without_torchrl() -> None:
    assert "fastrnn.integrations.torchrl" in sys.modules  # imported by this test
    import subprocess

    program = (
        "import sys, torch, fastrnn; fastrnn.replace_(torch.nn.GRU(2, 3)); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torchrl" not in done.stdout


@pytest.mark.parametrize("kind", STATES)
def test_times(kind: str, whole: None, ratio: Ratio) -> None:
    """A rollout as in a loss, and a step as in a collector."""
    sizes = {"inputs": 64, "hidden": 128}
    theirs = module(kind, **sizes)
    mine = replaced(theirs)
    data = rollout(kind, 16, 64, begins=0.05, **sizes)
    episodes = 16 + int(data["is_init"][:, 1:].sum())

    def run(model: Any, data: Any) -> list[torch.Tensor]:
        result = model(data.clone(recurse=False))
        return [result[key] for key in model.out_keys]

    def gradients(model: Any) -> Any:
        loss = sum(t.square().sum() for t in run(model, data))
        return torch.autograd.grad(loss, list(model.parameters()))

    what = f"{kind}Module: a rollout of 16×64 steps, {episodes} episodes"
    ratio(CLIENT, what, lambda: run(theirs, data), lambda: run(mine, data), within=1e-5)
    ratio(
        CLIENT,
        f"{what}, gradients",
        lambda: gradients(theirs),
        lambda: gradients(mine),
        within=1e-5,
        grad=True,
    )
    step = data[:, 0]
    with modules.set_recurrent_mode(False):
        ratio(
            CLIENT,
            f"{kind}Module: a step of 16 environments",
            lambda: run(theirs, step),
            lambda: run(mine, step),
            within=1e-5,
        )
