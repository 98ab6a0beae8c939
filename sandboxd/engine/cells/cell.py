"""One cell, from its slot to its death. Whose program it will run is not known before the last moment.

Theory of operation (the processes: sandboxd/engine/cells/zygote.py; the states: state.py)

    take a slot: host uid and cgroup leaf, limits written
    nursery: init with its namespaces, tmpfs, streams, channel; zygote: the cell, forked into them; it raises its walls
    the cell says so (its first packet, written by C before any library runs): SEALED; its owner, the pool, is told
    left alone, it rehearses, so that the pages which a program touches are its own, and says "P": parked
    a run takes it: inputs and source are written, the program's arguments go down the channel: RUNNING
    its end, for whatever reason: SIGKILL to the init; the zygote and the nursery say when nothing of it lives
    the slot goes back once it is dead and its run has let go of it

What comes from a cell after GO is hostile. Before that only our own code runs in it, and anything that is not expected
ends it.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import logging
import os
import select
import signal
import struct
import time
from typing import TYPE_CHECKING, Final, Protocol

from sandboxd._native import lib
from sandboxd._util import disposal
from sandboxd.engine.cells import workspace
from sandboxd.engine.cells.resources import SPARE_DESCRIPTORS
from sandboxd.engine.cells.state import Event, Life, State
from sandboxd.errors import Unavailable
from sandboxd.ids.ranges import ZYGOTE_ID
from sandboxd.inside.channel import PACKET_BYTES, PARKED
from sandboxd.kernel import calls
from sandboxd.kernel.fd import Fd
from sandboxd.kernel.stages import unavailable
from sandboxd.protocol import cell_socket

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from sandboxd.cgroup.interface import AnyLeaf
    from sandboxd.engine.cells.messages import CellFds
    from sandboxd.engine.cells.resources import Resources
    from sandboxd.engine.cells.shape import CellSpec
    from sandboxd.engine.cells.slots import Slot
    from sandboxd.engine.cells.zygote import Zygote

__all__ = ["Cell", "CellOwner", "RunEvents"]

log = logging.getLogger("sandboxd.engine")

HELLO: Final = struct.Struct("=4sIiI")
HELLO_SECONDS: Final = 10.0
LAST_PACKETS: Final = 1024
"""Of a dead cell's, before its finished frame: far more than a program has under way, and read in some ms."""
SOURCE_NAME: Final = "main.py"
# Room that is there already: a fresh 256 KiB would be mapped and unmapped for each packet.
_room: Final = bytearray(PACKET_BYTES)


class Watched(enum.IntEnum):
    """What a descriptor that is watched stands for."""

    CHANNEL = 0
    STDOUT = 1
    STDERR = 2
    OOM = 3
    ALARM = 4


class CellOwner(Protocol):
    """Who had a cell made and holds it until a run takes it."""

    def sealed(self, cell: Cell) -> None:
        """Every wall is up: it can be taken."""

    def parked(self, cell: Cell) -> None:
        """It has rehearsed and is asleep."""

    def failed(self, cell: Cell, why: Unavailable | None) -> None:
        """It ended before a run took it; None: the zygote was lost."""

    def gone(self, cell: Cell) -> None:
        """Its slot was given back."""


class RunEvents(Protocol):
    """The run that has a cell. Told in the engine's loop."""

    def spoke(self, data: bytes) -> None:
        """A packet of the program's, or b"" at the end of the channel."""

    def wrote(self, number: int) -> None:
        """Stream 1 or 2 can be read, or is at its end."""

    def ran_out(self) -> None:
        """There may have been an OOM kill."""

    def rang(self) -> None:
        """Its alarm rang, if it has one."""

    def exited(self) -> None:
        """The program's process ended; ``wait`` says how."""

    def lost(self) -> None:
        """The zygote is gone, and the cell with it."""


class Cell:
    """Made by ``make``; then its owner's until ``attach``, then its run's until ``let_go``."""

    # More than 15 attributes: one object on the request path holds what the kernel gave, the state, and who is told.

    __slots__ = (
        "_alarm",
        "_events",
        "_loop",
        "_owner",
        "_poll",
        "_refused",
        "_resources",
        "_source",
        "_watched",
        "channel",
        "death_waiters",
        "ended_at",
        "fds",
        "is_parked",
        "life",
        "made_at",
        "slot",
        "spec",
        "wait",
        "zygote",
    )

    def __init__(self, resources: Resources, zygote: Zygote, spec: CellSpec, owner: CellOwner) -> None:
        self._resources = resources
        self._owner: CellOwner = owner
        self._loop = asyncio.get_running_loop()
        self._events: RunEvents | None = None
        self._refused: Unavailable | None = None
        self._source: Fd | None = None
        self._alarm: Fd | None = None
        self._watched: dict[int, Watched] = {}
        self._poll: select.epoll | None = None
        self.zygote = zygote
        self.spec = spec
        self.life = Life()
        self.slot: Slot | None = None
        self.fds: CellFds | None = None
        self.channel: socket.socket | None = None
        self.is_parked = False
        self.made_at = self.ended_at = 0.0
        self.wait: tuple[int, int] | None = None
        self.death_waiters: list[asyncio.Future[None]] = []

    # Making

    def make(self, hurry: bool) -> None:
        """Ask for it; in a *hurry* it does not warm up. Its owner hears the rest. Raises Unavailable, ZygoteLost;
        nothing is left then.
        """
        resources = self._resources
        if resources.crowded:
            what = (
                f"{resources.descriptors - SPARE_DESCRIPTORS} descriptors are open, and {resources.descriptors} may be"
            )
            raise Unavailable(
                "cell", what, errno=errno.EMFILE, fix="raise the limit of open files, or lower max_running"
            )
        try:
            slot = resources.slots.take()
            try:
                slot.leaf.set_limits(self.spec.leaf)
            except BaseException:
                resources.slots.give_back(slot)
                raise
        except IndexError:
            fix = "start the engine again; its log says which processes would not die"
            raise Unavailable("slots", "every slot is lost to processes that would not die", fix=fix) from None
        except OSError as error:
            fix = "the engine must own its cgroup subtree; sandboxd doctor says what is missing"
            raise Unavailable("cgroup", str(error), errno=error.errno, fix=fix) from error
        self.slot = slot
        self.made_at = time.monotonic()
        try:
            guest = resources.slot_ids.guest_uid(slot.index)
            self.zygote.make(self, self.spec.plan, slot.index, guest, slot.entry, hurry)
        except BaseException:
            self.slot = None
            resources.slots.give_back(slot)
            raise

    def made(self, fds: CellFds) -> None:
        """As ``zygote.CellEvents``."""
        self.fds = fds
        self._resources.crowded = (
            fds.highest() > self._resources.descriptors - SPARE_DESCRIPTORS
        )  # numbers are the lowest that are free
        if self.life.on(Event.MADE) is State.ENDING:
            self._kill()
            return
        try:
            self.channel = fds.take_channel()
            cell_socket.refuse_descriptors(self.channel)
            poll = self._poll = select.epoll()
            self._watch(self.channel.fileno(), Watched.CHANNEL)
            self._source = Fd(workspace.make_source(self.zygote.files, fds.code, SOURCE_NAME, ZYGOTE_ID))
            self._loop.add_reader(poll.fileno(), self._ready)
        except OSError as error:
            self._fail(Unavailable("cell", str(error), errno=error.errno, fix="raise the limit of open files"))

    def not_made(self, refusal: Unavailable) -> None:
        """As ``zygote.CellEvents``."""
        self._refused = self._refused or refusal
        wanted = self.life.state is State.MAKING
        self.life.on(Event.FAILED if wanted else Event.DEAD)
        if wanted:
            self._owner.failed(self, refusal)
        self._on_dead()

    def not_forked(self, refusal: Unavailable) -> None:
        """As ``zygote.CellEvents``."""
        self._fail(refusal)

    def _fail(self, why: Unavailable) -> None:
        """A cell that cannot be used: its owner is told, or its run."""
        if self.life.state is State.ENDING:
            return
        self._refused = why
        events = self._events
        if events is None:
            self.end(Event.FAILED)
            self._owner.failed(self, why)
        else:
            events.exited()

    def _watch(self, fd: int, what: Watched) -> None:
        if self._poll is not None:
            self._poll.register(fd, select.EPOLLIN)
        self._watched[fd] = what

    def _unwatch(self, fd: int) -> None:
        if self._watched.pop(fd, None) is not None and self._poll is not None:
            self._poll.unregister(fd)

    # Waiting for a program

    @property
    def _account(self) -> object:
        """Of what it sends, for ``disposal``."""
        return ("cell", self.slot.index) if self.slot is not None else None

    @property
    def leaf(self) -> AnyLeaf:
        """The cgroup leaf; only while it has a slot."""
        assert self.slot is not None  # noqa: S101
        return self.slot.leaf

    def discard(self) -> None:
        """Nobody will use it."""
        if self.life.state not in (State.ENDING, State.COLLECTING, State.GONE):
            self.end(Event.DISCARDED)

    def check_late(self, now: float) -> None:
        """One that has not said in time that its walls are up is ended."""
        if self.life.state in (State.MAKING, State.SEALING) and now - self.made_at > HELLO_SECONDS:
            self._fail(
                Unavailable("cell", "the new cell did not say that its walls are up", fix="look at the engine's log")
            )

    def attach(self, events: RunEvents) -> None:
        """*events* has it now, and hears what comes of it. The program starts with ``go``."""
        self._events = events
        if not self.is_parked:
            self.leaf.begin()

    @property
    def source_fd(self) -> int:
        """The program's file, to be written once."""
        assert self._source is not None  # noqa: S101
        return self._source.fileno()

    def put_source(self, source: bytes, name: str) -> None:
        """Write the program's text where the cell reads it. Raises OSError."""
        assert self.fds is not None  # noqa: S101
        view = memoryview(source)
        while len(view):
            view = view[os.write(self.source_fd, view) :]
        if name != SOURCE_NAME:
            self.zygote.files.rename(self.fds.code, SOURCE_NAME, name, ZYGOTE_ID)

    def go(self, with_streams: bool) -> None:
        """From now on it is the program's. Without *with_streams* its output is watched by somebody else."""
        assert self.fds is not None  # noqa: S101
        self.life.on(Event.GO)
        if with_streams:
            self._watch(self.fds.stdout, Watched.STDOUT)
            self._watch(self.fds.stderr, Watched.STDERR)
        self._watch(self.leaf.oom_fd, Watched.OOM)
        if self._resources.slots.many and self.slot is not None:
            self.slot.close_idle_fds()
            if self._source is not None:
                self._source.close()
            self.fds.close("code")

    def watch_alarm(self, alarm: int) -> None:
        """Tell its run when *alarm* rings; it is the cell's to close."""
        self._alarm = Fd(alarm)
        self._watch(alarm, Watched.ALARM)

    # What comes from it

    def _ready(self) -> None:
        assert self._poll is not None  # noqa: S101
        for fd, _ in self._poll.poll(0, 5):
            what = self._watched.get(fd)
            if what is Watched.CHANNEL:
                self._speaks()
            elif self._events is not None and what is not None:
                if what is Watched.OOM:
                    self._events.ran_out()
                elif what is Watched.ALARM:
                    self._unwatch(fd)
                    self._events.rang()
                else:
                    self._events.wrote(what)

    def watch_stream(self, number: int, on: bool) -> None:
        """Tell its run when stream *number* can be read, or do not."""
        assert self.fds is not None  # noqa: S101
        fd = self.fds.stdout if number == 1 else self.fds.stderr
        if on and self._poll is not None and fd not in self._watched:
            self._watch(fd, Watched(number))
        elif not on:
            self._unwatch(fd)

    def last_packets(self) -> Iterator[bytes]:
        """What it said that nobody has read, LAST_PACKETS at most: it is dead."""
        for _ in range(LAST_PACKETS):
            if self.channel is None:
                return
            try:
                data = cell_socket.receive(self.channel, _room, self._account)
            except (OSError, cell_socket.Descriptors):
                return
            if not data:
                return
            yield data

    def stop_reading(self) -> None:
        """Read no more of its packets: the program could keep the engine busy with them."""
        if self.channel is not None:
            self._unwatch(self.channel.fileno())

    def set_reading(self, on: bool) -> None:
        """Read its packets, or do not for the moment."""
        if self.channel is None or (self.channel.fileno() in self._watched) is on:
            return
        if on:
            self._watch(self.channel.fileno(), Watched.CHANNEL)
        else:
            self._unwatch(self.channel.fileno())

    def resume_reading(self) -> None:
        """Whoever read the channel and the streams does so no more."""
        assert self.fds is not None  # noqa: S101
        assert self.channel is not None  # noqa: S101
        self._watch(self.channel.fileno(), Watched.CHANNEL)
        self._watch(self.fds.stdout, Watched.STDOUT)
        self._watch(self.fds.stderr, Watched.STDERR)

    def _speaks(self) -> None:
        assert self.channel is not None  # noqa: S101
        try:
            data = cell_socket.receive(self.channel, _room, self._account)
        except BlockingIOError:
            return
        except cell_socket.Descriptors:
            log.info("a program sent descriptors over its channel, and is heard no more")
            data = b""
        except OSError:
            data = b""
        self._resources.held.did(len(data))
        if not data:
            self._unwatch(self.channel.fileno())
        state = self.life.state
        if self._events is not None and state is not State.SEALED:
            self._events.spoke(data)
        elif not data:
            return  # its end is told by who reaps it
        elif state is State.SEALING:
            self._hello(data)
        elif state is State.SEALED and data == PARKED and not self.is_parked:
            if self._events is None:
                self.leaf.begin()
                self.is_parked = True
                self._owner.parked(self)
        elif state is State.SEALED:
            self._fail(Unavailable("cell", "a parked cell said what it should not", fix="look at the engine's log"))

    def _hello(self, data: bytes) -> None:
        if len(data) != HELLO.size or data[:4] != b"SBXC":
            what = "the new cell's first packet is not its own"
            self._fail(Unavailable("cell", what, fix="reinstall sandboxd"))
            return
        _, stage, number, _ = HELLO.unpack(data)
        if stage:
            self._fail(unavailable(stage, number))
            return
        self.life.on(Event.WALLS_UP)
        self._owner.sealed(self)

    # The end

    def end(self, event: Event) -> None:
        """*event* ends it: SIGKILL to the init, and so to everything of the cell."""
        before = self.life.state
        if self.life.on(event) is not State.ENDING or before is State.ENDING:
            return
        self.ended_at = time.monotonic()
        self._resources.reaper.add(self)
        self._kill()
        self._thaw()
        # What it said or wrote is read when it is dead. Its ends hang up before that, and would keep the loop busy.
        self._unwatch_all()

    def _kill(self) -> None:
        if self.fds is not None and self.fds.init >= 0:
            try:
                calls.pidfd_kill(self.fds.init, signal.SIGKILL)
            except OSError as error:
                log.error("the kill of a cell was refused: %s", error)

    def _thaw(self) -> None:
        """What is frozen on v1 does not die; killed, it does not go on either."""
        if self.slot is not None:
            try:
                self.slot.leaf.thaw()
            except OSError as error:
                log.error("a dying cell cannot be thawed: %s", error)

    def exited(self, code: int, status: int) -> None:
        """As ``zygote.CellEvents``."""
        self.wait = (code, status)
        # Its children may live, and send for as long as they do: first the kill. What it said is read when it is dead.
        if self._events is not None:
            self._events.exited()
            return
        if self.life.state is State.SEALING and self.channel is not None:
            self._speaks()  # no program has been in it: which step was refused, if it could say so
        if self.life.state in (State.SEALING, State.SEALED):
            when = "before its walls were up" if self.life.state is State.SEALING else "while nobody had it"
            self._fail(Unavailable("cell", f"the new cell ended {when}", fix="look at the engine's log"))

    def dead(self) -> None:
        """As ``zygote.CellEvents``."""
        if self.life.state is not State.ENDING:
            self.end(Event.EXITED)
        self.life.on(Event.DEAD)
        self._on_dead()

    def lost(self) -> None:
        """As ``zygote.CellEvents``."""
        if self.life.state in (State.COLLECTING, State.GONE):
            return
        self.life.on(Event.LOST)
        if self._events is not None:
            self._events.lost()
        elif self._refused is None:
            self._owner.failed(self, None)
        self._on_dead()

    def _on_dead(self) -> None:
        """Nothing of it lives."""
        self._resources.reaper.discard(self)
        self._unwatch_all()
        death_waiters, self.death_waiters = self.death_waiters, []
        for one in death_waiters:
            if not one.done():
                one.set_result(None)
        if self._events is None and self.life.state is State.COLLECTING:
            self._give_back()

    def _unwatch_all(self) -> None:
        if self._poll is not None:
            self._loop.remove_reader(self._poll.fileno())
            self._poll.close()
            self._poll = None

    async def death(self) -> None:
        """Until nothing of it lives, or it was given up."""
        if self.life.state in (State.COLLECTING, State.GONE):
            return
        future = self._loop.create_future()
        self.death_waiters.append(future)
        await future

    def let_go(self) -> None:
        """The run needs it no more. It must have been ended."""
        self._events = None
        if self.life.state is State.COLLECTING:
            self._give_back()

    def _give_back(self) -> None:
        """Close what is left and give the slot back. Descriptors first: they pin the file systems and their memory,
        and so much of it that freeing it takes its time is freed by another thread.
        """
        self.life.on(Event.LET_GO)
        slow = self._is_slow_to_close()
        fds = self._take_fds()
        if slow:
            closing = self._loop.run_in_executor(None, lib.sbx_close_all, fds, len(fds))
            closing.add_done_callback(self._closed)
        else:
            lib.sbx_close_all(fds, len(fds))
            self._closed()

    def _closed(self, _: object = None) -> None:
        self._resources.crowded = False
        slot, self.slot = self.slot, None
        if slot is not None:
            self._resources.slots.give_back(slot)
        self._owner.gone(self)

    def _is_slow_to_close(self) -> bool:
        try:
            return self.fds is not None and workspace.is_large(self.fds)
        except OSError:
            return False  # not there any more

    def _take_fds(self) -> list[int]:
        """Every descriptor that is open, now the caller's to close."""
        fds = [one.take() for one in (self._source, self._alarm) if one is not None]
        if self.fds is not None:
            fds += self.fds.take()
        end, self.channel = self.channel, None
        if end is not None:
            if cell_socket.may_carry_descriptors():
                disposal.close_socket(end, self._account)
            else:
                end.close()
        return [fd for fd in fds if fd >= 0]

    def check_teardown(self, now: float) -> bool:
        """Killed tasks run their own end, under the CPU quota of their leaf: when that takes long, it is lifted."""
        if self.slot is not None and now - self.ended_at > 0.02:
            try:
                self.slot.leaf.unthrottle()
            except OSError as error:
                log.debug("a dying cell's quota cannot be lifted: %s", error)
        return now - self.ended_at > 10.0

    def abandon(self) -> None:
        """It would not die: its slot is not used again, and nobody waits any more."""
        log.error("processes of a cell are still there after 10 s; its slot is not used again")
        if self.slot is not None:
            self._resources.slots.abandon(self.slot)
            self.slot = None
        death_waiters, self.death_waiters = self.death_waiters, []
        for one in death_waiters:
            if not one.done():
                one.set_result(None)
