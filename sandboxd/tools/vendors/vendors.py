"""Tools in the form that each vendor's interface takes. Plain values; no vendor's package is needed."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

from sandboxd.tools.result import shown
from sandboxd.tools.schema.fitting import Fitting, children, everywhere, resolve

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sandboxd.tools.pipeline.tool import Tool
    from sandboxd.tools.schema.fitting import Schema

# What Anthropic's interface calls code of its own container that calls tools.
ANTHROPIC_CODE_CALLER = "code_execution_20260120"

# Bounds of OpenAI's strict mode: levels of objects, properties in all, values of all enumerations.
_OPENAI_DEPTH, _OPENAI_PROPERTIES, _OPENAI_CHOICES = 10, 5000, 1000
_OPENAI_FORMATS = frozenset(("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"))
_OPENAI_KEYWORDS = frozenset(
    (
        *("type", "enum", "const", "anyOf", "properties", "required", "additionalProperties", "items", "$ref", "$defs"),
        *("description", "pattern", "format", "multipleOf", "minimum", "maximum"),
        *("exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems"),
    )
)
_SAID = {"minLength": "at least {} characters", "maxLength": "at most {} characters", "contentEncoding": "in {}"}


def schemas(
    vendor: str, tools: Iterable[Tool], code_execution: str | None = ANTHROPIC_CODE_CALLER
) -> list[dict[str, Any]]:
    """*tools* for "openai" (Chat Completions, strict where it can be), "anthropic" or "mcp". Raises ValueError.

    Tools that only code may call are left out of the first and the last, which know no such thing; of the second, when
    *code_execution*, the name of its own code as a caller, is None.
    """
    match vendor:
        case "openai":
            return [openai(tool) for tool in tools if "model" in tool.callers]
        case "anthropic":
            return [anthropic(tool, code_execution) for tool in tools if code_execution or "model" in tool.callers]
        case "mcp":
            return [mcp(tool) for tool in tools if "model" in tool.callers]
        case _:
            raise ValueError(f'A vendor is "openai", "anthropic" or "mcp", not {vendor!r}.')


def anthropic(tool: Tool, code_execution: str | None = ANTHROPIC_CODE_CALLER) -> dict[str, Any]:
    """An entry of ``tools`` in Anthropic's Messages interface."""
    names = {"model": "direct", **({"code": code_execution} if code_execution else {})}
    return {
        "name": tool.name,
        "description": tool.description,
        "input_schema": copy.deepcopy(tool.arguments_schema),
        "allowed_callers": [name for caller, name in names.items() if caller in tool.callers],
    }


def mcp(tool: Tool) -> dict[str, Any]:
    """A Tool of the Model Context Protocol. A result that is no object is to be sent as ``mcp_result`` wraps it."""
    hints = {
        "readOnlyHint": tool.read_only,
        "destructiveHint": tool.destructive,
        "idempotentHint": tool.idempotent,
    }
    made: dict[str, Any] = {
        "name": tool.name,
        "description": tool.description,
        "inputSchema": copy.deepcopy(tool.arguments_schema),
    }
    if tool.result_schema is not None:
        made["outputSchema"] = copy.deepcopy(_output(tool.result_schema))
    annotations = {name: value for name, value in hints.items() if value is not None}
    return {**made, "annotations": annotations} if annotations else made


def mcp_result(tool: Tool, value: Any) -> dict[str, Any] | None:
    """The ``structuredContent`` for *value*; None when *tool* declares no result."""
    if tool.result_schema is None:
        return None
    return cast("dict[str, Any]", value) if _is_object(tool.result_schema) else {"result": value}


def _is_object(schema: Schema) -> bool:
    return resolve(schema, schema).get("type") == "object"


def _output(schema: Schema) -> Schema:
    definitions = {"$defs": schema["$defs"]} if "$defs" in schema else {}
    if _is_object(schema):
        return {**resolve(schema, schema), **definitions}
    inner = {key: value for key, value in schema.items() if key != "$defs"}
    return {"type": "object", "properties": {"result": inner}, "required": ["result"], **definitions}


# OpenAI


def openai(tool: Tool) -> dict[str, Any]:
    """An entry of ``tools`` in OpenAI's Chat Completions interface.

    Strict mode lets the vendor enforce the schema, and knows no optional keys: those become nullable, and null then
    means "left out" (``from_openai``). A tool whose arguments cannot be said so is not strict.
    """
    strict = _is_strict(tool.arguments_schema)
    parameters = _strict(tool.arguments_schema, tool.arguments_schema) if strict else tool.arguments_schema
    return {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.description,
            "parameters": copy.deepcopy(parameters),
            "strict": strict,
        },
    }


def from_openai(tool: Tool, arguments: dict[str, Any]) -> dict[str, Any]:
    """*arguments* without the nulls that stand for "left out" in the form that ``openai`` offered."""
    schema = tool.arguments_schema
    if not _is_strict(schema):
        return arguments
    return cast("dict[str, Any]", _left_out(schema, arguments, Fitting(schema), 32))


def _left_out(schema: Schema, value: Any, fitting: Fitting, depth: int) -> Any:
    """*value* without nulls of optional keys that are not nullable by themselves."""
    root = fitting.root
    schema = resolve(schema, root)
    if depth == 0:
        return value
    if isinstance(value, dict):
        given = cast("dict[str, Any]", value)
        properties = _object_of(schema, given, root)
        required = properties.get("required", ())
        known: dict[str, Schema] = properties.get("properties", {})
        return {
            key: _left_out(known.get(key, {}), item, fitting, depth - 1)
            for key, item in given.items()
            if not (item is None and key in known and key not in required and not fitting.fits(known[key], None, {}))
        }
    if isinstance(value, list):
        items = schema.get("items")
        for part in schema.get("anyOf", ()):
            items = items or resolve(part, root).get("items")
        return [_left_out(items or {}, item, fitting, depth - 1) for item in cast("Iterable[Any]", value)]
    return value


def _object_of(schema: Schema, value: dict[str, Any], root: Schema) -> Schema:
    """The object schema that *value* was written for: of several, the first that knows all of its keys."""
    parts: list[Schema] = [schema, *schema.get("anyOf", ()), *schema.get("oneOf", ())]
    candidates = [resolve(part, root) for part in parts]
    return next((one for one in candidates if "properties" in one and value.keys() <= one["properties"].keys()), {})


def _nullable(schema: Schema, root: Schema) -> bool:
    return Fitting(root).fits(schema, None, {})


def _is_strict(schema: Schema) -> bool:
    parts = list(everywhere(schema))
    properties = sum(len(part.get("properties", {})) for part in parts)
    choices = sum(len(part.get("enum", ())) for part in parts)
    if properties > _OPENAI_PROPERTIES or choices > _OPENAI_CHOICES or _depth(schema) > _OPENAI_DEPTH:
        return False
    for part in parts:
        if not part.keys() & {"type", "enum", "const", "anyOf", "oneOf", "$ref"} or part.keys() & {
            "allOf",
            "prefixItems",
        }:
            return False  # any value at all, or a form that strict mode has no word for
        if part.get("type") == "object" and (part.get("additionalProperties") is not False or "properties" not in part):
            return False
        if part.get("type") == "array" and not part.get("items"):
            return False
    return True


def _depth(schema: Schema) -> int:
    """Levels of objects as they are written, each definition by itself: a recursive one has no other depth."""
    below = max((_depth(child) for child in children(schema)), default=0)
    return below + (schema.get("type") == "object")


def _strict(schema: Schema, root: Schema) -> Schema:
    """*schema* in the words of strict mode; what it has none for goes into the description."""
    if "$ref" in schema:
        return {"$ref": schema["$ref"]} if len(schema) == 1 else _beside_reference(schema, root)
    made: Schema = {}
    notes: list[str] = [schema["description"]] if schema.get("description") else []
    for key in schema:
        value: Any = schema[key]
        match key:
            case "anyOf" | "oneOf":
                made["anyOf"] = [_strict(part, root) for part in value]
            case "items":
                made[key] = _strict(value, root)
            case "$defs":
                made[key] = {name: _strict(part, root) for name, part in cast("dict[str, Schema]", value).items()}
            case "properties":
                made[key] = {
                    name: _strict(part, root) if name in schema.get("required", ()) else _optional(part, root)
                    for name, part in cast("dict[str, Schema]", value).items()
                }
            case "format" if value not in _OPENAI_FORMATS:
                notes.append(f"(Format: {value}.)")
            case _ if key in _SAID:
                notes.append(f"({_SAID[key].format(value)})")
            case _ if key in _OPENAI_KEYWORDS:
                made[key] = copy.deepcopy(value)
            case _:
                pass
    if "properties" in made:
        made["required"] = list(made["properties"])
        made["additionalProperties"] = False
    if notes:
        made["description"] = " ".join(notes)
    return made


def _beside_reference(schema: Schema, root: Schema) -> Schema:
    """A reference may have no keyword beside it in strict mode, but one of several choices may be one."""
    rest = {key: value for key, value in schema.items() if key != "$ref"}
    return {**_strict(rest, root), "anyOf": [{"$ref": schema["$ref"]}]}


def _optional(schema: Schema, root: Schema) -> Schema:
    """*schema*, or null."""
    default = schema.get("default")
    made = _strict({key: value for key, value in schema.items() if key != "default"}, root)
    if not _nullable(schema, root):
        if "anyOf" in made:
            made["anyOf"] = [*made["anyOf"], {"type": "null"}]
        elif isinstance(made.get("type"), str) and not made.keys() & {"enum", "const"}:
            made["type"] = [made["type"], "null"]
        else:
            description = {"description": made.pop("description")} if "description" in made else {}
            made = {"anyOf": [made, {"type": "null"}], **description}
        meaning = "Null" if default is None else f"Null: {shown(default)}"
        return {**made, "description": f"{made.get('description', '')} ({meaning} if left out.)".lstrip()}
    if default is not None:
        return {**made, "description": f"{made.get('description', '')} (Usually {shown(default)}.)".lstrip()}
    return made
