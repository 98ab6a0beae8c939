"""From nothing to an executed nursery: the namespaces, the root, and the processes of one zygote."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sandboxd._native import ffi, lib
from sandboxd.engine.cells import files as cellfiles
from sandboxd.engine.cells.files import Broker
from sandboxd.errors import Unavailable
from sandboxd.ids import rootless
from sandboxd.kernel import calls, userns
from sandboxd.kernel.fd import Fd
from sandboxd.kernel.stages import Stage, unavailable
from sandboxd.rootfs import plan as rootfs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sandboxd.cgroup.interface import AnyInstance
    from sandboxd.engine.cells.files import CellFiles
    from sandboxd.ids.ranges import IdBlock
    from sandboxd.rootfs.interpreter import Interpreter

__all__ = ["INSIDE", "Report", "Spawned", "ZygoteSpec", "spawn"]

INSIDE: Final = Path(__file__).resolve().parents[2] / "inside"

_REPORT: Final = struct.Struct("=IiI")
_UNMET: Final = {
    lib.SBX_KEPT_KEYRING: "a session keyring of its own (a filter around the engine refuses keyctl)",
    lib.SBX_KEPT_USER_NAMESPACES: "the limit on user namespaces (/proc/sys/user cannot be written here)",
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


@dataclass(frozen=True, slots=True)
class ZygoteSpec:
    """What a zygote is made of before any policy has its say. *allow_user_namespaces* exists for tests of other
    walls.
    """

    python: Interpreter
    operations: Sequence[rootfs.Op]
    allow_user_namespaces: bool = False


@dataclass(slots=True)
class Spawned:
    """What the engine holds of a zygote's processes; every descriptor is the holder's."""

    pid: int
    """Of the nursery."""
    pidfd: int
    nursery: socket.socket
    zygote: socket.socket
    log: int
    report: Fd
    """Says how far the start has come; at its end when the nursery runs."""
    files: CellFiles

    def kill(self) -> None:
        """SIGKILL to the nursery, and so to everything of it."""
        calls.pidfd_kill(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Everything of it is dead and reaped."""
        self.nursery.close()
        self.zygote.close()
        if isinstance(self.files, Broker):
            self.files.close()
        os.close(self.pidfd)
        os.close(self.log)
        self.report.close()


class Report:
    """What the new process says of its start, read from *said*."""

    def __init__(self, said: bytes, operations: Sequence[rootfs.Op]) -> None:
        """Raises Unavailable for a step that was refused."""
        self.unmet: list[str] = []
        """What it goes without."""
        if said:
            stage, _, lacks = _REPORT.unpack_from(said)
            if stage:
                raise _refused(said, operations)
            self.unmet = [words for bit, words in _UNMET.items() if lacks & bit]
            if len(said) > _REPORT.size:
                raise _refused(said[_REPORT.size :], operations)


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


def spawn(spec: ZygoteSpec, ids: IdBlock, cgroup: AnyInstance) -> Spawned:
    """Have the namespaces and the root made, and nursery and interpreter executed there, among *cgroup*'s zygotes.

    The mounts take some 20 ms, most of it the kernel's waiting for itself, and nobody waits for them here: what goes
    wrong with them is in the report. Raises Unavailable, OSError; nothing is left then.
    """
    python, operations = spec.python, spec.operations
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
                    "allow_user_namespaces": spec.allow_user_namespaces,
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
        made = Spawned(pid, pidfd, nursery, zygote, log, Fd(os.dup(report_read)), files)
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
