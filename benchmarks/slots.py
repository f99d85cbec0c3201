"""Times a server of many streams: slots beside one stepper for each stream.

    python -m benchmarks.slots                            1,000 streams, about a minute
    python -m benchmarks.slots --streams 200 --rate 100   fewer streams with more frames
    python -m benchmarks.slots --cell gru --layers 1      another layer
    python -m benchmarks.slots --save                     writes results/<machine>/slots.md too

Frames arrive at random, independent of each other. A server takes all streams that have a frame,
gives each an output, and looks again. The delay of a frame is the time from its arrival to its
output. Frames per second are those of servers that never wait, when each time a random half of the
streams has a frame. With several threads, each serves its share of the streams; in the row of one
object, one thread serves all streams and a step uses the threads.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import fastrnn
from benchmarks.report import RESULTS
from fastrnn.tools.bench import store

LAYERS: dict[str, Any] = {"lstm": fastrnn.LSTM, "gru": fastrnn.GRU, "rnn": fastrnn.RNN}
MOST_ROUNDS = 64  # in which frames of random halves of the streams come before they come again


class Server(Protocol):
    """Has the states of its streams, which are numbered from 0."""

    nbytes: int

    def serve(self, streams: np.ndarray, x: np.ndarray) -> None:
        """One step of these distinct streams, whose frames are rows of `x` [streams, I]."""
        ...


class InSlots:
    def __init__(self, layer: Any, streams: int, threads: int = 1) -> None:
        self.slots = layer.stream_slots(streams, threads=threads)
        self.of = np.array([self.slots.add() for _ in range(streams)])
        self.x = np.empty((streams, self.slots.input_size), "float32")
        self.y = np.empty((streams, self.slots.output_size), "float32")
        self.nbytes = self.slots.nbytes

    def serve(self, streams: np.ndarray, x: np.ndarray) -> None:
        n = len(streams)
        np.take(x, streams, axis=0, out=self.x[:n])
        self.slots.step(self.x[:n], self.of[streams], self.y[:n])


class OneStepperEach:
    def __init__(self, layer: Any, streams: int) -> None:
        self.steppers = [layer.stream() for _ in range(streams)]
        self.y = np.empty((streams, self.steppers[0].output_size), "float32")
        self.nbytes = streams * self.steppers[0].nbytes

    def serve(self, streams: np.ndarray, x: np.ndarray) -> None:
        steppers, y = self.steppers, self.y
        for stream in streams.tolist():
            steppers[stream].step(x[stream], y[stream])


@dataclass(frozen=True)
class Row:
    name: str
    megabytes: float  # of weights
    most: float  # frames per second
    delays: tuple[float, float, float]  # milliseconds: the median, 99 % and 99.9 % of frames

    @property
    def line(self) -> str:
        cells = [self.name, f"{self.megabytes:.3g}", f"{self.most:,.0f}"]
        return f"| {' | '.join(cells + [f'{delay:.3g}' for delay in self.delays])} |"


def frames_per_second(server: Server, x: np.ndarray, seconds: float) -> float:
    draw = np.random.default_rng(1)
    rounds = [draw.permutation(len(x))[: max(1, len(x) // 2)] for _ in range(MOST_ROUNDS)]
    served, begin = 0, time.perf_counter()
    while True:
        streams = rounds[served // len(rounds[0]) % MOST_ROUNDS]
        server.serve(streams, x)
        served += len(streams)
        taken = time.perf_counter() - begin
        if taken >= seconds:
            return served / taken


def delays(server: Server, x: np.ndarray, rate: float, seconds: float, seed: int) -> np.ndarray:
    """Seconds from arrival to output of each frame, at `rate` frames per second and stream."""
    draw = np.random.default_rng(seed)
    count = max(1, round(rate * len(x) * seconds))
    arrivals = np.sort(draw.uniform(0, seconds, count))
    streams = draw.integers(len(x), size=count)
    taken = np.empty(count)
    waiting = np.empty(0, int)  # a frame that came before the output of the last one of its stream
    arrived, begin = 0, time.perf_counter()
    while arrived < count or len(waiting):
        now = time.perf_counter() - begin
        until = int(np.searchsorted(arrivals, now, "right"))
        waiting = np.concatenate([waiting, np.arange(arrived, until)])
        arrived = until
        if not len(waiting):
            time.sleep(0)  # another thread may take the GIL
            continue
        first = np.sort(np.unique(streams[waiting], return_index=True)[1])
        frames = waiting[first]
        server.serve(streams[frames], x)
        taken[frames] = time.perf_counter() - begin - arrivals[frames]
        waiting = np.delete(waiting, first)
    return taken


def together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results of calls in a thread each."""
    results: list[Any] = [None] * len(calls)

    def run(k: int) -> None:
        results[k] = calls[k]()

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(calls))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return results


def measure(
    name: str, servers: Sequence[Server], streams: int, width: int, rate: float, seconds: float
) -> Row:
    draw = np.random.default_rng(0)
    shares = np.array_split(draw.normal(size=(streams, width)).astype("float32"), len(servers))
    pairs = list(zip(servers, shares, strict=True))
    for server, x in pairs:
        server.serve(np.arange(len(x)), x)
    most = together([partial(frames_per_second, s, x, seconds) for s, x in pairs])
    taken = together([partial(delays, s, x, rate, seconds, k) for k, (s, x) in enumerate(pairs)])
    low, high, highest = 1e3 * np.quantile(np.concatenate(taken), [0.5, 0.99, 0.999])
    megabytes = sum(server.nbytes for server in servers) / 1e6
    return Row(name, megabytes, float(sum(most)), (float(low), float(high), float(highest)))


HEAD = """\
| server | weights, MB | frames per second | delay of a frame, ms: half | 99 % | 99.9 % |
|---|---|---|---|---|---|"""


def conditions(given: argparse.Namespace) -> str:
    return (
        f"{given.cell.upper()} of {given.layers} layers, I = {given.inputs}, H = {given.hidden}; "
        f"{given.streams} streams on {given.threads} threads, {given.rate:g} frames per second "
        f"each, {given.rate * given.streams:,.0f} in all"
    )


def page(rows: Sequence[Row], given: argparse.Namespace, command: str) -> str:
    return (
        "# Many streams\n\n"
        f"{store.made_by(command)} {conditions(given)}. The delays are those from "
        "arrival to output; frames per second are those of servers that never wait.\n\n"
        + "\n".join([HEAD, *(row.line for row in rows)])
        + "\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slots", description=__doc__)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2, help="of all servers together")
    parser.add_argument("--rate", type=float, default=10, help="frames per second of a stream")
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--cell", choices=LAYERS, default="lstm")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--inputs", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--save", action="store_true", help="write the table to the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of all machines")
    given = parser.parse_args(arguments)
    if not 1 <= given.threads <= given.streams:
        parser.error("--threads should be at least 1 and at most the number of streams")
    layer = LAYERS[given.cell](given.inputs, given.hidden, num_layers=given.layers)
    share = -(-given.streams // given.threads)
    each = range(given.threads)
    kinds: dict[str, Callable[[], Sequence[Server]]] = {
        "slots": lambda: [InSlots(layer, share) for _ in each],
        "slots, one object": lambda: [InSlots(layer, given.streams, given.threads)],
        "a stepper for each stream": lambda: [OneStepperEach(layer, share) for _ in each],
    }
    print(conditions(given))
    print(HEAD)
    rows = []
    for name, make in kinds.items():
        sizes = given.streams, given.inputs, given.rate, given.seconds
        rows.append(measure(name, make(), *sizes))
        print(rows[-1].line, flush=True)
    if given.save:
        words = sys.argv[1:] if arguments is None else arguments
        text = page(rows, given, store.command("benchmarks.slots", words))
        store.save_page(given.results, "slots.md", text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
