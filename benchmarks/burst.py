"""How long do 200 requests wait that come at once to an idle engine?

    python benchmarks/burst.py [--json] [--n 200] [--rounds N] [--policy data]

All must be done, and p99 is set beside N divided by the throughput of a closed loop of 8 clients, taken in the same
minutes. Every request is a thread of this process that waits at a barrier; before each burst the engine is left alone
for two seconds.
"""

from __future__ import annotations

import contextlib
import threading
import time

import common

from sandboxd import Sandbox
from sandboxd.bench.load import closed_loop
from sandboxd.bench.stats import Failed, Series
from sandboxd.errors import SandboxError

IDLE_SECONDS = 2.0


def burst(run: common.Checked, count: int) -> tuple[Series, float]:
    """Latencies of *count* requests at once, from the moment that all were let go, and until the last was done."""
    series = Series()
    lock = threading.Lock()
    begun = [0.0]
    gate = threading.Barrier(count, action=lambda: begun.__setitem__(0, time.perf_counter()))

    def client() -> None:
        gate.wait()
        try:
            run()
        except (Failed, OSError, SandboxError) as error:
            with lock:
                series.failures[str(error) or type(error).__name__] += 1
        else:
            took = time.perf_counter() - begun[0]
            with lock:
                series.samples.append(took)

    threading.stack_size(256 << 10)
    threads = [threading.Thread(target=client, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return series, time.perf_counter() - begun[0]


def main() -> None:
    """Measure, then print."""
    parser = common.parser(__doc__)
    parser.add_argument("--n", type=int, default=200, metavar="N", help="requests at once (default 200)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="bursts (default 5)")
    parser.add_argument("--policy", default="data", help="the policy or image (default data)")
    options = parser.parse_args()
    record = common.Record(options)
    chosen = common.image(options.policy)
    with contextlib.ExitStack() as undo:
        sandbox = undo.enter_context(Sandbox(chosen))
        record.ran(chosen, sandbox)
        run = common.Checked(sandbox).settle()

        def once() -> None:
            run()

        whole = Series()
        p99, rates = [], []
        for number in range(options.rounds):
            rates.append(closed_loop(once, 8, 2.0).per_second)
            time.sleep(IDLE_SECONDS)
            series, seconds = burst(run, options.n)
            whole.samples += series.samples
            whole.failures += series.failures
            p99.append(series.p(0.99))
            record.figure(f"burst {number + 1}: until the last was done", seconds * 1e3, "ms", **series.plain())
    record.series(f"{options.n} at once, all bursts", whole)
    rate = common.mean(rates)
    record.figure("closed loop, 8 clients", rate, "per s", rounds=rates)
    record.target("requests that failed", whole.failed, "most", 0, "")
    if whole.samples and rate:
        record.target(f"p99 / ({options.n} / throughput)", whole.p(0.99) * rate / options.n, "most", 3, "times")
    record.done()


if __name__ == "__main__":
    main()
