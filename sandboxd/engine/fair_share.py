"""How much of the engine's one thread, and of its memory, a uid may take by what it sends.

Requests are parsed where every run is watched, so who sends large ones in a row would stop everybody's clocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Final

from sandboxd.errors import Busy

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FairShare", "Floor", "Shares"]

HELD_BYTES: Final = 64 << 20
"""Source texts and JSON of one uid's requests, waiting or running; as Python's objects they take several times that."""
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


class Shares:
    """Every uid's share of one engine. A uid of None is the operator's, and not bounded."""

    def __init__(self) -> None:
        self._floor = Floor()
        self._shares: weakref.WeakValueDictionary[object, FairShare] = weakref.WeakValueDictionary()
        self._held: Counter[object] = Counter()

    def of(self, who: object) -> FairShare:
        """*who*'s share of the engine's thread, the same for all its connections."""
        if who is None:
            return FairShare(True, self._floor)
        found = self._shares.get(who)
        if found is None:
            found = self._shares[who] = FairShare(False, self._floor)
        return found

    @contextlib.contextmanager
    def hold(self, who: object, size_bytes: int) -> Iterator[None]:
        """Count a request of *size_bytes* among what *who* has in the engine's memory. Raises Busy when it is more than
        HELD_BYTES with the others.
        """
        if who is None:
            yield
            return
        if self._held[who] and self._held[who] + size_bytes > HELD_BYTES:
            raise Busy(1.0)
        self._held[who] += size_bytes
        try:
            yield
        finally:
            self._held[who] -= size_bytes
            if not self._held[who]:
                del self._held[who]
