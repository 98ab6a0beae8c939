"""What our commands write: escaped text, colours only on a terminal, JSON, and the program's own bytes passed through.

Names, messages and other words that came out of a cell are hostile: they reach a terminal only through ``escape``. The
program's stdout and stderr are the exception, by contract: they pass through as they are.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import IO, TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sandboxd.errors import SandboxError

__all__ = [
    "OutputLost",
    "Passthrough",
    "complain",
    "describe",
    "emit_json",
    "escape",
    "paint",
    "quantity",
    "table",
    "write",
]

# The styles that commands use, as keyword arguments of click.style.
STYLES: dict[str, dict[str, Any]] = {
    "bad": {"fg": "red", "bold": True},
    "good": {"fg": "green"},
    "warn": {"fg": "yellow"},
    "dim": {"dim": True},
    "head": {"bold": True},
}


class OutputLost(Exception):
    """Our own *name* ("stdout" or "stderr") takes no more bytes: *errno* is EPIPE when its reader went away."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(f"cannot write to {name}: {os.strerror(number)}")
        self.name = name
        self.errno = number

    @property
    def reader_gone(self) -> bool:
        return self.errno == errno.EPIPE


def escape(text: str) -> str:
    """*text* on one line and harmless to a terminal.

    Everything that ``str.isprintable`` refuses becomes a backslash escape: C0 and C1 controls, line and paragraph
    separators, bidirectional overrides, lone surrogates, unassigned code points.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def colours(stream: IO[str] | None) -> bool:
    """Whether *stream* is a terminal that wants colours (https://no-color.org)."""
    if stream is None or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


def paint(text: str, style: str, stream: IO[str] | None = None) -> str:
    """*text* in one of STYLES when *stream* (stdout unless given) is a terminal; *text* must be escaped already."""
    return click.style(text, **STYLES[style]) if colours(stream or sys.stdout) else text


def write(line: str = "", *, err: bool = False) -> None:
    """One line on stdout or stderr; its parts must be escaped already. Raises OutputLost."""
    try:
        click.echo(line, err=err)
    except OSError as error:
        raise OutputLost("stderr" if err else "stdout", error.errno or errno.EIO) from error


def complain(message: str) -> None:
    """One line on stderr, after our name, escaped; a stderr that is gone is no reason to fail again."""
    try:
        click.echo(f"{paint('sandboxd:', 'bad', sys.stderr)} {escape(message)}", err=True)
    except OSError:
        silence()


def describe(error: SandboxError) -> str:
    """The words of *error* for one line on stderr."""
    return str(error) or type(error).__name__


def emit_json(value: Any) -> None:
    """*value* as one JSON object on one line.

    ASCII only: a terminal sees no control character, no C1 byte and no bidirectional override of a program's output,
    and a lone surrogate stays representable. Raises OutputLost.
    """
    import json

    write(json.dumps(value, ensure_ascii=True, allow_nan=False))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns on stdout under a *head*; every cell is escaped here."""
    escaped = [[escape(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(head), *escaped]) for i in range(len(head))]
    for number, row in enumerate([head, *escaped]):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        write(paint(line, "head") if number == 0 else line)


def quantity(size_bytes: float) -> str:
    """A number of bytes as people say it: 512 MiB, 1.5 GiB, 300 bytes."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= factor:
            return f"{round(size_bytes / factor, 1):g} {unit}"
    return f"{size_bytes:.0f} bytes"


def silence() -> None:
    """Point stdout and stderr at /dev/null, so that the flush at exit does not complain about what they cannot take."""
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    for fd in (1, 2):
        os.dup2(null, fd)
    os.close(null)


class Passthrough:
    """A callback that hands a program's text on to one of our own streams, whole and at once.

    Text is written as UTF-8; lone surrogates that stand for undecodable bytes (PEP 383) become those bytes again.
    Raises OutputLost when the stream takes no more.
    """

    def __init__(self, name: str, stream: IO[str] | None) -> None:
        self.name = name
        self._stream = stream
        self.at_line_start = True

    def __call__(self, text: str) -> None:
        if not text or self._stream is None:
            return
        self.at_line_start = text.endswith("\n")
        try:
            data = text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            data = text.encode("utf-8", "replace")
        try:
            self._stream.flush()
            try:
                fd = self._stream.fileno()
            except (OSError, ValueError):  # replaced by an object without a descriptor
                self._stream.buffer.write(data)  # type: ignore[attr-defined]  # text streams of the standard library have it
                return
            write_all(fd, data)
        except OSError as error:
            raise OutputLost(self.name, error.errno or errno.EIO) from error


def write_all(fd: int, data: bytes) -> None:
    """Write *data* to *fd*, also when whoever shares its open file made it non-blocking."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            import select

            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll()
