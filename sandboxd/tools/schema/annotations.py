"""JSON Schema in the words of Python's annotations: what types a tool's arguments and results have. Pure.

What JSON has and annotations have no word for is Any; what a schema says beyond its type (bounds, formats) is text.
"""

from __future__ import annotations

import json
import keyword
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeGuard

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["Names", "Record", "Types", "explained", "is_object", "spelled_value"]

DEPTH: Final = 16  # of types within types that are spelled out; what is deeper is Any

_PLAIN: Final = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None"}
_FORMATS: Final = {
    "date-time": "ISO 8601 date and time",
    "date": "ISO 8601 date",
    "time": "ISO 8601 time",
    "duration": "ISO 8601 duration",
    "uuid": "a UUID",
    "binary": "base64",
    "base64": "base64",
    "base64url": "base64url",
    "email": "an e-mail address",
    "uri": "a URI",
}
_BOUNDS: Final = (
    ("minimum", "at least {}"),
    ("exclusiveMinimum", "more than {}"),
    ("maximum", "at most {}"),
    ("exclusiveMaximum", "less than {}"),
    ("multipleOf", "a multiple of {}"),
    ("minLength", "at least {} characters"),
    ("maxLength", "at most {} characters"),
    ("minItems", "at least {} items"),
    ("maxItems", "at most {} items"),
    ("minProperties", "at least {} keys"),
    ("maxProperties", "at most {} keys"),
    ("pattern", "matching {}"),
)
_OWN_NAMES: Final = {"Any", "Literal", "NotRequired", "TypedDict", *_PLAIN.values(), "list", "dict", "tuple"}


class Record(NamedTuple):
    """An object with known keys: its name in the text and its schema."""

    name: str
    schema: Mapping[str, Any]
    fields: list[tuple[str, str, bool]]
    """Key, type, and whether it is always there."""


class Names:
    """The names of object types in one text. The same schema under the same name is one type; another gets a number."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self._known: dict[str, str] = {}
        self._taken = set(_OWN_NAMES)
        self._numbers: dict[str, int] = {}

    def of(self, wanted: str, key: str) -> tuple[str, bool]:
        """The name for the schema whose identity is *key*, and whether it is new."""
        if key in self._known:
            return self._known[key], False
        base = re.sub(r"\W+", "_", wanted, flags=re.ASCII).strip("_") or "Record"
        base = f"T{base}" if base[0].isdigit() or keyword.iskeyword(base) else base
        name, number = base, self._numbers.get(base, 1)
        while name in self._taken:
            number += 1
            name = f"{base}{number}"
        self._numbers[base] = number
        self._taken.add(name)
        self._known[key] = name
        return name, True


class Types:
    """Types of one schema, with its ``$defs``, as Python annotations."""

    def __init__(self, root: Mapping[str, Any], names: Names) -> None:
        self._root = root
        self._names = names

    def spelled(self, schema: Any, wanted: str, depth: int = DEPTH) -> str:
        """The annotation for *schema*; *wanted* names the type when it is an object that has no name."""
        if not is_object(schema) or depth == 0:
            return "Any"
        if "$ref" in schema:
            name, target = self._followed(schema["$ref"])
            return self.spelled(target, name, depth - 1)
        if "const" in schema:
            return _literal([schema["const"]])
        if "enum" in schema:
            return _literal(schema["enum"])
        for word in ("anyOf", "oneOf"):
            if word in schema:
                return _union(self.spelled(one, wanted, depth - 1) for one in schema[word])
        if len(schema.get("allOf", ())) == 1:
            return self.spelled(schema["allOf"][0], wanted, depth - 1)
        kind = schema.get("type")
        if isinstance(kind, list):
            return _union(self.spelled({**schema, "type": one}, wanted, depth - 1) for one in kind)
        if kind == "array":
            return self._array(schema, wanted, depth)
        if kind == "object":
            return self._object(schema, wanted, depth)
        return _PLAIN.get(kind, "Any") if isinstance(kind, str) else "Any"

    def _array(self, schema: Mapping[str, Any], wanted: str, depth: int) -> str:
        first = schema.get("prefixItems")
        if first and schema.get("maxItems") == len(first):
            parts = {self.spelled(one, wanted, depth - 1): None for one in first}
            return f"list[{_union(parts)}]"  # JSON has no tuples: what arrives is a list
        return f"list[{self.spelled(schema.get('items', True), wanted, depth - 1)}]"

    def _object(self, schema: Mapping[str, Any], wanted: str, depth: int) -> str:
        if not schema.get("properties"):
            return f"dict[str, {self.spelled(schema.get('additionalProperties', True), wanted, depth - 1)}]"
        title = schema.get("title")
        name, new = self._names.of(title if isinstance(title, str) and title else wanted, self._identity(schema))
        if new:
            record = Record(name, schema, [])
            self._names.records[name] = record
            required = schema.get("required", ())
            record.fields.extend(
                (one, self.spelled(inner, f"{name}_{one}", depth - 1), one in required)
                for one, inner in schema["properties"].items()
            )
        return name

    def _identity(self, schema: Mapping[str, Any]) -> str:
        """*schema* with all that it refers to: in another root the same reference may mean another type."""
        reached: dict[str, Any] = {}

        def bare(one: Any) -> Any:
            if isinstance(one, list):
                return [bare(inner) for inner in one]
            if not is_object(one):
                return one
            reference = one.get("$ref")
            if isinstance(reference, str) and reference not in reached:
                reached[reference] = None
                reached[reference] = bare(self._followed(reference)[1])
            # An argument is closed and a result open, which makes no other type of it.
            return {key: bare(inner) for key, inner in one.items() if (key, inner) != ("additionalProperties", False)}

        return json.dumps([bare(schema), reached], sort_keys=True, default=str)

    def _followed(self, reference: object) -> tuple[str, Any]:
        name = str(reference).removeprefix("#/$defs/").replace("~1", "/").replace("~0", "~")
        return name, self._root.get("$defs", {}).get(name, True)


def explained(schema: Any) -> str:
    """What a schema says beyond its type: its description, its format, its bounds."""
    if not is_object(schema):
        return ""
    description = schema.get("description")
    text = description.strip() if isinstance(description, str) else ""
    notes: list[str] = []
    # An optional value has its bounds in the one alternative that is not null.
    inner: list[dict[str, Any]] = [
        one for one in schema.get("anyOf", ()) if is_object(one) and one.get("type") != "null"
    ]
    for one in [schema, *(inner if len(inner) == 1 else ())]:
        form = one.get("format") or one.get("contentEncoding")
        if isinstance(form, str) and form in _FORMATS:
            notes.append(_FORMATS[form])
        notes += [words.format(spelled_value(one[word])) for word, words in _BOUNDS if word in one]
    if not notes:
        return text
    return f"{text} ({', '.join(dict.fromkeys(notes))})" if text else ", ".join(dict.fromkeys(notes))


def _literal(values: Sequence[Any]) -> str:
    plain = [one for one in values if one is None or isinstance(one, str | int | bool)]
    return f"Literal[{', '.join(map(spelled_value, plain))}]" if plain and len(plain) == len(values) else "Any"


def _union(kinds: Iterable[str]) -> str:
    each = list(dict.fromkeys(kinds)) or ["Any"]
    return "Any" if "Any" in each else " | ".join(each)


def spelled_value(value: Any) -> str:
    """A JSON value as Python writes it, in printable characters."""
    text = repr(value)
    return text if text.isprintable() else ascii(value)


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether *value* is a JSON object."""
    return isinstance(value, dict)
