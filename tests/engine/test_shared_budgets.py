"""What the host has once for all cells and no cgroup counts: the disk's write cache, and the pages of pipes."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from sandboxd import Sandbox
from tests.support import leftovers
from tests.support.modes import HAS_CGROUP, ONE_ID, policy_of

FLUSHES: Final = 2_000
"""Asked for by one run, which takes a tenth of a second; what others of this machine flush meanwhile is far less."""
GROWERS: Final = 24
"""Programs whose three streams, of 1 MiB each, would be more than an ordinary user's pipes may have (64 MiB)."""
BY_DEFAULT: Final = [65536] * 3

FLUSH = f"""
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
with open(sys.argv[1], "rb") as file:
    number = file.fileno()
    with mmap.mmap(number, 4096, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as mapped:
        begin = ctypes.c_void_p(int(next(line for line in open("/proc/self/maps") if sys.argv[1] in line).split("-")[0], 16))
        for _ in range({FLUSHES} // 4):
            os.fsync(number)
            os.fdatasync(number)
            assert libc.sync_file_range(number, ctypes.c_long(0), ctypes.c_long(0), 7) == 0, ctypes.get_errno()
            assert libc.msync(begin, 4096, 4) == 0, ctypes.get_errno()
print("flushed")
"""  # noqa: E501 - the line that finds a mapping

GROW = """
import fcntl, os, sys, time
for size in (1 << 20, 1 << 19, 1 << 18, 1 << 17):  # as much as is left, to the last
    for number in range(3):
        try:
            fcntl.fcntl(number, 1031, max(size, fcntl.fcntl(number, 1032)))
        except PermissionError:
            pass
print([fcntl.fcntl(number, 1032) for number in range(3)])
while True:
    sys.stdout.write("ready.")
    sys.stdout.flush()
    time.sleep(0.05)
"""
SIZES = "import fcntl\nprint([fcntl.fcntl(number, 1032) for number in range(3)])"


class Enough(Exception):
    """The program may end."""


def flushes(device: int) -> int:
    """Flush requests that the disk *device* has carried out. Source: /proc/diskstats, field 19; Linux 5.5."""
    wanted = [str(os.major(device)), str(os.minor(device))]
    for line in Path("/proc/diskstats").read_text().splitlines():
        fields = line.split()
        if fields[:2] == wanted and len(fields) >= 19:
            return int(fields[18])
    pytest.skip("/usr is on no disk of its own in this kernel's /proc/diskstats")


@pytest.mark.kernel
def test_program_cannot_have_the_disk_flush_its_cache(sandbox: Sandbox) -> None:
    path = os.path.realpath("/usr/bin/env")
    device = os.stat(path).st_dev
    before = flushes(device)
    with open(path, "rb") as file:
        for _ in range(FLUSHES // 20):
            os.fsync(file)
    if flushes(device) - before < FLUSHES // 20:
        pytest.skip("in this kernel an fsync of /usr is no flush of its disk")

    def caused() -> int:
        before = flushes(device)
        result = sandbox.run(FLUSH, args=[path])
        assert (result.status, result.stdout, result.stderr) == ("ok", "flushed\n", "")
        return flushes(device) - before

    assert min(caused() for _ in range(3)) < FLUSHES // 4


@pytest.mark.only(not ONE_ID and HAS_CGROUP)
def test_programs_that_grow_their_pipes_leave_later_cells_theirs() -> None:
    """A cell's streams are pipes of the engine's: what a cell could add to them, the next cells would go without."""
    ready, over = threading.Semaphore(0), threading.Event()
    grown: list[str] = []

    def grow() -> None:
        said: list[str] = []

        def speaks(text: str) -> None:
            if not said:
                ready.release()
            said.append(text)
            if over.is_set():
                raise Enough

        with pytest.raises(Enough):
            made.run(GROW, on_stdout=speaks, results=False)
        grown.append("".join(said).partition("ready")[0])

    with Sandbox(policy_of(), max_running=40, pool=leftovers.UNPARKED) as made, ThreadPoolExecutor(GROWERS) as threads:
        running = [threads.submit(grow) for _ in range(GROWERS)]
        try:
            until = time.monotonic() + 60
            assert all(ready.acquire(timeout=max(0.0, until - time.monotonic())) for _ in range(GROWERS))
            sizes = [made.run(SIZES).stdout for _ in range(6)]
        finally:
            over.set()
        for one in running:
            one.result(60)
    assert sizes == [f"{BY_DEFAULT}\n"] * 6
    assert grown == [f"{BY_DEFAULT}\n"] * GROWERS
