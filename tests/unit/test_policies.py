"""When a policy is brought into force, and when it is not tried again. What is made is a stand-in."""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn

import pytest

from sandboxd.engine import policies as module
from sandboxd.engine.cells.resources import Resources
from sandboxd.engine.config import EngineConfig
from sandboxd.engine.policies import Policies
from sandboxd.engine.runs.live import LiveRuns
from sandboxd.engine.tally import Tally
from sandboxd.errors import Unavailable


def policies() -> Policies:
    return Policies(Resources(EngineConfig()), LiveRuns(), Tally())


def test_a_policy_that_fails_is_not_tried_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESTART_SECONDS", 0.1)
    tries = 0

    async def fail(*_: object) -> NoReturn:
        nonlocal tries
        tries += 1
        raise Unavailable("zygote")

    async def main() -> None:
        found = policies()
        monkeypatch.setattr(found, "_make", fail)
        for _ in range(20):
            with pytest.raises(Unavailable):
                await found.get("x", {})
        assert tries == 1
        async with asyncio.timeout(5):
            while tries == 1:
                with pytest.raises(Unavailable):
                    await found.get("x", {})
                await asyncio.sleep(0.01)

    asyncio.run(main())


def test_who_leaves_while_a_policy_is_made_ready_does_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        found, go = policies(), asyncio.Event()

        async def make(*_: object) -> Any:
            await go.wait()
            return "made"

        monkeypatch.setattr(found, "_make", make)
        first, second = (asyncio.create_task(found.get("x", {})) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        go.set()
        made: object = await second
        assert made == "made"
        assert first.cancelled()

    asyncio.run(main())
