"""The listening socket: bound by the daemon itself, or handed over by whoever started it (socket activation).

Who may connect is the file system's affair. A socket that was handed over belongs to its giver: it is neither unlinked
nor changed here, so that clients that connect while the daemon is started anew wait in its backlog.
Sources: unix(7); sd_listen_fds(3).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
from typing import TYPE_CHECKING, Final

from sandboxd.daemon.config import group_id
from sandboxd.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, MutableMapping
    from pathlib import Path

__all__ = ["BACKLOG", "handed_over", "listen"]

log = logging.getLogger("sandboxd")

BACKLOG: Final = 512
_FIRST_FD: Final = 3


def handed_over(environment: MutableMapping[str, str]) -> socket.socket | None:
    """The listening socket that LISTEN_PID and LISTEN_FDS speak of, None when they speak of none to this process.

    The variables are taken out of *environment*: they are for this process alone. Raises Unavailable for anything but
    one listening SOCK_SEQPACKET socket of AF_UNIX.
    """
    pid, count = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "")
    if pid != str(os.getpid()) or not count:
        return None
    if not (count.isascii() and count.isdigit()):
        raise _wrong(f"LISTEN_FDS is {count[:20]!r}, which is no number")
    if int(count) == 0:
        return None
    if int(count) != 1:
        raise _wrong(f"{count} sockets were handed over{f' ({names[:200]})' if names else ''} instead of one")
    os.set_inheritable(_FIRST_FD, False)
    try:
        if not stat.S_ISSOCK(os.fstat(_FIRST_FD).st_mode):
            raise _wrong(f"what was handed over as descriptor {_FIRST_FD} is no socket")
        sock = socket.socket(fileno=_FIRST_FD)
    except OSError as error:
        raise _wrong(f"descriptor {_FIRST_FD} was announced, but: {error}") from error
    kinds = {one.value: one.name for one in socket.SocketKind}
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_SEQPACKET:
        family = getattr(sock.family, "name", sock.family)
        what = f"the socket that was handed over is {family} {kinds.get(sock.type, sock.type)}"
        sock.detach()
        raise _wrong(f"{what}, not AF_UNIX SOCK_SEQPACKET")
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.detach()
        raise _wrong("the socket that was handed over does not listen (Accept=yes hands over connections)")
    return sock


def _wrong(what: str) -> Unavailable:
    fix = "in the socket unit: ListenSequentialPacket=PATH once, Accept=no and nothing else to listen on"
    return Unavailable("socket", what, errno=errno.EINVAL, fix=fix)


@contextlib.contextmanager
def listen(path: Path, group: str | None) -> Iterator[socket.socket]:
    """A bound SOCK_SEQPACKET socket at *path*, 0660, in a directory that is made 0750 when it is missing.

    A socket that a dead daemon left is replaced; a living one keeps its place (the lock beside it tells them apart).
    """
    gid = group_id(group)
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(mode=0o750, parents=True)
            os.chmod(path.parent, 0o750)  # noqa: S103 - members of the group may enter
            _give(path.parent, gid)
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise Unavailable(
            "socket", f"{path}: {error}", errno=error.errno, fix="choose another --socket, or run as root"
        ) from error
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        _take(lock, path)
        try:
            try:
                _bind(sock, path, gid)
            except OSError as error:
                fix = "choose another --socket, or run as root"
                raise Unavailable("socket", f"{path}: {error}", errno=error.errno, fix=fix) from error
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
        raise Unavailable("socket", f"a daemon serves {path} already", errno=errno.EADDRINUSE, fix=fix)


def _bind(sock: socket.socket, path: Path, gid: int) -> None:
    """Take the name *path* for *sock*. Raises OSError, Unavailable."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise Unavailable("socket", f"{path} is there and is no socket", errno=errno.EEXIST, fix="move it away")
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
            raise Unavailable("socket", f"{path} was replaced", errno=errno.EEXIST, fix="choose a directory of root's")
        _give(f"/proc/self/fd/{bound}", gid)
        os.chmod(f"/proc/self/fd/{bound}", 0o660)
    finally:
        os.close(bound)


def _give(path: str | Path, gid: int) -> None:
    """Make *gid* the group of *path*; -1 changes nothing. Who is not root can do so for groups of its own, chown(2)."""
    try:
        os.chown(path, -1, gid)
    except PermissionError:
        if os.geteuid() == 0:
            raise
        log.warning("only this user and root can connect: this user is no member of the group %d", gid)
