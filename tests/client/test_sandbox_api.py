"""The Sandbox as its caller's program sees it: threads, forks, signals, interruptions, the end; nothing is left."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

from sandboxd import InvalidRequest, Limits, Policy, PolicyError, Result, Sandbox
from sandboxd.client.connections import Connection
from tests.engine.test_results import live_runs
from tests.support.engine import pid_of
from tests.support.leftovers import assert_nothing_new, descendants, eventually, lives, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LEEWAY_SECONDS = 2.0
ENDLESS = "print('begun', flush=True)\nwhile True: pass"
LONG = Limits(wall_seconds=25)


@pytest.fixture
def own() -> Iterator[Sandbox]:
    """An engine of this test alone, and a look at what it left."""
    before = snapshot()
    with Sandbox() as made:
        yield made
    assert_nothing_new(before)


class Running(threading.Thread):
    """Runs *code* in a thread of its own; ``begun`` once its first output came, ``outcome`` when it ended."""

    def __init__(self, sandbox: Sandbox, code: str = ENDLESS, **arguments: Any) -> None:
        super().__init__()
        self.begun = threading.Event()
        self.outcome: Result | BaseException | None = None
        self._call: Callable[[], Result] = lambda: sandbox.run(
            code, on_stdout=lambda text: self.begun.set(), **{"limits": LONG, **arguments}
        )

    def run(self) -> None:
        try:
            self.outcome = self._call()
        except BaseException as error:
            self.outcome = error

    def __enter__(self) -> Self:
        self.start()
        assert self.begun.wait(15)
        return self

    def __exit__(self, *about: object) -> None:
        self.join(15)
        assert not self.is_alive()


def engine_of(sandbox: Sandbox) -> int:
    """The pid of its engine."""
    return pid_of(sandbox)


# --- callbacks ----------------------------------------------------------------------------------------------------


def test_callbacks_get_text_in_the_calling_thread_as_it_comes(sandbox: Sandbox) -> None:
    threads: set[int] = set()
    out: list[str] = []
    err: list[str] = []

    def take(to: list[str]) -> Callable[[str], None]:
        def callback(text: str) -> None:
            threads.add(threading.get_ident())
            assert isinstance(text, str)
            to.append(text)

        return callback

    code = "import sys\nfor n in range(200): print('ü', n); print('é', n, file=sys.stderr)"
    result = sandbox.run(code, on_stdout=take(out), on_stderr=take(err))
    assert ("".join(out), "".join(err)) == (result.stdout, result.stderr)
    assert threads == {threading.get_ident()}


def test_output_comes_before_the_program_ends(sandbox: Sandbox) -> None:
    with Running(sandbox, "print('begun', flush=True)\nimport time; time.sleep(0.5)\nprint('end')") as running:
        assert running.outcome is None
    assert isinstance(running.outcome, Result)
    assert running.outcome.stdout == "begun\nend\n"


def test_a_character_cut_between_writes_arrives_whole(sandbox: Sandbox) -> None:
    got: list[str] = []
    code = "import os, time\nfor byte in '🙂'.encode(): os.write(1, bytes([byte])); time.sleep(0.01)"
    assert sandbox.run(code, on_stdout=got.append).stdout == "🙂"
    assert got == ["🙂"]


def test_bytes_that_end_in_half_a_character(sandbox: Sandbox) -> None:
    got: list[str] = []
    assert sandbox.run("import os; os.write(1, b'a\\xf0\\x9f')", on_stdout=got.append).stdout == "a\ufffd"
    assert "".join(got) == "a\ufffd"


def test_only_one_callback(sandbox: Sandbox) -> None:
    got: list[str] = []
    result = sandbox.run("import sys; print('o'); print('e', file=sys.stderr)", on_stderr=got.append)
    assert (result.stdout, "".join(got)) == ("o\n", "e\n")


@pytest.mark.parametrize(
    "raised", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3)], ids=lambda e: type(e).__name__
)
def test_an_exception_of_a_callback_kills_the_run_and_is_raised(sandbox: Sandbox, raised: BaseException) -> None:
    def callback(text: str) -> None:
        raise raised

    begun = time.monotonic()
    with pytest.raises(type(raised)) as got:
        sandbox.run(ENDLESS, on_stdout=callback, limits=LONG)
    assert got.value is raised
    assert time.monotonic() - begun < 5
    eventually(lambda: live_runs(sandbox) == [], 5, "the run is gone")
    assert sandbox.run("print(1)").stdout == "1\n"


def test_a_callback_that_raises_once_the_run_is_over_cancels_nothing(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half character is handed over when it is known that nothing completes it: with the result."""

    def callback(text: str) -> None:
        raise KeyError(text)

    monkeypatch.setattr(Connection, "cancel", lambda _: pytest.fail("a run that was over was cancelled"))
    with pytest.raises(KeyError):
        sandbox.run(r"import os; os.write(1, b'\xc3')", on_stdout=callback)


def test_a_slow_callback_slows_only_its_own_run(sandbox: Sandbox) -> None:
    inside, go = threading.Event(), threading.Event()
    ended: list[Result] = []

    def slow(text: str) -> None:
        inside.set()
        assert go.wait(20)

    code = "for _ in range(200): print('x' * 10_000)"
    thread = threading.Thread(target=lambda: ended.append(sandbox.run(code, on_stdout=slow)))
    thread.start()
    try:
        assert inside.wait(15)
        for _ in range(3):
            assert sandbox.run("print(1)").status == "ok"
    finally:
        go.set()
        thread.join(20)
    assert ended[0].status == "ok"
    assert ended[0].stdout_dropped_bytes == 200 * 10_001 - (1 << 20)


def test_a_run_inside_a_callback(sandbox: Sandbox) -> None:
    got: list[str] = []
    sandbox.run("print('outer')", on_stdout=lambda text: got.append(sandbox.run(f"print({text!r} + 'inner')").stdout))
    assert got == ["outer\ninner\n"]


# --- interruption -------------------------------------------------------------------------------------------------


def test_ctrl_c_kills_the_run_and_then_propagates(sandbox: Sandbox) -> None:
    begun = threading.Event()

    def interrupt() -> None:
        assert begun.wait(15)
        # run() is back in its wait, or will find the signal when it gets there.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sandbox.run(ENDLESS, on_stdout=lambda text: begun.set(), limits=LONG)
    thread.join()
    assert time.monotonic() - started < 10
    # Killed before it propagated, not some time after.
    assert live_runs(sandbox) == []
    assert sandbox.run("print(1)").stdout == "1\n"


def test_a_signal_with_a_handler_does_not_disturb_a_run(sandbox: Sandbox) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        begun = threading.Event()

        def poke() -> None:
            begun.wait(15)
            for _ in range(20):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

        thread = threading.Thread(target=poke)
        thread.start()
        code = "print('begun', flush=True)\nimport time; time.sleep(0.3)\nprint('end')"
        result = sandbox.run(code, on_stdout=lambda text: begun.set())
        thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (result.status, result.stdout) == ("ok", "begun\nend\n")
    assert seen


def test_ctrl_c_of_the_terminal_does_not_reach_the_engine(own: Sandbox) -> None:
    # The terminal signals a process group: the engine must not be in the caller's.
    assert os.getpgid(engine_of(own)) != os.getpgid(0)
    assert os.getsid(engine_of(own)) != os.getsid(0)


# --- arguments of a wrong type -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"limits": {"wall_seconds": 1}}, "limits must be sandboxd.Limits"),
        ({"policy": None}, "policy must be"),
        ({"policy": 5}, "policy must be"),
        ({"max_running": 0}, "max_running must be"),
        ({"max_running": "3"}, "max_running must be"),
        ({"memory_bytes": 1.5}, "memory_bytes must be"),
        ({"memory_bytes": "100X"}, "memory_bytes: '100X' is not allowed"),
        ({"memory_bytes": "unlimited"}, "memory_bytes: 'unlimited' is not allowed"),
        ({"ids": 5}, "ids must be"),
    ],
)
def test_wrong_arguments_of_a_sandbox_start_nothing(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], named: str
) -> None:
    monkeypatch.setattr("sandboxd.client.sandbox.EngineProcess", lambda: pytest.fail("an engine was started"))
    with pytest.raises(PolicyError, match=f"^{re.escape(named)}"):
        Sandbox(**given)


def test_connect_refuses_limits_that_are_none() -> None:
    with pytest.raises(PolicyError, match="limits must be"):
        Sandbox.connect("unix:/nowhere", limits={"pids": 1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"files": ["x"]}, "files"),
        ({"env": ["x"]}, "env"),
        ({"env": "x"}, "env"),
        ({"args": 5}, "args"),
        ({"args": "abc"}, "args"),
        ({"args": b"abc"}, "args"),
        ({"args": [1]}, "args[0]"),
        ({"on_stdout": 3}, "on_stdout"),
        ({"on_stderr": "x"}, "on_stderr"),
        ({"stdin": 1}, "stdin"),
        ({"limits": {"pids": 1}}, "limits"),
    ],
)
def test_wrong_arguments_of_a_run_are_named(sandbox: Sandbox, given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sandbox.run("1", **given)
    assert caught.value.field == field


def test_the_engines_memory_may_be_a_size_with_a_unit() -> None:
    with Sandbox(memory_bytes="1G") as made:
        assert made.run("print(1)").stdout == "1\n"


# --- threads ------------------------------------------------------------------------------------------------------


def test_fifty_threads_at_once(sandbox: Sandbox) -> None:
    outcomes: dict[int, Result | BaseException] = {}
    gate = threading.Barrier(50)

    def work(n: int) -> None:
        gate.wait()
        try:
            code = f"import sys; open('f', 'w').write('{n}'); print({n}); print(sys.stdin.read(), file=sys.stderr); {n}"
            outcomes[n] = sandbox.run(code, stdin=str(n).encode())
        except BaseException as error:
            outcomes[n] = error

    threads = [threading.Thread(target=work, args=(n,)) for n in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for n in range(50):
        result = outcomes[n]
        assert isinstance(result, Result), result
        assert (result.status, result.stdout, result.stderr) == ("ok", f"{n}\n", f"{n}\n")
        assert result.results[0].mime["text/plain"] == str(n)
        assert result.files[0].read() == str(n).encode()
    assert live_runs(sandbox) == []


def test_two_runs_are_strangers(sandbox: Sandbox) -> None:
    code = """
    import os, time
    open("/workspace/mine", "w").close(); open("/tmp/mine", "w").close(); open("/dev/shm/mine", "w").close()
    print("begun", flush=True)
    time.sleep(1)
    """
    look = """
    import os
    print(os.listdir("/workspace"), os.listdir("/tmp"), os.listdir("/dev/shm"))
    print([name for name in os.listdir("/proc") if name.isdigit()] == [str(os.getpid())], os.getuid())
    """
    with Running(sandbox, textwrap.dedent(code)) as running:
        result = sandbox.run(textwrap.dedent(look))
    assert result.stdout.startswith("[] [] []\nTrue ")
    assert isinstance(running.outcome, Result)
    assert running.outcome.status == "ok"
    assert running.outcome.isolation is not None
    assert result.isolation is not None
    assert running.outcome.isolation.uid != result.isolation.uid


def test_runs_over_the_bound_wait_their_turn() -> None:
    with Sandbox(max_running=1) as sandbox, Running(sandbox, "print(1, flush=True)\nimport time; time.sleep(0.4)"):
        result = sandbox.run("print(2)")
        assert result.status == "ok"
        assert result.timings.queued_seconds > 0.05


def test_a_run_that_waits_too_long_is_busy() -> None:
    from sandboxd import Busy

    with Sandbox(max_running=1) as sandbox:
        with Running(sandbox, limits=Limits(wall_seconds=1.5)) as running:
            with pytest.raises(Busy) as refused:
                sandbox.run("open('/nothing')", limits=Limits(queue_seconds=0.1))
            assert refused.value.retry_after > 0
        assert isinstance(running.outcome, Result)
        assert running.outcome.status == "timeout"
        assert sandbox.run("print(1)").status == "ok"


# --- the end ------------------------------------------------------------------------------------------------------


def test_close_in_the_middle_from_another_thread() -> None:
    before = snapshot()
    sandbox = Sandbox()
    with Running(sandbox) as running:
        started = time.monotonic()
        sandbox.close()
        assert time.monotonic() - started < 2 + LEEWAY_SECONDS
    assert isinstance(running.outcome, RuntimeError)
    assert "closed" in str(running.outcome)
    assert_nothing_new(before)


def test_close_with_many_runs() -> None:
    before = snapshot()
    sandbox = Sandbox()
    runs = [Running(sandbox) for _ in range(6)]
    for running in runs:
        running.start()
    for running in runs:
        assert running.begun.wait(20)
    started = time.monotonic()
    sandbox.close()
    assert time.monotonic() - started < 2 + LEEWAY_SECONDS
    for running in runs:
        running.join(10)
        assert isinstance(running.outcome, RuntimeError)
    assert_nothing_new(before)


def test_close_is_idempotent_and_use_afterwards_is_runtimeerror() -> None:
    sandbox = Sandbox()
    sandbox.close()
    sandbox.close()
    with pytest.raises(RuntimeError, match="closed"):
        sandbox.run("print(1)")
    assert "closed" in repr(sandbox)


def test_close_from_many_threads_at_once() -> None:
    sandbox = Sandbox()
    errors: list[BaseException] = []

    def close() -> None:
        try:
            sandbox.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=close) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert errors == []


def test_an_exception_in_the_with_block_closes() -> None:
    with pytest.raises(ZeroDivisionError), Sandbox() as sandbox:
        raise ZeroDivisionError
    with pytest.raises(RuntimeError):
        sandbox.run("")


def test_a_forgotten_sandbox_is_closed_with_a_warning() -> None:
    before = snapshot()
    sandbox = Sandbox()
    assert sandbox.run("print(1)").status == "ok"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del sandbox
        gc.collect()
    assert [one.category for one in caught] == [ResourceWarning]
    assert_nothing_new(before)


def test_a_failed_start_leaves_nothing() -> None:
    before = snapshot()
    from sandboxd import Unavailable

    missing = Policy.model_validate({"name": "p", "runtime": {"preload": ["nothing_like_it"]}})
    with pytest.raises(Unavailable, match="nothing_like_it"):
        Sandbox(missing)
    ends = Policy.model_validate({"name": "p", "runtime": {"warmup": "import os; os._exit(3)"}})
    with pytest.raises(Unavailable):
        Sandbox(ends)
    assert_nothing_new(before)


def test_an_ordinary_life_leaves_nothing(own: Sandbox) -> None:
    for code in ("print(1)", "1/0", "import os; os.abort()", "open('f', 'w').write('x')", "import os; os.fork()"):
        own.run(code).close()
    own.run("while True: pass", limits=Limits(wall_seconds=0.2))


RUNS = 100


def test_descriptors_do_not_grow_with_runs(sandbox: Sandbox) -> None:
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{engine_of(sandbox)}/fd"))

    def grown() -> tuple[int, int]:
        before = count()
        for _ in range(RUNS):
            sandbox.run("open('f', 'w').write('x')").close()
        after = count()
        return after[0] - before[0], after[1] - before[1]

    # Slots that were never used have no leaf open yet, and a connection keeps the counters of a few leaves: that grows
    # until all have been used, by some thirty descriptors at a time. A descriptor lost by each run grows for ever.
    windows = [grown() for _ in range(5)]
    assert min(ours for ours, _ in windows) < RUNS // 2
    assert min(engines for _, engines in windows) < RUNS // 2
    assert sum(engines for _, engines in windows) < RUNS * 5


# --- fork in the caller -------------------------------------------------------------------------------------------


def in_child(work: Callable[[], object]) -> Any:
    """What *work* returned, or the exception's type and text, in a forked child of this process."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 3.12 warns about threads; that is what is tried
        pid = os.fork()
    if pid == 0:
        try:
            try:
                said: Any = work()
            except BaseException as error:
                said = [type(error).__name__, str(error)]
            os.write(write, json.dumps(said).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        answer = file.read()
    os.waitpid(pid, 0)
    return json.loads(answer)


def sockets() -> list[str]:
    """The sockets that this process holds."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if link.startswith(("socket:", "anon_inode:[pidfd]", "pidfd:")):
            found.append(link)
    return found


def test_after_a_fork_the_childs_copy_raises_and_the_parents_goes_on(own: Sandbox) -> None:
    own.run("print(1)")
    kind, text = in_child(lambda: own.run("print(1)").stdout)
    assert kind == "RuntimeError"
    assert "fork" in text
    assert in_child(own.close) is None
    assert own.run("print(2)").stdout == "2\n"


def test_after_a_fork_the_child_holds_none_of_its_descriptors(own: Sandbox) -> None:
    own.run("print(1)")
    mine = set(sockets())
    own.close()
    without = set(sockets())
    with Sandbox() as again:
        again.run("print(1)")
        theirs = in_child(sockets)
        assert mine - without
        assert not set(sockets()) - without & set(theirs)


def test_a_fork_in_the_middle_of_a_run(own: Sandbox) -> None:
    with Running(own, limits=Limits(wall_seconds=1)) as running:
        assert in_child(lambda: own.run("1").status)[0] == "RuntimeError"
    assert isinstance(running.outcome, Result)
    assert running.outcome.status == "timeout"


def test_a_child_may_make_a_sandbox_of_its_own(own: Sandbox) -> None:
    def work() -> str:
        with Sandbox() as mine:
            return mine.run("print('child')").stdout

    assert in_child(work) == "child\n"
    assert own.run("print('parent')").stdout == "parent\n"


def test_an_engine_ends_with_its_caller_even_if_a_child_lives_on() -> None:
    # The child keeps copies of whatever it was not told to close: the end of file may never come.
    code = """
    import os, signal, sys
    from sandboxd import Sandbox
    sandbox = Sandbox()
    sandbox.run("print(1)")
    if (child := os.fork()) == 0:
        os.closerange(0, 3)
        signal.pause()
    print(sandbox._handle.engine.pid, child, flush=True)
    os._exit(0)
    """
    before = snapshot()
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        engine, child = map(int, caller.stdout.readline().split())
        caller.wait(20)
    eventually(lambda: not os.path.exists(f"/proc/{engine}"), 5, "the engine ends")
    os.kill(child, signal.SIGKILL)
    assert_nothing_new(before)


# --- the caller's process is not touched --------------------------------------------------------------------------


def facts() -> dict[str, Any]:
    """What belongs to the caller's process and must stay as it is."""
    umask = os.umask(0)
    os.umask(umask)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("ascii").splitlines())
    return {
        "umask": umask,
        "cwd": os.getcwd(),
        "environment": dict(os.environ),
        "signals": [status[name] for name in ("SigBlk", "SigIgn", "SigCgt")],
        "handlers": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        "cgroup": Path("/proc/self/cgroup").read_text("ascii"),
        "dumpable": os.stat("/proc/self/fd").st_uid,
        "no-new-privs": status["NoNewPrivs"],
        "capabilities": status["CapEff"],
        "namespaces": [os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")],
        "session": (os.getsid(0), os.getpgrp()),
        "threads": len(os.listdir("/proc/self/task")),
        "oom": Path("/proc/self/oom_score_adj").read_text("ascii"),
    }


def test_the_callers_process_is_as_it_was() -> None:
    before = facts()
    with Sandbox() as sandbox:
        sandbox.run("print(1)")
        during = facts()
    assert during == before
    assert facts() == before


@contextmanager
def handler(number: int, action: Any) -> Iterator[None]:
    """*action* for signal *number* meanwhile."""
    before = signal.signal(number, action)
    try:
        yield
    finally:
        signal.signal(number, before)


def test_no_sigchld_ever_comes() -> None:
    seen: list[int] = []
    with handler(signal.SIGCHLD, lambda number, frame: seen.append(number)):
        with Sandbox() as sandbox:
            sandbox.run("import os; os.fork()")
        # A child of the caller's own is told as ever.
        subprocess.run(["true"], check=True)
        eventually(lambda: seen, 5, "the signal of the own child")
    assert seen == [signal.SIGCHLD]


def test_a_caller_that_ignores_sigchld() -> None:
    with handler(signal.SIGCHLD, signal.SIG_IGN), Sandbox() as sandbox:
        assert sandbox.run("import os; os._exit(3)").exit_code == 3


def test_the_callers_waits_never_see_the_engine() -> None:
    # In a program of its own: what pytest or another fixture started is its child, too.
    code = """
    import os
    from sandboxd import Sandbox
    with Sandbox() as sandbox:
        sandbox.run("print(1)")
        try:
            print(os.waitpid(-1, os.WNOHANG))
        except ChildProcessError:
            print("no child")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "no child\n"


def test_strange_surroundings_of_the_caller_do_not_reach_the_cell(tmp_path: Path) -> None:
    code = """
    import os, signal, sys
    os.umask(0o777)
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
    for number in (signal.SIGTERM, signal.SIGPIPE, signal.SIGUSR1): signal.signal(number, signal.SIG_IGN)
    os.environ.update(PYTHONHOME="/nowhere", PYTHONPATH="/nowhere", LD_PRELOAD="", LANG="xx")
    os.environ.update(TMPDIR="/nowhere", TZ="EST5")
    secret = os.open("/etc/passwd", os.O_RDONLY); os.set_inheritable(secret, True)
    import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from sandboxd import Sandbox
    with Sandbox() as sandbox:
        print(sandbox.run(sys.argv[1]).stdout, end="")
    """
    look = """
    import os, signal, time
    print(oct(os.umask(0)), signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.getsignal(signal.SIGUSR1))
    print(sorted(map(int, os.listdir("/proc/self/fd")))[:-1], time.tzname[0], os.environ.get("LANG"), os.getcwd())
    """
    command = [sys.executable, "-c", textwrap.dedent(code), textwrap.dedent(look)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.stdout == "0o22 set() 0\n[0, 1, 2, 3] UTC C.UTF-8 /workspace\n"


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_a_caller_without_its_standard_streams(closed: tuple[int, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = f"""
    import os
    for fd in {closed!r}: os.close(fd)
    from sandboxd import Sandbox
    with Sandbox() as sandbox:
        result = sandbox.run("import sys; print(1); print(2, file=sys.stderr)", stdin=b"x")
    open({str(out)!r}, "w").write(repr((result.status, result.stdout, result.stderr)))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60, check=False)
    assert out.read_text() == "('ok', '1\\n', '2\\n')"


# --- the caller dies ----------------------------------------------------------------------------------------------

CALLER = """
import sys
from sandboxd import Limits, Sandbox
sandbox = Sandbox()
def say(_text):
    print(sandbox._handle.engine.pid, flush=True)
sandbox.run(sys.argv[1], on_stdout=say, limits=Limits(wall_seconds=29))
"""


TREE = "import os, signal\nfor _ in range(4): os.fork()\nos.write(1, b'x')\nwhile True: signal.pause()"


@pytest.mark.parametrize(
    ("number", "program"),
    [
        pytest.param(signal.SIGKILL, ENDLESS, id="killed"),
        pytest.param(signal.SIGKILL, TREE, id="killed-with-a-tree"),
        pytest.param(signal.SIGTERM, ENDLESS, id="terminated"),
        pytest.param(signal.SIGINT, ENDLESS, id="interrupted"),
    ],
)
def test_a_killed_caller_leaves_nothing(number: int, program: str) -> None:
    before = snapshot()
    command = [sys.executable, "-c", CALLER, program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as caller:
        assert caller.stdout is not None
        engine = int(caller.stdout.readline())
        below = descendants(engine)
        assert len(below) >= 3  # nursery, zygote, init, cell
        caller.send_signal(number)
        caller.wait(20)
    eventually(lambda: not any(lives(one) for one in below), 5, "every process of the engine is gone")
    eventually(lambda: not os.path.exists(f"/proc/{engine}"), 5, "the engine is gone")
    assert_nothing_new(before)


@pytest.mark.alone
def test_an_engine_that_was_killed_is_connectionlost_and_the_next_sweeps() -> None:
    from sandboxd import ConnectionLost

    before = snapshot()
    sandbox = Sandbox()
    with Running(sandbox) as running:
        os.kill(engine_of(sandbox), signal.SIGKILL)
    assert isinstance(running.outcome, ConnectionLost)
    assert running.outcome.may_have_started
    eventually(lambda: not os.path.exists(f"/proc/{engine_of(sandbox)}"), 5, "the engine is gone")
    with pytest.raises(ConnectionLost) as lost:
        sandbox.run("print(1)")
    assert not lost.value.may_have_started
    sandbox.close()
    with Sandbox() as again:  # sweeps what the dead one left
        assert again.run("print(1)").status == "ok"
    assert_nothing_new(before)
