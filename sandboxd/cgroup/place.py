"""Where an engine keeps its cgroup directories, how they are named, and how they are held.

Theory of operation. Below a root directory (v1: the mount point; v2: home.py) an engine owns
``sandboxd.<pid>.<starttime>`` and holds flock(LOCK_EX) on it in each hierarchy for as long as it lives. On v1, and in
a v2 twin without controllers, it holds, flat:

    zygotes                 zygotes and their nurseries
    c<slot>.<generation>    the leaf of one cell

On v2 with controllers no process may live in an inner node, so the engine has a leaf, too; and the bounds of the whole
stand on ``cells``, so that the kernel never chooses the engine when their sum is met:

    engine                  the engine itself, unbounded
    cells                   with the engine's bounds
        zygotes
        c<slot>.<generation>

The kernel drops the lock when the engine dies, however it dies. ``sweep`` removes directories whose lock it gets and
whose owner, named by pid and start time, is not alive. The name protects between mkdir and flock; the lock protects
from a sweep in another pid namespace, which cannot see the owner. Should such a sweep remove the directory before the
lock was there, its maker notices (another inode, or none, at the path) and takes the next name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd.cgroup.files import Group

if TYPE_CHECKING:
    from sandboxd.cgroup.discovery import Hierarchy

__all__ = ["NAME", "Place", "remove_quietly", "start_time"]

# pid, start time, and a number when that name was taken.
NAME = re.compile(r"sandboxd\.(\d+)\.(\d+)(?:\.\d+)?")


class Place:
    """The instance's directory in one hierarchy: made, locked, owned. *group* is the directory itself."""

    def __init__(self, hierarchy: Hierarchy, root: str, name: str) -> None:
        """Raises FileExistsError when the name is taken, or was swept away before it was locked; else OSError."""
        self.hierarchy = hierarchy
        self.root = root
        self.path = f"{root.rstrip('/')}/{name}"
        self.fd = -1
        with ExitStack() as undo:
            os.mkdir(self.path, 0o711)  # a stranger who could open it could hold its lock
            undo.callback(remove_quietly, self.path)
            try:
                self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
                undo.callback(os.close, self.fd)
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                kept = os.path.samestat(os.fstat(self.fd), os.stat(self.path))
            except (FileNotFoundError, BlockingIOError):
                kept = False
            if not kept:
                raise FileExistsError(errno.EEXIST, f"mkdir: {os.strerror(errno.EEXIST)}", self.path)
            self.group = self.child(".")
            undo.pop_all()

    @property
    def nested(self) -> bool:
        """Whether what is bounded has a directory of its own."""
        return self.hierarchy.version == 2 and bool(self.hierarchy.controllers)

    @property
    def bounded(self) -> Group:
        """What holds zygotes and leaves, and nothing else on v2."""
        return self.child("cells") if self.nested else self.group

    def child(self, name: str) -> Group:
        """A directory beside the engine's."""
        return Group(self.fd, self.path, name)

    def below(self, name: str) -> Group:
        """A directory in ``bounded``."""
        return self.child(f"cells/{name}" if self.nested else name)

    def remove(self) -> None:
        """rmdir and close, which gives up the lock. What cannot be removed is left to a later sweep."""
        remove_quietly(self.path)
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def remove_quietly(path: str) -> None:
    with suppress(OSError):
        os.rmdir(path)


def start_time(pid: int) -> str | None:
    """Field 22 of /proc/PID/stat: with the pid it names a process for good. None when it is gone, also as a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(b")")[2].split()  # from field 3, the state
    return None if fields[0] in (b"Z", b"X") else fields[19].decode("ascii")
