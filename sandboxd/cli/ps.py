"""``sandboxd ps``: the live cells of a daemon, as the daemon says and as this host's process table shows."""

from __future__ import annotations

from typing import Any

import click

from sandboxd.cli import output
from sandboxd.cli.params import ADDRESS, DEFAULT_ADDRESS

__all__ = ["ps"]

# The columns of the table: key in a row, head.
COLUMNS = (
    ("id", "ID"),
    ("policy", "POLICY"),
    ("client_uid", "CLIENT UID"),
    ("uid", "CELL UID"),
    ("pid", "PID"),
    ("state", "STATE"),
    ("age_seconds", "AGE"),
    ("cpu_seconds", "CPU"),
    ("memory_bytes", "MEMORY"),
    ("processes", "PROCESSES"),
)


@click.command()
@click.option("--connect", type=ADDRESS, default=DEFAULT_ADDRESS, show_default=True, help="The daemon to ask.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def ps(connect: str, as_json: bool) -> None:
    """List the live cells of a daemon: your own, or everybody's for root and the service user."""
    from sandboxd.client import admin

    rows = [{**row, **process_facts(row.get("pid"))} for row in admin.ps(connect)]
    if as_json:
        output.emit_json(rows)
        return
    for row in rows:
        client_facts = row.get("client")
        row["client_uid"] = client_facts.get("uid") if isinstance(client_facts, dict) else None
    if not rows:
        output.write("No cell is running.")
        return
    output.table([head for _, head in COLUMNS], [[cell(key, row.get(key)) for key, _ in COLUMNS] for row in rows])


def cell(key: str, value: Any) -> str:
    """One *value* of a row as a person reads it; "-" when it is not known."""
    if value is None:
        return "-"
    if key.endswith("_bytes"):
        return output.quantity(value)
    if key.endswith("_seconds"):
        return f"{value:.1f} s"
    return str(value)


def process_facts(pid: object) -> dict[str, Any]:
    """How many processes and threads the program *pid* has, its own included, and their commands.

    Empty when the process is gone or is not ours to see, as with a daemon in another pid namespace. The commands come
    from the cell and are hostile text.
    """
    if not isinstance(pid, int) or pid <= 1:
        return {}
    import psutil

    try:
        program = psutil.Process(pid)
        tree = [program, *program.children(recursive=True)]
    except psutil.Error:
        return {}
    threads = 0
    names = []
    for process in tree:
        try:
            threads += process.num_threads()
            names.append(process.name())
        except psutil.Error:  # ended meanwhile, or another user's under hidepid
            continue
    return {"processes": len(tree), "threads": threads, "commands": sorted(names)}
