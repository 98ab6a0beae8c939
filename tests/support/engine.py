"""What tests look at inside an engine, and of a Sandbox's own: here alone, so that names change in one place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import asyncio
    import socket

    from sandboxd import Sandbox
    from sandboxd.client.leased import LeaseSlot
    from sandboxd.engine.cells.active_policy import ActivePolicy
    from sandboxd.engine.cells.cell import Cell
    from sandboxd.engine.cells.zygote import Zygote
    from sandboxd.engine.engine import Engine
    from sandboxd.rootfs.interpreter import Interpreter

TREE: Final = Path(__file__).resolve().parents[2]

# The engine process of an embedded Sandbox


def pid_of(sandbox: Sandbox) -> int:
    """The pid of its engine."""
    assert sandbox._handle.engine is not None
    return sandbox._handle.engine.pid


def connect(sandbox: Sandbox) -> socket.socket:
    """A connection to its engine that the Sandbox knows nothing of."""
    assert sandbox._handle.engine is not None
    return sandbox._handle.engine.connect()


def lease_slots(sandbox: Sandbox) -> list[tuple[socket.socket, LeaseSlot]]:
    """Its idle connections over which cells are lent to this process, with what was lent."""
    idle = sandbox._handle.connections._idle
    return [(one.sock, one.slot) for one in idle if one.slot is not None]


# Inside an engine of this process


def parked(active: ActivePolicy) -> list[Cell]:
    """Its parked cells."""
    return list(active.pool._parked)


def take_zygote(engine: Engine, python: Interpreter) -> Zygote:
    """A zygote that no policy has touched."""
    return engine.policies._zygotes.take(python)


def early_zygotes(engine: Engine) -> dict[Any, Zygote]:
    """Those that were started before a policy came; the engine's own table."""
    return engine.policies._zygotes._early


def guess(engine: Engine) -> asyncio.Task[ActivePolicy] | None:
    """The default policy that is made ready although nobody has asked for it."""
    return engine.policies._guess


_PROGRAM: Final = """
import asyncio, json, sys, time
from sandboxd.engine.config import EngineConfig
from sandboxd.engine.engine import Engine
from sandboxd.rootfs.interpreter import Interpreter
from sandboxd.policy import Policy, Runtime
from tests.support.engine import early_zygotes, guess, parked, take_zygote

async def until(what):
    async with asyncio.timeout(60):
        while not what():
            await asyncio.sleep(0.01)

async def main():
    engine = Engine(EngineConfig())
    engine.start()
    try:
        print(json.dumps(await look(engine)))
    finally:
        await engine.close()
%s
asyncio.run(main())
"""


def in_engine(look: str) -> Any:
    """What *look*, the source of ``async def look(engine)``, returns in a process that has an engine."""
    command = [sys.executable, "-c", _PROGRAM % look]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, cwd=TREE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
