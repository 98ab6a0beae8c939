"""Tool calls as the audit record has them: put together from the packets that pass through the engine.

Only for engines that record. Bodies are kept as far as a record shows them; of longer ones the beginning, with length
and hash of the whole. Nothing here judges: what is no JSON is recorded as the text that it was.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from sandboxd.audit.record import CAP_BYTES, Excerpt
from sandboxd.errors import ProtocolError
from sandboxd.inside.channel import CALL_BEGINS
from sandboxd.protocol.packets import loads

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CallRecords"]

BODIES_BYTES: Final = 4 << 20
"""Of a run's tool calls in the record, arguments and results together."""
_BEGINS: Final = re.compile(CALL_BEGINS)


class CallRecords:
    """Of one run. *write* gets a record for each call that was passed on, when it was answered or at the run's end, and
    one for all that the engine refused itself. A program cannot push older records out by calling: its bodies are shown
    as far as BODIES_BYTES go, then their lengths and hashes alone.
    """

    def __init__(self, write: Callable[[dict[str, Any]], None]) -> None:
        self._write = write
        self._open: dict[int, tuple[float, _Body]] = {}
        self._answering: dict[int, _Body] = {}
        self._refused: Counter[str] = Counter()
        self._room = BODIES_BYTES

    def call(self, number: int, part: bytes, index: int) -> None:
        """The program sent a part of a call."""
        if index == 0:
            self._open[number] = (time.monotonic(), _Body())
        found = self._open.get(number)
        if found is not None:
            found[1].add(part)

    def answer(self, number: int, part: bytes, last: bool) -> None:
        """A part of its answer passes through."""
        body = self._answering.setdefault(number, _Body())
        body.add(part)
        if last:
            del self._answering[number]
            self._tell(number, body)

    def refused(self, code: str) -> None:
        """A call was not passed on."""
        self._refused[code] += 1

    def close(self) -> None:
        """The run is over: what was not answered is recorded so."""
        self._answering.clear()
        for number in list(self._open):
            self._tell(number, None)
        if self._refused:
            self._write({"tool": None, "caller": "code", "ok": False, "refused": dict(self._refused)})
            self._refused.clear()

    def _tell(self, number: int, answer: _Body | None) -> None:
        found = self._open.pop(number, None)
        if found is None:
            return
        begun, call = found
        asked, said = call.json(), None if answer is None else answer.json()
        name = _BEGINS.match(call.text)  # the engine passes nothing on that begins otherwise
        record: dict[str, Any] = {"tool": None if name is None else name[1].decode("ascii"), "caller": "code"}
        is_call = isinstance(asked, dict) and asked.keys() == {"tool", "arguments"}
        record["arguments"] = self._shown(call, is_call, asked["arguments"] if is_call else None)
        record["ok"] = record["code"] = record["result"] = None
        if answer is not None:
            if isinstance(said, dict) and said.keys() == {"ok", "value", "error"}:
                error = said["error"]
                record["ok"] = said["ok"]
                record["code"] = error.get("code") if isinstance(error, dict) else None
                record["result"] = self._shown(answer, True, said["value"] if error is None else error)
            else:
                record["ok"] = answer.text.startswith(b'{"ok":true') or None
                record["result"] = self._shown(answer, False, None)
        record["seconds"] = round(time.monotonic() - begun, 6)
        self._write(record)

    def _shown(self, body: _Body, whole: bool, value: Any) -> Any:
        """*value*, if it is all that *body* holds and there is room for it, else an excerpt."""
        shown = value if whole and self._room > 0 else body.excerpt(self._room > 0)
        self._room -= min(body.bytes, CAP_BYTES)
        return shown


class _Body:
    """A body's beginning, its length and its hash."""

    __slots__ = ("_hash", "bytes", "text")

    def __init__(self) -> None:
        self.text = bytearray()
        self._hash = hashlib.sha256()
        self.bytes = 0

    def add(self, part: bytes) -> None:
        self.bytes += len(part)
        self._hash.update(part)
        if len(self.text) < CAP_BYTES:
            self.text += part[: CAP_BYTES - len(self.text)]

    def json(self) -> Any:
        """The value, when it is whole here and is one; else None."""
        if self.bytes > len(self.text):
            return None
        try:
            return loads(bytes(self.text))
        except ProtocolError:
            return None

    def excerpt(self, with_text: bool) -> Excerpt:
        text = self.text.decode("utf-8", "backslashreplace") if with_text else ""
        return Excerpt.of(text, self.bytes, self._hash.hexdigest())
