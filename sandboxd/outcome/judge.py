"""From evidence to status: pure, so that every line of the table can be tested without a kernel.

Evidence is what the kernel and the engine's own clock and readers say; the finished frame is the program's word, and
counts only for an ordinary end. The order below is the order of trust.
"""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from sandboxd.errors import ProtocolError
from sandboxd.limits import value_of
from sandboxd.protocol.packets import loads

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sandboxd.cgroup import Counters
    from sandboxd.limits import LimitValue

__all__ = ["Cause", "Evidence", "Finished", "Outcome", "Space", "ended_cleanly", "judge", "limit_met", "parse_finished"]

Cause = Literal["timeout", "tool_wait", "approval", "cpu", "output", "memory", "cancelled", "lost"]

_MESSAGE: Final = 8 << 10
_TRACEBACK: Final = 64 << 10
_RESULT: Final = 256 << 10
_RESULTS: Final = 16
_PAGE: Final = 4096
_LIMITS_OF: Final = {
    "/workspace": ("workspace_bytes", "workspace_files"),
    "/tmp": ("tmp_bytes", "tmp_bytes"),  # noqa: S108 - how many files the other two hold is no limit of its own
    "/dev/shm": ("shm_bytes", "shm_bytes"),  # noqa: S108
}


@dataclass(frozen=True, slots=True)
class Finished:
    """What the cell said at its end; checked for form, not for truth."""

    exit_code: int
    error: dict[str, Any] | None
    results: list[dict[str, dict[str, str]]]
    errno: int | None


class Space(NamedTuple):
    """What was free in one file system of a cell at the end."""

    place: str
    bytes: int
    files: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is known when everything of a cell is dead. *wait*: (si_code, si_status), None when nobody could ask.
    *run_seconds*: by the program's wall clock, which stands still while it waits for a tool. *spaces*: empty when
    nobody could look.
    """

    cause: Cause | None
    wait: tuple[int, int] | None
    finished: Finished | None
    counters: Counters | None
    limits: Mapping[str, LimitValue]
    run_seconds: float
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    dropped_bytes: int = 0
    spaces: Sequence[Space] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """The public part: status, exit_code, signal, error, results, limits_hit."""

    status: str
    exit_code: int | None
    signal: int | None
    error: dict[str, Any] | None
    results: list[dict[str, dict[str, str]]]
    limits_hit: list[dict[str, Any]]


def parse_finished(data: bytes) -> Finished:
    """The finished frame. It is hostile: anything that is not exactly one raises ProtocolError."""
    frame = loads(data)
    if b"\\u" in data:
        frame = _as_text(frame)
    if set(frame) != {"exit_code", "error", "results"}:
        raise ProtocolError("a finished frame has other keys")
    code, error, results = frame["exit_code"], frame["error"], frame["results"]
    if type(code) is not int or not 0 <= code <= 255:
        raise ProtocolError("a finished frame's exit_code is no exit status")
    number = None
    if error is not None:
        if not isinstance(error, dict) or set(error) != {"type", "message", "traceback", "line", "errno"}:
            raise ProtocolError("a finished frame's error has other keys")
        for key, most in (("type", 1024), ("message", _MESSAGE), ("traceback", _TRACEBACK)):
            if not isinstance(error[key], str) or len(error[key]) > most:
                raise ProtocolError(f"a finished frame's {key} is out of bounds")
        for key in ("line", "errno"):
            if error[key] is not None and (type(error[key]) is not int or not 0 <= error[key] < 1 << 31):
                raise ProtocolError(f"a finished frame's {key} is out of bounds")
        number = error["errno"]
        error = {key: error[key] for key in ("type", "message", "traceback", "line")}
    if not isinstance(results, list) or len(results) > _RESULTS:
        raise ProtocolError("a finished frame's results are out of bounds")
    for one in results:
        if not isinstance(one, dict) or len(one) > 8:
            raise ProtocolError("a finished frame's results are out of bounds")
        for kind, text in one.items():
            if kind != "text/plain" or not isinstance(text, str) or len(text) > _RESULT:
                raise ProtocolError("a finished frame's results are out of bounds")
    return Finished(code, error, [{"mime": one} for one in results], number)


def _as_text(value: Any) -> Any:
    """*value* with a question mark for each lone surrogate: what a program says is text, which UTF-8 can hold."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_as_text(one) for one in value]
    if isinstance(value, dict):
        return {_as_text(key): _as_text(one) for key, one in value.items()}
    return value


def ended_cleanly(finished: Finished | None, cause: Cause | None, tasks: int, untouched: bool) -> bool:
    """Whether a program ended by its own word and left nothing behind: then its answer need not wait for its death. No
    limit fired (*cause*); of its *tasks* one at most is left, its main thread, which said so; the workspace is
    *untouched*.
    """
    return finished is not None and cause is None and tasks <= 1 and untouched


def limit_met(
    limits: Mapping[str, LimitValue], run_seconds: float, counters: Counters, stdout_bytes: int, stderr_bytes: int
) -> Cause | None:
    """The limit that an engine would have ended the run for by now, seen from what it has used."""
    wall, cpu, stop = limits["wall_seconds"], limits["cpu_seconds"], limits["output_stop_bytes"]
    if counters.oom_kills:
        return "memory"
    if wall is not None and run_seconds >= wall:
        return "timeout"
    if cpu is not None and counters.cpu_usec >= cpu * 1e6:
        return "cpu"
    if stop is not None and max(stdout_bytes, stderr_bytes) > stop:
        return "output"
    return None


def judge(seen: Evidence) -> Outcome:
    """The outcome. A limit that fired outranks what the program said; when two tie, it is *timeout*."""
    exit_code, killed_by = _ended(seen)
    finished = seen.finished
    own_oom = _own_oom(seen)
    wall = seen.limits.get("wall_seconds")
    tied = (own_oom or seen.cause in ("cpu", "output")) and wall is not None and seen.run_seconds >= wall
    status: str
    if seen.cause == "cancelled":
        status = "cancelled"
    elif seen.cause in ("timeout", "tool_wait", "approval") or tied:
        status = "timeout"
    elif own_oom:
        status = "memory"
    elif seen.cause in ("cpu", "output"):
        status = seen.cause
    elif seen.cause == "lost":
        status = "internal"
    elif killed_by == signal.SIGSYS:
        status = "denied"
    elif killed_by == signal.SIGXCPU and _cpu_is_spent(seen):
        status = "cpu"  # the belt of one process; a program may also send the signal to itself
    elif killed_by is not None:
        status = "killed"
    elif seen.counters is not None and seen.counters.oom_kills:
        status = "killed"  # memory ran out for the whole engine or host, not for this cell's own limit
        killed_by = signal.SIGKILL
        exit_code = None
    elif exit_code is None:
        status = "internal"
    else:
        status = "ok" if exit_code == 0 else "error"
    if status not in ("ok", "error"):
        exit_code = None
    if status in ("timeout", "cpu", "memory", "output", "cancelled") and killed_by is None:
        killed_by = signal.SIGKILL
    error = finished.error if finished is not None and status == "error" else None
    results = finished.results if finished is not None and status == "ok" else []
    return Outcome(
        status,
        exit_code,
        None if killed_by is None else int(killed_by),
        error,
        results,
        _limits(seen, status, killed_by),
    )


def _ended(seen: Evidence) -> tuple[int | None, int | None]:
    """Exit code and signal. The frame goes first: SIGKILL follows it at once and would hide the program's own end."""
    if seen.finished is not None:
        return seen.finished.exit_code, None
    if seen.wait is None:
        return None, None
    code, status = seen.wait
    return (status, None) if code == os.CLD_EXITED else (None, status)


def _own_oom(seen: Evidence) -> bool:
    counters = seen.counters
    return counters is not None and counters.oom_kills > 0 and counters.memory_limit_hits > 0


def _cpu_is_spent(seen: Evidence) -> bool:
    limit = seen.limits.get("cpu_seconds")
    if limit is None:
        return False
    if seen.counters is None:  # no cgroup: that it can have been is all that is known
        return seen.run_seconds * (os.cpu_count() or 1) >= limit
    return seen.counters.cpu_usec >= limit * 1e6


def _limits(seen: Evidence, status: str, killed_by: int | None) -> list[dict[str, Any]]:
    hits: list[dict[str, Any]] = []

    def hit(limit: str, source: str, detail: str, value: LimitValue | str = None) -> None:
        if all(one["limit"] != limit for one in hits):
            shown = value_of(seen.limits, limit) if value is None else value
            hits.append({"limit": limit, "value": shown, "evidence": {"source": source, "detail": detail}})

    if seen.cause == "tool_wait":
        hit("tool_wait_seconds", "clock", "waiting for tools, all calls of the run together")
    elif seen.cause == "approval":
        hit("approval_seconds", "clock", "frozen while a tool call waited for its approval")
    elif status == "timeout":
        hit("wall_seconds", "clock", f"{seen.run_seconds:.3f} s since the program's start")
    counters = seen.counters
    if status == "cpu" or seen.cause == "cpu":
        used = "" if counters is None else f"{counters.cpu_usec / 1e6:.3f} s of "
        hit("cpu_seconds", "cgroup" if seen.cause == "cpu" else "wait", f"{used}CPU time, children included")
    if counters is not None:
        if counters.oom_kills and counters.memory_limit_hits:
            hit(
                "memory_bytes",
                "cgroup",
                f"{counters.oom_kills} killed for want of memory; "
                f"the limit was met {counters.memory_limit_hits} times; peak {counters.memory_peak_bytes} bytes",
            )
        elif counters.oom_kills:
            hit(
                "memory_bytes",
                "cgroup",
                f"{counters.oom_kills} killed when memory ran out for the whole engine or host; "
                "this run's own limit was not met",
            )
        if counters.pids_limit_hits:
            hit("pids", "cgroup", f"{counters.pids_limit_hits} times no new process or thread")
        if counters.throttled_usec:
            hit("cpus", "cgroup", f"held back for {counters.throttled_usec / 1e6:.3f} s")
    if seen.cause == "output":
        most = max(seen.stdout_bytes, seen.stderr_bytes)
        hit("output_stop_bytes", "reader", f"{most} bytes on one stream")
    if seen.dropped_bytes:
        hit("output_bytes", "reader", f"{seen.dropped_bytes} bytes not kept")
    for space in seen.spaces:
        of_bytes, of_files = _LIMITS_OF[space.place]
        if space.bytes < _PAGE:
            why = "; SIGBUS is how a mapped file says that it has no room" if killed_by == signal.SIGBUS else ""
            hit(of_bytes, "statfs", f"{space.bytes} bytes free in {space.place} at the end{why}")
        if space.files < 1:
            hit(of_files, "statfs", f"no inode free in {space.place} at the end")
    # Not ENOSPC: a full file system shows above, and the error does not say which one it was.
    number = seen.finished.errno if seen.finished is not None else None
    if number == errno.EMFILE:
        hit("open_files", "program", "uncaught EMFILE")
    elif number == errno.EFBIG:
        hit("file_bytes", "program", "uncaught EFBIG")
    if seen.finished is None and seen.wait is not None and _ended(seen)[1] == signal.SIGXFSZ:
        hit("file_bytes", "wait", "ended by SIGXFSZ")
    if status == "denied":
        hit("syscall", "seccomp", "killed by the filter (SIGSYS): a foreign ABI's system call", "unknown")
    return hits
