"""What a Sandbox and an AsyncSandbox share: the engine behind them, its connections, and what an error means for a run.

No run's input or output here: the one waits in the caller's thread, the other on the caller's loop.
"""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Any

from sandboxd.client.connections import Connections, ask, open_daemon
from sandboxd.errors import ConnectionLost, ProtocolError, SandboxError

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from sandboxd.client.connections import Connection
    from sandboxd.client.exchange import Exchange
    from sandboxd.client.launcher import EngineProcess
    from sandboxd.limits import LimitValue
    from sandboxd.protocol.operations import Operation

__all__ = ["Handle"]


class Handle:
    """On an engine of its own, *engine*, or on the daemon whose socket is *path*."""

    def __init__(
        self,
        engine: EngineProcess | None,
        path: str | None = None,
        policy: str | None = None,
        limits: Mapping[str, LimitValue] | None = None,
    ) -> None:
        """A daemon is asked for *policy*, by name; *limits* narrow it for every run."""
        self.engine = engine
        self.path = path
        self.connections = Connections(self.dial)
        self._policy = policy
        self._limits = dict(limits or {})
        self._closed = False
        self._forked = False
        _alive.add(self)

    @property
    def is_closed(self) -> bool:
        """Whether no run can begin any more."""
        return self._closed

    def check_open(self) -> None:
        """Raises RuntimeError once it is closed, or in a child of the process that made it."""
        if self._forked:
            raise RuntimeError("This Sandbox belongs to the process that made it; after fork() make another.")
        if self._closed:
            raise RuntimeError("This Sandbox is closed.")

    def dial(self) -> socket.socket:
        """A new connection. Raises Unavailable, ConnectionLost, RuntimeError."""
        try:
            return self.engine.connect() if self.engine is not None else open_daemon(self.path or "")
        except OSError as error:
            self.check_open()
            raise ConnectionLost(False) from error

    def exchange(self, code: str | bytes, **arguments: Any) -> Exchange:
        """A checked request under this handle's policy and limits. Raises InvalidRequest, PolicyError, RuntimeError."""
        from sandboxd.client.exchange import Exchange

        self.check_open()
        return Exchange(code, policy=self._policy, base_limits=self._limits, **arguments)

    def failed(self, connection: Connection, exchange: Exchange, error: SandboxError) -> None:
        """The run of *exchange* failed with *error*. Returns when it shall be tried on another connection: this was an
        idle one, and its daemon was started anew meanwhile. Raises *error* otherwise.
        """
        fresh = connection.fresh
        self.connections.settle(connection, keep=not isinstance(error, ConnectionLost | ProtocolError))
        self.check_open()
        if fresh or exchange.sent or not isinstance(error, ConnectionLost):
            raise error
        self.connections.forget_idle()  # the others are no better

    def ask(self, operation: Operation) -> dict[str, Any]:
        """The engine's answer to an operation without arguments. Raises what it refused with."""
        self.check_open()
        return ask(self.dial(), operation)

    def close(self) -> None:
        """Kill what runs and end an engine of its own; waits at most 2 s. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.connections.shut_down()
        if self.engine is not None:
            self.engine.close()

    def _after_fork(self) -> None:
        """In the child: what is open is the parent's."""
        if self._closed:
            return
        self._closed = self._forked = True
        self.connections.abandon()
        if self.engine is not None:
            self.engine.abandon()


_alive: weakref.WeakSet[Handle] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for handle in list(_alive):
        handle._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
