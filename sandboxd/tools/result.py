"""What a call comes to: a value, or a refusal with a code of a closed set, worded for a model.

Whatever is said here may be read by a model and by code in a cell, so nothing of the host goes in: texts are bounded,
control characters are escaped, and an exception's own words never appear unless its author meant them to (ToolError).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Sized

CODES = (
    "unknown_tool",
    "caller_not_allowed",
    "invalid_arguments",
    "rate_limited",
    "budget_exceeded",
    "approval_denied",
    "timeout",
    "tool_failed",
    "invalid_result",
    "result_too_large",
    "busy",
    "unavailable",
    "internal",
)

_TEXT_CHARACTERS = 2000
_JSON = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def readable(text: str, most: int = _TEXT_CHARACTERS) -> str:
    """*text* on printable characters and newlines only, others escaped, at most about *most* characters."""
    if len(text) > most:
        text = f"{text[: most - most // 4]} ... {text[len(text) - most // 4 :]}"
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def shown(value: object, most: int = 60) -> str:
    """*value* as a model would write it, in at most about *most* characters; for messages."""
    if isinstance(value, str):
        value = value[: most + 1]  # the rest would be cut anyway
    elif isinstance(value, list | tuple | dict):
        count = len(cast("Sized", value))
        if count > most:
            return f"{'an object' if isinstance(value, dict) else 'a list'} of {count} entries"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = f"a value of type {type(value).__name__}"
    return readable(text if len(text) <= most else text[: most - 3] + "...", 2 * most)


class ToolError(Exception):
    """A tool raises it to say on purpose why it failed: *message* and *hint* go to the model as they are.

    Of every other exception the model is told the class only. Both texts are bounded, control characters are escaped.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Refused(Exception):
    """Inside this package: the call ends here, with this code and these words."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.failure = ToolFailure(code, readable(message), readable(hint))


@dataclass(frozen=True, slots=True)
class ToolFailure:
    """Why there is no value: *code* is one of CODES, *message* says what was wrong, *hint* what to do about it."""

    code: str
    message: str
    hint: str

    def to_dict(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message, "hint": self.hint}


@dataclass(frozen=True, slots=True)
class ToolResult:
    """How a call went. *value* holds plain JSON values (None when not ok), *error* is None when ok."""

    ok: bool
    value: Any
    error: ToolFailure | None
    # The JSON of *value* where it is known already: large results are serialised once.
    _text: str | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "value": self.value, "error": None if self.error is None else self.error.to_dict()}

    @property
    def json_text(self) -> str:
        """Compact JSON of *value*."""
        return _JSON(self.value) if self._text is None else self._text

    def to_json(self) -> str:
        """Compact ASCII JSON of ``to_dict``."""
        error = "null" if self.error is None else _JSON(self.error.to_dict())
        return f'{{"ok":{"true" if self.ok else "false"},"value":{self.json_text},"error":{error}}}'


def refusal(code: str, message: str, hint: str = "") -> ToolResult:
    """The result of a call that ends with *code*."""
    return ToolResult(False, None, ToolFailure(code, readable(message), readable(hint)))
