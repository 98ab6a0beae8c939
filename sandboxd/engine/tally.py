"""What an engine has done so far, for ``stats``: runs by who asked for them, by policy and by status."""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sandboxd.engine.held_time import HeldTime
    from sandboxd.engine.runs.live import LiveRuns

__all__ = ["STATUSES", "Tally", "stats"]

# Those of Result.status. Here once more because that module needs pydantic, which the engine does without.
STATUSES: Final = frozenset(
    {"ok", "error", "timeout", "cpu", "memory", "output", "denied", "killed", "cancelled", "busy", "internal"}
)


class Tally:
    """Since the engine was made."""

    def __init__(self) -> None:
        self.born = time.monotonic()
        self.restarts: Counter[str] = Counter()
        """Zygotes that were lost and made again, by policy."""
        self._runs: dict[tuple[object, str], Counter[str]] = {}

    def count(self, uid: object, policy: str, status: str) -> None:
        """A run that *uid* asked for has come to *status*."""
        self._runs.setdefault((uid, policy), Counter())[status] += 1

    def runs(self, uid: object) -> dict[str, Counter[str]]:
        """By policy and status; of everybody when *uid* is None."""
        found: dict[str, Counter[str]] = {}
        for (who, policy), statuses in self._runs.items():
            if uid is None or who == uid:
                found.setdefault(policy, Counter()).update(statuses)
        return found


def stats(
    tally: Tally, live: LiveRuns, parked: Iterable[tuple[str, int]], held: HeldTime, uid: object
) -> dict[str, Any]:
    """The counters of an engine, in seconds and numbers of runs, cells and zygotes. For *uid* those of its own runs;
    None is the operator, who sees everybody's, and what is the engine's own. *parked*: cells that wait, by policy.
    """
    policies: dict[str, dict[str, Any]] = {}

    def row(policy: str) -> dict[str, Any]:
        return policies.setdefault(policy, {"runs": {}, "queued": 0, "running": 0})

    for policy, statuses in tally.runs(uid).items():
        row(policy)["runs"] = dict(sorted(statuses.items()))
    for run in live.of(uid):
        row(run.policy)["queued" if run.is_queued else "running"] += 1
    if uid is None:
        for policy, number in parked:
            row(policy)["parked"] = row(policy).get("parked", 0) + number
        for found in policies.values():
            found.setdefault("parked", 0)
            found["zygote_restarts"] = 0
        for policy, restarts in tally.restarts.items():
            row(policy)["zygote_restarts"] = restarts
    totals: Counter[str] = Counter()
    for found in policies.values():
        totals.update(found["runs"])
    summed = ("queued", "running", *(("parked", "zygote_restarts") if uid is None else ()))
    return {
        "uptime_seconds": round(time.monotonic() - tally.born, 3),
        "runs": dict(sorted(totals.items())),
        **{key: sum(found.get(key, 0) for found in policies.values()) for key in summed},
        **({"held_seconds": held.plain(), "pid": os.getpid()} if uid is None else {}),
        "policies": dict(sorted(policies.items())),
    }
