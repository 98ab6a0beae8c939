"""``sandboxd run``: one program in a fresh cell, embedded or through a daemon.

Start-up time is the product here, so everything slow is imported inside the function that needs it, and all that can be
wrong with the command line is found before an engine is started.
"""

from __future__ import annotations

import codecs
import os
import re
import signal
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from sandboxd.cli import EXIT_INTERRUPTED, EXIT_UNAVAILABLE, failure_status, output
from sandboxd.cli.exit_status import OPTIONS, exit_status, reason
from sandboxd.cli.files import BadInput, plan_inputs, read_bounded
from sandboxd.cli.params import ADDRESS, LimitType
from sandboxd.errors import Busy, ConnectionLost, InvalidRequest, SandboxError
from sandboxd.protocol.run_header import CODE_MAX_BYTES, check_args, check_code, check_env, check_filename

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sandboxd.client.result import Result
    from sandboxd.client.sandbox import Sandbox

__all__ = ["exit_status", "failure", "run"]

LIMIT_OPTIONS = {"timeout": "wall_seconds", "memory": "memory_bytes", "cpus": "cpus", "pids": "pids"}
STDIN_MAX_BYTES = 64 << 20
COOKIE = re.compile(rb"^[ \t\f]*#.*?coding[:=]", re.MULTILINE)  # PEP 263; whether it counts is tokenize's to say


@dataclass(frozen=True)
class Job:
    """What to run, checked and read in; the arguments of one ``Sandbox.run``."""

    source: str
    filename: str | None
    args: list[str]
    files: dict[str, Path | bytes]
    stdin: bytes | None
    env: dict[str, str]


class RunCommand(click.Command):
    """Says of an unknown option what it may have been meant for."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            words = error.format_message().removesuffix(".")
            raise click.UsageError(f"{words}; put the program's own options after --.", ctx) from None


@click.command(
    cls=RunCommand,
    options_metavar="[OPTIONS]",
    epilog="Exit status: the program's own; 128+N when a signal ended it; 124 timeout or CPU time; 137 memory; "
    "153 output; 159 denied by seccomp; 130 cancelled; 75 busy; 125 the host cannot; 2 wrong usage.",
)
@click.option("-c", "code", metavar="CODE", help="The program itself, as text.")
@click.option(
    "--policy",
    metavar="NAME|FILE",
    help="The policy to run under; a daemon takes names only.  [default: default, or the daemon's choice]",
)
@click.option(
    "--language", type=click.Choice(["python", "bash", "node"]), default="python", help="Only python in this version."
)
@click.option("--timeout", type=LimitType("wall_seconds"), help="Wall clock from the program's start.")
@click.option("--memory", type=LimitType("memory_bytes"), help="Memory of the whole cell, such as 256M.")
@click.option("--cpus", type=LimitType("cpus"), help="CPU time per time, such as 0.5.")
@click.option("--pids", type=LimitType("pids"), help="Processes and threads at once.")
@click.option(
    "--input",
    "inputs",
    metavar="HOST[:GUEST]",
    multiple=True,
    help="A file or directory to copy into /workspace. May be repeated.",
)
@click.option("--output-dir", metavar="DIR", help="Where to copy what the program wrote into /workspace.")
@click.option("--env", "env", metavar="K=V", multiple=True, help="A variable for the program. May be repeated.")
@click.option("--stdin", "stdin", metavar="FILE|-", help="What the program reads from stdin; empty unless given.")
@click.option("--connect", type=ADDRESS, help="Run through the daemon on this socket.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as one JSON object instead of streaming.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="FILE [-- ARG...]")
@click.pass_context
def run(ctx: click.Context, /, **given: Any) -> None:
    """Run one program in a fresh cell.

    FILE is a Python program, or - for one read from stdin; with -c the program is text on the command line. What
    follows goes to the program as sys.argv. Its output streams through as it comes, raw; a reason in one line follows
    on stderr when it did not end well.
    """
    job = prepare(given)
    limits = {name: given[option] for option, name in LIMIT_OPTIONS.items() if given[option] is not None}
    with ExitStack() as undo:
        directory = None
        if given["output_dir"] is not None:
            directory = open_directory(given["output_dir"])
            undo.callback(os.close, directory)
        ctx.exit(execute(job, given, limits, directory))


def open_directory(path: str) -> int:
    """A descriptor of the caller's directory *path*, made when it is missing. Raises click.BadParameter.

    Opened before the run, so that files go to the directory that was meant, whatever its name stands for later.
    """
    try:
        os.makedirs(path, exist_ok=True)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise wrong(
            "--output-dir", f"{path!r}: {error.strerror}; it must be a directory, or be free for one"
        ) from error


def prepare(given: dict[str, Any]) -> Job:
    """Check the command line and read what it names. Raises click.UsageError; nothing is started before it returns."""
    if given["language"] != "python":
        raise wrong("--language", f"{given['language']!r} comes in a later version of sandboxd; allowed: 'python'")
    arguments = list(given["arguments"])
    code = given["code"]
    if code is None and not arguments:
        raise click.UsageError("Nothing to run: give FILE, '-' for a program on stdin, or -c CODE.")
    path = None if code is not None else arguments.pop(0)
    if path == "-" and given["stdin"] == "-":
        raise click.UsageError("'-' and '--stdin -' both want stdin; give the program or its stdin as a file.")
    # The cheap checks first: a usage error must not wait for somebody to type a program.
    env = parse_env(given["env"], arguments)
    try:
        files, skipped = plan_inputs(given["inputs"])
    except BadInput as error:
        raise wrong("--input", str(error)) from error
    for name in skipped:
        output.complain(f"not copied into /workspace, neither a regular file nor a directory: {name}")
    return Job(
        source=read_source(path) if path is not None else code_text(code),
        filename=None if path is None or path == "-" else file_name(path),
        args=arguments,
        files=files,
        stdin=None if given["stdin"] is None else read_stdin(given["stdin"]),
        env=env,
    )


def wrong(option: str, problem: str) -> click.BadParameter:
    """The usage error of *option*; *problem* says what is wrong and what is allowed."""
    return click.BadParameter(f"{output.escape(problem).removesuffix('.')}.", param_hint=option)


def parse_env(pairs: tuple[str, ...], arguments: list[str]) -> dict[str, str]:
    """``K=V`` pairs as a mapping, checked together with the program's *arguments*. The last of a name wins."""
    env: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise wrong("--env", f"{pair!r} is not of the form K=V")
        env[name] = value
    try:
        check_args(arguments)
        check_env(env, arguments)
    except InvalidRequest as error:
        raise wrong("--env" if error.field.startswith("env") else "ARG", error.problem) from None
    return env


def file_name(path: str) -> str | None:
    """The name of the program's file for tracebacks and sys.argv[0]; None when it is not one that a cell can show."""
    try:
        return check_filename(os.path.basename(path))
    except InvalidRequest:
        return None


def code_text(code: str) -> str:
    """The program of ``-c``. Raises click.BadParameter."""
    try:
        return check_code(code)
    except InvalidRequest as error:
        raise wrong("-c", error.problem) from None


def read_source(path: str) -> str:
    """The text of the program in the file *path*, or on stdin for ``-``. Raises click.BadParameter."""
    try:
        data = read_bounded(0 if path == "-" else path, CODE_MAX_BYTES)
        if COOKIE.search(data[: _two_lines(data)]):
            return check_code(decoded(data))
        return check_code(data.removeprefix(codecs.BOM_UTF8))
    except BadInput as error:
        raise wrong("FILE", f"{path!r}: {error}") from error
    except InvalidRequest as error:
        raise wrong("FILE", f"{path!r}: {error.problem}; allowed: Python source in UTF-8") from None
    except OSError as error:
        raise wrong("FILE", f"{path!r}: {error.strerror}; it must be a file with Python source") from error


def _two_lines(data: bytes) -> int:
    """The length of the first two lines of *data*."""
    end = data.find(b"\n")
    end = data.find(b"\n", end + 1) if end >= 0 else -1
    return end if end >= 0 else len(data)


def decoded(data: bytes) -> str:
    """Source in the encoding that its first lines name, as ``tokenize.open`` decides. Raises BadInput."""
    import io
    import tokenize

    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise BadInput(f"byte {error.start} is not text in {encoding}, which the file names as its encoding") from None
    except (SyntaxError, LookupError) as error:
        raise BadInput(f"{error}; allowed: Python source in UTF-8, or in the encoding that it names") from None


def read_stdin(path: str) -> bytes:
    """What the program shall find on its stdin. Raises click.BadParameter."""
    try:
        return read_bounded(0 if path == "-" else path, STDIN_MAX_BYTES)
    except BadInput as error:
        raise wrong("--stdin", f"{path!r}: {error}") from error
    except OSError as error:
        raise wrong("--stdin", f"{path!r}: {error.strerror}; it must be a file that can be read, or '-'") from error


def execute(job: Job, given: dict[str, Any], limits: dict[str, Any], directory: int | None) -> int:
    """Run *job* and show how it went. Returns the exit status of the command; what went wrong is shown already.

    Ctrl-C cancels the run, whose Result is shown like any other; a second one does not wait for it.
    """
    as_json = bool(given["as_json"])
    stdout = output.Passthrough("stdout", sys.stdout)
    stderr = output.Passthrough("stderr", sys.stderr)
    result = None
    try:
        with open_sandbox(given["policy"], given["connect"], limits) as sandbox:
            from sandboxd.client.sandbox import Cancel

            cancel = Cancel()
            with on_interrupt(cancel):
                result = sandbox._run_cancellable(
                    cancel,
                    job.source,
                    filename=job.filename or "main.py",
                    results=job.filename is None,
                    args=job.args,
                    files=job.files,
                    stdin=job.stdin,
                    env=job.env,
                    on_stdout=None if as_json else stdout,
                    on_stderr=None if as_json else stderr,
                )
            if as_json:
                output.write(result.to_json())
            elif words := reason(result, policy_shown(given), limits if given["connect"] else OPTIONS):
                if not stderr.at_line_start:
                    output.write(err=True)
                output.complain(words)
            stored = directory is None or store_files(result, directory)
            status = exit_status(result)
            # The host could not do what was asked; a failure of the program's own is the better news to pass on.
            return status if stored or status else EXIT_UNAVAILABLE
    except SandboxError as error:
        if as_json:
            output.emit_json(failure(error))
        words = output.describe(error)
        if isinstance(error, InvalidRequest) and error.field == "files":
            words = f"--input: {error.problem}"
        output.complain(words)
        return failure_status(error)
    except KeyboardInterrupt:
        if result is None:  # else it is shown, or was about to be
            if as_json:
                output.emit_json(failure(None))
            output.complain("cancelled: interrupted before the outcome of the run was known")
        return EXIT_INTERRUPTED


@contextmanager
def on_interrupt(cancel: Callable[[], None]) -> Iterator[None]:
    """Within it the first SIGINT calls *cancel*, and a second raises KeyboardInterrupt. One that is ignored, as for a
    job in the background, stays so.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def first(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        cancel()

    try:
        signal.signal(signal.SIGINT, first)
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def policy_shown(given: dict[str, Any]) -> str:
    """What ``sandboxd policy show`` takes to show the policy of the run; the word NAME when only a daemon knows."""
    return str(given["policy"] or ("NAME" if given["connect"] else "default"))


def open_sandbox(policy: str | None, connect: str | None, limits: dict[str, Any]) -> Sandbox:
    """An embedded engine, or a daemon's, under *policy*; *limits* are those given on the command line.

    What was not given is left to the client: the default policy is "default" here, the operator's choice at a daemon.
    """
    from sandboxd.client.sandbox import Sandbox

    given: dict[str, Any] = {} if policy is None else {"policy": policy}
    if limits:
        from sandboxd.policy import Limits

        given["limits"] = Limits(**limits)
    # One program comes, so one cell waits.
    return Sandbox.connect(connect, **given) if connect else Sandbox(**given, pool={"maximum": 1})


def store_files(result: Result, directory: int) -> bool:
    """Copy what the run left below the descriptor *directory*; whether all of it could be stored."""
    whole = True
    for file in result.files:
        try:
            file.save(directory)
        except OSError as error:
            output.complain(f"could not store {file.path!r}: {error.strerror or error}")
            whole = False
    if result.files_skipped:
        output.complain(f"not stored: {result.files_skipped} (links, devices, or beyond a limit)")
    return whole


def failure(error: SandboxError | None) -> dict[str, Any]:
    """The JSON object of ``--json`` when there is no Result: *error* ended the command, or Ctrl-C (None).

    It has the fields of a Result, empty, and ``failure`` with the error's own. ``status`` is "busy" or "cancelled" for
    those, "internal" when a run may have started and its outcome is unknown, and null when nothing was started.
    """
    if error is None:
        status: str | None = "cancelled"
    elif isinstance(error, Busy):
        status = "busy"
    elif isinstance(error, ConnectionLost) and error.may_have_started:
        status = "internal"
    else:
        status = None
    return {
        "id": None,
        "status": status,
        "exit_code": None,
        "signal": None,
        "stdout": "",
        "stderr": "",
        "stdout_dropped_bytes": 0,
        "stderr_dropped_bytes": 0,
        "error": None,
        "results": [],
        "files": [],
        "files_skipped": 0,
        "limits_hit": [],
        "usage": None,
        "timings": None,
        "warm": False,
        "isolation": None,
        "state": None,
        "failure": None if error is None else {**error.plain(), "text": str(error)},
    }
