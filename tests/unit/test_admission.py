"""Turns of an engine: who waits, in which order, and how many may."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from sandboxd.engine.admission import Admission
from sandboxd.engine.fair_share import Shares
from sandboxd.errors import Busy

ONE, OTHER = 1001, 1002


def test_uids_take_turns_in_the_queue() -> None:
    async def order() -> list[str]:
        admission = Admission(most_running=1, most_queued=100)
        served: list[str] = []

        async def run(who: str) -> None:
            await admission.enter(who, 5.0, None)
            served.append(who)
            await asyncio.sleep(0)
            admission.leave()

        await admission.enter("first", None, None)
        tasks = [asyncio.create_task(run(who)) for who in ["greedy"] * 4 + ["modest", "third"] + ["modest"]]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.sleep(0)
        admission.leave()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (admission.running, admission.queued, admission.is_waited_for) == (0, 0, False)
        return served

    assert asyncio.run(order()) == ["greedy", "modest", "third", "greedy", "modest", "greedy"]


def test_run_beyond_the_length_of_the_queue_is_busy_at_once() -> None:
    async def main() -> None:
        admission = Admission(most_running=1, most_queued=2)
        await admission.enter(ONE, None, None)
        waiting = [asyncio.create_task(admission.enter(who, None, None)) for who in (ONE, OTHER)]
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await asyncio.wait_for(admission.enter(ONE, None, None), 5)
        for _ in range(2):
            admission.leave()
        await asyncio.gather(*waiting)

    asyncio.run(main())


def test_a_turn_that_is_held_for_a_program_is_taken_back_for_one_that_is_there() -> None:
    class Holder:
        def revoke(self) -> bool:
            admission.unreserve(self)
            return True

    admission = Admission(most_running=1, most_queued=1)
    assert admission.reserve(Holder())
    assert not admission.reserve(Holder())
    asyncio.run(admission.enter(ONE, None, None))
    assert admission.running == 1
    assert not admission.reserve(Holder())


def test_what_waits_while_the_engine_drains_is_busy() -> None:
    async def main() -> None:
        admission = Admission(most_running=1, most_queued=1)
        await admission.enter(ONE, None, None)
        waiting = asyncio.create_task(admission.enter(OTHER, None, None))
        await asyncio.sleep(0)
        admission.drain()
        with pytest.raises(Busy):
            await waiting
        with pytest.raises(Busy):
            admission.check_open()
        assert admission.running == 1

    asyncio.run(main())


def test_what_one_uid_keeps_in_memory_is_bounded() -> None:
    shares = Shares()
    with contextlib.ExitStack() as held:
        for _ in range(4):
            held.enter_context(shares.hold(ONE, 16 << 20))
        with pytest.raises(Busy), shares.hold(ONE, 1):
            pass
        with shares.hold(OTHER, 100 << 20), shares.hold(None, 1 << 40):
            pass
    with shares.hold(ONE, 100 << 20):  # nothing of before is counted any more
        pass
