"""The parked cells of one policy: how many, and when they are made.

A run takes the cell that was parked last: its pages are the warmest. More are made off the request path: at once for
runs that wait, otherwise when no run is under way, or this much later. How many wait follows the rate at which they are
taken. What is stale, beyond the memory bound, or no longer healthy is ended.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

from sandboxd.engine.cells.cell import Cell
from sandboxd.engine.cells.shape import CellSpec, same_spec
from sandboxd.engine.cells.state import State
from sandboxd.engine.cells.zygote import ZygoteLost
from sandboxd.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sandboxd.engine.cells.resources import Resources
    from sandboxd.engine.cells.zygote import Zygote
    from sandboxd.limits import LimitValue

__all__ = ["Borrower", "Pool"]

log = logging.getLogger("sandboxd.engine")

COVER_SECONDS: Final = 0.05
"""So many cells wait as are taken in this time."""
RATE_SECONDS: Final = 1.0
"""What was taken longer ago counts by half for each of these."""
DEFER_SECONDS: Final = 0.01
"""A refill waits for the end of a run, but not longer."""
TIDY_SECONDS: Final = 1.0
RETRY_SECONDS: Final = 0.5
_DYING: Final = 64
"""Cells that die; with more no new ones are made, so that a teardown that lags slows admission."""


class Borrower(Protocol):
    """A caller of an embedded engine who runs programs in parked cells itself."""

    def offer(self, cell: Cell) -> bool:
        """*cell* is parked. False when it cannot be given: then it stays the pool's."""

    def revoke(self, again: bool = True) -> bool:
        """It is over before its program came; *again*: another cell is wanted. False when the program has started."""


class Pool:
    """Of one zygote, for the *limits* of one policy; idle until ``open``. *on_worn* is called when the zygote has
    served for so long that another one should take its place.
    """

    # More than 15 attributes: where a cell can be (five places), who can wait for one (three ways), and two timers.

    def __init__(
        self,
        resources: Resources,
        name: str,
        limits: Mapping[str, LimitValue],
        zygote: Zygote,
        on_worn: Callable[[], None],
    ) -> None:
        self._resources = resources
        self._name = name
        self._limits = limits
        self._zygote = zygote
        self._on_worn = on_worn
        self._settings = resources.config.pool
        self._loop = asyncio.get_running_loop()
        self._spec = CellSpec.of(limits, resources.no_cgroups)
        self._parked: list[Cell] = []
        self._making: set[Cell] = set()
        self._waiting: deque[asyncio.Future[Cell]] = deque()
        self._borrowers: deque[Borrower] = deque()
        self._lent: dict[Cell, Borrower] = {}
        self._failed_waiters: dict[Cell, list[tuple[asyncio.Future[Cell], Exception]]] = {}
        self._special: dict[Cell, asyncio.Future[Cell]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._tidying: asyncio.TimerHandle | None = None
        self._rate = 0.0
        self._rated = time.monotonic()
        self._open = False
        self._retry_at = 0.0
        self.living = 0

    # Runs

    def take(self, limits: dict[str, LimitValue]) -> Cell | None:
        """A parked cell that serves *limits*; None when there is none."""
        if not self._parked or not same_spec(limits, self._limits, self._resources.no_cgroups):
            return None
        cell = self._parked.pop()
        self._taken()
        return cell

    async def acquire(self, limits: dict[str, LimitValue]) -> Cell:
        """A cell for a run that has to wait for it. Raises Unavailable, and ZygoteLost when the zygote is lost before
        there is one: nothing of the run exists then.
        """
        future: asyncio.Future[Cell] = self._loop.create_future()
        if same_spec(limits, self._limits, self._resources.no_cgroups):
            if self._open:
                self._taken(waits=True)
            self._waiting.append(future)
            try:
                self._refill()
                return await future
            except BaseException:
                self._withdraw(future)
                raise
        cell = Cell(self._resources, self._zygote, CellSpec.of(limits, self._resources.no_cgroups), self)
        self._special[cell] = future
        self.living += 1
        try:
            cell.make(hurry=True)
        except BaseException:
            del self._special[cell]
            self.living -= 1
            raise
        try:
            return await future
        except BaseException:
            self._special.pop(cell, None)
            cell.discard()
            raise

    # Callers of an embedded engine that run their programs themselves

    def lend(self, borrower: Borrower) -> None:
        """Offer *borrower* a parked cell: now, or when one is there."""
        if borrower not in self._borrowers:
            self._borrowers.append(borrower)
        self._lend()

    def unlend(self, borrower: Borrower) -> None:
        """It wants none any more."""
        if borrower in self._borrowers:
            self._borrowers.remove(borrower)

    def _lend(self) -> None:
        """A cell that has rehearsed goes to who has waited longest; whatever is refused stays. Beyond the first, one is
        kept back for runs that come the ordinary way.
        """
        while self._borrowers and not self._waiting and self._parked and self._parked[-1].is_parked:
            if len(self._parked) == 1 and self._lent_idle():
                return
            borrower = self._borrowers[0]
            cell = self._parked.pop()
            if not borrower.offer(cell):
                self._parked.append(cell)
                return
            self._borrowers.popleft()
            self._lent[cell] = borrower
            self._taken()

    def _lent_idle(self) -> int:
        """Cells that are lent and wait for a program."""
        return sum(1 for cell in self._lent if cell.life.state is State.SEALED)

    def _withdraw(self, future: asyncio.Future[Cell]) -> None:
        """Who waited does so no more; a cell that was given just then is kept."""
        if future in self._waiting:
            self._waiting.remove(future)
        elif future.done() and not future.cancelled() and future.exception() is None:
            self.sealed(future.result())

    def _taken(self, waits: bool = False) -> None:
        now = time.monotonic()
        self._rate = self._rate * 0.5 ** ((now - self._rated) / RATE_SECONDS) + 1.0
        self._rated = now
        if not waits and self._timer is None:
            self._timer = self._loop.call_later(DEFER_SECONDS, self._refill)

    @property
    def target(self) -> int:
        """How many cells shall be parked now."""
        settings = self._settings
        rate = self._rate * 0.5 ** ((time.monotonic() - self._rated) / RATE_SECONDS) * 0.7  # ln 2: taken in a second
        return max(settings.minimum, min(settings.maximum, settings.minimum + int(rate * COVER_SECONDS)))

    # The keeper of the cells

    def sealed(self, cell: Cell) -> None:
        """As ``cell.CellOwner``."""
        self._making.discard(cell)
        special = self._special.pop(cell, None)
        if special is not None:
            if special.done():
                cell.discard()
            else:
                special.set_result(cell)
            return
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(cell)
                self._refill()
                return
        if not self._open or len(self._parked) >= self._settings.maximum:
            cell.discard()
            return
        self._parked.insert(0, cell)  # it is taken last: it has not rehearsed
        self._refill()

    def parked(self, cell: Cell) -> None:
        """As ``cell.CellOwner``: the warmest is taken first."""
        if cell in self._parked:
            self._parked.remove(cell)
            self._parked.append(cell)
        lent = [one for one in self._lent if one.life.state is State.SEALED]
        used = sum(one.leaf.memory_seen() for one in [*self._parked, *lent] if one.is_parked)
        while used > self._settings.memory_bytes and len(self._parked) > 1:
            oldest = self._parked.pop(0)
            used -= oldest.leaf.memory_seen()
            oldest.discard()
        self._lend()

    def failed(self, cell: Cell, why: Unavailable | None) -> None:
        """As ``cell.CellOwner``."""
        error: Exception = why or self._lost()
        self._making.discard(cell)
        special = self._special.pop(cell, None)
        if special is not None:
            self._failed_waiters[cell] = [(special, error)]
            return
        if cell in self._parked:
            self._parked.remove(cell)
        if why is not None:
            log.warning("a cell of policy %s could not be parked: %s", self._name, why)
        self._retry_at = time.monotonic() + RETRY_SECONDS
        told = self._failed_waiters[cell] = []
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                told.append((future, error))
                if why is not None:
                    break  # one refusal for one run: the next attempt may go better
        self._later(RETRY_SECONDS)

    def gone(self, cell: Cell) -> None:
        """As ``cell.CellOwner``."""
        self.living -= 1
        self._lent.pop(cell, None)
        self._tell(cell)
        if self._waiting or not self._resources.busy:
            self._refill()

    def _tell(self, cell: Cell) -> None:
        """Those who waited for *cell* learn that it failed, once nothing of it is left."""
        for future, error in self._failed_waiters.pop(cell, ()):
            if not future.done():
                future.set_exception(error)

    # Making

    def open(self) -> None:
        """Begin to park cells."""
        self._open = self._settings.maximum > 0
        self._refill()
        if self._open:
            self._tidying = self._loop.call_later(TIDY_SECONDS, self._tidy)

    def _later(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(seconds, self._refill)

    def _refill(self) -> None:
        """Have cells made: for those who wait, then up to the target."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._zygote.lost:
            self._give_up()
            return
        resources = self._resources
        most_running = resources.admission.most_running
        wanted = len(self._waiting) - len(self._making)
        if self._open:
            if time.monotonic() < self._retry_at:
                self._later(RETRY_SECONDS)
            else:
                # Those that are lent and still wait are as good as parked.
                wanted += max(0, self.target - len(self._parked) - self._lent_idle())
        while wanted > 0 and len(self._making) < resources.makers and len(resources.reaper) < _DYING + most_running:
            if resources.slots.free <= (0 if self._waiting else most_running) and resources.reaper:
                return  # the slots that are left are for runs; a cell that is dying gives one back
            wanted -= 1
            cell = Cell(resources, self._zygote, self._spec, self)
            try:
                cell.make(hurry=len(self._waiting) > len(self._making))
            except (Unavailable, ZygoteLost) as error:
                self.failed(cell, error if isinstance(error, Unavailable) else None)
                self._tell(cell)
                return
            self._making.add(cell)
            self.living += 1

    def _give_up(self) -> None:
        """No cell will be made any more: those who wait for one learn it."""
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(self._lost())

    def _lost(self) -> ZygoteLost:
        return ZygoteLost(self._zygote.last_words())

    def _tidy(self) -> None:
        """Now and then: end what is stale or too many, look after those that are late."""
        self._tidying = self._loop.call_later(TIDY_SECONDS, self._tidy)
        now = time.monotonic()
        for cell in [*self._making, *self._special]:
            cell.check_late(now)
        stale = [cell for cell in self._parked if now - cell.made_at > self._settings.age_seconds]
        cold = next((cell for cell in self._parked if self._is_cold(cell) and cell not in stale), None)
        if cold is not None:
            stale.append(cold)  # one at a time: the others may be wanted now
        too_many = len(self._parked) - len(stale) + self._lent_idle() > self.target
        if too_many and len(stale) < len(self._parked):
            stale.append(next(cell for cell in self._parked if cell not in stale))
        for cell in stale:
            self._parked.remove(cell)
            cell.discard()
        for cell, borrower in list(self._lent.items()):
            late = now - cell.made_at > self._settings.age_seconds or self._is_cold(cell)
            if (late or (too_many and not self._parked)) and borrower.revoke(again=late):
                too_many = False
        if len(self._parked) < self.target and not self._resources.busy:
            self._refill()
        zygote = self._zygote
        if zygote.made >= self._settings.zygote_cells or now - zygote.born > self._settings.zygote_seconds:
            self._on_worn()

    def _is_cold(self, cell: Cell) -> bool:
        """Whether it was forked before the zygote knew what the warm-up touches, and it knows now."""
        warm_at = self._zygote.warm_at
        return warm_at is not None and cell.made_at < warm_at

    # The end

    @property
    def waiting(self) -> int:
        """Cells that are ready for a program: parked, or lent and not used yet."""
        return len(self._parked) + self._lent_idle()

    def counts(self) -> dict[str, int]:
        """For operators and measurements: cells that are parked, being made, and alive in all."""
        return {"parked": len(self._parked), "making": len(self._making), "living": self.living}

    def close(self) -> None:
        """No more is parked, what is parked ends; runs keep their cells, and may still ask for more."""
        self._open = False
        self._borrowers.clear()
        for handle in (self._timer, self._tidying):
            if handle is not None:
                handle.cancel()
        self._timer = self._tidying = None
        for borrower in list(self._lent.values()):
            borrower.revoke()
        parked, self._parked = self._parked, []
        for cell in parked:
            if cell.life.state is State.SEALED:
                cell.discard()
