"""Compiled filters from the cache, because importing pyseccomp alone costs a good part of an engine's start."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from typing import TYPE_CHECKING, Final

from sandboxd._util.diskcache import cached
from sandboxd.seccomp.bpf import IMPLEMENTATION, check
from sandboxd.seccomp.layers import Layers, compile_layers, split

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sandboxd.seccomp.rules import Profile

__all__ = ["cached_layers"]

_LENGTH: Final = struct.Struct("<I")

_LIBRARY: Final = "libseccomp.so.2"
_LIBRARY_DIRECTORIES: Final = ("/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib")


def cached_layers(profile: Profile, directory: Path | None = None) -> Layers:
    """``compile_layers(profile)``, from *directory* (default: ``diskcache.cache_directory()``) when a trustworthy copy
    lies there: both programs in one file. Raises what ``compile_layers`` raises.
    """
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
    return cached(name, verify, make, directory)


def _library_identity() -> str | None:
    """Which libseccomp this host has, without loading it; None when it is in no usual place."""
    for directory in _LIBRARY_DIRECTORIES:
        with contextlib.suppress(OSError):
            path = os.path.realpath(os.path.join(directory, _LIBRARY), strict=True)
            status = os.stat(path)
            return f"{path} {status.st_size} {status.st_mtime_ns}"
    return None
