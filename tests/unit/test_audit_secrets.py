"""What is left out of the audit record, against callers who choose the secrets, the texts and their lengths."""

from __future__ import annotations

import hashlib
import json
import time
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd.audit import AuditLog, record, redact
from sandboxd.tools import Dispatcher, tool
from sandboxd.tools import result as outcome
from tests.unit.test_audit import records

if TYPE_CHECKING:
    from pathlib import Path

MARKS = "".join(map(chr, range(32)))
"""Whatever stands for what was replaced is one of these."""


# --- bounds --------------------------------------------------------------------------------------------------------


def test_more_secrets_than_are_sought_close_the_record_and_cost_no_time() -> None:
    # All of them begin alike: an alternation of these took seconds, with every other thread waiting.
    many = ["b" * 60] + ["a" * 60 + f"{number:04x}" for number in range(150)]
    given = {"event": "tool_called", "tool": "login", "caller": "code", "ok": False, "code": "tool_failed"}
    begun = time.thread_time()
    clean = redact.Redactor(["key"])({**given, "arguments": {"key": many, "t": "a" * 1000}, "result": {"m": many[-1]}})
    assert time.thread_time() - begun < 5
    assert clean == {**given, "arguments": "[redacted]", "result": "[redacted]", "redacted": True}


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"key": ["s3cret" + "x" * 3000 + one for one in "abc"]}, id="long"),
        pytest.param({"key": [f"s3cret{one}" for one in range(32)], "t": ["abcde"] * 2000}, id="in-many-texts"),
        pytest.param(
            {"key": ["s3cret-" + "x" * 90 + one for one in "abcdefgh"], "t": "x" * 14_000}, id="in-a-long-one"
        ),
    ],
)
def test_a_search_that_would_take_long_is_not_begun(arguments: dict[str, Any]) -> None:
    clean = redact.Redactor(["key"])({"event": "tool_called", "tool": "t", "arguments": arguments, "result": "s3cret1"})
    assert (clean["tool"], clean["arguments"], clean["result"]) == ("t", "[redacted]", "[redacted]")


def test_too_many_secret_variables_close_the_records_of_a_run() -> None:
    clear = redact.Redactor(["*_key"], {f"X{number}_KEY": f"s3cret{number}" for number in range(40)})
    clean = clear({"event": "run_ended", "status": "ok", "exit_code": 0, "error": {"message": "s3cret7"}})
    assert (clean["status"], clean["exit_code"], clean["error"]) == ("ok", 0, "[redacted]")


def test_a_value_that_is_too_long_to_be_shown_is_not_searched_and_nothing_of_it_is_kept() -> None:
    arguments = {"key": "s3cret", "t": "x" * record.CAP_BYTES}
    clean = redact.Redactor(["key"])({"event": "tool_called", "arguments": arguments, "result": "s3cret", "ok": True})
    text = json.dumps(arguments, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert clean["arguments"] == {"text": "[redacted]", "bytes": len(text), "sha256": digest}
    assert clean["result"] == "[redacted]"  # it may hold what nobody looked for
    assert clean["ok"] is True


def test_a_name_is_compared_in_time_that_grows_with_its_length() -> None:
    clear = redact.Redactor(["*api*key*", "a*_token"])
    begun = time.thread_time()
    assert not clear({"event": "x", "arguments": {"api" * 5000: 1, "ke" * 10: 1}}).get("redacted")
    assert time.thread_time() - begun < 5
    names = {"MY_API_KEYS": True, "apikey": True, "key_api": False, "a_token": True, "A1_Token": True, "_token": False}
    clean = clear({"event": "x", "arguments": dict.fromkeys(names, 7)})
    assert clean["arguments"] == {name: "[redacted]" if secret else 7 for name, secret in names.items()}


# --- replacing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", ["redacted", "acte", MARKS, "a\x01b\x02"])
def test_no_secret_is_found_in_what_takes_its_place(secret: str) -> None:
    clear = redact.Redactor(["*_key"], {"a_key": "hunter22", "b_key": secret, "c_key": "[red", "d_key": "cted]"})
    assert clear({"event": "x", "args": ["a hunter22 b"]})["args"] == ["a [redacted] b"]
    assert clear({"event": "x", "args": [f"a {secret}{secret} b"]})["args"] == ["a [redacted][redacted] b"]


def test_who_uses_every_character_is_searched_all_the_same() -> None:
    clean = redact.Redactor(["KEY"], {"KEY": "hunter22"})({"event": "x", "code": MARKS + "hunter22 and the rest"})
    assert clean["code"].endswith("[redacted] and the rest")
    assert len(clean["code"]) > len(MARKS)


def test_a_secret_is_found_anywhere_in_a_long_source() -> None:
    secret = "s3cret-" * 10
    clear = redact.Redactor(["KEY"], {"KEY": secret})
    for at in range(record.CHUNK - len(secret), record.CHUNK + 2, 7):
        code = "x" * at + secret + "y" * record.CHUNK + secret + secret
        assert clear({"event": "run_started", "code": code})["code"] == (
            "x" * at + "[redacted]" + "y" * record.CHUNK + "[redacted]" * 2
        )


def test_a_number_that_is_a_secret_is_left_out_as_a_number_and_as_text() -> None:
    given = {"event": "tool_called", "arguments": {"pin": 123456}, "result": {"message": "123456?", "was": 123456}}
    assert redact.Redactor(["pin"])(given)["result"] == {"message": "[redacted]?", "was": "[redacted]"}


SECRETS = [
    pytest.param("s3cret-" * 20, id="long"),
    pytest.param("a\"s3cret'\\\n\x1b" * 10, id="escaped"),
    pytest.param("säcrät\u202e\U0001f600\U000e0001" * 9, id="beyond-ascii"),
    pytest.param("s3cret-9", id="eight"),
    pytest.param("s3cret", id="six"),
    pytest.param(987654321, id="number"),
]


def said(secret: Any, message: str) -> str:
    given = {"event": "tool_called", "arguments": {"key": secret, "n": 1}, "result": {"message": message}}
    return str(redact.Redactor(["key"])(given)["result"]["message"])


def starts(secret: Any) -> list[str]:
    spelled = json.dumps(secret, ensure_ascii=False).strip('"')
    return [spelled[:length] for length in range(3, 9)]


@pytest.mark.parametrize("secret", SECRETS)
def test_the_beginning_of_a_secret_that_a_message_shows_is_left_out(secret: Any) -> None:
    text = said(secret, f"key is {outcome.shown(secret)}; it must be short")
    assert text.replace('"', "").replace("...", "") == "key is [redacted]; it must be short"


@pytest.mark.parametrize("secret", SECRETS)
def test_the_few_characters_of_a_secret_at_a_cut_are_left_out(secret: Any) -> None:
    for pad in range(40, 60):
        text = said(secret, f"{outcome.shown(['x' * pad, secret])} was given")
        assert not any(start in text for start in starts(secret)), text
        assert text.startswith('["xxx')


@pytest.mark.parametrize("secret", ["s3cret", "s3\"cret'\\\n\x1b", "säcrät\u202e\U0001f600\U000e0001"])
def test_both_ends_of_a_secret_in_a_message_that_was_cut_in_the_middle_are_left_out(secret: Any) -> None:
    whole = "".join(f"{number:04}{secret}" for number in range(300))[:2000]
    text = said(whole, outcome.readable("y" * 1000 + whole + "z" * 100))
    assert text.strip("yz") == "[redacted] ... [redacted]"


def test_an_error_of_a_run_is_not_cut_through_a_secret() -> None:
    error = record.capped({"message": "hunter22-k" * 3000})
    given = {"event": "run_ended", "error": error}
    assert redact.Redactor(["KEY"], {"KEY": "hunter22-k"})(given)["error"]["text"] == "[redacted]"
    assert redact.Redactor(["KEY"], {"OTHER": "hunter22-k"})(given) is given


# --- the dispatcher's record ---------------------------------------------------------------------------------------

UNREAD: list[Any] = [
    pytest.param("login", '{"api_key": "s3cret-a", "n": 1,}', "model", id="no-json"),
    pytest.param("login", '{"api_key": "s3cret-a", "n": 1, "n": 2}', "model", id="key-twice"),
    pytest.param("login", '{"api_key": "s3cret-a", "n": 1} x', "model", id="more"),
    pytest.param("login", b'{"api_key": "s3cret-a\xff", "n": 1}', "model", id="no-utf-8"),
    pytest.param("login", '{"api_key": "s3cret-a", "n": "' + "x" * 20_000 + '"}', "model", id="long"),
    pytest.param("login", '{"api_key": "s3cret-a", "n": "' + "x" * (1 << 20) + '"}', "model", id="too-long"),
    pytest.param("nosuch", '{"api_key": "s3cret-a", "n": 1}', "model", id="unknown-tool"),
    pytest.param("nosuch", {"api_key": "s3cret-a", "n": 1}, "model", id="unknown-tool-object"),
    pytest.param("login", '{"api_key": "s3cret-a", "n": 1}', "code", id="not-for-code"),
    pytest.param("login", {"api_key": "s3cret-a", "n": float("nan")}, "model", id="nan"),
    pytest.param("login", {"api_key": "s3cret-a", "n": 1 << 2000}, "model", id="large"),
    pytest.param("login", {"api_key": "s3cret-a", "n": 10**5000}, "model", id="larger"),
    pytest.param("login", {"api_key": "s3cret-a\udc80", "n": 1}, "model", id="surrogate"),
    pytest.param("login", MappingProxyType({"api_key": "s3cret-a", "n": object()}), "model", id="mapping"),
    pytest.param("login", [{"api_key": "s3cret-a"}], "model", id="list"),
    pytest.param("login", '[{"api_key": "s3cret-a"}]', "model", id="list-as-text"),
    pytest.param({"api_key": "s3cret-a"}, {}, "model", id="as-the-tool"),
]


@pytest.mark.parametrize(("name", "arguments", "caller"), UNREAD)
def test_no_secret_of_a_refused_call_is_in_the_dispatchers_record(
    tmp_path: Path, name: Any, arguments: Any, caller: str
) -> None:
    @tool(callers=("model",))
    def login(api_key: str, n: float) -> int:
        raise AssertionError

    path = tmp_path / "audit.jsonl"
    with AuditLog(path, redact=["api_key"]) as audit, Dispatcher([login], audit=audit) as dispatcher:
        result = dispatcher.call(name, arguments, caller=caller)
    found = records(path)[0]
    assert "s3cret" not in path.read_text()
    assert result.error is not None
    assert (found["event"], found["code"], found["redacted"]) == ("tool_called", result.error.code, True)
    assert found["tool"] == (name if isinstance(name, str) else {"api_key": "[redacted]"})


def test_arguments_as_text_are_recorded_as_what_they_say_also_when_they_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path, redact=["api_key"]) as audit, Dispatcher([], audit=audit) as dispatcher:
        dispatcher.call("nosuch", '{"api_key": "s3cret-a", "n": 1}')
    assert records(path)[0]["arguments"] == {"api_key": "[redacted]", "n": 1}


def test_a_secret_that_is_too_long_for_its_tool_is_not_in_the_record(tmp_path: Path) -> None:
    @tool
    def login(pin: int) -> int:
        raise AssertionError

    path = tmp_path / "audit.jsonl"
    with AuditLog(path, redact=["pin"]) as audit, Dispatcher([login], audit=audit) as dispatcher:
        failure = dispatcher.call("login", {"pin": "s3cret-" * 20}).error
    assert failure is not None
    assert "s3cret-s3cret-s3cret" in failure.message  # what the model is told
    assert "s3cret" not in path.read_text()
    assert "it must be" in records(path)[0]["result"]["message"]
