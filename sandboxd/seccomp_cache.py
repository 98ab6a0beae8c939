"""Compiled filters kept on disk, because importing pyseccomp alone costs a good part of an engine's start.

Runs in the engine, as the engine. A filter from a file that somebody else could have written would be no wall
(firejail once kept its own in a writable directory), so nothing is believed for its name: the directory and the file
must belong to the effective user and be closed to everybody else, and whatever is odd is compiled anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sandboxd.seccomp_bpf import IMPLEMENTATION, INSTRUCTIONS_MAX, check, compile
from sandboxd.seccomp_layers import Layers, compile_layers, split

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.seccomp_rules import Profile

__all__ = ["cache_directory", "cached_compile", "cached_layers"]

_MAGIC: Final = b"sandboxd seccomp filter\n"
_HEAD_BYTES: Final = len(_MAGIC) + hashlib.sha256().digest_size
_LENGTH: Final = struct.Struct("<I")
_FILE_BYTES: Final = _HEAD_BYTES + _LENGTH.size + 2 * 8 * INSTRUCTIONS_MAX

_LIBRARY: Final = "libseccomp.so.2"
_LIBRARY_DIRECTORIES: Final = ("/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib")


def cache_directory() -> Path:
    """/var/cache/sandboxd for root, else sandboxd below $XDG_CACHE_HOME or ~/.cache."""
    if os.geteuid() == 0:
        return Path("/var/cache/sandboxd")
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "sandboxd"


def cached_compile(profile: Profile, directory: Path | None = None) -> bytes:
    """``compile(profile)``, from *directory* (default: ``cache_directory()``) when a trustworthy copy lies there.

    The directory is made with mode 0700 when it is missing. A cache that cannot be used, read or written is no error:
    the program is then compiled. Raises what ``compile`` raises.
    """
    return _cached(profile.sha256, check, lambda: compile(profile), directory)


def cached_layers(profile: Profile, directory: Path | None = None) -> Layers:
    """``compile_layers(profile)``, kept and looked at as ``cached_compile`` does it: both programs in one file."""
    lower, upper = split(profile)  # their hashes hold what stands in SPAWN, too

    def made() -> bytes:
        layers = compile_layers(profile)
        return _LENGTH.pack(len(layers.inherited)) + layers.inherited + layers.own

    return _layers(_cached(f"{lower.sha256} {upper.sha256}", _layers, made, directory))


def _layers(content: bytes) -> Layers:
    """The two programs of a file's content. Raises ValueError unless both are of their form."""
    if len(content) < _LENGTH.size:
        raise ValueError("the length of the first program is missing")
    (length,) = _LENGTH.unpack_from(content)
    layers = Layers(content[_LENGTH.size :][:length], content[_LENGTH.size + length :])
    check(layers.inherited)
    check(layers.own, guarded=False)
    return layers


def _cached(rules: str, verify: Callable[[bytes], object], make: Callable[[], bytes], directory: Path | None) -> bytes:
    """What *make* makes of *rules*, from the cache when *verify* finds no fault with what lies there."""
    library = _library_identity()
    if library is None:
        return make()
    name = hashlib.sha256(f"{IMPLEMENTATION}\n{library}\n{rules}".encode()).hexdigest() + ".bpf"
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


def _library_identity() -> str | None:
    """Which libseccomp this host has, without loading it; None when it is in no usual place."""
    for directory in _LIBRARY_DIRECTORIES:
        with contextlib.suppress(OSError):
            path = os.path.realpath(os.path.join(directory, _LIBRARY), strict=True)
            status = os.stat(path)
            return f"{path} {status.st_size} {status.st_mtime_ns}"
    return None


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
            or status.st_size > _FILE_BYTES
        ):
            raise ValueError("the cached file is not as it was written")
        content = file.read(_FILE_BYTES + 1)
    stored = content[_HEAD_BYTES:]
    if content[:_HEAD_BYTES] != _MAGIC + hashlib.sha256(stored).digest():
        raise ValueError("the cached file's content is not as it was written")
    return stored


def _store(where: int, name: str, content: bytes) -> None:
    """Put *content* into the directory *where* as *name*, whole or not at all. Raises OSError."""
    draft = f".{name}.{os.urandom(8).hex()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.ExitStack() as undo:
        file = open(os.open(draft, flags, 0o600, dir_fd=where), "wb")  # noqa: SIM115 - closed by the with below
        undo.callback(os.unlink, draft, dir_fd=where)
        with file:
            os.fchmod(file.fileno(), 0o600)  # whatever the umask is
            file.write(_MAGIC + hashlib.sha256(content).digest() + content)
        os.rename(draft, name, src_dir_fd=where, dst_dir_fd=where)
        undo.pop_all()
