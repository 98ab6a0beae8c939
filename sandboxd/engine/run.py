"""One run, from its turn to its result.

Theory of operation (the processes: sandboxd/zygote.py; the states: life.py)

    take a slot: host uid and cgroup leaf, limits written, counters from zero
    nursery: init with its namespaces, tmpfs and pipes      -> init.pidfd, /workspace, /code, six pipe ends
    input files and the source are written through those descriptors
    zygote: fork the cell into the leaf and the init's pid namespace -> cell.pidfd, and a packet on the cell's channel
    the cell says that every wall is up; the program's arguments go down the channel: the clock starts
    wait for the first of: finished frame, exit (pidfd), wall clock, CPU time, OOM kill, output flood, caller gone
    SIGKILL to the init; wait for the cell's pidfd; the zygote reaps; wait for the init's pidfd: nothing lives any more
    read the pipes to their end, the counters, the files; judge; give the slot back

Everything that is made is closed or ended in ``_end``, in the reverse order, whichever step failed. What comes from the
cell (frames, output, files) is hostile: bounded, parsed strictly, never acted upon.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import os
import resource
import signal
import socket
import struct
import time
from typing import TYPE_CHECKING, Any, Final

from sandboxd import native
from sandboxd.cgroup import Counters, LeafLimits
from sandboxd.engine import workspace
from sandboxd.engine.life import Event, Life, State
from sandboxd.engine.outcome import Cause, Evidence, Finished, judge, parse_finished
from sandboxd.engine.output import Collector
from sandboxd.engine.streams import Emit, OutputStream
from sandboxd.errors import ProtocolError, Unavailable
from sandboxd.stages import unavailable
from sandboxd.waiting import readable
from sandboxd.zygote import CellProcess, Init, InitSizes, ZygoteLost

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sandboxd.engine.core import Engine
    from sandboxd.engine.prepared import Prepared
    from sandboxd.engine.slots import Slot
    from sandboxd.limits import LimitValue
    from sandboxd.wire import Run

__all__ = ["CellRun", "Emit"]

log = logging.getLogger("sandboxd.engine")

_MIB: Final = 1 << 20
TMP_BYTES: Final = 64 * _MIB
TMP_FILES: Final = 16_384
CODE_BYTES: Final = 17 * _MIB
HELLO: Final = struct.Struct("=4sIiI")
HELLO_SECONDS: Final = 10.0
DEATH_SECONDS: Final = 10.0
UNTHROTTLE_SECONDS: Final = 0.02
FRAME_BYTES: Final = 1 << 18
MESSAGE_HEAD_BYTES: Final = 8
READ_BYTES: Final = 1 << 16
READS: Final = 16
CPU_BELT_SECONDS: Final = 5
OOM_TRIES: Final = 100
UNLIMITED_BYTES: Final = (1 << 63) - 1


class CellRun:
    """One run of *prepared*'s policy under *limits*. ``execute`` once; ``cancel`` at any time."""

    def __init__(
        self,
        engine: Engine,
        prepared: Prepared,
        request: Run,
        limits: dict[str, LimitValue],
        identity: str,
        emit: Emit | None,
    ) -> None:
        self.id = identity
        self.life = Life()
        self.limits = limits
        self.policy = prepared.name
        self.started: float | None = None
        self.slot: Slot | None = None
        self._engine = engine
        self._prepared = prepared
        self._request = request
        self._emit = emit
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._cause: Cause | None = None
        self._finished: Finished | None = None
        self._init: Init | None = None
        self._cell: CellProcess | None = None
        self._wait: tuple[int, int] | None = None
        self._channel: socket.socket | None = None
        self._hello: asyncio.Future[bytes] | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._readers: set[int] = set()
        self._streams: list[OutputStream] = []
        keep = int(limits["output_bytes"] or 0)
        self._outputs = (Collector(keep), Collector(keep))
        self._known: workspace.Known = {}
        self._stdin: memoryview | None = None
        self._message: memoryview | None = None

    # From the outside

    def cancel(self) -> None:
        """The caller wants the end: now, whatever state the run is in."""
        self._end_by(Event.CANCELLED, "cancelled")

    def facts(self) -> dict[str, Any]:
        """For ``ps``: state and what was used so far."""
        used = memory = None
        if self.slot is not None and self.slot.leaf is not None and self.life.state is State.RUNNING:
            with contextlib.suppress(OSError):
                counters = self.slot.leaf.counters()
                used, memory = counters.cpu_usec / 1e6, counters.memory_current_bytes
        return {
            "id": self.id,
            "policy": self.policy,
            "state": self.life.state.value,
            "uid": None if self.slot is None else self._engine.slot_ids.host_uid(self.slot.index),
            "pid": self._engine.host_pid(self._cell.pidfd) if self._cell is not None else None,
            "age_seconds": None if self.started is None else round(time.monotonic() - self.started, 3),
            "cpu_seconds": used,
            "memory_bytes": memory,
        }

    # The run

    async def execute(self, queued_seconds: float) -> tuple[dict[str, Any], list[bytes], workspace.Collected]:
        """The whole life. Returns the Result's header, stdout and stderr, and the files; the files' memfd is the
        caller's.

        Raises Unavailable when the host refused a step, InvalidRequest when the inputs do not fit.
        """
        begun = time.monotonic()
        self.life.on(Event.ADMITTED)
        collected = workspace.Collected()
        setup = run = 0.0
        counters: Counters | None = None
        free: tuple[int | None, int | None] = (None, None)
        failure: BaseException | None = None
        try:
            await self._set_up()
            if not self._ended.done():
                self.started = time.monotonic()
                setup = self.started - begun
                self._go()
                await self._ended
                run = time.monotonic() - self.started
        except ZygoteLost as error:
            log.warning("run %s: zygote lost: %s", self.id, error)
            self._end_by(Event.LOST, "lost")
        except BaseException as error:
            failure = error
            if self.life.state not in (State.ENDING, State.GONE):
                self.life.on(Event.FAILED)
        dying = self._loop.create_task(self._die())
        while not dying.done():
            try:
                await asyncio.shield(dying)
            except asyncio.CancelledError as error:  # the engine closes: first the cell, then the task
                failure = failure or error
        try:
            if failure is not None:
                raise failure
            if self.started is None and self._cause is None:
                raise Unavailable(
                    "cell", None, "look at the engine's log", "the new cell ended before its program came"
                )
            if self.slot is not None and self.slot.leaf is not None and self.started is not None:
                counters = self.slot.leaf.counters()
            if self._init is not None and self.started is not None:
                free = workspace.usage(self._init.workspace)
                most = int(self.limits["workspace_bytes"] or UNLIMITED_BYTES)
                collected = await self._collect(most)
            header, texts = self._result(queued_seconds, setup, run, counters, free, collected)
        except BaseException as error:
            collected.close()
            if self.started is None or not isinstance(error, Exception):
                self._drop_streams()
                raise
            # The program may have had its effects: that is a Result, never an error that promises nothing ran.
            log.exception("run %s: its end could not be told", self.id)
            collected, self._cause = workspace.Collected(), "lost"
            header, texts = self._result(queued_seconds, setup, run, None, (None, None), collected)
        finally:
            self.life.on(Event.COLLECTED)
            self._release()
        return header, texts, collected

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

    async def _set_up(self) -> None:
        """Everything up to a sealed cell that waits for its program."""
        engine, limits = self._engine, self.limits
        zygote = self._prepared.zygote
        try:
            slot = self.slot = engine.slots.take()
            leaf = slot.leaf
            assert leaf is not None  # noqa: S101 (Slots.take's promise)
            memory, pids, cpus = limits["memory_bytes"], limits["pids"], limits["cpus"]
            leaf.set_limits(
                LeafLimits(
                    None if memory is None else int(memory),
                    None if pids is None else int(pids),
                    None if cpus is None else float(cpus),
                )
            )
        except IndexError:
            fix = "start the engine again; its log says which processes would not die"
            raise Unavailable("slots", None, fix, "every slot is lost to processes that would not die") from None
        except OSError as error:
            fix = "the engine must own its cgroup subtree; sandboxd doctor says what is missing"
            raise Unavailable("cgroup", error.errno, fix, str(error)) from error
        guest = engine.slot_ids.guest_uid(slot.index)
        zygote.on_lost(self._zygote_lost)
        init = self._init = await zygote.make_init(slot.index, guest, self._sizes())
        if self.life.on(Event.INIT_MADE) is State.ENDING:
            return
        self._put_inputs(init, engine.slot_ids.host_uid(slot.index), engine.slot_ids.base)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._channel = ours
        self._read(ours.fileno(), self._cell_speaks)
        try:
            theirs.setblocking(True)
            self._hello = self._loop.create_future()
            self._cell = await zygote.fork(
                guest, init, theirs.fileno(), leaf.clone_fd, leaf.entry_fds(), _rlimits(limits)
            )
        finally:
            theirs.close()
            init.close("stdin_read", "stdout_write", "stderr_write")
        self._read(self._cell.pidfd, self._exited)
        if self.life.on(Event.FORKED) is State.ENDING:
            return
        await self._await_hello()
        while not workspace.settled(self._known) and not self._ended.done():
            await asyncio.sleep(0.001)
        if self.life.on(Event.WALLS_UP) is not State.ENDING:
            leaf.begin()

    async def _await_hello(self) -> None:
        assert self._hello is not None  # noqa: S101
        waiters: set[asyncio.Future[Any]] = {self._hello, self._ended}
        await asyncio.wait(waiters, timeout=HELLO_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if not self._hello.done():
            if self._cause == "lost":
                raise ZygoteLost("the zygote ended while it made the cell")
            if self._cause == "cancelled":
                return
            raise Unavailable(
                "cell", None, "look at the engine's log", "the new cell did not say that its walls are up"
            )
        data = self._hello.result()
        if len(data) != HELLO.size or data[:4] != b"SBXC":
            raise Unavailable("cell", None, "reinstall sandboxd", "the new cell's first packet is not its own")
        _, stage, number, _ = HELLO.unpack(data)
        if stage:
            raise unavailable(stage, number)

    def _sizes(self) -> InitSizes:
        limits = self.limits
        memory = limits["memory_bytes"]
        half = max(_MIB, int(memory) // 2) if memory is not None else UNLIMITED_BYTES
        files = limits["workspace_files"]
        return InitSizes(
            workspace_bytes=int(limits["workspace_bytes"] or UNLIMITED_BYTES),
            # The root directory is an inode, too.
            workspace_files=int(files) + 1 if files is not None else 1 << 31,
            tmp_bytes=TMP_BYTES,
            tmp_files=TMP_FILES,
            shm_bytes=half,
            shm_files=TMP_FILES,
            code_bytes=CODE_BYTES,
        )

    def _put_inputs(self, init: Init, cell_uid: int, zygote_uid: int) -> None:
        request = self._request
        workspace.put_source(init.code, request.filename, request.code.encode(), zygote_uid)
        self._known = workspace.put_files(init.workspace, request.files, cell_uid)
        self._request = dataclasses.replace(request, code="", files=(), stdin=None)  # it may hold many megabytes
        if request.stdin is None or not len(request.stdin):
            init.close("stdin_write")
        else:
            self._stdin = request.stdin
            os.set_blocking(init.stdin_write, False)

    def _go(self) -> None:
        """Start the clocks and hand the program over."""
        assert self._init is not None  # noqa: S101
        assert self._channel is not None  # noqa: S101
        assert self.slot is not None  # noqa: S101
        init, limits = self._init, self.limits
        request = self._request
        for number, fd in ((1, init.stdout_read), (2, init.stderr_read)):
            os.set_blocking(fd, False)
            self._streams.append(OutputStream(number, fd, self._outputs[number - 1], self._emit, self._grown))
        leaf = self.slot.leaf
        assert leaf is not None  # noqa: S101
        leaf.oom_clear()
        self._read(leaf.oom_fd, self._oom)
        if self._stdin is not None:
            self._feed_stdin()
        if limits["wall_seconds"] is not None:
            self._later("wall", float(limits["wall_seconds"]), lambda: self._end_by(Event.LIMIT, "timeout"))
        if limits["cpu_seconds"] is not None:
            self._check_cpu()
        message = {
            "args": list(request.args),
            "env": request.env,
            "filename": request.filename,
            "results": request.results,
        }
        self.life.on(Event.GO)
        text = json.dumps(message).encode()
        self._message = memoryview(len(text).to_bytes(MESSAGE_HEAD_BYTES, "little") + text)
        self._hand_over()

    def _hand_over(self) -> None:
        """Send what is left of the program's arguments, in packets that any socket takes."""
        assert self._channel is not None  # noqa: S101
        assert self._message is not None  # noqa: S101
        fd = self._channel.fileno()
        try:
            while len(self._message):
                self._message = self._message[self._channel.send(self._message[:READ_BYTES], socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            self._loop.add_writer(fd, self._hand_over)
            return
        except OSError:
            log.info("run %s: the cell was gone before its program came", self.id)
        self._stop_message()

    def _stop_message(self) -> None:
        if self._message is not None and self._channel is not None:
            self._message = None
            self._loop.remove_writer(self._channel.fileno())

    # Events

    def _end_by(self, event: Event, cause: Cause | None) -> None:
        """Take *event*; the first one that ends the run decides its cause, and kills it."""
        if self.life.state in (State.QUEUED, State.COLLECTING, State.GONE):
            return
        already = self.life.state is State.ENDING
        self.life.on(event)
        if already:
            return
        self._cause = cause
        if not self._ended.done():
            self._ended.set_result(None)
        self._kill()

    def _kill(self) -> None:
        """SIGKILL to the init, and so to everything of the cell; ``_die`` sees whether it worked."""
        if self._init is not None and self._init.pidfd >= 0:
            try:
                native.pidfd_kill(self._init.pidfd, signal.SIGKILL)
            except OSError as error:
                log.error("run %s: the kill was refused: %s", self.id, error)

    def _zygote_lost(self) -> None:
        self._end_by(Event.LOST, "lost")

    def _cell_speaks(self) -> None:
        assert self._channel is not None  # noqa: S101
        try:
            data = self._channel.recv(FRAME_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:  # closed by the program, or the cell ended: the pidfd tells
            self._unread(self._channel.fileno())
            return
        if self._hello is not None and not self._hello.done():
            self._hello.set_result(data)
            return
        if self.life.state is not State.RUNNING:
            return
        try:
            self._finished = parse_finished(data)
        except ProtocolError as error:
            # Not ours: the program wrote it. Its own end is still to come.
            log.info("run %s: a frame that is none: %s", self.id, error)
            self._unread(self._channel.fileno())  # else it could keep the engine busy with more of them
            return
        self._end_by(Event.FINISHED, None)

    def _exited(self) -> None:
        assert self._cell is not None  # noqa: S101
        self._unread(self._cell.pidfd)
        self._cell_spoke_last()
        self._end_by(Event.EXITED if self.life.state in (State.RUNNING, State.ENDING) else Event.FAILED, self._cause)

    def _cell_spoke_last(self) -> None:
        """A finished frame that was sent before the exit is read before the exit counts."""
        if self._channel is not None and self._channel.fileno() in self._readers:
            self._cell_speaks()

    def _check_cpu(self) -> None:
        """No polling: the next look is when the limit could be reached at the earliest."""
        assert self.slot is not None  # noqa: S101
        assert self.slot.leaf is not None  # noqa: S101
        limit, cpus = float(self.limits["cpu_seconds"] or 0), self.limits["cpus"]
        left = limit - self.slot.leaf.cpu_usec() / 1e6
        if left <= 0:
            self._end_by(Event.LIMIT, "cpu")
            return
        most = min(self._engine.cpus, float(cpus)) if cpus is not None else self._engine.cpus
        self._later("cpu", max(0.002, left / most), self._check_cpu)

    def _oom(self, tries: int = 0) -> None:
        """An OOM notice; on v1 it comes just before the kill is counted."""
        if self.life.state is not State.RUNNING or self.slot is None or self.slot.leaf is None:
            return
        leaf = self.slot.leaf
        leaf.oom_clear()
        if leaf.oom_kills():
            self._end_by(Event.LIMIT, "memory")
        elif tries < OOM_TRIES:
            self._later("oom", 0.001, lambda: self._oom(tries + 1))

    # Streams

    def _grown(self) -> bool:
        """A stream has grown; beyond output_stop_bytes the run is over, and True."""
        stop = self.limits["output_stop_bytes"]
        if stop is None or max(one.total_bytes for one in self._outputs) <= stop:
            return False
        self._end_by(Event.LIMIT, "output")
        return True

    def _feed_stdin(self) -> None:
        assert self._init is not None  # noqa: S101
        assert self._stdin is not None  # noqa: S101
        fd = self._init.stdin_write
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
        self._stop_stdin()

    def _stop_stdin(self) -> None:
        self._stdin = None
        if self._init is not None and self._init.stdin_write >= 0:
            self._loop.remove_writer(self._init.stdin_write)
            self._init.close("stdin_write")

    # The end

    async def _die(self) -> None:
        """Until nothing of the cell lives and its streams are read. Never raises, never waits for ever."""
        for timer in self._timers.values():
            timer.cancel()
        if self.slot is not None and self.slot.leaf is not None:
            self._unread(self.slot.leaf.oom_fd)
        self._stop_stdin()
        self._stop_message()
        zygote, init, cell = self._prepared.zygote, self._init, self._cell
        self._kill()
        if init is not None:
            init.close("stdin_read", "stdout_write", "stderr_write")
        alive = False
        try:
            async with asyncio.timeout(DEATH_SECONDS):
                if cell is not None:
                    self._unread(cell.pidfd)
                    await self._until_dead(cell.pidfd)
                    if self._finished is None and self._channel is not None and self.started is not None:
                        self._last_frame()
                    with contextlib.suppress(ZygoteLost, OSError):
                        self._wait = await zygote.reap(cell)
                if init is not None:
                    await readable(init.pidfd)
                for stream in self._streams:
                    await stream.finish()
        except TimeoutError:
            alive = True
            for stream in self._streams:
                stream.cancel()
        if alive:
            log.error(
                "run %s: its processes are still there after %g s; its slot is not used again", self.id, DEATH_SECONDS
            )
            if self.slot is not None:
                self._engine.slots.abandon(self.slot)
                self.slot = None
        if self.life.state is not State.ENDING:
            self.life.on(Event.FAILED)
        self.life.on(Event.DEAD)

    async def _until_dead(self, pidfd: int) -> None:
        """Killed tasks run their own end, under the CPU quota of their leaf: when that takes long, it is lifted."""
        dead = self._loop.create_task(readable(pidfd))
        try:
            await asyncio.wait({dead}, timeout=UNTHROTTLE_SECONDS)
            if not dead.done() and self.slot is not None and self.slot.leaf is not None:
                with contextlib.suppress(OSError):
                    self.slot.leaf.unthrottle()
            await dead
        finally:
            dead.cancel()

    def _last_frame(self) -> None:
        """The program's own end may have crossed with a kill of ours; a limit that fired outranks it all the same."""
        assert self._channel is not None  # noqa: S101
        while True:
            try:
                data = self._channel.recv(FRAME_BYTES)
            except OSError:
                return
            if not data:
                return
            with contextlib.suppress(ProtocolError):
                self._finished = parse_finished(data)
                return

    async def _collect(self, most: int) -> workspace.Collected:
        assert self._init is not None  # noqa: S101
        if workspace.is_untouched(self._init.workspace, self._known):
            return workspace.Collected()
        return await asyncio.to_thread(workspace.collect, self._init.workspace, self._known, most)

    def _release(self) -> None:
        """Close what is left and give the slot back. Order: descriptors first, they pin the file systems and their
        memory.
        """
        self._prepared.zygote.forget(self._zygote_lost)
        for fd in list(self._readers):
            self._unread(fd)
        if self._channel is not None:
            self._channel.close()
        if self._cell is not None:
            os.close(self._cell.pidfd)
        if self._init is not None:
            self._init.close()
        slot, self.slot = self.slot, None
        if slot is not None:
            self._engine.slots.give_back(slot)

    # Result

    def _result(
        self,
        queued: float,
        setup: float,
        run: float,
        counters: Counters | None,
        free: tuple[int | None, int | None],
        collected: workspace.Collected,
    ) -> tuple[dict[str, Any], list[bytes]]:
        out, out_dropped = self._outputs[0].kept()
        err, err_dropped = self._outputs[1].kept()
        outcome = judge(
            Evidence(
                cause=self._cause,
                wait=self._wait,
                finished=self._finished,
                counters=counters,
                limits=self.limits,
                run_seconds=run,
                stdout_bytes=self._outputs[0].total_bytes,
                stderr_bytes=self._outputs[1].total_bytes,
                dropped_bytes=out_dropped + err_dropped,
                free_bytes=free[0],
                free_files=free[1],
            )
        )
        index = None if self.slot is None else self.slot.index
        at = len(out) + len(err)
        header = {
            "id": self.id,
            "status": outcome.status,
            "exit_code": outcome.exit_code,
            "signal": outcome.signal,
            "stdout": [0, len(out)],
            "stderr": [len(out), len(err)],
            "stdout_dropped_bytes": out_dropped,
            "stderr_dropped_bytes": err_dropped,
            "error": outcome.error,
            "results": outcome.results,
            "files": [{"path": path, "size_bytes": size, "offset": at + off} for path, size, off in collected.files],
            "files_skipped": collected.skipped,
            "limits_hit": outcome.limits_hit,
            "usage": {
                "wall_seconds": run,
                "cpu_user_seconds": counters.cpu_user_usec / 1e6 if counters else 0.0,
                "cpu_system_seconds": counters.cpu_system_usec / 1e6 if counters else 0.0,
                "memory_peak_bytes": counters.memory_peak_bytes if counters else None,
                "pids_peak": counters.pids_peak if counters else None,
                "throttled_seconds": counters.throttled_usec / 1e6 if counters else None,
            },
            "timings": {"queued_seconds": queued, "setup_seconds": setup, "run_seconds": run},
            "warm": False,
            "isolation": None if index is None else self._prepared.receipt(index),
            "state": None,
        }
        return header, [out, err]

    # Loop

    def _read(self, fd: int, callback: Callable[[], Any]) -> None:
        self._loop.add_reader(fd, callback)
        self._readers.add(fd)

    def _unread(self, fd: int) -> None:
        if fd in self._readers:
            self._readers.discard(fd)
            self._loop.remove_reader(fd)

    def _later(self, name: str, seconds: float, callback: Callable[[], Any]) -> None:
        self._timers[name] = self._loop.call_later(seconds, callback)


def _rlimits(limits: dict[str, LimitValue]) -> Sequence[tuple[int, int, int]]:
    """(resource, soft, hard) of setrlimit(2). What the policy names must hold; the rest is a belt, as low as
    allowed.
    """

    def belt(which: int, value: int) -> tuple[int, int, int]:
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        return which, value, value

    chosen = [
        belt(resource.RLIMIT_CORE, 0),
        belt(resource.RLIMIT_STACK, 8 * _MIB),
        belt(resource.RLIMIT_MEMLOCK, 64 << 10),
        belt(resource.RLIMIT_MSGQUEUE, 0),
        belt(resource.RLIMIT_SIGPENDING, 256),
        belt(resource.RLIMIT_RTPRIO, 0),
        belt(resource.RLIMIT_NICE, 0),
    ]
    if limits["open_files"] is not None:
        chosen.append((resource.RLIMIT_NOFILE, int(limits["open_files"]), int(limits["open_files"])))
    if limits["file_bytes"] is not None:
        chosen.append((resource.RLIMIT_FSIZE, int(limits["file_bytes"]), int(limits["file_bytes"])))
    if limits["cpu_seconds"] is not None:
        # For one process, against an engine that does not come to look; the limit itself is the engine's, for the tree.
        chosen.append(belt(resource.RLIMIT_CPU, math.ceil(float(limits["cpu_seconds"])) + CPU_BELT_SECONDS))
    return chosen
