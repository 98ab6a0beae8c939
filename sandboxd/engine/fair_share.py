"""How much of the engine's one thread a uid may take by what it sends.

Requests are parsed where every run is watched, so who sends large ones in a row would stop everybody's clocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FairShare", "Floor"]

_SMALL_SECONDS: Final = 0.001
"""The loop's clock has no finer step; less than this is added up until it is more."""


class Floor:
    """All uids': in one iteration of the loop one of them has something large looked at, whatever their number."""

    def __init__(self) -> None:
        self.taken = False

    def take(self) -> None:
        """Until the next iteration."""
        if not self.taken:
            self.taken = True
            asyncio.get_running_loop().call_soon(self._leave)

    def _leave(self) -> None:
        self.taken = False


class FairShare:
    """One uid's: as long as its packets took, so long the next one waits, whatever the number of its connections. A
    *free* one, of an operator, only lets the others in between.
    """

    def __init__(self, free: bool, floor: Floor | None = None) -> None:
        self._free = free
        self._floor = floor or Floor()
        self._lock = asyncio.Lock()
        self._until = self._spent = 0.0

    async def turn(self) -> None:
        """Until the next packet may be taken. What it costs must be ``counted`` before the caller suspends again."""
        if self._free:
            if self._spent > _SMALL_SECONDS:  # not each time: going round costs as much as a small request
                self._spent = 0.0
                await asyncio.sleep(0)
        else:
            async with self._lock:
                wait = self._until - time.monotonic()
                await asyncio.sleep(wait if wait > _SMALL_SECONDS else 0)
        while self._floor.taken:
            await asyncio.sleep(0)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Around work for this uid that does not suspend."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.spent(begun)

    def spent(self, begun: float) -> float:
        """As ``counted``, of work that *begun* at that time.monotonic(). Seconds until more may be taken, 0 for now."""
        now = time.monotonic()
        self._spent += now - begun
        if now - begun > _SMALL_SECONDS:
            self._floor.take()
        if self._free:
            return 0.0
        self._until = max(self._until, begun) + (now - begun) * 2
        owed = self._until - now
        if owed <= _SMALL_SECONDS:
            return 0.0
        # Keeps this object: who hangs up and comes again is still the same.
        asyncio.get_running_loop().call_later(owed, self._paid)
        return owed

    def took(self, seconds: float) -> None:
        """As ``counted``, of work that another thread has done."""
        self.spent(time.monotonic() - seconds)

    def _paid(self) -> None:
        pass
