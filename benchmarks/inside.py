"""How much slower does a program run inside than outside: pure Python, numpy, and a bare system call?

    python benchmarks/inside.py [--json] [--rounds N] [--policy data]

The same text runs in a cell and in an unsandboxed Python, in turn; each times itself by CLOCK_MONOTONIC and prints the
nanoseconds, so neither start nor end counts. The system call is getppid in a loop: no rule of the filter looks at its
arguments.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile

import common

from sandboxd import Sandbox
from sandboxd.bench.stats import Series, ratio_interval
from sandboxd.bench.warm import plain_environment

CALLS = 500_000
PROGRAMS = {
    "Python": """\
def primes(limit):
    sieve = bytearray([1]) * limit
    for i in range(2, int(limit ** 0.5) + 1):
        if sieve[i]:
            for j in range(i * i, limit, i):
                sieve[j] = 0
    return sum(sieve) - 2
for _ in range(2):
    begun = time.perf_counter_ns()
    assert primes(400_000) == 33_860
    took = time.perf_counter_ns() - begun
""",
    "numpy": """\
import numpy
matrix = numpy.random.default_rng(7).random((360, 360))
for _ in range(2):
    begun = time.perf_counter_ns()
    for _ in range(12):
        product = matrix @ matrix
        product.sort()
    took = time.perf_counter_ns() - begun
""",
    "getppid": f"""\
import os
for _ in range(2):
    begun = time.perf_counter_ns()
    for _ in range({CALLS}):
        os.getppid()
    took = time.perf_counter_ns() - begun
""",
}


def main() -> None:
    """Measure, then print."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--rounds", type=int, default=15, metavar="N", help="of inside and outside in turn (default 15)"
    )
    parser.add_argument("--policy", default="data", help="the policy or image (default data)")
    options = parser.parse_args()
    record = common.Record(options)
    chosen = common.image(options.policy)
    inside: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    outside: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    throttled = 0.0
    with contextlib.ExitStack() as undo:
        environment = plain_environment(undo.enter_context(tempfile.TemporaryDirectory()))
        sandbox = undo.enter_context(Sandbox(chosen))
        record.ran(chosen, sandbox)
        for number in range(options.rounds):
            for name, body in PROGRAMS.items():
                code = f"import time\n{body}print(took)\n"

                def run_inside(name: str = name, code: str = code) -> None:
                    nonlocal throttled
                    result = sandbox.run(code)
                    if result.status != "ok":
                        raise SystemExit(f"{name} failed inside: {result!r}")
                    throttled += result.usage.throttled_seconds or 0
                    inside[name].append(int(result.stdout) / 1e9)

                def run_outside(name: str = name, code: str = code) -> None:
                    command = [sys.executable, "-I", "-c", code]
                    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                    outside[name].append(int(done.stdout) / 1e9)

                for side in (run_inside, run_outside) if number % 2 else (run_outside, run_inside):
                    side()
    for name in PROGRAMS:
        a, b = Series(inside[name]), Series(outside[name])
        record.series(f"{name}: inside", a)
        record.series(f"{name}: outside", b)
        ratio = ratio_interval(inside[name], outside[name])
        # Noise of a shared machine only ever adds: the least samples come closest to what the walls themselves cost.
        least = min(inside[name]) / min(outside[name])
        if name == "getppid":
            extra = (a.p(0.5) - b.p(0.5)) / CALLS * 1e9
            fastest = (min(inside[name]) - min(outside[name])) / CALLS * 1e9
            record.figure("getppid: each call more than outside, least samples", fastest, "ns")
            record.target("getppid: each call more than outside, p50", extra, "most", 60, "ns")
        else:
            record.figure(f"{name}: slower inside, least samples", (least - 1) * 100, "%")
            record.figure(
                f"{name}: slower inside, mean of rounds",
                (ratio.estimate - 1) * 100,
                "%",
                low=(ratio.low - 1) * 100,
                high=(ratio.high - 1) * 100,
            )
            record.target(f"{name}: slower inside, p50", (a.p(0.5) / b.p(0.5) - 1) * 100, "most", 2, "%")
    record.figure("held back by the policy's cpus, all runs together", throttled * 1e3, "ms")
    record.done()


if __name__ == "__main__":
    main()
