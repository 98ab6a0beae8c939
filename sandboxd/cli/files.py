"""Files that ``sandboxd run`` reads for the caller: the program, its stdin, and what is copied into ``/workspace``.

Runs in the caller's process, with the caller's rights, before anything is started.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd.errors import InvalidRequest
from sandboxd.protocol.run_header import check_files, check_guest_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["BadInput", "plan_inputs", "read_bounded", "split_input"]


class BadInput(ValueError):
    """An input that cannot be used; the message names it and says what is allowed."""


def read_bounded(path: str | int, limit_bytes: int) -> bytes:
    """The whole content of *path* (a path or an open descriptor, a pipe too), at most *limit_bytes*.

    Raises BadInput above that size; OSError as open(2) and read(2) do. A descriptor that was given stays open.
    """
    fd = path if isinstance(path, int) else os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        chunks: list[bytes] = []
        total = 0
        while chunk := os.read(fd, min(1 << 20, limit_bytes + 1 - total)):
            chunks.append(chunk)
            total += len(chunk)
            if total > limit_bytes:
                raise BadInput(f"larger than {limit_bytes:,} bytes, the most that is allowed")
        return b"".join(chunks)
    finally:
        if not isinstance(path, int):
            os.close(fd)


def split_input(value: str) -> tuple[str, str]:
    """``HOST[:GUEST]`` as a path of the caller and a path below ``/workspace`` ("" is ``/workspace`` itself).

    A colon in a host path needs no escape when that path exists and no GUEST follows. Without GUEST the file's name is
    kept, with a GUEST that ends in a slash too, below it; "." stands for ``/workspace``. Raises BadInput.
    """
    host, guest = value, ""
    if not os.path.lexists(value) and ":" in value:
        host, _, guest = value.rpartition(":")
        if not guest:
            raise BadInput("the path after ':' is empty; leave the colon out to keep the file's name")
    if not host or "\0" in host:
        raise BadInput(f"{value!r} names no file of this host; allowed: HOST[:GUEST]")
    name = os.path.basename(os.path.abspath(host))
    if not guest:
        return host, _below(name)
    if guest in (".", "./"):
        return host, name if guest == "./" else ""
    return host, _below(f"{guest}{name}" if guest.endswith("/") else guest)


def _below(path: str) -> str:
    try:
        return check_guest_path(path)
    except InvalidRequest as error:
        raise BadInput(error.problem) from None


def plan_inputs(values: Iterable[str]) -> tuple[dict[str, Path | bytes], list[str]]:
    """What to copy into ``/workspace``: guest path to host path, for each ``HOST[:GUEST]``; and what was left out.

    A file named by the caller is followed when it is a link, as cp does. A directory is taken with what is below it;
    links and special files in it are left out and returned as the second value. Raises BadInput.
    """
    found: list[tuple[str, Path]] = []
    skipped: list[str] = []
    for value in values:
        host, guest = split_input(value)
        try:
            found.extend(_expand(host, guest, skipped))
        except OSError as error:
            raise BadInput(f"{error.filename or host!r}: {error.strerror}") from error
    try:
        check_files((guest, 0) for guest, _ in found)
    except InvalidRequest as error:
        raise BadInput(error.problem) from None
    return dict(found), skipped


def _expand(host: str, guest: str, skipped: list[str]) -> Iterator[tuple[str, Path]]:
    mode = os.stat(host).st_mode
    if stat.S_ISDIR(mode):
        yield from _walk(host, guest, skipped)
    elif stat.S_ISREG(mode):
        if not guest:
            raise BadInput(f"{host!r} is a file and needs a name below /workspace")
        _require_readable(host)
        yield guest, Path(host)
    else:
        raise BadInput(f"{host!r} is neither a regular file nor a directory")


def _walk(host: str, guest: str, skipped: list[str]) -> Iterator[tuple[str, Path]]:
    with os.scandir(host) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            inner = f"{guest}/{entry.name}" if guest else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path, inner, skipped)
            elif entry.is_file(follow_symlinks=False):
                _require_readable(entry.path)
                yield inner, Path(entry.path)
            else:
                skipped.append(entry.path)


def _require_readable(path: str) -> None:
    # Opened once here, so that a file we may not read is an error before anything starts.
    os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY))
