"""The attack table: what hostile code tries inside a cell, and exactly how it is refused. One module a theme."""

from __future__ import annotations

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

__all__ = ["ATTACKS", "Attack"]
