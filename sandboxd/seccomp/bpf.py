"""From rules to the classic BPF program that seccomp(2) takes, and back: structure, evaluation, proof.

libseccomp makes the frame: the check of the architecture, the guard against x32 numbers and a binary tree over the
numbers. It has one default for whatever no rule matches and no order among rules, so conditions on arguments are not
given to it: a call that has them gets a placeholder action (SECCOMP_RET_TRACE, which no profile can ask for), and each
placeholder's RET is replaced, one instruction for one, by a jump to a section of ours that asks the rows in order. The
default is such a placeholder too, which keeps the many numbers that are refused alike out of the tree: a program is
verified and translated each time it is installed, so its length is time.

The second of two layers (sandboxd/seccomp/layers.py) is made without libseccomp: it has no frame but a small tree.

The finished program is evaluated here before it is believed: every known number, with the arguments of each row, must
get what ``Profile.decide`` says.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sandboxd.errors import PolicyError, Unavailable
from sandboxd.seccomp.rules import ALLOW, NO_CALL, WORD, Action, Arguments, Profile, Rule, Test, refuse
from sandboxd.seccomp.syscalls import NEWEST, X32_BIT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = [
    "AUDIT_ARCH_I386",
    "AUDIT_ARCH_X86_64",
    "IMPLEMENTATION",
    "INSTRUCTIONS_MAX",
    "check",
    "compile",
    "compile_upper",
    "marked",
    "prove",
    "run",
]

IMPLEMENTATION: Final = 2
"""Raised whenever the same rules come to another program; part of the cache's key."""

INSTRUCTIONS_MAX: Final = 4096
"""BPF_MAXINSNS: the kernel takes no longer program."""

AUDIT_ARCH_X86_64: Final = 0xC000003E
AUDIT_ARCH_I386: Final = 0x40000003

# linux/bpf_common.h; the kernel's seccomp_check_filter lets few of them pass, and libseccomp and we use fewer.
_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND: Final = 0x54  # BPF_ALU | BPF_AND | BPF_K
_JUMP: Final = 0x05  # BPF_JMP | BPF_JA
_JEQ: Final = 0x15
_JGT: Final = 0x25
_JGE: Final = 0x35
_JSET: Final = 0x45
_RETURN: Final = 0x06  # BPF_RET | BPF_K
_BRANCHES: Final[dict[int, Callable[[int, int], bool]]] = {
    _JEQ: int.__eq__,
    _JGT: int.__gt__,
    _JGE: int.__ge__,
    _JSET: lambda a, k: a & k != 0,
}

# linux/seccomp.h
_KILL_PROCESS: Final = 0x80000000
_ERRNO: Final = 0x00050000
_TRACE: Final = 0x7FF00000
_LOG: Final = 0x7FFC0000
_ALLOW: Final = 0x7FFF0000
_ACTION: Final = 0xFFFF0000

_DATA_BYTES: Final = 64  # struct seccomp_data: nr, arch, instruction_pointer, args[6]
_ARGUMENTS_OFFSET: Final = 16
_INSTRUCTION: Final = struct.Struct("=HBBI")

_OPTIMIZE_BINARY_TREE: Final = 2
_RUNS_MAX: Final = 8
_LEAF: Final = 4  # numbers that are asked one after the other at the end of the small tree; libseccomp takes as many
_BRANCH_MAX: Final = 255  # a conditional jump has eight bits

_Rows = tuple[tuple[Action, tuple[Test, ...]], ...]


@dataclass(frozen=True, slots=True)
class _Instruction:
    code: int
    k: int
    if_true: int = 0
    if_false: int = 0


def compile(profile: Profile, *, marker_errno: int | None = None) -> bytes:
    """The program of *profile*: an array of ``struct sock_filter`` in native byte order.

    With *marker_errno* every answer of the filter, success too, is that errno instead of its own, so that a sweep over
    all numbers can tell it from the kernel's; kills stay kills. Costs tenths of a second: pyseccomp, imported only
    here, starts ldconfig, and the proof evaluates each row. Raises PolicyError when the profile needs more
    instructions than the kernel takes, Unavailable when libseccomp is missing or makes something else than what was
    asked, ValueError for a marker that no call can answer.
    """
    shown = profile if marker_errno is None else marked(profile, marker_errno)
    sections: dict[_Rows, int] = {}
    frame = _frame(shown, sections)
    content = _packed(_link(frame, [_rest(shown), *map(_section, sections)]), profile)
    check(content)
    prove([content], shown)
    return content


def compile_upper(profile: Profile) -> bytes:
    """The program of *profile* for a process that is under a filter of ``compile`` already; as short as it can be.

    It asks neither for the architecture nor for x32 numbers: of two filters the more restrictive answer counts, and
    the one below kills those calls. Raises ValueError unless *profile* allows what it does not name, PolicyError and
    Unavailable as ``compile`` does.
    """
    if profile.default_action != ALLOW:
        raise ValueError(f"{profile.name} refuses what it does not name: no filter to lay upon another")
    sections: dict[_Rows, int] = {}
    frame = _small_frame(profile, sections)
    # No number gets to the first of the sections, which stands for the default in a frame of libseccomp's.
    content = _packed(_link(frame, [[], *map(_section, sections)]), profile)
    check(content, guarded=False)
    prove([content], profile)
    return content


def _packed(program: Sequence[_Instruction], profile: Profile) -> bytes:
    if len(program) > INSTRUCTIONS_MAX:
        raise PolicyError(
            f"seccomp.profile: {profile.name} is {len(program)} instructions; the kernel takes {INSTRUCTIONS_MAX}.",
            key="seccomp.profile",
        )
    return b"".join(_INSTRUCTION.pack(one.code, one.if_true, one.if_false, one.k) for one in program)


def check(program: bytes, *, guarded: bool = True) -> None:
    """Raise ValueError unless *program* is of the form that ``compile`` makes.

    Whole instructions, at most 4,096; only known ones; loads within seccomp_data; jumps forward and inside; a return at
    every end; and, when *guarded*, calls of another architecture or with an x32 number are killed. The meaning of the
    rest is not looked at.
    """
    instructions = _parse(program)
    for index, one in enumerate(instructions):
        left = len(instructions) - index - 1
        match one.code:
            case 0x20:
                fits = one.k % 4 == 0 and one.k < _DATA_BYTES
            case 0x05:
                fits = one.k < left
            case 0x54 | 0x06:
                fits = True
            case _:
                fits = one.code in _BRANCHES and one.if_true < left and one.if_false < left
        if not fits:
            raise ValueError(f"instruction {index} is none that a filter of ours has")
    if instructions[-1].code != _RETURN:
        raise ValueError("the last instruction does not return")
    if guarded:
        _check_guards(instructions)


def _check_guards(instructions: Sequence[_Instruction]) -> None:
    foreign = (
        *((AUDIT_ARCH_I386, number) for number in (0, 1, 11, 120, NEWEST)),
        *((AUDIT_ARCH_X86_64, X32_BIT | number) for number in (0, 1, 59, 512, NEWEST)),
        (AUDIT_ARCH_X86_64, 0x8000_0000),
        (AUDIT_ARCH_X86_64, NO_CALL - 1),
    )
    for architecture, number in foreign:
        if _evaluate(instructions, architecture, number, (0,) * 6) != _KILL_PROCESS:
            raise ValueError(f"number {number:#x} of architecture {architecture:#x} is not killed")


def run(program: bytes, architecture: int, number: int, arguments: Sequence[int] = (0,) * 6) -> int:
    """What *program* returns for a call, as the kernel would evaluate it: a SECCOMP_RET_* value with its data."""
    return _evaluate(_parse(program), architecture, number, arguments)


def _parse(program: bytes) -> list[_Instruction]:
    if not program or len(program) % _INSTRUCTION.size:
        raise ValueError(f"{len(program)} bytes are no whole number of instructions")
    if len(program) > INSTRUCTIONS_MAX * _INSTRUCTION.size:
        raise ValueError(f"the kernel takes at most {INSTRUCTIONS_MAX} instructions")
    return [_Instruction(code, k, jt, jf) for code, jt, jf, k in _INSTRUCTION.iter_unpack(program)]


def _evaluate(program: Sequence[_Instruction], architecture: int, number: int, arguments: Sequence[int]) -> int:
    words = [number & WORD, architecture, 0, 0]
    for argument in arguments:
        words += (argument & WORD, argument >> 32 & WORD)
    accumulator = position = 0
    while True:
        one = program[position]
        position += 1
        if one.code == _LOAD:
            accumulator = words[one.k // 4]
        elif one.code == _AND:
            accumulator &= one.k
        elif one.code == _JUMP:
            position += one.k
        elif one.code == _RETURN:
            return one.k
        else:
            position += one.if_true if _BRANCHES[one.code](accumulator, one.k) else one.if_false


def _returned(action: Action) -> int:
    match action.kind:
        case "allow":
            return _ALLOW
        case "log":
            return _LOG
        case "succeed" | "errno":
            return _ERRNO | action.errno
        case "kill":
            return _KILL_PROCESS


def marked(profile: Profile, errno: int) -> Profile:
    """*profile* with *errno* as each of the filter's answers. Raises ValueError for one that no call can answer."""

    def mark(action: Action) -> Action:
        return refuse(errno) if action.answers else action

    rules = tuple(Rule(rule.number, mark(rule.action), rule.tests, rule.reason) for rule in profile.rules)
    return Profile(profile.name, mark(profile.default_action), rules)


def _frame(profile: Profile, sections: dict[_Rows, int]) -> list[_Instruction]:
    """libseccomp's part: the guards, and the tree over all numbers but those that ``_rest`` answers.

    *sections* is filled: rows of arguments, and the number of their placeholder, from 1.
    """
    library = _libseccomp()
    usual = _usual_refusal(profile)
    try:
        made = library.SyscallFilter(_TRACE)
        made.set_attr(library.Attr.ACT_BADARCH, _KILL_PROCESS)
        made.set_attr(library.Attr.CTL_OPTIMIZE, _OPTIMIZE_BINARY_TREE)
        for number in profile.numbers:
            rows = profile.rows(number)
            if len(rows) > 1:
                key = tuple((row.action, row.tests) for row in rows)
                action = _TRACE | sections.setdefault(key, len(sections) + 1)
            elif (only := next(iter(rows)).action) == usual:
                continue
            else:
                action = _returned(only)
            # By number: a name that libseccomp does not know would be -1, and its rule gone.
            made.add_rule_exactly(action, number)
        return _parse(_exported(made))
    except OSError as error:
        raise Unavailable(
            "seccomp", "libseccomp could not build the filter", errno=error.errno, fix="install libseccomp 2.5 or newer"
        ) from error


def _usual_refusal(profile: Profile) -> Action:
    """The refusal that most numbers have, so that the tree need not hold them; the default where that is no gain."""
    counts = Counter(next(iter(rows)).action for rows in map(profile.rows, profile.numbers) if len(rows) == 1)
    usual, _ = max(counts.items(), key=lambda item: item[1] if not item[0].permits else 0, default=(ALLOW, 0))
    if usual.permits or len(_runs(profile.numbers)) > _RUNS_MAX:
        return profile.default_action
    return usual


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of successive *numbers*, which ascend."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    return runs


def _rest(profile: Profile) -> list[_Instruction]:
    """What a number that the tree does not hold gets: the usual refusal when the profile names it, else the default."""
    usual, default = _returned(_usual_refusal(profile)), _returned(profile.default_action)
    code = [_Instruction(_LOAD, 0)]
    if usual != default:
        for first, last in reversed(_runs(profile.numbers)):
            code += (
                _Instruction(_JGT, last, 0, 1),
                _Instruction(_RETURN, default),
                _Instruction(_JGE, first, 0, 1),
                _Instruction(_RETURN, usual),
            )
    return [*code, _Instruction(_RETURN, default)]


def _libseccomp() -> Any:
    try:
        import pyseccomp  # pyright: ignore[reportMissingTypeStubs]
    except (ImportError, RuntimeError, AttributeError) as error:  # RuntimeError: libseccomp.so.2 is not there
        raise Unavailable(
            "seccomp", str(error), fix="install libseccomp (Debian: apt install libseccomp2) and pyseccomp"
        ) from error
    return pyseccomp


def _exported(made: Any) -> bytes:
    with open(os.memfd_create("sandboxd-seccomp", os.MFD_CLOEXEC), "rb") as file:
        made.export_bpf(file)
        size = file.seek(0, os.SEEK_END)
        if size > INSTRUCTIONS_MAX * _INSTRUCTION.size:
            raise PolicyError("seccomp.profile: the filter is longer than the kernel takes.", key="seccomp.profile")
        file.seek(0)
        return file.read()


def _link(frame: list[_Instruction], sections: list[list[_Instruction]]) -> list[_Instruction]:
    """The frame with its placeholders replaced by jumps to *sections*, which follow it."""
    starts: list[int] = []
    end = len(frame)
    for section in sections:
        starts.append(end)
        end += len(section)
    linked = [
        _Instruction(_JUMP, starts[one.k & ~_ACTION] - index - 1)
        if one.code == _RETURN and one.k & _ACTION == _TRACE
        else one
        for index, one in enumerate(frame)
    ]
    return [*linked, *(one for section in sections for one in section)]


def _small_frame(profile: Profile, sections: dict[_Rows, int]) -> list[_Instruction]:
    """What ``_frame`` does, for few numbers and without guards: a tree over them, then each answer once.

    Raises ValueError for more numbers than the tree's jumps can span.
    """
    returned: dict[int, int] = {}
    for number in profile.numbers:
        rows = profile.rows(number)
        key = tuple((row.action, row.tests) for row in rows)
        many = len(rows) > 1
        returned[number] = _TRACE | sections.setdefault(key, len(sections) + 1) if many else _returned(rows[0].action)
    if not returned:
        return [_Instruction(_RETURN, _ALLOW)]
    tree = [_Instruction(_LOAD, 0), *_branches(list(returned))]
    answers = list(dict.fromkeys((_ALLOW, *returned.values())))
    if len(tree) + len(answers) > _BRANCH_MAX:
        raise ValueError(f"{profile.name} names {len(returned)} calls: too many for a small tree")
    for index, one in enumerate(tree):
        if one.code == _JEQ:
            # The first answer is for whatever no JEQ of its leaf takes, and stands right behind the tree.
            rest = len(tree) - index - 1
            found = rest + answers.index(returned[one.k])
            tree[index] = _Instruction(_JEQ, one.k, found, rest if one.if_false else 0)
    return [*tree, *(_Instruction(_RETURN, answer) for answer in answers)]


def _branches(numbers: list[int]) -> list[_Instruction]:
    """Code that halves *numbers*, ascending, and asks the last few in turn.

    Where a JEQ leads is left open; ``if_false`` is 1 for the last one of its leaf.
    """
    if len(numbers) <= _LEAF:
        return [_Instruction(_JEQ, number, 0, int(number == numbers[-1])) for number in numbers]
    middle = len(numbers) // 2
    lower, upper = _branches(numbers[:middle]), _branches(numbers[middle:])
    return [_Instruction(_JGE, numbers[middle], len(lower), 0), *lower, *upper]


def _section(rows: _Rows) -> list[_Instruction]:
    """Code that returns the action of the first of *rows* whose tests all hold; the last has no tests."""
    code: list[_Instruction] = []
    loaded: tuple[int, int] | None = None  # argument and mask in the accumulator on every way that leads here
    for (action, word), group in itertools.groupby(_fewest(rows), key=lambda row: (row[0], _single(row[1]))):
        if word is None:
            for _, tests in group:
                comparisons = [one for test in tests for one in _compare(test)]
                code += _settled([*comparisons, _Instruction(_RETURN, _returned(action))])
            loaded = None
        else:
            if word != loaded:
                code += _fetch(_ARGUMENTS_OFFSET + 8 * word[0], word[1])
                loaded = word
            for values in _chunks([tests[0].value for _, tests in group], 128):
                code += _one_of(values, _returned(action))
    return code


def _fewest(rows: _Rows) -> Iterator[tuple[Action, tuple[Test, ...]]]:
    """*rows* in an order that means the same and is asked faster.

    Successive rows that ask whether one int is this or that value exclude each other, so their order is free: what is
    allowed comes first, in the order of the profile. Those right before the last row that answer what it answers are
    left out.
    """
    left = len(rows)
    for word, group in itertools.groupby(rows, key=lambda row: _single(row[1])):
        run = list(group)
        left -= len(run)
        if word is not None:
            run.sort(key=lambda row: not row[0].permits)
            if left == 1:
                run = [row for row in run if row[0] != rows[-1][0]]
        yield from run


def _single(tests: tuple[Test, ...]) -> tuple[int, int] | None:
    """Argument and mask of a row that asks only whether an int is one value; None for every other row."""
    if len(tests) == 1 and tests[0].op == "==" and tests[0].mask <= WORD:
        return tests[0].argument, tests[0].mask
    return None


def _chunks(values: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _one_of(values: list[int], returned: int) -> Iterator[_Instruction]:
    """Code that returns when the accumulator is one of *values*, else falls through; a jump spans 255 at most."""
    for left in range(len(values) - 1, 0, -1):
        yield _Instruction(_JEQ, values[-left - 1], left, 0)
    yield _Instruction(_JEQ, values[-1], 0, 1)
    yield _Instruction(_RETURN, returned)


# Where a comparison leaves to, until the row's length is known: to the next row, or past the comparison itself. Jumps
# of real programs are below 256, so these cannot be meant as such.
_FAIL: Final = 1000
_PASS: Final = 1001


def _settled(body: list[_Instruction]) -> list[_Instruction]:
    """*body*, one row, with every jump to the next row given its distance."""
    end = len(body)

    def distance(target: int, index: int) -> int:
        return end - index - 1 if target == _FAIL else target

    return [
        _Instruction(one.code, one.k, distance(one.if_true, index), distance(one.if_false, index))
        for index, one in enumerate(body)
    ]


def _compare(test: Test) -> list[_Instruction]:
    """Code that falls through when *test* holds and jumps to _FAIL when not."""
    offset = _ARGUMENTS_OFFSET + 8 * test.argument
    low, high = test.mask & WORD, test.mask >> 32
    value_low, value_high = test.value & WORD, test.value >> 32
    code: list[_Instruction] = []
    if high:
        code += _fetch(offset + 4, high)
        match test.op:
            case "==":
                code.append(_Instruction(_JEQ, value_high, 0, _FAIL))
            case "!=":
                code.append(_Instruction(_JEQ, value_high, 0, _PASS))
            case ">" | ">=":
                code += (_Instruction(_JGT, value_high, _PASS, 0), _Instruction(_JEQ, value_high, 0, _FAIL))
            case "<" | "<=":
                code += (_Instruction(_JGT, value_high, _FAIL, 0), _Instruction(_JEQ, value_high, 0, _PASS))
    code += _fetch(offset, low)
    match test.op:
        case "==":
            code.append(_Instruction(_JEQ, value_low, 0, _FAIL))
        case "!=":
            code.append(_Instruction(_JEQ, value_low, _FAIL, 0))
        case ">":
            code.append(_Instruction(_JGT, value_low, 0, _FAIL))
        case ">=":
            code.append(_Instruction(_JGE, value_low, 0, _FAIL))
        case "<":
            code.append(_Instruction(_JGE, value_low, _FAIL, 0))
        case "<=":
            code.append(_Instruction(_JGT, value_low, _FAIL, 0))
    end = len(code)
    return [
        _Instruction(
            one.code,
            one.k,
            end - index - 1 if one.if_true == _PASS else one.if_true,
            end - index - 1 if one.if_false == _PASS else one.if_false,
        )
        for index, one in enumerate(code)
    ]


def _fetch(offset: int, mask: int) -> Iterator[_Instruction]:
    yield _Instruction(_LOAD, offset)
    if mask != WORD:
        yield _Instruction(_AND, mask)


def prove(programs: Sequence[bytes], profile: Profile, also: Sequence[Profile] = ()) -> None:
    """Raise Unavailable unless *programs*, installed in this order, do together what *profile* says.

    Compared for each number up to past the newest, with arguments for each row of *profile* and of *also*, with and
    without high bits.
    """
    layers = [_parse(program) for program in reversed(programs)]  # as the kernel asks them: the newest first
    looked_at = (profile, *also)
    for number in (*range(max((NEWEST, *profile.numbers)) + 64), NO_CALL):
        examples = {answer.arguments for one in looked_at for answer in one.verdict(number) if answer.arguments}
        for arguments in itertools.chain.from_iterable(map(_variants, examples)):
            answers = [_evaluate(layer, AUDIT_ARCH_X86_64, number, arguments) for layer in layers]
            if min(answers, key=_rank) != _returned(profile.decide(number, arguments)):
                raise Unavailable(
                    "seccomp",
                    f"the filter that was built does not do for call {number} what {profile.name} says",
                    fix="report this with the version of libseccomp",
                )


def _rank(returned: int) -> int:
    """The order of answers in which the kernel takes the least, and the first of equals (seccomp_run_filters)."""
    action = returned & _ACTION
    return action - (1 << 32) if action >> 31 else action


def _variants(arguments: Arguments) -> Iterator[tuple[int, ...]]:
    yield arguments
    yield tuple(argument & WORD for argument in arguments)
    yield tuple(argument | 1 << 32 for argument in arguments)
