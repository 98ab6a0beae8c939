"""Limits and counters on cgroup v1 hierarchies: memory, cpu, cpuacct. (pids.py serves v1 and v2.)

Runs in the engine. Source: Documentation/admin-guide/cgroup-v1/memory.rst, Documentation/scheduler/sched-bwc.rst.
"""

from __future__ import annotations

import errno
import os

from sandboxd.cgroup.files import Fds, Group, flat_keyed, pread_int, pread_text

__all__ = ["Bandwidth", "CpuUsage", "Memory", "bound_memory", "swap_is_bounded"]

_MEMORY_LIMIT = "memory.limit_in_bytes"
_SWAP_LIMIT = "memory.memsw.limit_in_bytes"

# Charges are tried in batches of 64 pages (MEMCG_CHARGE_BATCH), so a limit is met when less than that is left; larger
# folios are not insisted on.
_CHARGE_BYTES = 64 * os.sysconf("SC_PAGE_SIZE")


def _write_memory_limit(group: Group, limit_bytes: int | None, *, raising: bool) -> None:
    """Set memory and memory+swap to the same value, which leaves no swap of its own.

    The kernel keeps memory <= memory+swap at every moment (EINVAL): the larger one goes first when raising, last when
    lowering.
    """
    text = "-1" if limit_bytes is None else str(limit_bytes)
    files = [_MEMORY_LIMIT]
    if group.has(_SWAP_LIMIT):
        files.insert(0 if raising else 1, _SWAP_LIMIT)
    for file in files:
        group.write(file, text)


def bound_memory(group: Group, limit_bytes: int | None) -> None:
    """Limits of the instance's own, new directory. Raises OSError.

    Swappiness 0 keeps its reclaim from swapping at all; leaves inherit the value when they are made.
    """
    group.write("memory.swappiness", "0")
    if limit_bytes is not None:
        _write_memory_limit(group, limit_bytes, raising=False)


def swap_is_bounded(group: Group) -> bool:
    """Whether this kernel accounts memory and swap together; if not, only swappiness 0 keeps a cell out of swap."""
    return group.has(_SWAP_LIMIT)


class Memory:
    """The memory files of one leaf. Values are bytes; counts are since ``begin``."""

    peak_resettable = True

    def __init__(self, group: Group, fds: Fds) -> None:
        self._group = group
        self._limit: int | None = None
        self._peak = fds.own(group.open("memory.max_usage_in_bytes", os.O_RDWR))
        self._usage = fds.own(group.open("memory.usage_in_bytes"))
        # The two limits are the same, so either may be the one that counts a hit.
        self._failcnts = [fds.own(group.open("memory.failcnt"))]
        swap_failcnt = group.open_if_there("memory.memsw.failcnt")
        if swap_failcnt is not None:
            self._failcnts.append(fds.own(swap_failcnt))
        self._oom_control = fds.own(group.open("memory.oom_control"))
        self._kills_before = self._hits_before = 0
        # The kernel signals the eventfd before it kills, also for an OOM of the instance's own directory, and on rmdir.
        self.oom_fd = fds.own(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        group.write("cgroup.event_control", f"{self.oom_fd} {self._oom_control}")

    def set_limit(self, limit_bytes: int | None) -> None:
        before = self._limit
        raising = before is not None and (limit_bytes is None or limit_bytes > before)
        _write_memory_limit(self._group, limit_bytes, raising=raising)
        self._limit = limit_bytes

    def begin(self) -> None:
        os.pwrite(self._peak, b"0", 0)  # resets the high-water mark to what is in use now
        self._kills_before = self._kills()
        self._hits_before = self._hits()
        self.oom_clear()

    def _kills(self) -> int:
        return flat_keyed(pread_text(self._oom_control)).get("oom_kill", 0)

    def _hits(self) -> int:
        return sum(map(pread_int, self._failcnts))

    def oom_clear(self) -> None:
        try:
            os.eventfd_read(self.oom_fd)
        except BlockingIOError:
            return

    def oom_kills(self) -> int:
        return self._kills() - self._kills_before

    def limit_hits(self) -> int:
        """How often usage met the limit, or 1 when the count says 0 and the peak otherwise.

        Charges meet memory+swap first, and since about Linux 6.14 refusals there are counted nowhere
        (mem_cgroup_css_alloc sets track_failcnt for memory only; seen on 6.18).
        """
        hits = self._hits() - self._hits_before
        if not hits and self._limit is not None and self.peak() > self._limit - _CHARGE_BYTES:
            return 1
        return hits

    def peak(self) -> int:
        return pread_int(self._peak)

    def current(self) -> int:
        return pread_int(self._usage)

    def reclaim(self) -> None:
        try:
            self._group.write("memory.force_empty", "0")
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EINTR):
                raise


class Bandwidth:
    """cpu.cfs_quota_us and its neighbours of one leaf."""

    def __init__(self, group: Group, fds: Fds) -> None:
        self._group = group
        self._stat = fds.own(group.open("cpu.stat"))
        self._burst = group.has("cpu.cfs_burst_us")  # Linux 5.14, not in every configuration
        self._period_usec = 0
        self._throttled_before = 0

    def set_quota(self, quota_usec: int | None, period_usec: int) -> None:
        """At most *quota_usec* of CPU time in each *period_usec*, None for no limit. Raises OSError."""
        write = self._group.write
        if self._burst:
            write("cpu.cfs_burst_us", "0")  # burst <= quota holds at every moment: EINVAL
        if self._period_usec != period_usec:
            write("cpu.cfs_period_us", str(period_usec))
            self._period_usec = period_usec
        write("cpu.cfs_quota_us", "-1" if quota_usec is None else str(quota_usec))
        if self._burst and quota_usec is not None:
            write("cpu.cfs_burst_us", str(quota_usec))

    def begin(self) -> None:
        self._throttled_before = self._throttled()

    def _throttled(self) -> int:
        return flat_keyed(pread_text(self._stat)).get("throttled_time", 0) // 1000

    def throttled_usec(self) -> int:
        return self._throttled() - self._throttled_before


class CpuUsage:
    """CPU time from cpuacct, for hosts without a v2 mount (the twin measures it too, and needs no hierarchy more)."""

    def __init__(self, group: Group, fds: Fds) -> None:
        self._total = fds.own(group.open("cpuacct.usage"))
        self._user = fds.own(group.open("cpuacct.usage_user"))
        self._system = fds.own(group.open("cpuacct.usage_sys"))
        self._before = (0, 0, 0)

    def _read(self) -> tuple[int, int, int]:
        return pread_int(self._total), pread_int(self._user), pread_int(self._system)

    def begin(self) -> None:
        self._before = self._read()

    def usage_usec(self) -> int:
        return (pread_int(self._total) - self._before[0]) // 1000

    def times_usec(self) -> tuple[int, int, int]:
        """Total, user and system time. The total is exact; of the others, sampled by ticks, the ratio is used."""
        total, user, system = (now - before for now, before in zip(self._read(), self._before, strict=True))
        total //= 1000
        user_usec = total * user // (user + system) if user + system else total
        return total, user_usec, total - user_usec
