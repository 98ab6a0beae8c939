"""Limits, counters and life-cycle on the cgroup v2 hierarchy. The twin of v1 uses CpuUsage and LifeCycle only.

Runs in the engine. Source: Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import errno
import os
import select
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sandboxd.cgroup.files import Fds, Group
    from sandboxd.cgroup.numbers import Numbers

__all__ = [
    "Bandwidth",
    "CpuUsage",
    "LifeCycle",
    "Memory",
    "Notifier",
    "available_controllers",
    "bound_memory",
    "enable_controllers",
    "swap_is_bounded",
]

_SWAP_LIMIT = "memory.swap.max"


def available_controllers(group: Group) -> frozenset[str]:
    """What the parent of *group* lets it hand on to its children: cgroup.controllers."""
    return frozenset(group.read("cgroup.controllers").split())


def enable_controllers(group: Group, controllers: tuple[str, ...]) -> tuple[str, ...]:
    """Give the children of *group* these controllers; returns those that were off before.

    Raises OSError: EBUSY when processes live in *group* itself ("No Internal Process Constraint"), ENOENT for a
    controller that is not available.
    """
    enabled = group.read("cgroup.subtree_control").split()
    added = tuple(name for name in controllers if name not in enabled)
    if added:
        group.write("cgroup.subtree_control", " ".join(f"+{name}" for name in added))
    return added


def bound_memory(group: Group, limit_bytes: int | None) -> None:
    """Limits of a directory of the instance's; they hold for the sum of what is below, and no page of it is swapped."""
    if group.has(_SWAP_LIMIT):
        group.write(_SWAP_LIMIT, "0")
    if limit_bytes is not None:
        group.write("memory.max", str(limit_bytes))


def swap_is_bounded(group: Group) -> bool:
    """Whether this kernel accounts swap per cgroup."""
    return group.has(_SWAP_LIMIT)


class Notifier:
    """Turns the change notice of a control file into a descriptor that is *readable* until the file was read again.

    kernfs always says "readable" and marks a change by POLLPRI | POLLERR, for which most event loops cannot ask. An
    epoll instance that waits for it is itself readable exactly then.
    """

    def __init__(self, watched: int, fds: Fds) -> None:
        self._watched = watched
        with select.epoll() as epoll:
            epoll.register(watched, select.EPOLLPRI)
            self.fd = fds.own(os.dup(epoll.fileno()))  # a plain number with one owner, like every descriptor here
        self.clear()

    def clear(self) -> None:
        """Forget changes up to now, by reading the file."""
        os.pread(self._watched, 4096, 0)


class Memory:
    """The memory files of one leaf. Values are bytes."""

    limit = None  # meeting it is counted
    counts_late = False

    def __init__(self, group: Group, fds: Fds, numbers: Numbers) -> None:
        self._group = group
        group.write("memory.oom.group", "1")
        if group.has(_SWAP_LIMIT):
            group.write(_SWAP_LIMIT, "0")
        self._usage = numbers.add(fds.file(group, "memory.current"), "", "current")
        events = fds.own(group.open("memory.events"))
        self.kills = numbers.add(events, "oom_kill", "kills")
        # With memory.oom.group the kernel kills the chosen task, then the group with that task, and counts each time.
        numbers.add(events, "oom_group_kill", "again")  # Linux 5.17
        # Not "max", which also counts where reclaim made room: an OOM of the engine would pass for the leaf's own.
        numbers.add(events, "oom", "hits")
        self.peak_resettable = False
        try:
            self._peak_fd = fds.own(group.open("memory.peak", os.O_RDWR))
            os.pwrite(self._peak_fd, b"reset", 0)  # Linux 6.12; what later reads of this very descriptor start from
            self.peak_resettable = True
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EINVAL):
                raise
            self._peak_fd = fds.own(group.open("memory.peak"))
        numbers.add(self._peak_fd, "", "peak")
        self._notifier = Notifier(events, fds)
        self.oom_fd = self._notifier.fd

    def set_limit(self, limit_bytes: int | None) -> None:
        self._group.write("memory.max", "max" if limit_bytes is None else str(limit_bytes))

    def reset_peak(self) -> None:
        if self.peak_resettable:
            os.pwrite(self._peak_fd, b"reset", 0)

    def oom_clear(self) -> None:
        self._notifier.clear()

    def current(self) -> int:
        """By the last reading."""
        return self._usage.last

    def left(self) -> tuple[int, int]:
        """Kernel memory that could be reclaimed, and page cache of files that are not on a tmpfs."""
        stat = self._group.read_table("memory.stat")
        return stat.get("slab_reclaimable", 0), stat.get("file", 0) - stat.get("shmem", 0)

    def reclaim(self) -> None:
        try:
            self._group.write("memory.reclaim", self._group.read("memory.current").strip())  # Linux 5.19
        except OSError as error:
            # EAGAIN: it freed less than asked for, which is what one expects here.
            if error.errno not in (errno.EAGAIN, errno.EINTR, errno.ENOENT):
                raise


class Bandwidth:
    """cpu.max and its neighbours of one leaf."""

    def __init__(self, group: Group, fds: Fds, numbers: Numbers) -> None:
        self._group = group
        numbers.add(fds.file(group, "cpu.stat"), "throttled_usec", "throttled")
        self._burst = group.has("cpu.max.burst")  # Linux 5.14

    def set_quota(self, quota_usec: int | None, period_usec: int) -> None:
        """At most *quota_usec* of CPU time in each *period_usec*, None for no limit. Raises OSError."""
        if self._burst:
            self._group.write("cpu.max.burst", "0")  # burst <= quota holds at every moment: EINVAL
        self._group.write("cpu.max", f"{'max' if quota_usec is None else quota_usec} {period_usec}")
        if self._burst and quota_usec is not None:
            self._group.write("cpu.max.burst", str(quota_usec))


class CpuUsage:
    """CPU time from cpu.stat, which every v2 cgroup has, also without a controller. The kernel estimates the split."""

    def __init__(self, group: Group, fds: Fds, numbers: Numbers) -> None:
        stat = fds.file(group, "cpu.stat")
        self.total = numbers.add(stat, "usage_usec", "cpu")
        self.divisor = 1
        numbers.add(stat, "user_usec", "user")


class LifeCycle:
    """Whether a v2 directory is populated, stopping and killing it. *fd* is for CLONE_INTO_CGROUP."""

    def __init__(self, group: Group, fds: Fds, numbers: Numbers) -> None:
        self._group = group
        self._fds = fds
        self._directory = fds.file(group, ".", os.O_PATH | os.O_DIRECTORY)
        self._events = fds.file(group, "cgroup.events")
        self._populated = numbers.add(self._events, "populated")
        self._frozen = numbers.add(self._events, "frozen")
        self._kill = fds.file(group, "cgroup.kill", os.O_WRONLY)  # Linux 5.14
        self._notifier: Notifier | None = None

    @property
    def fd(self) -> int:
        """The directory, O_PATH."""
        return self._directory.fd

    def populated(self) -> bool:
        return self._populated.now() != 0

    def frozen(self) -> bool:
        return self._frozen.now() != 0

    def events_fd(self) -> int:
        """Readable after a change of populated or frozen; ``populated`` and ``frozen`` clear it."""
        if self._notifier is None:
            self._notifier = Notifier(self._events.fd, self._fds)
        return self._notifier.fd

    def kill(self) -> None:
        """SIGKILL everything here and below, also what is being forked at this moment."""
        os.write(self._kill.fd, b"1")

    def freeze(self, on: bool) -> None:
        self._group.write("cgroup.freeze", "1" if on else "0")
