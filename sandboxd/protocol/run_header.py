"""A run as it travels: a JSON header and one binary payload, checked on arrival without pydantic.

The payload is the source text, then stdin, then the contents of the files, end to end; the header holds their lengths
and everything else. ``build_header`` writes it, ``parse_header`` reads it and is the engine's guard: whoever wrote the
header may be hostile, so keys, types, lengths and ranges are all checked again here, whatever the client did.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from sandboxd.errors import InvalidRequest, PolicyError, ProtocolError
from sandboxd.limits import LIMITS, LimitValue, resolved, shown

__all__ = [
    "ARGS_ENV_MAX_BYTES",
    "CALLS_MOST",
    "CODE_MAX_BYTES",
    "FILES_MAX",
    "MODULE_BYTES",
    "Run",
    "Tools",
    "announced_code_bytes",
    "build_header",
    "check_args",
    "check_code",
    "check_env",
    "check_filename",
    "check_files",
    "check_guest_path",
    "check_inputs_fit",
    "check_language",
    "parse_header",
]

CODE_MAX_BYTES: Final = 16 << 20
# MAX_ARG_STRLEN, execve(2): what the program passes on to a child cannot fail by its length
ARGS_ENV_MAX_BYTES: Final = 128 << 10
FILES_MAX: Final = 100_000
DEPTH: Final = 64
"""Directories above a file in /workspace, in and out: each is a step of the kernel's walk for each file below it."""

CALLS_MOST: Final = 1_000_000
"""Tool calls that one run may make."""
MODULE_BYTES: Final = 256 << 10
"""The longest source text of a cell's tools."""

_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_READ_TOO_EARLY: Final = ("LD_", "PYTHON", "GLIBC_TUNABLES", "MALLOC_")
_PAGE: Final = 4096


@dataclass(frozen=True, slots=True)
class Run:
    """One run, checked. *stdin* and the contents of *files* are views into the payload, *limits* those asked for."""

    code: str
    language: str
    filename: str
    args: tuple[str, ...]
    env: dict[str, str]
    stdin: memoryview | None
    files: tuple[tuple[str, memoryview], ...]
    limits: dict[str, LimitValue]
    stream: bool
    results: bool
    tools: Tools | None = None


@dataclass(frozen=True, slots=True)
class Tools:
    """Tools that a program may call: *module* is the source text of the functions that it sees, *calls* how many it may
    make.
    """

    module: str
    calls: int


def check_code(code: object) -> str:
    """Source text: a str, or bytes in UTF-8, at most 16 MiB as UTF-8 and without NUL. Raises InvalidRequest."""
    if isinstance(code, str):
        text = code
        try:
            size = len(text) if text.isascii() else len(text.encode())  # ASCII needs no copy to be measured
        except UnicodeEncodeError as error:
            raise InvalidRequest("code", f"it is not text: a lone surrogate at character {error.start}") from None
    elif isinstance(code, bytes | bytearray | memoryview):
        content = memoryview(cast("bytes | bytearray | memoryview", code))
        size = content.nbytes
        try:
            text = str(content, "utf-8") if size <= CODE_MAX_BYTES else ""
        except UnicodeDecodeError as error:
            raise InvalidRequest("code", f"it is not text in UTF-8: byte {error.start} cannot be decoded") from None
    else:
        raise InvalidRequest("code", f"it must be str, or bytes in UTF-8, not {type(code).__name__}")
    if size > CODE_MAX_BYTES:
        raise InvalidRequest("code", f"{size:,} bytes is too long; at most {CODE_MAX_BYTES:,} bytes (16 MiB) as UTF-8")
    if "\0" in text:
        raise InvalidRequest("code", f"it is not text: a NUL at character {text.index(chr(0))}")
    return text


def check_language(language: object) -> str:
    """A language that runs now. Raises InvalidRequest that lists them."""
    if language == "python":
        return "python"
    if language in ("bash", "node"):
        raise InvalidRequest("language", f'{language!r} comes later; this version runs only "python"')
    raise InvalidRequest("language", f'{shown(language)} is not a language of sandboxd; allowed: "python"')


def check_filename(filename: object) -> str:
    """The name by which tracebacks and ``sys.argv[0]`` show the source: one part of a path. Raises InvalidRequest."""
    if not isinstance(filename, str) or filename != _guest_path("filename", filename) or "/" in filename:
        raise InvalidRequest("filename", f"{shown(filename)} is not allowed; it must be a file's name without a slash")
    return filename


def check_args(args: object) -> tuple[str, ...]:
    """The program's arguments: strings without NUL. Raises InvalidRequest."""
    if not isinstance(args, list | tuple):
        raise InvalidRequest("args", f"it must be a list of str, not {type(args).__name__}")
    return tuple(_word(f"args[{index}]", item) for index, item in enumerate(cast("Iterable[object]", args)))


def check_env(env: object, args: Iterable[str] = ()) -> dict[str, str]:
    """Variables added to the program's environment; with *args* they hold at most 128 KiB. Raises InvalidRequest.

    A name is letters, digits and _, and begins with no digit. Names that the loader, the allocator or the interpreter
    read before the program begins (LD_*, GLIBC_TUNABLES, MALLOC_*, PYTHON*) are refused: the interpreter is running
    already, so they would do nothing. A program that wants them for its children sets them in os.environ itself.
    """
    if not isinstance(env, Mapping):
        raise InvalidRequest("env", f"it must map str to str, not {type(env).__name__}")
    checked: dict[str, str] = {}
    for name, value in cast("Mapping[object, object]", env).items():
        if not isinstance(name, str) or not _ENV_NAME.fullmatch(name):
            raise InvalidRequest(
                "env", f"{shown(name)} is not a variable's name; allowed: letters, digits and _, no digit first"
            )
        if name.startswith(_READ_TOO_EARLY):
            raise InvalidRequest(
                "env",
                f"{name} would do nothing: the interpreter, which reads it when it starts, is already running; "
                "set it inside the program for its children",
            )
        checked[name] = _word(f"env[{name!r}]", value)
    size = sum(len(arg.encode()) + 1 for arg in args)
    size += sum(len(name) + len(value.encode()) + 2 for name, value in checked.items())
    if size > ARGS_ENV_MAX_BYTES:
        raise InvalidRequest("args", f"with env they hold {size:,} bytes; at most {ARGS_ENV_MAX_BYTES:,} together")
    return checked


def check_guest_path(path: object) -> str:
    """A path below /workspace, in its one normal form; returned as it is.

    Relative, no empty, "." or ".." part, no NUL, at most 4,095 bytes, each part at most 255, at most 64 directories
    deep. Raises InvalidRequest.
    """
    return _guest_path("files", path)


def _guest_path(field: str, path: object) -> str:
    if not isinstance(path, str):
        raise InvalidRequest(field, f"a path must be str, not {type(path).__name__}")
    parts = path.split("/")
    if path.startswith("/"):
        wrong = "it must be relative; it is taken below /workspace"
    elif ".." in parts:
        wrong = 'it must not hold ".."'
    elif "" in parts or "." in parts:
        wrong = 'it must hold no empty or "." part'
    elif "\0" in path:
        wrong = "it must not hold a NUL"
    elif len(parts) > DEPTH + 1:
        wrong = f"at most {DEPTH} directories deep"
    else:
        try:
            sizes = [*map(len, parts)] if path.isascii() else [len(part.encode()) for part in parts]
        except UnicodeEncodeError:
            wrong = "it must be text that UTF-8 can hold"
        else:
            if max(sizes) <= 255 and sum(sizes) + len(sizes) - 1 <= 4095:
                return path
            wrong = "at most 4,095 bytes, and 255 in each part"
    raise InvalidRequest(field, f"the path {shown(path)} is not allowed; {wrong}")


def check_files(files: Iterable[tuple[object, object]]) -> tuple[tuple[str, int], ...]:
    """Input files as (path, size in bytes): no path twice, none a directory of another. Raises InvalidRequest."""
    checked: dict[str, int] = {}
    for path, size in files:
        path = check_guest_path(path)
        if isinstance(size, bool) or not isinstance(size, int) or size < 0 or size >= 1 << 50:
            raise InvalidRequest("files", f"{shown(size)} is not a size in bytes for {shown(path)}")
        if path in checked:
            raise InvalidRequest("files", f"the path {shown(path)} is there twice")
        checked[path] = size
    if len(checked) > FILES_MAX:
        raise InvalidRequest("files", f"{len(checked):,} files are too many; at most {FILES_MAX:,}")
    above = "\0"
    for path in _in_tree_order(checked):
        if path.startswith(above):
            raise InvalidRequest("files", f"{shown(above[:-1])} is a file and the directory of another")
        above = f"{path}/"
    return tuple(checked.items())


def check_inputs_fit(files: Iterable[tuple[str, int]], limits: Mapping[str, LimitValue]) -> None:
    """Raises InvalidRequest when *files* (path, size) do not fit into the workspace that *limits* allow.

    Counted as tmpfs counts: whole pages, and an inode for each file and each directory that has to be made.
    """
    sizes = dict(files)
    size = sum(-(-size // _PAGE) * _PAGE for size in sizes.values())
    inodes = len(sizes) + _count_directories(sizes)
    space, most = limits["workspace_bytes"], limits["workspace_files"]
    remedy = "give fewer or smaller ones, or raise it in the [limits] of the policy"
    if space is not None and size > space:
        raise InvalidRequest("files", f"they take {size:,} bytes; limits.workspace_bytes is {space:,}; {remedy}")
    if most is not None and inodes > most:
        what = f"they are {inodes:,} with their directories"
        raise InvalidRequest("files", f"{what}; limits.workspace_files is {most:,}; {remedy}")


def _in_tree_order(paths: Iterable[str]) -> list[str]:
    """Sorted so that what is below a path follows it: no character of a name comes before the slash."""
    return [path.replace("\0", "/") for path in sorted(path.replace("/", "\0") for path in paths)]


def _count_directories(paths: Iterable[str]) -> int:
    """How many directories *paths* need. In tree order each adds those that it does not share with the one before:
    keeping all of them would take a path's length squared.
    """
    count = 0
    previous: list[str] = []
    last = ""
    for path in _in_tree_order(paths):
        above = path.rpartition("/")[0]
        if above == last:
            continue
        last = above
        parts = above.split("/") if above else []
        shared = 0
        while shared < min(len(parts), len(previous)) and parts[shared] == previous[shared]:
            shared += 1
        count += len(parts) - shared
        previous = parts
    return count


def _word(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(field, f"it must be str, not {type(value).__name__}")
    if "\0" in value:
        raise InvalidRequest(field, "it must not hold a NUL")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(field, "it must be text that UTF-8 can hold") from None
    return value


def build_header(
    *,
    code_bytes: int,
    stdin_bytes: int | None,
    files: Iterable[tuple[str, int]],
    args: Iterable[str],
    env: dict[str, str],
    limits: Mapping[str, LimitValue],
    language: str,
    filename: str,
    stream: bool,
    results: bool,
    tools: Tools | None = None,
) -> dict[str, Any]:
    """The header of a run whose values were checked. *files* are paths with sizes; *stdin_bytes* None is no input."""
    header: dict[str, Any] = {
        "code_bytes": code_bytes,
        "stdin_bytes": stdin_bytes,
        "files": [[path, size] for path, size in files],
        "args": list(args),
        "env": env,
        "limits": limits,
        "language": language,
        "filename": filename,
        "stream": stream,
        "results": results,
    }
    if tools is not None:
        header["tools"] = {"module": tools.module, "calls": tools.calls}
    return header


_HEADER_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "code_bytes": (int,),
    "stdin_bytes": (int, type(None)),
    "files": (list,),
    "args": (list,),
    "env": (dict,),
    "limits": (dict,),
    "language": (str,),
    "filename": (str,),
    "stream": (bool,),
    "results": (bool,),
}


def parse_header(header: dict[str, Any], payload: bytes | bytearray | memoryview) -> Run:
    """The run that *header* and *payload* describe.

    Raises ProtocolError when the header is not of the protocol (keys, types, lengths that do not add up to the
    payload), InvalidRequest for a wrong argument, PolicyError for a limit that is unknown or out of range.
    """
    tools = _tools(header.pop("tools")) if "tools" in header else None
    if set(header) != set(_HEADER_TYPES):
        odd = ", ".join(sorted(map(str, set(header) ^ set(_HEADER_TYPES))))
        raise ProtocolError(f"A run's header has keys missing or unknown: {shown(odd)}.")
    for key, types in _HEADER_TYPES.items():
        if not isinstance(header[key], types) or (isinstance(header[key], bool) and bool not in types):
            raise ProtocolError(f"A run's header has a wrong type at {key!r}.")
    pairs: list[Any] = header["files"]
    if not all(isinstance(pair, list) for pair in pairs) or any(len(pair) != 2 for pair in pairs):
        raise ProtocolError("A run's header has a file that is not [path, size].")
    language, filename = check_language(header["language"]), check_filename(header["filename"])
    args = check_args(header["args"])
    env = check_env(header["env"], args)
    files = check_files(pairs)
    limits: dict[str, LimitValue] = {}
    for name, value in header["limits"].items():
        if name not in LIMITS:
            raise PolicyError(f"{shown(name)} is not a limit. The limits are {', '.join(LIMITS)}.", key="limits")
        limits[name] = resolved(name, value)

    view = memoryview(payload).cast("B") if not isinstance(payload, memoryview) else payload.cast("B")
    code_bytes, stdin_bytes = header["code_bytes"], header["stdin_bytes"]
    sizes = [code_bytes, stdin_bytes or 0, *(size for _, size in files)]
    if min(sizes) < 0 or sum(sizes) != len(view):
        raise ProtocolError("A run's lengths do not add up to its payload.")
    code = check_code(view[:code_bytes])
    at = code_bytes + (stdin_bytes or 0)
    stdin = None if stdin_bytes is None else view[code_bytes:at]
    contents: list[tuple[str, memoryview]] = []
    for path, size in files:
        contents.append((path, view[at : at + size]))
        at += size
    return Run(
        code=code,
        language=language,
        filename=filename,
        args=args,
        env=env,
        stdin=stdin,
        files=tuple(contents),
        limits=limits,
        stream=header["stream"],
        results=header["results"],
        tools=tools,
    )


def announced_code_bytes(header: Mapping[str, Any]) -> int:
    """How long the source text is said to be, before anything of *header* was checked; 0 when nothing sensible is."""
    size = header.get("code_bytes")
    return size if type(size) is int and size > 0 else 0


def _tools(given: Any) -> Tools:
    """Raises ProtocolError."""
    if not isinstance(given, dict) or set(given) != {"module", "calls"}:
        raise ProtocolError("A run's tools are not in the protocol's form.")
    module, calls = given["module"], given["calls"]
    if not isinstance(module, str) or len(module) > MODULE_BYTES or "\0" in module:
        raise ProtocolError("The text of a run's tools is out of bounds.")
    if type(calls) is not int or not 0 <= calls <= CALLS_MOST:
        raise ProtocolError("The number of a run's tool calls is out of bounds.")
    return Tools(module, calls)
