"""``sandboxd serve``: the daemon in the foreground."""

from __future__ import annotations

import sys

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
    # asyncio takes ssl along when it is there. The daemon speaks to nobody over a network.
    sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]
    from sandboxd.daemon import main

    ctx.exit(main(config_path, socket_path))
