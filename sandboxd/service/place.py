"""Which command the units start, and whether the service may use what stands there."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Final

from sandboxd.errors import Unavailable

__all__ = ["command", "problem"]

_HIDDEN: Final = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - those that the unit covers
_FIX: Final = (
    "install it where root alone writes: python3 -m venv /opt/sandboxd && /opt/sandboxd/bin/pip install sandboxd"
)


def command() -> list[str]:
    """How this installation is started: its script, else this interpreter with the package's name."""
    script = Path(sys.prefix, "bin", "sandboxd")
    return [str(script)] if os.access(script, os.X_OK) else [sys.executable, "-P", "-m", "sandboxd"]


def check(program: str) -> None:
    """Raises Unavailable unless the service of the system may use *program*, its interpreter and this package."""
    parts = {program, sys.executable, sys.base_prefix, str(Path(__file__).resolve().parent.parent)}
    for part in sorted(parts):
        for path in dict.fromkeys((part, os.path.realpath(part))):
            found = problem(path)
            if found:
                raise Unavailable("place", None, _FIX, f"the service cannot be started from {path}: {found}")


def problem(path: str) -> str:
    """What keeps another user from using *path*, or gives others than root a hand in it; "" when nothing does."""
    for place in _HIDDEN:
        if path == place or path.startswith(f"{place}/"):
            return f"the service does not see {place}"
    for one in [*reversed(Path(path).parents), Path(path)]:
        try:
            status = one.lstat()
        except OSError as error:
            return f"{one}: {error.strerror}"
        if stat.S_ISLNK(status.st_mode):
            continue  # its own mode says nothing; what it leads to is looked at, too
        if status.st_uid != 0:
            return f"{one} belongs to uid {status.st_uid}, who could change what the service runs"
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o022 and not mode & stat.S_ISVTX:
            return f"{one} can be written by others (mode {mode:04o})"
        if not mode & 0o001 and (one.is_dir() or one == Path(path)):
            return f"{one} is closed to the service's user (mode {mode:04o})"
    return ""
