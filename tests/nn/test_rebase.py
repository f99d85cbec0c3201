"""Subclasses of torch.nn's classes, for `replace_`, and of ours, for TorchScript."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastrnn
from tests.support import subclasses
from tests.support.models import SIZES
from tests.support.paths import ROOT
from tests.support.subclasses import (
    KINDS,
    AnyLength,
    Deeper,
    Delegating,
    Forecasting,
    Inheriting,
    OldStyle,
    assert_same,
    flat,
    made,
    sample,
)
from tests.support.tensors import sum_of


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_and_gradients_stay(kind: type[nn.Module]) -> None:
    module, original = made(kind)
    assert_same(module, original)
    for m in (module, original):
        sum_of(y.square().sum() for y in flat(m(sample(m)))).backward()
    torch.testing.assert_close(
        [p.grad for p in module.parameters()], [p.grad for p in original.parameters()]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_fastrnns_forward_that_runs(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = made(kind)
    x = sample(module)
    for name in ("lstm", "gru", "lstm_cell"):
        monkeypatch.setattr(torch._VF, name, None)
    module(x)


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_keeps_its_name_and_members(kind: type[nn.Module]) -> None:
    module, original = made(kind)
    assert repr(module) == repr(original)
    assert (type(module).__name__, type(module).__module__) == (kind.__name__, kind.__module__)
    assert isinstance(module, nn.RNNCellBase if kind is OldStyle else nn.RNNBase)
    # A cell stays an instance of its class. A layer cannot: torch's layer is a base of that class.
    assert isinstance(module, kind) == (kind is OldStyle)
    assert vars(module).keys() - vars(original).keys() <= {"_frozen"}
    assert module.state_dict().keys() == original.state_dict().keys()


def test_members_of_every_kind_find_their_class() -> None:
    module: Any
    ours: Any
    theirs: Any
    module, original = made(Deeper)
    assert module.extra_repr() == original.extra_repr()
    assert module.calls == original.calls
    assert module.shift == original.shift
    assert module.three() == 3
    ours, theirs = made(Inheriting)
    torch.testing.assert_close(ours.last(sample(ours)), theirs.last(sample(theirs)))


def test_a_mixin_beside_torchs_class_stays_a_base() -> None:
    module, original = made(Forecasting)
    assert isinstance(module, AnyLength)
    x = sample(module)
    for lengths in (torch.tensor([2, 4, 1]), torch.tensor([0, 0, 0])):
        torch.testing.assert_close(
            flat(module(x, lengths=lengths)), flat(original(x, lengths=lengths))
        )


def test_the_original_class_is_left_alone() -> None:
    before = dict(vars(Deeper))
    made(Deeper)
    assert dict(vars(Deeper)) == before
    assert type(Deeper(*SIZES)) is Deeper
    assert Deeper(*SIZES)(torch.zeros(1, 1, 5))[0].shape == (1, 1, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_two_modules_share_the_class(kind: type[nn.Module]) -> None:
    assert type(made(kind)[0]) is type(made(kind)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["copy", "deepcopy", "pickle", "torch.save"])
def test_copies(kind: type[nn.Module], way: str) -> None:
    module, _ = made(kind)
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = {
            "copy": copy.copy,
            "deepcopy": copy.deepcopy,
            "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        }[way](module)
    assert type(twin) is type(module)
    assert twin is not module
    assert_same(twin, module)


def test_a_pickle_is_read_by_another_process(tmp_path: Path) -> None:
    module, _ = made(Deeper)
    (tmp_path / "module").write_bytes(pickle.dumps(module))
    program = (
        "import pickle, sys, torch, fastrnn\n"
        "module = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(isinstance(module, torch.nn.GRU), isinstance(module, fastrnn.GRU))\n"
        "print(repr(module(torch.ones(1, 1, 5))[0].sum().item()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "module")],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={"PYTHONPATH": ".", "PATH": "/usr/bin:/bin"},
    )
    classes, value = done.stdout.splitlines()
    assert classes == "False True"
    assert float(value) == pytest.approx(module(torch.ones(1, 1, 5))[0].sum().item())


@pytest.mark.parametrize("kind", KINDS)
def test_restore_gives_the_class_back(kind: type[nn.Module]) -> None:
    module, original = made(kind)
    parameters = list(module.parameters())
    report = fastrnn.restore_(module)
    assert len(report.replaced) == 1
    assert type(module) is kind
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    assert vars(module).keys() == vars(original).keys()
    assert_same(module, original)


def test_optimizer_and_hooks_stay() -> None:
    module: Any = Delegating(*SIZES)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    seen: list[str] = []
    module.register_forward_hook(lambda *_: seen.append("forward"))
    before = module.weight_hh_l0.detach().clone()
    fastrnn.replace_(module, subclasses=True)
    module(sample(module))[0].sum().backward()
    optimizer.step()
    assert seen == ["forward"]
    assert not torch.equal(before, module.weight_hh_l0)


def test_parametrized_subclass() -> None:
    module = Delegating(*SIZES)
    parametrizations.weight_norm(module, "weight_hh_l0")
    original = copy.deepcopy(module)
    fastrnn.replace_(module, subclasses=True)
    assert isinstance(module, fastrnn.GRU)
    assert_same(module, original)
    assert_same(copy.deepcopy(module), original)
    fastrnn.restore_(module)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is Delegating


@pytest.mark.parametrize("kind", [Inheriting, Delegating, Forecasting, OldStyle])
def test_compiles_without_graph_break(kind: type[nn.Module]) -> None:
    module, original = made(kind)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    x = sample(module)
    torch.testing.assert_close(flat(compiled(x)), flat(original(x)), atol=1e-6, rtol=1e-5)


def test_freezing_it() -> None:
    module, original = made(Delegating)
    fastrnn.freeze(module)
    with torch.no_grad():
        assert_same(module, original)
        assert_same(pickle.loads(pickle.dumps(module)), original)


def test_reports() -> None:
    model = nn.ModuleDict({"a": Forecasting(*SIZES), "b": OldStyle(*SIZES)})
    place = subclasses.__name__
    lines = [
        f"replaced  a  {place}.Forecasting -> {place}.Forecasting on fastrnn.LSTM",
        f"replaced  b  {place}.OldStyle -> {place}.OldStyle on fastrnn.LSTMCell",
    ]
    assert str(fastrnn.replace_(model, subclasses=True)).splitlines() == lines
    again = fastrnn.replace_(model, subclasses=True)
    assert again.replaced == ()
    assert [s.reason for s in again.skipped] == [
        f"is {place}.Forecasting on fastrnn.LSTM already",
        f"is {place}.OldStyle on fastrnn.LSTMCell already",
    ]


# Refused subclasses, each with its reason.


class OwnForward(nn.LSTM):
    def forward(self, *args: Any) -> Any:
        return "mine"


class WrappedForward(nn.LSTM):
    @functools.wraps(nn.LSTM.forward)
    def forward(self, *args: Any) -> Any:  # type: ignore[override]
        return super().forward(*args)


class Permuting(nn.LSTM):
    def permute_hidden(self, hx: Any, permutation: Any) -> Any:
        return hx


class Streaming(nn.GRU):
    def stream(self) -> str:
        return "mine"


class NamesItself(nn.GRU):
    def forward(self, input: Any, hx: Any = None) -> Any:
        return super(NamesItself, self).forward(input, hx)  # noqa: UP008


class NamesItselfInside(nn.GRU):
    def forward(self, input: Any, hx: Any = None) -> Any:
        return (lambda: super(NamesItselfInside, self).forward(input, hx))()


class AsksForItsClass(nn.LSTM):
    def doubles(self) -> bool:
        return isinstance(self, nn.LSTM)

    def forward(self, input: Any, hx: Any = None) -> Any:
        output, states = super().forward(input, hx)
        return (output * 2 if self.doubles() else output), states


class Registering(nn.GRU):
    def __init_subclass__(cls, **kwargs: Any) -> None:
        raise AssertionError("a class was made from it")


class Registry:
    def __init_subclass__(cls, **kwargs: Any) -> None:
        assert cls.__name__ == "Registered" and not hasattr(cls, "seen"), "a class was made from it"
        setattr(cls, "seen", True)  # noqa: B010


class Registered(nn.LSTMCell, Registry):
    pass


class Reducing(nn.GRU):
    def __reduce__(self) -> Any:
        return Reducing, SIZES


class Meta(type(nn.Module)):  # type: ignore[misc]
    pass


class WithMeta(nn.GRU, metaclass=Meta):
    pass


class Slotted(nn.GRU):
    __slots__ = ("extra",)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OwnForward, r"OwnForward\.forward does not call super\(\)\.forward"),
        (WrappedForward, r"WrappedForward\.forward is wrapped, so what it calls cannot be seen"),
        (Permuting, r"Permuting has its own permute_hidden"),
        (Streaming, r"Streaming has its own stream, a name that fastrnn's layer uses itself"),
        (NamesItself, r"NamesItself\.forward names a class where it calls super\(\.\.\.\)"),
        (NamesItselfInside, r"NamesItselfInside\.forward names a class where it calls super"),
        (AsksForItsClass, r"AsksForItsClass\.doubles asks isinstance\(\.\.\.\) of a class"),
        (Registering, r"Registering acts on every class made from it"),
        (Registered, r"Registry acts on every class made from it"),
        (Reducing, r"Reducing has its own __reduce__"),
        (WithMeta, r"WithMeta has a metaclass, Meta"),
        (Slotted, r"Slotted has __slots__"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_refusals(kind: type[nn.Module], reason: str) -> None:
    module = kind(*SIZES)
    report = fastrnn.replace_(module, subclasses=True)
    assert report.replaced == ()
    (skipped,) = report.skipped
    assert re.search(reason, skipped.reason), skipped.reason
    assert type(module) is kind


class Bookkeeping(nn.GRU):
    def forward(self, input: Any, hx: Any = None) -> Any:
        if self._weights_have_changed():
            self._init_flat_weights()
        return super().forward(input, hx)


def test_torchs_own_bookkeeping_may_be_called() -> None:
    module = Bookkeeping(*SIZES)
    x = torch.randn(3, 2, SIZES[0])
    expected = module(x)[0]
    assert fastrnn.replace_(module, subclasses=True).replaced
    torch.testing.assert_close(module(x)[0], expected)


def test_refusal_of_what_hangs_on_the_module() -> None:
    module = Inheriting(*SIZES)
    module.stream = nn.Linear(1, 1)
    (skipped,) = fastrnn.replace_(module, subclasses=True).skipped
    assert "its own attribute stream" in skipped.reason
    module = Inheriting(*SIZES)
    module.forward = lambda *_: None  # type: ignore[method-assign, assignment]
    (skipped,) = fastrnn.replace_(module, subclasses=True).skipped
    assert "forward was set on the instance" in skipped.reason


def test_refusal_without_source() -> None:
    scope: dict[str, Any] = {"nn": nn}
    exec(
        "class Unseen(nn.GRU):\n"
        "    def forward(self, input, hx=None):\n"
        "        return super().forward(input, hx)\n",
        scope,
    )
    (skipped,) = fastrnn.replace_(scope["Unseen"](*SIZES), subclasses=True).skipped
    assert "has no source to be read" in skipped.reason


def test_the_filter_decides() -> None:
    model = nn.ModuleList([Delegating(*SIZES), nn.GRU(*SIZES)])
    report = fastrnn.replace_(model, lambda m, _: type(m) is nn.GRU, subclasses=True)
    assert [r.name for r in report.replaced] == ["1"]
    assert [(s.name, s.reason) for s in report.skipped] == [("0", "filter_fn returned False")]


def test_subclasses_are_left_alone_unless_asked_for() -> None:
    model = nn.ModuleList([kind(*SIZES) for kind in KINDS])
    report = fastrnn.replace_(model)
    assert report.replaced == ()
    assert [type(m) for m in model] == list(KINDS)
    assert all("subclasses=True" in s.reason for s in report.skipped)
