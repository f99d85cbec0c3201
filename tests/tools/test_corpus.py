"""The text that the demo trains on."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from fastrnn.tools.corpus import Corpus


def test_standard_library_is_text_enough() -> None:
    corpus = Corpus.standard_library()
    assert len(corpus.codes) > 1_000_000
    assert len(corpus.symbols) > 90
    head = corpus.decode(corpus.codes[:2000].tolist())
    assert corpus.decode(corpus.encode(head.replace("    ", "\t"))[0].tolist()) == head
    word = corpus.encode("self.")[0]
    assert (corpus.codes.unfold(0, len(word), 1) == word).all(1).sum() > 1000


def test_no_sources_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="pass a text with --text"):
        Corpus.standard_library()
