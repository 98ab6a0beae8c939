"""Whether JSON values fit a JSON Schema, fast and without a word; and what can be told of a schema by itself.

It knows the keywords that pydantic writes and no others.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Test = Callable[[Any, "Known"], bool]

Schema = dict[str, Any]
Known = dict[tuple[int, int], bool]
"""What was found out about parts of one value, by the ids of schema and part."""

# ISO 8601 as RFC 3339 writes it; the zone and the seconds may be absent, which RFC 3339 does not allow.
_TIME = r"\d\d:\d\d(:\d\d(\.\d{1,6})?)?([Zz]|[+-]\d\d:\d\d)?"
FORMATS = {
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
    """Whether pydantic would accept values that *schema* refuses, so that the schema must be asked first.

    It takes true for 1 in literals and enumerations, and reads several spellings of dates, UUIDs, decimals and base64.
    """
    return any(
        part.get("format") in FORMATS
        or "contentEncoding" in part
        or part.get("pattern") == DECIMAL
        or any(not isinstance(value, str | None) for value in choices(part))
        for part in everywhere(schema)
    )


def has_many_errors(schema: Schema) -> bool:
    """Whether a value of many parts can have many errors although the first one in each list, and under each free key,
    is the last one there.

    So it is where an object stands inside of its own kind, neither in a list nor under a free key; and where every
    unknown key is one error for each of several kinds of object.
    """
    definitions: dict[str, Schema] = schema.get("$defs", {})
    return any(_comes_again(part, schema) for part in definitions.values()) or any(
        [resolve(choice, schema).get("type") for choice in (*part.get("anyOf", ()), *part.get("oneOf", ()))].count(
            "object"
        )
        > 1
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


def choices(schema: Schema) -> list[Any]:
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


class Fitting:
    """Tests of values against *root* and the schemas in it, made when they are first asked for.

    The schemas must stay as they are. Safe in threads.
    """

    def __init__(self, root: Schema) -> None:
        self.root = root
        self._tests: dict[int, Test] = {}

    def fits(self, schema: Schema, value: object, known: Known) -> bool:
        """Whether *value* is what *schema*, a part of the root, says. *known* belongs to the value that this one is a
        part of, begins empty, and keeps choices between schemas from taking exponential time.
        """
        return self._test(schema)(value, known)

    def _test(self, schema: Schema) -> Test:
        found = self._tests.get(id(schema))
        if found is not None:
            return found

        def itself(value: Any, known: Known) -> bool:  # of a schema that comes again inside of itself
            return self._tests[id(schema)](value, known)

        self._tests[id(schema)] = itself
        made = self._tests[id(schema)] = self._made(schema)
        return made

    def _made(self, schema: Schema) -> Test:
        whole = resolve(schema, self.root)
        either: list[Schema] | None = whole.get("anyOf") or whole.get("oneOf")
        if either:
            return _any([self._test(part) for part in either])
        allowed = choices(whole)
        if allowed:
            return lambda value, _: any(same(value, one) for one in allowed)
        kind = whole.get("type")
        bounded = not _BOUNDS.isdisjoint(whole)
        if kind in _SCALARS and not bounded:
            return lambda value, _: of_type(value, kind)
        if kind in ("string", "number", "integer"):
            return lambda value, _: of_type(value, kind) and in_bounds(whole, value)
        return _remembered(id(schema), self._container(whole, kind, bounded))

    def _container(self, schema: Schema, kind: Any, bounded: bool) -> Test:
        of_object, of_list = self._object(schema), self._list(schema)

        def test(value: Any, known: Known) -> bool:
            if not of_type(value, kind) or (bounded and not in_bounds(schema, value)):
                return False
            if isinstance(value, dict):
                return of_object(value, known)
            return not isinstance(value, list | tuple) or of_list(value, known)

        return test

    def _object(self, schema: Schema) -> Test:
        required: frozenset[str] = frozenset(schema.get("required", ()))
        properties = {name: self._test(part) for name, part in schema.get("properties", {}).items()}
        rest = schema.get("additionalProperties", True)
        other = self._test(rest) if isinstance(rest, dict) else None
        named = self._test(schema["propertyNames"]) if other and "propertyNames" in schema else None

        def test(value: dict[str, Any], known: Known) -> bool:
            if not required <= value.keys():
                return False
            for name, item in value.items():
                one = properties.get(name)
                if one is None:
                    if rest is False or (named is not None and not named(name, known)):
                        return False
                    one = other
                if one is not None and not one(item, known):
                    return False
            return True

        return test

    def _list(self, schema: Schema) -> Test:
        first = [self._test(part) for part in schema.get("prefixItems", ())]
        items = schema.get("items")
        rest = self._test(items) if isinstance(items, dict) else None

        def test(value: Sequence[Any], known: Known) -> bool:
            if first:
                if not all(one(item, known) for one, item in zip(first, value, strict=False)):
                    return False
                value = value[len(first) :]
            if rest is not None:
                for item in value:
                    if not rest(item, known):
                        return False
            return True

        return test


def _any(tests: list[Test]) -> Test:
    def test(value: Any, known: Known) -> bool:
        for one in tests:  # noqa: SIM110 (a generator costs twice as much)
            if one(value, known):
                return True
        return False

    return test


def _remembered(schema: int, test: Test) -> Test:
    """*test*, made once for each list and object. Their ids are theirs, since they live as long as the whole value; and
    a part that is being looked at cannot come again below itself: values are trees.
    """

    def remembered(value: Any, known: Known) -> bool:
        if not isinstance(value, dict | list | tuple):
            return test(value, known)
        key = (schema, id(cast("object", value)))
        found = known.get(key)
        if found is None:
            found = known[key] = test(value, known)
        return found

    return remembered


def items_of(schema: Schema, value: Sequence[Any]) -> Iterator[tuple[Schema, Any, int]]:
    """The items of *value* that *schema* says something about, with what it says, and where they stand."""
    prefix: list[Schema] = schema.get("prefixItems", [])
    rest = schema.get("items")
    for index, item in enumerate(value):
        part = prefix[index] if index < len(prefix) else rest
        if isinstance(part, dict):
            yield cast("Schema", part), item, index


def same(one: object, other: object) -> bool:
    """Equality of JSON values: 1 and 1.0 are the same, 1 and true are not."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


_SCALARS = ("string", "number", "integer", "boolean", "null")
_BOUNDS = frozenset(
    (
        *("minLength", "maxLength", "format", "contentEncoding", "pattern", "minItems", "maxItems", "minProperties"),
        *("maxProperties", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    )
)


def of_type(value: object, kind: str | list[str] | None) -> bool:
    if kind is None:
        return True
    if isinstance(kind, list):
        return any(of_type(value, one) for one in kind)
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, _TYPES.get(kind, ()))


def in_bounds(schema: Schema, value: Any) -> bool:
    if isinstance(value, str):
        form = FORMATS.get(schema.get("format", ""))
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
