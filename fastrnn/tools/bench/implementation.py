"""The interface of implementations, and those of torch and fastrnn: layers, cells, compiled
loops."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn import kernels, plan
from fastrnn.tools.bench.workload import GATES, Workload

__all__ = [
    "OURS",
    "OURS_ON_GPU",
    "Case",
    "CompiledLoop",
    "Implementation",
    "Prepared",
    "Results",
    "Stepper",
    "TorchLayer",
    "cell_step",
    "frozen",
    "missing_package",
    "named_states",
]

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One workload for one cell and mode, with the weights and tensors all implementations share.

    Attributes:
        module: a layer of torch.nn, or a cell in mode "cell".
        x: [T, B, I], packed if the workload has lengths; [B, I] in mode "cell".
        gradient: gradient of the output, for training, shaped as the output's rows.
    """

    workload: Workload
    cell: str
    mode: str
    threads: int
    device: str
    module: nn.Module
    x: Tensor | PackedSequence
    gradient: Tensor

    @classmethod
    def build(
        cls, workload: Workload, cell: str, mode: str, threads: int, device: str = "cpu"
    ) -> Case:
        """Build a case. Equal shapes get equal numbers; torch's random state does not change."""
        w = workload
        dtype: torch.dtype = getattr(torch, w.dtype)
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if mode == "cell":
                kind = getattr(nn, f"{cell.upper()}Cell")
                module: nn.Module = kind(w.inputs, w.hidden, **options)
            else:
                module = getattr(nn, cell.upper())(
                    w.inputs, w.hidden, w.layers, bidirectional=w.bidirectional, **options
                )
            padded = torch.randn(w.steps, w.batch, w.inputs, device="cpu") * w.input_scale
            gradient = torch.randn(w.steps, w.batch, w.directions * w.hidden, device="cpu")
        padded, gradient = padded.to(device, dtype), gradient.to(device, dtype)
        if w.input_scale != 1:
            for name, parameter in module.named_parameters():
                if name.startswith("bias"):
                    nn.init.zeros_(parameter)
        x: Tensor | PackedSequence = padded
        if w.lengths:
            lengths = torch.tensor(w.lengths, device="cpu")
            x = pack_padded_sequence(padded, lengths)
            gradient = pack_padded_sequence(gradient, lengths).data
        elif mode == "cell":
            x, gradient = padded[0], gradient[0]
        return cls(workload, cell, mode, threads, device, module, x, gradient)

    def to(self, dtype: torch.dtype) -> Case:
        """The same case with weights, input and gradient of another dtype."""
        return replace(
            self,
            module=copy.deepcopy(self.module).to(dtype),
            x=self.x.to(dtype),
            gradient=self.gradient.to(dtype),
        )

    def layer_weights(self) -> Iterator[tuple[str, int, int, Mapping[str, Tensor]]]:
        """For each layer and direction: the suffix of the parameters, the layer, the direction, and
        the parameters by their names without the suffix."""
        for layer in range(self.workload.layers):
            for direction in range(self.workload.directions):
                suffix = f"_l{layer}" + ("_reverse" if direction else "")
                names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                yield (
                    suffix,
                    layer,
                    direction,
                    {n: getattr(self.module, n + suffix) for n in names},
                )


@dataclass(frozen=True)
class Prepared:
    """An implementation ready to run one case.

    Attributes:
        call: the call to time.
        read: converts the result of the last call to tensors by name: "output", "h_n", "c_n",
            "gradient of x", "gradient of weight_ih_l0" and so on, as far as there are any.
        around: a context that is entered around many calls, for switches.
        format: the format in which it multiplies if it has fewer digits than the case's dtype, one
            of `tolerance.FORMATS`.
    """

    call: Callable[[], Any]
    read: Callable[[Any], Results]
    around: Callable[[], AbstractContextManager[object]]
    format: str | None = None


class Implementation(Protocol):
    """An implementation that can run a workload. Reasons are sentences for the report."""

    name: str

    def available(self) -> str | None:
        """Why it cannot run here at all, or None."""

    def supports(self, case: Case) -> str | None:
        """Why it cannot run this case, or None."""

    def prepare(self, case: Case) -> Prepared:
        """Do all work that is needed once, before the clock starts."""


def missing_package(*names: str) -> str | None:
    """A reason if one of these packages is not installed, else None."""
    missing = [n for n in names if importlib.util.find_spec(n) is None]
    return f"not installed: pip install {' '.join(missing)}" if missing else None


def named_states(cell: str, states: object) -> Results:
    """ "h_n" and, for an LSTM, "c_n", from the states that torch.nn returns."""
    return dict(zip(("h_n", "c_n"), states, strict=True)) if cell == "lstm" else {"h_n": states}  # type: ignore[call-overload, dict-item]


class TorchLayer:
    """A module with the interface of `torch.nn`'s: torch's own, or ours converted from it.

    Args:
        tf32: whether this implementation multiplies float32 as TF32 on a GPU.
        kernel: the only kernel of ours that may run.
        inference: the context of calls without gradients.
        format: see `Prepared`.
        dtype: of weights, inputs and results, if it is not that of the case. Nothing is converted
            while the clock runs.
    """

    def __init__(
        self,
        name: str,
        convert: Callable[[nn.Module], nn.Module] = lambda module: module,
        *,
        modes: Sequence[str] = ("inference", "training", "step", "cell"),
        onednn: bool = True,
        tf32: bool = False,
        kernel: str | None = None,
        missing: str | None = None,
        inference: Callable[[], AbstractContextManager[object]] = torch.inference_mode,
        format: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.name, self.tf32 = name, tf32
        self._convert, self._modes, self._inference = convert, modes, inference
        self._onednn, self._kernel, self._missing = onednn, kernel, missing
        self._format, self._dtype = format, dtype

    def available(self) -> str | None:
        if self._kernel is not None and self._kernel not in plan.KERNELS:
            return f"fastrnn {fastrnn.__version__} has no kernel {self._kernel!r}"
        return self._missing

    def supports(self, case: Case) -> str | None:
        if case.mode not in self._modes:
            return f"does not do mode {case.mode!r}"
        if self.tf32 and case.workload.dtype != "float32":
            return f"TF32 is a way to compute float32, not {case.workload.dtype}"
        return None

    def prepare(self, case: Case) -> Prepared:
        if self._dtype is not None:
            case = case.to(self._dtype)
        return replace(self._prepare(case), format=self._format)

    def _prepare(self, case: Case) -> Prepared:
        module = self._convert(case.module)

        def around() -> AbstractContextManager[object]:
            return self._around(case)

        if case.mode == "training":
            return _training(module, case, around)
        if case.mode == "step":
            return _stepping(module, case, around)

        def read(result: Any) -> Results:
            if case.mode == "cell":
                return named_states(case.cell, result)
            output, states = result
            rows = output.data if isinstance(output, PackedSequence) else output
            return {"output": rows, **named_states(case.cell, states)}

        if case.mode == "cell":
            # The state is an argument, so that no call spends time on making zeros.
            state = torch.zeros_like(case.gradient)
            hx = (state, state) if case.cell == "lstm" else state
            return Prepared(lambda: module(case.x, hx), read, around)
        return Prepared(lambda: module(case.x), read, around)

    @contextmanager
    def _around(self, case: Case) -> Iterator[None]:
        threads = torch.get_num_threads()
        with ExitStack() as stack:
            if case.mode == "training":
                stack.enter_context(torch.enable_grad())
            else:
                stack.enter_context(self._inference())
            if not self._onednn:
                # `mkldnn.flags` would warn about TF32 on GPUs, which nobody asked for.
                torch.backends.mkldnn.set_flags(False)
                stack.callback(torch.backends.mkldnn.set_flags, True)
            if case.device == "cuda":
                # Without `enabled` these flags would turn cuDNN off.
                flags = torch.backends.cudnn.flags(enabled=True, allow_tf32=self.tf32)
                stack.enter_context(flags)
                stack.enter_context(_tf32_products(self.tf32))
            if self._kernel is not None:
                stack.enter_context(kernels.use(self._kernel))
            torch.set_num_threads(case.threads)
            try:
                yield
            finally:
                torch.set_num_threads(threads)


@contextmanager
def _tf32_products(allow: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allow
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


_Around = Callable[[], AbstractContextManager[object]]


def _training(module: nn.Module, case: Case, around: _Around) -> Prepared:
    if isinstance(case.x, PackedSequence):
        leaf = case.x.data.clone().requires_grad_()
        x: Tensor | PackedSequence = case.x._replace(data=leaf)
    else:
        x = leaf = case.x.clone().requires_grad_()
    names = ["x", *(name for name, _ in module.named_parameters())]
    leaves = [leaf, *module.parameters()]

    def call() -> Any:
        output, states = module(x)
        rows = output.data if isinstance(output, PackedSequence) else output
        return rows, states, torch.autograd.grad(rows, leaves, case.gradient)

    def read(result: Any) -> Results:
        output, states, gradients = result
        tensors = {"output": output, **named_states(case.cell, states)}
        tensors.update((f"gradient of {n}", g) for n, g in zip(names, gradients, strict=True))
        return {name: tensor.detach() for name, tensor in tensors.items()}

    return Prepared(call, read, around)


def _stepping(module: nn.Module, case: Case, around: _Around) -> Prepared:
    state: Any = None

    def call() -> Any:
        nonlocal state
        output, state = module(case.x, state)
        return output

    return Prepared(call, lambda output: {"output": output}, around)


class Stepper:
    """Our `layer.stream()`, which has its own states and buffers and does not use autograd.

    Args:
        convert: makes our layer from torch's.
        missing: why it cannot run here.
        format: see `Prepared`.
    """

    def __init__(
        self,
        name: str = "fastrnn stepper",
        convert: Callable[[nn.Module], nn.Module] = fastrnn.from_torch,
        *,
        missing: str | None = None,
        format: str | None = None,
    ) -> None:
        self.name = name
        self._convert, self._missing, self._format = convert, missing, format

    def available(self) -> str | None:
        if hasattr(fastrnn.LSTM, "stream"):
            return self._missing
        return f"fastrnn {fastrnn.__version__} has no stream()"

    def supports(self, case: Case) -> str | None:
        return None if case.mode == "step" else "runs single steps"

    def prepare(self, case: Case) -> Prepared:
        layer: Any = self._convert(case.module)
        stepper = layer.stream(batch_size=case.workload.batch, threads=case.threads)
        assert isinstance(case.x, Tensor)
        x, out = case.x[0], torch.empty_like(case.gradient[0])
        return Prepared(
            lambda: stepper.step(x, out=out),
            lambda result: {"output": out.unsqueeze(0)},
            lambda: _threads(case.threads),
            self._format,
        )


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def frozen(module: nn.Module) -> nn.Module:
    """Our layer with its weights packed for good."""
    return fastrnn.freeze(fastrnn.from_torch(module))  # type: ignore[attr-defined, unused-ignore]


# A row is about the first of these that can run its case.
OURS: tuple[Implementation, ...] = (
    Stepper(),
    TorchLayer("fastrnn", fastrnn.from_torch),
    TorchLayer(
        "fastrnn, frozen",
        frozen,
        modes=("inference",),
        missing=None
        if hasattr(fastrnn, "freeze")
        else f"fastrnn {fastrnn.__version__} has no freeze()",
    ),
)
OURS_ON_GPU: tuple[Implementation, ...] = (
    TorchLayer("fastrnn", fastrnn.from_torch),
    TorchLayer("fastrnn with TF32", fastrnn.from_torch, tf32=True),
    TorchLayer("fastrnn, cuda", fastrnn.from_torch, kernel="cuda"),
    TorchLayer("fastrnn, triton", fastrnn.from_torch, kernel="triton"),
)


def cell_step(
    cell: str,
    u: Any,
    v: Any,
    states: tuple[Any, ...],
    sigmoid: Callable[[Any], Any],
    tanh: Callable[[Any], Any],
) -> tuple[Any, ...]:
    """One time step for arrays of any library.

    `u = W x + b_ih` and `v = R h + b_hh` hold all gates, [..., G*H] in torch's order. The result is
    the new states, h first.
    """
    size = u.shape[-1] // GATES[cell]
    parts = [(u[..., k : k + size], v[..., k : k + size]) for k in range(0, u.shape[-1], size)]
    if cell == "gru":
        r, z = (sigmoid(a + b) for a, b in parts[:2])
        n = tanh(parts[2][0] + r * parts[2][1])
        return (n + z * (states[0] - n),)
    if cell == "rnn":
        return (tanh(u + v),)
    i, f, g, o = (a + b for a, b in parts)
    c = sigmoid(f) * states[1] + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


class CompiledLoop:
    """A Python loop over a step compiled by `torch.compile`, after the projection of the input.

    Only the step is compiled: the compiler would unroll a loop into one program as long as the
    sequence, which takes minutes.
    """

    name = "compiled loop"

    def available(self) -> str | None:
        return None

    def supports(self, case: Case) -> str | None:
        if not case.workload.compiled_loop:
            return "left out here, as each shape takes the compiler long"
        if case.workload.lengths:
            return "no packed sequences"
        return "runs whole sequences" if case.mode in ("step", "cell") else None

    def prepare(self, case: Case) -> Prepared:
        prepared = TorchLayer(self.name).prepare(replace(case, module=_LoopOfSteps(case)))
        with prepared.around():
            prepared.call()  # compiles
        return prepared


class _LoopOfSteps(nn.Module):
    """The layers of a case as a loop over one compiled step."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self._cell, self._size = case.cell, case.workload.hidden
        self._weights = list(case.layer_weights())
        for suffix, _, _, weights in self._weights:
            for name, weight in weights.items():
                self.register_parameter(name + suffix, nn.Parameter(weight.detach()))

        def step(u: Tensor, r: Tensor, b: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            v = F.linear(states[0], r, b)
            return cell_step(case.cell, u, v, states, torch.sigmoid, torch.tanh)

        self._step = torch.compile(step, dynamic=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        finals: list[tuple[Tensor, ...]] = []
        outputs: list[Tensor] = []
        for suffix, layer, direction, _ in self._weights:
            if direction == 0 and layer:
                x, outputs = torch.cat(outputs, -1), []
            w, r, a, b = (
                getattr(self, name + suffix)
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            projected = F.linear(x, w, a).unbind()
            zero = x.new_zeros(x.shape[1], self._size)
            states: tuple[Tensor, ...] = (zero,) * (2 if self._cell == "lstm" else 1)
            rows = []
            for u in reversed(projected) if direction else projected:
                states = self._step(u, r, b, *states)
                rows.append(states[0])
            outputs.append(torch.stack(rows[::-1] if direction else rows))
            finals.append(states)
        last = tuple(torch.stack(part) for part in zip(*finals, strict=True))
        return torch.cat(outputs, -1), last if self._cell == "lstm" else last[0]
