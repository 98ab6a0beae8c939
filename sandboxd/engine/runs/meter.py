"""What a program's time goes to, and what is left of each kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

__all__ = ["Meter", "Mode"]

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
