"""A thousand runs of every kind, and then everything as before: nothing is left, and nothing has grown."""

from __future__ import annotations

import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pytest

from sandboxd import Limits, Result, Sandbox
from tests.support import leftovers
from tests.support.engine import pid_of

if TYPE_CHECKING:
    from collections.abc import Callable

RUNS: Final = 1000
AT_ONCE: Final = 4
GROWTH_BYTES: Final = 1 << 20
"""What an engine, or a zygote, may grow by in RUNS runs once it is warm: a kilobyte for each would show."""

HELD_INPUTS: Final = 0
"""Requests in memfds whose pages live until the engine's next full garbage collection."""


def ok(sandbox: Sandbox) -> Result:
    return sandbox.run("print(6 * 7)")


def failing(sandbox: Sandbox) -> Result:
    return sandbox.run("def f():\n    raise ValueError('x' * 1000)\nf()")


def slow(sandbox: Sandbox) -> Result:
    return sandbox.run("while True: pass", limits=Limits(wall_seconds=0.05))


def greedy(sandbox: Sandbox) -> Result:
    return sandbox.run("x = bytearray(64 << 20)", limits=Limits(memory_bytes=16 << 20))


def writing(sandbox: Sandbox) -> Result:
    code = "import os\nopen('in.txt').read()\nfor n in range(5):\n    open(f'out{n}', 'wb').write(os.urandom(4096))"
    return sandbox.run(code, files={"in.txt": "x" * 10_000})


def reaper(sandbox: Sandbox) -> Result:
    return sandbox.run("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")


def forking(sandbox: Sandbox) -> Result:
    return sandbox.run("import os, time\nfor _ in range(3):\n    os.fork() or time.sleep(60)\nprint('done')")


def chatting(sandbox: Sandbox) -> Result:
    chunks: list[str] = []
    result = sandbox.run("print('y' * 100_000)", stdin=b"z" * 100_000, on_stdout=chunks.append)
    assert len("".join(chunks)) == 100_001
    return result


KINDS: Final[list[tuple[Callable[[Sandbox], Result], str]]] = [
    (ok, "ok"),
    (failing, "error"),
    (ok, "ok"),
    (slow, "timeout"),
    (greedy, "memory"),
    (writing, "ok"),
    (reaper, "killed"),
    (forking, "ok"),
    (ok, "ok"),
    (chatting, "ok"),
]


def make_runs(sandbox: Sandbox, count: int) -> None:
    """*count* runs, every kind in turn, some at once, each ending as it must."""

    def one(index: int) -> str | None:
        kind, status = KINDS[index % len(KINDS)]
        with kind(sandbox) as result:
            return None if result.status == status else f"run {index}, {kind.__name__}: {result.status}"

    with ThreadPoolExecutor(AT_ONCE) as pool:
        wrong = [text for text in pool.map(one, range(count)) if text is not None]
    assert not wrong, wrong


@dataclass(frozen=True)
class Open:
    """The descriptors of a process: how many of each kind, how many for each leaf, how many hold inputs."""

    kinds: dict[str, int]
    for_a_leaf: float
    inputs: int


def opened(pid: int) -> Open:
    """What *pid* has open, without the numbers that differ from run to run."""
    kinds: dict[str, int] = {}
    leaves: set[str] = set()
    for_leaves = inputs = 0
    for link in leftovers.fds(pid).values():
        if found := re.search(r"/(c\d+\.\d+)(?:/|$)", link):
            leaves.add(found[1])
            for_leaves += 1
        elif link == "anon_inode:[eventfd]":
            for_leaves += 1  # the notice of a leaf's OOM
        elif link.startswith("/memfd:"):
            inputs += 1
        elif re.match(r"net:|/proc/\d+/net/sockstat", link):
            continue  # of a slot that was used; as many as there are slots
        else:
            kind = re.sub(r"\d+", "N", link)
            kinds[kind] = kinds.get(kind, 0) + 1
    return Open(kinds, for_leaves / max(1, len(leaves)), inputs)


@pytest.mark.parametrize("policy", ["default"])
def test_a_thousand_runs_leave_nothing_and_grow_nothing(policy: str) -> None:
    outside = leftovers.snapshot()
    with Sandbox(policy, max_running=AT_ONCE, pool=leftovers.UNPARKED) as sandbox:
        engine = pid_of(sandbox)
        # As many slots, connections and threads as there will be, and the allocators' pools filled.
        make_runs(sandbox, 20 * len(KINDS))
        nursery, zygote = (one.pid for one in leftovers.descendants(engine))
        pids = [engine, nursery, zygote]
        leftovers.eventually(lambda: len(leftovers.descendants(engine)) == 2, 2, "only nursery and zygote")
        before, threads = leftovers.snapshot(), threading.active_count()
        fds = [opened(pid) for pid in pids]
        sizes = [leftovers.rss_bytes(pid) for pid in pids]

        make_runs(sandbox, RUNS)

        assert [one.pid for one in leftovers.descendants(engine)] == [nursery, zygote], "the zygote was made anew"
        for pid, had in zip(pids, fds, strict=True):
            leftovers.eventually(lambda: opened(pid).kinds == had.kinds, 5, f"{had.kinds}; now {opened(pid).kinds}")  # noqa: B023
            assert opened(pid).for_a_leaf in (had.for_a_leaf, 0.0)
            assert opened(pid).inputs <= HELD_INPUTS
        # A leaf that is not as new is taken away in the background, and its slot gets another.
        most = len(before.cgroups) + AT_ONCE * 4  # hierarchies
        leftovers.eventually(lambda: len(leftovers.snapshot().cgroups) <= most, 5, "the leaves of dead cells are gone")
        after = leftovers.snapshot()
        assert after.mounts == before.mounts
        assert after.processes == before.processes
        assert not after.zombies
        # The network namespaces of slots that were first used in between; cells have none that outlives them.
        assert len(after.namespaces) <= len(before.namespaces) + AT_ONCE
        assert after.fds == before.fds
        assert after.shm == before.shm
        assert threading.active_count() == threads
        for _ in range(5):
            grown = [leftovers.rss_bytes(pid) - size for pid, size in zip(pids, sizes, strict=True)]
            if max(grown) < GROWTH_BYTES:
                break
            make_runs(sandbox, 5 * len(KINDS))  # garbage waits for the next collection; a leak only grows
        assert max(grown) < GROWTH_BYTES, f"engine, nursery and zygote grew by {grown} bytes"
    leftovers.assert_nothing_new(outside)
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
