"""JSON values against a JSON Schema, in words that a model can act on.

pydantic decides what a function may get; this says why something was refused, from the same schema that the model was
shown. It also holds the line in the few places where pydantic reads more than the schema says (``needs_exact``).
It knows the keywords that pydantic writes and no others.
"""

from __future__ import annotations

import difflib
import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from sandboxd.tools.outcome import shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Schema = dict[str, Any]

# ISO 8601 as RFC 3339 writes it; the zone and the seconds may be absent, which RFC 3339 does not allow.
_TIME = r"\d\d:\d\d(:\d\d(\.\d{1,6})?)?([Zz]|[+-]\d\d:\d\d)?"
_FORMATS = {
    "date-time": (re.compile(rf"\d{{4}}-\d\d-\d\d[Tt ]{_TIME}", re.ASCII), "a date and time like 2024-07-31T12:30:00Z"),
    "date": (re.compile(r"\d{4}-\d\d-\d\d", re.ASCII), "a date like 2024-07-31"),
    "time": (re.compile(_TIME, re.ASCII), "a time of day like 12:30:00"),
    "duration": (
        re.compile(r"[+-]?P(?=[\dT])(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+(\.\d{1,6})?S)?)?)", re.ASCII),
        "an ISO 8601 duration like P1DT12H",
    ),
    "uuid": (
        re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"),
        "a UUID like 123e4567-e89b-12d3-a456-426614174000",
    ),
}
_BASE64 = re.compile(r"([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")
DECIMAL = r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?$"
_DECIMAL = re.compile(DECIMAL.removesuffix("$") + r"\Z")

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list, tuple),
    "string": (str,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_NOUNS = {
    "object": "an object",
    "array": "a list",
    "string": "a string",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: a sentence, and what may help."""

    text: str
    hint: str = ""


def children(schema: Schema) -> Iterator[Schema]:
    """The schemas right below *schema*."""
    for key in ("properties", "$defs"):
        yield from cast("dict[str, Schema]", schema.get(key, {})).values()
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        yield from cast("list[Schema]", schema.get(key, ()))
    for key in ("items", "additionalProperties", "propertyNames"):
        if isinstance(schema.get(key), dict):
            yield schema[key]


def everywhere(schema: Schema) -> Iterator[Schema]:
    """*schema* and all schemas below it."""
    yield schema
    for child in children(schema):
        yield from everywhere(child)


def needs_exact(schema: Schema) -> bool:
    """Whether pydantic would accept values that *schema* refuses, so that ``problems`` must be asked first.

    It takes true for 1 in literals and enumerations, and reads several spellings of dates, UUIDs, decimals and base64.
    """
    return any(
        part.get("format") in _FORMATS
        or "contentEncoding" in part
        or part.get("pattern") == DECIMAL
        or any(not isinstance(value, str | None) for value in _choices(part))
        for part in everywhere(schema)
    )


def is_ambiguous(schema: Schema) -> bool:
    """Whether *schema* has a choice between several objects, or several lists, that comes again inside of itself.

    pydantic tries all of them on every level: a value as deep as may be given would keep it busy for hours.
    """
    for part in everywhere(schema):
        kinds = [resolve(choice, schema).get("type") for choice in part.get("anyOf", ())]
        if max(kinds.count("object"), kinds.count("array")) > 1 and _comes_again(part, schema):
            return True
    return False


def _comes_again(part: Schema, root: Schema) -> bool:
    seen: set[int] = set()
    waiting = list(children(part))
    while waiting:
        here = waiting.pop()
        if here is part:
            return True
        if id(here) not in seen:
            seen.add(id(here))
            waiting += children(here)
            reference = here.get("$ref")
            if isinstance(reference, str):
                waiting.append(root.get("$defs", {}).get(reference.removeprefix("#/$defs/"), {}))
    return False


def _choices(schema: Schema) -> list[Any]:
    return [schema["const"]] if "const" in schema else cast("list[Any]", schema.get("enum", []))


def resolve(schema: Schema, root: Schema) -> Schema:
    """*schema*, or what its "$ref" points to in *root*, with the keywords beside it."""
    for _ in range(32):  # longer chains are circles
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            break
        target: Schema = root.get("$defs", {}).get(reference.removeprefix("#/$defs/"), {})
        schema = {**target, **{key: value for key, value in schema.items() if key != "$ref"}}
    return schema


def describe(schema: Schema, root: Schema, depth: int = 3) -> str:
    """What *schema* allows, as the end of "it must be"."""
    schema = resolve(schema, root)
    choices = _choices(schema)
    if choices:
        listed = ", ".join(shown(value) for value in choices[:12])
        more = f" and {len(choices) - 12} more" if len(choices) > 12 else ""
        return f"one of {listed}{more}" if len(choices) > 1 else listed
    either = schema.get("anyOf") or schema.get("oneOf")
    if either:
        return " or ".join(dict.fromkeys(describe(part, root, depth - 1) for part in either)) if depth else "a value"
    kind = schema.get("type")
    if kind == "string":
        if schema.get("format") in _FORMATS:
            return _FORMATS[schema["format"]][1]
        if "contentEncoding" in schema:
            return "base64 text"
        if schema.get("pattern") == DECIMAL:
            return "a decimal number as a string"
        named = f" (format {schema['format']})" if "format" in schema else ""
        matching = f" that matches {schema['pattern']}" if "pattern" in schema else ""
        return f"a string{named}{_span(schema, 'minLength', 'maxLength', 'characters')}{matching}"
    if kind in ("integer", "number"):
        return _NOUNS[kind] + _range(schema)
    if kind == "array":
        of = describe(schema["items"], root, depth - 1) if depth and schema.get("items") else ""
        return f"a list{_span(schema, 'minItems', 'maxItems', 'items')}" + (f", each item {of}" if of else "")
    if kind == "object" and schema.get("properties"):
        return f"an object with {_keys(schema)}"
    if isinstance(kind, list):
        return " or ".join(_NOUNS.get(part, "a value") for part in cast("list[str]", kind))
    return _NOUNS.get(kind or "", "any JSON value")


def _keys(schema: Schema) -> str:
    required = schema.get("required", [])
    return ", ".join(name if name in required else f"{name} (optional)" for name in schema["properties"])


def _span(schema: Schema, low: str, high: str, unit: str) -> str:
    least, most = schema.get(low), schema.get(high)
    if least is not None and most is not None:
        return f" of {least} {unit}" if least == most else f" of {least} to {most} {unit}"
    if least is not None:
        return f" of at least {least} {unit}"
    return "" if most is None else f" of at most {most} {unit}"


def _range(schema: Schema) -> str:
    words = [
        f"{word} {schema[key]}"
        for key, word in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "more than"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "less than"),
            ("multipleOf", "a multiple of"),
        )
        if key in schema
    ]
    return f", {' and '.join(words)}" if words else ""


def nearest(name: object, names: Sequence[str]) -> str | None:
    """The one of *names* that *name* was probably meant to be."""
    if not isinstance(name, str) or len(name) > 200:
        return None
    folded = {other.casefold(): other for other in reversed(names)}
    found = difflib.get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.5)
    return folded[found[0]] if found else None


def problems(schema: Schema, value: object, root: Schema) -> list[Problem]:
    """Where *value* is not what *schema* says; at most a few, since one mistake often makes many."""
    return list(itertools.islice(_Walk(root).problems(schema, value, ""), 4))


class _Walk:
    """One value against one schema. Visits each pair of a schema and a part of the value once or twice, however the
    choices between schemas are nested: a model's choice of words must not take exponential time.
    """

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._known: dict[tuple[int, int], bool] = {}

    def _fits(self, schema: Schema, value: object) -> bool:
        # Both objects live as long as the walk, so their ids are theirs. A pair that is being looked at cannot come
        # again below itself: values are trees.
        key = (id(schema), id(value))
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = next(self.problems(schema, value, ""), None) is None
        return known

    def problems(self, schema: Schema, value: Any, path: str) -> Iterator[Problem]:
        root = self._root
        schema = resolve(schema, root)
        either: list[Schema] | None = schema.get("anyOf") or schema.get("oneOf")
        if either:
            yield from self._of_either(schema, either, value, path)
            return
        choices = _choices(schema)
        if choices:
            if not any(_same(value, choice) for choice in choices):
                near = nearest(value, [choice for choice in choices if isinstance(choice, str)])
                yield _mismatch(schema, value, root, path, near)
            return
        if not _of_type(value, schema.get("type")) or not _in_bounds(schema, value):
            yield _mismatch(schema, value, root, path)
        elif isinstance(value, dict):
            yield from self._of_object(schema, cast("dict[str, Any]", value), path)
        elif isinstance(value, list | tuple):
            items = cast("Sequence[Any]", value)
            prefix: list[Schema] = schema.get("prefixItems", [])
            rest: Schema | None = schema["items"] if isinstance(schema.get("items"), dict) else None
            for index, item in enumerate(items):
                part = prefix[index] if index < len(prefix) else rest
                if part is not None:
                    yield from self.problems(part, item, _join(path, index))

    def _of_either(self, schema: Schema, either: list[Schema], value: Any, path: str) -> Iterator[Problem]:
        if any(self._fits(part, value) for part in either):
            return
        parts = [resolve(part, self._root) for part in either]
        alike = [
            part for part in parts if part.get("type") in ("object", "array") and _of_type(value, part.get("type"))
        ]
        # Of several objects, the one that the words of the value point to: {"kind": "circle"}.
        pointed = alike if len(alike) == 1 else [part for part in alike if _points_to(part, value, self._root)]
        if len(pointed) == 1:
            yield from self.problems(pointed[0], value, path)
        else:
            words = [choice for part in parts for choice in _choices(part) if isinstance(choice, str)]
            yield _mismatch(schema, value, self._root, path, nearest(value, words))

    def _of_object(self, schema: Schema, value: dict[str, Any], path: str) -> Iterator[Problem]:
        root = self._root
        properties: dict[str, Schema] = schema.get("properties", {})
        rest = schema.get("additionalProperties", True)
        missing = [name for name in schema.get("required", ()) if name not in value]
        for name, item in value.items():
            where = _join(path, name)
            if name in properties:
                yield from self.problems(properties[name], item, where)
            elif isinstance(rest, dict):
                if "propertyNames" in schema:
                    yield from self.problems(schema["propertyNames"], name, where)
                yield from self.problems(cast("Schema", rest), item, where)
            elif rest is False:
                near = nearest(name, missing or list(properties))
                taken = f"it takes {_keys(schema)}" if properties else "it takes none"
                yield Problem(f"{where} is unknown; {taken}.", f"Did you mean {near}?" if near else "")
        for name in missing:
            yield Problem(f"{_join(path, name)} is missing; it must be {describe(properties.get(name, {}), root)}.")


def _points_to(schema: Schema, value: object, root: Schema) -> bool:
    """Whether *value*, an object, has the fixed words that *schema* is told by."""
    if not isinstance(value, dict):
        return False
    given = cast("dict[str, Any]", value)
    fixed = {name: _choices(resolve(part, root)) for name, part in schema.get("properties", {}).items()}
    told = {name: choices for name, choices in fixed.items() if len(choices) == 1}
    return bool(told) and all(given.get(name) == choices[0] for name, choices in told.items())


def _mismatch(schema: Schema, value: object, root: Schema, path: str, near: str | None = None) -> Problem:
    return Problem(
        f"{path or 'The value'} is {shown(value)}; it must be {describe(schema, root)}.",
        "" if near is None else f"Did you mean {shown(near)}?",
    )


def _join(path: str, key: str | int) -> str:
    text = key if isinstance(key, str) and key.isidentifier() else str(key) if isinstance(key, int) else shown(key)
    return f"{path}.{text}" if path else text


def _same(one: object, other: object) -> bool:
    """Equality of JSON values: 1 and 1.0 are the same, 1 and true are not."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _of_type(value: object, kind: str | list[str] | None) -> bool:
    if kind is None:
        return True
    if isinstance(kind, list):
        return any(_of_type(value, one) for one in kind)
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, _TYPES.get(kind, ()))


def _in_bounds(schema: Schema, value: Any) -> bool:
    if isinstance(value, str):
        form = _FORMATS.get(schema.get("format", ""))
        return (
            schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
            and (form is None or form[0].fullmatch(value) is not None)
            and ("contentEncoding" not in schema or _BASE64.fullmatch(value) is not None)
            and (schema.get("pattern") != DECIMAL or _DECIMAL.match(value) is not None)
        )
    if isinstance(value, list | tuple):
        count = len(cast("Sequence[object]", value))
        return bool(schema.get("minItems", 0) <= count <= schema.get("maxItems", count))
    if isinstance(value, dict):
        count = len(cast("dict[str, object]", value))
        return bool(schema.get("minProperties", 0) <= count <= schema.get("maxProperties", count))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return bool(
            schema.get("minimum", value) <= value <= schema.get("maximum", value)
            and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
            and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
        )
    return True
