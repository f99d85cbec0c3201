"""The benchmark of many streams, from end to end. No test asserts a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fastrnn
from benchmarks import slots
from fastrnn.tools.bench import store

SMALL = ["--streams", "6", "--layers", "1", "--inputs", "3", "--hidden", "8", "--seconds", "0.02"]


def test_the_table_is_printed_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert slots.main([*SMALL, "--cell", "gru", "--results", str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir()), "it writes only if asked"
    assert slots.main(["--save", *SMALL, "--save", "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    (file,) = tmp_path.glob("*/slots.md")
    text = file.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| s") and "weights" not in line]
    assert [row.split(" | ")[0] for row in rows] == ["| slots", "| slots, one object"]
    assert "| a stepper for each stream |" in text and all(row in printed for row in rows)
    assert "`python -m benchmarks.slots --save --streams 6" in text and text.count("--save") == 1
    assert "LSTM of 1 layers, I = 3, H = 8" in text
    assert file.parent == store.folder(tmp_path)


def test_both_servers_give_the_same_numbers() -> None:
    layer = fastrnn.LSTM(3, 8)
    ours, theirs = slots.InSlots(layer, 5), slots.OneStepperEach(layer, 5)
    x = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    for streams in ([0, 1, 2, 3, 4], [3, 1], [4], [2, 0, 3]):
        chosen = np.array(streams)
        ours.serve(chosen, x)
        theirs.serve(chosen, x)
        expected = torch.from_numpy(theirs.y[chosen])
        assert torch.equal(torch.from_numpy(ours.y[: len(chosen)]), expected)
    assert theirs.nbytes == 5 * ours.nbytes


class Recorder:
    nbytes = 0

    def __init__(self) -> None:
        self.served: list[list[int]] = []

    def serve(self, streams: np.ndarray, x: np.ndarray) -> None:
        self.served.append(streams.tolist())


def test_each_frame_is_served_once_and_a_stream_once_at_a_time() -> None:
    server, x = Recorder(), np.zeros((4, 3), "float32")
    taken = slots.delays(server, x, rate=1000, seconds=0.05, seed=0)
    assert sum(map(len, server.served)) == len(taken) == 200
    assert all(len(set(streams)) == len(streams) > 0 for streams in server.served)
    assert (taken >= 0).all() and np.isfinite(taken).all()
    server.served.clear()
    assert slots.frames_per_second(server, x, 0.0) > 0
    assert list(map(len, server.served)) == [2]


def test_an_impossible_number_of_threads() -> None:
    with pytest.raises(SystemExit):
        slots.main([*SMALL, "--threads", "7"])
