"""Wrong calls: ours raise the errors of torch.nn, whose message comes first, and then say more."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from tests.support.modules import same_error, twins
from tests.support.names import CELLS, LAYERS
from tests.support.paths import ROOT
from tests.support.tensors import flatten, mapped

F64 = torch.float64

# Messages from torch.nn if it checks nothing itself: a product, a copy or the interpreter raises,
# and the message says nothing about the call. Then the beginning of our message.
NOT_TORCH_NNS_OWN = {
    # Input or states on another device, in cells and packed; layers have a message for it.
    r"Tensor on device cpu is not on the expected device meta!": (
        r"Input and (hidden|parameter) tensors are not at the same device, found input tensor at"
    ),
    # Packed input of an LSTM, which torch.nn does not check: the message of its other layers.
    r"mat1 and mat2 shapes cannot be multiplied \(6x2 and 3x20\)": (
        r"input\.size\(-1\) must be equal to input_size\. Expected 3, got 2"
    ),
    r"mat1 and mat2 shapes cannot be multiplied": r"Expected hidden\[0\] size \(",
    r"The size of tensor a": r"Expected hidden\[\d\] size \(",
    r"output with shape|shape '.*' is invalid": r"input must have 2 dimensions, got 3",
    # States of a dtype for which oneDNN has no LSTM: the message of other layers' products.
    r"could not create a primitive descriptor": r"mat1 and mat2 must have the same dtype, but got",
    # Layouts.
    r"reshape is not implemented for sparse": r"\w+: expected a dense tensor, got torch.sparse_coo",
    r"Given dimension 1 is irregular|.*expected to contain only concrete integers": (
        r"\w+: expected a dense tensor, got a nested tensor"
    ),
    # The table of signatures that torch's parser of arguments tried.
    r"lstm\(\) received an invalid combination of arguments - got": (
        r"lstm\(\) received an invalid combination of arguments: hx must be a tuple of 2 Tensors"
    ),
    # Python's own message, about another attribute than the one that ours looks up first.
    r"'(\w+)' object has no attribute '\w+'": r"'(\w+)' object has no attribute '\w+'",
    r"'float' object cannot be interpreted as an integer": r"num_layers should be of type int",
    r"'<=' not supported between": r"num_layers should be of type int, got: str",
}


def assert_torchs_words(ours: Callable[[], object], theirs: Callable[[], object]) -> None:
    """Asserts the same type of error, and a message that begins with torch.nn's."""
    mine, wanted = same_error(ours, theirs)
    # Python names the class that has the method, which may be a base class.
    mine, wanted = (re.sub(r"^\w+\.(\w+\(\))", r"\1", text) for text in (mine, wanted))
    if mine.startswith(wanted):
        return
    for pattern, instead in NOT_TORCH_NNS_OWN.items():
        if re.match(pattern, wanted):
            assert re.match(instead, mine), f"{mine!r} instead of {instead!r} for {wanted!r}"
            return
    raise AssertionError(f"{mine!r} does not begin with {wanted!r}")


# Construction.


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"input_size": 3.0},
        {"input_size": "3"},
        {"input_size": 0},
        {"input_size": -1},
        {"hidden_size": 5.0},
        {"hidden_size": 0},
        {"num_layers": 0},
        {"num_layers": -2},
        {"num_layers": 1.0},
        {"num_layers": "1"},
        {"bias": 1},
        {"bias": None},
        {"batch_first": 0},
        {"batch_first": "yes"},
        {"dropout": 1.5, "num_layers": 2},
        {"dropout": -0.1},
        {"dropout": float("nan")},
        {"dropout": True},
        {"dropout": torch.tensor(0.5)},
        {"dropout": ".5"},
        {"dropout": "x"},
        {"dropout": None},
        {"proj_size": 0.5, "hidden_size": 0},
        {"unknown": 1},
        {"dtype": torch.int32},
        {"device": "nowhere"},
        {"dropout": 2.0, "bias": 1, "batch_first": 1, "input_size": 0.5},
        {"bias": 1, "batch_first": 1, "input_size": 0.5, "hidden_size": -1},
        {"batch_first": 1, "input_size": 0.5, "hidden_size": -1},
        {"input_size": 0.5, "hidden_size": -1},
        {"hidden_size": -1, "num_layers": -1},
    ],
)
def test_arguments_of_layers(name: str, arguments: dict[str, object]) -> None:
    given = {"input_size": 3, "hidden_size": 5, **arguments}
    assert_torchs_words(lambda: getattr(fastrnn, name)(**given), lambda: getattr(nn, name)(**given))


@pytest.mark.parametrize("proj_size", [-1, 5, 6])
def test_bad_projection(proj_size: int) -> None:
    assert_torchs_words(
        lambda: fastrnn.LSTM(3, 5, proj_size=proj_size), lambda: nn.LSTM(3, 5, proj_size=proj_size)
    )
    with pytest.raises(ValueError, match=str(proj_size)):
        fastrnn.LSTM(3, 5, proj_size=proj_size)


@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_projection_is_for_lstm(name: str) -> None:
    for size in (0, 2):
        assert_torchs_words(
            partial(getattr(fastrnn, name), 3, 5, proj_size=size),
            partial(getattr(nn, name), 3, 5, proj_size=size),
        )
    # torch accepts it by position, and refuses only the call.
    positional = (3, 5, 1, *(("tanh",) if name == "RNN" else ()), True, False, 0.0, False, 2)
    ours, theirs = getattr(fastrnn, name)(*positional), getattr(nn, name)(*positional)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    dense = torch.randn(4, 2, 3)
    for x in (dense, dense[:, 0], pack_padded_sequence(dense, [4, 2])):
        assert_torchs_words(partial(ours, x), partial(theirs, x))


def test_unknown_nonlinearity() -> None:
    assert_torchs_words(
        lambda: fastrnn.RNN(3, 5, nonlinearity="x"), lambda: nn.RNN(3, 5, nonlinearity="x")
    )
    cells = [m.RNNCell(3, 5, nonlinearity="x") for m in (fastrnn, nn)]
    assert_torchs_words(*(lambda c=c: c(torch.randn(2, 3)) for c in cells))
    layers = [m.RNN(3, 5) for m in (fastrnn, nn)]
    for layer in layers:
        layer.mode = "x"
    assert_torchs_words(*(lambda m=m: m(torch.randn(2, 3)) for m in layers))


@pytest.mark.parametrize("name", LAYERS + CELLS)
@pytest.mark.parametrize("arguments", [(), (3,)])
def test_missing_arguments(name: str, arguments: tuple[int, ...]) -> None:
    assert_torchs_words(
        lambda: getattr(fastrnn, name)(*arguments), lambda: getattr(nn, name)(*arguments)
    )


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("arguments", [(3.0, 5), (3, -5), (3, 5, True, "tanh", None, torch.int64)])
def test_arguments_of_cells(name: str, arguments: tuple[object, ...]) -> None:
    assert_torchs_words(
        lambda: getattr(fastrnn, name)(*arguments), lambda: getattr(nn, name)(*arguments)
    )


# Calls of layers.


def states(name: str, *shape: int) -> Any:
    h = torch.randn(shape, dtype=F64)
    return (h, h.clone()) if "LSTM" in name else h


def bad_calls(name: str) -> dict[str, tuple[Any, ...]]:
    """Wrong arguments for a layer of `L` layers and directions, by their mistake."""
    x, flat = torch.randn(4, 2, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
    hx, h = states(name, 1, 2, 5), torch.randn(1, 2, 5, dtype=F64)
    packed = pack_padded_sequence(x, [4, 2])
    unsorted = pack_padded_sequence(x, [2, 4], enforce_sorted=False)
    return {
        "nothing": (),
        "0-D": (torch.randn((), dtype=F64),),
        "1-D": (torch.randn(3, dtype=F64),),
        "4-D": (torch.randn(2, 2, 4, 3, dtype=F64),),
        "None": (None,),
        "list": ([x],),
        "dtype": (x.float(),),
        "dtype unbatched": (flat.float(),),
        "integers": (torch.ones(4, 2, 3, dtype=torch.int64),),
        "features": (torch.randn(4, 2, 4, dtype=F64),),
        "no features": (x[..., :0],),
        "unbatched features": (torch.randn(4, 4, dtype=F64),),
        "features and hx": (torch.randn(4, 2, 4, dtype=F64), states(name, 1, 3, 5)),
        "no steps": (x[:0],),
        "no steps unbatched": (flat[:0],),
        "hx 1-D": (x, states(name, 5)),
        "hx 2-D for batched": (x, states(name, 1, 5)),
        "hx 3-D for unbatched": (flat, hx),
        "hx 4-D": (x, states(name, 1, 1, 2, 5)),
        "hx batch": (x, states(name, 1, 3, 5)),
        "hx batch of one": (x, states(name, 1, 1, 5)),
        "hx layers": (x, states(name, 2, 2, 5)),
        "hx features": (x, states(name, 1, 2, 4)),
        "hx unbatched layers": (flat, states(name, 3, 5)),
        "hx unbatched features": (flat, states(name, 1, 4)),
        "hx dtype": (x, mapped(hx, Tensor.half)),
        "hx integers": (x, mapped(hx, Tensor.long)),
        "hx device": (x, mapped(hx, lambda t: t.to("meta"))),
        "hx device unbatched": (flat, mapped(states(name, 1, 5), lambda t: t.to("meta"))),
        "hx of another kind": (x, h if name == "LSTM" else (h,)),
        "hx triple": (x, (h, h, h)),
        "hx single": (x, (h,)),
        "hx empty": (x, ()),
        "hx of None": (x, (None, None)),
        "hx text": (x, "h"),
        "hx number": (x, 3),
        "hx one tensor for both": (x, torch.randn(2, 1, 2, 5, dtype=F64)),
        "c 2-D": (x, (h, h[0])),
        "c batch": (x, (h, torch.randn(1, 3, 5, dtype=F64))),
        "c features": (x, (h, torch.randn(1, 2, 4, dtype=F64))),
        "packed dtype": (packed.to(torch.float32),),
        "packed features": (packed._replace(data=packed.data[:, :2]),),
        "packed 3-D": (packed._replace(data=packed.data.unsqueeze(1)),),
        "packed hx 2-D": (packed, states(name, 1, 5)),
        "packed hx batch": (packed, states(name, 1, 3, 5)),
        "packed hx features": (packed, states(name, 1, 2, 4)),
        "packed hx layers": (packed, states(name, 3, 2, 5)),
        "packed hx more layers": (packed, states(name, 6, 2, 5)),
        "packed hx dtype": (packed, mapped(hx, Tensor.half)),
        "packed hx of another kind": (packed, h if name == "LSTM" else (h,)),
        "packed hx single": (packed, (h,)),
        "packed hx triple": (packed, (h, h, h)),
        "unsorted hx 1-D": (unsorted, states(name, 5)),
        "unsorted hx 2-D": (unsorted, states(name, 1, 5)),
        "unsorted hx batch": (unsorted, states(name, 1, 1, 5)),
        "unsorted hx features": (unsorted, states(name, 1, 2, 4)),
        "unsorted hx of another kind": (unsorted, 3 if name == "LSTM" else (h,)),
        "sparse": (x.to_sparse(),),
        "nested": (torch.nested.nested_tensor([flat, flat[:2]]),),
        "jagged": (torch.nested.nested_tensor([flat, flat[:2]], layout=torch.jagged),),
        "device": (x.to("meta"),),
        "device with hx": (x.to("meta"), hx),
        "device unbatched": (flat.to("meta"),),
        "device packed": (packed.to("meta"),),  # type: ignore[arg-type]
        "a third argument": (x, None, None),
        "lengths by position": (x, hx, torch.tensor([4, 2])),
        "resets by position": (x, hx, None, torch.zeros(4, 2).bool()),
    }


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("case", list(bad_calls("RNN")))
def test_calls_of_layers(name: str, case: str) -> None:
    arguments = bad_calls(name)[case]
    ours, theirs, _ = twins(name, 3, 5)
    assert_torchs_words(lambda: ours(*arguments), lambda: theirs(*arguments))


DENSE = ["features", "hx batch", "hx layers", "hx features", "hx unbatched layers"]
PACKED = ["packed hx layers", "packed hx more layers", "packed hx batch", "unsorted hx batch"]


@pytest.mark.parametrize(
    ("name", "options", "case"),
    [
        *((name, {}, case) for name in LAYERS for case in (*DENSE, *PACKED)),
        *(("LSTM", {"proj_size": 4}, case) for case in DENSE),
    ],
)
def test_calls_of_several_layers(name: str, options: dict[str, Any], case: str) -> None:
    """Two layers in both directions: the message names the expected size as torch.nn does."""
    arguments = bad_calls(name)[case]
    ours, theirs, _ = twins(name, 3, 5, num_layers=2, bidirectional=True, **options)
    assert_torchs_words(lambda: ours(*arguments), lambda: theirs(*arguments))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "case", ["4-D", "features", "no steps", "hx batch", "hx 3-D for unbatched"]
)
def test_calls_with_the_batch_first(name: str, case: str) -> None:
    arguments = bad_calls(name)[case]
    ours, theirs, _ = twins(name, 3, 5, batch_first=True)
    if case == "no steps":
        arguments = (arguments[0].transpose(0, 1),)
    assert_torchs_words(lambda: ours(*arguments), lambda: theirs(*arguments))


def test_states_of_which_torch_takes_the_first_two() -> None:
    """If torch.nn converts each state, it checks neither other states nor their container."""
    ours, theirs, _ = twins("LSTM", 3, 5)
    flat = torch.randn(4, 3, dtype=F64)
    unsorted = pack_padded_sequence(torch.randn(4, 2, 3, dtype=F64), [2, 4], enforce_sorted=False)
    for x, hx in (
        (flat, tuple(torch.randn(3, 1, 5, dtype=F64))),
        (flat, torch.randn(2, 1, 5, dtype=F64)),
        (unsorted, tuple(torch.randn(3, 1, 2, 5, dtype=F64))),
        (unsorted, torch.randn(2, 1, 2, 5, dtype=F64)),
    ):
        for a, b in zip(flatten(ours(x, hx)), flatten(theirs(x, hx)), strict=True):
            torch.testing.assert_close(a, b)
    cells = twins("LSTMCell", 3, 5)
    for state in (torch.randn(2, 5, dtype=F64), list(torch.randn(3, 5, dtype=F64))):
        results = [flatten(cell(flat[0], state)) for cell in (cells.ours, cells.torchs)]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_check_methods(name: str) -> None:
    """Called by users, they raise the errors of torch.nn's methods."""
    ours, theirs, _ = twins(name, 3, 5, num_layers=2, bidirectional=True, batch_first=True)
    x, hx = torch.randn(2, 4, 3, dtype=F64), states(name, 4, 2, 5)
    for module in (ours, theirs):
        module.check_input(x, None)
        module.check_forward_args(x, hx, None)
    sizes = torch.tensor([2, 2, 1])
    for method, arguments in (
        ("check_input", (x.float(), None)),
        ("check_input", (x[0], None)),
        ("check_input", (x, sizes)),
        ("check_input", (x[..., :2], None)),
        ("check_forward_args", (x, states(name, 4, 3, 5), None)),
        ("check_hidden_size", (flatten(hx)[0], (1, 2, 3))),
        ("check_hidden_size", (flatten(hx)[0], (1, 2, 3), "wanted {}, got {}")),
    ):
        message, theirs_message = same_error(
            partial(getattr(ours, method), *arguments),
            partial(getattr(theirs, method), *arguments),
        )
        assert message == theirs_message
    methods = ["get_expected_hidden_size", *(["get_expected_cell_size"] if name == "LSTM" else [])]
    for method in methods:
        for arguments in ((x, None), (x[0], sizes)):
            assert getattr(ours, method)(*arguments) == getattr(theirs, method)(*arguments)
    order = torch.tensor([1, 0])
    torch.testing.assert_close(ours.permute_hidden(hx, order), theirs.permute_hidden(hx, order))
    assert ours.permute_hidden(hx, None) is hx


@pytest.mark.parametrize("name", LAYERS)
def test_overridden_checks_are_called(name: str) -> None:
    base: Any = getattr(fastrnn, name)

    class Strict(base):
        def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
            raise LookupError("asked")

    with pytest.raises(LookupError, match="asked"):
        Strict(3, 5)(torch.randn(4, 2, 3))


# Calls of cells.


def bad_cell_calls(name: str) -> dict[str, tuple[Any, ...]]:
    x, h = torch.randn(2, 3, dtype=F64), torch.randn(2, 5, dtype=F64)

    def hx(t: Tensor) -> Any:
        return (t, t) if name == "LSTMCell" else t

    def wrong(*shape: int) -> Any:
        return hx(torch.randn(shape, dtype=F64))

    def second(c: Tensor) -> Any:
        return (h, c) if name == "LSTMCell" else c

    return {
        "nothing": (),
        "0-D": (torch.tensor(1.0, dtype=F64),),
        "3-D": (torch.randn(1, 2, 3, dtype=F64),),
        "None": (None,),
        "list": ([x],),
        "features": (torch.randn(2, 4, dtype=F64),),
        "features and hx": (torch.randn(2, 4, dtype=F64), wrong(3, 4)),
        "unbatched features": (torch.randn(4, dtype=F64),),
        "dtype": (x.float(),),
        "dtype unbatched": (x[0].bfloat16(),),
        "integers": (x.long(),),
        "device": (x.to("meta"),),
        "device unbatched": (x[0].to("meta"),),
        "device with hx": (x.to("meta"), hx(h)),
        "hx device": (x, hx(h.to("meta"))),
        "hx 0-D": (x, wrong()),
        "hx 3-D": (x, hx(h[None])),
        "hx 4-D": (x, wrong(2, 1, 1, 5)),
        "hx batch": (x, wrong(3, 5)),
        "hx batch of one": (x, wrong(1, 5)),
        "hx features": (x, wrong(2, 4)),
        "hx batch and features": (x, wrong(3, 4)),
        "hx 1-D for batched": (x, hx(h[0])),
        "hx 1-D as long as the batch": (x, wrong(2)),
        "hx 0-D for unbatched": (x[0], wrong()),
        "hx 2-D for unbatched": (x[0], hx(h)),
        "hx batch of one for unbatched": (x[0], hx(h[:1])),
        "hx unbatched features": (x[0], wrong(4)),
        "hx dtype": (x, hx(h.float())),
        "hx dtype unbatched": (x[0], hx(h[0].half())),
        "hx of another kind": (x, h if name == "LSTMCell" else (h,)),
        "hx one tensor for both": (x, torch.randn(2, 2, 5, dtype=F64)),
        "hx triple": (x, (h, h, h)),
        "hx single": (x, (h,)),
        "hx single unbatched": (x[0], (h[0],)),
        "hx empty": (x, ()),
        "hx list": (x, [h]),
        "hx of None": (x, (None, None)),
        "hx text": (x, "h"),
        "hx number": (x, 3),
        "c batch": (x, second(torch.randn(3, 5, dtype=F64))),
        "c features": (x, second(torch.randn(2, 4, dtype=F64))),
        "c 1-D": (x, second(torch.randn(5, dtype=F64))),
        "c 3-D": (x, second(torch.randn(1, 2, 5, dtype=F64))),
        "a third argument": (x, None, None),
    }


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("case", list(bad_cell_calls("RNNCell")))
def test_calls_of_cells(name: str, case: str) -> None:
    arguments = bad_cell_calls(name)[case]
    ours, theirs, _ = twins(name, 3, 5)
    assert_torchs_words(lambda: ours(*arguments), lambda: theirs(*arguments))


@pytest.mark.parametrize("name", CELLS)
def test_a_wrong_state_is_shown_with_what_it_should_be(name: str) -> None:
    cell = getattr(fastrnn, name)(3, 5)
    for shape, instead in (((3, 5), "[2, 5]"), ((2, 4), "[2, 5]"), ((2,), "[2, 5]")):
        t = torch.randn(shape)
        with pytest.raises((RuntimeError, IndexError)) as raised:
            cell(torch.randn(2, 3), (t, t) if name == "LSTMCell" else t)
        assert str(raised.value).endswith(f": it is {list(shape)} and should be {instead}")
    # torch.nn takes the rows of such a state for steps, and returns as many steps.
    t = torch.randn(5, 5)
    with pytest.raises(RuntimeError, match=r"hidden0 .*: it is \[5, 5\] and should be \[5\]"):
        cell(torch.randn(3), (t, t) if name == "LSTMCell" else t)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_weights_on_another_device(name: str) -> None:
    """A model on the meta device must not return memory that nobody wrote."""
    x = torch.randn(4, 3)
    for device in ("cpu", "meta"):
        module = getattr(fastrnn, name)(3, 5, device=device)
        other = x.to("cpu" if device == "meta" else "meta")
        with pytest.raises(
            RuntimeError, match=f"tensor at {other.device} and parameter tensor at {device}. Move"
        ):
            module(other)
        assert flatten(module(x.to(device)))[0].device.type == device
    with pytest.raises(RuntimeError, match=r"the model: model.to\('meta'\)"):
        getattr(fastrnn, name)(3, 5)(x.to("meta"))
    with pytest.raises(RuntimeError, match=r"model.to_empty\(device=...\), then load"):
        getattr(fastrnn, name)(3, 5, device="meta")(x)


# torch's own tests of its modules.

TORCHS_OWN = """
import re
import torch, fastrnn
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
seen = 0
for info in module_db:
    ours = getattr(fastrnn, info.module_cls.__name__, None)
    if ours is None or info.module_error_inputs_func is None:
        continue
    for dtype in (torch.float32, torch.float64):
        for case in info.module_error_inputs_func(info, "cpu", dtype, False, False):
            made, call = (getattr(case.module_error_input, f"{part}_input")
                          for part in ("constructor", "forward"))
            message = "nothing raised"
            try:
                module = ours(*made.args, **made.kwargs)
                assert case.error_on == ModuleErrorEnum.FORWARD_ERROR, case.error_regex
                module.to(made.kwargs.get("dtype", dtype))(*call.args, **call.kwargs)
            except case.error_type as error:
                message = str(error)
            assert re.search(case.error_regex, message), (ours, case.error_regex, message)
            seen += 1
print(seen)
"""


def test_error_inputs_of_torchs_own_tests() -> None:
    """Runs in its own process, because torch.testing._internal freezes the flags of back ends."""
    pytest.importorskip("expecttest")
    done = subprocess.run(
        [sys.executable, "-c", TORCHS_OWN],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2 * (2 * 6 + 4 + 3 * 14)
