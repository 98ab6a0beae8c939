"""What a model sees of a run: the value of ``run_code``, and that value as text. Pure.

Whatever the program wrote is bounded, its first and last part kept. In the text every line of it stands behind a bar,
so that no output can pass for a line of ours: a status, a file, advice.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from sandboxd.limits import LIMITS, spell
from sandboxd.tools.code.kept import file_reference, value_reference
from sandboxd.tools.result import readable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sandboxd.client.result import OutputFile, ProgramError, Result, RichResult

__all__ = ["STREAM_CHARACTERS", "as_text", "clipped", "flat", "value_of"]

STREAM_CHARACTERS: Final = 4000
"""Of stdout and of stderr, each."""
MESSAGE_CHARACTERS: Final = 1000
TRACEBACK_CHARACTERS: Final = 3000
RESULT_CHARACTERS: Final = 4000
MOST_RESULTS: Final = 8
RESULT_KINDS: Final = 8
"""Forms of one displayed value."""
NAME_CHARACTERS: Final = 200
"""Of an exception's type, and of a form of a displayed value."""
MOST_FILES: Final = 50
FILES_BYTES: Final = 32 << 10
"""Of JSON, of the names of all files: a path of 4 KiB can be 24 KiB there."""
KEPT_RESULTS: Final = "tool_results/"
"""Where a cell keeps large results of tools (sandboxd/inside/toolcalls.py)."""


def clipped(text: str, characters: int) -> str:
    """*text*, its middle replaced by a line that says how much is left out when it is longer than *characters*."""
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]}\n... {len(text) - 2 * half:,} characters left out ...\n{text[-half:]}"


def value_of(result: Result, *, tool_calls: int, advice: str, review: str | None) -> dict[str, Any]:
    """The answer to ``run_code``, with the names of the Result. Texts are short; files and displayed values other than
    text are named by a reference, which ``Dispatcher.file`` reads.
    """
    # Copies of tools' results that the cell keeps: the program did not make them, and a model has no use for them.
    made = [file for file in result.files if not file.path.startswith(KEPT_RESULTS)]
    files = _files(result.id, made)
    return {
        "id": result.id,
        "status": result.status,
        "exit_code": result.exit_code,
        "signal": result.signal,
        "stdout": clipped(result.stdout, STREAM_CHARACTERS),
        "stderr": clipped(result.stderr, STREAM_CHARACTERS),
        "stdout_dropped_bytes": result.stdout_dropped_bytes,
        "stderr_dropped_bytes": result.stderr_dropped_bytes,
        "error": None if result.error is None else _error(result.error),
        "results": [_shown(result.id, number, one) for number, one in enumerate(result.results[:MOST_RESULTS])],
        "files": files,
        "files_skipped": result.files_skipped + len(made) - len(files),
        "limits_hit": [hit.model_dump() for hit in result.limits_hit],
        "usage": _rounded(result.usage.model_dump()),
        "timings": _rounded(result.timings.model_dump()),
        "tool_calls": tool_calls,
        "review": review,
        "next": advice,
    }


def as_text(value: Mapping[str, Any]) -> str:
    """That value for a model to read."""
    return "\n".join(_lines(value))


def _error(error: ProgramError) -> dict[str, Any]:
    return {
        "type": error.type[:NAME_CHARACTERS],
        "message": clipped(error.message, MESSAGE_CHARACTERS),
        "line": error.line,
        "traceback": clipped(error.traceback, TRACEBACK_CHARACTERS),
    }


def _files(run: str, made: Sequence[OutputFile]) -> list[dict[str, Any]]:
    """The files of which a model is told: as many as there is room for."""
    told: list[dict[str, Any]] = []
    left = FILES_BYTES
    for file in made:
        if len(told) == MOST_FILES:
            break
        one = {"path": file.path, "size_bytes": file.size_bytes, "id": file_reference(run, file.path)}
        size = 2 * len(json.dumps(file.path))  # it stands in the reference as well
        if size <= left:
            left -= size
            told.append(one)
    return told


def _shown(run: str, number: int, one: RichResult) -> dict[str, Any]:
    mime: dict[str, Any] = {}
    kinds = [kind for kind in one.mime if len(kind) <= NAME_CHARACTERS]
    for kind in kinds[:RESULT_KINDS]:
        text = one.mime[kind]
        if kind == "text/plain":
            mime[kind] = clipped(text, RESULT_CHARACTERS)
        else:
            size = len(text) if kind.startswith("text/") else len(text) * 3 // 4
            mime[kind] = {"id": value_reference(run, number, kind), "size_bytes": size}
    return {"mime": mime}


def _rounded(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: round(one, 3) if isinstance(one, float) else one for name, one in numbers.items()}


def _lines(value: Mapping[str, Any]) -> Iterator[str]:
    yield _head(value)
    error = value["error"]
    if error is not None:
        yield "error:" if error["line"] is None else f"error at line {error['line']}:"
        yield from _barred(error["traceback"] or f"{error['type']}: {error['message']}")
    yield from _stream("stdout", value["stdout"])
    yield from _stream("stderr", value["stderr"] if error is None else _without(value["stderr"], error["traceback"]))
    for one in value["results"]:
        for kind, shown in one["mime"].items():
            if isinstance(shown, str):
                yield "result:"
                yield from _barred(shown)
            else:
                yield f"result: {flat(kind)}, {shown['size_bytes']:,} bytes, {flat(shown['id'])}"
    if value["files"]:
        yield "files:"
        for file in value["files"]:
            yield f"- {flat(file['path'])}, {file['size_bytes']:,} bytes, {flat(file['id'])}"
    if value["files_skipped"]:
        yield f"files not listed: {value['files_skipped']} (too many, too large, too long a name, or no regular files)"
    if value["limits_hit"]:
        yield f"limits reached: {', '.join(map(_limit, value['limits_hit']))}"
    if value["review"] is not None:
        yield "review, not accepted:"
        yield from _barred(value["review"])
    if value["next"]:
        yield f"next: {flat(value['next'])}"


def _head(value: Mapping[str, Any]) -> str:
    parts = [f"status: {value['status']}"]
    if value["exit_code"]:
        parts.append(f"exit status {value['exit_code']}")
    if value["signal"] is not None and value["status"] == "killed":
        parts.append(f"signal {value['signal']}")
    parts.append(f"{value['usage']['wall_seconds']:.2f} s")
    if value["tool_calls"]:
        parts.append("1 tool call" if value["tool_calls"] == 1 else f"{value['tool_calls']} tool calls")
    return ", ".join(parts)


def _stream(name: str, text: str) -> Iterator[str]:
    if text.strip():
        yield f"{name}:"
        yield from _barred(text)


def _without(stderr: str, traceback: str) -> str:
    """*stderr* before the traceback that is shown as the error already; there it has the libraries' frames as well."""
    if traceback and stderr.endswith(traceback):
        return stderr.removesuffix(traceback)
    before, found, _ = stderr.rpartition("Traceback (most recent call last):\n")
    return before if found else stderr


def _barred(text: str) -> Iterator[str]:
    """Each line behind a bar; whatever some reader may take for a line's end counts as one."""
    for line in text.rstrip("\n").splitlines():
        yield f"| {_printable(line)}"


def flat(text: str) -> str:
    """On one line."""
    return readable(text, 4 * STREAM_CHARACTERS).replace("\n", "\\n")


def _printable(line: str) -> str:
    """Tabs and the spaces of other scripts stay; escape sequences and the like are spelled out."""
    if line.isprintable():
        return line
    return "".join(one if one.isprintable() or one == "\t" or one.isspace() else ascii(one)[1:-1] for one in line)


def _limit(hit: Mapping[str, Any]) -> str:
    name, value = hit["limit"], hit["value"]
    if name in LIMITS and (value is None or isinstance(value, int | float)):
        return f"{name}={spell(name, value)}"
    return f"{name}={flat(str(value))}"
