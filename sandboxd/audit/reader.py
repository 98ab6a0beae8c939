"""Read an audit record: check its chain, page through it, follow it. Never writes.

Files are looked at under a shared flock(2) for the moment that it takes to open them and to learn how long the live one
is: no write is under way then, so what follows sees whole lines only, while writers go on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from sandboxd.audit.file import rotated
from sandboxd.audit.record import NOTHING, hash_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["START", "Cursor", "Page", "Problem", "Verdict", "page", "verify"]

STEP: Final = 1 << 20
LOCK_SECONDS: Final = 2.0
PROBLEMS: Final = 100
"""So many are told; one edit can be the cause of all that follow."""

Cursor = tuple[int, int]
"""A file's inode, and a byte in it at which a line begins."""
START: Final[Cursor] = (0, 0)

_HEAD: Final = re.compile(
    rb'\{"time":"[^"]*","event":"(?P<event>[a-z_]+)","id":(?:null|"(?P<id>[^"\\]*)"),'
    rb'"client":(?:null|\{"uid":(?P<uid>[0-9]+|null)[,}])'
)
HEAD_BYTES: Final = 512


@dataclass(frozen=True, slots=True)
class Problem:
    """Where the chain breaks: *what* is wrong with line *line* (from 1) of *file*."""

    file: str
    line: int
    what: str


@dataclass(slots=True)
class Verdict:
    """What ``verify`` found. *first* and *last* are the numbers of the records at the ends, 0 when there is none;
    *sha256* is the hash of the last line, to be compared with one that was kept elsewhere.
    """

    records: int = 0
    first: int = 0
    last: int = 0
    sha256: str = NOTHING
    recovered: int = 0
    """Torn lines that a writer found after a crash, and wrote down."""
    lost: int = 0
    """Records that could not be written, by the record's own word."""
    problems: list[Problem] = field(default_factory=list)
    more: int = 0
    """Problems beyond those that are told."""
    blind: bool = False
    """The last line was no record: it may stand in the place of one, or have been put in."""

    def add(self, file: str, line: int, what: str) -> None:
        if len(self.problems) < PROBLEMS:
            self.problems.append(Problem(file, line, what))
        else:
            self.more += 1


@dataclass(slots=True)
class _File:
    path: str
    fd: int
    inode: int
    size: int


@contextlib.contextmanager
def _files(path: str) -> Iterator[list[_File]]:
    """All files of the record at *path*, oldest first, open. Raises OSError; FileNotFoundError when there is none."""
    with contextlib.ExitStack() as undo:
        lock = _locked(path, undo)
        try:
            found = []
            for name in [*rotated(path), path]:
                try:
                    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
                except FileNotFoundError:
                    continue
                undo.callback(os.close, fd)
                seen = os.fstat(fd)
                if not stat.S_ISREG(seen.st_mode):
                    raise OSError(errno.EINVAL, "it is not a regular file", name)
                found.append(_File(name, fd, seen.st_ino, seen.st_size))
        finally:
            if lock >= 0:
                fcntl.flock(lock, fcntl.LOCK_UN)
        if not found:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        yield found


def _locked(path: str, undo: contextlib.ExitStack) -> int:
    """A descriptor of the live file with a shared lock, or -1 when there is no such file, or a writer hangs."""
    deadline = time.monotonic() + LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return -1
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                undo.callback(os.close, fd)
                return fd
        except (BlockingIOError, FileNotFoundError):
            time.sleep(0.001)
        os.close(fd)
    return -1


def verify(path: str) -> Verdict:
    """Walk every file of the record at *path* and check each line's hash and number. Raises OSError."""
    verdict = Verdict()
    with _files(path) as files:
        for one in files:
            _verify_file(one, verdict, one is files[0])
    return verdict


def _verify_file(one: _File, verdict: Verdict, oldest: bool) -> None:
    before = (one.path, 0)
    with open(one.fd, "rb", closefd=False) as stream:
        left = one.size
        number = 0
        while left > 0:
            line = stream.readline(left)
            if not line:
                verdict.add(one.path, number + 1, "missing: the file was cut while it was read")
                return
            left -= len(line)
            number += 1
            if not line.endswith(b"\n"):
                verdict.add(one.path, number, f"torn: {len(line):,} bytes without an end; the next writer mends it")
                return
            line = line[:-1]
            _verify_line(one.path, number, line, verdict, oldest and number == 1, before)
            before = (one.path, number)


def _verify_line(
    path: str, number: int, line: bytes, verdict: Verdict, very_first: bool, before: tuple[str, int]
) -> None:
    record = _record(line)
    if record is None:
        verdict.add(path, number, "edited: it is not a record")
        verdict.sha256, verdict.blind = hash_of(line), True
        return
    sequence, previous = record["sequence"], record["previous"]
    expected = verdict.last + 1
    blind, verdict.blind = verdict.blind, False
    if very_first:
        verdict.first = sequence
        if sequence == 1 and previous != NOTHING:
            verdict.add(path, number, "edited: it is the first record, and names one before")
        elif sequence > 1 and record.get("event") != "log_rotated":
            verdict.add(path, number, f"missing: the records before {sequence:,}, out of the middle of a file")
    elif blind and expected <= sequence <= expected + 1:
        pass  # told already
    elif sequence > expected:
        verdict.add(path, number, f"missing: the records {expected:,} to {sequence - 1:,} before it")
    elif sequence < expected:
        verdict.add(path, number, f"reordered: record {sequence:,} stands where {expected:,} should")
    elif previous != verdict.sha256:
        # The one before is not what this one saw; an edit of this one would show at the next.
        verdict.add(before[0], before[1] or number, f"edited: its hash is not the one that record {sequence:,} names")
    verdict.records += 1
    verdict.last = sequence
    verdict.sha256 = hash_of(line)
    if record.get("event") == "recovered":
        verdict.recovered += 1
    elif record.get("event") == "gap" and type(record.get("lost")) is int:
        verdict.lost += record["lost"]


def _record(line: bytes) -> dict[str, Any] | None:
    """A line as a record; None when it is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    sequence, previous = found.get("sequence"), found.get("previous")
    if type(sequence) is not int or sequence < 1 or not isinstance(previous, str):
        return None
    return found


@dataclass(frozen=True, slots=True)
class Page:
    """Some *lines* of a record, each with its newline; *cursor* is where the next page begins. *end*: there was no
    more.
    """

    lines: list[bytes]
    cursor: Cursor
    end: bool


def page(
    path: str,
    cursor: Cursor = START,
    *,
    uid: int | None = None,
    run: str | None = None,
    most_bytes: int = STEP,
    scan_bytes: int = 16 * STEP,
) -> Page:
    """The next lines from *cursor* on: those of runs of *uid*, or everybody's; those of *run*, or of all.

    It stops when *most_bytes* are there or *scan_bytes* were looked at, at the end of a line. A cursor whose file is
    gone begins with the oldest there is, one that is not at a line's beginning with that file. Raises OSError.
    """
    lines: list[bytes] = []
    size = scanned = 0
    with _files(path) as files:
        at = next((index for index, one in enumerate(files) if one.inode == cursor[0]), 0)
        start = cursor[1] if files[at].inode == cursor[0] else 0
        for index in range(at, len(files)):
            one = files[index]
            if not 0 < start <= one.size or os.pread(one.fd, 1, start - 1) != b"\n":
                start = 0
            for begin, end in _bounds(one, start):
                if _is_wanted(os.pread(one.fd, min(end - begin, HEAD_BYTES), begin), uid, run):
                    lines.append(_all(one.fd, begin, end))
                    size += end - begin
                scanned += end - begin
                start = end
                if size >= most_bytes or scanned >= scan_bytes:
                    return Page(lines, (one.inode, start), False)
            if index + 1 < len(files):
                start = 0
        return Page(lines, (files[-1].inode, start), True)


def _is_wanted(head: bytes, uid: int | None, run: str | None) -> bool:
    if uid is None and run is None:
        return True
    found = _HEAD.match(head)
    if found is None:
        return False
    return (uid is None or found["uid"] == b"%d" % uid) and (run is None or found["id"] == run.encode())


def _bounds(one: _File, start: int) -> Iterator[tuple[int, int]]:
    """Where the whole lines from byte *start* on begin and end; a line may be larger than memory should hold."""
    at, begin = start, start
    while at < one.size:
        chunk = os.pread(one.fd, min(STEP, one.size - at), at)
        if not chunk:
            return
        found = chunk.find(b"\n")
        while found >= 0:
            yield begin, at + found + 1
            begin = at + found + 1
            found = chunk.find(b"\n", found + 1)
        at += len(chunk)


def _all(fd: int, begin: int, end: int) -> bytes:
    parts = []
    while begin < end and (part := os.pread(fd, end - begin, begin)):
        parts.append(part)
        begin += len(part)
    return b"".join(parts)


def follow(fetch: Callable[[Cursor], Page], wait: Callable[[], None] | None) -> Iterator[bytes]:
    """Every line that *fetch* (``page``, or a daemon) gives, and with *wait*, which pauses between two looks, those
    that come later: for ever then.
    """
    cursor = START
    while True:
        found = fetch(cursor)
        yield from found.lines
        cursor = found.cursor
        if found.end:
            if wait is None:
                return
            wait()
