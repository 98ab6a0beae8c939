"""One client's connection to an engine: packets in, answers out, one request at a time.

Runs in the engine. The peer may be anybody who may open the socket: every packet is parsed strictly, every state has a
deadline. A slow reader holds back only its own run's output, the end of that run waits for nobody, and who takes
nothing for SEND_SECONDS is dropped and its run killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import re
import sys
import termios
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from sandboxd import protocol
from sandboxd.engine.life import State
from sandboxd.engine.prepared import Prepared
from sandboxd.errors import Busy, ConnectionLost, InvalidRequest, PolicyError, ProtocolError, SandboxError, Unavailable
from sandboxd.limits import shown
from sandboxd.waiting import readable, writable
from sandboxd.wire import Run, parse_header

if TYPE_CHECKING:
    import socket

    from sandboxd.engine.core import Engine
    from sandboxd.engine.run import CellRun
    from sandboxd.engine.workspace import Collected
    from sandboxd.protocol import Packet

__all__ = ["Connection"]

log = logging.getLogger("sandboxd.engine")

HELLO_SECONDS: Final = 10.0
SEND_SECONDS: Final = 30.0
_SHOWN_KEYS: Final = 8
_NAME: Final = re.compile(r"[a-z0-9_-]{1,64}")
_RUN_KEYS: Final = frozenset({"op", "policy", "run"})

Policies = Callable[[str | None], Awaitable[Prepared]]
"""The policy of a name, in force; None is the engine's own default. Raises PolicyError, Unavailable."""


class _Gone(Exception):
    """The client left, or takes nothing any more."""


class Connection:
    """Serves one connected socket until its end."""

    def __init__(
        self, engine: Engine, sock: socket.socket, client: dict[str, Any], policies: Policies, sees_all: bool
    ) -> None:
        self._engine = engine
        self._sock = sock
        self._client = client
        self._policies = policies
        self._sees_all = sees_all
        self._loop = asyncio.get_running_loop()
        self._sending = asyncio.Lock()
        self._lost = False
        self._share = engine.share(None if sees_all else client.get("uid"))
        self._bounds = protocol.ANYTHING if sees_all else protocol.REQUESTS
        self._may_cancel = False
        self._unread = False
        sock.setblocking(False)

    async def serve(self) -> None:
        """Until the client leaves or breaks the protocol. Closes the socket."""
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                hello = await self._receive(inline=True)
            if hello is None:
                return
            hello.close()
            if hello.message.get("op") != "hello":
                raise ProtocolError("The first packet must be hello.")
            await self._send({"op": "hello", "version": protocol.VERSION, "engine": "sandboxd"})
            while (packet := await self._receive()) is not None:
                await self._request(packet)
        except TimeoutError:
            log.info("client %s: too slow; dropped", self._client)
        except ProtocolError as error:
            log.info("client %s: %s", self._client, error)
            with contextlib.suppress(_Gone):
                await self._refuse(error)
        except (_Gone, OSError) as error:
            log.debug("client %s: left: %s", self._client, error)
        finally:
            self.hang_up()

    def hang_up(self) -> None:
        """Close the socket, if ``serve`` did not come to it."""
        protocol.hang_up(self._sock, self._client.get("uid"))

    async def _request(self, packet: Packet) -> None:
        operation = packet.message.get("op")
        try:
            if operation == "run":
                self._may_cancel = True
                await self._run(packet)
            elif isinstance(packet.payload, int):
                raise ProtocolError("Only a request for a run may come in a memfd.")
            elif operation == "ps":
                visible = self._may_see
                await self._send({"op": "ps", "runs": self._engine.list_runs(visible)})
            elif operation == "cancel" and self._may_cancel:
                self._may_cancel = False  # it crossed with the answer to the run that it meant; a second one means none
            else:
                raise ProtocolError(f"There is no request {shown(operation)}.")
        finally:
            packet.close()

    def _may_see(self, owner: dict[str, Any]) -> bool:
        return self._sees_all or owner.get("uid") == self._client.get("uid")

    async def _run(self, packet: Packet) -> None:
        message = packet.message
        if set(message) != _RUN_KEYS or not isinstance(message["run"], dict):
            # Also what an older or a curious client would like to send along: an interpreter, a path, a policy's text.
            odd = sorted(repr(key[:40]) for key in set(message) ^ _RUN_KEYS)
            what = ", ".join([*odd[:_SHOWN_KEYS], *(["..."] if len(odd) > _SHOWN_KEYS else [])]) or "a run that is none"
            await self._refuse(PolicyError(f"A run names an installed policy and nothing more of it; not: {what}."))
            return
        name = message["policy"]
        if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
            await self._refuse(
                PolicyError(f"A policy is asked for by its name, which {shown(name)} is not.", key="policy")
            )
            return
        try:
            # Who sees all is the operator; of anybody else only so much stays in the engine's memory at a time.
            who = None if self._sees_all else self._client.get("uid")
            with self._engine.hold(who, packet.text_bytes + _code_bytes(message["run"])):
                with self._share.counted():
                    request = parse_header(message["run"], packet.take_bytes())
                packet.message = message = {}
                await self._execute(name, request)
        except (PolicyError, InvalidRequest, Busy) as error:
            await self._refuse(error)

    async def _execute(self, name: str | None, request: Run) -> None:
        """Run *request* and answer, with an eye on the client: when it speaks or leaves, the run ends."""
        self._lost = False
        await self._taken()
        started: list[CellRun] = []

        async def emit(stream: int, data: bytes) -> None:
            await self._emit(started[0], stream, data)

        async def execute() -> None:
            prepared = await self._policies(name)
            header, texts, files = await self._engine.run(
                prepared, request, self._client, emit if request.stream else None, started.append, self._notice
            )
            try:
                await self._send_result(header, texts, files)
            finally:
                files.close()

        task = self._loop.create_task(execute())
        watch = self._loop.create_task(self._receive(inline=True))
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            gone = False
            if not task.done():
                gone = await self._interrupted(watch, started, task)
            try:
                await task
            except SandboxError as error:
                await self._refuse(error)
            except OSError as error:
                log.exception("a run failed")
                await self._refuse(Unavailable("engine", error.errno, "look at the engine's log", str(error)))
            if gone:
                raise _Gone("in the middle of its run")
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, SandboxError, OSError, _Gone):
                    await task
            if not watch.done():
                watch.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watch
            elif not watch.cancelled() and watch.exception() is None and (late := watch.result()) is not None:
                late.close()

    async def _interrupted(
        self, watch: asyncio.Task[Packet | None], started: list[CellRun], task: asyncio.Task[None]
    ) -> bool:
        """The client spoke, or left, while its run was under way: the end of the run either way. True when it left."""
        gone = True
        try:
            packet = watch.result()
        except (OSError, ProtocolError):
            packet = None
        if packet is not None:
            gone = packet.message.get("op") != "cancel"
            packet.close()
        if started and started[0].life.state is not State.QUEUED:
            started[0].cancel()  # without effect when only its result is left to be sent
            return gone
        task.cancel()  # still queued, or its policy is being made ready
        with contextlib.suppress(asyncio.CancelledError, SandboxError, OSError):
            await task
        if not gone:
            await self._refuse(ConnectionLost(False))
        raise _Gone("before its run began")

    # Packets

    async def _emit(self, run: CellRun, stream: int, data: bytes) -> None:
        try:
            for start in range(0, len(data), protocol.INLINE_BYTES // 2):
                part = data[start : start + protocol.INLINE_BYTES // 2]
                await self._send({"op": "output", "stream": stream}, [part])
        except _Gone:
            self._lost = True
            run.cancel()
            raise

    async def _notice(self, what: str) -> None:
        await self._send({"op": what})

    async def _send_result(self, header: dict[str, Any], texts: list[bytes], files: Collected) -> None:
        if self._lost:
            raise _Gone("it took no output")
        message = {"op": "result", "result": header}
        if files.fd < 0:
            await self._send(message, texts)
            return
        try:
            packed = self._with_files(message, header, texts, files)
        except OSError as error:
            # The program ran: that must be told, with what there is.
            log.error("the files of run %s cannot be sent: %s", header["id"], error)
            header.update(status="internal", files=[], files_skipped=header["files_skipped"] + len(header["files"]))
            header.update(stdout=[0, len(texts[0])], stderr=[len(texts[0]), len(texts[1])])
            packed = protocol.pack(message, texts)
        await self._deliver(*packed)

    def _with_files(
        self, message: dict[str, Any], header: dict[str, Any], texts: list[bytes], files: Collected
    ) -> tuple[list[Any], int]:
        """The packed result: the files are in a memfd already; the texts go behind them, and the offsets follow."""
        fd = files.take()
        try:
            size = os.fstat(fd).st_size
            lead = len(texts[0]) + len(texts[1])
            header["stdout"][0] += size
            header["stderr"][0] += size
            _shorten(header)
            for entry in header["files"]:
                entry["offset"] -= lead
            os.pwrite(fd, texts[0] + texts[1], size)
        except BaseException:
            os.close(fd)
            raise
        return protocol.pack(message, filled=fd)

    async def _refuse(self, error: SandboxError) -> None:
        # The frames hold the request, and a task that holds the error; the payload is a mapping with a descriptor, and
        # must not wait for the collector.
        error.__traceback__ = error.__context__ = None
        await self._send({"op": "refused", "error": error.plain()})

    async def _send(self, message: dict[str, Any], payload: list[bytes] | None = None) -> None:
        await self._deliver(*protocol.pack(message, payload or []))

    async def _deliver(self, buffers: list[Any], fd: int) -> None:
        """Send one packet; waits while the peer's queue is full. Raises _Gone when it is full for SEND_SECONDS, or the
        peer has closed.
        """
        try:
            async with self._sending, asyncio.timeout(SEND_SECONDS):
                if fd >= 0:
                    await self._read()
                while True:
                    try:
                        protocol.send_packed(self._sock, buffers, fd)
                        self._unread = self._unread or fd >= 0
                        return
                    except BlockingIOError:
                        await writable(self._sock.fileno())
        except TimeoutError:
            log.info("client %s: takes nothing; dropped", self._client)
            raise _Gone("too slow") from None
        except (BrokenPipeError, ConnectionResetError) as error:
            raise _Gone(str(error)) from None
        finally:
            if fd >= 0:
                os.close(fd)

    async def _taken(self) -> None:
        """Wait for the peer to read the memfd that it was sent last, whose pages are the engine's. Raises _Gone when it
        does not within SEND_SECONDS.
        """
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self._read()
        except TimeoutError:
            log.info("client %s: does not read its answers; dropped", self._client)
            raise _Gone("too slow") from None

    async def _read(self) -> None:
        """Until nothing that went with a memfd is unread: SIOCOUTQ counts what the peer has yet to take, unix(7)."""
        pause = 0.0005
        while self._unread:
            queued = fcntl.ioctl(self._sock.fileno(), termios.TIOCOUTQ, bytes(4))
            self._unread = int.from_bytes(queued, sys.byteorder) > 0
            if self._unread:
                await asyncio.sleep(pause)
                pause = min(2 * pause, 0.05)

    async def _receive(self, inline: bool = False) -> Packet | None:
        """The next packet. Nothing suspends between taking it and returning it: a cancelled caller loses none."""
        while True:
            await self._share.turn()
            owner = self._client.get("uid")
            if not self._sees_all and protocol.closing(owner) > protocol.CLOSING_MAX:
                raise ProtocolError("Descriptors that came with earlier packets cannot be closed.")
            with self._share.counted(), contextlib.suppress(BlockingIOError):
                return protocol.receive(self._sock, inline=inline, bounds=self._bounds, owner=owner)
            await readable(self._sock.fileno())


def _code_bytes(run: dict[str, Any]) -> int:
    """How long the source text is said to be; ``parse_header`` checks that it is true."""
    size = run.get("code_bytes")
    return size if type(size) is int and size > 0 else 0


def _shorten(header: dict[str, Any]) -> None:
    """Leave out the last files when their names, which the program chose, are more than a message can hold."""
    room = protocol.JSON_BYTES // 2
    files = header["files"]
    for index, entry in enumerate(files):
        room -= len(json.dumps(entry))
        if room < 0:
            header["files_skipped"] += len(files) - index
            del files[index:]
            return
