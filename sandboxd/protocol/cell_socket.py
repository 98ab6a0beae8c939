"""The engine's end of a cell's channel: packets come in, descriptors never. What they hold: sandboxd/inside/channel.py.

Nobody has a reason to pass a descriptor over it. One that comes is closed by whoever receives it, or closes the socket
with the packet in its queue; a program would so make the engine's thread free a memfd as large as its memory limit,
253 of them with each packet. From Linux 6.16 on the kernel refuses them to the sender (SO_PASSRIGHTS, socket(7)). On
older ones they are received, and closed in another thread.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
from typing import Final

from sandboxd._util import disposal
from sandboxd.inside.channel import PACKET_BYTES

__all__ = ["Descriptors", "may_carry_descriptors", "read", "receive", "refuse_descriptors"]

_SO_PASSRIGHTS: Final = 83


class Descriptors(Exception):
    """A packet came with descriptors, which are on their way to be closed: read no more of this cell."""


def refuse_descriptors(sock: socket.socket) -> None:
    """Make the other end's sendmsg(2) fail with EPERM when it passes descriptors, where the kernel can. Raises
    OSError.
    """
    if not may_carry_descriptors():
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)


@functools.cache
def may_carry_descriptors() -> bool:
    """Whether this kernel lets descriptors into a channel although ``refuse_descriptors`` was called for it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise
            return True
    return False


def receive(sock: socket.socket, room: bytearray, owner: object) -> bytes:
    """One packet, cut to the *room*; b"" at the end. Descriptors are closed on *owner*'s account (``disposal``).

    Raises OSError, BlockingIOError when no packet is there, Descriptors.
    """
    if not may_carry_descriptors():
        return bytes(memoryview(room)[: sock.recv_into(room)])
    size, control, _, _ = sock.recvmsg_into([room], disposal.RIGHTS_ROOM, socket.MSG_CMSG_CLOEXEC)
    fds = disposal.rights(control)
    for fd in fds:
        disposal.leave(fd, owner)
    if fds:
        raise Descriptors
    return bytes(memoryview(room)[:size])


def read(fd: int) -> bytes:
    """As ``receive``, for who holds the descriptor only."""
    if not may_carry_descriptors():
        return os.read(fd, PACKET_BYTES)
    sock = socket.socket(fileno=fd)
    try:
        return receive(sock, bytearray(PACKET_BYTES), None)
    finally:
        sock.detach()
