"""Daemons for tests: real processes on sockets that other users can reach, and callers that are other users."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast

# A child that is another user cannot read them any more where the interpreter lives below somebody's home.
import sandboxd.client.exchange
import sandboxd.client.result  # noqa: F401
from sandboxd import Sandbox
from sandboxd.client.admin import ps
from sandboxd.protocol import packets
from tests.support import leftovers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

GROUP = "daemon"  # of every Debian, Fedora and Alpine
START_SECONDS = 30.0
SLEEP = "import time\nprint('up', flush=True)\ntime.sleep(25)"
T = TypeVar("T")


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    """A directory that others may pass through, which pytest's are not."""
    with tempfile.TemporaryDirectory(prefix="sandboxd-test-") as name:
        os.chmod(name, 0o711)  # noqa: S103 (what is the point here)
        yield Path(name)


@dataclass
class Served:
    """A running ``sandboxd serve``."""

    process: subprocess.Popen[bytes]
    path: Path
    log: Path

    @property
    def address(self) -> str:
        return f"unix:{self.path}"

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def audit(self) -> Path:
        """The file of its audit record."""
        return self.log.with_suffix(".jsonl")

    def said(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def runs(self) -> list[dict[str, Any]]:
        return ps(self.address)

    def sandbox(self, **options: Any) -> Sandbox:
        return Sandbox.connect(self.address, **options)

    def serves(self) -> bool:
        """One ordinary run."""
        with self.sandbox() as sandbox:
            return sandbox.run("print(6 * 7)").stdout == "42\n"

    def idle(self, seconds: float = 10) -> None:
        """Until no run is there."""
        leftovers.eventually(lambda: self.runs() == [], seconds, "runs are still there")

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(15)


Setting = int | float | str | Mapping[str, int | str]


def start(
    home: Path,
    name: str = "sandboxd",
    group: str = GROUP,
    *,
    manager: Mapping[str, str] | None = None,
    listener: socket.socket | None = None,
    **config: Setting,
) -> Served:
    """A daemon on HOME/NAME/socket, not yet ready; its audit record is beside it, unless *config* says otherwise.

    *manager* are variables of a service manager, *listener* is handed over as one does it.
    """
    path, log = home / name / "socket", home / f"{name}.log"
    file = configure(home, name, group, **config)
    command = [sys.executable, "-m", "sandboxd", "serve", "--config", str(file)]
    if listener is not None:
        command = [sys.executable, "-c", _HAND_OVER, str(listener.fileno()), *command]
    with log.open("ab") as stderr:
        process = subprocess.Popen(
            command,
            stderr=stderr,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(manager or {})},
            pass_fds=() if listener is None else (listener.fileno(),),
        )
    return Served(process, path, log)


# LISTEN_PID is the pid of who reads it, so it is set by the process that becomes the daemon.
_HAND_OVER = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="test")
os.execv(sys.argv[2], sys.argv[2:])"""


def configure(home: Path, name: str = "sandboxd", group: str = GROUP, **config: Setting) -> Path:
    """Write its configuration file."""
    path, log, file = home / name / "socket", home / f"{name}.log", home / f"{name}.toml"
    settings: dict[str, Setting] = {"socket": str(path), "group": group, **config}
    settings.setdefault("drain_seconds", 0)
    if isinstance(audit := settings.get("audit", {}), Mapping):
        settings["audit"] = {"path": str(log.with_suffix(".jsonl")), **audit}
    if isinstance(pool := settings.get("pool", {}), Mapping):
        # A cell or a zygote that is replaced for its age looks like one that another test left behind.
        settings["pool"] = {"age_seconds": 1_000_000, "zygote_seconds": 1_000_000, **pool}
    file.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in settings.items()))
    return file


def _toml(value: Setting) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + "}"
    return str(value).lower() if isinstance(value, int | float) else f'"{value}"'


@contextlib.contextmanager
def served(
    home: Path,
    name: str = "sandboxd",
    group: str = GROUP,
    *,
    manager: Mapping[str, str] | None = None,
    listener: socket.socket | None = None,
    **config: Setting,
) -> Iterator[Served]:
    """A daemon that is ready; ended by SIGTERM."""
    daemon = start(home, name, group, manager=manager, listener=listener, **config)
    try:
        before = daemon.said().count("ready on")
        leftovers.eventually(
            lambda: daemon.said().count("ready on") > before or daemon.process.poll() is not None,
            START_SECONDS,
            "no daemon is ready",
        )
        assert daemon.process.poll() is None, daemon.said()
        if config.get("pool") != leftovers.UNPARKED:
            leftovers.PARKING.add(daemon.pid)
        yield daemon
    finally:
        leftovers.PARKING.discard(daemon.pid)
        daemon.end()


class Raw:
    """A client that sends what it likes."""

    def __init__(self, daemon: Served | socket.socket, greet: bool = True) -> None:
        if isinstance(daemon, Served):
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.sock.connect(str(daemon.path))
        else:
            self.sock = daemon
        self.sock.settimeout(20)
        if greet:
            packets.send(self.sock, packets.hello())
            assert self.answer()["op"] == "hello"

    def send(self, message: dict[str, Any], payload: bytes = b"") -> None:
        packets.send(self.sock, message, [payload])

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """One packet as it is; a side that has closed is no error here."""
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, b"".join(fd.to_bytes(4, "little") for fd in fds))]
        with contextlib.suppress(BrokenPipeError):
            self.sock.sendmsg([data], control if fds else [])

    def answer(self) -> dict[str, Any]:
        """The next message; {} at the end of the connection."""
        for _ in range(2):
            with contextlib.suppress(ConnectionResetError):
                packet = packets.receive(self.sock)
                if packet is None:
                    return {}
                packet.close()
                return packet.message
        return {}

    def refusal(self) -> tuple[str, str]:
        """The kind and the message of the error that comes next; ("", "") at the end of the connection."""
        message = self.answer()
        if not message:
            return "", ""
        assert message["op"] == "refused", message
        error = message["error"]
        return error["kind"], error.get("message") or f"{error.get('field')}: {error.get('problem')}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.sock.close()


def header(**changes: Any) -> dict[str, Any]:
    """A run's header, of ``pass`` without anything, and *changes*."""
    plain: dict[str, Any] = {"code_bytes": 4, "stdin_bytes": None, "files": [], "args": [], "env": {}, "limits": {}}
    return {**plain, "language": "python", "filename": "main.py", "stream": False, "results": False, **changes}


def request(policy: Any = None, **changes: Any) -> dict[str, Any]:
    """The message of such a run."""
    return {"op": "run", "policy": policy, "run": header(**changes)}


class Child(Generic[T]):
    """A forked process that is another user and calls *function*."""

    def __init__(self, function: Callable[[], T], uid: int, gid: int, groups: Sequence[int] = ()) -> None:
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            _be(function, uid, gid, groups, write)
        os.close(write)
        self._read = read

    def result(self) -> T:
        """What *function* returned; raises what it raised."""
        with open(self._read, "rb") as stream:
            data = stream.read()
        os.waitpid(self.pid, 0)
        assert data, "the child ended without a word"
        good, value = pickle.loads(data)  # noqa: S301 (our own child)
        if not good:
            raise value
        return cast("T", value)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._read)


def _be(function: Callable[[], Any], uid: int, gid: int, groups: Sequence[int], write: int) -> None:
    status = 1
    try:
        os.setgroups(list(groups))
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        try:
            answer: tuple[bool, Any] = (True, function())
        except BaseException as error:
            answer = (False, error)
        with open(write, "wb") as stream:
            stream.write(pickle.dumps(answer))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def as_user(function: Callable[[], T], uid: int, gid: int, groups: Sequence[int] = ()) -> T:
    """Call *function* as another user, in a child."""
    return Child(function, uid, gid, groups).result()
