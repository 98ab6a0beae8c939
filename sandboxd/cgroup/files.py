"""Reading and writing the kernel's control files of one cgroup directory.

Every path is relative to a held descriptor of the instance's directory, so that a renamed or replaced parent cannot
redirect a write, and a request costs few path walks. A refusal is an OSError: errno, what was tried, which file.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Fds", "Group", "kill_listed"]

# The longest file read here is a cpu.stat or memory.events of a few hundred bytes; a list of pids is read to its end.
_CHUNK = 4096


class Fds:
    """The one owner of a set of descriptors, all close-on-exec; ``close`` closes them and may be called again."""

    def __init__(self) -> None:
        self._fds: list[int] = []
        self._files: list[File] = []

    def own(self, fd: int) -> int:
        """Take over *fd* and give it back."""
        self._fds.append(fd)
        return fd

    def file(self, group: Group, name: str, flags: int = os.O_RDONLY) -> File:
        """Open a control file that may ``rest``. Raises OSError."""
        made = File(group, name, flags)
        self._files.append(made)
        return made

    def rest(self) -> None:
        """Close the control files; each must ``wake`` before it is used again."""
        for file in self._files:
            file.rest()

    def wake(self) -> None:
        """Open again what rests. Raises OSError."""
        for file in self._files:
            file.wake()

    def close(self) -> None:
        # The list is forgotten first: after close(2) the kernel may hand a number out again.
        self.rest()
        self._files = []
        fds, self._fds = self._fds, []
        for fd in reversed(fds):
            os.close(fd)


class File:
    """An open control file, or one that rests: thousands of cells would hold more descriptors than a process may."""

    __slots__ = ("_flags", "_group", "_name", "fd")

    def __init__(self, group: Group, name: str, flags: int) -> None:
        self._group = group
        self._name = name
        self._flags = flags
        self.fd = group.open(name, flags)

    def rest(self) -> None:
        """Close it."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def wake(self) -> None:
        """Open it again, if it rests. Raises OSError."""
        if self.fd < 0:
            self.fd = self._group.open(self._name, self._flags)


def _explain(error: OSError, operation: str, path: str) -> OSError:
    return OSError(error.errno, f"{operation}: {error.strerror}", path)


class Group:
    """One directory of one hierarchy: *name* below the directory *parent_fd*.

    *parent_path* is for messages only. It does not own *parent_fd*. The name "." stands for the directory itself.
    """

    def __init__(self, parent_fd: int, parent_path: str, name: str) -> None:
        self.parent_fd = parent_fd
        self.name = name
        self.path = parent_path if name == "." else f"{parent_path}/{name}"

    def make(self) -> None:
        """mkdir. Raises OSError."""
        try:
            os.mkdir(self.name, 0o755, dir_fd=self.parent_fd)
        except OSError as error:
            raise _explain(error, "mkdir", self.path) from None

    def remove(self) -> bool:
        """rmdir; True when the directory is gone, False for EBUSY: a task in it is still dying. Raises OSError."""
        try:
            os.rmdir(self.name, dir_fd=self.parent_fd)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            raise _explain(error, "rmdir", self.path) from None
        return True

    def open(self, file: str, flags: int = os.O_RDONLY) -> int:
        """A close-on-exec descriptor of a control file, or of the directory for ".". Raises OSError."""
        try:
            return os.open(f"{self.name}/{file}", flags | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self.parent_fd)
        except OSError as error:
            raise _explain(error, "open", f"{self.path}/{file}") from None

    def has(self, file: str) -> bool:
        """Whether this kernel offers the control file here."""
        try:
            os.stat(f"{self.name}/{file}", dir_fd=self.parent_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def read(self, file: str) -> str:
        """The whole control file, opened anew. Raises OSError."""
        fd = self.open(file)
        try:
            chunks: list[bytes] = []
            while chunk := os.read(fd, _CHUNK):
                chunks.append(chunk)
        except OSError as error:
            raise _explain(error, "read", f"{self.path}/{file}") from None
        finally:
            os.close(fd)
        return b"".join(chunks).decode("ascii")

    def read_table(self, file: str) -> dict[str, int]:
        """A control file of lines with a word and a number, such as memory.stat. Raises OSError."""
        rows = (line.split() for line in self.read(file).splitlines())
        return {key: int(value) for key, value in rows}

    def write(self, file: str, text: str) -> None:
        """Write *text* in one call: the kernel takes or refuses it as a whole. Raises OSError."""
        fd = self.open(file, os.O_WRONLY)
        try:
            os.write(fd, text.encode("ascii"))
        except OSError as error:
            raise _explain(error, f"write {text!r}", f"{self.path}/{file}") from None
        finally:
            os.close(fd)

    def pids(self) -> list[int]:
        """The processes in this directory itself, as pids of our pid namespace; a process outside it is 0.

        The file is opened for each call: v1 serves a descriptor that was read before from a list up to one second old.
        """
        return [int(line) for line in self.read("cgroup.procs").split()]

    def attach(self, pid: int) -> None:
        """Move a whole process here. Raises OSError."""
        self.write("cgroup.procs", str(pid))

    def chown(self, file: str, uid: int) -> None:
        """Give a control file to *uid*; the group stays. Raises OSError."""
        try:
            os.chown(f"{self.name}/{file}", uid, -1, dir_fd=self.parent_fd, follow_symlinks=False)
        except OSError as error:
            raise _explain(error, "chown", f"{self.path}/{file}") from None

    def open_to_all(self, file: str) -> None:
        """Let every user write a control file. Raises OSError."""
        try:
            os.chmod(f"{self.name}/{file}", 0o666, dir_fd=self.parent_fd)  # noqa: S103 (see Instance.clone_owner)
        except OSError as error:
            raise _explain(error, "chmod", f"{self.path}/{file}") from None


def _kill_members(group: Group, skip: int) -> set[int]:
    """SIGKILL every process in *group* but *skip*; returns the pids that were there, also of those already dying."""
    pidfds: dict[int, int] = {}
    try:
        for pid in group.pids():
            if pid in (0, skip):
                continue
            try:
                pidfds[pid] = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
        # Listed again, now that pidfds pin the processes: a number that went to a stranger meanwhile is no longer here.
        members = pidfds.keys() & group.pids() if pidfds else set[int]()
        for pid in members:
            try:
                signal.pidfd_send_signal(pidfds[pid], signal.SIGKILL)
            except ProcessLookupError:
                continue
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise
        return set()  # the directory is gone, so it was empty
    finally:
        for pidfd in pidfds.values():
            os.close(pidfd)
    return members


def kill_listed(groups: Callable[[], Iterable[Group]], deadline: float | None, skip: int = 0) -> None:
    """SIGKILL the processes in *groups* one by one: the way without cgroup.kill.

    What is forked between two rounds is met in the next one, so pids.max should be 0 before. With a *deadline* it
    waits, until none is left or time.monotonic() reaches it; without, it returns as soon as a round meets no process
    that is new.
    """
    met: set[int] = set()
    pause = 0.0005
    while True:
        members = {pid for group in groups() for pid in _kill_members(group, skip)}
        if not members or (deadline is None and members <= met):
            return
        met |= members
        if deadline is not None:
            if time.monotonic() >= deadline:
                return
            time.sleep(pause)
            pause = min(pause * 2, 0.05)
