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
import fcntl
import json
import logging
import os
import signal
import socket
import struct
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from sandboxd._native import ffi, lib
from sandboxd._util.fdwait import readable, resolve
from sandboxd.engine.cells import files as cellfiles
from sandboxd.engine.cells.files import Broker
from sandboxd.errors import Unavailable
from sandboxd.ids import rootless
from sandboxd.kernel import calls, userns
from sandboxd.kernel.stages import Stage, unavailable
from sandboxd.rootfs import plan as rootfs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sandboxd.cgroup import Instance
    from sandboxd.engine.cells.files import CellFiles
    from sandboxd.ids.ranges import IdBlock
    from sandboxd.rootfs.interpreter import Interpreter
    from sandboxd.seccomp import Layers

__all__ = [
    "CellEvents",
    "CellFds",
    "CellPlan",
    "Entry",
    "InitSizes",
    "Zygote",
    "ZygoteConfig",
    "ZygoteLost",
    "ZygoteSpec",
]

log = logging.getLogger("sandboxd.engine")

INSIDE: Final = Path(__file__).resolve().parents[2] / "inside"
READY_SECONDS: Final = 120.0  # imports of a large stack on a cold disk
SPAWN_SECONDS: Final = 60.0  # a bind of a tree on a network file system may take its time
LOG_BYTES: Final = 8192

_HEAD: Final = struct.Struct("=II")
_SIZES: Final = struct.Struct("=QQQQQQQ")
_CELL: Final = struct.Struct("=IIIIII")
_RLIMIT: Final = struct.Struct("=IIQQ")
_RLIMITS: Final = 16
_EVENT: Final = struct.Struct("=IIiiIiI")
_MADE, _REFUSED, _DEAD, _EXITED, _WARM = 1, 2, 3, 4, 5
_MADE_FDS: Final = 9
_EVENT_FDS: Final = 10
_BATCH: Final = 32
_REPORT: Final = struct.Struct("=IiI")
_KEPT: Final = {
    1: "a session keyring of its own (a filter around the engine refuses keyctl)",
    2: "the limit on user namespaces (/proc/sys/user cannot be written here)",
}

ENVIRONMENT: Final = {
    "HOME": "/workspace",
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "TMPDIR": "/tmp",  # noqa: S108 - the cell's own tmpfs
    "LANG": "C.UTF-8",
    "PYTHONUTF8": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    # One thread when the zygote forks: each of these libraries would start one or more at import. Cells keep the
    # variables, so that a library behaves alike whether the policy or the program imports it.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "GOTO_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "BLIS_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "POLARS_MAX_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pandas imports pyarrow where it is installed
    # No display, and caches where they do not show up among the program's files.
    "MPLBACKEND": "Agg",
    "MPLCONFIGDIR": "/tmp/.matplotlib",  # noqa: S108
    "XDG_CACHE_HOME": "/tmp/.cache",  # noqa: S108
}
"""The whole environment of zygote and cells; a run's ``env`` is added to it."""


class ZygoteLost(Exception):
    """The zygote or its nursery ended; every cell of it is gone. The message holds what they last said."""


@dataclass(frozen=True, slots=True)
class ZygoteSpec:
    """What a zygote is made of before any policy has its say. *allow_user_namespaces* exists for tests of other
    walls.
    """

    python: Interpreter
    operations: Sequence[rootfs.Op]
    allow_user_namespaces: bool = False


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


@dataclass(frozen=True, slots=True)
class InitSizes:
    """Bytes and inodes of a cell's file systems."""

    workspace_bytes: int
    workspace_files: int
    tmp_bytes: int
    tmp_files: int
    shm_bytes: int
    shm_files: int
    code_bytes: int


class CellPlan:
    """What is the same for all cells of the same limits, as the nursery and the zygote read it."""

    __slots__ = ("_nlimits", "_rlimits", "_sizes")

    def __init__(self, sizes: InitSizes, rlimits: Sequence[tuple[int, int, int]]) -> None:
        """*rlimits*: (resource, soft, hard) of setrlimit(2), at most 16."""
        self._sizes = _SIZES.pack(
            sizes.workspace_bytes,
            sizes.workspace_files,
            sizes.tmp_bytes,
            sizes.tmp_files,
            sizes.shm_bytes,
            sizes.shm_files,
            sizes.code_bytes,
        )
        self._nlimits = len(rlimits)
        packed = b"".join(_RLIMIT.pack(which, 0, soft, hard) for which, soft, hard in rlimits)
        self._rlimits = packed.ljust(_RLIMITS * _RLIMIT.size, b"\0")

    def request(self, identity: int, slot: int, guest_id: int, entry: Entry, hurry: bool) -> bytes:
        """A struct sbx_make_request."""
        cell = _CELL.pack(guest_id, entry.has_cgroup, entry.count - entry.has_cgroup, self._nlimits, hurry, 0)
        return b"".join((_HEAD.pack(identity, slot), self._sizes, cell, self._rlimits))


class Entry:
    """The descriptors by which a cell enters its leaf, as C takes them; they stay the leaf's."""

    __slots__ = ("count", "fds", "has_cgroup")

    def __init__(self, clone_fd: int | None, entry_fds: Sequence[int]) -> None:
        numbers = [*([] if clone_fd is None else [clone_fd]), *entry_fds]
        self.has_cgroup = clone_fd is not None
        self.count = len(numbers)
        self.fds = ffi.new("int[]", numbers)


@dataclass(slots=True)
class CellFds:
    """What the engine holds of one cell; every descriptor is the holder's. -1 is closed or handed on."""

    init: int
    """pidfd: killing it ends everything of the cell."""
    workspace: int
    tmp: int
    shm: int
    code: int
    stdin: int
    stdout: int
    stderr: int
    channel: int

    def take_channel(self) -> socket.socket:
        """The near end of the channel, now the caller's."""
        end = socket.socket(fileno=self.channel)
        self.channel = -1
        return end

    def highest(self) -> int:
        """The highest number among them."""
        return max(
            self.init, self.workspace, self.tmp, self.shm, self.code, self.stdin, self.stdout, self.stderr, self.channel
        )

    def take(self) -> list[int]:
        """Those that are open, now the caller's."""
        fds = [getattr(self, name) for name in self.__slots__]
        for name in self.__slots__:
            setattr(self, name, -1)
        return [fd for fd in fds if fd >= 0]

    def close(self, *names: str) -> None:
        """Close the named descriptors, or all."""
        for name in names or self.__slots__:
            fd = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                os.close(fd)


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


class Zygote:
    """One nursery with one zygote. Made by ``start``; ``close`` ends every process of it."""

    def __init__(
        self,
        pid: int,
        pidfd: int,
        body: ZygoteSpec,
        nursery: socket.socket,
        zygote: socket.socket,
        log: int,
        report: int,
        files: CellFiles,
    ) -> None:
        self.pid = pid
        self.files = files
        self.python = body.python
        self._operations = body.operations
        self._report = report
        self.landlock_abi = 0
        self.unmet: list[str] = []
        self.version: tuple[int, ...] = ()
        self.lost = False
        self._why = self._end = ""
        self._pidfd = pidfd
        self._nursery = nursery
        self._zygote = zygote
        self._log = log
        self._said = b""
        self._loop = asyncio.get_running_loop()
        self._cells: dict[int, CellEvents] = {}
        self._half_closed: set[int] = set()
        self._unsent: deque[tuple[bytes, Entry]] = deque()
        # There from the start: a zygote may be lost before anybody waits for its answer.
        self._ready: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._answered = False
        self.made = 0
        self.born = time.monotonic()
        self.image = ""
        self.learning = False
        """Whether it is still finding out what the warm-up touches; cells are served meanwhile."""
        self.warm_at: float | None = None
        """Since when its cells know."""
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._closed = False
        for end in (nursery, zygote):
            end.setblocking(False)
        self._event = ffi.new("char[]", _EVENT.size)
        self._event_bytes = ffi.buffer(self._event)
        self._fds = ffi.new("int[]", _EVENT_FDS)
        self._nfds = ffi.new("unsigned int *")
        for fd, reader in (
            (self._pidfd, self._died),
            (self._nursery.fileno(), self._nursery_speaks),
            (self._zygote.fileno(), self._zygote_speaks),
            (self._log, self._log_speaks),
        ):
            self._loop.add_reader(fd, reader)

    # Start

    @classmethod
    def spawn(cls, body: ZygoteSpec, ids: IdBlock, cgroup: Instance) -> Zygote:
        """Have the namespaces and the root made, and nursery and interpreter executed there; ``activate`` comes next.

        It is born among *cgroup*'s zygotes. The mounts take some 20 ms, most of it the kernel's waiting for
        itself, and nobody waits for them here. Raises Unavailable; what goes wrong later is told by ``activate``.
        """
        return _spawn(cls, body, ids, cgroup)

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
        try:
            self._zygote.send(json.dumps(message).encode())
            self._zygote.send(config.filters.inherited)
            self._zygote.send(config.filters.own)
            answer = await asyncio.wait_for(self._ready, READY_SECONDS)
        except TimeoutError:
            fix = "look at [runtime] preload and warmup: they did not end"
            raise Unavailable("zygote", f"no zygote after {READY_SECONDS:.0f} s", fix=fix) from None
        except (ZygoteLost, OSError) as error:
            fix = f"start {self.python.executable} by hand; the rootfs shows it only its own prefix and /usr"
            what = f"the interpreter ended before it was ready: {self.last_words()}"
            raise Unavailable("zygote", what, errno=getattr(error, "errno", None), fix=fix) from None
        if not answer.get("ok"):
            raise _not_preloaded(answer, self.python, config.policy)
        if answer["open_fds"]:
            log.warning(
                "preloaded libraries keep descriptors open, which no cell inherits: %s", ", ".join(answer["open_fds"])
            )
        self.landlock_abi = int(answer["landlock_abi"])
        self.version = tuple(answer["version"])
        self.image = str(answer.get("image", ""))
        self.learning = bool(answer.get("learning"))
        if self.landlock_abi < config.landlock_abi:
            raise Unavailable(
                "landlock",
                f"the policy requires Landlock ABI {config.landlock_abi}, this kernel has {self.landlock_abi}",
                errno=errno.EOPNOTSUPP,
                fix="boot with landlock in lsm=, on a kernel that has it, or lower [require] landlock_abi in the "
                "policy",
            )

    async def _executed(self) -> None:
        """Until the nursery runs. Raises Unavailable when a step before that was refused."""
        report, self._report = self._report, -1
        try:
            async with asyncio.timeout(SPAWN_SECONDS):
                await readable(report)
            said = os.read(report, 64)
        except TimeoutError:
            fix = "look at the mounts of this host: one of them does not answer"
            raise Unavailable("zygote", f"the root was not built within {SPAWN_SECONDS:.0f} s", fix=fix) from None
        finally:
            os.close(report)
        if said:
            stage, _, lacks = _REPORT.unpack_from(said)
            if stage:
                raise _refused(said, self._operations)
            self.unmet = [words for bit, words in _KEPT.items() if lacks & bit]
            if len(said) > _REPORT.size:
                raise _refused(said[_REPORT.size :], self._operations)

    # Cells

    def make(self, hears: CellEvents, plan: CellPlan, slot: int, guest_id: int, entry: Entry, hurry: bool) -> None:
        """Have a cell made in *slot*, which must have none; *hears* is told. In a *hurry* it does not rehearse. Raises
        ZygoteLost.
        """
        if self.lost:
            raise ZygoteLost(self.last_words() if not self._closed else "closed")
        self.made += 1
        identity = self.made & 0xFFFFFFFF
        self._cells[identity] = hears
        self._unsent.append((plan.request(identity, slot, guest_id, entry, hurry), entry))
        if len(self._unsent) == 1:
            self._send()

    @property
    def alive(self) -> int:
        """Cells that were asked for and are not dead."""
        return len(self._cells)

    def _send(self) -> None:
        """What waits goes out as far as the nursery's queue takes it."""
        fd = self._nursery.fileno()
        while self._unsent:
            request, entry = self._unsent[0]
            sent = lib.sbx_send_fds(fd, request, len(request), entry.fds, entry.count)
            if sent == -errno.EAGAIN:
                self._loop.add_writer(fd, self._send_more)
                return
            if sent < 0:
                self._lose(f"a request for a cell could not be sent: {os.strerror(-sent)}")
                return
            self._unsent.popleft()

    def _send_more(self) -> None:
        self._loop.remove_writer(self._nursery.fileno())
        self._send()

    def last_words(self) -> str:
        """The end of what nursery and zygote wrote to their log; else, as far as it is known, why they were lost."""
        self._log_speaks()
        known = ", ".join(part for part in (self._why, self._end) if part)
        return self._said.decode("utf-8", "replace").strip() or known or "it ended"

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
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        for end in (self._nursery, self._zygote):
            end.close()
        if isinstance(self.files, Broker):
            self.files.close()
        os.close(self._pidfd)
        os.close(self._log)
        if self._report >= 0:
            os.close(self._report)
        if cancelled is not None:
            raise cancelled

    # Inside

    def _next_event(self, channel: socket.socket) -> tuple[int, ...] | None:
        """The next event, with the descriptors in ``_fds``; None when none is there, or the zygote was lost."""
        self._nfds[0] = _EVENT_FDS
        size = lib.sbx_recv_fds(channel.fileno(), self._event, _EVENT.size, self._fds, self._nfds)
        if size == _EVENT.size:
            return _EVENT.unpack(self._event_bytes)
        if size != -errno.EAGAIN:
            lib.sbx_close_all(self._fds, self._nfds[0])
            if size == 0:
                self._lose("it hung up")
            else:
                self._lose("its report is malformed" if size > 0 else f"its report was lost: {os.strerror(-size)}")
        return None

    def _nursery_speaks(self) -> None:
        for _ in range(_BATCH):
            event = self._next_event(self._nursery)
            if event is None:
                return
            kind, identity, _, _, stage, number, _ = event
            hears = self._cells.get(identity)
            if hears is None or (kind == _MADE and self._nfds[0] != _MADE_FDS):
                lib.sbx_close_all(self._fds, self._nfds[0])
                self._lose("it reported a cell that nobody asked for")
            elif kind == _MADE:
                hears.made(CellFds(*self._fds[0:_MADE_FDS]))
            elif kind == _DEAD:
                self._half_dead(identity, hears)
            else:
                del self._cells[identity]
                hears.not_made(unavailable(stage, number))
            if self.lost:
                return

    def _zygote_speaks(self) -> None:
        if not self._answered:
            self._on_ready()
            return
        # Each cell was announced by the nursery first; here both may have become readable at the same time.
        self._nursery_speaks()
        for _ in range(_BATCH):
            event = None if self.lost else self._next_event(self._zygote)
            if event is None:
                return
            kind, identity, code, status, stage, number, _ = event
            if kind == _WARM and self.learning:
                self.learning = False
                self.warm_at = time.monotonic()
                log.info("what the warm-up touches is known, %.2f s after the zygote's birth", self.warm_at - self.born)
                continue
            hears = self._cells.get(identity)
            if hears is None:
                self._lose("it reported a cell that nobody asked for")
                return
            if kind == _EXITED:
                hears.exited(code, status)
            else:
                hears.not_forked(unavailable(stage, number))
            self._half_dead(identity, hears)

    def _half_dead(self, identity: int, hears: CellEvents) -> None:
        """The nursery has reaped the init, or the zygote the cell; the other one says so too, sooner or later."""
        if identity not in self._half_closed:
            self._half_closed.add(identity)
            return
        self._half_closed.discard(identity)
        del self._cells[identity]
        hears.dead()

    def _on_ready(self) -> None:
        """Its first packet says whether the policy could be brought into force."""
        data, fds = _receive(self._zygote, 1 << 16, 1)
        _close_all(fds)
        self._answered = True
        try:
            answer = json.loads(data)
        except ValueError:
            self._lose("its answer to the policy is not JSON" if data else "it hung up")
            return
        if not self._ready.done():
            self._ready.set_result(answer)

    def _log_speaks(self) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._log, 65536)
            self._said = (self._said + data)[-LOG_BYTES:]
            if not data:
                self._loop.remove_reader(self._log)

    def _died(self) -> None:
        with contextlib.suppress(ChildProcessError):
            ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if ended is not None:
                how = "exit status" if ended.si_code == os.CLD_EXITED else "signal"
                self._end = f"the nursery ended with {how} {ended.si_status}"
        self._lose("")
        self._loop.remove_reader(self._pidfd)
        cells, self._cells = list(self._cells.values()), {}
        for hears in cells:
            hears.lost()
        resolve(self._gone)

    def _lose(self, why: str) -> None:
        """From now on nothing is asked; whoever waits is told once everything of it is dead."""
        if self.lost:
            return
        self.lost = True
        self._why = why
        self._log_speaks()
        for fd in (self._nursery.fileno(), self._zygote.fileno(), self._log):
            self._loop.remove_reader(fd)
        self._loop.remove_writer(self._nursery.fileno())
        self._unsent.clear()
        calls.pidfd_kill(self._pidfd, signal.SIGKILL)
        if not self._ready.done():
            self._ready.set_exception(ZygoteLost(self.last_words()))
            self._ready.exception()  # whoever waited may be gone


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


def _program() -> int:
    """The nursery's program as a sealed memfd: what runs inside can never reach a file of the host through /proc/1/exe
    (CVE-2019-5736).
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create("nursery", flags | 0x10)  # MFD_EXEC, Linux 6.3
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.memfd_create("nursery", flags)
    try:
        os.write(fd, (INSIDE / "nursery").read_bytes())
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _pair(undo: ExitStack) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    undo.callback(theirs.close)
    return ours, theirs


def _spawn(kind: type[Zygote], body: ZygoteSpec, ids: IdBlock, cgroup: Instance) -> Zygote:
    """From nothing to an executed nursery. On failure nothing is left."""
    python, operations = body.python, body.operations
    environment = {**ENVIRONMENT, "PATH": f"{os.path.dirname(python.executable)}:{ENVIRONMENT['PATH']}"}
    encoded = rootfs.encode(operations)
    with ExitStack() as undo, ExitStack() as given:
        nursery, nursery_end = _pair(given)
        undo.callback(nursery.close)
        zygote, zygote_end = _pair(given)
        undo.callback(zygote.close)
        log, log_end = os.pipe2(os.O_CLOEXEC)
        undo.callback(os.close, log)
        given.callback(os.close, log_end)
        os.set_blocking(log, False)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        given.callback(os.close, null)
        program = _program()
        given.callback(os.close, program)
        owner = calls.pidfd_open(os.getpid())
        given.callback(os.close, owner)
        go_read, go_write = os.pipe2(os.O_CLOEXEC)
        given.callback(os.close, go_read)
        report_read, report_write = os.pipe2(os.O_CLOEXEC)
        given.callback(os.close, report_read)
        with os.fdopen(go_write, "wb", buffering=0) as go, os.fdopen(report_write, "wb", buffering=0) as report:
            files: CellFiles | None = cellfiles.of(ids)
            broker_end = userns_fd = -1
            if files is None:
                files, theirs = Broker.pair()
                undo.callback(files.close)
                given.callback(theirs.close)
                broker_end = theirs.fileno()
                userns_fd = _user_namespace(program, ids)
                given.callback(os.close, userns_fd)
            try:
                clone_fd, tasks = given.enter_context(cgroup.zygotes_entry())
            except OSError as error:
                raise unavailable(Stage.CGROUP, error.errno or errno.EIO) from error
            name = "nursery" if ids.shared is None else "one-id"
            argv, keep_argv = calls.c_strings([name, python.executable, f"{rootfs.INSIDE_DIRECTORY}/zygote.py"])
            envp, keep_envp = calls.c_strings([f"{name}={value}" for name, value in environment.items()])
            buffer = ffi.from_buffer("unsigned char[]", encoded)
            plan = ffi.new(
                "struct sbx_zygote_plan *",
                {
                    "rootfs": buffer,
                    "rootfs_length": len(encoded),
                    "argv": argv,
                    "envp": envp,
                    "go_fd": go_read,
                    "go_write_fd": go_write,
                    "report_fd": report_write,
                    "null_fd": null,
                    "log_fd": log_end,
                    "engine_fd": nursery_end.fileno(),
                    "zygote_fd": zygote_end.fileno(),
                    "owner_fd": owner,
                    "nursery_fd": program,
                    "broker_fd": broker_end,
                    "userns_fd": userns_fd,
                    "single_id": ids.shared is not None,
                    "allow_user_namespaces": body.allow_user_namespaces,
                    "cgroup_fd": -1 if clone_fd is None else clone_fd,
                    "tasks": tasks,
                    "ntasks": len(tasks),
                },
            )
            number = ffi.new("int *", -1)
            pid = lib.sbx_zygote_clone(plan, number)
            if pid < 0:
                raise userns.explained(unavailable(Stage.CLONE, -pid))
            pidfd = int(number[0])
            undo.callback(os.close, pidfd)
            undo.callback(_end, pidfd)
            report.close()
            if userns_fd < 0:
                _map_ids(pid, ids)
            go.write(b"g")
            del keep_argv, keep_envp
        made = kind(pid, pidfd, body, nursery, zygote, log, os.dup(report_read), files)
        undo.pop_all()
        return made


def _refused(said: bytes, operations: Sequence[rootfs.Op]) -> Unavailable:
    """What the new process reported instead of executing the nursery."""
    stage, error, detail = _REPORT.unpack(said)
    refused = operations[detail] if stage == Stage.MOUNTS and detail < len(operations) else None
    if refused is not None and refused.kind == rootfs.Kind.PROC:
        return unavailable(Stage.PROC, error)
    where = refused.target if refused is not None else ""
    return userns.explained(unavailable(stage, error, where and f"/{where}"))


def _end(pidfd: int) -> None:
    calls.pidfd_kill(pidfd, signal.SIGKILL)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)


def _map_ids(pid: int, ids: IdBlock) -> None:
    try:
        rootless.map_ids(pid, ids)
    except Unavailable as error:
        raise userns.explained(error) from error
    except OSError as error:
        raise userns.explained(unavailable(Stage.MAPS, error.errno or errno.EIO)) from error


def _user_namespace(program: int, ids: IdBlock) -> int:
    """A descriptor of a new user namespace with *ids* mapped, and no process in it. Raises Unavailable, OSError.

    For an engine that is not root: its own /proc files and those of what it clones belong to root, since it is not
    dumpable. The holder executes the nursery's program, and so has nothing to hide.
    """
    with ExitStack() as held:
        wait_read, wait_write = os.pipe2(os.O_CLOEXEC)
        held.callback(os.close, wait_write)
        report_read, report_write = os.pipe2(os.O_CLOEXEC)
        held.callback(os.close, report_read)
        number = ffi.new("int *", -1)
        try:
            pid = lib.sbx_userns_hold(program, wait_read, report_write, number)
        finally:
            os.close(wait_read)
            os.close(report_write)
        if pid < 0:
            raise userns.explained(unavailable(Stage.CLONE, -pid))
        pidfd = int(number[0])
        held.callback(os.close, pidfd)
        held.callback(_end, pidfd)
        said = os.read(report_read, _REPORT.size)
        stage, error, _ = _REPORT.unpack(said) if len(said) == _REPORT.size else (Stage.EXEC, 0, 0)
        if stage:
            raise userns.explained(unavailable(stage, error))
        _map_ids(pid, ids)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)


def _not_preloaded(answer: dict[str, Any], python: Interpreter, policy: str) -> Unavailable:
    if answer.get("threads"):
        return _left_threads(answer["threads"], policy)
    if answer.get("shared"):
        return _left_shared(answer["shared"], policy)
    step, missing = answer.get("step"), [str(name) for name in answer.get("missing") or ()]
    if missing:
        packages = " ".join(dict.fromkeys(name.partition(".")[0] for name in missing))
        fix = f"install it for that interpreter: {python.executable} -m pip install {packages}"
        what = f"not installed, which the policy's [runtime] section imports: {', '.join(missing)}"
        return Unavailable("preload", what, fix=fix)
    where = "warmup" if step == "warmup" else f"preload of {step!r}"
    return Unavailable("preload", f"{where} failed: {answer.get('error')}", fix="mend the policy's [runtime] section")


def _left_threads(found: Sequence[dict[str, str]], policy: str) -> Unavailable:
    threads = "; ".join(f"{one['name']!r}, there since {_step(one)}" for one in found)
    what = f"policy {policy!r}: a zygote forks with one thread only, and others still run: {threads}"
    fix = (
        f"have {_step(found[0])} start no thread, by a setting of the library, or end the thread in warmup; or take "
        "that out of [runtime] and leave it to the programs"
    )
    return Unavailable("threads", what, fix=fix)


def _left_shared(found: Sequence[dict[str, str]], policy: str) -> Unavailable:
    areas = "; ".join(f"{one['name']}, there since {_step(one)}: {one['why']}" for one in found)
    what = f"policy {policy!r}: its cells would share memory that they can write to, and a copy will not do: {areas}"
    fix = (
        f"have {_step(found[0])} map it MAP_PRIVATE, or unmap it in warmup; or take that out of [runtime] and leave it "
        "to the programs"
    )
    return Unavailable("shared-memory", what, fix=fix)


def _step(one: dict[str, str]) -> str:
    names = {"warmup": "the warmup", "": "the start"}
    return names.get(one["step"], f"the import of {one['step']!r}")
