"""The folder where compiled cells, generated sources and what was measured are kept.

Libraries and sources from it run as code. So they are taken only from a folder and files that are
the user's own and that nobody else can write, replace or rename. Environment: `FASTRNN_CACHE` names
the folder, `~/.cache/fastrnn` by default.
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
    """Where things are kept, without symbolic links in it.

    Where that folder cannot be written, it is one for this process alone; where it cannot be
    trusted, too, and a warning says why.

    Raises:
        OSError: where there is no folder to be trusted for temporary files either.
    """
    named = os.environ.get("FASTRNN_CACHE", "")
    try:
        found = Path(named or "~/.cache/fastrnn").expanduser().resolve()
        reason = _make(found) or refusal(found)
        if reason is None:
            with tempfile.TemporaryFile(dir=found):
                return found
    except (OSError, RuntimeError):  # the latter: there is no home, or links lead in a circle
        return _for_this_process()
    private = _for_this_process()
    warn_once(
        f"fastrnn loads no code from {found}: {reason}. What this process compiles is kept in "
        f"{private} until it ends. Put that right, or name a folder of your own in FASTRNN_CACHE"
    )
    return private


@functools.cache
def warn_once(text: str) -> None:
    """Warn, once for each text."""
    warnings.warn(text, UserWarning, stacklevel=3)


def is_private(path: Path) -> bool:
    """Whether that folder is for this process alone."""
    return _private.cache_info().currsize > 0 and path == Path(_private().name).resolve()


def refusal(path: Path) -> str | None:
    """Why nothing in that folder may be run as code, or None.

    `path` is absolute and without symbolic links. The folders around it count as well, up to the
    user's home: who can rename one of them can put another one in its place.
    """
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        return f"{path} is no folder"
    return _owner_refusal(path, status) or _mode_refusal(path, status) or _around(path)


def file_refusal(path: Path) -> str | None:
    """Why a file in `folder()` may not be run as code, or None.

    Raises:
        FileNotFoundError: where there is none.
    """
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        return f"{path} is no regular file"
    return _owner_refusal(path, status) or _mode_refusal(path, status)


@contextlib.contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to make it in; its name begins like that of the target."""
    with tempfile.TemporaryDirectory(
        dir=target.parent, prefix=f"{_BUILDING}{target.name}-"
    ) as work:
        yield Path(work)


def write(path: Path, text: str) -> None:
    """Write a file of `folder()`, which other processes see whole or not at all."""
    with work_folder(path) as work:
        made = work / path.name
        made.write_text(text, encoding="utf-8")
        made.chmod(0o600)
        os.replace(made, path)


@contextlib.contextmanager
def locked(target: Path, waits: Callable[[], None]) -> Iterator[None]:
    """Hold the right to make `target`, as one process and one thread at a time does.

    `waits` is called once, before others are waited for. When the holder dies, the right is free
    again. On a file system without locks everyone has it.
    """
    path = target.with_name(f"{target.name}.lock")
    descriptor, alone = _lock(path, waits)
    try:
        for left in target.parent.glob(f"{_BUILDING}{target.name}-*") if alone else ():
            shutil.rmtree(left, ignore_errors=True)  # of one that was killed
        yield
    finally:
        # Removed while it is held, so that nobody else holds it at this moment.
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        with contextlib.suppress(OSError):  # where there are no locks
            # By hand, as a process that was forked meanwhile keeps the file open.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _lock(path: Path, waits: Callable[[], None]) -> tuple[int, bool]:
    """The open file, and whether it is locked: not where the file system has no locks."""
    said = False  # it may have to wait for several, one after the other
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not said:
                    waits()
                said = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError:
                return descriptor, False
            # The last holder removed the file that this one waited at: others are at a new one.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                    return descriptor, True
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _make(path: Path) -> str | None:
    """Make the folder; where those around it cannot be trusted, say why and make nothing, so that
    root leaves no folders in the home of another user."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    reason = _around(missing[-1]) if missing else None
    if reason is None:
        for each in reversed(missing):
            each.mkdir(mode=0o700, exist_ok=True)
    return reason


def _around(path: Path) -> str | None:
    """Why the folders around `path` may be changed by others, or None."""
    home = _home(os.geteuid())
    for place in path.parents if path != home else ():
        status = os.lstat(place)
        if status.st_uid != 0 and (reason := _owner_refusal(place, status)):
            return reason
        # In a folder like /tmp nobody can rename what belongs to another.
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
    """Whether only a group of the user's own name can write, as where the umask is 002."""
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
    """Removed when the process ends, by when the libraries in it are loaded."""
    return tempfile.TemporaryDirectory(prefix="fastrnn-")
