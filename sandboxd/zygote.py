"""The engine's handle on one zygote: start it, have inits made and cells forked, notice its death.

Theory of operation

    engine (this process; root, or the owner of a delegated subtree)
      | clone3: new user, pid, mount, net, ipc, uts namespaces; id maps written by the engine
      `-- nursery: pid 1 there, a static executable without libc, mapped root; makes inits, reaps, dies with the engine
            |-- zygote: the image's interpreter, mapped root; imports, warms up, forks cells; never sees tenants' bytes
            |     `-- cell: forked into an init's pid namespace, joins its other namespaces, drops everything
            |               (native/cell.c)
            `-- init: pid 1 of one cell's namespaces, no capabilities, no descriptors, asleep

    channel to the nursery: struct sbx_init_request / sbx_init_reply with nine descriptors
    channel to the zygote:  config and filter, its ready message, then struct sbx_cell_request / sbx_cell_reply
    log: a pipe that both have as stdout and stderr; its last bytes explain a death

Who reaps whom: the nursery its zygote and its inits, the zygote its cells (when the engine asks), the engine the
nursery. A cell's pid namespace is dead only when the zygote has reaped the cell: kill the init, wait for the cell's
pidfd, REAP, wait for the init's pidfd. Requests and replies are in order on both channels, so a queue of futures
matches them.
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
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sandboxd import native, rootfs
from sandboxd._native import ffi, lib
from sandboxd.errors import Unavailable
from sandboxd.stages import Stage, unavailable
from sandboxd.waiting import readable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sandboxd.cgroup import Instance
    from sandboxd.ids import IdBlock
    from sandboxd.interpreter import Interpreter

__all__ = ["CellProcess", "Init", "InitSizes", "Zygote", "ZygoteBody", "ZygoteConfig", "ZygoteLost"]

log = logging.getLogger("sandboxd.engine")

_T = TypeVar("_T")

INSIDE: Final = Path(__file__).resolve().parent / "inside"
READY_SECONDS: Final = 120.0  # imports of a large stack on a cold disk
SPAWN_SECONDS: Final = 60.0  # a bind of a tree on a network file system may take its time
LOG_BYTES: Final = 8192

_INIT_REQUEST: Final = struct.Struct("=IIQQQQQQQ")
_INIT_REPLY: Final = struct.Struct("=IIiI")
_INIT_FDS: Final = 9
_CELL_REQUEST: Final = struct.Struct("=IIiIIIII" + "IIQQ" * 16)
_CELL_REPLY: Final = struct.Struct("=IIiiiIiI")
_HELLO: Final = struct.Struct("=4sIiI")
_FORK, _REAP = 1, 2
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
    # One thread when the zygote forks: each of these libraries would start its pool at import.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "GOTO_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "BLIS_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "POLARS_MAX_THREADS": "1",
    # No display, and caches where they do not show up among the program's files.
    "MPLBACKEND": "Agg",
    "MPLCONFIGDIR": "/tmp/.matplotlib",  # noqa: S108
    "XDG_CACHE_HOME": "/tmp/.cache",  # noqa: S108
}
"""The whole environment of zygote and cells; a run's ``env`` is added to it."""


class ZygoteLost(Exception):
    """The zygote or its nursery ended; every cell of it is gone. The message holds what they last said."""


@dataclass(frozen=True, slots=True)
class ZygoteBody:
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
    filter_program: bytes
    landlock_abi: int
    """The lowest ABI that will do; 0 goes without."""
    walls_down: frozenset[int] = frozenset()


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


@dataclass(slots=True)
class Init:
    """One init and what came with it; every descriptor is the holder's. -1 is closed or handed on."""

    pidfd: int
    workspace: int
    code: int
    stdin_read: int
    stdin_write: int
    stdout_read: int
    stdout_write: int
    stderr_read: int
    stderr_write: int

    def close(self, *names: str) -> None:
        """Close the named descriptors, or all."""
        for name in names or self.__slots__:
            fd = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                os.close(fd)


@dataclass(slots=True)
class CellProcess:
    """A cell's first process: *pid* as the zygote knows it (for ``reap``), *pidfd* the holder's."""

    pid: int
    pidfd: int


class Zygote:
    """One nursery with one zygote. Made by ``start``; ``close`` ends every process of it."""

    def __init__(
        self,
        pid: int,
        pidfd: int,
        body: ZygoteBody,
        nursery: socket.socket,
        zygote: socket.socket,
        log: int,
        report: int,
    ) -> None:
        self.pid = pid
        self.python = body.python
        self._operations = body.operations
        self._report = report
        self.landlock_abi = 0
        self.kept: list[str] = []
        self.version: tuple[int, ...] = ()
        self.lost = False
        self._pidfd = pidfd
        self._nursery = nursery
        self._zygote = zygote
        self._log = log
        self._said = b""
        self._loop = asyncio.get_running_loop()
        self._inits: deque[asyncio.Future[Init]] = deque()
        self._cells: deque[asyncio.Future[tuple[tuple[int, ...], int]]] = deque()
        self._ready: asyncio.Future[dict[str, Any]] | None = None
        self._next_id = 0
        self._on_lost: list[Callable[[], None]] = []
        self._closed = False
        for fd, reader in (
            (self._pidfd, self._died),
            (self._nursery.fileno(), self._nursery_speaks),
            (self._zygote.fileno(), self._zygote_speaks),
            (self._log, self._log_speaks),
        ):
            self._loop.add_reader(fd, reader)

    # Start

    @classmethod
    def spawn(cls, body: ZygoteBody, ids: IdBlock, cgroup: Instance) -> Zygote:
        """Have the namespaces and the root made, and nursery and interpreter executed there; ``prepare`` comes next.

        It is born among *cgroup*'s zygotes. The mounts take some 20 ms, most of it the kernel's waiting for
        itself, and nobody waits for them here. Raises Unavailable; what goes wrong later is told by ``prepare``.
        """
        return _spawn(cls, body, ids, cgroup)

    async def prepare(self, config: ZygoteConfig) -> None:
        """Have it import and warm up what a policy names. Raises Unavailable; the zygote is of no use then."""
        walls_down = sum(1 << stage for stage in config.walls_down)
        message = {"preload": list(config.preload), "warmup": config.warmup, "walls_down": walls_down}
        await self._executed()
        self._ready = self._loop.create_future()
        try:
            self._zygote.send(json.dumps(message).encode())
            self._zygote.send(config.filter_program)
            answer = await asyncio.wait_for(self._ready, READY_SECONDS)
        except TimeoutError:
            fix = "look at [runtime] preload and warmup: they did not end"
            raise Unavailable("zygote", None, fix, f"no zygote after {READY_SECONDS:.0f} s") from None
        except (ZygoteLost, OSError) as error:
            said = self.last_words()
            fix = f"start {self.python.executable} by hand; the rootfs shows it only its own prefix and /usr"
            raise Unavailable(
                "zygote", None, fix, f"the interpreter ended before it was ready: {said or error}"
            ) from None
        if not answer.get("ok"):
            raise _not_preloaded(answer, self.python)
        if answer["threads"] != 1:
            raise unavailable(Stage.THREADS, 0)
        if answer["kept"]:
            log.warning(
                "preloaded libraries keep descriptors open, which no cell inherits: %s", ", ".join(answer["kept"])
            )
        self.landlock_abi = int(answer["landlock_abi"])
        self.version = tuple(answer["version"])
        if self.landlock_abi < config.landlock_abi:
            raise Unavailable(
                "landlock",
                errno.EOPNOTSUPP,
                "boot with landlock in lsm=, on a kernel that has it, or lower [require] landlock_abi in the policy",
                f"the policy requires Landlock ABI {config.landlock_abi}, this kernel has {self.landlock_abi}",
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
            raise Unavailable("zygote", None, fix, f"the root was not built within {SPAWN_SECONDS:.0f} s") from None
        finally:
            os.close(report)
        if said:
            stage, _, kept = _REPORT.unpack_from(said)
            if stage:
                raise _refused(said, self._operations)
            self.kept = [words for bit, words in _KEPT.items() if kept & bit]
            if len(said) > _REPORT.size:
                raise _refused(said[_REPORT.size :], self._operations)

    # Requests

    async def make_init(self, slot: int, guest_id: int, sizes: InitSizes) -> Init:
        """The namespaces and file systems of one cell. Raises Unavailable, ZygoteLost."""
        self._must_live()
        future: asyncio.Future[Init] = self._loop.create_future()
        request = _INIT_REQUEST.pack(
            slot,
            guest_id,
            sizes.workspace_bytes,
            sizes.workspace_files,
            sizes.tmp_bytes,
            sizes.tmp_files,
            sizes.shm_bytes,
            sizes.shm_files,
            sizes.code_bytes,
        )
        self._inits.append(future)
        self._send(self._nursery, request, ())
        return await _taken(future, Init.close)

    async def fork(
        self,
        guest_id: int,
        init: Init,
        channel: int,
        clone_fd: int | None,
        entry_fds: Sequence[int],
        rlimits: Sequence[tuple[int, int, int]],
    ) -> CellProcess:
        """Fork one cell into *init*. It says on *channel* whether its walls are up. Raises Unavailable, ZygoteLost."""
        self._must_live()
        fds = [init.pidfd, init.stdin_read, init.stdout_write, init.stderr_write, channel]
        if clone_fd is not None:
            fds.append(clone_fd)
        fds += entry_fds
        flat = [number for resource, soft, hard in rlimits for number in (resource, 0, soft, hard)]
        flat += [0] * (64 - len(flat))
        self._next_id += 1
        request = _CELL_REQUEST.pack(
            _FORK, self._next_id, 0, guest_id, guest_id, clone_fd is not None, len(entry_fds), len(rlimits), *flat
        )
        reply, pidfd = await self._ask_zygote(request, fds)
        _, _, pid, _, _, stage, number, _ = reply
        if pid < 0:
            raise unavailable(stage, number)
        return CellProcess(pid, pidfd)

    async def reap(self, cell: CellProcess) -> tuple[int, int]:
        """How a cell that has ended did so: (si_code, si_status) of waitid(2). Only once its pidfd is readable."""
        self._must_live()
        self._next_id += 1
        reply, _ = await self._ask_zygote(
            _CELL_REQUEST.pack(_REAP, self._next_id, cell.pid, 0, 0, 0, 0, 0, *[0] * 64), ()
        )
        if reply[6]:
            raise OSError(reply[6], f"waitid: {os.strerror(reply[6])}")
        return reply[3], reply[4]

    async def _ask_zygote(self, request: bytes, fds: Sequence[int]) -> tuple[tuple[int, ...], int]:
        future: asyncio.Future[tuple[tuple[int, ...], int]] = self._loop.create_future()
        self._cells.append(future)
        self._send(self._zygote, request, fds)
        return await _taken(future, lambda answer: os.close(answer[1]) if answer[1] >= 0 else None)

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Have *callback* called when the zygote is lost, unless ``forget`` comes first."""
        self._on_lost.append(callback)

    def forget(self, callback: Callable[[], None]) -> None:
        """Take *callback* back; it may never have been given."""
        with contextlib.suppress(ValueError):
            self._on_lost.remove(callback)

    def last_words(self) -> str:
        """The end of what nursery and zygote wrote to their log."""
        self._log_speaks()
        return self._said.decode("utf-8", "replace").strip()

    async def close(self) -> None:
        """Kill every process of it and wait until they are gone. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._lose()
        native.pidfd_kill(self._pidfd, signal.SIGKILL)
        await readable(self._pidfd)
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        for end in (self._nursery, self._zygote):
            end.close()
        os.close(self._pidfd)
        os.close(self._log)
        if self._report >= 0:
            os.close(self._report)

    # Inside

    def _must_live(self) -> None:
        if self.lost:
            raise ZygoteLost(self.last_words() if not self._closed else "closed")

    def _send(self, channel: socket.socket, request: bytes, fds: Sequence[int]) -> None:
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
        try:
            # A blocking send: the reader is one of ours and answers within a fork's time.
            channel.sendmsg([request], control, socket.MSG_NOSIGNAL)
        except OSError:
            self._lose()

    def _nursery_speaks(self) -> None:
        data, fds = _receive(self._nursery, _INIT_REPLY.size, _INIT_FDS)
        if not self._inits or len(data) != _INIT_REPLY.size:
            _close_all(fds)
            self._lose()
            return
        _, stage, number, _ = _INIT_REPLY.unpack(data)
        future = self._inits.popleft()
        if stage or len(fds) != _INIT_FDS:
            _close_all(fds)
            if not future.done():
                future.set_exception(unavailable(stage, number))
        elif future.done():
            _close_all(fds)
        else:
            future.set_result(Init(*fds))

    def _zygote_speaks(self) -> None:
        data, fds = _receive(self._zygote, 1 << 16, 1)
        if self._ready is not None and not self._ready.done():
            _close_all(fds)
            try:
                self._ready.set_result(json.loads(data))
            except ValueError:
                self._lose()
            return
        if not self._cells or len(data) != _CELL_REPLY.size:
            _close_all(fds)
            self._lose()
            return
        future = self._cells.popleft()
        if future.done():
            _close_all(fds)
        else:
            future.set_result((_CELL_REPLY.unpack(data), fds[0] if fds else -1))

    def _log_speaks(self) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._log, 65536)
            self._said = (self._said + data)[-LOG_BYTES:]
            if not data:
                self._loop.remove_reader(self._log)

    def _died(self) -> None:
        self._lose()

    def _lose(self) -> None:
        """From now on nothing is asked; whoever waits is told, and nothing is left running."""
        if self.lost:
            return
        self.lost = True
        for fd in (self._pidfd, self._nursery.fileno(), self._zygote.fileno(), self._log):
            self._loop.remove_reader(fd)
        native.pidfd_kill(self._pidfd, signal.SIGKILL)
        error = ZygoteLost(self.last_words() or "the zygote ended")
        waiting: list[asyncio.Future[Any]] = [*self._inits, *self._cells, *([self._ready] if self._ready else [])]
        self._inits.clear()
        self._cells.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(error)
                future.exception()  # whoever waited may be gone
        for callback in list(self._on_lost):
            callback()


async def _taken(future: asyncio.Future[_T], drop: Callable[[_T], object]) -> _T:
    """The answer; when the waiting task is cancelled, an answer that comes all the same is dropped."""
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        future.add_done_callback(lambda late: None if late.cancelled() or late.exception() else drop(late.result()))
        raise


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


def _spawn(kind: type[Zygote], body: ZygoteBody, ids: IdBlock, cgroup: Instance) -> Zygote:
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
        owner = native.pidfd_open(os.getpid())
        given.callback(os.close, owner)
        go_read, go_write = os.pipe2(os.O_CLOEXEC)
        given.callback(os.close, go_read)
        report_read, report_write = os.pipe2(os.O_CLOEXEC)
        given.callback(os.close, report_read)
        with os.fdopen(go_write, "wb", buffering=0) as go, os.fdopen(report_write, "wb", buffering=0) as report:
            try:
                clone_fd, tasks = given.enter_context(cgroup.zygotes_entry())
            except OSError as error:
                raise unavailable(Stage.CGROUP, error.errno or errno.EIO) from error
            argv, keep_argv = native.c_strings(["nursery", python.executable, f"{rootfs.INSIDE_DIRECTORY}/zygote.py"])
            envp, keep_envp = native.c_strings([f"{name}={value}" for name, value in environment.items()])
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
                    "allow_user_namespaces": body.allow_user_namespaces,
                    "cgroup_fd": -1 if clone_fd is None else clone_fd,
                    "tasks": tasks,
                    "ntasks": len(tasks),
                },
            )
            number = ffi.new("int *", -1)
            pid = lib.sbx_zygote_clone(plan, number)
            if pid < 0:
                raise unavailable(Stage.CLONE, -pid)
            pidfd = int(number[0])
            undo.callback(os.close, pidfd)
            undo.callback(_end, pidfd)
            report.close()
            _map_ids(pid, ids)
            go.write(b"g")
            del keep_argv, keep_envp
        made = kind(pid, pidfd, body, nursery, zygote, log, os.dup(report_read))
        undo.pop_all()
        return made


def _refused(said: bytes, operations: Sequence[rootfs.Op]) -> Unavailable:
    """What the new process reported instead of executing the nursery."""
    stage, error, detail = _REPORT.unpack(said)
    refused = operations[detail] if stage == Stage.MOUNTS and detail < len(operations) else None
    if refused is not None and refused.kind == rootfs.Kind.PROC:
        return unavailable(Stage.PROC, error)
    where = refused.target if refused is not None else ""
    return unavailable(stage, error, where and f"/{where}")


def _end(pidfd: int) -> None:
    native.pidfd_kill(pidfd, signal.SIGKILL)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)


def _map_ids(pid: int, ids: IdBlock) -> None:
    try:
        for name in ("gid_map", "uid_map"):
            with open(f"/proc/{pid}/{name}", "w", encoding="ascii") as file:
                file.write(ids.id_map)
    except OSError as error:
        raise unavailable(Stage.MAPS, error.errno or errno.EIO) from error


def _not_preloaded(answer: dict[str, Any], python: Interpreter) -> Unavailable:
    step, missing = answer.get("step"), [str(name) for name in answer.get("missing") or ()]
    if missing:
        packages = " ".join(dict.fromkeys(name.partition(".")[0] for name in missing))
        fix = f"install it for that interpreter: {python.executable} -m pip install {packages}"
        what = f"not installed, which the policy's [runtime] section imports: {', '.join(missing)}"
        return Unavailable("preload", None, fix, what)
    where = "warmup" if step == "warmup" else f"preload of {step!r}"
    return Unavailable("preload", None, "mend the policy's [runtime] section", f"{where} failed: {answer.get('error')}")
