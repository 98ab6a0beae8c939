"""What the numbers of a leaf come to: one run's counters, from values now and at its start.

Pure, so that whoever holds the descriptors can do it: the engine, or the caller of an embedded one for its own run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Final, Literal

__all__ = ["Counters", "Reading", "Role", "Row"]

Role = Literal[
    "cpu", "user", "system", "throttled", "peak", "current", "hits", "kills", "again", "pids_peak", "pids_hits", "tasks"
]
"""What a number counts. "hits" may be there twice; "system" only where the two parts must be scaled to the total;
"again" says how many of "kills" were counted twice."""

# Charges are tried in batches of 64 pages (MEMCG_CHARGE_BATCH), so a limit is met when less than that is left; larger
# folios are not insisted on.
_CHARGE_BYTES: Final = 64 * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Counters:
    """What one run used and touched, counted since ``Leaf.begin``.

    *memory_peak_bytes* includes page cache, tmpfs and kernel memory. *oom_kills* counts tasks of this leaf killed by
    any OOM, also the host's: it was the leaf's own limit only if *memory_limit_hits* is not 0 too. *memory_limit_hits*
    counts how often usage met the limit; on v1 also when reclaim then made room. *pids_peak* is None where the kernel
    cannot tell it for this run alone.
    """

    cpu_usec: int
    cpu_user_usec: int
    cpu_system_usec: int
    throttled_usec: int
    memory_peak_bytes: int
    memory_current_bytes: int
    memory_limit_hits: int
    oom_kills: int
    pids_peak: int | None
    pids_limit_hits: int


@dataclass(frozen=True, slots=True)
class Row:
    """One number: in which unit it counts, as a divisor to microseconds, bytes or times."""

    role: Role
    divisor: int = 1


@dataclass(frozen=True, slots=True)
class Reading:
    """The rows of a leaf in the order of its numbers, their values when the run began, and what else is needed.

    *memory_limit* is the limit where meeting it is not always counted (v1, see ``counters``), else None. *pids_floor*
    is how many tasks every run has at once: as long as the peak was not above it, the next run's is exact; after that
    it is known only when it rises, since the kernel resets no pids.peak.
    """

    rows: tuple[Row, ...]
    before: tuple[int, ...]
    memory_limit: int | None
    pids_floor: int

    def counters(self, values: tuple[int, ...]) -> Counters:
        """What *values*, of now, come to."""
        cpu = user = system = throttled = hits = kills = again = pids_hits = peak = current = 0
        scaled = False
        pids_peak: int | None = None
        for row, now, was in zip(self.rows, values, self.before, strict=True):
            count = now - was
            match row.role:
                case "cpu":
                    cpu = count // row.divisor
                case "user":
                    user = count
                case "system":
                    system, scaled = count, True
                case "throttled":
                    throttled = count // row.divisor
                case "peak":
                    peak = now
                case "current":
                    current = now
                case "hits":
                    hits += count
                case "kills":
                    kills = count
                case "again":
                    again = count
                case "pids_peak":
                    pids_peak = now if now > was or was <= self.pids_floor else None
                case "pids_hits":
                    pids_hits = count
                case _:
                    continue
        if scaled and user + system:  # sampled by ticks: of the two parts the ratio is used
            user = cpu * user // (user + system)
        # Else scaled by the kernel at every read, so it may step back by a few microseconds.
        user = cpu if scaled and not user + system else min(max(user, 0), cpu)
        killed = max(kills - again, min(kills, 1))  # a task that was gone by then was counted once
        if not hits and self.memory_limit is not None and peak > self.memory_limit - _CHARGE_BYTES:
            # Charges meet memory+swap first, and since about Linux 6.14 refusals there are counted nowhere
            # (mem_cgroup_css_alloc sets track_failcnt for memory only; seen on 6.18).
            hits = 1
        return Counters(cpu, user, cpu - user, throttled, peak, current, hits, killed, pids_peak, pids_hits)

    def tasks(self, values: tuple[int, ...]) -> int:
        """How many tasks are in the leaf, zombies included."""
        return next(now for row, now in zip(self.rows, values, strict=True) if row.role == "tasks")

    def plain(self) -> dict[str, Any]:
        """As values that JSON can carry; ``from_plain`` is its inverse."""
        return {
            "rows": [[row.role, row.divisor] for row in self.rows],
            "before": list(self.before),
            "memory_limit": self.memory_limit,
            "pids_floor": self.pids_floor,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Reading:
        """Of the engine's own words: not checked."""
        rows = tuple(Row(role, divisor) for role, divisor in plain["rows"])
        return cls(rows, tuple(plain["before"]), plain["memory_limit"], plain["pids_floor"])
