"""``sandboxd doctor``: what this host can enforce, what is missing and how to mend it."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from sandboxd.cli import output

if TYPE_CHECKING:
    from sandboxd.diagnostics.doctor import Finding, Report
    from sandboxd.diagnostics.host_facts import Fact

__all__ = ["doctor"]

_STYLES = {"in force": "good", "missing": "bad", "unknown": "warn", "ok": "good", "attention": "warn"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as one JSON object.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Show what this host can enforce, what is missing, and how to mend it.

    Exit status 0 only if the default policy can be enforced in full by the user who asks.
    """
    from sandboxd.diagnostics.doctor import prove, survey

    try:
        report = survey()
    except OSError as error:
        output.complain(f"this host cannot be looked at: {error.strerror or error}")
        ctx.exit(1)
    # A cell proves nothing new when a wall is missing already: its engine would only say the same.
    if report.ok:
        report = replace(report, proof=prove())
    if as_json:
        output.emit_json(report.to_dict())
    else:
        show(report)
    ctx.exit(0 if report.ok else 1)


def show(report: Report) -> None:
    """The report for a person."""
    from sandboxd.diagnostics.doctor import MODES

    output.write(output.paint(f"Walls, as {MODES[report.mode]} (this process)", "head"))
    for wall in report.walls:
        line(wall.name, wall.modes[report.mode], 16)
        if wall.modes[report.mode].state != "in force" and not wall.stops.startswith("nothing"):
            output.write(f"  {'':16} stops: {wall.stops}")
    for mode, title in MODES.items():
        if mode != report.mode:
            output.write()
            output.write(output.paint(f"Walls, as {title}", "head"))
            for wall in report.walls:
                line(wall.name, wall.modes[mode], 16)
    output.write()
    output.write(output.paint("This host", "head"))
    for fact in report.facts:
        show_fact(fact)
    output.write()
    if report.proof is not None and report.proof.isolation is not None and report.proof.ok:
        output.write(output.paint("A cell was sealed here:", "good"))
        for key, value in report.proof.isolation.items():
            output.write(f"  {output.escape(key):16} {output.escape(spelled(value))}")
    elif report.proof is not None:
        output.complain(f"a cell could not be sealed here: {report.proof.problem}")
    verdict = (
        "The default policy can be enforced in full."
        if report.ok
        else "The default policy can NOT be enforced in full."
    )
    output.write(output.paint(verdict, "good" if report.ok else "bad"))


def line(name: str, finding: Finding, width: int) -> None:
    """One wall in one mode: state, evidence, and the fix on a line of its own."""
    state = output.paint(f"{finding.state:9}", _STYLES[finding.state], sys.stdout)
    output.write(f"  {name:{width}} {state} {output.escape(finding.detail)}")
    if finding.fix:
        output.write(f"  {'':{width}} {'to mend:':9} {output.escape(finding.fix)}")


def show_fact(fact: Fact) -> None:
    """One fact of the host; those that deserve attention with their meaning and fix."""
    state = output.paint(f"{fact.state:9}", _STYLES[fact.state], sys.stdout)
    output.write(f"  {fact.name:38} {state} {output.escape(fact.value)}")
    output.write(f"  {'':38} {'':9} {output.paint(output.escape(fact.meaning), 'dim')}")
    if fact.fix:
        output.write(f"  {'':38} {'to mend:':9} {output.escape(fact.fix)}")


def spelled(value: object) -> str:
    """A value of the receipt on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {spelled(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "nothing"
    return str(value)
