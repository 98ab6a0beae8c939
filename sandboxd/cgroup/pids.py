"""The pids controller, whose files are the same on v1 and v2. Source: Documentation/admin-guide/cgroup-v1/pids.rst."""

from __future__ import annotations

from sandboxd.cgroup.files import Fds, Group, flat_keyed, pread_int, pread_text

__all__ = ["Pids", "bound_pids"]


def bound_pids(group: Group, limit: int | None) -> None:
    """Let at most *limit* tasks live in *group* and below; None for any number. Raises OSError."""
    group.write("pids.max", "max" if limit is None else str(limit))


class Pids:
    """The pids files of one leaf. Threads and zombies count. Counts are since ``begin``.

    The kernel cannot reset pids.peak. *floor* is how many tasks every run has at once: as long as the peak stayed at or
    below it, the next run's is exact; after that it is known only when it rises.
    """

    def __init__(self, group: Group, fds: Fds, floor: int) -> None:
        self._group = group
        self._floor = floor
        self._current = fds.own(group.open("pids.current"))
        self._events = fds.own(group.open("pids.events"))
        peak = group.open_if_there("pids.peak")  # Linux 6.1
        self._peak = None if peak is None else fds.own(peak)
        self._hits_before = self._peak_before = 0

    def set_limit(self, limit: int | None) -> None:
        bound_pids(self._group, limit)

    def begin(self) -> None:
        self._hits_before = self._hits()
        self._peak_before = 0 if self._peak is None else pread_int(self._peak)

    def _hits(self) -> int:
        return flat_keyed(pread_text(self._events)).get("max", 0)

    def limit_hits(self) -> int:
        """Forks refused in this leaf. One that the instance's bound refused counts too, but not on v2 since 6.11."""
        return self._hits() - self._hits_before

    def peak(self) -> int | None:
        if self._peak is None:
            return None
        peak = pread_int(self._peak)
        return peak if peak > self._peak_before or self._peak_before <= self._floor else None

    def peak_stays_exact(self) -> bool:
        """Whether the next run in this directory will have a peak of its own."""
        return self._peak is None or pread_int(self._peak) <= self._floor

    def current(self) -> int:
        return pread_int(self._current)
