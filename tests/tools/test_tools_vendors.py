"""Tools in each vendor's form: the vendors' own types accept them, and they mean what the function means."""

from __future__ import annotations

import datetime  # noqa: TC003 (annotations of tools are evaluated)
import json
import re
from decimal import Decimal  # noqa: TC003
from typing import Annotated, Any, Literal

import anthropic.types
import jsonschema
import mcp.types
import openai.types.chat
import openai.types.shared_params
import pytest
from pydantic import BaseModel, Field, TypeAdapter

from sandboxd import Sandbox
from sandboxd.tools import Dispatcher, Tool, tool
from sandboxd.tools.vendors import vendors


class Row(BaseModel):
    region: str
    amount: float = 0.0
    note: str | None = None


class Tree(BaseModel):
    value: int
    children: list[Tree] = []


class Circle(BaseModel):
    kind: Literal["circle"]
    radius: float


class Square(BaseModel):
    kind: Literal["square"]
    side: float = 1.0


Shape = Annotated[Circle | Square, Field(discriminator="kind")]


@tool(read_only=True, destructive=False)
def query(quarter: Literal["Q1", "Q2"], fields: list[str], row: Row | None = None, limit: int = 10) -> list[Row]:
    """Sales rows.

    Args:
        quarter: Which.
        limit: At most so many.
    """
    return [row or Row(region=quarter, amount=limit)]


@tool
def everything(
    row: Row,
    tree: Tree,
    shape: Shape,
    at: datetime.datetime,
    price: Decimal,
    raw: bytes = b"hi",
    name: Annotated[str, Field(min_length=1, max_length=5)] = "x",
    choice: Literal["a", 1] | None = None,
    rows: list[Row] = [],  # noqa: B006 (nobody changes it)
    colour: Literal["red", "blue"] = "red",
    shapes: list[Shape] | None = None,
) -> Row:
    """All kinds."""
    return row


@tool
def free(options: dict[str, Any], what: Any = None) -> int:
    """A free-form object."""
    return len(options)


@tool(callers=("code",), idempotent=True)
def only_code(pair: tuple[int, str]) -> None:
    """For code."""


@tool(callers=("model",))
def only_model() -> dict[str, int]:
    """For the model."""
    return {}


TOOLS: list[Tool] = [query, everything, free, only_code, only_model]


def functions() -> dict[str, dict[str, Any]]:
    with Dispatcher(TOOLS) as dispatcher:
        return {one["function"]["name"]: one["function"] for one in dispatcher.schemas("openai")}


# The vendors' types


def test_openai_types_accept_them() -> None:
    with Dispatcher(TOOLS) as dispatcher:
        made = dispatcher.schemas("openai")
    adapter = TypeAdapter(list[openai.types.chat.ChatCompletionFunctionToolParam])
    assert adapter.validate_python(made, extra="forbid") == made


def test_anthropic_types_accept_them() -> None:
    with Dispatcher(TOOLS) as dispatcher:
        made = dispatcher.schemas("anthropic")
    for one in made:
        TypeAdapter(anthropic.types.ToolParam).validate_python(one, extra="forbid")


def test_mcp_types_accept_them() -> None:
    with Dispatcher(TOOLS) as dispatcher:
        made = dispatcher.schemas("mcp")
    for one in made:
        again = mcp.types.Tool.model_validate(one).model_dump(mode="json", by_alias=True, exclude_none=True)
        assert again == one


def test_the_name_for_code_is_one_that_anthropic_knows() -> None:
    assert vendors.ANTHROPIC_CODE_CALLER in str(anthropic.types.ToolParam.__annotations__["allowed_callers"])


def test_run_code_is_among_them_when_there_is_a_sandbox() -> None:
    with Sandbox() as sandbox, Dispatcher([query], sandbox=sandbox) as dispatcher:
        assert [one["name"] for one in dispatcher.schemas("anthropic")] == ["query", "run_code"]
        assert [one["name"] for one in dispatcher.schemas("mcp")] == ["query", "run_code"]
        made = dispatcher.schemas("openai")
    assert [one["function"]["name"] for one in made] == ["query", "run_code"]
    assert made[1]["function"]["strict"] is True


def test_another_vendor_is_refused() -> None:
    with Dispatcher() as dispatcher, pytest.raises(ValueError, match="vendor"):
        dispatcher.schemas("acme")  # type: ignore[arg-type]


@pytest.mark.parametrize("vendor", ["openai", "anthropic", "mcp"])
def test_what_is_done_to_a_schema_does_not_reach_the_tool(vendor: Any) -> None:
    with Dispatcher(TOOLS) as dispatcher:
        before = json.dumps(dispatcher.schemas(vendor))
        for one in dispatcher.schemas(vendor):
            spoil(one)
        assert json.dumps(dispatcher.schemas(vendor)) == before


def spoil(value: Any) -> None:
    if isinstance(value, dict):
        for item in list(value.values()):
            spoil(item)
        value.clear()
    elif isinstance(value, list):
        for item in value:
            spoil(item)
        value.clear()


# Who may call


def test_callers_are_said_where_the_vendor_has_words_for_it() -> None:
    with Dispatcher(TOOLS) as dispatcher:
        callers = {one["name"]: one["allowed_callers"] for one in dispatcher.schemas("anthropic")}
        assert "only_code" not in [one["function"]["name"] for one in dispatcher.schemas("openai")]
        assert "only_code" not in [one["name"] for one in dispatcher.schemas("mcp")]
    code = vendors.ANTHROPIC_CODE_CALLER
    assert callers["query"] == ["direct", code]
    assert callers["only_code"] == [code]
    assert callers["only_model"] == ["direct"]


def test_without_anthropics_code_execution_tools_are_for_direct_calls() -> None:
    with Dispatcher(TOOLS) as dispatcher:
        made = dispatcher.schemas("anthropic", code_execution=None)
    assert "only_code" not in [one["name"] for one in made]
    assert {tuple(one["allowed_callers"]) for one in made} == {("direct",)}


# OpenAI's strict mode


def check_strict(schema: Any) -> None:
    """What the service asks of a schema in strict mode; it answers 400 to anything else."""
    if isinstance(schema, list):
        for part in schema:
            check_strict(part)
    if not isinstance(schema, dict):
        return
    allowed = {
        *("type", "enum", "const", "anyOf", "properties", "required", "additionalProperties", "items", "$ref", "$defs"),
        *("description", "pattern", "format", "multipleOf", "minimum", "maximum", "exclusiveMinimum"),
        *("exclusiveMaximum", "minItems", "maxItems"),
    }
    assert schema.keys() <= allowed, schema
    if "$ref" in schema:
        assert len(schema) == 1, schema
        return
    assert schema.keys() & {"type", "enum", "const", "anyOf"}, schema
    if "properties" in schema:
        assert schema["additionalProperties"] is False
        assert schema["required"] == list(schema["properties"])
    if schema.get("type") == "array":
        assert schema["items"]
    for key in ("properties", "$defs"):
        check_strict(list(schema.get(key, {}).values()))
    check_strict(schema.get("anyOf"))
    check_strict(schema.get("items"))


@pytest.mark.parametrize("name", ["query", "everything", "only_model"])
def test_strict_schemas_follow_the_rules_of_strict_mode(name: str) -> None:
    made = functions()[name]
    assert made["strict"] is True
    assert made["parameters"]["type"] == "object"
    check_strict(made["parameters"])
    jsonschema.Draft202012Validator.check_schema(made["parameters"])


@tool
def pairs(pair: tuple[int, str]) -> None: ...
@tool
def bare_list(items: list[Any]) -> None: ...
@tool
def table(rows: dict[str, int]) -> None: ...
@tool
def choices(what: Literal[tuple(str(n) for n in range(1001))]) -> None: ...  # type: ignore[valid-type]


@pytest.mark.parametrize("given", [free, pairs, bare_list, table, choices], ids=lambda given: given.name)
def test_what_strict_mode_cannot_say_is_offered_as_it_is(given: Tool) -> None:
    function = vendors.openai(given)["function"]
    assert function["strict"] is False
    assert function["parameters"] == given.arguments_schema


def test_optional_arguments_become_nullable_and_say_what_null_means() -> None:
    properties = functions()["query"]["parameters"]["properties"]
    assert properties["limit"] == {
        "type": ["integer", "null"],
        "description": "At most so many. (Null: 10 if left out.)",
    }
    assert properties["quarter"] == {"type": "string", "enum": ["Q1", "Q2"], "description": "Which."}


def test_a_length_that_strict_mode_cannot_say_is_said_in_words() -> None:
    name = functions()["everything"]["parameters"]["properties"]["name"]
    assert "at least 1 characters" in name["description"]
    assert "at most 5 characters" in name["description"]


RIGHT: dict[str, Any] = {
    "row": {"region": "x", "amount": None, "note": None},
    "tree": {"value": 1, "children": [{"value": 2, "children": None}]},
    "shape": {"kind": "square", "side": None},
    "at": "2024-07-31T12:00:00Z",
    "price": "1.5",
    "raw": None,
    "name": None,
    "choice": None,
    "rows": [{"region": "y", "amount": 1, "note": None}],
    "colour": None,
    "shapes": [{"kind": "square", "side": None}, {"kind": "circle", "radius": 1}],
}


def test_arguments_in_the_strict_form_reach_the_function_without_the_nulls() -> None:
    jsonschema.validate(RIGHT, functions()["everything"]["parameters"])
    arguments = vendors.from_openai(everything, RIGHT)
    assert arguments == {
        "row": {"region": "x", "note": None},
        "tree": {"value": 1, "children": [{"value": 2}]},
        "shape": {"kind": "square"},
        "at": "2024-07-31T12:00:00Z",
        "price": "1.5",
        "choice": None,
        "rows": [{"region": "y", "amount": 1, "note": None}],
        "shapes": [{"kind": "square"}, {"kind": "circle", "radius": 1}],
    }
    with Dispatcher([everything]) as dispatcher:
        assert dispatcher.call("everything", arguments).ok
        assert not dispatcher.call("everything", RIGHT).ok


def test_nulls_that_were_not_offered_stay() -> None:
    assert vendors.from_openai(free, {"options": {"a": None}, "what": None}) == {"options": {"a": None}, "what": None}
    assert vendors.from_openai(query, {"quarter": None, "other": None}) == {"quarter": None, "other": None}


@pytest.mark.parametrize("arguments", [{}, {"row": 1}, {"tree": []}, {"rows": {"a": None}}, {"shape": [None]}])
def test_wrong_arguments_are_left_to_the_pipeline(arguments: dict[str, Any]) -> None:
    assert vendors.from_openai(everything, arguments) == arguments


# MCP


def test_a_result_that_is_no_object_is_wrapped() -> None:
    with Dispatcher(TOOLS) as dispatcher:
        made = {one["name"]: one for one in dispatcher.schemas("mcp")}
        result = dispatcher.call("query", {"quarter": "Q1", "fields": []})
    schema = made["query"]["outputSchema"]
    assert schema["type"] == "object"
    jsonschema.validate(vendors.mcp_result(query, result.value), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(result.value, schema)


def test_a_result_that_is_an_object_is_sent_as_it_is() -> None:
    schema = vendors.mcp(everything)["outputSchema"]
    assert schema["type"] == "object"
    assert vendors.mcp_result(everything, {"region": "x"}) == {"region": "x"}
    jsonschema.validate({"region": "x", "amount": 1.0, "note": None}, schema)


def test_a_recursive_result_has_an_object_at_its_root() -> None:
    @tool
    def grow() -> Tree:
        return Tree(value=1)

    schema = vendors.mcp(grow)["outputSchema"]
    assert schema["type"] == "object"
    jsonschema.validate({"value": 1, "children": [{"value": 2, "children": []}]}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"value": 1, "children": [{"value": "2"}]}, schema)


def test_hints_are_given_where_the_author_gave_them() -> None:
    with Dispatcher(TOOLS) as dispatcher:
        made = {one["name"]: one for one in dispatcher.schemas("mcp")}
    assert made["query"]["annotations"] == {"readOnlyHint": True, "destructiveHint": False}
    assert "annotations" not in made["free"]
    assert vendors.mcp(only_code)["annotations"] == {"idempotentHint": True}


def test_names_fit_all_vendors() -> None:
    for made in TOOLS:
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", made.name)
