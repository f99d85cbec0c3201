"""Writes expressions as a member function in C++."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from fastrnn.compiler.expression import MASKS, Expr, ordered, uses, write

__all__ = ["function"]


def function(
    name: str,
    places: Mapping[str, str],
    inputs: Sequence[str],
    outputs: Mapping[str, Expr],
    arrays: Sequence[str],
    first: str = "",
) -> str:
    """A member function of a struct.

    Args:
        places: the text of each input of the expressions.
        inputs: its parameters that are read: names of arrays, or of values, which begin with `V `.
        outputs: expressions by the element of an array that they are assigned to.
        arrays: those arrays.
        first: a parameter before all others.
    """

    def leaf(node: Expr) -> str:
        return places[node.label] if node.op == "input" else f"splat<V>({_number(node.label)})"

    roots = _fused(list(outputs.values()))
    passed = dict.fromkeys(root for root in roots if root.op == "input")
    copies = {root: f"r{k}" for k, root in enumerate(passed)}
    lines, names = write(roots, leaf)
    body = [f"const V {copy} = {leaf(root)};" for root, copy in copies.items()]
    body += [f"const {'auto' if n.op in MASKS else 'V'} {to} = {text};" for n, to, text in lines]
    body += [
        f"{target} = {copies.get(root, text)};"
        for target, root, text in zip(outputs, roots, names, strict=True)
    ]
    used = {places[label].split("[")[0] for label in uses(roots)}
    used |= {target.split("[")[0] for target in outputs}

    def parameter(kind: str, array: str) -> str:
        if array.startswith("V "):
            kind, array = array.split(" ")
        return f"{kind} {array if array in used else f'/*{array}*/'}"

    read = [*([first] if first else []), *(parameter("const V*", array) for array in inputs)]
    written = [parameter("V*", array) for array in arrays]
    opening = f"  FASTRNN_HD FASTRNN_INLINE static void {name}("
    signature = f"{opening}{', '.join([*read, *written])}) {{"
    if len(signature) > 100:
        signature = f"{opening}\n      {', '.join(read)},\n      {', '.join(written)}) {{"
    return "\n".join(["  template <class V>", signature, *(f"    {line}" for line in body), "  }"])


def _fused(roots: Sequence[Expr]) -> list[Expr]:
    """The roots with every sum of a product that nothing else uses as one multiply-add.

    Compilers may fuse no other (`-ffp-contract=off`), so a cell gives the same bits in every kernel
    that it is inlined into.
    """
    count = Counter(roots)
    order = ordered(roots)
    count.update(arg for node in order for arg in node.args)
    new: dict[Expr, Expr] = {}
    for node in order:
        args = tuple(new[arg] for arg in node.args)
        products = [k for k, arg in enumerate(node.args) if arg.op == "mul" and count[arg] == 1]
        if node.op in _FUSED and products:
            k = products[-1]
            new[node] = Expr(_FUSED[node.op][k], (*args[k].args, args[1 - k]))
        else:
            new[node] = Expr(node.op, args, node.label) if args else node
    return [new[root] for root in roots]


# The function of csrc/core/vec.h for a sum whose first or second term is a product.
_FUSED = {
    "add": ("multiply_add", "multiply_add"),
    "sub": ("multiply_subtract", "subtract_product"),
}


def _number(label: str) -> str:
    value = float(label)
    if value != value:
        return "std::numeric_limits<double>::quiet_NaN()"
    if value in (float("inf"), float("-inf")):
        return ("-" if value < 0 else "") + "std::numeric_limits<double>::infinity()"
    return label
