"""Sudden death of every process of the tree, and of its caller: told to whom it concerns, and nothing is left."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import pytest

from sandboxd import Result, Sandbox
from sandboxd.cgroup import discover, systemd
from sandboxd.errors import ConnectionLost, SandboxError, Unavailable
from tests.support import daemons, leftovers
from tests.support.engine import pid_of

if TYPE_CHECKING:
    from collections.abc import Iterator

# What an engine leaves behind that was killed, and who sweeps it, is the same for every engine of this host.
pytestmark = pytest.mark.alone

LIVE: Final = 20
# A hard limit of 1,024 descriptors, which occurs, is room for twenty runs.
LIVE_IN_DAEMON: Final = min(50, resource.getrlimit(resource.RLIMIT_NOFILE)[1] // 50)
SLEEP: Final = "print('here', flush=True)\nimport time\ntime.sleep(120)"
ORPHANS: Final = """
import os, time
for _ in range(2):
    if os.fork() == 0:
        os.setsid()
print('here', flush=True)
time.sleep(120)
"""


class Runs:
    """Runs under way in threads of their own; what each came to."""

    def __init__(self, sandboxes: list[Sandbox], count: int, code: str = SLEEP) -> None:
        self._here = threading.Semaphore(0)
        self._pool = ThreadPoolExecutor(count)
        self._ends = [self._pool.submit(self._one, sandboxes[index % len(sandboxes)], code) for index in range(count)]
        self._count = count

    def _one(self, sandbox: Sandbox, code: str) -> Result | SandboxError:
        said = False

        def hear(_: str) -> None:
            nonlocal said
            if not said:
                said = True
                self._here.release()

        try:
            return sandbox.run(code, on_stdout=hear)
        except SandboxError as error:
            return error

    def wait_until_all_run(self) -> None:
        """Each has printed a line."""
        deadline = time.monotonic() + 60
        for _ in range(self._count):
            if not self._here.acquire(timeout=max(0.0, deadline - time.monotonic())):
                ended = [end.result() for end in self._ends if end.done()]
                raise AssertionError(f"not all runs began within 60 s; ended already: {ended}")

    def ends(self) -> list[Result | SandboxError]:
        """What the runs came to, all within 10 s."""
        deadline = time.monotonic() + 10
        results = [end.result(timeout=max(0.0, deadline - time.monotonic())) for end in self._ends]
        self._pool.shutdown()
        return results


def family(root: int) -> list[leftovers.Process]:
    """*root* and everything below it."""
    own = leftovers.process(root)
    assert own is not None
    return [own, *leftovers.descendants(root)]


def all_gone(processes: list[leftovers.Process]) -> bool:
    """Whether none of *processes* is there any more; a zombie that is ours to reap does not count."""
    return not any(leftovers.lives(one) and one.state not in "ZX" and _state(one) not in "ZX" for one in processes)


def _state(one: leftovers.Process) -> str:
    now = leftovers.process(one.pid)
    return "X" if now is None else now.state


def named(root: int, name: str) -> list[leftovers.Process]:
    """Processes below *root*, by what they are: nursery, zygote, init or cell."""
    nursery = [one for one in leftovers.descendants(root) if one.parent == root]
    below = [one for one in leftovers.descendants(root) if one.parent in {top.pid for top in nursery}]
    zygotes = [one for one in below if one.name != "init"]
    return {
        "nursery": nursery,
        "zygote": zygotes,
        "init": [one for one in below if one.name == "init"],
        "cell": [one for one in leftovers.descendants(root) if one.parent in {top.pid for top in zygotes}],
    }[name]


@pytest.fixture
def clean() -> Iterator[None]:
    """Nothing of the test is left afterwards."""
    before = leftovers.snapshot()
    yield
    leftovers.assert_nothing_new(before)


# The engine


@pytest.mark.usefixtures("clean")
def test_an_engine_that_is_killed_takes_all_its_cells_along() -> None:
    before = leftovers.snapshot()
    with Sandbox(max_running=LIVE, pool=leftovers.UNPARKED) as sandbox:
        runs = Runs([sandbox], LIVE, ORPHANS)
        runs.wait_until_all_run()
        victims = family(pid_of(sandbox))
        assert len(victims) >= 3 + 4 * LIVE
        os.kill(pid_of(sandbox), signal.SIGKILL)
        for end in runs.ends():
            assert isinstance(end, ConnectionLost)
            assert end.may_have_started
        # No process of ours has to do anything for it: the kernel and the nursery see to it.
        leftovers.eventually(lambda: all_gone(victims), 5, "every process is gone")
        with pytest.raises(ConnectionLost) as late:
            sandbox.run("1")
        assert not late.value.may_have_started
    left = leftovers.difference(before)
    assert set(left) <= {"cgroups"}, left
    if systemd.is_manager() and discover().version == "v2":
        leftovers.assert_nothing_new(before)  # it had a scope, which systemd removes
    else:
        assert left["cgroups"], "the next engine would have nothing to sweep: this test tests nothing"
    with Sandbox(pool=leftovers.UNPARKED) as following:
        assert following.run("print(1)").status == "ok"


@pytest.mark.usefixtures("clean")
def test_an_engine_may_be_killed_at_any_moment_of_its_start() -> None:
    """Above all between the birth of the nursery's process and its exec, when nothing of ours runs in it yet."""
    others = {one.pid for one in leftovers.engines()}  # of the session's fixtures

    def fresh() -> list[leftovers.Process]:
        return [one for one in leftovers.engines() if one.pid not in others]

    for delay in range(0, 400, 25):
        started = threading.Event()
        made: list[object] = []

        def start(made: list[object] = made, started: threading.Event = started) -> None:
            started.set()
            try:
                with Sandbox(pool=leftovers.UNPARKED) as sandbox:
                    made.append(sandbox.run("print(1)").status)
            except SandboxError as error:
                made.append(error)

        thread = threading.Thread(target=start)
        thread.start()
        started.wait()
        leftovers.eventually(lambda: fresh() or made, 5, "an engine's process")  # noqa: B023
        threading.Event().wait(delay / 1000)  # the moment is what is tried
        victims = [one for engine in fresh() for one in family(engine.pid)]
        for engine in fresh():
            os.kill(engine.pid, signal.SIGKILL)
        thread.join(10)
        assert not thread.is_alive(), f"killed after {delay} ms: the caller waits for ever"
        (came,) = made
        assert came == "ok" or isinstance(came, Unavailable | ConnectionLost), came
        leftovers.eventually(lambda: all_gone(victims), 5, f"gone, killed after {delay} ms")  # noqa: B023
    with Sandbox(pool=leftovers.UNPARKED) as following:
        assert following.run("print(1)").status == "ok"


# What is below the engine


@pytest.mark.parametrize("who", ["nursery", "zygote"])
@pytest.mark.usefixtures("clean")
def test_a_zygote_that_is_killed_costs_its_runs_and_no_others(who: str) -> None:
    with Sandbox(max_running=LIVE, pool=leftovers.UNPARKED) as sandbox:
        engine = pid_of(sandbox)
        runs = Runs([sandbox], LIVE)
        runs.wait_until_all_run()
        victims = family(engine)[1:]
        (victim,) = named(engine, who)
        os.kill(victim.pid, signal.SIGKILL)
        for end in runs.ends():
            assert isinstance(end, Result)
            assert (end.status, end.stdout) == ("internal", "here\n")
        leftovers.eventually(lambda: all_gone(victims), 5, "every process of the lost zygote is gone")
        result = sandbox.run("print(1)")
        assert (result.status, result.stdout) == ("ok", "1\n")
        (successor,) = named(engine, who)
        assert successor.pid != victim.pid


@pytest.mark.parametrize("who", ["init", "cell"])
@pytest.mark.usefixtures("clean")
def test_a_cell_that_is_killed_from_outside_is_told_from_the_others(who: str) -> None:
    with Sandbox(pool=leftovers.UNPARKED) as sandbox:
        engine = pid_of(sandbox)
        runs = Runs([sandbox], 2)
        runs.wait_until_all_run()
        makers = [one.pid for name in ("nursery", "zygote") for one in named(engine, name)]
        os.kill(named(engine, who)[0].pid, signal.SIGKILL)
        leftovers.eventually(lambda: len(named(engine, who)) == 1, 5, "one cell is gone, the other not")
        os.kill(named(engine, who)[0].pid, signal.SIGKILL)
        for end in runs.ends():
            assert isinstance(end, Result)
            assert (end.status, end.signal, end.stdout) == ("killed", signal.SIGKILL, "here\n")
        assert sandbox.run("print(1)").status == "ok"
        assert [one.pid for name in ("nursery", "zygote") for one in named(engine, name)] == makers


# The caller

CALLER: Final = """
import sys, threading
from sandboxd import Sandbox
sandbox = Sandbox()
def hear(text):
    print(text, end="", flush=True)
threading.Thread(target=sandbox.run, args=(sys.argv[1],), kwargs={"on_stdout": hear}, daemon=True).start()
sys.stdin.read()
"""


@pytest.fixture
def caller() -> Iterator[subprocess.Popen[str]]:
    """A program with a Sandbox and one run under way."""
    process = subprocess.Popen(
        [sys.executable, "-c", CALLER, ORPHANS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "here\n"
        yield process
        process.kill()


@pytest.mark.usefixtures("clean")
def test_a_caller_that_is_killed_takes_its_engine_along(caller: subprocess.Popen[str]) -> None:
    victims = family(caller.pid)[1:]
    assert len(victims) >= 7
    caller.kill()
    caller.wait(5)
    leftovers.eventually(lambda: all_gone(victims), 5, "the engine and all below it is gone")


@pytest.mark.usefixtures("clean")
def test_a_caller_that_is_stopped_keeps_its_engine_and_goes_on(caller: subprocess.Popen[str]) -> None:
    engine = family(caller.pid)[1]
    caller.send_signal(signal.SIGSTOP)
    leftovers.eventually(lambda: _state(family(caller.pid)[0]) == "T", 5, "the caller is stopped")
    assert leftovers.lives(engine)
    # Others are served meanwhile, and by engines of their own.
    with Sandbox(pool=leftovers.UNPARKED) as other:
        assert other.run("print(1)").status == "ok"
    assert leftovers.lives(engine)
    caller.send_signal(signal.SIGCONT)
    assert caller.stdin is not None
    caller.stdin.close()
    assert caller.wait(10) == 0
    leftovers.eventually(lambda: all_gone([engine]), 5, "the engine ends with its caller")


# The daemon


@pytest.mark.usefixtures("clean")
def test_a_daemon_that_is_killed_under_load_starts_again_as_if_nothing_had_been() -> None:
    before = leftovers.snapshot()
    with daemons.directory() as home:
        first = daemons.start(home, max_running=LIVE_IN_DAEMON)
        try:
            leftovers.eventually(lambda: _answers(first), 20, "the daemon is ready")
            files = {path for path in home.rglob("*") if path != first.path}
            clients = [first.sandbox() for _ in range(5)]
            runs = Runs(clients, LIVE_IN_DAEMON)
            runs.wait_until_all_run()
            victims = family(first.pid)
            assert len(victims) >= 3 + 2 * LIVE_IN_DAEMON
            first.end(signal.SIGKILL)
            for end in runs.ends():
                assert isinstance(end, ConnectionLost)
                assert end.may_have_started
            leftovers.eventually(lambda: all_gone(victims), 5, "every process is gone")
        finally:
            first.process.kill()
            first.process.wait()
        second = daemons.start(home, max_running=LIVE_IN_DAEMON)
        try:
            leftovers.eventually(lambda: _answers(second), 20, "the second daemon is ready")
            # The same handles go on; what the first daemon's connections are good for is found out by trying.
            for client in clients:
                leftovers.eventually(lambda: _runs(client), 5, "a run by the second daemon")  # noqa: B023
                client.close()
            assert second.end() == 0
        finally:
            second.process.kill()
            second.process.wait()
        assert {path for path in home.rglob("*") if path != second.path} <= files
    leftovers.assert_nothing_new(before)


def _answers(daemon: daemons.Served) -> bool:
    assert daemon.process.poll() is None, daemon.said()[-2000:]
    try:
        return daemon.serves()
    except (Unavailable, ConnectionLost):
        return False


def _runs(client: Sandbox) -> bool:
    try:
        return client.run("print(1)").status == "ok"
    except ConnectionLost as error:
        assert not error.may_have_started  # noqa: PT017 - it ends a loop, it is not what is expected
        return False
