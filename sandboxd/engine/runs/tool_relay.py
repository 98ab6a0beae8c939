"""One run's tool calls: packets between its cell and the host's program, which holds the tools.

Runs in the engine. The cell's side is its own channel, so who calls is known by where a packet comes from; nothing in
it says so. Bodies are passed on unread. What must hold whatever the two say is the affair of ``CallTable`` (the form of
each packet, how many calls there are at a time and in all, whose number an answer bears) and of the run's clocks. A
peer that does not read stops the other one from being read: no more than one packet waits in memory for each direction.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from typing import TYPE_CHECKING, Final, Protocol

from sandboxd.engine.runs.backlog import Backlog
from sandboxd.engine.runs.call_table import GONE, CallTable, Refusal
from sandboxd.errors import ProtocolError
from sandboxd.inside import channel

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.engine.audit.tool_calls import CallRecords
    from sandboxd.engine.fair_share import FairShare

__all__ = ["Caller", "ToolRelay"]

log = logging.getLogger("sandboxd.engine")

_room: Final = bytearray(channel.TOOL_PACKET_BYTES + 1)
_view: Final = memoryview(_room)
PACKETS: Final = 16
"""Of the host's, before it is somebody else's turn."""


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
        self._share = share
        self._loop = asyncio.get_running_loop()
        self._host, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._host.setblocking(False)
        self.theirs: socket.socket | None = theirs
        self._calls = CallTable(calls, caller.waits)
        self._to_cell = Backlog(channel, self._cell_changed)
        self._to_host = Backlog(self._host, self._listen)
        self._is_reading = self._is_resting = self._is_closed = False

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
        if self._is_closed:
            return
        begun = time.monotonic()
        try:
            self._from_cell(data)
        finally:
            self._count(begun)

    def _from_cell(self, data: bytes) -> None:
        head = _head(data, channel.CALL_BYTES)
        judged = self._calls.call_part(head, data)
        if judged is None:
            return
        refusal, last = judged
        if refusal is None:
            if self._records is not None:
                self._records.call(head.number, data[channel.TOOL_HEAD.size :], head.index)
            self._send_host(data)
        elif last:
            if self._records is not None:
                self._records.refused(refusal[0])
            self._answer(head.number, refusal)

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
        if owed and not self._is_resting and not self._is_closed:
            self._is_resting = True
            self._loop.call_later(owed, self._rested)
            self._read(True)
            self._listen()

    def _rested(self) -> None:
        self._is_resting = False
        if not self._is_closed:
            self._cell_changed()

    def _hear(self) -> None:
        for _ in range(PACKETS):
            if self._is_closed or self._to_cell:
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
        self._calls.check_host(head)
        if head.kind == channel.FREEZE:
            self._freeze(head.number)
        elif head.kind == channel.THAW:
            self._thaw(head.number)
        else:
            first, last = self._calls.answer_part(head)
            if first:
                self._over(head.number)
            if self._records is not None:
                self._records.answer(head.number, data[channel.TOOL_HEAD.size :], last)
            self._to_cell.send(data)

    def _over(self, number: int) -> None:
        self._thaw(number)
        self._calls.finish(number)

    def _freeze(self, number: int) -> None:
        self._calls.freeze(number)
        self._listen()
        self._caller.freeze(lambda why: self._stopped(number, why))

    def _stopped(self, number: int, why: str) -> None:
        if self._is_closed or not self._calls.is_frozen_for(number):
            return
        if why:
            self._thaw(number)
        self._send_host(channel.tool_frame(channel.FROZEN, number, why.encode("utf-8", "replace")[:1024]))

    def _thaw(self, number: int) -> None:
        if self._calls.thaw(number):
            self._caller.thaw()
            self._listen()

    def _host_lost(self) -> None:
        """The host's program has no ear for this run any more: every call is answered from here."""
        unanswered = self._calls.lose_host()
        self._read(False)
        self._to_host.drop()
        for number in unanswered:
            self._over(number)
            if not self._calls.refuse_rest(number):  # else it is answered when its last part has come
                self._answer(number, GONE)

    # Sending

    def _answer(self, number: int, refusal: Refusal) -> None:
        code, message, hint = refusal
        error = {"code": code, "message": message, "hint": hint}
        body = json.dumps({"ok": False, "value": None, "error": error}).encode()
        self._to_cell.send(channel.tool_frame(channel.ANSWER, number, body))

    def _send_host(self, data: bytes) -> None:
        if not self._calls.is_host_gone:
            self._to_host.send(data)

    # Who is read

    def _cell_changed(self) -> None:
        """The cell takes packets again, or takes none for the moment."""
        self._read(not self._to_cell.is_blocked)
        self._listen()

    def _listen(self) -> None:
        """Read the cell only while what it says can go on. Not while it is frozen: it takes no answer, and a refusal
        that waits for it would keep the host from being read, and so the thaw.
        """
        stopped = self._to_cell.is_blocked or self._to_host.is_blocked or self._is_resting or self._calls.is_frozen
        self._caller.listen(not stopped)

    def _read(self, on: bool) -> None:
        """Read the host, if that may be now."""
        on = on and not (self._calls.is_host_gone or self._is_closed or self._is_resting)
        if on is not self._is_reading:
            self._is_reading = on
            if on:
                self._loop.add_reader(self._host.fileno(), self._heard)
            else:
                self._loop.remove_reader(self._host.fileno())

    def close(self) -> None:
        """The run is over: the host's workers find the end of their channel, the cell hears no more."""
        if self._is_closed:
            return
        self._is_closed = True
        self._read(False)
        self._to_host.close()
        self._to_cell.close()
        self._host.close()
        if self.theirs is not None:
            self.theirs.close()
        self._calls.close()
        if self._records is not None:
            self._records.close()


def _head(data: bytes, most_bytes: int) -> channel.ToolHead:
    """The head of a packet that may be hostile. Raises ProtocolError."""
    try:
        return channel.parse_tool_frame(data, most_bytes)
    except channel.FrameError as error:
        raise ProtocolError(str(error)) from None
