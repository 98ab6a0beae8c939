"""What a client sends: packets, taken when it is their turn."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from sandboxd._util import disposal
from sandboxd._util.fdwait import resolve
from sandboxd.errors import ProtocolError
from sandboxd.protocol import packets

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from sandboxd.engine.clients.peer import Peer
    from sandboxd.engine.held_time import HeldTime
    from sandboxd.protocol.packets import Packet

__all__ = ["Inbox"]


class Inbox:
    """Of one connection. *speaks* is called when something came that no ``receive`` waits for; it stays in the
    socket, and is told once unless ``watch`` is called again.
    """

    def __init__(self, sock: socket.socket, peer: Peer, held: HeldTime, speaks: Callable[[], None]) -> None:
        self._sock = sock
        self._peer = peer
        self._held = held
        self._speaks: Callable[[], None] | None = speaks
        self._loop = asyncio.get_running_loop()
        self._wake: asyncio.Future[None] | None = None
        self._watching = False

    async def receive(self, inline: bool = False) -> Packet | None:
        """The next packet. Nothing suspends between taking it and returning it: a cancelled caller loses none."""
        peer = self._peer
        while True:
            await peer.share.turn()
            if not peer.sees_all and disposal.pending(peer.uid) > disposal.PENDING_MAX:
                raise ProtocolError("Descriptors that came with earlier packets cannot be closed.")
            with peer.share.counted(), contextlib.suppress(BlockingIOError):
                packet = packets.receive(self._sock, inline=inline, bounds=peer.bounds, owner=peer.uid)
                self._held.did(packet.text_bytes if packet is not None else 0)
                return packet
            self._wake = self._loop.create_future()
            self.watch()
            try:
                await self._wake
            finally:
                self._wake = None

    def receive_now(self) -> Packet | None:
        """A small packet, which somebody should have sent. Raises BlockingIOError when there is none."""
        peer = self._peer
        with peer.share.counted():
            return packets.receive(self._sock, inline=True, bounds=peer.bounds, owner=peer.uid)

    def watch(self) -> None:
        """Watch the socket: it stays watched from one packet to the next, for turning that on and off costs more than
        the packet.
        """
        if not self._watching:
            self._loop.add_reader(self._sock.fileno(), self._readable)
            self._watching = True

    def unwatch(self) -> None:
        """Do not, until ``watch`` or ``receive``."""
        if self._watching:
            self._loop.remove_reader(self._sock.fileno())
            self._watching = False

    def close(self) -> None:
        """The socket is about to be closed."""
        self.unwatch()
        self._speaks = None  # a cycle would keep the connection until the next collection

    def _readable(self) -> None:
        if self._wake is not None:
            resolve(self._wake)
            return
        self.unwatch()
        if self._speaks is not None:
            self._speaks()
