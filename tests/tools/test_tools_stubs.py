"""Stubs: what a model and a program read of a tool is true, and nothing in it breaks out of its place."""

from __future__ import annotations

import ast
import inspect
import typing
from types import SimpleNamespace
from typing import Annotated, Any, Literal, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from sandboxd.protocol.run_header import MODULE_BYTES
from sandboxd.tools import Tool, tool
from sandboxd.tools.schema.stubs import cell_module, prompt_stubs, signature


class Row(BaseModel):
    """One row of the table."""

    region: Annotated[str, Field(description="Where it was sold.")]
    amount: float
    parent: Row | None = None


class Filter(TypedDict, total=False):
    region: str


@tool
def query_sales(
    quarter: Literal["Q1", "Q2"],
    fields: list[str],
    limit: Annotated[int, Field(ge=1, le=100)] = 10,
    only: Filter | None = None,
) -> list[Row]:
    """Sales rows of one quarter.

    Args:
        quarter: Which quarter of the year.
    """
    raise NotImplementedError


@tool(callers=("model",))
def send_email(text: str) -> None:
    """Not for code."""


class Default:
    """As in a cell: stands for "not given"."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def executed(source: str) -> dict[str, Any]:
    """The names of the module after it ran as a cell runs it, with a ``_call`` that returns what it got."""

    def call(name: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return name, {key: value for key, value in arguments.items() if not isinstance(value, Default)}

    names: dict[str, Any] = {"__name__": "tools", "_call": call, "_Default": Default}
    exec(compile(source, "tools", "exec", dont_inherit=True), names)  # noqa: S102 (what a cell does with it)
    return names


def made_of(
    properties: dict[str, Any],
    *,
    description: str = "",
    required: list[str] | None = None,
    result: dict[str, Any] | None = None,
    definitions: dict[str, Any] | None = None,
) -> Tool:
    """A tool as far as stubs look at one, of any schema."""
    schema = {"type": "object", "properties": properties, "required": required or [], "$defs": definitions or {}}
    return cast(
        "Tool",
        SimpleNamespace(
            name="probe",
            description=description,
            arguments_schema=schema,
            result_schema=result,
            callers=frozenset(("code",)),
        ),
    )


def test_signature_says_types_and_defaults() -> None:
    assert signature(query_sales) == (
        "query_sales(quarter: Literal['Q1', 'Q2'], fields: list[str], limit: int = 10, only: Filter | None = None)"
        " -> list[Row]"
    )


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, "str"),
        ({"type": "integer"}, "int"),
        ({"type": "number"}, "float"),
        ({"type": "boolean"}, "bool"),
        ({"type": "null"}, "None"),
        ({"type": ["string", "null"]}, "str | None"),
        ({"enum": ["a", 1, True, None]}, "Literal['a', 1, True, None]"),
        ({"const": "x"}, "Literal['x']"),
        ({"enum": [1.5]}, "Any"),
        ({"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}, "list[list[int]]"),
        ({"type": "array"}, "list[Any]"),
        (
            {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "minItems": 2, "maxItems": 2},
            "list[str | int]",
        ),
        ({"type": "object", "additionalProperties": {"type": "number"}}, "dict[str, float]"),
        ({"type": "object"}, "dict[str, Any]"),
        ({"anyOf": [{"type": "string"}, {"type": "string"}]}, "str"),
        ({"anyOf": [{"type": "string"}, {}]}, "Any"),
        ({"allOf": [{"type": "string"}]}, "str"),
        ({"$ref": "#/$defs/Missing"}, "Any"),
        (True, "Any"),
    ],
)
def test_json_types_become_python_types(schema: Any, expected: str) -> None:
    assert signature(made_of({"value": schema}, required=["value"])) == f"probe(value: {expected}) -> Any"


def test_prompt_names_object_types_once_and_closed_arguments_are_no_other_type() -> None:
    @tool
    def put(row: Row) -> Row:
        """Put one back."""
        return row

    text = prompt_stubs([query_sales, put])

    classes = [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    assert classes == ["Filter", "Row"]
    assert "region: str  # Where it was sold." in text
    assert "parent: NotRequired[Row | None]" in text


def test_types_of_one_name_and_different_meaning_are_told_apart() -> None:
    one = {"type": "object", "title": "Row", "properties": {"a": {"type": "string"}}}
    other = {"type": "object", "title": "Row", "properties": {"b": {"type": "string"}}}

    assert signature(made_of({"x": one, "y": other}, required=["x", "y"])) == "probe(x: Row, y: Row2) -> Any"


def test_types_with_the_same_reference_in_different_schemas_are_told_apart() -> None:
    inner = {"type": "object", "properties": {"next": {"$ref": "#/$defs/B"}}}
    first = made_of({"x": {"$ref": "#/$defs/A"}}, definitions={"A": inner, "B": {"type": "string"}})
    second = made_of({"x": {"$ref": "#/$defs/A"}}, definitions={"A": inner, "B": {"type": "integer"}})

    text = prompt_stubs([first, second])

    assert "class A(TypedDict):\n    next: NotRequired[str]" in text
    assert "class A2(TypedDict):\n    next: NotRequired[int]" in text


def test_only_tools_for_code_are_in_it() -> None:
    assert "send_email" not in prompt_stubs([query_sales, send_email])
    assert "send_email" not in cell_module([query_sales, send_email])
    assert prompt_stubs([send_email]) == ""
    assert cell_module([send_email]) == ""


def test_module_calls_with_what_was_given_and_leaves_out_defaults() -> None:
    function = executed(cell_module([query_sales]))["query_sales"]

    assert function("Q1", fields=["region"]) == ("query_sales", {"quarter": "Q1", "fields": ["region"]})
    assert function(quarter="Q1", fields=[], limit=3)[1] == {"quarter": "Q1", "fields": [], "limit": 3}


def test_module_tells_help_what_it_needs() -> None:
    function = executed(cell_module([query_sales]))["query_sales"]

    assert str(inspect.signature(function)) == (
        "(quarter: \"Literal['Q1', 'Q2']\", fields: 'list[str]', limit: 'int' = 10, only: 'Filter | None' = None)"
        " -> 'list[Row]'"
    )
    text = inspect.getdoc(function) or ""
    assert text.startswith("Sales rows of one quarter.")
    assert "quarter: Which quarter of the year." in text
    assert "limit: at least 1, at most 100" in text
    assert "Row is a dict:\n    region: str  Where it was sold." in text


def test_required_arguments_come_first() -> None:
    probe = made_of({"late": {"default": 1}, "early": {"type": "string"}}, required=["early"])

    assert executed(cell_module([probe]))["probe"]("x") == ("probe", {"early": "x"})


def test_a_default_that_json_cannot_say_is_an_ellipsis() -> None:
    assert signature(made_of({"x": {"type": "string"}})) == "probe(x: str = ...) -> Any"


@pytest.mark.parametrize("name", ["a-b", "class", "", "1a", "_call", "_Default", "ﬁ", "x\n", "__class__"])
def test_names_that_python_has_not_are_given_as_a_mapping(name: str) -> None:
    source = cell_module([made_of({name: {"type": "string"}}, required=[name])])

    assert executed(source)["probe"](**{name: "v"}) == ("probe", {name: "v"})
    ast.parse(prompt_stubs([made_of({name: {"type": "string"}}, required=[name])]))


def test_keys_that_python_has_not_are_still_typed() -> None:
    result = {"type": "object", "title": "Odd", "properties": {"a-b": {"type": "integer"}}, "required": ["a-b"]}

    assert "Odd = TypedDict('Odd', {'a-b': 'int'})" in prompt_stubs([made_of({}, result=result)])


def test_a_recursive_type_ends() -> None:
    # As deep as it goes in types without a name, which could not refer to themselves.
    endless: dict[str, Any] = {"type": "array"}
    endless["items"] = endless

    assert signature(made_of({"x": endless}, required=["x"])).count("list[") == 16


def test_a_module_that_no_cell_takes_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"a cell takes 262,144\. Shorten them or grant fewer"):
        cell_module([made_of({}, description="x" * MODULE_BYTES)])


# Text that could break out: quotes, backslashes, line ends of every kind, NUL, halves of surrogate pairs.
AWKWARD = st.text(
    st.one_of(
        st.sampled_from("'\"\\\n\r\t\0#{}()x \x0c\x1b\x85\u2028\ud800\udfff"),
        st.characters(),
    ),
    max_size=40,
)
BREAKOUTS = ['"""', "'''\\", '\\"""', "\\", '"', '""', 'x\n"""\nimport os\n', "\\N{DASH}", "\r\nraise", "{0}%s"]


@given(AWKWARD, AWKWARD, AWKWARD, AWKWARD)
@example(BREAKOUTS[0], BREAKOUTS[1], BREAKOUTS[2], BREAKOUTS[3])
@example(BREAKOUTS[4], BREAKOUTS[5], BREAKOUTS[6], BREAKOUTS[7])
@example(BREAKOUTS[8], BREAKOUTS[9], BREAKOUTS[0], BREAKOUTS[3])
def test_no_text_breaks_out(description: str, told: str, value: str, title: str) -> None:
    record = {"type": "object", "title": title, "description": told, "properties": {"k": {"description": value}}}
    probe = made_of(
        {"x": {"enum": [value], "description": told}, "y": {"default": value}, "z": record, title: record},
        description=description,
        required=["x"],
        result={"type": "array", "items": {**record, "properties": {value: {"description": told}}}},
    )

    for source in (cell_module([probe]), prompt_stubs([probe])):
        # Nothing but what there should be: functions with a docstring, and in the prompt the types.
        kinds = {type(node) for node in ast.parse(source).body}
        assert kinds <= {ast.FunctionDef, ast.ClassDef, ast.Assign}
        functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
        assert [node.name for node in functions] == ["probe"]
        assert ast.dump(ast.parse(source)).count("Import") == 0
    names = executed(cell_module([probe]))
    if description:
        assert names["probe"].__doc__.startswith(description)


@given(AWKWARD)
@example('"')
@example("\\")
@example('x"""')
def test_the_prompt_shows_the_description_itself(description: str) -> None:
    tree = ast.parse(prompt_stubs([made_of({}, description=description)]))

    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    # The compiler strips nothing; indentation and the last line's end are ours.
    shown = (ast.get_docstring(function, clean=False) or "").replace("\n    ", "\n").rstrip("\n")
    assert shown == description.rstrip("\n").replace("\n    ", "\n")


def test_module_runs_with_names_that_shadow_builtins() -> None:
    probe = made_of({"list": {"type": "array"}, "str": {"type": "string", "default": "x"}}, required=["list"])

    assert executed(cell_module([probe]))["probe"]([1]) == ("probe", {"list": [1]})


def test_prompt_is_what_a_type_checker_would_take() -> None:
    names: dict[str, Any] = {}
    head = "from __future__ import annotations\nfrom typing import *\nfrom typing import NotRequired\n"
    exec(compile(head + prompt_stubs([query_sales]), "prompt", "exec"), names)  # noqa: S102 (our own text)

    returned = typing.get_type_hints(names["query_sales"])["return"]
    assert typing.get_origin(returned) is list
    assert typing.get_args(returned) == (names["Row"],)
