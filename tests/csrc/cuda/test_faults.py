"""The real CUDA kernels under the sanitizers, and planted mistakes, which must be found.

`python -m tests.cudasim.sanitize` runs far more cases under the sanitizers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from fastrnn import cells
from fastrnn.compiler import emit_cpp
from fastrnn.compiler.derive import derive
from tests.cudasim.build import Fault, build, missing
from tests.cudasim.sweeps import Case, run_cases
from tests.support.names import BUILT_IN
from tests.support.selection import ALL_TESTS
from tests.support.simulated import only

pytestmark = [
    pytest.mark.simulator,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

TILE, EXCHANGE = "cuda/persistent/product.cuh", "cuda/persistent/exchange.cuh"
FORWARD, BACKWARD = "cuda/persistent/forward.cuh", "cuda/persistent/backward.cuh"
LAUNCH, RECOMPUTE = "cuda/persistent/launch.cuh", "cuda/recompute.cu"
STEP, ROWS = "cuda/step/product.cuh", "cuda/rows.cuh"
FORWARD_STEP, BACKWARD_STEP = "cuda/step/forward.cu", "cuda/step/backward.cu"
AGAIN = {"chunk": 2}  # chunks of 2 steps; then tapes are recomputed too
CELL = "lstm"  # it has two states and saved values
PRECISION = "bfloat16"
SEEDS = range(1, 7)
BLOCKS = {"step": 1, "block": 1, "cluster": 3, "grid": 3}


class Planted(NamedTuple):
    """A mistake, and the kernels that show it."""

    name: str
    residency: str
    fault: Fault
    race: bool = False  # the thread sanitizer must find it too; a few stand for all
    outside: bool = False  # an access out of bounds, which the address sanitizer must find
    given: Mapping[str, Any] = MappingProxyType({})  # fields of the case


FAULTS = [
    Planted(
        "a block's steps without a barrier",
        "block",
        Fault(EXCHANGE, "if (i > 0) __syncthreads();", "if (i > 0 && !PLANTED) __syncthreads();"),
    ),
    Planted(
        "slices added before they are there",
        "cluster",
        Fault(
            TILE,
            "platform::named_barrier(1 + group, at.slices * kWarp);\n  if (slice > 0) return;",
            "if (!PLANTED) platform::named_barrier(1 + group, at.slices * kWarp);\n"
            "  if (slice > 0) return;",
        ),
        race=True,
    ),
    Planted(
        "a number of the wrong column",
        "cluster",
        Fault(TILE, "sum[m][j][0] += x.x,", "sum[m][j][0] += PLANTED ? x.y : x.x,"),
    ),
    Planted(
        "a wait for the wrong phase",
        "cluster",
        Fault(EXCHANGE, "(i - 1) >> 1 & 1", "((i - 1) >> 1 & 1) ^ PLANTED"),
    ),
    Planted(
        "no wait for the peers",
        "cluster",
        Fault(
            EXCHANGE,
            "if (i > 0 && computes) platform::barrier_wait(",
            "if (i > 0 && computes && !PLANTED) platform::barrier_wait(",
        ),
    ),
    Planted(
        "a phase that expects too little",
        "cluster",
        Fault(
            EXCHANGE,
            "if (operands > 1) platform::barrier_expect(&barriers[1], columns * at.exchanged);",
            "if (operands > 1)"
            " platform::barrier_expect(&barriers[1], columns * at.exchanged - (PLANTED ? 16 : 0));",
        ),
    ),
    Planted(
        "later phases that expect nothing",
        "cluster",
        Fault(EXCHANGE, "&& i + 2 < operands)", "&& i + 2 < operands && !PLANTED)"),
    ),
    Planted(
        "one buffer for all steps",
        "cluster",
        Fault(
            EXCHANGE,
            "const char* here = tiles + place * at.tile +",
            "const char* here = tiles + (PLANTED ? 0 : place) * at.tile +",
        ),
        race=True,
    ),
    Planted(
        "peers that are not ready",
        "cluster",
        Fault(
            EXCHANGE,
            "platform::cluster_sync();\n    else",
            "PLANTED ? void() : platform::cluster_sync();\n    else",
        ),
    ),
    Planted(
        "pieces read before other lanes wrote them",
        "cluster",
        Fault(
            EXCHANGE,
            "__syncwarp();\n#pragma unroll\n    for (int first",
            "if (!PLANTED) __syncwarp();\n#pragma unroll\n    for (int first",
        ),
        race=True,
    ),
    Planted(
        "a flag of the step before",
        "grid",
        Fault(
            EXCHANGE, "static_cast<uint32_t>(i)) watch", "static_cast<uint32_t>(i - PLANTED)) watch"
        ),
    ),
    Planted(
        "a block whose flag no thread polls",
        "grid",
        Fault(
            EXCHANGE,
            "block < at.active; block += blockDim.x",
            "block < at.active - PLANTED; block += blockDim.x",
        ),
    ),
    Planted(
        "a flag that does not speak for all warps",
        "grid",
        Fault(
            EXCHANGE,
            "__syncthreads();\n    if (threadIdx.x == 0) platform::store_release(",
            "if (!PLANTED) __syncthreads();\n    if (threadIdx.x == 0) platform::store_release(",
        ),
        race=True,
    ),
    Planted(
        "the other area",
        "grid",
        Fault(EXCHANGE, "const char* from = area(i);", "const char* from = area(i ^ PLANTED);"),
    ),
    Planted(
        "an operand that others are still writing",
        "grid",
        Fault(EXCHANGE, "if (i > 0) await(i);", "if (i > 0 && !PLANTED) await(i);"),
        race=True,
    ),
    Planted(
        "a slice that polls too few of its blocks",
        "grid",
        Fault(
            EXCHANGE,
            "block * owned < end; block +=",
            "block * owned < end - (PLANTED ? owned : 0); block +=",
        ),
    ),
    Planted(
        "a slice that polls only blocks behind its first",
        "grid",
        Fault(EXCHANGE, "block = producer + thread;", "block = producer + PLANTED + thread;"),
    ),
    Planted(
        "a slice copied before all its warps have seen their flags",
        "grid",
        Fault(
            EXCHANGE,
            "meet();\n    const char* from",
            "if (!PLANTED) meet();\n    const char* from",
        ),
        race=True,
    ),
    Planted(
        "a slice read before all its warps have copied",
        "grid",
        Fault(EXCHANGE, "meet();\n  }", "if (!PLANTED) meet();\n  }"),
        race=True,
    ),
    Planted(
        "the rest of a slice read before it is there",
        "grid",
        Fault(
            EXCHANGE,
            "if (kRest && at.depth ==",
            "if (kRest && PLANTED) return;\n    if (kRest && at.depth ==",
        ),
        given={"hidden": 200},
    ),
    Planted(
        "terms in another order than the weights",
        "grid",
        Fault(TILE, "= in_place ? w + 1 : w + 4;", "= in_place && !PLANTED ? w + 1 : w + 4;"),
    ),
    Planted(
        "a group left out by the second launch",
        "grid",
        Fault(
            LAUNCH,
            "launched.first = static_cast<int>(first);",
            "launched.first = PLANTED ? 0 : static_cast<int>(first);",
        ),
        given={"batch": 20},
    ),
    Planted(
        "a tape in which an episode begins with the states before",
        "step",
        Fault(RECOMPUTE, "s[k] = cut ? Sum(0) : s[k];", "s[k] = cut && !PLANTED ? Sum(0) : s[k];"),
        given=AGAIN,
    ),
    Planted(
        "a tape without the states before a chunk",
        "step",
        Fault(RECOMPUTE, "begin > 0 && at.time(", "begin > 0 && !PLANTED && at.time("),
        given=AGAIN,
    ),
    Planted(
        "chunks whose tapes all begin with the first states",
        "step",
        Fault(
            RECOMPUTE,
            "carry[at.state(k, b) + n] = s[k];",
            "if (!PLANTED) carry[at.state(k, b) + n] = s[k];",
        ),
        given=AGAIN,
    ),
    Planted(
        "a step before the first",
        "step",
        Fault(RECOMPUTE, "} else if (initial) {", "} else if (initial && !PLANTED) {"),
        given=AGAIN,
    ),
    Planted(
        "copies nobody waited for",
        "grid",
        Fault(
            EXCHANGE,
            "platform::copy_async_wait<kRest ? 0 : 1>();",
            "if (!PLANTED) platform::copy_async_wait<kRest ? 0 : 1>();",
        ),
    ),
    Planted(
        "stages nobody waited for",
        "step",
        Fault(
            STEP,
            "platform::copy_async_wait<Shape::kStages - 2>();",
            "if (!PLANTED) platform::copy_async_wait<Shape::kStages - 2>();",
        ),
    ),
    Planted(
        "sums written over a stage in use",
        "step",
        Fault(
            STEP,
            "__syncthreads();  // the stages make room for sums",
            "if (!PLANTED) __syncthreads();",
        ),
        race=True,
    ),
    Planted(
        "sums that are shared out before they are there",
        "block",
        Fault(
            TILE,
            "if (at.slices > 1) platform::named_barrier(",
            "if (at.slices > 1 && !PLANTED) platform::named_barrier(",
        ),
        race=True,
    ),
    Planted(
        "a number of the wrong column among sums that are shared out",
        "block",
        Fault(TILE, "sum.x += more.x,", "sum.x += PLANTED ? more.y : more.x,"),
    ),
    Planted(
        "u of the step just done",
        "block",
        Fault(FORWARD, "moved(u_from, ahead,", "moved(u_from, PLANTED ? 0 : ahead,"),
    ),
    Planted(
        "an output in the row of the step before",
        "block",
        Fault(FORWARD, "moved(y_to, ahead,", "moved(y_to, PLANTED ? 0 : ahead,"),
    ),
    Planted(
        "a tape whose rows do not move on",
        "block",
        Fault(FORWARD, "moved(tape_to, ahead,", "moved(tape_to, PLANTED ? 0 : ahead,"),
    ),
    Planted(
        "a step that begins one row too early",
        "block",
        Fault(
            ROWS,
            "sweep.first[to] - sweep.first[from]",
            "sweep.first[to] - sweep.first[from] - PLANTED",
        ),
        given={"layout": "packed", "batch": 5},
    ),
    Planted(
        "a flag of another group",
        "grid",
        Fault(
            EXCHANGE,
            "platform::opaque(task) * at.active;",
            "PLANTED ? 0 : platform::opaque(task) * at.active;",
        ),
        given={"batch": 20},
    ),
    Planted(
        "a state that stays as it was",
        "block",
        Fault(
            FORWARD,
            "= here ? after[k].x",
            "= here && !(PLANTED && k == 1) ? after[k].x",
        ),
    ),
    Planted(
        "a product that passes a reset",
        "block",
        Fault(FORWARD, "(cut ? 0 : product_of_h)", "(cut && !PLANTED ? 0 : product_of_h)"),
    ),
    Planted(
        "a state that passes a reset",
        "block",
        Fault(FORWARD, "before[k] = cut ? 0 :", "before[k] = cut && !PLANTED ? 0 :"),
    ),
    Planted(
        "a row of the batch that goes on past its end",
        "block",
        Fault(FORWARD, "here = t < stop[j][e] &&", "here = (PLANTED || t < stop[j][e]) &&"),
        given={"layout": "lengths"},
    ),
    Planted(
        "one state handed on for another",
        "block",
        Fault(
            FORWARD,
            "b, n, s[k][o][j][e]);",
            "b, n, s[PLANTED ? 0 : k][o][j][e]);",
        ),
    ),
    Planted(
        "a state of another row of the batch",
        "cluster",
        Fault(
            FORWARD,
            "s[k][o][j][e] = state_before<X>(at, k, b, n, begins);",
            "s[k][o][j][e] = state_before<X>(at, k, PLANTED ? b0 : b, n, begins);",
        ),
    ),
    Planted(
        "one value on the tape for another",
        "block",
        Fault(
            FORWARD,
            "saved[j][o][e][k - (S - 1)].x",
            "saved[j][o][e][PLANTED ? 0 : k - (S - 1)].x",
        ),
    ),
    Planted(
        "a first operand that is not there yet",
        "block",
        Fault(
            FORWARD,
            "exchange.ready();\n\n  for (int i",
            "if (!PLANTED) exchange.ready();\n\n  for (int i",
        ),
        race=True,
    ),
    Planted(
        "states written while other blocks read them",
        "grid",
        Fault(FORWARD, "exchange.settle();", "if (!PLANTED) exchange.settle();"),
        race=True,
        given={"chunk": 1},
    ),
    Planted(
        "an output past the batch",
        "block",
        Fault(
            FORWARD, "if (t >= stop[j][e]) continue;", "if (t >= stop[j][e] && !PLANTED) continue;"
        ),
        outside=True,
    ),
    Planted(
        "states past the batch",
        "block",
        Fault(
            FORWARD,
            "if (b < sweep.batch && n < hidden) leave_state<X>(",
            "if ((PLANTED || b < sweep.batch) && n < hidden) leave_state<X>(",
        ),
        outside=True,
    ),
    Planted(
        "a chunk that begins anew from the initial states",
        "block",
        Fault(FORWARD, "if (!at.unstarted(t,", "if (!PLANTED && !at.unstarted(t,"),
        given={"chunk": 2},
    ),
    Planted(
        "a chunk of a step each that begins anew from the initial states",
        "step",
        Fault(FORWARD_STEP, "row.outer = recurrence", "row.outer = PLANTED || recurrence"),
    ),
    Planted(
        "gradients of the last states that count again in every chunk",
        "block",
        Fault(BACKWARD, "if (!at.ended(t,", "if (!PLANTED && !at.ended(t,"),
        given={"chunk": 2},
    ),
    Planted(
        "gradients of the last states that count again in every step",
        "step",
        Fault(BACKWARD_STEP, "row.outer = recurrence", "row.outer = PLANTED || recurrence"),
    ),
    Planted(
        "no states of a tile that has ended",
        "block",
        Fault(
            FORWARD,
            "if (sweep.end == sweep.steps) pass_",
            "if (sweep.end == sweep.steps && !PLANTED) pass_",
        ),
        given={"layout": "packed", "chunk": 1, "batch": 9},
    ),
    Planted(
        "no gradients of the states of a tile that begins later",
        "block",
        Fault(BACKWARD, "if (sweep.begin == 0) pass_", "if (sweep.begin == 0 && !PLANTED) pass_"),
        given={"layout": "lengths", "chunk": 1, "batch": 17, "recurrences": 2},
    ),
    Planted(
        "an item given to two warps",
        "block",
        Fault(BACKWARD, "return slice + i *", "return (PLANTED ? 0 : slice) + i *"),
        race=True,
    ),
    Planted(
        "one item fetched for another",
        "block",
        Fault(BACKWARD, "still ? i + 2 : i % 2", "still ? i + 2 : PLANTED ? 0 : i % 2"),
        given={"batch": 9, "tile": 16},
    ),
    Planted(
        "a flag raised before the last item was sent",
        "grid",
        Fault(
            BACKWARD,
            "if (both) process(odd, i + 1, second);\n"
            "      if (i + 2 >= items) exchange.sent(step + 1);",
            "if (both && !PLANTED) process(odd, i + 1, second);\n"
            "      if (i + 2 >= items) exchange.sent(step + 1);\n"
            "      if (both && PLANTED) process(odd, i + 1, second);",
        ),
        race=True,
        given={"hidden": 72, "batch": 9, "tile": 16},
    ),
    Planted(
        "a warp without items that sends no flag",
        "grid",
        Fault(
            BACKWARD, "if (items == 0) exchange.sent", "if (items == 0 && !PLANTED) exchange.sent"
        ),
    ),
    Planted(
        "the state after a step for the one before it",
        "block",
        Fault(
            BACKWARD,
            "still ? earlier : earliest",
            "still || PLANTED ? earlier : earliest",
        ),
    ),
    Planted(
        "a first step that begins from what is stored before it",
        "block",
        Fault(BACKWARD, "if (at.initial(t, stop)) {", "if (at.initial(t, stop) && !PLANTED) {"),
    ),
    Planted(
        "a gradient that passes a reset",
        "block",
        Fault(BACKWARD, "= cut ? 0 : dbefore[k].x", "= cut && !PLANTED ? 0 : dbefore[k].x"),
    ),
    Planted(
        "a product of gradients that passes a reset",
        "block",
        Fault(BACKWARD, "alive[e] && !cut ?", "alive[e] && (PLANTED || !cut) ?"),
    ),
    Planted(
        "an output from before a reset",
        "block",
        Fault(BACKWARD, "h_prev[e] = cut ?", "h_prev[e] = cut && !PLANTED ?"),
    ),
    Planted(
        "gradients of a row of the batch past its end",
        "block",
        Fault(
            BACKWARD,
            "to.alive[e] = t < stop &&",
            "to.alive[e] = (PLANTED ? b0 + c + e < sweep.batch : t < stop) &&",
        ),
        given={"layout": "lengths"},
    ),
    Planted(
        "the last product left out",
        "cluster",
        Fault(BACKWARD, "k == 0 ? add_product", "k == 0 && !PLANTED ? add_product"),
    ),
    Planted(
        "a last operand that is not there yet",
        "block",
        Fault(
            BACKWARD,
            "operand = exchange.wait(step, computes);",
            "operand = PLANTED && step == steps ? exchange.first() + (steps & 1) * layout.tile"
            " : exchange.wait(step, computes);",
        ),
        race=True,
    ),
    Planted(
        "one state's gradient handed on for another's",
        "grid",
        Fault(
            BACKWARD,
            "leave_gradient<X>(at, k, b, n, x.x);",
            "leave_gradient<X>(at, PLANTED ? 0 : k, b, n, x.x);",
        ),
        given={"chunk": 2},
    ),
    Planted(
        "gradients past the batch",
        "block",
        Fault(
            BACKWARD,
            "if (!result.alive[e]) continue;",
            "if (!result.alive[e] && !PLANTED) continue;",
        ),
        outside=True,
    ),
    Planted(
        "gradients of states past the batch",
        "block",
        Fault(
            BACKWARD,
            "if (n < hidden && b < sweep.batch) leave_gradient<X>(",
            "if (n < hidden && (PLANTED || b < sweep.batch)) leave_gradient<X>(",
        ),
        outside=True,
    ),
]


# Tiles of kernels that no case of this file runs, in the words that name them. Compiling all takes
# minutes.
UNUSED = [
    (LAUNCH, "with_row_group<Direction, Cell, precision, 4>(plan, f)"),
    (STEP, "f(c, precision, typename Tiles::Middle{})"),
    (STEP, "f(c, precision, typename Tiles::Large{})"),
]


# Sanitizers, and the cells whose right kernels run under them. The address sanitizer sees those of
# each number of gates and states that the other does not see.
COVERING: dict[str | None, list[str]] = {
    "thread": [CELL, "gru"],
    "address": [CELL, "rnn_tanh", "rnn_relu"],
}
CELLS = dict.fromkeys(COVERING, BUILT_IN) if ALL_TESTS else COVERING
CELLS = {**CELLS, None: [CELL]}


@functools.cache
def library(sanitizer: str | None) -> Path:
    made = [cells.get(name) for name in CELLS[sanitizer]]
    header = emit_cpp.header(list(map(derive, made)), list(map(emit_cpp.key, made)))
    edits = [planted.fault for planted in FAULTS]
    edits += [Fault(file, call, "kInvalidConfiguration") for file, call in UNUSED]
    return build(None, sanitizer, edits, header, only([PRECISION]))


def case(number: int, seed: int) -> Case:
    """A case for the fault of this number."""
    planted = FAULTS[number - 1]
    blocks = BLOCKS[planted.residency]
    return Case(number, CELL, planted.residency, blocks, PRECISION, seed, **planted.given)


def test_each_cell_is_seen_by_a_sanitizer() -> None:
    assert set(BUILT_IN) == {name for some in COVERING.values() for name in some}


@pytest.mark.takes(60)
@pytest.mark.parametrize("sanitizer", ["thread", "address", None])
def test_right_kernels(sanitizer: str | None) -> None:
    given = [
        Case(
            0,
            name,
            residency,
            BLOCKS[residency],
            PRECISION,
            seed,
            recurrences=2,
            chunk=2,
            layout=layout,
        )
        for name in CELLS[sanitizer]
        for seed, (residency, layout) in enumerate(
            zip(BLOCKS, ["packed", "lengths", "dense", "packed"], strict=True)
        )
    ]
    lines = [f"=== {one}" for one in given] + ["=== end"]
    output = run_cases(library(sanitizer), sanitizer, given)
    assert [line for line in output.splitlines() if line] == lines, output[:5000]


NOTHING = len(FAULTS) + 1  # no fault has this number


def missed(sanitizer: str | None, numbers: list[int], words: str) -> list[str]:
    """Names of the faults for which no schedule prints these words. Without a fault none may.

    ThreadSanitizer sees a race only if both threads come close enough in time, which a busy machine
    can prevent: the races that are left get more attempts.
    """
    left = numbers
    for _ in range(12 if sanitizer == "thread" else 1):
        given = [case(number, seed) for number in left for seed in SEEDS]
        given += [case(number, 1)._replace(fault=NOTHING) for number in left]
        found = set()
        for part in run_cases(library(sanitizer), sanitizer, given).split("=== ")[1:]:
            if words in part and not part.startswith("end"):
                found.add(Case.parse(part.splitlines()[0]).fault)
        assert NOTHING not in found
        left = [number for number in left if number not in found]
        if not left:
            break
    return [FAULTS[number - 1].name for number in left]


@pytest.mark.takes(10)
def test_faults_are_found() -> None:
    inside = [n for n, planted in enumerate(FAULTS, 1) if not planted.outside]
    assert not missed(None, inside, "WRONG")


@pytest.mark.takes(15)
def test_races_are_found() -> None:
    races = [n for n, planted in enumerate(FAULTS, 1) if planted.race]
    assert not missed("thread", races, "WARNING: ThreadSanitizer: data race")


@pytest.mark.takes(10)
def test_accesses_out_of_bounds_are_found() -> None:
    outside = [n for n, planted in enumerate(FAULTS, 1) if planted.outside]
    assert not missed("address", outside, "ERROR: AddressSanitizer: heap-buffer-overflow")
