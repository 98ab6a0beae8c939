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
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import pytest

from sandboxd import Sandbox
from sandboxd.errors import ConnectionLost, Unavailable
from sandboxd.seccomp.syscalls import NUMBERS
from tests.support import leftovers
from tests.support.engine import pid_of
from tests.support.interpose import Fault, Interposed, Role, Seen

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CALLS: Final = (  # noqa: SIM905 - as fifty lines it would read no better
    "capset chdir clone3 close_range dup2 dup3 epoll_create1 eventfd2 execve execveat fchdir fchown flock fsconfig "
    "fsmount fsopen landlock_add_rule landlock_create_ruleset landlock_restrict_self memfd_create mkdir mkdirat mount "
    "mount_setattr move_mount open_tree openat2 pidfd_open pipe2 pivot_root prctl prlimit64 rmdir seccomp sendfile "
    "setfsgid setfsuid setgroups sethostname setns setresgid setresuid setsid signalfd4 socketpair symlinkat umount2 "
    "unshare"
).split()

ALWAYS: Final = 1 << 20
PROGRAM: Final = "open('made.txt', 'w').write('x')\nprint(6 * 7)"

# Stage by role and call. A number picks one of several calls of that name.
CELL_STAGES: Final[dict[tuple[str, str], str]] = {
    ("nursery", "fsopen"): "tmpfs",
    ("nursery", "fsconfig"): "tmpfs",
    ("nursery", "fsmount"): "tmpfs",
    ("nursery", "setfsuid"): "pipes",
    ("nursery", "setfsgid"): "pipes",
    ("nursery", "pipe2"): "pipes",
    ("nursery", "socketpair"): "pipes",
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


def chosen(seen: Iterable[Seen], role: Role, few: int = 5) -> list[Seen]:
    """*role*'s calls: the first and the last of each name (only the first if *few* is 0), all where they are few."""
    calls = [one for one in seen if one.role == role]
    last = {one.name: one.nth for one in calls}
    return [one for one in calls if last[one.name] <= few or one.nth == 1 or (few and one.nth == last[one.name])]


def told(answer: dict[str, Any]) -> str:
    """What came of a run or a start, in a word."""
    if "kind" in answer:
        number = errno.errorcode.get(answer.get("errno") or 0)
        return f"{answer['kind']}({answer.get('stage')}, {number}): {answer.get('message')}"
    return f"result {answer.get('status')}: {answer.get('stdout')!r}" if "status" in answer else str(answer)


def family(worker: int) -> dict[str, tuple[int, int]]:
    """Processes below *worker* and their descriptors, counted by name: what must be as before after each fault."""
    counts: dict[str, tuple[int, int]] = {}
    for index, one in enumerate(leftovers.descendants(worker)):
        name = f"{one.name.removeprefix('memfd:')}{' engine' if index == 0 else ''}{' zombie' * (one.state in 'ZX')}"
        many, fds = counts.get(name, (0, 0))
        counts[name] = many + 1, fds + len(leftovers.fds(one.pid))
    return counts


LEAF_FDS: Final = 17  # of a hybrid host
NETNS_FDS: Final = 2


def same_family(one: dict[str, tuple[int, int]], other: dict[str, tuple[int, int]]) -> bool:
    """Whether they are the same but for what a slot keeps for the next run: a leaf, a network namespace. A run that
    comes while the last one's cell is dying takes another slot.
    """
    if set(one) != set(other):
        return False
    for name, (many, fds) in one.items():
        kept = LEAF_FDS if "engine" in name else NETNS_FDS if name == "nursery" else 0
        slots, rest = divmod(fds - other[name][1], kept) if kept else (0, fds - other[name][1])
        if many != other[name][0] or rest or abs(slots) > 2:
            return False
    return True


def assert_family(worker: int, wanted: dict[str, tuple[int, int]], after: object) -> None:
    """Until *worker*'s family is as it was; 2 s at most."""
    leftovers.eventually(
        lambda: same_family(family(worker), wanted), 2, f"after {after}: {family(worker)}, before it: {wanted}"
    )


@pytest.fixture(scope="module")
def engine() -> Iterator[Interposed]:
    """An engine whose every chosen call is ours to refuse. Afterwards nothing of it may be left."""
    before = leftovers.snapshot()
    with Interposed({name: NUMBERS[name] for name in CALLS}) as made:
        answer = made.start(pool=leftovers.UNPARKED)
        assert "engine" in answer, answer
        for _ in range(2):
            assert made.run(PROGRAM)["status"] == "ok"
        yield made
    leftovers.assert_nothing_new(before)


@pytest.fixture(scope="module")
def cell_steps(engine: Interposed) -> list[Seen]:
    """The calls of one whole run, in order: in a slot that was used before, as every later run's may be."""
    for _ in range(20):
        engine.watch()
        assert engine.run(PROGRAM)["status"] == "ok"
        seen = engine.seen()
        if not {("nursery", "unshare"), ("engine", "mkdirat")} & {(one.role, one.name) for one in seen}:
            return seen
    raise AssertionError("no slot was used twice")


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
    leftovers.eventually(
        lambda: not leftovers.lives(nursery) or len(family(engine.worker.pid)) < 3, 5, "the nursery's end"
    )


def expected(role: Role, name: str, nth: int, number: int) -> str:
    """What must come of a cell's step that was refused with *number*, as ``told`` has it, without the message."""
    if (role, name) in TOLERATED:
        return "result ok"
    stage = CELL_STAGES.get((role, name), "a stage of the table")
    if name.startswith("setfs"):
        if nth > 2:
            return "result internal"  # it cannot take its own id back: it ends itself, and another takes its place
        number = errno.EPERM  # these calls know no errno
    if name == "prctl:nnp?":
        number = errno.EPERM  # what is asked is whether it is 1
    if (role, name, nth) == ("init", "move_mount", 5):
        stage = "proc"  # the others are the cell's own file systems
    return f"Unavailable({stage}, {errno.errorcode[number]})"


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
        should = expected(role, step.name, step.nth, number)
        if not told(answer).startswith(should):
            wrong.append(f"{fault}: {told(answer)}, should be {should}")
        following = engine.run(PROGRAM)
        if told(following) != "result ok: '42\\n'":
            wrong.append(f"after {fault}: {told(following)}")
        assert_family(engine.worker.pid, wanted, fault)
    assert not wrong, "\n".join(wrong)


def test_a_step_of_the_engine_s_own_fails_the_run_only(engine: Interposed, cell_steps: list[Seen]) -> None:
    wanted = family(engine.worker.pid)
    wrong = []
    steps = chosen(cell_steps, "engine")
    program_begins = cell_steps.index(Seen("cell", "seccomp", 1))
    for step in steps:
        if step.name.startswith("setfs") and (step.nth - 1) % 4 > 1:
            continue  # the way back to its own ids, which setfsuid(2) never refuses
        fault = Fault("engine", step.name, step.nth, number=errno.EMFILE)
        engine.arm(fault)
        answer = engine.run(PROGRAM)
        engine.arm(None)
        assert fault.hits == 1, f"{fault} did not strike: {told(answer)}"
        if cell_steps.index(step) < program_begins:
            good = answer.get("kind") == "Unavailable" and answer.get("stage")
        else:
            # It may have had effects: that nothing ran, which Unavailable says, would be a lie.
            good = answer.get("status") in ("ok", "internal") and answer.get("stdout") == "42\n"
        if not good:
            wrong.append(f"{fault}: {told(answer)}")
        following = engine.run(PROGRAM)
        if told(following) != "result ok: '42\\n'":
            wrong.append(f"after {fault}: {told(following)}")
        assert_family(engine.worker.pid, wanted, fault)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("role", ["init", "cell"])
def test_the_death_of_a_cell_at_any_step_of_its_set_up_is_told(
    engine: Interposed, cell_steps: list[Seen], role: Role
) -> None:
    wanted = family(engine.worker.pid)
    wrong = []
    for step in chosen(cell_steps, role):
        fault = Fault(role, step.name, step.nth, kind="kill")
        engine.arm(fault)
        answer = engine.run(PROGRAM)
        engine.arm(None)
        assert fault.hits == 1, f"{fault} did not strike: {told(answer)}"
        if answer.get("kind") != "Unavailable" or not answer.get("stage"):
            wrong.append(f"{fault}: {told(answer)}")
        following = engine.run(PROGRAM)
        if told(following) != "result ok: '42\\n'":
            wrong.append(f"after {fault}: {told(following)}")
        assert_family(engine.worker.pid, wanted, fault)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("role", "name"),
    [("nursery", "fsopen"), ("nursery", "pipe2"), ("nursery", "clone3"), ("zygote", "setns"), ("zygote", "clone3")],
)
def test_the_death_of_a_zygote_while_it_makes_a_cell_costs_that_run_only(
    engine: Interposed, role: Role, name: str
) -> None:
    wanted = family(engine.worker.pid)
    fault = Fault(role, name, kind="kill")
    engine.arm(fault)
    answer = engine.run(PROGRAM)
    engine.arm(None)
    assert fault.hits == 1
    assert told(answer).startswith("result internal")
    assert told(engine.run(PROGRAM)) == "result ok: '42\\n'"
    assert_family(engine.worker.pid, wanted, fault)


# The steps of a start

START_STAGES: Final[dict[tuple[str, str], str]] = {
    **{("worker", name): "engine" for name in ("socketpair", "pidfd_open", "clone3", "pipe2")},
    **{("engine", name): "engine" for name in ("dup2", "close_range", "execve", "socketpair", "prctl:dumpable")},
    **{("engine", name): "engine" for name in ("pipe2", "memfd_create", "pidfd_open", "epoll_create1")},
    ("engine", "prlimit64"): "engine",
    **{("engine", name): "cgroup" for name in ("mkdir", "mkdirat", "flock", "fchown")},
    **{("engine", name): "clone" for name in ("clone3",)},
    ("nursery", "mount"): "private",
    ("nursery", "open_tree"): "mounts",
    ("nursery", "setgroups"): "maps",
    ("nursery", "setresgid"): "maps",
    ("nursery", "setresuid"): "maps",
    ("nursery", "mkdirat"): "mounts",
    ("nursery", "symlinkat"): "mounts",
    ("nursery", "mount_setattr"): "mounts",
    ("nursery", "fchdir"): "pivot",
    ("nursery", "pivot_root"): "pivot",
    ("nursery", "umount2"): "pivot",
    ("nursery", "chdir"): "pivot",
    ("nursery", "sethostname"): "hostname",
    ("nursery", "dup2"): "fds",
    ("nursery", "close_range"): "fds",
    ("nursery", "execveat"): "exec",
    **{("nursery", name): "zygote" for name in ("signalfd4", "clone3", "prctl:dumpable", "prctl:bounding")},
    **{("nursery", name): "zygote" for name in ("prctl:nnp", "prctl:nnp?", "socketpair")},
    ("nursery", "pipe2"): "pipes",  # of the zygote's probe, which is taken for the nursery, and then of the first init
    **{("zygote", name): "zygote" for name in ("dup2", "close_range", "execve", "pipe2", "prctl:dumpable")},
    **{("zygote", name): "zygote" for name in ("prctl:nnp", "prctl:nnp?", "prctl:bounding", "prlimit64")},
    ("zygote", "landlock_create_ruleset"): "landlock",
}

START_TOLERATED: Final[dict[tuple[str, str], str]] = {
    ("engine", "setsid"): "a leader of a session already, or the caller's own",
    ("engine", "chdir"): "every path of its is absolute",
    ("engine", "epoll_create1"): "tried anew by asyncio",
    ("engine", "prlimit64"): "only asked",
    ("engine", "prctl:capbset"): "only asked",
    ("engine", "mkdir"): "a v2 twin that the host refuses is done without; v1 must be",
    ("engine", "mkdirat"): "as mkdir",
    ("engine", "flock"): "as mkdir; of an id range: the next one is taken",
    ("engine", "clone3"): "a thread that helps",
    ("zygote", "prlimit64"): "the interpreter asks for the size of its stack",
    ("nursery", "setsid"): "its session is nobody's terminal",
    ("zygote", "setsid"): "its session is nobody's terminal",
    ("zygote", "memfd_create"): "its memory stays where it is: forks cost more, no wall depends on it",
    ("nursery", "move_mount"): "of the root: /mnt is tried after /tmp",
}
"""Refused once, the start may do without, for the reason given; it must then serve, or fail with the table's stage."""


@pytest.fixture(scope="module")
def starter() -> Iterator[Interposed]:
    """A worker to start engines in. Afterwards nothing may be left."""
    before = leftovers.snapshot()
    with Interposed({name: NUMBERS[name] for name in CALLS}) as made:
        yield made
    leftovers.assert_nothing_new(before)


@pytest.fixture(scope="module")
def start_steps(starter: Interposed) -> list[Seen]:
    """The calls from the start of a worker's Sandbox to its zygote's readiness, in order."""
    starter.watch()
    assert "engine" in starter.start(pool=leftovers.UNPARKED)
    seen = starter.seen()
    ready = max(index for index, one in enumerate(seen) if one.role == "zygote" and one.name.startswith("landlock"))
    return seen[: ready + 1]


@pytest.mark.parametrize("role", ["worker", "engine", "nursery", "zygote"])
def test_no_engine_serves_that_lacks_one_of_its_steps(starter: Interposed, start_steps: list[Seen], role: Role) -> None:
    wrong = []
    root = [one for one in start_steps if one.role == "nursery" and one.name in ("fsopen", "fsconfig", "fsmount")]
    for step in chosen(start_steps, role, few=2 if role in ("worker", "engine") else 0):
        # From that call on: a zygote that was begun before its policy was known is made again when that failed.
        fault = Fault(
            role, step.name, step.nth, number=errno.EPERM, times=1 if role in ("worker", "engine") else ALWAYS
        )
        starter.arm(fault)
        answer = starter.start(pool=leftovers.UNPARKED)
        starter.arm(None)
        assert fault.hits, f"{fault} did not strike: {told(answer)}"
        stage = START_STAGES.get((role, step.name))
        if step in root or (role, step.name) == ("nursery", "move_mount"):
            stage = "root" if step.nth == 1 else "mounts"
        allowed = {stage}
        if (role, step.name) == ("engine", "clone3"):
            allowed = {"engine", "clone"}  # the engine itself, then its threads, then the nursery
        served = "engine" in answer
        if served and (role, step.name) in START_TOLERATED:
            assert starter.run(PROGRAM).get("status") == "ok", fault
            continue
        if served or answer.get("kind") != "Unavailable" or answer.get("stage") not in allowed:
            wrong.append(f"{fault}: {told(answer)}, should be stage {stage}")
        if not served:
            # A failed start has ended everything that it made before it says so.
            assert_family(starter.worker.pid, {}, fault)
    assert "engine" in starter.start(pool=leftovers.UNPARKED)
    assert told(starter.run(PROGRAM)) == "result ok: '42\\n'"
    assert not wrong, "\n".join(wrong)


# A kernel that says yes and does nothing


@pytest.mark.parametrize(
    ("role", "name", "nth", "times"),
    [
        ("cell", "setns", 1, 1),
        ("cell", "unshare", 1, 1),
        ("cell", "close_range", 1, 1),
        ("cell", "setresgid", 1, 1),
        ("cell", "setresuid", 1, 1),
        ("cell", "seccomp", 1, 1),
        ("cell", "landlock_restrict_self", 1, 1),
        ("zygote", "prctl:bounding", 1, ALWAYS),
        ("nursery", "mount_setattr", 1, ALWAYS),
        ("nursery", "umount2", 1, ALWAYS),
        ("nursery", "pivot_root", 1, ALWAYS),
    ],
)
def test_a_wall_that_only_seems_to_be_up_is_not_served(
    starter: Interposed, role: Role, name: str, nth: int, times: int
) -> None:
    """Every call that raises the wall succeeds, and the wall is not there: the self-test of the first cell sees it."""
    fault = Fault(role, name, nth, kind="lie", times=times)
    starter.arm(fault)
    answer = starter.start(pool=leftovers.UNPARKED)
    starter.arm(None)
    assert fault.hits
    assert answer.get("kind") == "Unavailable", told(answer)
    assert answer.get("stage") != "engine", told(answer)  # it would not have come as far as that
    assert_family(starter.worker.pid, {}, fault)


# No more descriptors


def raise_soft_limit(pid: int, descriptors: int) -> None:
    """Set RLIMIT_NOFILE of another process, the hard limit as it is."""
    hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(descriptors, hard), hard))


@pytest.mark.parametrize("who", ["engine", "nursery", "zygote"])
def test_a_process_out_of_descriptors_fails_runs_by_name_and_recovers(who: str) -> None:
    with Sandbox(pool=leftovers.UNPARKED) as sandbox:
        root = pid_of(sandbox)

        def target() -> int:
            if who == "engine":
                return root
            nursery, zygote, *_ = (one.pid for one in leftovers.descendants(root))
            return nursery if who == "nursery" else zygote

        def serves() -> bool:
            try:
                return sandbox.run("1").status == "ok"
            except Unavailable:  # a zygote that could not be made is tried again after a second
                return False

        for _ in range(2):
            assert serves()
        leftovers.eventually(lambda: len(leftovers.descendants(root)) == 2, 5, "nothing but nursery and zygote")
        before = len(leftovers.fds(root)), 2
        outcomes: set[str] = set()
        for room in range(24):
            pid = target()
            usual = resource.prlimit(pid, resource.RLIMIT_NOFILE)[0]
            raise_soft_limit(pid, len(leftovers.fds(pid)) + room)
            try:
                outcomes.add(sandbox.run("open('made', 'w').write('x')").status)
            except (Unavailable, ConnectionLost) as error:
                outcomes.add(type(error).__name__)
            with suppress(ProcessLookupError):  # it may just be ending
                raise_soft_limit(pid, usual)
            leftovers.eventually(serves, 5, f"a run after {who} had room for {room} more descriptors")
        assert "ok" in outcomes
        assert len(outcomes) > 1, "the limit was never met"
        assert outcomes <= {"ok", "internal", "Unavailable", "ConnectionLost"}

        def as_before() -> bool:
            slots, rest = divmod(len(leftovers.fds(root)) - before[0], LEAF_FDS)
            return not rest and 0 <= slots <= 3 and len(leftovers.descendants(root)) == before[1]

        leftovers.eventually(as_before, 5, f"as before, but for leaves of slots: {before}")
