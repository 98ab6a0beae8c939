"""What ``sandboxd bench`` does: a policy's runs, the floors and the peers, in the same minutes; then throughput."""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sandboxd import Sandbox, policy
from sandboxd.bench import facts
from sandboxd.bench.commands import time_command
from sandboxd.bench.contest import PAUSE_SECONDS, Contestant, alternate
from sandboxd.bench.daemon import served
from sandboxd.bench.load import check, closed_loop
from sandboxd.bench.peers import EXPECTED, Peers, Task
from sandboxd.bench.stats import Failed
from sandboxd.bench.warm import WarmProcess, forking_loops, plain_environment
from sandboxd.errors import SandboxError
from sandboxd.rootfs.interpreter import Interpreter

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd import Policy, Result

__all__ = ["CLIENTS", "SCHEMA", "Settings", "measure", "task_of"]

SCHEMA: Final = 1
CLIENTS: Final = 8
WARMUP_RUNS: Final = 20
LATENCY_SHARE: Final = 0.7


@dataclass(frozen=True)
class Settings:
    """What a person asked for. *seconds* are measured ones; starts and first tries come on top."""

    policy: str = "default"
    seconds: float = 20.0
    quick: bool = False
    peers: bool = True


class Runs:
    """Runs of ``1+1`` on one handle, checked; it keeps a receipt, and counts those that a waiting cell served."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self.kept: Result | None = None
        self.warm = 0

    def __call__(self) -> float:
        """Seconds from the call to the complete Result. Raises Failed, SandboxError."""
        begun = time.perf_counter()
        result = self._sandbox.run("1+1")
        took = time.perf_counter() - begun
        check(result, "2")
        self.warm += result.warm
        self.kept = result
        return took

    def settle(self, count: int) -> None:
        """Some that are not counted. Raises Failed, SandboxError."""
        for _ in range(count):
            self()
        self.warm = 0


def task_of(chosen: Policy, scratch: str) -> Task:
    """The peers' task under the interpreter that *chosen* names. Raises Unavailable."""
    named = chosen.runtime.interpreter
    python = Interpreter.probe(named) if named else Interpreter.current()
    trees = tuple(dict.fromkeys((python.prefix, python.base_prefix)))
    return Task(python.executable, trees, plain_environment(scratch), scratch, chosen.runtime.preload)


def measure(settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything, as plain values with raw samples. *say* gets a line now and then. Raises SandboxError, Failed."""
    import tempfile

    chosen = policy.load(settings.policy)
    before = facts.host()
    with contextlib.ExitStack() as undo:
        scratch = undo.enter_context(tempfile.TemporaryDirectory(prefix="sandboxd-bench-"))
        task = task_of(chosen, scratch)
        say(f"starting an engine with the policy {chosen.name}, and the floor's interpreter")
        ours = Runs(undo.enter_context(Sandbox(chosen)))
        ours.settle(5 if settings.quick else WARMUP_RUNS)
        runtime = chosen.runtime
        warm = [
            undo.enter_context(WarmProcess(runtime.preload, runtime.warmup, task.python))
            for _ in range(1 if settings.quick else facts.cpus())
        ]
        plain = _plain(task)
        for row in plain:
            row.sample()  # not counted: files come into the page cache, libraries write theirs
        rows = [
            Contestant(
                "sandboxd", "sandboxd, embedded: run('1+1')", "sandboxd", ours, "all walls of the policy", True, 4.0
            ),
            *_floors(warm[0], task),
            *plain,
        ]
        absent: list[dict[str, str]] = []
        if not settings.quick:
            try:
                daemon = undo.enter_context(served(settings.policy))
                through = Runs(undo.enter_context(daemon.connect()))
                through.settle(WARMUP_RUNS)
            except (SandboxError, Failed) as error:
                absent.append({"key": "sandboxd-daemon", "why": str(error)})
            else:
                what = "sandboxd, daemon's socket: run('1+1')"
                rows.insert(
                    1, Contestant("sandboxd-daemon", what, "sandboxd", through, "all walls of the policy", True, 3.0)
                )
        if settings.peers:
            say("trying each peer once")
            peers = undo.enter_context(Peers(task))
            rows += peers.find()
            absent += peers.absent
        latency_seconds = settings.seconds * LATENCY_SHARE
        say(f"measuring {len(rows)} rows in turn for {latency_seconds:.0f} s")
        alternate(rows, latency_seconds)
        say("closed loops")
        # Before the closed loops, whose runs are another matter.
        served_warm = {row.key: row.sample.warm for row in rows if isinstance(row.sample, Runs)}
        throughput = _throughput(ours, warm, settings.seconds - latency_seconds)
    isolation = ours.kept.isolation.model_dump() if ours.kept is not None and ours.kept.isolation is not None else None
    return {
        "schema": SCHEMA,
        "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": {**before, "load_1min_after": round(os.getloadavg()[0], 2)},
        "policy": {
            "name": chosen.name,
            "sha256": chosen.sha256,
            "preload": list(chosen.runtime.preload),
            "interpreter": task.python,
        },
        "isolation": isolation,
        "settings": {
            "seconds": settings.seconds,
            "quick": settings.quick,
            "pause_ms": [pause * 1e3 for pause in PAUSE_SECONDS],
        },
        "rows": [{**row.plain(), **({"warm": served_warm[row.key]} if row.key in served_warm else {})} for row in rows],
        "absent": absent,
        "throughput": throughput,
    }


def _floors(warm: WarmProcess, task: Task) -> list[Contestant]:
    true = next((path for path in ("/usr/bin/true", "/bin/true") if os.access(path, os.X_OK)), None)
    rows = [
        Contestant(
            "fork", "os.fork + _exit + wait, same warm interpreter", "floor", warm.fork, "no isolation", True, 2.0
        ),
        Contestant("round-trip", "socket round trip to a process that waits", "floor", warm.ping, "no process", True),
    ]
    if true is not None:
        rows.append(
            Contestant(
                "spawn",
                "posix_spawn + wait of /bin/true",
                "floor",
                lambda: time_command([true], task.environment, ""),
                "no isolation",
            )
        )
    return rows


def _plain(task: Task) -> list[Contestant]:
    bare = [task.python, "-I", "-c", "pass"]
    rows = [
        Contestant(
            "python-pass",
            "python -c pass",
            "plain",
            lambda: time_command(bare, task.environment, ""),
            "no isolation",
        )
    ]
    more = ", …" if len(task.preload) > 1 else ""
    what = f"python -c 'import {task.preload[0]}{more}'" if task.preload else "python -c 'print(1 + 1)'"
    rows.append(
        Contestant(
            "python",
            what,
            "plain",
            lambda: time_command(task.command, task.environment, EXPECTED),
            "no isolation",
        )
    )
    return rows


def _throughput(ours: Runs, warm: list[WarmProcess], seconds: float) -> list[dict[str, Any]]:
    """Closed loops of ours and of the naive floor, in turn, twice each."""

    def once() -> None:
        ours()

    part = max(0.2, seconds / 4)
    loads = []
    floors = []
    for _ in range(2):
        loads.append(closed_loop(once, CLIENTS, part))
        floors.append(forking_loops(warm, part))
    total = loads[0]
    total.series.samples += loads[1].series.samples
    total.series.failures += loads[1].series.failures
    total.seconds += loads[1].seconds
    return [
        {"key": "sandboxd", "what": f"sandboxd, embedded: {CLIENTS} clients, closed loop", **total.plain()},
        {
            "key": "fork",
            "what": f"os.fork + _exit + wait, {len(warm)} loops at once",
            "clients": len(warm),
            "seconds": round(2 * part, 3),
            "per_second": round(sum(floors) / 2, 1),
        },
    ]
