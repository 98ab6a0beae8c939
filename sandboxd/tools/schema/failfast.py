"""A validator that gives up at the first bad item of a list, a set, a tuple or an object.

pydantic's own collects an error for every bad field of every bad item, with no bound: one call of a megabyte could cost
gigabytes and many seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from pydantic_core import SchemaValidator, core_schema

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["COVERS_OBJECTS", "validator"]

COVERS_OBJECTS: Final = "fail_fast" in core_schema.DictSchema.__annotations__
"""Whether this pydantic can do so for objects of any keys."""

_MANY: Final = ("list", "set", "frozenset", "tuple", "dict")
# Where a core schema has others inside; what it has besides (defaults, metadata, classes) is not to be touched.
_BELOW: Final = (
    *("schema", "items_schema", "keys_schema", "values_schema", "fields", "choices", "definitions", "steps"),
    *("extras_schema", "extras_keys_schema", "json_schema", "python_schema", "lax_schema", "strict_schema"),
    *("arguments_schema",),
)


def validator(schema: Mapping[str, Any]) -> SchemaValidator:
    """A validator for the core *schema*, which accepts what pydantic's own accepts."""
    made = cast("core_schema.CoreSchema", _eager(schema))
    # Models have validators of their own already, which collect errors; they are made anew.
    return SchemaValidator(made, _use_prebuilt=False)


def _eager(part: Any) -> Any:
    """A copy of *part* of a core schema, a container of schemas among it, in which the first error ends it."""
    if isinstance(part, list | tuple):  # of items, choices, definitions; a choice may be a pair with its name
        return type(part)(_eager(one) for one in cast("list[Any]", part))
    if not isinstance(part, dict):
        return part
    schema = cast("dict[str, Any]", part)
    if not isinstance(schema.get("type"), str):  # fields by name, or choices by tag
        return {name: _eager(one) for name, one in schema.items()}
    made = {key: _eager(one) if key in _BELOW else one for key, one in schema.items()}
    return {**made, "fail_fast": True} if schema["type"] in _MANY else made
