"""The choice of the extension's file, and the messages if there is none for this torch."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from fastrnn import extension

HERE = EXTENSION_SUFFIXES[0]
MINOR = ".".join(torch.__version__.split(".")[:2])


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def test_this_installation_has_a_binding_for_this_torch() -> None:
    assert MINOR in extension.bindings()
    compiled = extension._C
    assert compiled.__file__ == str(extension.choose(torch.__version__))
    assert compiled.built_for.split(".")[:2] == MINOR.split(".")
    from fastrnn import _C

    assert _C is compiled


def test_the_file_for_the_minor_version_is_chosen(tmp_path: Path) -> None:
    touch(tmp_path, f"_C.torch2.9{HERE}", f"_C.torch2.13{HERE}", f"_C.torch2.10{HERE}")
    touch(tmp_path, "_C.torch2.14.cpython-36m-sparc-linux-gnu.so", "_C.torch2.15.pyi", f"_C{HERE}")
    assert list(extension.bindings(tmp_path)) == ["2.9", "2.10", "2.13"]
    for version in ("2.10.0", "2.10.97+rocm", "2.10.0a0+git123"):
        assert extension.choose(version, tmp_path).name == f"_C.torch2.10{HERE}"


def test_not_built(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"was not built.*--no-build-isolation"):
        extension.load(tmp_path)
    touch(tmp_path, f"_C.torch{MINOR}.cpython-36m-sparc-linux-gnu.so")
    with pytest.raises(ImportError, match=r"was not built for this Python.*--no-build-isolation"):
        extension.load(tmp_path)


def test_no_binding_for_this_torch(tmp_path: Path) -> None:
    touch(tmp_path, f"_C.torch2.9{HERE}")
    with pytest.raises(ImportError) as one:
        extension.load(tmp_path)
    assert f"was built for torch 2.9, but torch {torch.__version__} is installed" in str(one.value)
    assert "Install torch 2.9, or build it for this torch" in str(one.value)
    assert "pip install --no-build-isolation --no-deps --force-reinstall ." in str(one.value)
    touch(tmp_path, f"_C.torch2.10{HERE}", f"_C.torch2.8{HERE}")
    with pytest.raises(ImportError, match=r"for torch 2\.8, 2\.9 and 2\.10, but"):
        extension.load(tmp_path)


def test_a_file_that_cannot_be_loaded(tmp_path: Path) -> None:
    touch(tmp_path, f"_C.torch{MINOR}{HERE}")
    reason = r"cannot be loaded with torch .*file too short.*build it"
    with pytest.raises(ImportError, match=reason):
        extension.load(tmp_path)
