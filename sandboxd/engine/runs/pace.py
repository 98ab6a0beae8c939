"""How often a stream is read. Output is bounded in bytes, not in writes: a program that writes single bytes would have
the engine read each of them.
"""

from __future__ import annotations

from typing import Final

__all__ = ["Pace"]

_FULL_BYTES: Final = 16 << 10
"""A quarter of a pipe: a program that writes as fast as that is read as fast."""
_LEAST_SECONDS: Final = 0.001
_MOST_SECONDS: Final = 0.016


class Pace:
    """Of one stream: after each read that found little it is left alone, the longer the more often that happened in a
    row. A pipe holds 64 KiB, so nobody who writes little waits for its reader meanwhile.
    """

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next = _LEAST_SECONDS

    def after(self, found_bytes: int) -> float:
        """Seconds until the next read; 0 for now."""
        if found_bytes >= _FULL_BYTES:
            self._next = _LEAST_SECONDS
            return 0.0
        seconds = self._next
        self._next = min(2 * seconds, _MOST_SECONDS)
        return seconds

    def reset(self) -> None:
        """Nothing was there to be read: the next that comes is read at once."""
        self._next = _LEAST_SECONDS
