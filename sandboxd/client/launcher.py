"""Start an engine for this program, and end it: the process behind an embedded Sandbox.

Nothing of the caller's process is touched: no signal handler, no SIGCHLD (the engine is init's child), no umask, no
cwd, no cgroup. The engine ends when its control socket closes or when this process is gone, whichever comes first.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any, Final

from sandboxd.errors import ProtocolError, Unavailable, from_plain
from sandboxd.kernel import calls
from sandboxd.protocol import packets
from sandboxd.protocol.operations import Operation

__all__ = ["EngineProcess"]

CLOSE_SECONDS: Final = 2.0
# asyncio takes ssl along when it is there; the engine speaks to nobody over a network, and it costs 15 ms and 4 MB.
_MAIN: Final = (
    "import json, sys; sys.modules['ssl'] = None; sys.path += json.loads(sys.argv[1]); "
    "from sandboxd.engine.__main__ import main; main()"
)


class EngineProcess:
    """One engine process, from ``__init__`` to ``close``. Thread-safe once configured."""

    def __init__(self) -> None:
        """Start it; it does nothing before ``configure``. Raises Unavailable."""
        if not sys.executable:
            raise Unavailable(
                "engine", "no sys.executable", fix="run under a Python interpreter that knows its own path"
            )
        # -I: no PYTHON* variable, no current directory. What the caller imports from comes after the interpreter's own.
        paths = [path for path in sys.path if os.path.isabs(path)]
        paths.append(str(Path(__file__).resolve().parents[2]))
        command = [sys.executable, "-I", "-c", _MAIN, json.dumps(paths)]
        environment = {"PATH": os.defpath, "LANG": "C.UTF-8"}
        if os.geteuid() != 0 and "XDG_RUNTIME_DIR" in os.environ:
            environment["XDG_RUNTIME_DIR"] = os.environ["XDG_RUNTIME_DIR"]  # one of the places for its locks
        try:
            with contextlib.ExitStack() as undo, contextlib.ExitStack() as given:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                undo.callback(ours.close)
                given.callback(theirs.close)
                null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
                given.callback(os.close, null)
                owner = calls.pidfd_open(os.getpid())
                given.callback(os.close, owner)
                stderr = 2 if _is_open(2) else null
                fds = [null, stderr, stderr, theirs.fileno(), owner]
                self.pid, self._pidfd = calls.launch(command, environment, fds)
                undo.pop_all()
        except OSError as error:
            fix = "raise the limits of processes and open files of this program"
            raise Unavailable("engine", "the engine's process cannot be made", errno=error.errno, fix=fix) from error
        self._control: socket.socket | None = ours

    def configure(self, engine: dict[str, Any], likely: bool) -> None:
        """Hand over the engine's settings: it begins with what no policy decides, and where that is *likely* with the
        default policy. Answers come with ``ready``.
        """
        with contextlib.suppress(OSError):
            packets.send(self._living(), {"op": Operation.CONFIGURE, "engine": engine, "likely": likely})

    def ready(self, policy: dict[str, Any]) -> None:
        """Hand over *policy* (``Policy.plain()``); returns when a first cell was proved sealed.

        Raises Unavailable, PolicyError.
        """
        control = self._living()
        try:
            # It may have refused its settings already: then that is the answer.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                packets.send(control, {"op": Operation.POLICY, "policy": policy})
            # What the first run needs is imported while the engine proves its first cell.
            importlib.import_module("sandboxd.client.exchange")
            importlib.import_module("sandboxd.client.leased")
            try:
                answer = packets.receive(control)
            except ConnectionResetError:  # it left our packet unread, which is told once, and before what it had said
                answer = packets.receive(control)
        except OSError:
            answer = None
        if answer is None:
            fix = "its message is on stderr; sandboxd doctor says what this host lacks"
            raise Unavailable("engine", "the engine ended while it started", fix=fix)
        answer.close()
        if answer.message.get("op") == Operation.REFUSED and isinstance(answer.message.get("error"), dict):
            raise from_plain(answer.message["error"])
        if answer.message.get("op") != Operation.READY:
            raise ProtocolError("The engine did not say that it is ready.")

    def connect(self) -> socket.socket:
        """A new connection. Raises OSError when the engine is gone."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", theirs.fileno()))
            self._living().sendmsg([b"c"], [rights], socket.MSG_NOSIGNAL)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return ours

    def _living(self) -> socket.socket:
        if self._control is None:
            raise BrokenPipeError(32, "the engine was closed")
        return self._control

    def close(self) -> None:
        """End it and every run; waits at most 2 s, then kills it. Idempotent."""
        control, self._control = self._control, None
        if control is None:
            return
        with contextlib.suppress(OSError):
            control.shutdown(socket.SHUT_RDWR)
        control.close()
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        if not poller.poll(CLOSE_SECONDS * 1000):
            calls.pidfd_kill(self._pidfd, signal.SIGKILL)
            poller.poll(CLOSE_SECONDS * 1000)
        with contextlib.suppress(ChildProcessError):
            # Ours only where this process is itself init, or has taken init's place as a subreaper.
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        os.close(self._pidfd)

    def abandon(self) -> None:
        """In a child after fork: close our copies; the engine is the parent's."""
        control, self._control = self._control, None
        if control is not None:
            control.close()
            os.close(self._pidfd)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
