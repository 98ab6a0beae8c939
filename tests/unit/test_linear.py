"""Whatever a program, a client or a model can make is parsed in linear time, and so is a record of it.

The engine has one thread, and so has a caller's asyncio loop. What is quadratic there is a way to stop them: 3 MiB take
a thousand times as long as 100 KB. Each row names one parser and one shape that was made against it.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime  # noqa: TC003 (read by pydantic)
import io
import json
import os
import socket
import struct
import zlib
from decimal import Decimal  # noqa: TC003
from functools import cache, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast
from uuid import UUID

import pytest
from pydantic import AnyUrl, BaseModel, Field

from sandboxd import limits
from sandboxd.audit import reader, record
from sandboxd.audit.log import AuditLog
from sandboxd.audit.redact import Redactor
from sandboxd.cli import logs
from sandboxd.client.exchange import Exchange
from sandboxd.client.result import ProgramError, Result, RichResult
from sandboxd.engine.audit.tool_calls import CallRecords
from sandboxd.engine.cells.workspace import collect
from sandboxd.engine.clients import result_packet
from sandboxd.engine.runs.tool_relay import ToolRelay
from sandboxd.inside import channel
from sandboxd.outcome.collector import Collector
from sandboxd.outcome.judge import parse_finished
from sandboxd.protocol import packets as protocol
from sandboxd.protocol import run_header
from sandboxd.protocol.packets import Packet
from sandboxd.tools import result as outcome
from sandboxd.tools import tool
from sandboxd.tools.code import pictures, view
from sandboxd.tools.code.advice import Surroundings, advice
from sandboxd.tools.code.kept import Kept
from sandboxd.tools.code.link import RunTools
from sandboxd.tools.pipeline.recording import ToolCalled
from sandboxd.tools.schema import stubs, values
from sandboxd.tools.schema.annotations import Names
from sandboxd.tools.schema.checking import nearest
from sandboxd.tools.vendors import forms, vendors
from tests.support.linear import growth
from tests.support.pictures import damaged_png, endless_jpeg, jpeg, png
from tests.unit.test_result import answer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SAME_HASH = (1 << 61) - 1
"""Its multiples all have the hash 0. Source: sys.hash_info.modulus."""


# The instrument, before it is believed


def test_the_instrument_lets_linear_work_pass() -> None:
    assert growth(lambda n: b"ab" * n, lambda data: [data.count(b"ba"), *map(str, data)], 20_000).is_linear
    assert growth(lambda n: [*range(n)], sorted, 20_000).is_linear


QUADRATIC: dict[str, tuple[Callable[[int], Any], Callable[[Any], object], int]] = {
    "loop": (lambda n: [*range(n)], lambda given: [one for one in given for _ in given], 400),
    "search in C": (bytes, lambda data: [b"\xff\xd9" in data[at:] for at in range(0, len(data), 8)], 4000),
    "copy in C": (bytes, lambda data: [data[at:] for at in range(0, len(data), 8)], 20_000),
    "equal hashes": (lambda n: [k * SAME_HASH for k in range(n)], set, 1000),
    "list from its front": (lambda n: [*range(n)], lambda given: [given.copy().pop(0) for _ in given], 1500),
    "in a list": (lambda n: [str(k) for k in range(n)], lambda given: [one in given for one in given], 500),
    "pattern": (lambda n: "a" * n, lambda text: __import__("re").search("a*b", text), 1000),
}


@pytest.mark.parametrize("kind", QUADRATIC)
def test_the_instrument_notices_quadratic_work(kind: str) -> None:
    make, function, n = QUADRATIC[kind]
    # What disturbs it makes growth look smaller: one look of three that tells is enough.
    assert any(not growth(make, function, n).is_linear for _ in range(3))


# What is given to the parsers


def text_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def finished(**changes: Any) -> bytes:
    """A finished frame."""
    return json.dumps({"exit_code": 0, "error": None, "results": [], **changes}).encode()


def failed(**changes: Any) -> dict[str, Any]:
    return {"type": "E", "message": "", "traceback": "", "line": 1, "errno": None, **changes}


JSONS: dict[str, Callable[[int], bytes]] = {
    "lists in lists": lambda n: b'{"a":' + b"[" * n,
    "lists in lists, closed": lambda n: b'{"a":' + b"[" * n + b"]" * n + b"}",
    "objects in objects": lambda n: b'{"a":' * n,
    "32 deep, many times": lambda n: b'{"a":[' + b",".join([b"[" * 29 + b"]" * 29] * (n // 60)) + b"]}",
    "many keys": lambda n: json.dumps({f"k{k}": k for k in range(n)}).encode(),
    "one key over and over": lambda n: b"{" + b",".join([b'"k":1'] * n) + b"}",
    "equal prefixes": lambda n: json.dumps({"x" * 500 + str(k): 0 for k in range(n // 100)}).encode(),
    "long escapes": lambda n: b'{"a":"' + b"\\u0001" * n + b'"}',
    "backslashes without an end": lambda n: b'{"a":"' + b"\\" * n,
    "escaped quotes": lambda n: b'{"a":"' + b'\\"' * n + b'"}',
    "half surrogates": lambda n: b'{"a":"' + b"\\ud800" * n + b'"}',
    "quotes": lambda n: b'{"a":' + b'"' * n,
    "tiny strings": lambda n: b'{"a":[' + b",".join([b'""'] * n) + b"]}",
    "brackets in strings": lambda n: b'{"a":["' + b"[{" * n + b'"]}',
    "brackets and a stray backslash": lambda n: b'{"a":[\\"' + b"[]" * n + b'"]}',
    "digits": lambda n: b'{"a":' + b"1" * n + b"}",
    "digits of a fraction": lambda n: b'{"a":0.' + b"1" * n + b"}",
    "zeros of a fraction": lambda n: b'{"a":0.' + b"0" * n + b"1}",
    "digits of an exponent": lambda n: b'{"a":1e-' + b"1" * n + b"}",
    "numbers of 4,300 digits": lambda n: b'{"a":[' + b",".join([b"7" * 4300] * (n // 4300)) + b"]}",
    "spaces": lambda n: b'{"a":' + b" \n" * n + b"}",
    "commas": lambda n: b'{"a":[' + b"," * n,
    "not UTF-8": lambda n: b'{"a":"' + b"\xff" * n + b'"}',
    "four-byte characters": lambda n: b'{"a":"' + "\U0001f600".encode() * n + b'"}',
}

FRAMES: dict[str, Callable[[int], bytes]] = {
    "keys": lambda n: finished(**{f"k{k}": 1 for k in range(n)}),
    "a long text": lambda n: finished(results=[{"text/plain": "é\n" * n}]),
    "half surrogates everywhere": lambda n: finished(
        results=[{"text/plain": "\ud800a" * (n // 16)} for _ in range(16)]
    ),
    "keys that become one": lambda n: finished(
        error={"\ud800" * (k % 9 + 1) + "\udfff" * (k % 40): "" for k in range(n)}
    ),
    "kinds of a result": lambda n: finished(results=[{f"k{k}": "" for k in range(n)}]),
    "results": lambda n: finished(results=[{}] * n),
    "a traceback": lambda n: finished(exit_code=1, error=failed(traceback="\udc80\n" * n)),
    "a type": lambda n: finished(exit_code=1, error=failed(type="x" * n)),
}

ARGUMENTS: dict[str, Callable[[int], str]] = {
    name: partial(lambda make, n: make(n).decode("utf-8", "replace"), make) for name, make in JSONS.items()
}


class Leaf(BaseModel):
    kind: Literal["leaf"]
    name: str


class Branch(BaseModel):
    kind: Literal["branch"]
    below: list[Annotated[Leaf | Branch, Field(discriminator="kind")]]
    more: dict[str, Branch] | None = None


class Row(BaseModel, frozen=True):
    a: int
    b: str = ""


@tool
def takes(
    numbers: set[int] | None = None,
    fractions: set[float] | None = None,
    decimals: set[Decimal] | None = None,
    ids: frozenset[UUID] | None = None,
    spans: set[datetime.timedelta] | None = None,
    pairs: set[tuple[int, int]] | None = None,
    rows: set[Row] | None = None,
    words: set[str] | None = None,
    several: list[set[int]] | None = None,
    any_of: list[Row | Leaf] | None = None,
    tree: Branch | None = None,
    data: bytes | None = None,
    one: Decimal | None = None,
    when: datetime.datetime | None = None,
    span: datetime.timedelta | None = None,
    url: AnyUrl | None = None,
    odd: Literal["north", "south", 3] | None = None,
    named: dict[str, Row] | None = None,
    integer: int | None = None,
) -> dict[str, Any]:
    """Takes what pydantic can read."""
    return {}


def deep(n: int, most: int = 9) -> dict[str, Any]:
    """A tree of about *n* branches, the last of which are wrong."""
    here: list[Any] = [{"kind": "leaf", "name": 5}] * (n // most)
    for _ in range(most):
        here = [{"kind": "branch", "below": here}, {"kind": "leaf", "name": "x"}]
    return {"kind": "branch", "below": here}


GIVEN: dict[str, Callable[[int], dict[str, Any]]] = {
    "set of integers of one hash": lambda n: {"numbers": [k * SAME_HASH for k in range(1, 5 * n)]},
    "set of floats": lambda n: {"fractions": [float(k) for k in range(5 * n)]},
    "set of decimals of one hash": lambda n: {"decimals": [str(k * SAME_HASH) for k in range(1, 5 * n)]},
    "set of UUIDs of one hash": lambda n: {"ids": [str(UUID(int=k * SAME_HASH)) for k in range(1, 5 * n)]},
    "set of durations": lambda n: {"spans": [f"P{k}D" for k in range(5 * n)]},
    "set of pairs of one hash": lambda n: {"pairs": [[k * SAME_HASH, 0] for k in range(1, 5 * n)]},
    "set of models of one hash": lambda n: {"rows": [{"a": k * SAME_HASH} for k in range(1, 5 * n)]},
    "sets of one hash": lambda n: {"several": [[k * SAME_HASH for k in range(1, 100)]] * (n // 100)},
    "set of words": lambda n: {"words": [f"word{k}" for k in range(5 * n)]},
    "choices": lambda n: {"any_of": [{"kind": "leaf", "a": 1}] * n},
    "choices of many keys": lambda n: {"any_of": [{f"k{k}": 1 for k in range(n)}]},
    "a tree": lambda n: {"tree": deep(n)},
    "a broad tree": lambda n: {"tree": {"kind": "branch", "below": [{"kind": "branch", "below": []}] * n}},
    "unknown keys": lambda n: {f"unknown{k}": 1 for k in range(n)},
    "unknown keys of 200 letters": lambda n: {"numbers" * 28 + str(k): 1 for k in range(n // 50)},
    "base64 with a wrong end": lambda n: {"data": "AAAA" * n + "!"},
    "base64": lambda n: {"data": "AAAA" * n},
    "a decimal with a wrong end": lambda n: {"one": "1" * n + "!"},
    "a decimal": lambda n: {"one": "1" * n + "." + "2" * n},
    "a duration with a wrong end": lambda n: {"span": "P1DT" + "1" * n + "!"},
    "a time": lambda n: {"when": "2024-01-01T" + "0" * n},
    "an URL of dots": lambda n: {"url": "http://a/" + "../a/" * n},
    "an URL of other scripts": lambda n: {"url": "http://" + "".join(chr(0x4E00 + k % 20_000) for k in range(n)) + "/"},
    "an URL of at signs": lambda n: {"url": "http://" + "@" * n},
    "nearly a word": lambda n: {"odd": "nort" * n},
    "keys of one model": lambda n: {"named": {f"k{k}": {"a": k, "b": 1} for k in range(n)}},
    "whole floats": lambda n: {"named": {f"k{k}": {"a": float(k)} for k in range(n)}},
    "digits as text": lambda n: {"integer": "1" * n},
}


def read_arguments(given: tuple[dict[str, Any], str]) -> object:
    plain, text = given
    values.check(plain)
    return takes._arguments.read(values.arguments_json(values.parse(text)), plain)


NAMES: dict[str, Callable[[int], list[str]]] = {
    "short": lambda n: [str(k) for k in range(n)],
    "equal prefixes": lambda n: ["/".join(["d" * 200] * 5) + f"/{k}" for k in range(n // 20)],
    "deep": lambda n: ["a/" * 1000 + str(k) for k in range(n // 100)],
    "one below the other": lambda n: ["/".join(["a"] * (k % 50 + 1)) + f"/f{k}" for k in range(n)],
    "other scripts": lambda n: ["é" * 100 + str(k) for k in range(n // 4)],
    "a file and its directory": lambda n: [*(f"a{k}" for k in range(n)), "a0/b"],
    "equal": lambda n: ["same"] * n,
    "too long": lambda n: ["x" * n],
    "dots": lambda n: ["./" * n],
    "NUL at the end": lambda n: ["x/" * n + "\0"],
}


def request(names: list[str], **changes: Any) -> dict[str, Any]:
    """The header of a run."""
    header = {
        **{"code_bytes": 0, "stdin_bytes": None, "args": [], "env": {}, "limits": {}, "language": "python"},
        **{"filename": "main.py", "stream": False, "results": True, "files": [[name, 0] for name in names]},
    }
    return {**header, **changes}


def sent(names: list[str], out: bytes = b"", **changes: Any) -> tuple[dict[str, Any], bytes]:
    """An engine's answer with files of these names."""
    files = [{"path": name, "size_bytes": 0, "offset": 0} for name in names]
    return answer(files=files, stdout=[0, len(out)], stderr=[0, len(out)], **changes), out


@cache
def plain_result() -> Result:
    return Result.from_wire(*sent([]))


def result(**changes: Any) -> Result:
    """A Result with other values."""
    return plain_result().model_copy(update={"status": "ok", "error": None, "results": [], "files": [], **changes})


def failing(kind: str, message: str, traceback: str = "") -> Result:
    return result(status="error", error=ProgramError(type=kind, message=message, traceback=traceback, line=1))


def shown(kind: str, texts: list[str]) -> Result:
    return result(results=[RichResult(mime={kind: text}) for text in texts])


def left(*contents: bytes) -> Any:
    """A Result of a run that left these pictures."""
    files = [
        SimpleNamespace(path=f"{k}.jpg", size_bytes=len(data), read=lambda data=data: data)
        for k, data in enumerate(contents)
    ]
    return SimpleNamespace(id="0" * 16, results=[], files=files)


def tell(made: Result) -> object:
    """All that a model is told of it."""
    around = Surroundings(["query"], ["in.csv"], [f"package{k}" for k in range(300)], 10.0)
    return view.as_text(view.value_of(made, tool_calls=1, advice=advice(made, around), review=None))


STREAMS: dict[str, Callable[[int], str]] = {
    "lines": lambda n: "\n" * n,
    "letters": lambda n: "x" * n,
    "escape sequences": lambda n: "\x1b[2J" * n,
    "line separators": lambda n: "\u2028" * n,
    "tabs": lambda n: "\t" * n,
    "tracebacks": lambda n: "Traceback (most recent call last):\n" * n,
}
MESSAGES: dict[str, Callable[[int], str]] = {
    "module, over and over": lambda n: "No module named '" * n,
    "module of dots": lambda n: "No module named '" + "." * n,
    "path, over and over": lambda n: "No such file or directory: '" * n,
    "path without an end": lambda n: "No such file or directory: b'" + "x" * n,
}


def collected(chunks: list[bytes]) -> object:
    for keep in (1, 1000, 1 << 20):
        kept = Collector(keep)
        for chunk in chunks:
            kept.add(chunk)
        kept.kept()
    return None


def streamed(chunks: list[bytes]) -> object:
    """An exchange whose program prints."""
    given: dict[str, Any] = dict.fromkeys(("policy", "limits", "files", "stdin", "env", "on_stderr"))
    exchange = Exchange(
        "", base_limits={}, language="python", args=(), filename="main.py", results=True, on_stdout=len, **given
    )
    for chunk in chunks:
        exchange.feed(Packet({"op": "output", "stream": 1}, chunk, len(chunk)))
    return None


class Quiet:
    """A run whose program calls; a share of the engine's time; a socket that takes everything."""

    def waits(self, _: bool) -> None: ...
    def freeze(self, _: object) -> None: ...
    def thaw(self) -> None: ...
    def listen(self, _: bool) -> None: ...

    def spent(self, _: float) -> float:
        return 0.0

    def send(self, data: bytes, _: int) -> int:
        return len(data)

    def fileno(self) -> int:
        return -1


def called(packets: list[bytes]) -> object:
    """A run's tool calls, in the engine: the host's end is read, so that nothing waits."""

    async def link() -> None:
        quiet = cast("Any", Quiet())
        made = ToolRelay(quiet, quiet, 1_000_000, quiet, CallRecords(lambda _: None))
        host = socket.socket(fileno=made.take_theirs())
        host.setblocking(False)
        try:
            for packet in packets:
                made.from_cell(packet)
                with contextlib.suppress(BlockingIOError):
                    host.recv(1 << 17)
        finally:
            made.close()
            host.close()

    asyncio.run(link())
    return None


def heard(packets: list[bytes]) -> object:
    """The same packets in the host's program."""
    box = RunTools("", 1, lambda body, _: body)
    for packet in packets:
        box._take(packet)
    return None


def calls_of(n: int, body: bytes) -> list[bytes]:
    return [part for number in range(n) for part in channel.tool_frames(channel.CALL, number, body)]


BEGUN = b'{"tool": "query", "arguments": '


def refuses(n: int) -> list[bytes]:
    return calls_of(n, b'{"tool": "' + b"x" * 200)


def told(body: bytes) -> object:
    """The record of one call in the engine, as it is written."""
    written: list[bytes] = []
    records = CallRecords(lambda one: written.append(record.body({"event": "tool_called", **one}, 0)))
    for index, at in enumerate(range(0, len(body), 1000)):
        records.call(1, body[at : at + 1000], index)
    records.answer(1, body, last=True)
    return written


SECRETS = Redactor(["*token*", "key"], {"A_TOKEN": "aaaaaaaaaaaaaaaaaaaaaaaaab", "KEY": "ab" * 60})
RECORDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "code like a secret": lambda n: {"event": "run_started", "code": "a" * n},
    "code of beginnings": lambda n: {"event": "run_started", "code": "aaaaaaaa" + "abababab" * n},
    "error of cut secrets": lambda n: {"event": "run_ended", "error": {"message": "aaaaaaaaaa..." * n}},
    "control characters": lambda n: {"event": "run_started", "code": "\x01\x7f\u2028" * n},
    "marks": lambda n: {"event": "run_started", "code": "".join(map(chr, range(1, 32))) * n},
    "arguments of many keys": lambda n: {"event": "tool_called", "arguments": {f"k{k}": "a" for k in range(n)}},
    "arguments of secrets": lambda n: {
        "event": "tool_called",
        "arguments": {f"token{k}": f"aaaa{k}" for k in range(n)},
    },
    "numbers of one hash": lambda n: {"event": "tool_called", "arguments": {"key": [k * SAME_HASH for k in range(n)]}},
    "too deep": lambda n: {"event": "tool_called", "arguments": nested(n)},
    "half surrogates": lambda n: {"event": "tool_called", "result": "\ud800" * n},
    "no JSON": lambda n: {"event": "tool_called", "arguments": {"a": float("nan"), "b": "x" * n}},
    "a text of stars": lambda n: {"event": "tool_called", "arguments": {"to" * n: 1, "token" * n: 2}},
}


def nested(n: int) -> Any:
    made: Any = 1
    for _ in range(n):
        made = [made]
    return made


def recorded(given: dict[str, Any]) -> bytes:
    return record.body(SECRETS(given), 0)


def of_dispatcher(given: Any) -> bytes:
    """A dispatcher's record of a call whose arguments were refused."""
    failure = outcome.refusal("invalid_arguments", "No.")
    return record.body(SECRETS(ToolCalled("query", "code", None, "", given, failure, 0.0)), 0)


def shown_in_terminal(line: bytes) -> object:
    with contextlib.redirect_stdout(io.StringIO()):
        logs.brief(line)
        logs.whole(line)
        logs.raw(line)
    return None


def many_tools(n: int) -> list[Any]:
    return [made_tool(k) for k in range(n)]


@cache
def made_tool(k: int) -> Any:
    one = type("Row", (BaseModel,), {"__annotations__": {f"field{k}": int}, "__module__": __name__})

    def query(row: Any) -> Any:
        return None

    query.__annotations__ = {"row": one, "return": one}
    query.__doc__ = '"""' * (k % 50) + "\\" * (k % 50) + "\x07"
    from sandboxd.tools import Tool

    return Tool(query, name=f"query{k}")


def named(keys: list[str]) -> object:
    names = Names()
    return [names.of("Row", key) for key in keys]


def keep(many: list[Any]) -> None:
    kept = Kept(runs=1000, size_bytes=1 << 40)
    for number, one in enumerate(many):
        one.id = str(number)
        one.close = bool
        kept.add(one)


ROWS: list[tuple[str, Callable[[int], Any], Callable[[Any], object], int]] = [
    *((f"message: {name}", make, protocol.loads, 8000) for name, make in JSONS.items()),
    *((f"finished: {name}", make, parse_finished, 8000) for name, make in FRAMES.items()),
    *((f"arguments' text: {name}", make, values.parse, 8000) for name, make in ARGUMENTS.items()),
    *(
        (f"arguments: {name}", partial(lambda make, n: (make(n), json.dumps(make(n))), make), read_arguments, 2000)
        for name, make in GIVEN.items()
    ),
    ("arguments in OpenAI's form", lambda n: {"tree": deep(n)}, partial(vendors.from_openai, takes), 2000),
    ("arguments: depth", nested, values.arguments_json, 20_000),
    ("arguments: size", lambda n: {"a": [[]] * n}, values.is_small, 20_000),
    ("a tool's name", lambda n: "x" * n, lambda name: nearest(name, ["query", "send"]), 20_000),
    ("a value in words", lambda n: {"a": ["\x01" * n], "b": nested(n % 900)}, outcome.shown, 20_000),
    ("a value in an error", lambda n: ["\x01" * n], limits.shown, 20_000),
    *(
        (
            f"names of a request: {name}",
            lambda n, make=make: request(make(n)),
            lambda h: run_header.parse_header(h, b""),
            2000,
        )
        for name, make in NAMES.items()
    ),
    (
        "request: keys",
        lambda n: request([], **{f"k{k}": 1 for k in range(n)}),
        lambda h: run_header.parse_header(h, b""),
        20_000,
    ),
    ("request: words", lambda n: request([], args=["é"] * n), lambda h: run_header.parse_header(h, b""), 5000),
    (
        "request: environment",
        lambda n: request([], env={f"A{k}": "" for k in range(n)}),
        lambda h: run_header.parse_header(h, b""),
        5000,
    ),
    (
        "request: limits",
        lambda n: request([], limits={f"l{k}": 1 for k in range(n)}),
        lambda h: run_header.parse_header(h, b""),
        20_000,
    ),
    (
        "request: a limit",
        lambda n: request([], limits={"memory_bytes": "9" * n}),
        lambda h: run_header.parse_header(h, b""),
        20_000,
    ),
    (
        "request: sizes",
        lambda n: request([], code_bytes=1 << n, files=[[f"{k}", 1 << n % 60] for k in range(n)]),
        lambda h: run_header.parse_header(h, b""),
        2000,
    ),
    ("request: source", lambda n: "é" * n + "\0", run_header.check_code, 200_000),
    ("request: half a surrogate", lambda n: "é" * n + "\ud800", run_header.check_code, 200_000),
    *(
        (
            f"room for files: {name}",
            lambda n, make=make: [(path, 1) for path in make(n)],
            lambda files: run_header.check_inputs_fit(files, {"workspace_bytes": None, "workspace_files": None}),
            2000,
        )
        for name, make in NAMES.items()
    ),
    *(
        (f"names of a result: {name}", lambda n, make=make: sent(make(n)), lambda given: Result.from_wire(*given), 2000)
        for name, make in NAMES.items()
    ),
    ("names in an answer", lambda n: sent(["é" * 100 + str(k) for k in range(n)])[0], result_packet._shorten, 4000),
    ("result: no UTF-8", lambda n: sent([], b"\xff\xe2\x80" * n), lambda given: Result.from_wire(*given), 50_000),
    (
        "result: wrong files",
        lambda n: sent([], limits_hit=[{"limit": f"l{k}"} for k in range(n)]),
        lambda given: Result.from_wire(*given),
        1000,
    ),
    (
        "result: values",
        lambda n: sent([], results=[{"mime": {f"k{k}": "" for k in range(n)}}]),
        lambda given: Result.from_wire(*given),
        4000,
    ),
    ("result: JSON", lambda n: result(stdout="\u2028\ud800" * n), Result.to_json, 50_000),
    ("result: repr", lambda n: result(stdout="\x01" * n), repr, 50_000),
    *(
        (f"stdout: {name}", lambda n, make=make: result(stdout=make(n), stderr=make(n)), tell, 50_000)
        for name, make in STREAMS.items()
    ),
    *(
        (f"traceback: {name}", lambda n, make=make: failing("E", make(n), make(n)), tell, 50_000)
        for name, make in STREAMS.items()
    ),
    *(
        (f"message of an exception: {name}", lambda n, make=make: failing("ModuleNotFoundError", make(n)), tell, 5000)
        for name, make in MESSAGES.items()
    ),
    *(
        (f"message of an error: {name}", lambda n, make=make: failing("FileNotFoundError", make(n)), tell, 5000)
        for name, make in MESSAGES.items()
    ),
    ("displayed values", lambda n: shown("text/plain", ["\x1b"] * n), tell, 1000),
    (
        "kinds of a displayed value",
        lambda n: result(results=[RichResult(mime={f"k{k}": "" for k in range(n)})]),
        tell,
        20_000,
    ),
    (
        "files told",
        lambda n: result(files=[SimpleNamespace(path=f"\x01{k}", size_bytes=1) for k in range(n)]),
        tell,
        20_000,
    ),
    (
        "stderr with its traceback",
        lambda n: failing("E", "", "\n" * n).model_copy(update={"stderr": "\n" * n}),
        tell,
        50_000,
    ),
    ("an answer to a model", lambda n: ["\u2028é"] * n, forms._compact, 20_000),
    ("kept results", lambda n: [left(*[b""] * 100) for _ in range(n)], keep, 40),
    ("JPEG: scans without an end", endless_jpeg, pictures._checked, 40_000),
    ("JPEG: scan without a frame", lambda n: b"\xff\xd8" + b"\xff\xda\x00\x02" * n, pictures._checked, 40_000),
    ("JPEG: fill bytes", lambda n: b"\xff\xd8" + b"\xff" * n, pictures._checked, 200_000),
    (
        "JPEG: fill bytes at each marker",
        lambda n: b"\xff\xd8" + (b"\xff" * 50 + b"\xe0\x00\x02") * n,
        pictures._checked,
        5000,
    ),
    ("JPEG: empty segments", lambda n: b"\xff\xd8" + b"\xff\xe0\x00\x02" * n, pictures._checked, 4000),
    ("JPEG: segments of no length", lambda n: b"\xff\xd8" + b"\xff\xe0\x00\x00" * n, pictures._checked, 4000),
    ("JPEG: half an end", lambda n: jpeg(2, 2)[:-2] + b"\xff" * n, pictures._checked, 200_000),
    ("PNG: empty chunks", damaged_png, pictures._checked, 20_000),
    ("PNG: empty chunks before the head", lambda n: png(1, 1)[:8] + damaged_png(n), pictures._checked, 20_000),
    (
        "PNG: one long chunk",
        lambda n: png(1, 1)[:33] + struct.pack(">I", n) + b"IDAT" + bytes(n + 4),
        pictures._checked,
        1_000_000,
    ),
    (
        "PNG: long chunks",
        lambda n: (
            png(1, 1)[:33]
            + (struct.pack(">I", 9999) + b"tEXt" + bytes(9999) + struct.pack(">I", zlib.crc32(b"tEXt" + bytes(9999))))
            * (n // 9999)
        ),
        pictures._checked,
        1_000_000,
    ),
    ("pictures: damaged ones", lambda n: left(*[endless_jpeg(40_000)] * n), pictures.pictures_of, 64),
    ("pictures: too large ones", lambda n: left(*[bytes(pictures.PICTURE_BYTES + 1)] * n), pictures.pictures_of, 64),
    (
        "pictures: names",
        lambda n: result(
            files=[SimpleNamespace(path="\u0130" * 50 + f"{k}.PNG", size_bytes=1 << 40) for k in range(n)]
        ),
        pictures.pictures_of,
        4000,
    ),
    ("pictures: base64", lambda n: shown("image/png", ["AAAA" * n + "!", "\x80" * n]), pictures.pictures_of, 40_000),
    ("pictures: base64 of padding", lambda n: "=" * n, pictures._decoded, 200_000),
    (
        "pictures: answers",
        lambda n: [
            forms.Event(
                forms.Call("chat", "1", "x", {}, "model"), "", False, [pictures.Picture("x", "image/png", bytes(n))]
            )
        ],
        forms.replies,
        400_000,
    ),
    ("output: tiny chunks", lambda n: [b"x"] * n, collected, 4000),
    ("output: large chunks", lambda n: [bytes(1 << 16)] * n, collected, 40),
    ("output: halves of characters", lambda n: [b"\xf0\x9f"] * n, collected, 4000),
    ("streamed: tiny chunks", lambda n: [b"x"] * n, streamed, 2000),
    ("streamed: halves of characters", lambda n: [b"\xf0\x9f"] * n, streamed, 2000),
    ("tool calls: parts", lambda n: calls_of(1, BEGUN + b"[" * n), called, 100_000),
    ("tool calls: small ones", lambda n: calls_of(n, BEGUN + b"{}}"), called, 400),
    ("tool calls: refused ones", refuses, called, 400),
    ("tool calls: one part over and over", lambda n: calls_of(1, BEGUN + bytes(70_000))[:1] * n, called, 400),
    ("tool calls in the host: parts", lambda n: calls_of(1, bytes(n)), heard, 400_000),
    ("tool calls in the host: beginnings", lambda n: [calls_of(1, bytes(70_000))[0]] * n, heard, 400),
    ("tool calls in the record: parts", lambda n: BEGUN + b"[" * n, told, 50_000),
    ("tool calls in the record: no UTF-8", lambda n: BEGUN + b"\xff" * n, told, 50_000),
    ("tool calls in the record: many", lambda n: b"x" * n, lambda body: [told(body) for _ in range(3)], 50_000),
    *((f"record: {name}", make, recorded, 2000) for name, make in RECORDS.items()),
    ("record: refused arguments", lambda n: {"a": [[]] * n}, of_dispatcher, 20_000),
    ("record: refused text", lambda n: '{"a":' * n, of_dispatcher, 20_000),
    ("record: refused object", lambda n: {k: {1: 2} for k in range(n)}, of_dispatcher, 5000),
    *(
        (f"line of the record: {name}", lambda n, make=make: recorded(make(n)), shown_in_terminal, 2000)
        for name, make in RECORDS.items()
    ),
    ("line: lists in lists", lambda n: b"[" * n, shown_in_terminal, 20_000),
    (
        "line: many lines of code",
        lambda n: json.dumps({"event": "run_started", "code": "\n\t" * n}).encode(),
        shown_in_terminal,
        2000,
    ),
    (
        "line: limits",
        lambda n: json.dumps({"event": "run_ended", "limits_hit": [{"limit": "\x1b"}] * n}).encode(),
        shown_in_terminal,
        4000,
    ),
    (
        "a message's calls",
        lambda n: {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "x", "input": {}}] * n},
        forms.calls_of,
        4000,
    ),
    ("types of one name", lambda n: [str(k) for k in range(n)], named, 400),
    ("stubs for a prompt", many_tools, stubs.prompt_stubs, 60),
    ("module of a cell", many_tools, stubs.cell_module, 60),
    ("docstring of quotes", lambda n: '"\\\x07' * n, stubs._docstring, 20_000),
]


@pytest.mark.parametrize(("make", "function", "n"), [pytest.param(*row, id=name) for name, *row in ROWS])
def test_work_grows_with_its_input(make: Callable[[int], Any], function: Callable[[Any], object], n: int) -> None:
    found = growth(make, function, n)

    assert found.is_linear, found


# What needs a file system


class HostFiles:
    """As ``CellFiles``, on a directory of the host."""

    def open_directory(self, at: int, path: str) -> int:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)

    def open(self, at: int, path: str) -> int:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=at)


def directory(base: Path, n: int, parts: int = 1) -> int:
    place = base / str(n)
    place.joinpath(*["d" * 100] * parts).mkdir(parents=True, exist_ok=True)
    for k in range(n):
        place.joinpath(*["d" * 100] * parts, f"{k}" + "x" * 100).touch()
    return os.open(place, os.O_RDONLY | os.O_DIRECTORY)


@pytest.mark.parametrize("parts", [1, 30])
def test_files_are_collected_in_linear_time(tmp_path: Path, parts: int) -> None:
    open_now: dict[int, int] = {}

    def made(n: int) -> int:
        if n not in open_now:
            open_now[n] = directory(tmp_path, n, parts)
        return open_now[n]

    def collecting(workspace: int) -> object:
        collect(cast("Any", HostFiles()), workspace, {}, 1 << 30).close()
        return None

    try:
        found = growth(made, collecting, 200)
        assert found.is_linear, found
    finally:
        for fd in open_now.values():
            os.close(fd)


def audit_file(path: Path, lines: int, characters: int) -> str:
    name = str(path / f"{lines}-{characters}")
    if not os.path.exists(name):
        with AuditLog(name, max_bytes=1 << 30) as log:
            for _ in range(lines):
                log.append({"event": "run_started", "id": "ab", "code": "\x01" * characters})
    return name


READERS: dict[str, Callable[[str], object]] = {
    "verified": reader.verify,
    "paged": lambda path: pages(path, None),
    "paged for one run": lambda path: pages(path, "ab"),
    "opened again": lambda path: AuditLog(path, max_bytes=1 << 30).close(),
}


def pages(path: str, run: str | None) -> int:
    return sum(map(len, reader.follow(lambda cursor: reader.page(path, cursor, run=run, most_bytes=1 << 14), None)))


@pytest.mark.parametrize("reading", READERS)
@pytest.mark.parametrize("shape", ["lines", "a long line"])
def test_a_record_is_read_in_linear_time(tmp_path: Path, reading: str, shape: str) -> None:
    def made(n: int) -> str:
        return audit_file(tmp_path, n, 10) if shape == "lines" else audit_file(tmp_path, 2, n * 200)

    found = growth(made, READERS[reading], 240)
    assert found.is_linear, found
