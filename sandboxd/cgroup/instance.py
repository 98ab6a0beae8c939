"""The cgroup directories of one engine, in every hierarchy. place.py tells how they are named and held."""

from __future__ import annotations

import errno
import os
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from sandboxd._util.closeable import Closing
from sandboxd.cgroup import systemd, v1, v2
from sandboxd.cgroup.discovery import CONTROLLERS, Hierarchy, Layout
from sandboxd.cgroup.files import Fds, Group, kill_listed
from sandboxd.cgroup.home import ask_systemd, v2_roots
from sandboxd.cgroup.leaf import Leaf, LeafGroups
from sandboxd.cgroup.pids import bound_pids
from sandboxd.cgroup.place import Place, start_time
from sandboxd.cgroup.refusal import unavailable
from sandboxd.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Bounds", "Facts", "Instance"]

_SWAP = "swap accounting"
_SECONDS = 2.0  # for killing, and again for removing

# The files without which a limit of a cell cannot be set; looked for at the start rather than at the first run.
_FILES = {
    1: {
        "memory": ("memory.limit_in_bytes", "cgroup.event_control"),
        "pids": ("pids.max",),
        "cpu": ("cpu.cfs_quota_us",),
    },
    2: {"memory": ("memory.max", "memory.peak", "memory.oom.group"), "pids": ("pids.max",), "cpu": ("cpu.max",)},
}


# Those of v2 that are done without, which a receipt says.
_BETTER = {"pids": ("pids.peak",), "cpu": ("cpu.max.burst",)}


@dataclass(frozen=True)
class Bounds:
    """What one engine with all its cells may use; None is no bound. Memory without swap."""

    memory_bytes: int | None = None
    pids: int | None = None


class Facts(TypedDict):
    """What the receipt of a run says about cgroups; *missing* names what this kernel lacks of it."""

    version: Literal["v1", "v2", "hybrid", "none"]
    controllers: list[str]
    twin: bool
    missing: list[str]


def _without(controllers: tuple[str, ...], below: Group) -> list[str]:
    """Which of the files that are no must *below*, a child on v2, has not."""
    return [file for controller in controllers for file in _BETTER.get(controller, ()) if not below.has(file)]


def _require_files(place: Place, controllers: tuple[str, ...], below: Group) -> None:
    """Look for the control files in *below*, a new child. Raises OSError, ENOENT."""
    version = place.hierarchy.version
    for controller in controllers:
        for file in _FILES[version].get(controller, ()):
            if not below.has(file):
                raise OSError(errno.ENOENT, f"open: {os.strerror(errno.ENOENT)}", f"{below.path}/{file}")


class Instance(Closing):
    """The directories of this engine, held until ``close``. Used by one thread of one process; use ``create``."""

    def __init__(self, v1_places: list[Place], v2_place: Place | None, cleanup: ExitStack, missing: list[str]) -> None:
        self._v1 = v1_places
        self._v2 = v2_place
        self._cleanup = cleanup
        self._missing = missing
        self._leaves: set[Leaf] = set()
        self._generations: dict[int, int] = {}
        self._clone_uid: int | None = None
        self._closed = False

    @classmethod
    def create(cls, layout: Layout, bounds: Bounds) -> Instance:
        """Make, lock and bound the directories; on v2 with controllers also move this process into ``engine``, where
        nothing else is to be had in a scope that systemd is asked for.

        Raises Unavailable(stage "cgroup") when the host refuses; nothing is left behind then.
        """
        if layout.missing:
            names = ", ".join(layout.missing)
            raise Unavailable(
                "cgroup",
                f"no mounted hierarchy has the controllers {names}",
                fix="mount cgroup v2 (mount -t cgroup2 none /sys/fs/cgroup), or boot without cgroup_disable=",
            )
        base = f"sandboxd.{os.getpid()}.{start_time(os.getpid())}"
        for attempt in range(100):
            try:
                return cls._create(layout, bounds, base if attempt == 0 else f"{base}.{attempt}")
            except FileExistsError:
                continue
        raise Unavailable("cgroup", errno=errno.EEXIST, fix=f"remove the directories {base}.* below the cgroup mounts")

    @classmethod
    def _create(cls, layout: Layout, bounds: Bounds, name: str) -> Instance:
        with ExitStack() as undo:
            missing: list[str] = []
            v2_place = cls._make_v2(layout.v2, bounds, name, undo, missing)
            v1_places: list[Place] = []
            hierarchies = list(layout.v1)
            if v2_place is None:
                if layout.accounting is None:
                    raise Unavailable(
                        "cgroup",
                        "nothing measures the CPU time of a cell: there is neither cgroup v2 nor cpuacct",
                        fix="mount the cpuacct hierarchy, or cgroup v2 (mkdir DIR && mount -t cgroup2 none DIR)",
                    )
                hierarchies = _joined(hierarchies, layout.accounting)
                if layout.freezer is not None:
                    hierarchies = _joined(hierarchies, layout.freezer)
            for hierarchy in hierarchies:
                try:
                    place = Place(hierarchy, hierarchy.mount_point, name)
                    undo.callback(place.remove)
                    _bound_v1(place, bounds, missing)
                    zygotes = place.below("zygotes")
                    zygotes.make()
                    undo.callback(zygotes.remove)
                    _require_files(place, hierarchy.controllers, zygotes)
                except FileExistsError:
                    raise
                except OSError as error:
                    raise unavailable(error, hierarchy) from error
                v1_places.append(place)
            return cls(v1_places, v2_place, undo.pop_all(), missing)

    @staticmethod
    def _make_v2(
        hierarchy: Hierarchy | None, bounds: Bounds, name: str, undo: ExitStack, missing: list[str]
    ) -> Place | None:
        """The v2 directory, with controllers or as twin. A twin that the host refuses is done without."""
        if hierarchy is None:
            return None
        refusal: OSError | None = None

        def make(hierarchy: Hierarchy, root: str) -> Place | None:
            nonlocal refusal
            with ExitStack() as attempt:
                try:
                    place = _make_v2_at(hierarchy, root, bounds, name, attempt, missing)
                except FileExistsError:
                    raise
                except OSError as error:
                    refusal = refusal or error
                    return None
                undo.push(attempt.pop_all())
                return place

        for root in v2_roots(hierarchy):
            if place := make(hierarchy, root):
                return place
        if not hierarchy.controllers:
            return None
        words = ""
        if systemd.is_manager():
            try:
                scope = ask_systemd(hierarchy)
            except systemd.Refused as refused:
                words = str(refused)
            else:
                refusal = None
                if scope.own is not None and (place := make(scope, scope.own)):
                    return place
        if refusal is None:
            refusal = OSError(errno.EACCES, os.strerror(errno.EACCES), hierarchy.mount_point)
        raise unavailable(refusal, hierarchy, words) from refusal

    def facts(self) -> Facts:
        """What is in force, for receipts."""
        twin = self._v2 is not None and bool(self._v1)
        return {
            "version": "v2" if not self._v1 else "hybrid" if self._v2 is not None else "v1",
            "controllers": list(CONTROLLERS),
            "twin": twin,
            "missing": list(self._missing),
        }

    def _places(self) -> list[Place]:
        return [*self._v1, *([] if self._v2 is None else [self._v2])]

    def paths(self) -> list[str]:
        """The instance's directory in each hierarchy, the one on v2 last."""
        return [place.path for place in self._places()]

    @contextmanager
    def zygotes_entry(self) -> Iterator[tuple[int | None, list[int]]]:
        """How a new process gets among the zygotes at no cost: the directory for CLONE_INTO_CGROUP (None without v2),
        and the v1 ``tasks`` files into which it writes "0" first thing. Open within the block. Raises OSError.
        """
        fds = Fds()
        try:
            tasks = [fds.own(place.below("zygotes").open("tasks", os.O_WRONLY)) for place in self._v1]
            flags = os.O_RDONLY | os.O_DIRECTORY
            yield None if self._v2 is None else fds.own(self._v2.below("zygotes").open(".", flags)), tasks
        finally:
            fds.close()

    def clone_owner(self, uid: int) -> None:
        """Let processes of host *uid* in ``zygotes`` use CLONE_INTO_CGROUP for leaves that ``Leaf.clone_owner`` gave.

        The kernel asks for write permission on cgroup.procs of the target and of the common ancestor, which is what
        holds both. Once a second uid comes it is made writable for all: a move inside still needs the target's own
        file, and one from outside that of an ancestor above us. An engine that is not root can give nothing away, and
        does that at once. Raises OSError.
        """
        if self._v2 is None or self._clone_uid == uid:
            return
        if os.geteuid() != 0:
            self._v2.bounded.open_to_all("cgroup.procs")
        elif self._clone_uid is None:
            self._v2.bounded.chown("cgroup.procs", uid)
        else:
            os.chmod(f"{self._v2.bounded.name}/cgroup.procs", 0o666, dir_fd=self._v2.fd)  # noqa: S103 - see above
        self._clone_uid = uid

    def make_leaf(self, slot: int, pids_floor: int = 1) -> Leaf:
        """A new leaf for *slot*, without limits yet. Raises OSError.

        *pids_floor* is how many tasks every run has in it at the same moment, as far as that is certain
        (``Leaf.reusable``).
        """
        generation = self._generations.get(slot, 0)
        self._generations[slot] = generation + 1
        name = f"c{slot}.{generation}"
        by_controller = {
            controller: group
            for place, group in ((place, place.below(name)) for place in self._v1)
            for controller in place.hierarchy.controllers
        }
        groups = LeafGroups(
            v1=by_controller,
            v2=None if self._v2 is None else self._v2.below(name),
            v2_controllers=() if self._v2 is None else self._v2.hierarchy.controllers,
        )
        leaf = Leaf(name, groups, pids_floor, self._leaves.discard)
        self._leaves.add(leaf)
        return leaf

    def close(self) -> list[str]:
        """Kill and remove everything, for at most about 2 s, and give up the locks; returns the paths that are left.

        Those are a later sweep's work. One case is ordinary: on v2 the engine cannot leave its directory while another
        engine uses the same root, so ``engine`` stays until then. Idempotent.
        """
        if self._closed:
            return []
        self._closed = True
        deadline = time.monotonic() + _SECONDS
        for leaf in self._leaves:
            leaf.kill_quietly()
        zygotes = [place.below("zygotes") for place in self._places()]
        _kill_groups(zygotes, deadline)
        for leaf in list(self._leaves):
            leaf.remove_wait(max(deadline - time.monotonic(), 0))
        for group in zygotes:
            _remove_until(group, deadline)
        paths = self.paths()
        self._cleanup.close()
        return [path for path in paths if os.path.isdir(path)]


def _joined(hierarchies: list[Hierarchy], extra: Hierarchy) -> list[Hierarchy]:
    """*hierarchies* with the controller of *extra*: in the directory of a joint mount, else as one more."""
    joint = [place for place in hierarchies if place.mount_point == extra.mount_point]
    if not joint:
        return [*hierarchies, extra]
    first = joint[0]
    both = Hierarchy(1, first.mount_point, (*first.controllers, *extra.controllers), first.own, first.read_only)
    return [both if place is first else place for place in hierarchies]


def _bound_v1(place: Place, bounds: Bounds, missing: list[str]) -> None:
    if "memory" in place.hierarchy.controllers:
        v1.bound_memory(place.group, bounds.memory_bytes)
        if not v1.swap_is_bounded(place.group):
            missing.append(_SWAP)
    if "pids" in place.hierarchy.controllers:
        bound_pids(place.group, bounds.pids)


def _make_v2_at(
    hierarchy: Hierarchy, root: str, bounds: Bounds, name: str, undo: ExitStack, missing: list[str]
) -> Place:
    """Make the v2 directory below *root*. Raises OSError; *undo* takes back what was done."""
    place = Place(hierarchy, root, name)
    undo.callback(place.remove)
    controllers = hierarchy.controllers
    if controllers:
        root_group = Group(place.fd, place.path, "..")
        lacking = set(controllers) - v2.available_controllers(root_group)
        if lacking:
            raise OSError(errno.ENOENT, f"{', '.join(sorted(lacking))} not offered", f"{root}/cgroup.controllers")
        engine = place.child("engine")
        engine.make()
        undo.callback(engine.remove)
        engine.attach(os.getpid())
        undo.callback(_leave, hierarchy.own)
        added = v2.enable_controllers(root_group, controllers)
        # Only where that is the way back (see _leave) and only engines live: elsewhere others may rely on it now.
        if root == hierarchy.own and root_group.has("cgroup.type"):
            undo.callback(_disable, root_group, added)
        v2.enable_controllers(place.group, controllers)
        undo.callback(_disable, place.group, controllers)
        cells = place.bounded
        cells.make()
        undo.callback(cells.remove)
        if "memory" in controllers:
            v2.bound_memory(place.group, None)
            v2.bound_memory(cells, bounds.memory_bytes)
            if not v2.swap_is_bounded(cells) and _SWAP not in missing:
                missing.append(_SWAP)
        if "pids" in controllers:
            bound_pids(cells, bounds.pids)
        v2.enable_controllers(cells, controllers)
        undo.callback(_disable, cells, controllers)
    zygotes = place.below("zygotes")
    zygotes.make()
    undo.callback(zygotes.remove)
    _require_files(place, controllers, zygotes)
    missing.extend(file for file in _without(controllers, zygotes) if file not in missing)
    return place


def _disable(group: Group, controllers: tuple[str, ...]) -> None:
    """Take controllers from the children of *group* again. EBUSY: another engine's directory uses them."""
    if controllers:
        with suppress(OSError):
            group.write("cgroup.subtree_control", " ".join(f"-{name}" for name in controllers))


def _leave(origin: str | None) -> None:
    """Move this process back to where it was. Refused (EBUSY) while children of that directory use controllers."""
    if origin is not None:
        with suppress(OSError):
            Path(origin, "cgroup.procs").write_text(str(os.getpid()))


def _kill_groups(groups: list[Group], deadline: float) -> None:
    """SIGKILL what is in *groups* and wait until they are empty: by cgroup.kill where it exists, else one by one."""
    for group in groups:
        if group.has("cgroup.kill"):
            group.write("cgroup.kill", "1")
    kill_listed(lambda: groups, deadline, skip=os.getpid())


def _remove_until(group: Group, deadline: float) -> bool:
    pause = 0.0005
    while not group.remove():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 2, 0.05)
    return True
