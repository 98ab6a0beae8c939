"""AsyncSandbox: many runs at once on one loop, cancellation, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd import AsyncSandbox, Limits
from sandboxd.errors import Busy, PolicyError, Unavailable
from tests.support import daemons, leftovers
from tests.support.daemons import SLEEP, Served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with daemons.directory() as home, daemons.served(home, max_running=4) as made:
        yield made


async def until(condition: Callable[[], object], seconds: float = 10) -> None:
    """As leftovers.eventually, for a loop that has to go on."""
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(sandbox: AsyncSandbox, **options: Any) -> AsyncIterator[asyncio.Task[Any]]:
    """A run that is known to have begun, and is over afterwards."""
    up = asyncio.Event()
    task = asyncio.create_task(sandbox.run(SLEEP, on_stdout=lambda _: up.set(), **options))
    try:
        async with asyncio.timeout(15):
            await up.wait()
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_a_hundred_runs_at_once_on_an_engine_of_its_own() -> None:
    before = leftovers.snapshot()

    async def main() -> list[str]:
        async with AsyncSandbox(max_running=4) as sandbox:
            results = await asyncio.gather(*(sandbox.run(f"print({number})") for number in range(100)))
        return [result.stdout for result in results]

    assert asyncio.run(main()) == [f"{number}\n" for number in range(100)]
    leftovers.assert_nothing_new(before)


def test_a_hundred_runs_at_once_through_a_daemon(served: Served) -> None:
    async def main() -> list[str]:
        async with AsyncSandbox.connect(served.address) as sandbox:
            results = await asyncio.gather(*(sandbox.run(f"print({number})") for number in range(100)))
        return [result.stdout for result in results]

    assert asyncio.run(main()) == [f"{number}\n" for number in range(100)]


def test_cancellation_kills_the_run_and_goes_on(served: Served) -> None:
    async def main() -> None:
        async with AsyncSandbox.connect(served.address) as sandbox:
            async with running(sandbox) as task:
                cell = leftovers.process((await asyncio.to_thread(served.runs))[0]["pid"])
                assert cell is not None
                task.cancel()
                begun = time.monotonic()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert time.monotonic() - begun < 2
                # Not later: when the cancellation arrives, the run is over.
                assert await asyncio.to_thread(served.runs) == []
                assert not leftovers.lives(cell)
            assert (await sandbox.run("print(1)")).stdout == "1\n"

    asyncio.run(main())


def test_a_timeout_of_the_callers_kills_the_run(served: Served) -> None:
    async def main() -> None:
        async with AsyncSandbox.connect(served.address) as sandbox:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(sandbox.run("while True: pass"), 0.3)
            assert await asyncio.to_thread(served.runs) == []

    asyncio.run(main())


def test_a_cancelled_run_that_waits_for_its_turn_never_starts(served: Served) -> None:
    async def main() -> None:
        async with AsyncSandbox.connect(served.address) as sandbox, contextlib.AsyncExitStack() as stack:
            for _ in range(4):
                await stack.enter_async_context(running(sandbox))
            queued = asyncio.create_task(sandbox.run("pass"))
            await until(lambda: len(served.runs()) == 5)
            queued.cancel()
            with pytest.raises(asyncio.CancelledError):
                await queued
            assert [run["state"] for run in await asyncio.to_thread(served.runs)] == ["running"] * 4
            with pytest.raises(Busy):
                await sandbox.run("pass", limits=Limits(queue_seconds=0.1))
        await until(lambda: served.runs() == [])

    asyncio.run(main())


def test_callbacks_come_on_the_loops_thread(served: Served) -> None:
    threads: set[int] = set()
    chunks: list[str] = []

    def take(text: str) -> None:
        asyncio.get_running_loop()
        threads.add(threading.get_ident())
        chunks.append(text)

    async def main() -> None:
        async with AsyncSandbox.connect(served.address) as sandbox:
            await sandbox.run("for i in range(1000): print(i)", on_stdout=take)

    asyncio.run(main())
    assert threads == {threading.get_ident()}
    assert "".join(chunks).split() == [str(number) for number in range(1000)]


@pytest.mark.parametrize("error", [KeyError("mine"), BrokenPipeError("mine"), BlockingIOError("mine")])
def test_what_a_callback_raises_kills_the_run_and_is_raised(served: Served, error: Exception) -> None:
    def fail(_: str) -> None:
        raise error

    async def main() -> None:
        async with AsyncSandbox.connect(served.address) as sandbox:
            with pytest.raises(type(error), match="mine"):
                await sandbox.run(SLEEP, on_stdout=fail)
            assert await asyncio.to_thread(served.runs) == []
            assert (await sandbox.run("print(1)")).stdout == "1\n"

    asyncio.run(main())


def test_one_run_does_not_hold_up_another_nor_the_loop(served: Served) -> None:
    async def main() -> None:
        async with AsyncSandbox.connect(served.address) as sandbox, running(sandbox) as slow:
            begun = time.monotonic()
            assert (await sandbox.run("print(1)")).stdout == "1\n"
            assert time.monotonic() - begun < 5
            assert not slow.done()

    asyncio.run(main())


def test_the_handles_limits_narrow(served: Served) -> None:
    async def main() -> None:
        async with AsyncSandbox.connect(served.address, limits=Limits(wall_seconds=0.2)) as sandbox:
            assert (await sandbox.run("while True: pass")).status == "timeout"
            with pytest.raises(PolicyError, match="wider"):
                await sandbox.run("pass", limits=Limits(wall_seconds=1.0))

    asyncio.run(main())


def test_connecting_waits_until_it_is_needed(served: Served, tmp_path: Path) -> None:
    async def main() -> None:
        nobody = AsyncSandbox.connect(f"unix:{tmp_path / 'nobody'}")
        with pytest.raises(Unavailable):
            await nobody.run("pass")
        await nobody.close()
        lazy = AsyncSandbox.connect(served.address, policy="no-such-policy")
        with pytest.raises(PolicyError, match="no-such-policy"):
            await lazy.run("pass")
        await lazy.close()
        with pytest.raises(PolicyError):
            await AsyncSandbox.connect(served.address, policy="./x.toml").run("pass")

    asyncio.run(main())


def test_close_ends_what_runs(served: Served) -> None:
    async def main() -> None:
        sandbox = AsyncSandbox.connect(served.address)
        async with running(sandbox) as task:
            await sandbox.close()
            await sandbox.close()
            with pytest.raises(RuntimeError, match="closed"):
                await task
            with pytest.raises(RuntimeError, match="closed"):
                await sandbox.run("pass")
        await until(lambda: served.runs() == [])

    asyncio.run(main())


def test_one_handle_serves_two_loops_one_after_the_other(served: Served) -> None:
    sandbox = AsyncSandbox.connect(served.address)

    async def main() -> list[str]:
        return [result.stdout for result in await asyncio.gather(*(sandbox.run("print(1)") for _ in range(5)))]

    assert asyncio.run(main()) == asyncio.run(main()) == ["1\n"] * 5
    asyncio.run(sandbox.close())


def test_no_descriptor_is_left_open(served: Served) -> None:
    async def main() -> None:
        async with AsyncSandbox.connect(served.address) as sandbox:
            await asyncio.gather(*(sandbox.run("print(1)", stdin=b"x" * 100_000) for _ in range(20)))
            for delay in range(10):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(sandbox.run("pass", stdin=b"x" * 100_000), delay / 100)

    before = leftovers.fds()
    asyncio.run(main())
    assert leftovers.fds() == before
    served.idle()


# Starts


def test_a_start_that_fails_leaves_nothing() -> None:
    before = leftovers.snapshot()

    async def main() -> None:
        with pytest.raises(PolicyError):
            async with AsyncSandbox("no-such-policy"):
                pass
        with pytest.raises(Unavailable):
            await AsyncSandbox(ids="5:5").run("pass")

    asyncio.run(main())
    leftovers.assert_nothing_new(before)


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1, 0.2])
def test_cancellation_during_the_start_leaves_no_engine(delay: float) -> None:
    before = leftovers.snapshot()

    async def main() -> None:
        sandbox = AsyncSandbox()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sandbox.run(SLEEP), delay)
        await sandbox.close()

    asyncio.run(main())
    leftovers.assert_nothing_new(before)


def test_a_loop_that_ends_during_the_start_leaves_no_engine() -> None:
    before = leftovers.snapshot()

    async def start_and_leave() -> None:
        task = asyncio.create_task(AsyncSandbox().run("pass"))
        await asyncio.sleep(0.02)
        assert not task.done()

    asyncio.run(start_and_leave())
    leftovers.assert_nothing_new(before)


def test_close_during_the_start_leaves_no_engine() -> None:
    before = leftovers.snapshot()

    async def main() -> None:
        sandbox = AsyncSandbox()
        task = asyncio.create_task(sandbox.run(SLEEP))
        await asyncio.sleep(0.02)
        await sandbox.close()
        with pytest.raises(RuntimeError, match="closed"):
            await task

    asyncio.run(main())
    leftovers.assert_nothing_new(before)


def test_runs_that_come_together_start_one_engine() -> None:
    before = leftovers.snapshot()

    async def main() -> set[int]:
        sandbox = AsyncSandbox()
        results = await asyncio.gather(*(sandbox.run("pass") for _ in range(5)))
        await sandbox.close()
        return {result.isolation.uid - result.isolation.uid % 1024 for result in results if result.isolation}

    assert len(asyncio.run(main())) == 1
    leftovers.assert_nothing_new(before)
