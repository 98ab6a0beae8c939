"""What an engine has in the place of cgroups where it gets none: the same small interface, without limits or counters.

A cell is ended through its init's pidfd, as always, and what rlimits can hold (``cells/shape.py``) is held. Nothing is
counted, nothing is frozen, and no notice of an OOM comes; receipts name what is missing. A policy that requires a
controller is refused with ``NoInstance.refusal``, which says why there is none and what gives it one.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sandboxd._util.closeable import Closing
from sandboxd.cgroup.reading import Counters, Reading

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.cgroup.instance import Facts
    from sandboxd.cgroup.leaf import LeafLimits
    from sandboxd.cgroup.numbers import Number
    from sandboxd.errors import Unavailable

__all__ = ["NoInstance", "NoLeaf"]

MISSING = (
    "limits of memory, processes and CPU time for a whole run: only rlimits for each process",
    "counters: the usage of runs is not measured",
    "freezing for approvals",
)


class NoInstance(Closing):
    """As ``interface.AnyInstance``: no directory in any hierarchy; *refusal* is why."""

    def __init__(self, refusal: Unavailable) -> None:
        self.refusal = refusal
        self._leaf: NoLeaf | None = None

    def facts(self) -> Facts:
        return {"version": "none", "controllers": [], "twin": False, "missing": list(MISSING)}

    @contextmanager
    def zygotes_entry(self) -> Iterator[tuple[int | None, list[int]]]:
        yield None, []

    def clone_owner(self, uid: int) -> None:
        pass

    def make_leaf(self, slot: int) -> NoLeaf:
        if self._leaf is None:
            self._leaf = NoLeaf()
        return self._leaf

    def close(self) -> None:
        leaf, self._leaf = self._leaf, None
        if leaf is not None:
            leaf.close()


class NoLeaf:
    """As ``interface.AnyLeaf``, of every cell: it holds nothing of any of them."""

    counts = False
    counts_kills_late = False

    def __init__(self) -> None:
        self.name = "none"
        self._never = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close(self) -> None:
        """Close its one descriptor."""
        os.close(self._never)

    def close_idle_fds(self) -> None:
        pass

    def set_limits(self, limits: LeafLimits) -> None:
        pass

    def begin(self) -> None:
        pass

    def counters(self) -> Counters:
        return Counters(0, 0, 0, 0, 0, 0, 0, 0, None, 0)

    def reading(self) -> Reading:
        return Reading((), (), None, 0)

    def numbers(self) -> list[Number]:
        return []

    def cpu_usec(self) -> int:
        return 0

    def memory_seen(self) -> int:
        return 0

    def tasks(self) -> int:
        """Nobody knows: more than one, so that a run's answer waits until everything of it is dead."""
        return 2

    def pids(self) -> list[int]:
        return []

    @property
    def oom_fd(self) -> int:
        """Never readable."""
        return self._never

    def oom_clear(self) -> None:
        pass

    def oom_kills(self) -> int:
        return 0

    def entry_fds(self) -> list[int]:
        return []

    @property
    def clone_fd(self) -> int | None:
        return None

    def clone_owner(self, uid: int) -> None:
        pass

    def is_empty(self) -> bool:
        return True

    def freeze(self, on: bool) -> None:
        raise OSError(errno.ENOTSUP, "without cgroups nothing can be frozen", self.name)

    def is_frozen(self) -> bool:
        return False

    def thaw(self) -> None:
        pass

    def unthrottle(self) -> None:
        pass

    def reusable(self) -> bool:
        """What says that a cell is dead is its pid namespace."""
        return True

    def reclaim_names(self) -> bool:
        return False

    def remove(self) -> bool:
        return True
