"""The programs that profiles compile to, read by an evaluator of the tests' own: no kernel yet."""

from __future__ import annotations

import errno
import itertools
import struct
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd import seccomp
from sandboxd.errors import PolicyError, Unavailable
from sandboxd.seccomp import ALLOW as PERMIT
from sandboxd.seccomp import KILL, SUCCEED, Profile, Rule, Test, bpf, refuse
from sandboxd.seccomp import LOG as LOGGED
from sandboxd.seccomp.syscalls import NAMES, NUMBERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sandboxd.seccomp.rules import Operator

SHIPPED = ("default", "strict")
REGISTER = (1 << 64) - 1

# A second reading of classic BPF, written from Documentation/networking/filter.rst and not from sandboxd's own; it
# fails on everything that seccomp(2) does not admit.

X86_64 = 0xC000003E
I386 = 0x40000003

KILL_PROCESS = 0x80000000
ERRNO = 0x00050000
LOG = 0x7FFC0000
ALLOW = 0x7FFF0000


def _seccomp_data(architecture: int, number: int, arguments: Sequence[int]) -> bytes:
    """``struct seccomp_data`` of linux/seccomp.h, little-endian; the instruction pointer is of no interest."""
    return struct.pack("<iIQ6Q", number - (1 << 32) if number >> 31 else number, architecture, 0, *arguments)


def evaluate(program: bytes, architecture: int, number: int, arguments: Sequence[int] = (0,) * 6) -> int:
    """The value that *program* returns for one call."""
    data = _seccomp_data(architecture, number, arguments)
    instructions = list(struct.iter_unpack("<HBBI", program))
    a = pc = 0
    for _ in range(len(instructions)):
        code, jt, jf, k = instructions[pc]
        pc += 1
        match code & 0x07:
            case 0x00:  # BPF_LD
                assert code == 0x20, "only BPF_W | BPF_ABS is admitted"
                (a,) = struct.unpack_from("<I", data, k)
            case 0x04:  # BPF_ALU
                assert code == 0x54, "only BPF_AND | BPF_K is used"
                a &= k
            case 0x05:  # BPF_JMP
                match code & 0xF0:
                    case 0x00:
                        pc += k
                    case 0x10:
                        pc += jt if a == k else jf
                    case 0x20:
                        pc += jt if a > k else jf
                    case 0x30:
                        pc += jt if a >= k else jf
                    case _:
                        raise AssertionError(f"unknown jump {code:#x}")
            case 0x06:  # BPF_RET
                assert code == 0x06, "only BPF_K is used"
                return int(k)
            case _:
                raise AssertionError(f"unknown instruction {code:#x}")
    raise AssertionError("the program did not return")


def answer(kind: str, errno: int = 0) -> int:
    """The return value of an action."""
    return {"allow": ALLOW, "log": LOG, "succeed": ERRNO, "kill": KILL_PROCESS, "errno": ERRNO | errno}[kind]


@pytest.fixture(scope="module")
def default() -> Profile:
    return seccomp.effective("default")


def assert_means(program: bytes, profile: Profile, numbers: list[int], registers: Sequence[tuple[int, ...]]) -> None:
    """*program* does what *profile* says for these numbers, with each row's example and with *registers*."""
    for number in numbers:
        examples = [answer.arguments for answer in profile.verdict(number) if answer.arguments is not None]
        for arguments in (*examples, *registers):
            action = profile.decide(number, arguments)
            assert evaluate(program, X86_64, number, arguments) == answer(action.kind, action.errno), (
                f"{NAMES.get(number, number)} {[hex(argument) for argument in arguments]}"
            )


ALL_NUMBERS = [*range(601), 0x3FFFFFFF, *(0x40000000 | n for n in range(0, 601, 7)), 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
REGISTERS = [(0,) * 6, (REGISTER,) * 6, (1,) * 6, (1 << 32,) * 6, (0x5412,) * 6, (0x10000000,) * 6, (0x110000000,) * 6]


@pytest.mark.parametrize("name", SHIPPED)
def test_program_means_what_the_profile_says(name: str) -> None:
    profile = seccomp.effective(name)
    assert_means(seccomp.compile(profile), profile, ALL_NUMBERS, REGISTERS)


@pytest.mark.parametrize("name", SHIPPED)
def test_other_architectures_are_killed(name: str) -> None:
    program = seccomp.compile(seccomp.effective(name))
    for architecture in (I386, 0xC00000B7, 0x4000003E, 0, 0xFFFFFFFF):
        for number in range(0, 600, 11):
            assert evaluate(program, architecture, number) == KILL_PROCESS


@pytest.mark.parametrize("name", SHIPPED)
def test_architecture_and_x32_are_asked_before_anything_else(name: str) -> None:
    instructions = list(struct.iter_unpack("=HBBI", seccomp.compile(seccomp.effective(name))))
    assert instructions[0] == (0x20, 0, 0, 4)  # load the architecture
    assert instructions[1][0::3] == (0x15, X86_64)
    assert instructions[2] == (0x20, 0, 0, 0)  # load the number
    assert instructions[3][0::3] == (0x35, 0x40000000)


@pytest.mark.parametrize("name", SHIPPED)
def test_marker_replaces_every_refusal_and_nothing_else(name: str) -> None:
    profile = seccomp.effective(name)
    program = seccomp.compile(profile, marker_errno=4000)
    for number in ALL_NUMBERS:
        for possible in profile.verdict(number):
            assert possible.arguments is not None
            kind = possible.action.kind
            expected = answer("errno", 4000) if possible.action.answers else answer(kind)
            assert evaluate(program, X86_64, number, possible.arguments) == expected


def test_calls_that_libseccomp_does_not_know_are_in_the_program() -> None:
    profile = seccomp.effective("default", allow=["listns", "rseq_slice_yield"])
    program = seccomp.compile(profile)
    assert evaluate(program, X86_64, NUMBERS["rseq_slice_yield"]) == ALLOW
    assert evaluate(program, X86_64, NUMBERS["mseal"]) == ALLOW
    assert evaluate(program, X86_64, NUMBERS["setxattrat"]) == answer("errno", errno.ENOTSUP)


def test_programs_are_short() -> None:
    lengths = [len(seccomp.compile(seccomp.effective(name))) // 8 for name in SHIPPED]
    assert max(lengths) < 700


def test_allowed_calls_do_not_look_at_arguments(default: Profile) -> None:
    # The kernel answers such numbers from a bitmap, without running the program (since 5.11).
    program = list(struct.iter_unpack("=HBBI", seccomp.compile(default)))
    for call in ("read", "futex", "mprotect", "newfstatat", "gettid"):
        position = accumulator = 0
        while program[position][0] != 0x06:
            code, jt, jf, k = program[position]
            position += 1
            if code == 0x20:
                assert k in (0, 4), call
                accumulator = NUMBERS[call] if k == 0 else X86_64
            elif code == 0x05:
                position += k
            else:
                taken = {0x15: accumulator == k, 0x25: accumulator > k, 0x35: accumulator >= k}[code]
                position += jt if taken else jf


OPERATORS: list[Operator] = ["==", "!=", "<", "<=", ">", ">="]
actions = st.sampled_from([PERMIT, LOGGED, KILL, SUCCEED, refuse(errno.EPERM), refuse(errno.ENOTTY), refuse(4094)])
words = st.sampled_from([0, 1, 2, 0x7F, 0x80000000, 0xFFFFFFFF, 1 << 32, (1 << 32) + 1, 1 << 63, REGISTER])
masks = st.sampled_from([1, 0xFF, 0xFFFFFFFF, 0xF0000000F0, 0xFFFFFFFF00000000, REGISTER])


@st.composite
def some_tests(draw: st.DrawFn) -> Test:
    mask = draw(masks)
    op = draw(st.sampled_from(OPERATORS))
    value = draw(words) & mask if op in ("==", "!=") else min(draw(words), mask)
    return Test(draw(st.integers(0, 5)), op, value, mask)


@st.composite
def some_profiles(draw: st.DrawFn) -> Profile:
    numbers = draw(st.lists(st.integers(0, 1000), unique=True, max_size=40))
    conditions = st.lists(st.lists(some_tests(), max_size=3), max_size=4)
    rules = [Rule(number, draw(actions), tuple(tests)) for number in numbers for tests in draw(conditions)]
    return Profile("any", draw(actions), tuple(rules))


@settings(max_examples=30, deadline=None)
@given(profile=some_profiles(), registers=st.lists(st.tuples(*[words] * 6), min_size=1, max_size=8))
def test_any_profile_compiles_to_its_meaning(profile: Profile, registers: list[tuple[int, ...]]) -> None:
    numbers = [*profile.numbers, 0, 500, 1001, 0x40000000, 0xFFFFFFFF]
    assert_means(seccomp.compile(profile), profile, numbers, registers)


def test_long_lists_of_values_span_more_than_one_jump() -> None:
    values = [index * 7919 for index in range(400)]
    rules = [Rule(16, refuse(errno.ENOTTY), (Test(1, "==", value),)) for value in values[:300]]
    rules += [Rule(16, PERMIT, (Test(1, "==", value),)) for value in values[300:]]
    profile = Profile("long", refuse(errno.ENOSYS), tuple(rules))
    program = seccomp.compile(profile)
    for value in (*values, 7):
        action = profile.decide(16, (0, value, 0, 0, 0, 0))
        expected = answer(action.kind, action.errno)
        assert evaluate(program, X86_64, 16, (0, value, 0, 0, 0, 0)) == expected


def test_values_that_are_refused_like_the_rest_cost_nothing() -> None:
    """A profile may name them for the sake of their reasons; those that are allowed are asked first."""
    allowed = [Rule(72, PERMIT, (Test(1, "==", value),)) for value in (3, 4)]
    special = Rule(72, refuse(errno.EPERM), (Test(1, "==", 1024),))
    named = [Rule(72, refuse(errno.EINVAL), (Test(1, "==", value),)) for value in (12, 25)]
    rest = Rule(72, refuse(errno.EINVAL))
    short = seccomp.compile(Profile("short", refuse(errno.ENOSYS), (*allowed, special, rest)))
    assert seccomp.compile(Profile("long", refuse(errno.ENOSYS), (special, *named, *allowed, rest))) == short


@pytest.mark.parametrize("first", [Test(1, "==", 12, 0xFF), Test(0, "==", 12), Test(1, "!=", 0, 4)], ids=str)
def test_values_are_asked_in_the_order_of_the_profile_where_several_rows_may_match(first: Test) -> None:
    rows = [
        Rule(72, refuse(errno.EINVAL), (Test(1, "==", 12),)),
        Rule(72, refuse(errno.EPERM), (first,)),
        Rule(72, PERMIT, (Test(1, "==", 13),)),
        Rule(72, refuse(errno.EINVAL)),
    ]
    for rules in itertools.permutations(rows[:3]):
        profile = Profile("overlapping", refuse(errno.ENOSYS), (*rules, rows[3]))
        registers = [(other, value, 0, 0, 0, 0) for value in (0, 4, 12, 13, 268) for other in (0, 12)]
        assert_means(seccomp.compile(profile), profile, [72], registers)


def test_program_longer_than_the_kernel_takes_is_an_error() -> None:
    rules = [Rule(16, PERMIT, (Test(index % 6, "==", index, REGISTER),)) for index in range(2000)]
    with pytest.raises(PolicyError, match="the kernel takes 4096"):
        seccomp.compile(Profile("huge", refuse(errno.ENOSYS), tuple(rules)))


def test_filter_that_is_not_what_was_asked_is_never_returned(default: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bpf._link

    def broken(frame: list[bpf._Instruction], sections: list[list[bpf._Instruction]]) -> object:
        return [
            bpf._Instruction(one.code, 0x7FFF0000) if one.code == 0x06 and one.k == 0x50061 else one
            for one in real(frame, sections)
        ]

    monkeypatch.setattr(bpf, "_link", broken)
    with pytest.raises(Unavailable, match="does not do for call 41"):
        seccomp.compile(default)


def test_marker_that_no_call_can_answer(default: Profile) -> None:
    with pytest.raises(ValueError, match="errno 4095"):
        seccomp.compile(default, marker_errno=4095)


def test_missing_libseccomp_is_unavailable_with_the_fix(default: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    with pytest.raises(Unavailable, match="libseccomp2") as caught:
        seccomp.compile(default)
    assert caught.value.stage == "seccomp"


def instruction(code: int, k: int = 0, jt: int = 0, jf: int = 0) -> bytes:
    return struct.pack("=HBBI", code, jt, jf, k)


GUARD = instruction(0x20, 4) + instruction(0x15, X86_64, 0, 2) + instruction(0x20) + instruction(0x35, 0x40000000, 0, 1)
GUARDED = GUARD + instruction(0x06, KILL_PROCESS) + instruction(0x06, ALLOW)


def test_check_takes_a_guarded_program() -> None:
    seccomp.check(GUARDED)


@pytest.mark.parametrize(
    "program",
    [
        b"",
        GUARDED[:-1],
        GUARDED * 700,
        GUARDED + instruction(0x20),  # no return at the end
        instruction(0x06, ALLOW),  # no guard
        GUARDED[:8] + GUARDED[16:],
        GUARD + instruction(0x06, 0) + instruction(0x06, ALLOW),  # kills the thread only
        instruction(0x20, 64) + GUARDED,  # load past seccomp_data
        instruction(0x20, 2) + GUARDED,
        instruction(0x05, 100) + GUARDED,
        instruction(0x15, 0, 200, 0) + GUARDED,
        instruction(0x87) + GUARDED,  # an instruction that seccomp does not take
    ],
    ids=["empty", "torn", "long", "endless", "open", "no-arch", "thread", "far", "odd", "jump", "branch", "unknown"],
)
def test_check_refuses(program: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        seccomp.check(program)
