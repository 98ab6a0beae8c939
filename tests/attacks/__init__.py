"""The attack table: what hostile code tries inside a cell, and exactly how it is refused. One module a theme."""

from __future__ import annotations

import re
from typing import Final

from tests.attacks import files, host, identity, kernel, mounts, namespaces, network, processes
from tests.attacks.base import Attack

ATTACKS: tuple[Attack, ...] = (
    *files.ATTACKS,
    *mounts.ATTACKS,
    *namespaces.ATTACKS,
    *network.ATTACKS,
    *identity.ATTACKS,
    *kernel.ATTACKS,
    *processes.ATTACKS,
    *host.ATTACKS,
)

# What may depend on whose the engine is, and on its cgroup: files and processes that belong to its user, ids, groups.
_OF_THE_ENGINE: Final = re.compile(r"bait|cgroup|-of-init|leaked|overwrite|setuid|setgid|setgroups|chown|signal-owner")

SAMPLE: Final = frozenset(
    row.id for number, row in enumerate(ATTACKS) if number % 10 == 0 or _OF_THE_ENGINE.search(row.id)
)
"""Enough where a whole table has been run on the same kernel by an engine that differs in its user, its cgroup, or the
way its cells come about.
"""

__all__ = ["ATTACKS", "SAMPLE", "Attack"]
