"""Slots: who may use which host uid and which cgroup leaf, one run at a time."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from sandboxd.engine.cells.messages import Entry

if TYPE_CHECKING:
    from sandboxd.cgroup.interface import AnyInstance, AnyLeaf

__all__ = ["Slot", "Slots"]

FEW: Final = 64
BACKLOG: Final = 64
"""So many leaves may wait for the thread that retires them. It needs a thirtieth of the time that it takes a program to
make what there is to reclaim, so this is reached only where dozens of CPUs do nothing else."""
_RETRY_SECONDS: Final = 0.05
_CLOSE_SECONDS: Final = 0.25
"""So long the end of the engine reclaims at most, the leaf that is under way apart."""
log = logging.getLogger("sandboxd.engine")


class Slot:
    """One slot: its number decides the uid; its leaf is made when first needed and kept while it may be used again."""

    __slots__ = ("_entry", "_leaf", "index")

    def __init__(self, index: int) -> None:
        self.index = index
        self._leaf: AnyLeaf | None = None
        self._entry: Entry | None = None

    @property
    def leaf(self) -> AnyLeaf:
        """Its cgroup leaf. Raises LookupError when it has none, which ``Slots.take`` sees to."""
        if self._leaf is None:
            raise LookupError(f"slot {self.index} has no leaf")
        return self._leaf

    @property
    def entry(self) -> Entry:
        """How a cell enters the leaf."""
        if self._entry is None:
            self._entry = Entry(self.leaf.clone_fd, self.leaf.entry_fds())
        return self._entry

    def close_idle_fds(self) -> None:
        """Of so many live cells, this one's leaf is not needed before its end."""
        if self._leaf is not None:
            self._entry = None
            self._leaf.close_idle_fds()

    def has_leaf(self) -> bool:
        """Whether ``leaf`` is there."""
        return self._leaf is not None

    def put(self, leaf: AnyLeaf | None) -> AnyLeaf | None:
        """Give it another leaf, or none; returns the one it had."""
        before, self._leaf, self._entry = self._leaf, leaf, None
        return before


class Slots:
    """The free slots, last used first: its leaf and network namespace are there already, and still warm.

    A leaf that is not used again is *retired*: one thread has the kernel forget the names that its cell asked for, and
    removes it. That thread alone uses the leaf until it is done.
    """

    def __init__(self, instance: AnyInstance, capacity: int, zygote_uid: int) -> None:
        self._instance = instance
        self._zygote_uid = zygote_uid
        self._free = [Slot(index) for index in range(capacity - 1, -1, -1)]
        self._capacity = capacity
        self._retired: list[AnyLeaf] = []
        self._retiring: list[AnyLeaf] = []
        self._thread: ThreadPoolExecutor | None = None
        self._reclaim_until = math.inf
        self._leaving: list[AnyLeaf] = []
        self._abandoned: dict[AnyLeaf, Slot] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def take(self) -> Slot:
        """A free slot with a leaf. Raises OSError when the leaf cannot be made, IndexError when none is free."""
        slot = self._free.pop()
        try:
            if not slot.has_leaf():
                slot.put(self._instance.make_leaf(slot.index))
                slot.leaf.clone_owner(self._zygote_uid)
        except BaseException:
            if (leaf := slot.put(None)) is not None:
                self._remove(leaf)
            self._free.append(slot)
            raise
        return slot

    def give_back(self, slot: Slot) -> None:
        """Every process of the slot's cell is dead. A leaf that is not as new is taken away; the next run gets
        another.
        """
        try:
            as_new = not slot.has_leaf() or slot.leaf.reusable()
        except OSError:
            as_new = False
        if not as_new and (leaf := slot.put(None)) is not None:
            self._retire(leaf)
        self._free.append(slot)

    def abandon(self, slot: Slot) -> None:
        """Something in *slot* would not die: its uid is not used again before its leaf is empty. Without cgroups nobody
        can tell when that is: the slot is lost to this engine.
        """
        leaf = slot.put(None)
        if leaf is None or not leaf.counts:
            log.error("slot %d is lost to this engine", slot.index)
            return
        log.error("slot %d is lost to this engine until its cgroup leaf %s is empty", slot.index, leaf.name)
        self._abandoned[leaf] = slot
        self._remove(leaf)

    # Leaves that are not used again

    def _retire(self, leaf: AnyLeaf) -> None:
        if len(self._retired) >= BACKLOG or self._closed:
            self._remove(leaf)  # what the kernel keeps for it is the instance's then
            return
        leaf.close_idle_fds()
        self._retired.append(leaf)
        self._retire_next()

    def _retire_next(self) -> None:
        if self._retiring or not self._retired or self._closed:
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "sandboxd-leaves")
        self._retiring, self._retired = self._retired, []
        done = asyncio.get_running_loop().run_in_executor(self._thread, self._clear, self._retiring)
        done.add_done_callback(self._cleared)

    def _clear(self, leaves: list[AnyLeaf]) -> list[AnyLeaf]:
        """In the thread: reclaim and remove *leaves*; returns those that are still there."""
        for leaf in leaves:
            if time.monotonic() < self._reclaim_until:
                try:
                    leaf.reclaim_names()
                except OSError as error:
                    log.warning("memory of cgroup leaf %s cannot be reclaimed: %s", leaf.name, error)
        return [leaf for leaf in leaves if not self._is_removed(leaf)]

    def _cleared(self, done: asyncio.Future[list[AnyLeaf]]) -> None:
        self._retiring = []
        if self._closed or done.cancelled():
            return
        for leaf in done.result():
            self._remove(leaf)
        self._retire_next()

    def _remove(self, leaf: AnyLeaf) -> None:
        """Now, or as soon as it is empty."""
        self._leaving.append(leaf)
        if self._timer is None:
            self._remove_leaving()

    def _remove_leaving(self) -> None:
        self._timer = None
        self._leaving = [leaf for leaf in self._leaving if not self._is_removed(leaf)]
        if self._leaving:
            self._timer = asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._remove_leaving)

    def _is_removed(self, leaf: AnyLeaf) -> bool:
        """Whether nothing is left to do for *leaf*."""
        try:
            slot = self._abandoned.get(leaf)
            if slot is not None and not _is_empty(leaf):
                return False
            if not leaf.remove():
                return False
        except OSError as error:
            log.warning("cgroup leaf %s cannot be removed: %s", leaf.name, error)
            self._abandoned.pop(leaf, None)
            return True
        if slot is not None:
            del self._abandoned[leaf]
            # Used last: the pid namespace of what died there may end a moment later.
            self._free.insert(0, slot)
            log.info("slot %d is free again: its leaf is empty", slot.index)
        return True

    @property
    def many(self) -> bool:
        """Whether so many are in use that each should hold as few descriptors as it can."""
        return self._capacity - len(self._free) > FEW

    @property
    def free(self) -> int:
        """How many can be taken."""
        return len(self._free)

    def close(self) -> None:
        """Retire what waits for it, as far as a moment goes, and stop retrying; what is left goes with the instance.

        Waits for the leaf that the thread is at: its directory could not be removed before that either.
        """
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._reclaim_until = time.monotonic() + _CLOSE_SECONDS
        if self._thread is not None:
            self._thread.shutdown()
        self._clear(self._retired)


def _is_empty(leaf: AnyLeaf) -> bool:
    """Whether nothing is in it, zombies included."""
    try:
        return leaf.is_empty()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise
        return True  # one of its directories is gone already
