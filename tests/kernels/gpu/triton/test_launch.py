"""When Triton is imported, and which generated sources are kept."""

from __future__ import annotations

import importlib.util
import os
import py_compile
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastrnn import cache, cells
from fastrnn.compiler.derive import derive
from fastrnn.kernels.gpu.triton import launch

pytestmark = pytest.mark.interpreter

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)


def test_triton_is_not_imported_until_it_runs() -> None:
    text = "import sys, fastrnn, torch; fastrnn.LSTM(2, 3)(torch.zeros(1, 1, 2));"
    text += "sys.exit('triton' in sys.modules and 'torch._inductor' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", text]).returncode == 0


def test_sources_are_kept_and_found_again() -> None:
    derived = derive(cells.get("lstm"))
    module = launch.cell_module(derived)
    assert module is launch.cell_module(replace(derived))
    assert isinstance(module.__file__, str) and os.path.isfile(module.__file__)


def test_what_is_kept_is_run_only_where_nobody_else_could_write_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path / "cache"))
    make = launch._cell_module.__wrapped__
    path = Path(str(make("taken = None\n", "kept").__file__))
    other = tmp_path / "other.py"
    other.write_text("taken = 'from beside it'\n")
    # An import would take this byte code without a look at the source.
    beside = importlib.util.cache_from_source(str(path))
    checked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(other), cfile=beside, invalidation_mode=checked)
    assert make("taken = None\n", "kept").taken is None

    path.chmod(0o777)
    assert make("taken = None\n", "kept").__file__ == str(path)
    assert cache.file_refusal(path) is None

    (tmp_path / "cache").chmod(0o777)
    with pytest.warns(UserWarning, match=r"loads no code from .*/cache: others can write"):
        elsewhere = Path(str(make("taken = None\n", "kept").__file__))
    assert tmp_path not in elsewhere.parents
