"""What does a small DataFrame groupby cost in a fresh sandbox, call to Result, beside an unsandboxed Python?

    python benchmarks/groupby.py [--json] [--seconds S] [--policy data]

Without and with the result's repr as last expression, and an operation that no warm-up of ours has run (a resampling).
Requests come 5 to 20 ms apart. An unsandboxed `python -c "import pandas..."` does the same groupby meanwhile.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile

import common

from sandboxd import Sandbox, policy
from sandboxd.bench.commands import time_command
from sandboxd.bench.contest import Contestant, alternate
from sandboxd.bench.warm import plain_environment

TABLE = """\
import pandas as pd
shop = pd.DataFrame({"kind": ["tea", "bread", "tea", "milk", "bread"] * 8, "price": [3.5, 2.25, 4.0, 1.5, 2.75] * 8})
total = shop.groupby("kind")["price"].sum()
assert float(total["tea"]) == 60.0
"""
OTHER = """\
import pandas as pd
shop = pd.DataFrame({"day": pd.date_range("2024-03-01", periods=40), "price": [3.5, 2.25, 4.0, 1.5, 2.75] * 8})
spread = shop.resample("9D", on="day")["price"].quantile(0.75)
assert len(spread) == 5
"""


def main() -> None:
    """Measure, then print."""
    parser = common.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=30, metavar="S", help="in all, starts apart (default 30)")
    parser.add_argument("--policy", default="data", help="the policy (default data)")
    options = parser.parse_args()
    record = common.Record(options)
    chosen = policy.load(options.policy)
    with contextlib.ExitStack() as undo:
        environment = plain_environment(undo.enter_context(tempfile.TemporaryDirectory()))

        def outside(code: str) -> list[str]:
            return [sys.executable, "-I", "-c", code]

        def shown(name: str, code: str) -> str:
            command = outside(f"{code}print(repr({name}))")
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            return done.stdout.rstrip("\n")

        sandbox = undo.enter_context(Sandbox(chosen))
        record.ran(chosen, sandbox)
        programs = {
            "without": ("groupby, no value", TABLE, ""),
            "with": ("groupby, text/plain of the result", f"{TABLE}total\n", shown("total", TABLE)),
            "other": ("resample, not in the warm-up, no value", OTHER, ""),
            "other-with": ("resample, text/plain of the result", f"{OTHER}spread\n", shown("spread", OTHER)),
        }
        rows = [
            Contestant(key, what, "sandboxd", common.Checked(sandbox, code, value).settle(3), "", True)
            for key, (what, code, value) in programs.items()
        ]
        rows.append(
            Contestant(
                "python",
                "python -c: import pandas and the groupby",
                "plain",
                lambda: time_command(outside(TABLE), environment, ""),
            )
        )
        alternate(rows, options.seconds)
    found = {row.key: row.series for row in rows}
    for row in rows:
        record.series(row.what, row.series, row.sample.warm if isinstance(row.sample, common.Checked) else None)
    record.target("groupby, p50", found["without"].p(0.5) * 1e3, "most", 1.5, "ms")
    record.target("groupby with its repr, p50", found["with"].p(0.5) * 1e3, "most", 2.0, "ms")
    record.target("unsandboxed / groupby", found["python"].p(0.5) / found["without"].p(0.5), "least", 150, "times")
    record.done()


if __name__ == "__main__":
    main()
