"""What a seccomp profile comes down to: rows of system call, condition and action, the first that matches deciding.

Pure values: nothing here reads files or knows BPF. ``Profile.decide`` is the meaning that the compiled program must
have, and what the tests compare it with, number by number.
"""

from __future__ import annotations

import errno as errno_module
import hashlib
import itertools
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from sandboxd.seccomp.syscalls import NAMES, X32_BIT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = [
    "ALLOW",
    "ERRNO_MAX",
    "KILL",
    "LOG",
    "NO_CALL",
    "SUCCEED",
    "WORD",
    "Action",
    "Arguments",
    "Decision",
    "Operator",
    "Profile",
    "Rule",
    "Test",
    "refuse",
]

Operator = Literal["==", "!=", "<", "<=", ">", ">="]
Arguments = tuple[int, int, int, int, int, int]

WORD: Final = 0xFFFF_FFFF
"""The low half of a register: all that the kernel looks at when the argument is an int."""

ERRNO_MAX: Final = 4094
"""The highest errno that libseccomp lets a rule answer: one less than the kernel's MAX_ERRNO."""

NO_CALL: Final = 0xFFFF_FFFF
"""Number -1: what a tracer writes to skip a call. No x32 call, so it gets the default action."""

_REGISTER: Final = 0xFFFF_FFFF_FFFF_FFFF
_ONES: Final[Arguments] = (_REGISTER, _REGISTER, _REGISTER, _REGISTER, _REGISTER, _REGISTER)


@dataclass(frozen=True, slots=True)
class Action:
    """What happens to a call. *errno* is what it answers, from 1 to ERRNO_MAX, and 0 for all kinds but "errno"."""

    kind: Literal["allow", "log", "succeed", "errno", "kill"]
    errno: int = 0

    def __post_init__(self) -> None:
        least, most = (1, ERRNO_MAX) if self.kind == "errno" else (0, 0)
        if not least <= self.errno <= most:
            raise ValueError(f"a call cannot answer errno {self.errno}; from {least} to {most} it can")

    def __str__(self) -> str:
        return errno_module.errorcode.get(self.errno, f"errno {self.errno}") if self.kind == "errno" else self.kind

    @property
    def permits(self) -> bool:
        """Does the call reach the kernel?"""
        return self.kind in ("allow", "log")

    @property
    def answers(self) -> bool:
        """Does the filter answer in the kernel's place, so that the program goes on?"""
        return self.kind in ("succeed", "errno")

    @property
    def severity(self) -> int:
        """Order in which the kernel ranks actions: a higher one is the more restrictive.

        The kernel does not rank answers among each other; here an errno is more than a success.
        """
        return ("allow", "log", "succeed", "errno", "kill").index(self.kind)


ALLOW: Final = Action("allow")
LOG: Final = Action("log")
"""Allowed, with a line in the kernel's audit log."""
SUCCEED: Final = Action("succeed")
"""Returns 0, and the kernel does nothing (SECCOMP_RET_ERRNO with errno 0): for hints, and for flushes of memory."""
KILL: Final = Action("kill")
"""Ends the whole process with SIGSYS (SECCOMP_RET_KILL_PROCESS)."""


def refuse(errno: int) -> Action:
    """The action that answers *errno*."""
    return Action("errno", errno)


@dataclass(frozen=True, slots=True)
class Test:
    """``(argument & mask) op value``, unsigned. A mask within the low 32 bits makes it a comparison of an int."""

    __test__ = False  # no test case of pytest's

    argument: int
    op: Operator
    value: int
    mask: int = WORD

    def __post_init__(self) -> None:
        if not 0 <= self.argument <= 5:
            raise ValueError(f"there is no argument {self.argument}; a system call has 0 to 5")
        if not 0 < self.mask <= _REGISTER:
            raise ValueError(f"mask {self.mask:#x} is not within 64 bits, or empty")
        if not 0 <= self.value <= _REGISTER:
            raise ValueError(f"{self.value} is not an unsigned 64-bit number")
        if self.value > self.mask or (self.op in ("==", "!=") and self.value & ~self.mask):
            raise ValueError(f"{self.value:#x} is not within the mask {self.mask:#x}: always the same outcome")

    def holds(self, arguments: Sequence[int]) -> bool:
        """Is it true for a call with these six registers?"""
        given = arguments[self.argument] & self.mask
        match self.op:
            case "==":
                return given == self.value
            case "!=":
                return given != self.value
            case "<":
                return given < self.value
            case "<=":
                return given <= self.value
            case ">":
                return given > self.value
            case _:
                return given >= self.value

    def __str__(self) -> str:
        name = f"arg{self.argument}"
        if self.mask == _REGISTER:
            return f"{name} {self.op} {self.value:#x}"
        if self.mask == WORD:
            return f"int(arg{self.argument}) {self.op} {self.value:#x}"
        return f"({name} & {self.mask:#x}) {self.op} {self.value:#x}"


@dataclass(frozen=True, slots=True)
class Rule:
    """One row: what *action* a call of *number* gets when all *tests* hold and no earlier row of it did."""

    number: int
    action: Action
    tests: tuple[Test, ...] = ()
    reason: str = ""

    @property
    def syscall(self) -> str:
        """The call's name, or its number in words when it is newer than our table."""
        return NAMES.get(self.number, f"syscall {self.number}")

    @property
    def condition(self) -> str:
        """The tests in words; empty when the row takes everything that is left."""
        return " and ".join(map(str, self.tests))

    def holds(self, arguments: Sequence[int]) -> bool:
        return all(test.holds(arguments) for test in self.tests)

    def plain(self) -> dict[str, Any]:
        """The row as values that JSON can carry, for people: ``policy show --json``."""
        return {
            "syscall": self.syscall,
            "number": self.number,
            "action": str(self.action),
            "condition": self.condition,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Decision:
    """One thing that can happen to a call of a number, with registers for which it does.

    The registers are all ones but for the bits that the rules ask for: as descriptor, pointer, pid or flags that is a
    value which the kernel refuses, so a call that reaches it does no harm. None when the search found no example.
    """

    action: Action
    arguments: Arguments | None = _ONES


@dataclass(frozen=True)
class Profile:
    """What is in force: rows sorted by number and, within a number, by the order in which they are asked.

    Every number that has rows ends in one without a condition. *ignored* holds names of an OCI file that are no calls
    of x86-64, where leaving them out only tightens.
    """

    name: str
    default_action: Action
    rules: tuple[Rule, ...]
    description: str = ""
    ignored: tuple[str, ...] = ()
    _by_number: dict[int, tuple[Rule, ...]] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        ordered = sorted(self.rules, key=lambda rule: rule.number)  # stable: rows of one number keep their order
        by_number: dict[int, tuple[Rule, ...]] = {}
        for number, rows in itertools.groupby(ordered, key=lambda rule: rule.number):
            by_number[number] = _reachable(rows, self.default_action)
        object.__setattr__(self, "rules", tuple(itertools.chain.from_iterable(by_number.values())))
        object.__setattr__(self, "_by_number", by_number)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers that have rows, ascending."""
        return tuple(self._by_number)

    @property
    def sha256(self) -> str:
        """Hash of what is in force, as canonical JSON: actions and conditions, neither names nor reasons."""
        content = {
            "default": [self.default_action.kind, self.default_action.errno],
            "rules": [
                [
                    rule.number,
                    rule.action.kind,
                    rule.action.errno,
                    [[test.argument, test.op, test.value, test.mask] for test in rule.tests],
                ]
                for rule in self.rules
            ],
        }
        canonical = json.dumps(content, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    def rows(self, number: int) -> tuple[Rule, ...]:
        """The rows of *number* in the order they are asked; empty when the default action takes it."""
        return self._by_number.get(number, ())

    def decide(self, number: int, arguments: Sequence[int] = _ONES) -> Action:
        """What a call of *number* with these registers gets from the native ABI; another ABI's calls are killed."""
        number &= WORD
        if number >= X32_BIT and number != NO_CALL:
            return KILL
        for rule in self.rows(number):
            if rule.holds(arguments):
                return rule.action
        return self.default_action

    def verdict(self, number: int) -> tuple[Decision, ...]:
        """Everything that can happen to *number*: an answer for each row, in order, with an example of arguments."""
        rows = self.rows(number & WORD)
        if not rows:
            return (Decision(self.decide(number)),)
        return tuple(Decision(row.action, _example(rows, index)) for index, row in enumerate(rows))


def _reachable(rows: Iterable[Rule], default: Action) -> tuple[Rule, ...]:
    """*rows* without repetitions and without what follows a row that takes everything; the last one takes the rest."""
    kept: list[Rule] = []
    for row in rows:
        if any(earlier.tests == row.tests for earlier in kept):
            continue
        kept.append(row)
        if not row.tests:
            return tuple(kept)
    return (*kept, Rule(kept[0].number, default, (), "no rule matched: the profile's default"))


def _example(rows: tuple[Rule, ...], wanted: int) -> Arguments | None:
    """Registers that the row at index *wanted* takes, as near to all ones as the search finds; None if none."""
    candidates: list[tuple[int, ...]] = [(_REGISTER,)] * 6
    for argument in range(6):
        values = dict.fromkeys(_interesting(rows, wanted, argument))
        candidates[argument] = tuple(values)
    for arguments in itertools.islice(itertools.product(*candidates), 1 << 18):
        first = next(index for index, row in enumerate(rows) if row.holds(arguments))
        if first == wanted:
            return (arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5])
    return None


def _interesting(rows: tuple[Rule, ...], wanted: int, argument: int) -> Iterator[int]:
    """Values of one register at which some row's answer may change, those near what the wanted row asks for first."""
    yield _REGISTER
    fixed, most = 0, _REGISTER
    for test in rows[wanted].tests:
        if test.argument == argument and test.op == "==":
            fixed, most = fixed | test.mask, most & ~test.mask | test.value
    yield most
    for test in (test for row in rows for test in row.tests if test.argument == argument):
        most &= ~(test.mask & ~fixed)  # the bits that any row asks about, cleared one row after the other
        yield most
    for test in (test for row in (rows[wanted], *rows) for test in row.tests if test.argument == argument):
        around = _REGISTER & ~test.mask
        yield around | test.value
        yield around | (test.value - 1 & test.mask)
        yield around | (test.value + 1 & test.mask)
        yield around
        if test.value == 0:
            yield from (around | 1 << bit for bit in range(64) if test.mask >> bit & 1)
