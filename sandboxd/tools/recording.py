"""A call's line in the audit record."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sandboxd.tools import values
from sandboxd.tools.outcome import Refused, ToolFailure, ToolResult, shown

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sandboxd.audit import AuditLog

_LOG = logging.getLogger("sandboxd.tools")


class ToolCalled(Mapping[str, Any]):
    """The record of one call, made of what cannot change any more; its values are built when the log writes them.

    *text* is the arguments' JSON; where they are none, *given* is what was given instead. *begun* is of
    time.monotonic(), *run* the id of the run of code that called.
    """

    __slots__ = ("_caller", "_failure", "_given", "_made", "_result", "_run", "_seconds", "_text", "_tool")

    def __init__(
        self, tool: object, caller: str, run: str | None, text: str, given: object, result: ToolResult, begun: float
    ) -> None:
        self._seconds = time.monotonic() - begun
        self._tool = tool if isinstance(tool, str) else shown(tool)
        self._caller = caller
        self._run = run
        self._text = text
        self._given = None if text else _unreadable(given)
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
                "arguments": json.loads(self._text) if self._text else self._given,
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


def _unreadable(given: object) -> Any:
    """Arguments that were refused before they were JSON, as a copy that can be recorded."""
    if given is None or isinstance(given, str):
        return given
    if isinstance(given, bytes | bytearray):
        return bytes(given).decode(errors="backslashreplace")
    try:
        return json.loads(values.arguments_json(given))
    except Refused:
        return shown(given, 1000)


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
