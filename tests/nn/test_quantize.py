"""Quantised modules: they give the numbers of their rounded weights, from every path, and a
`state_dict` holds them rounded or not."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from fastrnn import kernels
from fastrnn.extension import _C
from fastrnn.tools import tolerance
from tests.support.names import CELLS
from tests.support.shared import peepholes
from tests.support.tensors import batches, flatten

CHANGED = "changed or replaced after"
FORMATS: list[dict[str, Any]] = [
    {"weights": "int8"},
    {"weights": "int8", "activations": "int16"},
    {"weights": "bfloat16"},
]
# Of h in float32 layers with torch's initial weights, where the kernel rounds activations too.
LIMITS = tolerance.FORMATS


class Case(NamedTuple):
    kind: str
    arguments: Mapping[str, Any] = MappingProxyType({})

    def layer(self, inputs: int = 7, hidden: int = 33, **more: Any) -> Any:
        arguments = {**self.arguments, **more}
        if self.kind == "Recurrent":
            return fastrnn.Recurrent(peepholes, inputs, hidden, **arguments)
        return getattr(fastrnn, self.kind)(inputs, hidden, **arguments)


CASES = [
    Case("RNN"),
    Case("RNN", {"nonlinearity": "relu", "bias": False}),
    Case("GRU", {"num_layers": 2, "bidirectional": True}),
    Case("LSTM", {"num_layers": 3, "batch_first": True}),
    Case("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 5}),
    Case("LSTM", {"heads": 3, "bidirectional": True}),
    Case("Recurrent", {"num_layers": 2}),
]
SOME = [CASES[1], CASES[2], CASES[4], CASES[5]]


def has_kernel(format: str) -> bool:
    return format in _C.formats()


def format_of(how: Mapping[str, str]) -> str:
    return how.get("activations", how["weights"])


def assert_like(ours: Any, theirs: Any, format: str = "int8") -> None:
    """Equality with float layers of rounded weights. Where the kernel rounds activations as well,
    h differs by up to LIMITS."""
    limit = LIMITS[format] if has_kernel(format) else 0.0
    for one, other in zip(flatten(ours), flatten(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=limit)


def assert_equal(ours: Any, theirs: Any) -> None:
    for one, other in zip(flatten(ours), flatten(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def in_int8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers and scales, written out for one row at a time."""
    numbers, scales = torch.empty(matrix.shape), torch.empty(matrix.shape[:-1])
    for index in numpy.ndindex(*scales.shape):
        row = matrix[index].float()
        scales[index] = scale = row.abs().max() / 127 if row.any() else torch.tensor(1.0)
        numbers[index] = torch.round(row / scale)
    return numbers.to(torch.int8), scales


def by_hand(module: Any, weights: str = "int8") -> Any:
    """A float copy of a layer with rounded matrices."""
    other = copy.deepcopy(module).requires_grad_(False)
    for name, p in other.named_parameters():
        if not re.search("weight_(ih|hh|hr)", name):
            continue
        if weights == "bfloat16":
            p.copy_(p.bfloat16())
        else:
            numbers, scales = in_int8(p)
            p.copy_(numbers * scales.unsqueeze(-1))
    return other


def saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# Numbers


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
@pytest.mark.parametrize("how", FORMATS, ids=format_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_those_of_rounded_weights(
    case: Case, how: dict[str, Any], keep_float: bool
) -> None:
    steps, batch = 9, 3
    module = case.layer()
    expected = by_hand(module, how["weights"])
    first, second = (batch, steps) if module.batch_first else (steps, batch)
    x, resets = torch.randn(first, second, 7), torch.rand(first, second) < 0.3
    lengths = torch.tensor([9, 0, 4])
    packed = pack_sequence(batches([3, 9, 5], 7, torch.float32), enforce_sorted=False)
    states = expected(x)[1]
    report = fastrnn.quantize_(module, **how, keep_float=keep_float)
    assert [q.name for q in report.quantised] == [""] and not report.left_alone
    calls: list[Callable[[Any], Any]] = [
        lambda m: m(x),
        lambda m: m(x, states),
        lambda m: m(x, lengths=lengths, resets=resets),
        lambda m: m(packed),
        lambda m: m(x[0]),
    ]
    for call in calls:
        assert_like(call(module), call(expected), format_of(how))


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
@pytest.mark.parametrize("how", FORMATS, ids=format_of)
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias", [True, False], ids=["biased", "plain"])
def test_cells(kind: str, bias: bool, how: dict[str, Any], keep_float: bool) -> None:
    cell = getattr(fastrnn, kind)(5, 33, bias=bias)
    expected = by_hand(cell, how["weights"])
    x = torch.randn(3, 5)
    hx = expected(x)
    fastrnn.quantize_(cell, **how, keep_float=keep_float)
    for given in ((x,), (x[0],), (x, hx)):
        assert_like(cell(*given), expected(*given), format_of(how))
    with pytest.raises(RuntimeError, match="Convert input"):
        cell(x.double())
    with pytest.raises(RuntimeError, match="no derivative"):
        cell(x.requires_grad_())


@pytest.mark.parametrize("how", FORMATS, ids=format_of)
def test_a_sequence_has_the_same_numbers_alone_and_in_any_batch(how: dict[str, Any]) -> None:
    module = fastrnn.GRU(7, 33)
    fastrnn.quantize_(module, **how)
    x = torch.randn(11, 5, 7)
    whole = module(x)[0]
    assert_equal(module(x[:, 2:3])[0], whole[:, 2:3])
    first, state = module(x[:4])
    assert_equal(torch.cat([first, module(x[4:], state)[0]]), whole)
    assert_equal(module(torch.cat([x * 50, x], 1))[0][:, 5:], whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
def test_layers_of_half_precision(dtype: torch.dtype, keep_float: bool) -> None:
    module = fastrnn.LSTM(7, 33, dtype=dtype)
    expected = by_hand(module)
    report = fastrnn.quantize_(module, keep_float=keep_float)
    restored = f", {str(dtype).removeprefix('torch.')} weights restored"
    assert report.quantised[0].kernel == _C.isa() + restored * (not has_kernel("int8"))
    x = torch.randn(5, 3, 7, dtype=dtype)
    assert_like(module(x), expected(x))
    with pytest.raises(ValueError, match="Convert input"):
        module(x.float())


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_bfloat16_matrices_become_buffers_of_their_own(weights: str) -> None:
    module: Any = fastrnn.LSTM(5, 7, dtype=torch.bfloat16)
    own = module.weight_ih_l0
    fastrnn.quantize_(module, weights, keep_float=False)
    assert type(module.weight_ih_l0) is Tensor and not module.weight_ih_l0.requires_grad
    x = torch.randn(6, 2, 5, dtype=torch.bfloat16)
    before = module(x)[0]
    with torch.no_grad():
        own.zero_()
    assert_equal(module(x)[0], before)


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


def test_compiled_code_does_not_take_floats_that_are_not_rounded() -> None:
    module, x = fastrnn.LSTM(5, 7), torch.randn(6, 2, 5)
    fastrnn.quantize_(module)
    compiled = torch.compile(module, backend="aot_eager")
    with kernels.use("reference"):
        if has_kernel("int8"):
            with pytest.raises(RuntimeError, match="asked for by name"):
                compiled(x)
        else:
            compiled(x)
    assert_equal(compiled(x), module(x))


def test_rows_of_zeros_and_the_largest_number() -> None:
    module: Any = fastrnn.GRU(4, 3, bias=False)
    with torch.no_grad():
        module.weight_ih_l0[1] = 0
        module.weight_ih_l0[2] = torch.tensor([-6.35, 0.024, 3.2, 0.0])
        module.weight_hh_l0[0] = 1e-45
    fastrnn.quantize_(module, keep_float=False)
    state = module.state_dict()
    assert not state["weight_ih_l0"][1].any() and state["weight_ih_l0_scale"][1] == 1
    assert state["weight_ih_l0"][2].tolist() == [-127, 0, 64, 0]
    torch.testing.assert_close(state["weight_ih_l0_scale"][2], torch.tensor(0.05))
    assert state["weight_hh_l0"].abs().amax() == 127
    assert module(torch.randn(5, 2, 4))[0].isfinite().all()


# Other paths than the prepacked weights


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
@pytest.mark.parametrize("how", [FORMATS[0], FORMATS[2]], ids=format_of)
def test_where_another_kernel_runs_rounded_weights_do(
    how: dict[str, Any], keep_float: bool
) -> None:
    module: Any = fastrnn.GRU(5, 9, num_layers=2).requires_grad_(False)
    x = torch.randn(4, 3, 5)

    def within(context: Any, m: nn.Module) -> Any:
        with context:
            return m(x)

    calls: list[Callable[[Any], Any]] = [
        lambda m: torch.func.vmap(m, 1)(x.unsqueeze(1)),
        lambda m: torch.func.jvp(lambda x: m(x)[0], (x,), (x,)),
        lambda m: torch.export.export(m, (x,)).module()(x),
        lambda m: torch.export.export(m, (x,), strict=True).module()(x),
        lambda m: within(torch.autocast("cpu", torch.bfloat16), m),
        lambda m: within(kernels.use("reference"), m),
        lambda m: torch.jit.trace(m, (x,))(x),
        lambda m: torch.jit.script(nn.Sequential(m))(x),
    ]
    expected = by_hand(module, how["weights"])
    before = [call(expected) for call in calls]
    fastrnn.quantize_(module, **how, keep_float=keep_float)
    for call, theirs in zip(calls, before, strict=True):
        for one, other in zip(flatten(call(module)), flatten(theirs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
def test_where_another_kernel_runs_a_cell_has_rounded_weights(kind: str, keep_float: bool) -> None:
    cell = getattr(fastrnn, kind)(5, 9).requires_grad_(False)
    x = torch.randn(3, 5)

    def within(context: Any, m: nn.Module) -> Any:
        with context:
            return m(x)

    calls: list[Callable[[Any], Any]] = [
        lambda m: torch.func.vmap(m)(x.unsqueeze(1)),
        lambda m: torch.export.export(m, (x,)).module()(x),
        lambda m: within(torch.autocast("cpu", torch.bfloat16), m),
        lambda m: within(kernels.use("reference"), m),
        lambda m: torch.jit.trace(m, (x,))(x),
    ]
    expected = by_hand(cell)
    before = [call(expected) for call in calls]
    fastrnn.quantize_(cell, keep_float=keep_float)
    for call, theirs in zip(calls, before, strict=True):
        for one, other in zip(flatten(call(cell)), flatten(theirs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


class Opaque(Tensor):
    """Its views are plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
def test_for_a_subclass_of_tensor_rounded_weights_compute(keep_float: bool) -> None:
    module, cell = fastrnn.GRU(5, 9, batch_first=True), fastrnn.GRUCell(5, 9)
    x = torch.randn(4, 3, 5)
    expected = by_hand(module)(x), by_hand(cell)(x[0]), by_hand(cell)(x[0, 0])
    for each in (module, cell):
        fastrnn.quantize_(each, keep_float=keep_float)
    special = x.as_subclass(Opaque)
    results = (
        module(special),
        cell(x[0].as_subclass(Opaque)),
        cell(x[0, 0].as_subclass(Opaque)),
    )
    with torch.device("meta"):
        assert_like(module(x), expected[0])
    for ours, theirs in zip(results, expected, strict=True):
        for one, other in zip(flatten(ours), flatten(theirs), strict=True):
            torch.testing.assert_close(one.as_subclass(Tensor), other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
def test_on_another_device_rounded_weights_compute(keep_float: bool) -> None:
    module = fastrnn.GRU(5, 9)
    fastrnn.quantize_(module, keep_float=keep_float)
    y, _ = module.to("meta")(torch.randn(4, 3, 5, device="meta"))
    assert y.shape == (4, 3, 9)
    assert module.bias_hh_l0.is_meta and module.weight_hh_l0.is_meta


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
def test_compiled(keep_float: bool) -> None:
    torch._dynamo.reset()
    module: Any = fastrnn.LSTM(5, 9, num_layers=2, bidirectional=True)
    fastrnn.quantize_(module, keep_float=keep_float)
    x = torch.randn(4, 3, 5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(x), module(x))


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
@pytest.mark.parametrize("how", FORMATS, ids=format_of)
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[6], Case("GRUCell")], ids=str)
def test_a_stepper_has_the_numbers_of_the_layer(
    case: Case, how: dict[str, Any], keep_float: bool
) -> None:
    module = case.layer()
    fastrnn.quantize_(module, **how, keep_float=keep_float)
    stepper = module.stream(batch_size=2)
    x = torch.randn(6, 2, 7)
    steps = torch.stack([stepper.step(frame) for frame in x])
    if case.kind == "GRUCell":
        assert_equal(steps[0], module(x[0]))
        return
    y = module(x.transpose(0, 1) if module.batch_first else x)[0]
    assert_equal(steps, y.transpose(0, 1) if module.batch_first else y)


# What a module holds


@pytest.mark.parametrize("case", CASES, ids=str)
def test_with_floats_nothing_of_the_module_changes(case: Case) -> None:
    module = case.layer()
    before, held = copy.deepcopy(module.state_dict()), dict(module.named_parameters())
    fastrnn.quantize_(module)
    assert list(module.state_dict()) == list(before)
    assert_equal(list(module.state_dict().values()), list(before.values()))
    assert not any(p.requires_grad for p in module.parameters())
    x = torch.randn(4, 3, 7)
    assert fastrnn.dequantize_(module) is module
    assert all(p.requires_grad for p in module.parameters())
    assert all(p is held[n] for n, p in module.named_parameters())
    assert "_frozen" not in vars(module)
    module(x)[0].sum().backward()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_floats_a_module_holds_int8(case: Case) -> None:
    module = case.layer()
    floats, names = copy.deepcopy(module.state_dict()), list(module.state_dict())
    module.get_parameter(names[-1]).requires_grad_(False)
    fastrnn.quantize_(module, keep_float=False)
    state = module.state_dict()
    matrices = [n for n in names if re.search("weight_(ih|hh|hr)", n)]
    assert set(state) == set(names) | {f"{n}_scale" for n in matrices}
    assert set(dict(module.named_buffers())) == set(state) - (set(names) - set(matrices))
    for name in matrices:
        numbers, scales = in_int8(floats[name])
        assert_equal([state[name], state[f"{name}_scale"]], [numbers, scales])
    fastrnn.dequantize_(module)
    assert list(module.state_dict()) == names and not list(module.buffers())
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == names[-1:]
    expected = by_hand(case.layer().to(torch.float32))
    expected.load_state_dict(floats)
    assert_equal(list(module.state_dict().values()), list(by_hand(expected).state_dict().values()))


def test_the_state_dict_is_a_quarter_as_large() -> None:
    def size(module: nn.Module) -> int:
        return sum(t.nbytes for t in module.state_dict().values())

    module = fastrnn.LSTM(256, 256)
    before = size(module)
    report = fastrnn.quantize_(module, keep_float=False)
    assert 3.8 < before / size(module) <= 4
    assert report.quantised[0].bytes_before == before
    assert report.quantised[0].bytes_after == size(module)
    fastrnn.quantize_(module, "bfloat16", keep_float=False)
    assert module.weight_hh_l0.dtype == torch.bfloat16
    assert 1.9 < before / size(module) <= 2
    assert not [n for n in module.state_dict() if "scale" in n]


HOLDS: dict[str, dict[str, Any] | None] = {
    "floats": None,
    "int8 and floats": {"keep_float": True},
    "int8": {"keep_float": False},
    "bfloat16": {"weights": "bfloat16", "keep_float": False},
}


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("source", HOLDS)
@pytest.mark.parametrize("target", HOLDS)
@pytest.mark.parametrize("case", [CASES[4], CASES[5], Case("LSTMCell")], ids=str)
def test_every_kind_loads_every_state_dict(
    case: Case, source: str, target: str, assign: bool
) -> None:
    one, other = (nn.Sequential(case.layer()) for _ in range(2))
    for module, how in ((one, HOLDS[source]), (other, HOLDS[target])):
        if how is not None:
            fastrnn.quantize_(module, **how)
        module.requires_grad_(False)
    state = one.state_dict()
    names, entries = list(other.state_dict()), dict(state)
    other.load_state_dict(state, assign=assign)
    assert list(other.state_dict()) == names
    assert_equal(list(state.values()), list(entries.values()))
    expected = fastrnn.dequantize_(copy.deepcopy(one))[0]
    if target == "bfloat16":
        expected = by_hand(expected, "bfloat16")
    elif target != "floats":
        expected = by_hand(expected)
    x = torch.randn(5, 3, 7) if case.kind == "LSTM" else torch.randn(3, 7)
    format = "bfloat16" if target == "bfloat16" else "int8"
    for a, b in zip(flatten(other(x)), flatten(expected(x)), strict=True):
        # Scales that are computed again may differ in the last bit.
        limit = LIMITS[format] if has_kernel(format) else 1e-6
        torch.testing.assert_close(a, b, rtol=0, atol=limit)


def test_state_dicts_that_do_not_fit() -> None:
    module = fastrnn.GRU(3, 4)
    fastrnn.quantize_(module, keep_float=False)
    state = module.state_dict()
    del state["weight_hh_l0_scale"]
    for target in (module, fastrnn.GRU(3, 4)):
        with pytest.raises(RuntimeError, match="weight_hh_l0_scale"):
            target.load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch for weight_hh_l0"):
        module.load_state_dict(fastrnn.GRU(3, 5).state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected.*weight_ih_l0_scale"):
        plain = fastrnn.GRU(3, 4)
        plain.load_state_dict({**plain.state_dict(), "weight_ih_l0_scale": torch.ones(12)})


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
@pytest.mark.parametrize("how", FORMATS, ids=format_of)
@pytest.mark.parametrize("case", [*SOME, Case("GRUCell")], ids=str)
def test_copies_give_the_same_numbers(case: Case, how: dict[str, Any], keep_float: bool) -> None:
    module = case.layer()
    fastrnn.quantize_(module, **how, keep_float=keep_float)
    x = torch.randn(3, 7) if case.kind == "GRUCell" else torch.randn(4, 3, 7)
    expected = module(x)
    copies = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), saved(module))
    for other in (*copies, copy.copy(module)):
        assert_equal(other(x), expected)
        assert list(other.state_dict()) == list(module.state_dict())
    again = fastrnn.dequantize_(copies[0])
    assert all(p.requires_grad for p in again.parameters())
    assert_equal(module.share_memory()(x), expected)


@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_rounded_weights_stay_what_they_are(case: Case, weights: str) -> None:
    module = case.layer()
    fastrnn.quantize_(module, weights, keep_float=False)
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    x = torch.randn(4, 3, 7)
    expected = module(x)
    for change in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double()):
        change(module)
        for name, buffer in module.named_buffers():
            assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name])
        dtype = module._frozen.precision.dtype
        assert {p.dtype for p in module.parameters()} <= {dtype}
        y, _ = module(x.to(dtype))
        assert y.dtype == dtype
    module.float()
    for one, other in zip(flatten(module(x)), flatten(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-2)  # biases were bfloat16 once


@pytest.mark.parametrize("case", SOME, ids=str)
def test_floats_that_change_their_dtype_are_rounded_anew(case: Case) -> None:
    module = case.layer()
    fastrnn.quantize_(module)
    module.bfloat16()
    expected = by_hand(fastrnn.dequantize_(copy.deepcopy(module)))
    x = torch.randn(4, 3, 7, dtype=torch.bfloat16)
    assert_like(module(x), expected(x))


# Changes


def replaced(module: Any) -> None:
    bias = module.bias_hh_l0
    module.bias_hh_l0 = nn.Parameter(bias * 2, requires_grad=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.weight_ih_l0.add_(1),
        lambda m: m.weight_hh_l0[0].zero_(),
        lambda m: m.bias_hh_l0.mul_(2),
        lambda m: m.bias_hh_l0.numpy().__setitem__(5, 3),
        lambda m: setattr(m, "weight_hh_l0", m.weight_hh_l0 * 1),
        lambda m: nn.init.zeros_(m.weight_ih_l0),
        replaced,
    ],
)
@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
def test_a_change_is_found_out(change: Callable[[nn.Module], object], keep_float: bool) -> None:
    module: Any = fastrnn.GRU(5, 9)
    fastrnn.quantize_(module, keep_float=keep_float)
    x = torch.randn(4, 3, 5)
    module(x)
    with torch.no_grad():
        if keep_float and isinstance(module.weight_hh_l0, nn.Parameter):
            module.weight_hh_l0.requires_grad_(False)
        try:
            change(module)
        except TypeError:  # torch refuses a tensor in the place of a Parameter
            return
        with pytest.raises(RuntimeError, match=CHANGED):
            module(x)
        fastrnn.quantize_(module, keep_float=keep_float)
        module(x)


def test_changed_scales_are_found_out() -> None:
    module: Any = fastrnn.GRU(5, 9)
    fastrnn.quantize_(module, keep_float=False)
    module.weight_hh_l0_scale.mul_(2)
    with pytest.raises(RuntimeError, match=CHANGED):
        module(torch.randn(4, 3, 5))


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
def test_what_is_loaded_is_rounded(keep_float: bool) -> None:
    module, other = (fastrnn.LSTM(5, 9, num_layers=2) for _ in range(2))
    fastrnn.quantize_(module, keep_float=keep_float)
    module.load_state_dict(other.state_dict())
    x = torch.randn(4, 3, 5)
    assert_like(module(x), by_hand(other)(x))


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
def test_what_is_loaded_may_be_nan_and_gives_nan(keep_float: bool) -> None:
    module = fastrnn.GRU(5, 9)
    fastrnn.quantize_(module, keep_float=keep_float)
    state = fastrnn.GRU(5, 9).state_dict()
    for value in (float("nan"), float("inf")):
        state["weight_ih_l0"][20, 2] = value  # of the new gate of unit 2
        module.load_state_dict(state)
        assert module(torch.randn(4, 3, 5))[0].isnan().any(0).any(0).tolist()[2]


def test_no_derivative_is_said_and_not_lost() -> None:
    for keep_float in (True, False):
        module = fastrnn.GRU(5, 9)
        fastrnn.quantize_(module, keep_float=keep_float)
        x = torch.randn(4, 3, 5, requires_grad=True)
        with pytest.raises(RuntimeError, match="no derivative"):
            module(x)
        with pytest.raises(RuntimeError, match="no derivative"), torch.autocast("cpu"):
            module(x)
        with torch.no_grad():
            assert not module(x)[0].requires_grad


# Freezing, quantising again, the way back


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
def test_the_last_of_freeze_and_quantize_counts(keep_float: bool) -> None:
    module: Any = fastrnn.GRU(5, 9)
    original = copy.deepcopy(module).requires_grad_(False)
    rounded, x = by_hand(module), torch.randn(4, 3, 5)
    fastrnn.freeze(module)
    fastrnn.quantize_(module, keep_float=keep_float)
    assert_like(module(x), rounded(x))
    with pytest.raises(ValueError, match="dequantize_"):
        fastrnn.unfreeze(module)
    assert_like(module(x), rounded(x))
    fastrnn.freeze(module)
    assert_equal(module(x), (original if keep_float else rounded)(x))
    assert list(module.state_dict()) == list(original.state_dict())
    fastrnn.dequantize_(module)  # a frozen layer stays frozen
    assert not module.bias_hh_l0.requires_grad
    fastrnn.unfreeze(module)
    assert all(p.requires_grad for p in module.parameters())


def test_quantising_again() -> None:
    module: Any = fastrnn.GRU(5, 9)
    x, original = torch.randn(4, 3, 5), copy.deepcopy(module)
    fastrnn.quantize_(module)
    fastrnn.quantize_(module, "bfloat16")
    assert_like(module(x), by_hand(original, "bfloat16")(x), "bfloat16")
    fastrnn.quantize_(module, keep_float=False)
    state = copy.deepcopy(module.state_dict())
    report = fastrnn.quantize_(module, activations="int16", keep_float=False)
    assert report.quantised[0].format == "int8 x int16"
    assert_equal(list(module.state_dict().values()), list(state.values()))
    assert_like(module(x), by_hand(original)(x), "int16")
    fastrnn.quantize_(module, keep_float=True)
    assert isinstance(module.weight_hh_l0, nn.Parameter)
    assert_like(module(x), by_hand(original)(x), "int8")
    fastrnn.dequantize_(module)
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("keep_float", [True, False], ids=["float", "rounded"])
def test_the_way_back_to_torch(keep_float: bool) -> None:
    model = nn.Sequential(nn.LSTM(5, 9, proj_size=4))
    original = copy.deepcopy(model[0])
    x = torch.randn(4, 3, 5)
    fastrnn.replace_(model)
    fastrnn.quantize_(model, keep_float=keep_float)
    other = fastrnn.to_torch(model[0])
    assert type(other) is nn.LSTM and isinstance(other.weight_hh_l0, nn.Parameter)
    fastrnn.restore_(model)
    assert type(model[0]) is nn.LSTM and "_frozen" not in vars(model[0])
    assert all(p.requires_grad for p in model.parameters())
    expected = original if keep_float else by_hand(original)
    assert list(model[0].state_dict()) == list(original.state_dict())
    torch.testing.assert_close(model(x), expected(x))
    torch.testing.assert_close(other(x), expected(x))


# Which layers, and the report


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


def test_the_widest_sums_do_not_overflow() -> None:
    """All products of the widest layer are as large as they can be, and of one sign."""
    layer: Any = fastrnn.RNN(65_536, 1, nonlinearity="relu", bias=False)
    with torch.no_grad():
        layer.weight_ih_l0.fill_(0.25)
    for activations in ("int8", "int16"):
        fastrnn.quantize_(layer, activations=activations)
        for sign in (1, -1):
            y = layer(torch.full((1, 1, 65_536), 2.0 * sign))[0]
            torch.testing.assert_close(y.item(), max(0.0, 32768.0 * sign))


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
