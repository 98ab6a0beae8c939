"""What was worked out once, kept on disk: compiled filters, checked policies. Importing the libraries that make them is
a good part of an engine's start.

Runs in the engine, as the engine. A filter from a file that somebody else could have written would be no wall
(firejail once kept its own in a writable directory), so nothing is believed for its name: the directory and the file
must belong to the effective user and be closed to everybody else, and whatever is odd is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MOST_BYTES", "cache_directory", "cached"]

MAGIC: Final = b"sandboxd cache\n"
HEAD_BYTES: Final = len(MAGIC) + hashlib.sha256().digest_size
MOST_BYTES: Final = 1 << 21
"""Of one file."""
MOST_FILES: Final = 256
"""With more of them the older half goes: each text, and each version of what makes something of it, has its own."""
_OURS: Final = re.compile(r"[0-9a-f]{64}\.[a-z]+|\.[0-9a-f]{64}\.[a-z]+\.[0-9a-f]{16}")
"""Named for a hash; or a draft, which a killed engine may leave."""


def cache_directory() -> Path:
    """/var/cache/sandboxd for root, else sandboxd below $XDG_CACHE_HOME or ~/.cache."""
    if os.geteuid() == 0:
        return Path("/var/cache/sandboxd")
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "sandboxd"


def cached(
    name: str, verify: Callable[[bytes], object], make: Callable[[], bytes], directory: Path | None = None
) -> bytes:
    """What *make* makes, from the file *name* of *directory* (default: ``cache_directory()``) when it lies there,
    trustworthy, and *verify* raises no ValueError for it.

    The directory is made with mode 0700 when it is missing. A cache that cannot be used, read or written is no error.
    Raises what *make* raises.
    """
    try:
        where = _open_directory(directory or cache_directory())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home directory
        return make()
    try:
        with contextlib.suppress(OSError, ValueError):
            content = _load(where, name)
            verify(content)
            return content
        content = make()
        with contextlib.suppress(OSError):
            _store(where, name, content)
        return content
    finally:
        os.close(where)


def _open_directory(path: Path) -> int:
    """A descriptor of *path*, made if missing. Raises OSError, ValueError when others could have a hand in it."""
    with contextlib.suppress(FileExistsError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
    where = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    status = os.fstat(where)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != 0o700:
        os.close(where)
        raise ValueError("the cache directory is not this user's alone")
    return where


def _load(where: int, name: str) -> bytes:
    """The content of file *name* of the directory *where*. Raises OSError, ValueError unless it is as it was stored."""
    # O_NONBLOCK: a FIFO of that name must not hold the engine up.
    with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=where), "rb") as file:
        status = os.fstat(file.fileno())
        if (
            not stat.S_ISREG(status.st_mode)
            or status.st_uid != os.geteuid()
            or stat.S_IMODE(status.st_mode) != 0o600
            or status.st_nlink != 1
            or status.st_size > MOST_BYTES
        ):
            raise ValueError("the cached file is not as it was written")
        content = file.read(MOST_BYTES + 1)
    stored = content[HEAD_BYTES:]
    if content[:HEAD_BYTES] != MAGIC + hashlib.sha256(stored).digest():
        raise ValueError("the cached file's content is not as it was written")
    return stored


def _store(where: int, name: str, content: bytes) -> None:
    """Put *content* into the directory *where* as *name*, whole or not at all. Raises OSError."""
    if HEAD_BYTES + len(content) > MOST_BYTES:
        return
    draft = f".{name}.{os.urandom(8).hex()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.ExitStack() as undo:
        file = open(os.open(draft, flags, 0o600, dir_fd=where), "wb")  # noqa: SIM115 - closed by the with below
        undo.callback(os.unlink, draft, dir_fd=where)
        with file:
            os.fchmod(file.fileno(), 0o600)  # whatever the umask is
            file.write(MAGIC + hashlib.sha256(content).digest() + content)
        os.rename(draft, name, src_dir_fd=where, dst_dir_fd=where)
        undo.pop_all()
    _tidy(where)


def _tidy(where: int) -> None:
    """Remove the files that were stored first when there are too many. Raises OSError."""
    names = [name for name in os.listdir(where) if _OURS.fullmatch(name)]
    if len(names) <= MOST_FILES:
        return
    ages: dict[str, int] = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            ages[name] = os.stat(name, dir_fd=where, follow_symlinks=False).st_mtime_ns
    for name in sorted(ages, key=ages.__getitem__)[: -MOST_FILES // 2]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=where)
