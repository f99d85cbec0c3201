"""The modules that `replace_` and `restore_` skip, and the reports."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import nn

import fastrnn
from fastrnn.nn.replace import Report
from tests.support.models import PLACES, SIZES, model_with_all


class MyLSTM(nn.LSTM):
    def forward(self, *args: object) -> object:  # type: ignore[override]
        return "mine"


class MyFastLSTM(fastrnn.LSTM):
    pass


def reason(module: nn.Module, change: Callable[..., Report] = fastrnn.replace_) -> str:
    kind = type(module)
    report = change(nn.Sequential(module))
    assert type(module) is kind
    assert report.replaced == ()
    (skipped,) = report.skipped
    assert skipped.name == "0"
    return skipped.reason


def test_reasons_for_skipping() -> None:
    assert "subclass of torch.nn.LSTM" in reason(MyLSTM(*SIZES))
    assert "subclass of fastrnn.LSTM" in reason(MyFastLSTM(*SIZES), fastrnn.restore_)
    assert "already" in reason(fastrnn.GRU(*SIZES))
    assert "already" in reason(nn.GRUCell(*SIZES), fastrnn.restore_)
    recurrent = fastrnn.Recurrent(fastrnn.cells.gru, 5, 7)
    assert "torch.nn does not have" in reason(recurrent, fastrnn.restore_)
    wrapped = nn.LSTM(*SIZES)
    wrapped.forward = lambda *_: None  # type: ignore[method-assign, assignment]
    assert "forward was set on the instance" in reason(wrapped)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_quantised_and_scripted_are_skipped() -> None:
    from torch.ao.nn.quantized import dynamic

    assert "quantised" in reason(dynamic.LSTM(*SIZES))
    assert "scripted" in reason(torch.jit.script(nn.GRUCell(*SIZES)))


def test_skipped_subclass_still_works() -> None:
    model = nn.ModuleList([MyLSTM(*SIZES), nn.LSTM(*SIZES)])
    fastrnn.replace_(model)
    assert model[0](torch.zeros(1)) == "mine"
    assert type(model[1]) is fastrnn.LSTM


def test_filter_sees_module_and_name_and_decides() -> None:
    model = model_with_all()
    seen: dict[str, nn.Module] = {}

    def only_layers(module: nn.Module, name: str) -> bool:
        seen[name] = module
        return isinstance(module, nn.RNNBase)

    report = fastrnn.replace_(model, only_layers)
    assert seen == {place: model.get_submodule(place) for place in PLACES}
    assert {s.name for s in report.skipped} == {"list.2", "cells.0", "cells.1"}
    assert {s.reason for s in report.skipped} == {"filter_fn returned False"}
    assert type(model.get_submodule("cells.0")) is nn.LSTMCell
    assert type(model.get_submodule("list.0")) is fastrnn.LSTM
    restored = fastrnn.restore_(model, lambda _, name: name == "list.0")
    assert [r.name for r in restored.replaced] == ["list.0"]
    assert type(model.get_submodule("dict.deep.0.0")) is fastrnn.RNN


def test_report_reads_as_a_table() -> None:
    model = nn.ModuleDict({"encoder": nn.LSTM(*SIZES), "decode": MyLSTM(*SIZES)})
    report = fastrnn.replace_(model)
    assert str(report).splitlines() == [
        "replaced  encoder  torch.nn.LSTM -> fastrnn.LSTM",
        f"skipped   decode   {__name__}.MyLSTM: is a subclass of torch.nn.LSTM: "
        "its forward may be its own; subclasses=True takes those that build on torch's",
    ]
    assert str(fastrnn.replace_(nn.Linear(2, 2))) == "no recurrent modules found"


def test_report_notes_packages_that_go_by_class(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastrnn.replace_(nn.Sequential(nn.GRU(*SIZES))).notes == ()
    monkeypatch.setitem(sys.modules, "thop", ModuleType("thop"))
    report = fastrnn.replace_(nn.Sequential(nn.GRU(*SIZES)))
    ((package, text),) = report.notes
    assert package == "thop"
    assert "restore_(model) before counting" in text
    assert str(report).splitlines() == [
        "replaced  0     torch.nn.GRU -> fastrnn.GRU",
        f"note      thop  {text}",
    ]
    assert fastrnn.replace_(nn.Linear(2, 2)).notes == ()  # nothing to warn of
    model = nn.Sequential(fastrnn.GRU(*SIZES))
    assert fastrnn.replace_(model).notes == ()
    assert fastrnn.restore_(model).notes == ()


def test_report_notes_models_of_transformers() -> None:
    base = type("PreTrainedModel", (nn.Module,), {"__module__": "transformers.modeling_utils"})
    model = type("Mine", (base,), {})()
    model.rnn = nn.LSTM(*SIZES)
    assert (
        "call replace_ on a model that was loaded"
        in dict(fastrnn.replace_(model).notes)["transformers"]
    )


def test_restore_leaves_heads_alone() -> None:
    assert "has heads" in reason(fastrnn.GRU(4, 8, heads=2), fastrnn.restore_)
