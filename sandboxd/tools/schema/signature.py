"""From annotations to JSON Schema 2020-12, and from JSON to what a function gets.

Exactly what the schema allows is accepted, plus nothing: pydantic validates in its strict JSON mode, unknown keys are
refused at every level, and where it would still read more than the schema says, the schema is checked first. Where the
schema allows more than pydantic reads, it is made to say so or the type is refused. Decided here:

- 2.0 is the integer 2, as JSON Schema has it; true is no integer and no literal 1.
- Times are ISO 8601 strings, never numbers; zone and seconds may be absent. UUIDs are in their hyphenated form.
- bytes are standard base64 with padding. Decimals are numbers, or strings in plain or exponent form.
- Sets take lists; repeated items count once. Tuples take lists of exactly their length.
- Sets of anything but strings take at most SET_ITEMS items, of objects SET_OBJECTS. Hashes of numbers, and hashes made
  of them, are no secret: a caller could choose n items that have the same one, which cost n * n comparisons.
- Keys of objects are strings: dict[int, ...] is refused, since its keys would be read from text.
- A recursive choice between models needs a discriminator: without one, checking takes exponential time.
- A validator of one's own (pydantic's AfterValidator, field_validator, ...) narrows further; no schema can show it.
"""

from __future__ import annotations

import contextlib
import enum
from typing import TYPE_CHECKING, Any, NoReturn, NotRequired, cast

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError, PydanticUndefinedAnnotation
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticSerializationError
from typing_extensions import TypedDict

from sandboxd.tools.result import Refused, ToolError, shown
from sandboxd.tools.schema import failfast, fitting, values
from sandboxd.tools.schema.checking import Checker, Problem
from sandboxd.tools.schema.fitting import everywhere

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic_core import ErrorDetails, core_schema

    from sandboxd.tools.schema.fitting import Schema

SET_ITEMS = 1000  # of numbers, UUIDs and the like, compared in less than 0.1 us
SET_OBJECTS = 100  # of models and dataclasses, compared in 2 us
_PROBLEMS = 3
_SHORT = 4096  # of arguments' JSON: so few bytes cannot have many errors that the schema does not explain
_ERRORS = 1000  # that are looked at
_CONFIG = ConfigDict(extra="forbid", val_json_bytes="base64", ser_json_bytes="base64", allow_inf_nan=False)


class _Generator(GenerateJsonSchema):
    """pydantic's generator, held to what is true of this module's validation."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # a title that only repeats the name is noise to a model

    def bytes_schema(self, schema: core_schema.BytesSchema) -> Schema:
        if super().bytes_schema(schema).get("format") == "binary" and self.mode == "validation":
            raise TypeError(
                "bytes in a model are read as UTF-8 text unless the model says "
                "model_config = ConfigDict(val_json_bytes='base64', ser_json_bytes='base64')"
            )
        return {"type": "string", "contentEncoding": "base64"}  # lengths are the bytes', not the text's

    def decimal_schema(self, schema: core_schema.DecimalSchema) -> Schema:
        text: Schema = {"type": "string", "pattern": fitting.DECIMAL}
        if self.mode == "serialization":
            return {"type": "string"}
        number = cast("list[Schema]", super().decimal_schema(schema)["anyOf"])[0]
        return {"anyOf": [number, text]}

    def set_schema(self, schema: core_schema.SetSchema) -> Schema:
        return self._set(super().set_schema(schema), schema)

    def frozenset_schema(self, schema: core_schema.FrozenSetSchema) -> Schema:
        return self._set(super().frozenset_schema(schema), schema)

    def _set(self, made: Schema, schema: core_schema.SetSchema | core_schema.FrozenSetSchema) -> Schema:
        """Repeated items are allowed; many that a caller can give one hash are not."""
        made = {name: value for name, value in made.items() if name != "uniqueItems"}
        items: Any = schema.get("items_schema", {"type": "any"})
        if self.mode == "validation" and not _is_all(items, ("str",)):  # whose hash nobody can foresee
            most = SET_ITEMS if _is_all(items, _SCALARS) else SET_OBJECTS
            made["maxItems"] = min(most, made.get("maxItems", most))
        return made

    def dict_schema(self, schema: core_schema.DictSchema) -> Schema:
        keys: Any = schema.get("keys_schema", {"type": "any"})
        while "schema" in keys:  # a definition, or a function around it
            keys = keys["schema"]
        if keys["type"] not in ("any", "str", "literal", "enum", "definition-ref"):
            raise TypeError(f"the keys of a JSON object are strings, and {keys['type']} is not")
        for key in [*keys.get("expected", ()), *(member.value for member in keys.get("members", ()))]:
            if not isinstance(key, str | enum.Enum):
                raise TypeError(f"the keys of a JSON object are strings, and {key!r} is not")
        return super().dict_schema(schema)

    def generator_schema(self, schema: core_schema.GeneratorSchema) -> Schema:
        raise TypeError("iterators and generators cannot be checked before they run; use a list")

    def call_schema(self, schema: core_schema.CallSchema) -> Schema:  # how pydantic had named tuples before 2.14
        self._refuse_named_tuple()
        return super().call_schema(schema)

    def named_tuple_schema(self, schema: Any) -> Schema:
        self._refuse_named_tuple()
        made: Schema = super().named_tuple_schema(schema)
        return made

    def _refuse_named_tuple(self) -> None:
        if self.mode == "validation":
            raise TypeError("pydantic reads named tuples from lists and from objects; use a dataclass or a model")

    def complex_schema(self, schema: core_schema.ComplexSchema) -> Schema:
        raise TypeError("JSON has no complex numbers")


_SCALARS = (
    *("str", "int", "float", "decimal", "bool", "none", "uuid", "timedelta", "date", "time", "datetime", "bytes"),
    *("url", "multi-host-url", "enum", "literal"),
)


def _is_all(schema: Any, kinds: tuple[str, ...]) -> bool:
    """Whether the core *schema* is of one of *kinds*, or a tuple of such, or a choice between such."""
    while schema["type"] not in ("model", "dataclass") and "schema" in schema:  # a function around it
        schema = schema["schema"]
    parts: list[Any] = [*schema.get("items_schema", ())] if schema["type"] == "tuple" else []
    if schema["type"] == "union":
        parts = [part[0] if isinstance(part, tuple) else part for part in schema["choices"]]
    return all(_is_all(part, kinds) for part in parts) if parts else schema["type"] in kinds


def _has_bounded_set(schema: Schema) -> bool:
    """Whether the schema must be asked before pydantic, which does not know these bounds."""
    return any(part.get("maxItems") in (SET_ITEMS, SET_OBJECTS) for part in everywhere(schema))


def _generate(adapter: TypeAdapter[Any], mode: Any, what: str) -> Schema:
    try:
        return adapter.json_schema(mode=mode, schema_generator=_Generator)
    except PydanticInvalidForJsonSchema as error:
        _unsupported(what, error)
    except TypeError as error:
        raise TypeError(f"{what}: {error}.") from None


def _unsupported(what: str, error: Exception) -> NoReturn:
    reason = str(error).splitlines()[0].partition(". ")[0].rstrip(".") + "."  # pydantic's advice would not help
    raise TypeError(f"{what} has a type that JSON cannot carry. {reason}") from error


class Arguments:
    """What one function takes: its schema, and the way from JSON to its arguments.

    *annotations* by name, *descriptions* from the docstring, *defaults* of the optional ones. Raises TypeError.
    """

    def __init__(
        self, tool: str, annotations: Mapping[str, Any], descriptions: Mapping[str, str], defaults: Mapping[str, Any]
    ) -> None:
        self._tool = tool
        for name, annotation in annotations.items():
            _probe(annotation, f"Argument {name} of {tool}")
        fields = {name: NotRequired[kind] if name in defaults else kind for name, kind in annotations.items()}
        adapter = _adapter(_keys(fields), f"The arguments of {tool}")
        made = _generate(adapter, "validation", f"The arguments of {tool}")
        properties: dict[str, Schema] = made.get("properties", {})
        if list(properties) != list(annotations):
            raise TypeError(f"The arguments of {tool} have aliases; a model must see the names that the function has.")
        for name, text in descriptions.items():
            if name in properties and text:
                properties[name].setdefault("description", text)
        for name, value in defaults.items():
            known, plain = _plain_default(annotations[name], value)
            if known:
                properties[name]["default"] = plain
        # A model class may allow any key; then the others ignore what they do not know, as pydantic has it.
        inner = [part for child in fitting.children(made) for part in everywhere(child) if "properties" in part]
        self._extra: Any = None if any(part.get("additionalProperties", False) for part in inner) else "forbid"
        if self._extra == "forbid":
            for part in inner:
                part["additionalProperties"] = False
        self.schema: Schema = {
            "type": "object",
            "properties": properties,
            "required": made.get("required", []),
            "additionalProperties": False,
            **({"$defs": made["$defs"]} if "$defs" in made else {}),
        }
        if fitting.is_ambiguous(self.schema):
            raise TypeError(
                f"The arguments of {tool} have a type that chooses between several models and contains itself; give it "
                "a discriminator, pydantic's Field(discriminator=...)."
            )
        # Checked against the schema first: what pydantic would read further than it says, and where the errors that it
        # collects could become too many.
        self._checker = Checker(self.schema)
        self._first = fitting.needs_exact(self.schema) or fitting.has_many_errors(self.schema)
        self._first |= _has_bounded_set(self.schema)
        if not failfast.COVERS_OBJECTS:
            self._first |= any(isinstance(part.get("additionalProperties"), dict) for part in everywhere(self.schema))
        self._validate = failfast.validator(adapter.core_schema).validate_json
        self._validate_all = adapter.validator.validate_json

    def read(self, text: str, plain: object) -> dict[str, Any]:
        """The arguments that *text*, the JSON of *plain*, stands for. Raises Refused (invalid_arguments).

        What a validator of the tool's author raises besides ValueError comes through.
        """
        if self._first:
            found = self._checker.problems(plain)
            if found:
                raise self._refusal(found)
        try:
            return cast("dict[str, Any]", self._validate(text, strict=True, extra=self._extra))
        except ValidationError as error:
            first = error
        except ToolError as error:
            raise Refused("invalid_arguments", error.message, error.hint) from None
        if values.has_whole_floats(plain):
            whole = values.arguments_json(values.whole_floats_as_integers(plain))
            with contextlib.suppress(ValidationError, Refused):
                return cast("dict[str, Any]", self._validate(whole, strict=True, extra=self._extra))
        found = [] if self._first else self._checker.problems(plain)
        raise self._refusal(found or _own(self._all(text, first), plain))

    def _all(self, text: str, first: ValidationError) -> ValidationError:
        """All errors of the arguments, of which *first* has at least one; of long ones, *first*."""
        if len(text) <= _SHORT:
            with contextlib.suppress(Exception):  # of an author's check that was content, or raised something else
                try:
                    self._validate_all(text, strict=True, extra=self._extra)
                except ValidationError as error:
                    return error
        return first

    def _refusal(self, found: Sequence[Problem]) -> Refused:
        count = min(len(found), _PROBLEMS)
        hints = list(dict.fromkeys(problem.hint for problem in found[:count] if problem.hint))
        more = " There is more." if len(found) > count else ""
        return Refused(
            "invalid_arguments",
            f"{self._tool} was not called: " + " ".join(problem.text for problem in found[:count]) + more,
            " ".join([*hints, "Call it again with that mended."]),
        )


def _adapter(annotation: Any, what: str) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(annotation)
    except (PydanticUserError, PydanticSchemaGenerationError, PydanticUndefinedAnnotation) as error:
        _unsupported(what, error)


def _probe(annotation: Any, what: str) -> None:
    """Refuse an unsupported type by the name of its argument."""
    _generate(_adapter(_keys({"value": annotation}), what), "validation", what)


def _keys(fields: Mapping[str, Any]) -> Any:
    """The type of an object with these keys and no others."""
    made = cast("Any", TypedDict)("Arguments", dict(fields))  # of keys that no type checker knows
    made.__pydantic_config__ = _CONFIG
    return made


def _plain_default(annotation: Any, value: Any) -> tuple[bool, Any]:
    """Whether *value* has a JSON form that may be shown as a default, and that form."""
    try:
        values.measure(value, 1000)
        dumped = _adapter(annotation, "").dump_python(value, warnings="error")
        return True, values.result_json(dumped, 1000)[0]
    except (values.TooLarge, values.NotPlain, PydanticSerializationError, TypeError):
        return False, None


_WORDS = {
    "too_short": "it has too few items",
    "too_long": "it has too many items",
    "bytes_too_short": "it holds too few bytes",
    "bytes_too_long": "it holds too many bytes",
    "finite_number": "it is too large a number",
    "recursion_loop": "it is nested too deeply",
}


def _own(error: ValidationError, plain: object) -> list[Problem]:
    """What pydantic found where the schema has no objection: the author's own checks, and finer points of types."""
    found: dict[str, Problem] = {}
    if error.error_count() > _ERRORS:  # each would become a dict with copies of what was given
        return [Problem("Many of the values given are refused by checks of this tool.")]
    for detail in error.errors(include_url=False):
        path, given = _place(detail["loc"], plain)
        if path not in found:
            found[path] = Problem(f"{path or 'The arguments'}: {shown(given)} was given; {_reason(detail)}.")
    return list(found.values())


def _reason(detail: ErrorDetails) -> str:
    kind = detail["type"]
    cause = detail.get("ctx", {}).get("error")
    if kind not in ("value_error", "assertion_error"):
        text = _WORDS.get(kind, detail["msg"])
    elif type(cause) is ValueError:  # its text is pydantic's way of telling the caller
        text = str(cause)
    else:  # an assertion, or a subclass: an accident of other code, whose words may hold anything
        return "a check of this tool refused it"
    return text[:1].lower() + text[1:].rstrip(".")


def _place(loc: tuple[int | str, ...], plain: Any) -> tuple[str, Any]:
    """The path in the arguments that *loc* means, and what stands there; pydantic's own names in it are left out."""
    path: list[str] = []
    here = plain
    for part in loc:
        try:
            here = here[part]
        except (LookupError, TypeError):
            continue
        path.append(str(part))
    return ".".join(path), here


class Returns:
    """What one function returns: its schema, and the check of a value against the annotation. Raises TypeError."""

    def __init__(self, tool: str, annotation: Any) -> None:
        what = f"The result of {tool}"
        adapter = _adapter(annotation, what)
        self.schema: Schema = _generate(adapter, "serialization", what)
        self._validator = adapter.validator
        self._serializer = adapter.serializer

    def check(self, value: Any) -> Any:
        """*value* in pydantic's plain form. Raises values.NotPlain when it is not what the annotation says.

        Also a value whose JSON form is right will do: a dict for a model, an ISO string for a time.
        """
        try:
            try:
                checked = self._validator.validate_python(value, strict=True)
            except ValidationError as error:
                first = error
                try:
                    text = values.result_json(value, 1 << 62)[1]
                    checked = self._validator.validate_json(text, strict=True)
                except (ValidationError, values.NotPlain):
                    raise values.NotPlain(_mismatch(first)) from None
            return self._serializer.to_python(checked, by_alias=True, warnings="error")
        except PydanticSerializationError:
            raise values.NotPlain("a model in it holds values of other types than it declares") from None


def _mismatch(error: ValidationError) -> str:
    detail = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in detail["loc"] if isinstance(part, int) or part.isidentifier())
    message = "a check refused it" if "error" in detail.get("ctx", {}) else detail["msg"]
    return f"{'at ' + where + ': ' if where else ''}{message[:1].lower()}{message[1:]}"
