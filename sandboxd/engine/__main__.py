"""The engine of an embedded Sandbox: a process of its own, started by sandboxd.client.sandbox.

Descriptors: 0 /dev/null, 1 and 2 the caller's stderr, 3 the control socket, 4 a pidfd of the caller. It serves one
policy, which the caller chose and so may be any; it ends when the control socket does, or the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sandboxd._util.fdwait import readable, resolve
from sandboxd.engine import held_time
from sandboxd.engine.clients.connection import Connection
from sandboxd.engine.collecting import collect_when_idle
from sandboxd.engine.config import EngineConfig
from sandboxd.engine.engine import Engine
from sandboxd.errors import ProtocolError, SandboxError, Unavailable
from sandboxd.protocol import packets
from sandboxd.protocol.operations import Operation

if TYPE_CHECKING:
    from sandboxd.engine.cells.active_policy import ActivePolicy

__all__ = ["main"]

CONTROL: Final = 3
OWNER: Final = 4


class Embedded:
    """The engine, its one policy, and the connections that the control socket handed over."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._connections: set[asyncio.Task[None]] = set()
        self._engine: Engine | None = None
        self._plain: dict[str, Any] = {}
        self._caller = _pid_of(OWNER)
        # The caller may fork: a child of its holds the control socket open, but the pidfd is of the caller alone.
        self._loop.add_reader(OWNER, self._end)

    def _end(self) -> None:
        self._loop.remove_reader(OWNER)  # it stays readable
        resolve(self._over)

    async def serve(self) -> None:
        """Configure, say so, then take connections until the end, which may come at any moment before."""
        try:
            configuring = self._loop.create_task(self._configure())
            self._over.add_done_callback(lambda _: configuring.cancel())
            try:
                refusal = await configuring
            except asyncio.CancelledError:
                if self._over.done():
                    return
                raise
            if refusal is not None:
                with contextlib.suppress(OSError):
                    packets.send(self._control, {"op": Operation.REFUSED, "error": refusal.plain()})
                return
            collect_when_idle(lambda: self._engine is None or not self._engine.live)
            packets.send(self._control, {"op": Operation.READY, "version": packets.VERSION})
            self._control.setblocking(False)
            self._loop.add_reader(self._control.fileno(), self._take)
            await self._over
        finally:
            self._loop.remove_reader(self._control.fileno())
            await self._close()

    async def _configure(self) -> SandboxError | None:
        """Start the engine and its policy; the error to report when that cannot be."""
        try:
            settings = await self._packet(Operation.CONFIGURE)
            self._engine = engine = Engine(EngineConfig.from_plain(settings["engine"]))
            engine.start()
            engine.prestart(settings["likely"])
            self._plain = (await self._packet(Operation.POLICY))["policy"]
            await self._policy(None)
        except SandboxError as error:
            return error
        except OSError as error:
            return Unavailable("engine", str(error), errno=error.errno, fix="sandboxd doctor says what this host lacks")
        except Exception as error:
            logging.getLogger("sandboxd.engine").exception("the engine cannot start")
            fix = "its traceback is on stderr; sandboxd doctor says what this host lacks"
            return Unavailable("engine", f"{type(error).__name__}: {error}", fix=fix)
        return None

    async def _packet(self, operation: Operation) -> dict[str, Any]:
        """The next packet of the control socket, which must be *operation*. Raises ProtocolError, also at the end."""
        await readable(self._control.fileno())
        packet = packets.receive(self._control)
        if packet is None or packet.message.get("op") != operation:
            raise ProtocolError(f"The next packet must be {operation}.")
        packet.close()
        return packet.message

    async def _close(self) -> None:
        if self._engine is not None:
            await self._engine.close()
        for task in list(self._connections):
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections, timeout=2)

    async def _policy(self, name: str | None) -> ActivePolicy:
        assert self._engine is not None  # noqa: S101
        if name is not None:
            raise Engine.policy_error(name)
        return await self._engine.policies.get("", self._plain)

    def _take(self) -> None:
        """One packet of the control socket: one byte and a connection, or the end."""
        try:
            data, control, _, _ = self._control.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, control = b"", []
        for level, kind, raw in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._connect(socket.socket(fileno=struct.unpack("i", raw[:4])[0]))
        if not data:
            self._end()

    def _connect(self, sock: socket.socket) -> None:
        assert self._engine is not None  # noqa: S101
        client = {"uid": os.getuid(), "pid": self._caller}
        # A program in a lent cell is not seen here, and so could not be recorded.
        lends = self._engine.config.audit is None
        connection = Connection(self._engine, sock, client, self._policy, sees_all=True, lends=lends)
        task = self._loop.create_task(connection.serve())
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)


def _pid_of(pidfd: int) -> int:
    """The process of *pidfd*; -1 when it is gone. Source: Pid in /proc/self/fdinfo, proc_pid_fdinfo(5)."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text("ascii").splitlines():
        if line.startswith("Pid:"):
            return int(line.split()[1])
    return -1


async def _serve() -> None:
    with socket.socket(fileno=CONTROL) as control:
        await Embedded(control).serve()


def main() -> None:
    """Entry of the process."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="sandboxd: %(message)s")
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        held_time.run(_serve)
    # Everything is given back by now, and the caller waits for this process: the interpreter's own end takes 20 ms.
    logging.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
