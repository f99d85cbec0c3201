"""The vectors and functions of csrc/core (vec.h, math.h) with each instruction set."""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fastrnn.compiler import flags
from tests.support.paths import ROOT

np = pytest.importorskip("numpy")

CXX = os.environ.get("CXX") or next(
    (c for c in ("c++", "g++", "clang++") if shutil.which(c)), "c++"
)
SAME, BFLOAT16, FLOAT16 = range(3)
HALVES = {BFLOAT16: torch.bfloat16, FLOAT16: torch.float16}
SCALAR = {"float": np.float32, "floats": np.float32, "double": np.float64, "doubles": np.float64}
WIDER = {np.float32: np.float64, np.float64: np.longdouble}
if TYPE_CHECKING:
    from numpy import ndarray

    Array = ndarray[Any, Any]
else:
    Array = np.ndarray


def instruction_sets() -> dict[str, str]:
    """The build's instruction sets that this processor runs, with their compiler flags."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"baseline": ""}
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    has = set(next(line for line in lines if line.startswith("flags")).split())
    needs = {
        isa: {flag[2:] for flag in own.split() if "vector-width" not in flag}
        for isa, own in flags.ISA.items()
    }
    return {isa: own for isa, own in flags.ISA.items() if needs[isa] <= has}


class Compiled:
    """math_check.cpp for one instruction set, on numpy arrays. A kind is a key of SCALAR."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.name.restype = ctypes.c_char_p
        names = iter(map(self._library.name, itertools.count()).__next__, None)
        self.functions = {name.decode(): i for i, name in enumerate(names)}
        for kind in SCALAR:
            self._function("bound", kind).restype = ctypes.c_double

    def _function(self, name: str, kind: str) -> Any:
        return getattr(self._library, f"{name}_{kind}")

    def lanes(self, kind: str) -> int:
        return int(self._function("lanes", kind)())

    def bound(self, function: str, kind: str) -> float:
        return float(self._function("bound", kind)(self.functions[function]))

    def call(self, function: str, kind: str, a: Array, b: Array | None = None) -> Array:
        a = np.ascontiguousarray(a, SCALAR[kind])
        b = a if b is None else np.ascontiguousarray(b, SCALAR[kind])
        out = np.full_like(a, np.nan)
        size = ctypes.c_int64(a.size)
        self._function("call", kind)(self.functions[function], a.ctypes, b.ctypes, out.ctypes, size)
        return out

    def power(self, exponent: float, kind: str, x: Array) -> Array:
        out = np.full_like(x, np.nan)
        size = ctypes.c_int64(x.size)
        self._function("power", kind)(ctypes.c_double(exponent), x.ctypes, out.ctypes, size)
        return out

    def convert(self, kind: str, x: Array, source: int, target: int, dtype: Any) -> Array:
        out = np.zeros(x.size, dtype)
        size = ctypes.c_int64(x.size)
        self._function("convert", kind)(x.ctypes, source, out.ctypes, target, size)
        return out

    def convert_at(
        self, kind: str, source: int, n: int, storage: int, target: int, to: int
    ) -> None:
        """Converts `n` elements from one address to another."""
        self._function("convert", kind)(
            ctypes.c_void_p(source), storage, ctypes.c_void_p(target), to, ctypes.c_int64(n)
        )

    def load(self, kind: str, address: int, n: int, storage: int) -> Array:
        """All lanes of a vector after a load of `n` elements."""
        out = np.full(self.lanes(kind), np.nan, SCALAR[kind])
        self._function("load", kind)(ctypes.c_void_p(address), n, storage, out.ctypes)
        return out

    def splat(self, kind: str, value: float) -> Array:
        out = np.full(self.lanes(kind), np.nan, SCALAR[kind])
        self._function("splat", kind)(ctypes.c_double(value), out.ctypes)
        return out

    def halve_around_flush(self, x: float) -> list[float]:
        value, out = np.float32([x]), np.full(4, np.nan, np.float32)
        self._library.halve_around_flush(value.ctypes, out.ctypes)
        return [float(y) for y in out]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    folder = tmp_path_factory.mktemp("math")
    source = Path(__file__).with_name("math_check.cpp")

    def build(isa: str, own: str) -> Compiled:
        target = folder / f"{isa}.so"
        options = f"-std=c++17 -O3 {flags.CXX} {own} -shared -DFASTRNN_ISA={isa}"
        includes = ["-iquote", str(ROOT / "csrc")]
        command = [*shlex.split(CXX), *options.split(), *includes, str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
        return Compiled(target)

    sets = instruction_sets()
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(sets, pool.map(build, sets, sets.values()), strict=True))


@pytest.fixture(params=list(instruction_sets()))
def built(libraries: dict[str, Compiled], request: pytest.FixtureRequest) -> Compiled:
    return libraries[request.param]


each_kind = pytest.mark.parametrize("kind", list(SCALAR))
each_half = pytest.mark.parametrize("storage", list(HALVES), ids=["bfloat16", "float16"])


@functools.cache
def samples(scalar: type) -> Array:
    """Every binade of both signs, subnormals included, and dense samples where functions bend."""
    unsigned, mantissa, exponents, per_binade, limit = (
        (np.uint32, 23, 255, 500, 105) if scalar is np.float32 else (np.uint64, 52, 2047, 60, 750)
    )
    rng = np.random.default_rng(0)
    low = rng.integers(0, 2**mantissa, (exponents, per_binade), dtype=unsigned)
    low[:, 0], low[:, 1] = 0, 2**mantissa - 1
    high = np.arange(exponents, dtype=unsigned)[:, None] << unsigned(mantissa)
    every = (high | low).ravel().view(scalar)
    dense = [rng.uniform(-size, size, 60_000).astype(scalar) for size in (limit, 20, 4, 0.5)]
    return np.concatenate([every, -every, *dense])


TRUE: dict[str, Callable[[Array], Array]] = {
    "exp": np.exp,
    "expm1": np.expm1,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


@functools.cache
def true_values(function: str, scalar: type) -> Array:
    with np.errstate(all="ignore"):
        return TRUE[function](samples(scalar).astype(WIDER[scalar]))


def ulps(result: Array, true: Array) -> Array:
    """Errors in units in the last place of the true values, also of subnormal ones."""
    info = np.finfo(result.dtype)
    wide = true.dtype.type
    with np.errstate(all="ignore"):
        _, exponent = np.frexp(true)
        last = np.ldexp(wide(1), np.maximum(exponent - 1, info.minexp) - info.nmant)
        return np.abs(result.astype(wide) - true) / last


@each_kind
@pytest.mark.parametrize("function", list(TRUE))
def test_exponentials_keep_their_bounds(built: Compiled, function: str, kind: str) -> None:
    scalar = SCALAR[kind]
    if np.finfo(WIDER[scalar]).nmant < np.finfo(scalar).nmant + 8:
        pytest.skip("numpy has no number format wide enough here")
    info = np.finfo(scalar)
    x, true = samples(scalar), true_values(function, scalar)
    result = built.call(function, kind, x)
    error = ulps(result, true)
    size = np.abs(true)
    normal = (size >= info.tiny) & (size <= info.max)
    assert error[normal].max() <= built.bound(function, kind)
    small, huge = size < info.tiny, true > info.max
    if function == "sigmoid":
        assert np.abs(result[small]).max() < info.tiny
    elif small.any():
        assert error[small].max() <= 1
    assert np.all(result[huge] == np.inf)
    assert huge.any() == (function in ("exp", "expm1"))


@each_kind
def test_exponentials_stay_in_their_ranges(built: Compiled, kind: str) -> None:
    x = samples(SCALAR[kind])
    tanh = built.call("tanh", kind, x)
    assert np.abs(tanh).max() == 1
    assert np.array_equal(built.call("tanh", kind, -x), -tanh)
    sigmoid = built.call("sigmoid", kind, x)
    assert (sigmoid.min(), sigmoid.max()) == (0, 1)
    assert built.call("exp", kind, x).min() == 0
    assert built.call("expm1", kind, x).min() == -1


def as_torch(function: str, x: Array) -> Array:
    return np.asarray(getattr(torch, function)(torch.from_numpy(x)).numpy())


@each_kind
def test_special_values_are_those_of_torch(built: Compiled, kind: str) -> None:
    info = np.finfo(SCALAR[kind])
    finite = [0.0, info.smallest_subnormal, info.tiny, 0.3, 0.5, 1.0, 1.5, 2.5, info.max]
    x = np.array([s * v for v in [*finite, np.inf, np.nan] for s in (1, -1)], SCALAR[kind])
    for function in built.functions:
        if function in ("maximum", "minimum", "masks"):
            continue
        result, expected = built.call(function, kind, x), as_torch(function, x)
        np.testing.assert_allclose(
            result, expected, rtol=4 * info.eps, atol=info.smallest_subnormal, err_msg=function
        )
        zero = (expected == 0) & ((x == 0) | np.isinf(x))
        signs = np.signbit(result[zero]) == np.signbit(expected[zero])
        assert np.all(signs), f"{function} of {x[zero][~signs]}"


@each_kind
def test_other_functions_match_numpy(built: Compiled, kind: str) -> None:
    scalar = SCALAR[kind]
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(0, s, 3001) for s in (0.1, 1, 30)]).astype(scalar)
    positive = np.abs(x) + scalar(1e-3)
    wide, wide_positive = x.astype(WIDER[scalar]), positive.astype(WIDER[scalar])

    def check(function: str, x: Array, true: Array, bound: float) -> None:
        assert ulps(built.call(function, kind, x), true).max() <= bound, function

    bounds = {"sin": 2, "cos": 2, "floor": 0, "abs": 0, "sign": 0, "reciprocal": 0.5}
    for function, bound in bounds.items():
        check(function, x, getattr(np, function)(wide), bound)
    for function, bound in {"log": 2, "log1p": 2, "sqrt": 0.5}.items():
        check(function, positive, getattr(np, function)(wide_positive), bound)
    check("rsqrt", positive, 1 / np.sqrt(wide_positive), 1.5)
    check("relu", x, np.maximum(wide, 0), 0)
    # Neither numpy nor torch has erf in a wider format than double.
    if scalar is np.float32:
        check("erf", x, as_torch("erf", wide), 2)
    else:
        np.testing.assert_allclose(built.call("erf", kind, x), as_torch("erf", x), rtol=1e-15)


@each_kind
@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 0.5, -0.5, -1, -2, 0.1, 7.3])
def test_pow(built: Compiled, exponent: float, kind: str) -> None:
    scalar = SCALAR[kind]
    x = np.abs(np.random.default_rng(2).normal(0, 2, 1001)).astype(scalar) + scalar(0.1)
    true = x.astype(WIDER[scalar]) ** WIDER[scalar](scalar(exponent))
    assert ulps(built.power(exponent, kind, x), true).max() <= 2


@each_kind
def test_two_operands(built: Compiled, kind: str) -> None:
    values = [-np.inf, -1, -0.5, 0, 0.5, 1, np.inf, np.nan]
    a, b = (m.ravel().astype(SCALAR[kind]) for m in np.meshgrid(values, values))
    assert np.array_equal(built.call("maximum", kind, a, b), np.maximum(a, b), equal_nan=True)
    assert np.array_equal(built.call("minimum", kind, a, b), np.minimum(a, b), equal_nan=True)
    less, positive = a < b, a > 0
    masks = [less, a <= b, a > b, a >= b, a == b, a != b, less & positive, less | positive, ~less]
    code = sum(m * 2**i for i, m in enumerate(masks))
    assert np.array_equal(built.call("masks", kind, a, b), code)


@each_kind
def test_splat(built: Compiled, kind: str) -> None:
    lanes = built.lanes(kind)
    assert np.signbit(built.splat(kind, -0.0)).all()
    assert np.isnan(built.splat(kind, np.nan)).all()
    assert np.array_equal(built.splat(kind, 0.1), np.full(lanes, SCALAR[kind](0.1)))


@pytest.mark.parametrize("kind", ["float", "floats"])
@each_half
def test_halves_widen_exactly(built: Compiled, storage: int, kind: str) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(HALVES[storage]).float().numpy()
    result = built.convert(kind, bits, storage, SAME, np.float32)
    nan = np.isnan(expected)
    assert np.isnan(result[nan]).all()
    assert np.array_equal(result[~nan].view(np.uint32), expected[~nan].view(np.uint32))


@pytest.mark.parametrize("kind", ["float", "floats"])
@each_half
def test_halves_round_to_nearest_even(built: Compiled, storage: int, kind: str) -> None:
    bits = np.arange(65535, dtype=np.uint16)
    below = built.convert(kind, bits, storage, SAME, np.float32)
    above = built.convert(kind, bits + np.uint16(1), storage, SAME, np.float32)
    usable = np.isfinite(below) & np.isfinite(above)
    ties = ((below[usable].astype(np.float64) + above[usable]) / 2).astype(np.float32)
    anything = np.random.default_rng(3).integers(0, 2**32, 300_000, dtype=np.uint32)
    largest = np.float32([65504, 65519.996, 65520, 65536, 3.3961775e38, 3.4028235e38, np.inf])
    x = np.concatenate(
        [
            ties,
            np.nextafter(ties, np.float32(9e9)),
            np.nextafter(ties, np.float32(-9e9)),
            largest,
            -largest,
            samples(np.float32),
            anything.view(np.float32),
        ]
    )
    expected = torch.from_numpy(x).to(HALVES[storage])
    result = torch.from_numpy(built.convert(kind, x, SAME, storage, np.int16))
    nan = expected.isnan()
    assert result.view(HALVES[storage])[nan].isnan().all()
    assert torch.equal(result[~nan], expected.view(torch.int16)[~nan])


class GuardedPage:
    """A page of writable memory before a page that must not be accessed."""

    def __init__(self) -> None:
        size = mmap.PAGESIZE
        self._map = mmap.mmap(-1, 2 * size)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.end = start + size
        self.bytes = np.frombuffer(self._map, np.uint8, size)
        libc, no_access = ctypes.CDLL(None, use_errno=True), 0
        if libc.mprotect(ctypes.c_void_p(self.end), ctypes.c_size_t(size), no_access):
            raise OSError(ctypes.get_errno(), "mprotect")


@pytest.fixture(scope="module")
def page() -> Iterator[GuardedPage]:
    yield GuardedPage()


def tails() -> list[tuple[str, int, Any]]:
    same = [(kind, SAME, scalar) for kind, scalar in SCALAR.items()]
    return [*same, *((k, h, np.uint16) for k in ("float", "floats") for h in HALVES)]


@pytest.mark.parametrize("kind, storage, dtype", tails())
def test_tails_touch_nothing_beyond(
    built: Compiled, page: GuardedPage, kind: str, storage: int, dtype: Any
) -> None:
    lanes, width = built.lanes(kind), np.dtype(dtype).itemsize
    # Both 16-bit formats and float hold these exactly.
    values = np.arange(1, lanes + 1, dtype=SCALAR[kind])
    stored = values if storage == SAME else built.convert(kind, values, SAME, storage, dtype)
    stored = np.ascontiguousarray(stored, dtype)
    for n in range(lanes + 1):
        size = n * width
        address = page.end - size
        page.bytes[:] = 0xAB
        built.convert_at(kind, stored.ctypes.data, n, storage, address, storage)
        assert page.bytes[len(page.bytes) - size :].tobytes() == stored[:n].tobytes()
        assert np.all(page.bytes[: len(page.bytes) - size] == 0xAB)
        loaded = built.load(kind, address, n, storage)
        assert np.array_equal(loaded, np.where(np.arange(lanes) < n, values, 0))


def test_flushing_denormals_ends_with_its_scope(built: Compiled) -> None:
    tiny = float(np.finfo(np.float32).tiny)
    before, within, still_within, after = built.halve_around_flush(tiny)
    assert before == after == tiny / 2
    flushed = 0 if platform.machine() in ("x86_64", "AMD64", "aarch64", "arm64") else tiny / 2
    assert within == still_within == flushed
