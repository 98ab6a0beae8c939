"""``sandboxd logs``: the audit record, of a daemon or in a file: shown, followed, checked.

What stands in it came from programs and clients: it reaches a terminal through ``escape`` only, and no line of a
program can look like one of ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import stat
from typing import TYPE_CHECKING, Any, Final

import click

from sandboxd.cli import output
from sandboxd.cli.params import ADDRESS, DEFAULT_ADDRESS
from sandboxd.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandboxd.audit.reader import Cursor, Page

__all__ = ["logs"]

DEFAULT_FILE: Final = "/var/log/sandboxd/audit.jsonl"
LOOK_MILLISECONDS: Final = 200
BROKEN: Final = 1
RUN_ID: Final = re.compile(r"[0-9a-f]{1,64}")
_HEADLINE: Final = ("time", "event", "id")
_LAST: Final = ("sequence", "previous")


@click.command()
@click.option("--file", "file", metavar="PATH", help=f"A file of audit records; a daemon's is {DEFAULT_FILE}.")
@click.option("--connect", type=ADDRESS, help=f"A daemon to ask. [default: {DEFAULT_ADDRESS}, if one is there]")
@click.option("--follow", is_flag=True, help="Go on with what is recorded from now on, until Ctrl-C.")
@click.option("--run", "run", metavar="ID", help="Show all of one run, with its source text.")
@click.option("--verify", is_flag=True, help="Check the hash of every record; exit 1 when the chain is broken.")
@click.option("--json", "as_json", is_flag=True, help="Print the lines as they are recorded.")
def logs(file: str | None, connect: str | None, follow: bool, run: str | None, verify: bool, as_json: bool) -> None:
    """Show the audit record, one line for each event: your own runs', or everybody's for root and the service user.

    --verify reads the files themselves, and proves as much as their last hash, which should be kept elsewhere: whoever
    can write the file can write it anew.
    """
    if file is not None and connect is not None:
        raise click.UsageError("--file and --connect exclude each other.")
    if verify:
        if connect is not None or follow or run is not None:
            raise click.UsageError("--verify reads a file, so it cannot go with --connect, --follow or --run.")
        click.get_current_context().exit(check(file or DEFAULT_FILE, as_json))
    if run is not None and not RUN_ID.fullmatch(run):
        raise click.UsageError(f"--run takes a run's id, 16 digits and letters from a to f, and {run!r} is none.")
    from sandboxd.audit.reader import follow as lines

    show = raw if as_json else whole if run is not None else brief
    with source(file, connect, run) as fetch:
        for line in lines(fetch, pause if follow else None):
            show(line)


@contextlib.contextmanager
def source(file: str | None, connect: str | None, run: str | None) -> Iterator[Callable[[Cursor], Page]]:
    """What fetches the record's pages. Raises Unavailable."""
    if file is None and (connect is not None or _is_socket(DEFAULT_ADDRESS.partition(":")[2])):
        from sandboxd.client.admin import pages

        with pages(connect or DEFAULT_ADDRESS, run) as fetch:
            yield fetch
        return
    from sandboxd.audit.reader import page

    path = file or DEFAULT_FILE

    def read(cursor: Cursor) -> Page:
        try:
            return page(path, cursor, run=run)
        except OSError as error:
            raise unreadable(path, error) from error

    yield read


def unreadable(path: str, error: OSError) -> Unavailable:
    """Why the file *path* cannot be shown."""
    fix = {
        13: "run it as root, or ask the daemon: --connect unix:PATH",
        2: "name the file with --file, or a daemon with --connect unix:PATH",
    }.get(error.errno or 0, "name a file of audit records with --file")
    return Unavailable("audit", f"{path} cannot be read", errno=error.errno, fix=fix)


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def pause() -> None:
    """Wait for a moment, or until nobody reads our output any more. Raises OutputLost then."""
    import errno

    poller = select.poll()
    poller.register(1, 0)  # its errors alone: POLLERR of a pipe that has no reader
    if poller.poll(LOOK_MILLISECONDS):
        raise output.OutputLost("stdout", errno.EPIPE)


def check(path: str, as_json: bool) -> int:
    """Verify the record at *path* and say what was found; the exit status."""
    import dataclasses

    from sandboxd.audit.reader import verify

    try:
        found = verify(path)
    except OSError as error:
        raise unreadable(path, error) from error
    if as_json:
        plain = dataclasses.asdict(found)
        del plain["blind"]
        output.emit_json({**plain, "ok": not found.problems})
        return BROKEN if found.problems else 0
    for problem in found.problems:
        output.write(output.escape(f"{problem.file}:{problem.line}: {problem.what}"))
    if found.more:
        output.write(f"and {found.more:,} more")
    words = [f"{found.records:,} records"]
    if found.first > 1:
        words.append(f"from number {found.first:,} on (older files are not here)")
    if found.recovered:
        words.append(f"{found.recovered:,} torn by crashes and told")
    if found.lost:
        words.append(f"{found.lost:,} that could not be written and were counted")
    output.write(f"{'BROKEN' if found.problems else 'unbroken'}: {', '.join(words)}")
    output.write(f"last: number {found.last:,}, sha256 {found.sha256}")
    return BROKEN if found.problems else 0


def raw(line: bytes) -> None:
    """A line as it is recorded, which is ASCII; one that somebody damaged is escaped."""
    output.write(output.escape(line.decode("utf-8", "backslashreplace").rstrip("\n")))


def brief(line: bytes) -> None:
    """One line for one event."""
    record = parsed(line)
    if record is None:
        raw(line)
        return
    output.write(headline(record))


def parsed(line: bytes) -> dict[str, Any] | None:
    """The record in *line*; None when there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def headline(record: dict[str, Any]) -> str:
    """Time, event, run, client and what matters most of the rest, escaped."""
    client = record.get("client")
    who = "-"
    if isinstance(client, dict):
        who = str(client.get("name") or client.get("uid"))
    words = [record.get("time"), f"{record.get('event')!s:<12}", record.get("id") or "-", who, *_words(record)]
    return output.escape(" ".join(str(word) for word in words))


def _words(record: dict[str, Any]) -> Iterator[str]:
    event = record.get("event")
    policy = record.get("policy")
    if event == "run_started":
        yield str(policy.get("name")) if isinstance(policy, dict) else "-"
        yield f"{record.get('language')} {record.get('filename')}, {len(str(record.get('code')).encode()):,} bytes"
    elif event == "run_ended":
        yield from _ending(record)
    elif event == "tool_called" and isinstance(refused := record.get("refused"), dict):
        yield f"calls refused by the engine: {', '.join(f'{count} {code}' for code, count in refused.items())}"
    elif event == "tool_called":
        yield f"{record.get('tool')}, from {record.get('caller')}:"
        yield "ok" if record.get("ok") else str(record.get("code") or "not answered, its run ended")
        if isinstance(seconds := record.get("seconds"), int | float):
            yield f"{seconds:.3f} s"
    elif event == "gap":
        yield f"{record.get('lost')} records could not be written"
    elif event == "recovered":
        torn = record.get("torn")
        yield f"{torn.get('bytes') if isinstance(torn, dict) else '?'} bytes of a torn line"


def _ending(record: dict[str, Any]) -> Iterator[str]:
    failure = record.get("failure")
    yield str(record.get("status") or "not run")
    if record.get("exit_code"):
        yield f"exit {record['exit_code']}"
    if record.get("signal"):
        yield f"signal {record['signal']}"
    hit = record.get("limits_hit")
    if isinstance(hit, list) and hit:
        yield f"({', '.join(str(one.get('limit')) for one in hit if isinstance(one, dict))})"
    usage = record.get("usage")
    if isinstance(usage, dict) and isinstance(usage.get("wall_seconds"), int | float):
        yield f"{usage['wall_seconds']:.3f} s"
    if isinstance(failure, dict):
        yield str(failure.get("text"))


def whole(line: bytes) -> None:
    """All of one event; texts of several lines keep their lines, each behind a bar."""
    record = parsed(line)
    if record is None:
        raw(line)
        return
    output.write(output.paint(headline(record), "head"))
    for key, value in record.items():
        if key not in (*_HEADLINE, *_LAST) and value is not None:
            _field(key, value)
    output.write()


def _field(key: str, value: Any) -> None:
    """One field, indented. Nothing that a program wrote begins a line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if "\n" in text or (key == "code" and text):
        output.write(f"  {output.escape(key)}:")
        for one in text.split("\n"):
            output.write(f"  | {escaped(one)}")
        return
    output.write(f"  {output.escape(key)}: {escaped(text)}")


def escaped(text: str) -> str:
    """As ``output.escape``, but for tabs, which programs are indented with."""
    return "\t".join(output.escape(part) for part in text.split("\t"))
