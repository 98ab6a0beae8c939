"""The cgroup leaf of one cell: limits, counters and life-cycle, put together from the hierarchies that the host has."""

from __future__ import annotations

import errno
import math
import os
import select
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, Self

from sandboxd.cgroup import v1, v2
from sandboxd.cgroup.files import Fds, Group, kill_listed
from sandboxd.cgroup.numbers import Number, Numbers
from sandboxd.cgroup.pids import Pids
from sandboxd.cgroup.reading import Counters, Reading

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

__all__ = ["REUSE_BELOW_BYTES", "Counters", "Leaf", "LeafGroups", "LeafLimits", "cpu_quota"]

# A leaf whose tasks are gone keeps up to 64 pages (256 KiB) of unused charge for each CPU they ran on, and whatever
# page cache they were the first to read. 1 MiB is four such CPUs, and 0.2 % of the default limit: what the next run is
# charged for the last.
REUSE_BELOW_BYTES = 1 << 20

# Of an import from files that nobody had read, the kernel keeps some 1.3 KiB for each file: 1 byte for 20 of content.
_FILES_PER_KERNEL = 4

# Short, so that a cell that used up its share waits milliseconds: with the kernel's 100 ms a job of a few ms may wait
# for 90.
_PERIOD_USEC = 10_000
_MIN_QUOTA_USEC = 1_000  # the kernel's own, for quota and period
_MAX_PERIOD_USEC = 1_000_000


@dataclass(frozen=True)
class LeafLimits:
    """What one cell may use; None is no limit. *cpus* is in CPUs, at least 0.001."""

    memory_bytes: int | None = None
    pids: int | None = None
    cpus: float | None = None


@dataclass(frozen=True)
class LeafGroups:
    """The directories of one leaf: *v1* by controller (a joint mount under each of its names), and that on v2."""

    v1: Mapping[str, Group]
    v2: Group | None
    v2_controllers: tuple[str, ...]

    def v1_distinct(self) -> list[Group]:
        """The v1 directories, each once."""
        return list({group.path: group for group in self.v1.values()}.values())

    def all(self) -> list[Group]:
        """Every directory, the one on v2 last."""
        return [*self.v1_distinct(), *([] if self.v2 is None else [self.v2])]

    def of(self, controller: str) -> Group:
        """The directory that holds *controller*."""
        group = self.v2 if controller in self.v2_controllers else self.v1[controller]
        if group is None:
            raise LookupError(f"no hierarchy with {controller}")
        return group


class _Memory(Protocol):
    oom_fd: int
    counts_late: bool
    peak_resettable: bool
    kills: Number

    @property
    def limit(self) -> int | None: ...
    def set_limit(self, limit_bytes: int | None) -> None: ...
    def reset_peak(self) -> None: ...
    def oom_clear(self) -> None: ...
    def current(self) -> int: ...
    def left(self) -> tuple[int, int]: ...
    def reclaim(self) -> None: ...


class _Bandwidth(Protocol):
    def set_quota(self, quota_usec: int | None, period_usec: int) -> None: ...


class _CpuUsage(Protocol):
    total: Number
    divisor: int


def cpu_quota(cpus: float | None) -> tuple[int | None, int]:
    """Quota and period in microseconds that make *cpus*. The period is 10 ms, longer below 0.1 CPU: quota >= 1 ms.

    Raises ValueError below 0.001.
    """
    if cpus is None:
        return None, _PERIOD_USEC
    if not math.isfinite(cpus) or cpus * _MAX_PERIOD_USEC < _MIN_QUOTA_USEC:
        raise ValueError(f"cpus: {cpus} is not a finite number of at least 0.001")
    quota = round(cpus * _PERIOD_USEC)
    if quota >= _MIN_QUOTA_USEC:
        return quota, _PERIOD_USEC
    return _MIN_QUOTA_USEC, min(math.ceil(_MIN_QUOTA_USEC / cpus), _MAX_PERIOD_USEC)


class Leaf:
    """One leaf, of which at most one cell at a time is a member.

    It owns its directories and descriptors; ``remove`` ends it. Not thread-safe. Methods raise OSError (errno,
    operation, path) where the kernel refuses.
    """

    # More than 15 attributes: one for each controller, beside name, limits, descriptors and what was counted before.

    counts = True
    """Whether there are counters at all."""

    def __init__(self, name: str, groups: LeafGroups, pids_floor: int, forget: Callable[[Leaf], None]) -> None:
        """Make the directories. *forget* is called once, when the leaf is gone. Nothing is left behind on failure."""
        self.name = name
        self._groups = groups
        self._forget = forget
        self._limits: LeafLimits | None = None
        self._begun = False
        self._fds = Fds()
        self._numbers = Numbers()
        self._pids_floor = pids_floor
        self._reading: Reading | None = None
        self._kills_before = self._cpu_before = 0
        self._dozing = False
        with ExitStack() as undo:
            for group in groups.all():
                group.make()
                undo.callback(group.remove)
            undo.callback(self._fds.close)
            self._open()
            undo.pop_all()

    def _open(self) -> None:
        groups, fds, numbers = self._groups, self._fds, self._numbers
        self._usage: _CpuUsage = (
            v1.CpuUsage(groups.of("cpuacct"), fds, numbers)
            if groups.v2 is None
            else v2.CpuUsage(groups.v2, fds, numbers)
        )
        memory, cpu = groups.of("memory"), groups.of("cpu")
        self._memory: _Memory = (
            v2.Memory(memory, fds, numbers) if memory is groups.v2 else v1.Memory(memory, fds, numbers)
        )
        self._pids = Pids(groups.of("pids"), fds, numbers)
        self._bandwidth: _Bandwidth = (
            v2.Bandwidth(cpu, fds, numbers) if cpu is groups.v2 else v1.Bandwidth(cpu, fds, numbers)
        )
        self._life = None if groups.v2 is None else v2.LifeCycle(groups.v2, fds, numbers)
        self._freezer: v1.Freezer | v2.LifeCycle | None = self._life
        if self._life is None and "freezer" in groups.v1:
            self._freezer = v1.Freezer(groups.of("freezer"))
        self._stopped = False
        self._entries = [fds.file(group, "tasks", os.O_WRONLY) for group in groups.v1_distinct()]

    # Descriptors

    def close_idle_fds(self) -> None:
        """Close what is not needed before the run's end; the next question opens it again. For many live cells at once:
        seventeen descriptors each are more than a process may have.
        """
        self._fds.rest()
        self._dozing = True

    def _wake(self) -> None:
        if self._dozing:
            self._dozing = False
            self._fds.wake()
            self._numbers.rebind()

    # Limits and counters

    def set_limits(self, limits: LeafLimits) -> None:
        """Put *limits* in force, without swap; what did not change since the last call is not written again.

        Raises OSError (EBUSY when memory in use cannot be brought below a new limit), ValueError for *cpus* below
        0.001. After an error any of them may be in force: set them again, or do not use the leaf.
        """
        before, self._limits = self._limits, None
        if before is None or before.memory_bytes != limits.memory_bytes:
            self._memory.set_limit(limits.memory_bytes)
        if before is None or before.pids != limits.pids:
            self._pids.set_limit(limits.pids)
        if before is None or before.cpus != limits.cpus:
            self._bandwidth.set_quota(*cpu_quota(limits.cpus))
        self._limits = limits

    def begin(self) -> None:
        """Start counting from here: a new run."""
        self._wake()
        self._memory.reset_peak()
        self._numbers.refresh()
        before = self._numbers.values()
        self._reading = Reading(tuple(self._numbers.rows), before, self._memory.limit, self._pids_floor)
        self._kills_before = self._memory.kills.last
        self._cpu_before = self._usage.total.last
        self._memory.oom_clear()
        self._begun = True

    def counters(self) -> Counters:
        """All counters since ``begin``. CPU time of tasks that run at this moment may lag by a tick."""
        self._wake()
        self._numbers.refresh()
        return self.reading().counters(self._numbers.values())

    def reading(self) -> Reading:
        """How the counted numbers become counters; before ``begin``, since the leaf was made."""
        if self._reading is None:
            rows = tuple(self._numbers.rows)
            return Reading(rows, (0,) * len(rows), self._memory.limit, self._pids_floor)
        if self._reading.memory_limit != self._memory.limit:
            self._reading = replace(self._reading, memory_limit=self._memory.limit)
        return self._reading

    def numbers(self) -> list[Number]:
        """The counted numbers, with the leaf's own descriptors, in the order of ``reading``."""
        self._wake()
        return self._numbers.counted

    def cpu_usec(self) -> int:
        """CPU time since ``begin``: one read, for the engine's clock."""
        self._wake()
        return (self._usage.total.now() - self._cpu_before) // self._usage.divisor

    def memory_seen(self) -> int:
        """Bytes charged when ``begin`` or ``counters`` last looked."""
        return self._memory.current()

    def tasks(self) -> int:
        """Tasks in it now, zombies included: one read."""
        self._wake()
        return self._pids.current()

    def pids(self) -> list[int]:
        """The processes in it, as this process sees them. Raises OSError."""
        return self._groups.of("pids").pids()

    # Out of memory

    @property
    def oom_fd(self) -> int:
        """Readable (EPOLLIN, as add_reader of asyncio wants) when there may have been an OOM kill, until ``oom_clear``.

        Ask ``oom_kills`` then. On v1 the notice comes just before the kill, so the count may still be 0 for a moment;
        an OOM of the instance's own bound is told too; and removing the leaf makes it readable: take it off the loop
        first. On v2 any change of memory.events makes it readable, also a limit that was met and then held.
        """
        return self._memory.oom_fd

    @property
    def counts_kills_late(self) -> bool:
        """Whether a kill is counted only after ``oom_fd`` announced it (v1); else the count has a notice of its own."""
        return self._memory.counts_late

    def oom_clear(self) -> None:
        """Make ``oom_fd`` unreadable until the next notice."""
        self._memory.oom_clear()

    def oom_kills(self) -> int:
        """Tasks of this leaf killed by an OOM since ``begin``: one read. v1 leaves the others alive: kill them."""
        self._wake()
        return self._memory.kills.now() - self._kills_before

    # Entering

    def entry_fds(self) -> list[int]:
        """Descriptors of ``tasks`` files, one for each v1 hierarchy, into which the cell itself writes "0" first thing.

        The kernel judges by who opened the file, so the cell needs no right of its own; moving only itself skips the
        lock that makes a move by the engine cost milliseconds now and then. The leaf owns them.
        """
        self._wake()
        return [entry.fd for entry in self._entries]

    @property
    def clone_fd(self) -> int | None:
        """The directory for CLONE_INTO_CGROUP on v2 or the twin; None on a host without v2. The leaf owns it."""
        self._wake()
        return None if self._life is None else self._life.fd

    def clone_owner(self, uid: int) -> None:
        """Let processes of host *uid* in ``zygotes`` clone into this leaf; needs ``Instance.clone_owner`` too."""
        if self._groups.v2 is None:
            return
        if os.geteuid() == 0:
            self._groups.v2.chown("cgroup.procs", uid)
        else:
            self._groups.v2.open_to_all("cgroup.procs")

    def attach(self, pid: int) -> None:
        """Move a process here, in every hierarchy, from outside. Slow: for what cannot do it itself."""
        for group in self._groups.all():
            group.attach(pid)

    # End of a run

    def is_empty(self) -> bool:
        """Whether no task is left in any hierarchy; a zombie counts until it is reaped (pids.current)."""
        self._wake()
        if self._pids.current() or (self._life is not None and self._life.populated()):
            return False
        pids = self._groups.of("pids")
        return not any(group.pids() for group in self._groups.v1_distinct() if group is not pids)

    def freeze(self, on: bool) -> None:
        """Ask the kernel to stop or continue all tasks; ``is_frozen`` says when it did. OSError ENOTSUP where neither
        v2 nor the freezer of v1 is mounted.
        """
        if self._freezer is None:
            raise OSError(errno.ENOTSUP, f"freezer: {os.strerror(errno.ENOTSUP)}", self.name)
        self._stopped = True  # also when it is refused: continuing what runs does no harm
        self._freezer.freeze(on)
        self._stopped = on

    def is_frozen(self) -> bool:
        """Whether every task is stopped."""
        self._wake()
        return self._freezer is not None and self._freezer.frozen()

    def thaw(self) -> None:
        """Continue what ``freeze`` stopped, if it did. What was killed meanwhile dies."""
        if self._stopped:
            self.freeze(False)

    def unthrottle(self) -> None:
        """Lift the CPU quota: what was killed has to run its own end, and would do so at the pace of the quota."""
        self._limits = None  # the next set_limits writes everything again
        self._bandwidth.set_quota(None, _PERIOD_USEC)

    def kill(self) -> None:
        """SIGKILL every task, frozen or not; ``is_empty`` says when they are gone.

        Without v2: forking is stopped by pids.max 0 (``set_limits`` brings it back), then each is signalled.
        """
        self._wake()
        if self._life is not None:
            self._life.kill()
        else:
            self._kill_one_by_one()

    def _kill_one_by_one(self) -> None:
        self._limits = None
        self._pids.set_limit(0)
        kill_listed(self._groups.v1_distinct, deadline=None)
        self.thaw()

    def reusable(self) -> bool:
        """Whether another run may use this leaf: seen empty, memory back below 1 MiB, and the next run's peaks its own.
        For a leaf whose pid namespace is known to be dead: of the v1 directories only that of pids is asked.

        The kernel resets no pids.peak, and memory.peak only since 6.12 (v1: always): if a peak is stained for good, the
        answer is False, and the slot needs a new leaf. If only memory is left, ``reclaim`` may help.
        """
        self._wake()
        if self._pids.current() or (self._life is not None and (self._life.populated() or self._life.frozen())):
            return False  # a frozen one: the next cell would be born stopped
        if self._stopped:
            return False
        self._numbers.refresh()
        return (
            (self._memory.peak_resettable or not self._begun)
            and self._pids.peak() <= self._pids_floor
            and self._memory.current() < REUSE_BELOW_BYTES
        )

    def reclaim(self) -> None:
        """Give back page cache, kernel memory and unused charge of an empty leaf.

        Takes as long as the memory is large, up to 2.5 s for each GiB of dentries: call it in a thread.
        """
        self._memory.reclaim()

    def reclaim_names(self) -> bool:
        """``reclaim`` an empty leaf before ``remove``, unless that would cost later runs more; whether it did.

        Dentries and inodes outlive the leaf otherwise, and nothing bounds them over many runs: a stat of a name that
        does not exist makes one. File content outlives it, too, but there is only so much of it as the host's files
        hold, and evicting what the cell was the first to read would have every run read it from the disk again. So a
        leaf of mostly file content is left alone.

        It opens what it needs, so another thread may call it while nobody else uses the leaf.
        """
        kernel_bytes, file_bytes = self._memory.left()
        if file_bytes > max(REUSE_BELOW_BYTES, _FILES_PER_KERNEL * kernel_bytes):
            return False
        self._memory.reclaim()
        return True

    def remove(self) -> bool:
        """rmdir in every hierarchy, without waiting. True: gone, descriptors closed. False: a task dies, ask again."""
        if self._fds is _GONE:
            return True
        if not all([group.remove() for group in self._groups.all()]):
            return False
        fds, self._fds = self._fds, _GONE
        fds.close()
        self._forget(self)
        return True

    def remove_wait(self, timeout: float) -> bool:
        """Kill what is in it and remove it; False when *timeout* seconds were not enough. Blocks: for ``close``."""
        deadline = time.monotonic() + timeout
        pause = 0.0005
        while not self.remove():
            if time.monotonic() >= deadline:
                return False
            self.kill_quietly()
            self._wait(min(pause, max(deadline - time.monotonic(), 0)))
            pause = min(pause * 2, 0.05)
        return True

    def kill_quietly(self) -> None:
        """As ``kill`` when some directories may be gone already; also what is in a v1 directory but not in the twin."""
        try:
            self.kill()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
        if self._life is not None:
            kill_listed(self._groups.v1_distinct, deadline=None)

    def _wait(self, seconds: float) -> None:
        """Until cgroup.events changed, or *seconds* passed: rmdir answers EBUSY a little longer than populated says."""
        poll = select.poll()
        try:
            if self._life is not None and self._life.populated():
                poll.register(self._life.events_fd(), select.POLLIN)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
        poll.poll(max(1, seconds * 1000))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # What is still dying after that is the instance's to remove.
        self.remove_wait(2.0)


_GONE = Fds()
