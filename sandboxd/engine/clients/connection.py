"""One client's connection to an engine: packets in, answers out, one request at a time.

Runs in the engine. The peer may be anybody who may open the socket: every packet is parsed strictly, every state has a
deadline. A slow reader holds back only its own run's output, the end of that run waits for nobody, and who takes
nothing for SEND_SECONDS is dropped and its run killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import socket
import sys
import termios
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from sandboxd._util import disposal
from sandboxd._util.fdwait import in_thread, resolve, writable
from sandboxd.engine.cells.active_policy import ActivePolicy
from sandboxd.engine.clients.leases import Leases, send_now
from sandboxd.engine.tally import STATUSES
from sandboxd.errors import Busy, ConnectionLost, InvalidRequest, PolicyError, ProtocolError, SandboxError, Unavailable
from sandboxd.limits import shown
from sandboxd.protocol import packets
from sandboxd.protocol.run_header import Run, announced_code_bytes, parse_header

if TYPE_CHECKING:
    from sandboxd.engine.engine import Engine
    from sandboxd.engine.runs.run import CellRun
    from sandboxd.outcome.collected import Collected
    from sandboxd.protocol.packets import Packet

__all__ = ["Connection"]

log = logging.getLogger("sandboxd.engine")

HELLO_SECONDS: Final = 10.0
SEND_SECONDS: Final = 30.0
MOST_SECONDS: Final = 1e6
LARGE_BYTES: Final = 1 << 20
"""Of a payload that is looked at, and given back, by another thread than the loop's."""
LARGE_TEXT_BYTES: Final = 1 << 13
"""Of a message whose contents are judged by another thread: a loop over some hundred files takes a millisecond."""
FEW_FILES: Final = 64
"""Of a result; the names of more are counted and encoded by another thread."""
_SHOWN_KEYS: Final = 8
_NAME: Final = re.compile(r"[a-z0-9_-]{1,64}")
_RUN_KEYS: Final = frozenset({"op", "policy", "run"})

Policies = Callable[[str | None], Awaitable[ActivePolicy]]
"""The policy of a name, in force; None is the engine's own default. Raises PolicyError, Unavailable."""

Reload = Callable[[], Awaitable[list[str]]]
"""Have the operator's files read again: sentences about what changed. Raises SandboxError; all is as before then."""


class _Gone(Exception):
    """The client left, or takes nothing any more."""


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
        self._client = client
        self._policies = policies
        self._sees_all = sees_all
        self._lends = lends
        self._leases: Leases | None = None
        self._loop = asyncio.get_running_loop()
        self._sending = asyncio.Lock()
        self._lost = False
        self._share = engine.shares.of(None if sees_all else client.get("uid"))
        self._bounds = packets.ANYTHING if sees_all else packets.REQUESTS
        self._may_cancel = False
        self._unread = False
        self._run_now: CellRun | None = None
        self._running = False
        self._interrupted = ""  # or "cancel", or "gone"
        self._task: asyncio.Task[None] | None = None
        self._wake: asyncio.Future[None] | None = None
        self._watching = False
        self._reload = reload
        self._answering = False
        self._draining = False
        sock.setblocking(False)

    async def serve(self) -> None:
        """Until the client leaves or breaks the protocol. Closes the socket."""
        self._task = asyncio.current_task()
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                hello = await self._receive(inline=True)
            if hello is None:
                return
            hello.close()
            if hello.message.get("op") != "hello":
                raise ProtocolError("The first packet must be hello.")
            if self._lends and hello.message.get("direct") is True:
                engine = self._engine
                self._leases = Leases(
                    engine.resources,
                    engine.live,
                    engine.tally,
                    engine.policies.current,
                    self._client,
                    lambda data, fds: send_now(self._sock, data, fds),
                )
            await self._send({"op": "hello", "version": packets.VERSION, "engine": "sandboxd"})
            while (packet := await self._receive()) is not None:
                self._answering = True
                await self._request(packet)
                self._answering = False
                if self._draining:
                    self._hear_no_more()
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

    def drain(self) -> None:
        """Answer what the client has sent, and end then. What it sends from now on fails at once, so that it knows that
        nothing of it was begun.
        """
        self._draining = True
        if not self._answering:
            self._hear_no_more()

    def _hear_no_more(self) -> None:
        # What is in the queue can still be read, and the peer's next send is EPIPE: unix_shutdown() in af_unix.c.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)

    def hang_up(self) -> None:
        """Close the socket, if ``serve`` did not come to it."""
        self._unwatch()
        if self._leases is not None:
            self._leases.close()
        disposal.close_socket(self._sock, self._client.get("uid"))

    async def _request(self, packet: Packet) -> None:
        operation = packet.message.get("op")
        try:
            if operation == "run":
                self._may_cancel = True
                await self._run(packet)
            elif self._leases is not None and operation in ("done", "take"):
                await self._direct(self._leases, operation, packet)
            elif isinstance(packet.payload, int):
                raise ProtocolError("Only a request for a run may come in a memfd.")
            elif operation == "ps":
                visible = self._may_see
                await self._send({"op": "ps", "runs": self._engine.live.facts(visible)})
            elif operation == "stats":
                uid = None if self._sees_all else self._client.get("uid")
                await self._send({"op": "stats", "stats": self._engine.stats(uid)})
            elif operation == "logs":
                await self._logs(packet.message)
            elif operation == "reload" and self._reload is not None:
                await self._read_again(self._reload)
            elif operation == "cancel" and self._leases is not None and (run := self._leases.begun()) is not None:
                run.cancel()
                await self._answer_taken(self._leases, run, b"", b"", b"")
            elif operation == "cancel" and self._may_cancel:
                self._may_cancel = False  # it crossed with the answer to the run that it meant; a second one means none
            else:
                raise ProtocolError(f"There is no request {shown(operation)}.")
        finally:
            packet.close()

    async def _logs(self, message: dict[str, Any]) -> None:
        from sandboxd.engine.clients import logs

        uid = None if self._sees_all else self._client["uid"]
        try:
            said, lines = await logs.answer(self._engine, message, uid)
        except Unavailable as error:
            await self._refuse(error)
            return
        if self._unread:
            await self._taken()
        await self._send(said, lines)

    async def _read_again(self, reload: Reload) -> None:
        if not self._sees_all:
            fix = "ask root, or the user that the daemon runs as"
            await self._refuse(
                Unavailable("reload", "only its operator has a daemon reload", errno=errno.EPERM, fix=fix)
            )
            return
        try:
            said = await reload()
        except SandboxError as error:
            await self._refuse(error)
        else:
            await self._send({"op": "reloaded", "said": said})

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
            with self._engine.shares.hold(who, packet.text_bytes + announced_code_bytes(message["run"])):
                # Not a name of this frame: the payload's pages go with its last reference, which may take a while.
                requests = [await self._parse(packet)]
                message = {}
                try:
                    await self._execute(name, requests[0])
                finally:
                    if packet.payload_bytes > LARGE_BYTES:
                        disposal.leave(requests.clear, who)
        except (PolicyError, InvalidRequest, Busy) as error:
            await self._refuse(error)

    async def _parse(self, packet: Packet) -> Run:
        """The run that *packet* asks for. A large one is looked at by another thread, whose time counts as well. Raises
        what ``parse_header`` raises.
        """
        header: dict[str, Any] = packet.message["run"]
        packet.message = {}
        if packet.payload_bytes <= LARGE_BYTES and packet.text_bytes <= LARGE_TEXT_BYTES:
            with self._share.counted():
                return parse_header(header, packet.take_bytes())
        begun = time.monotonic()
        try:
            return await in_thread(lambda: parse_header(header, packet.take_bytes()))
        finally:
            self._share.spent(begun)

    async def _execute(self, name: str | None, request: Run) -> None:
        """Run *request* and answer, with an eye on the client: when it speaks or leaves, the run ends."""
        self._lost = False
        if self._unread:
            await self._taken()
        self._running, self._interrupted = True, ""
        self._watch()
        try:
            prepared = await self._policies(name)
            header, texts, files = await self._engine.run(
                prepared,
                request,
                self._client,
                self._emit if request.stream else None,
                self._announce,
                self._notice,
                self._lend_tools,
                self._share,
            )
            self._running = False
            try:
                await self._send_result(header, texts, files)
            finally:
                files.close()
            if self._leases is not None:
                self._leases.want(prepared)
        except asyncio.CancelledError:
            if not self._interrupted:
                raise  # the engine closes
            assert self._task is not None  # noqa: S101
            self._task.uncancel()
            if self._interrupted == "cancel":
                self._running = False
                await self._refuse(ConnectionLost(False))
            raise _Gone("before its run began") from None
        except SandboxError as error:
            self._running = False
            await self._refuse(error)
        except OSError as error:
            self._running = False
            log.exception("a run failed")
            await self._refuse(Unavailable("engine", str(error), errno=error.errno, fix="look at the engine's log"))
        finally:
            self._running = False
            self._run_now = None
        if self._interrupted == "gone":
            raise _Gone("in the middle of its run")

    async def _direct(self, leases: Leases, operation: str, packet: Packet) -> None:
        """What a caller says of a cell that it holds itself."""
        message = packet.message
        identity = message.get("lease")
        if operation == "done":
            status = message.get("status")
            if not (isinstance(status, str) and status in STATUSES):
                raise ProtocolError("A run that is done says how it ended.")
            leases.done(identity, status)
        else:
            ago = message.get("seconds")
            if type(ago) is not float or not 0 <= ago < MOST_SECONDS:
                raise ProtocolError("A run that is handed back says for how long it has been running.")
            run = leases.reclaim(identity, ago)
            if run is None:
                await self._send({"op": "revoked", "lease": identity, "taken": True})
                return
            sizes = [_size(message.get(key)) for key in ("stdout", "stderr", "frame")]
            data = bytes(packet.take_bytes())
            if sum(sizes) != len(data):
                raise ProtocolError("A run's parts do not add up to its payload.")
            out, err = data[: sizes[0]], data[sizes[0] : sizes[0] + sizes[1]]
            await self._answer_taken(leases, run, out, err, data[sizes[0] + sizes[1] :])

    async def _answer_taken(self, leases: Leases, run: CellRun, out: bytes, err: bytes, frame: bytes) -> None:
        """Carry a run that its caller began to its end, and answer."""
        self._running, self._interrupted, self._run_now, self._lost = True, "", run, False
        self._watch()
        try:
            header, texts, files = await run.finish_leased(out, err, frame)
            self._running = False
            self._engine.tally.count(self._client.get("uid"), run.policy, header["status"])
            try:
                await self._send_result(header, texts, files)
            finally:
                files.close()
        except SandboxError as error:
            self._running = False
            await self._refuse(error)
        finally:
            self._running = False
            self._run_now = None
            leases.finish(run)
        if self._interrupted == "gone":
            raise _Gone("in the middle of its run")

    def _announce(self, run: CellRun) -> None:
        self._run_now = run

    def _interrupt(self) -> None:
        """The client spoke, or left, while its run was under way: the end of the run either way."""
        self._unwatch()
        try:
            with self._share.counted():
                packet = packets.receive(self._sock, inline=True, bounds=self._bounds, owner=self._client.get("uid"))
        except BlockingIOError:
            self._watch()
            return
        except (OSError, ProtocolError):
            packet = None
        self._interrupted = "gone"
        if packet is not None:
            if packet.message.get("op") == "cancel":
                self._interrupted = "cancel"
            packet.close()
        run = self._run_now
        if run is not None and not run.is_queued:
            run.cancel()  # without effect when only its result is left to be sent
        elif self._task is not None:
            self._task.cancel()  # still queued, or its policy is being made ready

    # Packets

    async def _emit(self, stream: int, data: bytes) -> None:
        try:
            for start in range(0, len(data), packets.INLINE_BYTES // 2):
                part = data[start : start + packets.INLINE_BYTES // 2]
                await self._send({"op": "output", "stream": stream}, [part])
        except _Gone:
            self._lost = True
            if self._run_now is not None:
                self._run_now.cancel()
            raise

    async def _lend_tools(self, run: str, fd: int) -> None:
        try:
            data = packets.with_descriptors({"op": "tools", "run": run})
        except BaseException:
            os.close(fd)
            raise
        await self._deliver([data], fd)

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
            if len(header["files"]) <= FEW_FILES:
                packed = self._with_files(message, header, texts, files)
            else:
                packed = await in_thread(self._with_files, message, header, texts, files, discard=_close_packed)
        except OSError as error:
            # The program ran: that must be told, with what there is.
            log.error("the files of run %s cannot be sent: %s", header["id"], error)
            header.update(status="internal", files=[], files_skipped=header["files_skipped"] + len(header["files"]))
            header.update(stdout=[0, len(texts[0])], stderr=[len(texts[0]), len(texts[1])])
            packed = packets.pack(message, texts)
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
        return packets.pack(message, filled=fd)

    async def _refuse(self, error: SandboxError) -> None:
        # The frames hold the request, and a task that holds the error; the payload is a mapping with a descriptor, and
        # must not wait for the collector.
        error.__traceback__ = error.__context__ = None
        await self._send({"op": "refused", "error": error.plain()})

    async def _send(self, message: dict[str, Any], payload: list[bytes] | None = None) -> None:
        await self._deliver(*packets.pack(message, payload or []))

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
                        packets.send_packed(self._sock, buffers, fd)
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
                disposal.close(fd, self._client.get("uid"))

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
            if not self._sees_all and disposal.pending(owner) > disposal.PENDING_MAX:
                raise ProtocolError("Descriptors that came with earlier packets cannot be closed.")
            with self._share.counted(), contextlib.suppress(BlockingIOError):
                packet = packets.receive(self._sock, inline=inline, bounds=self._bounds, owner=owner)
                self._engine.resources.held.did(packet.text_bytes if packet is not None else 0)
                return packet
            self._wake = self._loop.create_future()
            self._watch()
            try:
                await self._wake
            finally:
                self._wake = None

    def _watch(self) -> None:
        """Watch the socket: it stays watched from one packet to the next, for turning that on and off costs more than
        the packet.
        """
        if not self._watching:
            self._loop.add_reader(self._sock.fileno(), self._readable)
            self._watching = True

    def _unwatch(self) -> None:
        if self._watching:
            self._loop.remove_reader(self._sock.fileno())
            self._watching = False

    def _readable(self) -> None:
        if self._wake is not None:
            resolve(self._wake)
        elif self._running:
            self._interrupt()
        else:
            self._unwatch()  # its turn comes


def _close_packed(packed: tuple[list[Any], int]) -> None:
    """Nobody will send it."""
    os.close(packed[1])


def _size(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ProtocolError("A run's part has a length that is none.")
    return value


def _shorten(header: dict[str, Any]) -> None:
    """Leave out the last files when their names, which the program chose, are more than a message can hold."""
    room = packets.JSON_BYTES // 2
    files = header["files"]
    for index, entry in enumerate(files):
        room -= len(json.dumps(entry))
        if room < 0:
            header["files_skipped"] += len(files) - index
            del files[index:]
            return
