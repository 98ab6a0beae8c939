"""A caller's asyncio loop goes on while what a program made is looked at, however the program made it."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd import AsyncSandbox
from sandboxd.client.result import Result
from sandboxd.tools import Dispatcher, tool
from tests.support.held import holding
from tests.support.pictures import damaged_png, endless_jpeg

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from sandboxd import Sandbox
    from tests.support.held import Held

HELD_SECONDS = 0.05
TRIES = 3

JPEG = "data = bytes.fromhex({start!r}) + b'\\xff\\xda\\0\\2' * ({size} // 4)\n"
PNG = "data = bytes.fromhex({start!r}) + bytes.fromhex({chunk!r}) * ({size} // 12)\n"


def hostile(size: int, count: int = 1) -> dict[str, Any]:
    """A model's message whose program leaves *count* pictures of *size* bytes that have no end."""
    start, chunk = endless_jpeg(40)[:23], damaged_png(100)[-12:]
    code = JPEG.format(start=start.hex(), size=size)
    code += f"for n in range({count}): open(f'chart{{n}}.jpg', 'wb').write(data[:{size}])\n"
    code += PNG.format(start=damaged_png(0).hex(), chunk=chunk.hex(), size=size)
    code += f"open('damaged.png', 'wb').write(data[:{size}])\nprint('done')"
    return message(code)


def message(code: str) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": [{"type": "tool_use", "id": "1", "name": "run_code", "input": {"code": code}}],
    }


def least_held(scene: Callable[[], Coroutine[Any, Any, Held]]) -> Held:
    """The best of some tries, for other programs hold up the thread that has the interpreter's lock."""
    best: Held | None = None
    for _ in range(TRIES):
        found = asyncio.run(scene())
        if best is None or max(found.callback, found.late) < max(best.callback, best.late):
            best = found
        if max(best.callback, best.late) <= HELD_SECONDS:
            break
    assert best is not None
    return best


def check(scene: Callable[[], Coroutine[Any, Any, Held]]) -> None:
    held = least_held(scene)
    assert held.callback <= HELD_SECONDS, held.what
    assert held.late <= HELD_SECONDS


def test_the_instrument_sees_a_callback_that_holds_the_loop() -> None:
    async def scene() -> Held:
        async with holding() as held:
            time.sleep(0.08)
        return held

    held = asyncio.run(scene())
    assert held.callback >= 0.08
    assert held.late >= 0.07
    assert "scene" in held.what


def test_the_instrument_sees_a_thread_that_keeps_the_interpreters_lock() -> None:
    text = b"a" * (1 << 19)

    def keep() -> None:
        until = time.monotonic() + 10
        while time.monotonic() < until and not done:
            text.count(b"a" * 40 + b"b")
            sum(range(4_000_000))  # one call, in C, with the lock held

    done: list[None] = []

    async def scene() -> Held:
        async with holding() as held:
            work = asyncio.create_task(asyncio.to_thread(keep))
            await asyncio.sleep(0.3)
            done.append(None)
            await work
        return held

    assert asyncio.run(scene()).late > 0.01


@pytest.mark.parametrize("size", [100_000, 3 << 20])
def test_hostile_pictures_are_soon_looked_at(sandbox: Sandbox, size: int) -> None:
    with Dispatcher(sandbox=sandbox) as dispatcher:
        begun = time.thread_time()
        (answer,) = dispatcher.handle(hostile(size))
        taken = time.thread_time() - begun

    assert "chart0.jpg: not shown, the JPEG is damaged" in answer["content"][0]["content"]
    assert taken < 0.5


@pytest.mark.parametrize("size", [100_000, 3 << 20])
def test_hostile_pictures_do_not_hold_the_callers_loop(sandbox: Sandbox, size: int) -> None:
    async def scene() -> Held:
        with Dispatcher(sandbox=sandbox) as dispatcher:
            async with holding() as held:
                (answer,) = await dispatcher.ahandle(hostile(size, 12))
            assert "done" in answer["content"][0]["content"]
        return held

    check(scene)


def test_hostile_pictures_do_not_hold_the_loop_of_an_async_sandbox_and_its_review() -> None:
    seen = []

    async def review(subject: Any) -> None:
        seen.append(subject.pictures)

    async def scene() -> Held:
        async with AsyncSandbox() as sandbox:
            with Dispatcher(sandbox=sandbox, review=review) as dispatcher:
                await sandbox.run("1")
                async with holding() as held:
                    await dispatcher.ahandle(hostile(3 << 20, 12))
        return held

    check(scene)
    assert seen[0] == []


def test_a_result_with_thousands_of_long_names_does_not_hold_the_loop() -> None:
    code = "import os\nos.makedirs('/'.join(['d' * 200] * 5))\nos.chdir('/'.join(['d' * 200] * 5))\n"
    code += "for n in range(4000): open(f'{n}' + 'x' * 100, 'w').close()"

    async def scene() -> Held:
        async with AsyncSandbox() as sandbox:
            async with holding() as held:
                result = await sandbox.run(code + "\nprint('\\xff' * 500_000)")
            assert len(result.files) > 3000, result
            result.close()
        return held

    check(scene)


def test_long_arguments_of_code_do_not_hold_the_loop() -> None:
    @tool
    def count(groups: list[set[uuid.UUID]]) -> int:
        """How many."""
        return sum(map(len, groups))

    # All of one hash, as many as a set may have: the most work that arguments can be.
    group = [str(uuid.UUID(int=number * sys.hash_info.modulus)) for number in range(1, 1000)]

    async def scene() -> Held:
        with Dispatcher([count]) as dispatcher:
            async with holding() as held:
                result = await dispatcher.acall("count", {"groups": [group] * 8}, "code")
            assert result.value == 8 * 999
        return held

    check(scene)


def test_results_that_are_dropped_are_closed_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []
    plain = Result.close

    def close(result: Result) -> None:
        closed.append(threading.get_ident())
        plain(result)

    async def scene() -> None:
        async with AsyncSandbox() as sandbox:
            with Dispatcher(sandbox=sandbox) as dispatcher:
                dispatcher._code.kept._runs = 1
                await dispatcher.ahandle(message("print(1)"))
                monkeypatch.setattr(Result, "close", close)
                await dispatcher.ahandle(message("print(2)"))
                monkeypatch.undo()

    asyncio.run(scene())
    assert len(closed) == 1
    assert closed[0] != threading.get_ident()


def test_a_cancelled_wait_for_a_large_result_leaves_no_descriptor() -> None:
    code = "for n in range(3000): open(f'{n}' + 'x' * 200, 'w').close()"

    async def scene() -> None:
        async with AsyncSandbox() as sandbox:
            (await sandbox.run(code)).close()
            before = len(os.listdir("/proc/self/fd"))
            cancelled = 0
            for delay in range(12):
                task = asyncio.create_task(sandbox.run(code))
                # Just before and while the answer is being read.
                await asyncio.sleep(0.05 + 0.02 * delay)
                task.cancel()
                begun = time.monotonic()
                (found,) = await asyncio.gather(task, return_exceptions=True)
                assert time.monotonic() - begun < 1.9  # nobody waits for an answer that has come already
                if isinstance(found, asyncio.CancelledError):
                    cancelled += 1
                elif not isinstance(found, BaseException):
                    found.close()
            assert cancelled
            (await sandbox.run("1")).close()
            assert len(os.listdir("/proc/self/fd")) <= before + 1

    asyncio.run(scene())


def test_a_result_that_is_closed_meanwhile_has_no_pictures(sandbox: Sandbox) -> None:
    async def scene() -> list[dict[str, Any]]:
        with Dispatcher(sandbox=sandbox) as dispatcher:
            dispatcher._code.kept._closed = True  # each Result is dropped, and closed, at once
            kept = dispatcher._code.kept
            add = kept.add

            def and_keep(result: Any) -> None:
                add(result)
                kept._results[result.id] = result

            kept.add = and_keep  # type: ignore[method-assign]
            return await dispatcher.ahandle(hostile(1000))

    (answer,) = asyncio.run(scene())
    assert "not shown" not in answer["content"][0]["content"]


def test_a_cancelled_ahandle_leaves_its_pictures_and_the_next_one_is_answered(sandbox: Sandbox) -> None:
    async def scene() -> list[dict[str, Any]]:
        with Dispatcher(sandbox=sandbox, max_abandoned=1) as dispatcher:
            for _ in range(3):
                task = asyncio.create_task(dispatcher.ahandle(hostile(3 << 20, 12)))
                await asyncio.sleep(0.15)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                async with asyncio.timeout(20):
                    while dispatcher.abandoned:
                        await asyncio.sleep(0.01)
            return await dispatcher.ahandle(hostile(1000))

    (answer,) = asyncio.run(scene())
    assert "damaged" in answer["content"][0]["content"]
