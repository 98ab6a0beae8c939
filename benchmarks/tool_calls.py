"""What does a tool call from code cost: one after the other, and side by side from threads and from tasks?

    python benchmarks/tool_calls.py [--json] [--calls N] [--rounds R]

A tool that does nothing, through the whole pipeline of a dispatcher, from one run; embedded and through the daemon's
socket, in turn. Beside it the floor: a packet to a process and back over a socket pair, in Python on both sides.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import common

from sandboxd import Limits, Sandbox, policy
from sandboxd.bench.daemon import served
from sandboxd.bench.stats import Failed, Series
from sandboxd.tools import Budget, Dispatcher, tool

if TYPE_CHECKING:
    from collections.abc import Iterator

ONE_BY_ONE = """
import json, time
tools.nothing(0)
samples = []
for n in range({calls}):
    begun = time.perf_counter()
    tools.nothing(n)
    samples.append(time.perf_counter() - begun)
print(json.dumps(samples))
"""
THREADS = """
import json, time
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor({at_once}) as pool:
    list(pool.map(tools.nothing, range(100)))
    begun = time.perf_counter()
    list(pool.map(tools.nothing, range({calls})))
    print(json.dumps([time.perf_counter() - begun]))
"""
TASKS = """
import asyncio, json, time
async def main():
    async def some(count):
        for n in range(count):
            await tools.aio.nothing(n)
    begun = time.perf_counter()
    await asyncio.gather(*(some({calls} // {at_once}) for _ in range({at_once})))
    print(json.dumps([time.perf_counter() - begun]))
asyncio.run(main())
"""
AT_ONCE = 16


@tool
def nothing(n: int) -> int:
    """Gives back what it gets."""
    return n


def measured(dispatcher: Dispatcher, program: str, calls: int) -> list[float]:
    """What *program* printed. Raises Failed."""
    result = dispatcher.call("run_code", {"code": program.format(calls=calls, at_once=AT_ONCE)})
    if not result.ok:
        raise Failed(str(result.error))
    run = dispatcher.result(result.value["id"])
    if run.status != "ok":
        raise Failed(f"{run.status}: {run.stderr[-500:]}")
    samples: list[float] = json.loads(run.stdout)
    return samples


def echoes(calls: int) -> Iterator[float]:
    """Round trips of a small packet to a process that sends it back."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        pid = os.fork()
        if pid == 0:
            ours.close()
            while data := theirs.recv(4096):
                theirs.send(data)
            os._exit(0)
        theirs.close()
        for _ in range(calls):
            begun = time.perf_counter()
            ours.send(b"x" * 64)
            ours.recv(4096)
            yield time.perf_counter() - begun
        ours.close()
        os.waitpid(pid, 0)


def main() -> None:
    """Measure, then print."""
    parser = common.parser(__doc__)
    parser.add_argument("--calls", type=int, default=3000, metavar="N", help="calls of each run (default 3000)")
    parser.add_argument("--rounds", type=int, default=5, metavar="R", help="runs of each kind (default 5)")
    options = parser.parse_args()
    record = common.Record(options)
    chosen = policy.load("default")
    floor = Series()
    one: dict[str, Series] = {}
    rates: dict[str, list[float]] = {}
    with ExitStack() as undo:
        embedded = undo.enter_context(Sandbox(chosen, limits=Limits(wall_seconds=60)))
        record.ran(chosen, embedded)
        daemon = undo.enter_context(undo.enter_context(served("default")).connect())
        budget = Budget(calls_per_run=10 * options.calls)
        ways = {
            "embedded": undo.enter_context(Dispatcher([nothing], sandbox=embedded, budget=budget)),
            "daemon": undo.enter_context(Dispatcher([nothing], sandbox=daemon, budget=budget)),
        }
        for _ in range(options.rounds):
            for sample in echoes(options.calls):
                floor.samples.append(sample)
            for name, dispatcher in ways.items():
                for sample in measured(dispatcher, ONE_BY_ONE, options.calls):
                    one.setdefault(name, Series()).samples.append(sample)
                for kind, program in (("threads", THREADS), ("tasks", TASKS)):
                    (seconds,) = measured(dispatcher, program, options.calls)
                    rates.setdefault(f"{name}, {AT_ONCE} {kind}", []).append(options.calls / seconds)
    record.series("a packet to a process and back", floor)
    for name, series in one.items():
        record.series(f"{name}: a call, one after the other", series)
        record.figure(f"{name}: calls per second, one after the other", 1 / series.p(0.5), "calls/s")
    for name, found in rates.items():
        record.figure(f"{name}: calls per second", sorted(found)[len(found) // 2], "calls/s")
    best = max(sorted(found)[len(found) // 2] for name, found in rates.items() if name.startswith("embedded"))
    record.target("a tool call from code, p50", one["embedded"].p(0.5) * 1e6, "most", 300, "us")
    record.target("calls per second of one run", best, "least", 5000, "calls/s")
    record.done()


if __name__ == "__main__":
    main()
