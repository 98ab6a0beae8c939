"""The engine's clock over all programs that run: one timer for the run that is due first, instead of two for each."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final, Literal, Protocol

__all__ = ["Clock", "Meter", "Mode", "Timed"]

Mode = Literal["timeout", "tool_wait", "approval"]
"""What a program's time goes to, by the name of what ends it: its wall clock, waiting for tools, being frozen."""

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sandboxd.limits import LimitValue

LIMIT_OF: Final[dict[Mode, str]] = {
    "timeout": "wall_seconds",
    "tool_wait": "tool_wait_seconds",
    "approval": "approval_seconds",
}


class Timed(Protocol):
    """A run under the clock; times are of time.monotonic()."""

    wall_end: float
    cpu_look: float

    def tick(self, now: float) -> None:
        """One of the two has come; both may be set anew."""


class Meter:
    """How long a program has been in each mode, and what is left of it; one of them at a time."""

    __slots__ = ("_left", "_since", "mode", "spent")

    def __init__(self, limits: Mapping[str, LimitValue], now: float) -> None:
        self._left = {mode: _seconds(limits[name]) for mode, name in LIMIT_OF.items()}
        self.spent: dict[Mode, float] = dict.fromkeys(LIMIT_OF, 0.0)
        self._since = now
        self.mode: Mode = "timeout"

    def switch(self, mode: Mode, now: float) -> float:
        """From *now* on it is *mode*; when that has lasted too long, counted with the times before."""
        passed = now - self._since
        self.spent[self.mode] += passed
        self._left[self.mode] -= passed
        self.mode, self._since = mode, now
        return now + self._left[mode]

    def stood_still(self) -> float:
        """Seconds in which the wall clock did not run, up to the last ``switch``."""
        return self.spent["tool_wait"] + self.spent["approval"]


def _seconds(limit: LimitValue) -> float:
    return float("inf") if limit is None else float(limit)


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
