"""``@tool``: what is made of a function, what is refused at decoration, and what a model is told."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import time
import tracemalloc
import uuid
from collections.abc import Iterable, Iterator  # noqa: TC003 (annotations of tools are evaluated)
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple

import jsonschema
import pytest
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from typing_extensions import TypedDict

from sandboxd.tools import Dispatcher, Tool, ToolError, ToolResult, tool
from sandboxd.tools.schema.checking import Checker
from sandboxd.tools.schema.docstrings import split
from sandboxd.tools.schema.signature import SET_ITEMS, SET_OBJECTS
from sandboxd.tools.schema.values import VALUES

NEW_YEAR = datetime.date(2024, 1, 1)


class Row(BaseModel):
    region: str
    amount: float = 0.0


class Frozen(BaseModel, frozen=True):
    a: int


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


def said(result: ToolResult) -> str:
    """Message and hint of a call that was refused for its arguments."""
    assert result.error is not None
    assert result.error.code == "invalid_arguments"
    return f"{result.error.message} | {result.error.hint}"


def ask(function: Tool, arguments: Any) -> ToolResult:
    with Dispatcher([function]) as dispatcher:
        return dispatcher.call(function.name, arguments)


# What is made


def test_a_tool_has_the_schemas_of_its_function() -> None:
    @tool
    def query(quarter: Literal["Q1", "Q2"], fields: list[str], limit: int = 10) -> list[Row]:
        """Sales rows of one quarter."""
        return []

    assert query.arguments_schema == {
        "type": "object",
        "properties": {
            "quarter": {"enum": ["Q1", "Q2"], "type": "string"},
            "fields": {"items": {"type": "string"}, "type": "array"},
            "limit": {"type": "integer", "default": 10},
        },
        "required": ["quarter", "fields"],
        "additionalProperties": False,
    }
    assert query.result_schema is not None
    assert query.result_schema["items"] == {"$ref": "#/$defs/Row"}
    jsonschema.Draft202012Validator.check_schema(query.result_schema)
    assert query.description == "Sales rows of one quarter."


def test_calling_a_tool_calls_its_function() -> None:
    @tool
    def double(x: int) -> int:
        """Twice as much."""
        return 2 * x

    assert double(4) == 8
    assert double.__name__ == "double"  # type: ignore[attr-defined]
    assert double.__doc__ == "Twice as much."


def test_options_end_up_on_the_tool() -> None:
    @tool(
        callers=("code",),
        approval=True,
        rate="100/min",
        timeout=5,
        name="other",
        max_result_bytes=100,
        read_only=True,
        destructive=False,
        idempotent=True,
    )
    async def first() -> None: ...

    made: Tool = first
    assert (made.name, sorted(made.callers), made.approval, made.timeout) == ("other", ["code"], True, 5.0)
    assert made.rate is not None
    assert (made.rate.count, made.rate.seconds, made.max_result_bytes, made.is_async) == (100, 60, 100, True)
    assert (made.read_only, made.destructive, made.idempotent) == (True, False, True)


def test_no_return_annotation_means_no_result_schema() -> None:
    @tool
    def anything():  # type: ignore[no-untyped-def]  # noqa: ANN202 (the matter of this test)
        return 1

    assert anything.result_schema is None


def test_types_named_in_the_enclosing_function_are_found() -> None:
    class Local(BaseModel):
        x: int

    @tool
    def take(local: Local) -> Local:
        return local

    assert ask(take, {"local": {"x": 1}}).value == {"x": 1}


def test_a_method_of_an_object_can_be_a_tool() -> None:
    class Shop:
        def price(self, article: str) -> int:
            """What it costs."""
            return len(article)

    assert ask(Tool(Shop().price), {"article": "pen"}).value == 3


def test_the_function_gets_the_types_that_it_names() -> None:
    seen: dict[str, Any] = {}

    @dataclasses.dataclass
    class Point:
        x: int

    class Options(TypedDict):
        limit: int

    @tool
    def take(
        row: Row, point: Point, options: Options, colour: Colour, at: datetime.datetime, on: datetime.date,
        key: uuid.UUID, price: Decimal, raw: bytes, names: set[str], share: float, maybe: int | None = None,
    ) -> None:  # fmt: skip
        seen.update(locals())

    result = ask(
        take,
        {
            "row": {"region": "north"},
            "point": {"x": 1},
            "options": {"limit": 2},
            "colour": "red",
            "at": "2024-07-31T12:00:00Z",
            "on": "2024-07-31",
            "key": "123e4567-e89b-12d3-a456-426614174000",
            "price": "1.10",
            "raw": "aGk=",
            "names": ["a", "a"],
            "share": 1,
        },
    )
    assert result.ok
    assert seen["row"] == Row(region="north")
    assert seen["point"] == Point(1)
    assert seen["options"] == {"limit": 2}
    assert seen["colour"] is Colour.RED
    assert seen["at"] == datetime.datetime(2024, 7, 31, 12, tzinfo=datetime.UTC)
    assert seen["on"] == datetime.date(2024, 7, 31)
    assert seen["key"] == uuid.UUID("123e4567-e89b-12d3-a456-426614174000")
    assert seen["price"] == Decimal("1.10")
    assert (seen["raw"], seen["names"], seen["maybe"]) == (b"hi", {"a"}, None)
    assert type(seen["share"]) is float


def test_the_function_shares_nothing_with_the_caller() -> None:
    @tool
    def spoil(items: list[int], whole: dict[str, Any]) -> list[int]:
        items.append(9)
        whole["more"] = True
        return items

    arguments: dict[str, Any] = {"items": [1], "whole": {"a": [1]}}
    assert ask(spoil, arguments).value == [1, 9]
    assert arguments == {"items": [1], "whole": {"a": [1]}}


def test_defaults_are_shown_in_json() -> None:
    @tool
    def take(colour: Colour = Colour.RED, on: datetime.date = NEW_YEAR, what: Any = object) -> None: ...

    properties = take.arguments_schema["properties"]
    assert properties["colour"]["default"] == "red"
    assert properties["on"]["default"] == "2024-01-01"
    assert "default" not in properties["what"]


# Docstrings


GOOGLE = """Do it.

More of it.

Args:
    first (int): The first,
        in two lines.
    second: It has a colon: here.

Returns:
    Something.
"""
NUMPY = """Do it.

More of it.

Parameters
----------
first : int
    The first,
    in two lines.
second
    It has a colon: here.

Returns
-------
Something.
"""
SPHINX = """Do it.

More of it.

:param int first: The first,
    in two lines.
:type second: str
:param second: It has a colon: here.
:returns: Something.
"""


@pytest.mark.parametrize("docstring", [GOOGLE, NUMPY, SPHINX], ids=["google", "numpy", "sphinx"])
def test_arguments_are_described_by_the_docstring(docstring: str) -> None:
    text, arguments = split(docstring)
    assert arguments == {"first": "The first, in two lines.", "second": "It has a colon: here."}
    assert text.startswith("Do it.\n\nMore of it.\n\n")
    assert "in two lines" not in text


@pytest.mark.parametrize("docstring", [None, "", "Args:", "Parameters\n---", "Args:\n  : x\n\n\n", "x:\n\n  y: z"])
def test_odd_docstrings_do_no_harm(docstring: str | None) -> None:
    split(docstring)


def test_a_field_description_wins_over_the_docstring() -> None:
    @tool
    def take(first: Annotated[int, Field(description="Of the field.")], second: Row) -> None:
        """Take.

        Args:
            first: Of the docstring.
            second: A row.
        """

    properties = take.arguments_schema["properties"]
    assert properties["first"]["description"] == "Of the field."
    assert properties["second"]["description"] == "A row."
    assert take.description == "Take."


# What is refused at decoration


def any_number(*rows: int) -> None: ...
def any_name(**rows: int) -> None: ...
def positional(row: int, /) -> None: ...
def unannotated(row) -> None: ...  # type: ignore[no-untyped-def]  # noqa: ANN001
def hidden(_row: int) -> None: ...
def callback(row: type) -> None: ...
def complicated(row: complex) -> None: ...
def numbered(row: dict[int, str]) -> None: ...
def iterated(row: Iterable[int]) -> None: ...
def undefined(row: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821


class Pair(NamedTuple):
    x: int


class Raw(BaseModel):
    data: bytes


class Other:
    pass


def named_tuple(row: Pair) -> None: ...
def raw_model(row: Raw) -> None: ...
def foreign(row: Other) -> None: ...
def foreign_result() -> Other: ...  # type: ignore[empty-body]
def numbered_result() -> dict[int, str]: ...  # type: ignore[empty-body]
def aliased(row: Annotated[int, Field(alias="line")]) -> None: ...


def generator() -> Iterator[int]:
    yield 1


REFUSED: list[tuple[Any, str]] = [
    (any_number, "any number"),
    (any_name, "any number"),
    (positional, "positional only"),
    (unannotated, "no annotation"),
    (hidden, "underscore"),
    (callback, "row"),
    (complicated, "complex"),
    (numbered, "keys"),
    (iterated, "list"),
    (undefined, "Nowhere"),
    (named_tuple, "named tuple"),
    (raw_model, "base64"),
    (foreign, "row"),
    (foreign_result, "result of foreign_result"),
    (numbered_result, "keys"),
    (aliased, "alias"),
    (generator, "generator"),
    (len, "function"),
    (Row, "function"),
]


@pytest.mark.parametrize(("function", "word"), REFUSED, ids=[function.__name__ for function, _ in REFUSED])
def test_a_function_that_cannot_be_a_tool_is_refused(function: Any, word: str) -> None:
    with pytest.raises(TypeError, match=word):
        tool(function)


@pytest.mark.parametrize(
    "options",
    [
        {"callers": ("model", "user")},
        {"callers": ()},
        {"rate": "often"},
        {"rate": "0/s"},
        {"rate": "10/fortnight"},
        {"rate": 10},
        {"timeout": 0},
        {"timeout": -1.0},
        {"timeout": float("nan")},
        {"timeout": True},
        {"name": "class"},
        {"name": "_hidden"},
        {"name": "two words"},
        {"name": "é"},
        {"name": "x" * 65},
        {"name": ""},
        {"max_result_bytes": 0},
        {"max_result_bytes": 1.5},
    ],
    ids=str,
)
def test_an_option_that_means_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        tool(**options)(lambda: None)


def test_a_lambda_without_a_name_is_refused() -> None:
    with pytest.raises(TypeError, match="name"):
        tool(lambda: None)


# What a model is told


@tool
def query(quarter: Literal["Q1", "Q2", "Q3", "Q4"], fields: list[str], row: Row | None = None, limit: int = 10) -> int:
    """Query."""
    return limit


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"quarter": "q3", "fields": []}, ['quarter is "q3"', '"Q1", "Q2", "Q3", "Q4"', 'Did you mean "Q3"?']),
        ({"quarter": "Q1"}, ["fields is missing", "a list, each item a string"]),
        ({"quarter": "Q1", "fields": ["a", 1]}, ["fields.1 is 1", "a string"]),
        ({"quarter": "Q1", "fields": [], "limt": 1}, ["limt is unknown", "it takes quarter", "Did you mean limit?"]),
        ({"quarter": "Q1", "fields": [], "limit": "5"}, ['limit is "5"', "an integer"]),
        ({"quarter": "Q1", "fields": [], "limit": 1.5}, ["limit is 1.5", "an integer"]),
        ({"quarter": "Q1", "fields": [], "limit": True}, ["limit is true", "an integer"]),
        ({"quarter": "Q1", "fields": [], "row": {"region": 1}}, ["row.region is 1"]),
        ({"quarter": "Q1", "fields": [], "row": {"region": "x", "z": 1}}, ["row.z is unknown", "region", "amount"]),
        ({"quarter": "Q1", "fields": [], "row": 3}, ["row is 3", "an object with region, amount (optional) or null"]),
    ],
)
def test_a_refusal_says_which_argument_what_was_given_and_what_is_allowed(
    arguments: dict[str, Any], words: list[str]
) -> None:
    text = said(ask(query, arguments))
    for word in words:
        assert word in text
    assert "pydantic" not in text


def test_three_problems_are_told_and_that_there_are_more() -> None:
    text = said(ask(query, {"quarter": 1, "fields": 1, "limit": "x", "row": 5}))
    assert text.count("must be") == 3
    assert "There is more." in text


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"quarter": "Q1", "quarter": "Q2", "fields": []}', "twice"),
        ('{"quarter": "Q1", "fields": [], "limit": NaN}', "NaN"),
        ('{"quarter": "Q1", "fields": [], "limit": 1e999}', "too large"),
        ('{"quarter": "Q1", "fields": [], "limit": ' + "9" * 400 + "}", "too large"),
        ('{"quarter": "Q1", "fields": [], "limit": ' + "9" * 5000 + "}", "digits"),
        ('{"quarter": "\\ud800", "fields": []}', "surrogate"),
        ("[1]", "object"),
        ("", "not valid JSON"),
        ("{'quarter': 'Q1'}", "not valid JSON"),
        ("[" * 100_000, "nested"),
        ('{"fields": ' + "[" * 40 + "]" * 40 + "}", "nested"),
        ('{"fields": "' + "x" * (1 << 20) + '"}', "larger"),
    ],
    ids=lambda value: value[:30],
)
def test_text_that_is_not_strict_json_is_refused(text: str, word: str) -> None:
    assert word in said(ask(query, text))


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), {1: 2}, {1}, b"x", object(), 1 << 2000, "\ud800", [[[...]]]],
    ids=lambda value: type(value).__name__,
)
def test_python_values_that_are_no_json_are_refused(value: Any) -> None:
    @tool
    def take(what: Any) -> None: ...

    said(ask(take, {"what": value}))


def test_a_list_that_contains_itself_is_refused() -> None:
    @tool
    def take(what: Any) -> None: ...

    circle: list[Any] = []
    circle.append(circle)
    assert "nested" in said(ask(take, {"what": circle}))


def test_a_large_value_is_not_repeated_in_the_message() -> None:
    result = ask(query, {"quarter": "Q" * 100_000, "fields": []})
    assert len(said(result)) < 1000


def test_control_characters_of_the_model_are_escaped() -> None:
    text = said(ask(query, {"quarter": "\x1b[2J\x00\u202e", "fields": []}))
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_many_choices_are_not_all_listed() -> None:
    @tool
    def take(what: Literal[tuple(f"choice{n}" for n in range(500))]) -> None: ...  # type: ignore[valid-type]

    text = said(ask(take, {"what": "choise7"}))
    assert len(text) < 600
    assert 'Did you mean "choice7"?' in text


def test_a_validator_of_ones_own_speaks_to_the_model() -> None:
    def even(value: int) -> int:
        if value % 2:
            raise ValueError("it must be even")
        return value

    @tool
    def take(what: Annotated[int, AfterValidator(even)], row: Row) -> None: ...

    text = said(ask(take, {"what": 3, "row": {"region": "x"}}))
    assert "what: 3 was given; it must be even" in text
    assert "function" not in text


@pytest.mark.parametrize("error", [AssertionError("/secret"), UnicodeError("/secret")], ids=lambda e: type(e).__name__)
def test_an_accident_in_a_validator_does_not(error: Exception) -> None:
    class Careful(BaseModel):
        x: int

        @field_validator("x")
        @classmethod
        def check(cls, value: int) -> int:
            raise error

    @tool
    def take(what: Careful) -> None: ...

    text = said(ask(take, {"what": {"x": 1}}))
    assert "secret" not in text
    assert "what.x: 1 was given" in text


def test_a_validator_may_raise_tool_error() -> None:
    def no(value: int) -> int:
        raise ToolError("not on Sundays", "wait")

    @tool
    def take(what: Annotated[int, AfterValidator(no)]) -> None: ...

    assert said(ask(take, {"what": 1})) == "not on Sundays | wait"


def test_any_other_exception_of_a_validator_is_a_failure_of_the_tool() -> None:
    def broken(value: int) -> int:
        raise KeyError("/secret")

    @tool
    def take(what: Annotated[int, AfterValidator(broken)]) -> None: ...

    result = ask(take, {"what": 1})
    assert result.error is not None
    assert result.error.code == "tool_failed"
    assert "secret" not in result.to_json()


# Where pydantic and JSON Schema differ


def test_a_whole_float_is_an_integer() -> None:
    assert ask(query, {"quarter": "Q1", "fields": [], "limit": 3.0}).value == 3


def test_an_any_keeps_its_float() -> None:
    @tool
    def kind(what: Any) -> str:
        return type(what).__name__

    assert ask(kind, {"what": 3.0}).value == "float"


def test_true_is_not_one() -> None:
    @tool
    def take(what: Literal[1]) -> None: ...

    assert "what is true; it must be 1" in said(ask(take, {"what": True}))


def test_a_model_that_allows_more_keys_may_have_them() -> None:
    class Open(BaseModel):
        model_config = ConfigDict(extra="allow")
        x: int

    @tool
    def take(what: Open) -> dict[str, Any]:
        return what.model_dump()

    assert ask(take, {"what": {"x": 1, "y": 2}}).value == {"x": 1, "y": 2}


def test_models_inside_refuse_keys_that_they_do_not_know() -> None:
    schema = query.arguments_schema
    assert schema["$defs"]["Row"]["additionalProperties"] is False
    said(ask(query, {"quarter": "Q1", "fields": [], "row": {"region": "x", "colour": "red"}}))


def test_a_recursive_model_works() -> None:
    assert ask(depth, {"node": {"children": [{"children": []}]}}).value == 2
    assert "node.children.0.children is 1" in said(ask(depth, {"node": {"children": [{"children": 1}]}}))


class Node(BaseModel):
    children: list[Node] = []


@tool
def depth(node: Node) -> int:
    """How deep it is."""
    return 1 + max((depth(child) for child in node.children), default=0)


class Plus(BaseModel):
    left: Plus | Times | int
    weight: int


class Times(BaseModel):
    left: Plus | Times | int
    weight: str


class Shape(BaseModel):
    kind: Literal["circle"]
    radius: float


class Side(BaseModel):
    kind: Literal["square"]
    side: float


class Sum(BaseModel):
    kind: Literal["sum"]
    terms: list[Annotated[Sum | Product, Field(discriminator="kind")]] | None = None


class Product(BaseModel):
    kind: Literal["product"]
    factors: list[Annotated[Sum | Product, Field(discriminator="kind")]]


def ambiguous(what: Plus | Times) -> None: ...
def told_apart(what: Sum | Product | None, tree: Node | list[Node] | int) -> None: ...


def test_a_recursive_choice_without_a_discriminator_is_refused() -> None:
    with pytest.raises(TypeError, match="discriminator"):
        Tool(ambiguous)
    value = {"kind": "sum", "terms": [{"kind": "product", "factors": []}]}
    assert ask(Tool(told_apart), {"what": value, "tree": {"children": []}}).ok


def test_nested_choices_are_explained_in_reasonable_time() -> None:
    value: Any = "x"
    for _ in range(29):
        value = {"left": value, "weight": "x"}
    schema = TypeAdapter(dict[str, Plus | Times]).json_schema()
    begun = time.monotonic()
    assert Checker(schema).problems({"what": value})
    assert time.monotonic() - begun < 10


def test_of_several_objects_the_one_that_was_meant_is_explained() -> None:
    @tool
    def take(shape: Shape | Side | None) -> None: ...

    text = said(ask(take, {"shape": {"kind": "square", "radius": 1}}))
    assert "shape.radius is unknown; it takes kind, side." in text
    assert "shape.side is missing" in text


def test_schemas_are_plain_json() -> None:
    for made in (query, depth):
        assert json.loads(json.dumps(made.arguments_schema)) == made.arguments_schema
        jsonschema.Draft202012Validator.check_schema(made.arguments_schema)


# Calls of a megabyte


Letters = Annotated[str, Field(pattern="^[a-z]+$")]


class Many(BaseModel):
    a: int
    b: int
    c: int
    d: int
    e: int
    f: int
    g: int
    h: int


class Most(Many):
    kind: Literal["most"]


class Branch(BaseModel):
    left: Branch | None = None
    right: Branch | None = None
    needed: int
    wanted: int
    asked: int
    name: Letters = "x"


class Mixed(BaseModel):
    words: list[Letters]
    named: dict[str, Letters]
    unique: set[Letters]
    pair: tuple[Letters, ...]


def branches(leaf: Any, levels: int) -> Any:
    made = leaf
    for _ in range(levels):
        made = {**leaf, "left": made, "right": made}
    return made


GOOD = dict.fromkeys("abcdefgh", 1)
COUNT = 49_000
LARGE: dict[str, tuple[Any, Any]] = {
    "objects": (list[Many], [{}] * COUNT),
    "choice": (list[Many | Most], [{}] * COUNT),
    "last of a choice": (list[Many | Most], [GOOD] * 5000 + [{}]),
    "unknown keys": (Many | Most, {f"{n:x}": 1 for n in range(COUNT)}),
    "patterns": (list[Letters], ["1"] * COUNT),
    "patterns by key": (dict[str, Letters], {f"{n:x}": "1" for n in range(COUNT)}),
    "patterns of a choice": (list[Letters | Many], ["1"] * COUNT),
    "patterns inside": (list[Mixed], [{"words": ["1"], "named": {"a": "1"}, "unique": ["1"], "pair": ["1"]}] * 5000),
    "literals": (list[Literal["a", 2]], [3] * COUNT),
    "dates": (list[datetime.date], ["2024-13-01"] * COUNT),
    "bytes": (bytes, "A" * 1_000_001),
    "tree": (Branch, branches({}, 13)),
    "patterns of a tree": (Branch, branches({"needed": 1, "wanted": 1, "asked": 1, "name": "1"}, 12)),
    "whole floats": (list[int], [1.0] * (COUNT - 1) + ["x"]),
    "nulls": (list[int | str], [None] * COUNT),
    "too many": (list[int], [[]] * 340_000),
    "too many objects": (list[Many], [{}] * 340_000),
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_large_invalid_call_is_refused_in_little_time_and_memory(kind: str) -> None:
    def take(what: Any) -> None: ...

    annotation, value = LARGE[kind]
    take.__annotations__["what"] = annotation
    made = Tool(take)
    found: list[int] = []

    def counted(validate: Any) -> Any:
        def counting(*arguments: Any, **named: Any) -> Any:
            try:
                return validate(*arguments, **named)
            except ValidationError as error:
                found.append(error.error_count())
                raise

        return counting

    made._arguments._validate = counted(made._arguments._validate)
    made._arguments._validate_all = counted(made._arguments._validate_all)
    text = json.dumps({"what": value}, separators=(",", ":"))
    with Dispatcher([made]) as dispatcher:
        tracemalloc.start()
        try:
            begun = time.process_time()
            result = dispatcher.call("take", text)
            spent = time.process_time() - begun
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert said(result)
    assert spent < 5  # 0.2 s, but for tracemalloc
    assert peak < 100 << 20
    assert sum(found) < 10_000  # whose memory is pydantic's own, and not traced


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (list[int], [1.0] * COUNT),
        (list[Many | Most], [{**GOOD, "kind": "most"}] * 4000),
        (dict[str, Letters], {f"{n:x}": "a" for n in range(COUNT)}),
        (Branch, branches({"needed": 1, "wanted": 1, "asked": 1}, 12)),
        (str, "\n" * 520_000),
    ],
    ids=["whole floats", "choice", "keys", "tree", "text"],
)
def test_a_large_valid_call_reaches_the_function(annotation: Any, value: Any) -> None:
    reached: list[Any] = []

    def take(what: Any) -> None:
        reached.append(what)

    take.__annotations__["what"] = annotation
    assert ask(Tool(take), {"what": value}).ok
    plain = TypeAdapter(annotation).dump_python(reached[0], exclude_unset=True)
    assert plain == value


def test_one_call_has_a_bounded_number_of_values() -> None:
    @tool
    def take(what: list[int]) -> int:
        return len(what)

    assert ask(take, {"what": [0] * (VALUES - 1)}).value == VALUES - 1
    refused = ask(take, {"what": [0] * VALUES})
    assert said(refused) == f"The arguments hold more than {VALUES} values. | Send fewer, or in several calls."


def test_all_that_a_check_of_the_author_refuses_is_told_of_short_arguments() -> None:
    @tool
    def take(what: list[Letters], names: dict[str, Letters]) -> None: ...

    text = said(ask(take, {"what": ["1", "x", "2"], "names": {"a": "3", "b": "y"}}))
    for part in ("what.0", "what.2", "names.a"):
        assert f"{part}: " in text
    assert "There is more" not in text


@pytest.mark.parametrize(
    ("annotation", "most", "make"),
    [
        (set[int], SET_ITEMS, int),
        (frozenset[float], SET_ITEMS, float),
        (set[uuid.UUID], SET_ITEMS, lambda k: str(uuid.UUID(int=k))),
        (set[tuple[int, str]], SET_ITEMS, lambda k: [k, ""]),
        (set[int | None], SET_ITEMS, int),
        (set[Frozen], SET_OBJECTS, lambda k: {"a": k}),
        (set[tuple[Frozen, int]], SET_OBJECTS, lambda k: [{"a": k}, 1]),
        (set[int | Frozen], SET_OBJECTS, int),
        (dict[str, set[int]], None, None),
        (set[str], None, str),
    ],
)
def test_a_set_of_what_a_caller_can_give_one_hash_is_bounded(annotation: Any, most: int | None, make: Any) -> None:
    def take(given: Any) -> int:
        return len(given)

    take.__annotations__["given"] = annotation
    made = Tool(take)
    if make is None:
        assert not ask(made, {"given": {"a": [*range(SET_ITEMS + 1)]}}).ok
        return
    if most is None:
        assert ask(made, {"given": [make(k) for k in range(SET_ITEMS + 1)]}).ok
        return
    assert made.arguments_schema["properties"]["given"]["maxItems"] == most
    assert ask(made, {"given": [make(k) for k in range(most)]}).value == most
    refused = ask(made, {"given": [make(k) for k in range(most + 1)]})
    assert refused.error is not None
    assert f"a list of at most {most} items" in refused.error.message


def test_a_set_with_a_smaller_bound_keeps_it_and_a_result_has_none() -> None:
    @tool
    def take(given: Annotated[set[int], Field(max_length=5)]) -> set[int]:
        return set(range(2000))

    assert take.arguments_schema["properties"]["given"]["maxItems"] == 5
    assert take.result_schema is not None
    assert "maxItems" not in take.result_schema
    assert ask(take, {"given": [1]}).ok
