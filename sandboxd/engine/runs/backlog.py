"""Packets for a side that may not read at the moment."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Backlog"]


class Backlog:
    """Packets that wait for room in *sock*, which stays its owner's. *changed* is told when it fills and when it has
    room again; whoever puts packets here stops asking for more meanwhile.
    """

    def __init__(self, sock: socket.socket, changed: Callable[[], None]) -> None:
        self._sock = sock
        self._changed: Callable[[], None] | None = changed
        self._loop = asyncio.get_running_loop()
        self._waiting: list[bytes] = []
        self.is_blocked = False
        """Whether the other side does not read."""

    def __bool__(self) -> bool:
        """Whether something waits."""
        return bool(self._waiting)

    def send(self, data: bytes) -> None:
        """Send it after what waits."""
        self._waiting.append(data)
        if len(self._waiting) == 1:
            self._flush()

    def drop(self) -> None:
        """What waits is not wanted any more."""
        self._waiting.clear()
        self._flush()

    def _flush(self) -> None:
        blocked = self._send_waiting()
        if blocked is self.is_blocked:
            return
        self.is_blocked = blocked
        if blocked:
            self._loop.add_writer(self._sock.fileno(), self._flush)
        else:
            self._loop.remove_writer(self._sock.fileno())
        if self._changed is not None:
            self._changed()

    def _send_waiting(self) -> bool:
        """Send what waits; whether something is left because the other side does not read. One that is gone is told by
        its own end.
        """
        while self._waiting:
            try:
                self._sock.send(self._waiting[0], socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
            except OSError:
                self._waiting.clear()
                return False
            del self._waiting[0]
        return False

    def close(self) -> None:
        """Before the socket is closed, or somebody else's."""
        if self.is_blocked:
            self._loop.remove_writer(self._sock.fileno())
        self._changed = None  # a cycle would keep its owner until the next collection
