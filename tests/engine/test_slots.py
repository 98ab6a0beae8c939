"""Slots, and the leaves that they leave: what the kernel keeps for a cell that is gone, and who gets its id next."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from sandboxd import Sandbox
from sandboxd.cgroup import Bounds, Instance, Leaf, NoInstance, discover
from sandboxd.engine.cells.slots import BACKLOG, Slots
from sandboxd.errors import Unavailable
from tests.support import leftovers
from tests.support.modes import HAS_CGROUP, policy_of
from tests.support.patience import SLOWER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandboxd.cgroup.interface import AnyLeaf
    from sandboxd.engine.cells.slots import Slot

RUNS: Final = 500 if SLOWER == 1 else 60
NAMES: Final = 600
"""Names that are not there, asked for by each run: 300,000 in all, some 55 MiB of dentries."""
MAY_STAY: Final = 0.2
"""Of them, since others make dentries on this machine, too, and a leaf is used again while it holds little."""

ONE_TASK: Final = f"""
import os
for n in range({NAMES}):
    try:
        os.stat(f"/usr/lib/{{os.urandom(8).hex()}}")
    except FileNotFoundError:
        pass
"""
# The peak of its tasks alone rules out that the leaf is used again.
TWO_TASKS: Final = f"{ONE_TASK}\nimport threading\nthread = threading.Thread(target=int)\nthread.start()\nthread.join()"

pytestmark = [pytest.mark.cgroup, pytest.mark.kernel]
needs_instance = pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups here needs root")


def negative_dentries() -> int:
    """Source: Documentation/admin-guide/sysctl/fs.rst, dentry-state; Linux 5.0."""
    return int(Path("/proc/sys/fs/dentry-state").read_text("ascii").split()[4])


def kernel_bytes(directory: str) -> int:
    """Kernel memory that is charged to a cgroup directory and all below it; 0 where there is no memory controller."""
    usage, stat = Path(directory, "memory.kmem.usage_in_bytes"), Path(directory, "memory.stat")
    if usage.exists():
        return int(usage.read_text("ascii"))
    rows = dict(line.split() for line in stat.read_text("ascii").splitlines()) if stat.exists() else {}
    return int(rows.get("slab_reclaimable", 0))


@pytest.mark.skipif(not HAS_CGROUP, reason="without cgroups nobody can tell which memory is a cell's")
@pytest.mark.parametrize("program", [ONE_TASK, TWO_TASKS], ids=["leaf-used-again", "leaf-of-each-run"])
def test_names_that_runs_asked_for_do_not_stay_in_the_kernel(program: str) -> None:
    others = leftovers.snapshot().cgroups
    with Sandbox(policy_of(), pool=leftovers.UNPARKED) as sandbox:
        sandbox.run(program)
        own = [one for one in leftovers.snapshot().cgroups - others if Path(one).name.startswith("sandboxd.")]
        before, charged = negative_dentries(), sum(map(kernel_bytes, own))
        for _ in range(RUNS):
            result = sandbox.run(program)
            assert result.status == "ok", result
        may_stay = int(RUNS * NAMES * MAY_STAY)
        leftovers.eventually(
            lambda: negative_dentries() - before < may_stay,
            10 * SLOWER,
            f"{negative_dentries() - before} negative dentries are left of {RUNS * NAMES}",
        )
        left_bytes = sum(map(kernel_bytes, own)) - charged
        assert left_bytes < may_stay * 192, f"{left_bytes} bytes of kernel memory are left in {own}"  # sizeof(dentry)


@pytest.mark.skipif(not HAS_CGROUP, reason="without cgroups nobody can tell which memory is a cell's")
def test_names_that_the_last_run_asked_for_do_not_outlive_the_engine() -> None:
    before = negative_dentries()
    with Sandbox(policy_of(), pool=leftovers.UNPARKED) as sandbox:
        result = sandbox.run(TWO_TASKS.replace(f"range({NAMES})", "range(100_000)"))
        assert result.status == "ok", result
        assert result.usage.memory_peak_bytes is None or result.usage.memory_peak_bytes > 100_000 * 192
    assert negative_dentries() - before < 100_000 * MAY_STAY


# Slots of their own


@pytest.fixture
def instance() -> Iterator[Instance]:
    layout = discover()
    if layout.missing or any(hierarchy.read_only for hierarchy in layout.v1):
        pytest.skip("no writable cgroup hierarchies with memory, pids and cpu")
    with Instance.create(layout, Bounds(memory_bytes=1 << 30, pids=500)) as made:
        yield made


def spoil(slot: Slot) -> None:
    """A second task at the same time: the leaf's peak is no longer that of a new one."""
    slot.leaf.begin()
    code = "import os, sys\nsys.stdin.readline()\nif os.fork() == 0: os._exit(0)\nos.wait()"
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", code], stdin=subprocess.PIPE) as process:
        assert isinstance(slot.leaf, Leaf)
        slot.leaf.attach(process.pid)
        process.communicate(b"\n", timeout=30)
    assert not slot.leaf.reusable()


async def until(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def exists(instance: Instance, leaf: AnyLeaf) -> bool:
    return any(Path(path, below, leaf.name).exists() for path in instance.paths() for below in ("", "cells"))


@needs_instance
def test_a_leaf_that_is_not_as_new_goes_and_its_slot_is_free_at_once(instance: Instance) -> None:
    async def scenario() -> None:
        slots = Slots(instance, 1, os.geteuid())
        slot = slots.take()
        leaf = slot.leaf
        spoil(slot)
        slots.give_back(slot)
        assert slots.free == 1
        again = slots.take()
        assert again is slot
        assert again.leaf is not leaf
        await until(lambda: not exists(instance, leaf))
        assert exists(instance, again.leaf)
        slots.close()

    asyncio.run(scenario())


@needs_instance
def test_leaves_that_wait_for_the_thread_are_bounded(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    held, reclaimed = threading.Event(), list[int]()

    def reclaim() -> None:
        assert held.wait(30)
        reclaimed.append(1)

    async def scenario() -> None:
        slots = Slots(instance, 1, os.geteuid())
        leaves = []
        for _ in range(2 * BACKLOG):
            slot = slots.take()
            leaf = slot.leaf
            leaves.append(leaf)
            monkeypatch.setattr(leaf, "reusable", lambda: False)
            monkeypatch.setattr(leaf, "reclaim_names", reclaim)
            slots.give_back(slot)
        assert sum(exists(instance, leaf) for leaf in leaves) == BACKLOG + 1  # and the one that the thread is at
        held.set()
        await until(lambda: not any(exists(instance, leaf) for leaf in leaves))
        assert len(reclaimed) == BACKLOG + 1
        slots.close()

    asyncio.run(scenario())


@needs_instance
def test_closing_waits_for_the_leaf_that_the_thread_is_at(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    at_it, reclaimed = threading.Event(), list[int]()

    def reclaim() -> None:
        at_it.set()
        time.sleep(0.1)
        reclaimed.append(1)

    async def scenario() -> None:
        slots = Slots(instance, 2, os.geteuid())
        taken = [slots.take(), slots.take()]
        leaves = [slot.leaf for slot in taken]
        for leaf in leaves:
            monkeypatch.setattr(leaf, "reusable", lambda: False)
            monkeypatch.setattr(leaf, "reclaim_names", reclaim)
        for slot in taken:
            slots.give_back(slot)
        assert at_it.wait(10)
        slots.close()
        assert len(reclaimed) == 2
        assert not any(exists(instance, leaf) for leaf in leaves)

    asyncio.run(scenario())


@needs_instance
def test_an_abandoned_slot_is_free_again_when_its_leaf_is_empty(instance: Instance) -> None:
    async def scenario() -> None:
        slots = Slots(instance, 2, os.geteuid())
        slot, other = slots.take(), slots.take()
        leaf = slot.leaf
        process = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"])
        assert isinstance(leaf, Leaf)
        leaf.attach(process.pid)
        slots.abandon(slot)
        await asyncio.sleep(0.2)
        assert slots.free == 0
        assert exists(instance, leaf)
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        await asyncio.sleep(0.2)
        assert slots.free == 0, "given back while a zombie of it was there"
        process.wait(10)
        await until(lambda: slots.free == 1)
        assert not exists(instance, leaf)
        slots.give_back(other)
        assert slots.take() is other, "the slot that was lost is the last to be used"
        assert slots.take() is slot
        assert slot.leaf is not leaf
        slots.close()

    asyncio.run(scenario())


def test_an_abandoned_slot_without_cgroups_stays_lost() -> None:
    async def scenario() -> None:
        with NoInstance(Unavailable("cgroup", "none in this test", fix="")) as without:
            slots = Slots(without, 2, os.geteuid())
            slots.abandon(slots.take())
            await asyncio.sleep(0.2)
            assert slots.free == 1
            slots.give_back(slots.take())
            assert slots.free == 1
            slots.close()

    asyncio.run(scenario())
