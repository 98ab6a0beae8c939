"""What a program writes to stdout and stderr: kept in part, counted, and handed on where somebody takes it at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Final

from sandboxd.engine.cells.state import State
from sandboxd.engine.runs.pace import Pace
from sandboxd.engine.runs.streams import DRAIN_READS, Emit, OutputStream
from sandboxd.outcome.collector import Collector

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.engine.cells.cell import Cell
    from sandboxd.engine.held_time import HeldTime

__all__ = ["Output"]

READ_BYTES: Final = 1 << 16
READS: Final = 16
"""In one iteration of the loop."""


class Output:
    """Of one run. With *emit* each stream has tasks of its own (``streams``); otherwise it is read as it comes."""

    def __init__(self, keep_bytes: int, emit: Emit | None, grown: Callable[[], bool], held: HeldTime) -> None:
        """*grown* is called after each piece: True when that was too much, and no more is to be read before the end."""
        self.kept = (Collector(keep_bytes), Collector(keep_bytes))
        self._emit = emit
        self._grown = grown
        self._held = held
        self._loop = asyncio.get_running_loop()
        self._paces = (Pace(), Pace())
        self._streams: list[OutputStream] = []

    @property
    def most_bytes(self) -> int:
        """What was written to the stream that got most."""
        return max(one.total_bytes for one in self.kept)

    @property
    def is_streamed(self) -> bool:
        """Whether somebody takes it as it comes."""
        return bool(self._streams)

    def start(self, cell: Cell) -> None:
        """*cell*'s program starts."""
        if self._emit is None or cell.fds is None:
            return
        for number, fd in ((1, cell.fds.stdout), (2, cell.fds.stderr)):
            kept, did = self.kept[number - 1], self._held.did
            self._streams.append(OutputStream(number, fd, kept, self._emit, self._grown, did))

    def add(self, stdout: bytes, stderr: bytes) -> None:
        """Somebody else has read this."""
        for kept, data in zip(self.kept, (stdout, stderr), strict=True):
            kept.add(data)

    def wrote(self, cell: Cell, number: int) -> None:
        """Stream *number* can be read, or is at its end."""
        found = self.read(cell, number)
        if found is None:
            cell.watch_stream(number, False)
            return
        pace = self._paces[number - 1]
        seconds = pace.after(found) if found else 0.0
        if seconds and cell.life.state is State.RUNNING:
            cell.watch_stream(number, False)
            self._loop.call_later(seconds, self._read_again, cell, number)

    def _read_again(self, cell: Cell, number: int) -> None:
        """A stream that was left alone for a while."""
        if cell.life.state is not State.RUNNING:
            return
        found = self.read(cell, number)
        if found:
            self._loop.call_later(self._paces[number - 1].after(found), self._read_again, cell, number)
        elif found is not None:
            self._paces[number - 1].reset()
            cell.watch_stream(number, True)

    def read(self, cell: Cell, number: int) -> int | None:
        """Read what is there, READS pieces at most. How many bytes that was; None at the end, or when it is too
        much. Raises OSError.
        """
        if cell.fds is None:
            return None
        fd = cell.fds.stdout if number == 1 else cell.fds.stderr
        found = 0
        for _ in range(READS):
            try:
                data = os.read(fd, READ_BYTES)
            except BlockingIOError:
                return found
            if not data:
                return None
            found += len(data)
            self._held.did(len(data))
            self.kept[number - 1].add(data)
            if self._grown():
                return None  # a kill takes its time; the rest is read when it is dead
            if len(data) < READ_BYTES:
                break
        return found

    async def finish(self, cell: Cell) -> None:
        """Everything that could write is dead: read what is left."""
        for stream in self._streams:
            await stream.finish()
        if self._streams or cell.fds is None or cell.fds.stdout < 0:
            return
        for number, fd in ((1, cell.fds.stdout), (2, cell.fds.stderr)):
            with contextlib.suppress(BlockingIOError):
                for _ in range(DRAIN_READS):
                    data = os.read(fd, READ_BYTES)
                    if not data:
                        break
                    self.kept[number - 1].add(data)
            self._grown()

    async def delivered(self) -> None:
        """Until the caller has taken what was still on its way."""
        try:
            for stream in self._streams:
                await stream.delivered()
        finally:
            self.drop()

    def drop(self) -> None:
        """Hand nothing on any more."""
        for stream in self._streams:
            stream.cancel()
        # They know the run: a cycle would keep it until the next collection.
        self._streams = []
        self._emit = None
        self._grown = _never


def _never() -> bool:
    """Of a run that is over, nothing is too much."""
    return False
