"""What does a user wait for? The command, the start of an engine, a run through the API, its end; and the memory held.

    python benchmarks/command_and_api.py [--json] [--profile] [--commands N] [--runs N] [--policies default,data]

Every sample is a wall-clock time seen by the caller, after a warm-up that is not counted. ``--profile`` adds where the
time of a run goes (Result.timings and usage, medians). Raw samples, host and load stand in the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import common

from sandboxd import Result, Sandbox
from sandboxd.bench import facts
from sandboxd.bench.stats import percentile

if TYPE_CHECKING:
    from collections.abc import Callable


def milliseconds(action: Callable[[], object]) -> float:
    """How long *action* takes."""
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3


def command(arguments: list[str], count: int) -> list[float]:
    """Wall times of whole processes, exec to exit, output discarded. Raises CalledProcessError."""

    def run() -> None:
        subprocess.run(arguments, stdout=subprocess.DEVNULL, check=True)

    run()
    return [milliseconds(run) for _ in range(count)]


def memory(engine: int) -> dict[str, float]:
    """PSS and USS of *engine* and all below it (nursery, zygote), together, in MiB. Source: /proc/PID/smaps_rollup."""
    # None: a zombie, the init of the last cell, which the nursery is about to reap.
    found = [sizes for process in common.processes(engine) if (sizes := common.rollup(process.pid)) is not None]
    uss, pss = (sum(sizes) / (1 << 20) for sizes in zip(*found, strict=True))
    return {"pss_mib": round(pss, 1), "uss_mib": round(uss, 1)}


def checked(result: Result, value: str) -> Result:
    """*result*, when it ended well with *value*: a failure that returns at once is no fast run. Raises RuntimeError."""
    if result.status != "ok" or result.results[0].mime["text/plain"] != value:
        raise RuntimeError(f"unexpected outcome: {result!r}, {result.results!r}")
    return result


def policy(name: str, starts: int, runs: int) -> dict[str, Any]:
    """Start, run and close under the policy *name*."""
    start: list[float] = []
    close: list[float] = []
    warm: list[float] = []
    kept: list[Result] = []
    held: dict[str, float] = {}
    for number in range(starts + 1):
        begun = time.perf_counter()
        sandbox = Sandbox(policy=name)
        started = (time.perf_counter() - begun) * 1e3
        try:
            if number == starts:
                checked(sandbox.run("1+1"), "2")
                for _ in range(20):
                    sandbox.run("1+1")
                for _ in range(runs):
                    begun = time.perf_counter()
                    result = sandbox.run("1+1")
                    warm.append((time.perf_counter() - begun) * 1e3)
                    kept.append(checked(result, "2"))
                held = memory(common.engine_pid(sandbox))
        finally:
            ended = milliseconds(sandbox.close)
        if number:  # the first warms the host's caches
            start.append(started)
            close.append(ended)
    return {
        "start_ms": start,
        "run_ms": warm,
        "close_ms": close,
        "memory": held,
        "profile_ms": {
            "queued": statistics.median(one.timings.queued_seconds for one in kept) * 1e3,
            "setup (slot, init, fork, walls)": statistics.median(one.timings.setup_seconds for one in kept) * 1e3,
            "run (program to its end)": statistics.median(one.timings.run_seconds for one in kept) * 1e3,
            "the rest (kill, reap, collect, channel)": statistics.median(
                whole - (one.timings.queued_seconds + one.timings.setup_seconds + one.timings.run_seconds) * 1e3
                for whole, one in zip(warm, kept, strict=True)
            ),
            "CPU time of the cell": statistics.median(
                one.usage.cpu_user_seconds + one.usage.cpu_system_seconds for one in kept
            )
            * 1e3,
        },
    }


def row(what: str, samples: list[float]) -> str:
    """One line of the table."""
    p50, p99 = percentile(samples, 0.50), percentile(samples, 0.99)
    return f"{what:<48} {len(samples):>5} {min(samples):>10.2f} {p50:>10.2f} {p99:>10.2f}"


def main() -> None:
    """Measure, then print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object, raw samples included")
    parser.add_argument("--profile", action="store_true", help="also print where the time of a run goes")
    parser.add_argument("--commands", type=int, default=15, metavar="N", help="whole commands (default 15)")
    parser.add_argument("--starts", type=int, default=5, metavar="N", help="engine starts for each policy (default 5)")
    parser.add_argument("--runs", type=int, default=300, metavar="N", help="warm runs for each policy (default 300)")
    parser.add_argument("--policies", default="default,data", metavar="A,B", help="policies (default default,data)")
    chosen = parser.parse_args()

    about = facts.host()
    sandboxd = [sys.executable, "-m", "sandboxd", "run", "-c", "print(1)"]
    commands = command(sandboxd, chosen.commands)
    bare = command([sys.executable, "-c", "print(1)"], chosen.commands)
    found = {name: policy(name, chosen.starts, chosen.runs) for name in chosen.policies.split(",")}
    about["load_1min_after"] = os.getloadavg()[0]
    if chosen.json:
        print(json.dumps({"host": about, "command_ms": commands, "bare_python_ms": bare, "policies": found}))
        return
    print(
        f"{about['cpu']}, {about['cpus']} CPUs, Linux {about['kernel']}, Python {about['python']}, "
        f"load {about['load_1min']:.1f} before, {about['load_1min_after']:.1f} after"
    )
    print(f"{'':<48} {'n':>5} {'least ms':>10} {'p50 ms':>10} {'p99 ms':>10}")
    print(row("command: sandboxd run -c 'print(1)'", commands))
    print(row("for comparison: python -c 'print(1)', no sandbox", bare))
    for name, one in found.items():
        print(row(f"{name}: Sandbox()", one["start_ms"]))
        print(row(f"{name}: run('1+1'), warm", one["run_ms"]))
        print(row(f"{name}: close()", one["close_ms"]))
        print(
            f"{name + ': engine, nursery and zygote together':<48}       "
            f"{one['memory']['pss_mib']:>6.1f} MiB PSS, {one['memory']['uss_mib']:.1f} MiB USS"
        )
        if chosen.profile:
            for part, value in one["profile_ms"].items():
                print(f"    {part:<44}                  {value:>10.2f}")


if __name__ == "__main__":
    main()
