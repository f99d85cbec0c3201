"""C99 as text: identifiers, literals, comments, arrays, and the expressions of a step."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastrnn.compiler.expression import MASKS, Expr, ordered, write

__all__ = [
    "array",
    "can_be_a_member",
    "comment",
    "filled",
    "functions_of",
    "identifier",
    "statements",
    "type_of",
]


def identifier(text: str) -> str:
    """`text` as an identifier that C and C++ accept: `my gru-2` becomes `my_gru_2`.

    Raises:
        ValueError: if there is none.
    """
    name = re.sub(r"[^0-9A-Za-z]+", "_", text).strip("_")
    if not name or name[0].isdigit() or name in _RESERVED:
        raise ValueError(f"{text!r} gives no name in C; a name begins with a letter, as 'my_gru'")
    return name


def can_be_a_member(name: str) -> bool:
    """Whether a struct in C and C++ can have a member of this name."""
    return bool(re.fullmatch(r"[a-z][a-z0-9_]*", name)) and name not in _RESERVED


def comment(text: str) -> str:
    """Text of one line that neither ends nor begins a comment."""
    return " ".join(text.replace("*/", "* /").replace("/*", "/ *").split())


def array(name: str, numbers: Tensor) -> str:
    """The definition of an array."""
    values = numbers.flatten().tolist()
    texts = [str(v) if numbers.dtype == torch.int8 else _number(v) for v in values]
    width = 18 if numbers.dtype == torch.int8 else 6
    rows = "".join(f"  {', '.join(texts[k : k + width])},\n" for k in range(0, len(texts), width))
    return f"static const {type_of(numbers)} {name}[{len(texts)}] = {{\n{rows}}};"


def type_of(numbers: Tensor) -> str:
    """The type of an element of an array."""
    return "int8_t" if numbers.dtype == torch.int8 else "float"


def _number(value: float) -> str:
    """A literal of type float, exact if the value has that type."""
    if not math.isfinite(value):
        return "NAN" if value != value else "INFINITY" if value > 0 else "-INFINITY"
    text = f"{value:.9g}"
    return f"{text if set(text) & set('.e') else text + '.0'}f"


def filled(opening: str, arguments: Sequence[str], closing: str, width: int = 100) -> str:
    """Code with a list of arguments, in lines of at most `width` columns."""
    lines = [opening]
    for k, argument in enumerate(arguments):
        text = argument + (closing if k == len(arguments) - 1 else ",")
        if len(lines[-1]) + len(text) + 1 > width:
            lines.append(" " * len(opening) + text)
        else:
            lines[-1] += text if lines[-1] == opening else f" {text}"
    return "\n".join(lines)


def statements(
    roots: Sequence[Expr], places: Mapping[str, str], names: Mapping[Expr, str] | None = None
) -> tuple[list[str], list[str]]:
    """The statements that compute the roots, and the texts of their values.

    Args:
        places: the text of each input.
        names: names for roots that are operations; others that need one are called `t0`, `t1`, ...
    """

    def leaf(node: Expr) -> str:
        return places[node.label] if node.op == "input" else _number(_rounded(node.label))

    renamed = _in_c(roots)
    pairs = zip(roots, renamed, strict=True)
    chosen = {new: names[old] for old, new in pairs if names and old in names}
    lines, texts = write(renamed, leaf, chosen)
    made = [f"const {'int' if n.op in MASKS else 'float'} {to} = {text};" for n, to, text in lines]
    return made, texts


def functions_of(roots: Sequence[Expr]) -> set[str]:
    """The functions that those statements call, and operators."""
    return {node.op for node in ordered(_in_c(roots))}


def _rounded(label: str) -> float:
    """A constant as float32."""
    return torch.tensor(float(label), dtype=torch.float32, device="cpu").item()


def _in_c(roots: Sequence[Expr]) -> list[Expr]:
    """The roots with C's names of their functions."""
    new: dict[Expr, Expr] = {}
    for node in ordered(roots):
        args = tuple(new[a] for a in node.args)
        if node.op == "pow":
            args += (Expr("const", (), node.label),)
        label = "" if node.op == "pow" else node.label
        new[node] = Expr(_NAMES.get(node.op, node.op), args, label) if args else node
    return [new[root] for root in roots]


# Names of functions in C, where they differ from those of `expression.py`.
_NAMES = {
    "abs": "fabsf",
    "floor": "floorf",
    "sqrt": "sqrtf",
    "expm1": "expm1f",
    "log": "logf",
    "log1p": "log1pf",
    "sin": "sinf",
    "cos": "cosf",
    "erf": "erff",
    "pow": "powf",
    "exp": "exponential",
    "tanh": "hyperbolic_tangent",
}

# Words that C, C++ or their headers reserve.
_RESERVED_WORDS = """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t
    char32_t class compl concept const const_cast consteval constexpr constinit continue co_await
    co_return co_yield decltype default delete do double dynamic_cast else enum explicit export
    extern false float for friend goto if inline int long mutable namespace new noexcept not not_eq
    nullptr operator or or_eq private protected public register reinterpret_cast requires restrict
    return short signed sizeof static static_assert static_cast struct switch template this
    thread_local throw true try typedef typeid typename typeof typeof_unqual union unsigned using
    virtual void volatile wchar_t while xor xor_eq linux unix
"""
_RESERVED = frozenset(_RESERVED_WORDS.split())
