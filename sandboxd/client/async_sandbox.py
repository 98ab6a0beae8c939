"""AsyncSandbox: the same handle for asyncio. Packets are read and callbacks called on the caller's loop.

What did not fit into a packet came in a memfd, and may hold 100,000 names and megabytes of text that a program chose.
It is parsed in a thread: that takes up to some hundred milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar

from sandboxd._util.fdwait import readable, writable
from sandboxd.client.connections import CANCEL_SECONDS, DESCRIPTORS, counters
from sandboxd.client.sandbox import RUN_DEFAULTS, Sandbox
from sandboxd.errors import SandboxError, later
from sandboxd.protocol import packets
from sandboxd.protocol.operations import LAST, Operation

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from sandboxd.client.connections import Connection
    from sandboxd.client.exchange import Exchange, FileContent, TextCallback, ToolHost
    from sandboxd.client.handle import Handle
    from sandboxd.client.result import Result
    from sandboxd.policy import Limits, Policy
    from sandboxd.protocol.packets import Packet

__all__ = ["AsyncSandbox"]

R = TypeVar("R")


class AsyncSandbox:
    """A Sandbox whose methods are awaited; arguments and errors are those of Sandbox.

    The engine is started by ``async with``, or by the first run. Cancelling a task kills its run, then the cancellation
    goes on. To be used from one loop.
    """

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
    ) -> None:
        if isinstance(audit, str | os.PathLike) and str(audit):
            audit = os.path.abspath(audit)  # of this moment's working directory
        self._start = lambda: Sandbox(
            policy, limits=limits, max_running=max_running, memory_bytes=memory_bytes, ids=ids, pool=pool, audit=audit
        )
        self._declared: tuple[str | Path | Policy | None, Limits | None] = (policy, limits)
        self._init_state()

    @classmethod
    def connect(cls, address: str, *, policy: str | None = None, limits: Limits | None = None) -> Self:
        """On the daemon at *address*, which is called when it is first needed."""
        self = cls.__new__(cls)
        self._start = lambda: Sandbox.connect(address, policy=policy, limits=limits)
        self._declared = (None, limits)
        self._init_state()
        return self

    def _init_state(self) -> None:
        self._sandbox: Sandbox | None = None
        self._starting = asyncio.Lock()
        self._closed = False

    async def _opened(self) -> Handle:
        if self._closed:
            raise RuntimeError("This AsyncSandbox is closed.")
        async with self._starting:
            if self._closed:
                raise RuntimeError("This AsyncSandbox is closed.")
            if self._sandbox is None:
                start = _Start(self._start)
                try:
                    await asyncio.to_thread(start.run)
                except asyncio.CancelledError:
                    start.abandon()
                    raise
                self._sandbox = start.made
            assert self._sandbox is not None  # noqa: S101 (run's promise)
            return self._sandbox._handle

    async def run(
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
        """As ``Sandbox.run``."""
        handle = await self._opened()
        exchange = handle.exchange(
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
        return await self._perform(handle, exchange)

    async def _run_with_tools(self, code: str | bytes, tools: ToolHost, **arguments: Any) -> Result:
        """As ``Sandbox._run_with_tools``."""
        handle = await self._opened()
        try:
            exchange = handle.exchange(code, tools=tools, **{**RUN_DEFAULTS, **arguments})
            return await self._perform(handle, exchange)
        finally:
            tools.end()

    @staticmethod
    async def _perform(handle: Handle, exchange: Exchange) -> Result:
        connections = handle.connections
        while True:
            connection = connections.take()
            connection.sock.setblocking(False)
            try:
                result = await _drive(connection, exchange)
            except SandboxError as error:
                handle.failed(connection, exchange, error)
            except BaseException:
                if not exchange.answered:
                    await _cancel(connection.sock)
                connections.settle(connection, keep=False)
                raise
            else:
                connections.settle(connection, keep=True)
                return result

    async def stats(self) -> dict[str, Any]:
        """As ``Sandbox.stats``."""
        return counters(await asyncio.to_thread((await self._opened()).ask, Operation.STATS))

    def session(self, **_arguments: Any) -> NoReturn:
        """As ``Sandbox.session``: not in this version. Raises Unavailable."""
        raise later("sessions come")

    async def close(self) -> None:
        """As ``Sandbox.close``."""
        self._closed = True
        async with self._starting:  # what is being started must not stay behind
            sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            await asyncio.to_thread(sandbox.close)

    async def __aenter__(self) -> Self:
        await self._opened()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<AsyncSandbox {self._sandbox!r}>"


class _Start:
    """Makes a Sandbox in a thread, which cannot be stopped: one that nobody waits for any more is closed there, also
    when the loop is gone by then.
    """

    def __init__(self, make: Callable[[], Sandbox]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._unwanted = False
        self.made: Sandbox | None = None

    def run(self) -> None:
        """In the thread."""
        made = self._make()
        with self._lock:
            self.made = made
            unwanted = self._unwanted
        if unwanted:
            made.close()

    def abandon(self) -> None:
        """Nobody waits: close it now, or as soon as it is there."""
        with self._lock:
            self._unwanted = True
            made = self.made
        if made is not None:
            made.close()


async def _drive(connection: Connection, exchange: Exchange) -> Result:
    sock = connection.sock
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # as in Sandbox._drive
        if connection.fresh:
            await _send(sock, *packets.pack(packets.hello()))
        await _send(sock, *exchange.packet())
        exchange.sent = True

    def drop(packet: Packet | None) -> None:
        if packet is not None:
            exchange.note(packet)
            packet.close()

    while (packet := await _receive(sock, drop)) is not None:
        if await _feed(exchange, packet):
            assert exchange.result is not None  # noqa: S101 (feed's promise)
            return exchange.result
    raise exchange.lost()


async def _feed(exchange: Exchange, packet: Packet) -> bool:
    """``Exchange.feed``; a large result is read in a thread, once the callbacks have had the last output here."""
    if isinstance(packet.payload, bytes) or packet.message.get("op") != Operation.RESULT:
        return exchange.feed(packet)
    try:
        exchange.flush()
    except BaseException:
        exchange.note(packet)
        packet.close()
        raise

    def drop(_: object) -> None:
        if exchange.result is not None:
            exchange.result.close()

    return await _in_thread(partial(exchange.feed, packet), drop)


async def _in_thread(function: Callable[[], R], drop: Callable[[R], None]) -> R:
    """What *function* returns or raises, called in a thread. A cancellation waits for it, so that *drop* can free what
    it made. In a process that can start no thread it is called here.
    """
    try:
        call = asyncio.get_running_loop().run_in_executor(None, function)
    except RuntimeError:
        return function()
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        while not call.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((call,))
        if call.exception() is None:
            drop(call.result())
        raise


async def _cancel(sock: socket.socket) -> None:
    """Ask for the end of the run and wait for it, but not long; a second cancellation ends the wait."""
    with contextlib.suppress(OSError, SandboxError, TimeoutError):
        async with asyncio.timeout(CANCEL_SECONDS):
            await _send(sock, *packets.pack(packets.CANCEL))
            while (packet := await _receive(sock, _close)) is not None:
                packet.close()
                if packet.message.get("op") in LAST:
                    return


async def _send(sock: socket.socket, buffers: Sequence[Any], fd: int) -> None:
    try:
        while True:
            try:
                packets.send_packed(sock, buffers, fd)
                return
            except BlockingIOError:
                await writable(sock.fileno())
    finally:
        if fd >= 0:
            os.close(fd)


async def _receive(sock: socket.socket, drop: Callable[[Packet | None], None]) -> Packet | None:
    """The next packet; *drop* gets the one that was being parsed when this was cancelled."""
    while True:
        try:
            raw = packets.take(sock)
            break
        except BlockingIOError:
            await readable(sock.fileno())
        except ConnectionResetError:
            raw = packets.take(sock)  # as in connections
            break
    if raw is None:
        return None
    parse = partial(packets.parse, raw, descriptors=DESCRIPTORS)
    return await _in_thread(parse, drop) if raw.is_large else parse()


def _close(packet: Packet | None) -> None:
    if packet is not None:
        packet.close()
