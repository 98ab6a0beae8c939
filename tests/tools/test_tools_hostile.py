"""Programs in cells against a dispatcher: what its checks and bounds hold when the caller is hostile, and what is left.

The frames are those of test_tool_calls.py; here their bodies come to real tools through the whole pipeline.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from sandboxd import Limits, Sandbox
from sandboxd.tools import Budget, Dispatcher, Tool, ToolError, tool
from tests.engine.test_tool_calls import RAW
from tests.support import daemons, leftovers
from tests.support.engine import pid_of

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("prompt")

CANARY = "sk-canary-4711-do-not-show"

reached: list[tuple[str, Any]] = []
hold = threading.Event()


@tool(callers=("model", "code"))
def sales(quarter: Literal["Q1", "Q2"], limit: int = 10) -> list[int]:
    """Sales of a quarter."""
    reached.append(("sales", quarter))
    return list(range(limit))


@tool(callers=("model",))
def send_email(to: str) -> bool:
    """Only the model may."""
    reached.append(("send_email", to))
    return True


@tool
def fail(how: str) -> int:
    """Fails in some way."""
    secret = CANARY
    if how == "raise":
        raise RuntimeError(f"cannot open /etc/shadow with {secret}")
    if how == "own":
        raise ToolError("there is no such quarter", "use Q1")
    if how == "exit":
        sys.exit(3)
    if how == "type":
        return "no number"  # type: ignore[return-value]
    if how == "nan":
        return float("nan")  # type: ignore[return-value]
    if how == "large":
        return "x" * (1 << 30)  # type: ignore[return-value]
    if how == "deep":
        value: Any = []
        for _ in range(100_000):
            value = [value]
        return value  # type: ignore[no-any-return]
    return 1


@tool(timeout=0.2)
def hang() -> int:
    """Does not return in time."""
    hold.wait(20)
    return 1


@tool(timeout=0.2)
async def hang_async() -> int:
    """Does not return in time."""
    await asyncio.sleep(20)
    return 1


@tool(approval=True)
def transfer(amount: int) -> int:
    """Asks first."""
    reached.append(("transfer", amount))
    return amount


TOOLS: list[Tool] = [sales, send_email, fail, hang, hang_async, transfer]


@pytest.fixture
def dispatcher(sandbox: Sandbox) -> Iterator[Dispatcher]:
    reached.clear()
    hold.clear()
    with Dispatcher(TOOLS, sandbox=sandbox, budget=Budget(calls_per_run=500)) as made:
        yield made
        hold.set()
        # Whatever was tried, both go on.
        assert run(made, "print(tools.sales('Q1', 2))")["stdout"] == "[0, 1]\n"


def run(dispatcher: Dispatcher, code: str, **arguments: Any) -> dict[str, Any]:
    result = dispatcher.call("run_code", {"code": textwrap.dedent(code), **arguments})
    assert result.ok, result.error
    value: dict[str, Any] = result.value
    return value


def said(dispatcher: Dispatcher, code: str) -> str:
    value = run(dispatcher, code)
    assert value["status"] == "ok", value
    text: str = value["stdout"]
    return text


TRY = """
def attempt(call, *args, **kwargs):
    try:
        print(call(*args, **kwargs))
    except tools.ToolError as error:
        print(error.code, "|", error.message, "|", error.hint)
"""


# --- what reaches a function --------------------------------------------------------------------------------------


def test_wrong_arguments_come_back_worded_for_the_program(dispatcher: Dispatcher) -> None:
    text = said(dispatcher, TRY + "attempt(tools.sales, 'Q5')\nattempt(tools.sales, 'Q1', '3')")
    lines = text.splitlines()
    assert [line.split(" | ")[0] for line in lines[:2]] == ["invalid_arguments"] * 2
    assert "quarter" in lines[0]
    assert "Q5" in lines[0]
    assert "limit" in lines[1]
    assert reached == []


UNGRANTED = [
    ("of-the-model-alone", "send_email", '{"to": "a@b"}', "caller_not_allowed"),
    ("run_code", "run_code", '{"code": "1"}', "caller_not_allowed"),
    ("unknown", "drop_database", "{}", "unknown_tool"),
    ("a-method", "__class__", "{}", "invalid_arguments"),
    ("empty", "", "{}", "invalid_arguments"),
    ("another-case", "Sales", '{"quarter": "Q1"}', "unknown_tool"),
    ("with-a-space", "sales ", '{"quarter": "Q1"}', "invalid_arguments"),
]


@pytest.mark.parametrize(
    ("name", "arguments", "code"), [pytest.param(n, a, c, id=identity) for identity, n, a, c in UNGRANTED]
)
def test_tool_that_was_not_granted_is_not_called(dispatcher: Dispatcher, name: str, arguments: str, code: str) -> None:
    program = (
        RAW
        + f"""
os.write(3, frame(body=json.dumps({{"tool": {name!r}, "arguments": json.loads({arguments!r})}}).encode()))
print(answers()[0]["error"]["code"])
"""
    )
    assert said(dispatcher, program) == f"{code}\n"
    assert reached == []


def test_module_holds_granted_tools_only(dispatcher: Dispatcher) -> None:
    listed = said(dispatcher, "print(sorted(name for name in dir(tools) if name[:2] != '__'))")
    assert listed == "['ToolError', 'aio', 'fail', 'hang', 'hang_async', 'sales', 'transfer']\n"


BODIES = [
    ("no-json", b"hello"),
    ("no-utf8", b"\xff\xfe"),
    ("a-list", b"[]"),
    ("a-number", b"1"),
    ("no-arguments", b'{"tool": "sales"}'),
    ("more-keys", b'{"tool": "sales", "arguments": {"quarter": "Q1"}, "caller": "model"}'),
    ("another-run", b'{"tool": "sales", "arguments": {"quarter": "Q1"}, "run": "0000"}'),
    ("name-is-a-list", b'{"tool": ["sales"], "arguments": {"quarter": "Q1"}}'),
    ("arguments-are-a-list", b'{"tool": "sales", "arguments": ["Q1"]}'),
    ("arguments-are-text", b'{"tool": "sales", "arguments": "{\\"quarter\\": \\"Q1\\"}"}'),
    ("key-twice", b'{"tool": "sales", "arguments": {"quarter": "Q5", "quarter": "Q1"}}'),
    ("tool-twice", b'{"tool": "fail", "tool": "sales", "arguments": {"quarter": "Q1"}}'),
    ("nan", b'{"tool": "sales", "arguments": {"quarter": "Q1", "limit": NaN}}'),
    ("infinity", b'{"tool": "sales", "arguments": {"quarter": "Q1", "limit": 1e999}}'),
    ("a-huge-number", b'{"tool": "sales", "arguments": {"quarter": "Q1", "limit": ' + b"9" * 50_000 + b"}}"),
    ("deep", b'{"tool": "sales", "arguments": {"quarter": ' + b"[" * 25_000 + b"]" * 25_000 + b"}}"),
    ("open", b'{"tool": "sales", "arguments": ' + b'{"a":' * 10_000),
    ("surrogate", b'{"tool": "sales", "arguments": {"quarter": "\\ud800"}}'),
    ("two-values", b'{"tool": "sales", "arguments": {"quarter": "Q1"}} {}'),
    ("nul", b'{"tool": "sales\\u0000", "arguments": {"quarter": "Q1"}}'),
]


@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in BODIES])
def test_odd_body_is_refused_in_words(dispatcher: Dispatcher, body: bytes) -> None:
    program = (
        RAW
        + f"""
import base64
body = base64.b64decode({__import__("base64").b64encode(body)!r})
os.write(3, frame(body=body))
answer = answers()[0]
print(answer["ok"], answer["error"]["code"] in ("invalid_arguments", "unknown_tool"), len(json.dumps(answer)) < 4000)
"""
    )
    assert said(dispatcher, program) == "False True True\n"
    assert reached == []


# --- what comes back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "code"),
    [("raise", "tool_failed"), ("own", "tool_failed"), ("exit", "tool_failed"), ("type", "invalid_result"),
     ("nan", "invalid_result"), ("large", "invalid_result result_too_large"), ("deep", "invalid_result")],
)  # fmt: skip
def test_tool_that_fails_is_told_without_anything_of_the_host(dispatcher: Dispatcher, how: str, code: str) -> None:
    text = said(dispatcher, TRY + f"attempt(tools.fail, {how!r})")
    assert text.split(" | ")[0] in code.split()
    for part in (CANARY, "/etc/shadow", __file__, "Traceback", os.getcwd()):
        assert part not in text
    if how == "own":
        assert "there is no such quarter | use Q1" in text


@pytest.mark.parametrize("name", ["hang", "hang_async"])
def test_hung_tool_is_a_timeout_for_the_program_and_not_its_end(dispatcher: Dispatcher, name: str) -> None:
    assert said(dispatcher, TRY + f"attempt(tools.{name})\nprint('on')").splitlines()[0].startswith("timeout | ")


def test_abandoned_threads_are_bounded_and_then_busy(sandbox: Sandbox) -> None:
    hold.clear()
    with Dispatcher(TOOLS, sandbox=sandbox, max_abandoned=2) as dispatcher:
        codes = [line.split(" | ")[0] for line in said(dispatcher, TRY + "attempt(tools.hang)\n" * 4).splitlines()]
        assert codes == ["timeout", "timeout", "busy", "busy"]
        assert dispatcher.abandoned == 2
        hold.set()
        leftovers.eventually(lambda: dispatcher.abandoned == 0, 10, "threads are still counted")


# --- approval -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
def test_approval_is_asked_with_the_exact_call_and_counts_once(sandbox: Sandbox, is_async: bool) -> None:
    asked: list[tuple[Any, ...]] = []

    def approve(name: str, arguments: dict[str, Any], caller: str, run_id: str | None) -> bool:
        asked.append((name, arguments, caller, run_id))
        return arguments["amount"] == 5 and len(asked) == 1

    async def approve_async(*question: Any) -> bool:
        return approve(*question)

    reached.clear()
    with Dispatcher(TOOLS, sandbox=sandbox, approve=approve_async if is_async else approve) as dispatcher:
        value = run(
            dispatcher, TRY + "attempt(tools.transfer, 5)\nattempt(tools.transfer, 5)\nattempt(tools.transfer, 6)"
        )
    assert [line.split(" | ")[0] for line in value["stdout"].splitlines()] == ["5", *["approval_denied"] * 2]
    assert asked == [("transfer", {"amount": n}, "code", value["id"]) for n in (5, 5, 6)]
    assert reached == [("transfer", 5)]


def test_program_cannot_change_its_call_while_it_is_judged(sandbox: Sandbox) -> None:
    """The whole cell stands still before anybody is asked: also its other threads and processes."""
    stood: list[bool] = []

    def approve(name: str, arguments: dict[str, Any], caller: str, run_id: str | None) -> bool:
        first, second = used(), 0.0
        threading.Event().wait(0.3)
        second = used()
        stood.append(first == second)
        return True

    def used() -> float:
        found = [one for one in leftovers.processes().values() if one.pid in cells()]
        return sum(cpu(one.pid) for one in found)

    def cells() -> set[int]:
        import psutil

        return {one.pid for one in psutil.Process(pid_of(sandbox)).children(recursive=True)}

    def cpu(pid: int) -> float:
        import psutil

        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(times.user + times.system)

    code = """
    import os, threading
    def burn():
        while True: pass
    threading.Thread(target=burn, daemon=True).start()
    if os.fork() == 0:
        burn()
    print(tools.transfer(1))
    """
    with Sandbox(pool=leftovers.UNPARKED) as sandbox, Dispatcher(TOOLS, sandbox=sandbox, approve=approve) as dispatcher:
        assert said(dispatcher, code) == "1\n"
    assert stood == [True]


def test_no_callback_means_refused(dispatcher: Dispatcher) -> None:
    assert said(dispatcher, TRY + "attempt(tools.transfer, 1)").startswith("approval_denied | ")
    assert reached == []


# --- floods -------------------------------------------------------------------------------------------------------


def test_ten_thousand_calls_use_up_the_runs_budget_and_no_more(dispatcher: Dispatcher) -> None:
    code = """
    from collections import Counter
    found = Counter()
    for n in range(10_000):
        try:
            tools.sales("Q1", 1)
            found["ok"] += 1
        except tools.ToolError as error:
            found[error.code] += 1
    print(sorted(found.items()))
    """
    assert said(dispatcher, code) == "[('budget_exceeded', 9500), ('ok', 500)]\n"
    assert len(reached) == 500


def test_next_run_has_a_budget_of_its_own(dispatcher: Dispatcher) -> None:
    for _ in range(2):
        assert said(dispatcher, "for n in range(400): tools.sales('Q1', 1)\nprint('done')") == "done\n"


def test_large_results_of_many_threads_are_bounded(dispatcher: Dispatcher) -> None:
    code = """
    from concurrent.futures import ThreadPoolExecutor
    def ask(n):
        try:
            return len(tools.sales("Q1", 3_000_000))
        except tools.ToolError as error:
            return error.code
    with ThreadPoolExecutor(8) as pool:
        print(set(pool.map(ask, range(8))))
    """
    assert said(dispatcher, code) == "{'result_too_large'}\n"


# --- ends ---------------------------------------------------------------------------------------------------------


def test_run_that_ends_in_the_middle_of_a_call_is_told_and_the_tool_ends_unheard(dispatcher: Dispatcher) -> None:
    value = run(dispatcher, "import threading, os\nthreading.Thread(target=tools.hang).start()\nos._exit(4)")
    assert (value["status"], value["exit_code"]) == ("error", 4)


def test_memory_hog_that_waits_for_a_tool_is_still_told_as_one(dispatcher: Dispatcher) -> None:
    code = """
    import threading
    threading.Thread(target=tools.hang, daemon=True).start()
    data = bytearray(b"x") * (2 << 30)
    """
    assert run(dispatcher, code)["status"] in ("memory", "error")


HOST = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from sandboxd import Sandbox
from sandboxd.tools import Dispatcher, tool
@tool
def wait() -> int:
    "Never returns."
    print("called", flush=True)
    threading.Event().wait(60)
    return 1
sandbox = Sandbox()
print(sandbox._handle.engine.pid, flush=True)
Dispatcher([wait], sandbox=sandbox).call("run_code", {"code": "tools.wait()"})
"""


def test_host_that_dies_in_the_middle_of_a_call_leaves_nothing() -> None:
    before = leftovers.snapshot()
    root = str(Path(__file__).resolve().parents[2])
    with subprocess.Popen([sys.executable, "-c", HOST, root], stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        engine = leftovers.process(int(host.stdout.readline()))
        assert engine is not None
        assert host.stdout.readline() == "called\n"
        host.send_signal(signal.SIGKILL)
    leftovers.eventually(lambda: not leftovers.lives(engine), 20, "the engine is still there")
    leftovers.assert_nothing_new(before)


FORK = """
import asyncio, os, sys
sys.path.insert(0, sys.argv[1])
from sandboxd import Sandbox
from sandboxd.tools import Dispatcher, tool
@tool(timeout=5)
def timed() -> int:
    "In a thread."
    return 1
@tool
async def later() -> int:
    "On a loop."
    return 2
def use(dispatcher):
    return [dispatcher.call(name, {}).value for name in ("timed", "later")]
sandbox = Sandbox()
with Dispatcher([timed, later], sandbox=sandbox) as dispatcher:
    print(use(dispatcher), dispatcher.call("run_code", {"code": "tools.timed()"}).value["status"], flush=True)
    if os.fork() == 0:
        print(use(dispatcher), flush=True)
        with Sandbox() as own, Dispatcher([timed, later], sandbox=own) as another:
            value = another.call("run_code", {"code": "print(tools.timed() + tools.later())"}).value
            print(value["status"], value["stdout"].strip(), flush=True)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
sandbox.close()
"""


def test_child_of_the_host_has_tools_of_its_own() -> None:
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-W", "ignore", "-c", FORK, root]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == ["[1, 2] ok", "[1, 2]", "ok 3", "0"], done.stderr


def test_result_bound_of_a_tool_cannot_break_the_channel(sandbox: Sandbox) -> None:
    @tool(max_result_bytes=64 << 20)
    def large(n: int) -> str:
        """So many."""
        return "x" * n

    with Dispatcher([large], sandbox=sandbox) as dispatcher:
        text = said(dispatcher, TRY + "attempt(tools.large, 9 << 20)\nprint(len(tools.large(8_000_000)))")
    assert [line.split(" | ")[0] for line in text.splitlines()] == ["result_too_large", "8000000"]


@pytest.mark.parametrize("is_async", [False, True])
def test_yes_that_comes_too_late_is_not_carried_out(is_async: bool) -> None:
    answered = threading.Event()

    def approve(*question: Any) -> bool:
        threading.Event().wait(1)
        answered.set()
        return True

    async def approve_async(*question: Any) -> bool:
        await asyncio.sleep(1)
        answered.set()
        return True

    reached.clear()
    with (
        Sandbox(limits=Limits(approval_seconds=0.3)) as sandbox,
        Dispatcher(TOOLS, sandbox=sandbox, approve=approve_async if is_async else approve) as dispatcher,
    ):
        assert run(dispatcher, "tools.transfer(1)")["status"] == "timeout"
        assert answered.wait(10)
        assert said(dispatcher, "print(tools.sales('Q1', 1))") == "[0]\n"
        assert ("transfer", 1) not in reached


def test_yes_for_a_dispatcher_that_was_closed_meanwhile_is_not_carried_out() -> None:
    def approve(*question: Any) -> bool:
        made.close()
        return True

    reached.clear()
    made = Dispatcher([transfer], approve=approve)
    result = made.call("transfer", {"amount": 1})
    assert result.error is not None
    assert result.error.code == "unavailable"
    assert reached == []


def test_asynchronous_tool_of_a_run_that_was_ended_is_cancelled() -> None:
    ended: list[str] = []
    over = threading.Event()

    @tool
    async def slow() -> int:
        """Takes long."""
        try:
            await asyncio.sleep(20)
            ended.append("done")
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        finally:
            over.set()
        return 1

    with Sandbox(limits=Limits(tool_wait_seconds=0.3)) as sandbox, Dispatcher([slow], sandbox=sandbox) as dispatcher:
        assert run(dispatcher, "tools.slow()")["status"] == "timeout"
        assert over.wait(10)
    assert ended == ["cancelled"]


WRONG_USES: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("a-tool-alone", [sales], {}),
    ("a-number", [5], {}),
    ("a-policys-name", [[]], {"sandbox": "default"}),
    ("a-class", [[]], {"sandbox": Sandbox}),
    ("a-yes", [[]], {"approve": True}),
    ("a-word", [[]], {"review": "yes"}),
]


@pytest.mark.parametrize(("given", "named"), [pytest.param(g, n, id=identity) for identity, g, n in WRONG_USES])
def test_wrong_use_of_a_dispatcher_is_told_at_once(given: list[Any], named: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"list of tools|must be"):
        Dispatcher(*given, **named)


def test_record_of_run_code_bears_the_id_of_its_run(sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with Dispatcher([sales], sandbox=sandbox, audit=path) as dispatcher:
        value = run(dispatcher, "tools.sales('Q1')")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(one["tool"], one["id"]) for one in records] == [("sales", value["id"]), ("run_code", value["id"])]


def test_two_dispatchers_on_one_daemon_never_see_each_others_calls(tmp_path: Path) -> None:
    seen: dict[str, list[int]] = {"one": [], "two": []}

    def made(name: str, sandbox: Sandbox) -> Dispatcher:
        @tool(name="note")
        def note(n: int) -> str:
            """Notes it."""
            seen[name].append(n)
            return name

        return Dispatcher([note], sandbox=sandbox)

    with daemons.directory() as home, daemons.served(home) as served:
        handles = {name: served.sandbox() for name in seen}
        ways = {name: made(name, handles[name]) for name in seen}
        starts = {"one": 0, "two": 10_000}
        code = "print({{tools.note(n) for n in range({0}, {0} + 300)}})"
        found: dict[str, str] = {}

        def drive(name: str) -> None:
            found[name] = said(ways[name], code.format(starts[name]))

        threads = [threading.Thread(target=drive, args=(name,)) for name in seen for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for name in seen:
            ways[name].close()
            handles[name].close()
    assert found == {"one": "{'one'}\n", "two": "{'two'}\n"}
    for name, start in starts.items():
        assert sorted(seen[name]) == sorted([*range(start, start + 300)] * 2)


def test_closed_dispatcher_answers_programs_that_still_run(sandbox: Sandbox) -> None:
    dispatcher = Dispatcher(TOOLS, sandbox=sandbox)

    @tool
    def close() -> int:
        """Closes the dispatcher."""
        made.close()
        return 1

    made = Dispatcher([close, sales], sandbox=sandbox)
    value = run(made, TRY + "attempt(tools.close)\nattempt(tools.sales, 'Q1')")
    assert [line.split(" | ")[0] for line in value["stdout"].splitlines()][1] == "unavailable"
    dispatcher.close()


def test_wall_clock_of_run_code_stands_still_while_its_tools_work(sandbox: Sandbox) -> None:
    @tool
    def slow() -> int:
        """Takes a while."""
        threading.Event().wait(1.2)
        return 1

    with Dispatcher([slow], sandbox=sandbox) as dispatcher:
        value = run(dispatcher, "print(tools.slow())", timeout=1)
    assert (value["status"], value["stdout"]) == ("ok", "1\n")


def test_hung_tool_without_a_timeout_ends_with_the_run() -> None:
    hold.clear()

    @tool
    def forever() -> int:
        """Never returns."""
        hold.wait(30)
        return 1

    with (
        Sandbox(limits=Limits(tool_wait_seconds=0.5)) as sandbox,
        Dispatcher([forever], sandbox=sandbox) as dispatcher,
    ):
        value = run(dispatcher, "tools.forever()")
        hold.set()
    assert value["status"] == "timeout"
    assert value["limits_hit"][0]["limit"] == "tool_wait_seconds"
    assert "tool" in value["next"]


def test_program_learns_nothing_of_the_host_from_the_module(dispatcher: Dispatcher) -> None:
    code = """
    import inspect, json
    text = repr(vars(tools)) + repr([vars(one) for one in vars(tools).values() if hasattr(one, "__dict__")])
    text += "".join(repr(getattr(one, "__globals__", "")) for one in vars(tools).values())
    for one in vars(tools).values():
        text += repr([cell.cell_contents for cell in getattr(one, "__closure__", None) or ()])
    print(json.dumps(text))
    """
    text = said(dispatcher, code)
    for part in (CANARY, os.getcwd(), "send_email", str(os.getpid())):
        assert part not in text
