"""docs/beyond-torch-nn.md, row by row: torch.nn fails or is wrong, and ours works."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import fastrnn
from tests.support.names import LAYERS
from tests.support.paths import ROOT


def made(library: Any, name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    layer: nn.Module = getattr(library, name)(4, 6, **kwargs)
    return layer


def compiled(layer: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(5, 3, 4))


def compiled_packed(layer: nn.Module) -> Any:
    torch._dynamo.reset()
    call = torch.compile(lambda p: layer(p), fullgraph=True, backend="aot_eager")
    return call(pack_sequence([torch.randn(3, 4), torch.randn(2, 4)]))


def exported(layer: nn.Module) -> Any:
    steps = torch.export.Dim("steps", min=2)
    program = torch.export.export(
        layer, (torch.randn(5, 3, 4),), dynamic_shapes={"input": {0: steps}}
    )
    assert program.module()(torch.randn(9, 3, 4))[0].shape == (9, 3, 6)


def vmapped(layer: nn.Module) -> Any:
    return torch.vmap(lambda x: layer(x)[0])(torch.randn(7, 5, 3, 4))


def vmapped_weights(layer: nn.Module) -> Any:
    weights, _ = torch.func.stack_module_state([layer, copy.deepcopy(layer)])
    return torch.vmap(lambda w: torch.func.functional_call(layer, w, (torch.ones(5, 3, 4),))[0])(
        weights
    )


def per_sample(layer: nn.Module) -> Any:
    weights = dict(layer.named_parameters())

    def loss(weights: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, weights, (x.unsqueeze(1),))[0].square().sum()

    return torch.vmap(torch.func.grad(loss), (None, 1))(weights, torch.randn(5, 3, 4))


def forward_mode(layer: nn.Module) -> Any:
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.randn(5, 3, 4), torch.randn(5, 3, 4))
        assert forward_ad.unpack_dual(layer(x)[0]).tangent is not None


def skip_init(layer: nn.Module) -> Any:
    return nn.utils.skip_init(type(layer), 4, 6)


def swapped(layer: nn.Module) -> Any:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.load_state_dict(copy.deepcopy(layer).state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def changed_in_place(layer: nn.Module) -> Any:
    output, _ = layer(torch.randn(5, 3, 4))
    output.mul_(2)
    output.sum().backward()


def no_steps(layer: nn.Module) -> Any:
    x = torch.randn(5, 3, 4)
    if isinstance(layer, (nn.RNN, nn.GRU, nn.LSTM)):
        return layer(pack_padded_sequence(x, [5, 2, 0]))
    assert not layer(x, lengths=[5, 2, 0])[0][:, 2].any()


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (compiled, LAYERS),
        (compiled_packed, LAYERS),
        (exported, LAYERS),
        (vmapped, LAYERS),
        (vmapped_weights, LAYERS),
        (per_sample, ["RNN", "GRU"]),
        (forward_mode, ["LSTM"]),
        (skip_init, LAYERS),
        (swapped, LAYERS),
        (changed_in_place, ["LSTM"]),
        (no_steps, LAYERS),
    ],
    ids=lambda v: v.__name__ if callable(v) else None,
)
def test_torch_refuses_what_works_here(call: Callable[[nn.Module], Any], names: list[str]) -> None:
    for name in names:
        call(made(fastrnn, name))
        with pytest.raises(Exception, match=r"."):
            call(made(nn, name))


@pytest.mark.parametrize("name", LAYERS)
def test_a_copy_keeps_what_was_written(name: str) -> None:
    x = torch.randn(5, 3, 4)
    same = []
    for library in (nn, fastrnn):
        layer: Any = made(library, name)
        layer._flat_weights[1] = nn.Parameter(torch.randn_like(layer.weight_hh_l0))
        same.append(torch.equal(layer(x)[0], copy.deepcopy(layer)(x)[0]))
    assert same == [False, True]


@pytest.mark.parametrize("name", LAYERS)
def test_a_deleted_weight_is_missed(name: str) -> None:
    theirs, ours = made(nn, name), made(fastrnn, name)
    del theirs.weight_hh_l0, ours.weight_hh_l0
    theirs(torch.randn(5, 3, 4))
    with pytest.raises(AttributeError, match="weight_hh_l0"):
        ours(torch.randn(5, 3, 4))


def test_float16_autocast_of_an_lstm() -> None:
    """torch.nn raises on most processors, and not on those whose oneDNN has float16."""
    with torch.autocast("cpu", torch.float16):
        y, _ = made(fastrnn, "LSTM")(torch.randn(5, 3, 4))
    assert y.dtype == torch.float16


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "keyword",
    [
        {"heads": 2},
        {"recompute": True},
        {"zoneout": 0.5},
        {"recurrent_dropout": 0.5},
        {"clip_grad_step": 0.01},
    ],
    ids=lambda k: next(iter(k)),
)
def test_keywords_of_layers(name: str, keyword: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        made(nn, name, **keyword)
    x, results = torch.randn(5, 3, 4), []
    for layer in (made(fastrnn, name), made(fastrnn, name, **keyword)):
        torch.manual_seed(1)
        y, _ = layer(x)
        (100 * y).sum().backward()
        results.append((y, *(p.grad for p in layer.parameters())))
    same = [torch.equal(a, b) for a, b in zip(*results, strict=True) if a.shape == b.shape]
    kind = next(iter(keyword))
    assert all(same) == (kind == "recompute")
    assert same[0] == (kind in ("recompute", "clip_grad_step")), "the output changes, or gradients"


@pytest.mark.parametrize("name", LAYERS)
def test_keywords_of_calls(name: str) -> None:
    theirs, ours = made(nn, name), made(fastrnn, name)
    x, resets = torch.randn(5, 3, 4), torch.zeros(5, 3, dtype=torch.bool)
    resets[2, 1] = True
    states = [torch.randn(1, 3, 6) for _ in range(2 if name == "LSTM" else 1)]
    hx: Any = tuple(states) if name == "LSTM" else states[0]
    calls: list[dict[str, Any]] = [
        {"lengths": [5, 2, 0]},
        {"resets": resets},
        {"resets": resets, "reset_states": hx},
        {"return_states": True},
    ]
    whole, _ = ours(x)
    for keywords in calls:
        with pytest.raises(TypeError, match="unexpected keyword"):
            theirs(x, **keywords)
        y, last, *rest = ours(x, **keywords)
        if "lengths" in keywords:
            assert torch.equal(y[:2, 1], whole[:2, 1]) and not y[2:, 1].any() and not y[:, 2].any()
        elif "resets" in keywords:
            own = tuple(s[:, 1:2] for s in states) if "reset_states" in keywords else None
            begun = own[0] if own is not None and name != "LSTM" else own
            assert torch.equal(y[2:, 1:2], ours(x[2:, 1:2], begun)[0])
            assert torch.equal(y[:, 0], whole[:, 0])
        else:
            ((h, *others),) = rest[0]
            assert torch.equal(h, y) and len(others) == len(states) - 1
            for state, final in zip(others, last[1:], strict=True):
                assert torch.equal(state[-1], final[0])


PUBLISHED = ("LayerNormLSTM", "LayerNormGRU", "PeepholeLSTM", "GRUResetBefore", "SLSTM")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layers_have_the_arguments_of_recurrent(name: str) -> None:
    every = dict(inspect.signature(fastrnn.Recurrent).parameters)
    del every["cell"]
    found = dict(inspect.signature(getattr(fastrnn, name)).parameters)
    if name == "SLSTM":
        assert found.pop("norm").default is False
    assert found == every


def test_names_that_torch_lacks() -> None:
    x = torch.randn(5, 3, 4)

    @fastrnn.cell(gates="a", states="h", name="beyond_torch")
    def own(u: Any, v: Any, h: Tensor) -> Tensor:
        return torch.tanh(u.a + v.a - h.mean(-1, keepdim=True))

    layers = [fastrnn.Recurrent(own, 4, 6), *(made(fastrnn, name) for name in PUBLISHED)]
    for name in (*PUBLISHED, "Recurrent", "WeightDrop", "freeze", "quantize_", "cell"):
        assert not hasattr(nn, name) and name in fastrnn.__all__
    for layer in layers:
        assert layer(x)[0].shape == (5, 3, 6)
    gru = made(fastrnn, "GRU")
    stepper = gru.stream(3)  # type: ignore[operator]
    y = gru(x)[0]
    assert torch.equal(torch.stack([stepper.step(row) for row in x]), y)
    assert torch.equal(fastrnn.freeze(gru)(x)[0], y)
    fastrnn.quantize_(gru)
    assert 0 < (gru(x)[0] - y).abs().max() < 0.02
    assert not hasattr(made(nn, "GRU"), "stream")
    dropped = made(fastrnn, "GRU")
    torch.nn.utils.parametrize.register_parametrization(
        dropped, "weight_hh_l0", fastrnn.WeightDrop(0.5)
    )
    assert not torch.equal(dropped(x)[0], dropped(x)[0])


# The first cell of every row of the page, in order, and what tests it.
ROWS: dict[str, Any] = {
    "`torch.compile(fullgraph=True)` of a layer": compiled,
    "`torch.export` of a layer with a dynamic number of steps": exported,
    "an ahead-of-time package (`aoti_compile_and_package`) with dynamic batch and steps": (
        "tests/csrc/binding/test_aoti.py"
    ),
    "`torch.compile` of packed sequences": compiled_packed,
    "`vmap` over inputs, states or weights of a layer": vmapped,
    "per-sample gradients, `vmap(grad(...))`": per_sample,
    "forward-mode derivatives of a float32 LSTM": forward_mode,
    "`float16` autocast of an LSTM on a CPU": test_float16_autocast_of_an_lstm,
    "sequences without any step: `lengths=[100, 7, 0]`": no_steps,
    "`nn.utils.skip_init` of a layer": skip_init,
    "`load_state_dict` with `torch.__future__.set_swap_module_params_on_conversion(True)`": swapped,
    "an LSTM's output changed in place before `backward()`": changed_in_place,
    "a weight was deleted from a layer": test_a_deleted_weight_is_missed,
    "`copy.deepcopy` of a layer with entries written into `_flat_weights`": (
        test_a_copy_keeps_what_was_written
    ),
    "`layer(x, lengths=[100, 7, 0])`": test_keywords_of_calls,
    "`layer(x, resets=mask)`": test_keywords_of_calls,
    "`layer(x, resets=mask, reset_states=states)`": test_keywords_of_calls,
    "`layer(x, return_states=True)`": test_keywords_of_calls,
    "`heads=`": test_keywords_of_layers,
    "`recompute=`": test_keywords_of_layers,
    "`stream()`, `fastrnn.freeze`": test_names_that_torch_lacks,
    "`@fastrnn.cell`, `fastrnn.Recurrent`": test_names_that_torch_lacks,
    "`LayerNormLSTM`, `LayerNormGRU`, `PeepholeLSTM`, `GRUResetBefore`, `SLSTM`": (
        test_names_that_torch_lacks
    ),
    "`zoneout=`, `recurrent_dropout=`": test_keywords_of_layers,
    "`clip_grad_step=`": test_keywords_of_layers,
    "`fastrnn.WeightDrop`": test_names_that_torch_lacks,
    "`fastrnn.quantize_`": test_names_that_torch_lacks,
}


def test_every_row_of_the_page_has_a_test() -> None:
    page = (ROOT / "docs" / "beyond-torch-nn.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \|", page, re.M)
    heads = ("call", "case", "keyword or method")
    assert [row for row in rows if row not in heads] == list(ROWS)
    assert all((ROOT / test).is_file() for test in ROWS.values() if isinstance(test, str))
