"""JSON values at the border: read strictly, bounded before they are copied, written in one way.

Arguments come from a model or from hostile code: duplicate keys, NaN, infinities, lone surrogates and deep nesting are
refused. Results come from the host's own functions, whose size nobody promised: they are measured before anything
walks or copies them as a whole.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import enum
import functools
import ipaddress
import json
import math
import uuid
from collections import deque
from decimal import Decimal
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NoReturn, cast

from pydantic import AnyUrl, BaseModel, SecretBytes, SecretStr
from pydantic_core import MultiHostUrl, Url, to_jsonable_python

from sandboxd.tools.result import Refused, shown

if TYPE_CHECKING:
    from collections.abc import Iterable

ARGUMENTS_BYTES = 1 << 20  # of JSON
VALUES = 50_000  # in the arguments of one call: each costs far more than its bytes
DEPTH = 32  # of lists and objects in each other, arguments and results alike
SMALL_BYTES = 16 << 10  # of JSON: what takes no longer than a loop may be held, whatever is done to it
_FLAT = frozenset((str, bool, type(None)))  # nothing about them needs to be checked
_INT_BITS = 1024  # as many as the largest float has when it is read as an integer

_COMPACT = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def _bad(message: str, hint: str = "Send one JSON object that has the arguments' names as keys.") -> NoReturn:
    raise Refused("invalid_arguments", message, hint)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                _bad(f"The key {shown(key)} stands twice in one object.", "Give each key once.")
            seen.add(key)
    return made


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _bad(f"The number {shown(text)} is too large.")
    return value


def _constant(text: str) -> NoReturn:
    _bad(f"{text} is no JSON value.", "Use null, or leave the argument out.")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_float, parse_constant=_constant)


def parse(text: str | bytes | bytearray, most: int = ARGUMENTS_BYTES) -> Any:
    """The JSON value that *text* is. Raises Refused (invalid_arguments): not JSON, a duplicate key, over *most* bytes.

    What the value holds is for ``arguments_json`` to check.
    """
    if len(text) > most:
        _bad(f"The arguments are larger than {most} bytes of JSON.", "Send less, or in several calls.")
    try:
        return _DECODER.decode(text if isinstance(text, str) else bytes(text).decode())
    except json.JSONDecodeError as error:
        _bad(f"The arguments are not valid JSON: {error.msg} at character {error.pos}.")
    except UnicodeDecodeError:
        _bad("The arguments are not UTF-8 text.")
    except RecursionError:
        _bad(f"The arguments are nested deeper than {DEPTH} levels.", "Send a flatter value.")
    except ValueError:  # int() of more digits than the interpreter converts
        _bad("A number in the arguments has too many digits.")


def arguments_json(arguments: object) -> str:
    """Compact JSON of *arguments*, which must be JSON values within the bounds. Raises Refused (invalid_arguments)."""
    if not isinstance(arguments, dict):
        _bad(f"The arguments must be a JSON object, and {shown(arguments)} was given.")
    try:
        _check(cast("dict[object, object]", arguments), DEPTH, VALUES)
        text = _COMPACT(arguments)
    except (TypeError, ValueError, RecursionError, RuntimeError) as error:  # of odd subclasses, or changed meanwhile
        _bad(f"The arguments are not JSON values ({type(error).__name__}).")
    if len(text) > ARGUMENTS_BYTES:
        _bad(f"The arguments are larger than {ARGUMENTS_BYTES} bytes of JSON.", "Send less, or in several calls.")
    if "\\ud" in text and _surrogate(arguments):
        _bad("A text in the arguments is not valid Unicode: it holds half of a surrogate pair.")
    return text


def _surrogate(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def check(value: object) -> None:
    """Refuse what is no JSON value, or nested too deeply, or of too many values. Raises Refused (invalid_arguments)."""
    _check(value, DEPTH, VALUES)


def _check(value: object, depth: int, left: int) -> int:
    """Refuse what is no JSON value, nested deeper than *depth*, or of more than *left* values; what is left of them."""
    if isinstance(value, dict):
        if depth == 0:
            _bad(f"The arguments are nested deeper than {DEPTH} levels.", "Send a flatter value.")
        items = cast("dict[object, object]", value)
        left = _fewer(left, len(items))
        for key, item in items.items():
            if not isinstance(key, str):
                _bad(f"The keys of a JSON object are strings, and {shown(key)} is not.")
            if type(item) not in _FLAT:
                left = _check(item, depth - 1, left)
    elif isinstance(value, (list, tuple)):
        if depth == 0:
            _bad(f"The arguments are nested deeper than {DEPTH} levels.", "Send a flatter value.")
        sequence = cast("list[object]", value)
        left = _fewer(left, len(sequence))
        for item in sequence:
            if type(item) not in _FLAT:
                left = _check(item, depth - 1, left)
    elif isinstance(value, int):
        if value.bit_length() > _INT_BITS:
            _bad("An integer in the arguments is too large.")
    elif isinstance(value, float):
        if not math.isfinite(value):
            _bad("NaN and infinities are no JSON values.", "Use null, or leave the argument out.")
    elif not isinstance(value, str) and value is not None:
        _bad(f"A value of type {type(value).__name__} is no JSON value.")
    return left


def _fewer(left: int, count: int) -> int:
    if count > left:
        _bad(f"The arguments hold more than {VALUES} values.", "Send fewer, or in several calls.")
    return left - count


def is_small(value: object) -> bool:
    """Whether *value*, arguments as they came, is read and checked in a few milliseconds."""
    if isinstance(value, dict | list | tuple):
        try:
            return _least(cast("object", value), SMALL_BYTES, DEPTH) >= 0
        except (NotPlain, RuntimeError):  # refused sooner or later; or changed meanwhile
            return False
    if isinstance(value, str | bytes | bytearray):
        return len(value) <= SMALL_BYTES
    return value is None or isinstance(value, int | float)


def has_whole_floats(value: object) -> bool:
    """Whether ``whole_floats_as_integers`` would change anything."""
    if isinstance(value, float):
        return value.is_integer()
    if isinstance(value, dict):
        return any(map(has_whole_floats, cast("dict[str, object]", value).values()))
    return isinstance(value, list | tuple) and any(map(has_whole_floats, cast("Iterable[object]", value)))


def whole_floats_as_integers(value: Any) -> Any:
    """A copy of a JSON value in which 2.0 reads 2: to JSON Schema both are the same integer."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, dict):
        return {key: whole_floats_as_integers(item) for key, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [whole_floats_as_integers(item) for item in cast("Iterable[Any]", value)]
    return value


class TooLarge(Exception):
    """A result is over its bound; *size* is its length in bytes of JSON, None when nobody counted to the end."""

    def __init__(self, size: int | None) -> None:
        super().__init__(size)
        self.size = size


class NotPlain(Exception):
    """A result is no JSON value; the message says why."""


def measure(value: object, most: int) -> None:
    """Make sure that *value* can be walked and copied: at most DEPTH levels, at least in theory *most* bytes of JSON.

    Counts a lower bound and stops as soon as it is over. Raises TooLarge, NotPlain.
    """
    if _least(value, most, DEPTH) < 0:
        raise TooLarge(None)


def _least(value: object, left: int, depth: int) -> int:
    """What is left of *left* bytes after the JSON of *value*; below 0 when it is certainly too long."""
    kind = type(value)
    if kind is float or kind is bool or value is None:
        return left - 1
    if isinstance(value, int):
        return left - (value.bit_length() - 1) * 3 // 10 - 1  # log10(2) is a little more than 0.3
    if isinstance(value, (str, bytes, bytearray)):
        return left - len(value) - 2
    if isinstance(value, dict):
        items = cast("dict[object, object]", value)
        left -= 3 * len(items) + 1  # of each entry: two quotes, colon, a comma but for the last
        if left >= 0 and items:
            _deeper(depth)
            for key, item in items.items():
                if not isinstance(key, str):
                    raise NotPlain(f"the keys of a JSON object are strings, and one here is of type {_kind(key)}")
                left -= len(key) + 1
                left = left - len(item) - 2 if type(item) is str else _least(item, left, depth - 1)
                if left < 0:
                    break
        return left
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        sequence = cast("list[object]", value)
        left -= len(sequence) + 1
        if left >= 0 and sequence:
            _deeper(depth)
            for item in sequence:
                left = left - len(item) - 2 if type(item) is str else _least(item, left, depth - 1)
                if left < 0:
                    break
        return left
    if BaseModel in kind.__mro__:  # isinstance would ask an abstract base class, slowly
        model = cast("BaseModel", value)
        excluded = _excluded(type(model))
        fields = model.__dict__
        if excluded:
            fields = {name: item for name, item in fields.items() if name not in excluded}
        left = _least(fields, left, depth)
        return _least(model.__pydantic_extra__, left, depth) if left > 0 and model.__pydantic_extra__ else left
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _least(_fields(value), left, depth)
    return left - 1


@functools.lru_cache(maxsize=1000)
def _excluded(model: type[BaseModel]) -> frozenset[str]:
    """The fields of *model* that its JSON leaves out."""
    return frozenset(name for name, field in model.model_fields.items() if field.exclude)


def _deeper(depth: int) -> None:
    if depth == 0:
        raise NotPlain(f"it is nested deeper than {DEPTH} levels, or contains itself")


def _fields(value: Any) -> dict[str, object]:
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}


def _kind(value: object) -> str:
    return shown(type(value).__name__)


_TEXTUAL = (
    *(datetime.timedelta, PurePath, AnyUrl, Url, MultiHostUrl, SecretStr, SecretBytes),
    *(ipaddress.IPv4Address, ipaddress.IPv6Address, ipaddress.IPv4Network, ipaddress.IPv6Network),
    *(ipaddress.IPv4Interface, ipaddress.IPv6Interface),
)


def _convert(value: object) -> object:
    """What JSON has for a value that it does not know; its parts may again be such values."""
    match value:
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case bytes() | bytearray():
            return base64.b64encode(value).decode()
        case Decimal():
            if not value.is_finite():
                raise NotPlain("it holds a Decimal that is NaN or infinite")
            return str(value)
        case uuid.UUID():
            return str(value)
        case enum.Enum():
            return value.value
        case set() | frozenset() | deque():
            return list(cast("Iterable[object]", value))
        case BaseModel():
            return value.model_dump(by_alias=True, warnings="error")
        case _ if isinstance(value, _TEXTUAL):
            return to_jsonable_python(value)
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return _fields(value)
    raise NotPlain(f"a value of type {_kind(value)} has no JSON form")


_ENCODE = json.JSONEncoder(allow_nan=False, separators=(",", ":"), default=_convert).encode


def result_json(value: object, most: int) -> tuple[Any, str]:
    """Plain JSON values for *value*, which ``measure`` let pass, and their compact JSON.

    Nothing in them is shared with *value*. Raises TooLarge over *most* bytes, NotPlain.
    """
    kind = type(value)
    if value is None or kind is bool:
        return value, "null" if value is None else "true" if value else "false"
    try:
        text = _ENCODE(value)
    except ValueError as error:
        # NaN, a circle that a conversion made, an integer of more digits than the interpreter writes
        what = (
            "it holds NaN or an infinity" if "Out of range" in str(error) else "it contains itself, or a huge integer"
        )
        raise NotPlain(what) from None
    except RecursionError:
        raise NotPlain("it is nested too deeply, or contains itself") from None
    except TypeError:
        raise NotPlain("a key of an object in it has no JSON form") from None
    if len(text) > most:
        raise TooLarge(len(text))
    plain = value if kind is int or kind is str or kind is float else json.loads(text)
    if "\\ud" in text and _surrogate(plain):
        raise NotPlain("a text in it is not valid Unicode")
    return plain, text


def plain_copy(text: str) -> dict[str, Any]:
    """Fresh values for somebody who must not share them."""
    made: dict[str, Any] = json.loads(text)
    return made
