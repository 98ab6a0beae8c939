"""``sandboxd bench``: what isolation costs on this host."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from sandboxd.cli import output

__all__ = ["bench"]

EXIT_FAILED = 1


@click.command()
@click.option("--policy", "policy", default="default", metavar="NAME|FILE", help="The policy to measure [default].")
@click.option("--seconds", type=click.FloatRange(0.5, 3600), help="How long to measure, starts apart [20; quick: 3].")
@click.option("--quick", is_flag=True, help="A rough look: few seconds, no daemon, one fork loop.")
@click.option("--peers/--no-peers", default=True, help="Also measure other sandboxes found on this host [peers].")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.png", help="Draw a picture.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, raw samples included.")
@click.pass_context
def bench(
    ctx: click.Context,
    policy: str,
    seconds: float | None,
    quick: bool,
    peers: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure what a run costs here, beside the kernel's own floor and beside every peer found on this host.

    All rows are measured in turn, in the same minutes. A run that did not end well with the right value is counted as a
    failure and is never a sample; exit status 1 when one of ours failed.
    """
    if plot is not None:
        from sandboxd.bench.plot import available

        if not available():
            raise click.UsageError("--plot needs matplotlib: pip install matplotlib")
        if not plot.parent.is_dir():
            raise click.UsageError(f"--plot: there is no directory {output.escape(str(plot.parent))}.")
    from sandboxd.bench.measure import Settings, measure
    from sandboxd.bench.stats import Failed

    chosen = Settings(policy, seconds or (3.0 if quick else 20.0), quick, peers)
    try:
        found = measure(chosen, lambda line: click.echo(f"{line} …", err=True) if sys.stderr.isatty() else None)
    except Failed as error:
        output.complain(f"nothing could be measured: {error}")
        ctx.exit(EXIT_FAILED)
    if plot is not None:
        from sandboxd.bench.plot import draw

        try:
            draw(found, plot)
        except OSError as error:
            output.complain(f"{plot}: {error.strerror or error}")
            ctx.exit(EXIT_FAILED)
    if as_json:
        output.emit_json(found)
    else:
        _show(found, plot)
    failed = any(row["failures"] for row in found["rows"] if row["group"] == "sandboxd")
    ctx.exit(EXIT_FAILED if failed or found["throughput"][0]["failures"] else 0)


def _show(found: dict[str, Any], plot: Path | None) -> None:
    """The table, for a person."""
    from sandboxd.bench import report

    for line in report.about(found):
        output.write(output.paint(output.escape(line), "dim"))
    output.write()
    output.table(report.HEAD, report.rows(found))
    output.write()
    output.table(("THROUGHPUT", "PER SECOND", "FAILED"), report.throughput(found))
    for one in found["absent"]:
        output.write(output.escape(f"Not measured: {one['key']}: {one['why']}"))
    for row in found["rows"]:
        for reason, count in row["reasons"].items():
            output.complain(f"{row['what']}: {count} failed: {reason}")
    if plot is not None:
        output.write(f"Drawn to {output.escape(str(plot))}")
