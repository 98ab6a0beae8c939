"""Subordinate ids for the service's user, in /etc/subuid and /etc/subgid.

The files are changed as shadow's tools change them: under their lock files, by a rename. Sources: subuid(5);
commonio_lock_nowait() in shadow's lib/commonio.c.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from typing import TYPE_CHECKING, Final

from sandboxd.errors import Unavailable
from sandboxd.ids.ranges import IdRange, known_to_nss, login_ids, parse_subordinate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

__all__ = ["COUNT", "add", "free_range", "granted", "remove"]

COUNT: Final = 65_536
"""Enough for eight engines of the service's user."""
_LOWEST: Final = 100_000  # SUB_UID_MIN of login.defs(5) as it is shipped
_HIGHEST: Final = 0x7000_0000
_RESERVED: Final = (
    # Of systemd-nspawn and of systemd's dynamic users: systemd.io/UIDS-GIDS.
    IdRange(0x0008_0000, 0x7000_0000 - 0x0008_0000),
)
_LOCK_SECONDS: Final = 10.0
_FILES: Final = ("subuid", "subgid")


def granted(etc: Path, user: str) -> bool:
    """Whether both files give *user* a range, the same in both, that is large enough."""
    ranges = [{area for owner, area in parse_subordinate(_read(etc / name)) if owner == user} for name in _FILES]
    return any(area.count >= COUNT for area in ranges[0] & ranges[1])


def free_range(taken: Sequence[IdRange], known: Callable[[int], bool] = lambda _: False) -> IdRange:
    """COUNT ids that nobody has: those that systemd uses last. *known* tells whether a directory service has a user
    with that id; the first of a range is asked for, as ``ranges.claim`` does it. Raises Unavailable.
    """
    for reserved in (_RESERVED, ()):
        areas = sorted([*taken, *reserved], key=lambda one: one.base)
        base = _LOWEST
        while base + COUNT <= _HIGHEST:
            area = next((area for area in areas if area.overlaps(IdRange(base, COUNT))), None)
            if area is None and not known(base):
                return IdRange(base, COUNT)
            base = -(-(base + 1 if area is None else area.end) // COUNT) * COUNT
    raise Unavailable("ids", f"no {COUNT:,} ids are free", fix="free a range in /etc/subuid and /etc/subgid")


def add(etc: Path, user: str) -> None:
    """Give *user* a free range, the same of uids and gids. Raises Unavailable, OSError."""
    with _locked(etc):
        texts = {name: _read(etc / name) for name in _FILES}
        taken = [area for text in texts.values() for _, area in parse_subordinate(text)]
        taken += [area for name in ("passwd", "group") for area in login_ids(_read(etc / name))]
        # Of a tree that is being prepared nobody knows the directory service.
        chosen = free_range(taken, known_to_nss) if str(etc) == "/etc" else free_range(taken)
        for name, text in texts.items():
            _write(etc / name, f"{_ended(text)}{user}:{chosen.base}:{chosen.count}\n")


def remove(etc: Path, user: str) -> None:
    """Take all ranges of *user* out. Raises Unavailable, OSError."""
    with _locked(etc):
        for name in _FILES:
            text = _read(etc / name)
            kept = "".join(line for line in text.splitlines(keepends=True) if line.partition(":")[0] != user)
            if kept != text:
                _write(etc / name, kept)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "surrogateescape")
    except FileNotFoundError:
        return ""


def _ended(text: str) -> str:
    return text if not text or text.endswith("\n") else f"{text}\n"


def _write(path: Path, text: str) -> None:
    """Replace *path*, whole or not at all; owner and mode stay."""
    draft = path.with_name(f"{path.name}+")  # shadow's own name for it; the lock is ours
    with contextlib.suppress(FileNotFoundError):
        draft.unlink()
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
        try:
            before = path.stat()
        except FileNotFoundError:
            os.fchmod(fd, 0o644)
        else:
            os.fchown(fd, before.st_uid, before.st_gid)
            os.fchmod(fd, before.st_mode & 0o7777)
        file.write(text)
        file.flush()
        os.fsync(fd)
    os.rename(draft, path)


@contextlib.contextmanager
def _locked(etc: Path) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        for name in _FILES:
            lock = _lock(etc / name)
            held.callback(lock)
        yield


def _lock(path: Path) -> Callable[[], None]:
    """Take the lock file of *path*; returns what gives it back. Raises Unavailable."""
    lock, own = path.with_name(f"{path.name}.lock"), path.with_name(f"{path.name}.{os.getpid()}")
    until = time.monotonic() + _LOCK_SECONDS
    with contextlib.suppress(FileNotFoundError):
        own.unlink()
    fd = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(f"{os.getpid()}\0".encode())
        while True:
            try:
                os.link(own, lock)
            except FileExistsError:
                if _is_stale(lock):
                    with contextlib.suppress(FileNotFoundError):
                        lock.unlink()
                    continue
                if time.monotonic() > until:
                    fix = "wait for the tool that changes it, or remove the lock"
                    raise Unavailable("ids", f"{lock} is held", errno=errno.EAGAIN, fix=fix) from None
                time.sleep(0.1)
            else:
                return lock.unlink
    finally:
        own.unlink()


def _is_stale(lock: Path) -> bool:
    """Whether the process that a lock file names is gone."""
    try:
        pid = int(lock.read_bytes().rstrip(b"\0\n") or b"0")
        if pid <= 0:
            return False
        os.kill(pid, 0)
    except (FileNotFoundError, ProcessLookupError):
        return True
    except (OSError, ValueError):
        return False
    return False
