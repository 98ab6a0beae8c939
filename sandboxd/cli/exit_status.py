"""How a run's Result becomes an exit status and one line of words. Pure."""

from __future__ import annotations

import signal as signals
from typing import TYPE_CHECKING, Any, Protocol

from sandboxd.limits import LIMITS, spell

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence

__all__ = ["FIXED", "OPTIONS", "exit_status", "reason"]

# Statuses whose exit status does not depend on the program.
FIXED = {
    "timeout": 124,
    "cpu": 124,
    "memory": 137,
    "output": 153,
    "denied": 159,
    "cancelled": 130,
    "busy": 75,
    "internal": 125,
}

# The option that raises a limit; the others stand in the policy.
OPTIONS = {"wall_seconds": "--timeout", "memory_bytes": "--memory", "cpus": "--cpus", "pids": "--pids"}

# The limits whose hit explains a status, in order of preference.
CAUSES = {
    "timeout": ("wall_seconds",),
    "cpu": ("cpu_seconds",),
    "memory": ("memory_bytes",),
    "output": ("output_stop_bytes",),
    "denied": ("syscall",),
}


class Ended(Protocol):
    """The part of a Result that decides the exit status."""

    @property
    def status(self) -> str: ...
    @property
    def exit_code(self) -> int | None: ...
    @property
    def signal(self) -> int | None: ...


class Explained(Ended, Protocol):
    """The part of a Result that the reason is made from."""

    @property
    def error(self) -> Any: ...
    @property
    def limits_hit(self) -> Sequence[Any]: ...
    @property
    def usage(self) -> Any: ...


def exit_status(result: Ended) -> int:
    """The exit status of ``sandboxd run``, 0 to 255, by the contract's table."""
    if result.status in FIXED:
        return FIXED[result.status]
    if result.status == "ok":
        return 0
    if result.status == "killed":
        # An OOM kill of the whole host, or a cell's end without a wait status, is a SIGKILL to whoever looks.
        return 128 + (result.signal or signals.SIGKILL)
    # "error": an uncaught exception is 1, as in python itself; a code of 0 would hide it.
    return ((result.exit_code or 0) & 0xFF) or 1


def reason(result: Explained, policy: str = "NAME", options: Container[str] = frozenset(OPTIONS)) -> str | None:
    """Why the run did not end well, in one line without our name and not yet escaped; None when it did. *policy* is
    what ``sandboxd policy show`` takes to show the run's; *options* are limits that the caller can raise by an option.
    """
    if result.status == "ok":
        return None
    explanations: dict[str, Callable[[Explained], str]] = {
        "timeout": lambda result: _timeout(result, options),
        "cpu": lambda result: _cpu(result, options),
        "memory": lambda result: _memory(result, options),
        "output": lambda result: _output(result, options),
        "denied": lambda result: _denied(result, policy),
        "killed": _killed,
        "error": _error,
        "cancelled": lambda _: "the run was cancelled",
        "busy": lambda _: "the run was not started: the engine cannot take it now; try again",
        "internal": lambda _: "sandboxd failed, and the outcome of the run is unknown",
    }
    explain = explanations.get(result.status)
    words = explain(result) if explain is not None else "the run did not end well"
    causes = CAUSES.get(result.status, ())
    also = [_spelled(hit) for hit in result.limits_hit if hit.limit not in causes]
    if also:
        words += f"; limits reached: {', '.join(also)}"
    return f"{result.status}: {words}"


def _cause(result: Explained) -> Any | None:
    """The first entry of limits_hit that explains the status."""
    for name in CAUSES.get(result.status, ()):
        for hit in result.limits_hit:
            if hit.limit == name:
                return hit
    return None


def _value(hit: Any) -> str:
    """``wall_seconds=30`` or ``memory_bytes=512M``: the key and value as a policy would say it."""
    if hit.limit in LIMITS and (hit.value is None or isinstance(hit.value, int | float)):
        return f"{hit.limit}={spell(hit.limit, hit.value)}"
    return f"{hit.limit}={hit.value}"


def _evidence(hit: Any) -> str:
    return f"{hit.evidence.source}: {hit.evidence.detail}" if hit.evidence.detail else str(hit.evidence.source)


def _spelled(hit: Any) -> str:
    return f"{_value(hit)} ({_evidence(hit)})"


def _remedy(limit: str, options: Container[str]) -> str:
    if limit in OPTIONS and limit in options:
        return f"raise it with {OPTIONS[limit]}"
    return f"raise {limit} in the [limits] of a policy"


def _stopped(what: str, result: Explained, limit: str, options: Container[str], *, evidence: bool) -> str:
    hit = _cause(result)
    if hit is None:
        return f"{what} (limit {limit}); {_remedy(limit, options)}"
    proof = f"; {_evidence(hit)}" if evidence else ""
    return f"{what} (limit {_value(hit)}{proof}); {_remedy(limit, options)}"


def _timeout(result: Explained, options: Container[str]) -> str:
    what = f"stopped after {result.usage.wall_seconds:.1f} s of wall clock"
    return _stopped(what, result, "wall_seconds", options, evidence=False)


def _cpu(result: Explained, options: Container[str]) -> str:
    used = (result.usage.cpu_user_seconds or 0) + (result.usage.cpu_system_seconds or 0)
    what = f"stopped after {used:.1f} s of CPU time in all its processes"
    return _stopped(what, result, "cpu_seconds", options, evidence=False)


def _memory(result: Explained, options: Container[str]) -> str:
    return _stopped("the program needed more memory than it may have", result, "memory_bytes", options, evidence=True)


def _output(result: Explained, options: Container[str]) -> str:
    return _stopped("stopped because it wrote too much", result, "output_stop_bytes", options, evidence=True)


def _denied(result: Explained, policy: str) -> str:
    hit = _cause(result)
    proof = f" ({_value(hit)}; {_evidence(hit)})" if hit is not None else ""
    show = f"'sandboxd policy show {policy}'"
    return f"killed by the seccomp filter{proof}; {show} lists the system calls that are allowed"


def _killed(result: Explained) -> str:
    number = result.signal
    if number is None:
        return "the program was killed from outside"
    try:
        name = signals.Signals(number).name
    except ValueError:
        name = "a real-time signal" if number >= signals.SIGRTMIN else "an unknown signal"
    return f"the program ended by signal {number} ({name})"


def _error(result: Explained) -> str:
    error = result.error
    if error is None:
        return f"the program ended with exit status {result.exit_code}"
    where = f" (line {error.line})" if error.line is not None else ""
    message = f": {error.message}" if error.message else ""
    if len(message) > 300:
        message = f"{message[:297]}..."
    return f"uncaught {error.type}{message}{where}"
