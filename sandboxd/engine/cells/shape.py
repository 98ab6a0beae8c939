"""What of a run's limits is built into its cell, and what can still be set when the program comes."""

from __future__ import annotations

import math
import resource
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sandboxd.cgroup import LeafLimits
from sandboxd.engine.cells.messages import CellPlan, InitSizes
from sandboxd.limits import value_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sandboxd.limits import LimitValue

__all__ = ["BUILT_IN", "CellSpec", "NoCgroups", "leaf_limits", "same_spec"]

_MIB: Final = 1 << 20
TMP_FILES: Final = 16_384
CODE_BYTES: Final = 17 * _MIB
CPU_BELT_SECONDS: Final = 5
UNLIMITED_BYTES: Final = (1 << 63) - 1

BUILT_IN: Final = (
    "memory_bytes",
    "workspace_bytes",
    "workspace_files",
    "tmp_bytes",
    "shm_bytes",
    "open_files",
    "file_bytes",
)
"""Limits that file systems and rlimits of a cell are made with: a run that asks for others gets a cell of its own. The
rest is set in the leaf, or is the engine's clock and readers.
"""
BUILT_IN_WITHOUT_CGROUPS: Final = ("cpu_seconds", "pids")
"""What more is an rlimit where there is no leaf."""


@dataclass(frozen=True, slots=True)
class NoCgroups:
    """A host that gives the engine no cgroups."""

    own_uid: bool
    """Whether a cell has an id of its own, by which its processes can be counted."""


@dataclass(frozen=True, slots=True)
class CellSpec:
    """A cell to be: what its leaf, its file systems and its process are given."""

    leaf: LeafLimits
    plan: CellPlan

    @classmethod
    def of(cls, limits: Mapping[str, LimitValue], no_cgroups: NoCgroups | None = None) -> CellSpec:
        """For runs under *limits*. Without cgroups, *no_cgroups* says what rlimits can do in their place."""
        rlimits = [*_rlimits(limits), *(() if no_cgroups is None else _instead(limits, no_cgroups))]
        return cls(leaf_limits(limits), CellPlan(_sizes(limits), list({one[0]: one for one in rlimits}.values())))


def same_spec(
    one: Mapping[str, LimitValue], other: Mapping[str, LimitValue], no_cgroups: NoCgroups | None = None
) -> bool:
    """Whether a cell made for one serves the other."""
    return all(
        one[name] == other[name] for name in (*BUILT_IN, *(() if no_cgroups is None else BUILT_IN_WITHOUT_CGROUPS))
    )


def leaf_limits(limits: Mapping[str, LimitValue]) -> LeafLimits:
    """What the cgroup leaf enforces of *limits*."""
    memory, pids, cpus = limits["memory_bytes"], limits["pids"], limits["cpus"]
    return LeafLimits(
        None if memory is None else int(memory),
        None if pids is None else int(pids),
        None if cpus is None else float(cpus),
    )


def _sizes(limits: Mapping[str, LimitValue]) -> InitSizes:
    files = limits["workspace_files"]
    return InitSizes(
        workspace_bytes=int(limits["workspace_bytes"] or UNLIMITED_BYTES),
        # The root directory is an inode, too.
        workspace_files=int(files) + 1 if files is not None else 1 << 31,
        tmp_bytes=int(limits["tmp_bytes"] or UNLIMITED_BYTES),
        tmp_files=TMP_FILES,
        shm_bytes=int(value_of(limits, "shm_bytes") or UNLIMITED_BYTES),
        shm_files=TMP_FILES,
        code_bytes=CODE_BYTES,
    )


def _instead(limits: Mapping[str, LimitValue], no_cgroups: NoCgroups) -> Iterator[tuple[int, int, int]]:
    """Limits of each process, where there is nothing to hold the run as a whole: its data, its CPU time; and, of its
    uid, its processes.
    """
    memory, pids, cpu = limits["memory_bytes"], limits["pids"], limits["cpu_seconds"]
    if memory is not None:
        yield resource.RLIMIT_DATA, int(memory), int(memory)
    if cpu is not None:
        most = math.ceil(float(cpu))
        yield resource.RLIMIT_CPU, most, most + 1  # SIGXCPU first, which tells it from any other kill
    if pids is not None and no_cgroups.own_uid:
        yield resource.RLIMIT_NPROC, int(pids), int(pids)


def _rlimits(limits: Mapping[str, LimitValue]) -> Sequence[tuple[int, int, int]]:
    """(resource, soft, hard) of setrlimit(2). What the policy names must hold; the rest is a belt, as low as
    allowed.
    """

    def belt(which: int, value: int) -> tuple[int, int, int]:
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        return which, value, value

    chosen = [
        belt(resource.RLIMIT_CORE, 0),
        belt(resource.RLIMIT_STACK, 8 * _MIB),
        belt(resource.RLIMIT_MEMLOCK, 64 << 10),
        belt(resource.RLIMIT_MSGQUEUE, 0),
        belt(resource.RLIMIT_SIGPENDING, 256),
        belt(resource.RLIMIT_RTPRIO, 0),
        belt(resource.RLIMIT_NICE, 0),
    ]
    if limits["open_files"] is not None:
        chosen.append((resource.RLIMIT_NOFILE, int(limits["open_files"]), int(limits["open_files"])))
    if limits["file_bytes"] is not None:
        chosen.append((resource.RLIMIT_FSIZE, int(limits["file_bytes"]), int(limits["file_bytes"])))
    if limits["cpu_seconds"] is not None:
        # For one process, against an engine that does not come to look; the limit itself is the engine's, for the tree.
        chosen.append(belt(resource.RLIMIT_CPU, math.ceil(float(limits["cpu_seconds"])) + CPU_BELT_SECONDS))
    return chosen
