"""Messages of the vendors: which calls are in them, and answers that the vendors' own packages take."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import json
import threading
import time
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from sandboxd.tools import Dispatcher, tool
from sandboxd.tools.code.pictures import (
    LOOKED_AT,
    LOOKED_AT_BYTES,
    MOST_PICTURES,
    PICTURE_BYTES,
    Picture,
    _checked,
    _Unfit,
    pictures_of,
)
from sandboxd.tools.vendors.forms import calls_of
from tests.support.pictures import damaged_png, endless_jpeg, jpeg, png

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd import Sandbox
    from sandboxd.client.result import Result

needs_openai = pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="openai is not installed")
needs_anthropic = pytest.mark.skipif(importlib.util.find_spec("anthropic") is None, reason="anthropic is not installed")
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@tool
def add(a: int, b: int = 1) -> int:
    """The sum."""
    return a + b


@tool(callers=("code",))
def for_code() -> str:
    """Only code may call it."""
    return "secret ✓"


@pytest.fixture(scope="module")
def dispatcher(sandbox: Sandbox) -> Iterator[Dispatcher]:
    with Dispatcher([add, for_code], sandbox=sandbox) as made:
        yield made


def chat(*calls: tuple[str, Any]) -> dict[str, Any]:
    """An assistant's message of Chat Completions: names with arguments as text, or as values."""
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": f"call_{number}",
                "type": "function",
                "function": {"name": name, "arguments": given if isinstance(given, str) else json.dumps(given)},
            }
            for number, (name, given) in enumerate(calls)
        ],
    }


def anthropic(*calls: tuple[str, Any], **more: Any) -> dict[str, Any]:
    """An assistant's message of Anthropic's Messages."""
    blocks: list[dict[str, Any]] = [{"type": "text", "text": "I look."}]
    blocks += [
        {"type": "tool_use", "id": f"toolu_{number}", "name": name, "input": given, **more}
        for number, (name, given) in enumerate(calls)
    ]
    return {"role": "assistant", "content": blocks}


def responses(*calls: tuple[str, Any], **more: Any) -> list[dict[str, Any]]:
    """Output items of OpenAI's Responses."""
    return [{"type": "reasoning", "id": "rs_1", "summary": []}] + [
        {"type": "function_call", "id": f"fc_{n}", "call_id": f"call_{n}", "name": name, "arguments": text, **more}
        for n, (name, text) in enumerate(calls)
    ]


# The three forms


def test_openai_calls_are_answered_one_message_each(dispatcher: Dispatcher) -> None:
    replies = dispatcher.handle(chat(("add", {"a": 1, "b": 2}), ("add", '{"a": 5}')))

    assert replies == [
        {"role": "tool", "tool_call_id": "call_0", "content": "3"},
        {"role": "tool", "tool_call_id": "call_1", "content": "6"},
    ]


def test_anthropic_calls_are_answered_in_one_message(dispatcher: Dispatcher) -> None:
    replies = dispatcher.handle(anthropic(("add", {"a": 1}), ("add", {"a": "x"})))

    assert [reply["role"] for reply in replies] == ["user"]
    first, second = replies[0]["content"]
    assert first == {"type": "tool_result", "tool_use_id": "toolu_0", "content": "2", "is_error": False}
    assert (second["tool_use_id"], second["is_error"]) == ("toolu_1", True)
    assert json.loads(second["content"])["error"]["code"] == "invalid_arguments"


def test_items_of_responses_are_answered_as_items(dispatcher: Dispatcher) -> None:
    assert dispatcher.handle(responses(("add", '{"a": 1}'))) == [
        {"type": "function_call_output", "call_id": "call_0", "output": "2"}
    ]


def test_null_means_left_out_in_openais_form_alone(dispatcher: Dispatcher) -> None:
    assert dispatcher.handle(chat(("add", {"a": 1, "b": None})))[0]["content"] == "2"
    (block,) = dispatcher.handle(anthropic(("add", {"a": 1, "b": None})))[0]["content"]
    assert block["is_error"]


def test_run_code_takes_the_nulls_of_openais_strict_mode(dispatcher: Dispatcher) -> None:
    given = {"code": "6 * 7", "language": None, "timeout": None, "files": None}

    assert "result:\n| 42" in dispatcher.handle(chat(("run_code", given)))[0]["content"]


@needs_openai
@quiet
def test_openais_own_types_take_the_answers(dispatcher: Dispatcher) -> None:
    from openai.types.chat import ChatCompletionMessageParam
    from openai.types.responses import ResponseInputItemParam

    code = f"open('a.png', 'wb').write({png(2, 2)!r}) and None"
    made = {"code": code}

    for reply in dispatcher.handle(chat(("run_code", made), ("add", "{"), ("nothing", "{}"))):
        TypeAdapter(ChatCompletionMessageParam).validate_python(reply)
    for reply in dispatcher.handle(responses(("run_code", json.dumps(made)), ("add", "{"))):
        TypeAdapter(ResponseInputItemParam).validate_python(reply)


@needs_anthropic
@quiet
def test_anthropics_own_types_take_the_answers(dispatcher: Dispatcher) -> None:
    from anthropic.types import MessageParam

    made = {"code": f"open('a.png', 'wb').write({png(2, 2)!r}) and None"}

    for reply in dispatcher.handle(anthropic(("run_code", made), ("add", {}), ("nothing", {}))):
        TypeAdapter(MessageParam).validate_python(reply)


@needs_openai
@quiet
def test_objects_of_openais_package_are_messages(dispatcher: Dispatcher) -> None:
    from openai.types.chat import ChatCompletion, ChatCompletionMessage
    from openai.types.responses import ResponseFunctionToolCall

    plain = chat(("add", {"a": 1}))
    completion = {
        "id": "x",
        "created": 0,
        "model": "m",
        "object": "chat.completion",
        "choices": [{"index": 0, "finish_reason": "tool_calls", "message": plain}],
    }
    expected = dispatcher.handle(plain)

    message = ChatCompletionMessage.model_validate(plain)
    assert dispatcher.handle(message) == expected
    assert dispatcher.handle(ChatCompletion.model_validate(completion)) == expected
    assert dispatcher.handle({"role": "assistant", "tool_calls": message.tool_calls}) == expected
    assert dispatcher.handle({"output": responses(("add", '{"a": 1}'))}) == dispatcher.handle(
        responses(("add", '{"a": 1}'))
    )
    item = ResponseFunctionToolCall.model_validate(responses(("add", '{"a": 1}'))[1])
    assert dispatcher.handle([item]) == dispatcher.handle(item) == dispatcher.handle(responses(("add", '{"a": 1}')))


@needs_anthropic
@quiet
def test_objects_of_anthropics_package_are_messages(dispatcher: Dispatcher) -> None:
    from anthropic.types import Message

    plain = anthropic(("add", {"a": 1}))
    message = Message.model_validate(
        {
            **plain,
            "id": "msg_1",
            "model": "m",
            "stop_reason": "tool_use",
            "type": "message",
            "usage": {"input_tokens": 1, "output_tokens": 1},
        }
    )
    expected = dispatcher.handle(plain)

    assert dispatcher.handle(message) == expected
    assert dispatcher.handle({"role": "assistant", "content": message.content}) == expected
    assert dispatcher.handle(message.content) == expected


# Who calls


@pytest.mark.parametrize(
    ("caller", "ok"),
    [
        ({"type": "direct"}, False),
        (None, False),
        ({"type": "code_execution_20260120", "tool_id": "srvtoolu_1"}, True),
        ({"type": "code_execution_20250825", "tool_id": "srvtoolu_1"}, True),
    ],
)
def test_anthropics_caller_says_whether_code_calls(dispatcher: Dispatcher, caller: Any, ok: bool) -> None:
    (block,) = dispatcher.handle(anthropic(("for_code", {}), caller=caller))[0]["content"]

    assert block["is_error"] is not ok
    if ok:
        assert json.loads(block["content"]) == "secret ✓"


def test_code_of_a_vendors_container_cannot_run_code(dispatcher: Dispatcher) -> None:
    call = anthropic(("run_code", {"code": "1"}), caller={"type": "code_execution_20260120", "tool_id": "x"})

    (block,) = dispatcher.handle(call)[0]["content"]

    assert json.loads(block["content"])["error"]["code"] == "caller_not_allowed"


def test_a_program_of_openais_calls_as_code_and_is_answered_as_such(dispatcher: Dispatcher) -> None:
    caller = {"type": "program", "caller_id": "call_9"}

    (item,) = dispatcher.handle(responses(("for_code", "{}"), caller=caller))

    assert json.loads(item["output"]) == "secret ✓"
    assert item["caller"] == caller


# What is wrong with a call is answered, what is no message raises


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("add", "{", "invalid_arguments"),
        ("add", '{"a": 1, "a": 2}', "invalid_arguments"),
        ("add", '{"a": NaN}', "invalid_arguments"),
        ("add", "[1]", "invalid_arguments"),
        ("add", "", "invalid_arguments"),  # a is missing
        ("add", '{"a": 1, "c": 2}', "invalid_arguments"),
        ("add", "[" * 100_000, "invalid_arguments"),
        ("ad", '{"a": 1}', "unknown_tool"),
        ("", "{}", "unknown_tool"),
        ("for_code", "{}", "caller_not_allowed"),
    ],
)
def test_wrong_calls_are_answered_with_what_is_wrong(
    dispatcher: Dispatcher, name: str, arguments: str, code: str
) -> None:
    (reply,) = dispatcher.handle(chat((name, arguments)))

    error = json.loads(reply["content"])["error"]
    assert error["code"] == code
    assert error["message"]
    assert error["hint"]


def test_a_function_without_arguments_may_be_sent_none(sandbox: Sandbox) -> None:
    @tool
    def ping() -> str:
        """Nothing to say."""
        return "pong"

    with Dispatcher([ping], sandbox=sandbox) as made:
        call = chat(("ping", ""))
        del call["tool_calls"][0]["function"]["arguments"]
        assert made.handle(call)[0]["content"] == '"pong"'
        assert made.handle(chat(("ping", "")))[0]["content"] == '"pong"'


def test_a_call_of_another_kind_is_answered_as_unknown(dispatcher: Dispatcher) -> None:
    call = {"id": "c", "type": "custom", "custom": {"name": "grammar", "input": "free text"}}

    (reply,) = dispatcher.handle({"role": "assistant", "content": None, "tool_calls": [call]})

    assert json.loads(reply["content"])["error"]["code"] == "unknown_tool"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "Hello."},
        {"role": "assistant", "content": None, "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]},
        {"role": "assistant", "content": [{"type": "server_tool_use", "id": "x", "name": "web_search", "input": {}}]},
        [{"type": "message", "role": "assistant", "content": []}],
        [],
    ],
)
def test_a_message_without_calls_needs_no_answer(dispatcher: Dispatcher, message: Any) -> None:
    assert dispatcher.handle(message) == []


@pytest.mark.parametrize(
    "message",
    [
        None,
        "text",
        7,
        {},
        {"role": "user", "content": "Hello."},
        {"role": "tool", "tool_call_id": "x", "content": "3"},
        {"role": "assistant", "tool_calls": "x"},
        {"role": "assistant", "tool_calls": ["x"]},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]},
        {"role": "assistant", "content": [{"type": "tool_use", "name": "add", "input": {}}]},
        [{"type": "function_call", "name": "add", "arguments": "{}"}],
        {"choices": []},
        ["x"],
    ],
)
def test_what_is_no_message_is_a_value_error(dispatcher: Dispatcher, message: Any) -> None:
    with pytest.raises(ValueError, match=r"\.$"):
        dispatcher.handle(message)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(
    [
        "role",
        "type",
        "content",
        "tool_calls",
        "id",
        "name",
        "input",
        "function",
        "arguments",
        "caller",
        "output",
        "custom",
    ]
)
WORDS = st.sampled_from(["assistant", "tool_use", "function_call", "function", "custom", "text", "direct", "add", ""])
SHAPES = st.recursive(
    WORDS | JSON,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=20,
)


@given(SHAPES)
def test_any_shape_is_a_list_of_calls_or_a_value_error(message: Any) -> None:
    try:
        calls = calls_of(message)
    except ValueError:
        return
    assert all(call.id and isinstance(call.name, str) for call in calls)
    assert len({call.form for call in calls}) <= 1


# Side by side


def test_calls_of_a_message_run_side_by_side_and_keep_their_order() -> None:
    meeting = threading.Barrier(8, timeout=30)

    @tool
    def meet(number: int) -> int:
        """Waits for the others."""
        meeting.wait()
        return number

    with Dispatcher([meet]) as made:
        replies = made.handle(chat(*(("meet", {"number": number}) for number in range(8))))

    assert [reply["content"] for reply in replies] == [str(number) for number in range(8)]


def test_more_calls_than_run_at_once_are_all_answered(dispatcher: Dispatcher) -> None:
    replies = dispatcher.handle(chat(*(("add", {"a": number}) for number in range(100))))

    assert [reply["content"] for reply in replies] == [str(number + 1) for number in range(100)]


def test_ahandle_runs_calls_side_by_side_on_the_loop() -> None:
    async def main() -> list[dict[str, Any]]:
        everyone = asyncio.Event()
        arrived: list[int] = []

        @tool
        async def meet(number: int) -> int:
            """Waits for the others."""
            arrived.append(number)
            if len(arrived) == 8:
                everyone.set()
            await asyncio.wait_for(everyone.wait(), 30)
            return number

        with Dispatcher([meet]) as made:
            return await made.ahandle(anthropic(*(("meet", {"number": number}) for number in range(8))))

    (reply,) = asyncio.run(main())
    assert [block["content"] for block in reply["content"]] == [str(number) for number in range(8)]


def test_cancelling_ahandle_cancels_the_calls() -> None:
    async def main() -> None:
        begun = asyncio.Event()
        ended: list[str] = []

        @tool
        async def hang(number: int) -> None:
            """Never returns."""
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("cancelled")

        with Dispatcher([hang]) as made:
            task = asyncio.create_task(made.ahandle(chat(("hang", {"number": 1}), ("hang", {"number": 2}))))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert ended == ["cancelled"] * 2

    asyncio.run(main())


def test_misuse_raises_also_from_the_threads() -> None:
    made = Dispatcher([add])
    made.close()
    with pytest.raises(RuntimeError, match="closed"):
        made.handle(chat(("add", {"a": 1}), ("add", {"a": 2})))


@pytest.mark.parametrize("most", [0, 2])
def test_calls_go_on_when_no_more_threads_can_be_started(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    begin = threading.Thread.start
    started: list[threading.Thread] = []

    def start(thread: threading.Thread) -> None:
        if len(started) == most:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        begin(thread)

    @tool
    def pay(number: int) -> int:
        """Must be done once."""
        done.append(number)
        return number

    with Dispatcher([pay]) as made:
        monkeypatch.setattr(threading.Thread, "start", start)
        replies = made.handle(chat(*(("pay", {"number": number}) for number in range(20))))

    assert [reply["content"] for reply in replies] == [str(number) for number in range(20)]
    assert sorted(done) == list(range(20))


@pytest.mark.parametrize("mode", ["handle", "ahandle"])
def test_a_dispatcher_that_is_closed_meanwhile_still_answers(mode: str) -> None:
    done: list[int] = []

    @tool
    def last() -> int:
        """The other call comes when nothing may be called any more."""
        made.close()
        done.append(1)
        return 1

    made = Dispatcher([last])
    calls: list[tuple[str, Any]] = [("last", {})] * 40
    replies = made.handle(chat(*calls)) if mode == "handle" else asyncio.run(made.ahandle(chat(*calls)))

    assert len(replies) == 40
    assert [reply["content"] for reply in replies].count("1") == len(done) > 0
    assert "The call failed in the host program." in replies[-1]["content"]


# Pictures


def makes(name: str, data: bytes) -> dict[str, Any]:
    """Arguments of run_code for a program that writes *data* to *name*."""
    content = base64.b64encode(data).decode()
    files = [{"path": "data", "content": content, "encoding": "base64"}]
    return {"code": f"import os; os.rename('data', {name!r})", "files": files}


def test_pictures_go_along_in_anthropics_result(dispatcher: Dispatcher) -> None:
    data = png(4, 3)

    (block,) = dispatcher.handle(anthropic(("run_code", makes("chart.png", data))))[0]["content"]

    text, picture = block["content"]
    assert text["type"] == "text"
    assert "- chart.png, " in text["text"]
    assert picture == {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": base64.b64encode(data).decode()},
    }


def test_pictures_follow_as_a_users_message_in_openais_chat(dispatcher: Dispatcher) -> None:
    data = jpeg(4, 3)

    replies = dispatcher.handle(chat(("run_code", makes("photo.jpeg", data)), ("add", {"a": 1})))

    assert [reply["role"] for reply in replies] == ["tool", "tool", "user"]
    text, picture = replies[2]["content"]
    assert text == {"type": "text", "text": "Pictures that the program of call call_0 made: photo.jpeg"}
    assert picture["image_url"]["url"] == f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def test_pictures_stand_in_the_output_of_responses(dispatcher: Dispatcher) -> None:
    (item,) = dispatcher.handle(responses(("run_code", json.dumps(makes("chart.png", png(2, 2))))))

    assert [part["type"] for part in item["output"]] == ["input_text", "input_image"]


def test_pictures_can_be_left_out(dispatcher: Dispatcher) -> None:
    (block,) = dispatcher.handle(anthropic(("run_code", makes("a.png", png(2, 2)))), pictures=False)[0]["content"]

    assert isinstance(block["content"], str)


def result_with(sandbox: Sandbox, **files: bytes) -> Result:
    """The Result of a run that left these files behind."""
    code = "import os\nfor name in os.listdir('in'): os.rename(f'in/{name}', name.replace('_', '.'))"
    return sandbox.run(code, files={f"in/{name}": data for name, data in files.items()})


BROKEN = {
    "neither PNG nor JPEG": b"\x89PNG\r\n\x1a",
    "the PNG is damaged": png(2, 2)[:-1],
    "the PNG is damaged ": png(2, 2).replace(b"IDAT", b"IDAX"),
    "8001 x 1 pixels": png(8001, 1),
    "0 x 1 pixels": png(0, 1),
    "the JPEG is damaged": jpeg(2, 2)[:-2],
    "8001 x 2 pixels": jpeg(8001, 2),
    "bytes are more than": png(2, 2) + b"\0" * PICTURE_BYTES,
}


@pytest.mark.parametrize("why", BROKEN)
def test_pictures_that_a_service_would_refuse_are_left_out_and_said_so(sandbox: Sandbox, why: str) -> None:
    with result_with(sandbox, a_png=BROKEN[why]) as result:
        pictures, left_out = pictures_of(result)

    assert pictures == []
    assert len(left_out) == 1
    assert why.strip() in left_out[0]


def test_only_so_many_pictures_go_along(sandbox: Sandbox) -> None:
    with result_with(sandbox, **{f"{number}_png": png(1, 1) for number in range(6)}) as result:
        pictures, left_out = pictures_of(result)

    assert [one.name for one in pictures] == [f"{number}.png" for number in range(MOST_PICTURES)]
    assert left_out == [f"picture {number}.png: not shown, only {MOST_PICTURES} pictures are" for number in (4, 5)]


def test_only_so_many_pictures_are_looked_at(sandbox: Sandbox) -> None:
    files = {f"{number:02}_jpg": endless_jpeg(100) for number in range(LOOKED_AT)}
    with result_with(sandbox, **files, z_png=png(1, 1)) as result:
        pictures, left_out = pictures_of(result)

    assert pictures == []
    assert left_out[-1] == "and 7 more pictures: not shown"
    assert left_out[0] == "picture 00.jpg: not shown, the JPEG is damaged"


def test_only_so_many_bytes_of_pictures_are_looked_at(sandbox: Sandbox) -> None:
    code = f"for n in range(9): open(f'{{n}}.jpg', 'wb').write(b'x' * {PICTURE_BYTES})\nopen('z.jpg', 'wb').write(b'x')"
    with sandbox.run(code) as result:
        pictures, left_out = pictures_of(result)

    assert pictures == []
    reasons = [line.partition(", ")[2] for line in left_out]
    most = LOOKED_AT_BYTES // PICTURE_BYTES
    assert reasons[:most] == ["it is neither PNG nor JPEG"] * most
    assert reasons[most:9] == ["only 16 pictures, and 16 MiB of them, are looked at"] * (9 - most)
    assert reasons[9] == "it is neither PNG nor JPEG"  # there is room for a small one


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (damaged_png(12 * 20_000), "the PNG has more than 10,000 chunks"),
        (b"\xff\xd8" + b"\xff\xe0\0\2" * 20_000, "the JPEG has more than 10,000 segments"),
        (b"\xff\xd8\xff\xe0\0\1" + jpeg(2, 2)[2:], "the JPEG is damaged"),
        (b"\xff\xd8" + b"\xff" * 1000, "the JPEG is damaged"),
    ],
)
def test_a_picture_of_too_many_or_of_wrong_parts_is_left_out(data: bytes, why: str) -> None:
    with pytest.raises(_Unfit, match=why):
        _checked(data)


def test_fill_bytes_before_a_marker_are_none_of_its_segment() -> None:
    data = jpeg(5, 4)
    assert _checked(data.replace(b"\xff\xc0", b"\xff" * 30 + b"\xc0")) == "image/jpeg"
    with pytest.raises(_Unfit, match="9001 x 4"):
        _checked(jpeg(9001, 4).replace(b"\xff\xc0", b"\xff" * 30 + b"\xc0"))


def test_lines_about_pictures_left_out_are_few_and_short(dispatcher: Dispatcher) -> None:
    code = "for n in range(300): open('p' * 150 + f'{n:03}.png', 'w').write('x')"
    (block,) = dispatcher.handle(anthropic(("run_code", {"code": code})))[0]["content"]

    lines = [line for line in block["content"].splitlines() if "not shown" in line]
    assert len(lines) == 11
    assert lines[0] == f"picture {'p' * 97}...: not shown, it is neither PNG nor JPEG"
    assert lines[-1] == "and 290 more pictures: not shown"


def test_a_picture_with_a_long_name_is_called_by_its_beginning(dispatcher: Dispatcher) -> None:
    *_, last = dispatcher.handle(chat(("run_code", makes("p" * 240 + ".png", png(1, 1)))))

    assert last["content"][0]["text"].endswith(f"made: {'p' * 97}...")


def test_displayed_pictures_are_pictures(sandbox: Sandbox) -> None:
    shown = base64.b64encode(png(1, 1)).decode()
    result = sandbox.run("1")
    displayed = result.model_copy(
        update={"results": [type(result.results[0])(mime={"text/plain": "<Figure>", "image/png": shown})]}
    )

    assert pictures_of(displayed) == ([Picture("results/0", "image/png", png(1, 1))], [])


def test_what_is_left_out_is_said_in_the_answer(dispatcher: Dispatcher) -> None:
    (block,) = dispatcher.handle(anthropic(("run_code", makes("a.png", b"no picture"))))[0]["content"]

    assert cast("str", block["content"]).endswith("picture a.png: not shown, it is neither PNG nor JPEG")


@given(st.binary(max_size=300), st.sampled_from([png(3, 3), jpeg(3, 3), b""]), st.integers(0, 200))
def test_any_bytes_are_a_picture_or_not(data: bytes, start: bytes, cut: int) -> None:
    try:
        kind = _checked(start[:cut] + data)
    except _Unfit:
        return
    assert kind in ("image/png", "image/jpeg")


# What a parser of pictures reads as structure, for a program that puts it together as nobody would.
PIECES = (
    *(b"\xff", b"\xff\xd8", b"\xff\xd9", b"\xff\xda\0\2", b"\xff\xda\0\0", b"\xff\xc0\0\x0b", b"\xff\xe0\xff\xff"),
    *(
        png(1, 1)[:8],
        png(1, 1)[8:33],
        png(1, 1)[33:],
        damaged_png(0),
        damaged_png(100)[-12:],
        b"\0\0\0\0IEND",
        bytes(4),
    ),
    *(jpeg(2, 2), jpeg(2, 2)[2:], b"\xff\xff\xff\xffIDAT", b"\x7f\xff\xff\xff"),
)


@given(st.lists(st.tuples(st.sampled_from(PIECES), st.integers(1, 2000)), max_size=8), st.sampled_from([png, jpeg]))
def test_pieces_of_pictures_are_read_in_little_time(pieces: list[tuple[bytes, int]], start: Any) -> None:
    data = start(2, 2)[:40] + b"".join(piece * count for piece, count in pieces)
    begun = time.thread_time()
    with contextlib.suppress(_Unfit):
        assert _checked(data) in ("image/png", "image/jpeg")
    assert time.thread_time() - begun < 0.5


def test_older_form_is_told_and_not_taken_for_an_answer_without_calls(dispatcher: Dispatcher) -> None:
    message = {"role": "assistant", "function_call": {"name": "add", "arguments": "{}"}}
    with pytest.raises(ValueError, match="older form"):
        dispatcher.handle(message)
