"""``sandboxd policy``: which policies there are, what one of them means in full, and what is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from sandboxd.cli import output
from sandboxd.errors import PolicyError

__all__ = ["policy"]

EXIT_WRONG = 2


@click.group()
def policy() -> None:
    """List, show and check policies.

    A policy is a TOML file: the operator's in /etc/sandboxd/policies, then the shipped ones.
    """


@policy.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def list_(as_json: bool) -> None:
    """List the policies that can be named, and the file of each."""
    from sandboxd import policy as policies

    rows: list[dict[str, str | None]] = []
    for name, file in policies.installed().items():
        try:
            found, error = policies.load(name), None
        except PolicyError as problem:
            found, error = None, str(problem)
        rows.append({"name": name, "file": str(file), "sha256": found.sha256 if found else None, "error": error})
    if as_json:
        output.emit_json(rows)
        return
    output.table(
        ["NAME", "FILE", "SHA256"],
        [
            [row["name"] or "", row["file"] or "", row["sha256"] or "broken: see `sandboxd policy check`"]
            for row in rows
        ],
    )


@policy.command()
@click.argument("name_or_file", metavar="NAME|FILE")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(name_or_file: str, as_json: bool) -> None:
    """Show the effective value of every key, and every system call that the seccomp filter decides on."""
    from sandboxd import policy as policies
    from sandboxd import seccomp
    from sandboxd.policy.files import file_of

    shown = policies.load(name_or_file)
    try:
        filtered = seccomp.effective(shown.seccomp.profile, shown.seccomp.allow, shown.seccomp.deny)
    except PolicyError as problem:
        raise policies.located(problem, file_of(name_or_file)) from None
    if as_json:
        output.emit_json(
            {
                "policy": shown.plain(),
                "sha256": shown.sha256,
                "seccomp": {
                    "sha256": filtered.sha256,
                    "default_action": str(filtered.default_action),
                    "rules": [rule.plain() for rule in filtered.rules],
                },
            }
        )
        return
    output.write(f"# sha256 of the values below: {shown.sha256}")
    for line in _toml(shown.plain()):
        output.write(line)
    output.write()
    output.write(f"# sha256 of the system calls below: {filtered.sha256}")
    output.write(f"# any other call: {filtered.default_action}")
    output.table(
        ["ACTION", "SYSCALL", "CONDITION", "REASON"],
        [[str(rule.action), rule.syscall, rule.condition, rule.reason] for rule in filtered.rules],
    )


@policy.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(file: Path, as_json: bool) -> None:
    """Say everything that is wrong with a policy file, with key and line; exit 2 when something is."""
    from sandboxd import policy as policies

    found, problems = policies.check(file)
    if found is not None:
        from sandboxd import seccomp

        try:
            seccomp.effective(found.seccomp.profile, found.seccomp.allow, found.seccomp.deny)
        except PolicyError as problem:
            problems = [policies.located(problem, file)]
    if as_json:
        output.emit_json(
            {
                "file": str(file),
                "ok": not problems,
                "name": found.name if found else None,
                "sha256": found.sha256 if found else None,
                "problems": [{"key": p.key, "line": p.line, "message": p.message} for p in problems],
            }
        )
    elif problems:
        for found_problem in problems:
            output.write(output.escape(str(found_problem)), err=True)
    elif found is not None:
        output.write(output.escape(f"{file}: policy {found.name!r} is valid, sha256 {found.sha256}"))
    if problems:
        click.get_current_context().exit(EXIT_WRONG)


def _toml(plain: dict[str, Any]) -> list[str]:
    """The lines of *plain* as a policy file that gives the same policy, with each limit's kernel object beside it."""
    from sandboxd.limits import LIMITS, spell

    lines = [f"name = {json.dumps(plain['name'])}"]
    for section, values in plain.items():
        if section == "name":
            continue
        lines += ["", output.paint(f"[{section}]", "head")]
        for key, value in values.items():
            if section == "limits":
                spelled = spell(key, value)
                setting = f"{key} = {spelled if _is_number(spelled) else json.dumps(spelled)}"
                lines.append(f"{setting:<32}{output.paint(f'# {LIMITS[key].kernel}', 'dim')}")
            elif value is None:
                lines.append(output.paint(f"# {key} is not set", "dim"))
            else:
                lines.append(f"{key} = {output.escape(json.dumps(value, ensure_ascii=False))}")
    return lines


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()
