"""One run: a cell is taken for it, its program handed over, and how it ended told.

    take a parked cell, or wait for one; set what of the limits can still be set
    inputs and source are written through the engine's descriptors; the arguments go down the channel: the clock starts
    wait for the first of: finished frame, exit, wall clock, CPU time, OOM kill, output flood, caller gone
    an ordinary end, nothing left behind: counters, judge, answer; the cell dies while the answer is on its way
    any other end: SIGKILL, wait until nothing of the cell lives, read the streams to their end, counters, files; answer

What comes from the cell (frames, output, files) is hostile: bounded, parsed strictly, never acted upon. Each has a
module of its own beside this one: inputs, frames, output, run_clock, oom.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any

from sandboxd._util.fdwait import in_thread
from sandboxd.engine.cells import workspace
from sandboxd.engine.cells.shape import UNLIMITED_BYTES, leaf_limits
from sandboxd.engine.cells.state import Event, State
from sandboxd.engine.cells.zygote import ZygoteLost
from sandboxd.engine.fair_share import FairShare
from sandboxd.engine.runs.frames import FrameReader
from sandboxd.engine.runs.inputs import Inputs
from sandboxd.engine.runs.oom import OomWatch
from sandboxd.engine.runs.output import Output
from sandboxd.engine.runs.run_clock import RunClock
from sandboxd.errors import Unavailable
from sandboxd.outcome.answer import Durations, RunAnswer, answer
from sandboxd.outcome.collected import Collected, is_untouched
from sandboxd.outcome.judge import Cause, Evidence, Space, ended_cleanly

if TYPE_CHECKING:
    from sandboxd.cgroup import Counters
    from sandboxd.engine.audit.tool_calls import CallRecords
    from sandboxd.engine.cells.active_policy import ActivePolicy
    from sandboxd.engine.cells.cell import Cell
    from sandboxd.engine.cells.resources import Resources
    from sandboxd.engine.runs.frames import LendTools
    from sandboxd.engine.runs.meter import Mode
    from sandboxd.engine.runs.streams import Emit
    from sandboxd.limits import LimitValue
    from sandboxd.outcome.collected import Known
    from sandboxd.protocol.run_header import Run

__all__ = ["CellRun"]

log = logging.getLogger("sandboxd.engine")


class CellRun:
    """One run of *active*'s policy under *limits*. ``execute`` once; ``cancel`` at any time; ``close`` at the end."""

    def __init__(
        self,
        resources: Resources,
        active: ActivePolicy,
        limits: dict[str, LimitValue],
        identity: str,
        emit: Emit | None = None,
    ) -> None:
        """*emit* takes the output as it comes."""
        self.id = identity
        self.limits = limits
        self.policy = active.name
        self.cell: Cell | None = None
        self.clock = RunClock(resources.clock, limits, resources.cpus, self._expired)
        self._resources = resources
        self._active = active
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._cause: Cause | None = None
        self._failure: BaseException | None = None
        self._frames = FrameReader(identity)
        self._output = Output(int(limits["output_bytes"] or 0), emit, self._grown, resources.held)
        self._oom = OomWatch(lambda: self._end_by(Event.LIMIT, "memory"))
        self._inputs: Inputs | None = None
        self._spaces: list[Space] = []

    # From the outside

    @property
    def state(self) -> str:
        """For people: where it stands."""
        if self.cell is not None:
            return self.cell.life.state.value
        return "queued" if self.is_queued else State.GONE.value

    @property
    def is_queued(self) -> bool:
        """Whether nothing of it exists yet. Not so again at its end, while its last output is on its way."""
        return self.cell is None and self._inputs is None

    def serves(self, active: ActivePolicy) -> bool:
        """Whether it is *active*'s, be it that it still queues."""
        return self._active is active

    def cancel(self) -> None:
        """The caller wants the end: now, whatever state the run is in."""
        self._end_by(Event.CANCELLED, "cancelled")

    def facts(self) -> dict[str, Any]:
        """For ``ps``: state and what was used so far."""
        used = memory = pid = uid = None
        cell = self.cell
        if cell is not None and cell.slot is not None:
            uid = self._resources.slot_ids.host_uid(cell.slot.index)
            if cell.life.state is State.RUNNING:
                with contextlib.suppress(OSError):
                    counters = cell.leaf.counters()
                    used, memory = counters.cpu_usec / 1e6, counters.memory_current_bytes
                    pid = min(cell.leaf.pids(), default=None)
        started = self.clock.started
        return {
            "id": self.id,
            "policy": self.policy,
            "state": self.state,
            "uid": uid,
            "pid": pid,
            "age_seconds": None if started is None else round(time.monotonic() - started, 3),
            "cpu_seconds": used,
            "memory_bytes": memory,
        }

    # A run that its caller starts itself (clients/leases.py)

    def start_leased(self, cell: Cell, ago_seconds: float) -> None:
        """The caller handed its program to *cell* so long ago; the clocks run from then."""
        self.cell = cell
        cell.attach(self)
        assert cell.fds is not None  # noqa: S101
        cell.fds.close("stdin")
        cell.leaf.oom_clear()
        self.clock.start(cell.leaf, ago_seconds)
        cell.go(with_streams=False)
        self.ran_out()  # it may have happened already

    def start_lost(self, cell: Cell) -> None:
        """The caller handed its program to *cell*, which is dead with its zygote."""
        self.cell = cell
        self.clock.begin_lost()
        cell.attach(self)
        self.lost()

    async def finish_leased(self, stdout: bytes, stderr: bytes, frame: bytes) -> RunAnswer:
        """Go on from where the caller stopped: what it has read so far, and the finished frame if it came."""
        cell = self.cell
        assert cell is not None  # noqa: S101
        self._output.add(stdout, stderr)
        if cell.life.state is State.RUNNING:
            cell.resume_reading()
        if frame:
            self.spoke(frame)
        self._grown()
        return await self._to_its_end(cell, 0.0, 0.0, True)

    # The run

    async def execute(
        self,
        request: Run,
        queued_seconds: float = 0.0,
        share: FairShare | None = None,
        lend_tools: LendTools | None = None,
        records: CallRecords | None = None,
    ) -> RunAnswer:
        """The whole life but for ``close``, which must follow. The files of the answer are the caller's.

        *share* is the client's part of the engine's time; *lend_tools* gets the host's end of the program's tool calls,
        if it has tools, and *records* sees them.

        Raises Unavailable when the host refused a step, InvalidRequest when the inputs do not fit.
        """
        begun = time.monotonic()
        pool = self._active.pool
        cell = pool.take(self.limits)
        warm = cell is not None
        if cell is None:
            try:
                cell = await pool.acquire(self.limits)
            except ZygoteLost as error:
                log.warning("run %s: zygote lost: %s", self.id, error)
                self._cause = "lost"
                return self._tell(Durations(queued_seconds, 0.0, 0.0), None, Collected(), False)
        self.cell = cell
        share = share or FairShare(free=True)
        tools = request.tools
        try:
            cell.attach(self)
            inputs = self._inputs = Inputs(self.id, request, share)
            del request  # it may hold many megabytes
            self._set_limits(cell)
            assert cell.slot is not None  # noqa: S101
            await inputs.put(cell, self._resources.slot_ids.guest_uid(cell.slot.index))
            if tools is not None and lend_tools is not None:
                await self._frames.open_tools(self, cell, tools.calls, share, records, lend_tools)
            await inputs.settle(self._ended)
            if not self._ended.done():
                self._go(cell, inputs)
        except BaseException as error:
            self._fail(cell, error)
        setup = (self.clock.started or time.monotonic()) - begun
        return await self._to_its_end(cell, queued_seconds, setup, warm)

    def _set_limits(self, cell: Cell) -> None:
        if self.limits == self._active.limits:
            return
        try:
            cell.leaf.set_limits(leaf_limits(self.limits))
        except OSError as error:
            fix = "the engine must own its cgroup subtree; sandboxd doctor says what is missing"
            raise Unavailable("cgroup", str(error), errno=error.errno, fix=fix) from error

    def _go(self, cell: Cell, inputs: Inputs) -> None:
        """Start the clocks and hand the program over."""
        self._output.start(cell)
        cell.leaf.oom_clear()
        self.clock.start(cell.leaf, with_tools=self._frames.has_tools)
        self._frames.start()
        cell.go(with_streams=not self._output.is_streamed)
        inputs.start(cell)

    def _fail(self, cell: Cell, error: BaseException) -> None:
        self._failure = self._failure or error
        if cell.life.state not in (State.ENDING, State.COLLECTING):
            cell.end(Event.FAILED if self.clock.started is None else Event.CANCELLED)

    async def _to_its_end(self, cell: Cell, queued_seconds: float, setup: float, warm: bool) -> RunAnswer:
        """From the program's start to the answer."""
        if self._failure is None and not self._ended.done():
            try:
                await self._ended
            except BaseException as error:
                self._fail(cell, error)
        now = time.monotonic()
        run = now - self.clock.started if self.clock.started is not None else 0.0
        seconds = Durations(queued_seconds, setup, run)
        self._stop_tools(now)
        self._look(cell)
        if self._failure is None and self._is_clean(cell):
            return self._tell(seconds, cell.leaf.counters(), Collected(), warm)
        return await self._after_death(cell, seconds, warm)

    def _is_clean(self, cell: Cell) -> bool:
        """``ended_cleanly``, and nothing of its input or output is under way."""
        finished = self._frames.finished
        if finished is None or self._cause is not None or self._output.is_streamed or self._is_feeding:
            return False
        assert cell.fds is not None  # noqa: S101
        try:
            untouched = is_untouched(cell.fds.workspace, self._known)
            tasks = cell.leaf.tasks()
            for number in (1, 2):
                self._output.read(cell, number)  # what it wrote before its end is in the pipes, and may be too much
            return ended_cleanly(finished, self._cause, tasks, untouched)
        except OSError:
            return False

    @property
    def _is_feeding(self) -> bool:
        return self._inputs is not None and self._inputs.is_feeding

    @property
    def _known(self) -> Known:
        """The files that were put into its workspace."""
        return {} if self._inputs is None else self._inputs.known

    def _look(self, cell: Cell) -> None:
        """See how full its file systems are, once, before the kill: files without a name go with their processes."""
        if not self._spaces and self.clock.started is not None and cell.fds is not None and cell.fds.workspace >= 0:
            with contextlib.suppress(OSError):  # the kill comes next, whatever a filter around the engine refuses
                self._spaces = workspace.spaces(cell.fds)

    async def _after_death(self, cell: Cell, seconds: Durations, warm: bool) -> RunAnswer:
        """Nothing of it may live any more; only then its files are read."""
        if cell.life.state not in (State.ENDING, State.COLLECTING):
            cell.end(Event.FINISHED if self._frames.finished is not None else Event.EXITED)
        dying = asyncio.get_running_loop().create_task(self._die(cell))
        while not dying.done():
            try:
                await asyncio.shield(dying)
            except asyncio.CancelledError as error:  # the engine closes: first the cell, then the task
                self._failure = self._failure or error
        collected = Collected()
        counters: Counters | None = None
        started = self.clock.started
        try:
            if self._failure is not None:
                raise self._failure
            if started is None and self._cause is None:
                what = "the new cell ended before its program came"
                raise Unavailable("cell", what, fix="look at the engine's log")
            if cell.slot is not None and started is not None:
                counters = cell.leaf.counters() if cell.leaf.counts else None
            if cell.fds is not None and cell.fds.workspace >= 0 and started is not None:
                collected = await self._collect(cell.fds.workspace)
            return self._tell(seconds, counters, collected, warm)
        except BaseException as error:
            collected.close()
            if started is None or not isinstance(error, Exception):
                self._output.drop()
                raise
            # The program may have had its effects: that is a Result, never an error that promises nothing ran.
            log.exception("run %s: its end could not be told", self.id)
            self._cause = "lost"
            return self._tell(seconds, None, Collected(), warm)

    async def _die(self, cell: Cell) -> None:
        """Until nothing of the cell lives and its streams are read. Never raises, never waits for ever."""
        self._stop_inputs(cell)
        await cell.death()
        # The program's own end may have crossed with a kill of ours; a limit that fired outranks it all the same.
        self._frames.feed_last(cell)
        await self._output.finish(cell)

    async def _collect(self, workspace_fd: int) -> Collected:
        if is_untouched(workspace_fd, self._known):
            return Collected()
        most = int(self.limits["workspace_bytes"] or UNLIMITED_BYTES)
        args = (self._active.zygote.files, workspace_fd, self._known, most)
        return await in_thread(workspace.collect, *args, discard=Collected.close)

    def _tell(self, seconds: Durations, counters: Counters | None, collected: Collected, warm: bool) -> RunAnswer:
        out, err = self._output.kept
        cell = self.cell
        waited = self.clock.stood_still()
        evidence = Evidence(
            cause=self._cause,
            wait=None if cell is None else cell.wait,
            finished=self._frames.finished,
            counters=counters,
            limits=self.limits,
            run_seconds=seconds.run - waited,
            stdout_bytes=out.total_bytes,
            stderr_bytes=err.total_bytes,
            spaces=self._spaces,
        )
        slot = None if cell is None else cell.slot
        isolation = None if slot is None else self._active.receipt(slot.index)
        return answer(self.id, evidence, (out, err), collected, seconds, warm, isolation, waited)

    async def delivered(self) -> None:
        """After ``execute``: until the caller has taken the output that was still on its way. No slot waits for
        that.
        """
        await self._output.delivered()

    def close(self) -> None:
        """End the cell, if it still lives, and let go of it."""
        cell, self.cell = self.cell, None
        self.clock.close()
        self._oom.close()
        if not self._output.is_streamed:
            self._output.drop()  # else ``delivered`` does
        if cell is None:
            return
        if cell.life.state not in (State.ENDING, State.COLLECTING):
            cell.end(Event.FINISHED if self._frames.finished is not None else Event.CANCELLED)
        self._stop_inputs(cell)
        self._stop_tools(time.monotonic())
        cell.let_go()

    def _stop_inputs(self, cell: Cell) -> None:
        if self._inputs is not None:
            self._inputs.stop(cell)

    def _stop_tools(self, now: float) -> None:
        """The program is over, and with it the calls of its that are under way."""
        if self._frames.has_tools:
            self._frames.stop_tools()
            self.clock.stop_meter(now)

    # What ends it

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
        self.clock.rest()
        if self.cell is not None and event not in (Event.FINISHED, Event.LOST):
            self._look(self.cell)
            self.cell.end(event)

    def _expired(self, cause: Cause) -> None:
        if self.cell is None or self._ended.done():
            self.clock.rest()
        else:
            self._end_by(Event.LIMIT, cause)

    def _grown(self) -> bool:
        """A stream has grown; beyond output_stop_bytes the run is over, and True."""
        stop = self.limits["output_stop_bytes"]
        if stop is None or self._output.most_bytes <= stop:
            return False
        if self._frames.finished is not None and self._cause is None:
            self._cause = "output"  # it finished, and had written too much by then
        self._end_by(Event.LIMIT, "output")
        return True

    # As ``cell.RunEvents``

    def spoke(self, data: bytes) -> None:
        """As ``cell.RunEvents``."""
        if self._frames.feed(data, self.cell):
            self._end_by(Event.FINISHED, None)

    def wrote(self, number: int) -> None:
        """As ``cell.RunEvents``."""
        if self.cell is not None:
            self._output.wrote(self.cell, number)

    def ran_out(self) -> None:
        """As ``cell.RunEvents``."""
        self._oom.noticed(self.cell)

    def rang(self) -> None:
        """As ``cell.RunEvents``."""

    def exited(self) -> None:
        """As ``cell.RunEvents``."""
        self._end_by(Event.EXITED, None)

    def lost(self) -> None:
        """As ``cell.RunEvents``."""
        self._end_by(Event.LOST, "lost")

    # As ``freezer.Waiter``

    def spend(self, mode: Mode) -> None:
        """As ``freezer.Waiter``."""
        if not self._ended.done():
            self.clock.spend(mode)

    def is_stuck(self, error: OSError) -> None:
        """As ``freezer.Waiter``."""
        log.error("run %s: it cannot be thawed: %s", self.id, error)
        self._end_by(Event.CANCELLED, "lost")

    def listen(self, on: bool) -> None:
        """As ``freezer.Waiter``."""
        if self.cell is not None and self.cell.life.state is State.RUNNING:
            self._frames.set_reading(self.cell, on)
