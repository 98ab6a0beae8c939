"""What a client is sent: one packet after the other, as far as it reads them."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import sys
import termios
from typing import TYPE_CHECKING, Any, Final

from sandboxd._util import disposal
from sandboxd._util.fdwait import writable
from sandboxd.protocol import packets
from sandboxd.protocol.operations import Operation

if TYPE_CHECKING:
    import socket

    from sandboxd.engine.clients.peer import Peer
    from sandboxd.errors import SandboxError

__all__ = ["Gone", "Outbox"]

log = logging.getLogger("sandboxd.engine")

SEND_SECONDS: Final = 30.0


class Gone(Exception):
    """The client left, or takes nothing any more."""


class Outbox:
    """Of one connection. A client that takes nothing for SEND_SECONDS is Gone."""

    def __init__(self, sock: socket.socket, peer: Peer) -> None:
        self._sock = sock
        self._peer = peer
        self._sending = asyncio.Lock()
        self._has_unread = False

    async def send(self, message: dict[str, Any], payload: list[bytes] | None = None) -> None:
        """Send one packet, as ``deliver``."""
        await self.deliver(*packets.pack(message, payload or []))

    async def refuse(self, error: SandboxError) -> None:
        """Send *error*, as ``deliver``."""
        # The frames hold the request, and a task that holds the error; the payload is a mapping with a descriptor, and
        # must not wait for the collector.
        error.__traceback__ = error.__context__ = None
        await self.send({"op": Operation.REFUSED, "error": error.plain()})

    async def deliver(self, buffers: list[Any], fd: int) -> None:
        """Send one packet, and *fd* along with it unless that is -1, which is closed; waits while the peer's queue is
        full. Raises Gone when it is full for SEND_SECONDS, or the peer has closed.
        """
        try:
            async with self._sending, asyncio.timeout(SEND_SECONDS):
                if fd >= 0:
                    await self._until_read()
                while True:
                    try:
                        packets.send_packed(self._sock, buffers, fd)
                        self._has_unread = self._has_unread or fd >= 0
                        return
                    except BlockingIOError:
                        await writable(self._sock.fileno())
        except TimeoutError:
            log.info("client %s: takes nothing; dropped", self._peer.facts)
            raise Gone("too slow") from None
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Gone(str(error)) from None
        finally:
            if fd >= 0:
                disposal.close(fd, self._peer.uid)

    async def drained(self) -> None:
        """Wait for the peer to read the memfd that it was sent last, whose pages are the engine's. Raises Gone when it
        does not within SEND_SECONDS.
        """
        if not self._has_unread:
            return
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self._until_read()
        except TimeoutError:
            log.info("client %s: does not read its answers; dropped", self._peer.facts)
            raise Gone("too slow") from None

    async def _until_read(self) -> None:
        """Until nothing that went with a memfd is unread: SIOCOUTQ counts what the peer has yet to take, unix(7)."""
        pause = 0.0005
        while self._has_unread:
            queued = fcntl.ioctl(self._sock.fileno(), termios.TIOCOUTQ, bytes(4))
            self._has_unread = int.from_bytes(queued, sys.byteorder) > 0
            if self._has_unread:
                await asyncio.sleep(pause)
                pause = min(2 * pause, 0.05)
