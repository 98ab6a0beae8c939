"""Who may run: max_running turns, and the queue for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

from sandboxd.errors import Busy
from sandboxd.protocol.operations import Operation

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["DRAINING_SECONDS", "Admission", "Holder"]

DRAINING_SECONDS: Final = 1.0
"""After it, who was turned away because the engine ends may ask again: another one may be there."""


class Holder(Protocol):
    """Who holds a turn for a program that may never come."""

    def revoke(self) -> bool:
        """Somebody else wants the turn. False when the program has started."""


class Admission:
    """One engine's turns. A run takes one with ``enter`` and gives it back with ``leave``."""

    def __init__(self, most_running: int, most_queued: int) -> None:
        self.most_running = most_running
        self.most_queued = most_queued
        self.running = 0
        """Turns that are taken."""
        self.queued = 0
        self._holders: dict[Holder, None] = {}
        # By the uid that asked, in the order in which the uids are served.
        self._waiting: dict[object, deque[asyncio.Future[None]]] = {}
        self._draining = False
        self._closed = False

    @property
    def is_waited_for(self) -> bool:
        """Whether a run waits for its turn."""
        return bool(self._waiting)

    def check_open(self) -> None:
        """Raises Busy while the engine drains: nothing begins any more."""
        if self._draining:
            raise Busy(DRAINING_SECONDS)

    async def enter(
        self, who: object, wait_seconds: float | None, notice: Callable[[Operation], Awaitable[None]] | None
    ) -> None:
        """Take a turn. The uids that wait are served in rotation, the runs of one uid in their order: who asks for a
        hundred runs stands in nobody's way. *notice* is told "queued" when there is a wait, and then "admitted". Raises
        Busy.
        """
        if not self._waiting and (self.running < self.most_running or self._revoke()):
            self.running += 1
            return
        if self.queued >= self.most_queued:
            raise Busy(1.0)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        mine = self._waiting.setdefault(who, deque())
        mine.append(turn)
        self.queued += 1
        try:
            async with asyncio.timeout(wait_seconds):
                if notice is not None:
                    await notice(Operation.QUEUED)
                await turn
                if notice is not None:
                    await notice(Operation.ADMITTED)
        except BaseException as error:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.leave()  # it had become our turn just then
            if isinstance(error, TimeoutError):
                raise Busy(1.0) from None
            raise
        finally:
            self.queued -= 1
            with contextlib.suppress(ValueError):
                mine.remove(turn)
            if not mine and self._waiting.get(who) is mine:
                del self._waiting[who]

    def leave(self) -> None:
        """Give the turn to the next in the queue."""
        while self._waiting:
            who = next(iter(self._waiting))
            mine = self._waiting.pop(who)
            turn = mine.popleft()
            if mine:
                self._waiting[who] = mine  # behind the others
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1

    # Turns that callers of an embedded engine hold for cells that they start themselves

    def reserve(self, holder: Holder) -> bool:
        """Take a turn for *holder*, if nobody waits for one."""
        if self._closed or self._waiting or self.running >= self.most_running:
            return False
        self.running += 1
        self._holders[holder] = None
        return True

    def unreserve(self, holder: Holder) -> None:
        """Give it back."""
        if self._holders.pop(holder, self) is not self:
            self.leave()

    def _revoke(self) -> bool:
        """Take the turn that has been held longest for a program that has not come."""
        return any(holder.revoke() for holder in list(self._holders))

    # The end

    def drain(self) -> None:
        """Begin nothing any more: what is asked for, and what waits for its turn, is *busy*; what runs goes on."""
        self._draining = True
        for mine in self._waiting.values():
            for turn in mine:
                if not turn.done():
                    turn.set_exception(Busy(DRAINING_SECONDS))
        self._waiting.clear()

    def close(self) -> None:
        """Reserve nothing any more."""
        self._closed = True
