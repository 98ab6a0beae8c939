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

__all__ = ["Share"]

_SMALL_SECONDS: Final = 0.001
"""The loop's clock has no finer step; less than this is added up until it is more."""


class Share:
    """One uid's: as long as its packets took, so long the next one waits, whatever the number of its connections. A
    *free* one, of an operator, only lets the others in between.
    """

    def __init__(self, free: bool) -> None:
        self._free = free
        self._lock = asyncio.Lock()
        self._until = self._spent = 0.0

    async def turn(self) -> None:
        """Until the next packet may be taken. What it costs must be ``counted`` before the caller suspends again."""
        if self._free:
            if self._spent > _SMALL_SECONDS:  # not each time: going round costs as much as a small request
                self._spent = 0.0
                await asyncio.sleep(0)
            return
        async with self._lock:
            wait = self._until - time.monotonic()
            await asyncio.sleep(wait if wait > _SMALL_SECONDS else 0)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Around work for this uid that does not suspend."""
        begun = time.monotonic()
        try:
            yield
        finally:
            now = time.monotonic()
            self._spent += now - begun
            self._until = max(self._until, begun) + (now - begun) * 2
            if not self._free and self._until - now > _SMALL_SECONDS:
                # Keeps this object: who hangs up and comes again is still the same.
                asyncio.get_running_loop().call_later(self._until - now, self._paid)

    def _paid(self) -> None:
        pass
