"""Cells that were killed and are not dead yet: one look at all of them now and then, while there are any."""

from __future__ import annotations

import asyncio
import time
from typing import Final, Protocol

__all__ = ["Dying", "Reaper"]

_LOOK_SECONDS: Final = 0.02


class Dying(Protocol):
    """A cell that was sent SIGKILL."""

    def check_teardown(self, now: float) -> bool:
        """Help it along at *now*, a time.monotonic(); whether it takes too long."""

    def abandon(self) -> None:
        """It would not die."""


class Reaper:
    """``add`` when a cell is killed, ``discard`` when it is dead. Its length is the backlog of the teardown."""

    def __init__(self) -> None:
        self._cells: set[Dying] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._cells)

    def add(self, cell: Dying) -> None:
        """It was sent SIGKILL."""
        self._cells.add(cell)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._look)

    def discard(self, cell: Dying) -> None:
        """It is dead, or given up."""
        self._cells.discard(cell)

    def _look(self) -> None:
        self._timer = None
        now = time.monotonic()
        for cell in list(self._cells):
            if cell.check_teardown(now):
                self._cells.discard(cell)
                cell.abandon()
        if self._cells:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._look)

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
