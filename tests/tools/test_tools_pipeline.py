"""The Dispatcher's pipeline: each step, their order, running, results, and what is never told."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import datetime
import enum
import errno
import inspect
import json
import logging
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel

from sandboxd.audit import AuditLog
from sandboxd.errors import Unavailable
from sandboxd.tools import CODES, Budget, Dispatcher, Tool, ToolError, ToolResult, tool
from sandboxd.tools.code.link import RunTools, ToolCall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LONG = 30.0  # far more than anything here takes; a test that waits for it has failed


@tool
def echo(what: Any = None) -> Any:
    """Give it back."""
    return what


def code_of(result: ToolResult) -> str | None:
    if result.error is None:
        return None
    assert result.error.code in CODES
    assert not result.ok
    assert result.value is None
    return result.error.code


def how(dispatcher: Dispatcher, mode: str, name: str, arguments: Any, caller: str = "model") -> ToolResult:
    if mode == "call":
        return dispatcher.call(name, arguments, caller)
    return asyncio.run(dispatcher.acall(name, arguments, caller))


both = pytest.mark.parametrize("mode", ["call", "acall"])


class Frozen(ToolCall):
    """A call of a run whose cell freezes, or does not, and says so."""

    def __init__(self, run: RunTools, error: Exception | None = None) -> None:
        super().__init__(run, 1)
        self.log: list[str] = []
        self._error = error

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        if self._error is not None:
            raise self._error
        self.log.append("frozen")
        yield
        self.log.append("thawed")


def toolbox() -> RunTools:
    made = RunTools("", 1000, lambda _body, _run: b"")
    made.id = "run-1"
    return made


def from_code(dispatcher: Dispatcher, name: Any, arguments: Any, run: ToolCall | None = None) -> dict[str, Any]:
    body = json.dumps({"tool": name, "arguments": arguments}).encode()
    answer: dict[str, Any] = json.loads(dispatcher._call_from_code(body, run or Frozen(toolbox())))
    assert answer.keys() == {"ok", "value", "error"}
    return answer


# Known tool, caller allowed


@both
def test_an_unknown_tool_is_refused_with_the_nearest_name(mode: str) -> None:
    with Dispatcher([echo]) as dispatcher:
        result = how(dispatcher, mode, "ecko", {})
    assert code_of(result) == "unknown_tool"
    assert result.error is not None
    assert "Did you mean echo?" in result.error.hint


@pytest.mark.parametrize("name", ["__class__", "", "x" * 10_000, None, 1, ["echo"], {"a": 1}])
def test_a_name_of_any_kind_is_answered(name: Any) -> None:
    with Dispatcher([echo]) as dispatcher:
        result = dispatcher.call(name, {})
    assert code_of(result) == "unknown_tool"
    assert len(result.to_json()) < 1000


@both
def test_a_caller_that_is_not_allowed_is_refused_before_anything_else(mode: str) -> None:
    @tool(callers=("code",))
    def only_code(x: int) -> None: ...

    @tool(callers=("model",))
    def only_model(x: int) -> None: ...

    with Dispatcher([only_code, only_model]) as dispatcher:
        assert code_of(how(dispatcher, mode, "only_code", {"wrong": 1})) == "caller_not_allowed"
        assert code_of(how(dispatcher, mode, "only_model", {"wrong": 1}, "code")) == "caller_not_allowed"
        assert how(dispatcher, mode, "only_code", {"x": 1}, "code").ok


def test_code_cannot_call_run_code() -> None:
    with Dispatcher([echo]) as dispatcher:
        assert from_code(dispatcher, "run_code", {"code": "1"})["error"]["code"] == "caller_not_allowed"


def test_another_caller_is_a_mistake_of_the_host_program() -> None:
    with Dispatcher([echo]) as dispatcher, pytest.raises(ValueError, match="caller"):
        dispatcher.call("echo", {}, caller="root")


def test_a_closed_dispatcher_is_a_mistake_of_the_host_program() -> None:
    dispatcher = Dispatcher([echo])
    dispatcher.close()
    dispatcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        dispatcher.call("echo", {})
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(dispatcher.acall("echo", {}))
    assert from_code(dispatcher, "echo", {})["error"]["code"] == "unavailable"


@pytest.mark.parametrize("name", ["run_code", "aio", "ToolError"])
def test_a_name_that_is_taken_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Dispatcher([tool(name=name)(lambda: None)])


def test_two_tools_cannot_share_a_name() -> None:
    with pytest.raises(ValueError, match="echo"):
        Dispatcher([echo, echo])


def test_a_plain_function_becomes_a_tool() -> None:
    def add(a: int, b: int = 2) -> int:
        return a + b

    with Dispatcher([add]) as dispatcher:
        assert dispatcher.call("add", {"a": 1}) == ToolResult(True, 3, None)


def test_without_a_sandbox_there_is_no_run_code() -> None:
    with Dispatcher([echo]) as dispatcher:
        assert code_of(dispatcher.call("run_code", {"code": "1"})) == "unavailable"
        assert "run_code" not in json.dumps(dispatcher.schemas("openai"))


# Order


STEPS = ["unknown_tool", "caller_not_allowed", "invalid_arguments", "rate_limited", "approval_denied", "invalid_result"]


@both
@pytest.mark.parametrize("step", range(len(STEPS)))
def test_the_first_step_that_refuses_decides(step: int, mode: str) -> None:
    """Everything from *step* on is wrong with the call; the answer is that of *step*."""
    called: list[str] = []

    def approve(tool: str, arguments: dict[str, Any], caller: str, run_id: str | None) -> bool:
        called.append("approve")
        return step > STEPS.index("approval_denied")

    @tool(callers=("code",), approval=True, rate="1/day")
    def strange(x: int) -> int:
        called.append("run")
        return "no number"  # type: ignore[return-value]

    with Dispatcher([strange], approve=approve) as dispatcher:
        name = "strange" if step > 0 else "stranger"
        caller = "code" if step > 1 else "model"
        arguments = {"x": 1 if step > 2 else "one"}
        if step <= STEPS.index("rate_limited"):
            dispatcher._buckets["strange"].take()
        result = how(dispatcher, mode, name, arguments, caller)
    assert code_of(result) == STEPS[step]
    assert called == ["approve", "run"][: max(0, step - 3)]


def test_refused_calls_use_up_nothing() -> None:
    @tool(callers=("code",), rate="1/day")
    def once(x: int) -> int:
        return x

    with Dispatcher([once], budget=1) as dispatcher:
        dispatcher.call("twice", {})
        dispatcher.call("once", {"x": 1})
        dispatcher.call("once", {"x": "1"}, "code")
        assert dispatcher.calls_left == 1
        assert dispatcher.call("once", {"x": 1}, "code").ok
        assert dispatcher.calls_left == 0


# Rates and budgets


def test_a_rate_says_when_to_come_back() -> None:
    @tool(rate="2/hour")
    def rare() -> None: ...

    with Dispatcher([rare]) as dispatcher, Dispatcher([rare]) as other:
        assert [dispatcher.call("rare", {}).ok for _ in range(3)] == [True, True, False]
        result = dispatcher.call("rare", {})
        assert other.call("rare", {}).ok
    assert code_of(result) == "rate_limited"
    assert result.error is not None
    assert "2/hour" in result.error.message
    seconds = float(result.error.hint.split(" in ")[1].split()[0])
    assert 1700 < seconds <= 1800


def test_a_bucket_fills_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("sandboxd.tools.pipeline.rates.time.monotonic", lambda: now[0])

    @tool(rate="10/s")
    def often() -> None: ...

    with Dispatcher([often]) as dispatcher:
        assert sum(dispatcher.call("often", {}).ok for _ in range(20)) == 10
        now[0] += 0.5
        assert sum(dispatcher.call("often", {}).ok for _ in range(20)) == 5
        now[0] += 1000
        assert sum(dispatcher.call("often", {}).ok for _ in range(20)) == 10


def test_a_budget_in_all() -> None:
    with Dispatcher([echo], budget=2) as dispatcher:
        results = [dispatcher.call("echo", {}) for _ in range(3)]
        assert code_of(dispatcher.call("run_code", {"code": "1"})) == "budget_exceeded"
    assert [code_of(result) for result in results] == [None, None, "budget_exceeded"]


def test_a_budget_for_one_tool() -> None:
    with Dispatcher([echo], budget=Budget(per_tool={"echo": 1})) as dispatcher:
        assert dispatcher.call("echo", {}).ok
        assert code_of(dispatcher.call("echo", {})) == "budget_exceeded"
        assert dispatcher.calls_left is None


def test_a_budget_for_each_run() -> None:
    first, second = toolbox(), toolbox()
    with Dispatcher([echo], budget=Budget(calls_per_run=2)) as dispatcher:
        answers = [from_code(dispatcher, "echo", {}, ToolCall(first, number)) for number in range(3)]
        assert from_code(dispatcher, "echo", {}, ToolCall(second, 1))["ok"]
        assert dispatcher.call("echo", {}).ok
    assert [answer["ok"] for answer in answers] == [True, True, False]
    assert answers[2]["error"]["code"] == "budget_exceeded"


def test_a_budget_holds_among_threads() -> None:
    with Dispatcher([echo], budget=500) as dispatcher:
        good = [0] * 8

        def work(number: int) -> None:
            good[number] = sum(dispatcher.call("echo", {}).ok for _ in range(100))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sum(good) == 500


@pytest.mark.parametrize("budget", [-1, True, Budget(per_tool={"nobody": 1}), "many"])
def test_a_budget_that_means_nothing_is_refused(budget: Any) -> None:
    with pytest.raises(ValueError, match="budget"):
        Dispatcher([echo], budget=budget)


# Approval


@tool(approval=True)
def delete(path: str, deep: list[int]) -> str:
    """Delete it."""
    return f"{path} {deep}"


ARGUMENTS = {"path": "/a", "deep": [1]}


@both
@pytest.mark.parametrize("kind", ["plain", "async", "awaitable"])
def test_approval_sees_the_exact_call(mode: str, kind: str) -> None:
    seen: list[Any] = []

    def plain(*asked: Any) -> bool:
        seen.append(asked)
        return True

    async def later(*asked: Any) -> bool:
        return plain(*asked)

    approve: Any = {"plain": plain, "async": later, "awaitable": lambda *asked: later(*asked)}[kind]
    with Dispatcher([delete], approve=approve) as dispatcher:
        assert how(dispatcher, mode, "delete", ARGUMENTS).value == "/a [1]"
    assert seen == [("delete", ARGUMENTS, "model", None)]


@both
@pytest.mark.parametrize("answer", [False, None, 1, "yes", "True", [True], object()])
def test_anything_but_true_refuses(mode: str, answer: Any) -> None:
    with Dispatcher([delete], approve=lambda *_: answer) as dispatcher:
        assert code_of(how(dispatcher, mode, "delete", ARGUMENTS)) == "approval_denied"


@both
def test_no_callback_refuses(mode: str) -> None:
    with Dispatcher([delete]) as dispatcher:
        assert code_of(how(dispatcher, mode, "delete", ARGUMENTS)) == "approval_denied"


@both
@pytest.mark.parametrize("is_async", [False, True])
def test_a_callback_that_fails_refuses(mode: str, is_async: bool) -> None:
    def plain(*_: Any) -> bool:
        raise OSError(errno.EIO, "secret", "/host/path")

    async def later(*_: Any) -> bool:
        return plain()

    with Dispatcher([delete], approve=later if is_async else plain) as dispatcher:
        result = how(dispatcher, mode, "delete", ARGUMENTS)
    assert code_of(result) == "approval_denied"
    assert "secret" not in result.to_json()


def test_what_the_callback_does_to_the_arguments_changes_nothing() -> None:
    def approve(name: str, arguments: dict[str, Any], caller: str, run_id: str | None) -> bool:
        arguments["path"] = "/etc"
        arguments["deep"].append(2)
        return True

    with Dispatcher([delete], approve=approve) as dispatcher:
        assert dispatcher.call("delete", ARGUMENTS).value == "/a [1]"
    assert ARGUMENTS == {"path": "/a", "deep": [1]}


def test_every_call_is_asked_for() -> None:
    asked: list[int] = []
    with Dispatcher([delete], approve=lambda *_: asked.append(1) or True) as dispatcher:  # type: ignore[func-returns-value]
        for _ in range(3):
            dispatcher.call("delete", ARGUMENTS)
    assert len(asked) == 3


@pytest.mark.parametrize("is_async", [False, True])
def test_the_cell_stands_still_while_its_call_is_judged(is_async: bool) -> None:
    run = Frozen(toolbox())

    def plain(name: str, arguments: dict[str, Any], caller: str, run_id: str | None) -> bool:
        run.log.append(f"asked by {caller} of {run_id}")
        return True

    async def later(name: str, arguments: dict[str, Any], caller: str, run_id: str | None) -> bool:
        return plain(name, arguments, caller, run_id)

    with Dispatcher([delete], approve=later if is_async else plain) as dispatcher:
        assert from_code(dispatcher, "delete", ARGUMENTS, run)["ok"]
    assert run.log == ["frozen", "asked by code of run-1", "thawed"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "x"), Unavailable("freezer", fix="")], ids=["os", "ours"])
def test_nobody_is_asked_when_the_cell_cannot_be_frozen(error: Exception) -> None:
    asked: list[int] = []
    with Dispatcher([delete], approve=lambda *_: asked.append(1)) as dispatcher:
        answer = from_code(dispatcher, "delete", ARGUMENTS, Frozen(toolbox(), error))
    assert answer["error"]["code"] == "unavailable"
    assert not asked


def test_one_run_asks_one_question_at_a_time() -> None:
    """The others wait without having frozen the cell, and are asked in their turn."""
    asking, most, asked = 0, 0, 0
    other = threading.Event()
    lock = threading.Lock()
    run = toolbox()

    def approve(*_: Any) -> bool:
        nonlocal asking, most, asked
        with lock:
            asking += 1
            most = max(most, asking)
            asked += 1
        other.wait(0.05)  # room for a second question to overlap
        with lock:
            asking -= 1
        return True

    with Dispatcher([delete], approve=approve) as dispatcher, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: from_code(dispatcher, "delete", ARGUMENTS, Frozen(run)), range(8)))

    assert all(answer["ok"] for answer in answers)
    assert (most, asked) == (1, 8)


def test_two_runs_are_asked_for_side_by_side() -> None:
    both_asked = threading.Barrier(2, timeout=30)

    def approve(*_: Any) -> bool:
        both_asked.wait()
        return True

    with Dispatcher([delete], approve=approve) as dispatcher, ThreadPoolExecutor(2) as pool:
        answers = pool.map(lambda _: from_code(dispatcher, "delete", ARGUMENTS, Frozen(toolbox())), range(2))
        assert all(answer["ok"] for answer in answers)


@pytest.mark.parametrize("fails", [False, True])
def test_after_three_refusals_a_run_is_not_asked_for_any_more(fails: bool) -> None:
    asked: list[int] = []

    def approve(*_: Any) -> bool:
        asked.append(1)
        if fails:
            raise OSError(errno.EIO, "x")
        return False

    run = toolbox()
    with Dispatcher([delete], approve=approve) as dispatcher, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: from_code(dispatcher, "delete", ARGUMENTS, Frozen(run)), range(20)))
        assert {answer["error"]["code"] for answer in answers} == {"approval_denied"}
        assert len(asked) == 3
        assert sum("3 approvals were refused to this run" in answer["error"]["message"] for answer in answers) == 17

        from_code(dispatcher, "delete", ARGUMENTS, Frozen(toolbox()))  # another run begins anew
        dispatcher.call("delete", ARGUMENTS)  # and a model is no run
        assert len(asked) == 5


def test_a_cell_that_cannot_be_frozen_does_not_keep_the_next_question_from_being_asked() -> None:
    run = toolbox()
    with Dispatcher([delete], approve=lambda *_: True) as dispatcher:
        for _ in range(5):
            answer = from_code(dispatcher, "delete", ARGUMENTS, Frozen(run, OSError(errno.EIO, "x")))
            assert answer["error"]["code"] == "unavailable"
        assert from_code(dispatcher, "delete", ARGUMENTS, Frozen(run))["ok"]


# Running


@both
def test_an_asynchronous_tool_runs_where_the_caller_is(mode: str) -> None:
    @tool
    async def where() -> str:
        await asyncio.sleep(0)
        return threading.current_thread().name

    with Dispatcher([where]) as dispatcher:
        name = how(dispatcher, mode, "where", {}).value
    assert name == ("MainThread" if mode == "acall" else "sandboxd tool loop")


def test_an_asynchronous_tool_called_by_code_runs_on_the_loop_of_the_run() -> None:
    loops: list[Any] = []

    @tool
    async def where() -> None:
        loops.append(asyncio.get_running_loop())

    async def main() -> None:
        loop = asyncio.get_running_loop()
        body = b'{"tool": "where", "arguments": {}}'
        answer = await asyncio.to_thread(dispatcher._call_from_code, body, Frozen(toolbox()), loop)
        assert json.loads(answer)["ok"]
        assert loops == [loop]

    with Dispatcher([where]) as dispatcher:
        asyncio.run(main())


def test_a_synchronous_tool_leaves_the_loop_free() -> None:
    free = threading.Event()

    @tool
    def block() -> bool:
        return free.wait(LONG)

    async def main() -> bool:
        async def release() -> None:
            free.set()

        result, _ = await asyncio.gather(dispatcher.acall("block", {}), release())
        return bool(result.value)

    with Dispatcher([block]) as dispatcher:
        assert asyncio.run(main())


@both
@pytest.mark.parametrize("timeout", [None, LONG])
@pytest.mark.parametrize("is_async", [False, True])
def test_context_variables_of_the_caller_are_there(mode: str, timeout: float | None, is_async: bool) -> None:
    user: contextvars.ContextVar[str] = contextvars.ContextVar("user")

    def plain() -> str:
        return user.get()

    async def later() -> str:
        return user.get()

    who = Tool(later if is_async else plain, name="who", timeout=timeout)
    user.set("ann")
    with Dispatcher([who]) as dispatcher:
        assert how(dispatcher, mode, "who", {}).value == "ann"


@both
def test_a_hung_synchronous_tool_is_abandoned_and_counted(mode: str) -> None:
    go, gone = threading.Event(), threading.Event()

    @tool(timeout=0.05)
    def hang(number: int) -> int:
        go.wait(LONG)
        gone.set()
        return number

    @tool(timeout=LONG)
    def quick() -> int:
        return 1

    with Dispatcher([hang, quick], max_abandoned=2) as dispatcher:
        begun = time.monotonic()
        assert code_of(how(dispatcher, mode, "hang", {"number": 1})) == "timeout"
        assert time.monotonic() - begun < LONG / 2
        assert how(dispatcher, mode, "quick", {}).value == 1
        assert code_of(how(dispatcher, mode, "hang", {"number": 2})) == "timeout"
        assert dispatcher.abandoned == 2
        assert code_of(how(dispatcher, mode, "hang", {"number": 3})) == "busy"
        assert code_of(how(dispatcher, mode, "quick", {})) == "busy"
        go.set()
        gone.wait(LONG)
        until(lambda: dispatcher.abandoned == 0)
        assert how(dispatcher, mode, "quick", {}).value == 1


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@both
def test_a_tool_without_a_timeout_needs_no_thread_of_its_own_in_call(mode: str) -> None:
    @tool
    def where() -> bool:
        return threading.current_thread() is threading.main_thread()

    with Dispatcher([where], max_abandoned=0) as dispatcher:
        result = how(dispatcher, mode, "where", {})
    assert (result.value if mode == "call" else code_of(result)) == (True if mode == "call" else "busy")


@both
def test_an_asynchronous_tool_is_cancelled_when_time_is_up(mode: str) -> None:
    cancelled: list[bool] = []

    @tool(timeout=0.05)
    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with Dispatcher([hang]) as dispatcher:
        assert code_of(how(dispatcher, mode, "hang", {})) == "timeout"
        assert cancelled == [True]
        assert dispatcher.abandoned == 0


@both
def test_a_tool_that_ignores_its_cancellation_does_not_hold_the_caller(mode: str) -> None:
    finish: list[asyncio.Event] = []

    @tool(timeout=0.05)
    async def stubborn() -> None:
        event = asyncio.Event()
        finish.append(event)
        while not event.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await event.wait()

    async def main() -> None:
        assert code_of(await dispatcher.acall("stubborn", {})) == "timeout"
        assert dispatcher.abandoned == 1
        finish[0].set()
        while dispatcher.abandoned:
            await asyncio.sleep(0)

    with Dispatcher([stubborn]) as dispatcher:
        if mode == "acall":
            asyncio.run(main())
        else:
            assert code_of(dispatcher.call("stubborn", {})) == "timeout"
            assert dispatcher.abandoned == 1
            loop = dispatcher._coroutines._loop
            assert loop is not None
            loop.call_soon_threadsafe(finish[0].set)
            until(lambda: dispatcher.abandoned == 0)


@pytest.mark.parametrize("timeout", [None, LONG])
def test_cancelling_acall_cancels_the_tool(timeout: float | None) -> None:
    seen: list[str] = []

    @tool(timeout=timeout)
    async def hang() -> None:
        seen.append("begun")
        try:
            await asyncio.Event().wait()
        finally:
            seen.append("ended")

    async def main() -> None:
        task = asyncio.ensure_future(dispatcher.acall("hang", {}))
        while not seen:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert seen == ["begun", "ended"]

    with Dispatcher([hang]) as dispatcher:
        asyncio.run(main())


@both
def test_a_cancellation_of_the_tools_own_is_its_failure(mode: str) -> None:
    @tool
    async def confused() -> None:
        raise asyncio.CancelledError

    with Dispatcher([confused]) as dispatcher:
        assert code_of(how(dispatcher, mode, "confused", {})) == "tool_failed"


def test_call_on_the_loop_that_must_run_the_tool_is_a_mistake_that_does_not_hang() -> None:
    @tool
    async def inner() -> int:
        return 1

    @tool
    async def outer() -> bool:
        return dispatcher.call("inner", {}).ok

    with Dispatcher([inner, outer]) as dispatcher:
        assert dispatcher.call("outer", {}).value is False


def test_tools_may_call_tools() -> None:
    @tool(timeout=LONG)
    def outer(depth: int) -> int:
        return 0 if depth == 0 else 1 + int(dispatcher.call("outer", {"depth": depth - 1}).value)

    with Dispatcher([outer]) as dispatcher:
        assert dispatcher.call("outer", {"depth": 20}).value == 20


def test_many_callers_at_once_get_their_own_answers() -> None:
    @tool(timeout=LONG)
    def same(what: int) -> int:
        return what

    async def main() -> list[ToolResult]:
        return await asyncio.gather(*(dispatcher.acall("same", {"what": number}) for number in range(500)))

    with Dispatcher([same]) as dispatcher:
        assert [result.value for result in asyncio.run(main())] == list(range(500))


@both
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("timeout", [None, LONG])
def test_the_ends_of_a_program_come_through(mode: str, error: type[BaseException], timeout: float | None) -> None:
    @tool(timeout=timeout)
    def leave() -> None:
        raise error

    with Dispatcher([leave]) as dispatcher, pytest.raises(error):
        how(dispatcher, mode, "leave", {})


@both
def test_a_call_that_ends_the_program_is_recorded(tmp_path: Path, mode: str) -> None:
    @tool
    def leave() -> None:
        sys.exit(3)

    with Dispatcher([leave], audit=tmp_path / "audit.jsonl") as dispatcher:
        with pytest.raises(SystemExit):
            how(dispatcher, mode, "leave", {})
        from_code(dispatcher, "leave", {})
    assert [one["code"] for one in records(tmp_path / "audit.jsonl")] == ["tool_failed", "tool_failed"]


def test_a_mapping_of_another_kind_is_an_object_too() -> None:
    with Dispatcher([echo]) as dispatcher:
        assert dispatcher.call("echo", MappingProxyType({"what": 1})).value == 1


def test_code_cannot_end_the_host_program_through_a_tool() -> None:
    @tool
    def leave() -> None:
        sys.exit(3)

    with Dispatcher([leave]) as dispatcher:
        assert from_code(dispatcher, "leave", {})["error"]["code"] == "tool_failed"


def test_a_hung_tool_does_not_delay_the_end_of_the_interpreter() -> None:
    program = """
import asyncio, threading
from sandboxd.tools import Dispatcher, tool

@tool(timeout=0.05)
def hang() -> None:
    threading.Event().wait()

@tool(timeout=0.05)
async def stubborn() -> None:
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass

d = Dispatcher([hang, stubborn])
print(d.call("hang", {}).error.code, d.call("stubborn", {}).error.code, d.abandoned)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LONG, check=True)
    assert done.stdout == "timeout timeout 2\n"
    assert done.stderr == ""


# Failures


class Secretive(Exception):
    pass


@both
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("timeout", [None, LONG])
def test_a_failure_names_the_class_and_nothing_else(
    mode: str, is_async: bool, timeout: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    def plain() -> None:
        password = "hunter2"  # noqa: S105 (it must not get out)
        raise Secretive(f"/home/ann/key {password}")

    async def later() -> None:
        plain()

    broken = Tool(later if is_async else plain, name="broken", timeout=timeout)
    with Dispatcher([broken]) as dispatcher, caplog.at_level(logging.WARNING, "sandboxd.tools"):
        result = how(dispatcher, mode, "broken", {})
    assert code_of(result) == "tool_failed"
    assert "Secretive" in result.to_json()
    for word in ("hunter2", "/home", "Traceback", "tests"):
        assert word not in result.to_json()
    assert "hunter2" in caplog.text  # the operator's own record has all of it


def test_a_tool_error_speaks_to_the_model() -> None:
    @tool
    def careful() -> None:
        raise ToolError("no rows before 2020\x1b[2J" + "x" * 10_000, "ask for later ones")

    with Dispatcher([careful]) as dispatcher:
        result = dispatcher.call("careful", {})
    assert code_of(result) == "tool_failed"
    assert result.error is not None
    assert result.error.message.startswith("no rows before 2020\\x1b[2J")
    assert len(result.error.message) < 3000
    assert result.error.hint == "ask for later ones"


def test_a_class_name_is_no_way_out_either() -> None:
    odd = type("/etc/passwd\n" * 100, (Exception,), {})

    @tool
    def broken() -> None:
        raise odd

    with Dispatcher([broken]) as dispatcher:
        assert len(dispatcher.call("broken", {}).to_json()) < 1000


# Results


class Row(BaseModel):
    region: str
    at: datetime.date = datetime.date(2024, 1, 2)


@dataclasses.dataclass
class Point:
    x: int


class Colour(enum.Enum):
    RED = "red"


FORMS: list[tuple[Any, Any]] = [
    (Row(region="x"), {"region": "x", "at": "2024-01-02"}),
    ([Row(region="x")], [{"region": "x", "at": "2024-01-02"}]),
    (Point(1), {"x": 1}),
    ({"p": Point(1), "r": Row(region="y")}, {"p": {"x": 1}, "r": {"region": "y", "at": "2024-01-02"}}),
    (datetime.datetime(2024, 1, 2, 3, 4, tzinfo=datetime.UTC), "2024-01-02T03:04:00+00:00"),
    (datetime.time(3, 4), "03:04:00"),
    (datetime.timedelta(hours=1), "PT1H"),
    (b"\xff\xfe", "//4="),
    (Decimal("1.10"), "1.10"),
    (uuid.UUID(int=0), "00000000-0000-0000-0000-000000000000"),
    (Colour.RED, "red"),
    ((1, 2), [1, 2]),
    ({3}, [3]),
    (frozenset(), []),
    (None, None),
    (1.5, 1.5),
    ("\x00é\u2028", "\x00é\u2028"),
    (1 << 200, 1 << 200),
]


@pytest.mark.parametrize("annotated", [False, True], ids=["bare", "annotated"])
@pytest.mark.parametrize(("value", "plain"), FORMS, ids=[type(value).__name__ for value, _ in FORMS])
def test_results_become_plain_json(value: Any, plain: Any, annotated: bool) -> None:
    def give() -> Any:
        return value

    if annotated and not isinstance(value, list | dict | tuple):
        give.__annotations__["return"] = type(value)
    with Dispatcher([give]) as dispatcher:
        result = dispatcher.call("give", {})
    assert result.ok, result
    assert result.value == plain
    assert type(result.value) is type(plain)
    assert json.loads(result.to_json()) == {"ok": True, "value": plain, "error": None}
    assert result.to_json().isascii()


def circle() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


def deep() -> list[Any]:
    made: list[Any] = []
    for _ in range(100_000):
        made = [made]
    return made


def endless() -> Iterator[int]:
    while True:
        yield 1


WRONG: list[tuple[str, Any, Any]] = [
    ("nan", Any, lambda: float("nan")),
    ("nan-annotated", float, lambda: float("nan")),
    ("infinity-inside", list[float], lambda: [1.0, float("inf")]),
    ("decimal-nan", Decimal, lambda: Decimal("NaN")),
    ("string-for-int", int, lambda: "5"),
    ("true-for-int", int, lambda: True),
    ("none-for-int", int, lambda: None),
    ("int-keys", Any, lambda: {1: 2}),
    ("int-keys-deep", Any, lambda: [{"a": {None: 2}}]),
    ("object", Any, object),
    ("class", Any, lambda: Row),
    ("circle", Any, circle),
    ("circle-annotated", list[Any], circle),
    ("deep", Any, deep),
    ("endless", Any, endless),
    ("endless-annotated", list[int], endless),
    ("surrogate", Any, lambda: "\ud800"),
    ("surrogate-annotated", str, lambda: "\ud800"),
    ("missing-key", Row, lambda: {"at": "2024-01-01"}),
    ("unbuilt-model", Row, lambda: Row.model_construct(region=5)),
    ("other-model", Row, lambda: Point(1)),
    ("huge-integer", Any, lambda: 10**5000),
    ("exception", Any, lambda: OSError("x")),
    ("function", Any, lambda: len),
]


@both
@pytest.mark.parametrize(("annotation", "make"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_a_result_that_is_not_what_was_promised_is_refused(annotation: Any, make: Callable[[], Any], mode: str) -> None:
    def give() -> Any:
        return make()

    give.__annotations__["return"] = annotation
    with Dispatcher([give]) as dispatcher:
        result = how(dispatcher, mode, "give", {}, "code")
    assert code_of(result) == "invalid_result"


def test_a_forgotten_await_is_an_invalid_result() -> None:
    async def later() -> int:
        return 1

    def give() -> int:
        return later()  # type: ignore[return-value]

    with Dispatcher([give]) as dispatcher:  # a warning about the coroutine would fail the test
        assert code_of(dispatcher.call("give", {})) == "invalid_result"


def test_the_json_form_of_a_model_will_do() -> None:
    def give() -> list[Row]:
        return [{"region": "x", "at": "2024-05-06"}]  # type: ignore[list-item]

    with Dispatcher([give]) as dispatcher:
        assert dispatcher.call("give", {}).value == [{"region": "x", "at": "2024-05-06"}]


def test_the_result_is_nobody_elses() -> None:
    kept = {"rows": [1]}

    def give() -> dict[str, list[int]]:
        return kept

    with Dispatcher([give]) as dispatcher:
        result = dispatcher.call("give", {})
    kept["rows"].append(2)
    assert result.value == {"rows": [1]}


MILLION = 1_000_000
LARGE: list[tuple[str, Any]] = [
    ("text", lambda: "x" * (64 * MILLION)),
    ("bytes", lambda: b"x" * (64 * MILLION)),
    ("list", lambda: [None] * (16 * MILLION)),
    ("shared", lambda: [["x" * 100] * 1000] * 1000),
    ("dict", lambda: {str(number): number for number in range(MILLION)}),
    ("nested", lambda: [["x" * MILLION] * 20]),
    ("model", lambda: Row(region="x" * 20 * MILLION)),
    ("set", lambda: set(range(5 * MILLION))),
]


@pytest.mark.parametrize("caller", ["model", "code"])
@pytest.mark.parametrize("make", [row[1] for row in LARGE], ids=[row[0] for row in LARGE])
def test_a_large_result_is_refused_before_it_is_copied(make: Callable[[], Any], caller: str) -> None:
    value = make()

    def give() -> Any:
        return value

    with Dispatcher([give]) as dispatcher:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is used now
        before = peak_bytes()
        result = dispatcher.call("give", {}, caller)
        grown = peak_bytes() - before
    assert code_of(result) == "result_too_large"
    assert result.error is not None
    assert str(8 << 20 if caller == "code" else 64 << 10) in result.error.message
    assert grown < 32 * MILLION


def peak_bytes() -> int:
    """The most memory that this process had since the last reset."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))


def test_bounds_are_exact_and_can_be_set() -> None:
    @tool(max_result_bytes=10)
    def small(size: int) -> str:
        return "x" * size

    def other(size: int) -> str:
        return "\u00e9" * size  # six bytes each in JSON that is ASCII

    with Dispatcher([small, other], max_result_bytes=62) as dispatcher:
        assert dispatcher.call("small", {"size": 8}).ok
        assert code_of(dispatcher.call("small", {"size": 9})) == "result_too_large"
        assert dispatcher.call("other", {"size": 10}, "code").ok
        result = dispatcher.call("other", {"size": 11}, "code")
    assert code_of(result) == "result_too_large"
    assert result.error is not None
    assert "68 bytes" in result.error.message


# Calls from code


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b"null",
        b'{"tool": "echo"}',
        b'{"tool": "echo", "arguments": {}, "caller": "model"}',
        b'{"tool": "echo", "tool": "echo", "arguments": {}}',
        b'{"tool": "echo", "arguments": {"what": NaN}}',
        b'{"tool": "echo", "arguments": [1]}',
        b'{"tool": "echo", "arguments": null}',
        b'{"tool": "echo", "arguments": "{}"}',
        b'{"tool": ["echo"], "arguments": {}}',
        b'{"tool": 1, "arguments": {}}',
        b'{"tool": "\\ud800", "arguments": {}}',
        b"[" * 100_000,
        b'{"tool": "echo", "arguments": {"what": ' + b"[" * 500 + b"]" * 500 + b"}}",
        b'{"tool": "echo", "arguments": {"what": "' + b"x" * (2 << 20) + b'"}}',
    ],
    ids=lambda body: repr(body[:40]),
)
def test_a_forged_frame_is_answered(body: bytes) -> None:
    called: list[Any] = []

    @tool(name="echo")
    def noting(what: Any = None) -> None:
        called.append(what)

    with Dispatcher([noting]) as dispatcher:
        answer = json.loads(dispatcher._call_from_code(body, Frozen(toolbox())))
    assert answer["error"]["code"] in ("invalid_arguments", "unknown_tool")
    assert not called


def test_code_is_always_code() -> None:
    @tool(callers=("model",))
    def only_model() -> None: ...

    with Dispatcher([only_model]) as dispatcher:
        assert from_code(dispatcher, "only_model", {})["error"]["code"] == "caller_not_allowed"


# The record


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if '"tool_called"' in line]


@both
def test_every_call_is_recorded(tmp_path: Path, mode: str) -> None:
    @tool(callers=("code",))
    def only_code() -> None: ...

    path = tmp_path / "audit.jsonl"
    with Dispatcher([echo, only_code], audit=path) as dispatcher:
        how(dispatcher, mode, "echo", {"what": [1]})
        how(dispatcher, mode, "echo", '{"what": 1, "what": 2}')
        how(dispatcher, mode, "only_code", {})
        how(dispatcher, mode, "nothing", {"a": object()})
        from_code(dispatcher, "echo", {"what": "x"})
    found = records(path)
    assert [(one["tool"], one["caller"], one["ok"], one["code"], one["id"]) for one in found] == [
        ("echo", "model", True, None, None),
        ("echo", "model", False, "invalid_arguments", None),
        ("only_code", "model", False, "caller_not_allowed", None),
        ("nothing", "model", False, "unknown_tool", None),
        ("echo", "code", True, None, "run-1"),
    ]
    assert found[0]["arguments"] == {"what": [1]}
    assert found[0]["result"] == [1]
    assert found[1]["arguments"] == '{"what": 1, "what": 2}'
    assert found[0]["seconds"] >= 0


def test_a_result_that_is_changed_afterwards_is_recorded_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with Dispatcher([echo], audit=path) as dispatcher:
        arguments = {"what": ["before"]}
        result = dispatcher.call("echo", arguments)
        result.value[0] = arguments["what"][0] = "after"
    assert records(path)[0]["result"] == ["before"]
    assert records(path)[0]["arguments"] == {"what": ["before"]}


def test_no_call_is_made_while_the_record_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    real = log._file.append
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(_lines: Any, _wait: bool) -> None:
        raise full

    with log, Dispatcher([echo], audit=log) as dispatcher:
        monkeypatch.setattr(log._file, "append", refuse)
        assert dispatcher.call("echo", {"what": 1}).ok  # had begun when it showed; its record is kept
        assert code_of(dispatcher.call("echo", {"what": 2})) == "unavailable"
        monkeypatch.setattr(log._file, "append", real)
        assert dispatcher.call("echo", {"what": 3}).ok
    found = records(tmp_path / "audit.jsonl")
    assert [one["arguments"]["what"] for one in found] == [1, 2, 3]


def test_the_signature_of_call_is_what_is_promised() -> None:
    assert list(inspect.signature(Dispatcher.call).parameters) == ["self", "name", "arguments", "caller"]
    assert inspect.signature(Dispatcher.call).parameters["caller"].default == "model"
