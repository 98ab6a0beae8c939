"""``sandboxd reload``: a daemon reads its files again, and says what came of it."""

from __future__ import annotations

import click

from sandboxd.cli import output
from sandboxd.cli.params import ADDRESS, DEFAULT_ADDRESS

__all__ = ["reload"]


@click.command()
@click.option("--connect", type=ADDRESS, default=DEFAULT_ADDRESS, show_default=True, help="The daemon to reload.")
def reload(connect: str) -> None:
    """Have a daemon read its configuration and policies again, without dropping a run.

    For root and the user that the daemon runs as. A wrong file is named and
    changes nothing; the exit status is 2 then.
    """
    from sandboxd.client import admin

    said = admin.reload(connect)
    for sentence in said or ["Nothing has changed."]:
        output.write(output.escape(sentence))
