"""Files into a cell before its program runs, and out of it when everything in it is dead.

Both work on the engine's own descriptor of the cell's tmpfs, never on a path of the host. In: as the cell's uid, before
any of its code exists. Out: only after the pid namespace is dead, so nobody can change what is being read; still every
name is opened with openat2 (no symlink, no mount crossed), without blocking, and only regular files with one link
count. Who opens and makes files, the engine or a broker: ``cells.files``; owners are ids inside the namespace.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from typing import TYPE_CHECKING, Final

from sandboxd.errors import InvalidRequest
from sandboxd.outcome.collected import Collected, Known
from sandboxd.outcome.judge import Space
from sandboxd.protocol.run_header import DEPTH, check_guest_path

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sandboxd.engine.cells.files import CellFiles
    from sandboxd.engine.cells.messages import CellFds

__all__ = ["collect", "make_source", "put_files", "settled", "spaces"]

ENTRIES: Final = 100_000
NAMES_BYTES: Final = 4 << 20
_COPY: Final = 8 << 20
_REALTIME_COARSE: Final = 5  # CLOCK_REALTIME_COARSE, clock_gettime(2): the time of the last tick
_LARGE_BYTES: Final = 4 << 20
_LARGE_FILES: Final = 256


def make_source(by: CellFiles, directory: int, name: str, owner: int) -> int:
    """Make the program's file in the /code file system as *owner*: readable, not the cell's to change. Returns a
    descriptor to write it by. Raises OSError.
    """
    return by.create(directory, name, 0o444, owner)


def put_files(by: CellFiles, workspace: int, files: Iterable[tuple[str, memoryview]], owner: int) -> Known:
    """Write input files as the cell's *owner*; parents are made. Raises InvalidRequest when they do not fit. Not for
    the engine's loop: it takes as long as the files are many and large.
    """
    known: Known = {}
    made = {""}
    for path, content in files:
        try:
            _make_parents(by, workspace, path, owner, made)
            fd = by.create(workspace, path, 0o644, owner)
            try:
                _write_all(fd, content)
                found = os.fstat(fd)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EPIPE):
                raise  # the engine's own want
            raise InvalidRequest("files", f"{path!r} cannot be written into the workspace: {error.strerror}") from error
        known[path] = found.st_ino, found.st_ctime_ns
    return known


def settled(known: Known) -> bool:
    """Whether a change from now on has another ctime. Before Linux 6.13 (multigrain timestamps) that is the time of the
    last tick, and a fast program could change an input within the tick that it was written in.
    """
    latest = max((ctime for _, ctime in known.values()), default=0)
    return time.clock_gettime_ns(_REALTIME_COARSE) > latest


def spaces(fds: CellFds) -> list[Space]:
    """What is free in the file systems that the cell may write to. Source: fstatvfs(3)."""
    found: list[Space] = []
    for place, fd in (("/workspace", fds.workspace), ("/tmp", fds.tmp), ("/dev/shm", fds.shm)):  # noqa: S108
        facts = os.fstatvfs(fd)
        found.append(Space(place, facts.f_bavail * facts.f_frsize, facts.f_favail))
    return found


def is_large(fds: CellFds) -> bool:
    """Whether freeing the cell's file systems takes a millisecond or more: 0.2 ms for each MiB, some µs for each
    file.
    """
    size = files = 0
    for fd in (fds.workspace, fds.tmp, fds.shm):
        if fd >= 0:
            facts = os.fstatvfs(fd)
            size += (facts.f_blocks - facts.f_bfree) * facts.f_frsize
            files += facts.f_files - facts.f_ffree
    return size > _LARGE_BYTES or files > _LARGE_FILES


def collect(by: CellFiles, workspace: int, known: Known, most_bytes: int) -> Collected:
    """Copy out every regular file that is not an unchanged input, at most *most_bytes* in all.

    Other kinds, hard links, names that are not UTF-8, what is too deep or over the bounds are counted as skipped.
    """
    found = Collected()
    try:
        total = names = 0
        for path in sorted(_walk(by, workspace, found)):
            names += len(path)
            copied = None
            if names <= NAMES_BYTES:
                copied = _take(by, workspace, path, known.get(path), found, total, most_bytes)
            if copied is None:
                found.skipped += 1
            elif copied >= 0:
                found.files.append((path, copied, total))
                total += copied
        if found.fd >= 0:
            os.ftruncate(found.fd, total)
    except BaseException:
        found.close()
        raise
    return found


def _memfd() -> int:
    """Room for the files, -1 when there is none: the program has run, and what it left is no reason to fail it."""
    try:
        return os.memfd_create("sandboxd-files", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return -1


def _walk(by: CellFiles, workspace: int, found: Collected) -> list[str]:
    """The paths of regular files, by what their directories say of them."""
    wanted: list[str] = []
    seen = 0
    pending: list[tuple[str, int]] = [("", 0)]
    while pending:
        path, depth = pending.pop()
        try:
            directory = by.open_directory(workspace, path or ".")
        except OSError:
            found.skipped += 1
            continue
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    seen += 1
                    if seen > ENTRIES:
                        found.skipped += 1
                        continue
                    name = f"{path}/{entry.name}" if path else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        if depth < DEPTH and _is_plain(name):  # what is in it has a longer name
                            pending.append((name, depth + 1))
                        else:
                            found.skipped += 1
                    elif entry.is_file(follow_symlinks=False) and _is_plain(name):
                        wanted.append(name)
                    else:
                        found.skipped += 1
        except OSError:
            found.skipped += 1
        finally:
            os.close(directory)
    return wanted


def _is_plain(name: str) -> bool:
    try:
        check_guest_path(name)
    except InvalidRequest:
        return False
    return True


def _take(
    by: CellFiles,
    workspace: int,
    path: str,
    known: tuple[int, int] | None,
    found: Collected,
    offset: int,
    most_bytes: int,
) -> int | None:
    """Copy one file to *offset* of the memfd: its bytes, -1 for an unchanged input, None for what is skipped."""
    try:
        fd = by.open(workspace, path)
    except OSError:
        return None
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1:
            return None
        if known == (facts.st_ino, facts.st_ctime_ns):
            return -1
        if offset + facts.st_size > most_bytes:
            return None
        if found.fd < 0:
            found.fd = _memfd()
        return None if found.fd < 0 else _copy(fd, facts.st_size, found.fd, offset)
    except OSError:  # no memory left for the copy; the next one begins where this one did
        return None
    finally:
        os.close(fd)


def _copy(fd: int, size: int, to: int, offset: int) -> int:
    os.lseek(to, offset, os.SEEK_SET)
    done = 0
    while done < size:
        n = os.sendfile(to, fd, done, min(_COPY, size - done))
        if n == 0:
            break
        done += n
    return done


def _make_parents(by: CellFiles, workspace: int, path: str, owner: int, made: set[str]) -> None:
    """Make the directories above *path*, except those that are *made*, each once."""
    missing = []
    above = path.rpartition("/")[0]
    while above not in made:
        missing.append(above)
        above = above.rpartition("/")[0]
    for directory in reversed(missing):
        by.mkdir(workspace, directory, 0o755, owner)
        made.add(directory)


def _write_all(fd: int, content: bytes | memoryview) -> None:
    view = memoryview(content)
    while len(view):
        view = view[os.write(fd, view) :]
