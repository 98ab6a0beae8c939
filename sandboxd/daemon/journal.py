"""Log lines: for people and files, or for the journal where stderr leads there.

Names and messages come from clients, too: whatever is not printable is escaped, so that nobody can forge a line or
send a terminal a command. Sources: sd-daemon(3) for the prefixes; systemd.exec(5), "$JOURNAL_STREAM".
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["configure", "leads_to_journal"]

_PRIORITIES: Final = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG: Final = 7


class PlainFormatter(logging.Formatter):
    """One line for each record, and its traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = self._prefix(record)
        lines = [_escape(record.getMessage())]
        if record.exc_info:
            lines += [_escape(line) for line in self.formatException(record.exc_info).splitlines()]
        return "\n".join(f"{prefix}{line}" for line in lines)

    def _prefix(self, record: logging.LogRecord) -> str:
        return f"sandboxd: {record.levelname}: "


class JournalFormatter(PlainFormatter):
    """``<N>`` before each line; the journal knows the time and the service."""

    def _prefix(self, record: logging.LogRecord) -> str:
        return f"<{next((number for level, number in _PRIORITIES if record.levelno >= level), _DEBUG)}>"


def configure(environment: Mapping[str, str]) -> None:
    """Log to stderr from now on, in the form that fits where it leads."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JournalFormatter() if leads_to_journal(environment, 2) else PlainFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def leads_to_journal(environment: Mapping[str, str], fd: int) -> bool:
    """Whether *fd* is the stream that JOURNAL_STREAM names: somebody may have redirected it since."""
    device, colon, inode = environment.get("JOURNAL_STREAM", "").partition(":")
    if not colon:
        return False
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return (device, inode) == (str(status.st_dev), str(status.st_ino))


def _escape(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
