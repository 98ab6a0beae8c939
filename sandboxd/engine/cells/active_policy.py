"""A policy made ready: filter compiled, root planned, zygote running and proved sealed."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from sandboxd import seccomp
from sandboxd._native import lib
from sandboxd.cgroup import NoInstance
from sandboxd.engine.cells.pool import Pool
from sandboxd.engine.cells.zygote import Zygote, ZygoteConfig
from sandboxd.engine.cells.zygote_spawn import INSIDE, ZygoteSpec
from sandboxd.errors import PolicyError, Unavailable
from sandboxd.kernel.stages import Stage
from sandboxd.limits import defaults
from sandboxd.rootfs import plan
from sandboxd.rootfs.interpreter import Interpreter
from sandboxd.seccomp.syscalls import NUMBERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.engine.cells.resources import Resources
    from sandboxd.limits import LimitValue

__all__ = ["DEFAULT_POLICY", "WALLS", "ActivePolicy", "ZygotePool", "activate", "zygote_key"]

NAMESPACES: Final = ["user", "pid", "mount", "network", "ipc", "uts", "cgroup"]
SCOPES_ABI: Final = 6
NETWORK_ABI: Final = 4

WALLS: Final[dict[str, frozenset[int]]] = {
    "network": frozenset({lib.SBX_WALL_NETWORK}),
    "ipc": frozenset({lib.SBX_WALL_IPC}),
    "uts": frozenset({lib.SBX_WALL_UTS}),
    "cgroupns": frozenset({Stage.CGROUPNS}),
    "fds": frozenset({Stage.FDS}),
    "rlimits": frozenset({Stage.RLIMITS}),
    "ids": frozenset({Stage.IDS}),
    "caps": frozenset({Stage.CAPS}),
    "landlock": frozenset({Stage.LANDLOCK}),
    "seccomp": frozenset({Stage.SECCOMP}),
    "read-only": frozenset(),
    "userns-limit": frozenset(),
}
"""Walls that a test may leave out by name, and what of a cell's steps raises each (native/inside/cell.c; SBX_WALL_* are
parts of a step). "read-only" is the root's planner. The pid, mount and user namespaces are not here: no program could
be run without them.
"""


@dataclass(slots=True)
class ActivePolicy:
    """One policy in force. *receipt* says, for a slot, what surrounded a run."""

    name: str
    plain: dict[str, Any]
    zygote: Zygote
    limits: dict[str, LimitValue]
    filter_name: str
    profile: seccomp.Profile
    profile_sha256: str
    missing: list[str]
    resources: Resources
    on_worn: Callable[[ActivePolicy], None]
    """Called when its zygote should be replaced."""
    pool: Pool = field(init=False)
    _receipts: dict[int, dict[str, Any]] = field(default_factory=dict)
    serial: int = field(default_factory=itertools.count().__next__)
    """Another one for each zygote."""

    def __post_init__(self) -> None:
        self._make_pool()

    def _make_pool(self) -> None:
        self.pool = Pool(self.resources, self.name, self.limits, self.zygote, lambda: self.on_worn(self))

    def rename(self, plain: dict[str, Any]) -> None:
        """Serve the policy *plain*, of the same zygote_key, from now on; before the pool is open."""
        self.name, self.plain, self.limits = plain["name"], plain, dict(plain["limits"])
        self._make_pool()

    async def close(self) -> None:
        """End every cell, and the zygote."""
        self.pool.close()
        await self.zygote.close()

    def receipt(self, slot: int) -> dict[str, Any]:
        """The Result's ``isolation``."""
        known = self._receipts.get(slot)
        if known is not None:
            return known
        resources = self.resources
        facts = resources.instance.facts()
        receipt = self._receipts[slot] = {
            "namespaces": list(NAMESPACES),
            "cgroup": {"version": facts["version"], "controllers": list(facts["controllers"])},
            "seccomp": {"policy": self.filter_name, "sha256": self.profile_sha256},
            "landlock_abi": self.zygote.facts.landlock_abi,
            "uid": resources.slot_ids.host_uid(slot),
            "network": "none",
            "rootfs": self.plain["filesystem"]["image"],
            "kernel": kernel_release(),
            "missing": list(self.missing),
        }
        return receipt


DEFAULT_POLICY: Final[dict[str, Any]] = {
    "name": "default",
    "runtime": {"language": "python", "interpreter": None, "preload": [], "warmup": ""},
    "limits": defaults(),
    "filesystem": {"image": "host", "read_only": [], "writable": [], "proc": "pid"},
    "network": {"mode": "none"},
    "seccomp": {"profile": "default", "allow": [], "deny": [], "report": False},
    "require": {"cgroup": ["memory", "pids", "cpu"], "landlock_abi": 1, "own_uid": True},
    "audit": {"redact": []},
}
"""The shipped default policy as plain values, for an engine that has not been told its policy yet."""


def zygote_key(plain: dict[str, Any]) -> dict[str, Any]:
    """What of a policy makes its zygote: not its name, its limits, or what its audit records leave out."""
    return {key: value for key, value in plain.items() if key not in ("name", "limits", "audit")}


class ZygotePool:
    """Zygotes that run and wait for a policy, and the plans of their roots: the host is looked at once for each
    interpreter.
    """

    def __init__(self, resources: Resources) -> None:
        unknown = set(resources.config.walls_down) - set(WALLS)
        if unknown:
            raise ValueError(f"no such wall: {', '.join(sorted(unknown))}")
        self._resources = resources
        self._bodies: dict[Interpreter, ZygoteSpec] = {}
        self._early: dict[Interpreter, Zygote] = {}

    def prestart(self, python: Interpreter) -> None:
        """Start a zygote for *python* before it is asked for. Raises Unavailable."""
        self._early[python] = self._spawn(python)

    def take(self, python: Interpreter) -> Zygote:
        """A zygote for *python* that no policy has touched. Raises Unavailable."""
        early = self._early.pop(python, None)
        return self._spawn(python) if early is None else early

    async def close(self) -> None:
        """End those that nobody took."""
        while self._early:
            await self._early.popitem()[1].close()

    def _spawn(self, python: Interpreter) -> Zygote:
        return Zygote.spawn(self._body(python), self._resources.ids, self._resources.instance)

    def _body(self, python: Interpreter) -> ZygoteSpec:
        found = self._bodies.get(python)
        if found is None:
            down = self._resources.config.walls_down
            inside = [(str(INSIDE), plan.INSIDE_DIRECTORY)]
            operations = plan.plan_host(python, inside, slots=self._resources.slot_ids)
            # What libraries write while they are imported; each cell's own tmpfs covers it.
            writable = plan.NOSUID | plan.NODEV
            operations.append(plan.Op(plan.Kind.TMPFS, "tmp", "mode=1777,size=256m", flags=writable))
            if "read-only" in down:
                operations = [
                    plan.Op(op.kind, op.target, op.source, op.data, op.mode, op.flags & ~plan.RDONLY)
                    for op in operations
                ]
            found = self._bodies[python] = ZygoteSpec(python, operations, "userns-limit" in down)
        return found


async def activate(
    resources: Resources, zygotes: ZygotePool, plain: dict[str, Any], on_worn: Callable[[ActivePolicy], None]
) -> ActivePolicy:
    """Bring *plain* (``Policy.plain()``) into force, with a zygote of *zygotes*. Raises Unavailable, PolicyError."""
    config, instance = resources.config, resources.instance
    down = frozenset(config.walls_down)
    runtime, wanted = plain["runtime"], plain["require"]
    lacking = [name for name in wanted["cgroup"] if name not in instance.facts()["controllers"]]
    if lacking:
        if isinstance(instance, NoInstance):
            raise instance.refusal
        fix = "mount or delegate the controller; sandboxd doctor shows where each one lives"
        raise Unavailable("cgroup", f"the policy requires the controllers {', '.join(lacking)}", fix=fix)
    shared = resources.ids.shared
    if shared is not None and wanted["own_uid"]:
        what = f"the policy requires a host uid for each cell ([require] own_uid); {shared.message}"
        raise Unavailable("ids", what, errno=shared.errno, fix=shared.fix)
    chosen = plain["seccomp"]
    profile = seccomp.effective(chosen["profile"], chosen["allow"], chosen["deny"])
    for name in seccomp.CELLS_NEED:
        if not any(answer.action.permits for answer in profile.verdict(NUMBERS[name])):
            raise PolicyError(f"seccomp: {name} is refused, but no program can be started without it.", key="seccomp")
    chosen_python = runtime["interpreter"]
    python = await asyncio.to_thread(Interpreter.probe, chosen_python) if chosen_python else Interpreter.current()
    marker = config.marker_errno
    if marker is None:
        filters = await asyncio.to_thread(seccomp.cached_layers, profile)
    else:
        filters = await asyncio.to_thread(functools.partial(seccomp.compile_layers, profile, marker_errno=marker))
    zygote = zygotes.take(python)
    try:
        await zygote.activate(
            ZygoteConfig(
                preload=runtime["preload"],
                warmup=runtime["warmup"],
                filters=filters,
                landlock_abi=wanted["landlock_abi"],
                policy=plain["name"],
                walls_down=frozenset(stage for name in down for stage in WALLS[name]),
                extra=config.zygote,
            )
        )
    except BaseException:
        await zygote.close()
        raise
    missing = [f"wall left out: {name}" for name in sorted(down)]
    if marker is not None:
        missing.append(f"seccomp: the errnos of refusals (all answer {marker})")
    missing += [f"cgroup: {what}" for what in instance.facts()["missing"]]
    if shared is not None:
        missing.append("own uid: all cells have the id of the engine's user, and its supplementary groups")
    missing += zygote.facts.unmet
    if zygote.facts.landlock_abi == 0:
        missing.append("landlock")
    elif zygote.facts.landlock_abi < SCOPES_ABI:
        missing.append("landlock scopes for signals and abstract sockets (ABI 6, Linux 6.12)")
        if zygote.facts.landlock_abi < NETWORK_ABI:
            missing.append("landlock network rights (ABI 4, Linux 6.7)")
    return ActivePolicy(
        name=plain["name"],
        plain=plain,
        zygote=zygote,
        limits=dict(plain["limits"]),
        filter_name=chosen["profile"],
        profile=profile,
        profile_sha256=profile.sha256,
        missing=missing,
        resources=resources,
        on_worn=on_worn,
    )


@functools.cache
def kernel_release() -> str:
    """The running kernel, for receipts."""
    found = os.uname()
    return f"{found.sysname} {found.release}"
