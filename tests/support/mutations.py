"""What `tests/mutate` removes from the product, one at a time: each wall that can be left out, the enforcement of each
limit, the check of what cells inherit, the sweep at start, and the kill before the answer. Some test of `./run-tests`
must fail for each.

A mutation is a small edit of the source. *likely* names the tests that should notice it; they run first, and the whole
suite runs only if none of them fails.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["MUTATIONS", "Edit", "Mutation", "mutated"]


@dataclass(frozen=True, slots=True)
class Edit:
    """Replace *old*, which occurs exactly once in the file *path*, by *new*. The path is relative to the tree."""

    path: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Mutation:
    """*what* is missing once all *edits* are made; *likely* are pytest's arguments for the tests to try first."""

    name: str
    what: str
    edits: tuple[Edit, ...]
    likely: tuple[str, ...]


def mutated(mutation: Mutation, tree: Path) -> dict[Path, str]:
    """The new content of each file below *tree* that *mutation* changes. Raises ValueError where one does not fit."""
    changed: dict[Path, str] = {}
    for edit in mutation.edits:
        path = tree / edit.path
        text = changed.get(path) or path.read_text("utf-8")
        if text.count(edit.old) != 1:
            raise ValueError(
                f"{mutation.name}: {edit.path} has {text.count(edit.old)} times, not once, the text {edit.old!r}. "
                "Fix: bring tests/support/mutations.py up to date."
            )
        changed[path] = text.replace(edit.old, edit.new)
    return changed


POLICIES: Final = "sandboxd/engine/policies.py"
ADMISSION: Final = "sandboxd/engine/admission.py"
SHARES: Final = "sandboxd/engine/fair_share.py"
RESOURCES: Final = "sandboxd/engine/cells/resources.py"
RUN: Final = "sandboxd/engine/runs/run.py"
JUDGE: Final = "sandboxd/outcome/judge.py"
RUN_CLOCK: Final = "sandboxd/engine/runs/run_clock.py"
PLAN: Final = "sandboxd/engine/cells/shape.py"
LEAF: Final = "sandboxd/cgroup/leaf.py"
PREPARED: Final = "sandboxd/engine/cells/active_policy.py"
METER: Final = "sandboxd/engine/runs/meter.py"
ZYGOTE: Final = "sandboxd/inside/zygote.py"
SERVING: Final = "sandboxd/daemon/serving.py"
INSTANCE: Final = "sandboxd/cgroup/instance.py"

# The engine's own self-test would refuse to serve without a wall, so it goes as well: the question is whether the tests
# notice. The receipt does not show the missing wall either.
_NO_SELF_TEST: Final = Edit(POLICIES, "if not self._resources.config.walls_down:", "if False:")
_STAGES: Final = "walls_down=frozenset(stage for name in down for stage in WALLS[name]),"
_ATTACKS: Final = ("tests/attacks/test_attacks.py", "-k", "not strict")
_WALLS: Final = (
    *(
        (name, _STAGES, _STAGES.replace("in down", f'in (*down, "{name}")'))
        for name in (
            "network", "ipc", "uts", "cgroupns", "fds", "rlimits", "ids", "caps", "landlock", "seccomp",
        )
    ),
    ("read-only", 'if "read-only" in down:', "if True:"),
    ("userns-limit", '"userns-limit" in down)', "True)"),
)  # fmt: skip

# What is left out, where, what stands there, what stands there instead, the tests to try first.
_LIMITS: Final = (
    ("wall_seconds", RUN_CLOCK, "if wall is not None:", "if False:", "tests/engine/test_limits_hold.py -k at_the_wall"),
    ("cpu_seconds", RUN_CLOCK, "if cpu is not None:", "if False:", "tests/engine/test_limits_hold.py -k cpu_time"),
    ("cpus", LEAF, "set_quota(*cpu_quota(limits.cpus))", "set_quota(None, _PERIOD_USEC)",
     "tests/engine/test_limits_hold.py -k share_of_a_cpu"),
    # Some limit must hold: the engine's own bound is most of the host's memory.
    ("memory_bytes", LEAF, "set_limit(limits.memory_bytes)", "set_limit(2 << 30)",
     "tests/engine/test_limits_hold.py -k memory_hog"),
    ("pids", LEAF, "set_limit(limits.pids)", "set_limit(None)", "tests/engine/test_limits_hold.py -k 'bomb or thread'"),
    ("workspace_bytes", PLAN, 'int(limits["workspace_bytes"] or UNLIMITED_BYTES)', "UNLIMITED_BYTES",
     "tests/engine/test_limits_hold.py -k file_system"),
    ("workspace_files", PLAN, "int(files) + 1 if files is not None else 1 << 31", "1 << 31",
     "tests/engine/test_limits_hold.py -k 'files or kind'"),
    ("tmp_bytes", PLAN, 'int(limits["tmp_bytes"] or UNLIMITED_BYTES)', "UNLIMITED_BYTES",
     "tests/engine/test_limits_hold.py -k file_system"),
    ("shm_bytes", PLAN, 'int(value_of(limits, "shm_bytes") or UNLIMITED_BYTES)', "UNLIMITED_BYTES",
     "tests/engine/test_limits_hold.py -k file_system"),
    ("open_files", PLAN, 'if limits["open_files"] is not None:', "if False:",
     "tests/engine/test_limits_hold.py -k descriptors"),
    ("file_bytes", PLAN, 'if limits["file_bytes"] is not None:', "if False:",
     "tests/engine/test_limits_hold.py -k 10_gb"),
    ("output_bytes", RUN, 'int(limits["output_bytes"] or 0)', "1 << 28", "tests/engine/test_limits_hold.py -k output"),
    ("output_stop_bytes", RUN, 'stop = self.limits["output_stop_bytes"]', "stop = None",
     "tests/engine/test_limits_hold.py -k output"),
    ("queue_seconds", ADMISSION, "asyncio.timeout(wait_seconds)", "asyncio.timeout(None)",
     "tests/client/test_sandbox_api.py tests/daemon/test_daemon.py tests/engine/test_pool.py "
     "-k 'queue or busy or waits_too_long'"),
    ("tool_wait_seconds", METER, "return now + self._left[mode]",
     'return now + (float("inf") if mode == "tool_wait" else self._left[mode])',
     "tests/engine/test_tool_calls.py -k 'wait or approv'"),
    ("approval_seconds", METER, "return now + self._left[mode]",
     'return now + (float("inf") if mode == "approval" else self._left[mode])',
     "tests/engine/test_tool_calls.py -k 'wait or approv'"),
    ("a run may only narrow", "sandboxd/limits.py",
     "if widest is not None and (wanted is None or wanted > widest):", "if False:",
     "tests/unit/test_policy.py tests/unit/test_request.py -k 'narrow or wider'"),
    ("max_running", ADMISSION, "self.running < self.most_running or self._revoke()", "True",
     "tests/client/test_sandbox_api.py tests/daemon/test_daemon.py tests/engine/test_pool.py "
     "-k 'queue or busy or running'"),
    ("max_queued", ADMISSION, "if self.queued >= self.most_queued:", "if False:",
     "tests/client/test_sandbox_api.py tests/daemon/test_daemon.py tests/daemon/test_hostile_clients.py "
     "-k 'queue or busy'"),
    ("max_clients", SERVING, "full = len(self._clients) >= most and not sees_all", "full = False",
     "tests/daemon/test_daemon.py tests/daemon/test_hostile_clients.py -k 'client or connection'"),
    ("connections of one uid", SERVING, "self._per_uid[uid] >= max(1, most // CLIENTS_SHARE)", "False",
     "tests/daemon/test_daemon.py tests/daemon/test_hostile_clients.py -k 'client or connection'"),
    ("request bytes of one uid", SHARES, "self._held[who] + size_bytes > HELD_BYTES", "False",
     "tests/daemon/test_hostile_clients.py"),
    ("memory_bytes of the engine", INSTANCE, "v1.bound_memory(place.group, bounds.memory_bytes)", "pass",
     "tests/cgroup/test_cgroup.py"),
    ("pids of the engine", INSTANCE, "bound_pids(place.group, bounds.pids)", "pass", "tests/cgroup/test_cgroup.py"),
)  # fmt: skip


def _walls() -> Iterator[Mutation]:
    for name, old, new in _WALLS:
        edits = (Edit(PREPARED, old, new), _NO_SELF_TEST)
        yield Mutation(f"wall: {name}", f"cells do not have the wall {name}", edits, _ATTACKS)


def _limits() -> Iterator[Mutation]:
    for name, path, old, new, likely in _LIMITS:
        yield Mutation(f"limit: {name}", f"{name} does not hold", (Edit(path, old, new),), tuple(shlex.split(likely)))


def _ends() -> Iterator[Mutation]:
    yield Mutation(
        "self-test",
        "the first cell's self-test accepts anything",
        (Edit(POLICIES, "selftest.verify(said,", "0 and selftest.verify(said,"),),
        ("tests/engine/test_faults.py", "tests/engine/test_walls.py"),
    )
    yield Mutation(
        "private copies",
        "cells share what imports and the warm-up mapped MAP_SHARED",
        (Edit(ZYGOTE, 'refuse("shared", watch.make_private())', "pass"), _NO_SELF_TEST),
        ("tests/engine/test_preload.py",),
    )
    yield Mutation(
        "one thread",
        "a zygote serves with a second thread",
        (Edit(ZYGOTE, 'refuse("threads", watch.other_threads())', "pass"), _NO_SELF_TEST),
        ("tests/engine/test_preload.py",),
    )
    yield Mutation(
        "sweep at start",
        "an engine leaves behind what a dead one left",
        (Edit(RESOURCES, "in cgroup.sweep(layout):", "in ():"),),
        ("tests/engine/test_crash.py",),
    )
    yield Mutation(
        "kill before the answer",
        "a run is answered while its processes live",
        (Edit(RUN, "self._failure is None and self._is_clean(cell):", "self._failure is None:"),),
        ("tests/engine/test_limits_hold.py", "tests/engine/test_walls.py"),
    )
    yield Mutation(
        "kill before the answer: children",
        "a program that left children counts as one that ended cleanly",
        (Edit(JUDGE, "tasks <= 1 and untouched", "untouched"),),
        ("tests/engine/test_parked.py", "tests/engine/test_walls.py", "tests/engine/test_limits_hold.py"),
    )
    kill = "cell.end(Event.FINISHED if self._frames.finished is not None else Event.CANCELLED)\n"
    then = "        self._stop_inputs(cell)"
    yield Mutation(
        "kill after the answer",
        "the cell of a run that ended cleanly is not killed",
        (Edit(RUN, f"{kill}{then}", f"pass\n{then}"),),
        ("tests/engine/test_pool.py", "tests/client/test_sandbox_api.py"),
    )


MUTATIONS: Final = (*_walls(), *_limits(), *_ends())
