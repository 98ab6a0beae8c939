"""How often and how many times: token buckets for rates, counters for budgets. Safe in threads."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sandboxd.tools.pipeline.forking import renewed_after_fork
from sandboxd.tools.result import Refused

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sandboxd.tools.code.link import RunTools

_UNITS = {
    **dict.fromkeys(("s", "sec", "second"), 1),
    **dict.fromkeys(("min", "minute"), 60),
    **dict.fromkeys(("h", "hour"), 3600),
    **dict.fromkeys(("d", "day"), 86400),
}
_FORM = re.compile(r"([1-9][0-9]{0,8})/([a-z]+)")


@dataclass(frozen=True, slots=True)
class Rate:
    """*count* calls in *seconds*, all of which may come at once."""

    count: int
    seconds: int
    text: str

    @classmethod
    def parse(cls, text: str) -> Rate:
        """From "10/s", "100/min", "5/hour", "1/day". Raises TypeError."""
        found = _FORM.fullmatch(text) if isinstance(text, str) else None  # pyright: ignore[reportUnnecessaryIsInstance]
        if found is None or found[2] not in _UNITS:
            raise TypeError(f'A rate reads like "10/s", "100/min" or "5/hour", and {text!r} does not.')
        return cls(int(found[1]), _UNITS[found[2]], text)


class Bucket:
    """A token bucket: full at first, one token a call, refilled evenly."""

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._tokens = float(rate.count)
        self._per_second = rate.count / rate.seconds
        self._at = time.monotonic()
        renewed_after_fork(self)

    def begin(self) -> None:
        """As ``forking.Renewed``."""
        self._lock = threading.Lock()

    def take(self) -> float:
        """0.0 and one token fewer, or the seconds until there is one."""
        with self._lock:
            now = time.monotonic()
            self._tokens = min(self._rate.count, self._tokens + (now - self._at) * self._per_second)
            self._at = now
            if self._tokens >= 1:
                self._tokens -= 1
                return 0.0
            return (1 - self._tokens) / self._per_second


@dataclass(frozen=True, slots=True)
class Budget:
    """How many calls there may be: *calls* in all (None: no bound), *calls_per_run* of code in one run of run_code,
    *per_tool* for single tools by name. run_code counts as a call like any other. Raises ValueError.
    """

    calls: int | None = None
    calls_per_run: int = 1000
    per_tool: Mapping[str, int] = field(default_factory=dict[str, int])

    def __post_init__(self) -> None:
        for what, count in (("calls", self.calls), ("calls_per_run", self.calls_per_run), *self.per_tool.items()):
            if count is None and what == "calls":
                continue
            if type(count) is not int or count < 0:
                raise ValueError(f"The budget for {what} must be a count of calls, not {count!r}.")


class RunState:
    """What a dispatcher keeps of one run of code: its *calls* so far; approvals that were *refused* to it, and the lock
    *asking*, which whoever asks for one holds and which guards that count.
    """

    __slots__ = ("asking", "calls", "refused")

    def __init__(self) -> None:
        self.calls = 0
        self.refused = 0
        self.asking = threading.Lock()


class Spending:
    """What is left of a budget. *used* counts all calls that got as far as this."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._per_tool = dict(budget.per_tool)
        self.used = 0
        renewed_after_fork(self)

    def begin(self) -> None:
        """As ``forking.Renewed``."""
        self._lock = threading.Lock()

    @property
    def left(self) -> int | None:
        """Calls that are left in all; None when there is no bound."""
        return None if self._budget.calls is None else max(0, self._budget.calls - self.used)

    def take(self, tool: str, run: RunTools | None) -> None:
        """Count one call of *tool*. Raises Refused (budget_exceeded).

        *run* is the RunTools of the run whose code calls; its RunState is kept there, as ``state``.
        """
        with self._lock:
            if self._budget.calls is not None and self.used >= self._budget.calls:
                raise Refused(
                    "budget_exceeded",
                    f"All {self._budget.calls} tool calls of this conversation are used up.",
                    "Answer with what you have; no further call will be made.",
                )
            left = self._per_tool.get(tool)
            if left == 0:
                raise Refused(
                    "budget_exceeded",
                    f"All {self._budget.per_tool[tool]} calls of {tool} are used up.",
                    "Go on without this tool.",
                )
            if run is not None:
                if run.state is None:
                    run.state = RunState()
                state: RunState = run.state
                if state.calls >= self._budget.calls_per_run:
                    raise Refused(
                        "budget_exceeded",
                        f"This run has used all of its {self._budget.calls_per_run} tool calls.",
                        "Fetch more with each call, or split the work over several runs.",
                    )
                state.calls += 1
            if left is not None:
                self._per_tool[tool] = left - 1
            self.used += 1
