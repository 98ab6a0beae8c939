"""``sandboxd install-service``: the systemd service, made or taken back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sandboxd.cli import output

if TYPE_CHECKING:
    from sandboxd.install.steps import Host, Step

__all__ = ["install_service"]


@click.command("install-service")
@click.option("--dry-run", is_flag=True, help="Only show each step and the text of each file.")
@click.option("--uninstall", is_flag=True, help="Stop the service and remove what was installed.")
@click.option("--user", "for_user", is_flag=True, help="A service of your own, without root.")
@click.option(
    "--root",
    default="/",
    metavar="DIR",
    type=click.Path(file_okay=False, resolve_path=True),
    help="Prepare the system tree in DIR instead of the running one.",
)
@click.option("--exec", "program", metavar="PATH", help="The sandboxd command that the units start, if not this one.")
@click.option("--packaged", is_flag=True, hidden=True, help="For a package's scripts: its files are there.")
@click.pass_context
def install_service(
    ctx: click.Context, dry_run: bool, uninstall: bool, for_user: bool, root: str, program: str | None, packaged: bool
) -> None:
    """Install the systemd service: units, user, subordinate ids and directories.

    What is there already stays as it is; a second time changes nothing. The socket is enabled and started, and the
    daemon with its first client.
    """
    from sandboxd.errors import Unavailable
    from sandboxd.install import place, plans
    from sandboxd.install.steps import Host

    if program is not None and not program.startswith("/"):
        raise click.BadParameter("it must be an absolute path", param_hint="--exec")
    host = Host(Path(root), for_user)
    layout = plans.PACKAGE if packaged else plans.ADMIN
    command = place.command() if program is None else [program]
    refusal = None
    try:
        if uninstall:
            plans.check_caller(host)
        elif packaged:  # in a container there may be no systemd
            plans.check_account(host)
        else:
            plans.check(host)
            plans.check_alone(host)
            if program is None and not for_user:
                place.check(command[0])
    except Unavailable as error:
        if not dry_run:
            raise
        refusal = error
    if for_user:
        steps = plans.uninstall_for_user(host) if uninstall else plans.install_for_user(host, command)
    else:
        steps = plans.uninstall(host, layout) if uninstall else plans.install(host, layout, command)
    os.umask(0o022)
    done = _show(host, steps) if dry_run else _perform(host, steps)
    for kept in host.kept:
        output.write(f"kept: {output.escape(kept)}")
    if refusal is not None:
        output.write(f"would be refused: {output.escape(str(refusal))}")
        ctx.exit(125)
    if not done:
        output.write("Nothing to do." if uninstall else "Everything is installed already.")
    elif not dry_run and not uninstall and host.live and not for_user:
        output.write("Whoever shall run programs joins the group: usermod --append --groups sandboxd NAME")


def _show(host: Host, steps: list[Step]) -> int:
    needed = 0
    for step in steps:
        if not step.needed(host):
            output.write(f"not needed: {output.escape(str(step))}")
            continue
        needed += 1
        output.write(f"would {output.escape(str(step))}")
        for line in step.text.splitlines():
            output.write(f"    {output.escape(line)}".rstrip())
        host.changed.add(step.path)  # for the steps that come after it
    return needed


def _perform(host: Host, steps: list[Step]) -> int:
    done = 0
    for step in steps:
        if step.needed(host):
            output.write(output.escape(str(step)))
            step.do(host)
            done += 1
    return done
