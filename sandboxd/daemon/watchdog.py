"""Signs of life for the service manager, given only for what is alive.

They come from the event loop, so a loop that hangs gives none, and only after a program of the default policy has run
since the last one: a client's, or else one of our own. So a zygote that hangs, a nursery that makes no more cells, or a
cgroup that cannot be written starves the watchdog, too, and the manager starts the daemon anew.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from sandboxd.engine.cells.zygote import ZygoteLost
from sandboxd.errors import SandboxError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sandboxd.daemon.notify import Notifier

__all__ = ["watch"]

AGAIN_SECONDS: Final = 1.0
"""After a program of our own failed."""

log = logging.getLogger("sandboxd")


async def watch(notifier: Notifier, served: Callable[[], int], probe: Callable[[], Awaitable[None]]) -> None:
    """Until cancelled: each half of the manager's time, a sign of life if *served* has grown, or *probe* succeeds.

    *probe* is begun once and waited for, however long it takes: nothing is said meanwhile.
    """
    period = notifier.watchdog_seconds / 2
    before = -1
    while True:
        now = served()
        if now != before:
            before = now
            notifier.alive()
            await asyncio.sleep(period)
            continue
        begun = asyncio.get_running_loop().time()
        try:
            await probe()
        except (SandboxError, ZygoteLost, OSError) as error:
            log.error("no sign of life is given: a program of our own could not be run: %s", error)
            await asyncio.sleep(min(AGAIN_SECONDS, period))
            continue
        notifier.alive()
        before = served()
        await asyncio.sleep(max(0.1, period - (asyncio.get_running_loop().time() - begun)))
