"""Where this host keeps its cgroup controllers: two texts of /proc read into a Layout. Pure, nothing is touched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["CONTROLLERS", "Hierarchy", "Layout", "discover"]

# What a cell's limits need. cpuacct is only a meter of v1; v2 measures CPU time in every cgroup without a controller.
CONTROLLERS = ("memory", "pids", "cpu")

# Every v1 controller of a kernel >= 6.1, to tell them from the other super options (xattr, release_agent=, name=, ...).
_V1_NAMES = frozenset(
    (
        *("cpuset", "cpu", "cpuacct", "blkio", "memory", "devices", "freezer", "net_cls", "perf_event"),
        *("net_prio", "hugetlb", "pids", "rdma", "misc", "debug"),
    )
)


@dataclass(frozen=True)
class Hierarchy:
    """One mounted cgroup hierarchy.

    *controllers* are those this package uses here; on v2 the kernel has yet to confirm them (cgroup.controllers).
    *own* is the directory of the process itself, or None when the mount does not show it.
    """

    version: Literal[1, 2]
    mount_point: str
    controllers: tuple[str, ...]
    own: str | None
    read_only: bool = False


@dataclass(frozen=True)
class Layout:
    """Which hierarchies hold the limits and the life-cycle of a cell.

    *v1* are hierarchies with limits, a joint mount once. *v2* holds the controllers that no v1 hierarchy has; without
    any of ours it is still the twin: cgroup.kill, cgroup.freeze, cgroup.events, CLONE_INTO_CGROUP and CPU time.
    *accounting* and *freezer* are the v1 hierarchies of cpuacct and freezer, for hosts without v2. *missing* are needed
    controllers that no mount can have.
    """

    v1: tuple[Hierarchy, ...]
    v2: Hierarchy | None
    accounting: Hierarchy | None
    missing: tuple[str, ...]
    freezer: Hierarchy | None = None

    @property
    def version(self) -> Literal["v1", "v2", "hybrid"]:
        """Which kind of host: "v2" when that has every controller, "v1" when it is not mounted, else "hybrid"."""
        if self.v2 is None:
            return "v1"
        return "hybrid" if self.v1 else "v2"


@dataclass(frozen=True)
class _Mount:
    root: str
    mount_point: str
    kind: str
    read_only: bool
    controllers: frozenset[str]


def _decoded(field: str) -> str:
    # proc_pid_mountinfo(5): space, tab, newline and backslash are octal escapes.
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _mounts(text: str) -> list[_Mount]:
    mounts: list[_Mount] = []
    for line in text.splitlines():
        front, separator, back = line.partition(" - ")
        fields, tail = front.split(" "), back.split(" ")
        if not separator or len(fields) < 6 or len(tail) < 3 or tail[0] not in ("cgroup", "cgroup2"):
            continue
        super_options = tail[2].split(",")
        mounts.append(
            _Mount(
                root=_decoded(fields[3]),
                mount_point=_decoded(fields[4]),
                kind=tail[0],
                read_only="ro" in fields[5].split(",") or "ro" in super_options,
                controllers=_V1_NAMES.intersection(super_options) if tail[0] == "cgroup" else frozenset(),
            )
        )
    return mounts


def _memberships(text: str) -> tuple[dict[str, str], str | None]:
    """Our cgroup per v1 controller, and in the v2 hierarchy, as paths from the root of our cgroup namespace."""
    v1: dict[str, str] = {}
    v2 = None
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        names, separator, path = rest.partition(":")
        if not separator:
            continue
        path = path.removesuffix(" (deleted)")
        if number == "0" and not names:
            v2 = path
        else:
            v1.update(dict.fromkeys(names.split(","), path))
    return v1, v2


def _visible(path: str | None, mount: _Mount) -> str | None:
    """Where the cgroup *path* is seen through *mount*; None when it lies outside."""
    if path is None or ".." in path.split("/") or ".." in mount.root.split("/"):
        return None
    root = mount.root.rstrip("/")
    if path != root and not path.startswith(f"{root}/"):
        return None
    below = path[len(root) :].strip("/")
    return f"{mount.mount_point.rstrip('/')}/{below}".rstrip("/") or "/"


def _hierarchy(candidates: list[_Mount], own: str | None, controllers: tuple[str, ...]) -> Hierarchy | None:
    """The best of several mounts of one hierarchy: one that shows our own cgroup and can be written."""
    if not candidates:
        return None
    best = min(candidates, key=lambda mount: (mount.read_only, _visible(own, mount) is None))
    return Hierarchy(
        version=1 if best.kind == "cgroup" else 2,
        mount_point=best.mount_point,
        controllers=controllers,
        own=_visible(own, best),
        read_only=best.read_only,
    )


def discover(mountinfo: str | None = None, self_cgroup: str | None = None) -> Layout:
    """Read where each controller lives.

    The texts are those of /proc/self/mountinfo and /proc/self/cgroup, which are read when None is given. A controller
    that a v1 hierarchy has is not on v2 (cgroup-v2.rst, "Mounting"). Raises OSError when /proc cannot be read.
    """
    mounts = _mounts(Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo)
    own_v1, own_v2 = _memberships(Path("/proc/self/cgroup").read_text() if self_cgroup is None else self_cgroup)

    def on_v1(controller: str) -> list[_Mount]:
        return [mount for mount in mounts if controller in mount.controllers]

    v1: list[Hierarchy] = []
    taken: set[str] = set()
    for controller in CONTROLLERS:
        candidates = on_v1(controller)
        if controller in taken or not candidates:
            continue
        joint = tuple(name for name in CONTROLLERS if name in candidates[0].controllers)
        taken.update(joint)
        found = _hierarchy(candidates, own_v1.get(controller), joint)
        if found is not None:
            v1.append(found)
    rest = tuple(name for name in CONTROLLERS if name not in taken)
    v2 = _hierarchy([mount for mount in mounts if mount.kind == "cgroup2"], own_v2, rest)
    return Layout(
        v1=tuple(v1),
        v2=v2,
        accounting=_hierarchy(on_v1("cpuacct"), own_v1.get("cpuacct"), ("cpuacct",)),
        missing=() if v2 is not None else rest,
        freezer=_hierarchy(on_v1("freezer"), own_v1.get("freezer"), ("freezer",)),
    )
