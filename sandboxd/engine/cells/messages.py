"""The fixed structs that the engine exchanges with nursery and zygote (native/include/sandboxd.h)."""

from __future__ import annotations

import enum
import errno
import os
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from sandboxd._native import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CellFds", "CellPlan", "Entry", "Event", "EventReader", "InitSizes", "Kind", "NoEvent"]

_HEAD: Final = struct.Struct("=II")
_SIZES: Final = struct.Struct("=QQQQQQQ")
_CELL: Final = struct.Struct("=IIIIII")
_RLIMIT: Final = struct.Struct("=IIQQ")
_RLIMITS: Final = lib.SBX_RLIMITS
_EVENT: Final = struct.Struct("=IIiiIiI")
_MADE_FDS: Final = lib.SBX_MADE_FDS
_EVENT_FDS: Final = 10


@dataclass(frozen=True, slots=True)
class InitSizes:
    """Bytes and inodes of a cell's file systems."""

    workspace_bytes: int
    workspace_files: int
    tmp_bytes: int
    tmp_files: int
    shm_bytes: int
    shm_files: int
    code_bytes: int


class CellPlan:
    """What is the same for all cells of the same limits, as the nursery and the zygote read it."""

    __slots__ = ("_nlimits", "_rlimits", "_sizes")

    def __init__(self, sizes: InitSizes, rlimits: Sequence[tuple[int, int, int]]) -> None:
        """*rlimits*: (resource, soft, hard) of setrlimit(2), at most 16."""
        self._sizes = _SIZES.pack(
            sizes.workspace_bytes,
            sizes.workspace_files,
            sizes.tmp_bytes,
            sizes.tmp_files,
            sizes.shm_bytes,
            sizes.shm_files,
            sizes.code_bytes,
        )
        self._nlimits = len(rlimits)
        packed = b"".join(_RLIMIT.pack(which, 0, soft, hard) for which, soft, hard in rlimits)
        self._rlimits = packed.ljust(_RLIMITS * _RLIMIT.size, b"\0")

    def request(self, identity: int, slot: int, guest_id: int, entry: Entry, hurry: bool) -> bytes:
        """A struct sbx_make_request."""
        cell = _CELL.pack(guest_id, entry.has_cgroup, entry.count - entry.has_cgroup, self._nlimits, hurry, 0)
        return b"".join((_HEAD.pack(identity, slot), self._sizes, cell, self._rlimits))


class Entry:
    """The descriptors by which a cell enters its leaf, as C takes them; they stay the leaf's."""

    __slots__ = ("count", "fds", "has_cgroup")

    def __init__(self, clone_fd: int | None, entry_fds: Sequence[int]) -> None:
        numbers = [*([] if clone_fd is None else [clone_fd]), *entry_fds]
        self.has_cgroup = clone_fd is not None
        self.count = len(numbers)
        self.fds = ffi.new("int[]", numbers)


@dataclass(slots=True)
class CellFds:
    """What the engine holds of one cell; every descriptor is the holder's. -1 is closed or handed on."""

    init: int
    """pidfd: killing it ends everything of the cell."""
    workspace: int
    tmp: int
    shm: int
    code: int
    stdin: int
    stdout: int
    stderr: int
    channel: int

    def take_channel(self) -> socket.socket:
        """The near end of the channel, now the caller's."""
        end = socket.socket(fileno=self.channel)
        self.channel = -1
        return end

    def highest(self) -> int:
        """The highest number among them."""
        return max(
            self.init, self.workspace, self.tmp, self.shm, self.code, self.stdin, self.stdout, self.stderr, self.channel
        )

    def take(self) -> list[int]:
        """Those that are open, now the caller's."""
        fds = [getattr(self, name) for name in self.__slots__]
        for name in self.__slots__:
            setattr(self, name, -1)
        return [fd for fd in fds if fd >= 0]

    def close(self, *names: str) -> None:
        """Close the named descriptors, or all."""
        for name in names or self.__slots__:
            fd = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                os.close(fd)


class Kind(enum.IntEnum):
    """What an event tells."""

    MADE = lib.SBX_EVENT_MADE
    REFUSED = lib.SBX_EVENT_REFUSED
    DEAD = lib.SBX_EVENT_DEAD
    EXITED = lib.SBX_EVENT_EXITED
    WARM = lib.SBX_EVENT_WARM


class Event(NamedTuple):
    """A struct sbx_event."""

    kind: int
    identity: int
    code: int
    """si_code and si_status of waitid(2)."""
    status: int
    stage: int
    """Of a step that was refused, with its errno and a detail."""
    number: int
    detail: int


class NoEvent(Exception):
    """The other end hung up, or what it sent is not an event. The message says which."""


class EventReader:
    """Reads events from non-blocking channels, one at a time, into memory of its own."""

    def __init__(self) -> None:
        self._event = ffi.new("char[]", _EVENT.size)
        self._bytes = ffi.buffer(self._event)
        self._fds = ffi.new("int[]", _EVENT_FDS)
        self._nfds = ffi.new("unsigned int *")

    def next(self, channel: socket.socket) -> Event | None:
        """The next event of *channel*; None when none is there. Its descriptors are here until ``take_fds`` or
        ``close_fds``. Raises NoEvent.
        """
        self._nfds[0] = _EVENT_FDS
        size = lib.sbx_recv_fds(channel.fileno(), self._event, _EVENT.size, self._fds, self._nfds)
        if size == _EVENT.size:
            return Event(*_EVENT.unpack(self._bytes))
        if size == -errno.EAGAIN:
            return None
        self.close_fds()
        if size == 0:
            raise NoEvent("it hung up")
        raise NoEvent("its report is malformed" if size > 0 else f"its report was lost: {os.strerror(-size)}")

    def take_fds(self) -> CellFds | None:
        """Those of a cell that was made, now the caller's; None, and none is open any more, when they are not as many
        as a cell has.
        """
        if self._nfds[0] != _MADE_FDS:
            self.close_fds()
            return None
        return CellFds(*self._fds[0:_MADE_FDS])

    def close_fds(self) -> None:
        """Close those that came with the last event."""
        lib.sbx_close_all(self._fds, self._nfds[0])
        self._nfds[0] = 0
