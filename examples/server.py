"""A server of many streams: one copy of the weights, and a slot for each connection.

A client opens a connection and sends frames of float32 numbers as they come. The server answers
each with the output of the layer. Frames of different connections that wait at the same time go
through the layer as one batch. The clients of this script send sequences at a random pace, all at
once, and compare the answers with one call of the layer: every bit is the same.

    python examples/server.py
    python examples/server.py --port 8765   only serve, until Ctrl-C
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time

import numpy as np
import torch

import fastrnn

Waiting = tuple[bytes, asyncio.Future[bytes]]  # a frame, and its answer


class Server:
    def __init__(self, slots: fastrnn.nn.stream.Slots) -> None:
        self.slots = slots
        self.waiting: dict[int, Waiting] = {}
        self.wake = asyncio.Event()
        self.batches: list[int] = []  # the number of frames of each step

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            slot = self.slots.add()
        except RuntimeError:  # all slots are taken
            writer.close()
            return
        try:
            while True:
                frame = await reader.readexactly(4 * self.slots.input_size)
                answer = asyncio.get_running_loop().create_future()
                self.waiting[slot] = frame, answer
                self.wake.set()
                writer.write(await answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            self.waiting.pop(slot, None)
            self.slots.remove(slot)
            writer.close()

    async def steps(self) -> None:
        """Run all frames that wait, again and again."""
        while True:
            await self.wake.wait()
            self.wake.clear()
            waiting, self.waiting = self.waiting, {}
            if not waiting:
                continue
            frames = b"".join(frame for frame, _ in waiting.values())
            x = np.frombuffer(frames, "float32").reshape(len(waiting), -1)
            y = self.slots.step(x, list(waiting))
            self.batches.append(len(waiting))
            for row, (_, answer) in zip(y, waiting.values(), strict=True):
                answer.set_result(row.tobytes())


async def client(port: int, x: np.ndarray, seed: int) -> np.ndarray:
    """Send the frames `x` [T, I] at a random pace; the answers [T, H], or fewer if refused."""
    draw = random.Random(seed)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answers = []
    try:
        for frame in x:
            await asyncio.sleep(draw.expovariate(1 / 0.002))
            writer.write(frame.tobytes())
            answers.append(np.frombuffer(await reader.readexactly(4 * HIDDEN), "float32"))
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # the server has no slot for this client
    writer.close()
    return np.array(answers)


async def serve(server: Server, port: int) -> tuple[asyncio.Server, asyncio.Task[None]]:
    sockets = await asyncio.start_server(server.connection, "127.0.0.1", port)
    return sockets, asyncio.create_task(server.steps())


async def together(server: Server, sequences: list[np.ndarray]) -> list[np.ndarray]:
    """The answers to clients that send a sequence each at the same time."""
    sockets, steps = await serve(server, 0)
    port = sockets.sockets[0].getsockname()[1]
    answers = await asyncio.gather(*(client(port, x, k) for k, x in enumerate(sequences)))
    steps.cancel()
    sockets.close()
    await sockets.wait_closed()
    return answers


INPUTS, HIDDEN = 16, 64


def main(quick: bool = False, port: int | None = None) -> dict[str, float]:
    """Returns what happened, in numbers."""
    torch.manual_seed(0)
    layer = fastrnn.LSTM(INPUTS, HIDDEN, num_layers=2).requires_grad_(False)
    clients = 10 if quick else 100
    server = Server(layer.stream_slots(clients))
    if port is not None:

        async def forever() -> None:
            sockets, steps = await serve(server, port)
            print(f"listening on 127.0.0.1:{port}: frames of {INPUTS} numbers, Ctrl-C ends")
            await asyncio.gather(sockets.serve_forever(), steps)

        asyncio.run(forever())
    draw = random.Random(0)
    lengths = [draw.randint(5, 15) if quick else draw.randint(100, 300) for _ in range(clients)]
    sequences = [torch.randn(length, INPUTS) for length in lengths]
    begin = time.perf_counter()
    answers = asyncio.run(together(server, [x.numpy() for x in sequences]))
    seconds = time.perf_counter() - begin
    for x, answer in zip(sequences, answers, strict=True):
        assert torch.equal(torch.from_numpy(answer), layer(x)[0])
    assert sum(server.batches) == sum(lengths) and len(server.slots) == 0
    found = {
        "clients": clients,
        "frames": sum(lengths),
        "steps": len(server.batches),
        "largest batch": max(server.batches),
        "frames per second": sum(lengths) / seconds,
    }
    print("each answer has the bits of one call of the layer")
    for name, value in found.items():
        print(f"{name:>20} {value:,.0f}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few and short sequences")
    parser.add_argument("--port", type=int, help="serve on this port and start no clients")
    options = parser.parse_args()
    main(options.quick, options.port)
