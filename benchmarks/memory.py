"""What memory does a cell hold that waits, and what do engine and zygote hold?

    python benchmarks/memory.py [--json] [--images bare,data] [--sleeping N]

USS (pages that nobody shares) of each parked cell and its init, from /proc/PID/smaps_rollup, after some runs and two
idle seconds. Beside them: cells in which a program sleeps. Engine, nursery and zygotes together are all that is there
(PSS of everybody) less what the cells hold for themselves, so a page that all share counts once.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from pathlib import Path

import common

from sandboxd import Limits, Sandbox
from sandboxd.errors import SandboxError

TARGET_MIB = {"bare": 1.5, "data": 6.0}
MIB = 1 << 20


def cells(engine: int) -> tuple[list[int], list[int]]:
    """(first processes of cells, inits of cells): in pid namespaces two below the engine's, where the init is 1 and the
    cell's interpreter 2. Source: NSpid in /proc/PID/status.
    """
    depth = len(_namespaced(engine))
    found: dict[int, list[int]] = {1: [], 2: []}
    for process in common.processes(engine):
        pids = _namespaced(process.pid)
        if len(pids) == depth + 2 and pids[-1] in found:
            found[pids[-1]].append(process.pid)
    return found[2], found[1]


def _namespaced(pid: int) -> list[int]:
    """The pids of *pid* in its namespaces, the outermost first; empty when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return next(
        ([int(one) for one in line.split()[1:]] for line in status.splitlines() if line.startswith("NSpid")), []
    )


def held(pids: list[int]) -> list[int]:
    """USS of each that is still there."""
    return [found[0] for found in map(common.rollup, pids) if found is not None]


def main() -> None:
    """Measure, then print."""
    parser = common.parser(__doc__)
    parser.add_argument("--images", default="bare,data", metavar="A,B", help="what is measured (default bare,data)")
    parser.add_argument(
        "--sleeping", type=int, default=4, metavar="N", help="cells with a sleeping program (default 4)"
    )
    options = parser.parse_args()
    record = common.Record(options)
    for name in common.pairs(options.images):
        chosen = common.image(name)
        with contextlib.ExitStack() as undo:
            sandbox = Sandbox(chosen)
            undo.callback(sandbox.close)
            record.ran(chosen, sandbox)
            common.Checked(sandbox).settle(50)
            time.sleep(2)
            engine = common.engine_pid(sandbox)
            parked, inits = cells(engine)
            own = held(parked)
            if own:
                value = statistics.median(own) / MIB
                record.figure(f"{name}: USS of a parked cell, median of {len(own)}", value, "MiB", each_bytes=own)
                record.figure(f"{name}: USS of the largest parked cell", max(own) / MIB, "MiB")
                if name in TARGET_MIB:
                    record.target(f"{name}: USS of a parked cell", value, "most", TARGET_MIB[name], "MiB")
                if of_inits := held(inits):
                    record.figure(f"{name}: USS of its init", statistics.median(of_inits) / MIB, "MiB")
            else:
                record.note(f"{name}: no cell is parked")
            whole = sum(found[1] for process in common.processes(engine) if (found := common.rollup(process.pid)))
            rest = whole - sum(own) - sum(held(inits))
            record.figure(f"{name}: engine, nursery and zygotes, shared pages once", rest / MIB, "MiB")

            up = threading.Semaphore(0)

            def sleeper(sandbox: Sandbox = sandbox, up: threading.Semaphore = up) -> None:
                with contextlib.suppress(SandboxError, RuntimeError):
                    sandbox.run(
                        "import time\nprint(1 + 1, flush=True)\ntime.sleep(1000)",
                        limits=Limits(wall_seconds=30),
                        on_stdout=lambda _: up.release(),
                    )

            threads = [threading.Thread(target=sleeper) for _ in range(options.sleeping)]
            before = set(parked)
            for thread in threads:
                thread.start()
            for _ in threads:
                up.acquire(timeout=30)
            # Those that were parked before run now, or those that were not there then.
            time.sleep(1)
            now = cells(engine)[0]
            busy = [pid for pid in now if _slept(pid)]
            if sizes := held(busy):
                record.figure(
                    f"{name}: USS of a cell whose program sleeps, median of {len(sizes)}",
                    statistics.median(sizes) / MIB,
                    "MiB",
                    parked_before=len(before & set(busy)),
                )
            sandbox.close()
            for thread in threads:
                thread.join()
    record.done()


def _slept(pid: int) -> bool:
    """Whether *pid* waits for a clock: in a cell that is the program, a parked one waits for a packet."""
    try:
        with open(f"/proc/{pid}/syscall", encoding="ascii") as file:
            return file.read().split()[0] in ("230", "35")  # clock_nanosleep, nanosleep on x86-64
    except OSError:
        return False


if __name__ == "__main__":
    main()
