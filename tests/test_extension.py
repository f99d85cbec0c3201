"""Messages if the extension was not built, or was built for another torch."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from fastrnn import extension


def test_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastrnn._C", None)
    with pytest.raises(ImportError, match=r"was not built.*--no-build-isolation"):
        extension.load()


def test_built_with_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    older: object = SimpleNamespace(built_for="2.3.1+cpu")
    monkeypatch.setitem(sys.modules, "fastrnn._C", older)
    with pytest.raises(ImportError, match=r"built with torch 2\.3\.1\+cpu, but torch "):
        extension.load()


def test_a_patch_release_of_torch_is_no_other_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    minor = ".".join(torch.__version__.split(".")[:2])
    newer: object = SimpleNamespace(built_for=f"{minor}.97+rocm")
    monkeypatch.setitem(sys.modules, "fastrnn._C", newer)
    assert extension.load() is newer
