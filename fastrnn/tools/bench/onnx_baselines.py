"""The baselines ONNX Runtime and OpenVINO, which run the same graph of ONNX's operators."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fastrnn.extension import _C
from fastrnn.tools.bench.implementation import Case, Prepared, Results, missing_package
from fastrnn.tools.bench.workload import GATES

__all__ = ["OnnxRuntime", "OpenVino", "graph"]

# Indices of torch's gates in ONNX's order: torch has i f g o and r z n, ONNX i o f c and z r h.
_ORDER = {"rnn": (0,), "gru": (1, 0, 2), "lstm": (0, 3, 1, 2)}


def graph(case: Case) -> bytes:
    """The layers of a case as a serialized ONNX model.

    Inputs: "x" [T, B, I], "lengths" int32 [B] if the workload has lengths, and in mode "step" "h"
    (and "c") [D, B, H]. Outputs: "output" [T, B, D*H], "h_n" and "c_n" [layers*D, B, H].
    """
    onnx = importlib.import_module("onnx")
    node, array = onnx.helper.make_node, onnx.numpy_helper.from_array
    w, directions = case.workload, case.workload.directions
    states = ("h", "c") if case.cell == "lstm" else ("h",)
    constants = [
        array(torch.tensor([0, 0, -1], device="cpu").numpy(), "rows"),
        array(torch.tensor([1], device="cpu").numpy(), "axis"),
    ]
    arguments = [_value(onnx, "x", [w.steps, w.batch, w.inputs])]
    if w.lengths:
        int32 = onnx.TensorProto.INT32
        arguments.append(onnx.helper.make_tensor_value_info("lengths", int32, [w.batch]))
    if case.mode == "step":
        arguments += [_value(onnx, s, [directions, w.batch, w.hidden]) for s in states]
    nodes: list[Any] = []
    flow = "x"
    for layer in range(w.layers):
        weights = [direction for _, n, _, direction in case.layer_weights() if n == layer]
        biases = [
            torch.cat([_ordered(case.cell, direction[name]) for name in ("bias_ih", "bias_hh")])
            for direction in weights
        ]
        for name, parts in (
            ("W", [_ordered(case.cell, direction["weight_ih"]) for direction in weights]),
            ("R", [_ordered(case.cell, direction["weight_hh"]) for direction in weights]),
            ("B", biases),
        ):
            constants.append(array(torch.stack(parts).numpy(), f"{name}{layer}"))
        inputs = [flow, f"W{layer}", f"R{layer}", f"B{layer}", "lengths" if w.lengths else ""]
        inputs += states if case.mode == "step" else ()
        attributes: dict[str, object] = {
            "hidden_size": w.hidden,
            "direction": "bidirectional" if w.bidirectional else "forward",
        }
        if case.cell == "gru":
            attributes["linear_before_reset"] = 1  # the reset after the product, as in torch
        results = [f"Y{layer}", *(f"{s}_n{layer}" for s in states)]
        nodes.append(node(case.cell.upper(), inputs, results, **attributes))
        # [T, D, B, H] to [T, B, D*H]
        flow = "output" if layer == w.layers - 1 else f"y{layer}"
        if w.bidirectional:
            nodes.append(node("Transpose", [f"Y{layer}"], [f"Z{layer}"], perm=[0, 2, 1, 3]))
            nodes.append(node("Reshape", [f"Z{layer}", "rows"], [flow]))
        else:
            nodes.append(node("Squeeze", [f"Y{layer}", "axis"], [flow]))
    for s in states:
        nodes.append(
            node("Concat", [f"{s}_n{layer}" for layer in range(w.layers)], [f"{s}_n"], axis=0)
        )
    outputs = [_value(onnx, "output", [w.steps, w.batch, directions * w.hidden])]
    outputs += [_value(onnx, f"{s}_n", [w.layers * directions, w.batch, w.hidden]) for s in states]
    body = onnx.helper.make_graph(nodes, case.cell, arguments, outputs, constants)
    opset = onnx.helper.make_opsetid("", 14)
    return onnx.helper.make_model(body, opset_imports=[opset], ir_version=8).SerializeToString()


def _value(onnx: Any, name: str, shape: Sequence[int]) -> Any:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)


def _ordered(cell: str, weight: Tensor) -> Tensor:
    parts = weight.detach().chunk(GATES[cell])
    return torch.cat([parts[k] for k in _ORDER[cell]])


def _refusal(case: Case) -> str | None:
    if case.mode not in ("inference", "step"):
        return "inference only" if case.mode == "training" else "has no cells, only layers"
    if case.device != "cpu":
        return "written for CPUs here"
    if case.workload.dtype != "float32":
        return f"its recurrent operators are float32, not {case.workload.dtype}"
    return None


def _arrays(case: Case) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Inputs as NumPy arrays by name, and the names of the states. Packed batches are padded for
    ONNX."""
    if isinstance(case.x, PackedSequence):
        padded, lengths = torch.nn.utils.rnn.pad_packed_sequence(case.x)
        arrays = {"x": padded.numpy(), "lengths": lengths.int().numpy()}
    else:
        arrays = {"x": case.x.numpy()}
    return arrays, ("h", "c") if case.cell == "lstm" else ("h",)


def _results(case: Case, arrays: dict[str, Any]) -> Results:
    results = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    if case.workload.lengths:
        lengths = torch.tensor(case.workload.lengths, device="cpu")
        results["output"] = pack_padded_sequence(results["output"], lengths).data
    return results


def _state_sets(case: Case, states: Sequence[str]) -> list[dict[str, Any]]:
    """Two sets of zero states."""
    shape = (case.workload.directions, case.workload.batch, case.workload.hidden)
    return [{s: torch.zeros(shape, device="cpu").numpy() for s in states} for _ in range(2)]


class OnnxRuntime:
    """ONNX Runtime with inputs and outputs that are bound once, so that a call copies nothing.

    Args:
        format: "int8" for dynamic quantisation; None for float32.
    """

    def __init__(self, name: str = "ONNX Runtime", format: str | None = None) -> None:
        self.name, self._format = name, format

    def available(self) -> str | None:
        return missing_package("onnx", "onnxruntime")

    def supports(self, case: Case) -> str | None:
        if self._format is not None and case.cell != "lstm":
            return f"LSTM is its only recurrent operator in {self._format}"
        return _refusal(case)

    def prepare(self, case: Case) -> Prepared:
        runtime = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = case.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        model = graph(case) if self._format is None else _quantised(graph(case))
        session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        arrays, states = _arrays(case)
        names = [output.name for output in session.get_outputs()]
        # Mode "step" has two sets of states: a step reads the set that the previous one wrote.
        sets = _state_sets(case, states) if case.mode == "step" else [{}]
        values = [
            {s: runtime.OrtValue.ortvalue_from_numpy(array) for s, array in zeros.items()}
            for zeros in sets
        ]
        bindings = []
        for before, after in zip(values, reversed(values), strict=True):
            binding = session.io_binding()
            for name, array in arrays.items():
                binding.bind_cpu_input(name, array)
            for s, value in before.items():
                binding.bind_ortvalue_input(s, value)
            for name in names:
                if name.removesuffix("_n") in after:
                    binding.bind_ortvalue_output(name, after[name.removesuffix("_n")])
                else:
                    binding.bind_output(name)
            bindings.append(binding)
        turns = cycle(bindings)

        def call() -> Any:
            binding = next(turns)
            session.run_with_iobinding(binding)
            return binding

        def read(binding: Any) -> Results:
            arrays = dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))
            return _results(case, {"output": arrays["output"]} if case.mode == "step" else arrays)

        return Prepared(call, read, nullcontext, self._format)


def _quantised(model: bytes) -> bytes:
    """A graph with its LSTMs in int8, by the tool that ONNX Runtime has for it: DynamicQuantizeLSTM
    of the domain com.microsoft. A matrix has one scale: with one per row it is slower, and its
    errors are nearly the same."""
    onnx = importlib.import_module("onnx")
    tool = importlib.import_module("onnxruntime.quantization")
    floats = onnx.load_from_string(model)
    tool.quant_utils.add_pre_process_metadata(floats)  # there is nothing that could be prepared
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "quantised.onnx"
        # Without VNNI, sums of products of 8 bits saturate at 16 there: weights then
        # get 7 bits, as ONNX Runtime's guide to quantisation advises.
        saturates = "avx512_vnni" not in _C.isas()
        tool.quantize_dynamic(floats, file, op_types_to_quantize=["LSTM"], reduce_range=saturates)
        return file.read_bytes()


class OpenVino:
    """OpenVINO, compiled for latency.

    Args:
        format: "bfloat16", or None for float32.
    """

    def __init__(self, name: str = "OpenVINO", format: str | None = None) -> None:
        self.name, self._format = name, format

    def available(self) -> str | None:
        if reason := missing_package("onnx", "openvino"):
            return reason
        core = importlib.import_module("openvino").Core()
        # Without the instructions it would compute in float32.
        if self._format and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            return "it has no bfloat16 for this processor"
        return None

    def supports(self, case: Case) -> str | None:
        return _refusal(case)

    def prepare(self, case: Case) -> Prepared:
        openvino = importlib.import_module("openvino")
        core = openvino.Core()
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": case.threads,
            "INFERENCE_PRECISION_HINT": "bf16" if self._format else "f32",
            "NUM_STREAMS": 1,
        }
        model = core.compile_model(core.read_model(graph(case)), "CPU", settings)
        arrays, states = _arrays(case)
        sets = _state_sets(case, states) if case.mode == "step" else [{}]
        names = ["output", *(f"{s}_n" for s in states)]
        requests = []
        kept: list[Any] = []  # keeps the shared tensors alive
        for before, after in zip(sets, reversed(sets), strict=True):
            request = model.create_infer_request()
            bound = {**arrays, **before, **{f"{s}_n": array for s, array in after.items()}}
            for name, array in bound.items():
                kept.append(openvino.Tensor(array, shared_memory=True))
                request.set_tensor(name, kept[-1])
            requests.append(request)
        turns = cycle(requests)

        def call(kept: object = kept) -> Any:
            request = next(turns)
            request.infer()
            return request

        def read(request: Any) -> Results:
            wanted = names[:1] if case.mode == "step" else names
            return _results(case, {n: request.get_tensor(n).data for n in wanted})

        return Prepared(call, read, nullcontext, self._format)
