"""Every system-call number there is, called in a real cell, against what the policy says of it.

The list of calls is generated from the profile: each number up to past the newest known one, once for each row of
conditions on arguments, with and without high bits; x32 numbers; -1. Arguments are bad pointers, bad descriptors and
absurd sizes, so nothing that reaches the kernel can do harm.

Two engines for each profile. One has the filter as it is shipped: a refused call must answer exactly the errno of its
row. The other's refusals all answer an errno that the kernel never gives: what does not answer it reached the kernel.
"""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from sandboxd import Sandbox, seccomp
from sandboxd.policy import load
from sandboxd.seccomp.syscalls import NAMES, NEWEST, NUMBERS, X32_BIT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sandboxd.seccomp.rules import Action, Profile

MARKER = 3999
"""No errno of the kernel's, and below MAX_ERRNO (4095), where the filter's data is cut off."""

PAST = 20
"""Numbers past the newest known one that are called as well."""

WORD = 0xFFFF_FFFF
ONES = (0xFFFF_FFFF_FFFF_FFFF,) * 6
NO_NUMBER = 0xFFFF_FFFF_FFFF_FFFF

PROBERS_OWN = ("clone", "wait4", "setitimer")
"""What the prober needs to give a call to a child of its own; lent to it where the profile refuses it."""

# Inside: a call that may end, block or double its caller is made by a child. It is made by machine code: the C
# library's syscall() cannot come back twice, as a vfork does. The answer is left in memory that parent and child share.
PROBER = r"""
import ctypes, json, mmap, os, signal, struct

CALL = (
    "4157"              # push r15
    "4989ff"            # mov r15, rdi          the number and its arguments; then the answer
    "498b07"            # mov rax, [r15]
    "498b7f08"          # mov rdi, [r15+8]
    "498b7710"          # mov rsi, [r15+16]
    "498b5718"          # mov rdx, [r15+24]
    "4d8b5720"          # mov r10, [r15+32]
    "4d8b4728"          # mov r8, [r15+40]
    "4d8b4f30"          # mov r9, [r15+48]
    "0f05"              # syscall
    "49894738"          # mov [r15+56], rax
    "49c7474001000000"  # mov qword [r15+64], 1 it came back
)
RETURN = (
    "415f"              # pop r15
    "c3"                # ret
)
EXIT = (
    "31ff"              # xor edi, edi
    "b8e7000000"        # mov eax, 231          exit_group: of the caller, or of what it has just made
    "0f05"              # syscall
)

def function(code):
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex(code))
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ctypes.addressof(ctypes.c_char.from_buffer(page))), page

here, there = function(CALL + RETURN), function(CALL + EXIT)
shared = mmap.mmap(-1, mmap.PAGESIZE)
place = ctypes.addressof(ctypes.c_char.from_buffer(shared))

for line in open("/workspace/calls.json"):
    in_child, number, *arguments = json.loads(line)
    struct.pack_into("=9Q", shared, 0, number, *arguments, 0, 0)
    status = 0
    if not in_child:
        here[0](place)
    elif pid := os.fork():
        _, status = os.waitpid(pid, 0)
    else:
        signal.setitimer(signal.ITIMER_REAL, 0.1)  # what blocks is ended by the alarm, whose default action is death
        there[0](place)
    answer, back = struct.unpack_from("=qQ", shared, 56)
    if os.WIFSIGNALED(status):
        print(json.dumps(["signal", os.WTERMSIG(status)]))
    elif back:
        print(json.dumps(["answer", answer]))
    else:
        print(json.dumps(["exit", os.WEXITSTATUS(status)]))
"""


@dataclass(frozen=True)
class Call:
    """One call to make, and what the profile says of it."""

    number: int
    arguments: tuple[int, ...]
    action: Action

    def __str__(self) -> str:
        name = NAMES.get(self.number, f"{self.number:#x}")
        given = ", ".join("-1" if one == ONES[0] else f"{one:#x}" for one in self.arguments)
        return f"{name}({given})"


@dataclass(frozen=True)
class Swept:
    """One profile's calls with their answers: the refused and those that only succeed from the shipped filter, all from
    the marked one.
    """

    name: str
    shipped: list[tuple[Call, list[object]]]
    marked: list[tuple[Call, list[object]]]
    commands: list[tuple[Call, list[object]]]
    """Of calls that are known by a command: each command from the marked filter."""


ENDS: dict[str, list[object]] = {
    "exit": ["exit", 255],
    "exit_group": ["exit", 255],
    "pause": ["signal", 14],
    "rt_sigreturn": ["signal", 11],
    "uretprobe": ["signal", 4],  # only the trampoline of a uprobe may make it, since Linux 6.11
}
"""What does not return although it reached the kernel, and how its caller ends then."""


COMMANDS: dict[str, tuple[int, Sequence[int], frozenset[int]]] = {
    "fcntl": (
        1,
        range(1100),
        frozenset((*range(12), 15, 16, 17, 36, 37, 38, 1025, 1027, 1028, 1030, *range(1032, 1036), 1037)),
    ),
    "madvise": (2, range(200), frozenset((*range(5), 8, 9, 10, 11, *range(13, 20), 22, 23, 24, 102, 103))),
    "fadvise64": (3, range(20), frozenset(range(20)) - {4}),
    "msync": (2, range(16), frozenset((0, 1, 2, 3, 8, 9, 10, 11))),
    "setsockopt": (
        2,
        range(200),
        frozenset(
            (1, 2, *range(5, 11), 12, 13, 15, 16, 18, 20, 21, 29, 35, 40, 42, 45, 63, 64, 66, 67, 83, 84),
        ),
    ),
    "getsockopt": (
        2,
        range(200),
        frozenset(
            (*range(1, 11), 12, 13, *range(15, 22), 28, 29, 30, 35, 38, 39, 40, 42, 45, 63, 64, 66, 67, 83, 84),
        ),
    ),
    "arch_prctl": (
        0,
        [base + low for base in range(0x1000, 0x6000, 0x1000) for low in range(0x30)],
        frozenset(
            (*range(0x1001, 0x1005), 0x1011, 0x1021, 0x1022, 0x1023, 0x4001, 0x4003, 0x5001, 0x5002, 0x5003, 0x5005),
        ),
    ),
}  # fmt: skip
"""Which argument is the command, what is tried, and which of it reach the kernel under both shipped profiles: written
down once more, so that neither a slip in a profile nor a new row goes unseen.
"""


def commands() -> Iterator[Call]:
    """Each call of COMMANDS with each command, which a kernel takes from the low half of its register."""
    for name, (argument, tried, allowed) in COMMANDS.items():
        for command in tried:
            arguments = list(ONES)
            if name.endswith("sockopt"):
                arguments[1] = 1  # SOL_SOCKET
            arguments[argument] = command | 7 << 32
            yield Call(NUMBERS[name], tuple(arguments), seccomp.ALLOW if command in allowed else seccomp.refuse(MARKER))


def variants(arguments: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The same to a kernel that takes ints, with the high halves of the registers full, empty and in between."""
    return {
        arguments,
        tuple(one & WORD for one in arguments),
        tuple(one & WORD | 1 << 32 for one in arguments),
    }


def calls_of(profile: Profile) -> Iterator[Call]:
    """Every call of the sweep, in the order of numbers."""
    for number in range(NEWEST + PAST + 1):
        answers = profile.verdict(number)
        yield Call(number, ONES, profile.decide(number, ONES))
        if len(answers) > 1:
            for answer in answers:
                assert answer.arguments is not None, f"a row of {NAMES.get(number)} can never match"
                for arguments in sorted(variants(answer.arguments) - {ONES}):
                    yield Call(number, arguments, profile.decide(number, arguments))
    for number in range(NEWEST + PAST + 1):
        yield Call(X32_BIT | number, ONES, seccomp.KILL)
    yield Call(NO_NUMBER, ONES, profile.default_action)


def probe(sandbox: Sandbox, calls: Iterable[Call]) -> list[tuple[Call, list[object]]]:
    """What became of each of *calls* in a cell of *sandbox*. What the filter answers is asked by the prober itself."""
    made = list(calls)
    lines = "".join(f"{json.dumps([not call.action.answers, call.number, *call.arguments])}\n" for call in made)
    result = sandbox.run(PROBER, files={"calls.json": lines.encode()})
    assert result.status == "ok", (result.status, result.stderr[-2000:], result.limits_hit)
    return list(zip(made, (json.loads(line) for line in result.stdout.splitlines()), strict=True))


def shown(answer: list[object]) -> str:
    """An answer for a reader."""
    kind, value = answer
    assert isinstance(value, int)
    if kind == "answer" and value < 0:
        return errno.errorcode.get(-value, "the marker" if value == -MARKER else f"errno {-value}")
    return f"{kind} {value}"


@pytest.fixture(scope="module", params=["default", "strict"])
def swept(request: pytest.FixtureRequest) -> Iterator[Swept]:
    """Both sweeps of a shipped policy."""
    policy = load(request.param)
    profile = seccomp.effective(policy.seccomp.profile, policy.seccomp.allow, policy.seccomp.deny)
    calls = list(calls_of(profile))
    with Sandbox(policy) as engine:
        shipped = probe(engine, (call for call in calls if call.action.answers))
    # Where the profile lets no process be made, the prober is lent what it needs; those calls are then not looked at.
    lent = [
        name
        for name in PROBERS_OWN
        if not all(answer.action.permits for answer in profile.verdict(NUMBERS[name])) and request.param != "default"
    ]
    rules = policy.seccomp.model_copy(update={"allow": [*policy.seccomp.allow, *lent]})
    limits = policy.limits.model_copy(update={"wall_seconds": 60.0, "cpu_seconds": 60.0, "cpus": 2.0})
    with Sandbox(policy.model_copy(update={"seccomp": rules, "limits": limits}), _marker_errno=MARKER) as engine:
        isolation = engine.run("pass").isolation
        assert isolation is not None
        assert any(str(MARKER) in what for what in isolation.missing), "the receipt does not tell of the marker"
        own = {NUMBERS[name] for name in lent}
        marked = probe(engine, (call for call in calls if call.number not in own))
        yield Swept(request.param, shipped, marked, probe(engine, commands()))


def test_every_number_is_called(swept: Swept) -> None:
    numbers = {call.number for call, _ in [*swept.shipped, *swept.marked]}
    assert set(range(NEWEST + PAST + 1)) <= numbers
    assert {X32_BIT | number for number in range(NEWEST + PAST + 1)} <= numbers
    assert NO_NUMBER in numbers


def test_a_refused_call_answers_exactly_its_errno_and_one_that_succeeds_none(swept: Swept) -> None:
    assert {"succeed", "errno"} == {call.action.kind for call, _ in swept.shipped}
    wrong = [
        f"{call}: {shown(answer)}, should be {call.action}"
        for call, answer in swept.shipped
        if answer != ["answer", -call.action.errno]
    ]
    assert not wrong, "\n".join(wrong)


def test_what_the_filter_answers_does_not_reach_the_kernel(swept: Swept) -> None:
    reached = [
        f"{call}: {shown(answer)}, should be {call.action}"
        for call, answer in swept.marked
        if call.action.answers and answer != ["answer", -MARKER]
    ]
    assert not reached, "\n".join(reached)


def test_an_allowed_call_reaches_the_kernel(swept: Swept) -> None:
    stopped = []
    for call, answer in swept.marked:
        if call.action.permits:
            end = ENDS.get(NAMES.get(call.number, ""))
            # ENOSYS is the kernel's own here: it is older than the call.
            came_back = answer[0] == "answer" and answer[1] != -MARKER and (end is None or answer[1] == -errno.ENOSYS)
            if answer != end and not came_back:
                stopped.append(f"{call}: {shown(answer)}")
    assert not stopped, "\n".join(stopped)


def test_exactly_the_known_commands_of_a_call_reach_the_kernel(swept: Swept) -> None:
    wrong = [
        f"{call}: {shown(answer)}, should {'not ' if call.action.answers else ''}be reached"
        for call, answer in swept.commands
        if (answer == ["answer", -MARKER]) != call.action.answers or answer[0] != "answer"
    ]
    assert not wrong, "\n".join(wrong)


def test_a_number_of_another_abi_is_the_end_of_its_caller(swept: Swept) -> None:
    lived = [
        f"{call}: {shown(answer)}"
        for call, answer in swept.marked
        if call.action.kind == "kill" and answer != ["signal", 31]
    ]
    assert not lived, "\n".join(lived)


@pytest.mark.parametrize("policy", ["default", "strict"])
def test_a_program_that_makes_an_x32_call_is_denied(policy: str) -> None:
    number = X32_BIT | NUMBERS["getpid"]
    code = f"import ctypes\nprint('before', flush=True)\nctypes.CDLL(None).syscall({number})\nprint('after')"
    with Sandbox(policy) as engine:
        result = engine.run(code)
    assert (result.status, result.signal, result.stdout) == ("denied", 31, "before\n")
    assert [hit.limit for hit in result.limits_hit if hit.limit != "cpus"] == ["syscall"]  # slow hosts throttle it


def test_threads_are_what_strict_lets_clone_make() -> None:
    """The one row of clone that the sweep of `strict` cannot try: a thread with a bad stack would end the prober."""
    code = "import threading\nmade = threading.Thread(target=print, args=('from a thread',))\nmade.start()\nmade.join()"
    with Sandbox("strict") as engine:
        result = engine.run(code)
    assert (result.status, result.stdout) == ("ok", "from a thread\n")
