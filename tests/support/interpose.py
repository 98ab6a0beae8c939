"""Stand between an embedded engine and the kernel, for chosen system calls, without changing a line of the engine.

Theory of operation

    test (this process): holds the listener of a seccomp filter and decides for each call that comes
      `-- worker: ``python interpose.py FD``; installs that filter on itself, hands the listener over, then starts
            |     a Sandbox when it is told to and runs programs in it; one JSON packet for each command and answer
            `-- engine, nursery, zygote, inits, cells: inherit the filter

A call is let through (SECCOMP_USER_NOTIF_FLAG_CONTINUE), refused with an errno, said to have succeeded without being
made ("lie"), or its caller is killed before it is made. Source: seccomp_unotify(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

_NOTIFICATION: Final = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif
_RESPONSE: Final = struct.Struct("=QqiI")  # struct seccomp_notif_resp
_RECEIVE: Final = 0xC0502100  # SECCOMP_IOCTL_NOTIF_RECV
_SEND: Final = 0xC0182101  # SECCOMP_IOCTL_NOTIF_SEND
_CONTINUE: Final = 1
_LISTENER: Final = 1 << 3  # SECCOMP_FILTER_FLAG_NEW_LISTENER
_SECCOMP: Final = 317
_X86_64: Final = 0xC000003E
ZYGOTE_PID: Final = 30011  # native/inside/nursery.c

Role = Literal["worker", "engine", "nursery", "zygote", "init", "cell"]
Kind = Literal["refuse", "lie", "kill"]

PRCTL: Final = {
    4: "dumpable",
    15: "name",
    23: "capbset",
    24: "bounding",
    38: "nnp",
    39: "nnp?",
    40: "tid",
    47: "ambient",
}


@dataclass(frozen=True)
class Seen:
    """One call: by whom, which one, and the how manieth of its kind by that role since ``watch``, from 1."""

    role: Role
    name: str
    nth: int
    arguments: tuple[int, ...] = field(default=(), compare=False)


@dataclass
class Fault:
    """What to do with the *nth* call of *name* by *role*. *hits* counts: a fault strikes once, or *times* in a row."""

    role: Role
    name: str
    nth: int = 1
    kind: Kind = "refuse"
    number: int = errno.ENOMEM
    times: int = 1
    hits: int = 0
    pids: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        what = errno.errorcode[self.number] if self.kind == "refuse" else self.kind
        return f"{self.role}-{self.name}-{self.nth}-{what}"


class WorkerFailed(AssertionError):
    """The worker did not answer in time, or ended."""


class Interposed:
    """A worker under a filter, its engine once ``start`` was called, and the say over their system calls."""

    def __init__(self, calls: dict[str, int]) -> None:
        self._names = {number: name for name, number in calls.items()}
        self._lock = threading.Lock()
        self._seen: list[Seen] | None = None
        self._counts: dict[tuple[Role, str], int] = {}
        self._fault: Fault | None = None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            numbers = ",".join(str(number) for number in sorted(calls.values()))
            self.worker = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), str(theirs.fileno()), numbers],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._sock = ours
        self._depth = len(_ns_pids(os.getpid()))
        data, control, _, _ = ours.recvmsg(64, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        if data != b"ready":
            raise WorkerFailed("the worker could not install its filter")
        self._listener: int = struct.unpack("i", control[0][2])[0]
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, name="interposer")
        self._thread.start()

    # Commands

    def ask(self, seconds: float = 20.0, **command: Any) -> dict[str, Any]:
        """One command to the worker. Raises WorkerFailed when no answer comes in *seconds*."""
        with contextlib.suppress(BrokenPipeError):
            self._sock.send(json.dumps(command).encode())
        if not select.select([self._sock], [], [], seconds)[0]:
            raise WorkerFailed(f"no answer to {command} in {seconds:g} s")
        data = self._sock.recv(1 << 20)
        if not data:
            raise WorkerFailed(f"the worker ended while it was asked to {command}")
        answer: dict[str, Any] = json.loads(data)
        return answer

    def start(self, **options: Any) -> dict[str, Any]:
        """Make the worker's Sandbox."""
        return self.ask(op="start", options=options)

    def run(self, code: str = "print(6 * 7)", **options: Any) -> dict[str, Any]:
        """Run a program in it."""
        return self.ask(op="run", code=code, options=options)

    # Decisions

    def watch(self) -> None:
        """Count and remember from now on."""
        with self._lock:
            self._seen, self._counts = [], {}

    def seen(self) -> list[Seen]:
        """What came since ``watch``."""
        with self._lock:
            return list(self._seen or ())

    def arm(self, fault: Fault | None) -> None:
        """Have *fault* strike; counting begins anew. None: nothing any more."""
        with self._lock:
            self._counts = {}
            self._fault = fault

    def _decide(self, pid: int, number: int, arguments: tuple[int, ...]) -> tuple[Kind | None, int]:
        role = self._role(pid)
        if role is None:
            return None, 0
        name = self._names[number]
        if name == "prctl":
            name = f"prctl:{PRCTL.get(arguments[0], arguments[0])}"
        with self._lock:
            nth = self._counts[role, name] = self._counts.get((role, name), 0) + 1
            if self._seen is not None:
                self._seen.append(Seen(role, name, nth, arguments))
            fault = self._fault
            if fault is None or (fault.role, fault.name) != (role, name):
                return None, 0
            if not fault.nth <= nth < fault.nth + fault.times:
                return None, 0
            fault.hits += 1
            fault.pids.append(pid)
            return fault.kind, fault.number

    def _role(self, pid: int) -> Role | None:
        """What *pid* is; None when it has died since it made its call."""
        inside = _ns_pids(pid)
        if not inside:
            return None
        match len(inside) - self._depth:
            case 0:
                return "worker" if _thread_group(pid) == self.worker.pid else "engine"
            case 1:
                return "zygote" if inside[-1] == ZYGOTE_PID else "nursery"
            case _:
                return "init" if inside[-1] == 1 else "cell"

    def _serve(self) -> None:
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        poller.register(self._stop_read, select.POLLIN)
        while True:
            events = dict(poller.poll())
            if self._stop_read in events or events.get(self._listener, 0) & (select.POLLHUP | select.POLLERR):
                return
            buffer = bytearray(_NOTIFICATION.size)
            try:
                fcntl.ioctl(self._listener, _RECEIVE, buffer)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR):
                    continue  # the caller died meanwhile
                raise
            identity, pid, _, number, _, _, *arguments = _NOTIFICATION.unpack(buffer)
            kind, error_number = self._decide(pid, number, tuple(arguments))
            if kind == "kill":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(_thread_group(pid) or pid, signal.SIGKILL)
                continue
            flags = _CONTINUE if kind is None else 0
            refused = -error_number if kind == "refuse" else 0
            with contextlib.suppress(OSError):
                fcntl.ioctl(self._listener, _SEND, _RESPONSE.pack(identity, 0, refused, flags))

    # End

    def close(self) -> None:
        """End the worker, its engine and the filter. Idempotent."""
        if self._stop_write < 0:
            return
        self.arm(None)
        with contextlib.suppress(WorkerFailed, OSError):
            self.ask(op="close")
        self._sock.close()
        try:
            self.worker.wait(10)
        except subprocess.TimeoutExpired:
            self.worker.kill()
            self.worker.wait(10)
        # The engine ends with the worker; until then its calls want answers.
        deadline = time.monotonic() + 10
        while self._thread.is_alive() and time.monotonic() < deadline and not self._unused():
            self._thread.join(0.01)
        os.write(self._stop_write, b"x")
        self._thread.join()
        for fd in (self._stop_read, self._stop_write, self._listener):
            os.close(fd)
        self._stop_write = -1

    def _unused(self) -> bool:
        poller = select.poll()
        poller.register(self._listener, 0)
        return bool(poller.poll(0))  # POLLHUP: no process has the filter any more, Linux 5.9

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _ns_pids(pid: int) -> list[int]:
    """The pid of *pid* in each pid namespace from ours inwards. Source: NSpid in /proc/PID/status."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text("utf-8", "replace").splitlines():
            if line.startswith("NSpid:"):
                return [int(word) for word in line.split()[1:]]
    return []


def _thread_group(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text("utf-8", "replace").splitlines():
            if line.startswith("Tgid:"):
                return int(line.split()[1])
    return None


# The worker


def _install(numbers: Sequence[int]) -> int:
    """Load a filter that asks its listener about *numbers* and lets all else pass; returns the listener."""
    program = [(0x20, 0, 0, 4), (0x15, 0, len(numbers) + 1, _X86_64), (0x20, 0, 0, 0)]
    program += [(0x15, len(numbers) - index, 0, number) for index, number in enumerate(numbers)]
    program += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x7FC00000)]  # allow; SECCOMP_RET_USER_NOTIF
    code = b"".join(struct.pack("=HBBI", *one) for one in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    head = struct.pack("=HxxxxxxQ", len(program), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    listener = libc.syscall(_SECCOMP, 1, _LISTENER, ctypes.c_char_p(head))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return int(listener)


def _work(sock: socket.socket) -> None:
    from sandboxd import Limits, Sandbox
    from sandboxd.errors import SandboxError

    sandbox: Sandbox | None = None
    while data := sock.recv(1 << 20):
        command = json.loads(data)
        answer: dict[str, Any] = {}
        try:
            if command["op"] == "start":
                if sandbox is not None:
                    sandbox.close()
                    sandbox = None
                sandbox = Sandbox(**command["options"])
                assert sandbox._handle.engine is not None
                answer = {"engine": sandbox._handle.engine.pid}
            elif command["op"] == "run":
                assert sandbox is not None
                options = command["options"]
                if "limits" in options:
                    options["limits"] = Limits(**options["limits"])
                with sandbox.run(command["code"], **options) as result:
                    answer = {**result.to_dict(), "contents": [one.read().decode() for one in result.files]}
            elif command["op"] == "close" and sandbox is not None:
                sandbox.close()
                sandbox = None
        except SandboxError as error:
            answer = error.plain()
        except Exception as error:
            answer = {"kind": "untyped", "message": repr(error)}
        sock.send(json.dumps(answer).encode())
    if sandbox is not None:
        sandbox.close()


def _main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        listener = _install([int(word) for word in sys.argv[2].split(",")])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", listener))]
        # Nothing that is interposed may be called before the test holds the listener: sendmsg never is.
        sock.sendmsg([b"ready"], rights)
        os.close(listener)
        _work(sock)


if __name__ == "__main__":
    _main()
