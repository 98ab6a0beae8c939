"""What a line of the audit record looks like: canonical and bounded. Computes only; touches no file.

A line is one JSON object in ASCII: whatever a program, a client or a model wrote stands in it escaped, so that nothing
can end the line or reach a terminal. It begins with time, event, id and client, so that a reader knows whose it is
without parsing the rest, and ends with the number of the record and the hash of the line before.
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "CAPPED",
    "CAP_BYTES",
    "CHUNK",
    "NOTHING",
    "REDACTED",
    "Excerpt",
    "body",
    "capped",
    "encoded",
    "ending",
    "excerpted",
    "hash_of",
    "policy_sha256",
]

CAP_BYTES: Final = 16 << 10
"""Of a tool call's arguments, and of its result; and of what else in a record a caller can make as long as it likes."""
NOTHING: Final = "0" * 64
"""The hash before the first record of all."""
REDACTED: Final = "[redacted]"
CHUNK: Final = 1 << 18
"""A longer source is escaped piece by piece: other threads have their turn in between."""

_HEAD: Final = ("time", "event", "id", "client", "policy")
CAPPED: Final = ("tool", "arguments", "result")
"""Fields of a tool call that whoever calls fills as it likes."""
_FORM: Final = {"text", "bytes", "sha256"}


_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


class Excerpt(dict[str, Any]):
    """The beginning of a value that is too long for a record: text, bytes, sha256."""

    @classmethod
    def of(cls, text: str, bytes: int, sha256: str) -> Excerpt:
        """Of a value of *bytes* bytes with that hash, which begins with *text*; as much of that is kept as takes
        CAP_BYTES in a line, where each character beyond ASCII and each control character takes six or twelve.
        """
        return cls(text=_fitting(text), bytes=bytes, sha256=sha256)


def _fitting(text: str) -> str:
    """The beginning of *text* whose JSON is at most CAP_BYTES long."""
    text = text[:CAP_BYTES]
    escaped = _ENCODER.encode(text)[1:-1]
    if len(escaped) <= CAP_BYTES:
        return text
    for end in range(CAP_BYTES, CAP_BYTES - 12, -1):
        try:
            begun: str = json.loads(f'"{escaped[:end]}"')
        except ValueError:
            continue  # in the middle of an escape
        if text.startswith(begun):  # and not in the middle of two that are one character
            return begun
    return text[: CAP_BYTES // 12]  # halves of characters that stand alone


def encoded(value: Any) -> str:
    """*value* as JSON on one line, from space to tilde. What JSON cannot say is said in words: it never raises."""
    try:
        return _ENCODER.encode(value)
    except (TypeError, ValueError, RuntimeError):
        return _forced(value)


def _forced(value: Any) -> str:
    """As ``encoded``, of a value that is not plain JSON: NaN, an object, too deep, or a cycle."""
    try:
        text = json.dumps(value, separators=(",", ":"), default=_named)
        return json.dumps(json.loads(text, parse_constant=str), separators=(",", ":"))
    except (TypeError, ValueError, RuntimeError) as error:
        if not isinstance(value, dict):
            return json.dumps({"unrecordable": type(error).__name__})
        # The field that cannot be written must not take the others with it.
        return "{" + ",".join(f"{json.dumps(str(key))}:{_field(item)}" for key, item in value.items()) + "}"


def _field(value: Any) -> str:
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RuntimeError) as error:
        return json.dumps({"unrecordable": type(error).__name__})


def _named(value: object) -> dict[str, str]:
    return {"unrecordable": type(value).__name__}  # its own words could run the caller's code


def capped(value: Any) -> Any:
    """*value* as it is, or when its JSON is longer than CAP_BYTES an Excerpt of that.

    A value that looks like such an excerpt is made one, so that nothing passes for it.
    """
    if type(value) is Excerpt:
        return value
    text = encoded(value)
    if len(text) <= CAP_BYTES and not (isinstance(value, dict) and value.keys() == _FORM):
        return value
    return _excerpt(text)


def excerpted(value: Any, *, always: bool) -> Any:
    """As ``capped``, but nothing of a value that is cut is kept beside its length and hash. *always*: cut it."""
    found = _excerpt(encoded(value)) if always else capped(value)
    return Excerpt(found, text=REDACTED) if type(found) is Excerpt else found


def _excerpt(text: str) -> Excerpt:
    return Excerpt.of(text, len(text), hash_of(text.encode("ascii")))


def body(record: Mapping[str, Any], nsec: int) -> bytes:
    """A record without its end: ``ending`` is that, when its place in the file is known.

    *nsec* is the time of the event (CLOCK_REALTIME, nanoseconds).
    """
    whole: dict[str, Any] = dict.fromkeys(_HEAD)
    whole.update(record)
    whole["time"] = stamp(nsec)
    for key in CAPPED:
        if key in whole:
            whole[key] = capped(whole[key])
    code = whole.get("code")
    if not isinstance(code, str) or len(code) <= CHUNK:
        return encoded(whole).encode("ascii")
    del whole["code"]
    parts = [encoded(whole).encode("ascii")[:-1], b',"code":"']
    parts += [encoded(code[at : at + CHUNK])[1:-1].encode("ascii") for at in range(0, len(code), CHUNK)]
    return b"".join([*parts, b'"}'])


def ending(sequence: int, previous: str) -> bytes:
    """What makes a line of a ``body`` without its last byte."""
    return b',"sequence":%d,"previous":"%b"}' % (sequence, previous.encode("ascii"))


def hash_of(line: bytes) -> str:
    """SHA-256 of a line without its newline, in hexadecimal."""
    return hashlib.sha256(line).hexdigest()


def stamp(nsec: int) -> str:
    """ISO 8601 in UTC, with microseconds."""
    seconds, rest = divmod(nsec, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest // 1000:06d}Z"


def policy_sha256(plain: Mapping[str, Any]) -> str:
    """``Policy.sha256`` of a policy's plain values, where the model is not at hand."""
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
