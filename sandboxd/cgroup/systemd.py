"""What an engine asks of systemd: a delegated scope of its own, and whether a unit was delegated to what runs in it.

Over the manager's private socket, which is there without any bus daemon: root's is /run/systemd/private, a user's lies
in $XDG_RUNTIME_DIR. The process to move is named as the one that holds the connection (pid 0), never by a number, which
another pid namespace would read otherwise.

Source: org.freedesktop.systemd1(5); systemd.io/CONTROL_GROUP_INTERFACE; systemd.io/CGROUP_DELEGATION.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sandboxd.cgroup.dbus import CallError, Connection, Writer
from sandboxd.cgroup.discovery import CONTROLLERS

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Refused", "is_manager", "private_socket", "start_scope", "unit_is_delegated"]

_SECONDS: Final = 10.0  # a scope takes 5 ms on an idle host
_SERVICE: Final = "org.freedesktop.systemd1"
_ROOT: Final = "/org/freedesktop/systemd1"
_ENDLESS: Final = (1 << 64) - 1


class Refused(Exception):
    """systemd cannot be asked, or said no: why, in its own words."""


def is_manager() -> bool:
    """Whether systemd runs here, and so owns every cgroup that it did not delegate. Source: sd_booted(3)."""
    return os.path.isdir("/run/systemd/system")


def private_socket(uid: int) -> Path:
    """Where the manager of *uid* listens."""
    if uid == 0:
        return Path("/run/systemd/private")
    return Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{uid}") / "systemd/private"


@contextmanager
def _manager(path: Path | None) -> Iterator[Connection]:
    where = private_socket(os.geteuid()) if path is None else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
            connection = Connection(sock, time.monotonic() + _SECONDS)
            sock.connect(os.fspath(where))
            # pid, uid, gid; 0 is a process that our pid namespace does not show, so neither is our cgroup its.
            pid, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if not pid or uid not in (0, os.geteuid()):
                raise Refused(f"{where}: not this system's manager but process {pid} of uid {uid}")
            connection.authenticate()
            yield connection
    except CallError as error:
        raise Refused(str(error)) from error
    except TimeoutError:
        raise Refused(f"{where}: no answer within {_SECONDS:g} s") from None
    except OSError as error:
        raise Refused(f"{where}: {error.strerror or error}") from error
    except (ValueError, IndexError, struct.error) as error:
        raise Refused(f"{where}: the answer is no D-Bus message") from error


def start_scope(name: str, description: str, path: Path | None = None) -> None:
    """Move this process, alone, into a new scope *name* with CONTROLLERS delegated; returns when it is there.

    The scope sets no limit of its own, ends nothing after an OOM kill below it, and goes when its last process does.
    *path* is the manager's socket. Raises Refused, after at most 10 s.
    """
    properties: dict[str, tuple[str, object]] = {
        "Description": ("s", description),
        "PIDs": ("au", [0]),
        "DelegateControllers": ("as", list(CONTROLLERS)),
        "CollectMode": ("s", "inactive-or-failed"),
        "TasksMax": ("t", _ENDLESS),
        "OOMPolicy": ("s", "continue"),
    }
    with _manager(path) as connection:
        try:
            job = _start(connection, name, properties)
        except CallError as error:
            if "OOMPolicy" not in str(error):
                raise
            del properties["OOMPolicy"]  # scopes have it since systemd 253
            job = _start(connection, name, properties)
        while True:
            message = connection.next()  # a manager tells its direct connections of every job
            if message.is_signal("JobRemoved"):
                message.body.number()
                ended, _unit, result = (message.body.string() for _ in range(3))
                if ended == job:
                    break
    if result != "done":
        raise Refused(f"the start of {name} ended as {result!r}; see journalctl --unit {name}")


def _start(connection: Connection, name: str, properties: dict[str, tuple[str, object]]) -> str:
    """StartTransientUnit; returns the job's path."""
    body = Writer()
    body.string(name)
    body.string("fail")  # when the name is taken
    at = body.array(8)
    for key, (kind, value) in properties.items():
        body.align(8)
        body.string(key)
        body.variant(kind, value)
    body.end(at, 8)
    body.end(body.array(8), 8)  # no further units
    method = f"{_SERVICE}.Manager.StartTransientUnit"
    return connection.call(_SERVICE, _ROOT, method, "ssa(sv)a(sa(sv))", body).body.string()


def unit_is_delegated(unit: str, path: Path | None = None) -> bool:
    """Whether the manager of this user handed the cgroup of *unit*, a service or scope, over to what runs in it.

    A user's manager does not mark the directory, so there is nothing else to see it by. Raises Refused.
    """
    kind = unit.rpartition(".")[2].capitalize()
    escaped = "".join(c if c.isascii() and c.isalnum() else "".join(f"_{b:02x}" for b in c.encode()) for c in unit)
    body = Writer()
    body.string(f"{_SERVICE}.{kind}")
    body.string("Delegate")
    with _manager(path) as connection:
        answer = connection.call(_SERVICE, f"{_ROOT}/unit/{escaped}", "org.freedesktop.DBus.Properties.Get", "ss", body)
        return bool(answer.body.variant())
