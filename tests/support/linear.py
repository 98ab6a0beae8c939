"""Whether a function takes work in proportion to its input: measured at one size and at twice that.

Two counts, for each is blind where the other sees. Lines of Python and calls into C, which the interpreter counts: the
same on every machine, but one call into C is one, whatever it does. CPU time of the thread: it also sees a search or a
copy in C, with the interpreter's lock held, and on a noisy machine it has to be taken more than once.
"""

from __future__ import annotations

import gc
import itertools
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

MOST = 2.9
"""Between 2, which is linear, and 4, which is quadratic: n * log n is 2.2, and caches are not linear either."""
LEAST_SECONDS = 0.003
"""At the larger size: below that, what is not linear is still hidden by what is."""
LARGER = 2
"""How often the sizes may be doubled to get there."""
TRIES = 6
"""At least; and until PATIENCE_SECONDS are over."""
PATIENCE_SECONDS = 0.1
MOST_SECONDS = 1.0
"""No more tries after that."""


@dataclass(frozen=True)
class Growth:
    """How much more the doubled input took, by both counts."""

    steps: float
    seconds: float

    @property
    def is_linear(self) -> bool:
        return max(self.steps, self.seconds) <= MOST


def growth(make: Callable[[int], Any], function: Callable[[Any], object], n: int) -> Growth:
    """What *function* takes for ``make(2 * n)``, in units of what it takes for ``make(n)``. What it raises counts as
    an answer. A large bound of its own makes the growth smaller, which is as well.
    """
    small, large = make(n // 4), make(n // 2)
    steps = _steps(function, large) / max(1, _steps(function, small))
    for _ in range(LARGER):
        small, large = make(n), make(2 * n)
        if _seconds(function, large) >= LEAST_SECONDS:
            break
        n *= 2
    seconds = _ratio(function, small, large)
    if seconds > MOST:  # another program may have had the caches: what is quadratic is so again
        seconds = min(seconds, _ratio(function, make(n), make(2 * n)))
    return Growth(steps, seconds)


def _ratio(function: Callable[[Any], object], small: Any, large: Any) -> float:
    """The ratio of the least times seen so far; no more is asked when that is linear."""
    least = [float("inf"), float("inf")]
    begun = time.thread_time()
    for attempt in itertools.count(1):
        for at, given in enumerate((small, large)):
            least[at] = min(least[at], _seconds(function, given))
        if attempt > 1 and least[1] <= MOST * least[0]:
            break
        taken = time.thread_time() - begun
        if (attempt >= TRIES and taken > PATIENCE_SECONDS) or taken > MOST_SECONDS:
            break
    return least[1] / max(least[0], 1e-6)


def _answer(function: Callable[[Any], object], given: Any) -> None:
    try:
        function(given)
    except Exception:  # refused, which is what most of these inputs are for
        return


def _seconds(function: Callable[[Any], object], given: Any) -> float:
    gc.collect(0)
    gc.disable()  # a collection costs as much as everything that is alive
    try:
        begun = time.thread_time()
        _answer(function, given)
        return time.thread_time() - begun
    finally:
        gc.enable()


def _steps(function: Callable[[Any], object], given: Any) -> int:
    count = 0

    def line(_frame: FrameType, _event: str, _argument: object) -> Any:
        nonlocal count
        count += 1
        return line

    def call(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event == "c_call"

    before = sys.gettrace(), sys.getprofile()
    sys.settrace(line)
    sys.setprofile(call)
    try:
        _answer(function, given)
    finally:
        sys.setprofile(before[1])
        sys.settrace(before[0])
    return count
