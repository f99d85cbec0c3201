"""How long it counts that a thread came late."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import programs

SOURCE = Path(__file__).with_name("contention.cpp")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("contention")
    return programs.compiled(SOURCE, folder, "cpu/contention.cpp")


@pytest.mark.parametrize(
    ("commands", "answers"),
    [
        ("lasts 5", "0"),
        ("late 100 lasts 100 lasts 104 lasts 105 lasts 1000", "1 1 0 0"),
        # Again: four times as long, however late that is.
        ("late 100 late 130 lasts 149 lasts 150 late 9000 lasts 9079 lasts 9080", "1 0 1 0"),
        # Again after threads ran undisturbed for as long as it lasted.
        ("late 100 undisturbed 3 undisturbed 2 late 150 lasts 154 lasts 155", "1 0"),
        ("late 100 undisturbed 3 undisturbed 1 late 150 lasts 169 lasts 170", "1 0"),
        ("late 100 undisturbed 4 late 150 undisturbed 16 late 300 lasts 379 lasts 380", "1 0"),
        # Again after a minute without a try.
        ("late 100 late 130 late 60149 lasts 60228 lasts 60229", "1 0"),
        ("late 100 late 130 late 60150 lasts 60154 lasts 60155", "1 0"),
        # A peer that is late while it lasts anyway does not count.
        ("late 100 late 102 late 104 lasts 104 lasts 105", "1 0"),
    ],
)
def test_how_long_it_lasts(program: tuple[str, ...], commands: str, answers: str) -> None:
    assert programs.run(*program, text=commands).split() == answers.split()


def test_it_lasts_two_seconds_at_most(program: tuple[str, ...]) -> None:
    time, commands = 100, ""
    for length in (5, 20, 80, 320, 1280, 2000, 2000):
        commands += f"late {time} lasts {time + length - 1} lasts {time + length} "
        time += length
    assert programs.run(*program, text=commands).split() == ["1", "0"] * 7
