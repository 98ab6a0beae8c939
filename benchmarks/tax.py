"""How much CPU time does isolation cost: a whole run under load, less a fork of the same warmed interpreter?

    python benchmarks/tax.py [--json] [--seconds S] [--windows N] [--images bare,data]

Closed loops of 8 clients and of one fork loop for each CPU take turns. The busy time of the whole machine (/proc/stat)
in a window, less what the machine does when left alone, is divided by the runs of the window. When others use the
machine meanwhile that figure is theirs too: then cpu.stat of the engine's cgroups with this process's own CPU time,
and for the floor the times of its processes and their children, are what counts. The output says which was taken.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import common

from sandboxd import Sandbox
from sandboxd.bench import facts
from sandboxd.bench.load import closed_loop
from sandboxd.bench.warm import WarmProcess, forking_loops

QUIET_SHARE = 0.02
"""Of all CPUs, busy without us: more than that and /proc/stat is not believed."""
IDLE_SECONDS = 1.0


@dataclass
class Window:
    """One window: runs, and the CPU seconds of the machine and of those concerned."""

    runs: float
    machine: float
    own: float

    def each(self, quiet: bool) -> float:
        """CPU seconds of one run."""
        return (self.machine if quiet else self.own) / self.runs


def left_alone() -> float:
    """CPU seconds that the machine uses in a second without us."""
    before = facts.busy()
    time.sleep(IDLE_SECONDS)
    return facts.busy().since(before).busy_seconds / IDLE_SECONDS


def of_sandbox(sandbox: Sandbox, run: common.Checked, seconds: float, alone: float) -> Window:
    """A window of ours; until the teardown of its last run is over."""
    engine = common.engine_pid(sandbox)

    def once() -> None:
        run()

    machine, cells, client = facts.busy(), common.cpu_seconds(engine), common.own_cpu_seconds()
    begun = time.perf_counter()
    load = closed_loop(once, 8, seconds)
    time.sleep(0.2)
    took = time.perf_counter() - begun
    spent = facts.busy().since(machine).busy_seconds
    own = common.cpu_seconds(engine) - cells + common.own_cpu_seconds() - client
    if load.series.failed:
        raise SystemExit(f"runs failed: {dict(load.series.failures)}")
    return Window(len(load.series.samples), spent - alone * took, own)


def of_floor(warm: list[WarmProcess], seconds: float, alone: float) -> Window:
    """A window of the fork loops."""

    def spent_by() -> float:
        total = 0.0
        for process in warm:
            fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
            total += sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime: proc_pid_stat(5)
        return total / os.sysconf("SC_CLK_TCK")

    machine, own = facts.busy(), spent_by()
    begun = time.perf_counter()
    rate = forking_loops(warm, seconds)
    took = time.perf_counter() - begun
    return Window(rate * seconds, facts.busy().since(machine).busy_seconds - alone * took, spent_by() - own)


def main() -> None:
    """Measure, then print."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--seconds", type=float, default=24, metavar="S", help="closed loop for each image (default 24)"
    )
    parser.add_argument("--windows", type=int, default=6, metavar="N", help="of ours and the floor in turn (default 6)")
    parser.add_argument("--images", default="bare,data", metavar="A,B", help="what is measured (default bare,data)")
    options = parser.parse_args()
    record = common.Record(options)
    part = options.seconds / options.windows
    for name in common.pairs(options.images):
        chosen = common.image(name)
        ours: list[Window] = []
        floors: list[Window] = []
        alone: list[float] = []
        with contextlib.ExitStack() as undo:
            sandbox = undo.enter_context(Sandbox(chosen))
            record.ran(chosen, sandbox)
            warm = common.floor(chosen, undo, facts.cpus())
            run = common.Checked(sandbox).settle(200)
            for _ in range(options.windows):
                time.sleep(0.5)
                alone.append(left_alone())
                ours.append(of_sandbox(sandbox, run, part, alone[-1]))
                time.sleep(0.5)
                floors.append(of_floor(warm, part, alone[-1]))
        quiet = max(alone) / facts.cpus() <= QUIET_SHARE
        source = "/proc/stat" if quiet else "cpu.stat of the engine's cgroups and the client's own times"
        words = "" if quiet else f": others used {max(alone) / facts.cpus():.0%} of the CPUs"
        record.note(f"{name}: CPU time from {source}{words}")
        for what, windows in (("a whole run", ours), ("a fork", floors)):
            for label, believed in (("/proc/stat", True), ("own times", False)):
                each = [window.each(believed) * 1e3 for window in windows]
                record.figure(f"{name}: {what}, {label}", common.mean(each), "ms", windows=each)
        # Neighbouring windows, so that a slow minute of the host is in both.
        taxes = [(a.each(quiet) - b.each(quiet)) * 1e3 for a, b in zip(ours, floors, strict=True)]
        tax = common.mean(taxes)
        record.figure(f"{name}: isolation tax", tax, "ms", windows=taxes, source=source)
        if name == "bare":
            record.target("default, no warm-up code: isolation tax", tax, "most", 0.45, "ms")
    record.done()


if __name__ == "__main__":
    main()
