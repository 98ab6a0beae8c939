"""What a line of the audit record looks like: canonical, bounded, redacted. Computes only; touches no file.

A line is one JSON object in ASCII: whatever a program, a client or a model wrote stands in it escaped, so that nothing
can end the line or reach a terminal. It begins with time, event, id and client, so that a reader knows whose it is
without parsing the rest, and ends with the number of the record and the hash of the line before.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "CAP_BYTES",
    "NOTHING",
    "REDACTED",
    "Excerpt",
    "Redactor",
    "body",
    "capped",
    "ending",
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
SHORT: Final = 4
"""A secret with fewer characters is only replaced where it stands alone: "1" is in every other word."""

_HEAD: Final = ("time", "event", "id", "client", "policy")
_CAPPED: Final = ("arguments", "result")
_OURS: Final = frozenset({"time", "event", "id", "client", "policy", "isolation", "usage", "timings", "limits"})
"""Fields in which nothing stands that a caller could choose; a client's name is the user's."""
_FORM: Final = {"text", "bytes", "sha256"}


_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


class Excerpt(dict[str, Any]):
    """The beginning of a value as ``capped`` shows it, made by whoever saw the whole: text, bytes, sha256."""


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


def capped(value: Any, most: int = CAP_BYTES) -> Any:
    """*value* as it is, or the first *most* characters of its JSON, with length and hash of the whole.

    A value that looks like such an excerpt is made one, so that nothing passes for it.
    """
    if type(value) is Excerpt:
        return value
    text = encoded(value)
    if len(text) <= most and not (isinstance(value, dict) and value.keys() == _FORM):
        return value
    return {"text": text[:most], "bytes": len(text), "sha256": hash_of(text.encode("ascii"))}


def body(record: Mapping[str, Any], nsec: int) -> bytes:
    """A record without its end: ``ending`` is that, when its place in the file is known.

    *nsec* is the time of the event (CLOCK_REALTIME, nanoseconds).
    """
    whole: dict[str, Any] = dict.fromkeys(_HEAD)
    whole.update(record)
    whole["time"] = stamp(nsec)
    for key in _CAPPED:
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


class Redactor:
    """Leaves out secrets: what stands under one of *names*, and that same text wherever else it occurs in a record.

    *names* are those of environment variables and of keys in arguments and results; "*" stands for anything, case does
    not matter. *env* is the environment of the run that the records are about.
    """

    def __init__(self, names: Iterable[str] = (), env: Mapping[str, str] | None = None) -> None:
        self.names = tuple(names)
        pattern = "|".join(re.escape(name).replace(r"\*", ".*") for name in self.names)
        self._named = re.compile(pattern, re.IGNORECASE | re.DOTALL) if self.names else None
        self._values = frozenset(value for name, value in (env or {}).items() if value and self._is_secret(name))

    def __bool__(self) -> bool:
        return bool(self.names)

    def _is_secret(self, name: str) -> bool:
        return self._named is not None and self._named.fullmatch(name) is not None

    def __call__(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """*record* without the secrets; one in which something was replaced says so: ``redacted`` is true."""
        if self._named is None:
            return record
        found = set(self._values)
        try:
            for key in _CAPPED:
                self._collect(record.get(key), False, found)
            replacing = _Replacing(found, self._is_secret)
            clean = {
                key: value if key in _OURS else replacing.within(value, key in _CAPPED) for key, value in record.items()
            }
        except RuntimeError:
            # Too deep, or changed meanwhile: nobody can tell what is in there, so nothing of it is kept.
            return {key: value if key in _OURS else REDACTED for key, value in record.items()} | {"redacted": True}
        return {**clean, "redacted": True} if replacing.count else record

    def _collect(self, value: Any, secret: bool, found: set[str]) -> None:
        """Add to *found* every text that stands under a secret name in *value*."""
        if isinstance(value, dict):
            for key, item in value.items():
                self._collect(item, secret or self._is_secret(str(key)), found)
        elif isinstance(value, list | tuple):
            for item in value:
                self._collect(item, secret, found)
        elif secret and isinstance(value, str) and value:
            found.add(value)


class _Replacing:
    """The replacement in one record."""

    def __init__(self, values: Iterable[str], is_secret: Any) -> None:
        self.count = 0
        self._is_secret = is_secret
        self._whole = frozenset(values)
        spelled: set[str] = set()
        for value in self._whole:
            if len(value) >= SHORT:
                # A traceback or a printed object shows it as Python or JSON spells it.
                spelled |= {value, repr(value)[1:-1], json.dumps(value)[1:-1]}
        longest_first = sorted(spelled, key=lambda word: (-len(word), word))
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if spelled else None

    def within(self, value: Any, by_key: bool) -> Any:
        """*value* without the secrets; *by_key*: also what stands under their names."""
        if isinstance(value, str):
            return self._text(value)
        if type(value) is Excerpt:
            # What stands under a secret name in there cannot be told, nor what the cut went through.
            return Excerpt(value, text=self._gone())
        if isinstance(value, dict):
            return {
                self._text(str(key)): self._gone()
                if by_key and item is not None and self._is_secret(str(key))
                else self.within(item, by_key)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.within(item, by_key) for item in value]
        return value

    def _gone(self) -> str:
        self.count += 1
        return REDACTED

    def _text(self, text: str) -> str:
        if text in self._whole:
            return self._gone()
        if self._pattern is None:
            return text
        text, count = self._pattern.subn(REDACTED, text)
        self.count += count
        return text
