"""The life of a cell as a table: state x event -> state.

The coroutine in run.py orders the steps; each step tells its event here, and an event that the table does not hold is a
bug that shows at once. Parking will lease a cell in SEALED; a session will go from RUNNING back to SEALED.

    state        what exists                          what can happen
    QUEUED       nothing                              a turn, the caller leaves, the queue's time is over
    MAKING       a slot and its leaf                  the init is there; set-up fails; the zygote is lost
    FORKING      + init, its file systems and pipes   the cell is forked; as above
    SEALING      + the cell's process                 every wall is up; as above
    SEALED       a cell that waits for a program      go; the caller leaves; the zygote is lost
    RUNNING      the program runs                     finished frame, exit, a limit, the caller leaves, zygote lost
    ENDING       SIGKILL is on its way                the pid namespace is dead
    COLLECTING   only data: files, counters           collected
    GONE         nothing                              -
"""

from __future__ import annotations

import enum
from typing import Final

__all__ = ["TRANSITIONS", "Event", "Life", "State"]


class State(enum.Enum):
    """Where a run stands."""

    QUEUED = "queued"
    MAKING = "making"
    FORKING = "forking"
    SEALING = "sealing"
    SEALED = "sealed"
    RUNNING = "running"
    ENDING = "ending"
    COLLECTING = "collecting"
    GONE = "gone"


class Event(enum.Enum):
    """What happens to a run."""

    ADMITTED = "a slot is free"
    INIT_MADE = "the nursery made the init"
    FORKED = "the zygote forked the cell"
    WALLS_UP = "the cell says that every wall is up"
    GO = "the program was handed over"
    FINISHED = "the cell says that the program ended"
    EXITED = "the cell's process ended"
    LIMIT = "a limit fired"
    CANCELLED = "the caller left or asked for the end"
    FAILED = "a set-up step was refused"
    LOST = "the zygote is gone, and every cell with it"
    DEAD = "the pid namespace is empty"
    COLLECTED = "files and counters were read"


_S, _E = State, Event

_ENDS_SETUP: Final = {_E.FAILED: _S.ENDING, _E.CANCELLED: _S.ENDING, _E.LOST: _S.ENDING}

TRANSITIONS: Final[dict[State, dict[Event, State]]] = {
    _S.QUEUED: {_E.ADMITTED: _S.MAKING, _E.CANCELLED: _S.GONE, _E.FAILED: _S.GONE, _E.LOST: _S.GONE},
    _S.MAKING: {_E.INIT_MADE: _S.FORKING, **_ENDS_SETUP},
    _S.FORKING: {_E.FORKED: _S.SEALING, **_ENDS_SETUP},
    _S.SEALING: {_E.WALLS_UP: _S.SEALED, **_ENDS_SETUP},
    _S.SEALED: {_E.GO: _S.RUNNING, **_ENDS_SETUP},
    _S.RUNNING: {
        _E.FINISHED: _S.ENDING,
        _E.EXITED: _S.ENDING,
        _E.LIMIT: _S.ENDING,
        _E.CANCELLED: _S.ENDING,
        _E.LOST: _S.ENDING,
        _E.FAILED: _S.ENDING,
    },
    # What comes once the end has begun changes nothing any more.
    _S.ENDING: {
        _E.DEAD: _S.COLLECTING,
        **dict.fromkeys((_E.FINISHED, _E.EXITED, _E.LIMIT, _E.CANCELLED, _E.LOST, _E.FAILED), _S.ENDING),
        # A set-up step that was under way when the end began still answers.
        **dict.fromkeys((_E.INIT_MADE, _E.FORKED, _E.WALLS_UP), _S.ENDING),
    },
    _S.COLLECTING: {_E.COLLECTED: _S.GONE, _E.LOST: _S.COLLECTING, _E.CANCELLED: _S.COLLECTING},
    _S.GONE: {},
}


class Life:
    """One run's state. ``on`` is the only way to change it."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state = State.QUEUED

    def on(self, event: Event) -> State:
        """Take *event*; the new state. Raises RuntimeError for an event that cannot happen here."""
        try:
            self.state = TRANSITIONS[self.state][event]
        except KeyError:
            raise RuntimeError(f"{event.name} cannot happen to a cell that is {self.state.value}") from None
        return self.state
