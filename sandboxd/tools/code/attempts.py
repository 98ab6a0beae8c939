"""Attempts: how often a model may try to get a program right before the loop stops.

attempts = Attempts(max=3)
while attempts:
    message = model(history)
    history += [message, *dispatcher.handle(message, attempts=attempts)]
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from sandboxd.tools.result import refusal

if TYPE_CHECKING:
    from sandboxd.tools.result import ToolResult

__all__ = ["Attempts"]

MOST: Final = 1000


class Attempts:
    """True as long as the loop should go on: until a program ended well (and the review accepted it), until *max*
    programs did not, or until the model answered without calling any tool. Thread-safe.

    Every call of ``run_code`` is an attempt, also one that is refused: a loop ends whatever the reason. Calls of other
    tools are none.
    """

    def __init__(self, max: int = 3) -> None:
        if type(max) is not int or not 1 <= max <= MOST:
            raise ValueError(f"max must be a whole number from 1 to {MOST}, not {max!r}.")
        self.max: Final = max
        self._lock = threading.Lock()
        self._used = 0
        self._succeeded = False
        self._answered = False
        self._last: ToolResult | None = None

    @property
    def used(self) -> int:
        """Attempts begun so far."""
        with self._lock:
            return self._used

    @property
    def left(self) -> int:
        """Attempts that may still be begun."""
        with self._lock:
            return self.max - self._used

    @property
    def succeeded(self) -> bool:
        """Whether one ended well."""
        with self._lock:
            return self._succeeded

    @property
    def last(self) -> ToolResult | None:
        """The result of the successful attempt, else of the one that ended last; None before the first."""
        with self._lock:
            return self._last

    def __bool__(self) -> bool:
        with self._lock:
            return not self._succeeded and not self._answered and self._used < self.max

    def __repr__(self) -> str:
        return f"<Attempts {self.used} of {self.max} used{', succeeded' if self.succeeded else ''}>"

    # For sandboxd.tools.vendors.messages

    def begin(self) -> int | None:
        """The number of the attempt that begins now; None when all are used up."""
        with self._lock:
            if self._used == self.max:
                return None
            self._used += 1
            return self._used

    def end(self, number: int, result: ToolResult) -> str:
        """Note how attempt *number* ended; the sentence for the model, empty after a success."""
        good = result.ok and result.value["status"] == "ok" and result.value["review"] is None
        with self._lock:
            if good or not self._succeeded:
                self._last = result
            self._succeeded = self._succeeded or good
            left = self.max - self._used
        if good:
            return ""
        if left:
            return f"attempt {number} of {self.max} failed; {left} left."
        return (
            f"attempt {number} of {self.max} failed; none is left. Do not call run_code again: "
            "tell the user what was found out and what did not work."
        )

    def used_up(self) -> ToolResult:
        """The refusal of an attempt too many."""
        return refusal(
            "budget_exceeded",
            f"No attempt at running code is left: there were {self.max}.",
            "Do not call run_code again: tell the user what was found out and what did not work.",
        )

    def answered(self) -> None:
        """The model called no tool: it has said its last word."""
        with self._lock:
            self._answered = True
