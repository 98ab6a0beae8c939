"""What a service tells its manager: sd_notify(3) in a few lines, without libsystemd.

One datagram of ``NAME=value`` lines to the socket that NOTIFY_SOCKET names. Without a manager nothing is sent, and
nothing that goes wrong here stops the daemon: a manager that hears nothing acts by itself.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import MutableMapping

__all__ = ["Notifier"]

log = logging.getLogger("sandboxd")

SEND_SECONDS: Final = 2.0
"""A manager whose queue is full is waited for so long; the event loop stands still meanwhile."""


class Notifier:
    """The way to the service manager. Its variables are taken out of *environment*: they are for this process alone."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        self._address = _address(environment.pop("NOTIFY_SOCKET", ""))
        usec, pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
        mine = self._address is not None and pid in ("", str(os.getpid()))
        self.watchdog_seconds = int(usec) / 1e6 if mine and usec.isascii() and usec.isdigit() else 0.0
        """Without a sign of life for so long, the manager ends this process; 0: it does not look."""

    def ready(self, status: str) -> None:
        """The start, or a reload, is over."""
        self._send(f"READY=1\nSTATUS={_line(status)}")

    def status(self, status: str) -> None:
        """One line for people, in ``systemctl status``."""
        self._send(f"STATUS={_line(status)}")

    def reloading(self) -> None:
        """A reload begins; ``ready`` ends it, also when it failed."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str) -> None:
        """The end begins."""
        self._send(f"STOPPING=1\nSTATUS={_line(status)}")

    def extend(self, seconds: float) -> None:
        """What is under way, a start, a reload or a stop, may take that much longer from now on."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def alive(self) -> None:
        """A sign of life."""
        self._send("WATCHDOG=1")

    def _send(self, text: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(SEND_SECONDS)
                sock.sendto(text.encode("utf-8", "replace"), self._address)
        except OSError as error:
            log.warning("the service manager could not be told %s: %s", text.partition("\n")[0], error)


def _address(text: str) -> str | None:
    """The address that NOTIFY_SOCKET spells: a path, or "@" and an abstract name, unix(7)."""
    if text.startswith("@") and len(text) > 1:
        return f"\0{text[1:]}"
    if text.startswith("/"):
        return text
    if text:
        log.warning("NOTIFY_SOCKET is %r, which is no address of AF_UNIX: nobody is notified", text[:200])
    return None


def _line(text: str) -> str:
    # A line break would begin another assignment.
    return "".join(c if c.isprintable() else " " for c in text)
