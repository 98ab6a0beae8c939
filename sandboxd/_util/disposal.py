"""Closing what may be slow to close, on somebody's account and not in the thread that asks.

The last reference to a descriptor pays for its object: 0.2 ms for each MiB of a memfd or a tmpfs; and what is no memfd
may block in close(2) for as long as its sender likes (SO_LINGER, FUSE, NFS). So who gets descriptors, or memory, from a
peer that is not trusted has them closed here. Each owner has a line of its own, which one thread at a time works off:
who sends what cannot be closed waits for it alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

__all__ = ["PENDING_MAX", "RIGHTS_ROOM", "close", "close_socket", "leave", "pending", "rights"]

PENDING_MAX: Final = 512
"""Of one owner; with more, nothing should be taken of it any more."""
RIGHTS_ROOM: Final = socket.CMSG_SPACE(253 * 4)
"""For recvmsg(2): SCM_MAX_FD descriptors. What has no room, the kernel closes in the thread that receives."""
_THREADS: Final = 16
_LARGE_BYTES: Final = 8 << 20  # a memfd whose pages take a millisecond to be given back

Thing = int | Callable[[], object]
"""A descriptor, or what ends something else."""


def rights(control: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors in the ancillary data of recvmsg(2)."""
    return [
        fd
        for level, kind, raw in control
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS
        for fd in struct.unpack(f"{len(raw) // 4}i", raw[: len(raw) // 4 * 4])
    ]


def close(fd: int, owner: object) -> None:
    """Close a descriptor that may be of any kind: now if it is a small memfd, else on *owner*'s account."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        small = os.fstat(fd).st_blocks * 512 <= _LARGE_BYTES
    except OSError:
        small = False
    if small:
        os.close(fd)
    else:
        leave(fd, owner)


def close_socket(sock: socket.socket, owner: object) -> None:
    """Close a Unix socket whose peer is not trusted; what was sent to it can still be read. Never blocks.

    Packets that nobody has read go with it, and with them what they carry: then not in this thread.
    """
    if sock.fileno() < 0:
        return
    read = False
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
        # With SO_PASSCRED every packet has control data, the end has none: so an empty packet is not taken for the end.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        data, _, got, _ = sock.recvmsg(1, 0, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        read = not data and not got & socket.MSG_CTRUNC
    if read:
        sock.close()
    else:
        leave(sock.detach(), owner)


def leave(thing: Thing, owner: object) -> None:
    """Have *thing* closed, or called, by another thread on *owner*'s account. Returns at once."""
    _closer.put(thing, owner)


def pending(owner: object) -> int:
    """How many things of *owner* are not closed yet."""
    return _closer.count(owner)


class _Closer:
    """A thread ends when there is nothing left to do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: dict[object, deque[Thing]] = {}
        self._untended: deque[object] = deque()
        self._threads = 0

    def put(self, thing: Thing, owner: object) -> None:
        with self._lock:
            line = self._lines.get(owner)
            if line is None:
                line = self._lines[owner] = deque()
                self._untended.append(owner)
            line.append(thing)
            if not self._untended or self._threads >= _THREADS:
                return
            self._threads += 1
        try:
            threading.Thread(target=self._work, name="sandboxd-close", daemon=True).start()
        except RuntimeError:  # no more threads at the moment; the next descriptor tries again
            with self._lock:
                self._threads -= 1

    def count(self, owner: object) -> int:
        with self._lock:
            return len(self._lines.get(owner, ()))

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._untended:
                    self._threads -= 1
                    return
                owner = self._untended.popleft()
                line = self._lines[owner]
            while True:
                with self._lock:
                    if not line:
                        del self._lines[owner]
                        break
                    thing: Any = line[0]
                _end(thing)
                with self._lock:
                    line.popleft()
                del thing


_closer: Final = _Closer()


def _end(thing: Thing) -> None:
    """Call it; or close(2), after which nothing waits for a peer if that can be had."""
    if callable(thing):
        with contextlib.suppress(Exception):
            thing()
        return
    with contextlib.suppress(OSError):
        sock = socket.socket(fileno=thing)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        sock.detach()
    with contextlib.suppress(OSError):
        os.close(thing)
