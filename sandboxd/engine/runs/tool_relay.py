"""One run's tool calls: packets between its cell and the host's program, which holds the tools.

Runs in the engine. The cell's side is its own channel, so who calls is known by where a packet comes from; nothing in
it says so. Bodies are passed on unread. What is judged here is what must hold whatever the two say: the form of each
packet, how many calls there are at a time and in all, whose number an answer bears, and the clocks. A peer that does
not read stops the other one from being read: no more than one packet waits in memory for each direction.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import time
from typing import TYPE_CHECKING, Final, Protocol

from sandboxd.errors import ProtocolError
from sandboxd.inside import channel

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.engine.audit.tool_calls import CallRecords
    from sandboxd.engine.fair_share import FairShare

__all__ = ["Caller", "ToolRelay"]

log = logging.getLogger("sandboxd.engine")

REFUSALS: Final = 10_000
"""Calls that are refused here, and parts that come twice, before a run is heard no more."""
_BEGINS: Final = re.compile(channel.CALL_BEGINS)
_room: Final = bytearray(channel.TOOL_PACKET_BYTES + 1)
_view: Final = memoryview(_room)
PACKETS: Final = 16
"""Of the host's, before it is somebody else's turn."""
BUSY: Final = (
    "busy",
    f"{channel.OUTSTANDING} calls of this run are under way already.",
    "Wait for some of them to return before you make more.",
)
FORMLESS: Final = (
    "invalid_arguments",
    "A call is a JSON object with the tool's name and then its arguments, and this is none.",
    "Use the functions of the module tools.",
)
GONE: Final = (
    "unavailable",
    "The program that holds the tools does not answer any more.",
    "Go on without tools, or end.",
)


class Caller(Protocol):
    """The run whose program calls."""

    def waits(self, waiting: bool) -> None:
        """Whether it waits for at least one tool, from now on."""

    def freeze(self, answer: Callable[[str], None]) -> None:
        """Stop the cell and its clocks; *answer* is told "" when it stands still, or why it does not. May be asked
        again while it is frozen.
        """

    def thaw(self) -> None:
        """Let it go on."""

    def listen(self, on: bool) -> None:
        """Read the cell's packets, or do not for the moment."""


class ToolRelay:
    """Made for a run, with *calls* to make; *theirs* is the host's end, to be handed over."""

    def __init__(
        self, caller: Caller, channel: socket.socket, calls: int, share: FairShare, records: CallRecords | None = None
    ) -> None:
        """*channel* is the cell's, and stays its to close; *share* is the client's part of the engine's time; *records*
        gets what passes through.
        """
        self._records = records
        self._caller = caller
        self._channel = channel
        self._share = share
        self._loop = asyncio.get_running_loop()
        self._host, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._host.setblocking(False)
        self.theirs: socket.socket | None = theirs
        self._total = self._left = calls
        self._refusals = 0
        self._open: set[int] = set()
        self._frozen: set[int] = set()
        self._asked: set[int] = set()  # calls that were frozen once
        # What is in the middle of its parts: number, the next index, and a refusal to be sent at its end.
        self._calling: tuple[int, int, tuple[str, str, str] | None] | None = None
        self._answering: tuple[int, int] | None = None
        self._heard_last = (0, -1)
        self._to_cell: list[bytes] = []
        self._to_host: list[bytes] = []
        self._reading = self._resting = self._dead = self._closed = False

    def take_theirs(self) -> int:
        """The host's end as a descriptor, now the caller's."""
        theirs, self.theirs = self.theirs, None
        assert theirs is not None  # noqa: S101
        return theirs.detach()

    def start(self) -> None:
        """The program starts."""
        self._read(True)

    # From the cell

    def from_cell(self, data: bytes) -> None:
        """One packet of the cell's that may be hostile. Raises ProtocolError: then it is to be read no more."""
        if self._closed:
            return
        begun = time.monotonic()
        try:
            self._from_cell(data)
        finally:
            self._count(begun)

    def _from_cell(self, data: bytes) -> None:
        head = _head(data, channel.CALL_BYTES)
        if head.kind != channel.CALL:
            raise ProtocolError("a cell's frame that is no call")
        # A program that is interrupted while it sends a part cannot know whether that has gone, and sends it again.
        this, before = (head.number, head.index), self._heard_last
        if this == before and (head.index or self._calling is not None):
            self._count_rejected()
            return
        self._heard_last = this
        if self._calling is None:
            if head.index or not head.total:
                raise ProtocolError("a call that does not begin at its beginning")
            refusal = self._admit(head.number, data)
        else:
            number, index, refusal = self._calling
            if head.number != number or head.index != index:
                raise ProtocolError("a call in the middle of another one")
        last = (head.index + 1) * channel.PART_BYTES >= head.total
        self._calling = None if last else (head.number, head.index + 1, refusal)
        if refusal is None:
            if self._records is not None:
                self._records.call(head.number, data[channel.TOOL_HEAD.size :], head.index)
            self._send_host(data)
        elif last:
            if self._records is not None:
                self._records.refused(refusal[0])
            self._answer(head.number, refusal)

    def _admit(self, number: int, data: bytes) -> tuple[str, str, str] | None:
        """Count a new call; or why not. Raises ProtocolError."""
        if number in self._open:
            raise ProtocolError("a call's number is in use")
        if self._dead:
            refusal = GONE
        elif not _BEGINS.match(data, channel.TOOL_HEAD.size):
            refusal = FORMLESS
        elif not self._left:
            refusal = (
                "budget_exceeded",
                f"This run has made all of its {self._total} tool calls.",
                "Ask for more at once in fewer calls, or print what you have and go on in another run.",
            )
        elif len(self._open) >= channel.OUTSTANDING:
            refusal = BUSY
        else:
            self._left -= 1
            self._open.add(number)
            self._asked.discard(number)
            if len(self._open) == 1:
                self._caller.waits(True)
            return None
        self._count_rejected()
        return refusal

    def _count_rejected(self) -> None:
        """Count what leads to nothing. Raises ProtocolError when it is too much."""
        self._refusals += 1
        if self._refusals > REFUSALS:
            raise ProtocolError("a flood of calls")

    # From the host

    def _heard(self) -> None:
        begun = time.monotonic()
        try:
            self._hear()
        finally:
            self._count(begun)

    def _count(self, begun: float) -> None:
        """Whose packets take much of the engine's time lets the others go first."""
        owed = self._share.spent(begun)
        if owed and not self._resting and not self._closed:
            self._resting = True
            self._loop.call_later(owed, self._rested)
            self._read(True)
            self._listen()

    def _rested(self) -> None:
        self._resting = False
        if not self._closed:
            self._read(not self._cell_blocked)
            self._listen()

    def _hear(self) -> None:
        for _ in range(PACKETS):
            if self._closed or self._to_cell:
                return
            try:
                data = bytes(_view[: self._host.recv_into(_room)])
            except BlockingIOError:
                return
            except OSError:
                data = b""
            try:
                if not data:
                    self._host_lost()
                    return
                self._from_host(data)
            except ProtocolError as error:
                log.info("tool calls: the host's program sent %s", error)
                self._host_lost()
                return

    def _from_host(self, data: bytes) -> None:
        head = _head(data, channel.ANSWER_BYTES)
        if self._answering is not None:
            if (head.kind, head.number, head.index) != (channel.ANSWER, *self._answering):
                raise ProtocolError("an answer in the middle of another one")
        elif head.number not in self._open or head.index or self._is_incomplete(head.number):
            raise ProtocolError("an answer to no call")
        if head.kind == channel.FREEZE:
            self._freeze(head.number)
        elif head.kind == channel.THAW:
            self._thaw(head.number)
        elif head.kind == channel.ANSWER:
            if self._answering is None:
                self._over(head.number)
            last = (head.index + 1) * channel.PART_BYTES >= head.total
            self._answering = None if last else (head.number, head.index + 1)
            if self._records is not None:
                self._records.answer(head.number, data[channel.TOOL_HEAD.size :], last)
            self._send_cell(data)
        else:
            raise ProtocolError("a frame that is not the host's to send")

    def _is_incomplete(self, number: int) -> bool:
        """Whether the call's last part has yet to come."""
        return self._calling is not None and self._calling[0] == number and self._calling[2] is None

    def _over(self, number: int) -> None:
        """The tool has answered; what is left is the cell's affair."""
        self._thaw(number)
        self._open.discard(number)
        if not self._open:
            self._caller.waits(False)

    def _freeze(self, number: int) -> None:
        if number in self._asked:
            raise ProtocolError("a second freeze of one call")
        self._asked.add(number)
        self._frozen.add(number)
        self._listen()
        self._caller.freeze(lambda why: self._stopped(number, why))

    def _stopped(self, number: int, why: str) -> None:
        if self._closed or number not in self._frozen:
            return
        if why:
            self._thaw(number)
        self._send_host(channel.tool_frame(channel.FROZEN, number, why.encode("utf-8", "replace")[:1024]))

    def _thaw(self, number: int) -> None:
        if number in self._frozen:
            self._frozen.discard(number)
            if not self._frozen:
                self._caller.thaw()
                self._listen()

    def _host_lost(self) -> None:
        """The host's program has no ear for this run any more: every call is answered from here."""
        self._dead = True
        self._read(False)
        self._to_host.clear()
        self._flush_host()
        unanswered = sorted(self._open)
        if self._answering is not None:
            unanswered.append(self._answering[0])  # begun anew: the cell forgets the parts that it has
            self._answering = None
        for number in unanswered:
            self._over(number)
            if self._is_incomplete(number):
                assert self._calling is not None  # noqa: S101
                self._calling = number, self._calling[1], GONE  # answered when its last part has come
            else:
                self._answer(number, GONE)

    # Sending

    def _answer(self, number: int, refusal: tuple[str, str, str]) -> None:
        code, message, hint = refusal
        error = {"code": code, "message": message, "hint": hint}
        body = json.dumps({"ok": False, "value": None, "error": error}).encode()
        self._send_cell(channel.tool_frame(channel.ANSWER, number, body))

    def _send_cell(self, data: bytes) -> None:
        self._to_cell.append(data)
        if len(self._to_cell) == 1:
            self._flush_cell()

    def _flush_cell(self) -> None:
        blocked = self._flush(self._channel, self._to_cell)
        if blocked is not self._cell_blocked:
            self._cell_blocked = blocked
            fd = self._channel.fileno()
            if blocked:
                self._loop.add_writer(fd, self._flush_cell)
            else:
                self._loop.remove_writer(fd)
            self._read(not blocked)
            self._listen()

    def _send_host(self, data: bytes) -> None:
        if self._dead:
            return
        self._to_host.append(data)
        if len(self._to_host) == 1:
            self._flush_host()

    def _flush_host(self) -> None:
        blocked = self._flush(self._host, self._to_host)
        if blocked is not self._host_blocked:
            self._host_blocked = blocked
            if blocked:
                self._loop.add_writer(self._host.fileno(), self._flush_host)
            else:
                self._loop.remove_writer(self._host.fileno())
            self._listen()

    _cell_blocked = _host_blocked = False

    def _listen(self) -> None:
        """Read the cell only while what it says can go on. Not while it is frozen: it takes no answer, and a refusal
        that waits for it would keep the host from being read, and so the thaw.
        """
        self._caller.listen(not (self._cell_blocked or self._host_blocked or self._resting or self._frozen))

    @staticmethod
    def _flush(sock: socket.socket, waiting: list[bytes]) -> bool:
        """Send what waits; whether something is left because the other side does not read. One that is gone is told by
        its own end.
        """
        while waiting:
            try:
                sock.send(waiting[0], socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
            except OSError:
                waiting.clear()
                return False
            del waiting[0]
        return False

    def _read(self, on: bool) -> None:
        on = on and not (self._dead or self._closed or self._resting)
        if on is not self._reading:
            self._reading = on
            if on:
                self._loop.add_reader(self._host.fileno(), self._heard)
            else:
                self._loop.remove_reader(self._host.fileno())

    def close(self) -> None:
        """The run is over: the host's workers find the end of their channel, the cell hears no more."""
        if self._closed:
            return
        self._closed = True
        self._read(False)
        if self._host_blocked:
            self._loop.remove_writer(self._host.fileno())
        if self._cell_blocked:
            self._loop.remove_writer(self._channel.fileno())
        self._host.close()
        if self.theirs is not None:
            self.theirs.close()
        self._open.clear()
        self._frozen.clear()
        if self._records is not None:
            self._records.close()


def _head(data: bytes, most_bytes: int) -> channel.ToolHead:
    """The head of a packet that may be hostile. Raises ProtocolError."""
    try:
        return channel.parse_tool_frame(data, most_bytes)
    except channel.FrameError as error:
        raise ProtocolError(str(error)) from None
