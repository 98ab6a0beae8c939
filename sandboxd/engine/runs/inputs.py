"""What a program is given: its files and source, its stdin, and its arguments, which go down the channel last."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from typing import TYPE_CHECKING, Final

from sandboxd._util.fdwait import in_thread
from sandboxd.engine.cells import workspace
from sandboxd.inside.channel import program_message

if TYPE_CHECKING:
    from sandboxd.engine.cells.cell import Cell
    from sandboxd.engine.fair_share import FairShare
    from sandboxd.outcome.collected import Known
    from sandboxd.protocol.run_header import Run

__all__ = ["Inputs"]

log = logging.getLogger("sandboxd.engine")

PACKET_BYTES: Final = 1 << 16
STDIN_BYTES: Final = 1 << 20
WRITES: Final = 16
"""In one iteration of the loop."""
LOOP_CHARACTERS: Final = 1 << 18
"""A longer source, and input files, are written by another thread than the loop's."""


class Inputs:
    """Of one run. ``put`` before its program starts, ``start`` then, ``stop`` at the end."""

    def __init__(self, identity: str, request: Run, share: FairShare) -> None:
        """*share* is the client's part of the engine's time."""
        self.known: Known = {}
        """The files that were written, as they were then."""
        self._identity = identity
        self._request: Run | None = request
        self._share = share
        self._loop = asyncio.get_running_loop()
        self._stdin: memoryview | None = None
        self._message: memoryview | None = None

    async def put(self, cell: Cell, owner: int) -> None:
        """Write source and files into *cell*, as the id *owner* inside. Raises OSError, InvalidRequest when they do not
        fit.
        """
        request = self._request
        assert request is not None  # noqa: S101
        assert cell.fds is not None  # noqa: S101
        if request.files or len(request.code) > LOOP_CHARACTERS:
            self.known, seconds = await in_thread(_write, cell, request, owner)
            self._share.took(seconds)
        else:
            cell.put_source(request.code.encode(), request.filename)
        if request.stdin is None or not len(request.stdin):
            cell.fds.close("stdin")
        else:
            self._stdin = request.stdin
        tools = None if request.tools is None else request.tools.module
        message = program_message(request.args, request.env, request.filename, request.results, request.code, tools)
        self._message = memoryview(message)
        self._request = None  # it may hold many megabytes

    async def settle(self, ended: asyncio.Future[None]) -> None:
        """Until a file that the program changes can be told by its time from one that it leaves, or *ended* is."""
        while self.known and not workspace.settled(self.known) and not ended.done():
            await asyncio.sleep(0.001)

    @property
    def is_feeding(self) -> bool:
        """Whether some of its stdin is still to come."""
        return self._stdin is not None

    def start(self, cell: Cell) -> None:
        """The program may have them."""
        if self._stdin is not None:
            self._feed_stdin(cell)
        self._hand_over(cell)

    def _hand_over(self, cell: Cell) -> None:
        """Send what is left of the arguments, in packets that any socket takes."""
        if cell.channel is None or self._message is None:
            return
        try:
            while len(self._message):
                self._message = self._message[cell.channel.send(self._message[:PACKET_BYTES], socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            self._loop.add_writer(cell.channel.fileno(), self._hand_over, cell)
            return
        except OSError:
            log.info("run %s: the cell was gone before its program came", self._identity)
        self._stop_message(cell)

    def _stop_message(self, cell: Cell) -> None:
        if self._message is not None:
            self._message = None
            if cell.channel is not None:
                self._loop.remove_writer(cell.channel.fileno())

    def _feed_stdin(self, cell: Cell) -> None:
        if cell.fds is None or self._stdin is None:
            return
        fd = cell.fds.stdin
        try:
            for _ in range(WRITES):
                self._stdin = self._stdin[os.write(fd, self._stdin[:STDIN_BYTES]) :]
                if not len(self._stdin):
                    break
            else:
                raise BlockingIOError  # the others' turn
        except BlockingIOError:
            self._loop.add_writer(fd, self._feed_stdin, cell)
            return
        except BrokenPipeError:
            log.debug("run %s: the program closed its stdin", self._identity)
        self._stop_stdin(cell)

    def _stop_stdin(self, cell: Cell) -> None:
        self._stdin = None
        if cell.fds is not None and cell.fds.stdin >= 0:
            self._loop.remove_writer(cell.fds.stdin)
            cell.fds.close("stdin")

    def stop(self, cell: Cell) -> None:
        """Send no more."""
        self._stop_stdin(cell)
        self._stop_message(cell)


def _write(cell: Cell, request: Run, owner: int) -> tuple[Known, float]:
    """Write *request*'s source and files into *cell*, as *owner*; the seconds of CPU time that it took."""
    begun = time.thread_time()
    assert cell.fds is not None  # noqa: S101
    cell.put_source(request.code.encode(), request.filename)
    known = workspace.put_files(cell.zygote.files, cell.fds.workspace, request.files, owner)
    return known, time.thread_time() - begun
