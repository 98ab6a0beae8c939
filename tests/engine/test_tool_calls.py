"""Tool calls between a program in its cell and the host's program, by the channel alone: no dispatcher here.

What stands on the cell's side is no wall, so the hostile ones write frames of their own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd import AsyncSandbox, Limits, ProtocolError, Sandbox
from sandboxd.cgroup import discover
from sandboxd.errors import Unavailable
from sandboxd.inside import channel
from sandboxd.protocol.run_header import MODULE_BYTES
from sandboxd.tools.code import link
from sandboxd.tools.code.link import RunTools, ToolCall
from sandboxd.tools.pipeline.running import NoThread
from tests.support import daemons, leftovers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandboxd import Result

pytestmark = pytest.mark.usefixtures("prompt")

MODULE = '''
def echo(value: "Any" = _Default("None"), twice: "bool" = _Default("False")) -> "Any":
    """Gives back what it gets.

    value: anything.
    """
    return _call("echo", {"value": value, "twice": twice})

def other() -> "str":
    return _call("other", {})
'''
RAW = """
import os, struct, json, select
HEAD = struct.Struct("<BBHII")
def frame(kind=1, number=1, body=b"{}", index=0, total=None, magic=0x54):
    return HEAD.pack(magic, kind, index, number, len(body) if total is None else total) + body
def answers(count=1):
    found = []
    while len(found) < count:
        data = os.read(3, 1 << 17)
        if not data:
            break
        found.append(json.loads(data[HEAD.size:]))
    return found
def call(value=None, number=1):
    body = json.dumps({"tool": "echo", "arguments": {"value": value}}).encode()
    os.write(3, frame(number=number, body=body))
"""


def answer(value: Any) -> bytes:
    return json.dumps({"ok": True, "value": value, "error": None}, separators=(",", ":")).encode()


def refusal(code: str, message: str, hint: str = "") -> bytes:
    error = {"code": code, "message": message, "hint": hint}
    return json.dumps({"ok": False, "value": None, "error": error}).encode()


def echo(body: bytes, run: ToolCall) -> bytes:
    arguments = json.loads(body)["arguments"]
    return answer(arguments.get("value"))


def after_the_next() -> Callable[[bytes, ToolCall], bytes]:
    """A tool whose call "slow" is answered when another one comes."""
    go = threading.Event()

    def call(body: bytes, run: ToolCall) -> bytes:
        if json.loads(body)["arguments"]["value"] == "slow":
            go.wait(20)
        else:
            go.set()
        return echo(body, run)

    return call


def all_together(count: int) -> Callable[[bytes, ToolCall], bytes]:
    """A tool that answers when *count* calls of it are under way."""
    together = threading.Barrier(count)

    def call(body: bytes, run: ToolCall) -> bytes:
        together.wait(20)
        return echo(body, run)

    return call


def until(over: threading.Event) -> Callable[[bytes, ToolCall], bytes]:
    """A tool that answers when *over* is set."""

    def call(body: bytes, run: ToolCall) -> bytes:
        over.wait(25)
        return echo(body, run)

    return call


class Tools:
    """Runs programs with tools; *call* is what carries a call out, ``seen`` what came."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.seen: list[bytes] = []
        self.runs: set[str | None] = set()

    def run(
        self, code: str, call: Callable[[bytes, ToolCall], bytes] = echo, calls: int = 1000, **arguments: Any
    ) -> Result:
        def noted(body: bytes, run: ToolCall) -> bytes:
            self.seen.append(body)
            self.runs.add(run.id)
            return call(body, run)

        return self.sandbox._run_with_tools(textwrap.dedent(code), RunTools(MODULE, calls, noted), **arguments)

    def says(self, code: str, *lines: str, call: Callable[[bytes, ToolCall], bytes] = echo, **arguments: Any) -> Result:
        result = self.run(code, call, **arguments)
        assert (result.status, result.stdout.splitlines()) == ("ok", list(lines)), result.stderr
        return result


@pytest.fixture
def tools(sandbox: Sandbox) -> Iterator[Tools]:
    yield Tools(sandbox)
    # Whatever was tried, the engine serves the next.
    assert Tools(sandbox).run("tools.echo(42)").results[0].mime["text/plain"] == "42"


# --- the module ---------------------------------------------------------------------------------------------------


def test_tools_are_bound_and_importable(tools: Tools) -> None:
    code = """
    import tools as imported
    from tools import echo, ToolError
    print(imported is tools, echo(1), tools.echo(value=[1, {"a": None}]), issubclass(ToolError, Exception))
    """
    tools.says(code, "True 1 [1, {'a': None}] True")


@pytest.mark.parametrize(
    "how",
    ["from tools.aio import echo", "import tools.aio; echo = tools.aio.echo", "from tools import aio; echo = aio.echo",
     "from tools.aio import *", "echo = tools.aio.echo"],
)  # fmt: skip
def test_asynchronous_functions_are_imported_like_any(tools: Tools, how: str) -> None:
    tools.says(f"{how}\nimport asyncio\nprint(asyncio.run(echo(5)))", "5")


def test_run_has_the_id_that_its_calls_bear(tools: Tools) -> None:
    result = tools.says("tools.echo(1)")
    assert tools.runs == {result.id}


def test_default_that_was_not_given_is_not_sent(tools: Tools) -> None:
    tools.says("tools.echo(5)")
    assert [json.loads(body) for body in tools.seen] == [{"tool": "echo", "arguments": {"value": 5}}]


def test_help_and_signature_show_the_tool(tools: Tools) -> None:
    code = """
    import inspect
    print(inspect.signature(tools.echo))
    help(tools)
    """
    shown = tools.run(code).stdout
    assert shown.startswith("(value: 'Any' = None, twice: 'bool' = False) -> 'Any'\n")
    assert "Gives back what it gets." in shown
    assert "Help on module tools" in shown


def test_run_without_tools_has_no_such_module(sandbox: Sandbox) -> None:
    result = sandbox.run("import tools")
    assert result.error is not None
    assert result.error.type == "ModuleNotFoundError"


def test_tool_that_is_not_granted_is_named_with_those_that_are(tools: Tools) -> None:
    code = """
    print(hasattr(tools, "delete"))
    try:
        tools.delete()
    except tools.ToolError as error:
        print(error.code, "|", error.message, "|", error.hint)
    """
    tools.says(code, "False", "unknown_tool | There is no tool 'delete' here. | The tools are: echo, other.")


def test_refusal_is_an_exception_with_code_message_and_hint(tools: Tools) -> None:
    result = tools.run("tools.echo(1)", lambda body, run: refusal("rate_limited", "Too fast.", "Wait 2 s."))
    assert result.status == "error"
    assert result.error is not None
    assert (result.error.type, result.error.message) == ("tools.ToolError", "rate_limited: Too fast. Wait 2 s.")
    assert result.error.line == 1
    assert "toolcalls" not in result.stderr
    assert "/tools/" not in result.stderr


def test_values_of_common_libraries_travel_as_json(tools: Tools) -> None:
    code = """
    import datetime, decimal, uuid
    print(tools.echo([datetime.date(2026, 1, 2), decimal.Decimal("1.5"), b"ab", {3}, uuid.UUID(int=1)]))
    """
    tools.says(code, "['2026-01-02', '1.5', 'YWI=', [3], '00000000-0000-0000-0000-000000000001']")


@pytest.mark.parametrize("value", ["float('nan')", "object()", "{1: object}", "float('-inf')"])
def test_what_has_no_form_in_json_is_refused_in_the_cell(tools: Tools, value: str) -> None:
    code = f"""
    try:
        tools.echo({value})
    except tools.ToolError as error:
        print(error.code)
    """
    tools.says(code, "invalid_arguments")
    assert tools.seen == []


def test_threads_call_side_by_side(tools: Tools) -> None:
    code = """
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(8) as pool:
        print(list(pool.map(tools.echo, range(16))))
    """
    tools.says(code, str(list(range(16))), call=all_together(8))


def test_tasks_call_side_by_side(tools: Tools) -> None:
    code = """
    import asyncio
    async def main():
        print(await asyncio.gather(*(tools.aio.echo(n) for n in range(16))))
    asyncio.run(main())
    """
    tools.says(code, str(list(range(16))), call=all_together(8))


def test_threads_and_loops_share_the_channel(tools: Tools) -> None:
    code = """
    import asyncio, threading
    sums = []
    def plain(k):
        sums.append(sum(tools.echo(k + n) - k for n in range(100)))
    async def many(k):
        sums.append(sum(await asyncio.gather(*(tools.aio.echo(k + n) for n in range(100)))) - 100 * k)
    threads = [threading.Thread(target=plain, args=(k * 1000,)) for k in range(4)]
    threads += [threading.Thread(target=lambda k=k: asyncio.run(many(k * 1000))) for k in range(3)]
    for one in threads: one.start()
    asyncio.run(many(7))
    for one in threads: one.join()
    print(sums == [4950] * 8)
    """
    tools.says(code, "True")


def test_cancelled_task_leaves_the_others_alone(tools: Tools) -> None:
    code = """
    import asyncio
    async def main():
        try:
            await asyncio.wait_for(tools.aio.echo("slow"), 0.05)
        except TimeoutError:
            print("late")
        print(await tools.aio.echo("next"))
    asyncio.run(main())
    print(tools.echo("last"))
    """
    tools.says(code, "late", "next", "last", call=after_the_next())


def test_interrupted_thread_leaves_the_others_alone(tools: Tools) -> None:
    code = """
    import signal, threading
    def late(*_): raise TimeoutError
    signal.signal(signal.SIGALRM, late)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        tools.echo("slow")
    except TimeoutError:
        print("late")
    print(tools.echo("next"))
    thread = threading.Thread(target=lambda: print(tools.echo("other")))
    thread.start(); thread.join()
    """
    tools.says(code, "late", "next", "other", call=after_the_next())


def test_call_that_is_interrupted_while_it_is_sent_goes_out_whole(tools: Tools) -> None:
    code = """
    import signal
    class Late(Exception): pass
    def late(*_): raise Late
    signal.signal(signal.SIGALRM, late)
    big, interrupted = "x" * 1_000_000, 0
    for n in range(40):
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0005 * (n % 20 + 1))
            try:
                tools.echo(big)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Late:
            interrupted += 1
    print(interrupted > 0, tools.echo("last"))
    """
    tools.says(code, "True last")


def test_answers_to_interrupted_calls_make_room_for_others(tools: Tools) -> None:
    go = threading.Event()

    def slow(body: bytes, run: ToolCall) -> bytes:
        if json.loads(body)["arguments"]["value"] == "slow":
            go.wait(20)
        return echo(body, run)

    code = """
    import signal
    class Late(Exception): pass
    def late(*_): raise Late
    signal.signal(signal.SIGALRM, late)
    for n in range(64):
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            tools.echo("slow")
        except Late:
            pass
    print(tools.echo("last"))
    """
    threading.Timer(2, go.set).start()
    tools.says(code, "last", call=slow, limits=Limits(tool_wait_seconds=20))


def test_program_that_closes_the_channel_has_no_tools(tools: Tools) -> None:
    code = """
    import os
    os.close(3)
    try:
        tools.echo(1)
    except tools.ToolError as error:
        print(error.code)
    """
    tools.says(code, "unavailable")


def test_child_of_the_program_has_no_tools(tools: Tools) -> None:
    code = """
    import os
    if os.fork() == 0:
        try:
            tools.echo(1)
        except tools.ToolError as error:
            print(error.code, flush=True)
        os._exit(0)
    os.wait()
    print(tools.echo(2))
    """
    tools.says(code, "unavailable", "2")
    assert len(tools.seen) == 1


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 60 << 10, (60 << 10) - 60, 200_000, 900_000])
def test_calls_and_answers_of_any_size_arrive(tools: Tools, size: int) -> None:
    tools.says(f"print(tools.echo('x' * {size}) == 'x' * {size})", "True")


def test_large_calls_of_many_threads_do_not_lock_each_other_up(tools: Tools) -> None:
    code = """
    import asyncio
    from concurrent.futures import ThreadPoolExecutor
    big = "x" * 300_000
    with ThreadPoolExecutor(12) as pool:
        print(all(one == big for one in pool.map(tools.echo, [big] * 24)))
    async def main():
        print(all(one == big for one in await asyncio.gather(*(tools.aio.echo(big) for _ in range(24)))))
    asyncio.run(main())
    """
    tools.says(code, "True", "True")


def test_arguments_that_are_too_long_are_refused(tools: Tools) -> None:
    code = """
    try:
        tools.echo("x" * (1 << 20))
    except tools.ToolError as error:
        print(error.code, error.message)
    """
    tools.says(code, "invalid_arguments The arguments of echo take 1,048,620 bytes; at most 1,048,576 can be sent.")


def test_large_result_is_also_a_file_of_the_workspace(tools: Tools) -> None:
    code = """
    import json, os
    value = tools.other()
    (name,) = os.listdir("/workspace/tool_results")
    print(len(value), json.load(open(f"/workspace/tool_results/{name}")) == value)
    """
    result = tools.says(code, "4000000 True", call=lambda body, run: answer("y" * 4_000_000))
    assert [file.path for file in result.files] == ["tool_results/other-1.json"]


def test_large_result_without_room_for_its_file_arrives_all_the_same(tools: Tools) -> None:
    result = tools.run(
        "len(tools.other())",
        lambda body, run: answer("y" * 1_000_000),
        limits=Limits(workspace_bytes="64K"),
    )
    assert result.results[0].mime["text/plain"] == "1000000"


# --- clocks -------------------------------------------------------------------------------------------------------


def pause(seconds: float) -> Callable[[bytes, ToolCall], bytes]:
    def call(body: bytes, run: ToolCall) -> bytes:
        threading.Event().wait(seconds)
        return echo(body, run)

    return call


def test_waiting_for_a_tool_does_not_use_up_the_wall_clock(tools: Tools) -> None:
    result = tools.says("print(tools.echo(1))", "1", call=pause(1.5), limits=Limits(wall_seconds=1))
    assert result.timings.tool_wait_seconds >= 1.4
    assert result.usage.wall_seconds < 1
    assert result.timings.run_seconds >= 1.5


def test_wall_clock_goes_on_after_the_answer(tools: Tools) -> None:
    result = tools.run("tools.echo(1)\nwhile True: pass", pause(1.2), limits=Limits(wall_seconds=1))
    assert result.status == "timeout"
    assert result.limits_hit[0].limit == "wall_seconds"
    assert 1 <= result.usage.wall_seconds < 2
    assert result.timings.tool_wait_seconds >= 1.1


def test_waits_are_added_up_until_their_limit(tools: Tools) -> None:
    code = "for n in range(100):\n    print(tools.echo(n), flush=True)"
    result = tools.run(code, pause(0.3), limits=Limits(tool_wait_seconds=1))
    assert result.status == "timeout"
    assert result.stdout.split() == ["0", "1", "2"]
    (hit,) = [hit for hit in result.limits_hit if hit.limit == "tool_wait_seconds"]
    assert (hit.value, hit.evidence.source) == (1.0, "clock")


def test_calls_side_by_side_are_one_wait(tools: Tools) -> None:
    code = """
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(8) as pool:
        print(list(pool.map(tools.echo, range(8))))
    """
    result = tools.says(code, str(list(range(8))), call=pause(0.5), limits=Limits(tool_wait_seconds=2))
    assert result.timings.tool_wait_seconds < 2


@pytest.mark.cgroup
def test_cpu_time_counts_while_a_tool_is_waited_for(tools: Tools) -> None:
    code = """
    import threading
    threading.Thread(target=tools.echo, args=(1,), daemon=True).start()
    while True: pass
    """
    over = threading.Event()
    result = tools.run(code, until(over), limits=Limits(cpu_seconds=0.5, wall_seconds=20))
    over.set()
    assert result.status == "cpu"


def test_hung_tool_ends_the_run_and_not_its_caller(tools: Tools) -> None:
    over = threading.Event()
    result = tools.run("print('before', flush=True)\ntools.echo(1)", until(over), limits=Limits(tool_wait_seconds=0.3))
    assert (result.status, result.stdout) == ("timeout", "before\n")
    over.set()


# --- approval -----------------------------------------------------------------------------------------------------

GAP = """
import threading, time
gap = 0
def watch():
    global gap
    last = time.monotonic()
    while True:
        now = time.monotonic()
        gap = max(gap, now - last)
        last = now
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
time.sleep(0.02)
"""


@pytest.mark.cgroup
def test_cell_stands_still_while_an_approval_is_asked_for(tools: Tools) -> None:
    def ask(body: bytes, run: ToolCall) -> bytes:
        with run.frozen():
            threading.Event().wait(0.6)
        return echo(body, run)

    result = tools.run(GAP + "tools.echo(1)\ntime.sleep(0.02)\nprint(gap > 0.5)", ask, limits=Limits(wall_seconds=0.5))
    assert (result.status, result.stdout) == ("ok", "True\n"), result.stderr
    assert result.timings.tool_wait_seconds >= 0.6


@pytest.mark.cgroup
def test_frozen_cell_uses_no_cpu(tools: Tools) -> None:
    def ask(body: bytes, run: ToolCall) -> bytes:
        with run.frozen():
            threading.Event().wait(1)
        return echo(body, run)

    code = """
    import threading
    def burn():
        while True: pass
    threading.Thread(target=burn, daemon=True).start()
    tools.echo(1)
    """
    result = tools.run(code, ask)
    assert result.status == "ok"
    assert result.usage.cpu_user_seconds + result.usage.cpu_system_seconds < 0.8


@pytest.mark.cgroup
def test_approvals_may_overlap(tools: Tools) -> None:
    together = threading.Barrier(3)

    def ask(body: bytes, run: ToolCall) -> bytes:
        together.wait(20)
        with run.frozen():
            together.wait(20)
        return echo(body, run)

    code = """
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(3) as pool:
        print(list(pool.map(tools.echo, range(3))))
    """
    tools.says(code, "[0, 1, 2]", call=ask)


@pytest.mark.cgroup
def test_call_is_frozen_once(tools: Tools) -> None:
    def ask(body: bytes, run: ToolCall) -> bytes:
        for _ in range(2):
            with run.frozen():
                pass
        return echo(body, run)

    code = """
    try:
        tools.echo(1)
    except tools.ToolError as error:
        print(error.code)
    """
    tools.says(code, "unavailable", call=ask)


@pytest.mark.cgroup
def test_approval_that_does_not_come_ends_the_run(tools: Tools) -> None:
    over = threading.Event()

    def ask(body: bytes, run: ToolCall) -> bytes:
        with run.frozen():
            over.wait(25)
        return echo(body, run)

    result = tools.run("tools.echo(1)", ask, limits=Limits(approval_seconds=0.3, tool_wait_seconds=0.1))
    over.set()
    assert result.status == "timeout"
    assert [hit.limit for hit in result.limits_hit] == ["approval_seconds"]


@pytest.mark.cgroup
def test_run_that_is_over_is_not_frozen_any_more(tools: Tools) -> None:
    failed: list[BaseException] = []
    over = threading.Event()
    asked = threading.Event()

    def late(body: bytes, run: ToolCall) -> bytes:
        over.wait(25)
        try:
            with run.frozen():
                pass
        except Unavailable as error:
            failed.append(error)
        asked.set()
        return echo(body, run)

    tools.run("tools.echo(1)", late, limits=Limits(tool_wait_seconds=0.2))
    over.set()
    assert asked.wait(10)
    assert failed


@pytest.mark.cgroup
def test_large_answer_beside_an_approval_does_not_lock_the_run_up(tools: Tools) -> None:
    frozen = threading.Event()

    def mixed(body: bytes, run: ToolCall) -> bytes:
        if json.loads(body)["arguments"]["value"] == "ask":
            with run.frozen():
                frozen.set()
                threading.Event().wait(0.5)
            return echo(body, run)
        frozen.wait(20)
        return answer("x" * 4_000_000)

    code = """
    import threading
    got = []
    thread = threading.Thread(target=lambda: got.append(len(tools.echo("large"))))
    thread.start()
    print(tools.echo("ask"))
    thread.join()
    print(got)
    """
    tools.says(code, "ask", "[4000000]", call=mixed, limits=Limits(approval_seconds=10))


def test_program_that_ends_while_it_is_to_be_frozen_holds_no_thread(sandbox: Sandbox) -> None:
    failed: list[BaseException] = []

    def ask(body: bytes, run: ToolCall) -> bytes:
        try:
            with run.frozen():
                pass
        except Unavailable as error:
            failed.append(error)
            raise
        return echo(body, run)

    tools = Tools(sandbox)
    tools.run("tools.echo(1)")
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for delay in range(12):
        ending = f"import time\ntime.sleep({delay / 4000})\nos._exit(0)"
        tools.run(RAW + "for n in range(8): call(n, n)\n" + ending, ask)
    leftovers.eventually(lambda: threading.active_count() <= before[0] + 20, 20, "threads are stuck")
    assert failed
    assert len(os.listdir("/proc/self/fd")) <= before[1] + 60


def test_yes_for_a_program_that_is_gone_is_none(tools: Tools) -> None:
    over, outcome, told = threading.Event(), [], threading.Event()

    def ask(body: bytes, run: ToolCall) -> bytes:
        try:
            with run.frozen():
                over.wait(20)
            outcome.append("carried out")
        except Unavailable:
            outcome.append("refused")
        told.set()
        return echo(body, run)

    assert tools.run("tools.echo(1)", ask, limits=Limits(approval_seconds=0.3)).status == "timeout"
    over.set()
    assert told.wait(10)
    assert outcome == ["refused"]


WITHOUT_V2 = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from sandboxd import Limits, Sandbox
from tests.engine.test_tool_calls import GAP, Tools, echo
def ask(body, run):
    with run.frozen():
        threading.Event().wait(0.6)
    return echo(body, run)
with Sandbox() as sandbox:
    print(sandbox.run("1").isolation.cgroup.version)
    print(Tools(sandbox).run(GAP + "tools.echo(1)\\ntime.sleep(0.02)\\nprint(gap > 0.5)", ask).stdout.strip())
    short = Limits(approval_seconds=0.2)
    ended = Tools(sandbox).run("import os\\nos.fork()\\ntools.echo(1)", ask, limits=short)
    print(ended.status, ended.limits_hit[0].limit, sandbox.run("print(6 * 7)").stdout.strip())
"""


def test_freezing_without_cgroup_v2() -> None:
    layout = discover()
    if layout.v2 is None or layout.v2.controllers or layout.freezer is None:
        pytest.skip("controllers are on v2 here")
    before = leftovers.snapshot()
    root = str(Path(__file__).resolve().parents[2])
    script = f'umount --lazy {layout.v2.mount_point} && exec "$0" -c "$1" "$2"'
    command = ["unshare", "--mount", "sh", "-c", script, sys.executable, WITHOUT_V2, root]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == ["v1", "True", "timeout approval_seconds 42"], done.stderr
    leftovers.assert_nothing_new(before)


# --- hostile programs ---------------------------------------------------------------------------------------------


def test_program_without_the_module_may_call_all_the_same(tools: Tools) -> None:
    tools.says(RAW + "call('raw')\nprint(answers())", "[{'ok': True, 'value': 'raw', 'error': None}]")


FORGED = [
    ("too-short", "os.write(3, b'T')"),
    ("not-a-kind", "os.write(3, frame(kind=0))"),
    ("another-kind", "os.write(3, frame(kind=9))"),
    ("an-answer", "os.write(3, frame(kind=2))"),
    ("a-freeze", "os.write(3, frame(kind=3, body=b''))"),
    ("frozen", "os.write(3, frame(kind=4, body=b''))"),
    ("a-thaw", "os.write(3, frame(kind=5, body=b''))"),
    ("empty", "os.write(3, frame(body=b''))"),
    ("too-long", "os.write(3, frame(total=1 << 31))"),
    ("just-too-long", "os.write(3, frame(body=b'x' * 61440, total=(1 << 20) + 1))"),
    ("longer-than-it-says", "os.write(3, frame(total=1))"),
    ("shorter-than-it-says", "os.write(3, frame(total=3))"),
    ("packet-too-long", "os.write(3, frame(body=b'x' * 70000))"),
    ("from-the-middle", "os.write(3, frame(body=b'x' * 61440, total=200000, index=1))"),
    ("a-part-left-out", "p = b'x' * 61440\nos.write(3, frame(body=p, total=200000))\n"
                        "os.write(3, frame(body=p, total=200000, index=2))"),
    ("a-part-twice", "p = b'x' * 61440\nos.write(3, frame(body=p, total=200000))\n"
                     "os.write(3, frame(body=p, total=200000))"),
    ("another-in-between", "os.write(3, frame(body=b'x' * 61440, total=200000))\ncall(number=2)"),
    ("number-in-use", "for _ in range(2): call('hold', 5)"),
]  # fmt: skip


@pytest.mark.parametrize("forged", [pytest.param(code, id=name) for name, code in FORGED])
def test_forged_frame_is_not_passed_on_and_nothing_is_heard_after_it(tools: Tools, forged: str) -> None:
    over = threading.Event()

    def hold(body: bytes, run: ToolCall) -> bytes:
        if b"hold" in body:
            over.wait(25)
        return answer(None)

    code = RAW + forged + "\ncall('after', 77)\nprint('done', flush=True)\nos._exit(7)"
    result = tools.run(code, hold)
    over.set()
    assert (result.status, result.exit_code, result.stdout) == ("error", 7, "done\n")
    assert [body for body in tools.seen if b"after" in body or b"x" in body] == []


def test_forged_frame_does_not_stop_the_limits(tools: Tools) -> None:
    code = RAW + "os.write(3, frame(kind=2))\nwhile True: pass"
    assert tools.run(code, limits=Limits(wall_seconds=0.5)).status == "timeout"


def test_calls_beyond_their_number_are_refused_without_the_host(tools: Tools) -> None:
    code = """
    codes = []
    for n in range(8):
        try:
            codes.append(tools.echo(n))
        except tools.ToolError as error:
            codes.append(error.code)
    print(codes)
    """
    tools.says(code, str([0, 1, 2, *["budget_exceeded"] * 5]), calls=3)
    assert len(tools.seen) == 3


def test_too_many_calls_at_a_time_are_busy(tools: Tools) -> None:
    over = threading.Event()
    threading.Timer(1, over.set).start()
    code = RAW + "for n in range(80): call(n, n)\nfound = answers(80)\n"
    code += "print(sum(one['ok'] for one in found), {one['error']['code'] for one in found if not one['ok']})"
    tools.says(code, "64 {'busy'}", call=until(over))


def test_ten_thousand_calls_are_answered_or_refused(tools: Tools) -> None:
    code = """
    good = bad = 0
    for n in range(10_000):
        try:
            tools.echo(n)
            good += 1
        except tools.ToolError:
            bad += 1
    print(good, bad)
    """
    tools.says(code, "1000 9000")


def test_flood_without_reading_is_stopped(tools: Tools) -> None:
    code = RAW + "while True:\n    for n in range(1000): call(n, n)"
    result = tools.run(code, limits=Limits(wall_seconds=2, tool_wait_seconds=2))
    assert result.status == "timeout"
    assert len(tools.seen) <= 1000


def test_flood_of_one_part_again_and_again_is_stopped(tools: Tools) -> None:
    code = (
        RAW
        + """
import select
part = b'x' * 61440
os.write(3, frame(body=part, total=200000))
os.write(3, frame(body=part, total=200000, index=1))
poll = select.poll()
poll.register(3, select.POLLOUT)
sent = 0
while sent < 30_000 and poll.poll(1000):
    os.write(3, frame(body=part, total=200000, index=1))
    sent += 1
print(10_000 <= sent < 10_100)
"""
    )
    assert tools.run(code, limits=Limits(tool_wait_seconds=50)).stdout == "True\n"


def test_thousand_threads_are_served_in_turn(tools: Tools) -> None:
    big = Sandbox(limits=Limits(pids=1100, memory_bytes="1G"))
    code = """
    import threading
    threading.stack_size(1 << 16)
    got = []
    threads = [threading.Thread(target=lambda n=n: got.append(tools.echo(n))) for n in range(1000)]
    for one in threads: one.start()
    for one in threads: one.join()
    print(sorted(got) == list(range(1000)))
    """
    with big:
        Tools(big).says(code, "True")


def test_call_of_the_last_moment_does_no_harm(tools: Tools) -> None:
    assert tools.run(RAW + "call(1)\nos._exit(0)").status == "ok"
    assert tools.run(RAW + "os.write(3, frame(body=b'x' * 61440, total=200000))\nos._exit(0)").status == "ok"


def test_survivor_of_the_program_calls_nobody(tools: Tools) -> None:
    code = RAW + textwrap.dedent("""
    import time
    os.set_inheritable(3, True)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True:
                try:
                    call("survivor", os.getpid())
                except OSError:
                    pass
                time.sleep(0.05)
        os._exit(0)
    os.wait()
    """)
    result = tools.run(code)
    count = len(tools.seen)
    assert result.status == "ok"
    threading.Event().wait(0.3)
    assert len(tools.seen) == count


def test_answer_of_garbage_harms_the_program_alone(tools: Tools) -> None:
    result = tools.run("tools.echo(1)", lambda body, run: b"no json")
    assert result.status == "error"
    assert result.error is not None
    assert "JSONDecodeError" in result.error.type


# --- hostile clients ----------------------------------------------------------------------------------------------

PART = b"x" * channel.PART_BYTES
GARBAGE = [
    ("too-short", b"T"),
    ("not-a-kind", channel.tool_frame(9, 1)),
    ("a-call", channel.tool_frame(channel.CALL, 1, b"{}")),
    ("frozen", channel.tool_frame(channel.FROZEN, 1)),
    ("an-answer-to-nobody", channel.tool_frame(channel.ANSWER, 4711, b"{}")),
    ("a-freeze-for-nobody", channel.tool_frame(channel.FREEZE, 4711)),
    ("too-long", channel.tool_frame(channel.ANSWER, 1, PART, total=channel.ANSWER_BYTES + 1)),
    ("from-the-middle", channel.tool_frame(channel.ANSWER, 1, PART, index=1, total=200_000)),
    ("longer-than-it-says", channel.tool_frame(channel.ANSWER, 1, b"{}", total=1)),
]


@pytest.mark.parametrize("garbage", [pytest.param(data, id=name) for name, data in GARBAGE])
def test_garbage_of_the_host_ends_its_tools_and_not_the_run(tools: Tools, garbage: bytes) -> None:
    def send(body: bytes, run: ToolCall) -> bytes:
        assert run.run._sock is not None
        run.run._sock.send(garbage)
        return answer("too late")

    code = """
    for n in range(2):
        try:
            tools.echo(n)
        except tools.ToolError as error:
            print(error.code)
    """
    tools.says(code, "unavailable", "unavailable", call=send)


def test_half_an_answer_is_replaced_when_the_host_leaves(tools: Tools) -> None:
    def half(body: bytes, run: ToolCall) -> bytes:
        assert run.run._sock is not None
        run.run._sock.send(channel.tool_frame(channel.ANSWER, 1, PART, total=200_000))
        run.run.end()
        return b""

    code = """
    try:
        tools.echo(1)
    except tools.ToolError as error:
        print(error.code)
    """
    tools.says(code, "unavailable", call=half)


@pytest.mark.parametrize("kind", [channel.ANSWER, channel.FREEZE])
def test_call_is_not_answered_before_it_is_whole(sandbox: Sandbox, kind: int) -> None:
    spoken = threading.Event()

    class Early(RunTools):
        def begin(self, fd: int, run: str) -> None:
            self.sock = socket.socket(fileno=fd)
            threading.Thread(target=self.speak, daemon=True).start()

        def speak(self) -> None:
            self.sock.recv(channel.TOOL_PACKET_BYTES)  # the first part of four
            self.sock.send(channel.tool_frame(kind, 7, b"{}" if kind == channel.ANSWER else b""))
            spoken.set()

        def end(self) -> None:
            self.sock.close()

    code = (
        RAW
        + """
import time
body = b'{"tool": "echo", "arguments": {"value": "' + b"x" * 190_000 + b'"}}'
parts = [body[at : at + 61440] for at in range(0, len(body), 61440)]
os.write(3, frame(number=7, body=parts[0], total=len(body)))
time.sleep(0.2)
for index in (1, 2, 3):
    os.write(3, frame(number=7, body=parts[index], index=index, total=len(body)))
print(answers()[0]["error"]["code"])
call("next", 9)
print(answers()[0]["error"]["code"])
"""
    )
    result = sandbox._run_with_tools(code, Early(MODULE, 10, echo))
    assert spoken.wait(10)
    assert result.stdout == "unavailable\nunavailable\n", result.stderr


def test_answers_may_not_be_mixed(tools: Tools) -> None:
    def mixed(body: bytes, run: ToolCall) -> bytes:
        assert run.run._sock is not None
        run.run._sock.send(channel.tool_frame(channel.ANSWER, 1, PART, total=200_000))
        return answer("in between")

    code = """
    import threading
    codes = []
    def call():
        try:
            tools.echo(1)
        except tools.ToolError as error:
            codes.append(error.code)
    threads = [threading.Thread(target=call) for _ in range(2)]
    for one in threads: one.start()
    for one in threads: one.join()
    print(codes)
    """
    tools.says(code, "['unavailable', 'unavailable']", call=mixed)


class Deaf(RunTools):
    """A host that takes the socket and never reads it."""

    def begin(self, fd: int, run: str) -> None:
        self.fd = fd

    def end(self) -> None:
        os.close(self.fd)


def test_host_that_never_reads_holds_up_nothing_but_its_run(sandbox: Sandbox) -> None:
    code = RAW + "for n in range(1000): os.write(3, frame(number=n, body=b'x' * 60000))"
    limits = Limits(tool_wait_seconds=0.5, wall_seconds=2)
    result = sandbox._run_with_tools(code, Deaf(MODULE, 1000, echo), limits=limits)
    assert result.status == "timeout"
    assert sandbox.run("print(1)").stdout == "1\n"


def test_text_of_the_tools_is_bounded(sandbox: Sandbox) -> None:
    with pytest.raises(ProtocolError, match="out of bounds"):
        sandbox._run_with_tools("1", RunTools("#" * (MODULE_BYTES + 1), 1, echo))


# --- the host's program -------------------------------------------------------------------------------------------


def test_host_that_closes_its_end_leaves_calls_unavailable(sandbox: Sandbox) -> None:
    def leave(body: bytes, run: ToolCall) -> bytes:
        run.run.end()
        return b""

    code = """
    for n in range(2):
        try:
            tools.echo(n)
        except tools.ToolError as error:
            print(error.code)
    """
    Tools(sandbox).says(code, "unavailable", "unavailable", call=leave)


HOST = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from sandboxd import Sandbox
from sandboxd.tools.code.link import RunTools
from tests.engine.test_tool_calls import MODULE
def hang(body, run):
    print("called", flush=True)
    if sys.argv[2] == "frozen":
        with run.frozen():
            print("frozen", flush=True)
            threading.Event().wait(60)
    threading.Event().wait(60)
sandbox = Sandbox()
print(sandbox._handle.engine.pid, flush=True)
sandbox._run_with_tools("tools.echo(1)", RunTools(MODULE, 10, hang))
"""


@pytest.mark.parametrize("how", ["waiting", "frozen"])
def test_host_that_dies_in_a_call_leaves_nothing(how: str) -> None:
    before = leftovers.snapshot()
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", HOST, root, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        engine = leftovers.process(int(host.stdout.readline()))
        assert engine is not None
        assert host.stdout.readline() == "called\n"
        if how == "frozen":
            assert host.stdout.readline() == "frozen\n"
        host.send_signal(signal.SIGKILL)
    leftovers.eventually(lambda: not leftovers.lives(engine), 20, "the engine is still there")
    leftovers.assert_nothing_new(before)


def test_program_is_told_when_its_host_has_no_threads_left(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def start(self, function: Callable[[], None]) -> None:
            raise NoThread

    monkeypatch.setattr(link, "_threads", Full())
    code = """
    try:
        tools.echo(1)
    except tools.ToolError as error:
        print(error.code)
    """
    Tools(sandbox).says(code, "unavailable")


def test_runs_side_by_side_never_see_each_others_calls(sandbox: Sandbox) -> None:
    both = [Tools(sandbox), Tools(sandbox)]
    code = "print(all(tools.echo([{0}, n]) == [{0}, n] for n in range(200)))"
    threads = [
        threading.Thread(target=one.run, args=(code.format(number), echo, 200)) for number, one in enumerate(both)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number, one in enumerate(both):
        assert {json.loads(body)["arguments"]["value"][0] for body in one.seen} == {number}
        assert len(one.seen) == 200


def test_async_sandbox_has_tools_too() -> None:
    import asyncio

    async def main() -> Result:
        async with AsyncSandbox() as sandbox:
            return await sandbox._run_with_tools("tools.echo(6) * 7", RunTools(MODULE, 5, echo))

    assert asyncio.run(main()).results[0].mime["text/plain"] == "42"


def test_many_runs_leave_no_descriptors_and_no_threads() -> None:
    with Sandbox(pool=leftovers.UNPARKED) as sandbox:
        Tools(sandbox).run("tools.echo(1)")
        threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
        for n in range(30):
            assert Tools(sandbox).run(f"tools.echo({n})").status == "ok"
        # The last run's threads find its end a moment after its answer.
        leftovers.eventually(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, 10, "descriptors are left")
        assert threading.active_count() <= threads + 3


# --- a daemon -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[daemons.Served]:
    with daemons.directory() as home, daemons.served(home) as daemon:
        yield daemon


def test_tools_through_a_daemon(served: daemons.Served) -> None:
    with served.sandbox() as sandbox:
        Tools(sandbox).says("print(sum(tools.echo(n) for n in range(10)))", "45")
        Tools(sandbox).says("print(len(tools.echo('x' * 500_000)))", "500000")


def test_client_that_dies_in_a_call_leaves_the_daemon_idle(served: daemons.Served, tmp_path: Path) -> None:
    host = HOST.replace("Sandbox()", f"Sandbox.connect({served.address!r})").replace("sandbox._handle.engine.pid", "1")
    root = str(Path(__file__).resolve().parents[2])
    for how in ("waiting", "frozen"):
        with subprocess.Popen([sys.executable, "-c", host, root, how], stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            assert [client.stdout.readline() for _ in range(2)] == ["1\n", "called\n"]
            if how == "frozen":
                assert client.stdout.readline() == "frozen\n"
            client.send_signal(signal.SIGKILL)
        served.idle()
    assert served.serves()
