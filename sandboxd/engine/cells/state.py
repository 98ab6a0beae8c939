"""The life of a cell as a table: state x event -> state.

cell.py tells each event here, and an event that the table does not hold is a bug that shows at once. A run that has no
cell yet is queued, which is no state of a cell. A session will go from RUNNING back to SEALED.

    state        what exists                             what can happen
    MAKING       a slot and its leaf                     the init is there, or was refused; nobody wants it any more
    SEALING      + init, file systems, pipes; a fork     every wall is up; a step was refused; it ended
    SEALED       a cell that waits for a program         go; it is stale or nobody wants it; it ended
    RUNNING      the program runs                        finished frame, exit, a limit, the caller leaves
    ENDING       SIGKILL is on its way                   the pid namespace is dead
    COLLECTING   only data: files, counters              let go by its run
    GONE         nothing                                 -
"""

from __future__ import annotations

import enum
from typing import Final

__all__ = ["TRANSITIONS", "Event", "Life", "State"]


class State(enum.Enum):
    """Where a cell stands."""

    MAKING = "making"
    SEALING = "sealing"
    SEALED = "sealed"
    RUNNING = "running"
    ENDING = "ending"
    COLLECTING = "collecting"
    GONE = "gone"


class Event(enum.Enum):
    """What happens to a cell."""

    MADE = "the nursery made the init"
    WALLS_UP = "the cell says that every wall is up"
    GO = "the program was handed over"
    FINISHED = "the cell says that the program ended"
    EXITED = "the cell's process ended"
    LIMIT = "a limit fired"
    CANCELLED = "the caller left or asked for the end"
    DISCARDED = "nobody wants it: stale, or one too many"
    FAILED = "a set-up step was refused"
    LOST = "the zygote is gone, and every cell with it"
    DEAD = "the pid namespace is empty"
    LET_GO = "its run has taken what it needs"


_S, _E = State, Event

_ENDS_SETUP: Final = dict.fromkeys((_E.EXITED, _E.FAILED, _E.CANCELLED, _E.DISCARDED), _S.ENDING)
_LOST: Final = {_E.LOST: _S.COLLECTING}

TRANSITIONS: Final[dict[State, dict[Event, State]]] = {
    # Refused by the nursery, nothing is there that could die.
    _S.MAKING: {_E.MADE: _S.SEALING, **_ENDS_SETUP, _E.FAILED: _S.COLLECTING, **_LOST},
    _S.SEALING: {_E.WALLS_UP: _S.SEALED, **_ENDS_SETUP, **_LOST},
    _S.SEALED: {_E.GO: _S.RUNNING, **_ENDS_SETUP, **_LOST},
    _S.RUNNING: {
        **dict.fromkeys((_E.FINISHED, _E.EXITED, _E.LIMIT, _E.CANCELLED, _E.FAILED), _S.ENDING),
        **_LOST,
    },
    # What comes once the end has begun changes nothing any more. A set-up step that was under way still answers.
    _S.ENDING: {
        _E.DEAD: _S.COLLECTING,
        **dict.fromkeys((_E.FINISHED, _E.EXITED, _E.LIMIT, _E.CANCELLED, _E.DISCARDED, _E.FAILED), _S.ENDING),
        **dict.fromkeys((_E.MADE, _E.WALLS_UP), _S.ENDING),
        **_LOST,
    },
    _S.COLLECTING: {_E.LET_GO: _S.GONE, **dict.fromkeys((_E.CANCELLED, _E.LIMIT, _E.DISCARDED), _S.COLLECTING)},
    _S.GONE: {},
}


class Life:
    """One cell's state. ``on`` is the only way to change it."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state = State.MAKING

    def on(self, event: Event) -> State:
        """Take *event*; the new state. Raises RuntimeError for an event that cannot happen here."""
        try:
            self.state = TRANSITIONS[self.state][event]
        except KeyError:
            raise RuntimeError(f"{event.name} cannot happen to a cell that is {self.state.value}") from None
        return self.state
