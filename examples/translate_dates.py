"""Translate dates with attention: "Friday, 3rd of May 1996" becomes "1996-05-03".

The dates are made up, in ten spellings. A bidirectional LSTM reads the characters; the sequences of
a batch have different lengths, which `lengths=` says. A cell writes the ten characters of the ISO
date, and looks at the whole input before each of them.

    python examples/translate_dates.py
"""

from __future__ import annotations

import argparse
import datetime
import random
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastrnn

SPELLINGS = [
    *("%d.%m.%Y", "%m/%d/%Y", "{day} %B %Y", "{day} %b %Y", "%B {day}, %Y", "%b {day} %Y"),
    *("{day}{th} of %B %Y", "%A, {day} %B %Y", "%a {day}{th} %b, %Y", "%Y %B {day}"),
]
LETTERS = " ,./0123456789abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789-"
START = len(DIGITS)  # what the decoder reads before the first character


def spell(date: datetime.date, spelling: str) -> str:
    day = date.day
    th = "th" if 4 <= day <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return date.strftime(spelling.format(day=day, th=th)).lower()


def dates(count: int, draw: random.Random) -> tuple[list[str], list[str]]:
    """Random dates between 1900 and 2099, as people write them and in ISO's form."""
    first, last = datetime.date(1900, 1, 1).toordinal(), datetime.date(2099, 12, 31).toordinal()
    days = [datetime.date.fromordinal(draw.randint(first, last)) for _ in range(count)]
    return [spell(day, draw.choice(SPELLINGS)) for day in days], [day.isoformat() for day in days]


def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Codes [B, T] with zeros behind each text, and the lengths [B]."""
    codes = [torch.tensor([LETTERS.index(c) for c in text]) for text in texts]
    return nn.utils.rnn.pad_sequence(codes, True), torch.tensor([len(text) for text in texts])


class Translator(nn.Module):
    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.read = nn.Embedding(len(LETTERS), 32)
        self.encoder = fastrnn.LSTM(32, hidden // 2, bidirectional=True, batch_first=True)
        self.write = nn.Embedding(len(DIGITS) + 1, 32)
        self.decoder = fastrnn.LSTMCell(32 + hidden, hidden)
        self.query = nn.Linear(hidden, hidden)
        self.out = nn.Linear(2 * hidden, len(DIGITS))

    def forward(self, codes: Tensor, lengths: Tensor, target: Tensor | None = None) -> Tensor:
        """Scores [B, 10, 11] of the characters. With `target` [B, 10], each is told those before
        it; without, it reads what the model wrote."""
        memory, (h, c) = self.encoder(self.read(codes), lengths=lengths)
        state = h.transpose(0, 1).flatten(1), c.transpose(0, 1).flatten(1)  # both directions
        past_the_end = torch.arange(codes.size(1)) >= lengths[:, None]
        last = torch.full_like(lengths, START)
        context = torch.zeros_like(memory[:, 0])
        scores = []
        for t in range(10):
            state = self.decoder(torch.cat([self.write(last), context], -1), state)
            attention = (memory @ self.query(state[0])[:, :, None])[:, :, 0]
            attention = attention.masked_fill(past_the_end, float("-inf")).softmax(-1)
            context = (attention[:, None] @ memory)[:, 0]
            scores.append(self.out(torch.cat([state[0], context], -1)))
            last = scores[-1].argmax(-1) if target is None else target[:, t]
        return torch.stack(scores, 1)


def translate(model: Translator, texts: list[str]) -> list[str]:
    with torch.no_grad():
        written = model(*encode(texts)).argmax(-1)
    return ["".join(DIGITS[code] for code in row) for row in written.tolist()]


def main(quick: bool = False) -> float:
    """Returns the share of dates, drawn anew, that are translated without a mistake."""
    torch.manual_seed(0)
    draw = random.Random(0)
    model = Translator()
    steps, batch = (150, 64) if quick else (300, 128)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    start = time.perf_counter()
    for _ in range(steps):
        texts, iso = dates(batch, draw)
        target = torch.tensor([[DIGITS.index(c) for c in date] for date in iso])
        loss = cross_entropy(model(*encode(texts), target).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    print(f"trained for {steps} steps in {time.perf_counter() - start:.0f} s, loss {loss:.3f}")
    texts, iso = dates(1000, random.Random(1))
    found = translate(model, texts)
    for text, date, wanted in list(zip(texts, found, iso, strict=True))[:6]:
        print(f"  {text:28} {date}  {'' if date == wanted else f'should be {wanted}'}")
    accuracy = sum(a == b for a, b in zip(found, iso, strict=True)) / len(iso)
    print(f"{accuracy:.1%} of 1000 new dates are exactly right")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train for 150 smaller steps")
    main(parser.parse_args().quick)
