"""``sandboxd serve``: the daemon in the foreground."""

from __future__ import annotations

import click

__all__ = ["serve"]


@click.command()
@click.option("--socket", "socket_path", metavar="PATH", help="The Unix socket to listen on, instead of the config's.")
@click.option(
    "--config",
    "config_path",
    type=click.Path(exists=True, dir_okay=False, readable=True),
    metavar="FILE",
    help="The daemon's configuration (TOML).",
)
@click.pass_context
def serve(ctx: click.Context, socket_path: str | None, config_path: str | None) -> None:
    """Run the daemon on a Unix socket, in the foreground, until a signal ends it."""
    from sandboxd.daemon import main

    ctx.exit(main(config_path, socket_path))
