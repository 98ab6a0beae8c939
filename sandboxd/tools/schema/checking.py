"""JSON values against a JSON Schema, in words that a model can act on.

pydantic decides what a function may get; this says why something was refused, from the same schema that the model was
shown. It also holds the line in the few places where pydantic reads more than the schema says (``needs_exact``).
"""

from __future__ import annotations

import difflib
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from sandboxd.tools.result import shown
from sandboxd.tools.schema.fitting import (
    DECIMAL,
    FORMATS,
    Fitting,
    choices,
    in_bounds,
    items_of,
    of_type,
    resolve,
    same,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sandboxd.tools.schema.fitting import Known, Schema

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


def describe(schema: Schema, root: Schema, depth: int = 3) -> str:
    """What *schema* allows, as the end of "it must be"."""
    schema = resolve(schema, root)
    allowed = choices(schema)
    if allowed:
        listed = ", ".join(shown(value) for value in allowed[:12])
        more = f" and {len(allowed) - 12} more" if len(allowed) > 12 else ""
        return f"one of {listed}{more}" if len(allowed) > 1 else listed
    either = schema.get("anyOf") or schema.get("oneOf")
    if either:
        return " or ".join(dict.fromkeys(describe(part, root, depth - 1) for part in either)) if depth else "a value"
    kind = schema.get("type")
    if kind == "string":
        if schema.get("format") in FORMATS:
            return FORMATS[schema["format"]][1]
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


class Checker:
    """Says what is wrong with values, by one *schema*, which must stay as it is. Safe in threads."""

    def __init__(self, schema: Schema) -> None:
        self._fitting = Fitting(schema)

    def problems(self, value: object) -> list[Problem]:
        """Where *value* is not what the schema says; at most a few, since one mistake often makes many."""
        known: Known = {}
        root = self._fitting.root
        if self._fitting.fits(root, value, known):
            return []
        return list(itertools.islice(_Walk(self._fitting, known).problems(root, value, ""), 4))


class _Walk:
    """From a value that does not fit down to its parts that do not; *known* is what is found out about it."""

    def __init__(self, fitting: Fitting, known: Known) -> None:
        self._fitting = fitting
        self._root = fitting.root
        self._known = known

    def _fits(self, schema: Schema, value: object) -> bool:
        return self._fitting.fits(schema, value, self._known)

    def problems(self, schema: Schema, value: Any, path: str) -> Iterator[Problem]:
        """Where it is not."""
        root = self._root
        schema = resolve(schema, root)
        either: list[Schema] | None = schema.get("anyOf") or schema.get("oneOf")
        if either:
            yield from self._of_either(schema, either, value, path)
            return
        allowed = choices(schema)
        if allowed:
            if not any(same(value, choice) for choice in allowed):
                near = nearest(value, [choice for choice in allowed if isinstance(choice, str)])
                yield _mismatch(schema, value, root, path, near)
            return
        if not of_type(value, schema.get("type")) or not in_bounds(schema, value):
            yield _mismatch(schema, value, root, path)
        elif isinstance(value, dict):
            yield from self._of_object(schema, cast("dict[str, Any]", value), path)
        elif isinstance(value, list | tuple):
            for part, item, index in items_of(schema, cast("Sequence[Any]", value)):
                if not self._fits(part, item):
                    yield from self.problems(part, item, _join(path, index))

    def _of_either(self, schema: Schema, either: list[Schema], value: Any, path: str) -> Iterator[Problem]:
        if any(self._fits(part, value) for part in either):
            return
        parts = [resolve(part, self._root) for part in either]
        alike = [part for part in parts if part.get("type") in ("object", "array") and of_type(value, part.get("type"))]
        # Of several objects, the one that the words of the value point to: {"kind": "circle"}.
        pointed = alike if len(alike) == 1 else [part for part in alike if _points_to(part, value, self._root)]
        if len(pointed) == 1:
            yield from self.problems(pointed[0], value, path)
        else:
            words = [choice for part in parts for choice in choices(part) if isinstance(choice, str)]
            yield _mismatch(schema, value, self._root, path, nearest(value, words))

    def _of_object(self, schema: Schema, value: dict[str, Any], path: str) -> Iterator[Problem]:
        root = self._root
        properties: dict[str, Schema] = schema.get("properties", {})
        rest = schema.get("additionalProperties", True)
        missing = [name for name in schema.get("required", ()) if name not in value]
        for name, item in value.items():
            if name in properties:
                if not self._fits(properties[name], item):
                    yield from self.problems(properties[name], item, _join(path, name))
            elif isinstance(rest, dict):
                if "propertyNames" in schema:
                    yield from self.problems(schema["propertyNames"], name, _join(path, name))
                if not self._fits(cast("Schema", rest), item):
                    yield from self.problems(cast("Schema", rest), item, _join(path, name))
            elif rest is False:
                near = nearest(name, missing or list(properties))
                taken = f"it takes {_keys(schema)}" if properties else "it takes none"
                yield Problem(f"{_join(path, name)} is unknown; {taken}.", f"Did you mean {near}?" if near else "")
        for name in missing:
            yield Problem(f"{_join(path, name)} is missing; it must be {describe(properties.get(name, {}), root)}.")


def _points_to(schema: Schema, value: object, root: Schema) -> bool:
    """Whether *value*, an object, has the fixed words that *schema* is told by."""
    if not isinstance(value, dict):
        return False
    given = cast("dict[str, Any]", value)
    fixed = {name: choices(resolve(part, root)) for name, part in schema.get("properties", {}).items()}
    told = {name: allowed for name, allowed in fixed.items() if len(allowed) == 1}
    return bool(told) and all(given.get(name) == allowed[0] for name, allowed in told.items())


def _mismatch(schema: Schema, value: object, root: Schema, path: str, near: str | None = None) -> Problem:
    return Problem(
        f"{path or 'The value'} is {shown(value)}; it must be {describe(schema, root)}.",
        "" if near is None else f"Did you mean {shown(near)}?",
    )


def _join(path: str, key: str | int) -> str:
    text = key if isinstance(key, str) and key.isidentifier() else str(key) if isinstance(key, int) else shown(key)
    return f"{path}.{text}" if path else text
