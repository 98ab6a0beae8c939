"""What a model should do next after a run of its code: one or two sentences for each way to end. Pure.

The status and the limits are evidence; the exception's type and words are the program's own, so they choose between
sentences of ours and are quoted short, and never become the sentence.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sandboxd.limits import LIMITS, spell

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sandboxd.client.result import LimitHit, Result

__all__ = ["Surroundings", "advice", "missing_module"]

SHOWN_NAMES: Final = 60
QUOTED_CHARACTERS: Final = 80

_MISSING: Final = re.compile(r"No module named '([^']{1,200})'")
_NO_NETWORK: Final = (
    "[Errno 97]",  # EAFNOSUPPORT: the filter has no address family but AF_UNIX
    "[Errno 101]",  # ENETUNREACH
    "Name or service not known",
    "Temporary failure in name resolution",
    "Address family not supported",
    "Network is unreachable",
)
_NETWORK_ERRORS: Final = ("socket.gaierror", "urllib.error.URLError", "requests.", "httpx.", "aiohttp.", "urllib3.")
_PATH: Final = re.compile(r"No such file or directory: b?'([^']{0,200})'")


@dataclass(frozen=True)
class Surroundings:
    """What the program could have used: tools, input files, the packages of the interpreter, and the longest timeout in
    seconds (both None when they are not known).
    """

    tools: Sequence[str] = ()
    files: Sequence[str] = ()
    packages: Sequence[str] | None = None
    longest: float | None = None


def missing_module(result: Result) -> str | None:
    """The top-level module that the program wanted and that is not there."""
    if result.error is None or result.error.type not in ("ModuleNotFoundError", "ImportError"):
        return None
    found = _MISSING.search(result.error.message)
    return found[1].partition(".")[0] if found else None


def advice(result: Result, around: Surroundings) -> str:
    """One or two sentences on how to go on; empty when there is nothing to say."""
    if result.status == "ok":
        shown = result.stdout or result.stderr or result.results or result.files
        return "" if shown else "The program showed nothing: print() what you want to see, and save figures as files."
    if result.status == "error":
        return _after_error(result, around)
    if result.status == "timeout":
        return _timeout(result, around)
    words = _ENDS.get(result.status)
    return words(result) if words else "Run it again."


def _hit(result: Result, *limits: str) -> LimitHit | None:
    return next((hit for hit in result.limits_hit if hit.limit in limits), None)


def _spelled(hit: LimitHit | None) -> str:
    """The value of the limit with its unit, or empty."""
    if hit is None or not isinstance(hit.value, int | float) or hit.limit not in LIMITS:
        return ""
    text = spell(hit.limit, hit.value)
    unit = LIMITS[hit.limit].unit
    return (
        f"{text} s" if unit == "seconds" else f"{text[:-1]} {text[-1]}iB" if text[-1:] in ("K", "M", "G", "T") else text
    )


def _timeout(result: Result, around: Surroundings) -> str:
    if _hit(result, "approval_seconds"):
        return "Nobody decided on a tool call in time. Go on without that call, or say what you need it for."
    if _hit(result, "tool_wait_seconds"):
        return "The program waited too long for its tool calls. Make fewer calls, or ask for less in each."
    hit = _hit(result, "wall_seconds")
    asleep = result.usage.cpu_user_seconds + result.usage.cpu_system_seconds < 0.1 * result.usage.wall_seconds
    why = "It was mostly waiting: remove sleeps and waits" if asleep else "Do less work, use a faster method"
    longer = ""
    if around.longest is not None and hit is not None and isinstance(hit.value, int | float):
        longer = f", or ask for a longer `timeout`, up to {around.longest:g}" if hit.value < around.longest else ""
    return f"It ran for the whole {_spelled(hit) or 'time it had'} and was stopped. {why}, or split the task{longer}."


def _cpu(result: Result) -> str:
    limit = _spelled(_hit(result, "cpu_seconds")) or "all the CPU time it had"
    return f"It used {limit} of CPU time over all its processes. Use a faster method (vectorise), or split the task."


def _memory(result: Result) -> str:
    limit = _spelled(_hit(result, "memory_bytes")) or "it may have"
    return (
        f"It needed more than {limit} of memory, files in /workspace and /tmp included. Read in chunks, "
        "keep only the columns you need, and delete what is done with."
    )


def _output(result: Result) -> str:
    limit = _spelled(_hit(result, "output_stop_bytes"))
    return (
        f"It printed more than {limit or 'is allowed'} and was stopped. Print a summary, "
        "and write long output to a file in /workspace."
    )


def _denied(result: Result) -> str:
    hit = _hit(result, "syscall")
    name = f" ({hit.value})" if hit is not None and isinstance(hit.value, str) else ""
    return f"It made a system call that is not allowed here{name}. Do it another way, in plain Python."


_MAPPED: Final = {"shm_bytes": "/dev/shm", "tmp_bytes": "/tmp", "workspace_bytes": "/workspace"}  # noqa: S108


def _bus_error(result: Result) -> str:
    hit = _hit(result, *_MAPPED)
    if hit is not None:
        where = f"{_MAPPED[hit.limit]}, which holds {_spelled(hit)}, was full"
        return f"A mapped file or shared memory had no room: {where}. Map or share less at a time."
    return "A mapped file or shared memory was cut short, or had no room left. Map or share less at a time."


def _killed(result: Result) -> str:
    if result.signal == 7:
        return _bus_error(result)
    if result.signal in (11, 4, 8):
        return "The interpreter crashed, in native code most likely. Avoid the call that the last output points to."
    if result.signal == 6:
        return "The program aborted itself, in native code most likely. Avoid the call that the last output points to."
    return "It was ended by a signal. Run it again; if that recurs, use less memory and fewer processes."


_ENDS: Final[Mapping[str, Callable[[Result], str]]] = {
    "cpu": _cpu,
    "memory": _memory,
    "output": _output,
    "denied": _denied,
    "killed": _killed,
    "cancelled": lambda _: "The run was cancelled by the host. Run it again only if the task still asks for it.",
    "internal": lambda _: "The sandbox failed and the outcome is unknown; tool calls may have been made. Run it again.",
}


def _after_error(result: Result, around: Surroundings) -> str:
    error = result.error
    if error is None:
        return f"The program ended itself with exit status {result.exit_code}; what it printed should say why."
    if _is_network(error.type, error.message):
        tools = f"; get data through {_listed([f'tools.{one}' for one in around.tools])}" if around.tools else ""
        return f"There is no network here and never will be{tools or '; work with what the conversation holds'}."
    missing = missing_module(result)
    if missing is not None:
        return _not_installed(missing, around)
    if error.type == "tools.UnknownTool":
        return f"There is no such tool. Code may call {_listed([f'tools.{one}' for one in around.tools])}."
    if error.type == "tools.ToolError":
        return "A tool call failed. Mend the call as its message says, or catch tools.ToolError and go on without it."
    for limit, words in _TOUCHED.items():
        if _hit(result, limit):
            return words.format(_spelled(_hit(result, limit)))
    if error.type == "OSError" and "[Errno 30]" in error.message:  # EROFS
        return _FIXED["PermissionError"]
    if error.type == "FileNotFoundError":
        return _no_file(error.message, around)
    where = "" if error.line is None else f" at line {error.line}"
    if error.type in ("SyntaxError", "IndentationError", "TabError"):
        if "'await' outside" in error.message:
            return "await works in a coroutine only: put it into `async def main()` and call `asyncio.run(main())`."
        return f"The source is not valid Python{where}, so nothing ran. Send the whole corrected program."
    fixed = _FIXED.get(error.type)
    if fixed:
        return fixed
    return f"Mend the error{where} and send the whole program again: nothing of this run is left."


_FIXED: Final = {
    "MemoryError": "It asked for more memory than it may have. Read in chunks, and keep only what you need.",
    "EOFError": "There is nobody to type: input() and stdin are empty. Put the values into the code.",
    "RecursionError": "The recursion is too deep. Use a loop, or mend the condition that should end it.",
    "PermissionError": "It may not do that here. Write only below /workspace or /tmp.",
}
_TOUCHED: Final = {
    "pids": "It may have {} processes and threads. Start fewer.",
    "workspace_bytes": "/workspace holds {}. Write less, or delete what is done with.",
    "workspace_files": "/workspace holds {} files. Write fewer.",
    "tmp_bytes": "It may have {} and 16,384 files in /tmp. Write less, or delete what is done with.",
    "shm_bytes": "It may have {} and 16,384 files in /dev/shm. Share less, or unlink what is done with.",
    "file_bytes": "One file may have {}. Write less.",
    "open_files": "It may have {} files open at once. Close them: use `with`.",
}


def _is_network(kind: str, message: str) -> bool:
    if kind.startswith(_NETWORK_ERRORS):
        return True
    return kind in ("OSError", "ConnectionError", "ConnectionRefusedError") and any(
        one in message for one in _NO_NETWORK
    )


def _not_installed(name: str, around: Surroundings) -> str:
    if name == "tools":
        if around.tools:
            names = _listed([f"tools.{one}" for one in around.tools])
            return f"Tools are called from the program itself, not from one that it starts; it may call {names}."
        return "No tool may be called from code here. Use the data that the conversation holds."
    shown = _quoted(name)
    if around.packages is None:
        return f"{shown} is not installed and cannot be. Use the standard library or another package."
    if name in around.packages:
        return f"A part of {shown} is missing here and cannot be installed. Do without it."
    near = difflib.get_close_matches(name, around.packages, 1, 0.8)
    meant = f" Did you mean {near[0]}?" if near else ""
    names = _listed(around.packages) or "none"
    return f"{shown} is not installed and cannot be.{meant} Installed are, beside the standard library: {names}."


def _no_file(message: str, around: Surroundings) -> str:
    found = _PATH.search(message)
    what = f"{_quoted(found[1])} is not there. " if found else ""
    if not around.files:
        return (
            f"{what}/workspace was empty: every run starts afresh, and no file of an earlier run is left. "
            "Make the file in this program, or pass it in `files`."
        )
    return f"{what}The files in /workspace were: {_listed(around.files)}. Files of earlier runs are gone."


def _quoted(text: str) -> str:
    """A program's words, short and on one line."""
    return repr(_short(text))


def _short(text: str) -> str:
    return text if len(text) <= QUOTED_CHARACTERS else f"{text[:QUOTED_CHARACTERS]}..."


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN_NAMES
    return ", ".join(map(_short, names[:SHOWN_NAMES])) + (f" and {more} more" if more > 0 else "")
