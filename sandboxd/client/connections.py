"""Connections to an engine: dialling, greeting, one run at a time on each, and the idle ones that are kept.

Linux reports once that the other side closed without having read everything, before it hands out what that side had
sent: who receives looks again.
"""

from __future__ import annotations

import contextlib
import importlib
import select
import socket
import threading
from typing import TYPE_CHECKING, Any, Final

from sandboxd.errors import ConnectionLost, ProtocolError, SandboxError, Unavailable, from_plain
from sandboxd.protocol import packets
from sandboxd.protocol.operations import LAST, Operation

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.client.leased import LeasedCell, LeaseSlot

__all__ = [
    "CANCEL_SECONDS",
    "DESCRIPTORS",
    "Connection",
    "Connections",
    "ask",
    "counters",
    "greet",
    "open_daemon",
    "parse_address",
    "refused",
]

CANCEL_SECONDS: Final = 2.0
IDLE_CONNECTIONS: Final = 16
INTERRUPT_MILLISECONDS: Final = 200
DESCRIPTORS: Final = 64
"""Room for those of a lease."""


def parse_address(address: str) -> str:
    """The path of "unix:PATH". Raises ValueError for any other form."""
    scheme, _, path = address.partition(":")
    if scheme != "unix" or not path:
        raise ValueError(f'An address has the form "unix:/run/sandboxd/sandboxd.sock", not {address!r}.')
    return path


def open_daemon(path: str) -> socket.socket:
    """A connection to the daemon at *path*, not yet greeted. Raises Unavailable."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        fix = {
            13: f"ask to be added to the group that owns {path} (members may run installed policies)",
            2: f"start the daemon: sandboxd serve --socket {path}",
            111: f"start the daemon: sandboxd serve --socket {path}",
        }.get(error.errno or 0, "check the address")
        what = f"this user may not use {path}" if error.errno == 13 else f"no daemon answers at {path}"
        raise Unavailable("connect", what, errno=error.errno, fix=fix) from error
    return sock


def greet(sock: socket.socket) -> socket.socket:
    """Say hello on *sock* and wait for the answer; *sock*. Raises what the daemon refused with, ConnectionLost,
    ProtocolError; *sock* is closed then.
    """
    try:
        with contextlib.suppress(BrokenPipeError):  # one that turns clients away may have closed already
            packets.send(sock, packets.hello())
        answer = _receive(sock)
        if answer is None:
            raise ConnectionLost(False)
        answer.close()
        refused(answer)
        if answer.message.get("op") != Operation.HELLO:
            raise ProtocolError("The daemon did not answer hello.")
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError):
            raise ConnectionLost(False) from error
        raise
    return sock


def ask(sock: socket.socket, operation: Operation) -> dict[str, Any]:
    """The answer to an operation without arguments, on the new connection *sock*, which is closed. Raises what it was
    refused with.
    """
    with greet(sock):
        packets.send(sock, {"op": operation})
        answer = packets.receive(sock)
    if answer is None:
        raise ConnectionLost(False)
    answer.close()
    refused(answer)
    return answer.message


def counters(answer: dict[str, Any]) -> dict[str, Any]:
    """What an engine's *answer* to stats holds. Raises ProtocolError."""
    found = answer.get("stats")
    if not isinstance(found, dict):
        raise ProtocolError("The engine's answer to stats is not an object.")
    return found


def refused(answer: packets.Packet) -> None:
    """Raise the error that *answer* is a refusal with, if it is one."""
    if answer.message.get("op") == Operation.REFUSED and isinstance(answer.message.get("error"), dict):
        raise from_plain(answer.message["error"])


def _receive(sock: socket.socket) -> packets.Packet | None:
    """The next packet, None at the end.

    Looks up now and then: a signal that comes between the interpreter's last look and the system call does not
    interrupt it, and Ctrl-C would wait for the run's end.
    """
    waiting = select.poll()
    waiting.register(sock, select.POLLIN)
    while not waiting.poll(INTERRUPT_MILLISECONDS):
        continue
    try:
        return packets.receive(sock, descriptors=DESCRIPTORS)
    except ConnectionResetError:
        return packets.receive(sock, descriptors=DESCRIPTORS)


class Connection:
    """One of a handle's connections. *fresh*: nothing has been said on it yet."""

    def __init__(self, sock: socket.socket, fresh: bool) -> None:
        self.sock = sock
        self.fresh = fresh
        self.slot: LeaseSlot | None = None
        """For leases, when this process may run programs in cells that are lent to it."""

    def accept_leases(self) -> None:
        """Have the engine lend parked cells to this process."""
        self.slot = importlib.import_module("sandboxd.client.leased").LeaseSlot()

    def receive(self) -> packets.Packet | None:
        """The next packet, None at the end."""
        return _receive(self.sock)

    def note(self, packet: packets.Packet) -> bool:
        """Whether *packet* was about a lease, which is for the next run."""
        operation = packet.message.get("op")
        if operation not in (Operation.LEASE, Operation.REVOKED) or self.slot is None:
            return False
        if operation == Operation.LEASE:
            fds, packet.fds = packet.fds, []
            self.slot.take(packet.message, fds)
        else:
            self.slot.revoke(packet.message.get("lease"))
        return True

    def take_lease(self) -> LeasedCell | None:
        """What this process was lent; also what has come since the last run. Raises OSError, ProtocolError."""
        assert self.slot is not None  # noqa: S101
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = packets.receive(self.sock, socket.MSG_DONTWAIT, descriptors=DESCRIPTORS)
                if packet is None:
                    return None  # the engine is gone, or has hung up: the ordinary way tells
                if not self.note(packet):
                    packet.close()
                    raise ProtocolError("The engine spoke while nothing ran.")
        self.slot.used, self.slot.lease = self.slot.lease, None
        return self.slot.used

    def cancel(self) -> None:
        """Ask for the end of the run and wait for it, but not long."""
        with contextlib.suppress(OSError, SandboxError):
            self.sock.settimeout(CANCEL_SECONDS)
            packets.send(self.sock, packets.CANCEL)
            while (packet := packets.receive(self.sock, descriptors=DESCRIPTORS)) is not None:
                packet.close()
                if packet.message.get("op") in LAST:
                    return

    def close(self) -> None:
        """Close it with what was lent over it."""
        if self.slot is not None:
            self.slot.close()
        self.sock.close()


class Connections:
    """A handle's connections: one for each run that is under way, and the idle ones. Thread-safe."""

    def __init__(self, dial: Callable[[], socket.socket]) -> None:
        """*dial* makes a new one."""
        self._dial = dial
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._closed = False

    def take(self) -> Connection:
        """An idle one, else a new one. Raises what *dial* raises."""
        with self._lock:
            found = self._idle.pop() if self._idle else None
            if found is not None:
                self._busy.add(found)
                found.sock.setblocking(True)
                return found
        made = Connection(self._dial(), True)
        with self._lock:
            self._busy.add(made)
        return made

    def take_lent(self) -> Connection | None:
        """An idle one that has a lease, or was sent something that may be one."""
        with self._lock:
            found = self._lent()
            if found is None:
                return None
            self._idle.remove(found)
            self._busy.add(found)
        found.sock.setblocking(True)
        return found

    def _lent(self) -> Connection | None:
        waiting = [one for one in reversed(self._idle) if one.slot is not None]
        for one in waiting:
            if one.slot is not None and one.slot.lease is not None:
                return one
        if not waiting:
            return None
        poll = select.poll()
        for one in waiting:
            poll.register(one.sock, select.POLLIN)
        spoken = {fd for fd, _ in poll.poll(0)}
        return next((one for one in waiting if one.sock.fileno() in spoken), None)

    def settle(self, connection: Connection, keep: bool) -> None:
        """Its run is over; *keep* it for another one, unless there are enough."""
        connection.fresh = False
        with self._lock:
            self._busy.discard(connection)
            if keep and not self._closed and len(self._idle) < IDLE_CONNECTIONS:
                self._idle.append(connection)
                return
        connection.close()

    def forget_idle(self) -> None:
        """Close those that are idle."""
        with self._lock:
            idle, self._idle = self._idle, []
        for one in idle:
            one.close()

    def shut_down(self) -> None:
        """Keep none any more, and end what is under way: the thread of each run closes its own."""
        self._closed = True
        self.forget_idle()
        with self._lock:
            busy = list(self._busy)
        for one in busy:
            with contextlib.suppress(OSError):
                one.sock.shutdown(socket.SHUT_RDWR)

    def abandon(self) -> None:
        """In a child after a fork: what is open is the parent's. Close this process's copies."""
        self._closed = True
        self._lock = threading.Lock()
        for one in [*self._idle, *self._busy]:
            one.close()
        self._idle, self._busy = [], set()
