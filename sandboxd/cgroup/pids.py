"""The pids controller, whose files are the same on v1 and v2. Source: Documentation/admin-guide/cgroup-v1/pids.rst."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sandboxd.cgroup.files import Fds, Group
    from sandboxd.cgroup.numbers import Numbers

__all__ = ["Pids", "bound_pids"]


def bound_pids(group: Group, limit: int | None) -> None:
    """Let at most *limit* tasks live in *group* and below; None for any number. Raises OSError."""
    group.write("pids.max", "max" if limit is None else str(limit))


class Pids:
    """The pids files of one leaf. Threads and zombies count."""

    def __init__(self, group: Group, fds: Fds, numbers: Numbers) -> None:
        self._group = group
        self._current = numbers.add(fds.file(group, "pids.current"), "", "tasks")
        # Forks refused in this leaf. One that the instance's bound refused counts too, but not on v2 since 6.11.
        numbers.add(fds.file(group, "pids.events"), "max", "pids_hits")
        self._peak = None
        if group.has("pids.peak"):  # Linux 6.1
            self._peak = numbers.add(fds.file(group, "pids.peak"), "", "pids_peak")

    def set_limit(self, limit: int | None) -> None:
        bound_pids(self._group, limit)

    def peak(self) -> int:
        """The most there ever were, by the last reading; 0 where the kernel does not tell."""
        return 0 if self._peak is None else self._peak.last

    def current(self) -> int:
        """Now."""
        return self._current.now()
