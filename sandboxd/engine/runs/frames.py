"""What a program says on its cell's channel: tool calls, and at the end its finished frame. All of it is hostile."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from sandboxd.engine.runs.freezer import Freezer, Waiter
from sandboxd.engine.runs.tool_relay import ToolRelay
from sandboxd.errors import ProtocolError
from sandboxd.inside import channel
from sandboxd.outcome.judge import Finished, parse_finished

if TYPE_CHECKING:
    from sandboxd.engine.audit.tool_calls import CallRecords
    from sandboxd.engine.cells.cell import Cell
    from sandboxd.engine.fair_share import FairShare

__all__ = ["FrameReader", "LendTools"]

log = logging.getLogger("sandboxd.engine")

MALFORMED: Final = 16
"""Frames of a dead cell that are looked at in vain before its finished one is not sought any more."""
LendTools = Callable[[str, int], Awaitable[None]]
"""Hands the host's end of a run's tool calls, a descriptor that is its to close, to the client."""


class FrameReader:
    """Of one run."""

    def __init__(self, identity: str) -> None:
        self.finished: Finished | None = None
        """Its finished frame, once it has come."""
        self._identity = identity
        self._parked_said = False
        self._malformed = 0
        self._is_over = False
        self._has_tools = False
        self._relay: ToolRelay | None = None

    async def open_tools(
        self, waiter: Waiter, cell: Cell, calls: int, share: FairShare, records: CallRecords | None, lend: LendTools
    ) -> None:
        """The program may make so many *calls*; *lend* gets the end at which they arrive."""
        if cell.channel is None:
            return
        self._has_tools = True
        self._relay = ToolRelay(Freezer(waiter, cell), cell.channel, calls, share, records)
        await lend(self._identity, self._relay.take_theirs())

    @property
    def has_tools(self) -> bool:
        """Whether it may call tools now."""
        return self._relay is not None

    def start(self) -> None:
        """The program starts."""
        if self._relay is not None:
            self._relay.start()

    def feed(self, data: bytes, cell: Cell | None) -> bool:
        """One packet, or b"" at the end of the channel; whether it was the finished frame."""
        if not data or self.finished is not None:
            return False  # the end of the channel: its process tells the rest
        if data == channel.PARKED and not self._parked_said:
            self._parked_said = True  # it crossed with the program
            return False
        try:
            if data[0] == channel.TOOL_MAGIC and self._has_tools:
                if self._relay is not None:
                    self._relay.from_cell(data)
                return False
            self.finished = parse_finished(data)
        except ProtocolError as error:
            # Not ours: the program wrote it. Its own end is still to come.
            log.info("run %s: a frame that is none: %s", self._identity, error)
            self._malformed += 1
        self._is_over = True  # nothing after it counts
        if cell is not None:
            cell.stop_reading()
        return self.finished is not None

    def feed_last(self, cell: Cell) -> None:
        """*cell* is dead: look in what it said for the finished frame, which may have crossed with a kill of ours."""
        for data in cell.last_packets():
            self.feed(data, cell)
            if self.finished is not None or self._malformed >= MALFORMED:
                break

    def set_reading(self, cell: Cell, on: bool) -> None:
        """Read its packets, or do not for the moment."""
        cell.set_reading(on and not self._is_over)

    def stop_tools(self) -> None:
        """The program is over, and with it the calls of its that are under way."""
        relay, self._relay = self._relay, None
        if relay is not None:
            relay.close()
