"""The Result of a run: how it ended, with what evidence, what it printed and what it left.

Everything in ``to_dict`` is the public JSON object, key by key. What a program says (``error``, ``results``) is its
word only; everything else is evidence of the kernel's or the engine's. File contents stay in the one read-only
descriptor or buffer that came with the answer until the Result is closed or collected.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import secrets
import stat
import threading
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from sandboxd.errors import ProtocolError
from sandboxd.limits import shown
from sandboxd.protocol.run_header import check_guest_path

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

__all__ = [
    "CgroupReceipt",
    "Evidence",
    "Isolation",
    "LimitHit",
    "OutputFile",
    "ProgramError",
    "Result",
    "RichResult",
    "SeccompReceipt",
    "Timings",
    "Usage",
]

_Model = TypeVar("_Model", bound=BaseModel)
Payload = bytes | bytearray | memoryview | mmap.mmap | int

# Strict, so that a forged answer is refused and nothing is converted; extra keys are refused for the same reason.
_CONFIG = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

_Count = Annotated[int, Field(ge=0)]
_Seconds = Annotated[float, Field(ge=0)]


class _Contents:
    """The bytes of an answer: a descriptor that this object owns, or a buffer. A Result and its files share one.

    The lock keeps a read in one thread off a descriptor that another thread has just closed.
    """

    __slots__ = ("_buffer", "_fd", "_lock", "size")

    def __init__(self, payload: Payload) -> None:
        self._fd: int | None = None
        self._buffer: memoryview | None = None
        self._lock = threading.Lock()
        if isinstance(payload, int):
            self._fd = payload
            self.size = os.fstat(payload).st_size
        else:
            self._buffer = memoryview(payload).cast("B").toreadonly()
            self.size = len(self._buffer)

    def read(self, offset: int, size: int) -> bytes:
        with self._lock:
            if self._buffer is not None:
                return bytes(self._buffer[offset : offset + size])
            if self._fd is None:
                raise ValueError("The contents of this Result's files are gone: it was closed.")
            parts: list[bytes] = []
            while size:
                part = os.pread(self._fd, size, offset)  # at most 0x7ffff000 bytes at once, read(2)
                if not part:
                    raise ProtocolError("The answer is shorter than it was when it came.")
                parts.append(part)
                offset += len(part)
                size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        with self._lock:
            buffer, self._buffer = self._buffer, None
            fd, self._fd = self._fd, None
        if buffer is not None:
            buffer.release()
        if fd is not None:
            os.close(fd)

    def __del__(self) -> None:
        self.close()

    def __copy__(self) -> _Contents:
        return self

    def __deepcopy__(self, memo: object) -> _Contents:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("A Result holds a descriptor and cannot be pickled; to_dict() gives plain values.")


_GONE = _Contents(b"")
_GONE.close()


class ProgramError(BaseModel):
    """The exception that the program let escape, in the interpreter's words; *line* is the user's innermost, from 1."""

    model_config = _CONFIG

    type: str
    message: str
    traceback: str
    line: int | None


class RichResult(BaseModel):
    """One displayed value by MIME type; text as it is, everything else in base64."""

    model_config = _CONFIG

    mime: dict[str, str]


class OutputFile(BaseModel):
    """A regular file that the run made or changed below /workspace; *path* is relative to it."""

    model_config = _CONFIG

    path: str
    size_bytes: _Count

    _contents: _Contents = PrivateAttr(default=_GONE)
    _offset: int = PrivateAttr(default=0)

    def read(self) -> bytes:
        """The whole content. Raises ValueError once the Result was closed."""
        return self._contents.read(self._offset, self.size_bytes)

    def save(self, directory: Path | str | int) -> None:
        """Write the content below *directory*, a path or an open descriptor, at the file's own relative path.

        Missing directories are made. A regular file is replaced; a link on the way or in the place is never followed,
        it is an OSError (ELOOP or ENOTDIR on the way; FileExistsError for a link or any other kind in the place).
        Raises ValueError once the Result was closed.
        """
        content = self.read()
        *parents, name = self.path.split("/")
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        here = os.open(".", flags, dir_fd=directory) if isinstance(directory, int) else os.open(directory, flags)
        try:
            for part in parents:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=here)
                below = os.open(part, flags | os.O_NOFOLLOW, dir_fd=here)
                os.close(here)
                here = below
            _replace(here, name, content)
        finally:
            os.close(here)


def _replace(directory: int, name: str, content: bytes) -> None:
    """Put *content* at *name*: a new file renamed over the old one, so that neither a link nor a hard link is written
    to.
    """
    try:
        if not stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            raise FileExistsError(17, "not a regular file, so it is not overwritten", name)
    except FileNotFoundError:
        pass
    temporary = f".sandboxd-{secrets.token_hex(8)}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=directory)
    try:
        with open(fd, "wb") as stream:
            stream.write(content)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        os.unlink(temporary, dir_fd=directory)
        raise


class Evidence(BaseModel):
    """Where a limit's firing was seen, and what was seen there; "program" is the program's word only."""

    model_config = _CONFIG

    source: Literal["cgroup", "clock", "wait", "statfs", "reader", "seccomp", "program"]
    detail: str


class LimitHit(BaseModel):
    """A limit that the run reached: the policy's key, or "syscall" with the call's name where it is known."""

    model_config = _CONFIG

    limit: Literal[
        "wall_seconds",
        "cpu_seconds",
        "cpus",
        "memory_bytes",
        "pids",
        "workspace_bytes",
        "workspace_files",
        "tmp_bytes",
        "shm_bytes",
        "file_bytes",
        "open_files",
        "output_bytes",
        "output_stop_bytes",
        "tool_wait_seconds",
        "approval_seconds",
        "syscall",
    ]
    value: int | float | str | None
    evidence: Evidence


class Usage(BaseModel):
    """What this run alone used, from its cgroup and the engine's clock; None is what this kernel does not count."""

    model_config = _CONFIG

    wall_seconds: _Seconds
    cpu_user_seconds: _Seconds
    cpu_system_seconds: _Seconds
    memory_peak_bytes: _Count | None
    pids_peak: _Count | None  # pids.peak: cgroup v2 since Linux 6.1, v1 since 6.11
    throttled_seconds: _Seconds | None  # cpu.stat of the leaf, with the cpu controller


class Timings(BaseModel):
    """Where the time went: waiting for a turn, making the cell ready, running. *tool_wait_seconds* is the part of
    *run_seconds* in which the program's wall clock stood still, because it waited for a tool or for an approval.
    """

    model_config = _CONFIG

    queued_seconds: _Seconds
    setup_seconds: _Seconds
    run_seconds: _Seconds
    tool_wait_seconds: _Seconds = 0.0


class CgroupReceipt(BaseModel):
    """The hierarchy that held the run and the controllers that were in force."""

    model_config = _CONFIG

    version: Literal["v1", "v2", "hybrid", "none"]
    controllers: list[str]


class SeccompReceipt(BaseModel):
    """The filter that was loaded: its profile's name and the hash of the effective rules."""

    model_config = _CONFIG

    policy: str
    sha256: str


class Isolation(BaseModel):
    """What was in force around the run; *missing* names what the host lacks and the policy did not require."""

    model_config = _CONFIG

    namespaces: list[str]
    cgroup: CgroupReceipt
    seccomp: SeccompReceipt
    landlock_abi: _Count
    uid: _Count
    network: str
    rootfs: str
    kernel: str
    missing: list[str]


class Result(BaseModel):
    """One run, ended. ``status`` says how, ``limits_hit`` and ``usage`` by what evidence.

    A context manager: leaving it, ``close()`` or the collector frees the contents of ``files``; all else stays
    readable.
    """

    # More than 15 attributes: the fields that callers are promised.

    model_config = _CONFIG

    id: str
    status: Literal[
        "ok", "error", "timeout", "cpu", "memory", "output", "denied", "killed", "cancelled", "busy", "internal"
    ]
    exit_code: int | None
    signal: int | None
    stdout: str
    stderr: str
    stdout_dropped_bytes: _Count
    stderr_dropped_bytes: _Count
    error: ProgramError | None
    results: list[RichResult]
    files: list[OutputFile]
    files_skipped: _Count
    limits_hit: list[LimitHit]
    usage: Usage
    timings: Timings
    warm: bool
    isolation: Isolation | None  # None only when no cell was made
    state: Literal["preserved", "reset", "lost"] | None

    _contents: _Contents = PrivateAttr(default=_GONE)

    @classmethod
    def from_wire(cls, header: Mapping[str, Any], payload: Payload) -> Self:
        """The Result that an engine's *header* and *payload* describe.

        The header is the object of ``to_dict`` with two differences: ``stdout`` and ``stderr`` are ``[offset, size]``
        into the payload, and each entry of ``files`` has an ``offset`` too. A payload that is an int is a descriptor
        (a sealed memfd), which becomes the Result's own, also when this raises. Raises ProtocolError for anything else
        than that.
        """
        contents = _Contents(payload)
        try:
            body = dict(header)
            for stream in ("stdout", "stderr"):
                offset, size = header[stream]
                body[stream] = str(contents.read(*_span(offset, size, contents.size)), "utf-8", "replace")
            offsets: list[int] = []
            files: list[dict[str, Any]] = []
            entries: list[Any] = header["files"]
            if not isinstance(header["files"], list):
                raise TypeError("files is not a list")
            for entry in entries:
                own: dict[str, Any] = dict(entry)
                offsets.append(_span(own.pop("offset"), own["size_bytes"], contents.size)[0])
                check_guest_path(own["path"])
                files.append(own)
            body["files"] = files
            result = cls.model_validate(body)
        except Exception as error:
            contents.close()
            if isinstance(error, ValidationError):
                raise ProtocolError(f"The engine's answer is not a Result: {_first(error)}.") from None
            if isinstance(error, KeyError | TypeError | ValueError):
                raise ProtocolError(f"The engine's answer is not a Result: {shown(str(error))}.") from None
            raise
        if not files:
            contents.close()
            return result
        result._contents = contents
        for file, offset in zip(result.files, offsets, strict=True):
            file._contents, file._offset = contents, offset  # pyright: ignore[reportPrivateUsage]  one module
        return result

    @classmethod
    def assembled(cls, header: Mapping[str, Any], texts: Sequence[bytes], isolation: Isolation) -> Self:
        """The Result of a run without files that this process has judged itself, from the parts of ``from_wire``: they
        were checked when they were made, and are not once more.
        """
        body = dict(header)
        for stream, text in zip(("stdout", "stderr"), texts, strict=True):
            body[stream] = str(text, "utf-8", "replace")
        if body["error"] is not None:
            body["error"] = _made(ProgramError, body["error"])
        body["results"] = [_made(RichResult, one) for one in body["results"]]
        body["limits_hit"] = [LimitHit.model_validate(one) for one in body["limits_hit"]]
        body["usage"] = _made(Usage, body["usage"])
        body["timings"] = _made(Timings, body["timings"])
        body["isolation"] = isolation
        return _made(cls, body)

    def to_dict(self) -> dict[str, Any]:
        """The Result as the public JSON object; ``files`` without their contents."""
        return self.model_dump()

    def to_json(self, indent: int | None = None) -> str:
        """``to_dict`` as JSON in ASCII, so that nothing a program printed reaches a terminal as a control character."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def close(self) -> None:
        """Free the contents of ``files``; calling it again does nothing."""
        self._contents.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        parts = [f"status={self.status!r}", f"exit_code={self.exit_code}"]
        if self.signal is not None:
            parts.append(f"signal={self.signal}")
        parts.append(f"stdout={shown(self.stdout)}")
        if self.error is not None:
            parts.append(f"error={self.error.type}")
        if self.files:
            parts.append(f"files={len(self.files)}")
        return f"Result({', '.join(parts)})"

    __str__ = __repr__


def _made(kind: type[_Model], fields: dict[str, Any]) -> _Model:
    """A model of *fields*, all of them as they are: what ``model_construct`` does, without asking each for a default.
    Source: pydantic.BaseModel, class attributes.
    """
    made = kind.__new__(kind)
    object.__setattr__(made, "__dict__", fields)
    object.__setattr__(made, "__pydantic_fields_set__", set(fields))
    object.__setattr__(made, "__pydantic_extra__", None)
    object.__setattr__(made, "__pydantic_private__", {"_contents": _GONE} if kind is Result else None)
    return made


def _span(offset: object, size: object, total: int) -> tuple[int, int]:
    """*offset* and *size*, when they lie within *total* bytes. Raises ProtocolError otherwise."""
    if type(offset) is not int or type(size) is not int or offset < 0 or size < 0 or offset + size > total:
        raise ProtocolError("The engine's answer points outside its payload.")
    return offset, size


def _first(error: ValidationError) -> str:
    detail = error.errors(include_url=False, include_context=False)[0]
    return f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}"
