"""The folder that stores compiled cells, generated sources and measured configurations.

Libraries and sources from it run as code, so the folder and its files must belong to the user, and
nobody else may be able to write, replace or rename them. The environment variable `FASTRNN_CACHE`
names the folder; the default is `~/.cache/fastrnn`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import grp
import os
import pwd
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = [
    "file_refusal",
    "folder",
    "is_private",
    "locked",
    "refusal",
    "warn_once",
    "work_folder",
    "write",
]

_BUILDING = "building-"
_SHARED = stat.S_IWGRP | stat.S_IWOTH


def folder() -> Path:
    """The path of the cache, without symbolic links.

    If that folder cannot be written or trusted, it is a private folder of this process. If it
    cannot be trusted, a warning says why.

    Raises:
        OSError: if the folder for temporary files cannot be trusted either.
    """
    named = os.environ.get("FASTRNN_CACHE", "")
    try:
        path = Path(named or "~/.cache/fastrnn").expanduser().resolve()
        reason = _make(path) or refusal(path)
        if reason is None:
            with tempfile.TemporaryFile(dir=path):
                return path
    except (OSError, RuntimeError):  # RuntimeError: there is no home, or links form a circle
        return _for_this_process()
    private = _for_this_process()
    warn_once(
        f"fastrnn loads no code from {path}: {reason}. What this process compiles is kept in "
        f"{private} until it ends. Put that right, or name a folder of your own in FASTRNN_CACHE"
    )
    return private


@functools.cache
def warn_once(text: str) -> None:
    """Issue a UserWarning, once for each text."""
    warnings.warn(text, UserWarning, stacklevel=3)


def is_private(path: Path) -> bool:
    """Whether this is the private folder of this process."""
    return _private.cache_info().currsize > 0 and path == Path(_private().name).resolve()


def refusal(path: Path) -> str | None:
    """Why files in this folder must not run as code, or None.

    `path` is absolute and without symbolic links. The parent folders up to the user's home count
    too: a user who can rename one of them can put another in its place.
    """
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        return f"{path} is no folder"
    return _owner_refusal(path, status) or _mode_refusal(path, status) or _around(path)


def file_refusal(path: Path) -> str | None:
    """Why a file in `folder()` must not run as code, or None.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        return f"{path} is no regular file"
    return _owner_refusal(path, status) or _mode_refusal(path, status)


@contextlib.contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` in which to build it; its name contains the target's."""
    with tempfile.TemporaryDirectory(
        dir=target.parent, prefix=f"{_BUILDING}{target.name}-"
    ) as work:
        yield Path(work)


def write(path: Path, text: str) -> None:
    """Write a file of `folder()` atomically: other processes see it complete or not at all."""
    with work_folder(path) as work:
        temporary = work / path.name
        temporary.write_text(text, encoding="utf-8")
        temporary.chmod(0o600)
        os.replace(temporary, path)


@contextlib.contextmanager
def locked(target: Path, waits: Callable[[], None]) -> Iterator[None]:
    """Hold the lock for building `target`, which only one thread of one process has at a time.

    `waits` is called once before waiting for another holder. If the holder dies, the lock is free
    again. On a file system without locks, everyone gets it.
    """
    path = target.with_name(f"{target.name}.lock")
    descriptor, alone = _lock(path, waits)
    try:
        for left in target.parent.glob(f"{_BUILDING}{target.name}-*") if alone else ():
            shutil.rmtree(left, ignore_errors=True)  # a killed process left it behind
        yield
    finally:
        # The file is removed under the lock, so nobody else holds it at this moment.
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        with contextlib.suppress(OSError):  # the file system may have no locks
            # An explicit unlock, because a process forked meanwhile keeps the file open.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _lock(path: Path, waits: Callable[[], None]) -> tuple[int, bool]:
    """The open file, and whether it is locked, which needs a file system with locks."""
    reported = False  # `waits` is called once, even if it waits for several holders in turn
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not reported:
                    waits()
                reported = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError:
                return descriptor, False
            # If the last holder removed this file, other processes lock a new one: try again.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                    return descriptor, True
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _make(path: Path) -> str | None:
    """Create the folder. If its parents cannot be trusted, return why and create nothing, so that
    root leaves no folders in another user's home."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    reason = _around(missing[-1]) if missing else None
    if reason is None:
        for parent in reversed(missing):
            parent.mkdir(mode=0o700, exist_ok=True)
    return reason


def _around(path: Path) -> str | None:
    """Why other users can change the parent folders of `path`, or None."""
    home = _home(os.geteuid())
    for place in path.parents if path != home else ():
        status = os.lstat(place)
        if status.st_uid != 0 and (reason := _owner_refusal(place, status)):
            return reason
        # In a folder with the sticky bit, like /tmp, nobody can rename another user's files.
        guarded = status.st_mode & stat.S_ISVTX or _for_this_user_alone(status)
        if not guarded and (reason := _mode_refusal(place, status)):
            return reason
        if place == home:
            break
    return None


def _owner_refusal(path: Path, status: os.stat_result) -> str | None:
    if status.st_uid == os.geteuid():
        return None
    try:
        name = f"user {pwd.getpwuid(status.st_uid).pw_name!r}"
    except KeyError:
        name = f"user number {status.st_uid}"
    return f"{path} belongs to {name}, not to you"


def _mode_refusal(path: Path, status: os.stat_result) -> str | None:
    if not status.st_mode & _SHARED:
        return None
    mode = stat.S_IMODE(status.st_mode)
    return f"others can write to {path}, of mode {mode:o} (chmod go-w changes that)"


def _for_this_user_alone(status: os.stat_result) -> bool:
    """Whether at most the user's own private group can write, as with a umask of 002."""
    if status.st_mode & stat.S_IWOTH:
        return False
    try:
        group, user = grp.getgrgid(status.st_gid), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    alone = set(group.gr_mem) <= {user.pw_name}
    return alone and (group.gr_name, group.gr_gid) == (user.pw_name, user.pw_gid)


@functools.cache
def _home(user: int) -> Path | None:
    try:
        return Path(pwd.getpwuid(user).pw_dir).resolve()
    except (KeyError, OSError, RuntimeError):
        return None


def _for_this_process() -> Path:
    path = Path(_private().name).resolve()
    reason = refusal(path)
    if reason is not None:
        raise PermissionError(f"temporary files are not safe: {reason}; name another TMPDIR")
    return path


@functools.cache
def _private() -> tempfile.TemporaryDirectory[str]:
    """The private folder, which is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="fastrnn-")
