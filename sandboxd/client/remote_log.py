"""The audit record of a daemon, as far as the daemon lets this user see it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from sandboxd.audit.reader import START, Page
from sandboxd.client.sandbox import Sandbox, open_daemon, parse_address
from sandboxd.errors import ConnectionLost, ProtocolError, from_plain
from sandboxd.protocol import packets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandboxd.audit.reader import Cursor

__all__ = ["pages"]


@contextlib.contextmanager
def pages(address: str, run: str | None = None) -> Iterator[Callable[[Cursor], Page]]:
    """A function that fetches a page of the record of the daemon at *address*, of the run *run* or of all that may be
    seen; as ``reader.page``. Both raise Unavailable, ConnectionLost, ProtocolError.
    """
    with Sandbox._greeted(open_daemon(parse_address(address))) as sock:

        def fetch(cursor: Cursor) -> Page:
            try:
                packets.send(sock, {"op": "logs", "cursor": None if cursor == START else list(cursor), "run": run})
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
    message = answer.message
    if message.get("op") == "refused" and isinstance(message.get("error"), dict):
        raise from_plain(message["error"])
    cursor, end = message.get("cursor"), message.get("end")
    if not isinstance(cursor, list) or len(cursor) != 2 or type(end) is not bool:
        raise ProtocolError("The daemon's answer to logs is none.")
    if not all(type(one) is int for one in cursor):
        raise ProtocolError("The daemon's answer to logs has a cursor that is none.")
    return Page(bytes(answer.take_bytes()).splitlines(keepends=True), (cursor[0], cursor[1]), end)
