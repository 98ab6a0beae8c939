"""One run: a cell is taken for it, its program handed over, and how it ended told.

    take a parked cell, or wait for one; set what of the limits can still be set
    inputs and source are written through the engine's descriptors; the arguments go down the channel: the clock starts
    wait for the first of: finished frame, exit, wall clock, CPU time, OOM kill, output flood, caller gone
    an ordinary end, nothing left behind: counters, judge, answer; the cell dies while the answer is on its way
    any other end: SIGKILL, wait until nothing of the cell lives, read the streams to their end, counters, files; answer

What comes from the cell (frames, output, files) is hostile: bounded, parsed strictly, never acted upon.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from sandboxd._util.fdwait import in_thread
from sandboxd.engine.cells import workspace
from sandboxd.engine.cells.shape import UNLIMITED_BYTES, leaf_limits
from sandboxd.engine.cells.state import Event, State
from sandboxd.engine.cells.zygote import ZygoteLost
from sandboxd.engine.fair_share import FairShare
from sandboxd.engine.runs.clock import Meter, Mode
from sandboxd.engine.runs.freezer import Freezer
from sandboxd.engine.runs.pace import Pace
from sandboxd.engine.runs.streams import DRAIN_READS, Emit, OutputStream
from sandboxd.engine.runs.tool_relay import ToolRelay
from sandboxd.errors import ProtocolError, Unavailable
from sandboxd.outcome.answer import RunAnswer, answer
from sandboxd.outcome.collector import Collector
from sandboxd.outcome.judge import Cause, Evidence, Finished, Space, parse_finished
from sandboxd.protocol import toolframes

if TYPE_CHECKING:
    from sandboxd.cgroup import Counters
    from sandboxd.engine.cells.active_policy import ActivePolicy
    from sandboxd.engine.cells.cell import Cell
    from sandboxd.engine.core import Engine
    from sandboxd.limits import LimitValue
    from sandboxd.protocol.run_header import Run

__all__ = ["CellRun", "Emit"]

log = logging.getLogger("sandboxd.engine")

MESSAGE_HEAD_BYTES: Final = 8
READ_BYTES: Final = 1 << 16
READS: Final = 16
INLINE_CHARACTERS: Final = 24 << 10
"""A source up to this length travels with the arguments, too: the cell need not read the file."""
MALFORMED: Final = 16
"""Frames of a dead cell that are looked at in vain before its finished one is not sought any more."""
OOM_PAUSES: Final = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064)
"""Seconds between the looks for a kill that is counted after it was announced."""
LOOP_CHARACTERS: Final = 1 << 18
"""A longer source, and input files, are written by another thread than the loop's."""
LendTools = Callable[[str, int], Awaitable[None]]
"""Hands the host's end of a run's tool calls, a descriptor that is its to close, to the client."""


class CellRun:
    """One run of *prepared*'s policy under *limits*. ``execute`` once; ``cancel`` at any time; ``close`` at the end."""

    def __init__(
        self,
        engine: Engine,
        prepared: ActivePolicy,
        request: Run | None,
        limits: dict[str, LimitValue],
        identity: str,
        emit: Emit | None,
        lend_tools: LendTools | None = None,
        share: FairShare | None = None,
    ) -> None:
        self.id = identity
        self.limits = limits
        self.policy = prepared.name
        self.started: float | None = None
        self.wall_end = self.cpu_look = float("inf")
        self.cell: Cell | None = None
        self._engine = engine
        self._prepared = prepared
        self._request: Run | None = request
        self._emit = emit
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._cause: Cause | None = None
        self._failure: BaseException | None = None
        self._finished: Finished | None = None
        self._streams: list[OutputStream] = []
        keep = int(limits["output_bytes"] or 0)
        self._outputs = (Collector(keep), Collector(keep))
        self._paces = (Pace(), Pace())
        self._known: workspace.Known = {}
        self._spaces: list[Space] = []
        self._stdin: memoryview | None = None
        self._message: memoryview | None = None
        self._parked_said = False
        self._lend_tools = lend_tools
        self._share = share or FairShare(free=True)
        self._link: ToolRelay | None = None
        self._has_tools = False
        self._meter: Meter | None = None
        self._reads_no_more = False
        self._malformed = 0
        self._looks: int | None = None

    # From the outside

    @property
    def state(self) -> str:
        """For people: where it stands."""
        return "queued" if self.cell is None else self.cell.life.state.value

    @property
    def is_queued(self) -> bool:
        """Whether nothing of it exists yet."""
        return self.cell is None

    def cancel(self) -> None:
        """The caller wants the end: now, whatever state the run is in."""
        self._end_by(Event.CANCELLED, "cancelled")

    def facts(self) -> dict[str, Any]:
        """For ``ps``: state and what was used so far."""
        used = memory = pid = uid = None
        cell = self.cell
        if cell is not None and cell.slot is not None:
            uid = self._engine.slot_ids.host_uid(cell.slot.index)
            if cell.life.state is State.RUNNING:
                with contextlib.suppress(OSError):
                    counters = cell.leaf.counters()
                    used, memory = counters.cpu_usec / 1e6, counters.memory_current_bytes
                    pid = min(cell.leaf.pids(), default=None)
        return {
            "id": self.id,
            "policy": self.policy,
            "state": self.state,
            "uid": uid,
            "pid": pid,
            "age_seconds": None if self.started is None else round(time.monotonic() - self.started, 3),
            "cpu_seconds": used,
            "memory_bytes": memory,
        }

    # A run that its caller starts itself (leases.py)

    def start_leased(self, cell: Cell, ago_seconds: float) -> None:
        """The caller handed its program to *cell* so long ago; the clocks run from then."""
        self.cell = cell
        cell.attach(self)
        assert cell.fds is not None  # noqa: S101
        cell.fds.close("stdin")
        cell.leaf.oom_clear()
        self._start_clocks(ago_seconds)
        cell.go(with_streams=False)
        self.ran_out()  # it may have happened already

    def began(self, ago_seconds: float) -> None:
        """Its caller says that it began so long ago, which may be earlier than was known here."""
        if self.started is not None and (late := self.started - (time.monotonic() - ago_seconds)) > 0:
            self.started -= late
            self.wall_end -= late
            self._engine.clock.changed(self)

    def start_lost(self, cell: Cell) -> None:
        """The caller handed its program to *cell*, which is dead with its zygote."""
        self.cell = cell
        self.started = time.monotonic()
        cell.attach(self)
        self.lost()

    async def finish_leased(self, stdout: bytes, stderr: bytes, frame: bytes) -> RunAnswer:
        """Go on from where the caller stopped: what it has read so far, and the finished frame if it came."""
        cell = self.cell
        assert cell is not None  # noqa: S101
        for output, data in zip(self._outputs, (stdout, stderr), strict=True):
            output.add(data)
        if cell.life.state is State.RUNNING:
            cell.resume_reading()
        if frame:
            self.spoke(frame)
        self._grown()
        return await self._to_its_end(cell, 0.0, 0.0, True)

    # The run

    async def execute(self, queued_seconds: float) -> RunAnswer:
        """The whole life but for ``close``, which must follow. The files of the answer are the caller's.

        Raises Unavailable when the host refused a step, InvalidRequest when the inputs do not fit.
        """
        begun = time.monotonic()
        pool = self._prepared.pool
        cell = pool.take(self.limits)
        warm = cell is not None
        if cell is None:
            try:
                cell = await pool.acquire(self.limits)
            except ZygoteLost as error:
                log.warning("run %s: zygote lost: %s", self.id, error)
                self._cause = "lost"
                return self._tell(queued_seconds, 0.0, 0.0, None, workspace.Collected(), False)
        self.cell = cell
        try:
            cell.attach(self)
            tools = self._request.tools if self._request is not None else None
            await self._put_inputs(cell)
            if tools is not None and self._lend_tools is not None and cell.channel is not None:
                records = self._engine.trail.calls(self.id)
                self._has_tools = True
                self._link = ToolRelay(Freezer(self, cell), cell.channel, tools.calls, self._share, records)
                await self._lend_tools(self.id, self._link.take_theirs())
            if self._known:
                while not workspace.settled(self._known) and not self._ended.done():
                    await asyncio.sleep(0.001)
            if not self._ended.done():
                self._go(cell)
        except BaseException as error:
            self._fail(cell, error)
        setup = (self.started or time.monotonic()) - begun
        return await self._to_its_end(cell, queued_seconds, setup, warm)

    def _fail(self, cell: Cell, error: BaseException) -> None:
        self._failure = self._failure or error
        if cell.life.state not in (State.ENDING, State.COLLECTING):
            cell.end(Event.FAILED if self.started is None else Event.CANCELLED)

    async def _to_its_end(self, cell: Cell, queued_seconds: float, setup: float, warm: bool) -> RunAnswer:
        """From the program's start to the answer."""
        if self._failure is None and not self._ended.done():
            try:
                await self._ended
            except BaseException as error:
                self._fail(cell, error)
        now = time.monotonic()
        run = now - self.started if self.started is not None else 0.0
        self._stop_tools(now)
        self._look(cell)
        if self._failure is None and self._is_clean(cell):
            return self._tell(queued_seconds, setup, run, cell.leaf.counters(), workspace.Collected(), warm)
        return await self._after_death(cell, queued_seconds, setup, run, warm)

    def _is_clean(self, cell: Cell) -> bool:
        """Whether it ended by its own word and left nothing behind: then its answer need not wait for its death."""
        if self._finished is None or self._cause is not None or self._streams or self._stdin is not None:
            return False
        assert cell.fds is not None  # noqa: S101
        try:
            # One task at most is its main thread, which said so; what it wrote before is in the pipes.
            if cell.leaf.tasks() > 1 or not workspace.is_untouched(cell.fds.workspace, self._known):
                return False
            for number in (1, 2):
                self._read_stream(cell, number)
            return self._cause is None
        except OSError:
            return False

    def _look(self, cell: Cell) -> None:
        """See how full its file systems are, once, before the kill: files without a name go with their processes."""
        if not self._spaces and self.started is not None and cell.fds is not None and cell.fds.workspace >= 0:
            with contextlib.suppress(OSError):  # the kill comes next, whatever a filter around the engine refuses
                self._spaces = workspace.spaces(cell.fds)

    async def _after_death(self, cell: Cell, queued: float, setup: float, run: float, warm: bool) -> RunAnswer:
        """Nothing of it may live any more; only then its files are read."""
        if cell.life.state not in (State.ENDING, State.COLLECTING):
            cell.end(Event.FINISHED if self._finished is not None else Event.EXITED)
        reaper = self._loop.create_task(self._die(cell))
        while not reaper.done():
            try:
                await asyncio.shield(reaper)
            except asyncio.CancelledError as error:  # the engine closes: first the cell, then the task
                self._failure = self._failure or error
        collected = workspace.Collected()
        counters: Counters | None = None
        try:
            if self._failure is not None:
                raise self._failure
            if self.started is None and self._cause is None:
                raise Unavailable("cell", "the new cell ended before its program came", fix="look at the engine's log")
            if cell.slot is not None and self.started is not None:
                counters = cell.leaf.counters() if cell.leaf.counts else None
            if cell.fds is not None and cell.fds.workspace >= 0 and self.started is not None:
                collected = await self._collect(cell.fds.workspace)
            return self._tell(queued, setup, run, counters, collected, warm)
        except BaseException as error:
            collected.close()
            if self.started is None or not isinstance(error, Exception):
                self._drop_streams()
                raise
            # The program may have had its effects: that is a Result, never an error that promises nothing ran.
            log.exception("run %s: its end could not be told", self.id)
            self._cause = "lost"
            return self._tell(queued, setup, run, None, workspace.Collected(), warm)

    def serves(self, prepared: ActivePolicy) -> bool:
        """Whether it is *prepared*'s, be it that it still queues."""
        return self._prepared is prepared

    def close(self) -> None:
        """End the cell, if it still lives, and let go of it."""
        cell, self.cell = self.cell, None
        self._engine.clock.remove(self)
        if cell is None:
            return
        if cell.life.state not in (State.ENDING, State.COLLECTING):
            cell.end(Event.FINISHED if self._finished is not None else Event.CANCELLED)
        self._stop_stdin(cell)
        self._stop_message(cell)
        self._stop_tools(time.monotonic())
        cell.let_go()

    async def delivered(self) -> None:
        """After ``execute``: until the caller has taken the output that was still on its way. No slot waits for
        that.
        """
        try:
            for stream in self._streams:
                await stream.delivered()
        finally:
            self._drop_streams()

    def _drop_streams(self) -> None:
        for stream in self._streams:
            stream.cancel()
        self._streams = []  # they know this run: a cycle would keep it until the next collection
        self._emit = None

    async def _put_inputs(self, cell: Cell) -> None:
        request, limits = self._request, self.limits
        assert request is not None  # noqa: S101
        assert cell.fds is not None  # noqa: S101
        assert cell.slot is not None  # noqa: S101
        if limits != self._prepared.limits:
            try:
                cell.leaf.set_limits(leaf_limits(limits))
            except OSError as error:
                fix = "the engine must own its cgroup subtree; sandboxd doctor says what is missing"
                raise Unavailable("cgroup", str(error), errno=error.errno, fix=fix) from error
        owner = self._engine.slot_ids.guest_uid(cell.slot.index)
        if request.files or len(request.code) > LOOP_CHARACTERS:
            self._known, seconds = await in_thread(_write_inputs, cell, request, owner)
            self._share.took(seconds)
        else:
            cell.put_source(request.code.encode(), request.filename)
        if request.stdin is None or not len(request.stdin):
            cell.fds.close("stdin")
        else:
            self._stdin = request.stdin
        message: dict[str, Any] = {
            "args": list(request.args),
            "env": request.env,
            "filename": request.filename,
            "results": request.results,
        }
        if len(request.code) <= INLINE_CHARACTERS:
            message["code"] = request.code
        if request.tools is not None:
            message["tools"] = request.tools.module
        text = json.dumps(message).encode()
        self._message = memoryview(len(text).to_bytes(MESSAGE_HEAD_BYTES, "little") + text)
        self._request = None  # it may hold many megabytes

    def _go(self, cell: Cell) -> None:
        """Start the clocks and hand the program over."""
        assert cell.fds is not None  # noqa: S101
        if self._emit is not None:
            for number, fd in ((1, cell.fds.stdout), (2, cell.fds.stderr)):
                output, did = self._outputs[number - 1], self._engine.held.did
                self._streams.append(OutputStream(number, fd, output, self._emit, self._grown, did))
        cell.leaf.oom_clear()
        self._start_clocks()
        cell.go(not self._streams)
        if self._stdin is not None:
            self._feed_stdin()
        self._hand_over()

    def _start_clocks(self, ago_seconds: float = 0.0) -> None:
        self.started = now = time.monotonic() - ago_seconds
        wall, cpu = self.limits["wall_seconds"], self.limits["cpu_seconds"]
        if wall is not None:
            self.wall_end = now + float(wall)
        if self._link is not None:
            self._meter = Meter(self.limits, now)
            self._link.start()
        if cpu is not None:
            self.cpu_look = now + self._cpu_left(float(cpu))
        self._engine.clock.add(self)

    def _hand_over(self) -> None:
        """Send what is left of the program's arguments, in packets that any socket takes."""
        cell = self.cell
        assert cell is not None  # noqa: S101
        if cell.channel is None or self._message is None:
            return
        try:
            while len(self._message):
                self._message = self._message[cell.channel.send(self._message[:READ_BYTES], socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            self._loop.add_writer(cell.channel.fileno(), self._hand_over)
            return
        except OSError:
            log.info("run %s: the cell was gone before its program came", self.id)
        self._stop_message(cell)

    def _stop_message(self, cell: Cell) -> None:
        if self._message is not None:
            self._message = None
            if cell.channel is not None:
                self._loop.remove_writer(cell.channel.fileno())

    # Events

    def _end_by(self, event: Event, cause: Cause | None) -> None:
        """Take *event*; the first one that ends the run decides its cause. Only a clean end lets the cell live on until
        the answer is made.
        """
        if self._ended.done():
            if event is not Event.CANCELLED or self.cell is None:
                return
            self.cell.end(event)
            return
        self._cause = cause
        self._ended.set_result(None)
        if self.cell is not None and event not in (Event.FINISHED, Event.LOST):
            self._look(self.cell)
            self.cell.end(event)

    def spoke(self, data: bytes) -> None:
        """As ``cell.RunEvents``."""
        if not data or self._finished is not None:
            return  # the end of the channel: its process tells the rest
        if data == b"P" and not self._parked_said:
            self._parked_said = True  # it crossed with the program
            return
        try:
            if data[0] == toolframes.MAGIC and self._has_tools:
                if self._link is not None:
                    self._link.from_cell(data)
                return
            self._finished = parse_finished(data)
        except ProtocolError as error:
            # Not ours: the program wrote it. Its own end is still to come.
            log.info("run %s: a frame that is none: %s", self.id, error)
            self._malformed += 1
            self._stop_reading()
            return
        self._stop_reading()  # nothing after it counts
        self._end_by(Event.FINISHED, None)

    def _stop_reading(self) -> None:
        self._reads_no_more = True
        if self.cell is not None:
            self.cell.stop_reading()

    def rang(self) -> None:
        """As ``cell.RunEvents``."""

    def exited(self) -> None:
        """As ``cell.RunEvents``."""
        self._end_by(Event.EXITED, None)

    def lost(self) -> None:
        """As ``cell.RunEvents``."""
        self._end_by(Event.LOST, "lost")

    def ran_out(self) -> None:
        """As ``cell.RunEvents``."""
        looking, self._looks = self._looks is not None, 0
        if not looking:
            self._look_for_kill()

    def _look_for_kill(self) -> None:
        """Whether there was an OOM kill. Where the notice comes before the count there are several looks, the first of
        them again for each notice, and never two series of them.
        """
        cell, look, self._looks = self.cell, self._looks, None
        if cell is None or cell.life.state is not State.RUNNING:
            return
        cell.leaf.oom_clear()
        if cell.leaf.oom_kills():
            self._end_by(Event.LIMIT, "memory")
        elif cell.leaf.counts_kills_late and look is not None and look < len(OOM_PAUSES):
            self._looks = look + 1
            self._loop.call_later(OOM_PAUSES[look], self._look_for_kill)

    def tick(self, now: float) -> None:
        """The clock reached ``wall_end`` or ``cpu_look``."""
        cell = self.cell
        if cell is None or self._ended.done():
            self.wall_end = self.cpu_look = float("inf")
        elif now >= self.wall_end:
            self._end_by(Event.LIMIT, "timeout" if self._meter is None else self._meter.mode)
        elif now >= self.cpu_look:
            # No polling: the next look is when the limit could be reached at the earliest.
            left = float(self.limits["cpu_seconds"] or 0) - cell.leaf.cpu_usec() / 1e6
            if left <= 0:
                self._end_by(Event.LIMIT, "cpu")
            else:
                self.cpu_look = now + max(0.002, self._cpu_left(left))

    def _cpu_left(self, seconds: float) -> float:
        """How long *seconds* of CPU time last at least."""
        cpus = self.limits["cpus"]
        return seconds / (min(self._engine.cpus, float(cpus)) if cpus is not None else self._engine.cpus)

    # Tools

    def spend(self, mode: Mode) -> None:
        """The program's time goes to *mode* from now on."""
        if self._meter is not None and not self._ended.done():
            self.wall_end = self._meter.switch(mode, time.monotonic())
            self._engine.clock.changed(self)

    def is_stuck(self, error: OSError) -> None:
        """The cell stands still and cannot be made to go on."""
        log.error("run %s: it cannot be thawed: %s", self.id, error)
        self._end_by(Event.CANCELLED, "lost")

    def listen(self, on: bool) -> None:
        """Read the cell's packets, or do not for the moment."""
        if self.cell is not None and self.cell.life.state is State.RUNNING:
            self.cell.set_reading(on and not self._reads_no_more)

    def _stop_tools(self, now: float) -> None:
        """The program is over, and with it the calls of its that are under way."""
        link, self._link = self._link, None
        if link is None:
            return
        link.close()
        if self._meter is not None:
            self._meter.switch(self._meter.mode, now)

    # Streams

    def wrote(self, number: int) -> None:
        """As ``cell.RunEvents``; without a caller who takes it, output is read as it comes."""
        cell = self.cell
        if cell is None:
            return
        found = self._read_stream(cell, number)
        if found is None:
            cell.watch_stream(number, False)
            return
        pace = self._paces[number - 1]
        seconds = pace.after(found) if found else 0.0
        if seconds and cell.life.state is State.RUNNING:
            cell.watch_stream(number, False)
            self._loop.call_later(seconds, self._look_again, number)

    def _look_again(self, number: int) -> None:
        """A stream that was left alone for a while."""
        cell = self.cell
        if cell is None or cell.life.state is not State.RUNNING:
            return
        found = self._read_stream(cell, number)
        if found:
            self._loop.call_later(self._paces[number - 1].after(found), self._look_again, number)
        elif found is not None:
            self._paces[number - 1].reset()
            cell.watch_stream(number, True)

    def _read_stream(self, cell: Cell, number: int) -> int | None:
        """Read what is there, READS pieces at most. How many bytes that was; None at the end, or when it is too
        much.
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
            self._engine.held.did(len(data))
            self._outputs[number - 1].add(data)
            if self._grown():
                return None  # a kill takes its time; the rest is read when it is dead
            if len(data) < READ_BYTES:
                break
        return found

    def _drain(self, cell: Cell) -> None:
        """Everything that could write is dead: read what is left."""
        if cell.fds is None or cell.fds.stdout < 0:
            return
        for number, fd in ((1, cell.fds.stdout), (2, cell.fds.stderr)):
            with contextlib.suppress(BlockingIOError):
                for _ in range(DRAIN_READS):
                    data = os.read(fd, READ_BYTES)
                    if not data:
                        break
                    self._outputs[number - 1].add(data)
            self._grown()

    def _grown(self) -> bool:
        """A stream has grown; beyond output_stop_bytes the run is over, and True."""
        stop = self.limits["output_stop_bytes"]
        if stop is None or max(one.total_bytes for one in self._outputs) <= stop:
            return False
        if self._finished is not None and self._cause is None:
            self._cause = "output"  # it finished, and had written too much by then
        self._end_by(Event.LIMIT, "output")
        return True

    def _feed_stdin(self) -> None:
        cell = self.cell
        assert cell is not None  # noqa: S101
        if cell.fds is None or self._stdin is None:
            return
        fd = cell.fds.stdin
        try:
            for _ in range(READS):
                self._stdin = self._stdin[os.write(fd, self._stdin[: 16 * READ_BYTES]) :]
                if not len(self._stdin):
                    break
            else:
                raise BlockingIOError  # the others' turn
        except BlockingIOError:
            self._loop.add_writer(fd, self._feed_stdin)
            return
        except BrokenPipeError:
            log.debug("run %s: the program closed its stdin", self.id)
        self._stop_stdin(cell)

    def _stop_stdin(self, cell: Cell) -> None:
        self._stdin = None
        if cell.fds is not None and cell.fds.stdin >= 0:
            self._loop.remove_writer(cell.fds.stdin)
            cell.fds.close("stdin")

    # The end

    async def _die(self, cell: Cell) -> None:
        """Until nothing of the cell lives and its streams are read. Never raises, never waits for ever."""
        self._stop_stdin(cell)
        self._stop_message(cell)
        await cell.death()
        # The program's own end may have crossed with a kill of ours; a limit that fired outranks it all the same.
        for data in cell.last_packets():
            self.spoke(data)
            if self._finished is not None or self._malformed >= MALFORMED:
                break
        if self._streams:
            for stream in self._streams:
                await stream.finish()
        else:
            self._drain(cell)

    async def _collect(self, workspace_fd: int) -> workspace.Collected:
        if workspace.is_untouched(workspace_fd, self._known):
            return workspace.Collected()
        most = int(self.limits["workspace_bytes"] or UNLIMITED_BYTES)
        by = self._prepared.zygote.files
        args = (by, workspace_fd, self._known, most)
        return await in_thread(workspace.collect, *args, discard=workspace.Collected.close)

    def _tell(
        self,
        queued: float,
        setup: float,
        run: float,
        counters: Counters | None,
        collected: workspace.Collected,
        warm: bool,
    ) -> RunAnswer:
        out, err = self._outputs
        cell = self.cell
        waited = 0.0 if self._meter is None else self._meter.stood_still()
        evidence = Evidence(
            cause=self._cause,
            wait=None if cell is None else cell.wait,
            finished=self._finished,
            counters=counters,
            limits=self.limits,
            run_seconds=run - waited,
            stdout_bytes=out.total_bytes,
            stderr_bytes=err.total_bytes,
            spaces=self._spaces,
        )
        slot = None if cell is None else cell.slot
        isolation = None if slot is None else self._prepared.receipt(slot.index)
        return answer(self.id, evidence, (out, err), collected, (queued, setup, run), warm, isolation, waited)


def _write_inputs(cell: Cell, request: Run, owner: int) -> tuple[workspace.Known, float]:
    """Write *request*'s source and files into *cell*, as *owner*; the seconds of CPU time that it took."""
    begun = time.thread_time()
    assert cell.fds is not None  # noqa: S101
    cell.put_source(request.code.encode(), request.filename)
    known = workspace.put_files(cell.prepared.zygote.files, cell.fds.workspace, request.files, owner)
    return known, time.thread_time() - begun
