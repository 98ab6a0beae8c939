"""The request ``logs``: a page of the audit record, of the client's own runs or of everybody's.

One page at a time is read for all clients together, in a thread: it may look at many megabytes for a few lines. Which
file that is, the engine alone knows; a client's cursor is two numbers that mean nothing but a place to go on from.
"""

from __future__ import annotations

import asyncio
import functools
import re
from typing import TYPE_CHECKING, Any, Final

from sandboxd.audit.reader import START, Page, page
from sandboxd.errors import ProtocolError, Unavailable
from sandboxd.protocol.operations import Operation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sandboxd.engine.engine import Engine

__all__ = ["answer"]

KEYS: Final = frozenset({"op", "cursor", "run"})
RUN: Final = re.compile(r"[0-9a-f]{1,64}")
MOST: Final = 1 << 63


async def answer(engine: Engine, message: Mapping[str, Any], uid: int | None) -> tuple[dict[str, Any], list[bytes]]:
    """Message and payload that answer *message*; *uid* is whose runs may be seen, None everybody's.

    Raises ProtocolError for a wrong request, Unavailable when there is nothing to be read.
    """
    cursor, run = message.get("cursor"), message.get("run")
    if set(message) != KEYS or not (cursor is None or _is_cursor(cursor)) or not (run is None or _is_run(run)):
        raise ProtocolError("A request for logs has a cursor that it was given, or null, and a run's id, or null.")
    path = engine.audit.path
    if path is None:
        raise Unavailable("audit", "nothing is recorded", fix="set enabled = true in [audit] of its configuration")
    start = START if cursor is None else (cursor[0], cursor[1])
    async with engine.reading:
        try:
            found = await asyncio.to_thread(functools.partial(page, path, start, uid=uid, run=run))
        except FileNotFoundError:
            found = Page([], start, True)  # it is made when something can be written
        except OSError as error:
            raise Unavailable(
                "audit", "it cannot be read", errno=error.errno, fix="look at the engine's log"
            ) from error
    return {"op": Operation.LOGS, "cursor": list(found.cursor), "end": found.end}, found.lines


def _is_cursor(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(one) is int and 0 <= one < MOST for one in value)


def _is_run(value: object) -> bool:
    return isinstance(value, str) and RUN.fullmatch(value) is not None
