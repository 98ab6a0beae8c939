"""Which tests run at the same time: those marked ``alone`` by themselves, all others side by side.

Workers of pytest-xdist, and other runs of the suite by the same user, take turns through two locked files. A test that
waits to be alone holds the gate, so that tests that come later wait behind it and cannot keep it out for ever.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["turn"]

_HELD: Final = "SANDBOXD_TEST_TURN"
"""In the environment while a test runs: a pytest that a test starts is part of that test's turn."""


@contextlib.contextmanager
def turn(*, alone: bool) -> Iterator[None]:
    """Wait until this test may run, and hold its turn."""
    if _HELD in os.environ:
        yield
        return
    place = Path(tempfile.gettempdir(), f"sandboxd-tests-{os.geteuid()}")
    place.mkdir(mode=0o700, exist_ok=True)
    with (place / "room").open("wb") as room:
        with (place / "gate").open("wb") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)
            fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            fcntl.flock(gate, fcntl.LOCK_UN)  # said, not left to close: a child of a fork has the file open, too
        os.environ[_HELD] = "1"
        try:
            yield
        finally:
            del os.environ[_HELD]
            fcntl.flock(room, fcntl.LOCK_UN)
