"""How long does a caller wait for `run("1+1")` on an idle engine: embedded, and through the daemon's socket?

    python benchmarks/latency.py [--json] [--seconds S] [--policies default,data]

Requests come 5 to 20 ms apart. In the same minutes and in turn: the fork of the same warmed interpreter without any
isolation, and an unsandboxed `python -c pass`.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile

import common

from sandboxd import Sandbox, policy
from sandboxd.bench.commands import time_command
from sandboxd.bench.contest import Contestant, alternate
from sandboxd.bench.daemon import served
from sandboxd.bench.warm import plain_environment


def main() -> None:
    """Measure, then print."""
    parser = common.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=40, metavar="S", help="in all, starts apart (default 40)")
    parser.add_argument("--policies", default="default,data", metavar="A,B", help="policies (default default,data)")
    options = parser.parse_args()
    record = common.Record(options)
    rows: list[Contestant] = []
    with contextlib.ExitStack() as undo:
        environment = plain_environment(undo.enter_context(tempfile.TemporaryDirectory()))
        command = [sys.executable, "-I", "-c", "pass"]
        rows.append(Contestant("python", "python -c pass", "plain", lambda: time_command(command, environment, "")))
        for name in common.pairs(options.policies):
            chosen = policy.load(name)
            embedded = undo.enter_context(Sandbox(chosen))
            record.ran(chosen, embedded)
            daemon = undo.enter_context(undo.enter_context(served(name)).connect())
            warm = common.floor(chosen, undo)[0]
            rows += [
                Contestant(
                    f"{name}/embedded", f"{name}: embedded", "sandboxd", common.Checked(embedded).settle(), "", True, 3
                ),
                Contestant(
                    f"{name}/daemon",
                    f"{name}: daemon's socket",
                    "sandboxd",
                    common.Checked(daemon).settle(),
                    "",
                    True,
                    3,
                ),
                Contestant(f"{name}/fork", f"{name}: os.fork + _exit + wait", "floor", warm.fork, "", True),
            ]
        alternate(rows, options.seconds)
    for row in rows:
        record.series(row.what, row.series, row.sample.warm if isinstance(row.sample, common.Checked) else None)
    python = rows[0].series.p(0.5)
    for row in rows:
        if row.group != "sandboxd" or not row.series.samples:
            continue
        record.figure(f"python -c pass / {row.what}", python / row.series.p(0.5), "times")
        if row.key == "data/embedded":
            record.target("data, embedded, p50", row.series.p(0.5) * 1e3, "most", 0.35, "ms")
            record.target("data, embedded, p99", row.series.p(0.99) * 1e3, "most", 1.0, "ms")
            record.target("python -c pass / data, embedded", python / row.series.p(0.5), "least", 25, "times")
        if row.key == "data/daemon":
            record.target("data, daemon, p50", row.series.p(0.5) * 1e3, "most", 0.55, "ms")
    record.done()


if __name__ == "__main__":
    main()
