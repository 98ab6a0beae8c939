"""A policy made ready: filter compiled, root planned, zygote running and proved sealed."""

from __future__ import annotations

import asyncio
import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sandboxd import rootfs, seccomp
from sandboxd.errors import Unavailable
from sandboxd.interpreter import Interpreter
from sandboxd.limits import LimitValue
from sandboxd.stages import Stage
from sandboxd.zygote import INSIDE, Zygote, ZygoteConfig

if TYPE_CHECKING:
    from sandboxd.engine.core import Engine

__all__ = ["WALLS", "Prepared", "RootPlans", "prepare"]

NAMESPACES: Final = ["user", "pid", "mount", "network", "ipc", "uts", "cgroup"]
SCOPES_ABI: Final = 6
NETWORK_ABI: Final = 4

WALLS: Final[dict[str, frozenset[int]]] = {
    "network": frozenset({48}),
    "ipc": frozenset({49}),
    "uts": frozenset({50}),
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
"""Walls that a test may leave out by name, and what of a cell's steps raises each (native/cell.c; the numbers from 48 on
are parts of a step). "read-only" is the root's planner. The pid, mount and user namespaces are not here: no program
could be run without them.
"""


@dataclass(slots=True)
class Prepared:
    """One policy in force. *receipt* says, for a slot, what surrounded a run."""

    name: str
    plain: dict[str, Any]
    zygote: Zygote
    limits: dict[str, LimitValue]
    filter_name: str
    filter_sha256: str
    missing: list[str]
    engine: Engine

    def receipt(self, slot: int) -> dict[str, Any]:
        """The Result's ``isolation``."""
        engine = self.engine
        facts = engine.instance.facts()
        return {
            "namespaces": list(NAMESPACES),
            "cgroup": {"version": facts["version"], "controllers": list(facts["controllers"])},
            "seccomp": {"policy": self.filter_name, "sha256": self.filter_sha256},
            "landlock_abi": self.zygote.landlock_abi,
            "uid": engine.slot_ids.host_uid(slot),
            "network": "none",
            "rootfs": self.plain["filesystem"]["image"],
            "kernel": engine.kernel,
            "missing": list(self.missing),
        }


class RootPlans:
    """The roots' operations by interpreter; the host is looked at once for each."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._plans: dict[Interpreter, list[rootfs.Op]] = {}

    def plan(self, python: Interpreter) -> list[rootfs.Op]:
        """The operations for *python*. Raises Unavailable."""
        found = self._plans.get(python)
        if found is None:
            inside = [(str(INSIDE), rootfs.INSIDE_DIRECTORY)]
            found = rootfs.plan_host(python, inside, slots=self._engine.slot_ids)
            # What libraries write while they are imported; each cell's own tmpfs covers it.
            scratch = rootfs.Op(rootfs.Kind.TMPFS, "tmp", "mode=1777,size=256m", flags=rootfs.NOSUID | rootfs.NODEV)
            found = self._plans[python] = [*found, scratch]
        return found


async def prepare(engine: Engine, plain: dict[str, Any]) -> Prepared:
    """Bring *plain* (``Policy.plain()``) into force. Raises Unavailable, PolicyError."""
    down = frozenset(engine.config.walls_down)
    unknown = down - set(WALLS)
    if unknown:
        raise ValueError(f"no such wall: {', '.join(sorted(unknown))}")
    runtime, wanted = plain["runtime"], plain["require"]
    lacking = [name for name in wanted["cgroup"] if name not in engine.instance.facts()["controllers"]]
    if lacking:
        fix = "mount or delegate the controller; sandboxd doctor shows where each one lives"
        raise Unavailable("cgroup", None, fix, f"the policy requires the controllers {', '.join(lacking)}")
    chosen = plain["seccomp"]
    profile = seccomp.effective(chosen["profile"], chosen["allow"], chosen["deny"])
    chosen_python = runtime["interpreter"]
    python = await asyncio.to_thread(Interpreter.probe, chosen_python) if chosen_python else Interpreter.current()
    operations = engine.roots.plan(python)
    if "read-only" in down:
        operations = [
            rootfs.Op(op.kind, op.target, op.source, op.data, op.mode, op.flags & ~rootfs.RDONLY) for op in operations
        ]
    marker = engine.config.marker_errno
    if marker is None:
        filter_program = await asyncio.to_thread(seccomp.cached_compile, profile, None)
    else:
        filter_program = await asyncio.to_thread(functools.partial(seccomp.compile, profile, marker_errno=marker))
    zygote = await Zygote.start(
        ZygoteConfig(
            python=python,
            preload=runtime["preload"],
            warmup=runtime["warmup"],
            filter_program=filter_program,
            landlock_abi=wanted["landlock_abi"],
            allow_user_namespaces="userns-limit" in down,
            walls_down=frozenset(stage for name in down for stage in WALLS[name]),
        ),
        engine.ids,
        operations,
        engine.instance.zygotes_attach,
    )
    missing = [f"wall left out: {name}" for name in sorted(down)]
    if marker is not None:
        missing.append(f"seccomp: the errnos of refusals (all answer {marker})")
    missing += [f"cgroup: {what}" for what in engine.instance.facts()["missing"]]
    if zygote.landlock_abi == 0:
        missing.append("landlock")
    elif zygote.landlock_abi < SCOPES_ABI:
        missing.append("landlock scopes for signals and abstract sockets (ABI 6, Linux 6.12)")
        if zygote.landlock_abi < NETWORK_ABI:
            missing.append("landlock network rights (ABI 4, Linux 6.7)")
    return Prepared(
        name=plain["name"],
        plain=plain,
        zygote=zygote,
        limits=dict(plain["limits"]),
        filter_name=chosen["profile"],
        filter_sha256=profile.sha256,
        missing=missing,
        engine=engine,
    )


def kernel_release() -> str:
    """The running kernel, for receipts."""
    found = os.uname()
    return f"{found.sysname} {found.release}"
