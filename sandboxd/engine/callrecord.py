"""Tool calls as the audit record has them: put together from the packets that pass through the engine.

Only for engines that record. Bodies are kept as far as a record shows them; of longer ones the beginning, with length
and hash of the whole. Nothing here judges: what is no JSON is recorded as the text that it was.
"""

from __future__ import annotations

import hashlib
import re
import time
from typing import TYPE_CHECKING, Any, Final

from sandboxd.audit.record import CAP_BYTES, Excerpt
from sandboxd.errors import ProtocolError
from sandboxd.protocol import loads

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CallRecords"]

_NAME: Final = re.compile(rb'\s*\{\s*"tool"\s*:\s*"([A-Za-z0-9_]{1,64})"')
_CODE: Final = re.compile(rb'"code"\s*:\s*"([a-z_]{1,32})"')


class CallRecords:
    """Of one run. *write* gets a record for each call that was answered, or was not by the end of the run."""

    def __init__(self, write: Callable[[dict[str, Any]], None]) -> None:
        self._write = write
        self._open: dict[int, tuple[float, _Body]] = {}
        self._answering: dict[int, _Body] = {}

    def call(self, number: int, part: bytes) -> None:
        """The program sent a part of a call."""
        found = self._open.get(number)
        if found is None:
            found = self._open[number] = (time.monotonic(), _Body())
        found[1].add(part)

    def answer(self, number: int, part: bytes, last: bool) -> None:
        """A part of its answer passes through."""
        body = self._answering.setdefault(number, _Body())
        body.add(part)
        if last:
            del self._answering[number]
            self._tell(number, body)

    def close(self) -> None:
        """The run is over: what was not answered is recorded so."""
        self._answering.clear()
        for number in list(self._open):
            self._tell(number, None)

    def _tell(self, number: int, answer: _Body | None) -> None:
        found = self._open.pop(number, None)
        if found is None:
            return
        begun, call = found
        asked = call.json()
        record: dict[str, Any] = {"tool": call.match(_NAME), "caller": "code"}
        if isinstance(asked, dict) and "tool" in asked:
            record["tool"], asked = asked["tool"], asked.get("arguments")
        record["arguments"] = call.excerpt() if asked is None else asked
        record["ok"], record["code"], record["result"] = None, None, None
        if answer is not None:
            said = answer.json()
            if isinstance(said, dict) and said.keys() == {"ok", "value", "error"}:
                error = said["error"]
                record["ok"] = said["ok"]
                record["code"] = error.get("code") if isinstance(error, dict) else None
                record["result"] = said["value"] if error is None else error
            else:
                record["ok"] = answer.begins(b'{"ok":true') or None
                record["code"] = None if record["ok"] else answer.match(_CODE)
                record["result"] = answer.excerpt()
        record["seconds"] = round(time.monotonic() - begun, 6)
        self._write(record)


class _Body:
    """A body's beginning, its length and its hash."""

    __slots__ = ("_bytes", "_hash", "_text")

    def __init__(self) -> None:
        self._text = bytearray()
        self._hash = hashlib.sha256()
        self._bytes = 0

    def add(self, part: bytes) -> None:
        self._bytes += len(part)
        self._hash.update(part)
        if len(self._text) < CAP_BYTES:
            self._text += part[: CAP_BYTES - len(self._text)]

    def json(self) -> Any:
        """The value, when it is whole here and is one; else None."""
        if self._bytes > len(self._text):
            return None
        try:
            return loads(bytes(self._text))
        except ProtocolError:
            return None

    def begins(self, start: bytes) -> bool:
        return self._text.startswith(start)

    def match(self, pattern: re.Pattern[bytes]) -> str | None:
        found = pattern.search(self._text[:1024])
        return None if found is None else found[1].decode("ascii")

    def excerpt(self) -> Excerpt:
        text = self._text.decode("utf-8", "backslashreplace")
        return Excerpt(text=text, bytes=self._bytes, sha256=self._hash.hexdigest())
