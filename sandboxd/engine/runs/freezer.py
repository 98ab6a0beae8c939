"""While a program waits for the host: whose time it is, and the cell's freezing for an approval.

Runs in the engine. Frozen means every task of the cell's leaf, by the cgroup freezer: of v2, or of v1 where v2 is not
mounted. Nothing the program started goes on meanwhile, and no clock of its runs but that of ``approval_seconds``.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final, Protocol

from sandboxd.engine.cells.state import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.engine.cells.cell import Cell
    from sandboxd.engine.runs.meter import Mode

__all__ = ["Freezer", "Waiter"]

FREEZE_SECONDS: Final = 5.0
LOOK_SECONDS: Final = 0.001


class Waiter(Protocol):
    """The run."""

    def spend(self, mode: Mode) -> None:
        """Its time goes to *mode* from now on."""

    def is_stuck(self, error: OSError) -> None:
        """Its cell cannot be made to go on."""

    def listen(self, on: bool) -> None:
        """Read its cell's packets, or do not for the moment."""


class Freezer:
    """As ``tool_relay.Caller``, for one run in its cell."""

    def __init__(self, waiter: Waiter, cell: Cell) -> None:
        self._waiter = waiter
        self._cell = cell

    def waits(self, waiting: bool) -> None:
        """Whether it waits for at least one tool, from now on."""
        self._waiter.spend("tool_wait" if waiting else "timeout")

    def freeze(self, answer: Callable[[str], None]) -> None:
        """Stop the cell and its clocks; *answer* is told "" when it stands still, or why it does not."""
        if self._cell.life.state is not State.RUNNING:
            return
        try:
            self._cell.leaf.freeze(True)
        except OSError as error:
            answer(f"The cell cannot be frozen: {error.strerror}.")
            return
        self._waiter.spend("approval")
        self._look(answer, time.monotonic() + FREEZE_SECONDS)

    def _look(self, answer: Callable[[str], None], until: float) -> None:
        if self._cell.life.state is not State.RUNNING:
            return
        if self._cell.leaf.is_frozen():
            answer("")
        elif time.monotonic() > until:
            answer("The cell did not stand still in time.")
        else:
            asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look, answer, until)

    def thaw(self) -> None:
        """Let it go on, if it still lives: who ends it thaws it, too."""
        if self._cell.life.state is not State.RUNNING:
            return
        self._waiter.spend("tool_wait")
        try:
            self._cell.leaf.thaw()
        except OSError as error:
            self._waiter.is_stuck(error)

    def listen(self, on: bool) -> None:
        """Read the cell's packets, or do not for the moment."""
        self._waiter.listen(on)
