"""Each script of examples/ runs in its quick form, and its result is the one that it is about."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastrnn
from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


@pytest.fixture(autouse=True)
def alone() -> Any:
    """Undoes what a script may set for the whole process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_three_matrices(capsys: pytest.CaptureFixture[str]) -> None:
    differences = example("three_matrices").main(quick=True)
    assert set(differences) == {"one call", "readouts", "layer", "gradient", "step by step"}
    assert max(differences.values()) < 1e-13
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(differences)


@pytest.mark.takes(8)
def test_classify_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    script = example("classify_sequences")
    outcomes = script.main(quick=True)
    assert list(outcomes) == ["torch.nn", "fastrnn"]
    theirs, ours = outcomes.values()
    assert ours.accuracy > 0.7 and theirs.accuracy > 0.7  # a tenth is chance
    assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=1e-3), "they begin alike"
    assert ours.losses[-1] < ours.losses[0] / 2
    assert f"{ours.accuracy:.1%}" in capsys.readouterr().out


@pytest.mark.takes(6)
def test_forecast() -> None:
    pytest.importorskip("statsmodels")
    errors = example("forecast").main(quick=True)
    ours, *naive = errors.values()
    assert len(naive) == 2 and ours < 0.8 * min(naive)


@pytest.mark.takes(8)
def test_translate_dates(capsys: pytest.CaptureFixture[str]) -> None:
    script = example("translate_dates")
    assert script.main(quick=True) > 0.7
    shown = re.findall(r"\d{4}-\d\d-\d\d", capsys.readouterr().out)
    assert len(shown) >= 6
    day = script.datetime.date(1996, 5, 3)
    spelt = [script.spell(day, spelling) for spelling in script.SPELLINGS]
    assert spelt[0] == "03.05.1996" and "friday, 3 may 1996" in spelt
    assert len(set(spelt)) == 10 - 1  # the short form of May is May
    assert script.spell(script.datetime.date(2000, 1, 11), "{day}{th}") == "11th"
    assert script.spell(script.datetime.date(2000, 1, 22), "{day}{th}") == "22nd"


@pytest.mark.takes(6)
def test_sentiment(capsys: pytest.CaptureFixture[str]) -> None:
    accuracies = example("sentiment").main(quick=True)
    assert list(accuracies) == ["bag of words", "fastrnn.LSTM"]
    bag, ours = accuracies.values()
    assert ours > 0.95 and abs(bag - 0.5) < 0.06, "half is chance"
    assert f"{ours:.1%} of 2000 new reviews" in capsys.readouterr().out


def test_the_sentiment_of_a_review_depends_on_the_order_of_its_words() -> None:
    """The words of a review in another order make one of the opposite sentiment."""
    script = example("sentiment")
    draw = script.random.Random(0)
    judged: dict[tuple[str, ...], set[bool]] = {}
    judgements = 0
    for _ in range(3000):
        text, positive = script.review(draw)
        assert set(text.split()) <= set(script.CODES)
        kinds = dict.fromkeys(script.GOOD, "good") | dict.fromkeys(script.BAD, "bad")
        drop = set(script.THINGS) | set(script.VERY) | set(" ".join(script.ASIDES).split())
        words = [kinds.get(word, word) for word in text.split() if word not in drop - {"that"}]
        judged.setdefault(tuple(sorted(words)), set()).add(positive)
        # Read the text by rules: a denial, the clause that counts, its negation, its judgement.
        body = text.removeprefix("it is not true that ")
        first, _, second = body.removeprefix("although ").partition(" , ")
        clause = first if second.startswith("although") else second
        good = bool(set(clause.split()) & set(script.GOOD))
        negated = bool(set(clause.split()) & set(script.NOT))
        assert positive == ((good != negated) != (body != text))
        judgements += positive
    assert 1350 < judgements < 1650
    common = [found for found in judged.values() if len(found) == 2]
    assert len(common) > 30, "bags of words with reviews of both kinds"


@pytest.mark.takes(20)
def test_spoken_digits(capsys: pytest.CaptureFixture[str]) -> None:
    batch, stream = example("spoken_digits").main(quick=True)
    assert batch == stream > 0.8  # a tenth is chance
    assert f"{batch:.1%} of 500 digits in new voices" in capsys.readouterr().out


def test_spoken_vowels_have_their_formants() -> None:
    script = example("spoken_digits")
    script.DIGITS = ("iy iy iy", "aa aa aa")
    frequencies = torch.fft.rfftfreq(256, 1 / script.RATE)
    high, middle = frequencies > 1800, (frequencies > 600) & (frequencies < 1400)
    shares = []
    for vowel in range(2):
        sound = torch.from_numpy(script.speak(vowel, script.np.random.default_rng(0))).float()
        frames = sound.unfold(0, 256, 80) * torch.hann_window(256)
        power = torch.fft.rfft(frames).abs().square().sum(0)
        shares.append((power[high].sum() / power[middle].sum()).item())
    assert shares[0] > 3 * shares[1], "the second formant of iy is at 2290 Hz, that of aa at 1090"


def test_a_frame_of_speech_reads_no_later_sound() -> None:
    script = example("spoken_digits")
    sound = script.speak(3, script.np.random.default_rng(0))
    whole = script.log_mel(sound)
    assert whole.shape[1] == script.MELS and len(whole) > 20
    part = script.log_mel(sound[: 9 * script.HOP + script.FRAME])
    torch.testing.assert_close(part, whole[:10])


@pytest.mark.takes(6)
def test_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    results = example("gradients").main(quick=True)
    arriving = {name: arrived for name, (arrived, _) in results.items()}
    right = {name: accuracy for name, (_, accuracy) in results.items()}
    for name in ("RNN", "LSTM"):
        assert arriving[name] < 1e-6 and right[name] < 0.4, "a quarter is chance"
    assert arriving["relu RNN, large weights"] > 1e6
    assert arriving["RNN"] < 1e-3 * arriving["RNN, orthogonal"]
    gates = [arriving[f"LSTM{gate}"] for gate in ("", ", forget gate 1", ", forget gate 5")]
    assert gates == sorted(gates)
    for name in ("LSTM, forget gate 5", "LSTM, chrono", "LSTM, all treatments"):
        assert arriving[name] > 0.05 and right[name] > 0.9
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(results)


@pytest.mark.takes(10)
def test_recurrent_ppo(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sb3_contrib")
    script = example("recurrent_ppo")
    error, outcomes = script.main(quick=True)
    assert error < 1e-5
    assert list(outcomes) == ["loop of torch.nn", "one call of fastrnn"]
    for outcome in outcomes.values():
        assert outcome.learned > outcome.played > 0 and 8 < outcome.mean_return <= 500
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(outcomes)


def test_recurrent_ppo_processes_a_sequence_as_a_loop_does() -> None:
    process_sequence = example("recurrent_ppo").process_sequence
    lstm = fastrnn.LSTM(3, 5, num_layers=2)
    features, starts = torch.randn(4 * 7, 3), (torch.rand(4 * 7) < 0.3).float()
    states = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    output, last = process_sequence(features, states, starts, lstm)
    outputs = []
    for x, start in zip(features.view(4, 7, 3).unbind(1), starts.view(4, 7).unbind(1), strict=True):
        h, c = (s * (1 - start).view(1, 4, 1) for s in states)
        y, states = lstm(x.unsqueeze(0), (h, c))
        outputs.append(y[0])
    torch.testing.assert_close(output, torch.stack(outputs, 1).flatten(0, 1))
    torch.testing.assert_close(last, states)


def test_server(capsys: pytest.CaptureFixture[str]) -> None:
    found = example("server").main(quick=True)
    assert found["clients"] == 10 and found["frames"] >= found["steps"] >= 15
    assert "the bits of one call of the layer" in capsys.readouterr().out


def test_a_server_refuses_a_client_without_a_slot() -> None:
    script = example("server")
    layer = fastrnn.GRU(script.INPUTS, script.HIDDEN).requires_grad_(False)

    async def answers() -> list[Any]:
        server = script.Server(layer.stream_slots(2))
        return list(await script.together(server, [x.numpy() for x in sequences]))

    sequences = [torch.randn(20, script.INPUTS) for _ in range(3)]
    lengths = []
    for x, answer in zip(sequences, asyncio.run(answers()), strict=True):
        lengths.append(len(answer))
        if len(answer):
            assert torch.equal(torch.from_numpy(answer), layer(x)[0])
    assert sorted(lengths) == [0, 20, 20]


@pytest.mark.takes(15)
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_train_ddp() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(EXAMPLES / "train_ddp.py"), "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"2 processes, (\w+): largest difference (\S+)", done.stdout))
    assert set(found) == {"DDP", "FSDP2"}
    assert all(float(value) < 1e-5 for value in found.values())


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("classify_sequences", "scikit-learn"),
        ("forecast", "statsmodels"),
        ("recurrent_ppo", "sb3-contrib"),
    ],
)
def test_a_package_that_is_missing_is_named(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = example(name)
    for module in (
        "sklearn.datasets",
        "statsmodels.datasets",
        "sb3_contrib.ppo_recurrent.policies",
    ):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=f"pip install {package}"):
        script.main(quick=True)


def test_plots_are_saved(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    classify, forecast, gradients = map(example, ("classify_sequences", "forecast", "gradients"))
    flow = gradients.train(gradients.NETWORKS[0], 5, 1)[0]
    gradients.save(str(tmp_path / "flow.png"), {"RNN": flow})
    classify.save(
        str(tmp_path / "curves.png"),
        {name: classify.Outcome(0.5, 1.0, [2.0, 1.0]) for name in ("torch.nn", "fastrnn")},
    )
    forecast.save(str(tmp_path / "forecast.png"), [1, 2], torch.ones(2), torch.zeros(2))
    for name in ("flow", "curves", "forecast"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_plots_need_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("classify_sequences", "forecast", "gradients"):
        script = example(name)
        rest = inspect.signature(script.save).parameters.values()
        with pytest.raises(SystemExit, match="pip install matplotlib"):
            script.save("plot.png", *[None] * (len(rest) - 1))


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda f: f.stem)
def test_scripts_are_short_and_listed(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert '"--quick"' in text and "quick" in inspect.signature(example(file.stem).main).parameters
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert f" examples/{file.name}`" in listed
    assert ("--plot" in text) == (f"`{file.name}`" in listed), "the last line names these"
    assert f"`examples/{file.name}`" in (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) >= 10
