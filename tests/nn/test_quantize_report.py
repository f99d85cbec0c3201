"""Which layers `quantize_` takes, its report, and its errors."""

from __future__ import annotations

import re
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from fastrnn.compiler import jit
from fastrnn.extension import _C
from tests.support.quantised import LIMITS, assert_equal, assert_like, by_hand, has_kernel


@pytest.mark.skipif(not has_kernel("int8"), reason="this processor lacks the instructions")
def test_a_cell_is_compiled_in_the_format_that_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = jit.compile_cell

    def spy(derived: Any, key: str, format: str = "float32", fresh: bool = False) -> Any:
        asked.append(format)
        return real(derived, key, format, fresh)

    @fastrnn.cell(gates="a", states="h")
    def compiled_in_int8(u: Any, v: Any, h: Tensor) -> Tensor:
        return 0.5 * h + torch.tanh(u.a + v.a)

    monkeypatch.setattr(jit, "compile_cell", spy)
    layer = fastrnn.Recurrent(compiled_in_int8, 5, 7)
    fastrnn.quantize_(layer)
    layer(torch.randn(3, 2, 5))
    assert asked == ["int8"]


def test_a_sample_that_fails_later_changes_nothing() -> None:
    class Reader(nn.Module):
        """Reads a weight, which it cannot once that is int8."""

        def __init__(self) -> None:
            super().__init__()
            self.rnn = fastrnn.LSTM(5, 7)

        def forward(self, x: Tensor) -> Tensor:
            shift: Tensor = self.rnn(x)[0] + cast(Tensor, self.rnn.weight_hh_l0).mean()
            return shift

    module, x = Reader(), torch.randn(6, 2, 5)
    before = module(x)
    with pytest.raises(RuntimeError, match="mean"):
        fastrnn.quantize_(module, keep_float=False, sample=x)
    assert_equal(module(x), before)
    assert all(p.requires_grad for p in module.parameters())


def test_only_some_layers() -> None:
    def model() -> Any:
        return nn.ModuleDict({"a": fastrnn.GRU(3, 4), "b": nn.Sequential(fastrnn.LSTM(3, 4))})

    by_name, by_function = model(), model()
    reports = (
        fastrnn.quantize_(by_name, only=["b.0"]),
        fastrnn.quantize_(by_function, only=lambda name, m: isinstance(m, fastrnn.LSTM)),
    )
    reasons = ("only does not name it", "only returned False")
    for changed, report, reason in zip((by_name, by_function), reports, reasons, strict=True):
        assert [q.name for q in report.quantised] == ["b.0"]
        assert [(s.name, s.layer, s.reason) for s in report.left_alone] == [
            ("a", "GRU(3, 4)", reason)
        ]
        assert changed["a"].weight_hh_l0.requires_grad
        assert not changed["b"][0].weight_hh_l0.requires_grad
    with pytest.raises(ValueError, match="'c', but no fastrnn layer"):
        fastrnn.quantize_(model(), only={"a", "c"})
    with pytest.raises(ValueError, match="no layer can be quantised: a: only returned False"):
        fastrnn.quantize_(model(), only=lambda name, m: False)
    for wrong in ("a", 3):
        with pytest.raises(TypeError, match="only should be"):
            fastrnn.quantize_(model(), only=wrong)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:cell")
def test_what_is_left_alone() -> None:
    summing = fastrnn.cell(gates="h", states="h", name="quantised_summing")(
        lambda u, v, h: torch.tanh(u.h + v.h).cumsum(-1)
    )
    model = nn.ModuleDict(
        {
            "parametrized": fastrnn.GRU(3, 4),
            "pruned": fastrnn.LSTMCell(3, 4),
            "doubles": fastrnn.RNN(3, 4, dtype=torch.float64),
            "elsewhere": fastrnn.RNN(3, 4, device="meta"),
            "written": fastrnn.GRU(3, 4),
            "uncompiled": fastrnn.Recurrent(summing, 3, 4),
            "wide": fastrnn.RNN(70_000, 2),
        }
    )
    parametrize.register_parametrization(model["parametrized"], "weight_ih_l0", nn.Tanh())
    prune.random_unstructured(model["pruned"], "weight_hh", 0.5)
    written: Any = model["written"]
    written._flat_weights[0] = torch.zeros(12, 3)
    words = {
        "parametrized": "weight_ih_l0 is computed anew.*remove_parametrizations",
        "pruned": "weight_hh is computed anew.*prune.remove",
        "doubles": "float64",
        "elsewhere": "on meta",
        "written": "_flat_weights",
        "uncompiled": "quantised_summing' is not compiled",
        "wide": "70000 columns",
    }
    with pytest.raises(ValueError, match=r"pruned: weight_hh is computed.*doubles: .*float64"):
        fastrnn.quantize_(model)
    model["fine"] = fastrnn.GRU(3, 4)
    report = fastrnn.quantize_(model, keep_float=False)
    assert [q.name for q in report.quantised] == ["fine"]
    assert [s.name for s in report.left_alone] == list(words)
    for left in report.left_alone:
        assert re.search(words[left.name], left.reason), left
    assert model["doubles"].weight_hh_l0.requires_grad


def test_the_report() -> None:
    model = nn.ModuleDict({"rnn": fastrnn.GRU(256, 256), "cell": fastrnn.LSTMCell(3, 4)})
    report = fastrnn.quantize_(model, activations="int16", only=["rnn"])
    restored = "" if has_kernel("int16") else ", float32 weights restored"
    assert str(report).splitlines() == [
        f"quantised   rnn   GRU(256, 256): int8 x int16, 1.58 MB -> 0.41 MB, {_C.isa()}{restored}",
        "left alone  cell  LSTMCell(3, 4): only does not name it",
    ]
    assert report.sample is None
    (entry,) = fastrnn.quantize_(model["cell"], "bfloat16").quantised
    assert (entry.name, entry.format) == ("", "bfloat16 x bfloat16")
    assert (entry.bytes_before, entry.bytes_after) == (4 * (16 * 7 + 32), 2 * 16 * 7 + 4 * 32)


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = fastrnn.LSTM(5, 9, num_layers=2, dropout=0.5)
        self.seen: list[bool] = []

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        self.seen.append(torch.is_grad_enabled())
        return {"name": "asking", "y": [self.rnn(x)[0] * scale]}


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_a_sample_is_compared(training: bool, keep_float: bool) -> None:
    model = Asking().train(training)
    x = torch.randn(6, 2, 5)
    rounded = by_hand(model.rnn).train(training)
    before = torch.get_rng_state()
    with torch.no_grad():
        expected = 2 * (rounded(x)[0] - 0)
        torch.set_rng_state(before)
        expected = expected - 2 * model.rnn(x)[0]
        torch.set_rng_state(before)
    report = fastrnn.quantize_(model, sample={"x": x, "scale": 2.0}, keep_float=keep_float)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training is training and model.rnn.training is training
    assert not any(model.seen)
    assert report.sample is not None
    limit = 4 * LIMITS["int8"] if has_kernel("int8") else 1e-6
    assert abs(report.sample.max_error - float(expected.abs().max())) <= limit
    assert abs(report.sample.rms_error - float(expected.square().mean().sqrt())) <= limit
    assert report.sample.max_error > 0 and report.sample.speedup > 0
    last = str(report).splitlines()[-1]
    assert re.match(r"sample +\(model\)  max error .*, RMS error .*, .* times as fast", last)
    assert isinstance(model.rnn.weight_hh_l0, nn.Parameter) is keep_float
    assert_like(model(x)["y"][0] if not training else x, rounded(x)[0] if not training else x)


def test_samples_of_every_form() -> None:
    x = torch.randn(6, 2, 5)
    packed = pack_sequence([x[:, 0], x[:4, 1]])
    for sample in (x, (x,), (x, torch.zeros(1, 2, 9)), {"input": x}, packed):
        report = fastrnn.quantize_(fastrnn.GRU(5, 9), sample=sample)
        assert report.sample is not None and 0 < report.sample.max_error < 0.05
    silent: Any = nn.Sequential(fastrnn.GRU(5, 9))
    silent.forward = lambda x: "nothing"
    with pytest.raises(TypeError, match="no tensor: str"):
        fastrnn.quantize_(silent, sample=x)
    assert silent[0].weight_hh_l0.requires_grad


def test_what_cannot_be_quantised() -> None:
    for function in (fastrnn.quantize_, fastrnn.dequantize_):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            function("lstm")  # type: ignore[arg-type, type-var]
    with pytest.raises(ValueError, match="replace_"):
        fastrnn.quantize_(nn.LSTM(3, 4))
    module = fastrnn.GRU(3, 4)
    for wrong in ({"weights": "int4"}, {"activations": "float"}):
        with pytest.raises(ValueError, match="should be"):
            fastrnn.quantize_(module, **wrong)  # type: ignore[arg-type]
    for activations in ("int8", "int16", "bfloat16"):
        with pytest.raises(ValueError, match="should be one of 'auto'"):
            fastrnn.quantize_(module, "bfloat16", activations)
    assert module.weight_hh_l0.requires_grad and "_frozen" not in vars(module)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    model: Any = nn.Sequential(fastrnn.GRU(3, 4), fastrnn.GRU(4, 4, bidirectional=True))
    with torch.no_grad():
        model[1].weight_hh_l0_reverse[3, 1] = value
    for weights in ("int8", "bfloat16"):
        with pytest.raises(ValueError, match=r"1\.weight_hh_l0_reverse has values.*NaN"):
            fastrnn.quantize_(model, weights, keep_float=False)
    assert all(p.requires_grad for p in model.parameters())


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(fastrnn.GRU(3, 4), fastrnn.GRU(4, 4))
    model[1].weight_hh_l0 = nn.Parameter(torch.randn(12, 5))
    names = list(dict(model.named_parameters()))
    with pytest.raises(RuntimeError, match=r"should be|sizes"):
        fastrnn.quantize_(model, keep_float=False)
    assert list(dict(model.named_parameters())) == names
    assert all(p.requires_grad for p in model.parameters())
