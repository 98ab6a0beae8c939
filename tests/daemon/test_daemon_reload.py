"""A daemon whose files change, and one that ends, both under load: nothing that was accepted is lost."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from sandboxd import Limits
from sandboxd.client import admin
from sandboxd.errors import Busy, ConnectionLost, PolicyError, SandboxError, Unavailable
from tests.support import daemons, leftovers
from tests.support.daemons import SLEEP, Raw, as_user

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sandboxd import Result, Sandbox
    from tests.support.daemons import Served

BRIEF = 'name = "brief"\n[limits]\nwall_seconds = 10.0\n'
TOLD = "import time\nprint('up', flush=True)\ntime.sleep({})\nprint('end')"


@pytest.fixture
def home() -> Iterator[Path]:
    with daemons.directory() as path:
        (path / "policies").mkdir()
        (path / "policies" / "brief.toml").write_text(BRIEF)
        yield path


@pytest.fixture
def served(home: Path) -> Iterator[Served]:
    with daemons.served(home, max_running=2, policies_dir=str(home / "policies")) as made:
        yield made


def zygotes(served: Served) -> set[int]:
    """Their pids, without those of the cells that they forked."""
    named = {}
    for one in leftovers.descendants(served.pid):
        with contextlib.suppress(OSError), open(f"/proc/{one.pid}/cmdline", "rb") as file:
            if b"zygote" in file.read():
                named[one.pid] = one.parent
    return {pid for pid, parent in named.items() if parent not in named}


class Load:
    """Short runs from several threads, until the end; what became of each."""

    def __init__(self, sandbox: Sandbox, threads: int = 4) -> None:
        self._over = threading.Event()
        self.count = itertools.count()
        self.done = 0
        self._pool = ThreadPoolExecutor(threads)
        self._futures = [self._pool.submit(self._go, sandbox) for _ in range(threads)]

    def _go(self, sandbox: Sandbox) -> None:
        while not self._over.is_set():
            number = next(self.count)
            assert sandbox.run(f"print({number})").stdout == f"{number}\n"
            self.done += 1

    def goes_on(self) -> None:
        """Until some more have ended."""
        before = self.done
        leftovers.eventually(lambda: self.done > before + 8 or self._broken(), 30, "nothing runs any more")
        assert not self._broken()

    def _broken(self) -> bool:
        return any(future.done() for future in self._futures)

    def end(self) -> None:
        self._over.set()
        self._pool.shutdown(wait=True)
        for future in self._futures:
            future.result()


def begun(sandbox: Sandbox, pool: ThreadPoolExecutor, code: str) -> Future[Result]:
    """A run, known to have begun."""
    up = threading.Event()
    future = pool.submit(sandbox.run, code, on_stdout=lambda _: up.set())
    assert up.wait(20), future.exception() if future.done() else None
    return future


# Reload


def test_changed_policy_has_new_zygotes_and_no_run_is_lost(home: Path, served: Served) -> None:
    with served.sandbox(policy="brief") as brief, ThreadPoolExecutor(1) as pool:
        assert brief.run("pass").limits_hit == []
        before = zygotes(served)
        assert len(before) == 2
        long = begun(brief, pool, TOLD.format(2))
        load = Load(brief)
        load.goes_on()
        (home / "policies" / "brief.toml").write_text('name = "brief"\n[limits]\nwall_seconds = 9.0\npids = 9\n')
        assert admin.reload(served.address) == ["policy brief: changed"]
        now = zygotes(served)
        assert len(now - before) == 1
        load.goes_on()
        load.end()
        assert long.result(20).stdout == "up\nend\n"
        leftovers.eventually(lambda: len(zygotes(served)) == 2, 10, "the old zygote stays")
        assert len(before & zygotes(served)) == 1  # of the policy that did not change
        with pytest.raises(PolicyError, match="wider than the 9"):
            brief.run("pass", limits=client_limits(9.5))
    assert "reloaded; policy brief: changed" in served.said()


def client_limits(seconds: float) -> Limits:
    return Limits(wall_seconds=seconds)


def test_queued_run_of_a_policy_that_changes_is_served(home: Path, served: Served) -> None:
    with served.sandbox(policy="brief") as brief, served.sandbox() as other, ThreadPoolExecutor(3) as pool:
        brief.run("pass")
        running = [begun(other, pool, TOLD.format(3)) for _ in range(2)]
        queued = pool.submit(brief.run, "print('late')")
        leftovers.eventually(lambda: len(served.runs()) == 3, 10, "the third waits")
        (home / "policies" / "brief.toml").write_text('name = "brief"\n[limits]\nwall_seconds = 8.0\n')
        admin.reload(served.address)
        assert len(served.runs()) == 3
        assert queued.result(20).stdout == "late\n"
        assert [one.result(20).status for one in running] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("file", "text", "names"),
    [
        ("policies/brief.toml", "[limits]\nwall_secnods = 1\n", "brief.toml:2"),
        ("policies/other.toml", "[limits]\npids = 0\n", "other.toml:2"),
        ("policies/default.toml", 'name = "default"\n[runtime]\npreload = ["no_such_one"]\n', "no_such_one"),
        ("sandboxd.toml", "max_clients = 0\n", "max_clients"),
        ("sandboxd.toml", "[\n", "sandboxd.toml"),
        ("sandboxd.toml", 'policies_dir = "/nowhere"\n', "policies_dir"),
        ("sandboxd.toml", 'default_policy = "nowhere"\n', "nowhere"),
    ],
)
def test_wrong_file_changes_nothing_and_is_named(home: Path, served: Served, file: str, text: str, names: str) -> None:
    with served.sandbox(policy="brief") as brief, served.sandbox() as default:
        brief.run("pass")
        before = zygotes(served)
        if file.startswith("policies/"):  # a good change beside the wrong one is not made either
            (home / "policies" / "brief.toml").write_text(BRIEF.replace("10.0", "3.0"))
        (home / file).write_text(text)
        with pytest.raises(SandboxError) as caught:
            admin.reload(served.address)
        assert names in str(caught.value)
        assert "not reloaded, everything is as before" in served.said()
        assert brief.run("pass", limits=client_limits(10.0)).status == "ok"
        assert default.run("pass").status == "ok"
        leftovers.eventually(lambda: zygotes(served) == before, 10, "a zygote of the new state is left")


def test_mistakes_are_all_named_at_once(home: Path, served: Served) -> None:
    for name in ("one", "two"):
        (home / "policies" / f"{name}.toml").write_text("pids = 3\n")
    with pytest.raises(PolicyError) as caught:
        admin.reload(served.address)
    assert "one.toml:1" in str(caught.value)
    assert "two.toml:1" in str(caught.value)


def test_removed_policy_ends_with_its_last_run(home: Path, served: Served) -> None:
    with served.sandbox(policy="brief") as brief, ThreadPoolExecutor(1) as pool:
        long = begun(brief, pool, TOLD.format(1.5))
        (home / "policies" / "brief.toml").unlink()
        assert admin.reload(served.address) == ["policy brief: removed"]
        with pytest.raises(PolicyError, match="no policy named 'brief'"):
            brief.run("pass")
        assert long.result(20).stdout == "up\nend\n"
        leftovers.eventually(lambda: len(zygotes(served)) == 1, 10, "its zygote stays")


def test_policies_that_come_and_another_default(home: Path, served: Served) -> None:
    (home / "policies" / "later.toml").write_text('name = "later"\n[limits]\nwall_seconds = 4.0\n')
    config = (home / "sandboxd.toml").read_text()
    (home / "sandboxd.toml").write_text(f'default_policy = "later"\nmax_queued = 7\n{config}')
    assert admin.reload(served.address) == ["the default policy is later now"]
    with served.sandbox() as sandbox, pytest.raises(PolicyError, match="wider than the 4"):
        sandbox.run("pass", limits=client_limits(5.0))


def test_what_needs_a_restart_is_said(home: Path, served: Served) -> None:
    config = (home / "sandboxd.toml").read_text()
    (home / "sandboxd.toml").write_text(config.replace("max_running = 2", "max_running = 3"))
    assert admin.reload(served.address) == ["from the next restart on: max_running"]
    assert admin.reload(served.address) == ["from the next restart on: max_running"]
    (home / "sandboxd.toml").write_text(config)
    assert admin.reload(served.address) == []


def test_sighup_reloads_and_many_are_one(home: Path, served: Served) -> None:
    with served.sandbox() as sandbox:
        load = Load(sandbox, 2)
        for number in range(20):
            (home / "policies" / "default.toml").write_text(f'name = "default"\n[limits]\npids = {64 + number}\n')
            served.process.send_signal(signal.SIGHUP)
        leftovers.eventually(lambda: "reloaded; policy default: changed" in served.said(), 20, "it is not reloaded")
        load.goes_on()
        load.end()
        leftovers.eventually(lambda: len(zygotes(served)) == 1, 20, "old zygotes stay")
    assert "not reloaded" not in served.said()


def test_only_the_operator_may_ask_for_it(served: Served) -> None:
    import grp

    gid = grp.getgrnam(daemons.GROUP).gr_gid

    def ask() -> tuple[str, int | None]:
        try:
            admin.reload(served.address)
        except Unavailable as error:
            return error.stage, error.errno
        return "", None

    assert as_user(ask, 61_001, gid) == ("reload", 1)
    assert "reloaded" not in served.said()


def test_command_reloads_and_tells_what_is_wrong(home: Path, served: Served) -> None:
    def command() -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "sandboxd", "reload", "--connect", served.address]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    done = command()
    assert (done.returncode, done.stdout) == (0, "Nothing has changed.\n")
    (home / "policies" / "brief.toml").write_text("x = 1\n")
    done = command()
    assert done.returncode == 2
    assert "brief.toml:1" in done.stderr


# Drain


def test_runs_may_end_and_others_are_turned_away(home: Path) -> None:
    before = leftovers.snapshot()
    with daemons.served(home, "drains", max_running=2, drain_seconds=30) as made, made.sandbox() as sandbox:
        with ThreadPoolExecutor(4) as pool:
            running = [begun(sandbox, pool, TOLD.format(2)) for _ in range(2)]
            queued = pool.submit(sandbox.run, "pass")
            leftovers.eventually(lambda: len(made.runs()) == 3, 5, "the third waits")
            with Raw(made) as idle:
                made.process.send_signal(signal.SIGTERM)
                with pytest.raises(Busy):
                    queued.result(5)
                leftovers.eventually(lambda: idle.answer() == {}, 5, "an idle client stays")
                with pytest.raises(BrokenPipeError):
                    idle.send(daemons.request(), b"pass")
            # What is asked for from now on did certainly not run.
            with pytest.raises((Busy, ConnectionLost, Unavailable)) as caught:
                sandbox.run("pass")
            assert not getattr(caught.value, "may_have_started", False)
            assert [one.result(20).stdout for one in running] == ["up\nend\n"] * 2
        assert made.process.wait(10) == 0
    leftovers.assert_nothing_new(before)


def test_request_that_crossed_with_the_end_is_answered(home: Path) -> None:
    with daemons.served(home, "crosses", max_running=1, drain_seconds=30) as made, Raw(made) as raw:
        os.kill(made.pid, signal.SIGSTOP)
        raw.send(daemons.request(), b"pass")
        os.kill(made.pid, signal.SIGTERM)
        os.kill(made.pid, signal.SIGCONT)
        answer = raw.answer()
        if answer.get("op") == "refused":
            assert answer["error"]["kind"] == "Busy"
        else:
            assert answer["op"] == "result"  # it was read before the signal
        assert raw.answer() == {}
        assert made.process.wait(10) == 0


def test_what_takes_longer_is_killed(home: Path) -> None:
    with daemons.served(home, "slow", drain_seconds=1.0) as made, made.sandbox() as sandbox:
        with ThreadPoolExecutor(1) as pool:
            running = begun(sandbox, pool, SLEEP)
            begin = time.monotonic()
            assert made.end() == 0
            assert 0.9 < time.monotonic() - begin < 6
            with pytest.raises(ConnectionLost) as caught:
                running.result(5)
            assert caught.value.may_have_started
        assert "runs that are killed now, for 1 s are over: 1" in made.said()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_it_at_once(home: Path, second: signal.Signals) -> None:
    with (
        daemons.served(home, "twice", drain_seconds=60) as made,
        made.sandbox() as sandbox,
        ThreadPoolExecutor(1) as pool,
    ):
        running = begun(sandbox, pool, SLEEP)
        made.process.send_signal(signal.SIGTERM)
        leftovers.eventually(lambda: "stopped by SIGTERM" in made.said(), 5, "it does not stop")
        begin = time.monotonic()
        assert made.end(second) == 0
        assert time.monotonic() - begin < 6
        assert isinstance(running.exception(5), ConnectionLost)


@pytest.mark.parametrize("text", ["drain_seconds = -1", "drain_seconds = '5'", "drain_seconds = true"])
def test_drain_that_is_no_span_is_refused(tmp_path: Path, text: str) -> None:
    from sandboxd.daemon import load_config

    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(PolicyError, match=r"drain_seconds must be a number of seconds from 0 to"):
        load_config(tmp_path / "c.toml")
