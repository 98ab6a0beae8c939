"""How much does a tenant feel of another one that would keep the engine busy?

    python benchmarks/neighbours.py [--json] [--seconds 4] [--rounds N] [--only NAME]

One thread runs `1+1` in a row, streamed, so through the engine: first beside a program that sleeps, which is the floor
of the same minute, then beside each of the others. Their runs end by their own limits. Target: p99 within 3 times
quiet; one that only computes is there for comparison, since a program that takes a whole processor is felt on a machine
with two of them.
"""

from __future__ import annotations

import contextlib
import threading
import time

import common

from sandboxd import Limits, Sandbox
from sandboxd.bench.load import check
from sandboxd.bench.stats import Series
from sandboxd.errors import SandboxError

QUIET = "import time; time.sleep(100)"
PROGRAMS = {
    "computes": "while True: pass",
    "single bytes": "import os\nwhile True: os.write(1, b'x'); os.write(2, b'x')",
    "a flood of output": "import os\nwhile True: os.write(1, bytes(65536))",
    "orphans that say they finished": """
import os
frame = b'{"exit_code":0,"error":null,"results":[]}'
if os.fork():
    os._exit(0)
while True:
    os.write(3, frame)
""",
    "descriptors over the channel": """
import array, os, socket
channel = socket.socket(fileno=os.dup(3))
while True:
    memory = os.memfd_create("m")
    os.posix_fallocate(memory, 0, 100 << 20)
    try:
        channel.sendmsg([b"P"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [memory]))])
    except OSError:
        pass
    os.close(memory)
""",
    "a full workspace": "open('f', 'wb').write(bytes(60 << 20))",
    "many files": "for n in range(4000): open(str(n), 'w').close()",
    "names that are not there": "import os\nn = 0\nwhile True: os.path.exists(f'/usr/lib/{n}'); n += 1",
}
INPUTS = {
    "4,000 input files": {f"{number % 63}/{number}": b"x" for number in range(4000)},
    "inputs 64 levels deep": {f"{'d/' * 64}{number}": b"x" for number in range(1000)},
    "an input of 60 MiB": {"f": bytes(60 << 20)},
}


class Beside:
    """Something that another thread has the engine do, over and over, until the block ends."""

    def __init__(self, sandbox: Sandbox, code: str, files: dict[str, bytes], wall_seconds: float) -> None:
        self._sandbox, self._code, self._files = sandbox, code, files
        self._limits = Limits(wall_seconds=wall_seconds)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop)

    def _loop(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(SandboxError):
                self._sandbox.run(self._code, files=self._files, limits=self._limits, on_stdout=lambda _: None)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def neighbour(sandbox: Sandbox, seconds: float) -> Series:
    """Latencies of `1+1`, one run after the other."""
    series = Series()
    end = time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        check(sandbox.run("1+1", on_stdout=lambda _: None), "2")
        series.samples.append(time.perf_counter() - begun)
    return series


def main() -> None:
    """Measure, then print."""
    parser = common.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each program and round (default 4)")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="(default 2)")
    parser.add_argument("--only", metavar="NAME", help="one of the programs")
    options = parser.parse_args()
    record = common.Record(options)
    chosen = common.image("bare")
    cases = {name: (code, {}) for name, code in PROGRAMS.items()}
    cases |= {name: ("pass", files) for name, files in INPUTS.items()}
    with Sandbox(chosen) as sandbox:
        record.ran(chosen, sandbox)
        for name, (code, files) in cases.items():
            if options.only not in (None, name):
                continue
            quiet, busy = Series(), Series()
            for _ in range(options.rounds):
                for series, (beside, given) in ((quiet, (QUIET, {})), (busy, (code, files))):
                    with Beside(sandbox, beside, given, wall_seconds=1.0):
                        series.samples += neighbour(sandbox, options.seconds / 2).samples
            record.series(f"beside one that sleeps, before {name}", quiet)
            record.series(f"beside {name}", busy)
            record.target(f"p99 beside {name} / quiet", busy.p(0.99) / quiet.p(0.99), "most", 3, "times")
        held = sandbox.stats()["held_seconds"]
        record.figure("held time of the loop, worst", held["worst"] * 1e3, "ms")
        record.figure("held time of the loop, p99", held["p99"] * 1e3, "ms")
    record.done()


if __name__ == "__main__":
    main()
