"""The operations of the protocol: every value that the "op" of a message may have, and what each one is for.

The table of docs/architecture.md shows this list, and the engine's dispatch is made from it. What else is in a message
is told where the message is made; a run's header by ``run_header``.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LARGE", "LAST", "REQUESTS", "Asker", "Operation", "Sender", "operation_of"]


class Sender(enum.Enum):
    """Which way a message goes."""

    CLIENT = "client → engine"
    ENGINE = "engine → client"
    BOTH = "both ways"


class Asker(enum.Enum):
    """Who may send an operation to an engine; of anybody else it is refused."""

    ANYBODY = "any client"
    OPERATOR = "a daemon's operator"
    HOLDER = "an embedded engine's caller"
    STARTER = "an embedded engine's caller, over the control socket"
    NOBODY = ""


_CLIENT, _ENGINE, _BOTH = Sender.CLIENT, Sender.ENGINE, Sender.BOTH
_ANYBODY, _HOLDER, _STARTER, _NOBODY = Asker.ANYBODY, Asker.HOLDER, Asker.STARTER, Asker.NOBODY
_RUN_ANSWERS: Final = "queued admitted tools output result refused"


class Operation(enum.StrEnum):
    """One operation: its word on the wire, and what is known of it."""

    sender: Sender
    asker: Asker
    meaning: str
    _answers: tuple[str, ...]

    def __new__(cls, word: str, sender: Sender, asker: Asker, answers: str, meaning: str) -> Self:
        """*answers* are the words of the messages that may follow."""
        one = str.__new__(cls, word)
        one._value_ = word
        one.sender, one.asker, one.meaning = sender, asker, meaning
        one._answers = tuple(answers.split())
        return one

    @property
    def answers(self) -> tuple[Operation, ...]:
        """The messages that may follow, in their order."""
        return tuple(_BY_WORD[word] for word in self._answers)

    # Of every connection
    HELLO = ("hello", _BOTH, _ANYBODY, "hello refused", "The first packet each way: the version of the protocol.")
    RUN = ("run", _CLIENT, _ANYBODY, _RUN_ANSWERS, "Run a program under an installed policy.")
    CANCEL = ("cancel", _CLIENT, _ANYBODY, "", "End the run that is under way, whose answer follows.")
    PS = ("ps", _BOTH, _ANYBODY, "ps", "The live runs that the client may see.")
    STATS = ("stats", _BOTH, _ANYBODY, "stats", "The counters of the client's runs; for the operator, of all.")
    LOGS = ("logs", _BOTH, _ANYBODY, "logs refused", "A page of the audit record, of runs that the client may see.")
    RELOAD = ("reload", _CLIENT, Asker.OPERATOR, "reloaded refused", "Read configuration and policies again.")
    QUEUED = ("queued", _ENGINE, _NOBODY, "", "The run waits for its turn.")
    ADMITTED = ("admitted", _ENGINE, _NOBODY, "", "A run that was queued has its turn.")
    TOOLS = ("tools", _ENGINE, _NOBODY, "", "The run is about to start; with it comes the socket of its tool calls.")
    OUTPUT = ("output", _ENGINE, _NOBODY, "", "A piece of the program's stdout or stderr.")
    RESULT = ("result", _ENGINE, _NOBODY, "", "How the run ended, with its output and files.")
    REFUSED = ("refused", _ENGINE, _NOBODY, "", "What was asked for cannot be had; an error says why.")
    RELOADED = ("reloaded", _ENGINE, _NOBODY, "", "The files were read; sentences say what has changed.")

    # Of an embedded engine's connections (engine/clients/leases.py)
    LEASE = ("lease", _ENGINE, _NOBODY, "done take", "A parked cell is the caller's, with its descriptors.")
    REVOKED = ("revoked", _ENGINE, _NOBODY, "", "A lease is over before it was used.")
    DONE = ("done", _CLIENT, _HOLDER, "", "The leased cell's program ended cleanly; the caller has its answer.")
    TAKE = ("take", _CLIENT, _HOLDER, "result refused revoked", "The engine is to carry on the leased cell's run.")

    # Of an embedded engine's control socket
    CONFIGURE = ("configure", _CLIENT, _STARTER, "refused", "The settings of the engine.")
    POLICY = ("policy", _CLIENT, _STARTER, "ready refused", "The one policy that the engine serves.")
    READY = ("ready", _ENGINE, _NOBODY, "", "A first cell of the policy was proved sealed.")


REQUESTS: Final = tuple(
    one for one in Operation if one.asker in (Asker.ANYBODY, Asker.OPERATOR, Asker.HOLDER) and one != Operation.HELLO
)
"""What a client may say once hello was exchanged."""
LARGE: Final = (Operation.RUN, Operation.DONE, Operation.TAKE)
"""What may come to an engine in a memfd, because the payload may be long."""
LAST: Final = (Operation.RESULT, Operation.REFUSED)
"""What ends a run's answer."""
_BY_WORD: Final[Mapping[str, Operation]] = {one.value: one for one in Operation}


def operation_of(message: Mapping[str, Any]) -> Operation | None:
    """The operation of *message*, which may be hostile; None when it is none of the list."""
    word = message.get("op")
    return _BY_WORD.get(word) if isinstance(word, str) else None
