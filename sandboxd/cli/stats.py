"""``sandboxd stats``: the counters of a daemon since it began."""

from __future__ import annotations

from typing import Any

import click

from sandboxd.cli import output
from sandboxd.cli.params import ADDRESS, DEFAULT_ADDRESS

__all__ = ["stats"]

# The columns of the table: key of a policy's counters, head. Those of the daemon's own are its operator's to see.
COLUMNS = (("queued", "QUEUED"), ("running", "RUNNING"), ("parked", "PARKED"), ("zygote_restarts", "ZYGOTE RESTARTS"))


@click.command()
@click.option("--connect", type=ADDRESS, default=DEFAULT_ADDRESS, show_default=True, help="The daemon to ask.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def stats(connect: str, as_json: bool) -> None:
    """Show the counters of a daemon: of your own runs, or everything for root and the service user.

    The held time is how long one iteration of the daemon's loop kept all others waiting. Every clock and every kill
    is an event of that loop: above 50 ms, limits are late.
    """
    from sandboxd.client import admin

    found = admin.stats(connect)
    if as_json:
        output.emit_json(found)
        return
    rows = [*found["policies"].items(), ("all", found)]
    columns = [(key, head) for key, head in COLUMNS if key in found]
    table = [[name, *(str(row.get(key, 0)) for key, _ in columns), runs(row["runs"])] for name, row in rows]
    output.table(["POLICY", *(head for _, head in columns), "RUNS"], table)
    if "held_seconds" in found:
        output.write(held(found["held_seconds"]))
    output.write(f"Up for {found['uptime_seconds']:,.0f} s.")


def runs(statuses: dict[str, int]) -> str:
    """How many runs came to which status, the most frequent first."""
    found = sorted(statuses.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{number:,} {status}" for status, number in found) or "none"


def held(seconds: dict[str, Any]) -> str:
    """The held time as one line."""
    line = f"Held time of the loop: worst {1000 * seconds['worst']:.1f} ms, p99 {1000 * seconds['p99']:.2f} ms"
    return f"{line}, above 50 ms {seconds['above']['0.05']:,} of {seconds['iterations']:,} times."
