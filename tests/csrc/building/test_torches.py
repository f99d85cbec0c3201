"""The torch that the binding is compiled against: the installed one, or one in a folder."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from building import torches
from building.torches import Torch


def test_the_installed_torch() -> None:
    found = torches.found()
    assert found.version == torch.__version__ == torches.version()
    for folder, name in ((found.includes, "ATen/ATen.h"), (found.libraries, "libtorch.so")):
        assert any(Path(each, name).is_file() for each in folder)


def test_names() -> None:
    torch = Torch("2.9.1+cu130", (), ())
    assert torch.release == (2, 9) and torch.minor == "2.9"
    assert torch.folder.startswith("cp3") and torch.folder.endswith("-torch2.9.1+cu130")


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> NoReturn:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert torches.version() is None


def test_the_torch_of_another_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTRNN_TORCH", str(tmp_path))
    with pytest.raises(SystemExit, match="FASTRNN_TORCH is no folder of an installed torch"):
        torches.found()
    (tmp_path / "version.py").write_text("__version__ = '2.99.0+cpu'\n")
    found = torches.found()
    assert found.version == torches.version() == "2.99.0+cpu"
    assert all(each.startswith(str(tmp_path)) for each in found.includes + found.libraries)
