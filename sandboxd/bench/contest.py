"""Who is measured next: the one that has had the least time, so that all are spread over the same minutes."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from sandboxd.bench.stats import Failed, Series
from sandboxd.errors import SandboxError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["PAUSE_SECONDS", "Contestant", "alternate"]

PAUSE_SECONDS: Final = (0.005, 0.020)
"""Between two requests to something that is kept running: it is idle when the next one comes."""
BATCH_SECONDS: Final = 0.15
BATCH_SAMPLES: Final = 12


@dataclass
class Contestant:
    """One row of the table. *sample* returns seconds, or raises Failed, OSError or SandboxError."""

    key: str
    what: str
    group: Literal["sandboxd", "floor", "plain", "peer"]
    sample: Callable[[], float]
    note: str = ""
    pause: bool = False
    weight: float = 1.0
    series: Series = field(default_factory=Series)
    spent_seconds: float = 0.0

    def attempt(self) -> str | None:
        """One sample into the series, or one failure: its words are returned."""
        try:
            self.series.samples.append(self.sample())
        except (Failed, OSError, SandboxError) as error:
            reason = str(error) or type(error).__name__
            self.series.failures[reason] += 1
            return reason
        return None

    def batch(self, draw: random.Random) -> None:
        """Some samples in a row; what is slow gets one."""
        begun = time.perf_counter()
        for _ in range(BATCH_SAMPLES):
            if self.pause:
                time.sleep(draw.uniform(*PAUSE_SECONDS))
            self.attempt()
            if time.perf_counter() - begun > BATCH_SECONDS:
                break
        self.spent_seconds += time.perf_counter() - begun

    def plain(self) -> dict[str, Any]:
        """The row as JSON has it."""
        return {
            "key": self.key,
            "what": self.what,
            "group": self.group,
            "note": self.note,
            **self.series.plain(),
        }


def alternate(contestants: Sequence[Contestant], seconds: float, seed: int = 1) -> None:
    """Measure until each has had its share of *seconds*, and one sample at least; a *weight* of 2 is twice the share.

    It takes longer than *seconds* by what one sample of each slow one goes beyond its share.
    """
    draw = random.Random(seed)  # noqa: S311 - pauses and ties
    order = list(contestants)
    share = seconds / sum(one.weight for one in order)
    while True:
        draw.shuffle(order)
        chosen = min(order, key=lambda one: one.spent_seconds / one.weight)
        if chosen.spent_seconds >= share * chosen.weight and chosen.spent_seconds:
            return
        chosen.batch(draw)
