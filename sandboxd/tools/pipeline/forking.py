"""What begins anew in the child of a fork: locks that a thread of the parent may have held, and threads, of which the
child has none.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["renewed_after_fork"]


class Renewed(Protocol):
    """Has locks or threads."""

    def begin(self) -> None:
        """As when it was made."""


_all: weakref.WeakSet[Renewed] = weakref.WeakSet()


def renewed_after_fork(one: Renewed) -> None:
    """Have *one* begin now, and in every child that this process makes while it lives."""
    one.begin()
    _all.add(one)


def _after_fork_in_child() -> None:
    for one in list(_all):
        one.begin()


os.register_at_fork(after_in_child=_after_fork_in_child)
