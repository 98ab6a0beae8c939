"""How long an asyncio loop is held: by its callbacks, and by whatever else keeps it from its turn.

A loaded machine must not fail a test, so what counts is wall time less the time in which the loop's thread was ready
and had no CPU. Source: second field of /proc/thread-self/schedstat, nanoseconds (kernel: scheduler/sched-stats.rst).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TICK_SECONDS = 0.002


class Held:
    """What ``holding`` found. *callback*: the longest of one callback, *what*, in seconds. *late*: how late the loop
    was at most for a timer, which is also what another thread costs it that keeps the interpreter's lock.
    """

    def __init__(self) -> None:
        self.callback = 0.0
        self.what = ""
        self.late = 0.0
        self._fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._fd)

    def now(self) -> float:
        """Seconds of this thread in which it ran or waited for anything but a CPU."""
        waited = int(os.pread(self._fd, 100, 0).split()[1])
        return time.monotonic() - waited / 1e9


@contextlib.asynccontextmanager
async def holding() -> AsyncIterator[Held]:
    """Watch the running loop within the block, which ends when all that was begun in it has had its turn."""
    loop = asyncio.get_running_loop()
    held = Held()
    plain = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        if handle._loop is not loop:  # type: ignore[attr-defined]  # tests may look
            plain(handle)
            return
        begun = held.now()
        try:
            plain(handle)
        finally:
            taken = held.now() - begun
            if taken > held.callback:
                held.callback = taken
                held.what = repr(getattr(handle._callback, "__self__", None) or handle)  # type: ignore[attr-defined]

    async def ticking() -> None:
        while True:
            begun = held.now()
            await asyncio.sleep(TICK_SECONDS)
            held.late = max(held.late, held.now() - begun - TICK_SECONDS)

    asyncio.Handle._run = timed  # type: ignore[method-assign,assignment]
    ticks = asyncio.create_task(ticking())
    try:
        await asyncio.sleep(TICK_SECONDS)
        yield held
        await asyncio.sleep(2 * TICK_SECONDS)
    finally:
        asyncio.Handle._run = plain  # type: ignore[method-assign]
        ticks.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ticks
        held.close()
