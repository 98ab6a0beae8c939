"""One output stream of a cell: read, counted, kept in part, and handed to a caller who may be slow.

Reading and handing over are two tasks with a bounded backlog between them. While the program lives, a slow caller stops
the reading, so that the pipe fills up and the program waits. Once the program is dead the pipe is read to its end at
once, whatever the caller does, so that the cell's slot never waits for a client; the rest is handed over afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from sandboxd._util.fdwait import readable, resolve
from sandboxd.engine.runs.pace import Pace

if TYPE_CHECKING:
    from sandboxd.outcome.collector import Collector

__all__ = ["Emit", "OutputStream"]

READ_BYTES: Final = 1 << 16
BACKLOG_BYTES: Final = 1 << 18
READS: Final = 16
DRAIN_READS: Final = 17
"""Of READ_BYTES, once everything that could write is dead: the largest pipe (fs.pipe-max-size), and its end."""

Emit = Callable[[int, bytes], Awaitable[None]]
"""Called with 1 or 2 and bytes of stdout or stderr as they come."""


class OutputStream:
    """Stream *number* (1 or 2) on the non-blocking pipe end *fd*, which stays the owner's to close."""

    def __init__(
        self,
        number: int,
        fd: int,
        collector: Collector,
        emit: Emit | None,
        grown: Callable[[], bool],
        did: Callable[[int], object] = lambda _: None,
    ) -> None:
        """*grown* is called after each read; when it says that this was too much, the rest waits for ``finish``.
        *did* is told the size of each piece.
        """
        self._did = did
        self._number = number
        self._fd = fd
        self._collector = collector
        self._emit = emit
        self._grown = grown
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0
        self._change = asyncio.Event()
        self._hurried = False
        self._ended = False
        self._pace = Pace()
        self._rest: asyncio.Future[None] | None = None
        loop = asyncio.get_running_loop()
        self._reading = loop.create_task(self._read())
        self._handing = loop.create_task(self._hand_over()) if emit is not None else None

    async def finish(self) -> None:
        """Everything that could write is dead: read what is left, without waiting for the caller."""
        self._hurried = True
        self._change.set()
        if self._rest is not None:
            resolve(self._rest)
        await self._reading

    async def delivered(self) -> None:
        """Until the caller has taken everything, or has failed to."""
        if self._handing is not None:
            with contextlib.suppress(Exception):
                await self._handing

    def cancel(self) -> None:
        """Stop both tasks; what was not read or handed over is lost."""
        self._reading.cancel()
        if self._handing is not None:
            self._handing.cancel()

    async def _read(self) -> None:
        try:
            reads = last_reads = 0
            while last_reads < DRAIN_READS:
                last_reads += self._hurried
                try:
                    data = os.read(self._fd, READ_BYTES)
                except BlockingIOError:
                    if self._hurried:
                        return  # nobody is left who could write, and a descriptor passed elsewhere is no reason to wait
                    self._pace.reset()
                    await readable(self._fd)
                    continue
                if not data:
                    return
                self._did(len(data))
                self._collector.add(data)
                too_much = self._grown()
                if self._emit is not None:
                    self._backlog.append(data)
                    self._backlog_bytes += len(data)
                    self._change.set()
                    while self._backlog_bytes > BACKLOG_BYTES and self._emit is not None and not self._hurried:
                        await self._changed()
                while too_much and not self._hurried:
                    await self._changed()  # a kill takes its time; meanwhile the pipe is full, and the program waits
                await self._leave_alone(self._pace.after(len(data)))
                reads += 1
                if reads % READS == 0:
                    # A program that writes as fast as this reads must not keep the others waiting.
                    await asyncio.sleep(0)
        finally:
            self._ended = True
            self._change.set()

    async def _leave_alone(self, seconds: float) -> None:
        """Do not read for so long, or until ``finish``."""
        if not seconds or self._hurried:
            return
        loop = asyncio.get_running_loop()
        self._rest = loop.create_future()
        timer = loop.call_later(seconds, resolve, self._rest)
        try:
            await self._rest
        finally:
            timer.cancel()
            self._rest = None

    async def _hand_over(self) -> None:
        assert self._emit is not None  # noqa: S101 (the task exists only then)
        try:
            while True:
                while self._backlog:
                    data = self._backlog.popleft()
                    await self._emit(self._number, data)
                    self._backlog_bytes -= len(data)
                    self._change.set()
                if self._ended:
                    return
                await self._changed()
        finally:
            self._emit = None
            self._backlog.clear()
            self._backlog_bytes = 0
            self._change.set()

    async def _changed(self) -> None:
        self._change.clear()
        await self._change.wait()
