"""The files of one audit record: open, lock, append, rotate, and mend what a crash left.

``PATH`` is being written, ``PATH.1`` to ``PATH.KEEP`` are older. Several writers, also of several processes, may share
a path: each append holds flock(2) on the file and, when its size is not what this writer left, reads the last line
again. So the chain is one, whoever writes, and a writer that was killed holds nobody up.

A last line without its newline is what a crash, a kill or a power cut left of a record. It is moved to ``PATH.torn``,
then cut off, then written into the record as what it is, then ``PATH.torn`` goes: a crash at any of these points is
mended by the next writer, and the torn bytes are never gone before the record has them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import stat
import time
from typing import TYPE_CHECKING, Final

from sandboxd.audit.record import NOTHING, body, ending, hash_of

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ChainFile", "last_line", "rotated"]

LOCK_SECONDS: Final = 2.0
"""A writer has the lock for the time of a write; who has it for longer is stopped or hangs."""
LOCKED: Final = "another process holds the lock on the audit record"
REOPENINGS: Final = 100
TORN_BYTES: Final = 1 << 20
"""Of a torn line, so much is written into the record; its length and hash are of the whole."""
STEP: Final = 1 << 16
END_BYTES: Final = 128
"""More than ``record.ending`` and the newline add to a body."""
JOINED_BYTES: Final = 1 << 20
FARTHEST: Final = 100
"""So far apart may the numbers of older files be where some were taken away."""
BEGINNING: Final = b'{"time":"'
_END: Final = re.compile(rb',"sequence":([0-9]{1,18}),"previous":"[0-9a-f]{64}"\}\Z')


class ChainFile:
    """The file at *path*. Not for several threads at once; raises OSError throughout."""

    def __init__(self, path: str, max_bytes: int, keep: int, fsync: bool) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._fsync = fsync
        self._fd = -1
        self._size = -1
        self._sequence = 0
        self._previous = NOTHING
        self._owed: list[bytes] = []  # records of our own that must come first

    def append(self, bodies: Sequence[bytes], wait: bool = True) -> None:
        """Write *bodies* (of ``record.body``) as the next lines: all of them, or none.

        Another process that holds the lock is waited for, for LOCK_SECONDS; without *wait* it is a BlockingIOError.
        """
        try:
            self._lock(wait)
            if self._size > 0 and self._size + sum(len(one) + END_BYTES for one in bodies) > self._max_bytes:
                self._rotate(wait)
            self._write([*self._owed, *bodies])
            if self._owed:
                self._owed = []
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{self.path}.torn")
        finally:
            if self._fd >= 0:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def open(self) -> None:
        """Open, and mend what is to be mended: the same that the first ``append`` would do."""
        self.append([])

    def close(self) -> None:
        """Forget the file; the next ``append`` opens it again. Idempotent."""
        fd, self._fd = self._fd, -1
        self._size = -1
        self._owed = []
        if fd >= 0:
            os.close(fd)

    # Opening and locking

    def _lock(self, wait: bool) -> None:
        """Hold the lock on the file that has the path now, and know its last line."""
        for _ in range(REOPENINGS):
            if self._fd < 0:
                self._fd = _opened(self.path)
                self._size = -1
            _take(self._fd, wait)
            ours = os.fstat(self._fd)
            with contextlib.suppress(FileNotFoundError):
                there = os.lstat(self.path)
                if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                    if ours.st_size != self._size:
                        self._read_end(ours.st_size)
                    return
            self.close()  # another writer has rotated it, or somebody moved it away
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), self.path)

    def _read_end(self, size: int) -> None:
        """Find the end of the chain: ours to go on from, whoever wrote it."""
        self._size = -1  # until all of it is known
        self._owed = []
        good = _whole(self._fd, size)
        if good < size:
            self._put_aside(good, size)
        if good:
            line = last_line(self._fd, good)
            self._previous = hash_of(line)
            self._sequence = _sequence(line) or max(_last_sequence(self._fd, good), self._sequence)
        else:
            self._follow_older()
        self._size = good
        torn = _read_torn(f"{self.path}.torn")
        if torn:
            self._owed.append(_recovered(torn))

    def _follow_older(self) -> None:
        """The file is new: go on from the one that was rotated last, or from what this writer knows."""
        older = rotated(self.path)
        if older:
            fd = _opened(older[-1], 0)
            try:
                line = last_line(fd, _whole(fd, os.fstat(fd).st_size))
            finally:
                os.close(fd)
            found = _sequence(line)
            if found is not None and found >= self._sequence:
                self._sequence, self._previous = found, hash_of(line)
        if self._sequence:
            # A file that begins in the middle of the chain says so: then nobody can cut its beginning off unseen.
            self._owed.append(body({"event": "log_rotated"}, time.time_ns()))

    def _put_aside(self, good: int, size: int) -> None:
        """Move what stands behind byte *good* to PATH.torn."""
        tail = os.pread(self._fd, size - good, good)
        fd = _opened(f"{self.path}.torn")
        try:
            # A crash between the next two steps leaves it in both places.
            there = os.fstat(fd).st_size
            if there < len(tail) or os.pread(fd, len(tail), there - len(tail)) != tail:
                _write_all(fd, tail)
                os.fsync(fd)
        finally:
            os.close(fd)
        os.ftruncate(self._fd, good)

    # Writing

    def _write(self, bodies: Sequence[bytes]) -> None:
        if not bodies:
            return
        sequence, previous = self._sequence, self._previous
        parts: list[memoryview | bytes] = []
        for begun in bodies:
            sequence += 1
            rest, end = memoryview(begun)[:-1], ending(sequence, previous)
            line = hashlib.sha256(rest)
            line.update(end)
            previous = line.hexdigest()
            parts += [rest, end, b"\n"]
        size = sum(map(len, parts))
        try:
            # A source of 16 MiB can be a line of 96: it is not copied once more.
            for part in [b"".join(parts)] if size < JOINED_BYTES else parts:
                _write_all(self._fd, part)
            if self._fsync:
                os.fsync(self._fd)
        except OSError:
            try:
                os.ftruncate(self._fd, self._size)  # a part of it may be there
            except OSError:
                self._size = -1  # the next writer finds it torn
            raise
        self._size += size
        self._sequence, self._previous = sequence, previous

    def _rotate(self, wait: bool) -> None:
        """Give the file the name PATH.1, those before it the next ones, and begin a new one.

        Each step is atomic: a crash in between leaves a number free, which the next rotation fills, and loses nothing.
        Another writer that finds the path gone may make the new file first.
        """
        seen = os.fstat(self._fd)
        for name in _beyond(self.path, self._keep):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        free = next((n for n in range(1, self._keep) if not os.path.lexists(f"{self.path}.{n}")), self._keep)
        for number in range(free, 1, -1):
            os.rename(f"{self.path}.{number - 1}", f"{self.path}.{number}")
        os.rename(self.path, f"{self.path}.1")
        old, self._fd = self._fd, -1
        try:
            self._size = -1
            self._fd = _opened(self.path)
            if os.fstat(self._fd).st_mode != seen.st_mode:
                os.fchmod(self._fd, stat.S_IMODE(seen.st_mode))  # the operator's choice who else may read it
                with contextlib.suppress(PermissionError):
                    os.fchown(self._fd, -1, seen.st_gid)
            if self._fsync:
                _sync_directory(self.path)
        finally:
            os.close(old)
        self._lock(wait)


def rotated(path: str) -> list[str]:
    """The older files of *path* that are there, oldest first. A number far from all others is somebody's own."""
    directory, name = os.path.split(os.path.abspath(path))
    numbered = re.compile(re.escape(name) + r"\.([1-9][0-9]{0,5})")
    found = sorted(int(one[1]) for one in map(numbered.fullmatch, os.listdir(directory)) if one)
    ours: list[str] = []
    before = 0
    for number in found:
        if number - before > FARTHEST:
            break
        ours.append(os.path.join(directory, f"{name}.{number}"))
        before = number
    return ours[::-1]


def _beyond(path: str, keep: int) -> list[str]:
    """What a larger *keep* left of *path*, oldest first: records with the numbers that follow, one of which a crash may
    have left free. Whatever else has a number was given it by somebody, as a month perhaps, and is theirs.
    """
    found: list[str] = []
    number, free = keep + 1, 0
    while free < 2:
        name = f"{path}.{number}"
        if _is_record(name):
            found.append(name)
            free = 0
        else:
            free += 1
        number += 1
    return found[::-1]


def _is_record(path: str) -> bool:
    try:
        fd = _opened(path, 0)
    except OSError:
        return False
    try:
        return os.pread(fd, len(BEGINNING), 0) == BEGINNING
    finally:
        os.close(fd)


def last_line(fd: int, end: int) -> bytes:
    """The line that ends just before byte *end*, without its newline; empty when *end* is 0."""
    if end <= 0:
        return b""
    start = _after_newline(fd, end - 1)
    return _read(fd, start, end - 1)


def _opened(path: str, create: int = os.O_CREAT) -> int:
    """A descriptor of *path*, a file that nobody else can have put there or write to. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | create, 0o600)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", path)
        if found.st_nlink > 1 or found.st_mode & 0o022 or found.st_uid not in (0, os.geteuid()):
            raise OSError(errno.EPERM, "others may write this file, or it has a second name", path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _take(fd: int, wait: bool) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not wait:
                raise
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, LOCKED) from None
            time.sleep(0.0005)


def _whole(fd: int, size: int) -> int:
    """How many of *size* bytes are whole lines."""
    if size == 0 or os.pread(fd, 1, size - 1) == b"\n":
        return size
    return _after_newline(fd, size)


def _after_newline(fd: int, end: int) -> int:
    """Where the line begins that byte *end* - 1 is in."""
    while end > 0:
        start = max(0, end - STEP)
        at = _read(fd, start, end).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def _read(fd: int, start: int, end: int) -> bytes:
    parts: list[bytes] = []
    while start < end:
        part = os.pread(fd, min(end - start, 1 << 24), start)
        if not part:
            break
        parts.append(part)
        start += len(part)
    return b"".join(parts)


def _sequence(line: bytes) -> int | None:
    """The number at the end of a record; None when it is none of ours."""
    found = _END.search(line[-128:])
    return int(found[1]) if found else None


def _last_sequence(fd: int, end: int) -> int:
    """The number of the last record before byte *end* that can be read: what follows it is damaged."""
    while end > 0:
        line = last_line(fd, end)
        found = _sequence(line)
        if found is not None:
            return found
        end -= len(line) + 1
    return 0


def _read_torn(path: str) -> bytes:
    try:
        fd = _opened(path, 0)
    except FileNotFoundError:
        return b""
    try:
        return _read(fd, 0, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def _recovered(torn: bytes) -> bytes:
    # As Latin-1 each byte is one character: what was there can be had back.
    said = {"bytes": len(torn), "sha256": hash_of(torn), "text": torn[:TORN_BYTES].decode("latin-1")}
    return body({"event": "recovered", "torn": said}, time.time_ns())


def _write_all(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[os.write(fd, view) :]


def _sync_directory(path: str) -> None:
    fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
