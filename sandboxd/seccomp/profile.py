"""Reads our own seccomp profiles: TOML in which every call stands once, with its reason.

The form is described at the head of policies/seccomp/default.toml. Whatever is not understood is a PolicyError that
names the key: a profile that is half read would be a wall with a hole.
"""

from __future__ import annotations

import errno as errno_module
import tomllib
from typing import TYPE_CHECKING, Any, Final, cast

from sandboxd.errors import PolicyError
from sandboxd.seccomp.rules import ALLOW, SUCCEED, WORD, Action, Operator, Profile, Rule, Test, refuse
from sandboxd.seccomp.syscalls import NUMBERS, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["parse", "unknown_call"]

_ERRNOS: Final = {name: number for number, name in errno_module.errorcode.items()}
_BITS: Final = {32: WORD, 64: WORD << 32 | WORD}


def unknown_call(name: str, key: str, file: str | None = None) -> PolicyError:
    """The error for a name that is no system call of x86-64, with the nearest that is."""
    near = nearest(name)
    return PolicyError(
        f"{key}: {name!r} is no known system call of x86-64" + (f"; did you mean {near}?" if near else "."),
        file=file,
        key=key,
    )


def parse(text: str, file: str) -> Profile:
    """The profile in *text*. *file* is for messages. Raises PolicyError."""
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise PolicyError(f"this is not TOML: {error}", file=file) from None
    return _Reader(file).read(document)


class _Reader:
    """One pass over one document; holds the file's name and where each call was seen."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.places: dict[str, str] = {}
        self.rules: list[Rule] = []

    def read(self, document: Mapping[str, Any]) -> Profile:
        self.only(document, "", {"name", "description", "default", "allow", "rule", "succeed", "deny"})
        name = self.text(document, "name", "")
        description = self.text(document, "description", "")
        default = self.outcome(self.text(document, "default", ""), "default")
        if default.kind != "errno":
            raise self.wrong("default", "it must be the name of an errno: what a profile does not name is refused")
        for group, calls in self.table(document.get("allow", {}), "allow").items():
            for call in self.table(calls, f"allow.{group}"):
                key = f"allow.{group}.{call}"
                self.rules.append(Rule(self.place(call, key), ALLOW, (), self.text(calls, call, f"allow.{group}.")))
        for index, entry in enumerate(self.array(document.get("rule", []), "rule")):
            self.rule(self.table(entry, f"rule[{index}]"), f"rule[{index}]")
        for group, entry in self.table(document.get("succeed", {}), "succeed").items():
            self.succeed(self.table(entry, f"succeed.{group}"), f"succeed.{group}")
        for group, entry in self.table(document.get("deny", {}), "deny").items():
            self.deny(self.table(entry, f"deny.{group}"), f"deny.{group}")
        return Profile(name, default, tuple(self.rules), description)

    def succeed(self, entry: Mapping[str, Any], key: str) -> None:
        self.only(entry, f"{key}.", {"reason", "calls"})
        self.whole(SUCCEED, entry, key)

    def deny(self, entry: Mapping[str, Any], key: str) -> None:
        self.only(entry, f"{key}.", {"errno", "reason", "calls"})
        self.whole(self.refusal(self.text(entry, "errno", f"{key}."), f"{key}.errno"), entry, key)

    def whole(self, action: Action, entry: Mapping[str, Any], key: str) -> None:
        """Add *action* for the calls of *entry*, whatever their arguments."""
        reason = self.text(entry, "reason", f"{key}.")
        for call in self.calls(entry, key):
            self.rules.append(Rule(self.place(call, f"{key}.calls"), action, (), reason))

    def rule(self, entry: Mapping[str, Any], key: str) -> None:
        self.only(entry, f"{key}.", {"calls", "reason", "refuse", "succeed", "allow", "otherwise"})
        calls = self.calls(entry, key)
        reason = self.text(entry, "reason", f"{key}.")
        rows: list[tuple[Action, tuple[Test, ...], str]] = []
        for kind in ("refuse", "succeed", "allow"):
            for index, case in enumerate(self.array(entry.get(kind, []), f"{key}.{kind}")):
                rows.append(self.case(self.table(case, f"{key}.{kind}[{index}]"), kind, f"{key}.{kind}[{index}]"))
        if not rows:
            raise self.wrong(key, "it has no refuse, succeed or allow case; use [allow], [succeed] or [deny] instead")
        rows.append((self.outcome(self.text(entry, "otherwise", f"{key}."), f"{key}.otherwise"), (), reason))
        for call in calls:
            number = self.place(call, f"{key}.calls")
            self.rules.extend(Rule(number, action, tests, why) for action, tests, why in rows)

    def case(self, case: Mapping[str, Any], kind: str, key: str) -> tuple[Action, tuple[Test, ...], str]:
        own = {"and", "reason", "errno"} if kind == "refuse" else {"and", "reason"}
        tests = [self.test({name: value for name, value in case.items() if name not in own}, key)]
        for index, more in enumerate(self.array(case.get("and", []), f"{key}.and")):
            tests.append(self.test(self.table(more, f"{key}.and[{index}]"), f"{key}.and[{index}]"))
        if kind == "refuse":
            action = self.refusal(self.text(case, "errno", f"{key}."), f"{key}.errno")
        else:
            action = self.outcome(kind, key)
        return action, tuple(tests), self.text(case, "reason", f"{key}.")

    def test(self, case: Mapping[str, Any], key: str) -> Test:
        self.only(case, f"{key}.", {"arg", "is", "has", "lacks", "mask", "bits"})
        asked = [name for name in ("is", "has", "lacks") if name in case]
        if len(asked) != 1:
            raise self.wrong(key, "exactly one of is, has, lacks says what the argument is compared with")
        for name in case:
            if not isinstance(case[name], int) or isinstance(case[name], bool):
                raise self.wrong(f"{key}.{name}", "it must be a whole number")
        if "arg" not in case:
            raise self.wrong(f"{key}.arg", "it is missing: which argument, from 0 to 5")
        width = _BITS.get(case.get("bits", 32))
        if width is None:
            raise self.wrong(f"{key}.bits", "it must be 32 or 64")
        op: Operator = "!=" if asked[0] == "has" else "=="
        if asked[0] == "is":
            value, mask = case["is"], case.get("mask", width)
        elif "mask" in case:
            raise self.wrong(f"{key}.mask", f"{asked[0]} names the bits itself")
        else:
            value, mask = 0, case[asked[0]]
        if mask & ~width:
            raise self.wrong(key, "it names bits above 32; say bits = 64 if the kernel looks at them")
        try:
            return Test(case["arg"], op, value, mask)
        except ValueError as error:
            raise self.wrong(key, str(error)) from None

    def place(self, call: str, key: str) -> int:
        """The number of *call*, which must not stand elsewhere."""
        if call not in NUMBERS:
            raise unknown_call(call, key, self.file)
        if call in self.places:
            raise self.wrong(key, f"{call} already stands in {self.places[call]}; each call has one place")
        self.places[call] = key
        return NUMBERS[call]

    def calls(self, entry: Mapping[str, Any], key: str) -> list[str]:
        calls = self.array(entry.get("calls", []), f"{key}.calls")
        if not calls or not all(isinstance(call, str) for call in calls):
            raise self.wrong(f"{key}.calls", "it must be a list of names of system calls")
        return calls

    def outcome(self, word: str, key: str) -> Action:
        if word == "allow":
            return ALLOW
        return SUCCEED if word == "succeed" else self.refusal(word, key)

    def refusal(self, word: str, key: str) -> Action:
        if word not in _ERRNOS:
            raise self.wrong(key, f"{word!r} is no errno; EPERM, ENOSYS and their like are")
        return refuse(_ERRNOS[word])

    def text(self, table: Mapping[str, Any], name: str, under: str) -> str:
        value = table.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(f"{under}{name}", "a text is missing here")
        return value

    def table(self, value: object, key: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.wrong(key, "it must be a table")
        return cast("dict[str, Any]", value)

    def array(self, value: object, key: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.wrong(key, "it must be a list")
        items: list[Any] = value  # pyright: ignore[reportUnknownVariableType]
        return items

    def only(self, table: Mapping[str, Any], under: str, allowed: set[str]) -> None:
        for name in table:
            if name not in allowed:
                raise self.wrong(f"{under}{name}", f"there is no such key; allowed: {', '.join(sorted(allowed))}")

    def wrong(self, key: str, problem: str) -> PolicyError:
        return PolicyError(f"{key}: {problem}", file=self.file, key=key)
