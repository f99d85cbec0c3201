"""The folder of the cache: which files may be used, and which process waits."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastrnn import cache

OTHER = 54321  # a user and a group of no process here
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that FASTRNN_CACHE names, three levels below an existing one."""
    named = tmp_path / "a" / "b" / "cache"
    monkeypatch.setenv("FASTRNN_CACHE", str(named))
    return named


def given_to_another(path: Path) -> None:
    os.chown(path, OTHER, OTHER)


def shared(mode: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        if mode & stat.S_IWGRP and os.geteuid() == 0:
            os.chown(path, -1, OTHER)  # the group of a user's own name is for this user alone
        path.chmod(mode)

    return change


def test_a_new_folder_is_for_its_user_alone(named: Path) -> None:
    before = os.umask(0)
    try:
        assert cache.folder() == named
    finally:
        os.umask(before)
    for made in (named, named.parent, named.parent.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert cache.refusal(named) is None
    assert not cache.is_private(named)


def test_without_a_name_it_is_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTRNN_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "fastrnn"


REFUSED = {
    "own, group may write": (0, shared(0o770), "others can write to .*/cache, of mode 770.*chmod"),
    "own, all may write": (0, shared(0o707), "others can write to .*/cache, of mode 707"),
    "own, all may write, sticky": (0, shared(0o1777), "/cache, of mode 1777"),
    "own, another's": (0, given_to_another, f"/cache belongs to user number {OTHER}"),
    "around, all may write": (1, shared(0o777), "others can write to .*/b, of mode 777"),
    "far around, all may write": (2, shared(0o777), "others can write to .*/a, of mode 777"),
    "around, another's": (1, given_to_another, f"/b belongs to user number {OTHER}"),
    "far around, another's": (2, given_to_another, f"/a belongs to user number {OTHER}"),
}
# Only root can change group and owner to those of others.
NEEDS_ROOT = [name for name in REFUSED if "another's" in name]


@pytest.mark.parametrize("how", REFUSED)
def test_a_folder_that_others_can_change_is_refused(named: Path, how: str) -> None:
    if how in NEEDS_ROOT and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    up, change, reason = REFUSED[how]
    assert cache.folder() == named
    (named / "kept").write_text("")
    change((named, *named.parents)[up])
    with pytest.warns(UserWarning, match=rf"loads no code from {named}: .*{reason}.*FASTRNN_CACHE"):
        private = cache.folder()
    assert private != named
    assert cache.is_private(private)
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns once
        assert cache.folder() == private


@as_root
def test_a_group_that_others_are_in_is_refused_around_it_too(named: Path) -> None:
    assert cache.folder() == named
    named.parent.chmod(0o775)
    assert cache.refusal(named) is None  # root's own group may write, as with umask 002
    shared(0o775)(named.parent)
    assert "others can write to" in str(cache.refusal(named))


def test_a_sticky_folder_around_is_as_good_as_tmp(named: Path) -> None:
    assert cache.folder() == named
    named.parent.chmod(0o1777)
    assert cache.folder() == named


def test_a_folder_that_is_changed_later_is_refused_then(named: Path) -> None:
    assert cache.folder() == named
    named.chmod(0o777)
    with pytest.warns(UserWarning, match="loads no code"):
        assert cache.folder() != named
    named.chmod(0o700)
    assert cache.folder() == named


@as_root
def test_a_link_counts_as_what_it_leads_to(named: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    given_to_another(tmp_path / "theirs")
    named.parent.mkdir(parents=True)
    named.symlink_to(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="theirs belongs to"):
        assert cache.is_private(cache.folder())


def test_a_link_to_a_folder_of_ones_own_is_followed_once(named: Path, tmp_path: Path) -> None:
    """The checked folder is the one used, even if the link is changed afterwards."""
    (tmp_path / "mine").mkdir(mode=0o700)
    named.parent.mkdir(parents=True)
    named.symlink_to(tmp_path / "mine")
    assert cache.folder() == tmp_path / "mine"


@as_root
def test_root_makes_nothing_in_the_home_of_another(named: Path) -> None:
    home = named.parent.parent
    home.mkdir()
    given_to_another(home)
    with pytest.warns(UserWarning, match=f"{home} belongs to"):
        assert cache.is_private(cache.folder())
    assert os.listdir(home) == []


def test_a_folder_that_cannot_be_is_replaced(named: Path) -> None:
    named.parent.mkdir(parents=True)
    named.touch()
    with pytest.warns(UserWarning, match="cache is no folder"):
        assert cache.is_private(cache.folder())
    named.unlink()
    named.parent.rmdir()
    named.parent.touch()
    assert cache.is_private(cache.folder())


def test_a_temporary_folder_that_others_can_change_is_no_way_out(
    named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir(mode=0o700)
    (tmp_path / "tmp").chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    cache._private.cache_clear()
    try:
        named.parent.parent.mkdir()
        named.parent.touch()
        with pytest.raises(PermissionError, match=r"tmp, of mode 777.*another TMPDIR"):
            cache.folder()
    finally:
        cache._private.cache_clear()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user can reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_another_user(what: Callable[[], object]) -> str:
    """The result of `what` in a process of that user."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(OTHER)
            os.setuid(OTHER)
            os.write(writer, str(what()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as answer:
        return answer.read()


@as_root
def test_another_user_takes_nothing_from_root(open_folder: Path) -> None:
    root, theirs = open_folder / "root", open_folder / "theirs"
    for folder in (root, theirs):
        folder.mkdir(mode=0o755)
        (folder / "a.so").touch(mode=0o644)
    given_to_another(theirs)
    reason = as_another_user(lambda: cache.refusal(root))
    assert reason == f"{root} belongs to user 'root', not to you"
    assert "belongs to user 'root'" in as_another_user(lambda: cache.file_refusal(root / "a.so"))
    # The folders around it may be root's.
    assert as_another_user(lambda: cache.refusal(theirs)) == "None"


def test_a_file_that_others_can_change_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.so"
    with pytest.raises(FileNotFoundError):
        cache.file_refusal(path)
    path.touch(mode=0o700)
    assert cache.file_refusal(path) is None
    for mode in (0o720, 0o702):
        path.chmod(mode)
        assert f"of mode {mode:o}" in str(cache.file_refusal(path))
    path.chmod(0o755)
    assert cache.file_refusal(path) is None
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert "is no regular file" in str(cache.file_refusal(path))


@as_root
def test_a_file_of_another_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.so"
    path.touch(mode=0o700)
    given_to_another(path)
    assert cache.file_refusal(path) == f"{path} belongs to user number {OTHER}, not to you"


def test_what_is_written_is_for_its_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        cache.write(tmp_path / "a.py", "one")
        cache.write(tmp_path / "a.py", "two")
    finally:
        os.umask(before)
    assert (tmp_path / "a.py").read_text() == "two"
    assert cache.file_refusal(tmp_path / "a.py") is None
    assert os.listdir(tmp_path) == ["a.py"]


def test_one_at_a_time_makes_a_target(tmp_path: Path) -> None:
    inside, most, waited = [], [], []

    def make(number: int) -> None:
        with cache.locked(tmp_path / "a.so", lambda: waited.append(number)):
            inside.append(number)
            most.append(len(inside))
            while not waited and len(inside) == 1:  # until another wants the target too
                time.sleep(0.001)
            for _ in range(20):
                os.sched_yield()
            inside.remove(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make, range(64)))
    assert len(most) == 64
    assert max(most) == 1
    assert waited
    assert os.listdir(tmp_path) == []


HOLDER = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("cache", sys.argv[1])
cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cache)
from pathlib import Path
target = Path(sys.argv[2])
with cache.locked(target, lambda: None), cache.work_folder(target) as work:
    (work / "half").touch()
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_right_of_a_process_that_is_killed_is_free_again(tmp_path: Path) -> None:
    target = tmp_path / "a.so"
    command = [sys.executable, "-c", HOLDER, cache.__file__, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert len(os.listdir(tmp_path)) == 2
        waited = []

        def kill() -> None:
            waited.append(True)
            holder.send_signal(signal.SIGKILL)

        with cache.locked(target, kill):
            assert waited
            assert os.listdir(tmp_path) == ["a.so.lock"]  # and its half-made target is gone
    assert os.listdir(tmp_path) == []


def test_without_locks_everyone_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    target = tmp_path / "a.so"
    first = cache.locked(target, lambda: None)
    with first, cache.work_folder(target), cache.locked(target, lambda: None):
        assert len(os.listdir(tmp_path)) == 2  # files that another process makes are left alone
    assert os.listdir(tmp_path) == []
