"""What a refusal tells the author of a cell to write instead, by the function of torch that the
cell calls."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch

__all__ = ["BRANCH", "CALLED", "DTYPE", "IN_PLACE", "MIXED", "NEVER", "about", "torchs_function"]

DTYPE = (
    "a cell is computed in the dtype of its layer, and in float32 if that has 16 bits, whatever "
    "the kernel; drop double(), float(), half() and fixed dtypes, or write to(h.dtype) and "
    "dtype=h.dtype"
)
BRANCH = (
    "it reads the value of a tensor, perhaps to branch on it, and a kernel computes all units of "
    "all rows by one formula; choose per unit with torch.where"
)
CALLED = (
    "it calls a tensor, as v.a(x) would; v(x).a is the product of the recurrent weights of gate a "
    "with a value x of the step"
)
IN_PLACE = "give the result a name of its own, as in z = torch.tanh(z) and z = z * 0.5"
MIXED = (
    "units can be mixed by reductions over the last dimension (sum, mean, var, std, amax, amin, "
    "softmax, log_softmax, logsumexp, layer_norm, rms_norm) and by v(x) alone"
)
_PRODUCT = (
    "is a product of matrices; a cell multiplies by the recurrent weights alone: v.a is their "
    "product with the first state, and v(x).a that with another value x of the step, so a further "
    "matrix is a further gate, one without input rows if inputs= leaves it out. Values have a "
    "number for each unit: a product of two is x * y, and its sum (x * y).sum(-1, keepdim=True)"
)
_LENGTH = (
    "is not among the reductions that a cell may use; write a length as "
    "(x * x).sum(-1, keepdim=True).sqrt(), and F.normalize as x divided by that"
)
_NORM = (
    "is no norm that a cell may use: those are F.layer_norm(x, x.shape[-1:]) and F.rms_norm(x, "
    "x.shape[-1:], eps=1e-6), over all units of a row; with heads= a layer norms each head alone, "
    "and rows of a batch never see each other"
)
_WRITE = (
    "writes into some of the units, and a cell is one formula for every unit; choose per unit with "
    "torch.where, as in z = torch.where(z < 0, 0, z)"
)
_PLACE = (
    "takes some of the units of a row, or moves them, and a cell is one formula for every unit; "
    "give what differs a gate or a state of its own. Gates side by side (torch.cat) may be cut "
    "where one ends: a.chunk(len(gates), -1); " + MIXED
)
_SHAPE = (
    "changes the shape, and each value of a cell has a number for each unit, [..., H], or one for "
    "each row, [..., 1], which a reduction with keepdim=True gives; " + MIXED
)
_KINDS = {
    _PRODUCT: """addbmm addmm addmv addr baddbmm bilinear bmm chain_matmul cdist conv1d conv2d
        conv3d cross dot einsum ger inner kron linear matmul mm multi_dot mv outer
        scaled_dot_product_attention tensordot vdot vecdot __matmul__ __rmatmul__""",
    _NORM: """batch_norm group_norm instance_norm local_response_norm native_batch_norm
        native_group_norm renorm""",
    _LENGTH: "cosine_similarity dist matrix_norm norm normalize pairwise_distance vector_norm",
    _WRITE: """__setitem__ index_add index_add_ index_copy index_copy_ index_fill index_fill_
        index_put index_put_ masked_scatter masked_scatter_ put_ scatter scatter_ scatter_add
        scatter_add_""",
    _PLACE: """H T __getitem__ mH mT argsort chunk diff flip fliplr gather hsplit index_select
        kthvalue masked_select narrow permute roll rot90 select sort split split_with_sizes t take
        take_along_dim tensor_split topk transpose triu tril unbind unfold""",
    _SHAPE: """cat concat concatenate diag expand expand_as flatten hstack movedim ravel repeat
        repeat_interleave reshape stack tile unflatten unsqueeze view view_as vstack""",
}
_ABOUT = {name: text for text, names in _KINDS.items() for name in names.split()}
_ALL_OF = (_PRODUCT, _NORM, _LENGTH)
# Functions that no rule reads, whatever their arguments are.
NEVER = frozenset(name for name, text in _ABOUT.items() if text in _ALL_OF)


def about(name: str) -> str:
    """What follows "it calls NAME, which", or nothing if there is no advice about the function."""
    return _ABOUT.get(name, "")


_TORCH = str(Path(torch.__file__).parent)


def torchs_function(trace: TracebackType | None) -> str:
    """The function of torch, written in Python, through which an error came, or nothing."""
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename.startswith(_TORCH):
            return code.co_name
        trace = trace.tb_next
    return ""
