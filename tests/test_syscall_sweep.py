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
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from sandboxd import Sandbox, seccomp
from sandboxd.seccomp_rules import Action, Profile
from sandboxd.syscalls import NAMES, NEWEST, X32_BIT

MARKER = 3999
"""No errno of the kernel's, and below MAX_ERRNO (4095), where the filter's data is cut off."""

PAST = 20
"""Numbers past the newest known one that are called as well."""

WORD = 0xFFFF_FFFF
ONES = (0xFFFF_FFFF_FFFF_FFFF,) * 6

# Inside: each call is made by a child of its own, by way of ten instructions of machine code: the C library's syscall()
# cannot come back twice, as a vfork does. What the kernel answered is left in memory that parent and child share.
PROBER = r"""
import ctypes, json, mmap, os, resource, signal, struct, sys

CODE = bytes.fromhex(
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
    "31ff"              # xor edi, edi
    "b8e7000000"        # mov eax, 231          exit_group: of the caller, or of what it has just made
    "0f05"              # syscall
    "0f0b"              # ud2
)
RECORD = 72
code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(CODE)
shared = mmap.mmap(-1, mmap.PAGESIZE)
call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
place = ctypes.addressof(ctypes.c_char.from_buffer(shared))
devnull = os.open("/dev/null", os.O_RDWR)
home = os.getpid()

for line in open("/workspace/calls.json"):
    number, *arguments = json.loads(line)
    shared.seek(0)
    shared.write(struct.pack("=9Q", number, *arguments, 0, 0))
    pid = os.fork()
    if pid == 0:
        # What blocks is ended by the alarm, whose default action is death.
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        call(place)
    _, status = os.waitpid(pid, 0)
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


# What does not return although it reached the kernel, and how its caller ends then.
ENDS: dict[str, list[object]] = {
    "exit": ["exit", 255],
    "exit_group": ["exit", 255],
    "pause": ["signal", 14],
    "rt_sigreturn": ["signal", 11],
    "uretprobe": ["signal", 4],  # only the trampoline of a uprobe may make it, since Linux 6.11
}

NO_NUMBER = 0xFFFF_FFFF_FFFF_FFFF


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
        # All ones first: whatever the rows say of it.
        yield Call(number, ONES, profile.decide(number, ONES))
        if len(answers) > 1:
            for answer in answers:
                assert answer.arguments is not None, f"a row of {NAMES.get(number)} can never match"
                for arguments in sorted(variants(answer.arguments) - {ONES}):
                    yield Call(number, arguments, profile.decide(number, arguments))
    for number in range(NEWEST + PAST + 1):
        yield Call(X32_BIT | number, ONES, seccomp.KILL)
    yield Call(NO_NUMBER, ONES, profile.default_action)


def probe(sandbox: Sandbox, calls: list[Call]) -> list[list[object]]:
    """What became of each of *calls* in a cell of *sandbox*."""
    lines = "".join(f"{json.dumps([one.number, *one.arguments])}\n" for one in calls)
    result = sandbox.run(PROBER, files={"calls.json": lines.encode()})
    assert result.status == "ok", (result.status, result.stderr[-2000:], result.limits_hit)
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == len(calls)
    return answers


def shown(answer: list[object]) -> str:
    """An answer for a reader."""
    kind, value = answer
    assert isinstance(value, int)
    if kind == "answer" and value < 0:
        return errno.errorcode.get(-value, "the marker" if value == -MARKER else f"errno {-value}")
    return f"{kind} {value}"


@pytest.fixture(scope="module", params=["default", "strict"])
def swept(request: pytest.FixtureRequest) -> Iterator[tuple[list[Call], list[list[object]], list[list[object]]]]:
    """The calls, their answers under the filter as shipped, and under the one with the marker."""
    calls = list(calls_of(seccomp.effective(request.param)))
    with Sandbox(request.param) as shipped:
        real = probe(shipped, calls)
    with Sandbox(request.param, _marker_errno=MARKER) as marked:
        assert any("seccomp" in what for what in marked.run("pass").isolation.missing)
        yield calls, real, probe(marked, calls)


Swept = tuple[list[Call], list[list[object]], list[list[object]]]


def test_every_number_is_called(swept: Swept) -> None:
    numbers = {call.number for call in swept[0]}
    assert set(range(NEWEST + PAST + 1)) <= numbers
    assert {X32_BIT | number for number in range(NEWEST + PAST + 1)} <= numbers
    assert NO_NUMBER in numbers


def test_a_refused_call_answers_exactly_its_errno(swept: Swept) -> None:
    wrong = [
        f"{call}: {shown(real)}, should be {call.action}"
        for call, real in zip(swept[0], swept[1], strict=True)
        if call.action.kind == "errno" and real != ["answer", -call.action.errno]
    ]
    assert not wrong, "\n".join(wrong)


def test_a_refused_call_does_not_reach_the_kernel(swept: Swept) -> None:
    reached = [
        f"{call}: {shown(marked)}, should be {call.action}"
        for call, marked in zip(swept[0], swept[2], strict=True)
        if call.action.kind == "errno" and marked != ["answer", -MARKER]
    ]
    assert not reached, "\n".join(reached)


def test_an_allowed_call_reaches_the_kernel(swept: Swept) -> None:
    stopped = []
    for call, real, marked in zip(*swept, strict=True):
        if not call.action.permits:
            continue
        end = ENDS.get(NAMES.get(call.number, ""))
        for answer in (real, marked):
            came_back = answer[0] == "answer" and answer[1] != -MARKER and (end is None or answer[1] == -errno.ENOSYS)
            if answer != end and not came_back:
                stopped.append(f"{call}: {shown(answer)}")
    assert not stopped, "\n".join(stopped)


def test_a_number_of_another_abi_is_the_end(swept: Swept) -> None:
    lived = [
        f"{call}: {shown(answer)}"
        for call, *answers in zip(*swept, strict=True)
        if call.action.kind == "kill"
        for answer in answers
        if answer != ["signal", 31]
    ]
    assert not lived, "\n".join(lived)
