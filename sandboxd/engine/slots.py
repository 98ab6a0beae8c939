"""Slots: who may use which host uid and which cgroup leaf, one run at a time."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from sandboxd.zygote import Entry

if TYPE_CHECKING:
    from sandboxd.cgroup import Instance, Leaf

__all__ = ["Slot", "Slots"]

FEW: Final = 64
_RETRY_SECONDS: Final = 0.05
log = logging.getLogger("sandboxd.engine")


class Slot:
    """One slot: its number decides the uid; its leaf is made when first needed and kept while it may be used again."""

    __slots__ = ("_entry", "_leaf", "index")

    def __init__(self, index: int) -> None:
        self.index = index
        self._leaf: Leaf | None = None
        self._entry: Entry | None = None

    @property
    def leaf(self) -> Leaf:
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

    def doze(self) -> None:
        """Of so many live cells, this one's leaf is not needed before its end."""
        if self._leaf is not None:
            self._entry = None
            self._leaf.doze()

    def has_leaf(self) -> bool:
        """Whether ``leaf`` is there."""
        return self._leaf is not None

    def put(self, leaf: Leaf | None) -> Leaf | None:
        """Give it another leaf, or none; returns the one it had."""
        before, self._leaf, self._entry = self._leaf, leaf, None
        return before


class Slots:
    """The free slots, last used first: its leaf and network namespace are there already, and still warm."""

    def __init__(self, instance: Instance, capacity: int, zygote_uid: int) -> None:
        self._instance = instance
        self._zygote_uid = zygote_uid
        self._free = [Slot(index) for index in range(capacity - 1, -1, -1)]
        self._capacity = capacity
        self._leaving: list[Leaf] = []
        self._abandoned: dict[Leaf, Slot] = {}
        self._timer: asyncio.TimerHandle | None = None

    def take(self) -> Slot:
        """A free slot with a leaf. Raises OSError when the leaf cannot be made, IndexError when none is free."""
        slot = self._free.pop()
        try:
            if not slot.has_leaf():
                slot.put(self._instance.make_leaf(slot.index))
                slot.leaf.clone_owner(self._zygote_uid)
        except BaseException:
            self._drop_leaf(slot)
            self._free.append(slot)
            raise
        return slot

    def give_back(self, slot: Slot) -> None:
        """Every process of the slot's cell is dead. A leaf that is not as new is taken away; the next run gets
        another.
        """
        try:
            if slot.has_leaf() and not slot.leaf.reusable():
                self._drop_leaf(slot)
        except OSError:
            self._drop_leaf(slot)
        self._free.append(slot)

    def abandon(self, slot: Slot) -> None:
        """Something in *slot* would not die: its uid is not used again by this engine, its leaf goes when it is
        empty.
        """
        log.error("slot %d is lost to this engine", slot.index)
        self._drop_leaf(slot)

    def _drop_leaf(self, slot: Slot) -> None:
        leaf = slot.put(None)
        if leaf is not None:
            self._leaving.append(leaf)
            self._remove_leaving()

    def _remove_leaving(self) -> None:
        self._timer = None
        staying = []
        for leaf in self._leaving:
            try:
                if not leaf.remove():
                    staying.append(leaf)
                elif (slot := self._abandoned.pop(leaf, None)) is not None:
                    self._free.insert(0, slot)
            except OSError as error:
                log.warning("cgroup leaf %s cannot be removed: %s", leaf.name, error)
        self._leaving = staying
        if staying:
            self._timer = asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._remove_leaving)

    @property
    def many(self) -> bool:
        """Whether so many are in use that each should hold as few descriptors as it can."""
        return self._capacity - len(self._free) > FEW

    @property
    def free(self) -> int:
        """How many can be taken."""
        return len(self._free)

    def close(self) -> None:
        """Stop retrying; what is left goes with the instance."""
        if self._timer is not None:
            self._timer.cancel()
