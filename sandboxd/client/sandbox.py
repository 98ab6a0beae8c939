"""Sandbox: the caller's handle on an engine, embedded or behind a socket.

One connection serves one run at a time; idle ones are kept. So a run's packets are read in the thread that called
``run()``, its callbacks are called there, and threads do not wait for each other.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import socket
import sys
import threading
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

from sandboxd._util.closeable import Closing
from sandboxd.client.launcher import EngineProcess
from sandboxd.errors import ConnectionLost, PolicyError, ProtocolError, SandboxError, Unavailable, from_plain, later
from sandboxd.limits import parse, shown
from sandboxd.protocol import packets
from sandboxd.protocol.run_header import check_args, check_code, check_env

if TYPE_CHECKING:  # pydantic takes most of the time of a start; the engine's process begins first
    from collections.abc import Sequence

    from sandboxd.client.exchange import Exchange, FileContent, TextCallback, ToolHost
    from sandboxd.client.leased import LeasedCell, LeaseSlot
    from sandboxd.client.result import Result
    from sandboxd.limits import LimitValue
    from sandboxd.policy import Limits, Policy

__all__ = ["Sandbox", "parse_address", "ps", "reload", "stats"]

CANCEL_SECONDS: Final = 2.0
IDLE_CONNECTIONS: Final = 16
INTERRUPT_MILLISECONDS: Final = 200
RUN_DEFAULTS: Final[Mapping[str, Any]] = {
    "language": "python",
    "limits": None,
    "args": (),
    "files": None,
    "stdin": None,
    "env": None,
    "filename": "main.py",
    "results": True,
    "on_stdout": None,
    "on_stderr": None,
}
DESCRIPTORS: Final = 64
"""Room for those of a lease."""


def parse_address(address: str) -> str:
    """The path of "unix:PATH". Raises ValueError for any other form."""
    scheme, _, path = address.partition(":")
    if scheme != "unix" or not path:
        raise ValueError(f'An address has the form "unix:/run/sandboxd/sandboxd.sock", not {address!r}.')
    return path


def open_daemon(path: str) -> socket.socket:
    """A connection to the daemon at *path*, not yet greeted. Raises Unavailable."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        fix = {
            13: f"ask to be added to the group that owns {path} (members may run installed policies)",
            2: f"start the daemon: sandboxd serve --socket {path}",
            111: f"start the daemon: sandboxd serve --socket {path}",
        }.get(error.errno or 0, "check the address")
        what = f"this user may not use {path}" if error.errno == 13 else f"no daemon answers at {path}"
        raise Unavailable("connect", what, errno=error.errno, fix=fix) from error
    return sock


def _is_model(value: object, name: str) -> bool:
    """Whether *value* is of the class *name* of sandboxd.policy, which takes long to import: who has one has it."""
    kind = getattr(sys.modules.get("sandboxd.policy.model"), name, None)
    return kind is not None and isinstance(value, kind)


def _check_policy(policy: object) -> None:
    if not isinstance(policy, str | Path) and not _is_model(policy, "Policy"):
        raise PolicyError(
            f"policy must be a name, the path of a TOML file or a sandboxd.Policy, not {shown(policy)}.", key="policy"
        )


def _check_limits(limits: object) -> None:
    if limits is not None and not _is_model(limits, "Limits"):
        raise PolicyError(f"limits must be sandboxd.Limits or None, not {type(limits).__name__}.", key="limits")


def _check_count(name: str, value: object) -> None:
    if value is not None and (type(value) is not int or value < 1):
        raise PolicyError(f"{name} must be a whole number from 1, not {shown(value)}.", key=name)


def _checked_memory(value: int | str | None) -> int | None:
    if not isinstance(value, str):
        _check_count("memory_bytes", value)
        return value
    try:
        return int(parse("memory_bytes", value) or 0)
    except PolicyError as error:
        raise PolicyError(error.message.removeprefix("limits."), key="memory_bytes") from None


class Cancel:
    """Ends one run of ``Sandbox._run_cancellable``; may be called from a signal handler, and at any time."""

    def __init__(self) -> None:
        self.asked = False
        self._sock: socket.socket | None = None

    def __call__(self) -> None:
        self.asked = True
        if self._sock is not None:
            with contextlib.suppress(OSError):  # the answer, or the connection's end, is there already
                packets.send(self._sock, packets.CANCEL)

    def watch(self, sock: socket.socket | None) -> None:
        """*sock* has a run under way from now on; None: it is over."""
        self._sock = sock
        if self.asked and sock is not None:
            self()  # between two looks it may be sent twice, of which the engine ignores one


class Sandbox(Closing):
    """A sandbox with one policy. Thread-safe; a context manager.

    ``Sandbox(policy)`` starts an engine of its own, which takes some 100 ms and needs root;
    ``Sandbox.connect(address)`` uses a daemon. *policy* is a name, the path of a TOML file or a Policy; *limits* are
    put over the policy's and, here, may be any: whoever makes an embedded Sandbox is its operator. *max_running* bounds
    the runs at once (default: 4 for each CPU), *memory_bytes* the engine with all its runs (a number or a size such as
    "4G"; default: 80 % of what there is), *ids* names the range of host ids ("base:count"). *pool* bounds the cells
    that are kept ready: ``minimum``, ``maximum`` (0 keeps none), ``memory_bytes``, ``age_seconds``, and how long a
    zygote serves: ``zygote_cells``, ``zygote_seconds``. *audit* is a file to which each run is recorded with its source
    and its end, one JSON line for each; it is made when it is not there.

    Raises PolicyError for a wrong policy, Unavailable when this host cannot enforce it.
    """

    _engine: EngineProcess | None
    _declared: tuple[Policy | None, Limits | None] = (None, None)
    """What this process knows of the limits, for descriptions: its own policy, or what it asked of a daemon."""

    def __init__(
        self,
        policy: str | Path | Policy = "default",
        *,
        limits: Limits | None = None,
        max_running: int | None = None,
        memory_bytes: int | str | None = None,
        ids: str | None = None,
        pool: Mapping[str, float] | None = None,
        audit: str | Path | None = None,
        _walls_down: Sequence[str] = (),
        _marker_errno: int | None = None,
    ) -> None:
        self._prepare(None, {})
        if audit is not None and (not isinstance(audit, str | Path) or not str(audit) or "\0" in str(audit)):
            raise PolicyError(f"audit must be the path of a file, not {shown(audit)}.", key="audit")
        _check_policy(policy)
        _check_limits(limits)
        memory_bytes = _checked_memory(memory_bytes)
        _check_count("max_running", max_running)
        if pool is not None and not isinstance(pool, Mapping):
            raise PolicyError(f"pool must map settings to numbers, not {shown(pool)}.", key="pool")
        if ids is not None and not isinstance(ids, str):
            raise PolicyError(f'ids must be a string like "1879048192:65536", not {shown(ids)}.', key="ids")
        # The engine comes up while this process imports pydantic and reads the policy.
        engine = EngineProcess()
        try:
            engine.configure(
                {
                    "max_running": max_running,
                    "memory_bytes": memory_bytes,
                    "ids": ids,
                    "pool": None if pool is None else dict(pool),
                    "audit": None if audit is None else {"path": os.path.abspath(audit)},
                    "walls_down": list(_walls_down),
                    "marker_errno": _marker_errno,
                },
                likely=policy == "default",
            )
            from sandboxd._util.ownership import check_embedded_file
            from sandboxd.policy import load

            chosen = load(policy, believe=check_embedded_file)
            if limits is not None:
                chosen = chosen.with_limits(limits)
            engine.ready(chosen.plain())
        except BaseException:
            engine.close()
            raise
        self._engine = engine
        self._declared = (chosen, None)
        self._closed = False

    @classmethod
    def connect(cls, address: str, *, policy: str | None = None, limits: Limits | None = None) -> Self:
        """A Sandbox on the daemon at *address*, "unix:PATH". *policy* names one that its operator installed.

        *limits* narrow the policy's for every run of this handle. Raises Unavailable when no daemon answers,
        PolicyError for a policy that is not a name.
        """
        if policy is not None and (not isinstance(policy, str) or "/" in policy or policy.endswith(".toml")):
            raise PolicyError("A daemon's clients name an installed policy; a policy file stays with its operator.")
        _check_limits(limits)
        self = cls.__new__(cls)
        self._prepare(policy, {} if limits is None else limits.plain())
        self._declared = (None, limits)
        self._path = parse_address(address)
        self._give_back(self._greeted(open_daemon(self._path)))
        self._closed = False
        return self

    def _prepare(self, policy: str | None, limits: Mapping[str, LimitValue]) -> None:
        self._closed = True
        self._forked = False
        self._engine = None
        self._path: str | None = None
        self._policy = policy
        self._limits = dict(limits)
        self._lock = threading.Lock()
        self._idle: list[socket.socket] = []
        self._busy: set[socket.socket] = set()
        self._offers: dict[socket.socket, LeaseSlot] = {}
        self._direct: Any = None
        _alive.add(self)

    # Runs

    def run(
        self,
        code: str | bytes,
        *,
        language: str = "python",
        limits: Limits | None = None,
        args: Sequence[str] = (),
        files: Mapping[str, FileContent] | None = None,
        stdin: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        filename: str = "main.py",
        results: bool = True,
        on_stdout: TextCallback | None = None,
        on_stderr: TextCallback | None = None,
    ) -> Result:
        """Run *code* in a fresh cell and return how it ended; a program that fails is a Result, not an exception.

        *limits* narrow those of the sandbox. *files* maps relative paths below /workspace to bytes, text or a Path of
        the caller's. *results* asks for the last expression's value. *filename* is the name that tracebacks show.
        The callbacks get text as it comes, in this thread; what one raises cancels the run and is raised here.

        Raises InvalidRequest or PolicyError for a wrong argument, Busy when the engine was full, Unavailable when a
        wall could not be raised, ConnectionLost when the engine went away, RuntimeError on a closed Sandbox.
        """
        plain = files is None and stdin is None and limits is None and on_stdout is None and on_stderr is None
        if plain and self._offers and filename == "main.py" and language == "python":
            result = self._run_directly(code, args, env, results)
            if result is not None:
                return result
        exchange = self._exchange(
            code,
            language=language,
            limits=limits,
            args=args,
            files=files,
            stdin=stdin,
            env=env,
            filename=filename,
            results=results,
            on_stdout=on_stdout,
            on_stderr=on_stderr,
        )
        return self._perform(exchange, None)

    def _run_cancellable(self, cancel: Cancel, code: str, **arguments: Any) -> Result:
        """As ``run``, for a caller that wants the Result, "cancelled", of a run that it ends by *cancel*.

        Raises KeyboardInterrupt when it ended before its program began.
        """
        exchange = self._exchange(code, language="python", limits=None, **arguments)
        if cancel.asked:
            raise KeyboardInterrupt
        try:
            return self._perform(exchange, cancel)
        except ConnectionLost as error:
            if cancel.asked and not error.may_have_started:
                raise KeyboardInterrupt from None
            raise

    def _run_with_tools(self, code: str | bytes, tools: ToolHost, **arguments: Any) -> Result:
        """As ``run``, for a program that may call *tools*; arguments as there."""
        given = {**RUN_DEFAULTS, **arguments}
        try:
            return self._perform(self._exchange(code, tools=tools, **given), None)
        finally:
            tools.end()

    def _perform(self, exchange: Exchange, cancel: Cancel | None) -> Result:
        """Run it on a connection of its own. Raises as ``run`` does."""
        while True:
            sock, fresh = self._connection()
            try:
                result = self._drive(sock, exchange, fresh, cancel)
            except SandboxError as error:
                self._settle(sock, keep=not isinstance(error, ConnectionLost | ProtocolError))
                self._check_open()
                if fresh or exchange.sent or not isinstance(error, ConnectionLost):
                    raise
                # An idle connection whose daemon was started anew meanwhile; the others are no better.
                self._forget_idle()
            except BaseException:
                # KeyboardInterrupt, or a callback's own: the run is killed before it propagates.
                _cancel(sock)
                self._settle(sock, keep=False)
                raise
            else:
                self._settle(sock, keep=True)
                return result

    def stats(self) -> dict[str, Any]:
        """The engine's counters since it began.

        ``runs`` (number by status), ``queued``, ``running``, ``parked`` (cells that wait for a program) and
        ``zygote_restarts``, each also by policy in ``policies``; ``uptime_seconds``; ``pid``; and ``held_seconds``, how
        long one iteration of the engine's loop kept all others waiting: ``worst``, ``p99``, the number of
        ``iterations`` and of those ``above`` 0.01, 0.05, 0.1 and 1 s; ``slow``, the last ones above 0.05 s, each as
        seconds ago and seconds held; ``worst_bytes`` and ``worst_steps``, the most that one has read.

        Of a daemon its operator sees everything, and anybody else the counters of their own runs. Raises
        ConnectionLost, Unavailable.
        """
        self._check_open()
        return _stats(self._connect())

    def _connect(self) -> socket.socket:
        try:
            return self._engine.connect() if self._engine is not None else open_daemon(self._path or "")
        except OSError as error:
            self._check_open()
            raise ConnectionLost(False) from error

    def session(self, **_arguments: Any) -> NoReturn:
        """One live interpreter whose state stays between runs: not in this version. Raises Unavailable."""
        raise later("sessions come")

    def _exchange(self, code: str | bytes, **arguments: Any) -> Exchange:
        """A checked request under this handle's policy and limits. Raises InvalidRequest, PolicyError, RuntimeError."""
        from sandboxd.client.exchange import Exchange

        self._check_open()
        return Exchange(code, policy=self._policy, base_limits=self._limits, **arguments)

    def _drive(self, sock: socket.socket, exchange: Exchange, fresh: bool, cancel: Cancel | None) -> Result:
        # When the other side has closed, what it said before is still there and may say why.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if fresh and self._engine is not None:
                self._direct = importlib.import_module("sandboxd.client.leased")
                self._offers[sock] = self._direct.LeaseSlot()
            if fresh:
                packets.send(sock, packets.hello(direct=self._engine is not None))
            buffers, fd = exchange.packet()
            try:
                packets.send_packed(sock, buffers, fd)
                exchange.sent = True
            finally:
                if fd >= 0:
                    os.close(fd)
        if cancel is not None:
            cancel.watch(sock)
        try:
            return self._answer(sock, exchange)
        finally:
            if cancel is not None:
                cancel.watch(None)

    def _run_directly(
        self, code: object, args: Sequence[str], env: Mapping[str, str] | None, results: bool
    ) -> Result | None:
        """Run it in a cell that the engine lent to this process; None when there is none, or it is not for one."""
        direct = self._direct
        if type(code) is not str or len(code) > direct.SOURCE_BYTES or type(results) is not bool:
            return None
        source = check_code(code).encode()
        # What is odd is told by the ordinary way.
        if len(source) > direct.SOURCE_BYTES or type(args) not in (list, tuple) or type(env) not in (dict, NoneType):
            return None
        words = check_args(args) if args else ()
        names = check_env(env or {}, words) if env or words else {}
        self._check_open()
        message = direct.message_of(code, words, names, results)
        if len(message) > direct.MESSAGE_BYTES:
            return None
        with self._lock:
            sock = self._lent()
            if sock is None:
                return None
            self._idle.remove(sock)
            self._busy.add(sock)
        sock.setblocking(True)
        keep = False
        lease: LeasedCell | None = None
        try:
            try:
                lease = self._lease(sock)
            except ProtocolError:  # no room for its descriptors, for one: another connection, the ordinary way
                return None
            result = None
            if lease is not None:
                try:
                    lease.start(source, message)
                    result = lease.finish(sock) or self._carried_on(sock, code, args, env, results)
                finally:
                    lease.close()
            keep = True
            return result
        except OSError:
            self._check_open()
            raise ConnectionLost(lease is not None and lease.handed_over) from None
        except SandboxError as error:
            keep = not isinstance(error, ConnectionLost | ProtocolError)
            self._check_open()
            raise
        except BaseException:
            _cancel(sock)
            raise
        finally:
            self._settle(sock, keep=keep)

    def _lent(self) -> socket.socket | None:
        """The idle connection that has a lease, or was sent something that may be one. Under the lock."""
        waiting = [sock for sock in reversed(self._idle) if sock in self._offers]
        for sock in waiting:
            if self._offers[sock].lease is not None:
                return sock
        if not waiting:
            return None
        poll = select.poll()
        for sock in waiting:
            poll.register(sock, select.POLLIN)
        spoken = {fd for fd, _ in poll.poll(0)}
        return next((sock for sock in waiting if sock.fileno() in spoken), None)

    def _lease(self, sock: socket.socket) -> LeasedCell | None:
        """What *sock* was lent; also what has come since its last run. Raises OSError, ProtocolError."""
        offers = self._offers[sock]
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = packets.receive(sock, socket.MSG_DONTWAIT, descriptors=DESCRIPTORS)
                if packet is None:
                    return None  # the engine is gone, or has hung up: the ordinary way tells
                if not self._noted(sock, packet):
                    packet.close()
                    raise ProtocolError("The engine spoke while nothing ran.")
        offers.used, offers.lease = offers.lease, None
        return offers.used

    def _carried_on(self, sock: socket.socket, code: str, args: Any, env: Any, results: bool) -> Result | None:
        """The engine's answer to a run that it has taken over; None when its cell was dead before it began."""
        nothing: dict[str, Any] = {"limits": None, "files": None, "stdin": None, "on_stdout": None, "on_stderr": None}
        exchange = self._exchange(
            code, language="python", args=args, env=env, filename="main.py", results=results, **nothing
        )
        exchange.sent = True
        try:
            return self._answer(sock, exchange)
        except Revoked:
            return None

    def _noted(self, sock: socket.socket, packet: packets.Packet) -> bool:
        """Whether *packet* was about a lease, which is for the next run."""
        operation = packet.message.get("op")
        if operation not in ("lease", "revoked"):
            return False
        offers = self._offers.get(sock)
        if offers is None:
            return False
        if operation == "lease":
            fds, packet.fds = packet.fds, []
            offers.take(packet.message, fds)
        else:
            offers.revoke(packet.message.get("lease"))
        return True

    def _answer(self, sock: socket.socket, exchange: Exchange) -> Result:
        while (packet := _receive(sock)) is not None:
            if self._noted(sock, packet):
                if packet.message["op"] == "revoked" and packet.message.get("taken") is True:
                    raise Revoked
                continue
            if exchange.feed(packet):
                assert exchange.result is not None  # noqa: S101 (feed's promise)
                return exchange.result
        raise exchange.lost()

    # Connections

    def _connection(self) -> tuple[socket.socket, bool]:
        with self._lock:
            sock = self._idle.pop() if self._idle else None
            if sock is not None:
                self._busy.add(sock)
                sock.setblocking(True)
                return sock, False
        sock = self._connect()
        with self._lock:
            self._busy.add(sock)
        return sock, True

    def _forget_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for sock in idle:
            self._discard(sock)

    @staticmethod
    def _greeted(sock: socket.socket) -> socket.socket:
        try:
            with contextlib.suppress(BrokenPipeError):  # one that turns clients away may have closed already
                packets.send(sock, packets.hello())
            answer = _receive(sock)
            if answer is None:
                raise ConnectionLost(False)
            answer.close()
            if answer.message.get("op") == "refused" and isinstance(answer.message.get("error"), dict):
                raise from_plain(answer.message["error"])
            if answer.message.get("op") != "hello":
                raise ProtocolError("The daemon did not answer hello.")
        except BaseException as error:
            sock.close()
            if isinstance(error, OSError):
                raise ConnectionLost(False) from error
            raise
        return sock

    def _give_back(self, sock: socket.socket) -> None:
        with self._lock:
            self._busy.discard(sock)
            if len(self._idle) < IDLE_CONNECTIONS and not self._forked:
                self._idle.append(sock)
                return
        self._discard(sock)

    def _discard(self, sock: socket.socket) -> None:
        offers = self._offers.pop(sock, None)
        if offers is not None:
            offers.close()
        sock.close()

    def _settle(self, sock: socket.socket, keep: bool) -> None:
        if keep and not self._closed:
            self._give_back(sock)
            return
        with self._lock:
            self._busy.discard(sock)
        self._discard(sock)

    # End

    def _check_open(self) -> None:
        if self._forked:
            raise RuntimeError("This Sandbox belongs to the process that made it; after fork() make another.")
        if self._closed:
            raise RuntimeError("This Sandbox is closed.")

    def close(self) -> None:
        """Kill what runs and end the engine; waits at most 2 s. Idempotent; runs of other threads raise
        RuntimeError.
        """
        if self._closed:
            return
        self._closed = True
        self._forget_idle()
        with self._lock:
            busy = list(self._busy)
        for sock in busy:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # its own thread closes it
        if self._engine is not None:
            self._engine.close()

    def _after_fork(self) -> None:
        """In the child: what is open is the parent's."""
        if self._closed:
            return
        self._closed = self._forked = True
        self._lock = threading.Lock()
        for sock in [*self._idle, *self._busy]:
            self._discard(sock)
        self._idle, self._busy = [], set()
        if self._engine is not None:
            self._engine.abandon()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=1)
            self.close()

    def __repr__(self) -> str:
        where = f"unix:{self._path}" if self._path else "embedded"
        return f"<Sandbox {where}{', closed' if self._closed else ''}>"


def _receive(sock: socket.socket) -> packets.Packet | None:
    """The next packet, None at the end. Linux reports once that the other side closed without having read everything,
    before it hands out what that side had sent.

    Looks up now and then: a signal that comes between the interpreter's last look and the system call does not
    interrupt it, and Ctrl-C would wait for the run's end.
    """
    waiting = select.poll()
    waiting.register(sock, select.POLLIN)
    while not waiting.poll(INTERRUPT_MILLISECONDS):
        continue
    try:
        return packets.receive(sock, descriptors=DESCRIPTORS)
    except ConnectionResetError:
        return packets.receive(sock, descriptors=DESCRIPTORS)


class Revoked(Exception):
    """A lease was over before the program came: it runs as any other."""


def _cancel(sock: socket.socket) -> None:
    """Ask for the end of the run on *sock* and wait for it, but not long."""
    with contextlib.suppress(OSError, SandboxError):
        sock.settimeout(CANCEL_SECONDS)
        packets.send(sock, packets.CANCEL)
        while (packet := packets.receive(sock, descriptors=DESCRIPTORS)) is not None:
            packet.close()
            if packet.message.get("op") in ("result", "refused"):
                return


def _asked(address: str, operation: str) -> dict[str, Any]:
    """The daemon's answer to an operation without arguments. Raises what it refused with."""
    return _ask(open_daemon(parse_address(address)), operation)


def _ask(connected: socket.socket, operation: str) -> dict[str, Any]:
    """As ``_asked``, on a new connection, which is closed."""
    with Sandbox._greeted(connected) as sock:
        packets.send(sock, {"op": operation})
        answer = packets.receive(sock)
    if answer is None:
        raise ConnectionLost(False)
    answer.close()
    if answer.message.get("op") == "refused" and isinstance(answer.message.get("error"), dict):
        raise from_plain(answer.message["error"])
    return answer.message


def reload(address: str) -> list[str]:
    """Have the daemon at *address* read its files again; sentences about what changed. Raises PolicyError when a file
    is wrong (everything is as before then), Unavailable, ProtocolError.
    """
    said = _asked(address, "reload").get("said")
    if not isinstance(said, list) or not all(isinstance(one, str) for one in said):
        raise ProtocolError("The daemon's answer to reload is not a list.")
    return said


def _stats(connected: socket.socket) -> dict[str, Any]:
    found = _ask(connected, "stats").get("stats")
    if not isinstance(found, dict):
        raise ProtocolError("The engine's answer to stats is not an object.")
    return found


def stats(address: str) -> dict[str, Any]:
    """The counters of the daemon at *address*, as ``Sandbox.stats`` gives them. Raises Unavailable, ProtocolError."""
    return _stats(open_daemon(parse_address(address)))


def ps(address: str) -> list[dict[str, Any]]:
    """The live runs of the daemon at *address* that the caller may see. Raises Unavailable, ProtocolError."""
    runs = _asked(address, "ps").get("runs")
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise ProtocolError("The daemon's answer to ps is not a list.")
    return runs


_alive: weakref.WeakSet[Sandbox] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for sandbox in list(_alive):
        sandbox._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
