"""The answer to a run: evidence, output and files as the Result's header and payload."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

from sandboxd.outcome.judge import judge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sandboxd.cgroup import Counters
    from sandboxd.outcome.collected import Collected
    from sandboxd.outcome.collector import Collector
    from sandboxd.outcome.judge import Evidence

__all__ = ["Durations", "RunAnswer", "answer", "clean_exit_header", "hit_no_limit"]


class RunAnswer(NamedTuple):
    """One run, ended, as it goes to the client."""

    header: dict[str, Any]
    """Of ``Result.from_wire``."""
    texts: list[bytes]
    """stdout and stderr."""
    collected: Collected
    """The files, whose memfd is the holder's."""


class Durations(NamedTuple):
    """Seconds of a run: in the queue, until its program started, and from then to its end."""

    queued: float
    setup: float
    run: float


def answer(
    identity: str,
    evidence: Evidence,
    outputs: tuple[Collector, Collector],
    collected: Collected,
    seconds: Durations,
    warm: bool,
    isolation: dict[str, Any] | None,
    waited: float = 0.0,
) -> RunAnswer:
    """What *evidence* comes to. For *waited* seconds of the run the wall clock stood still."""
    out, out_dropped = outputs[0].kept()
    err, err_dropped = outputs[1].kept()
    dropped = out_dropped + err_dropped
    outcome = judge(dataclasses.replace(evidence, dropped_bytes=dropped) if dropped else evidence)
    counters = evidence.counters
    at = len(out) + len(err)
    header = {
        "id": identity,
        "status": outcome.status,
        "exit_code": outcome.exit_code,
        "signal": outcome.signal,
        "stdout": [0, len(out)],
        "stderr": [len(out), len(err)],
        "stdout_dropped_bytes": out_dropped,
        "stderr_dropped_bytes": err_dropped,
        "error": outcome.error,
        "results": outcome.results,
        "files": [{"path": path, "size_bytes": size, "offset": at + off} for path, size, off in collected.files],
        "files_skipped": collected.skipped,
        "limits_hit": outcome.limits_hit,
        "usage": {
            "wall_seconds": max(0.0, seconds.run - waited),
            "cpu_user_seconds": counters.cpu_user_usec / 1e6 if counters else 0.0,
            "cpu_system_seconds": counters.cpu_system_usec / 1e6 if counters else 0.0,
            "memory_peak_bytes": counters.memory_peak_bytes if counters else None,
            "pids_peak": counters.pids_peak if counters else None,
            "throttled_seconds": counters.throttled_usec / 1e6 if counters else None,
        },
        "timings": {
            "queued_seconds": seconds.queued,
            "setup_seconds": seconds.setup,
            "run_seconds": seconds.run,
            "tool_wait_seconds": waited,
        },
        "warm": warm,
        "isolation": isolation,
        "state": None,
    }
    return RunAnswer(header, [out, err], collected)


def hit_no_limit(counters: Counters) -> bool:
    """Whether no limit was met, by the leaf's word."""
    return not (counters.oom_kills or counters.memory_limit_hits or counters.pids_limit_hits or counters.throttled_usec)


def clean_exit_header(
    identity: str,
    results: list[dict[str, Any]],
    counters: Counters,
    outputs: Sequence[bytes],
    seconds: Durations,
) -> dict[str, Any]:
    """The header of ``answer`` for the commonest end of all: exit status 0, nothing dropped, no limit met, no files. A
    test compares the two.
    """
    out, err = len(outputs[0]), len(outputs[1])
    return {
        "id": identity,
        "status": "ok",
        "exit_code": 0,
        "signal": None,
        "stdout": [0, out],
        "stderr": [out, err],
        "stdout_dropped_bytes": 0,
        "stderr_dropped_bytes": 0,
        "error": None,
        "results": results,
        "files": [],
        "files_skipped": 0,
        "limits_hit": [],
        "usage": {
            "wall_seconds": seconds.run,
            "cpu_user_seconds": counters.cpu_user_usec / 1e6,
            "cpu_system_seconds": counters.cpu_system_usec / 1e6,
            "memory_peak_bytes": counters.memory_peak_bytes,
            "pids_peak": counters.pids_peak,
            "throttled_seconds": counters.throttled_usec / 1e6,
        },
        "timings": {
            "queued_seconds": seconds.queued,
            "setup_seconds": seconds.setup,
            "run_seconds": seconds.run,
            "tool_wait_seconds": 0.0,
        },
        "warm": True,
        "isolation": None,
        "state": None,
    }
