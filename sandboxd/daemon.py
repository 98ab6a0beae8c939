"""The daemon: one engine behind a Unix socket, for clients that its operator lets in.

Who may connect is the file system's affair: the socket is 0660 in a directory of 0750, both of group `sandboxd`. Who
connected is the kernel's word (SO_PEERCRED). A client names an installed policy and may narrow its limits; it never
sends a path, a policy's text or an interpreter. SIGTERM and SIGINT end the daemon: runs are killed, nothing stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import grp
import json
import logging
import os
import signal
import socket
import stat
import struct
import sys
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sandboxd import protocol
from sandboxd.engine.config import AuditSettings, EngineConfig
from sandboxd.engine.connection import Connection
from sandboxd.engine.core import Engine
from sandboxd.errors import Busy, PolicyError, SandboxError, Unavailable
from sandboxd.ids import parse_config as parse_range
from sandboxd.limits import LIMITS, parse, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.engine.prepared import Prepared

__all__ = ["Daemon", "DaemonConfig", "load_config", "main"]

log = logging.getLogger("sandboxd")

SOCKET: Final = Path("/run/sandboxd/sandboxd.sock")
CONFIG: Final = Path("/etc/sandboxd/sandboxd.toml")
GROUP: Final = "sandboxd"
CLIENTS_SHARE: Final = 4
"""One uid may have this part of max_clients."""
PAUSE_SECONDS: Final = 0.1
CLOSE_SECONDS: Final = 2.0
AUDIT: Final = Path("/var/log/sandboxd/audit.jsonl")
_ENGINE_KEYS: Final = ("max_running", "max_queued", "max_clients", "memory_bytes", "pids", "ids", "pool", "audit")
_UCRED: Final = struct.Struct("=iII")


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """The configuration file's keys; a command line option for the socket goes before it."""

    socket: Path = SOCKET
    group: str | None = GROUP
    policies_dir: Path | None = None
    default_policy: str = "default"
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(audit=AuditSettings(str(AUDIT))))


def load_config(path: Path | None) -> DaemonConfig:
    """Read a TOML file; without *path* the default one if it is there. Raises PolicyError that names file and key."""
    chosen = path or CONFIG
    try:
        return _read_config(chosen, path is None)
    except PolicyError as error:
        from sandboxd.policy import located

        raise located(error, chosen) from None


def _read_config(chosen: Path, may_be_missing: bool) -> DaemonConfig:
    try:
        with open(chosen, "rb") as file:
            table = tomllib.load(file)
    except FileNotFoundError:
        if may_be_missing:
            return DaemonConfig()
        raise PolicyError("there is no such file", file=str(chosen)) from None
    except (OSError, ValueError) as error:
        raise PolicyError(f"it cannot be read: {error}", file=str(chosen)) from None
    known = ("socket", "group", "policies_dir", "default_policy", *_ENGINE_KEYS)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise PolicyError(f"{key!r} is not a setting. They are {', '.join(known)}.", key=key)
        if key not in _ENGINE_KEYS and not (isinstance(value, str) and value):
            raise PolicyError(f"{key} must be a string, not {shown(value)}.", key=key)
        values[key] = value
    if "memory_bytes" in values:
        values["memory_bytes"] = _size("memory_bytes", values["memory_bytes"])
    values["audit"] = _audit(values.get("audit", {}))
    engine = EngineConfig.from_plain({key: values.pop(key) for key in _ENGINE_KEYS if key in values})
    if engine.ids is not None:
        try:
            parse_range(engine.ids)
        except ValueError as error:
            raise PolicyError(f"{error}.", key="ids") from None
    for key in ("socket", "policies_dir"):
        if key in values:
            values[key] = Path(values[key])
    config = DaemonConfig(**values, engine=engine)
    if "group" in values:
        _gid(config.group)
    if config.policies_dir is not None and not (config.policies_dir.is_absolute() and config.policies_dir.is_dir()):
        what = f"policies_dir must be the absolute path of a directory that exists, not {shown(values['policies_dir'])}"
        raise PolicyError(f"{what}.", key="policies_dir")
    if "default_policy" in values:
        _find(config, config.default_policy, "default_policy")
    return config


def _size(key: str, value: object) -> int:
    """Bytes from a number or a string such as "4G". Raises PolicyError."""
    limit = LIMITS["memory_bytes"]
    try:
        return int(parse(limit.name, value) or 0)
    except PolicyError:
        raise PolicyError(f"{key}: {shown(value)} is not allowed; allowed: {limit.allowed}.", key=key) from None


def _audit(table: object) -> dict[str, Any] | None:
    """[audit] as the engine's setting: on unless ``enabled`` is false. Raises PolicyError."""
    if not isinstance(table, dict):
        raise PolicyError(f"audit must be a table, [audit], not {shown(table)}.", key="audit")
    plain: dict[str, Any] = {"path": str(AUDIT), **table}
    enabled = plain.pop("enabled", True)
    if type(enabled) is not bool:
        raise PolicyError(f"audit.enabled must be true or false, not {shown(enabled)}.", key="audit.enabled")
    if "max_bytes" in plain:
        try:
            plain["max_bytes"] = int(parse("workspace_bytes", plain["max_bytes"]) or 0)
        except PolicyError:
            what = f"{shown(plain['max_bytes'])} is not allowed; allowed: {LIMITS['workspace_bytes'].allowed}"
            raise PolicyError(f"audit.max_bytes: {what}.", key="audit.max_bytes") from None
    AuditSettings.from_plain(plain)  # also when it is off: a mistake should not wait until it is on
    return plain if enabled else None


def _make_directory(settings: AuditSettings) -> None:
    """The directory of the audit record, 0700 when it is made here. Raises Unavailable where the record must be."""
    path = Path(settings.path)
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        if settings.on_failure == "continue":
            return  # that it cannot be opened will be logged
        raise Unavailable("audit", error.errno, "make the directory of the audit record", str(path.parent)) from error


def _find(config: DaemonConfig, name: str, key: str | None = None) -> Path:
    """The file of the policy *name*: of policies_dir, then the shipped ones. Raises PolicyError, for *key*."""
    from sandboxd.policy import find, policies_dir

    try:
        return find(name, None if config.policies_dir is None else [config.policies_dir, policies_dir()])
    except PolicyError as error:
        raise PolicyError(error.message, key=key) from None


def _read_policy(config: DaemonConfig, name: str) -> dict[str, Any]:
    """The plain values of the installed policy *name*. For a thread: pydantic takes a third of a start, and the
    engine works meanwhile. Raises PolicyError.
    """
    from sandboxd.policy import load

    file = _find(config, name)
    found = load(file)
    if found.name != name:
        raise PolicyError(f"The file of the policy {name!r} names itself {found.name!r}.", file=str(file), key="name")
    return found.plain()


class Daemon:
    """The engine, its listener and its clients."""

    def __init__(self, config: DaemonConfig) -> None:
        self._config = config
        self._engine = Engine(config.engine)
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[str] = self._loop.create_future()
        self._clients: set[asyncio.Task[None]] = set()
        self._per_uid: Counter[int] = Counter()
        self._plain: dict[str, dict[str, Any]] = {}

    async def serve(self) -> None:
        """From start to SIGTERM or SIGINT. Raises SandboxError when it cannot start."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop, signal.Signals(number).name)
        with contextlib.ExitStack() as undo:
            listener = undo.enter_context(listen(self._config.socket, self._config.group))
            if (audit := self._config.engine.audit) is not None:
                _make_directory(audit)
            self._engine.start()
            try:
                self._engine.foresee(likely=self._config.default_policy == "default")
                # The default policy, proved sealed, before anybody is let in.
                await self._check_network(await self._policy(None))
                listener.listen(512)
                listener.setblocking(False)
                self._loop.add_reader(listener.fileno(), self._accept, listener)
                log.info("ready on %s", self._config.socket)
                log.info("stopped by %s", await self._over)
            finally:
                self._loop.remove_reader(listener.fileno())
                # The clients first: a run that the daemon's end kills has no result, its client gets ConnectionLost.
                for task in list(self._clients):
                    task.cancel()
                if self._clients:
                    await asyncio.wait(self._clients, timeout=CLOSE_SECONDS)
                await self._engine.close()

    def _stop(self, name: str) -> None:
        if not self._over.done():
            self._over.set_result(name)

    async def _check_network(self, prepared: Prepared) -> None:
        """Ask the kernel by rtnetlink what the zygote's network namespace holds; in a process of its own, for pyroute2
        is large and no run needs it.
        """
        command = [sys.executable, "-m", "sandboxd.netns_check", f"/proc/{prepared.zygote.pid}/ns/net"]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, stdout=pipe, stderr=pipe, stdin=asyncio.subprocess.DEVNULL
        )
        said, complaint = await asyncio.wait_for(process.communicate(), 30)
        if process.returncode != 0 or json.loads(said):
            fix = "a new network namespace must hold nothing but lo, down; see sandboxd doctor"
            what = (said or complaint).decode("utf-8", "replace").strip()[-500:]
            raise Unavailable("self-test", None, fix, f"the cells' network namespace is not empty: {what}")

    async def _policy(self, name: str | None) -> Prepared:
        """An installed policy by its name, in force: of policies_dir, then the shipped ones. Files are read when first
        asked for, and again by a restart.
        """
        chosen = name or self._config.default_policy
        if chosen not in self._plain:
            self._plain[chosen] = await asyncio.to_thread(_read_policy, self._config, chosen)
        return await self._engine.prepared(chosen, self._plain[chosen])

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
        full = len(self._clients) >= most and uid != 0  # the operator gets in to look
        sees_all = uid in (0, os.geteuid())
        stuck = not sees_all and protocol.closing(uid) > protocol.CLOSING_MAX
        if full or stuck or self._per_uid[uid] >= max(1, most // CLIENTS_SHARE):
            why = "descriptors that it sent cannot be closed" if stuck else "too many connections"
            log.warning("client uid %d pid %d: turned away, %s", uid, pid, why)
            with contextlib.suppress(OSError):
                sock.setblocking(False)
                protocol.send(sock, {"op": "refused", "error": Busy(1.0).plain()})
            protocol.hang_up(sock, uid)
            return
        connection = Connection(self._engine, sock, {"uid": uid, "pid": pid}, self._policy, sees_all)
        task = self._loop.create_task(connection.serve())
        self._clients.add(task)
        self._per_uid[uid] += 1
        task.add_done_callback(lambda done: self._left(done, uid, connection))

    def _listen_again(self, listener: socket.socket) -> None:
        if not self._over.done():
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    def _left(self, task: asyncio.Task[None], uid: int, connection: Connection) -> None:
        connection.hang_up()  # a task that was cancelled before it began did not
        self._clients.discard(task)
        self._per_uid[uid] -= 1
        if not self._per_uid[uid]:
            del self._per_uid[uid]
        if not task.cancelled() and task.exception() is not None:
            log.error("a client's connection ended with an error", exc_info=task.exception())


@contextlib.contextmanager
def listen(path: Path, group: str | None) -> Iterator[socket.socket]:
    """A bound SOCK_SEQPACKET socket at *path*, 0660, in a directory that is made 0750 when it is missing.

    A socket that a dead daemon left is replaced; a living one keeps its place (the lock beside it tells them apart).
    """
    gid = _gid(group)
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(mode=0o750, parents=True)
            os.chmod(path.parent, 0o750)  # noqa: S103 - members of the group may enter
            os.chown(path.parent, os.geteuid(), gid)
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise Unavailable(
            "socket", error.errno, "choose another --socket, or run as root", f"{path}: {error}"
        ) from error
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        _take(lock, path)
        try:
            try:
                _bind(sock, path, gid)
            except OSError as error:
                fix = "choose another --socket, or run as root"
                raise Unavailable("socket", error.errno, fix, f"{path}: {error}") from error
            try:
                yield sock
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{path}.lock")
    finally:
        sock.close()
        os.close(lock)


def _take(lock: int, path: Path) -> None:
    """Lock the file beside *path*. Raises Unavailable when a daemon has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The name may have gone with a daemon that ended just now; a lock on a nameless file excludes nobody.
        ours = os.fstat(lock).st_ino == os.stat(f"{path}.lock").st_ino
    except (BlockingIOError, FileNotFoundError):
        ours = False
    if not ours:
        fix = "connect to it, or give this one another --socket"
        raise Unavailable("socket", errno.EADDRINUSE, fix, f"a daemon serves {path} already")


def _bind(sock: socket.socket, path: Path, gid: int) -> None:
    """Take the name *path* for *sock*. Raises OSError, Unavailable."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise Unavailable("socket", errno.EEXIST, "move it away", f"{path} is there and is no socket")
        os.unlink(path)
    before = os.umask(0o177)
    try:
        sock.bind(str(path))
    finally:
        os.umask(before)
    # By descriptor: where others may write in the directory, the name could be a link to somewhere else by now.
    bound = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(bound).st_mode):
            raise Unavailable("socket", errno.EEXIST, "choose a directory of root's", f"{path} was replaced")
        os.chown(f"/proc/self/fd/{bound}", -1, gid)
        os.chmod(f"/proc/self/fd/{bound}", 0o660)
    finally:
        os.close(bound)


def _gid(group: str | None) -> int:
    """The group's id; -1, which changes nothing, when the default group was never made."""
    if group is None:
        return -1
    try:
        gid = grp.getgrnam(group).gr_gid
        if group == GROUP and os.geteuid() != 0 and gid not in (os.getegid(), *os.getgroups()):
            return -1  # an ordinary user's own daemon, which nobody gave a group: its user connects
        return gid
    except KeyError:
        if group == GROUP:
            if os.geteuid() == 0:
                log.warning("there is no group %s: only root can connect; groupadd --system %s", group, group)
            return -1
        raise PolicyError(f"there is no group {group!r} on this host.", key="group") from None


def main(config_path: str | Path | None, socket_path: str | Path | None) -> int:
    """Serve until SIGTERM or SIGINT; the exit status: 2 when a policy is wrong, 125 when the host cannot. Logs go to
    stderr. Raises PolicyError for a wrong configuration.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="sandboxd: %(levelname)s: %(message)s")
    config = load_config(None if config_path is None else Path(config_path))
    if socket_path is not None:
        config = DaemonConfig(
            socket=Path(socket_path),
            group=config.group,
            policies_dir=config.policies_dir,
            default_policy=config.default_policy,
            engine=config.engine,
        )
    os.umask(0o022)

    async def serve() -> None:
        await Daemon(config).serve()

    try:
        asyncio.run(serve())
    except SandboxError as error:
        log.error("%s", error)
        return 2 if isinstance(error, PolicyError) else 125
    return 0
