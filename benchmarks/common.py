"""What the benchmarks share: options, images, floors, targets, the engine's own CPU time, how figures are printed."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from sandboxd import Policy, policy
from sandboxd.bench import facts
from sandboxd.bench.load import check
from sandboxd.bench.report import shown
from sandboxd.bench.stats import Failed, Series
from sandboxd.bench.warm import WarmProcess
from sandboxd.policy import Runtime

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import ExitStack

    from sandboxd import Sandbox

IMAGES = ("bare", "numpy+pandas", "data")


def image(name: str) -> Policy:
    """The policy of one of IMAGES: `default`, `default` with two libraries preloaded, `data` with its warm-up; or any
    other policy by its name or file.
    """
    if name == "bare":
        return policy.load("default")
    if name == "numpy+pandas":
        return preloading("numpy", "pandas")
    return policy.load(name)


def preloading(*modules: str) -> Policy:
    """`default`, with *modules* imported by the zygote and no warm-up."""
    return Policy(name="-".join(["preload", *modules]).replace(".", "_").lower(), runtime=Runtime(preload=modules))


def floor(chosen: Policy, undo: ExitStack, count: int = 1) -> list[WarmProcess]:
    """*count* interpreters warmed as *chosen* says, which only fork; *undo* ends them. Raises Failed."""
    runtime = chosen.runtime
    return [undo.enter_context(WarmProcess(runtime.preload, runtime.warmup, runtime.interpreter)) for _ in range(count)]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", action="store_true", help="print one JSON object, raw samples included")
    return made


def receipt(sandbox: Sandbox) -> dict[str, Any]:
    """The isolation of a run of *sandbox*, as the Result states it. Raises Failed."""
    result = sandbox.run("1+1")
    check(result, "2")
    assert result.isolation is not None
    return result.isolation.model_dump()


def engine_pid(sandbox: Sandbox) -> int:
    """The process of an embedded engine."""
    assert sandbox._handle.engine is not None
    return sandbox._handle.engine.pid


class Record:
    """One benchmark's output: host before and after, figures, targets; printed once, as a table or as JSON."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._json: bool = options.json
        self.plain: dict[str, Any] = {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "host": facts.host(),
            "policies": {},
            "isolation": {},
            "figures": {},
            "targets": [],
        }
        self._lines: list[tuple[str, ...]] = []

    def ran(self, chosen: Policy, sandbox: Sandbox) -> None:
        """Keep what stood around the runs of *sandbox*."""
        self.plain["policies"][chosen.name] = chosen.sha256
        self.plain["isolation"][chosen.name] = receipt(sandbox)

    def series(self, what: str, series: Series, warm: int | None = None) -> None:
        """A row of latencies; *warm*: how many of them a waiting cell served."""
        self.plain["figures"][what] = {**series.plain(), **({} if warm is None else {"warm": warm})}
        p50, p95, p99 = (shown(series.p(share) * 1e3) if series.samples else "-" for share in (0.50, 0.95, 0.99))
        note = "" if warm is None else f"{warm} warm"
        self._lines.append((what, f"{p50} ms", f"p95 {p95}", f"p99 {p99}", f"n {len(series.samples)}", note))
        for reason, count in series.failures.items():
            self._lines.append(("", f"{count} FAILED", reason[:100]))

    def figure(self, what: str, value: float, unit: str, **more: Any) -> None:
        """A row of one figure."""
        self.plain["figures"][what] = {"value": _number(value), "unit": unit, **more}
        self._lines.append((what, f"{value:,.4g} {unit}" if abs(value) < 1000 else f"{value:,.0f} {unit}"))

    def note(self, words: str) -> None:
        """A sentence that belongs to the figures."""
        self.plain.setdefault("notes", []).append(words)
        self._lines.append((words,))

    def target(self, what: str, value: float, at: str, limit: float, unit: str) -> None:
        """Compare *value* with the target, *at* "most" or "least" *limit*."""
        met = value <= limit if at == "most" else value >= limit  # NaN, of no samples, meets nothing
        self.plain["targets"].append(
            {"what": what, "value": _number(value), "unit": unit, "at": at, "limit": limit, "met": bool(met)}
        )
        verdict = "met" if met else "MISSED"
        self._lines.append((f"target: {what}", f"{value:,.4g} {unit}", f"at {at} {limit:,g}", verdict))

    def done(self) -> None:
        """Print it."""
        self.plain["host"]["load_1min_after"] = round(os.getloadavg()[0], 2)
        if self._json:
            print(json.dumps(self.plain, allow_nan=False))
            return
        host = self.plain["host"]
        print(
            f"{host['cpu']}, {host['cpus']} CPUs, Linux {host['kernel']}, Python {host['python']}, "
            f"load {host['load_1min']:.1f} before, {host['load_1min_after']:.1f} after"
        )
        width = max((len(line[0]) for line in self._lines if len(line) > 1), default=0)
        for line in self._lines:
            rest = "".join(f"{cell:>16}" if len(cell) < 16 else f"  {cell}" for cell in line[1:])
            print(f"{line[0]:<{width}}{rest}".rstrip())


def _number(value: float) -> float | None:
    """*value* as JSON has it."""
    return value if math.isfinite(value) else None


class Checked:
    """Runs of one program on one handle, each with the right value; counts those that a waiting cell served."""

    def __init__(self, sandbox: Sandbox, code: str = "1+1", value: str = "2") -> None:
        self._sandbox, self._code, self._value = sandbox, code, value
        self.warm = 0

    def __call__(self) -> float:
        """Seconds from the call to the complete Result. Raises Failed, SandboxError."""
        begun = time.perf_counter()
        result = self._sandbox.run(self._code)
        took = time.perf_counter() - begun
        check(result, self._value)
        self.warm += result.warm
        return took

    def settle(self, count: int = 20) -> Checked:
        """Some that are not counted."""
        for _ in range(count):
            self()
        self.warm = 0
        return self


def processes(engine: int) -> list[psutil.Process]:
    """*engine* and all below it."""
    top = psutil.Process(engine)
    return [top, *top.children(recursive=True)]


def cgroups(engine: int) -> list[Path]:
    """The directories of *engine*, one for each hierarchy."""
    roots = [Path(mount.mountpoint) for mount in psutil.disk_partitions(all=True) if mount.fstype.startswith("cgroup")]
    return [found for root in roots for found in root.rglob(f"sandboxd.{engine}.*") if found.is_dir()]


def cpu_seconds(engine: int) -> float:
    """CPU time of *engine*, nursery, zygotes and all cells since its start.

    From cpuacct.usage or cpu.stat of its cgroup, which keeps what removed leaves used, plus the times of those of its
    processes that live outside of it. Raises Failed when there is no such file.
    """
    for directory in cgroups(engine):
        usage, stat = directory / "cpuacct.usage", directory / "cpu.stat"
        if usage.exists():
            inside, kind = int(usage.read_text()) / 1e9, "cpuacct"
        elif stat.exists() and "usage_usec" in (text := stat.read_text()):
            inside, kind = int(text.split("usage_usec", 1)[1].split()[0]) / 1e6, ""
        else:
            continue
        for process in processes(engine):
            try:
                membership = Path(f"/proc/{process.pid}/cgroup").read_text(encoding="ascii")
                lines = [line.split(":", 2) for line in membership.splitlines()]
                own = next(path for _, controllers, path in lines if kind in controllers.split(","))
                if directory.name not in own:
                    spent = process.cpu_times()
                    inside += spent.user + spent.system
            except (OSError, StopIteration, psutil.NoSuchProcess):
                continue
        return inside
    raise Failed("no cgroup of the engine tells its CPU time")


def own_cpu_seconds() -> float:
    """CPU time of this process."""
    spent = psutil.Process().cpu_times()
    return spent.user + spent.system


def rollup(pid: int) -> tuple[int, int] | None:
    """(USS, PSS) of *pid* in bytes; None when it is gone. Source: /proc/PID/smaps_rollup."""
    try:
        return facts.uss_bytes(Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii"))
    except (FileNotFoundError, ProcessLookupError):
        return None


def pairs(text: str) -> Iterator[str]:
    """The parts of a list on the command line."""
    return (part for part in text.split(",") if part)


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean. Raises ZeroDivisionError."""
    return sum(values) / len(values)
