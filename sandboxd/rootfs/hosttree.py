"""Reading the host's file system for an image: path walks that show each symlink, and reads that trust nothing.

Everything is seen below a *root* directory, "/" in use and a fabricated tree in tests; absolute symlinks are taken
relative to it. Paths in and out are absolute, as a process chrooted to that root would spell them.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from _typeshed import StrPath

MAX_LINKS = 40
"""Symlinks followed in one walk: the kernel's own bound, path_resolution(7)."""

MAX_DEPTH = 256
"""Components of a path; the kernel bounds only its length."""


class Walk(NamedTuple):
    """How a path resolves. *real* has no symlink in it; *links* are those met, as (where, text), in order; *passed* are
    the directories gone through, each by its real path, also those that a ".." left again."""

    path: str
    real: str
    links: tuple[tuple[str, str], ...]
    passed: tuple[str, ...]


class HostTree:
    """The file system below *root*, taken to stand still while it is read: a known directory is not looked up again."""

    def __init__(self, root: StrPath = "/") -> None:
        self._root = os.fspath(root).rstrip("/")
        self._walks: dict[str, Walk] = {"/": Walk("/", "/", (), ())}  # of directories, by the path as spelled
        self._directories = {"/"}  # by their real path
        self._searchable: dict[str, bool] = {}  # by everyone; directories, by their real path

    def source(self, path: str) -> str:
        """The path of *path* outside of the root: what system calls of this process take."""
        return (self._root + path) or "/"

    def walk(self, path: str) -> Walk:
        """Resolve *path*. Raises OSError: ENOENT, ENOTDIR, ELOOP, ENAMETOOLONG; EINVAL for a relative path."""
        if not path.startswith("/") or "\0" in path:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return self._walk(path, 0)

    def _walk(self, path: str, followed: int) -> Walk:
        """walk() after *followed* symlinks. Goes by parent directories, which most paths of a plan have in common."""
        known = self._walks.get(path)
        if known is not None:
            return known
        if path.count("/") > MAX_DEPTH:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), path)
        above, _, name = path.rpartition("/")
        parent = self._walk(above or "/", followed)
        if name in ("", ".", ".."):
            if parent.real not in self._directories:
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            real = (parent.real.rpartition("/")[0] or "/") if name == ".." else parent.real
            return Walk(path, real, parent.links, parent.passed)
        here = f"{parent.real.rstrip('/')}/{name}"
        mode = os.lstat(self.source(here)).st_mode
        if not stat.S_ISLNK(mode):
            if not stat.S_ISDIR(mode):
                return Walk(path, here, parent.links, parent.passed)
            self._directories.add(here)
            self._walks[path] = found = Walk(path, here, parent.links, (*parent.passed, here))
            return found
        followed += 1
        if followed > MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        text = os.readlink(self.source(here))
        end = self._walk(text if text.startswith("/") else f"{parent.real.rstrip('/')}/{text}", followed)
        links = (*parent.links, (here, text), *end.links)
        if len(links) > MAX_LINKS:  # also what keeps links through links from growing without end
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        found = Walk(path, end.real, links, tuple(dict.fromkeys((*parent.passed, *end.passed))))
        if end.real in self._directories:
            self._walks[path] = found
        return found

    def resolve(self, path: str) -> str | None:
        """The real path of *path*, None when it does not resolve."""
        try:
            return self.walk(path).real
        except OSError:
            return None

    def kind(self, real: str) -> int:
        """S_IFREG, S_IFDIR, S_IFLNK or another S_IF* of what is at *real*; 0 when nothing is."""
        try:
            return stat.S_IFMT(os.lstat(self._root + real).st_mode)
        except OSError:
            return 0

    def text(self, real: str) -> str:
        """What the symlink at *real* says; empty when none is there."""
        try:
            return os.readlink(self._root + real)
        except OSError:
            return ""

    def entries(self, path: str, limit: int) -> list[tuple[str, int]]:
        """What is in the directory *path*: names, sorted, at most *limit*, with S_IFREG, S_IFDIR or S_IFLNK, and 0 for
        all other kinds. Nothing when *path* cannot be read or is a symlink itself.
        """
        try:
            fd = os.open(self.source(path), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return []
        try:
            with os.scandir(fd) as found:
                return sorted([(entry.name, _LINK if entry.is_symlink() else _kind(entry)) for entry in found])[:limit]
        except OSError:
            return []
        finally:
            os.close(fd)

    def for_everyone(self, real: str, below: str = "/") -> str | None:
        """The first of the directories from *below* down to *real* and *real* itself that not every user may read or
        search; None when all is open. *below* itself counts, its parents do not. Raises OSError when one is missing.
        """
        parts = [part for part in real[len(below.rstrip("/")) :].split("/") if part]
        here = below.rstrip("/")
        for name in ("", *parts):
            here = f"{here}/{name}" if name else here
            is_open = self._searchable.get(here)
            if is_open is None:
                mode = os.lstat(self.source(here or "/")).st_mode
                if stat.S_ISDIR(mode):
                    is_open = self._searchable[here] = bool(mode & stat.S_IXOTH)
                else:
                    is_open = bool(mode & stat.S_IROTH)
            if not is_open:
                return here or "/"
        return None

    def read(self, real: str, limit_bytes: int) -> bytes | None:
        """The content of the regular file *real*, a path without symlinks.

        None when it is missing, not a regular file, not readable by everyone (its directories included) or longer than
        *limit_bytes*: the engine may be root, the cell that gets the content is nobody.
        """
        try:
            if self.for_everyone(real.rpartition("/")[0]) is not None:
                return None
            # O_NONBLOCK: a fifo must not stop us, nor a device be woken, before fstat has told what it is.
            fd = os.open(self.source(real), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError:
            return None
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or not info.st_mode & stat.S_IROTH or info.st_size > limit_bytes:
                return None
            chunks: list[bytes] = []
            left = limit_bytes + 1
            while left > 0:
                # Not all that may be there: a buffer of that size costs more than the read.
                chunk = os.read(fd, min(left, info.st_size + 1))
                if not chunk:
                    return b"".join(chunks)
                chunks.append(chunk)
                left -= len(chunk)
        except OSError:
            return None
        finally:
            os.close(fd)
        return None


_LINK = stat.S_IFLNK


def _kind(entry: os.DirEntry[str]) -> int:
    """The kind of *entry*, which is no symlink."""
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    return stat.S_IFREG if entry.is_file(follow_symlinks=False) else 0
