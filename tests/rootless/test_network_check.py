"""The network check of a daemon that is not root: a process that is started early and enters the namespace."""

from __future__ import annotations

import asyncio
import os

import pytest

from sandboxd.daemon.network import NetworkCheck
from sandboxd.errors import Unavailable
from tests.rootless.test_broker import nursery
from tests.support.leftovers import process


def test_network_of_a_zygote_is_empty() -> None:
    async def main() -> None:
        async with nursery() as zygote, NetworkCheck() as network:
            await network.ask(zygote.pid)

    asyncio.run(main())


def test_network_that_cannot_be_entered_is_told() -> None:
    async def main() -> None:
        async with NetworkCheck() as network:
            await network.ask(os.getpid())

    with pytest.raises(Unavailable, match="cannot be looked into: PermissionError"):
        asyncio.run(main())


def test_process_that_nobody_asks_ends() -> None:
    async def main() -> int:
        async with NetworkCheck() as network:
            assert network._process is not None
            return network._process.pid

    assert process(asyncio.run(main())) is None
