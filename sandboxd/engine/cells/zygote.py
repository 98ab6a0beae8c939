"""The engine's handle on one zygote: start it, have inits made and cells forked, notice its death.

Theory of operation

    engine (this process; root, or an ordinary user)
      | clone3: new user, pid, mount, net, ipc, uts namespaces; id maps written by the engine. Not root, it has a holder
      |         make the user namespace first, which gets its maps and ends (_user_namespace)
      `-- nursery: pid 1 there, a static executable without libc, mapped root; makes inits, reaps, dies with the engine
            |-- broker: opens cells' files for an engine that is not root; without other rights (files.py)
            |-- zygote: the image's interpreter, mapped root; imports, warms up, forks cells; never sees tenants' bytes
            |     `-- cell: forked into an init's pid namespace, joins its other namespaces, drops everything
            |               (native/inside/cell.c)
            `-- init: pid 1 of one cell's namespaces, no capabilities, no descriptors, asleep

    channel to the nursery: one struct sbx_make_request for each cell; back come MADE with nine descriptors, or
                            REFUSED, and DEAD when the init, and so the pid namespace, is gone (sandboxd.h)
    channel to the zygote:  config and filters, its ready message; then nothing goes there any more. From it come
                            EXITED for each cell that was forked, and REFUSED for one that could not be
    log: a pipe that both have as stdout and stderr; its last bytes explain a death

The nursery hands each init on to the zygote itself: the engine asks once and is told twice. Who reaps whom: the nursery
its zygote and its inits, the zygote its cells, the engine the nursery. Nobody but the engine kills: the init's pidfd.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
import struct
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from sandboxd._native import lib
from sandboxd._util.fdwait import readable, resolve
from sandboxd.engine.cells.messages import EventReader, Kind, NoEvent
from sandboxd.engine.cells.preload_errors import not_preloaded
from sandboxd.engine.cells.zygote_spawn import Report, spawn
from sandboxd.errors import Unavailable
from sandboxd.kernel.stages import unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sandboxd.cgroup.interface import AnyInstance
    from sandboxd.engine.cells.files import CellFiles
    from sandboxd.engine.cells.messages import CellFds, CellPlan, Entry, Event
    from sandboxd.engine.cells.zygote_spawn import Spawned, ZygoteSpec
    from sandboxd.ids.ranges import IdBlock
    from sandboxd.seccomp import Layers

__all__ = ["CellEvents", "Facts", "Zygote", "ZygoteConfig", "ZygoteLost"]

log = logging.getLogger("sandboxd.engine")

READY_SECONDS: Final = 120.0  # imports of a large stack on a cold disk
SPAWN_SECONDS: Final = 60.0  # a bind of a tree on a network file system may take its time
LOG_BYTES: Final = 8192
BATCH: Final = 32
"""Events of one channel in one iteration of the loop."""
UNASKED: Final = "it reported a cell that nobody asked for"


class ZygoteLost(Exception):
    """The zygote or its nursery ended; every cell of it is gone. The message holds what they last said."""


@dataclass(frozen=True, slots=True)
class ZygoteConfig:
    """What a policy makes of a zygote. *walls_down* exists for tests of single walls."""

    preload: Sequence[str]
    warmup: str
    filters: Layers
    landlock_abi: int
    """The lowest ABI that will do; 0 goes without."""
    policy: str = ""
    """Its name, for errors."""
    walls_down: frozenset[int] = frozenset()
    rehearsal: bool = True
    """Whether a parked cell goes through the warm-up once more, so that its pages are its own."""
    extra: dict[str, Any] = field(default_factory=dict)
    """For measurements: what else the zygote is told."""


@dataclass(slots=True)
class Facts:
    """What is known of a zygote once it serves."""

    landlock_abi: int = 0
    version: tuple[int, ...] = ()
    image: str = ""
    learning: bool = False
    """Whether it is still finding out what the warm-up touches; cells are served meanwhile."""
    unmet: list[str] = field(default_factory=list)
    """What this host does not give it, in words."""


class CellEvents(Protocol):
    """Who asked for a cell, and is told what becomes of it. Exactly one of ``made`` and ``not_made`` comes; after
    ``made`` one of ``exited`` and ``not_forked``, and then ``dead``, when nothing of it lives; or ``lost``, after
    which nothing comes and nothing lives.
    """

    def made(self, fds: CellFds) -> None:
        """The init lives; the zygote is forking the cell."""

    def not_made(self, refusal: Unavailable) -> None:
        """A step of the init was refused; nothing is left of it."""

    def not_forked(self, refusal: Unavailable) -> None:
        """There is an init, but no cell in it."""

    def exited(self, code: int, status: int) -> None:
        """The cell's first process ended: si_code and si_status of waitid(2)."""

    def dead(self) -> None:
        """The pid namespace is gone with all that was in it."""

    def lost(self) -> None:
        """The zygote and its nursery are dead, and with them every cell."""


class _Asked:
    """A cell that was asked for."""

    __slots__ = ("events", "half_closed")

    def __init__(self, events: CellEvents) -> None:
        self.events = events
        self.half_closed = False
        """Whether the nursery has reaped the init, or the zygote the cell; the other one says so sooner or later."""


class _Log:
    """What nursery and zygote write to stdout and stderr: the end of it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._said = b""
        asyncio.get_running_loop().add_reader(fd, self.read)

    def read(self) -> None:
        """What has come."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._fd, 65536)
            self._said = (self._said + data)[-LOG_BYTES:]
            if not data:
                self.stop()

    def text(self) -> str:
        """The end of all that came."""
        self.read()
        return self._said.decode("utf-8", "replace").strip()

    def stop(self) -> None:
        """Be told of no more."""
        asyncio.get_running_loop().remove_reader(self._fd)


class Zygote:
    """One nursery with one zygote, made by ``spawn``. ``activate`` once; ``close`` ends every process of it."""

    def __init__(self, spec: ZygoteSpec, spawned: Spawned) -> None:
        self.facts = Facts()
        self.lost = False
        self.made = 0
        self.born = time.monotonic()
        self.warm_at: float | None = None
        """Since when its cells know what the warm-up touches."""
        self._spec = spec
        self._ends = spawned
        self._why: list[str] = []
        self._asked: dict[int, _Asked] = {}
        self._unsent: deque[tuple[bytes, Entry]] = deque()
        loop = asyncio.get_running_loop()
        # There from the start: a zygote may be lost before anybody waits for its answer.
        self._ready: asyncio.Future[dict[str, Any]] = loop.create_future()
        self._gone: asyncio.Future[None] = loop.create_future()
        self._closed = False
        self._reader = EventReader()
        spawned.nursery.setblocking(False)
        spawned.zygote.setblocking(False)
        loop.add_reader(spawned.pidfd, self._died)
        loop.add_reader(spawned.nursery.fileno(), self._nursery_speaks)
        loop.add_reader(spawned.zygote.fileno(), self._answer_speaks)
        self._log = _Log(spawned.log)

    @classmethod
    def spawn(cls, spec: ZygoteSpec, ids: IdBlock, cgroup: AnyInstance) -> Zygote:
        """A new one among *cgroup*'s zygotes; ``activate`` comes next. Raises Unavailable; what goes wrong later is
        told by ``activate``.
        """
        return cls(spec, spawn(spec, ids, cgroup))

    @property
    def files(self) -> CellFiles:
        """Who opens and makes files of its cells."""
        return self._ends.files

    @property
    def pid(self) -> int:
        """Of the nursery."""
        return self._ends.pid

    # Start

    async def activate(self, config: ZygoteConfig) -> None:
        """Have it import and warm up what a policy names. Raises Unavailable; the zygote is of no use then."""
        walls_down = sum(1 << stage for stage in config.walls_down)
        message = {
            "preload": list(config.preload),
            "warmup": config.warmup,
            "walls_down": walls_down,
            "rehearsal": config.rehearsal,
            **config.extra,
        }
        await self._executed()
        zygote = self._ends.zygote
        try:
            zygote.send(json.dumps(message).encode())
            zygote.send(config.filters.inherited)
            zygote.send(config.filters.own)
            answer = await asyncio.wait_for(self._ready, READY_SECONDS)
        except TimeoutError:
            fix = "look at [runtime] preload and warmup: they did not end"
            raise Unavailable("zygote", f"no zygote after {READY_SECONDS:.0f} s", fix=fix) from None
        except (ZygoteLost, OSError) as error:
            fix = f"start {self._spec.python.executable} by hand; the rootfs shows it only its own prefix and /usr"
            what = f"the interpreter ended before it was ready: {self.last_words()}"
            raise Unavailable("zygote", what, errno=getattr(error, "errno", None), fix=fix) from None
        if not answer.get("ok"):
            raise not_preloaded(answer, self._spec.python, config.policy)
        if answer["open_fds"]:
            log.warning(
                "preloaded libraries keep descriptors open, which no cell inherits: %s", ", ".join(answer["open_fds"])
            )
        self.facts = Facts(
            landlock_abi=int(answer["landlock_abi"]),
            version=tuple(answer["version"]),
            image=str(answer.get("image", "")),
            learning=bool(answer.get("learning")),
            unmet=self.facts.unmet,
        )
        if self.facts.landlock_abi < config.landlock_abi:
            has = self.facts.landlock_abi
            raise Unavailable(
                "landlock",
                f"the policy requires Landlock ABI {config.landlock_abi}, this kernel has {has}",
                errno=errno.EOPNOTSUPP,
                fix="boot with landlock in lsm=, on a kernel that has it, or lower [require] landlock_abi in the "
                "policy",
            )

    async def _executed(self) -> None:
        """Until the nursery runs. Raises Unavailable when a step before that was refused."""
        report = self._ends.report
        try:
            async with asyncio.timeout(SPAWN_SECONDS):
                await readable(report.fileno())
            said = os.read(report.fileno(), 64)
        except TimeoutError:
            fix = "look at the mounts of this host: one of them does not answer"
            raise Unavailable("zygote", f"the root was not built within {SPAWN_SECONDS:.0f} s", fix=fix) from None
        finally:
            report.close()
        self.facts.unmet = Report(said, self._spec.operations).unmet

    # Cells

    def make(self, events: CellEvents, plan: CellPlan, slot: int, guest_id: int, entry: Entry, hurry: bool) -> None:
        """Have a cell made in *slot*, which must have none; *events* is told. In a *hurry* it does not warm up. Raises
        ZygoteLost.
        """
        if self.lost:
            raise ZygoteLost(self.last_words() if not self._closed else "closed")
        self.made += 1
        identity = self.made & 0xFFFFFFFF
        self._asked[identity] = _Asked(events)
        self._unsent.append((plan.request(identity, slot, guest_id, entry, hurry), entry))
        if len(self._unsent) == 1:
            self._send()

    @property
    def alive(self) -> int:
        """Cells that were asked for and are not dead."""
        return len(self._asked)

    def _send(self) -> None:
        """What waits goes out as far as the nursery's queue takes it."""
        fd = self._ends.nursery.fileno()
        while self._unsent:
            request, entry = self._unsent[0]
            sent = lib.sbx_send_fds(fd, request, len(request), entry.fds, entry.count)
            if sent == -errno.EAGAIN:
                asyncio.get_running_loop().add_writer(fd, self._send_more)
                return
            if sent < 0:
                self._lose(f"a request for a cell could not be sent: {os.strerror(-sent)}")
                return
            self._unsent.popleft()

    def _send_more(self) -> None:
        asyncio.get_running_loop().remove_writer(self._ends.nursery.fileno())
        self._send()

    # What it says

    def _next_event(self, channel: socket.socket) -> Event | None:
        """The next event; None when none is there, or the zygote was lost."""
        try:
            return self._reader.next(channel)
        except NoEvent as error:
            self._lose(str(error))
            return None

    def _nursery_speaks(self) -> None:
        for _ in range(BATCH):
            event = self._next_event(self._ends.nursery)
            if event is None:
                return
            asked = self._asked.get(event.identity)
            if asked is None:
                self._reader.close_fds()
                self._lose(UNASKED)
            elif event.kind == Kind.MADE:
                fds = self._reader.take_fds()
                if fds is None:
                    self._lose(UNASKED)
                else:
                    asked.events.made(fds)
            elif event.kind == Kind.DEAD:
                self._half_dead(event.identity, asked)
            else:
                del self._asked[event.identity]
                asked.events.not_made(unavailable(event.stage, event.number))
            if self.lost:
                return

    def _zygote_speaks(self) -> None:
        # Each cell was announced by the nursery first; here both may have become readable at the same time.
        self._nursery_speaks()
        for _ in range(BATCH):
            event = None if self.lost else self._next_event(self._ends.zygote)
            if event is None:
                return
            if event.kind == Kind.WARM and self.facts.learning:
                self.facts.learning = False
                self.warm_at = time.monotonic()
                log.info("what the warm-up touches is known, %.2f s after the zygote's birth", self.warm_at - self.born)
                continue
            asked = self._asked.get(event.identity)
            if asked is None:
                self._lose(UNASKED)
                return
            if event.kind == Kind.EXITED:
                asked.events.exited(event.code, event.status)
            else:
                asked.events.not_forked(unavailable(event.stage, event.number))
            self._half_dead(event.identity, asked)

    def _half_dead(self, identity: int, asked: _Asked) -> None:
        if not asked.half_closed:
            asked.half_closed = True
            return
        del self._asked[identity]
        asked.events.dead()

    def _answer_speaks(self) -> None:
        """Its first packet says whether the policy could be brought into force."""
        zygote = self._ends.zygote
        data, fds = _receive(zygote, 1 << 16, 1)
        _close_all(fds)
        self._on_ready(data)
        if not self.lost:
            asyncio.get_running_loop().add_reader(zygote.fileno(), self._zygote_speaks)

    def _on_ready(self, data: bytes) -> None:
        try:
            answer = json.loads(data)
        except ValueError:
            self._lose("its answer to the policy is not JSON" if data else "it hung up")
            return
        if not self._ready.done():
            self._ready.set_result(answer)

    # The end

    def last_words(self) -> str:
        """The end of what nursery and zygote wrote to their log; else, as far as it is known, why they were lost."""
        return self._log.text() or ", ".join(part for part in self._why if part) or "it ended"

    def _died(self) -> None:
        end = ""
        with contextlib.suppress(ChildProcessError):
            ended = os.waitid(os.P_PIDFD, self._ends.pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if ended is not None:
                how = "exit status" if ended.si_code == os.CLD_EXITED else "signal"
                end = f"the nursery ended with {how} {ended.si_status}"
        self._lose("", end)
        asyncio.get_running_loop().remove_reader(self._ends.pidfd)
        asked, self._asked = list(self._asked.values()), {}
        for one in asked:
            one.events.lost()
        resolve(self._gone)

    def _lose(self, why: str, end: str = "") -> None:
        """From now on nothing is asked; whoever waits is told once everything of it is dead."""
        if self.lost:
            self._why.append(end)
            return
        self.lost = True
        self._why = [why, end]
        loop, ends = asyncio.get_running_loop(), self._ends
        self._log.read()
        self._log.stop()
        for fd in (ends.nursery.fileno(), ends.zygote.fileno()):
            loop.remove_reader(fd)
        loop.remove_writer(ends.nursery.fileno())
        self._unsent.clear()
        ends.kill()
        if not self._ready.done():
            self._ready.set_exception(ZygoteLost(self.last_words()))
            self._ready.exception()  # whoever waited may be gone

    async def close(self) -> None:
        """Kill every process of it and wait until they are gone, even when the caller is cancelled. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._lose("it was closed")
        cancelled: asyncio.CancelledError | None = None
        while not self._gone.done():  # SIGKILL is on its way
            try:
                await asyncio.shield(self._gone)
            except asyncio.CancelledError as error:
                cancelled = error
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self._ends.pidfd, os.WEXITED)
        self._ends.close()
        if cancelled is not None:
            raise cancelled


def _receive(channel: socket.socket, room: int, most_fds: int) -> tuple[bytes, list[int]]:
    try:
        data, control, flags, _ = channel.recvmsg(
            room, socket.CMSG_SPACE(4 * most_fds), socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        )
    except OSError:
        return b"", []
    fds = [
        fd
        for level, kind, raw in control
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS
        for fd in struct.unpack(f"{len(raw) // 4}i", raw[: len(raw) // 4 * 4])
    ]
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        _close_all(fds)
        return b"", []
    return data, fds


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
