"""Python's cyclic garbage collector in an engine: when it may look at everything.

A full collection looks at each object that lives, and so at what clients have waiting in the queue: requests of some
ten thousand files each. It would come in the middle of the loop, and take a tenth of a second. So the collector does
only the young generations by itself, whose size is bounded, and a full collection comes when nothing runs or waits.
"""

from __future__ import annotations

import asyncio
import gc
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["collect_when_idle"]

_LOOK_SECONDS: Final = 10.0
_MOST_SECONDS: Final = 600.0
"""An engine that is never idle has a full collection all the same."""
_NEVER: Final = 1 << 30


def collect_when_idle(is_idle: Callable[[], bool]) -> None:
    """From now on, in the running loop. What lives now stays for good, and is not looked at again."""
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _NEVER)
    loop = asyncio.get_running_loop()
    last = time.monotonic()

    def look() -> None:
        nonlocal last
        now = time.monotonic()
        if is_idle() or now - last > _MOST_SECONDS:
            last = now
            gc.collect()
        loop.call_later(_LOOK_SECONDS, look)

    loop.call_later(_LOOK_SECONDS, look)
