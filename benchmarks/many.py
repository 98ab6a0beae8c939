"""Do 2,000 live, sleeping cells fit, and how fast do new ones come when so many are there?

    python benchmarks/many.py [--json] [--n 2000] [--policy data] [--starters 8]

Each run prints once and sleeps. So many starters at a time wait for that first line of their cell before the next is
begun. The creation rate at a level is that of the last tenth of the cells up to it (at 10: of the first ten).
"""

from __future__ import annotations

import contextlib
import resource
import threading
import time

import common
import psutil

from sandboxd import Limits, Sandbox
from sandboxd.bench.stats import Series
from sandboxd.errors import SandboxError

LEVELS = (10, 100, 1000, 2000)
CODE = "import time\nprint(1 + 1, flush=True)\ntime.sleep(1000000)"


def main() -> None:
    """Measure, then print."""
    parser = common.parser(__doc__)
    parser.add_argument("--n", type=int, default=2000, metavar="N", help="cells (default 2000)")
    parser.add_argument("--policy", default="data", help="the policy or image (default data)")
    parser.add_argument("--starters", type=int, default=8, metavar="N", help="cells that are begun at once (default 8)")
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="for all of it (default 600)")
    options = parser.parse_args()
    record = common.Record(options)
    chosen = common.image(options.policy)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, 4 * options.n + 512)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(hard, wanted)))  # the engine inherits it
    threading.stack_size(256 << 10)

    up: list[float] = []
    failed: list[str] = []
    lock, turn = threading.Lock(), threading.Semaphore(options.starters)
    all_up, closing = threading.Event(), threading.Event()

    def one(sandbox: Sandbox) -> None:
        said = False

        def first(_: str) -> None:
            nonlocal said
            if not said:
                said = True
                with lock:
                    up.append(time.perf_counter())
                    if len(up) + len(failed) >= options.n:
                        all_up.set()
                turn.release()

        try:
            result = sandbox.run(CODE, on_stdout=first, results=False)
            reason = f"it ended: {result.status}"
        except (SandboxError, OSError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"
        if not closing.is_set():
            with lock:
                failed.append(reason)
                if len(up) + len(failed) >= options.n:
                    all_up.set()
            if not said:
                turn.release()

    before = psutil.virtual_memory().available
    sandbox = Sandbox(chosen, max_running=options.n + 32, limits=Limits(wall_seconds="unlimited"))
    with contextlib.ExitStack() as undo:
        undo.callback(sandbox.close)
        record.ran(chosen, sandbox)
        common.Checked(sandbox).settle()
        begun = time.perf_counter()
        threads: list[threading.Thread] = []
        for _ in range(options.n):
            if not turn.acquire(timeout=60):
                record.note("no cell came up for a minute")
                break
            threads.append(threading.Thread(target=one, args=(sandbox,), daemon=True))
            threads[-1].start()
        all_up.wait(options.timeout)
        took = time.perf_counter() - begun
        engine = common.engine_pid(sandbox)
        alive = len([process for process in common.processes(engine) if process.status() != psutil.STATUS_ZOMBIE])
        used = before - psutil.virtual_memory().available
        latency = common.Checked(sandbox).settle(0)
        series = Series()
        for _ in range(20):
            series.samples.append(latency())
        closing.set()
        ended = time.perf_counter()
        sandbox.close()
        ended = time.perf_counter() - ended
        for thread in threads:
            thread.join(30)
    record.figure("cells that came up", len(up), "")
    record.figure("cells that failed", len(failed), "", reasons=sorted(set(failed))[:5])
    for reason in sorted(set(failed))[:5]:
        record.note(f"failed: {reason}")
    record.figure("until the last was up", took, "s", up_seconds=[moment - begun for moment in up])
    record.figure("processes of the engine then", alive, "")
    record.figure("memory of the machine gone", used / (1 << 20), "MiB")
    record.series("1+1 beside them", series)
    record.figure("close()", ended * 1e3, "ms")
    rates = {}
    for level in (*(level for level in LEVELS if level < options.n), options.n):
        if len(up) < level:
            continue
        first = 0 if level <= 10 else level - max(10, level // 10)
        start = begun if first == 0 else up[first - 1]
        rates[level] = (level - first) / (up[level - 1] - start)
        record.figure(f"creation rate at {level:,}", rates[level], "per s")
    record.target("cells at once", len(up), "least", options.n, "")
    if 10 in rates and len(rates) > 1:
        last = max(rates)
        record.target(f"rate at {last:,} / rate at 10", rates[last] / rates[10], "least", 0.5, "times")
    record.done()


if __name__ == "__main__":
    main()
