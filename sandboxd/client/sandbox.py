"""Sandbox: the caller's handle on an engine, embedded or behind a socket.

One connection serves one run at a time; idle ones are kept (``connections``). So a run's packets are read in the thread
that called ``run()``, its callbacks are called there, and threads do not wait for each other.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

from sandboxd._util.closeable import Closing
from sandboxd.client.connections import Connection, counters, greet, open_daemon, parse_address
from sandboxd.client.handle import Handle
from sandboxd.client.launcher import EngineProcess
from sandboxd.errors import ConnectionLost, PolicyError, ProtocolError, SandboxError, later
from sandboxd.limits import parse, shown
from sandboxd.protocol import packets
from sandboxd.protocol.operations import Operation
from sandboxd.protocol.run_header import check_args, check_code, check_env

if TYPE_CHECKING:  # pydantic takes most of the time of a start; the engine's process begins first
    import socket
    from collections.abc import Sequence

    from sandboxd.client.exchange import Exchange, FileContent, TextCallback, ToolHost
    from sandboxd.client.leased import LeasedCell
    from sandboxd.client.result import Result
    from sandboxd.policy import Limits, Policy

__all__ = ["RUN_DEFAULTS", "Cancel", "Sandbox"]

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

    _handle: Handle
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
        self._handle = Handle(engine)
        self._declared = (chosen, None)

    @classmethod
    def connect(cls, address: str, *, policy: str | None = None, limits: Limits | None = None) -> Self:
        """A Sandbox on the daemon at *address*, "unix:PATH". *policy* names one that its operator installed.

        *limits* narrow the policy's for every run of this handle. Raises Unavailable when no daemon answers,
        PolicyError for a policy that is not a name.
        """
        if policy is not None and (not isinstance(policy, str) or "/" in policy or policy.endswith(".toml")):
            raise PolicyError("A daemon's clients name an installed policy; a policy file stays with its operator.")
        _check_limits(limits)
        path = parse_address(address)
        first = Connection(greet(open_daemon(path)), fresh=False)
        self = cls.__new__(cls)
        self._handle = Handle(None, path, policy, None if limits is None else limits.plain())
        self._handle.connections.settle(first, keep=True)
        self._declared = (None, limits)
        return self

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
        if plain and self._handle.engine is not None and filename == "main.py" and language == "python":
            result = self._run_leased(code, args, env, results)
            if result is not None:
                return result
        exchange = self._handle.exchange(
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
        exchange = self._handle.exchange(code, language="python", limits=None, **arguments)
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
            return self._perform(self._handle.exchange(code, tools=tools, **given), None)
        finally:
            tools.end()

    def _perform(self, exchange: Exchange, cancel: Cancel | None) -> Result:
        """Run it on a connection of its own. Raises as ``run`` does."""
        connections = self._handle.connections
        while True:
            connection = connections.take()
            try:
                result = self._drive(connection, exchange, cancel)
            except SandboxError as error:
                self._handle.failed(connection, exchange, error)
            except BaseException:
                # KeyboardInterrupt, or a callback's own: the run is killed before it propagates.
                if not exchange.answered:
                    connection.cancel()
                connections.settle(connection, keep=False)
                raise
            else:
                connections.settle(connection, keep=True)
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
        return counters(self._handle.ask(Operation.STATS))

    def session(self, **_arguments: Any) -> NoReturn:
        """One live interpreter whose state stays between runs: not in this version. Raises Unavailable."""
        raise later("sessions come")

    def _drive(self, connection: Connection, exchange: Exchange, cancel: Cancel | None) -> Result:
        sock = connection.sock
        # When the other side has closed, what it said before is still there and may say why.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if connection.fresh:
                direct = self._handle.engine is not None
                if direct:
                    connection.accept_leases()
                packets.send(sock, packets.hello(direct=direct))
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
            return _answer(connection, exchange)
        finally:
            if cancel is not None:
                cancel.watch(None)

    # In a cell that the engine lent to this process

    def _run_leased(
        self, code: object, args: Sequence[str], env: Mapping[str, str] | None, results: bool
    ) -> Result | None:
        """None when there is no such cell, or the run is not for one."""
        leased = sys.modules.get("sandboxd.client.leased")  # who has a lease has it
        if leased is None or type(code) is not str or len(code) > leased.SOURCE_BYTES or type(results) is not bool:
            return None
        source = check_code(code).encode()
        # What is odd is told by the ordinary way.
        if len(source) > leased.SOURCE_BYTES or type(args) not in (list, tuple) or type(env) not in (dict, NoneType):
            return None
        words = check_args(args) if args else ()
        names = check_env(env or {}, words) if env or words else {}
        self._handle.check_open()
        message = leased.message_of(code, words, names, results)
        if len(message) > leased.MESSAGE_BYTES:
            return None
        connection = self._handle.connections.take_lent()
        if connection is None:
            return None
        keep = False
        lease: LeasedCell | None = None
        try:
            try:
                lease = connection.take_lease()
            except ProtocolError:  # no room for its descriptors, for one: another connection, the ordinary way
                return None
            result = None
            if lease is not None:
                try:
                    lease.start(source, message)
                    result = lease.finish(connection.sock) or self._carried_on(connection, code, args, env, results)
                finally:
                    lease.close()
            keep = True
            return result
        except OSError:
            self._handle.check_open()
            raise ConnectionLost(lease is not None and lease.handed_over) from None
        except SandboxError as error:
            keep = not isinstance(error, ConnectionLost | ProtocolError)
            self._handle.check_open()
            raise
        except BaseException:
            connection.cancel()
            raise
        finally:
            self._handle.connections.settle(connection, keep=keep)

    def _carried_on(self, connection: Connection, code: str, args: Any, env: Any, results: bool) -> Result | None:
        """The engine's answer to a run that it has taken over; None when its cell was dead before it began."""
        exchange = self._handle.exchange(code, **{**RUN_DEFAULTS, "args": args, "env": env, "results": results})
        exchange.sent = True
        try:
            return _answer(connection, exchange)
        except Revoked:
            return None

    # End

    def close(self) -> None:
        """Kill what runs and end the engine; waits at most 2 s. Idempotent; runs of other threads raise
        RuntimeError.
        """
        handle = getattr(self, "_handle", None)
        if handle is not None:
            handle.close()

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle is not None and not handle.is_closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=1)
            handle.close()

    def __repr__(self) -> str:
        handle = getattr(self, "_handle", None)
        where = f"unix:{handle.path}" if handle is not None and handle.path else "embedded"
        return f"<Sandbox {where}{', closed' if handle is None or handle.is_closed else ''}>"


class Revoked(Exception):
    """A lease was over before the program came: it runs as any other."""


def _answer(connection: Connection, exchange: Exchange) -> Result:
    while (packet := connection.receive()) is not None:
        if connection.note(packet):
            if packet.message["op"] == Operation.REVOKED and packet.message.get("taken") is True:
                raise Revoked
            continue
        if exchange.feed(packet):
            assert exchange.result is not None  # noqa: S101 (feed's promise)
            return exchange.result
    raise exchange.lost()
