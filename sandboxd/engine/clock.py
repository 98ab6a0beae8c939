"""The engine's clock over all programs that run: one timer for the run that is due first, instead of two for each."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

__all__ = ["Clock", "Timed"]


class Timed(Protocol):
    """A run under the clock; times are of time.monotonic()."""

    wall_end: float
    cpu_look: float

    def tick(self, now: float) -> None:
        """One of the two has come; both may be set anew."""


class Clock:
    """``add`` when a program starts, ``remove`` when its run is over."""

    def __init__(self) -> None:
        self._runs: set[Timed] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._due = float("inf")

    def __len__(self) -> int:
        return len(self._runs)

    def add(self, run: Timed) -> None:
        """*run*'s program starts."""
        self._runs.add(run)
        self._set(min(run.wall_end, run.cpu_look))

    def changed(self, run: Timed) -> None:
        """A time of *run*'s, which is under the clock, was set anew."""
        if run in self._runs:
            self._set(min(run.wall_end, run.cpu_look))

    def remove(self, run: Timed) -> None:
        """It is over; the timer may ring once for nothing."""
        self._runs.discard(run)

    def _set(self, due: float) -> None:
        if due >= self._due:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = asyncio.get_running_loop().call_later(max(0.0, due - time.monotonic()), self._ring)

    def _ring(self) -> None:
        self._timer, self._due = None, float("inf")
        now = time.monotonic()
        for run in list(self._runs):
            if now >= run.wall_end or now >= run.cpu_look:
                run.tick(now)
        self._set(min((min(run.wall_end, run.cpu_look) for run in self._runs), default=float("inf")))

    def close(self) -> None:
        """Ring no more."""
        if self._timer is not None:
            self._timer.cancel()
        self._due = float("-inf")
