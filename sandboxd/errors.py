"""What sandboxd raises when the caller or the host is at fault.

A program that fails inside a sandbox is a Result, never an exception. Everything here crosses processes: the engine
raises, the client's side raises the same again, so each class can be pickled, turned into plain values (``plain``) and
built back (``from_plain``). Only the standard library is imported: the engine and the zygote's handle start from this
module.
"""

from __future__ import annotations

import errno as errno_module
import os
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "Busy",
    "ConnectionLost",
    "InvalidRequest",
    "PolicyError",
    "ProtocolError",
    "SandboxError",
    "Unavailable",
    "from_plain",
]


class SandboxError(Exception):
    """Root of every error of sandboxd; its string is one or two plain sentences.

    *fields* names the attributes that make up an error of this class; its arguments have the same names.
    """

    fields: ClassVar[tuple[str, ...]] = ("message",)

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), {name: getattr(self, name) for name in self.fields})

    def plain(self) -> dict[str, Any]:
        """The error as values that JSON can carry; ``from_plain`` is the way back."""
        return {"kind": type(self).__name__, **{name: getattr(self, name) for name in self.fields}}


class PolicyError(SandboxError):
    """A policy, or a limit asked of one, is wrong: the message names the key, the value and what is allowed.

    *file* and *line* say where it stands in a policy file, *key* is the dotted path of the key; each may be absent.
    """

    fields = ("message", "file", "line", "key")

    def __init__(self, message: str, file: str | None = None, line: int | None = None, key: str | None = None) -> None:
        super().__init__(message)
        self.file = file
        self.line = line
        self.key = key

    def __str__(self) -> str:
        where = "" if self.file is None else self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.message}" if where else self.message


class InvalidRequest(SandboxError, ValueError):
    """An argument of a run is wrong; *field* names it and the message says what is allowed. Nothing was started."""

    fields = ("field", "problem")

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class Unavailable(SandboxError):
    """This host cannot enforce what the policy asks for.

    *stage* is the set-up step that failed, *errno* the kernel's answer (None when no call was refused), *fix* what an
    operator can do about it.
    """

    fields = ("stage", "errno", "fix", "message")

    def __init__(self, stage: str, message: str = "", *, errno: int | None = None, fix: str = "") -> None:
        super().__init__(message)
        self.stage = stage
        self.errno = errno
        self.fix = fix

    def __str__(self) -> str:
        what = f"{self.stage}: {self.message or 'this host cannot do it'}"
        if self.errno is not None:
            name = errno_module.errorcode.get(self.errno, f"errno {self.errno}")
            what = f"{what} ({name}: {os.strerror(self.errno)})"
        return f"{what}. To mend it: {self.fix}" if self.fix else f"{what}."


class Busy(SandboxError):
    """The run never started and may be tried again: the engine was full for longer than the queue allows, is ending, or
    is replacing a zygote that it lost.

    *retry_after* is the engine's own guess, in seconds.
    """

    fields = ("retry_after",)

    def __init__(self, retry_after: float) -> None:
        super().__init__(
            f"The engine cannot take the run now, and it was not started; try again in {retry_after:.3g} s."
        )
        self.retry_after = retry_after


class ConnectionLost(SandboxError):
    """The engine or daemon went away; *may_have_started* says whether the run may have had effects before it was
    killed.
    """

    fields = ("may_have_started",)

    def __init__(self, may_have_started: bool) -> None:
        super().__init__(
            "The connection to the engine was lost after the run was handed over: "
            "it may have started, and its outcome is unknown."
            if may_have_started
            else "The connection to the engine was lost before the run was handed over: "
            "it did not start, and may be tried again."
        )
        self.may_have_started = may_have_started


class ProtocolError(SandboxError):
    """The other side sent something that is not in the protocol; the message says what."""


def later(what: str) -> Unavailable:
    """The error for something that the contract names and this version does not have yet."""
    return Unavailable("version", f"{what} in a later version", fix="use a later version of sandboxd")


_KINDS: dict[str, type[SandboxError]] = {
    kind.__name__: kind
    for kind in (SandboxError, PolicyError, InvalidRequest, Unavailable, Busy, ConnectionLost, ProtocolError)
}

# What each field may hold when it comes over a channel; the other side may be of another version, or hostile.
_TYPES: dict[str, tuple[type, ...]] = {
    "message": (str,),
    "file": (str, type(None)),
    "line": (int, type(None)),
    "key": (str, type(None)),
    "field": (str,),
    "problem": (str,),
    "stage": (str,),
    "errno": (int, type(None)),
    "fix": (str,),
    "retry_after": (int, float),
    "may_have_started": (bool,),
}


def _rebuild(kind: type[SandboxError], values: dict[str, Any]) -> SandboxError:
    return kind(**values)


def from_plain(plain: Mapping[str, Any]) -> SandboxError:
    """The error that ``plain`` described. Raises ProtocolError when *plain* is nothing of the kind."""
    kind = _KINDS.get(plain["kind"]) if isinstance(plain.get("kind"), str) else None
    if kind is None or set(plain) != {"kind", *kind.fields}:
        raise ProtocolError("The other side reported an error in a form that is not in the protocol.")
    values = {name: plain[name] for name in kind.fields}
    for name, value in values.items():
        if not isinstance(value, _TYPES[name]) or (isinstance(value, bool) and bool not in _TYPES[name]):
            raise ProtocolError(f"The other side reported an error whose {name!r} is of a wrong type.")
    return kind(**values)
