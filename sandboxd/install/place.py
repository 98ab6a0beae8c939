"""Which command the units start, and whether the service may use what stands there."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Final

from sandboxd._util.ownership import way
from sandboxd.errors import Unavailable

__all__ = ["command", "problem"]

_HIDDEN: Final = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - those that the unit covers
_FIX: Final = (
    "install it where root alone writes, with the system's own Python: /usr/bin/python3 -m venv /opt/sandboxd && "
    "/opt/sandboxd/bin/pip install SOURCE, sandboxd's source tree or wheel"
)


def command() -> list[str]:
    """How this installation is started: its script, else this interpreter with the package's name."""
    script = Path(sys.prefix, "bin", "sandboxd")
    return [str(script)] if os.access(script, os.X_OK) else [sys.executable, "-P", "-m", "sandboxd"]


def check(program: str) -> None:
    """Raises Unavailable unless the service of the system may use *program*, its interpreter and this package."""
    parts = {program, sys.executable, sys.base_prefix, str(Path(__file__).resolve().parents[1])}
    for path in sorted(parts):
        found = problem(path)
        if found:
            raise Unavailable("place", f"the service cannot be started from {path}: {found}", fix=_FIX)


def problem(path: str) -> str:
    """What keeps another user from using *path*, or gives others than root a hand in it; "" when nothing does."""
    try:
        for name in way(path):
            one, mode = name.path, stat.S_IMODE(name.status.st_mode)
            if str(one) in _HIDDEN:
                led = f", where {path} leads" if name.led else ""
                return f"the service does not see {one}{led}"
            if name.status.st_uid != 0:
                return f"{one} belongs to uid {name.status.st_uid}, who could change what the service runs"
            if stat.S_ISLNK(name.status.st_mode):
                continue
            if mode & 0o022 and not mode & stat.S_ISVTX:
                return f"{one} can be written by others (mode {mode:04o})"
            if not mode & 0o001 and (stat.S_ISDIR(name.status.st_mode) or name.last):
                return f"{one} is closed to the service's user (mode {mode:04o})"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return ""
