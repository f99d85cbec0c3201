"""The package names the device of each tensor that it makes, whatever the default device is."""

from __future__ import annotations

import ast
import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import fastrnn
from fastrnn import kernels
from fastrnn.compiler import emit_cpp
from fastrnn.compiler.derive import derive
from tests.support.names import CELLS, LAYERS
from tests.support.tensors import flatten

PACKAGE = Path(fastrnn.__file__).resolve().parent
FACTORIES = {f.__name__ for f in _device_constructors()} | {"Generator"}


def factory_calls(file: Path) -> Iterator[tuple[int, str]]:
    """Calls of torch's factories that name no device; `Generator` may name it by position."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value
        if not isinstance(owner, ast.Name) or owner.id != "torch":
            continue
        by_position = node.func.attr == "Generator" and node.args
        # **options may name it: the tests below run such calls.
        named = any(k.arg in ("device", None) for k in node.keywords)
        if node.func.attr in FACTORIES and not named and not by_position:
            yield node.lineno, node.func.attr


def test_every_factory_call_names_its_device() -> None:
    files = list(PACKAGE.rglob("*.py"))
    assert len(files) > 30
    found = [(f.name, *call) for f in files for call in factory_calls(f)]
    assert found == []
    (sample,) = factory_calls_of("import torch\nx = torch.zeros(3)\ny = torch.ones(2, device=d)")
    assert sample == (2, "zeros")


def factory_calls_of(text: str) -> list[tuple[int, str]]:
    class Text:
        def read_text(self, encoding: str) -> str:
            return text

    return list(factory_calls(Text()))  # type: ignore[arg-type]


class MetaInside(TorchFunctionMode):
    """Makes `meta` the default device for calls from inside the package alone. As with torch's own
    default device, a call that names a device, even None, is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _device_constructors():
            caller = sys._getframe(1)
            self.seen += 1
            inside = caller.f_globals.get("__name__", "").startswith("fastrnn.")
            if inside and "device" not in kwargs:
                kwargs = {**kwargs, "device": "meta"}
        return function(*args, **kwargs)


@fastrnn.cell(gates="ab", states="h", name="default_device_cell")
def late(u: Any, v: Any, h: Tensor) -> Tensor:
    a = torch.sigmoid(u.a + 1.25 * v.a)
    return a * h + (1 - a) * torch.tanh(u.b + v.b)


def made(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    if name == "Recurrent":
        return fastrnn.Recurrent(late, 4, 6, **kwargs)
    return getattr(fastrnn, name)(4, 6, **kwargs)


def everything(name: str, stream: bool) -> list[Tensor]:
    """Values and gradients of all ways to call a layer or a cell."""
    module = made(name)
    results: list[Tensor] = []
    if name in CELLS:
        x = torch.randn(3, 4)
        results += flatten(module(x)) + flatten(module(x[0])) + flatten(module(x, module(x)))
        results += [module.stream(3).step(x)] if stream else []
        if name != "RNNCell":
            results += flatten(made(name, bias=False)(x))
    else:
        x = torch.randn(5, 3, 4)
        resets = torch.rand(5, 3) < 0.3
        for given in (
            {},
            {"lengths": [5, 0, 3]},
            {"lengths": torch.tensor([1, 2, 3])},
            {"resets": resets},
        ):
            results += flatten(module(x, **given))
        packed = nn.utils.rnn.pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
        results += flatten(module(packed)) + flatten(module(x[:, 0]))
        both = made(name, num_layers=2, bidirectional=True, batch_first=True)
        results += flatten(both(x)) + flatten(made(name, heads=2)(x))
        results += [module.stream(3).step(x[0])] if stream else []
        again = made(name, recompute=True)
        results += torch.autograd.grad(again(x)[0].sum(), list(again.parameters()))
    loss: Any = sum(y.square().sum() for y in results if y.requires_grad)
    results += torch.autograd.grad(loss, list(module.parameters()))
    y = flatten(module(x))[0]
    (first,) = torch.autograd.grad(
        y.square().sum(),
        [module.weight_hh_l0] if name not in CELLS else [module.weight_hh],
        create_graph=True,
    )
    results += torch.autograd.grad(first.square().sum(), list(module.parameters()))
    frozen = fastrnn.freeze(copy.deepcopy(module))
    results += flatten(frozen(x))
    replaced = fastrnn.to_torch(made(name)) if name != "Recurrent" else made(name)
    fastrnn.replace_(replaced)
    results += flatten(replaced(x))
    return [t.detach() for t in results]


@pytest.mark.parametrize("kernel", [None, "reference"])
@pytest.mark.parametrize("name", [*LAYERS, "Recurrent", *CELLS])
def test_the_public_api_under_another_default_device(name: str, kernel: str | None) -> None:
    if kernel is None:
        expected = everything(name, stream=True)
        with MetaInside() as mode:
            found = everything(name, stream=True)
        assert mode.seen
    else:
        with kernels.use(kernel):
            expected = everything(name, stream=False)
            with MetaInside():
                found = everything(name, stream=False)
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.device.type == "cpu"
        torch.testing.assert_close(ours, wanted)  # a frozen layer rounds in the same way


@pytest.mark.parametrize("name", [*LAYERS, "Recurrent", *CELLS])
def test_frozen_under_meta(name: str) -> None:
    """The outputs were once uninitialised memory."""
    module = made(name)
    x = torch.randn(3, 4) if name in CELLS else torch.randn(5, 3, 4)
    expected = flatten(module(x))
    with torch.device("meta"):
        frozen = fastrnn.freeze(module)
        copied = copy.deepcopy(frozen)
        inside = flatten(frozen(x))
    copied.load_state_dict(frozen.state_dict())
    for outputs in (inside, flatten(frozen(x)), flatten(copied(x))):
        for ours, wanted in zip(outputs, expected, strict=True):
            torch.testing.assert_close(ours, wanted.detach())


def test_layers_are_made_on_the_default_device() -> None:
    """torch.nn's layers are made there too."""
    with torch.device("meta"):
        assert fastrnn.LSTM(4, 6).weight_ih_l0.device.type == "meta"
        assert fastrnn.Recurrent(late, 4, 6).weight_ih_l0.device.type == "meta"


def test_a_cell_is_derived_on_the_cpu() -> None:
    with torch.device("meta"):
        cell = fastrnn.cell(gates="ab", states="h", name="derived_under_meta")(late.function)
        under = derive(cell)
    assert emit_cpp.struct(under, "key") == emit_cpp.struct(derive(late), "key").replace(
        "default_device_cell", "derived_under_meta"
    )
