"""Every step of a set-up fails once: the error is typed and names the stage, nothing is left, the next run is served.

The steps are not listed here but recorded: one run (one start) under a filter that reports its system calls to this
process, then the same again for each recorded call with that call refused (interpose.py). What the tables below hold is
what must come of it; a call that no table knows fails its test, so a new step cannot be forgotten.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
from typing import TYPE_CHECKING, Any, Final

import leftovers
import pytest
from interpose import Fault, Interposed, Role, Seen

from sandboxd import Limits, Sandbox
from sandboxd.errors import ConnectionLost, SandboxError, Unavailable
from sandboxd.syscalls import NUMBERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CALLS: Final = (
    "capset chdir clone3 close_range dup2 dup3 epoll_create1 eventfd2 execve execveat fchdir fchown flock fsconfig "
    "fsmount fsopen landlock_add_rule landlock_create_ruleset landlock_restrict_self memfd_create mkdir mkdirat mount "
    "mount_setattr move_mount open_tree openat2 pidfd_open pipe2 pivot_root prctl prlimit64 rmdir seccomp sendfile "
    "setfsgid setfsuid setgroups sethostname setns setresgid setresuid setsid signalfd4 socketpair symlinkat umount2 "
    "unshare"
).split()

PROGRAM: Final = "open('made.txt', 'w').write('x')\nprint(6 * 7)"

# Stage by role and call. A number picks one of several calls of that name.
CELL_STAGES: Final[dict[tuple[str, str], str]] = {
    ("nursery", "fsopen"): "tmpfs",
    ("nursery", "fsconfig"): "tmpfs",
    ("nursery", "fsmount"): "tmpfs",
    ("nursery", "setfsuid"): "pipes",
    ("nursery", "setfsgid"): "pipes",
    ("nursery", "pipe2"): "pipes",
    ("nursery", "unshare"): "netns",
    ("nursery", "setns"): "netns",
    ("nursery", "clone3"): "clone",
    ("init", "setns"): "netns",
    ("init", "move_mount"): "attach",
    ("init", "fsopen"): "proc",
    ("init", "fsconfig"): "proc",
    ("init", "fsmount"): "proc",
    ("init", "dup2"): "fds",
    ("init", "close_range"): "fds",
    ("init", "setgroups"): "ids",
    ("init", "setresgid"): "ids",
    ("init", "setresuid"): "ids",
    ("init", "prctl:ambient"): "caps",
    ("init", "capset"): "caps",
    ("zygote", "prctl:tid"): "clone",
    ("zygote", "setns"): "clone",
    ("zygote", "clone3"): "clone",
    ("cell", "setns"): "namespaces",
    ("cell", "unshare"): "cgroupns",
    ("cell", "setsid"): "session",
    ("cell", "chdir"): "session",
    ("cell", "dup3"): "fds",
    ("cell", "close_range"): "fds",
    ("cell", "prlimit64"): "rlimits",
    ("cell", "setgroups"): "ids",
    ("cell", "setresgid"): "ids",
    ("cell", "setresuid"): "ids",
    ("cell", "prctl:ambient"): "caps",
    ("cell", "capset"): "caps",
    ("cell", "prctl:dumpable"): "caps",
    ("cell", "prctl:nnp"): "nnp",
    ("cell", "prctl:nnp?"): "nnp",
    ("cell", "landlock_create_ruleset"): "landlock",
    ("cell", "landlock_add_rule"): "landlock",
    ("cell", "landlock_restrict_self"): "landlock",
    ("cell", "seccomp"): "seccomp",
}

TOLERATED: Final[dict[tuple[str, str], str]] = {
    ("init", "setsid"): "its session is nobody's terminal anyway, and the cell makes one of its own",
    ("init", "prctl:name"): "a name for ps",
    ("zygote", "setsid"): "as the init's",
    ("nursery", "setsid"): "as the init's",
}
"""Refused, and the run is served all the same: no wall depends on it."""


def chosen(seen: Iterable[Seen], role: Role) -> list[Seen]:
    """*role*'s calls: the first and the last of each name, and all where there are few."""
    calls = [one for one in seen if one.role == role]
    last = {one.name: one.nth for one in calls}
    return [one for one in calls if last[one.name] <= 5 or one.nth in (1, last[one.name])]


def told(answer: dict[str, Any]) -> str:
    """What came of a run or a start, in a word."""
    if "kind" in answer:
        return f"{answer['kind']}({answer.get('stage')}, {errno.errorcode.get(answer.get('errno') or 0)}): {answer.get('message')}"
    return f"result {answer.get('status')}: {answer.get('stdout')!r}" if "status" in answer else str(answer)


def family(worker: int) -> dict[str, tuple[int, int]]:
    """Processes below *worker* and their descriptors, counted by name: what must be as before after each fault."""
    counts: dict[str, tuple[int, int]] = {}
    for index, one in enumerate(leftovers.descendants(worker)):
        name = f"{one.name.removeprefix('memfd:')} {'engine' if index == 0 else one.state in 'ZX' and 'zombie' or ''}"
        many, fds = counts.get(name, (0, 0))
        counts[name] = many + 1, fds + len(leftovers.fds(one.pid))
    return counts


def assert_family(worker: int, wanted: dict[str, tuple[int, int]], after: object) -> None:
    """Until *worker*'s family is as it was; 2 s at most."""
    leftovers.eventually(lambda: family(worker) == wanted, 2, f"after {after}: {family(worker)}, before it: {wanted}")


@pytest.fixture(scope="module")
def engine() -> Iterator[Interposed]:
    """An engine whose every chosen call is ours to refuse. Afterwards nothing of it may be left."""
    before = leftovers.snapshot()
    with Interposed({name: NUMBERS[name] for name in CALLS}) as made:
        answer = made.start()
        assert "engine" in answer, answer
        for _ in range(2):
            assert made.run(PROGRAM)["status"] == "ok"
        yield made
    leftovers.assert_nothing_new(before)


@pytest.fixture(scope="module")
def cell_steps(engine: Interposed) -> list[Seen]:
    """The calls of one whole run, in order."""
    engine.watch()
    assert engine.run(PROGRAM)["status"] == "ok"
    return engine.seen()


def nursery_of(engine: Interposed) -> int:
    """The pid of the engine's nursery."""
    (found,) = (one.pid for one in leftovers.descendants(engine.worker.pid) if "nursery" in one.name)
    return found


def lose_zygote(engine: Interposed) -> None:
    """Kill the engine's zygote with all that belongs to it; the next run needs a new one."""
    pid = nursery_of(engine)
    nursery = leftovers.process(pid)
    assert nursery is not None
    os.kill(pid, signal.SIGKILL)
    leftovers.eventually(lambda: not leftovers.lives(nursery) or len(family(engine.worker.pid)) < 3, 5, "the nursery's end")


# A cell's steps


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS], ids=errno.errorcode.get)
@pytest.mark.parametrize("role", ["nursery", "init", "zygote", "cell"])
def test_a_cell_is_not_served_without_one_of_its_steps(
    engine: Interposed, cell_steps: list[Seen], role: Role, number: int
) -> None:
    wanted = family(engine.worker.pid)
    wrong = []
    steps = chosen(cell_steps, role)
    assert steps
    for step in steps:
        fault = Fault(role, step.name, step.nth, number=number)
        engine.arm(fault)
        answer = engine.run(PROGRAM)
        engine.arm(None)
        assert fault.hits == 1, f"{fault} did not strike: {told(answer)}"
        if (role, step.name) in TOLERATED:
            if answer.get("status") != "ok":
                wrong.append(f"{fault}: {told(answer)}, should be tolerated")
        elif (role, step.name) == ("init", "move_mount") and step.nth == 5:
            if answer.get("stage") != "proc":
                wrong.append(f"{fault}: {told(answer)}, should be stage proc")
        elif role == "nursery" and step.name.startswith("setfs") and step.nth > 2:
            # It could not take its own id back: it ends itself, and another takes its place.
            if answer.get("status") != "internal":
                wrong.append(f"{fault}: {told(answer)}, should be internal")
        elif (answer.get("kind"), answer.get("stage"), answer.get("errno")) != (
            "Unavailable",
            CELL_STAGES.get((role, step.name)),
            number,
        ):
            wrong.append(f"{fault}: {told(answer)}, should be stage {CELL_STAGES.get((role, step.name))}")
        following = engine.run(PROGRAM)
        if following.get("status") != "ok" or following.get("stdout") != "42\n":
            wrong.append(f"after {fault}: {told(following)}")
        assert_family(engine.worker.pid, wanted, fault)
    assert not wrong, "\n".join(wrong)
