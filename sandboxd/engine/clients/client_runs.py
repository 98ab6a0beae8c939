"""The runs of one client: one at a time, from the request to the answer, with an eye on the client meanwhile."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from sandboxd._util import disposal
from sandboxd._util.fdwait import in_thread
from sandboxd.engine.cells.active_policy import ActivePolicy
from sandboxd.engine.clients import result_packet
from sandboxd.engine.clients.outbox import Gone
from sandboxd.engine.clients.phase import ENDS, Event, Phase
from sandboxd.engine.tally import STATUSES
from sandboxd.errors import Busy, ConnectionLost, InvalidRequest, PolicyError, ProtocolError, SandboxError, Unavailable
from sandboxd.limits import shown
from sandboxd.protocol import packets
from sandboxd.protocol.operations import Operation, operation_of
from sandboxd.protocol.run_header import Run, announced_code_bytes, parse_header

if TYPE_CHECKING:
    from sandboxd.engine.clients.inbox import Inbox
    from sandboxd.engine.clients.leases import Leases
    from sandboxd.engine.clients.outbox import Outbox
    from sandboxd.engine.clients.peer import Peer
    from sandboxd.engine.clients.phase import ConnectionLife
    from sandboxd.engine.engine import Engine
    from sandboxd.engine.runs.run import CellRun
    from sandboxd.outcome.collected import Collected
    from sandboxd.protocol.packets import Packet

__all__ = ["ClientRuns", "Policies"]

log = logging.getLogger("sandboxd.engine")

MOST_SECONDS: Final = 1e6
LARGE_BYTES: Final = 1 << 20
"""Of a payload that is looked at, and given back, by another thread than the loop's."""
LARGE_TEXT_BYTES: Final = 1 << 13
"""Of a message whose contents are judged by another thread: a loop over some hundred files takes a millisecond."""
_SHOWN_KEYS: Final = 8
_NAME: Final = re.compile(r"[a-z0-9_-]{1,64}")
_RUN_KEYS: Final = frozenset({"op", "policy", "run"})

Policies = Callable[[str | None], Awaitable[ActivePolicy]]
"""The policy of a name, in force; None is the engine's own default. Raises PolicyError, Unavailable."""


class ClientRuns:
    """Of one connection, whose *life* they move on. Made and used in the task that serves it, but for ``interrupt``."""

    def __init__(
        self, engine: Engine, peer: Peer, policies: Policies, inbox: Inbox, outbox: Outbox, life: ConnectionLife
    ) -> None:
        self.leases: Leases | None = None
        """The cells that the client holds itself, if it may."""
        self._engine = engine
        self._peer = peer
        self._policies = policies
        self._inbox = inbox
        self._outbox = outbox
        self._life = life
        self._now: CellRun | None = None
        self._task: asyncio.Task[Any] | None = None  # while one is under way

    # From the request on

    async def run(self, packet: Packet) -> None:
        """Answer a request for a run. Raises Gone, ProtocolError."""
        message = packet.message
        if set(message) != _RUN_KEYS or not isinstance(message["run"], dict):
            # Also what an older or a curious client would like to send along: an interpreter, a path, a policy's text.
            odd = sorted(repr(key[:40]) for key in set(message) ^ _RUN_KEYS)
            what = ", ".join([*odd[:_SHOWN_KEYS], *(["..."] if len(odd) > _SHOWN_KEYS else [])]) or "a run that is none"
            error = PolicyError(f"A run names an installed policy and nothing more of it; not: {what}.")
            await self._outbox.refuse(error)
            return
        name = message["policy"]
        if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
            error = PolicyError(f"A policy is asked for by its name, which {shown(name)} is not.", key="policy")
            await self._outbox.refuse(error)
            return
        try:
            # Who sees all is the operator; of anybody else only so much stays in the engine's memory at a time.
            who = self._peer.bound_uid
            with self._engine.shares.hold(who, packet.text_bytes + announced_code_bytes(message["run"])):
                # Not a name of this frame: the payload's pages go with its last reference, which may take a while.
                requests = [await self._parse(packet)]
                message = {}
                try:
                    await self._execute(name, requests[0])
                finally:
                    if packet.payload_bytes > LARGE_BYTES:
                        disposal.leave(requests.clear, who)
        except (PolicyError, InvalidRequest, Busy) as refusal:
            await self._outbox.refuse(refusal)

    async def _parse(self, packet: Packet) -> Run:
        """The run that *packet* asks for. A large one is looked at by another thread, whose time counts as well. Raises
        what ``parse_header`` raises.
        """
        header: dict[str, Any] = packet.message["run"]
        packet.message = {}
        if packet.payload_bytes <= LARGE_BYTES and packet.text_bytes <= LARGE_TEXT_BYTES:
            with self._peer.share.counted():
                return parse_header(header, packet.take_bytes())
        begun = time.monotonic()
        try:
            return await in_thread(lambda: parse_header(header, packet.take_bytes()))
        finally:
            self._peer.share.spent(begun)

    async def _execute(self, name: str | None, request: Run) -> None:
        """Run *request* and answer, with an eye on the client: when it speaks or leaves, the run ends."""
        await self._outbox.drained()
        self._begin(None)
        try:
            active = await self._policies(name)
            header, texts, files = await self._engine.run(
                active,
                request,
                self._peer.facts,
                self._emit if request.stream else None,
                self._announce,
                self._notice,
                self._lend_tools,
                self._peer.share,
            )
            self._over()
            await self._send_result(header, texts, files)
            if self.leases is not None:
                self.leases.want(active)
        except asyncio.CancelledError:
            phase = self._life.phase
            if phase not in (Phase.CANCELLED, Phase.LEFT):
                raise  # the engine closes
            assert self._task is not None  # noqa: S101
            self._task.uncancel()
            if phase is Phase.CANCELLED:
                self._over()
                await self._outbox.refuse(ConnectionLost(False))
            raise Gone("before its run began") from None
        except SandboxError as error:
            self._over()
            await self._outbox.refuse(error)
        except OSError as error:
            self._over()
            log.exception("a run failed")
            fix = "look at the engine's log"
            await self._outbox.refuse(Unavailable("engine", str(error), errno=error.errno, fix=fix))
        finally:
            self._end()
        if self._life.phase in ENDS:
            raise Gone("in the middle of its run")

    # A run in a cell that the client holds (leases.py)

    def done(self, leases: Leases, message: dict[str, Any]) -> None:
        """It ended cleanly, and has its answer. Raises ProtocolError."""
        status = message.get("status")
        if not (isinstance(status, str) and status in STATUSES):
            raise ProtocolError("A run that is done says how it ended.")
        leases.done(message.get("lease"), status)

    async def take(self, leases: Leases, packet: Packet) -> None:
        """Carry on what the client began. Raises Gone, ProtocolError."""
        message = packet.message
        identity, ago = message.get("lease"), message.get("seconds")
        if type(ago) is not float or not 0 <= ago < MOST_SECONDS:
            raise ProtocolError("A run that is handed back says for how long it has been running.")
        run = leases.reclaim(identity, ago)
        if run is None:
            await self._outbox.send({"op": Operation.REVOKED, "lease": identity, "taken": True})
            return
        sizes = [_size(message.get(key)) for key in ("stdout", "stderr", "frame")]
        data = bytes(packet.take_bytes())
        if sum(sizes) != len(data):
            raise ProtocolError("A run's parts do not add up to its payload.")
        out, err = data[: sizes[0]], data[sizes[0] : sizes[0] + sizes[1]]
        await self._finish(leases, run, out, err, data[sizes[0] + sizes[1] :])

    async def cancel_leased(self, leases: Leases, run: CellRun) -> None:
        """End *run*, which the client began, and answer. Raises Gone."""
        run.cancel()
        await self._finish(leases, run, b"", b"", b"")

    async def _finish(self, leases: Leases, run: CellRun, out: bytes, err: bytes, frame: bytes) -> None:
        """Carry a run that its caller began to its end, and answer."""
        self._begin(run)
        try:
            header, texts, files = await run.finish_leased(out, err, frame)
            self._over()
            self._engine.tally.count(self._peer.uid, run.policy, header["status"])
            await self._send_result(header, texts, files)
        except SandboxError as error:
            self._over()
            await self._outbox.refuse(error)
        finally:
            self._end()
            leases.finish(run)
        if self._life.phase in ENDS:
            raise Gone("in the middle of its run")

    # While it runs

    def _begin(self, run: CellRun | None) -> None:
        self._now, self._task = run, asyncio.current_task()
        self._life.on(Event.BEGUN)
        self._inbox.watch()

    def _over(self) -> None:
        """The client cannot interrupt it any more."""
        self._life.on(Event.OVER)

    def _end(self) -> None:
        """Whatever has become of it."""
        if self._life.phase in (Phase.RUNNING, Phase.CANCELLED):
            self._over()
        self._now = self._task = None

    def _announce(self, run: CellRun) -> None:
        self._now = run

    def interrupt(self) -> None:
        """The client spoke, or left, while its run was under way: the end of the run either way."""
        try:
            packet = self._inbox.receive_now()
        except BlockingIOError:
            self._inbox.watch()
            return
        except (OSError, ProtocolError):
            packet = None
        event = Event.LEAVE
        if packet is not None:
            if operation_of(packet.message) is Operation.CANCEL:
                event = Event.CANCEL
            packet.close()
        self._life.on(event)
        run = self._now
        if run is not None and not run.is_queued:
            run.cancel()  # without effect when only its result is left to be sent
        elif self._task is not None:
            self._task.cancel()  # still queued, or its policy is being made ready

    async def _emit(self, stream: int, data: bytes) -> None:
        try:
            for start in range(0, len(data), packets.INLINE_BYTES // 2):
                part = data[start : start + packets.INLINE_BYTES // 2]
                await self._outbox.send({"op": Operation.OUTPUT, "stream": stream}, [part])
        except Gone:
            self._life.on(Event.BLOCKED)
            if self._now is not None:
                self._now.cancel()
            raise

    async def _lend_tools(self, run: str, fd: int) -> None:
        try:
            data = packets.with_descriptors({"op": Operation.TOOLS, "run": run})
        except BaseException:
            os.close(fd)
            raise
        await self._outbox.deliver([data], fd)

    async def _notice(self, what: Operation) -> None:
        await self._outbox.send({"op": what})

    async def _send_result(self, header: dict[str, Any], texts: list[bytes], files: Collected) -> None:
        """Send the answer; *files* are closed."""
        try:
            if self._life.phase is Phase.DEAF:
                raise Gone("it took no output")
            await self._outbox.deliver(*await result_packet.packed(header, texts, files))
        finally:
            files.close()


def _size(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ProtocolError("A run's part has a length that is none.")
    return value
