"""What all cells of one engine share: its cgroups, its ids, its slots, its clock, and how much of each there is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
from typing import TYPE_CHECKING, Final

from sandboxd import cgroup
from sandboxd.engine import held_time
from sandboxd.engine.admission import Admission
from sandboxd.engine.cells.reaper import Reaper
from sandboxd.engine.cells.shape import NoCgroups
from sandboxd.engine.cells.slots import Slots
from sandboxd.engine.clock import Clock
from sandboxd.engine.held_time import HeldTime
from sandboxd.errors import Unavailable
from sandboxd.ids.claim import claim

if TYPE_CHECKING:
    from sandboxd.cgroup.interface import AnyInstance
    from sandboxd.engine.config import EngineConfig
    from sandboxd.ids import ranges

__all__ = ["SPARE_DESCRIPTORS", "Resources"]

log = logging.getLogger("sandboxd.engine")

SPARE_SLOTS: Final = 64
"""Slots beyond max_running: a run that is dying slowly keeps its own."""
SPARE_DESCRIPTORS: Final = 256
"""Descriptors of the engine that no new cell may take."""


class Resources:
    """Handed down to pools, cells and runs. ``open``, then use, then ``close``."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.cpus = os.cpu_count() or 1
        self.admission = Admission(config.running(), config.max_queued)
        self.clock = Clock()
        self.reaper = Reaper()
        self.held = HeldTime()
        self.descriptors = 1 << 20
        """As many may be open."""
        self.crowded = False
        """Nearly as many are: a cell whose descriptors do not arrive costs the whole zygote."""
        self.no_cgroups: NoCgroups | None = None
        self.instance: AnyInstance
        self.ids: ranges.IdBlock
        self.slot_ids: ranges.SlotIds
        self.slots: Slots
        self._undo = contextlib.ExitStack()

    def open(self) -> None:
        """Sweep what a dead engine left, claim cgroups and ids. Raises Unavailable; nothing is left then."""
        self.held = held_time.of(asyncio.get_running_loop())
        # Every cell takes some thirty descriptors here; what cells may open is their own limit.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        if most != resource.RLIM_INFINITY:
            self.descriptors = most
        layout = cgroup.discover()
        for swept in cgroup.sweep(layout):
            log.info("swept what a dead engine left in %s; processes killed: %d", swept.name, swept.killed)
            if swept.left:
                log.warning("could not be removed, and is tried again by the next engine: %s", ", ".join(swept.left))
        running = self.admission.most_running
        with contextlib.ExitStack() as undo:
            bounds = cgroup.Bounds(memory_bytes=self.config.memory(), pids=self.config.tasks())
            try:
                self.instance = undo.enter_context(cgroup.Instance.create(layout, bounds))
            except Unavailable as refusal:
                # Whether that will do is the policy's to say: [require] cgroup (active_policy.py).
                self.instance = undo.enter_context(cgroup.NoInstance(refusal))
            # Beside those that run: parked ones, and those that are dying.
            wanted = running + max(SPARE_SLOTS, running + 2 * self.config.pool.maximum)
            self.ids = undo.enter_context(claim(self.config.ids, slots=wanted))
            self.slot_ids = self.ids.slots(wanted)
            if running > self.slot_ids.capacity:
                raise Unavailable(
                    "ids",
                    f"{running} cells at once need as many ids; the range has {self.slot_ids.capacity}",
                    fix="give the engine a larger range of ids, or lower max_running",
                )
            if isinstance(self.instance, cgroup.NoInstance):
                self.no_cgroups = NoCgroups(own_uid=self.ids.shared is None)
            self.instance.clone_owner(self.ids.base)
            self.slots = Slots(self.instance, min(wanted, self.slot_ids.capacity), self.ids.base)
            undo.callback(self.slots.close)
            self._undo = undo.pop_all()

    @property
    def busy(self) -> bool:
        """Whether a program runs, or one waits to: what can wait, then, should."""
        return bool(len(self.clock) or self.admission.is_waited_for)

    @property
    def makers(self) -> int:
        """How many cells of one policy are made at a time."""
        return max(2, self.cpus)

    def close(self) -> None:
        """Remove cgroups, give ids back. Idempotent."""
        self.clock.close()
        self.reaper.close()
        self._undo.close()
