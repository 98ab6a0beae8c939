"""Which tool calls of one run are under way: the judge of every packet about them, by its head alone.

No input or output here. A call has a number, of the program's choice, from its first part to the first part of its
answer. Refused is what the program may ask for and not get: it is answered, and counted. What breaks the form is a
ProtocolError: then the side that sent it is heard no more.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from sandboxd.errors import ProtocolError
from sandboxd.inside import channel

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["GONE", "CallTable", "Refusal"]

Refusal = tuple[str, str, str]
"""As ``tools.ToolError`` has it: code, message, hint."""

REFUSALS: Final = 10_000
"""Calls that are refused here, and parts that come twice, before a run is heard no more."""
BUSY: Final = (
    "busy",
    f"{channel.OUTSTANDING} calls of this run are under way already.",
    "Wait for some of them to return before you make more.",
)
FORMLESS: Final = (
    "invalid_arguments",
    "A call is a JSON object with the tool's name and then its arguments, and this is none.",
    "Use the functions of the module tools.",
)
GONE: Final = (
    "unavailable",
    "The program that holds the tools does not answer any more.",
    "Go on without tools, or end.",
)
_BEGINS: Final = re.compile(channel.CALL_BEGINS)


class CallTable:
    """Of a run that may make so many *calls*. *waits* is told when its program begins to wait for a tool, and when it
    waits for none any more.
    """

    def __init__(self, calls: int, waits: Callable[[bool], None]) -> None:
        self._total = self._left = calls
        self._waits = waits
        self._refusals = 0
        self._open: set[int] = set()
        self._frozen: set[int] = set()
        self._asked: set[int] = set()  # calls that were frozen once
        # What is in the middle of its parts: number, the next index, and a refusal to be sent at its end.
        self._calling: tuple[int, int, Refusal | None] | None = None
        self._answering: tuple[int, int] | None = None
        self._heard_last = (0, -1)
        self.is_host_gone = False

    # From the cell

    def call_part(self, head: channel.ToolHead, data: bytes) -> tuple[Refusal | None, bool] | None:
        """The packet *data* of the cell's: why its call is refused, if it is, and whether it ends the call. None when
        it came before. Raises ProtocolError.
        """
        if head.kind != channel.CALL:
            raise ProtocolError("a cell's frame that is no call")
        # A program that is interrupted while it sends a part cannot know whether that has gone, and sends it again.
        this, before = (head.number, head.index), self._heard_last
        if this == before and (head.index or self._calling is not None):
            self._count_rejected()
            return None
        self._heard_last = this
        if self._calling is None:
            if head.index or not head.total:
                raise ProtocolError("a call that does not begin at its beginning")
            refusal = self._admit(head.number, data)
        else:
            number, index, refusal = self._calling
            if head.number != number or head.index != index:
                raise ProtocolError("a call in the middle of another one")
        last = _is_last(head)
        self._calling = None if last else (head.number, head.index + 1, refusal)
        return refusal, last

    def _admit(self, number: int, data: bytes) -> Refusal | None:
        """Count a new call; or why not. Raises ProtocolError."""
        if number in self._open:
            raise ProtocolError("a call's number is in use")
        if self.is_host_gone:
            refusal = GONE
        elif not _BEGINS.match(data, channel.TOOL_HEAD.size):
            refusal = FORMLESS
        elif not self._left:
            refusal = (
                "budget_exceeded",
                f"This run has made all of its {self._total} tool calls.",
                "Ask for more at once in fewer calls, or print what you have and go on in another run.",
            )
        elif len(self._open) >= channel.OUTSTANDING:
            refusal = BUSY
        else:
            self._left -= 1
            self._open.add(number)
            self._asked.discard(number)
            if len(self._open) == 1:
                self._waits(True)
            return None
        self._count_rejected()
        return refusal

    def _count_rejected(self) -> None:
        """Count what leads to nothing. Raises ProtocolError when it is too much."""
        self._refusals += 1
        if self._refusals > REFUSALS:
            raise ProtocolError("a flood of calls")

    # From the host

    def check_host(self, head: channel.ToolHead) -> None:
        """A packet of the host's. Raises ProtocolError."""
        if self._answering is not None:
            if (head.kind, head.number, head.index) != (channel.ANSWER, *self._answering):
                raise ProtocolError("an answer in the middle of another one")
        elif head.number not in self._open or head.index or self._is_incomplete(head.number):
            raise ProtocolError("an answer to no call")
        if head.kind not in (channel.ANSWER, channel.FREEZE, channel.THAW):
            raise ProtocolError("a frame that is not the host's to send")

    def answer_part(self, head: channel.ToolHead) -> tuple[bool, bool]:
        """A part of an answer passes through: whether it is the first, and whether it is the last."""
        first, last = self._answering is None, _is_last(head)
        self._answering = None if last else (head.number, head.index + 1)
        return first, last

    def finish(self, number: int) -> None:
        """The tool has answered; what is left is the cell's affair."""
        self._open.discard(number)
        if not self._open:
            self._waits(False)

    def lose_host(self) -> list[int]:
        """The host is heard no more: the calls that somebody else must answer, from the beginning."""
        self.is_host_gone = True
        unanswered = sorted(self._open)
        if self._answering is not None:
            unanswered.append(self._answering[0])  # begun anew: the cell forgets the parts that it has
            self._answering = None
        return unanswered

    def refuse_rest(self, number: int) -> bool:
        """Whether the call's last part has yet to come: it is refused then, as GONE."""
        if self._calling is None or not self._is_incomplete(number):
            return False
        self._calling = number, self._calling[1], GONE
        return True

    def _is_incomplete(self, number: int) -> bool:
        return self._calling is not None and self._calling[0] == number and self._calling[2] is None

    # Freezing

    @property
    def is_frozen(self) -> bool:
        """Whether the cell stands still for a call."""
        return bool(self._frozen)

    def freeze(self, number: int) -> None:
        """The cell is to stand still for a call. Raises ProtocolError when it did before."""
        if number in self._asked:
            raise ProtocolError("a second freeze of one call")
        self._asked.add(number)
        self._frozen.add(number)

    def is_frozen_for(self, number: int) -> bool:
        """Whether it still is to."""
        return number in self._frozen

    def thaw(self, number: int) -> bool:
        """Not for that call any more; whether the cell goes on."""
        if number not in self._frozen:
            return False
        self._frozen.discard(number)
        return not self._frozen

    def close(self) -> None:
        """The run is over; nobody is told."""
        self._open.clear()
        self._frozen.clear()


def _is_last(head: channel.ToolHead) -> bool:
    return (head.index + 1) * channel.PART_BYTES >= head.total
