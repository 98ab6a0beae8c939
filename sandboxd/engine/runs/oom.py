"""Whether a program was killed for the memory that it took, where the kernel's notice comes before its count."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from sandboxd.engine.cells.state import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.engine.cells.cell import Cell

__all__ = ["OomWatch"]

PAUSES: Final = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064)
"""Seconds between the looks for a kill that is counted after it was announced."""


class OomWatch:
    """Of one run; *killed* is called when there was a kill."""

    def __init__(self, killed: Callable[[], None]) -> None:
        self._killed = killed
        self._looks: int | None = None

    def noticed(self, cell: Cell | None) -> None:
        """There may have been an OOM kill in *cell*."""
        looking, self._looks = self._looks is not None, 0
        if not looking:
            self._look(cell)

    def _look(self, cell: Cell | None) -> None:
        """Where the notice comes before the count there are several looks, the first of them again for each notice, and
        never two series of them.
        """
        look, self._looks = self._looks, None
        if cell is None or cell.life.state is not State.RUNNING:
            return
        cell.leaf.oom_clear()
        if cell.leaf.oom_kills():
            self._killed()
        elif cell.leaf.counts_kills_late and look is not None and look < len(PAUSES):
            self._looks = look + 1
            asyncio.get_running_loop().call_later(PAUSES[look], self._look, cell)

    def close(self) -> None:
        """The run is over, and this forgets it."""
        self._killed = _nothing


def _nothing() -> None:
    """The run is over."""
