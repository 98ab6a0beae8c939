"""A zygote that is lost, or a caller that is gone, while somebody waits: nobody waits for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from sandboxd.errors import Busy
from tests.engine.test_crash import all_gone, family, named
from tests.support import daemons, leftovers
from tests.support.engine import in_engine

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="an engine in this process tree needs root")


def test_zygote_lost_before_it_answers_ends_the_start() -> None:
    """Its processes may outlive the notice by a moment, so that what is sent to them still arrives."""
    look = """
async def look(engine):
    import signal
    from sandboxd import seccomp
    from sandboxd.kernel import calls
    from sandboxd.errors import Unavailable
    from sandboxd.engine.cells.zygote import ZygoteConfig
    kill, calls.pidfd_kill = calls.pidfd_kill, lambda *_: None
    zygote = take_zygote(engine, Interpreter.current())
    executed = zygote._executed
    async def lost():
        await executed()
        zygote._lose("the test says so")
    zygote._executed = lost
    filters = seccomp.cached_layers(seccomp.effective("default"))
    try:
        async with asyncio.timeout(10):
            await zygote.activate(ZygoteConfig(preload=(), warmup="", filters=filters, landlock_abi=1))
    except Unavailable as error:
        return error.stage
    finally:
        calls.pidfd_kill = kill
        kill(zygote._ends.pidfd, signal.SIGKILL)
        await zygote.close()
"""
    assert in_engine(look) == "zygote"


@pytest.mark.parametrize("limits", ["{}", "{'memory_bytes': 64 << 20}"], ids=["ordinary", "of-its-own"])
def test_cell_of_a_lost_zygote_is_refused(limits: str) -> None:
    look = f"""
async def look(engine):
    import os, signal
    from sandboxd.engine.cells.zygote import ZygoteLost
    made = await engine.policies.get("", Policy(name="one").plain())
    os.kill(made.zygote.pid, signal.SIGKILL)
    await until(lambda: made.zygote.lost)
    try:
        async with asyncio.timeout(10):
            await made.pool.acquire({{**made.limits, **{limits}}})
    except ZygoteLost:
        return "lost"
"""
    assert in_engine(look) == "lost"


def test_cancelled_close_of_a_zygote_still_gives_everything_back() -> None:
    look = """
async def look(engine):
    import os
    before = set(os.listdir("/proc/self/fd"))
    zygote = take_zygote(engine, Interpreter.current())
    closing = asyncio.create_task(zygote.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait({closing})
    left = sorted(set(os.listdir("/proc/self/fd")) - before)
    return [closing.cancelled(), left, os.path.exists(f"/proc/{zygote.pid}")]
"""
    assert in_engine(look) == [True, [], False]


def test_run_that_queued_while_its_zygote_was_lost_is_busy() -> None:
    with daemons.directory() as home, daemons.served(home, max_running=1, pool=leftovers.UNPARKED) as daemon:
        with daemon.sandbox() as sandbox, ThreadPoolExecutor(2) as pool:
            first = pool.submit(sandbox.run, daemons.SLEEP)
            leftovers.eventually(lambda: [one["state"] for one in daemon.runs()] == ["running"], 10, "the first runs")
            second = pool.submit(sandbox.run, "print(2)")
            leftovers.eventually(lambda: len(daemon.runs()) == 2, 10, "the second queues")
            (victim,) = named(daemon.pid, "nursery")
            os.kill(victim.pid, signal.SIGKILL)
            assert first.result(20).status == "internal"
            assert isinstance(second.exception(20), Busy)
        assert daemon.serves()
        assert "the nursery ended with signal 9" in daemon.said()


CALLER = """
import sys
from sandboxd import Sandbox
Sandbox(sys.argv[1])
"""


def test_engine_whose_caller_dies_while_it_starts_does_not_finish_the_start(tmp_path: Path) -> None:
    policy = tmp_path / "slow.toml"
    policy.write_text('name = "slow"\n[runtime]\nwarmup = "import time; time.sleep(100)"\n')
    with subprocess.Popen([sys.executable, "-c", CALLER, str(policy)]) as caller:

        def engines() -> list[leftovers.Process]:
            return [one for one in leftovers.processes().values() if one.parent == caller.pid]

        leftovers.eventually(lambda: engines() and named(engines()[0].pid, "zygote"), 20, "the zygote warms up")
        victims = family(engines()[0].pid)
        caller.kill()
        caller.wait()
        leftovers.eventually(lambda: all_gone(victims), 10, "the engine and all below it are gone")
