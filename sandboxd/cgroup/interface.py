"""What an engine needs of cgroups: ``Instance`` and ``Leaf`` have it, and ``none`` where there are none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from sandboxd.cgroup.instance import Facts
    from sandboxd.cgroup.leaf import LeafLimits
    from sandboxd.cgroup.numbers import Number
    from sandboxd.cgroup.reading import Counters, Reading

__all__ = ["AnyInstance", "AnyLeaf"]


class AnyLeaf(Protocol):
    """Of one slot. Methods raise OSError where the kernel refuses; ``leaf.Leaf`` says what each one is."""

    name: str

    @property
    def counts(self) -> bool:
        """Whether there are counters at all."""

    @property
    def counts_kills_late(self) -> bool:
        """Whether an OOM kill is counted only after its notice."""

    @property
    def oom_fd(self) -> int:
        """Readable when there may have been an OOM kill."""

    @property
    def clone_fd(self) -> int | None:
        """The directory for CLONE_INTO_CGROUP, if there is one."""

    def set_limits(self, limits: LeafLimits) -> None:
        """Put *limits* in force."""

    def begin(self) -> None:
        """Start counting from here."""

    def counters(self) -> Counters:
        """All counters since ``begin``."""

    def reading(self) -> Reading:
        """How the counted numbers become counters."""

    def numbers(self) -> list[Number]:
        """The counted numbers, in the order of ``reading``."""

    def cpu_usec(self) -> int:
        """CPU time since ``begin``."""

    def memory_seen(self) -> int:
        """Bytes charged at the last look."""

    def tasks(self) -> int:
        """Tasks in it now."""

    def pids(self) -> list[int]:
        """Processes in it now."""

    def oom_clear(self) -> None:
        """Make ``oom_fd`` unreadable until the next notice."""

    def oom_kills(self) -> int:
        """Tasks killed by an OOM since ``begin``."""

    def entry_fds(self) -> list[int]:
        """Files into which a cell writes "0" to enter."""

    def clone_owner(self, uid: int) -> None:
        """Let processes of host *uid* clone into it."""

    def is_empty(self) -> bool:
        """Whether no task is left."""

    def freeze(self, on: bool) -> None:
        """Stop or continue all tasks."""

    def is_frozen(self) -> bool:
        """Whether every task is stopped."""

    def thaw(self) -> None:
        """Continue what ``freeze`` stopped."""

    def unthrottle(self) -> None:
        """Lift the CPU quota of what dies."""

    def close_idle_fds(self) -> None:
        """Close what is not needed before the run's end."""

    def reusable(self) -> bool:
        """Whether another run may have it."""

    def reclaim_names(self) -> bool:
        """Have the kernel forget the names that were looked up."""

    def remove(self) -> bool:
        """Remove it; False: ask again later."""


class AnyInstance(Protocol):
    """Of one engine; ``instance.Instance`` says what each method is."""

    def facts(self) -> Facts:
        """What is in force, for receipts."""

    def zygotes_entry(self) -> AbstractContextManager[tuple[int | None, list[int]]]:
        """How a new process gets among the zygotes."""

    def clone_owner(self, uid: int) -> None:
        """Let processes of host *uid* among the zygotes clone into leaves."""

    def make_leaf(self, slot: int) -> AnyLeaf:
        """The leaf of a slot."""
