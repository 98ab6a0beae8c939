"""Nobody holds up an engine: what its loop did while a test ran, by the engine's own account (``Sandbox.stats``)."""

from __future__ import annotations

import contextlib
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.support.patience import SLOWER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd import Sandbox

HELD_SECONDS: Final = 0.05
"""No iteration may be longer."""
ITERATION_BYTES: Final = 8 << 20
"""What one iteration may read, where an emulated processor makes its time say nothing: READS pieces of 64 KiB of both
streams of a few programs.
"""
ITERATION_STEPS: Final = 512


@contextmanager
def prompt(sandbox: Sandbox) -> Iterator[None]:
    """The block keeps no iteration of the loop of *sandbox*'s engine busy."""
    before = sandbox.stats()
    if "held_seconds" not in before:  # of a service whose operator is somebody else
        yield
        return
    began, waited = time.monotonic(), _waited_by_others(before["pid"])
    yield
    after, earlier = sandbox.stats()["held_seconds"], before["held_seconds"]
    assert after["worst_bytes"] <= max(ITERATION_BYTES, earlier["worst_bytes"]), after
    assert after["worst_steps"] <= max(ITERATION_STEPS, earlier["worst_steps"]), after
    if SLOWER > 1:
        return
    # A thread that has the interpreter's lock and no processor keeps the loop waiting, too: that is the host's load.
    allowed = HELD_SECONDS + _waited_by_others(before["pid"]) - waited
    passed = time.monotonic() - began
    held = [seconds for ago, seconds in after["slow"] if ago < passed and seconds > allowed]
    assert not held, f"iterations of the loop took longer than {allowed:.3f} s: {held}; {earlier}, {after}"


def _waited_by_others(pid: int) -> float:
    """Seconds for which the threads of *pid* but the first, which has the loop, waited for a processor. Source:
    /proc/PID/task/TID/schedstat.
    """
    found = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        if task.name != str(pid):
            with contextlib.suppress(OSError):  # ended meanwhile
                found += int((task / "schedstat").read_text("ascii").split()[1])
    return found / 1e9
