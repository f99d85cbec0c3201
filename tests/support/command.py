"""Calls the command line in this process."""

from __future__ import annotations

import pytest

from fastrnn import __main__


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = __main__.main(argv)
    out, err = capsys.readouterr()
    return code, out, err
