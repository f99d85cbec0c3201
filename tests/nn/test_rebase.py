"""Subclasses of torch.nn's classes, for `replace_`, and of ours, for TorchScript."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import re
import subprocess
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from tests.support.paths import ROOT

SIZES = (5, 7)


class Inheriting(nn.LSTM):
    """Adds an attribute, a buffer and a method."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.factor = 2.0
        self.register_buffer("offset", torch.ones(1))

    def last(self, x: Tensor) -> Tensor:
        return self(x)[0][-1] * self.factor + self.offset


class Delegating(nn.GRU):
    def forward(self, input: Any, hx: Any = None) -> Any:
        output, state = super().forward(input, hx)
        return output * 2, state


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(self: Any, *args: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return function(self, *args)

    return call


class Deeper(Delegating):
    """`super()` in every kind of member."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        output, state = super().forward(input, hx)
        return output + self.shift, state

    @property
    def shift(self) -> float:
        return len(super().extra_repr())

    @counted
    def extra_repr(self) -> str:
        return super().extra_repr() + f", {self.label()}, {self.three()}"

    @classmethod
    def label(cls) -> str:
        return super().__name__ if hasattr(super(), "__name__") else cls.__name__

    @staticmethod
    def three() -> int:
        return 3


class AnyLength(ABC, nn.RNNBase):
    """As in pytorch-forecasting: a class beside torch's, whose forward goes on to that."""

    @abstractmethod
    def start(self, x: Tensor) -> Any: ...

    def forward(self, x: Any, hx: Any = None, lengths: Tensor | None = None) -> Any:
        if lengths is None:
            return super().forward(x, hx=hx)  # type: ignore[misc]
        if lengths.max() == 0:
            return torch.zeros(*x.shape[:2], self.hidden_size), self.start(x)
        packed = pack_padded_sequence(x, lengths.clamp(min=1), enforce_sorted=False)
        output, state = super().forward(packed, hx=hx)  # type: ignore[misc]
        return pad_packed_sequence(output)[0], state


class Forecasting(AnyLength, nn.LSTM):
    def start(self, x: Tensor) -> Any:
        zeros = torch.zeros(self.num_layers, x.size(1), self.hidden_size)
        return zeros, zeros


class OldStyle(nn.LSTMCell):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        h, c = super(OldStyle, self).forward(input, hx)  # noqa: UP008
        return h * 2, c


KINDS = (Inheriting, Delegating, Deeper, Forecasting, OldStyle)


def made(kind: type[nn.Module], **options: Any) -> tuple[nn.Module, nn.Module]:
    """A module replaced as a subclass, and its copy that was not."""
    module = kind(*SIZES, **options)
    original = copy.deepcopy(module)
    report = fastrnn.replace_(module, subclasses=True)
    assert len(report.replaced) == 1, report
    return module, original


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for each in value for t in flat(each)]


def sample(module: nn.Module) -> Tensor:
    random = torch.Generator().manual_seed(3)
    cell = isinstance(module, nn.RNNCellBase)
    return torch.randn(*((3, 5) if cell else (4, 3, 5)), generator=random)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    x = sample(a)
    torch.testing.assert_close(flat(a(x)), flat(b(x)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_and_gradients_stay(kind: type[nn.Module]) -> None:
    module, original = made(kind)
    assert_same(module, original)
    for m in (module, original):
        sum(y.square().sum() for y in flat(m(sample(m)))).backward()
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
    assert (type(module).__name__, type(module).__module__) == (kind.__name__, __name__)
    assert isinstance(module, nn.RNNCellBase if kind is OldStyle else nn.RNNBase)
    # Cells stay what they are; a layer's class has torch's layer among its bases and cannot.
    assert isinstance(module, kind) == (kind is OldStyle)
    assert vars(module).keys() - vars(original).keys() <= {"_frozen"}
    assert module.state_dict().keys() == original.state_dict().keys()


def test_members_of_every_kind_find_their_class() -> None:
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
    module = Delegating(*SIZES)
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
    lines = [
        f"replaced  a  {__name__}.Forecasting -> {__name__}.Forecasting on fastrnn.LSTM",
        f"replaced  b  {__name__}.OldStyle -> {__name__}.OldStyle on fastrnn.LSTMCell",
    ]
    assert str(fastrnn.replace_(model, subclasses=True)).splitlines() == lines
    again = fastrnn.replace_(model, subclasses=True)
    assert again.replaced == ()
    assert [s.reason for s in again.skipped] == [
        f"is {__name__}.Forecasting on fastrnn.LSTM already",
        f"is {__name__}.OldStyle on fastrnn.LSTMCell already",
    ]


# What is refused, each with its reason.


class OwnForward(nn.LSTM):
    def forward(self, *args: Any) -> Any:
        return "mine"


class WrappedForward(nn.LSTM):
    @functools.wraps(nn.LSTM.forward)
    def forward(self, *args: Any) -> Any:
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
        cls.seen = True


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
    module.forward = lambda *_: None
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


# TorchScript, of subclasses of ours and of what was replaced. torch.nn's are the yardstick: their
# subclasses may inherit a cell's forward, or have one of their own, but may not call super().


def heirs(base: type[nn.Module]) -> dict[str, type[nn.Module]]:
    class Inherits(base):  # type: ignore[misc, valid-type]
        pass

    class Adds(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.scale = 2.0
            self.out = nn.Linear(7, 2)

        @torch.jit.export
        def twice(self, x: Tensor) -> Tensor:
            return self.scale * x

    class Replaces(base):  # type: ignore[misc, valid-type]
        def forward(self, input: Tensor) -> Tensor:
            return self.helper(input) + self.hidden_size

        def helper(self, x: Tensor) -> Tensor:
            return x * 2

    class Inherits2(Inherits):
        pass

    return {c.__name__: c for c in (Inherits, Adds, Replaces, Inherits2)}


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


def scripted(module: nn.Module) -> Any:
    """Saved and loaded, so that nothing of Python is left in it."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), file)
        file.seek(0)
        return torch.jit.load(file)


@pytest.mark.parametrize("heir", ["Inherits", "Adds", "Replaces", "Inherits2"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_script_of_a_subclass(name: str, heir: str) -> None:
    module = heirs(getattr(fastrnn, name))[heir](*SIZES)
    expected = flat(module(sample(module)))
    loaded = scripted(Holder(module))
    assert "fastrnn" not in str(loaded.inlined_graph)
    torch.testing.assert_close(flat(loaded(sample(module))), expected, atol=1e-6, rtol=1e-5)
    assert loaded.inner.state_dict().keys() == module.state_dict().keys()
    if heir == "Adds":
        assert loaded.inner.twice(torch.ones(1)) == 2


@pytest.mark.parametrize("heir", ["Inherits", "Adds", "Replaces"])
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_script_of_a_subclass_by_itself(name: str, heir: str) -> None:
    ours, theirs = (heirs(getattr(lib, name))[heir](*SIZES) for lib in (fastrnn, nn))
    theirs.load_state_dict(ours.state_dict())
    x = sample(ours)
    torch.testing.assert_close(flat(scripted(ours)(x)), flat(scripted(theirs)(x)))


def test_scripting_leaves_torchs_modules_in_the_model() -> None:
    """What docs/drop-in.md warns of; torch.jit.script writes them there itself."""
    model = Holder(fastrnn.GRU(*SIZES))
    weight = model.inner.weight_hh_l0
    scripted(model)
    assert type(model.inner) is nn.GRU
    assert model.inner.weight_hh_l0 is weight
    fastrnn.replace_(model)
    assert type(model.inner) is fastrnn.GRU


class CallsSuper(fastrnn.GRUCell):
    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input)


class TorchCallsSuper(nn.GRUCell):
    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input)


@pytest.mark.parametrize("kind", [TorchCallsSuper, CallsSuper])
def test_script_refuses_super_as_for_torchs(kind: type[nn.Module]) -> None:
    with pytest.raises(RuntimeError, match="no attribute or method 'forward'"):
        scripted(kind(*SIZES))


def test_script_of_a_subclass_with_heads_is_refused() -> None:
    class Inherits(fastrnn.GRU):
        pass

    with pytest.raises(TypeError, match=r"torch\.nn has no heads"):
        scripted(Holder(Inherits(4, 8, heads=2)))


def test_script_of_a_replaced_subclass_is_that_of_the_class_it_had() -> None:
    kind = heirs(nn.LSTMCell)["Adds"]
    module = kind(*SIZES)
    original = copy.deepcopy(module)
    fastrnn.replace_(module, subclasses=True)
    loaded = scripted(Holder(module))
    torch.testing.assert_close(flat(loaded(sample(module))), flat(original(sample(module))))
    assert loaded.inner.twice(torch.ones(1)) == 2


def test_trace_of_a_replaced_subclass() -> None:
    module, original = made(Delegating)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, (sample(module),))
    assert "fastrnn::" not in str(traced.inlined_graph)
    x = torch.randn(6, 1, 5)
    torch.testing.assert_close(flat(traced(x)), flat(original(x)), atol=1e-6, rtol=1e-5)
