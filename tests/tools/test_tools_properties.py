"""For generated tools and arguments: exactly the calls that the schema allows reach the function.

The oracle is another implementation of JSON Schema (jsonschema), which is shown the schema that a model is shown. What
no schema says by itself, formats and base64, it judges by lists of texts that were written down by hand.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import inspect
import json
import math
import types
import uuid
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, cast

import jsonschema
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema.validators import extend
from pydantic import BaseModel, ConfigDict, Field, create_model
from typing_extensions import NotRequired, TypedDict  # noqa: UP035 (pydantic needs this one before 3.12)

from sandboxd.tools import CODES, Dispatcher, Tool, tool

if TYPE_CHECKING:
    from collections.abc import Iterator

SPELLINGS = {  # format: (in it, not in it)
    "date-time": (
        ["2024-02-29T12:30:00Z", "2024-01-01T00:00:00", "2024-01-01 10:00:00.123456+02:00", "2024-06-30T23:59"],
        ["2024-01-01", "1700000000", "yesterday", "2024-02-30T00:00:00Z", "2024-01-01T25:00:00Z", "20240101T000000Z"],
    ),
    "date": (["2024-02-29", "1999-12-31"], ["2023-02-29", "20240101", "2024-1-1", "2024-01-01T00:00:00", "0"]),
    "time": (["12:30:00", "00:00", "23:59:59.5Z"], ["24:00", "12", "12:60:00", "123000"]),
    "duration": (["P1D", "PT1H30M", "P1DT0.5S", "-P2W"], ["1 day", "P", "PT", "3600", "01:00:00"]),
    "uuid": (
        ["123e4567-e89b-12d3-a456-426614174000", "123E4567-E89B-12D3-A456-426614174000"],
        ["123e4567e89b12d3a456426614174000", "urn:uuid:123e4567-e89b-12d3-a456-426614174000", "123e4567"],
    ),
}
BASE64 = (["", "aGk=", "aGk+", "/+8=", "AAAA"], ["aGk", "_-8=", "a===", "aGk=\n", "a Gk=", "é==="])
DECIMALS = (["1.50", "-0.1", "1e5", ".5", "5.", "+3"], ["NaN", "Infinity", "1_000", " 1 ", "1,5", "", "٣"])

formats = jsonschema.FormatChecker(())
for _name, (_good, _) in SPELLINGS.items():
    formats.checks(_name)(lambda text, good=tuple(_good): not isinstance(text, str) or text in good)


def _encoding(_validator: Any, _value: Any, text: Any, _schema: Any) -> Iterator[jsonschema.ValidationError]:
    if isinstance(text, str) and text not in BASE64[0]:
        yield jsonschema.ValidationError("not base64")


Oracle: Any = cast("Any", extend)(jsonschema.Draft202012Validator, {"contentEncoding": _encoding})


BASE64_CONFIG = ConfigDict(val_json_bytes="base64", ser_json_bytes="base64")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Mixed(enum.Enum):
    YES = True
    TWO = 2
    HALF = 0.5
    WORD = "word"


class Row(BaseModel):
    region: str
    amount: float = 0.0
    tags: list[str] = []


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Options(TypedDict):
    limit: int
    order: NotRequired[Literal["up", "down"]]


class Tree(BaseModel):
    value: int
    children: list[Tree] = []


whole = st.integers(-(2**70), 2**70)
real = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(codec="utf-8"), max_size=6)
keys = text | st.sampled_from(["x", "limit", "first"])
anything = st.recursive(
    st.none() | st.booleans() | whole | real | text | st.sampled_from([1, 2, True, 1.0, 2.0, 0.5, "red", "up"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(text | st.sampled_from(["x", "limit"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def spelled(pair: tuple[list[str], list[str]]) -> st.SearchStrategy[Any]:
    return st.sampled_from([*pair[0], *pair[0], *pair[1]])


Kind = tuple[Any, st.SearchStrategy[Any]]  # an annotation, and values of which many fit it

LEAVES: list[Kind] = [
    (int, whole | real.map(lambda value: float(math.floor(value)) if abs(value) < 1e15 else value)),
    (float, real | whole),
    (bool, st.booleans() | st.sampled_from([0, 1])),
    (str, text),
    (Annotated[int, Field(ge=0, lt=10)], st.integers(-2, 12)),
    (Annotated[float, Field(gt=0)], st.floats(-1, 1)),
    (Annotated[str, Field(min_length=1, max_length=3)], text),
    (Literal["a", "b"], st.sampled_from(["a", "b", "A"])),
    (Literal[1, 2, "x"], st.sampled_from([1, 2, 3, True, 1.0, "x", "1"])),
    (Literal[True], st.sampled_from([True, False, 1])),
    (Literal["a"] | None, st.sampled_from(["a", None, ""])),
    (Colour, st.sampled_from(["red", "blue", "RED"])),
    (Level, st.sampled_from([1, 2, 3, True, 2.0])),
    (Mixed, st.sampled_from([True, False, 2, 1, 0.5, "word"])),
    (datetime, spelled(SPELLINGS["date-time"])),
    (date, spelled(SPELLINGS["date"])),
    (time, spelled(SPELLINGS["time"])),
    (timedelta, spelled(SPELLINGS["duration"])),
    (uuid.UUID, spelled(SPELLINGS["uuid"])),
    (bytes, spelled(BASE64)),
    (Decimal, spelled(DECIMALS) | st.integers(-9, 9) | st.sampled_from([0.5, -1.25])),
    (None, st.none()),
    (Any, anything),
]


def lists(of: Kind) -> Kind:
    return types.GenericAlias(list, (of[0],)), st.lists(of[1], max_size=3)


def pair(one: st.SearchStrategy[Any], other: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.tuples(one, other).map(list)


def nested(inner: st.SearchStrategy[Kind]) -> st.SearchStrategy[Kind]:
    def model(fields: tuple[Kind, Kind]) -> Kind:
        made = create_model("Made", __config__=BASE64_CONFIG, first=(fields[0][0], ...), second=(fields[1][0], None))
        return made, st.fixed_dictionaries({"first": fields[0][1]}, optional={"second": fields[1][1]})

    return st.one_of(
        inner.map(lists),
        inner.map(lambda of: (types.GenericAlias(dict, (str, of[0])), st.dictionaries(text, of[1], max_size=3))),
        inner.map(lambda of: (of[0] | None if of[0] is not None else None, of[1] | st.none())),
        st.tuples(inner, inner).map(
            lambda two: (
                Union[two[0][0], two[1][0]],  # noqa: UP007 (None | None is no type)
                two[0][1] | two[1][1],
            )
        ),
        st.tuples(inner, inner).map(
            lambda two: (types.GenericAlias(tuple, (two[0][0], two[1][0])), pair(two[0][1], two[1][1]))
        ),
        st.tuples(inner, inner).map(model),
    )


row = st.fixed_dictionaries({"region": text}, optional={"amount": real, "tags": st.lists(text, max_size=2)})
tree: st.SearchStrategy[Any] = st.deferred(
    lambda: st.fixed_dictionaries({"value": whole}, optional={"children": st.lists(tree, max_size=2)})
)
OBJECTS: list[Kind] = [
    (Row, row),
    (list[Row], st.lists(row, max_size=2)),
    (Point, st.fixed_dictionaries({"x": whole}, optional={"y": whole})),
    (Options, st.fixed_dictionaries({"limit": whole}, optional={"order": st.sampled_from(["up", "down", "left"])})),
    (Tree, tree),
    (set[int], st.lists(st.integers(0, 3), max_size=4)),
]
kinds = st.recursive(st.sampled_from([*LEAVES, *OBJECTS]), nested, max_leaves=4)


def made(annotations: dict[str, Any], optional: set[str], calls: list[dict[str, Any]]) -> Tool:
    """A tool with these arguments that notes what it was called with."""

    def function(**given: Any) -> None:
        calls.append(given)

    wrapper: Any = lambda **given: function(**given)  # noqa: E731 (its signature is replaced)
    wrapper.__name__ = "made"
    wrapper.__annotations__ = annotations
    wrapper.__signature__ = inspect.Signature(
        [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None if name in optional else inspect.Parameter.empty
            )
            for name in annotations
        ]
    )
    return tool(wrapper)


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], set[str], dict[str, Any]]:
    """Annotations, which of them are optional, and arguments: mostly right, sometimes bent in one place."""
    chosen = draw(st.lists(kinds, max_size=3))
    names = ["first", "second", "third"][: len(chosen)]
    optional = {name for name in names if draw(st.booleans())}
    arguments = {
        name: draw(values)
        for name, (_, values) in zip(names, chosen, strict=True)
        if name not in optional or draw(st.booleans())
    }
    if draw(st.integers(0, 2)) == 0:
        arguments = draw(bent(arguments))
    return {name: kind for name, (kind, _) in zip(names, chosen, strict=True)}, optional, arguments


@st.composite
def bent(draw: st.DrawFn, arguments: dict[str, Any]) -> dict[str, Any]:
    """*arguments* with one place replaced, removed or added, however deep."""
    changed = copy.deepcopy(arguments)
    place: Any = changed
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        inner = [key for key in keys if isinstance(place[key], dict | list)]
        if not inner or draw(st.booleans()):
            break
        place = place[draw(st.sampled_from(inner))]
    what = draw(st.sampled_from(["replace", "remove", "add"]))
    if keys and what == "replace":
        place[draw(st.sampled_from(keys))] = draw(anything)
    elif keys and what == "remove":
        del place[draw(st.sampled_from(keys))]
    elif isinstance(place, dict):
        place[draw(text | st.sampled_from(["x", "y", "order", "second"]))] = draw(anything)
    else:
        place.append(draw(anything))
    return changed


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(calls())
def test_exactly_the_valid_calls_reach_the_function(drawn: tuple[dict[str, Any], set[str], dict[str, Any]]) -> None:
    annotations, optional, arguments = drawn
    seen: list[dict[str, Any]] = []
    given_tool = made(annotations, optional, seen)
    schema = given_tool.arguments_schema
    Oracle.check_schema(schema)
    expected = Oracle(schema, format_checker=formats).is_valid(arguments)
    before = copy.deepcopy(arguments)
    with Dispatcher([given_tool]) as dispatcher:
        as_object = dispatcher.call("made", arguments)
        as_text = dispatcher.call("made", json.dumps(arguments))
        # As it is for types that could have too many errors; whichever is asked first, the answer is the same.
        given_tool._arguments._first = True
        schema_first = dispatcher.call("made", arguments)
    assert as_object.ok == expected, (schema, arguments, as_object)
    assert as_text == schema_first == as_object
    assert len(seen) == (3 if expected else 0)
    assert arguments == before
    if expected:
        assert all(given.keys() == arguments.keys() for given in seen)
    else:
        assert as_object.error is not None
        assert as_object.error.code == "invalid_arguments"


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(calls(), anything)
def test_whatever_comes_is_answered_with_a_known_code(
    drawn: tuple[dict[str, Any], set[str], dict[str, Any]], arguments: Any
) -> None:
    annotations, optional, _ = drawn
    seen: list[dict[str, Any]] = []
    with Dispatcher([made(annotations, optional, seen)]) as dispatcher:
        result = dispatcher.call("made", arguments)
    assert result.ok == bool(seen)
    if result.error is not None:
        assert result.error.code in CODES
        assert result.error.message
        assert "pydantic" not in result.error.message + result.error.hint
    assert json.loads(result.to_json()) == result.to_dict()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40) | anything.map(lambda value: json.dumps(value).encode()))
def test_text_of_any_kind_is_answered(body: bytes) -> None:
    with Dispatcher([made({"first": int}, set(), [])]) as dispatcher:
        result = dispatcher.call("made", body)
    assert result.ok or (result.error is not None and result.error.code == "invalid_arguments")


@settings(max_examples=300, deadline=None)
@given(anything)
def test_results_that_are_json_come_back_as_they_were(value: Any) -> None:
    @tool
    def give() -> Any:
        return value

    with Dispatcher([give]) as dispatcher:
        result = dispatcher.call("give", {}, caller="code")
    assert result.ok
    assert result.value == json.loads(json.dumps(value))
    assert json.loads(result.to_json())["value"] == result.value
