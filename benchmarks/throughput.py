"""How many runs a second come out of a closed loop of 8 clients, beside as many fork loops as there are CPUs?

    python benchmarks/throughput.py [--json] [--seconds S] [--clients N] [--images bare,numpy+pandas,data]

*bare* is `default`, *numpy+pandas* the same with both preloaded, *data* that policy with its warm-up. Clients are
threads of this process. The floor is the same warmed interpreter in loops of os.fork, _exit and wait, one loop for each
CPU, no isolation; ours and the floor are measured in turn.
"""

from __future__ import annotations

import contextlib

import common

from sandboxd import Sandbox
from sandboxd.bench import facts
from sandboxd.bench.load import Load, closed_loop
from sandboxd.bench.stats import ratio_interval
from sandboxd.bench.warm import forking_loops

TARGETS = {"bare": 1300, "numpy+pandas": 930, "data": 600}


def main() -> None:
    """Measure, then print."""
    parser = common.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=20, metavar="S", help="for each image (default 20)")
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="of ours and the floor in turn (default 4)")
    parser.add_argument("--clients", type=int, default=8, metavar="N", help="threads that ask (default 8)")
    parser.add_argument("--images", default=",".join(common.IMAGES), metavar="A,B", help="what is preloaded")
    options = parser.parse_args()
    record = common.Record(options)
    part = options.seconds / options.rounds / 2
    for name in common.pairs(options.images):
        chosen = common.image(name)
        with contextlib.ExitStack() as undo:
            sandbox = undo.enter_context(Sandbox(chosen))
            record.ran(chosen, sandbox)
            warm = common.floor(chosen, undo, facts.cpus())
            run = common.Checked(sandbox).settle()

            def once(run: common.Checked = run) -> None:
                run()

            closed_loop(once, options.clients, min(1.0, part))  # the pool finds its size
            loads: list[Load] = []
            floors: list[float] = []
            for _ in range(options.rounds):
                loads.append(closed_loop(once, options.clients, part))
                floors.append(forking_loops(warm, part))
        whole = loads[0]
        ours = [load.per_second for load in loads]
        for load in loads[1:]:
            whole.series.samples += load.series.samples
            whole.series.failures += load.series.failures
            whole.seconds += load.seconds
        record.figure(f"{name}: runs", whole.per_second, "per s", clients=options.clients, rounds=ours)
        record.series(f"{name}: latency under this load", whole.series)
        record.figure(f"{name}: {len(warm)} fork loops", common.mean(floors), "per s", rounds=floors)
        if min(ours) > 0:
            ratio = ratio_interval(ours, floors)
            record.figure(f"{name}: runs / forks", ratio.estimate, "times", low=ratio.low, high=ratio.high)
        if name in TARGETS:
            record.target(f"{name}: runs per second", whole.per_second, "least", TARGETS[name], "per s")
            if name != "bare":
                record.target(f"{name}: naive floor", whole.per_second, "least", common.mean(floors), "per s")
    record.done()


if __name__ == "__main__":
    main()
