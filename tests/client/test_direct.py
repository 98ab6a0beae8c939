"""The direct way: who goes it, that nobody can tell, and that the engine's clocks, turns and kills hold for it, too."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import pytest

from sandboxd import Limits, Result, Sandbox, policy
from sandboxd.client.leased import SOURCE_BYTES, LeasedCell
from tests.client.test_sandbox_api import ENDLESS, in_child
from tests.engine.test_crash import all_gone, named
from tests.engine.test_parked import (
    FIXED,
    WAIT_SECONDS,
    directly,
    engine_of,
    is_lent,
    settled,
    told,
    went_directly,
)
from tests.engine.test_results import live_runs
from tests.support import leftovers

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="an embedded engine needs root")

LEEWAY_SECONDS: Final = 2.0


@pytest.fixture(scope="module")
def warm() -> Iterator[Sandbox]:
    """An engine with a fixed number of parked cells."""
    with Sandbox(pool=FIXED) as made:
        yield made


@pytest.fixture
def own() -> Iterator[Sandbox]:
    """An engine of this test alone, whose cells this process was lent, and a look at what it left."""
    before = leftovers.snapshot()
    with Sandbox(pool=FIXED) as made:
        directly(made, "1")
        yield made
    leftovers.assert_nothing_new(before)


def ready(sandbox: Sandbox) -> None:
    """A cell is lent, and others are parked."""
    directly(sandbox, "1")
    settled(engine_of(sandbox))
    leftovers.eventually(lambda: is_lent(sandbox), WAIT_SECONDS, "a cell is lent")


# Which requests go it


def padded(length: int) -> str:
    """A program of *length* bytes."""
    return "print(1) #".ljust(length - 2, "x") + "\n7"


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        pytest.param("print(1)\n7", {}, id="plain"),
        pytest.param("print(1)\n7", {"results": False}, id="no-results"),
        pytest.param("import sys\nprint(sys.argv)\n7", {"args": ["a", "ä", "\x01 b"]}, id="arguments"),
        pytest.param("import sys\nprint(sys.argv)\n7", {"args": ("a",), "env": {"A": "b"}}, id="both"),
        pytest.param("import os\nprint(os.environ['A'])\n7", {"env": {"A": "ä b"}}, id="environment"),
        pytest.param("print('ä€𝄞')\n7", {}, id="not-ascii"),
        pytest.param("x = (", {}, id="wrong"),
        pytest.param("", {}, id="empty"),
        pytest.param("\ufeffprint(1)\r\n7", {}, id="mark-and-line-ends"),
        pytest.param(padded(SOURCE_BYTES), {}, id="longest"),
    ],
)
def test_a_plain_request_goes_directly_and_ends_as_any(warm: Sandbox, code: str, arguments: dict[str, Any]) -> None:
    ready(warm)
    direct = warm.run(code, **arguments)
    assert went_directly(direct)
    other = warm.run(code, stdin=b"", **arguments)
    assert not went_directly(other)
    assert told(direct) == told(other)
    assert (direct.isolation is None, other.isolation is None) == (False, False)


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        pytest.param("print(open('f').read())\n7", {"files": {"f": "x"}}, id="files"),
        pytest.param("print(1)\n7", {"stdin": b""}, id="empty-stdin"),
        pytest.param("import sys\nprint(sys.stdin.read())\n7", {"stdin": "x"}, id="stdin"),
        pytest.param("print(1)\n7", {"on_stdout": lambda _: None}, id="stdout-callback"),
        pytest.param("print(1)\n7", {"on_stderr": lambda _: None}, id="stderr-callback"),
        pytest.param("print(1)\n7", {"limits": Limits(wall_seconds=5)}, id="limits"),
        pytest.param("print(__file__)\n7", {"filename": "other.py"}, id="filename"),
        pytest.param(padded(SOURCE_BYTES + 1), {}, id="long"),
        pytest.param(f"# {'ä' * (SOURCE_BYTES // 2)}\n7", {}, id="long-in-bytes"),
    ],
)
def test_other_requests_go_through_the_engine(warm: Sandbox, code: str, arguments: dict[str, Any]) -> None:
    ready(warm)
    result = warm.run(code, **arguments)
    assert (result.status, result.warm, went_directly(result)) == ("ok", True, False)
    assert result.results[0].mime == {"text/plain": "7"}
    # The lease that was not used is still good, or another is there.
    assert directly(warm, "print(2)").stdout == "2\n"


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"env": {"A": "ä" * 60_000}}, id="environment"),
        pytest.param({"args": ["\x01" * 130_000]}, id="argument"),
        pytest.param({"args": ["\x01"] * 60_000}, id="arguments"),
    ],
)
def test_arguments_of_the_largest_size_arrive(arguments: dict[str, Any]) -> None:
    """As JSON they are more than one packet holds."""
    code = "import os, sys\nprint(len(os.environ.get('A', '')), sum(map(len, sys.argv[1:])))"
    with Sandbox(limits=Limits(wall_seconds=3), pool=FIXED) as sandbox:
        ready(sandbox)
        result = sandbox.run(code, **arguments)
    counts = len(arguments.get("env", {}).get("A", "")), sum(map(len, arguments.get("args", [])))
    assert (result.status, result.stdout.split()) == ("ok", [str(count) for count in counts])


@pytest.mark.parametrize(
    "arguments",
    [
        {"args": 5},
        {"args": "abc"},
        {"args": b"abc"},
        {"args": [1]},
        {"args": {"a": 1}},
        {"env": ["x"]},
        {"env": "x"},
        {"env": 5},
        {"env": 0},
        {"env": {"1": "x"}},
        {"env": {"A": 1}},
        {"results": 1},
        {"language": "c"},
        {"language": 5},
        {"filename": 5},
        {"code": 5},
        {"code": "\ud800"},
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_in_the_same_words(warm: Sandbox, arguments: dict[str, Any]) -> None:
    said: list[tuple[str, str]] = []
    for more in ({}, {"stdin": b""}):
        ready(warm)
        with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is what is compared
            warm.run(**{"code": "1", **arguments, **more})
        said.append((caught.type.__name__, str(caught.value)))
    assert said[0] == said[1]
    assert directly(warm, "print(1)").stdout == "1\n"


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos._exit(4)",
        "import os\nos.kill(os.getpid(), 9)",
        "open('f', 'w').write('x')",
        "import os\nos.fork()",
        "import os\nos.close(3)",
        "import time\ntime.sleep(0.005)",
        "import time\ntime.sleep(0.0095)",
        "import time\ntime.sleep(0.02)",
    ],
)
def test_a_program_is_run_once(warm: Sandbox, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Whatever it ends with, and whenever: what was handed to a lent cell is not handed to another."""
    handed: list[str] = []

    def start(self: LeasedCell, *given: Any) -> None:
        handed.append(self.identity)
        begin(self, *given)

    begin = LeasedCell.start
    monkeypatch.setattr(LeasedCell, "start", start)
    for _ in range(20):
        ready(warm)
        handed.clear()
        with warm.run(code) as result:
            assert len(handed) == 1
            assert went_directly(result), result
            assert result.id == handed[0]


def test_nothing_of_the_output_is_lost_when_a_pipe_was_made_larger() -> None:
    """The shipped profiles refuse it; an operator's may not."""
    shipped = policy.load("default")
    allows = shipped.seccomp.model_copy(update={"allow": ("fcntl",)})
    code = "import fcntl, os\nfcntl.fcntl(1, 1031, 1 << 20)\nos.write(1, b'begin')\nos.write(1, b'o' * 500_000)"
    with Sandbox(shipped.model_copy(update={"seccomp": allows}), pool=FIXED) as sandbox:
        for _ in range(10):
            ready(sandbox)
            result = sandbox.run(code)
            assert result.stdout == "begin" + "o" * 500_000


# Interruption and clocks


@pytest.mark.parametrize("after", [0.001, 0.005, 0.05, 0.3])
def test_ctrl_c_ends_a_direct_run_and_the_sandbox_goes_on(own: Sandbox, after: float) -> None:
    ready(own)
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(after, signal.pthread_kill, (main, signal.SIGINT))

    def interrupted() -> None:
        timer.start()  # it may ring at once
        own.run("while True: pass")

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    timer.join()
    assert time.monotonic() - begun < 10
    leftovers.eventually(lambda: live_runs(own) == [], 5, "the run is gone")
    assert directly(own, "print(1)").stdout == "1\n"


def test_who_holds_the_interpreters_lock_does_not_prolong_the_wall_clock() -> None:
    """The clock is the engine's: also when this process does nothing for it."""
    libc = ctypes.PyDLL(None)  # its calls keep the lock
    with Sandbox(limits=Limits(wall_seconds=1), pool=FIXED) as sandbox:
        ready(sandbox)
        started, over = threading.Event(), threading.Event()
        run: list[Result] = []

        def start() -> None:
            started.set()
            run.append(sandbox.run("while True: pass"))
            over.set()

        thread = threading.Thread(target=start)
        thread.start()
        started.wait()
        leftovers.eventually(lambda: live_runs(sandbox) != [], 5, "the engine knows of it")
        cells = {one.pid for one in named(engine_of(sandbox), "cell")}
        assert len(cells) >= 1
        libc.sleep(4)
        over.wait(10)
        thread.join()
    (result,) = run
    assert result.status == "timeout"
    (hit,) = [hit for hit in result.limits_hit if hit.limit == "wall_seconds"]
    # What the engine's clock saw: not when this process came back.
    assert float(hit.evidence.detail.split()[0]) < 3
    assert result.usage.wall_seconds < 3


def test_a_program_that_ended_while_its_caller_slept_is_told_as_it_was() -> None:
    libc = ctypes.PyDLL(None)
    with Sandbox(pool=FIXED) as sandbox:
        ready(sandbox)
        run: list[Result] = []
        thread = threading.Thread(target=lambda: run.append(sandbox.run("print('quick')\n7")))
        thread.start()
        libc.usleep(500_000)
        thread.join()
        assert (run[0].status, run[0].stdout, run[0].results[0].mime) == ("ok", "quick\n", {"text/plain": "7"})


@pytest.mark.parametrize(
    ("limits", "code", "status"),
    [
        ({"wall_seconds": 0.2}, "while True: pass", "timeout"),
        ({"cpu_seconds": 0.2}, "while True: pass", "cpu"),
        ({"memory_bytes": 64 << 20}, "x = b'x' * (128 << 20)", "memory"),
        ({"output_stop_bytes": 1000}, "while True: print('x' * 100)", "output"),
        ({"output_stop_bytes": 1000}, "print('x' * 1000)", "output"),
        ({"output_stop_bytes": 1000}, "print('x' * 999)", "ok"),
        ({"pids": 3}, "import os, time\nfor _ in range(9): os.fork() or time.sleep(60)", "error"),
    ],
)
def test_a_sandboxs_own_limits_hold_directly(limits: dict[str, Any], code: str, status: str) -> None:
    with Sandbox(limits=Limits(**limits), pool=FIXED) as sandbox:
        ready(sandbox)
        result = sandbox.run(code)
        assert went_directly(result)
        assert result.status == status
        assert set(limits) & {hit.limit for hit in result.limits_hit} == (set() if status == "ok" else set(limits))


def test_a_forged_end_does_not_let_a_program_go_on(warm: Sandbox) -> None:
    lie = '{"exit_code": 0, "error": null, "results": []}'
    ready(warm)
    for more in ("while True: pass", "while True: os.write(1, b'x' * 65536)", "os.fork()\nwhile True: pass"):
        result = warm.run(f"import os\nos.write(3, b'''{lie}''')\n{more}")
        assert result.status == "ok"
    settled(engine_of(warm))  # as many as there are to be, and none of them runs


# Turns


def test_with_one_turn_there_are_never_two_programs() -> None:
    with Sandbox(max_running=1, pool=FIXED) as sandbox:
        code = (
            "import time\nbegin = time.monotonic_ns()\nwhile time.monotonic_ns() < begin + {}: pass\n"
            "print(begin, time.monotonic_ns())"
        )
        spans: list[tuple[int, int]] = []
        lock = threading.Lock()

        def work(nanoseconds: int) -> None:
            for _ in range(15):
                result = sandbox.run(code.format(nanoseconds))
                assert result.status == "ok", result
                begin, end = map(int, result.stdout.split())
                with lock:
                    spans.append((begin, end))

        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(work, length) for length in (2_000_000, 20_000_000)]:
                done.result(60)
    spans.sort()
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans)), spans
    assert len(spans) == 30


def test_a_lease_gives_its_turn_to_another_run() -> None:
    with Sandbox(max_running=1, pool=FIXED) as sandbox:
        for _ in range(5):
            directly(sandbox, "1")
            leftovers.eventually(lambda: is_lent(sandbox), WAIT_SECONDS, "a cell is lent")
            # Else it would wait for queue_seconds.
            assert sandbox.run("print(1)", stdin=b"", limits=Limits(queue_seconds=1)).stdout == "1\n"


def test_sixteen_threads() -> None:
    with Sandbox(max_running=4) as sandbox:
        gate = threading.Barrier(16)

        def work(number: int) -> list[tuple[str, str]]:
            gate.wait(20)
            return [
                (result.status, result.stdout)
                for turn in range(15)
                for result in [sandbox.run(f"print({number}, {turn})")]
            ]

        with ThreadPoolExecutor(16) as pool:
            for number, came in enumerate(pool.map(work, range(16))):
                assert came == [("ok", f"{number} {turn}\n") for turn in range(15)]


def test_a_lease_that_became_stale_is_no_error() -> None:
    with Sandbox(pool={**FIXED, "age_seconds": 0.3}) as sandbox:
        directly(sandbox, "1")
        for _ in range(3):
            lent = settled(engine_of(sandbox))
            leftovers.eventually(lambda: all_gone(lent), WAIT_SECONDS, "the cells were too old")  # noqa: B023
            result = sandbox.run("print(1)")
            assert (result.status, result.stdout) == ("ok", "1\n")


def test_a_lent_cell_that_died_is_no_error(own: Sandbox) -> None:
    ready(own)
    victims = settled(engine_of(own))
    for one in victims:
        os.kill(one.pid, signal.SIGKILL)
    leftovers.eventually(lambda: all_gone(victims), WAIT_SECONDS, "the lent cell is dead")
    settled(engine_of(own))
    assert own.run("print(1)").stdout == "1\n"


# Descriptors


def test_a_callers_descriptors_do_not_grow_with_its_runs(own: Sandbox) -> None:
    """A program with threads stains its slot's leaf, so that each run is lent another."""
    code = (
        "import threading\nbarrier = threading.Barrier(6)\n"
        "for _ in range(5): threading.Thread(target=barrier.wait).start()\nbarrier.wait() and None"
    )
    before = len(leftovers.fds())
    most = 0
    for _ in range(100):
        leftovers.eventually(lambda: is_lent(own), WAIT_SECONDS, "a cell is lent")
        assert own.run(code).status == "ok"
        most = max(most, len(leftovers.fds()))
    assert most < before + 200


def inheritable() -> set[str]:
    """What this process would leave open across exec."""
    found = set()
    for fd, link in leftovers.fds().items():
        with contextlib.suppress(OSError):  # the listing's own
            if os.get_inheritable(fd):
                found.add(f"{fd}: {link}")
    return found


def test_lent_descriptors_are_closed_across_exec() -> None:
    before = inheritable()
    with Sandbox(pool=FIXED) as sandbox:
        ready(sandbox)
        sandbox.run("1")
        ready(sandbox)
        assert inheritable() == before


# Ends


def test_close_while_direct_runs_are_under_way() -> None:
    before = leftovers.snapshot()
    sandbox = Sandbox(pool=FIXED)
    directly(sandbox, "1")
    with ThreadPoolExecutor(4) as pool:
        begun = threading.Semaphore(0)

        def work(code: str) -> BaseException | None:
            begun.release()
            try:
                while True:
                    sandbox.run(code)
            except BaseException as error:
                return error

        ends = [pool.submit(work, code) for code in ("1", "1", "while True: pass", "import time; time.sleep(0.01)")]
        for _ in ends:
            assert begun.acquire(timeout=10)
        leftovers.eventually(lambda: live_runs(sandbox) != [], 5, "one is under way")
        started = time.monotonic()
        sandbox.close()
        assert time.monotonic() - started < 2 + LEEWAY_SECONDS
        for end in ends:
            error = end.result(10)
            assert isinstance(error, RuntimeError), error
            assert "closed" in str(error)
    leftovers.assert_nothing_new(before)


def test_after_a_fork_the_childs_copy_raises_and_the_parents_leases_are_good(own: Sandbox) -> None:
    ready(own)
    kind, text = in_child(lambda: own.run("print(1)").stdout)
    assert (kind, "fork" in text) == ("RuntimeError", True)
    result = own.run("print(2)")
    assert (result.stdout, went_directly(result)) == ("2\n", True)


def links(directory: str = "/proc/self/fd") -> list[str]:
    """What this process has open, but for the look itself."""
    return sorted(link for fd, link in leftovers.fds().items() if fd > 2 and not link.startswith(directory))


def test_after_a_fork_the_child_holds_nothing_of_a_lease() -> None:
    before = set(links())
    with Sandbox(pool=FIXED) as sandbox:
        ready(sandbox)
        sandbox.run("1")
        ready(sandbox)
        assert set(links()) - before
        left = set(in_child(links)) - before
        assert {link for link in left if not link.startswith("pipe:")} == set()
        assert len(left) <= 1  # the pipe of in_child
        assert went_directly(sandbox.run("1"))


def test_a_fork_in_the_middle_of_a_direct_run_takes_nothing_of_it_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = set(links())
    found: list[set[str]] = []
    finish = LeasedCell.finish

    def fork_and_finish(self: LeasedCell, sock: Any) -> Result | None:
        found.append(set(in_child(links)) - before)
        return finish(self, sock)

    with Sandbox(pool=FIXED) as sandbox:
        ready(sandbox)
        monkeypatch.setattr(LeasedCell, "finish", fork_and_finish)
        result = sandbox.run("print(1)")
        monkeypatch.undo()
        assert result.stdout == "1\n"
        assert directly(sandbox, "print(2)").stdout == "2\n"
    assert found
    assert {link for link in found[0] if not link.startswith("pipe:")} == set()
    assert len(found[0]) <= 1


CALLER: Final = """
import os, sys, threading, time
from sandboxd import Sandbox
from sandboxd.client.leased import LeasedCell
sandbox = Sandbox()
while sandbox.run("1").timings.queued_seconds:
    time.sleep(0.01)
time.sleep(0.1)
start = LeasedCell.start
def start_and_say(self, *given):
    start(self, *given)
    os.write(1, b"%d\\n" % sandbox._handle.engine.pid)
    if sys.argv[2] == "at-once":
        os.kill(os.getpid(), 9)
LeasedCell.start = start_and_say
sandbox.run(sys.argv[1])
"""


@pytest.mark.parametrize("moment", ["at-once", "later"])
@pytest.mark.parametrize("code", [ENDLESS, "import os\nfor _ in range(4): os.fork()\nwhile True: pass", "1"])
def test_a_caller_that_is_killed_right_after_it_started_a_program_leaves_nothing(code: str, moment: str) -> None:
    before = leftovers.snapshot()
    command = [sys.executable, "-c", CALLER, code, moment]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        engine = int(caller.stdout.readline())
        below = leftovers.descendants(engine)
        if moment == "later":
            caller.kill()
        caller.wait(20)
    leftovers.eventually(lambda: all_gone(below), 5, "every process of the engine is gone")
    leftovers.eventually(lambda: not os.path.exists(f"/proc/{engine}"), 5, "the engine is gone")
    leftovers.assert_nothing_new(before)


@pytest.mark.alone
def test_an_engine_that_is_killed_under_a_direct_run_is_connectionlost() -> None:
    from sandboxd import ConnectionLost

    before = leftovers.snapshot()
    sandbox = Sandbox(pool=FIXED)
    ready(sandbox)
    victims = leftovers.descendants(engine_of(sandbox))
    timer = threading.Timer(0.2, os.kill, (engine_of(sandbox), signal.SIGKILL))
    timer.start()
    with pytest.raises(ConnectionLost) as lost:
        sandbox.run("while True: pass")
    assert lost.value.may_have_started
    timer.join()
    leftovers.eventually(lambda: all_gone(victims), 5, "what it held is gone")
    with pytest.raises(ConnectionLost) as late:
        sandbox.run("print(1)")
    assert not late.value.may_have_started
    sandbox.close()
    with Sandbox(pool=leftovers.UNPARKED) as following:  # sweeps
        assert following.run("print(1)").status == "ok"
    leftovers.assert_nothing_new(before)


@pytest.mark.alone
def test_an_engine_that_was_killed_while_nothing_ran_is_connectionlost() -> None:
    from sandboxd import ConnectionLost

    sandbox = Sandbox(pool=FIXED)
    ready(sandbox)
    victims = leftovers.descendants(engine_of(sandbox))
    os.kill(engine_of(sandbox), signal.SIGKILL)
    leftovers.eventually(lambda: all_gone(victims), 5, "the lent cell is gone")
    with pytest.raises(ConnectionLost):
        sandbox.run("print(1)")
    sandbox.close()
    with Sandbox(pool=leftovers.UNPARKED) as following:  # sweeps
        assert following.run("print(1)").status == "ok"


def test_a_run_names_its_lease_and_its_receipt_is_whole(own: Sandbox) -> None:
    ready(own)
    direct = own.run("1")
    other = own.run("1", stdin=b"")
    assert direct.isolation is not None
    assert other.isolation is not None
    one, two = direct.isolation.model_dump(), other.isolation.model_dump()
    for receipt in (one, two):
        del receipt["uid"]
    assert json.dumps(one, default=str) == json.dumps(two, default=str)
    assert direct.id != other.id
