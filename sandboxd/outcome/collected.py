"""The files that a program leaves: what of them is handed over, and whether there are any at all."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from sandboxd._native import lib
from sandboxd._util import disposal

__all__ = ["Collected", "Known", "is_untouched"]

Known = dict[str, tuple[int, int]]
"""Inode and ctime in ns of each input file. A program can set mtime, but not ctime."""


@dataclass(slots=True)
class Collected:
    """The files of a run: path, size and offset of each in the memfd *fd* (-1: there are none), sorted by path."""

    files: list[tuple[str, int, int]] = field(default_factory=list)
    skipped: int = 0
    fd: int = -1

    def take(self) -> int:
        """The memfd, now the caller's."""
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        """Close what nobody took."""
        fd = self.take()
        if fd >= 0:
            disposal.close(fd, Collected)


def is_untouched(workspace: int, known: Known) -> bool:
    """Whether nothing was put there and the program made nothing: no file to look for. Only the root's link count and
    size are asked, which tmpfs keeps. Raises OSError.
    """
    if known:
        return False
    empty = lib.sbx_is_empty(workspace)
    if empty < 0:
        raise OSError(-empty, os.strerror(-empty))
    return empty != 0
