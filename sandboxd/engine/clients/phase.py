"""The life of a connection as a table: phase x event -> phase.

The connection and its run tell each event here, and an event that the table does not hold is a bug that shows at once.

    phase        the client                                    what it sends
    GREETING     has yet to say hello                          is its hello
    IDLE         waits for nothing                             is its next request
    ANSWERING    waits for an answer that nothing interrupts   stays in the socket
    RUNNING      waits for its run                             ends the run
    CANCELLED    asked for the end of its run                  stays in the socket
    LEFT         left during its run, or broke the protocol    is not looked at: its run is ended, then the connection
    DEAF         takes no output of its run                    is not looked at: as above, and no result is sent
    CLOSED       is gone                                       -
"""

from __future__ import annotations

import enum
from typing import Final

__all__ = ["ENDS", "TRANSITIONS", "ConnectionLife", "Event", "Phase"]


class Phase(enum.Enum):
    """Where a connection stands."""

    GREETING = "greeting"
    IDLE = "idle"
    ANSWERING = "answering"
    RUNNING = "running"
    CANCELLED = "cancelled"
    LEFT = "left"
    DEAF = "deaf"
    CLOSED = "closed"


class Event(enum.Enum):
    """What happens to a connection."""

    GREETED = "hello was exchanged"
    ASKED = "a request came"
    BEGUN = "a run begins, which the client may interrupt"
    CANCEL = "the client asks for the end of its run"
    LEAVE = "the client left, or broke the protocol, during its run"
    BLOCKED = "the client takes no output of its run"
    OVER = "the run is over: its answer is still to be sent"
    ANSWERED = "the request is answered"
    CLOSE = "the socket is closed"


_P, _E = Phase, Event

_CLOSES: Final = {_E.CLOSE: _P.CLOSED}

TRANSITIONS: Final[dict[Phase, dict[Event, Phase]]] = {
    _P.GREETING: {_E.GREETED: _P.IDLE, **_CLOSES},
    _P.IDLE: {_E.ASKED: _P.ANSWERING, **_CLOSES},
    _P.ANSWERING: {_E.BEGUN: _P.RUNNING, _E.ANSWERED: _P.IDLE, **_CLOSES},
    _P.RUNNING: {
        _E.CANCEL: _P.CANCELLED,
        _E.LEAVE: _P.LEFT,
        _E.BLOCKED: _P.DEAF,
        _E.OVER: _P.ANSWERING,
        **_CLOSES,
    },
    _P.CANCELLED: {_E.BLOCKED: _P.DEAF, _E.OVER: _P.ANSWERING, **_CLOSES},
    # Nothing brings a client back: whatever becomes of its run, the connection ends.
    _P.LEFT: {_E.BLOCKED: _P.DEAF, _E.OVER: _P.LEFT, **_CLOSES},
    _P.DEAF: {_E.BLOCKED: _P.DEAF, _E.OVER: _P.DEAF, **_CLOSES},
    _P.CLOSED: {**_CLOSES, **dict.fromkeys((_E.BLOCKED, _E.OVER), _P.CLOSED)},
}

ENDS: Final = (Phase.LEFT, Phase.DEAF, Phase.CLOSED)
"""Where no request is taken any more."""


class ConnectionLife:
    """One connection's phase. ``on`` is the only way to change it."""

    __slots__ = ("phase",)

    def __init__(self) -> None:
        self.phase = Phase.GREETING

    def on(self, event: Event) -> Phase:
        """Take *event*; the new phase. Raises RuntimeError for an event that cannot happen here."""
        try:
            self.phase = TRANSITIONS[self.phase][event]
        except KeyError:
            raise RuntimeError(f"{event.name} cannot happen to a connection that is {self.phase.value}") from None
        return self.phase
