"""What a daemon's operator and its users ask it beside runs: its live runs, its counters, its record, a reload."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from sandboxd.client.connections import ask, counters, greet, open_daemon, parse_address, refused
from sandboxd.errors import ConnectionLost, ProtocolError
from sandboxd.protocol import packets
from sandboxd.protocol.operations import Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandboxd.audit.reader import Cursor, Page

__all__ = ["pages", "ps", "reload", "stats"]


def reload(address: str) -> list[str]:
    """Have the daemon at *address* read its files again; sentences about what changed. Raises PolicyError when a file
    is wrong (everything is as before then), Unavailable, ProtocolError.
    """
    said = _asked(address, Operation.RELOAD).get("said")
    if not isinstance(said, list) or not all(isinstance(one, str) for one in said):
        raise ProtocolError("The daemon's answer to reload is not a list.")
    return said


def ps(address: str) -> list[dict[str, Any]]:
    """The live runs of the daemon at *address* that the caller may see. Raises Unavailable, ProtocolError."""
    runs = _asked(address, Operation.PS).get("runs")
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise ProtocolError("The daemon's answer to ps is not a list.")
    return runs


def stats(address: str) -> dict[str, Any]:
    """The counters of the daemon at *address*, as ``Sandbox.stats`` gives them. Raises Unavailable, ProtocolError."""
    return counters(_asked(address, Operation.STATS))


def _asked(address: str, operation: Operation) -> dict[str, Any]:
    return ask(open_daemon(parse_address(address)), operation)


@contextlib.contextmanager
def pages(address: str, run: str | None = None) -> Iterator[Callable[[Cursor], Page]]:
    """A function that fetches a page of the record of the daemon at *address*, of the run *run* or of all that may be
    seen; as ``reader.page``. Both raise Unavailable, ConnectionLost, ProtocolError.
    """
    from sandboxd.audit.reader import START

    with greet(open_daemon(parse_address(address))) as sock:

        def fetch(cursor: Cursor) -> Page:
            try:
                place = None if cursor == START else list(cursor)
                packets.send(sock, {"op": Operation.LOGS, "cursor": place, "run": run})
                answer = packets.receive(sock)
            except OSError as error:
                raise ConnectionLost(False) from error
            if answer is None:
                raise ConnectionLost(False)
            try:
                return _page(answer)
            finally:
                answer.close()

        yield fetch


def _page(answer: packets.Packet) -> Page:
    refused(answer)
    message = answer.message
    cursor, end = message.get("cursor"), message.get("end")
    if not isinstance(cursor, list) or len(cursor) != 2 or type(end) is not bool:
        raise ProtocolError("The daemon's answer to logs is none.")
    if not all(type(one) is int for one in cursor):
        raise ProtocolError("The daemon's answer to logs has a cursor that is none.")
    from sandboxd.audit.reader import Page

    return Page(bytes(answer.take_bytes()).splitlines(keepends=True), (cursor[0], cursor[1]), end)
