"""Serving: the engine, its listener and its clients, from the start to the end of the drain.

The event loop is the daemon's only thread that touches them. Signals only set something in motion: SIGTERM and SIGINT
the drain, and its end when they come again; SIGHUP a reload.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import faulthandler
import logging
import os
import signal
import socket
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sandboxd._util import disposal
from sandboxd.daemon import journal, watchdog
from sandboxd.daemon.config import DaemonConfig, find_policy, load_config
from sandboxd.daemon.listening import BACKLOG, handed_over, listen
from sandboxd.daemon.network import NetworkCheck
from sandboxd.daemon.notify import Notifier
from sandboxd.daemon.policy_cache import plain_policy
from sandboxd.daemon.reload import plan
from sandboxd.engine import held_time
from sandboxd.engine.cells.zygote import ZygoteLost
from sandboxd.engine.clients.connection import Connection
from sandboxd.engine.collecting import collect_when_idle
from sandboxd.engine.engine import Engine
from sandboxd.errors import Busy, PolicyError, SandboxError, Unavailable
from sandboxd.protocol import packets
from sandboxd.protocol.operations import Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from sandboxd.engine.cells.active_policy import ActivePolicy
    from sandboxd.engine.config import AuditSettings

__all__ = ["Daemon", "main"]

log = logging.getLogger("sandboxd")

CLIENTS_SHARE: Final = 4
"""One uid may have this part of max_clients."""
PAUSE_SECONDS: Final = 0.1
CLOSE_SECONDS: Final = 2.0
TELL_SECONDS: Final = 0.2
"""So long a drain waits at least: those who are turned away are told."""
STOP_SECONDS: Final = 15.0
"""What the end takes at most beside the drain: clients, cells, zygotes."""
POLICY_SECONDS: Final = 90.0
"""What one policy takes at most to be brought into force."""
_UCRED: Final = struct.Struct("=iII")


def _make_directory(settings: AuditSettings) -> None:
    """The directory of the audit record, 0700 when it is made here. Raises Unavailable where the record must be."""
    path = Path(settings.path)
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        if settings.on_failure == "continue":
            return  # that it cannot be opened will be logged
        fix = "make the directory of the audit record, or name another file as path in [audit] of the configuration"
        raise Unavailable("audit", str(path.parent), errno=error.errno, fix=fix) from error


class Daemon:
    """The engine, its listener and its clients.

    *reread* gives the configuration as the files say now; *given* is a listening socket that somebody else bound.
    """

    def __init__(
        self,
        config: DaemonConfig,
        reread: Callable[[], DaemonConfig] | None = None,
        given: socket.socket | None = None,
        notifier: Notifier | None = None,
    ) -> None:
        self._config = config
        self._reread = reread or (lambda: config)
        self._given = given
        self._notifier = notifier or Notifier({})
        self._engine = Engine(config.engine)
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[str] = self._loop.create_future()
        self._at_once: asyncio.Future[str] = self._loop.create_future()
        self._clients: dict[asyncio.Task[None], Connection] = {}
        self._per_uid: Counter[int] = Counter()
        self._plain: dict[str, dict[str, Any]] = {}
        self._own_tasks: set[asyncio.Task[None]] = set()
        self._reloading = asyncio.Lock()
        self._hung_up = 0

    async def serve(self) -> None:
        """From start to SIGTERM or SIGINT. Raises SandboxError when it cannot start."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop, signal.Signals(number).name)
        self._hung_up = 1  # a SIGHUP from now on is for after the start
        self._loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        with contextlib.ExitStack() as undo:
            if self._given is not None:
                listener = undo.enter_context(contextlib.closing(self._given))
            else:
                listener = undo.enter_context(listen(self._config.socket, self._config.group))
            if (audit := self._config.engine.audit) is not None:
                _make_directory(audit)
            self._engine.start()
            try:
                self._engine.prestart(likely=self._config.default_policy == "default")
                # The default policy, proved sealed, before anybody is let in.
                self._notifier.extend(POLICY_SECONDS)
                async with NetworkCheck() as network:
                    await network.ask((await self._policy(None)).zygote.pid)
                if self._given is None:
                    listener.listen(BACKLOG)
                listener.setblocking(False)
                self._loop.add_reader(listener.fileno(), self._accept, listener)
                collect_when_idle(lambda: not self._engine.live)
                log.info("ready on %s", listener.getsockname())
                self._notifier.ready(self._status())
                self._begin()
                log.info("stopped by %s", await self._over)
                await self._drain(listener)
            finally:
                self._loop.remove_reader(listener.fileno())
                for own in self._own_tasks:
                    own.cancel()
                if self._own_tasks:
                    await asyncio.wait(self._own_tasks, timeout=CLOSE_SECONDS)
                # The clients first: a run that the daemon's end kills has no result, its client gets ConnectionLost.
                for task in list(self._clients):
                    task.cancel()
                if self._clients:
                    await asyncio.wait(self._clients, timeout=CLOSE_SECONDS)
                await self._engine.close()

    def _begin(self) -> None:
        """What goes on beside the clients, from ready on."""
        early, self._hung_up = self._hung_up > 1, 0
        if early:
            self._hang_up()
        if self._notifier.watchdog_seconds:
            self._own(watchdog.watch(self._notifier, lambda: self._engine.served, self._probe))

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._own_tasks.add(task)
        task.add_done_callback(self._own_tasks.discard)

    async def _probe(self) -> None:
        await self._engine.policies.probe(await self._policy(None))

    def _status(self) -> str:
        return f"Serving; policies in force: {', '.join(sorted(self._plain))}"

    # The end

    def _stop(self, name: str) -> None:
        for future in (self._over, self._at_once):
            if not future.done():
                future.set_result(name)
                return

    async def _drain(self, listener: socket.socket) -> None:
        """No new runs; those that are under way may end, for drain_seconds or until a second signal."""
        seconds = self._config.drain_seconds
        running = len(self._engine.live)
        self._notifier.stopping(f"Waiting up to {seconds:g} s for {running} runs" if running else "Stopping")
        self._notifier.extend(seconds + STOP_SECONDS)
        if self._given is not None:
            self._loop.remove_reader(listener.fileno())  # who comes now waits for the next daemon
        self._engine.drain()
        for connection in list(self._clients.values()):
            connection.drain()
        until = self._loop.time() + max(seconds, TELL_SECONDS)
        while self._clients and (left := until - self._loop.time()) > 0 and not self._at_once.done():
            waited: set[asyncio.Future[Any]] = {*self._clients, self._at_once}
            await asyncio.wait(waited, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if self._engine.live:
            why = f"{self._at_once.result()} again" if self._at_once.done() else f"{seconds:g} s are over"
            log.warning("runs that are killed now, for %s: %d", why, len(self._engine.live))

    # Reload

    def _hang_up(self) -> None:
        """SIGHUP. One that comes while one is waiting to be served is the same wish."""
        self._hung_up += 1
        if self._hung_up == 1:
            self._own(self._serve_hang_up())

    async def _serve_hang_up(self) -> None:
        async with self._reloading:
            self._hung_up = 0
            with contextlib.suppress(SandboxError):  # it was logged
                await self._reload()

    async def _asked_to_reload(self) -> list[str]:
        async with self._reloading:
            return await self._reload()

    async def _reload(self) -> list[str]:
        """Read the files again, check everything, and change to it. Raises SandboxError; all is as before then."""
        if self._over.done():
            raise Busy(1.0)
        self._notifier.reloading()
        try:
            said = await self._change()
        except (SandboxError, ZygoteLost, OSError) as error:
            for line in str(error).splitlines():
                log.error("not reloaded, everything is as before: %s", line)
            self._notifier.ready(f"Not reloaded: {error}")
            if isinstance(error, SandboxError):
                raise
            raise Unavailable(
                "reload", str(error), errno=getattr(error, "errno", None), fix="look at the daemon's log"
            ) from error
        log.info("reloaded; %s", "; ".join(said) or "nothing has changed")
        self._notifier.ready(self._status())
        return said

    async def _change(self) -> list[str]:
        # What was asked for but could not be brought into force, or is about to be, is read again when it is asked for.
        hashes = {name: self._engine.policies.filter_hash(name) for name in self._plain}
        idle = [name for name, sha256 in hashes.items() if not sha256]
        in_force = {name: (plain, hashes[name]) for name, plain in self._plain.items() if hashes[name]}
        planned = await asyncio.to_thread(lambda: plan(self._config, self._reread(), in_force))
        self._notifier.extend(POLICY_SECONDS * (1 + len(planned.changed)))
        await self._engine.policies.replace(planned.changed, [*planned.removed, *idle])
        # Nothing suspends from here on: who asks for a policy gets all of the old or all of the new.
        self._config = planned.config
        self._engine.config = replace(
            self._engine.config,
            max_clients=planned.config.engine.max_clients,
            max_queued=planned.config.engine.max_queued,
        )
        for name in [*planned.removed, *idle]:
            self._plain.pop(name, None)
        self._plain.update(planned.changed)
        return planned.said

    # Clients

    async def _policy(self, name: str | None) -> ActivePolicy:
        """An installed policy by its name, in force: of policies_dir, then the shipped ones. Files are read when first
        asked for, and again by a reload.
        """
        chosen = name or self._config.default_policy
        if chosen not in self._plain:
            async with self._reloading:
                if chosen not in self._plain:
                    config = self._config
                    # In a thread: for a text that is new pydantic is imported, and the engine works meanwhile.
                    self._plain[chosen] = await asyncio.to_thread(
                        lambda: plain_policy(find_policy(config, chosen), chosen)
                    )
        return await self._engine.policies.get(chosen, self._plain[chosen])

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno == errno.ECONNABORTED:
                return
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                raise
            # The listener stays readable: without a pause this would be called again at once.
            log.warning("no client can be let in for a moment: %s", error)
            self._loop.remove_reader(listener.fileno())
            self._loop.call_later(PAUSE_SECONDS, self._listen_again, listener)
            return
        pid, uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        most = self._config.engine.max_clients
        sees_all = uid in (0, os.geteuid())
        full = len(self._clients) >= most and not sees_all  # the operator gets in, to look and to reload
        stuck = not sees_all and disposal.pending(uid) > disposal.PENDING_MAX
        if self._over.done() or full or stuck or self._per_uid[uid] >= max(1, most // CLIENTS_SHARE):
            why = "descriptors that it sent cannot be closed" if stuck else "too many connections"
            if not self._over.done():
                log.warning("client uid %d pid %d: turned away, %s", uid, pid, why)
            with contextlib.suppress(OSError):
                sock.setblocking(False)
                packets.send(sock, {"op": Operation.REFUSED, "error": Busy(1.0).plain()})
            disposal.close_socket(sock, uid)
            return
        connection = Connection(
            self._engine, sock, {"uid": uid, "pid": pid}, self._policy, sees_all, reload=self._asked_to_reload
        )
        task = self._loop.create_task(connection.serve())
        self._clients[task] = connection
        self._per_uid[uid] += 1
        task.add_done_callback(lambda done: self._left(done, uid, connection))

    def _listen_again(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0 and not (self._over.done() and self._given is not None):
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    def _left(self, task: asyncio.Task[None], uid: int, connection: Connection) -> None:
        connection.hang_up()  # a task that was cancelled before it began did not
        del self._clients[task]
        self._per_uid[uid] -= 1
        if not self._per_uid[uid]:
            del self._per_uid[uid]
        if not task.cancelled() and task.exception() is not None:
            log.error("a client's connection ended with an error", exc_info=task.exception())


def main(config_path: str | Path | None, socket_path: str | Path | None) -> int:
    """Serve until SIGTERM or SIGINT; the exit status: 2 when a policy is wrong, 125 when the host cannot. Logs go to
    stderr. Raises PolicyError for a wrong configuration, Unavailable for a socket of a wrong kind.
    """
    journal.configure(os.environ)
    faulthandler.enable()  # a watchdog's SIGABRT tells where the loop hangs
    notifier = Notifier(os.environ)
    given = handed_over(os.environ)
    if given is not None and socket_path is not None:
        fix = "leave out --socket: the socket unit names the path"
        raise Unavailable(
            "socket", "a socket was handed over, and --socket names another one", errno=errno.EINVAL, fix=fix
        )

    def read() -> DaemonConfig:
        config = load_config(None if config_path is None else Path(config_path))
        return config if socket_path is None else replace(config, socket=Path(socket_path))

    config = read()
    os.umask(0o022)

    async def serve() -> None:
        await Daemon(config, read, given, notifier).serve()

    try:
        held_time.run(serve)
    except SandboxError as error:
        log.error("%s", error)
        notifier.status(str(error))
        return 2 if isinstance(error, PolicyError) else 125
    return 0
