"""Who opens a cell's files for the engine: itself, as root of the host, or a broker inside the user namespace.

An engine of an ordinary user is a stranger to the ids of its cells: it may neither open what a program made for itself
alone nor make a file as one of them. For such an engine the nursery forks a broker (native/inside/broker.c), which
opens by the same rules, as the same ids, and hands the descriptor over. Every path is beneath a directory of one cell,
which the engine holds and names by descriptor; no symlink is followed and no mount crossed (``calls.open_beneath``).

Ids are those inside the namespace: 0 is the zygote, a cell has its slot's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING, Final, Protocol

from sandboxd._native import ffi, lib
from sandboxd.kernel import calls

if TYPE_CHECKING:
    from sandboxd.ids.ranges import IdBlock

__all__ = ["Broker", "CellFiles", "HostRoot"]

PATH_BYTES: Final = 8192
"""SBX_BROKER_PATH."""
ANSWER_SECONDS: Final = 5.0
"""The event loop waits for some answers: no longer than a request may be held up."""
_OPEN, _MKDIR, _RENAME = 1, 2, 3
_ROOT: Final = 0xFFFFFFFF
_REQUEST: Final = struct.Struct("=IIIIQ")
_ANSWER: Final = struct.Struct("=i")
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL


class CellFiles(Protocol):
    """What the engine does with files of cells. All raise OSError, and may be called in any thread."""

    def create(self, directory: int, path: str, mode: int, owner: int) -> int:
        """Make a file as *owner* and open it for writing; EEXIST when anything is there. *mode* holds to the letter."""

    def mkdir(self, directory: int, path: str, mode: int, owner: int) -> None:
        """Make a directory as *owner*; its parent is there."""

    def rename(self, directory: int, old: str, new: str, owner: int) -> None:
        """Give a file in *directory* itself another name, as *owner*."""

    def open(self, directory: int, path: str) -> int:
        """Open a file for reading, whatever its owner and mode; never waits (a FIFO)."""

    def open_directory(self, directory: int, path: str) -> int:
        """Open a directory for listing it."""


class HostRoot:
    """The engine itself, root of the host, where *base* is 0 inside."""

    def __init__(self, base: int) -> None:
        self._base = base

    def create(self, directory: int, path: str, mode: int, owner: int) -> int:
        """As ``CellFiles``."""
        with calls.as_file_owner(self._base + owner, self._base + owner):
            fd = calls.open_beneath(directory, path, _CREATE, mode)
        try:
            os.fchmod(fd, mode)  # whatever the engine's umask is
        except BaseException:
            os.close(fd)
            raise
        return fd

    def mkdir(self, directory: int, path: str, mode: int, owner: int) -> None:
        """As ``CellFiles``."""
        above, _, name = path.rpartition("/")
        with calls.as_file_owner(self._base + owner, self._base + owner):
            parent = calls.open_beneath(directory, above or ".", os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.mkdir(name, mode, dir_fd=parent)
            finally:
                os.close(parent)

    def rename(self, directory: int, old: str, new: str, owner: int) -> None:
        """As ``CellFiles``."""
        with calls.as_file_owner(self._base + owner, self._base + owner):
            os.rename(old, new, src_dir_fd=directory, dst_dir_fd=directory)

    def open(self, directory: int, path: str) -> int:
        """As ``CellFiles``."""
        return calls.open_beneath(directory, path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)

    def open_directory(self, directory: int, path: str) -> int:
        """As ``CellFiles``."""
        return calls.open_beneath(
            directory, path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        )


class Broker:
    """The engine's end of the broker's channel, which becomes this object's. One question at a time."""

    def __init__(self, channel: socket.socket) -> None:
        channel.settimeout(None)
        # The kernel's own timeout: the C that receives does not look at Python's.
        patience = struct.pack("=qq", int(ANSWER_SECONDS), 0)
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        self._channel = channel
        self._lock = threading.Lock()
        self._broken = False
        self._answer = ffi.new("char[]", _ANSWER.size)
        self._fds = ffi.new("int[]", 1)
        self._nfds = ffi.new("unsigned int *")

    @classmethod
    def pair(cls) -> tuple[Broker, socket.socket]:
        """One, and the broker's end."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), theirs

    def close(self) -> None:
        """The broker ends, and the nursery with it. Idempotent."""
        self._channel.close()

    def create(self, directory: int, path: str, mode: int, owner: int) -> int:
        """As ``CellFiles``."""
        return self._ask(_OPEN, directory, os.fsencode(path), owner, mode, _CREATE)

    def mkdir(self, directory: int, path: str, mode: int, owner: int) -> None:
        """As ``CellFiles``."""
        self._ask(_MKDIR, directory, os.fsencode(path), owner, mode)

    def rename(self, directory: int, old: str, new: str, owner: int) -> None:
        """As ``CellFiles``."""
        self._ask(_RENAME, directory, os.fsencode(old) + b"\0" + os.fsencode(new), owner)

    def open(self, directory: int, path: str) -> int:
        """As ``CellFiles``."""
        return self._ask(_OPEN, directory, os.fsencode(path), _ROOT, 0, os.O_RDONLY | os.O_NOFOLLOW)

    def open_directory(self, directory: int, path: str) -> int:
        """As ``CellFiles``."""
        return self._ask(_OPEN, directory, os.fsencode(path), _ROOT, 0, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)

    def _ask(self, operation: int, directory: int, path: bytes, owner: int, mode: int = 0, flags: int = 0) -> int:
        """The descriptor that it opened, or 0. Raises OSError: its refusal, or EPIPE when it is gone."""
        if len(path) >= PATH_BYTES:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), os.fsdecode(path[:100]))
        request = _REQUEST.pack(operation, owner, mode, 0, flags) + path + b"\0"
        with self._lock:
            number, opened = self._exchange(request, directory)
        if number:
            raise OSError(number, f"broker: {os.strerror(number)}", os.fsdecode(path))
        return opened

    def _exchange(self, request: bytes, directory: int) -> tuple[int, int]:
        fd = self._channel.fileno()
        if self._broken or fd < 0:
            return errno.EPIPE, -1
        sent = lib.sbx_send_fds(fd, request, len(request), ffi.new("int[]", [directory]), 1)
        if sent == -errno.EBADF:
            return errno.EBADF, -1
        self._nfds[0] = 0  # nothing came yet
        size = sent
        if sent >= 0:
            self._nfds[0] = 1
            size = lib.sbx_recv_fds(fd, self._answer, _ANSWER.size, self._fds, self._nfds)
        if size != _ANSWER.size:
            self._give_up()  # an answer that came late would be taken for the next one's
            lib.sbx_close_all(self._fds, self._nfds[0])
            return errno.EPIPE, -1
        (number,) = _ANSWER.unpack(ffi.buffer(self._answer, _ANSWER.size))
        wants_one = request[:4] == struct.pack("=I", _OPEN) and not number
        if self._nfds[0] != int(wants_one):
            self._give_up()
            lib.sbx_close_all(self._fds, self._nfds[0])
            return errno.EPIPE, -1
        return int(number), int(self._fds[0]) if wants_one else 0

    def _give_up(self) -> None:
        """No question is asked any more. The broker sees the end of its channel and ends, the nursery with it: so the
        zygote is lost, and the next request gets a new one, instead of a zygote whose cells can have no files.
        """
        self._broken = True
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)


def of(ids: IdBlock) -> HostRoot | None:
    """The engine's own hands, when it is root of the host; None when it needs a broker."""
    return HostRoot(ids.base) if os.geteuid() == 0 else None
