"""The command line: one click group, whose commands are imported only when they are used.

Exit statuses are part of the contract. Whatever a command raises becomes one line on stderr and a status in one
place (``CommandLine.invoke``): 2 for what the caller got wrong, 75 for an engine that is full, 125 for a host that
cannot or a failure of ours, 130 for Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from typing import Any

try:
    from importlib import import_module

    import click

    from sandboxd.cli import output
    from sandboxd.errors import Busy, InvalidRequest, PolicyError, SandboxError
except KeyboardInterrupt:  # nothing has begun, and nobody wants to see where
    sys.exit(130)

__all__ = ["CommandLine", "cli", "failure_status", "main"]

EXIT_USAGE = 2
EXIT_BUSY = 75
EXIT_UNAVAILABLE = 125
EXIT_INTERRUPTED = 130
EXIT_READER_GONE = 141  # what a shell reports of a program that SIGPIPE ended

# name: (module, attribute, help line). The line stands here so that `sandboxd --help` imports none of them.
COMMANDS = {
    "run": ("sandboxd.cli.run", "run", "Run one program in a fresh cell."),
    "serve": ("sandboxd.cli.serve", "serve", "Run the daemon on a Unix socket."),
    "reload": ("sandboxd.cli.reload", "reload", "Have a daemon read its configuration and policies again."),
    "doctor": ("sandboxd.cli.doctor", "doctor", "Show what this host can enforce, and how to mend the rest."),
    "policy": ("sandboxd.cli.policy", "policy", "List, show and check policies."),
    "ps": ("sandboxd.cli.ps", "ps", "List the live cells of a daemon."),
    "stats": ("sandboxd.cli.stats", "stats", "Show the counters of a daemon."),
    "logs": ("sandboxd.cli.logs", "logs", "Show, follow and check the audit record."),
    "bench": ("sandboxd.cli.bench", "bench", "Measure what isolation costs on this host."),
    "install-service": ("sandboxd.cli.service", "install_service", "Install the systemd service, or remove it."),
}

# Promised names that have no code yet.
LATER = {
    "mcp": "the Model Context Protocol server",
}


class CommandLine(click.Group):
    """A group that imports a command's module when the command is used, and maps our errors to exit statuses."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            module, attribute, _ = COMMANDS[cmd_name]
            command = getattr(import_module(module), attribute)
            assert isinstance(command, click.Command)  # noqa: S101  narrows Any; COMMANDS is ours
            return command
        if cmd_name in LATER:
            return later(cmd_name)
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        try:
            return super().make_context(*args, **extra)
        except KeyboardInterrupt:  # click's own answer is status 1
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
        except OSError as error:  # it writes the help of the group
            raise click.exceptions.Exit(output_lost(output.OutputLost("stdout", error.errno or errno.EIO))) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except output.OutputLost as error:
            ctx.exit(output_lost(error))
        except SandboxError as error:
            output.complain(output.describe(error))
            ctx.exit(failure_status(error))
        except KeyboardInterrupt:
            ctx.exit(EXIT_INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:  # not 1, which is the status of a program that raised
            if isinstance(error, OSError) and error.filename is None and error.errno in (errno.EPIPE, errno.ENOSPC):
                ctx.exit(output_lost(output.OutputLost("stdout", error.errno)))  # click's own, such as a command's help
            import traceback

            output.complain("a failure of sandboxd itself; please report it with what follows")
            traceback.print_exc()
            ctx.exit(EXIT_UNAVAILABLE)


def output_lost(error: output.OutputLost) -> int:
    """Say that our stdout or stderr takes no more, unless its reader went away; the exit status for it."""
    if not error.reader_gone:
        output.complain(str(error))
    output.silence()
    return EXIT_READER_GONE if error.reader_gone else EXIT_UNAVAILABLE


def failure_status(error: SandboxError) -> int:
    """The exit status of a command that *error* ended."""
    if isinstance(error, PolicyError | InvalidRequest):
        return EXIT_USAGE
    if isinstance(error, Busy):
        return EXIT_BUSY
    return EXIT_UNAVAILABLE


def later(name: str) -> click.Command:
    """A command that takes any arguments and says that *name* comes in a later version."""

    def refuse(arguments: tuple[str, ...]) -> None:
        raise click.UsageError(f"'{name}' ({LATER[name]}) comes in a later version of sandboxd.")

    return click.Command(
        name,
        callback=refuse,
        params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
        hidden=True,
    )


def version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    """Print the installed version and exit; its source is the package's metadata, read only here."""
    if not value or ctx.resilient_parsing:
        return
    from importlib import metadata

    try:
        found = metadata.version("sandboxd")
    except metadata.PackageNotFoundError:
        found = "(not installed: run from a source tree)"
    click.echo(f"sandboxd {found}")
    ctx.exit(0)


@click.group(cls=CommandLine, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=version, help="Show the version and exit."
)
def cli() -> None:
    """Run code that a language model wrote in a fresh, sealed Linux process.

    `sandboxd run FILE` runs one program; `sandboxd doctor` says what this host can enforce.
    """


def _show_warning(message: Warning | str, *_where: object, **_source: object) -> None:
    """A warning of the library is for whoever gave the command; the line of code that it came from is not."""
    output.complain(str(message))


def main() -> None:
    """The ``sandboxd`` command, with the arguments of this process; never returns."""
    warnings.showwarning = _show_warning
    # A caller may close descriptors 0 to 2; the next file opened here would then take such a number, and the program's
    # output would go into it.
    try:
        for fd in range(3):
            try:
                os.fstat(fd)
            except OSError:
                os.open(os.devnull, os.O_RDWR)
        cli(prog_name="sandboxd")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
