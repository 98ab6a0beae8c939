"""Reads the seccomp profiles of container engines: ``linux.seccomp`` of the OCI runtime specification, in JSON.

Also the form that docker keeps its own in, with ``includes`` and ``excludes`` by capability (a cell has none),
architecture and kernel version. What the file asks is read so that the result is never weaker:

- among rules that match a call, the most restrictive decides, in whatever order they stand; runtimes leave that open;
- killing a thread becomes killing the process;
- SCMP_ACT_ERRNO with ``errnoRet`` 0 is a success without the kernel, as it is to libseccomp; as the default of a file
  it is an error: a program would take for done whatever the file does not name;
- a comparison of 64 bits with a number that fits into 32 looks at the low 32 where ignoring the high ones could only
  refuse more, because the kernel takes an int from the low half of a register (CVE-2019-7303);
- a name that is no call of x86-64 is left out of what is allowed, and refused in what is refused, unless libseccomp
  knows it as a call of another architecture;
- calls of other architectures and x32 numbers are killed, whatever ``architectures`` lists.

Repeated tests of one argument in one rule are alternatives, as runc reads them.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from typing import Any, Final, cast

from sandboxd.errors import PolicyError
from sandboxd.seccomp.profile import unknown_call
from sandboxd.seccomp.rules import (
    ALLOW,
    ERRNO_MAX,
    KILL,
    LOG,
    SUCCEED,
    WORD,
    Action,
    Operator,
    Profile,
    Rule,
    Test,
    refuse,
)
from sandboxd.seccomp.syscalls import NUMBERS

__all__ = ["parse"]

_ACTIONS: Final = {
    "SCMP_ACT_ALLOW": ALLOW,
    "SCMP_ACT_LOG": LOG,
    "SCMP_ACT_KILL": KILL,
    "SCMP_ACT_KILL_THREAD": KILL,
    "SCMP_ACT_KILL_PROCESS": KILL,
}
_OPERATORS: Final[dict[str, Operator]] = {
    "SCMP_CMP_EQ": "==",
    "SCMP_CMP_NE": "!=",
    "SCMP_CMP_LT": "<",
    "SCMP_CMP_LE": "<=",
    "SCMP_CMP_GT": ">",
    "SCMP_CMP_GE": ">=",
}
_KEYS: Final = {
    *("defaultAction", "defaultErrnoRet", "architectures", "archMap", "flags", "syscalls"),
    *("listenerPath", "listenerMetadata"),
}
_NOT_OURS: Final = "SCMP_ARCH_X86_64 is not among them, and sandboxd runs on nothing else"
_FLAGS: Final = (
    "SECCOMP_FILTER_FLAG_TSYNC",
    "SECCOMP_FILTER_FLAG_LOG",
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
)
_REGISTER: Final = WORD << 32 | WORD
_RULES_MAX: Final = 500  # of one call; the kernel would take no program for many more


def parse(text: str, file: str, kernel: tuple[int, int] | None = None) -> Profile:
    """The profile in *text*. *file* is for messages, *kernel* the version that ``minKernel`` is compared with.

    Raises PolicyError, also for what no cell can do: SCMP_ACT_TRAP, SCMP_ACT_TRACE, SCMP_ACT_NOTIFY.
    """
    try:
        document = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"this is no JSON that can be read: {error or 'nested too deep'}", file=file) from None
    return _Reader(file, kernel or _running_kernel()).read(document)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return table


def _running_kernel() -> tuple[int, int]:
    major, minor = re.findall(r"\d+", os.uname().release)[:2]
    return int(major), int(minor)


class _Reader:
    """One pass over one document; gathers rules per number and the names that were left out."""

    def __init__(self, file: str, kernel: tuple[int, int]) -> None:
        self.file = file
        self.kernel = kernel
        self.rules: dict[int, list[Rule]] = {}
        self.ignored: set[str] = set()
        self.default = KILL

    def read(self, document: object) -> Profile:
        top, under = self.table(document, "the file"), ""
        if "linux" in top and "seccomp" in (linux := self.table(top["linux"], "linux")):  # a whole config.json
            top, under = self.table(linux["seccomp"], "linux.seccomp"), "linux.seccomp."
        self.only(top, under, _KEYS)
        self.default = self.action(top, "defaultAction", "defaultErrnoRet", under)
        self.architectures(top, under)
        for index, flag in enumerate(self.array(top.get("flags"), f"{under}flags")):
            if flag not in _FLAGS:
                raise self.wrong(f"{under}flags[{index}]", f"{flag!r} is not known; allowed: {', '.join(_FLAGS)}")
        for name in ("listenerPath", "listenerMetadata"):
            if top.get(name):
                raise self.wrong(f"{under}{name}", "no process answers for a cell's calls; leave it out")
        for index, entry in enumerate(self.array(top.get("syscalls"), f"{under}syscalls")):
            self.entry(self.table(entry, f"{under}syscalls[{index}]"), f"{under}syscalls[{index}]")
        ordered = itertools.chain.from_iterable(
            sorted(rules, key=lambda rule: -rule.action.severity) for rules in self.rules.values()
        )
        name = os.path.basename(self.file).removesuffix(".json")
        return Profile(name, self.default, tuple(ordered), "OCI seccomp profile", tuple(sorted(self.ignored)))

    def architectures(self, top: dict[str, Any], under: str) -> None:
        if "architectures" in top:
            listed = self.array(top["architectures"], f"{under}architectures")
            if listed and "SCMP_ARCH_X86_64" not in listed:
                raise self.wrong(f"{under}architectures", _NOT_OURS)
        if "archMap" in top:
            listed = [self.table(one, f"{under}archMap") for one in self.array(top["archMap"], f"{under}archMap")]
            if not any(one.get("architecture") == "SCMP_ARCH_X86_64" for one in listed):
                raise self.wrong(f"{under}archMap", _NOT_OURS)

    def entry(self, entry: dict[str, Any], key: str) -> None:
        self.only(entry, f"{key}.", {"name", "names", "action", "errnoRet", "args", "comment", "includes", "excludes"})
        action = self.action(entry, "action", "errnoRet", f"{key}.")
        names = self.array(entry.get("names"), f"{key}.names") + ([entry["name"]] if entry.get("name") else [])
        if not names or not all(isinstance(name, str) for name in names):
            raise self.wrong(f"{key}.names", "it must be a list of names of system calls")
        alternatives = self.alternatives(entry, action, key)
        if not self.applies(entry, key):
            return
        comment = entry.get("comment")
        reason = comment if isinstance(comment, str) and comment else f"{key} of the file"
        for name in names:
            number = self.number(name, action, f"{key}.names")
            if number is not None:
                self.rules.setdefault(number, []).extend(Rule(number, action, tests, reason) for tests in alternatives)
                if len(self.rules[number]) > _RULES_MAX:
                    raise self.wrong(key, f"there are more than {_RULES_MAX} rules for {name}")

    def number(self, name: str, action: Action, key: str) -> int | None:
        if name in NUMBERS:
            return NUMBERS[name]
        if not action.permits and action.severity > self.default.severity:
            # Left out, the refusal would be weaker than asked. libseccomp is asked only here: it is slow to load.
            number = _libseccomp_number(name)
            if number is None:
                raise unknown_call(name, key, self.file)
            if number >= 0:
                return number
        self.ignored.add(name)
        return None

    def alternatives(self, entry: dict[str, Any], action: Action, key: str) -> list[tuple[Test, ...]]:
        """The rule's conditions: one tuple of tests that hold together, or several that each suffice."""
        tests = [
            self.test(self.table(given, f"{key}.args[{index}]"), action, f"{key}.args[{index}]")
            for index, given in enumerate(self.array(entry.get("args"), f"{key}.args"))
        ]
        if len({test.argument for test in tests}) < len(tests):
            return [(test,) for test in tests]
        return [tuple(tests)]

    def test(self, given: dict[str, Any], action: Action, key: str) -> Test:
        self.only(given, f"{key}.", {"index", "value", "valueTwo", "op"})
        numbers: dict[str, int] = {}
        for name in ("index", "value", "valueTwo"):
            number = given.get(name, 0 if name == "valueTwo" else None)
            if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= _REGISTER:
                raise self.wrong(f"{key}.{name}", "it must be a whole number of at most 64 bits, not negative")
            numbers[name] = number
        op = given.get("op")
        try:
            if op == "SCMP_CMP_MASKED_EQ":
                return Test(numbers["index"], "==", numbers["valueTwo"], numbers["value"])
            if not isinstance(op, str) or op not in _OPERATORS:
                known = ", ".join((*_OPERATORS, "SCMP_CMP_MASKED_EQ"))
                raise self.wrong(f"{key}.op", f"{op!r} is no comparison; allowed: {known}")
            operator = _OPERATORS[op]
            # High bits that the kernel does not look at must not make a refusal miss, nor a permission hit.
            careful = ("!=", ">", ">=") if action.permits else ("==", "<", "<=")
            mask = WORD if operator in careful and numbers["value"] <= WORD else _REGISTER
            return Test(numbers["index"], operator, numbers["value"], mask)
        except ValueError as error:
            raise self.wrong(key, str(error)) from None

    def applies(self, entry: dict[str, Any], key: str) -> bool:
        """Do docker's conditions hold for a cell: no capability, amd64, this kernel?"""
        for name in ("includes", "excludes"):
            conditions = self.table(entry.get(name) or {}, f"{key}.{name}")
            self.only(conditions, f"{key}.{name}.", {"caps", "arches", "minKernel"})
            caps = self.array(conditions.get("caps"), f"{key}.{name}.caps")
            arches = self.array(conditions.get("arches"), f"{key}.{name}.arches")
            least = conditions.get("minKernel")
            new_enough = False
            if least:
                match = re.fullmatch(r"(\d{1,4})\.(\d{1,4})", least) if isinstance(least, str) else None
                if match is None:
                    raise self.wrong(f"{key}.{name}.minKernel", "it must be a version such as 4.8")
                new_enough = self.kernel >= (int(match[1]), int(match[2]))
            if name == "includes" and (caps or (arches and "amd64" not in arches) or (least and not new_enough)):
                return False
            if name == "excludes" and ("amd64" in arches or (least and new_enough)):
                return False
        return True

    def action(self, table: dict[str, Any], name: str, errno_name: str, under: str) -> Action:
        word, errno = table.get(name), table.get(errno_name)
        if word == "SCMP_ACT_ERRNO":
            if errno is None:
                return refuse(1)  # EPERM, as runc
            least = 1 if name == "defaultAction" else 0
            if not isinstance(errno, int) or isinstance(errno, bool) or not least <= errno <= ERRNO_MAX:
                raise self.wrong(f"{under}{errno_name}", f"it must be an errno from {least} to {ERRNO_MAX}")
            return refuse(errno) if errno else SUCCEED
        if not isinstance(word, str) or word not in _ACTIONS:
            known = ", ".join(("SCMP_ACT_ERRNO", *_ACTIONS))
            raise self.wrong(f"{under}{name}", f"{word!r} is not supported; allowed: {known}")
        if errno is not None:
            raise self.wrong(f"{under}{errno_name}", f"{word} answers no errno")
        return _ACTIONS[word]

    def table(self, value: object, key: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.wrong(key, "it must be an object")
        return cast("dict[str, Any]", value)

    def array(self, value: object, key: str) -> list[Any]:
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.wrong(key, "it must be a list")
        items: list[Any] = value  # pyright: ignore[reportUnknownVariableType]
        return items

    def only(self, table: dict[str, Any], under: str, allowed: set[str]) -> None:
        for name in table:
            if name not in allowed:
                raise self.wrong(f"{under}{name}", f"there is no such key; allowed: {', '.join(sorted(allowed))}")

    def wrong(self, key: str, problem: str) -> PolicyError:
        return PolicyError(f"{key}: {problem}", file=self.file, key=key)


def _libseccomp_number(name: str) -> int | None:
    """libseccomp's number of *name*: negative for another architecture's call, None when there is none to be had."""
    try:
        import pyseccomp  # pyright: ignore[reportMissingTypeStubs]
    except (ImportError, RuntimeError, AttributeError):
        return None
    number: int = pyseccomp.resolve_syscall(pyseccomp.Arch.X86_64, name)
    return None if number == -1 else number
