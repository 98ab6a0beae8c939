"""Who can change a file: what an engine believes, or executes on the host, must be root's or its own user's.

A path is followed name by name, for whoever may write to a directory, or owns a link, decides where the rest of the
path leads. A name is safe when it belongs to root or to the effective user and neither group nor others may write to
it. A directory above with the sticky bit, such as /tmp, may be writable: what lies in it can be removed and renamed by
its owner alone. ACLs need no look of their own: the group bits of a file that has one are the most that it grants
anybody but the owner. No group counts as root's, not even its own: who is a member may change any day.

Imports little: a daemon asks before it imports pydantic.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import stat
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from sandboxd.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Name", "check", "check_daemons_file", "check_embedded_file", "check_interpreter", "check_opened", "way"]

_MOST_LINKS: Final = 40  # as the kernel: MAXSYMLINKS
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_CONFIG_BYTES: Final = 1 << 16


class Name(NamedTuple):
    """One name on the way."""

    path: Path
    status: os.stat_result
    last: bool
    """Nothing comes after it."""
    led: bool
    """It is on the way because a link leads there."""


def way(path: str | Path) -> Iterator[Name]:
    """Each name that decides what the absolute *path* is, from / on: directories, links, and what those lead to. Raises
    OSError.
    """
    one, pending, followed = Path("/"), list(Path(path).parts[1:]), 0
    yield Name(one, one.lstat(), not pending, led=False)
    while pending:
        one = one / pending.pop(0)
        if one.name == "..":
            one = one.parent.parent
            continue
        status = one.lstat()
        leads_to = Path(os.readlink(one)) if stat.S_ISLNK(status.st_mode) else None
        yield Name(one, status, leads_to is None and not pending, led=followed > 0)
        if leads_to is not None:
            followed += 1
            if followed > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(one))
            pending[:0] = leads_to.parts[1:] if leads_to.is_absolute() else leads_to.parts
            one = Path("/") if leads_to.is_absolute() else one.parent


def check(path: str | Path, key: str | None = None) -> None:
    """Raises PolicyError, for *key* if given, when others than root and the effective user could change what *path* is;
    OSError when it cannot be looked at. A relative path is followed from the working directory.
    """
    path = Path(os.getcwd(), path)
    for name in way(path):
        if flaw := _flaw(name.path, name.status, above=not name.last):
            if key is not None:
                raise PolicyError(f"{key}: {name.path} {flaw}.", key=key)
            what = "it" if name.path == path else name.path
            raise PolicyError(f"{what} {flaw}.", file=str(path))


def check_daemons_file(file: Path, fd: int) -> None:
    """``check`` *file*, which is open as *fd*. Raises PolicyError, OSError."""
    check(file)
    # Of two files that had this name in turn, the one that was opened counts, too.
    check_opened(file, fd)


def check_opened(file: Path, fd: int) -> None:
    """Raises PolicyError when others than root and the effective user may write to what is open as *fd*."""
    if flaw := _flaw(file, os.fstat(fd), above=False):
        raise PolicyError(f"it {flaw}.", file=str(file))


def check_embedded_file(file: Path, fd: int) -> None:
    """For the file that a program names to an engine of its own: root's engine refuses one that is another user's, who
    would get root's rights by it. Any other user is warned.

    Only the file that was opened counts, and not the way to it: the program chose that. sudo's caller is another user.
    A user's group may write unwarned, for with a umask of 002 each user has a group of their own.
    """
    try:
        check_opened(file, fd)
    except PolicyError as problem:
        if os.geteuid() == 0:
            raise
        status = os.fstat(fd)
        if status.st_uid == os.geteuid() and status.st_gid == os.getegid() and not status.st_mode & stat.S_IWOTH:
            return
        warnings.warn(str(problem), stacklevel=5)  # where the Sandbox is made


def check_interpreter(path: str, key: str) -> None:
    """``check`` what decides what the interpreter *path* does when it is started: itself, its virtual environment, and
    the directories of its library, though not every file there. Raises PolicyError for *key*, OSError.
    """
    check(path, key)
    pending, seen = [Path(path).parent, Path(os.path.realpath(path)).parent], set[Path]()
    while pending:
        directory = pending.pop()
        if directory in seen:
            continue
        seen.add(directory)
        check(directory, key)
        prefix = directory.parent
        for marker in (directory / "pyvenv.cfg", prefix / "pyvenv.cfg"):
            if marker.exists():
                check(marker, key)
                pending += _home(marker)
        for library in prefix.glob("lib/python3*"):
            check(library, key)
            if (packages := library / "site-packages").exists():
                check(packages, key)


def _home(marker: Path) -> list[Path]:
    """Where the interpreter lies that a virtual environment was made of."""
    with marker.open("rb") as file:
        text = file.read(_CONFIG_BYTES).decode("utf-8", "replace")
    found = re.search(r"^home\s*=\s*(/.*?)\s*$", text, re.MULTILINE | re.IGNORECASE)
    return [Path(found[1])] if found else []


def _flaw(path: Path, status: os.stat_result, *, above: bool) -> str:
    """How others could change *path*, and the remedy; "" when they cannot. *above*: something in it is meant."""
    link, mode = stat.S_ISLNK(status.st_mode), stat.S_IMODE(status.st_mode)
    if status.st_uid not in (0, os.geteuid()):
        who = "root" if os.geteuid() == 0 else f"root or uid {os.geteuid()}"
        command = f"chown {'-h ' if link else ''}root {shlex.quote(str(path))}"
        moved = ", or keep what lies in it where root alone writes" if above and not link else ""
        return f"belongs to uid {status.st_uid}, not to {who}. Fix: {command}{moved}"
    if link or not mode & _OTHERS_WRITE or (above and mode & stat.S_ISVTX):
        return ""
    return f"can be written by others (mode {mode:04o}). Fix: chmod go-w {shlex.quote(str(path))}"
