"""Attempts: a loop ends after a success, after so many failures, or when the model has nothing to call."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd.tools import Attempts, Dispatcher, tool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sandboxd import Sandbox


@tool
def look_up(key: str) -> str:
    """A value."""
    return key.upper()


@pytest.fixture(scope="module")
def dispatcher(sandbox: Sandbox) -> Iterator[Dispatcher]:
    with Dispatcher([look_up], sandbox=sandbox) as made:
        yield made


def message(*programs: str, **calls: dict[str, Any]) -> dict[str, Any]:
    """A model's message that runs *programs* and calls other tools."""
    blocks = [
        {"type": "tool_use", "id": f"run{number}", "name": "run_code", "input": {"code": code}}
        for number, code in enumerate(programs)
    ]
    blocks += [{"type": "tool_use", "id": name, "name": name, "input": given} for name, given in calls.items()]
    return {"role": "assistant", "content": blocks or [{"type": "text", "text": "That is all."}]}


def texts(replies: list[dict[str, Any]]) -> list[str]:
    return [block["content"] for reply in replies for block in reply["content"]]


def test_a_success_ends_the_loop(dispatcher: Dispatcher) -> None:
    attempts = Attempts(max=3)
    said = []
    for code in ("1 / 0", "print('done')", "never"):
        if not attempts:
            break
        said += texts(dispatcher.handle(message(code), attempts=attempts))

    assert said[0].endswith("attempt 1 of 3 failed; 2 left.")
    assert "attempt" not in said[1]
    assert len(said) == 2
    assert (attempts.used, attempts.left, attempts.succeeded) == (2, 1, True)
    assert attempts.last is not None
    assert attempts.last.value["stdout"] == "done\n"


def test_the_last_failure_tells_the_model_to_stop(dispatcher: Dispatcher) -> None:
    attempts = Attempts(max=2)
    said = []
    while attempts:
        said += texts(dispatcher.handle(message("1 / 0"), attempts=attempts))

    assert len(said) == 2
    assert "attempt 2 of 2 failed; none is left. Do not call run_code again" in said[1]
    assert not attempts.succeeded


def test_a_further_program_is_refused_and_does_not_run(dispatcher: Dispatcher) -> None:
    attempts = Attempts(max=1)
    dispatcher.handle(message("1 / 0"), attempts=attempts)
    last = attempts.last

    (said,) = texts(dispatcher.handle(message("print('ran')"), attempts=attempts))

    assert said.startswith('{"error":{"code":"budget_exceeded","message":"No attempt at running code is left')
    assert attempts.last is last


def test_an_attempt_too_many_is_recorded(sandbox: Sandbox, tmp_path: Path) -> None:
    attempts = Attempts(max=1)
    with Dispatcher(sandbox=sandbox, audit=tmp_path / "tools.jsonl") as own:
        for code in ("1 / 0", "print('too many')"):
            own.handle(message(code), attempts=attempts)

    last = json.loads((tmp_path / "tools.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["tool"], last["ok"], last["code"]) == (
        "tool_called",
        "run_code",
        False,
        "budget_exceeded",
    )
    assert "too many" in str(last["arguments"])


def test_programs_of_one_message_count_in_its_order(dispatcher: Dispatcher) -> None:
    attempts = Attempts(max=2)

    said = texts(dispatcher.handle(message("1 / 0", "1 / 0", "print('third')"), attempts=attempts))

    assert "attempt 1 of 2 failed" in said[0]
    assert "attempt 2 of 2 failed" in said[1]
    assert "budget_exceeded" in said[2]


def test_a_success_beside_a_failure_is_a_success(dispatcher: Dispatcher) -> None:
    attempts = Attempts(max=3)

    dispatcher.handle(message("print('good')", "1 / 0"), attempts=attempts)

    assert not attempts
    assert attempts.last is not None
    assert attempts.last.value["stdout"] == "good\n"


def test_other_tools_are_no_attempts(dispatcher: Dispatcher) -> None:
    attempts = Attempts(max=1)

    said = texts(dispatcher.handle(message(look_up={"key": "a"}), attempts=attempts))

    assert said == ['"A"']
    assert attempts
    assert attempts.used == 0


@pytest.mark.parametrize("wrong", [{"code": "1", "policy": "x"}, {}])
def test_a_refused_program_is_an_attempt(dispatcher: Dispatcher, wrong: dict[str, Any]) -> None:
    attempts = Attempts(max=2)
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "run_code", "input": wrong}]}

    (said,) = texts(dispatcher.handle(call, attempts=attempts))

    assert '"code":"invalid_arguments"' in said
    assert '"attempts":"attempt 1 of 2 failed; 1 left."' in said


def test_what_a_review_does_not_accept_is_a_failure(sandbox: Sandbox) -> None:
    attempts = Attempts(max=2)
    with Dispatcher(sandbox=sandbox, review=lambda made: None if "title" in made.code else "It has no title.") as own:
        (first,) = texts(own.handle(message("1"), attempts=attempts))
        assert attempts
        own.handle(message("'title'"), attempts=attempts)

    assert "| It has no title." in first
    assert first.endswith("attempt 1 of 2 failed; 1 left.")
    assert attempts.succeeded


def test_a_message_without_calls_ends_the_loop(dispatcher: Dispatcher) -> None:
    attempts = Attempts(max=3)

    assert dispatcher.handle(message(), attempts=attempts) == []
    assert not attempts
    assert not attempts.succeeded


@pytest.mark.parametrize("wrong", [0, -1, 1.0, True, "3", 1001])
def test_a_wrong_number_of_attempts_is_an_error(wrong: Any) -> None:
    with pytest.raises(ValueError, match="from 1 to 1000"):
        Attempts(max=wrong)


def test_many_threads_begin_exactly_as_many_as_there_are() -> None:
    attempts = Attempts(max=100)
    begun: list[int | None] = []
    threads = [threading.Thread(target=lambda: begun.extend(attempts.begin() for _ in range(50))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    numbers = [one for one in begun if one is not None]
    assert sorted(numbers) == list(range(1, 101))
    assert begun.count(None) == 300
