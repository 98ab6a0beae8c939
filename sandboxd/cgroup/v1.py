"""Limits and counters on cgroup v1 hierarchies: memory, cpu, cpuacct. (pids.py serves v1 and v2.)

Runs in the engine. Source: Documentation/admin-guide/cgroup-v1/memory.rst, Documentation/scheduler/sched-bwc.rst.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sandboxd.cgroup.files import Fds, Group
    from sandboxd.cgroup.numbers import Numbers

__all__ = ["Bandwidth", "CpuUsage", "Freezer", "Memory", "bound_memory", "swap_is_bounded"]

_MEMORY_LIMIT = "memory.limit_in_bytes"
_SWAP_LIMIT = "memory.memsw.limit_in_bytes"
_KERNEL_USAGE = "memory.kmem.usage_in_bytes"


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
    """The memory files of one leaf. Values are bytes."""

    peak_resettable = counts_late = True

    def __init__(self, group: Group, fds: Fds, numbers: Numbers) -> None:
        self._group = group
        self.limit: int | None = None
        self._peak = fds.file(group, "memory.max_usage_in_bytes", os.O_RDWR)
        numbers.add(self._peak, "", "peak")
        self._usage = numbers.add(fds.file(group, "memory.usage_in_bytes"), "", "current")
        # The two limits are the same, so either may be the one that counts a hit.
        numbers.add(fds.file(group, "memory.failcnt"), "", "hits")
        if group.has("memory.memsw.failcnt"):
            numbers.add(fds.file(group, "memory.memsw.failcnt"), "", "hits")
        oom_control = fds.file(group, "memory.oom_control")
        self.kills = numbers.add(oom_control, "oom_kill", "kills")
        # The kernel signals the eventfd before it kills, also for an OOM of the instance's own directory, and on rmdir.
        self.oom_fd = fds.own(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        group.write("cgroup.event_control", f"{self.oom_fd} {oom_control.fd}")

    def set_limit(self, limit_bytes: int | None) -> None:
        before = self.limit
        raising = before is not None and (limit_bytes is None or limit_bytes > before)
        _write_memory_limit(self._group, limit_bytes, raising=raising)
        self.limit = limit_bytes

    def reset_peak(self) -> None:
        os.pwrite(self._peak.fd, b"0", 0)  # the high-water mark becomes what is in use now

    def oom_clear(self) -> None:
        try:
            os.eventfd_read(self.oom_fd)
        except BlockingIOError:
            return

    def current(self) -> int:
        """By the last reading."""
        return self._usage.last

    def left(self) -> tuple[int, int]:
        """Kernel memory, and page cache of files that are not on a tmpfs."""
        # A kernel without accounting of its own memory has no such file, and nothing to give back.
        kernel = int(self._group.read(_KERNEL_USAGE)) if self._group.has(_KERNEL_USAGE) else 0
        stat = self._group.read_table("memory.stat")
        return kernel, stat.get("cache", 0) - stat.get("shmem", 0)

    def reclaim(self) -> None:
        try:
            self._group.write("memory.force_empty", "0")
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EINTR):
                raise


class Bandwidth:
    """cpu.cfs_quota_us and its neighbours of one leaf."""

    def __init__(self, group: Group, fds: Fds, numbers: Numbers) -> None:
        self._group = group
        numbers.add(fds.file(group, "cpu.stat"), "throttled_time", "throttled", 1000)
        self._burst = group.has("cpu.cfs_burst_us")  # Linux 5.14, not in every configuration
        self._period_usec = 0

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


class CpuUsage:
    """CPU time from cpuacct, for hosts without a v2 mount (the twin measures it too, and needs no hierarchy more)."""

    def __init__(self, group: Group, fds: Fds, numbers: Numbers) -> None:
        self.total = numbers.add(fds.file(group, "cpuacct.usage"), "", "cpu", 1000)
        self.divisor = 1000
        numbers.add(fds.file(group, "cpuacct.usage_user"), "", "user")
        numbers.add(fds.file(group, "cpuacct.usage_sys"), "", "system")


class Freezer:
    """freezer.state of one leaf, for hosts without a v2 mount. Unlike there, what is frozen cannot even be killed: it
    dies when it is thawed. Source: Documentation/admin-guide/cgroup-v1/freezer-subsystem.rst.
    """

    def __init__(self, group: Group) -> None:
        self._group = group

    def freeze(self, on: bool) -> None:
        self._group.write("freezer.state", "FROZEN" if on else "THAWED")

    def frozen(self) -> bool:
        return self._group.read("freezer.state").strip() == "FROZEN"  # FREEZING until every task has stopped
