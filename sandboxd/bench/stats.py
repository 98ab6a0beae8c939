"""Figures from samples: percentiles, a series with its failures, and how far a ratio can be trusted. No I/O."""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Failed", "Interval", "Series", "percentile", "ratio_interval"]

_DRAWS = 2000


class Failed(Exception):
    """A measured run that did not end well with the right value: counted, and never a sample."""


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that *share* of all do not exceed (nearest rank). Raises ValueError without samples."""
    if not samples:
        raise ValueError("no samples")
    rank = math.ceil(share * len(samples) - 1e-9)
    return sorted(samples)[min(max(rank, 1), len(samples)) - 1]


@dataclass
class Series:
    """Samples in seconds, in their order, and what went wrong, by its words."""

    samples: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        """How many runs failed."""
        return self.failures.total()

    def p(self, share: float) -> float:
        """A percentile in seconds; NaN without samples."""
        return percentile(self.samples, share) if self.samples else math.nan

    def plain(self) -> dict[str, Any]:
        """As JSON has it: milliseconds, raw samples last; figures are null without samples."""
        figures: dict[str, Any] = {"n": len(self.samples), "failures": self.failed, "reasons": dict(self.failures)}
        for name, share in (("p50_ms", 0.50), ("p95_ms", 0.95), ("p99_ms", 0.99)):
            figures[name] = round(self.p(share) * 1e3, 6) if self.samples else None
        figures["least_ms"] = round(min(self.samples) * 1e3, 6) if self.samples else None
        figures["mean_ms"] = round(statistics.fmean(self.samples) * 1e3, 6) if self.samples else None
        figures["samples_ms"] = [round(sample * 1e3, 6) for sample in self.samples]
        return figures


class Interval(NamedTuple):
    """An estimate and the range that holds it with 95 % confidence."""

    estimate: float
    low: float
    high: float


def ratio_interval(ours: Sequence[float], theirs: Sequence[float], seed: int = 1) -> Interval:
    """How many times *ours* is *theirs*, where the two lists hold one figure each of the same rounds.

    Geometric mean of the rounds' ratios; the range is a percentile bootstrap over rounds, so that what disturbed both
    sides of a round cancels out. Raises ValueError for lists that are empty, of different lengths or not positive.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError("a ratio wants as many figures of one side as of the other, and at least one")
    if min(*ours, *theirs) <= 0:
        raise ValueError("a ratio wants positive figures")
    logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    draw = random.Random(seed)  # noqa: S311 - a repeatable bootstrap
    means = [statistics.fmean(draw.choices(logs, k=len(logs))) for _ in range(_DRAWS)]
    return Interval(
        math.exp(statistics.fmean(logs)), math.exp(percentile(means, 0.025)), math.exp(percentile(means, 0.975))
    )
