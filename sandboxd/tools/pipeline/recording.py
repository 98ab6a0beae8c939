"""A call's line in the audit record."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sandboxd.tools.result import Refused, ToolFailure, ToolResult
from sandboxd.tools.schema import values

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sandboxd.audit import AuditLog

_LOG = logging.getLogger("sandboxd.tools")
_JSON = json.JSONEncoder(allow_nan=False).encode


class ToolCalled(Mapping[str, Any]):
    """The record of one call, made of what cannot change any more; its values are built when the log writes them.

    *text* is the arguments' JSON; where they are none, *given* is what was given instead: recorded is the JSON value
    that it is, a text that is none as it stands, and of anything else an excerpt. *begun* is of time.monotonic(),
    *run* the id of the run of code that called.
    """

    __slots__ = ("_caller", "_failure", "_given", "_made", "_result", "_run", "_seconds", "_text", "_tool")

    def __init__(
        self, tool: object, caller: str, run: str | None, text: str, given: object, result: ToolResult, begun: float
    ) -> None:
        self._seconds = time.monotonic() - begun
        self._tool: Any = tool if isinstance(tool, str) else _copy(tool)
        self._caller = caller
        self._run = run
        self._text = text
        self._given: Any = None if text else _copy(given)
        self._result = result.json_text
        self._failure: ToolFailure | None = result.error
        self._made: dict[str, Any] | None = None

    def _record(self) -> dict[str, Any]:
        if self._made is None:
            failure = self._failure
            self._made = {
                "event": "tool_called",
                "id": self._run,
                "tool": self._tool,
                "caller": self._caller,
                "arguments": json.loads(self._text) if self._text else _read(self._given),
                "result": json.loads(self._result) if failure is None else failure.to_dict(),
                "ok": failure is None,
                "code": None if failure is None else failure.code,
                "seconds": round(self._seconds, 6),
            }
        return self._made

    def __getitem__(self, key: str) -> Any:
        return self._record()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._record())

    def __len__(self) -> int:
        return len(self._record())


def _copy(given: object) -> Any:
    """What was given and is not known to be JSON, as a copy that can be recorded: nobody changes it any more."""
    from sandboxd.audit.record import Excerpt, encoded, hash_of

    if given is None or isinstance(given, str):
        return given
    if isinstance(given, bytes | bytearray):
        return bytes(given)
    try:
        if isinstance(given, Mapping):
            given = dict(given)
        return json.loads(_JSON({"": given}))[""]
    except Exception:  # what a caller's own class does here must not end the call
        text = encoded(given)
        return Excerpt.of(text, len(text), hash_of(text.encode("ascii")))


def _read(given: Any) -> Any:
    """The JSON value that *given* is, if it is a text; else the text."""
    if isinstance(given, bytes):
        given = given.decode(errors="backslashreplace")
    if not isinstance(given, str):
        return given
    try:
        return values.parse(given)
    except Refused:
        return given


def opened(audit: str | Path | AuditLog | None) -> tuple[AuditLog | None, bool]:
    """The log, and whether it is ours to close. Raises AuditError when it cannot be opened."""
    if audit is None:
        return None, False
    from sandboxd.audit import AuditLog

    return (audit, False) if isinstance(audit, AuditLog) else (AuditLog(audit, buffered=True), True)


def append(log: AuditLog, record: ToolCalled) -> None:
    """Hand *record* to *log*, which keeps it when it cannot write: then ``check`` refuses the next calls."""
    try:
        log.append(record, late=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: closed by its owner
        _LOG.error("A tool call could not be recorded: %s", error)


def check(log: AuditLog) -> None:
    """Raise Refused when *log* holds records that it cannot write."""
    if log.is_behind:
        try:
            log.flush()
        except OSError:
            raise Refused(
                "unavailable",
                "The host program cannot write its record of calls, and makes no call without one.",
                "Nothing that you send will change this; tell the user.",
            ) from None
