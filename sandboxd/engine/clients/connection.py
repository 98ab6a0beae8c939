"""One client's connection to an engine: packets in, answers out, one request at a time.

Runs in the engine. The peer may be anybody who may open the socket: every packet is parsed strictly, every state has a
deadline. A slow reader holds back only its own run's output, the end of that run waits for nobody, and who takes
nothing for SEND_SECONDS is dropped and its run killed.

What comes and goes are ``Inbox`` and ``Outbox``, what is asked for is in protocol/operations.py, where the connection
stands in phase.py; its runs are ``ClientRuns``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from sandboxd._util import disposal
from sandboxd.engine.clients.client_runs import ClientRuns, Policies
from sandboxd.engine.clients.inbox import Inbox
from sandboxd.engine.clients.leases import Leases, send_now
from sandboxd.engine.clients.outbox import Gone, Outbox
from sandboxd.engine.clients.peer import Peer
from sandboxd.engine.clients.phase import ConnectionLife, Event, Phase
from sandboxd.errors import ProtocolError, SandboxError, Unavailable
from sandboxd.limits import shown
from sandboxd.protocol import packets
from sandboxd.protocol.operations import LARGE, REQUESTS, Asker, Operation, operation_of

if TYPE_CHECKING:
    from sandboxd.engine.engine import Engine
    from sandboxd.protocol.packets import Packet

__all__ = ["Connection"]

log = logging.getLogger("sandboxd.engine")

HELLO_SECONDS: Final = 10.0

Reload = Callable[[], Awaitable[list[str]]]
"""Have the operator's files read again: sentences about what changed. Raises SandboxError; all is as before then."""


class Connection:
    """Serves one connected socket until its end."""

    def __init__(
        self,
        engine: Engine,
        sock: socket.socket,
        client: dict[str, Any],
        policies: Policies,
        sees_all: bool,
        lends: bool = False,
        reload: Reload | None = None,
    ) -> None:
        """*sees_all*: the client is the engine's operator; *lends*: it is its caller, and may hold cells itself;
        *reload*: what an operator's wish to have the configuration read again does.
        """
        self._engine = engine
        self._sock = sock
        self._lends = lends
        self._reload = reload
        self._peer = Peer(client, sees_all, engine.shares.of(None if sees_all else client.get("uid")))
        self._life = ConnectionLife()
        self._inbox = Inbox(sock, self._peer, engine.resources.held, self._spoken_to)
        self._outbox = Outbox(sock, self._peer)
        self._runs = ClientRuns(engine, self._peer, policies, self._inbox, self._outbox, self._life)
        self._may_cancel = False
        self._is_draining = False
        sock.setblocking(False)

    async def serve(self) -> None:
        """Until the client leaves or breaks the protocol. Closes the socket."""
        client = self._peer.facts
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                hello = await self._inbox.receive(inline=True)
            if hello is None:
                return
            await self._greet(hello)
            while (packet := await self._inbox.receive()) is not None:
                self._life.on(Event.ASKED)
                await self._request(packet)
                self._life.on(Event.ANSWERED)
                if self._is_draining:
                    self._hear_no_more()
        except TimeoutError:
            log.info("client %s: too slow; dropped", client)
        except ProtocolError as error:
            log.info("client %s: %s", client, error)
            with contextlib.suppress(Gone):
                await self._outbox.refuse(error)
        except (Gone, OSError) as error:
            log.debug("client %s: left: %s", client, error)
        finally:
            self.hang_up()

    async def _greet(self, hello: Packet) -> None:
        hello.close()
        if operation_of(hello.message) is not Operation.HELLO:
            raise ProtocolError("The first packet must be hello.")
        if self._lends and hello.message.get("direct") is True:
            engine, sock = self._engine, self._sock
            self._runs.leases = Leases(
                engine.resources,
                engine.live,
                engine.tally,
                engine.policies.current,
                self._peer.facts,
                lambda data, fds: send_now(sock, data, fds),
            )
        await self._outbox.send({"op": Operation.HELLO, "version": packets.VERSION, "engine": "sandboxd"})
        self._life.on(Event.GREETED)

    def drain(self) -> None:
        """Answer what the client has sent, and end then. What it sends from now on fails at once, so that it knows that
        nothing of it was begun.
        """
        self._is_draining = True
        if self._life.phase in (Phase.GREETING, Phase.IDLE):
            self._hear_no_more()

    def _hear_no_more(self) -> None:
        # What is in the queue can still be read, and the peer's next send is EPIPE: unix_shutdown() in af_unix.c.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)

    def hang_up(self) -> None:
        """Close the socket, if ``serve`` did not come to it."""
        self._life.on(Event.CLOSE)
        self._inbox.close()
        if self._runs.leases is not None:
            self._runs.leases.close()
        disposal.close_socket(self._sock, self._peer.uid)

    def _spoken_to(self) -> None:
        """The client sent something before its answer, or left. Only a run is interrupted by that."""
        if self._life.phase is Phase.RUNNING:
            self._runs.interrupt()

    # Requests

    async def _request(self, packet: Packet) -> None:
        operation = operation_of(packet.message)
        try:
            if isinstance(packet.payload, int) and not (operation in LARGE and self._may_ask(operation)):
                raise ProtocolError("Only a request for a run may come in a memfd.")
            if operation not in REQUESTS or not self._may_ask(operation):
                raise self._unknown(packet)
            await _HANDLERS[operation](self, packet)
        finally:
            packet.close()

    def _may_ask(self, operation: Operation) -> bool:
        """Whether this connection has *operation* at all. A user who asks for what is an operator's is told so."""
        if operation.asker is Asker.HOLDER:
            return self._runs.leases is not None
        return operation.asker is not Asker.OPERATOR or self._reload is not None

    @staticmethod
    def _unknown(packet: Packet) -> ProtocolError:
        return ProtocolError(f"There is no request {shown(packet.message.get('op'))}.")

    async def _on_run(self, packet: Packet) -> None:
        self._may_cancel = True
        await self._runs.run(packet)

    async def _on_cancel(self, packet: Packet) -> None:
        leases = self._runs.leases
        if leases is not None and (run := leases.begun()) is not None:
            await self._runs.cancel_leased(leases, run)
        elif self._may_cancel:
            self._may_cancel = False  # it crossed with the answer to the run that it meant; a second one means none
        else:
            raise self._unknown(packet)

    async def _on_done(self, packet: Packet) -> None:
        assert self._runs.leases is not None  # noqa: S101
        self._runs.done(self._runs.leases, packet.message)

    async def _on_take(self, packet: Packet) -> None:
        assert self._runs.leases is not None  # noqa: S101
        await self._runs.take(self._runs.leases, packet)

    async def _on_ps(self, _: Packet) -> None:
        await self._outbox.send({"op": Operation.PS, "runs": self._engine.live.facts(self._peer.may_see)})

    async def _on_stats(self, _: Packet) -> None:
        await self._outbox.send({"op": Operation.STATS, "stats": self._engine.stats(self._peer.bound_uid)})

    async def _on_logs(self, packet: Packet) -> None:
        from sandboxd.engine.clients import logs

        try:
            said, lines = await logs.answer(self._engine, packet.message, self._peer.bound_uid)
        except Unavailable as error:
            await self._outbox.refuse(error)
            return
        await self._outbox.drained()
        await self._outbox.send(said, lines)

    async def _on_reload(self, _: Packet) -> None:
        assert self._reload is not None  # noqa: S101
        if not self._peer.sees_all:
            fix = "ask root, or the user that the daemon runs as"
            error = Unavailable("reload", "only its operator has a daemon reload", errno=errno.EPERM, fix=fix)
            await self._outbox.refuse(error)
            return
        try:
            said = await self._reload()
        except SandboxError as refusal:
            await self._outbox.refuse(refusal)
        else:
            await self._outbox.send({"op": Operation.RELOADED, "said": said})


_HANDLERS: Final[Mapping[Operation, Callable[[Connection, Packet], Awaitable[None]]]] = {
    one: getattr(Connection, f"_on_{one}") for one in REQUESTS
}
