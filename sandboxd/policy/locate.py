"""Where a key stands in a TOML text: the line that an error about it names. tomllib keeps no positions."""

from __future__ import annotations

import re

__all__ = ["line_of"]


def line_of(text: str, key: str) -> int | None:
    """The line of *text* (from 1) that sets *key*, a dotted path, or that of the nearest table above it; None if
    neither.

    This reads headers and the start of ``key =`` lines, and skips strings of several lines, which may hold anything; an
    array of several lines can only hold what looks like neither.
    """
    wanted = tuple(key.split("."))
    table: tuple[str, ...] = ()
    best: tuple[int, int | None] = (0, None)  # how many parts of the path matched, and where
    closing = ""
    for number, line in enumerate(text.splitlines(), 1):
        if closing:
            _, closed, rest = line.partition(closing)
            closing = _opened(rest) if closed else closing
            continue
        header = re.match(r"\s*\[\[?([^\[\]]+)\]\]?\s*(#.*)?$", line)
        setting = None if header else re.match(r"\s*([A-Za-z0-9_\-.\"' ]+?)\s*=", line)
        if header:
            table = path = _dotted(header[1])
        elif setting:
            path = (*table, *_dotted(setting[1]))
        else:
            continue
        if path == wanted[: len(path)] and len(path) > best[0]:
            best = (len(path), number)
        if setting:
            closing = _opened(line[setting.end() :])
    return best[1]


def _dotted(name: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in name.split("."))


def _opened(rest: str) -> str:
    """The delimiter of a string of several lines that begins in *rest* and does not end there, else nothing."""
    start = re.match(r"\s*(\"{3}|'{3})", rest)
    return start[1] if start and start[1] not in rest[start.end() :] else ""
