"""The counters of an engine: what was run, what waits, and how long its loop was held."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd import AsyncSandbox, Busy, Limits, Sandbox
from sandboxd.engine import held_time
from sandboxd.errors import SandboxError
from tests.support import daemons, leftovers
from tests.support.daemons import as_user
from tests.support.engine import pid_of

if TYPE_CHECKING:
    from collections.abc import Iterator

USER = 61_007
GID = grp.getgrnam(daemons.GROUP).gr_gid


def test_runs_are_counted_by_policy_and_status() -> None:
    with Sandbox(max_running=1) as sandbox:
        for code in ("1", "1", "1 / 0", "import os; os.kill(os.getpid(), 9)"):
            sandbox.run(code)
        sandbox.run("1", on_stdout=lambda _: None)
        sandbox.run("while True: pass", limits=Limits(wall_seconds=0.1))
        leftovers.eventually(lambda: sandbox.stats()["parked"] > 0, 5, "a cell is parked")
        found = sandbox.stats()
    runs = {"ok": 3, "error": 1, "killed": 1, "timeout": 1}
    assert found["runs"] == found["policies"]["default"]["runs"] == runs
    assert (found["queued"], found["running"], found["zygote_restarts"]) == (0, 0, 0)
    assert set(found["policies"]) == {"default"}
    assert 0 < found["uptime_seconds"] < 60


def test_what_runs_and_waits_is_counted() -> None:
    with Sandbox(max_running=1) as sandbox:
        threads = [threading.Thread(target=sandbox.run, args=("import time; time.sleep(1)",)) for _ in range(3)]
        for thread in threads:
            thread.start()
        leftovers.eventually(
            lambda: (sandbox.stats()["running"], sandbox.stats()["queued"]) == (1, 2), 5, "one runs, two wait"
        )
        with pytest.raises(Busy):
            sandbox.run("1", limits=Limits(queue_seconds=0.1), on_stdout=lambda _: None)
        for thread in threads:
            thread.join()
        assert sandbox.stats()["runs"] == {"ok": 3, "busy": 1}


def test_a_zygote_that_is_lost_is_a_restart() -> None:
    with Sandbox() as sandbox:
        sandbox.run("1")
        nursery = next(one for one in leftovers.descendants(pid_of(sandbox)) if one.parent == pid_of(sandbox))
        os.kill(nursery.pid, signal.SIGKILL)

        def again() -> bool:
            with contextlib.suppress(SandboxError):
                return sandbox.run("1", on_stdout=lambda _: None).status == "ok"
            return False

        leftovers.eventually(lambda: again() and sandbox.stats()["zygote_restarts"] == 1, 20, "another one serves")
        assert sandbox.stats()["policies"]["default"]["zygote_restarts"] == 1


def test_stats_can_be_awaited() -> None:
    async def main() -> None:
        async with AsyncSandbox() as sandbox:
            await sandbox.run("1")
            assert (await sandbox.stats())["runs"] == {"ok": 1}

    asyncio.run(main())


@pytest.fixture(scope="module")
def served() -> Iterator[daemons.Served]:
    with daemons.directory() as home, daemons.served(home) as made:
        yield made


def test_of_a_daemon_others_see_their_own_counters(served: daemons.Served) -> None:
    assert served.serves()

    def other() -> dict[str, Any]:
        with served.sandbox() as sandbox:
            sandbox.run("1 / 0")
            return sandbox.stats()

    found = as_user(other, USER, GID)
    assert found["runs"] == {"error": 1}
    assert not {"held_seconds", "parked", "zygote_restarts"} & set(found)
    with served.sandbox() as sandbox:
        everything = sandbox.stats()
    assert everything["runs"]["error"] == 1
    assert everything["runs"]["ok"] >= 1
    assert everything["held_seconds"]["iterations"] > 0


# --- held time ------------------------------------------------------------------------------------------------------


def test_a_callback_that_blocks_is_held_time() -> None:
    async def main() -> None:
        held = held_time.of(asyncio.get_running_loop())
        await asyncio.sleep(0.01)
        before = held.plain()
        assert before["worst"] < 0.05
        time.sleep(0.06)  # what it is about: the loop is blocked
        await asyncio.sleep(0.01)
        after = held.plain()
        assert 0.06 <= after["worst"] < 0.2
        assert after["above"] == {**before["above"], "0.01": 1 + before["above"]["0.01"], "0.05": 1}
        assert after["p99"] <= after["worst"]

    held_time.run(main)


def test_waiting_for_an_event_is_no_held_time() -> None:
    async def main() -> None:
        await asyncio.sleep(0.2)
        assert held_time.of(asyncio.get_running_loop()).worst_seconds < 0.05

    held_time.run(main)


def test_the_99th_percentile_is_near_the_truth() -> None:
    held = held_time.HeldTime()
    for index in range(1000):
        held._counts[held_time._bucket(0.002 if index >= 985 else 0.0001)] += 1
    held.iterations, held.worst_seconds = 1000, 0.002
    assert 0.0016 <= held.p99_seconds() <= 0.0024
    held._counts = [0] * len(held._counts)
    held._counts[held_time._bucket(0.0001)] = 1000
    assert 0.00008 <= held.p99_seconds() <= 0.00012


def test_what_an_iteration_read_is_counted() -> None:
    held = held_time.HeldTime()
    held.begin(slept=True)
    held.did(100)
    held.did(28)
    held.end()
    held.begin(slept=False)
    held.did(64)
    held.end()
    held.close()
    assert (held.worst_bytes, held.worst_steps, held.iterations) == (128, 2, 2)
