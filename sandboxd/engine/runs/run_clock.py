"""One run's limits of time: wall clock, waiting for tools, approval, and CPU time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sandboxd.engine.runs.meter import Meter, Mode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sandboxd.cgroup.interface import AnyLeaf
    from sandboxd.engine.clock import Clock
    from sandboxd.limits import LimitValue
    from sandboxd.outcome.judge import Cause

__all__ = ["RunClock"]


class RunClock:
    """As ``clock.Timed``. Times are of time.monotonic()."""

    def __init__(
        self, clock: Clock, limits: Mapping[str, LimitValue], cpus: int, expired: Callable[[Cause], None]
    ) -> None:
        """*cpus* is how many the host has; *expired* is told which limit was reached."""
        self.started: float | None = None
        self.wall_end = self.cpu_look = float("inf")
        self._clock = clock
        self._limits = limits
        self._cpus = cpus
        self._expired = expired
        self._leaf: AnyLeaf | None = None
        self._meter: Meter | None = None

    def start(self, leaf: AnyLeaf, ago_seconds: float = 0.0, with_tools: bool = False) -> None:
        """The program started so long ago in *leaf*."""
        self.started = now = time.monotonic() - ago_seconds
        self._leaf = leaf
        wall, cpu = self._limits["wall_seconds"], self._limits["cpu_seconds"]
        if wall is not None:
            self.wall_end = now + float(wall)
        if with_tools:
            self._meter = Meter(self._limits, now)
        if cpu is not None:
            self.cpu_look = now + self._cpu_left(float(cpu))
        self._clock.add(self)

    def begin_lost(self) -> None:
        """It started, and was lost before anything could be timed."""
        self.started = time.monotonic()

    def began(self, ago_seconds: float) -> None:
        """Its caller says that it began so long ago, which may be earlier than was known here."""
        if self.started is not None and (late := self.started - (time.monotonic() - ago_seconds)) > 0:
            self.started -= late
            self.wall_end -= late
            self._clock.changed(self)

    def spend(self, mode: Mode) -> None:
        """The program's time goes to *mode* from now on."""
        if self._meter is not None:
            self.wall_end = self._meter.switch(mode, time.monotonic())
            self._clock.changed(self)

    def stop_meter(self, now: float) -> None:
        """The program is over; the mode that it was in has lasted until *now*."""
        if self._meter is not None:
            self._meter.switch(self._meter.mode, now)

    def stood_still(self) -> float:
        """Seconds in which the wall clock did not run."""
        return 0.0 if self._meter is None else self._meter.stood_still()

    def rest(self) -> None:
        """The run is over: nothing expires any more."""
        self.wall_end = self.cpu_look = float("inf")

    def tick(self, now: float) -> None:
        """The clock reached ``wall_end`` or ``cpu_look``."""
        if now >= self.wall_end:
            self._expired("timeout" if self._meter is None else self._meter.mode)
        elif now >= self.cpu_look and self._leaf is not None:
            # No polling: the next look is when the limit could be reached at the earliest.
            left = float(self._limits["cpu_seconds"] or 0) - self._leaf.cpu_usec() / 1e6
            if left <= 0:
                self._expired("cpu")
            else:
                self.cpu_look = now + max(0.002, self._cpu_left(left))

    def _cpu_left(self, seconds: float) -> float:
        """How long *seconds* of CPU time last at least."""
        cpus = self._limits["cpus"]
        return seconds / (min(self._cpus, float(cpus)) if cpus is not None else self._cpus)

    def close(self) -> None:
        """The run is let go of, and this forgets it: a cycle would keep both until the next collection."""
        self._clock.remove(self)
        self._leaf = None
        self._expired = _ignored


def _ignored(_: Cause) -> None:
    """The run is over."""
