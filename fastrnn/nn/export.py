"""Writes layers as C99, for programs without Python and torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastrnn._version import __version__
from fastrnn.kernels.operands import Weights
from fastrnn.nn.freeze import Freezable, floats_of, rounded_of

__all__ = ["export_c"]


def export_c(
    layer: Freezable, path: str | os.PathLike[str], *, name: str | None = None
) -> tuple[Path, Path]:
    """Write a layer as one C99 source and its header, a stepper with the weights inside.

    The source needs the C library alone, allocates nothing and has no global state that changes.
    The header declares, for the name `gru`:

    - `struct gru_state`: the states of one stream, one array [num_layers, H] per state of the cell
      ([num_layers, proj_size] for `h` of a projected layer), with the cell's names: `h`, `c`.
    - `void gru_reset(struct gru_state *state)`: sets all states to zero.
    - `void gru_step(struct gru_state *state, const float *x, float *y)`: runs one time step of
      one sequence, from `x` [I] to `y` [H], or [proj_size]. `x` and `y` may be the same array.
    - the sizes `GRU_INPUT_SIZE`, `GRU_HIDDEN_SIZE`, `GRU_OUTPUT_SIZE` and `GRU_NUM_LAYERS`.

    Steps give the layer's output in evaluation, up to rounding. The source of a layer that
    `quantize_` rounded to int8 has int8 weights, a quarter of the bytes; activations are floats.

    Args:
        layer: an `RNN`, `LSTM`, `GRU` or `Recurrent` in one direction, or a cell module, in
            float32, on any device.
        path: the source; the header lies beside it. A suffix `.c` may be left out. For a folder
            that exists, the files are named after the cell.
        name: prefix of all names in C, by default the file's, with `_` for what C refuses.

    Returns:
        The paths of source and header.

    Raises:
        TypeError: if `layer` is not one of fastrnn's. If no code can be derived for a custom cell,
            it is an `Underivable`, which says why.
        ValueError: if the layer is bidirectional, has a norm after it (`SLSTM`), is not in float32
            or has no weights yet (`meta`), or if `name` cannot be a name in C.
        OSError: if the files cannot be written.

    Example:
        >>> import tempfile, fastrnn
        >>> layer = fastrnn.GRU(8, 16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     source, header = fastrnn.export_c(layer, f"{folder}/gru.c")
        ...     "void gru_step(" in header.read_text()
        True
    """
    from fastrnn.compiler import emit_c
    from fastrnn.compiler.derive import derive

    if not isinstance(layer, Freezable):
        raise TypeError(
            f"layer should be a layer or cell of fastrnn, got: {type(layer).__name__}; "
            "fastrnn.from_torch(layer) makes one from a layer of torch.nn"
        )
    if getattr(layer, "bidirectional", False):
        raise ValueError(
            "a bidirectional layer needs the whole sequence before its first output, "
            "so it cannot run step by step in C; use bidirectional=False"
        )
    if getattr(layer, "norm", False):
        raise ValueError(
            "the code in C gives h, and the output of this layer is its norm; export a layer with "
            "norm=False, and normalise what it gives"
        )
    cell = layer._cell()
    target = Path(path)
    if target.is_dir():
        target /= emit_c.identifier(cell.name)
    stem = target.with_suffix("") if target.suffix in (".c", ".h") else target
    chosen = emit_c.identifier(stem.name) if name is None else name
    if name is not None and emit_c.identifier(name) != name:
        raise ValueError(f"name should be a name in C, as 'my_gru', got {name!r}")
    derived = derive(cell)
    with torch.no_grad(), _evaluating(layer):
        weights = floats_of(layer)
        for weight in weights[0].present():
            if weight.dtype != torch.float32 or weight.device.type == "meta":
                raise ValueError(
                    "the code in C has weights in float32, and this layer has them in "
                    f"{weight.dtype} on {weight.device}; write export_c(layer.float(), ...)"
                )
        heads = getattr(layer, "heads", 1)
        title = f"{type(layer).__name__}({layer.extra_repr()}), by fastrnn.export_c {__version__}"
        rounded = [r for r in rounded_of(layer) if r.scales]
        layers = [_on_cpu(r) for r in [r.weights for r in rounded] or weights]
        scales = [[s if s is None else s.cpu() for s in r.scales] for r in rounded]
        texts = emit_c.stepper(derived, layers, chosen, title, f"{stem.name}.h", scales, heads)
    files = Path(f"{stem}.c"), Path(f"{stem}.h")
    for file, text in zip(files, texts, strict=True):
        file.write_text(text, encoding="utf-8")
    return files


@contextmanager
def _evaluating(layer: nn.Module) -> Iterator[None]:
    """A block in which the layer, and what its weights are computed by, is in evaluation mode."""
    training = [(module, module.training) for module in layer.modules()]
    layer.eval()
    try:
        yield
    finally:
        for module, before in training:
            module.training = before


def _on_cpu(weights: Weights) -> Weights:
    moved: list[Any] = [w if w is None else w.cpu() for w in weights[:5]]
    return Weights(*moved)._replace(params=tuple(p.cpu() for p in weights.params))
