"""Held time: how long one iteration of the engine's loop kept all others waiting, and how much it looked at.

Every clock and every kill of every tenant is an event of one loop. An iteration begins when the selector returns and
ends when it is asked again; its held time is the wall time in between, less the time in which the thread was ready to
run and had no processor. That is the host's load and nobody's fault here. Source: /proc/PID/task/TID/schedstat, whose
second field is the time on a run queue in ns (Documentation/scheduler/sched-stats.rst).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import selectors
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["ABOVE_SECONDS", "HeldTime", "of", "run"]

ABOVE_SECONDS: Final = (0.01, 0.05, 0.1, 1.0)
"""For each of these it is counted how many iterations held the loop for longer."""
SLOW_SECONDS: Final = 0.05
"""An iteration that was held for longer is remembered with its time."""
_SLOW: Final = 16
_LOOK_SECONDS: Final = 0.001
"""An iteration that is shorter by the wall clock is taken as it is: reading schedstat costs some µs."""
_STALE_SECONDS: Final = 0.005
_SWITCH_SECONDS: Final = 0.0005
"""How long a thread that parses or writes keeps the interpreter's lock when the loop wants it; Python's own is 5 ms."""
_STEPS: Final = 4  # of the histogram, for each power of two
_LEAST_SECONDS: Final = 1e-6
_BUCKETS: Final = 28 * _STEPS  # up to 268 s


class HeldTime:
    """Of one loop, since it began."""

    def __init__(self) -> None:
        self.iterations = 0
        self.worst_seconds = 0.0
        self.worst_bytes = self.worst_steps = 0
        self.slow: deque[tuple[float, float]] = deque(maxlen=_SLOW)
        """The last iterations above SLOW_SECONDS: when they ended, by time.monotonic(), and for how long they held."""
        self._bytes = self._steps = 0
        self._above = [0] * len(ABOVE_SECONDS)
        self._counts = [0] * _BUCKETS
        self._begun = self._read = -1.0
        self._waited = 0
        self._schedstat = -2

    def did(self, size_bytes: int) -> None:
        """The iteration has taken a packet, or a piece of a stream, of *size_bytes*."""
        self._bytes += size_bytes
        self._steps += 1

    def begin(self, slept: bool) -> None:
        """An iteration begins in this thread; *slept*: after a pause."""
        now = time.monotonic()
        # What it waited for a processor before now, to be woken or between short iterations, does not count.
        if slept or now - self._read > _STALE_SECONDS:
            self._waited = self._waiting()
            self._read = now
        self._begun = now

    def end(self) -> None:
        """It is over."""
        if self._begun < 0:
            return
        now = time.monotonic()
        held = now - self._begun
        self._begun = -1.0
        if held > _LOOK_SECONDS:
            waited = self._waiting()
            held = max(0.0, held - (waited - self._waited) / 1e9)
            self._waited, self._read = waited, now
        self.iterations += 1
        self._counts[_bucket(held)] += 1
        if held > self.worst_seconds:
            self.worst_seconds = held
        if held > ABOVE_SECONDS[0]:
            for index, bound in enumerate(ABOVE_SECONDS):
                self._above[index] += held > bound
            if held > SLOW_SECONDS:
                self.slow.append((now, held))
        if self._steps:
            self.worst_bytes = max(self.worst_bytes, self._bytes)
            self.worst_steps = max(self.worst_steps, self._steps)
            self._bytes = self._steps = 0

    def p99_seconds(self) -> float:
        """What 99 of 100 iterations stayed below, to a fifth of it."""
        left = self.iterations / 100
        for index in range(_BUCKETS - 1, -1, -1):
            left -= self._counts[index]
            if left < 0:
                return min(float(_LEAST_SECONDS * 2 ** ((index + 1) / _STEPS)), self.worst_seconds)
        return 0.0

    def plain(self) -> dict[str, Any]:
        """For ``stats``."""
        return {
            "worst": round(self.worst_seconds, 6),
            "p99": round(self.p99_seconds(), 6),
            "iterations": self.iterations,
            "above": {f"{bound:g}": count for bound, count in zip(ABOVE_SECONDS, self._above, strict=True)},
            "slow": [[round(time.monotonic() - ended, 3), round(held, 6)] for ended, held in self.slow],
            "worst_bytes": self.worst_bytes,
            "worst_steps": self.worst_steps,
        }

    def close(self) -> None:
        """The loop is over."""
        if self._schedstat >= 0:
            os.close(self._schedstat)
        self._schedstat = -1

    def _waiting(self) -> int:
        """Nanoseconds that this thread has waited for a processor; 0 where the kernel does not tell."""
        if self._schedstat == -2:
            self._schedstat = -1
            with contextlib.suppress(OSError):  # not configured (CONFIG_SCHED_INFO)
                self._schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        if self._schedstat < 0:
            return 0
        return int(os.pread(self._schedstat, 64, 0).split()[1])


def _bucket(seconds: float) -> int:
    if seconds <= _LEAST_SECONDS:
        return 0
    return min(int(math.log2(seconds / _LEAST_SECONDS) * _STEPS), _BUCKETS - 1)


class _Selector(selectors.EpollSelector):
    """Tells *held* when an iteration begins and ends."""

    def __init__(self, held: HeldTime) -> None:
        super().__init__()
        self._held = held

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._held.end()
        events = super().select(timeout)
        self._held.begin(timeout is None or timeout > 0)
        return events


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.held = HeldTime()
        super().__init__(_Selector(self.held))

    def close(self) -> None:
        super().close()
        self.held.close()


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """As ``asyncio.run``, on a loop whose held time is measured, and which other threads let go on soon."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    with asyncio.Runner(loop_factory=_Loop) as runner:
        runner.run(main())


def of(loop: asyncio.AbstractEventLoop) -> HeldTime:
    """The held time of *loop*; of one that ``run`` did not make, an empty one."""
    return loop.held if isinstance(loop, _Loop) else HeldTime()
