"""Tool calls in the audit record of an engine, as they passed through it."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd import Policy, Sandbox
from sandboxd.policy import Audit
from tests.engine.test_tool_calls import RAW, Tools, answer, refusal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sandboxd.tools.code.link import ToolCall


class Recorded(Tools):
    """An engine that records, and its record."""

    def __init__(self, sandbox: Sandbox, path: Path) -> None:
        super().__init__(sandbox)
        self.path = path

    def calls(self) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in self.path.read_text("ascii").splitlines()]
        return [one for one in records if one["event"] == "tool_called"]


@pytest.fixture
def recorded(tmp_path: Path) -> Iterator[Recorded]:
    path = tmp_path / "audit.jsonl"
    with Sandbox(audit=path) as sandbox:
        yield Recorded(sandbox, path)


def test_call_is_recorded_with_arguments_and_result(recorded: Recorded) -> None:
    result = recorded.run("tools.echo({'a': [1, 'ü']})")
    (call,) = recorded.calls()
    assert call["id"] == result.id
    assert (call["tool"], call["caller"], call["ok"], call["code"]) == ("echo", "code", True, None)
    assert call["arguments"] == {"value": {"a": [1, "ü"]}}
    assert call["result"] == {"a": [1, "ü"]}
    assert call["seconds"] > 0


def test_refusal_is_recorded_with_its_code(recorded: Recorded) -> None:
    recorded.run("tools.echo(1)", lambda body, run: refusal("rate_limited", "Too fast.", "Wait."))
    (call,) = recorded.calls()
    assert (call["ok"], call["code"]) == (False, "rate_limited")
    assert call["result"] == {"code": "rate_limited", "message": "Too fast.", "hint": "Wait."}


def test_refusal_of_the_engines_own_is_recorded_too(recorded: Recorded) -> None:
    recorded.run(RAW + "for n in range(50): call(n, n)\nanswers(50)", calls=1)
    passed, refused = recorded.calls()
    assert passed["arguments"] == {"value": 0}
    assert (refused["tool"], refused["ok"], refused["refused"]) == (None, False, {"budget_exceeded": 49})


def test_program_cannot_push_older_records_out_by_calling(recorded: Recorded) -> None:
    code = (
        RAW
        + """
body = b'{"tool": "echo", "arguments": {"value": "' + b"\\0" * 200_000 + b'"}}'
for n in range(300):
    parts = [body[at : at + 61440] for at in range(0, len(body), 61440)]
    for index, part in enumerate(parts):
        os.write(3, frame(number=n, body=part, index=index, total=len(body)))
    answers()
"""
    )
    result = recorded.run(code, lambda body, run: refusal("invalid_arguments", "No."))
    assert result.status == "ok"
    calls = recorded.calls()
    assert len(calls) == 300
    assert sum(len(json.dumps(call)) for call in calls) < (6 << 20)
    assert (calls[0]["arguments"]["text"] != "", calls[-1]["arguments"]["text"]) == (True, "")
    assert calls[0]["arguments"]["sha256"] == calls[-1]["arguments"]["sha256"]


FORGED_NAMES = [
    ("another-key-first", b'{"x": {"tool": "harmless"}, "tool": "echo", "arguments": {"value": "%s"}}'),
    ("arguments-first", b'{"arguments": {"value": "%s", "tool": "harmless"}, "tool": "echo"}'),
    ("space-before", b' {"tool": "echo", "arguments": {"value": "%s"}}'),
    ("escaped", b'{"to\\u006fl": "echo", "arguments": {"value": "%s"}}'),
]


@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in FORGED_NAMES])
def test_tool_is_known_for_the_record_or_the_call_is_not_passed_on(recorded: Recorded, body: bytes) -> None:
    code = (
        RAW
        + f"""
body = {body!r}.replace(b"%s", b"x" * 20_000)
os.write(3, frame(body=body))
print(answers()[0]["error"]["code"])
"""
    )
    assert recorded.run(code).stdout == "invalid_arguments\n"
    assert recorded.seen == []


def test_long_values_are_excerpts_with_length_and_hash(recorded: Recorded) -> None:
    bodies: list[bytes] = []

    def long(body: bytes, run: ToolCall) -> bytes:
        bodies.append(body)
        return answer("y" * 200_000)

    recorded.run("tools.echo('x' * 100_000)", long)
    (call,) = recorded.calls()
    assert (call["tool"], call["ok"], call["code"]) == ("echo", True, None)
    for shown, whole in ((call["arguments"], bodies[0]), (call["result"], answer("y" * 200_000))):
        assert shown["bytes"] == len(whole)
        assert shown["sha256"] == hashlib.sha256(whole).hexdigest()
        assert shown["text"] == whole[: len(shown["text"])].decode()
        assert 15 << 10 < len(shown["text"]) <= 16 << 10


def test_call_without_an_answer_is_recorded_at_the_end_of_its_run(recorded: Recorded) -> None:
    recorded.run(RAW + "call(5)\nos._exit(0)", lambda body, run: b"")
    calls = recorded.calls()
    assert len(calls) == 1
    assert calls[0]["arguments"] == {"value": 5}


def test_what_is_no_json_is_recorded_as_it_was(recorded: Recorded) -> None:
    code = (
        RAW
        + """
os.write(3, frame(body=b'{"tool": "echo", "arguments": \\xff\\n\\x1b'))
answers()
"""
    )
    recorded.run(code, lambda body, run: refusal("invalid_arguments", "No."))
    (call,) = recorded.calls()
    assert call["tool"] == "echo"
    assert call["arguments"]["text"] == '{"tool": "echo", "arguments": \\xff\n\x1b'
    assert len(recorded.path.read_bytes().splitlines()) == len(recorded.path.read_text("ascii").split("\n")) - 1


def test_excerpt_cannot_be_forged(recorded: Recorded) -> None:
    recorded.run("tools.echo({'text': 'a', 'bytes': 1, 'sha256': 'b'})")
    (call,) = recorded.calls()
    assert call["arguments"] == {"value": {"text": "a", "bytes": 1, "sha256": "b"}}
    assert call["result"]["text"] != "a"


def test_secrets_are_redacted_in_calls_and_left_out_of_excerpts(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    policy = Policy(name="secretive", audit=Audit(redact=("API_KEY", "token")))
    code = """
    import os
    tools.echo({"token": "hush-1234", "note": os.environ["API_KEY"]})
    tools.echo({"token": "hush-5678", "filler": "x" * 100_000})
    """
    with Sandbox(policy, audit=path) as sandbox:
        assert Recorded(sandbox, path).run(code, env={"API_KEY": "sk-canary-99"}).status == "ok"
        calls = Recorded(sandbox, path).calls()
    text = path.read_text("ascii")
    for secret in ("hush-1234", "hush-5678", "sk-canary-99"):
        # The source says what it says: only what stands under a secret's name, and its value elsewhere, is known.
        assert secret not in json.dumps(calls)
    assert text.count("[redacted]") >= 4
