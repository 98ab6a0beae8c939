"""Control groups: one interface over v2, v1 and hybrid hosts.

``discover`` finds where each controller lives, ``sweep`` removes what dead engines left, ``Instance.create`` makes and
bounds this engine's directories, ``Instance.make_leaf`` a leaf for a cell. With controllers on v1, an empty v2
hierarchy beside them still serves as twin: limits on v1, life-cycle (kill, freeze, events, CLONE_INTO_CGROUP) and CPU
time on v2.

A run, as the engine does it:

    leaf.set_limits(LeafLimits(memory_bytes=..., pids=..., cpus=...))
    leaf.begin()
    ...     # the cell is cloned into leaf.clone_fd and writes "0" into leaf.entry_fds(); the loop watches leaf.oom_fd
    leaf.counters()
    leaf.kill()     # belt: the cell's pid 1 was killed before
    if not leaf.reusable():
        leaf.remove()   # False: ask again later; meanwhile the slot gets a new leaf
"""

from __future__ import annotations

from sandboxd.cgroup.discovery import CONTROLLERS, Hierarchy, Layout, discover
from sandboxd.cgroup.instance import Bounds, Facts, Instance
from sandboxd.cgroup.leaf import REUSE_BELOW_BYTES, Counters, Leaf, LeafLimits
from sandboxd.cgroup.none import NoInstance
from sandboxd.cgroup.sweep import Swept, sweep

__all__ = [
    "CONTROLLERS",
    "REUSE_BELOW_BYTES",
    "Bounds",
    "Counters",
    "Facts",
    "Hierarchy",
    "Instance",
    "Layout",
    "Leaf",
    "LeafLimits",
    "NoInstance",
    "Swept",
    "discover",
    "sweep",
]
