"""Tool calls out of a vendor's message, and the messages that answer them. Knows forms, no vendor's package.

Forms: OpenAI Chat Completions (``tool_calls``), OpenAI Responses (``function_call`` items), Anthropic (``tool_use``
blocks); each as plain values or as the objects of the vendor's package, which can become plain values.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeGuard, cast

from sandboxd.tools.code import view
from sandboxd.tools.code.pictures import pictures_of, short

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sandboxd.client.result import Result
    from sandboxd.tools.code.pictures import Picture
    from sandboxd.tools.result import ToolResult

__all__ = ["Call", "Event", "calls_of", "picture_notes", "replies", "text_of"]

Form = Literal["chat", "responses", "anthropic"]

RUN_CODE: Final = "run_code"


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a message. *arguments* is an object, or text that should be JSON; None when the vendor's own words
    for the call are not those of a function.
    """

    form: Form
    id: str
    name: str
    arguments: Any
    caller: Literal["model", "code"]
    vendor_caller: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """What is told for one call: text, whether it is an error, pictures."""

    call: Call
    text: str
    is_error: bool
    pictures: Sequence[Picture] = ()


def calls_of(message: object) -> list[Call]:
    """The calls in *message*, in order; none when the model only spoke. Raises ValueError for anything that is no
    message of a model in one of the forms, or has a call without an id, which nothing could answer.
    """
    plain = _plain(message)
    if _is_object(plain):
        return _calls_of_object(plain)
    if _is_list(plain):
        kinds = [item.get("type") for item in map(_object, plain)]
        return list(_anthropic(plain) if "tool_use" in kinds else _responses(plain))
    raise ValueError(f"A message is an object or a list of items, not {type(message).__name__}.")


def text_of(name: str, result: ToolResult, caller: str, note: str = "") -> str:
    """What the caller reads of *result*: compact JSON; of a run of code, for a model, lines of text. *note* follows."""
    if not result.ok:
        told = result.to_dict()["error"]
        text = _compact({"error": {**told, "attempts": note} if note else told})
    elif name == RUN_CODE and caller == "model":
        text = view.as_text(result.value)
        text = f"{text}\n{note}" if note else text
    else:
        text = _compact(result.value)
    return text


def picture_notes(result: Result) -> tuple[list[Picture], str]:
    """The pictures of a run, and lines for those that are not shown."""
    try:
        pictures, left_out = pictures_of(result)
    except (ValueError, OSError):  # the Result was dropped to make room for later ones
        return [], ""
    return pictures, "\n".join(map(view.flat, left_out))


def replies(answers: Sequence[Event]) -> list[dict[str, Any]]:
    """The messages for *answers*, which are those of one message and in its order."""
    if not answers:
        return []
    form = answers[0].call.form
    if form == "anthropic":
        return [{"role": "user", "content": [_tool_result(one) for one in answers]}]
    if form == "responses":
        return [_call_output(one) for one in answers]
    told: list[dict[str, Any]] = [{"role": "tool", "tool_call_id": one.call.id, "content": one.text} for one in answers]
    # Tool messages hold text alone here, so pictures come in a user's message behind them.
    parts = [part for one in answers if one.pictures for part in _picture_parts(one)]
    return [*told, {"role": "user", "content": parts}] if parts else told


# Reading


def _is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether *value* is a JSON object."""
    return isinstance(value, dict)


def _is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _plain(message: object) -> object:
    """Plain values for an object of a vendor's package; those are pydantic models."""
    dump = getattr(message, "model_dump", None)
    if callable(dump):
        return dump(mode="json", by_alias=True, warnings=False)
    if isinstance(message, list | tuple):
        return [_plain(item) for item in cast("Sequence[object]", message)]
    return message


def _object(item: object) -> dict[str, Any]:
    plain = _plain(item)
    if not _is_object(plain):
        raise ValueError(f"A message's items are objects, and one is of type {type(item).__name__}.")
    return plain


def _calls_of_object(message: dict[str, Any]) -> list[Call]:
    if isinstance(message.get("choices"), list):  # a whole chat completion
        if not message["choices"]:
            raise ValueError("The completion has no choices.")
        return _calls_of_object(_object(_object(message["choices"][0]).get("message")))
    if isinstance(message.get("output"), list) and "role" not in message:  # a whole response
        return list(_responses(message["output"]))
    if message.get("type") == "function_call":
        return list(_responses([message]))
    if message.get("type") == "tool_use":
        return list(_anthropic([message]))
    if message.get("role") != "assistant":
        raise ValueError(f"Only a model's message has calls; this one's role is {message.get('role')!r}.")
    if message.get("tool_calls") is not None:
        if not isinstance(message["tool_calls"], list):
            raise ValueError("tool_calls is not a list.")
        return list(_chat(message["tool_calls"]))
    if message.get("function_call") is not None:
        raise ValueError("function_call is OpenAI's older form. Give the model `tools`; it answers with tool_calls.")
    content = _plain(message.get("content"))
    return list(_anthropic(content)) if _is_list(content) else []


def _chat(calls: list[Any]) -> Iterator[Call]:
    for item in map(_object, calls):
        # What is no function is answered as one that is not known.
        kind = item.get("type") or "function"
        inner = _plain(item.get(kind)) if isinstance(kind, str) else None
        said: dict[str, Any] = inner if _is_object(inner) else {}
        arguments = said.get("arguments") if kind == "function" else said.get("input")
        yield Call("chat", _id(item.get("id")), _name(said.get("name")), _given(arguments), "model")


def _responses(items: list[Any]) -> Iterator[Call]:
    for item in map(_object, items):
        if item.get("type") == "function_call":
            caller = item.get("caller")
            program = _is_object(caller) and caller.get("type") == "program"
            yield Call(
                "responses",
                _id(item.get("call_id")),
                _name(item.get("name")),
                _given(item.get("arguments")),
                "code" if program else "model",
                caller if program else None,
            )


def _anthropic(blocks: list[Any]) -> Iterator[Call]:
    for block in map(_object, blocks):
        if block.get("type") == "tool_use":
            caller = block.get("caller")
            kind = caller.get("type") if _is_object(caller) else None
            # Whoever is not the model itself is code: an unknown kind gets the smaller rights of the two.
            who: Literal["model", "code"] = "model" if kind in (None, "direct") else "code"
            yield Call("anthropic", _id(block.get("id")), _name(block.get("name")), block.get("input"), who)


def _id(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("A call has no id, so it cannot be answered.")
    return value


def _name(value: object) -> str:
    return value if isinstance(value, str) else ""


def _given(arguments: object) -> object:
    """Some models send nothing at all where a function has no arguments."""
    return "{}" if arguments is None or arguments == "" else arguments


# Writing


def _compact(value: Any) -> str:
    """JSON in readable characters, as a model reads it best; those that could be mistaken for a line's end or steer a
    terminal are escaped by JSON itself or here.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text if text.isprintable() else json.dumps(value, allow_nan=False, separators=(",", ":"))


def _base64(picture: Picture) -> str:
    return base64.b64encode(picture.data).decode("ascii")


def _tool_result(answer: Event) -> dict[str, Any]:
    content: Any = answer.text
    if answer.pictures:
        content = [{"type": "text", "text": answer.text}]
        content += [
            {"type": "image", "source": {"type": "base64", "media_type": one.mime, "data": _base64(one)}}
            for one in answer.pictures
        ]
    return {
        "type": "tool_result",
        "tool_use_id": answer.call.id,
        "content": content,
        "is_error": answer.is_error,
    }


def _call_output(answer: Event) -> dict[str, Any]:
    output: Any = answer.text
    if answer.pictures:
        output = [{"type": "input_text", "text": answer.text}]
        output += [
            {"type": "input_image", "image_url": f"data:{one.mime};base64,{_base64(one)}", "detail": "auto"}
            for one in answer.pictures
        ]
    made: dict[str, Any] = {"type": "function_call_output", "call_id": answer.call.id, "output": output}
    if answer.call.vendor_caller is not None:
        made["caller"] = dict(answer.call.vendor_caller)
    return made


def _picture_parts(answer: Event) -> Iterator[dict[str, Any]]:
    names = ", ".join(view.flat(short(one.name)) for one in answer.pictures)
    yield {"type": "text", "text": f"Pictures that the program of call {view.flat(answer.call.id)} made: {names}"}
    for one in answer.pictures:
        yield {"type": "image_url", "image_url": {"url": f"data:{one.mime};base64,{_base64(one)}"}}
