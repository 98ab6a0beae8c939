"""How does the cost of a run grow with the image, live cells, clients, output, and mounts of the host?

    python benchmarks/growth.py [--json] [--n N] [--only image,alive,clients,output,mounts]

Each part changes one thing: what the zygote has imported (with the fork of the same interpreter beside it); how many
cells sleep meanwhile; how many clients ask at once; how much the program prints; how many mounts the host has when the
engine starts (in a mount namespace of its own, from `unshare`, so the machine sees none of them). Latencies are of
requests 5 to 20 ms apart, except with several clients.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING

import common

from sandboxd import Limits, Sandbox
from sandboxd.bench.contest import PAUSE_SECONDS, Contestant, alternate
from sandboxd.bench.load import closed_loop
from sandboxd.bench.stats import Failed, Series
from sandboxd.errors import SandboxError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

IMAGES = ((), ("numpy",), ("numpy", "pandas"), ("numpy", "pandas", "scipy.stats"))
ALIVE = (0, 8, 32, 128)
CLIENTS = (1, 2, 4, 8, 16, 32)
OUTPUT_BYTES = (0, 1 << 10, 1 << 14, 1 << 18, 1 << 20)
MOUNTS = (0, 100, 1000)


def spaced(run: Callable[[], float], count: int) -> Series:
    """*count* samples with pauses between."""
    draw = random.Random(1)  # noqa: S311 - pauses
    series = Series()
    for _ in range(count):
        time.sleep(draw.uniform(*PAUSE_SECONDS))
        try:
            series.samples.append(run())
        except (Failed, SandboxError) as error:
            series.failures[str(error)] += 1
    return series


def by_image(record: common.Record, count: int) -> None:
    """Engines with ever more imported, and the shipped `data`, in turn with the forks of the same interpreters."""
    with contextlib.ExitStack() as undo:
        rows: list[Contestant] = []
        for chosen in (*(common.preloading(*modules) for modules in IMAGES), common.image("data")):
            sandbox = undo.enter_context(Sandbox(chosen))
            record.ran(chosen, sandbox)
            warm = common.floor(chosen, undo)[0]
            run = common.Checked(sandbox).settle()
            rows.append(Contestant(chosen.name, f"image {chosen.name}: run", "sandboxd", run, "", True))
            rows.append(Contestant(f"{chosen.name}/fork", f"image {chosen.name}: fork", "floor", warm.fork, "", True))
        alternate(rows, count * len(rows) * 0.02)
    for row in rows:
        record.series(row.what, row.series)


@contextlib.contextmanager
def sleeping(sandbox: Sandbox, count: int) -> Iterator[None]:
    """*count* cells in which a program sleeps. They end when *sandbox* is closed, which the caller does."""
    up = threading.Semaphore(0)

    def one() -> None:
        with contextlib.suppress(SandboxError, RuntimeError):
            sandbox.run(
                "import time\nprint(1 + 1, flush=True)\ntime.sleep(1000000)",
                on_stdout=lambda _: up.release(),
                results=False,
            )

    threads = [threading.Thread(target=one, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for _ in threads:
        if not up.acquire(timeout=60):
            raise Failed("a sleeping cell did not come up")
    try:
        yield
    finally:
        sandbox.close()
        for thread in threads:
            thread.join(30)


def by_alive(record: common.Record, count: int) -> None:
    """An engine anew for each number of sleeping cells."""
    for alive in ALIVE:
        with Sandbox(max_running=alive + 16, limits=Limits(wall_seconds="unlimited")) as sandbox:
            run = common.Checked(sandbox).settle()
            with sleeping(sandbox, alive):
                record.series(f"{alive} cells alive: run", spaced(run, count))


def by_clients(record: common.Record, count: int) -> None:
    """One engine, more and more threads in a closed loop."""
    with Sandbox() as sandbox:
        run = common.Checked(sandbox).settle()

        def once() -> None:
            run()

        for clients in CLIENTS:
            load = closed_loop(once, clients, max(1.0, count / 100))
            record.figure(f"{clients} clients: runs", load.per_second, "per s")
            record.series(f"{clients} clients: latency", load.series)


def by_output(record: common.Record, count: int) -> None:
    """One engine; the program writes so many bytes to stdout, which must all come."""
    with Sandbox() as sandbox:
        common.Checked(sandbox).settle()
        for size in OUTPUT_BYTES:
            code = f"import sys\nsys.stdout.write('x' * {size})\nNone"

            def run(code: str = code, size: int = size) -> float:
                begun = time.perf_counter()
                result = sandbox.run(code)
                took = time.perf_counter() - begun
                if result.status != "ok" or len(result.stdout) + result.stdout_dropped_bytes != size:
                    raise Failed(f"status {result.status}, {len(result.stdout)} bytes")
                return took

            record.series(f"{size:,} bytes of output: run", spaced(run, count))


def by_mounts(record: common.Record, count: int) -> None:
    """This script again in a mount namespace with so many more mounts: start of an engine, and runs."""
    for mounts in MOUNTS:
        with tempfile.TemporaryDirectory() as place:
            script = (
                f"mount -t tmpfs none {place} && cd {place} && for i in $(seq {mounts}); do "
                'mkdir "$i" && mount -t tmpfs none "$i" || exit 1; done; cd /; exec "$@"'
            )
            command = [sys.executable, __file__, "--under-mounts", "--n", str(count)]
            done = subprocess.run(
                ["/usr/bin/unshare", "--mount", "/bin/sh", "-c", script, "sh", *command],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
        found = json.loads(done.stdout)
        record.figure(f"{mounts} more mounts: Sandbox()", found["start_seconds"] * 1e3, "ms")
        record.series(f"{mounts} more mounts: run", Series(found["samples"]))


def under_mounts(count: int) -> None:
    """What the copy of this script under ``by_mounts`` does: start twice, take the second, run."""
    for _ in range(2):
        begun = time.perf_counter()
        with Sandbox() as sandbox:
            took = time.perf_counter() - begun
            run = common.Checked(sandbox).settle()
            series = spaced(run, count)
    print(json.dumps({"start_seconds": took, "samples": series.samples}))


PARTS = {"image": by_image, "alive": by_alive, "clients": by_clients, "output": by_output, "mounts": by_mounts}


def options_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line."""
    parser.add_argument("--n", type=int, default=200, metavar="N", help="samples for each figure (default 200)")
    parser.add_argument("--only", default=",".join(PARTS), metavar="A,B", help="parts to measure (default all)")
    parser.add_argument("--under-mounts", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, then print."""
    options = options_of(common.parser(__doc__))
    if options.under_mounts:
        under_mounts(options.n)
        return
    record = common.Record(options)
    for name in common.pairs(options.only):
        PARTS[name](record, options.n)
    record.done()


if __name__ == "__main__":
    main()
