"""Which ids an engine claims: as root from ``ranges``, as an ordinary user from ``rootless``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from sandboxd.ids import ranges, rootless

if TYPE_CHECKING:
    from sandboxd.ids.ranges import IdBlock

__all__ = ["claim"]


def claim(config: str | None = None, *, slots: int = ranges.MAX_SLOTS) -> IdBlock:
    """A block of host ids that no other engine of this host holds, for *slots* cells or more; *config* is "base:count".

    Raises Unavailable (stage ``ids``).
    """
    return ranges.claim(config) if os.geteuid() == 0 else rootless.claim(config, slots=slots)
