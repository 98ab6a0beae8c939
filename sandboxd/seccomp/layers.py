"""One profile as two filters: what a zygote takes on once and its cells inherit, and the little that each cell adds.

Verifying and translating a program is most of what seccomp(2) costs, and the kernel does it each time; a filter that a
fork inherits is shared and free. So the zygote installs the profile as far as it can, which is all of it but for what
its own spawn path and a cell's set-up call afterwards (``SPAWN``). A cell installs the rest as its last wall.

Of two filters the kernel takes the more restrictive answer (seccomp(2); seccomp_run_filters in kernel/seccomp.c), and
of two alike that of the filter installed last. Together the layers answer what the profile says, errno included: a call
is refused by one of them at most, since the upper one asks only about what the lower one lets through against the
profile. ``compile_layers`` evaluates both together before they are believed.

Runs in the engine, as the engine, like all of ``sandboxd.seccomp``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sandboxd.seccomp.bpf import compile, compile_upper, marked, prove
from sandboxd.seccomp.rules import ALLOW, Profile, Rule, Test
from sandboxd.seccomp.syscalls import NUMBERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["SPAWN", "Layers", "Need", "compile_layers", "split"]


@dataclass(frozen=True, slots=True)
class Layers:
    """Two programs, arrays of ``struct sock_filter``, in the order in which they are installed."""

    inherited: bytes
    """By the zygote, once it is warm; refuses all that the profile refuses but what ``SPAWN`` names."""
    own: bytes
    """By each cell, last; means nothing without the other below it."""


@dataclass(frozen=True, slots=True)
class Need:
    """A call that must get through between the two layers when all *tests* hold, and why."""

    call: str
    reason: str
    tests: tuple[Test, ...] = ()


def _prctl(option: int, *tests: Test) -> tuple[Test, ...]:
    return (Test(0, "==", option), *tests)


# What is called under the inherited layer alone: by _cell.serve() and fork_cell() in the zygote, by the steps of
# cell_seal() in the cell (native/inside/cell.c; a test reads the C and compares), and by the interpreter around them. A
# profile of an operator's may refuse any of it. What a profile allows anyway costs nothing here. Arguments are given
# where profiles decide by them: a need that the profile grants leaves no trace in either layer.
SPAWN: Final = (
    # The zygote waits for requests, forks, reaps, answers.
    Need("poll", "waits for the nursery, the engine and SIGCHLD"),
    Need("signalfd4", "SIGCHLD as a descriptor"),
    Need("rt_sigprocmask", "SIGCHLD is blocked in the zygote, not in the cell"),
    Need("recvmsg", "a request and its descriptors"),
    Need("newfstatat", "/proc/self/task: one thread, else no fork"),
    Need("clone3", "the fork of a cell, into its leaf"),
    Need("waitid", "reaps cells"),
    Need("wait4", "reaps cells by os.waitpid"),
    Need("exit_group", "the end of the zygote, and of a cell that a wall failed in"),
    # The cell, in the order of its steps.
    Need("write", "cgroup.procs, tasks and oom_score_adj; the zygote's report"),
    Need("setns", "first into the init's pid namespace, for the child; then the cell into the others"),
    Need("unshare", "the cgroup namespace, once the leaf is entered"),
    Need("setsid", "no session of the zygote's"),
    Need("chdir", "/workspace"),
    Need("umask", "the cell's"),
    Need("openat", "oom_score_adj; the paths that Landlock grants"),
    Need("close", "what was opened for a moment"),
    Need("dup3", "streams and channel at their numbers"),
    Need("close_range", "no other descriptor stays"),
    Need("prlimit64", "its own limits", (Test(0, "==", 0),)),
    Need("setgroups", "no supplementary groups"),
    Need("setresgid", "the slot's id"),
    Need("setresuid", "the slot's id"),
    Need("prctl", "PR_CAP_AMBIENT_CLEAR_ALL: no ambient capability", _prctl(47, Test(1, "==", 4))),
    Need("capset", "no capability"),
    Need("prctl", "PR_SET_DUMPABLE: its own /proc/self", _prctl(4)),
    Need("prctl", "PR_SET_NO_NEW_PRIVS", _prctl(38)),
    Need("prctl", "PR_GET_NO_NEW_PRIVS: it is on", _prctl(39)),
    Need("landlock_create_ruleset", "the wall around files"),
    Need("landlock_add_rule", "the wall around files"),
    Need("landlock_restrict_self", "the wall around files"),
    Need("seccomp", "the layer that refuses this and all of the above"),
    Need("sendmsg", "the cell's hello; the zygote's answers"),
    # The interpreter in the zygote: its allocator, its locks around a fork, a look at its own descriptors, and the move
    # of its heap into a sealed memfd.
    Need("brk", "malloc"),
    Need("mmap", "malloc; the heap's new mapping", (Test(3, "==", 0, 0x40000),)),  # no MAP_HUGETLB
    Need("munmap", "malloc"),
    Need("mremap", "malloc: a large block grows"),
    Need("mprotect", "the heap's new mapping as the old one was"),
    Need("madvise", "MADV_DONTNEED: malloc gives back", (Test(2, "==", 4),)),
    Need("madvise", "MADV_FREE: other allocators give back", (Test(2, "==", 8),)),
    Need("madvise", "MADV_DONTFORK: the zygote's table of its cells", (Test(2, "==", 10),)),
    Need("madvise", "MADV_POPULATE_READ: pages are populated ahead", (Test(2, "==", 22),)),
    Need("madvise", "MADV_POPULATE_WRITE: pages are populated ahead", (Test(2, "==", 23),)),
    Need("memfd_create", "the heap's file", (Test(1, "==", 0, 0x4),)),  # no MFD_HUGETLB
    Need("ftruncate", "the heap's file has its final size"),
    Need("fcntl", "F_ADD_SEALS: nobody writes to the heap's file any more", (Test(1, "==", 1033),)),
    Need("futex", "the import lock is held over a fork"),
    Need("read", "/proc/self/maps and pagemap; which signal came"),
    Need("pread64", "/proc/self/pagemap"),
    Need("lseek", "/proc/self/maps"),
    Need("fstat", "os.listdir, open"),
    Need("getdents64", "os.listdir of /proc/self/fd"),
    Need("readlink", "which descriptors are left, by name"),
    Need("rt_sigreturn", "the end of a handler that a library left"),
)


def compile_layers(profile: Profile, *, marker_errno: int | None = None) -> Layers:
    """*profile* as two programs that do together what ``compile(profile)`` does alone.

    *marker_errno* as for ``compile``, in both. Raises what ``compile`` raises.
    """
    shown = profile if marker_errno is None else marked(profile, marker_errno)
    lower, upper = split(shown)
    layers = Layers(compile(lower), compile_upper(upper))
    prove((layers.inherited, layers.own), shown, (lower, upper))
    return layers


def split(profile: Profile) -> tuple[Profile, Profile]:
    """The rules of the inherited layer and of a cell's own.

    The first is *profile*, with a row in front for each of ``SPAWN`` that it would refuse or log. The second has, for
    just those calls, what *profile* says, and allows all else.
    """
    lower: list[Rule] = []
    upper: list[Rule] = []
    for need in SPAWN:
        number = NUMBERS[need.call]
        rows = profile.rows(number) or (Rule(number, profile.default_action),)
        # Of a call that is refused in any case the arguments would only make both programs longer.
        given = need.tests if len(rows) > 1 else ()
        asked = list(_under(rows, given))
        while asked and asked[-1].action == ALLOW:
            asked.pop()  # what is left is allowed in any case
        if asked:
            lower.append(Rule(number, ALLOW, given, f"spawning a cell: {need.reason}"))
            upper += asked
    return (
        Profile(profile.name, profile.default_action, (*lower, *profile.rules), profile.description, profile.ignored),
        Profile(profile.name, ALLOW, tuple(upper), profile.description),
    )


def _under(rows: Sequence[Rule], given: tuple[Test, ...]) -> Iterator[Rule]:
    """Those of *rows* that can decide on a call for which the tests *given* hold, each with these tests."""
    for row in rows:
        outcomes = {test: _known(test, given) for test in row.tests}
        if False in outcomes.values():
            continue
        unknown = tuple(test for test, outcome in outcomes.items() if outcome is None)
        yield Rule(row.number, row.action, (*given, *unknown), row.reason)
        if not unknown:
            return


def _known(test: Test, given: Sequence[Test]) -> bool | None:
    """What *test* is for each call for which all tests of *given* hold; None when that depends on the call."""
    for one in given:
        if one.argument != test.argument:
            continue
        if one.op == "==":
            if test.mask & ~one.mask == 0:
                return test.holds((one.value,) * 6)
            if test.op == "==" and (test.value ^ one.value) & test.mask & one.mask:
                return False
        elif one.op == "!=" and (one.value, one.mask) == (test.value, test.mask) and test.op in ("==", "!="):
            return test.op == "!="
    return None
