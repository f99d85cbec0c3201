"""Sentiment of text, where the order of words decides: an LSTM beside a bag of words.

A small grammar makes up reviews. Each praises one thing and blames another; "but" and "although"
say which of them counts, "not" turns the next judgement round, and "it is not true that" at the
beginning turns the whole review round, up to thirty words later. The same words in another order
make a review of the opposite sentiment, so a bag of words can learn nothing. The reviews of a batch
have different lengths, which `lengths=` says.

    python examples/sentiment.py
"""

from __future__ import annotations

import argparse
import random
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import fastrnn

THINGS = ["plot", "acting", "music", "camera", "ending", "pace", "cast", "story", "sound"]
GOOD = ["good", "great", "moving", "brilliant", "charming", "clever", "fresh", "gripping"]
BAD = ["bad", "dull", "weak", "awful", "boring", "clumsy", "stale", "tedious"]
NOT = ("not", "never", "hardly")
ASIDES = (
    *("that everybody told me about", "of the second part", "which my brother had seen before"),
    *("in the long version", "that the papers wrote of last week", "of this old director"),
)
VERY = ("", "very", "really", "quite")
WORDS = sorted(
    {"the", "is", "but", "although", ",", "it", "true", "that", *THINGS, *GOOD, *BAD, *NOT, *VERY}
    | {word for aside in ASIDES for word in aside.split()}
)
CODES = {word: code for code, word in enumerate(word for word in WORDS if word)}


def clause(good: bool, thing: str, draw: random.Random) -> str:
    """A judgement of a thing, in half of all cases by the opposite and a negation."""
    negated = draw.random() < 0.5
    aside = draw.choice(ASIDES) if draw.random() < 0.5 else ""
    words = draw.choice(GOOD if good != negated else BAD)
    return (
        f"the {thing} {aside} is {draw.choice(NOT) if negated else ''} {draw.choice(VERY)} {words}"
    )


def review(draw: random.Random, short: float = 0.0) -> tuple[str, bool]:
    """A text, and whether it is for the film. It has one clause alone with probability `short`."""
    praise = draw.random() < 0.5  # in the clause that counts
    counts, other = (
        clause(good, thing, draw)
        for good, thing in zip((praise, not praise), draw.sample(THINGS, 2), strict=True)
    )
    denied = draw.random() < 0.3
    pattern = draw.choice(("{1} , but {0}", "although {1} , {0}", "{0} , although {1}"))
    if draw.random() < short:
        pattern = "{0}"
    text = "it is not true that " * denied + pattern.format(counts, other)
    return " ".join(text.split()), praise != denied


def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Codes [B, T] with zeros behind each text, and the lengths [B]."""
    codes = [torch.tensor([CODES[word] for word in text.split()]) for text in texts]
    return nn.utils.rnn.pad_sequence(codes, True), torch.tensor([len(row) for row in codes])


class Reader(nn.Module):
    """From codes [B, T] to a score of each review [B]: positive if it is for the film."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(CODES), 32)
        self.rnn = fastrnn.LSTM(32, hidden, batch_first=True)
        self.out = nn.Linear(hidden, 1)

    def forward(self, codes: Tensor, lengths: Tensor) -> Tensor:
        _, (h_n, _) = self.rnn(self.embedding(codes), lengths=lengths)
        return self.out(h_n[-1])[:, 0]  # h_n has the state after the last word of each


class BagOfWords(nn.Module):
    """The same from the mean of the embeddings, which does not know the order."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(CODES), 32)
        self.out = nn.Sequential(nn.Linear(32, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, codes: Tensor, lengths: Tensor) -> Tensor:
        inside = torch.arange(codes.size(1)) < lengths[:, None]
        total = (self.embedding(codes) * inside[:, :, None]).sum(1)
        return self.out(total / lengths[:, None])[:, 0]


def train(model: nn.Module, steps: int) -> float:
    """Returns the seconds. Every batch has new reviews, the same for every model, half of them of
    one clause: they teach what the words and the negations mean."""
    draw = random.Random(0)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    start = time.perf_counter()
    for _ in range(steps):
        texts, target = zip(*(review(draw, 0.5) for _ in range(64)), strict=True)
        loss = binary_cross_entropy_with_logits(
            model(*encode(list(texts))), torch.tensor(target).float()
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return time.perf_counter() - start


def main(quick: bool = False) -> dict[str, float]:
    """Returns the share of 2000 new reviews whose sentiment each model names."""
    draw = random.Random(1)
    texts, target = zip(*(review(draw) for _ in range(2000)), strict=True)
    accuracies = {}
    for name, kind in (("bag of words", BagOfWords), ("fastrnn.LSTM", Reader)):
        torch.manual_seed(0)
        model = kind()
        seconds = train(model, 300 if quick else 600)
        with torch.no_grad():
            positive = model(*encode(list(texts))) > 0
        accuracies[name] = (positive == torch.tensor(target)).float().mean().item()
        print(f"{name:12}  {accuracies[name]:.1%} of 2000 new reviews, trained in {seconds:.0f} s")
    for text, found, right in list(zip(texts, positive.tolist(), target, strict=True))[:5]:
        print(f"  {'+' if found else '-'}{'' if found == right else ' (wrong)'}  {text}")
    return accuracies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train for 300 steps instead of 600")
    main(parser.parse_args().quick)
