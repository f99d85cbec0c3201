"""The implementations that are compared in formats of few digits: int8 and bfloat16."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import fastrnn
from fastrnn.extension import _C
from fastrnn.tools.bench.comparison import TORCH
from fastrnn.tools.bench.implementation import Implementation, Stepper, TorchLayer, frozen
from fastrnn.tools.bench.onnx_baselines import OnnxRuntime, OpenVino

__all__ = ["BASELINES", "FLOAT32", "FORMATS", "OURS", "name"]

# Weights and activations, as `quantize_` names them, by the format of the activations.
FORMATS = {
    "int8": ("int8", "int8"),
    "int16": ("int8", "int16"),
    "bfloat16": ("bfloat16", "auto"),
}
FLOAT32 = "fastrnn float32"
_ENGINES = ("x86", "fbgemm", "onednn", "qnnpack")  # of torch.ao, the fastest first


def name(format: str) -> str:
    """The name of our implementation of a format."""
    return f"fastrnn {format}"


def _quantised(module: nn.Module, format: str) -> nn.Module:
    layer = fastrnn.from_torch(module)
    fastrnn.quantize_(layer, *FORMATS[format])
    return layer


def _layer_and_stepper(
    name: str, convert: Callable[[nn.Module], nn.Module], format: str | None = None
) -> tuple[Implementation, Implementation]:
    missing = None
    if format is not None and format not in _C.formats():
        missing = f"this processor has no instructions for {format}, so it would be float32"
    layer = TorchLayer(name, convert, modes=("inference",), missing=missing, format=format)
    return layer, Stepper(name, convert, missing=missing, format=format)


class TorchAo(TorchLayer):
    """torch.nn's layer after dynamic quantisation by torch.ao."""

    def __init__(self) -> None:
        super().__init__("torch.ao int8", _by_torch_ao, modes=("inference", "step"), format="int8")

    def available(self) -> str | None:
        if not hasattr(torch.ao.quantization, "quantize_dynamic"):
            return f"torch {torch.__version__} has no quantize_dynamic"
        return None if _engine() else "torch has no engine for int8 on this processor"


def _engine() -> str | None:
    supported = torch.backends.quantized.supported_engines
    return next((engine for engine in _ENGINES if engine in supported), None)


def _by_torch_ao(module: nn.Module) -> nn.Module:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = _engine() or before  # packs the weights
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao is deprecated
            # It replaces layers inside a module.
            model = torch.ao.quantization.quantize_dynamic(nn.Sequential(module), {type(module)})
    finally:
        torch.backends.quantized.engine = before
    return model[0]


# A layer and a stepper of each. All have packed their weights before the clock starts, as the
# baselines have.
OURS: tuple[Implementation, ...] = (
    *_layer_and_stepper(FLOAT32, frozen),
    *(
        implementation
        for format in FORMATS
        for implementation in _layer_and_stepper(
            name(format), partial(_quantised, format=format), format
        )
    ),
)
BASELINES: tuple[Implementation, ...] = (
    TorchLayer(TORCH, modes=("inference", "step")),
    OnnxRuntime(),
    OpenVino(),
    TorchAo(),
    OnnxRuntime("ONNX Runtime int8", "int8"),
    TorchLayer(
        "torch.nn bfloat16",
        modes=("inference", "step"),
        format="bfloat16",
        dtype=torch.bfloat16,
    ),
    OpenVino("OpenVINO bfloat16", "bfloat16"),
)
