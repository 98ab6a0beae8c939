"""One run as a client sees it on the wire: what to send, and what each packet that comes back means.

No input or output here: the synchronous and the asynchronous client drive the same object.
"""

from __future__ import annotations

import codecs
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from sandboxd.client.result import Result
from sandboxd.errors import ConnectionLost, InvalidRequest, ProtocolError, from_plain
from sandboxd.limits import LimitValue, narrow, shown
from sandboxd.policy.model import Limits
from sandboxd.protocol import packets
from sandboxd.protocol.operations import LAST, Operation
from sandboxd.protocol.run_header import (
    Tools,
    build_header,
    check_args,
    check_code,
    check_env,
    check_filename,
    check_files,
    check_language,
)

if TYPE_CHECKING:
    from sandboxd.protocol.packets import Buffer, Packet

__all__ = ["Exchange", "FileContent", "TextCallback", "ToolHost"]

TextCallback = Callable[[str], object]
FileContent = bytes | bytearray | memoryview | str | Path


class ToolHost(Protocol):
    """Who answers the tool calls of one run; see sandboxd/tools/code/link.py."""

    module: str
    """The source text of the functions that the program sees."""
    calls: int
    """How many calls it may make."""

    def begin(self, fd: int, run: str) -> None:
        """The run of that id is about to start; its calls come over *fd*, a socket that is this object's to close."""

    def end(self) -> None:
        """The run is over, or never began."""


def _stdin(stdin: object) -> bytes | None:
    """What the program reads; None is empty input. Raises InvalidRequest."""
    if stdin is None or isinstance(stdin, bytes):
        return stdin
    if isinstance(stdin, bytearray | memoryview):
        return bytes(cast("bytearray | memoryview", stdin))
    raise InvalidRequest("stdin", f"it must be bytes or None, not {type(stdin).__name__}")


def _check_limits(limits: object) -> object:
    """Limits or None. Raises InvalidRequest."""
    if limits is None or isinstance(limits, Limits):
        return limits
    raise InvalidRequest("limits", f"it must be sandboxd.Limits or None, not {type(limits).__name__}")


def _content(path: str, content: object) -> bytes | memoryview:
    if isinstance(content, str):
        return content.encode()
    if isinstance(content, bytes):
        return content
    if isinstance(content, bytearray | memoryview):
        return bytes(content)
    if not isinstance(content, Path):
        raise InvalidRequest(
            "files", f"the content of {path!r} must be bytes, str or a Path, not {type(content).__name__}"
        )
    try:
        # Not blocking: a fifo in the place of a file must not hang the caller.
        fd = os.open(content, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise InvalidRequest("files", f"{content} for {path!r} is not a regular file")
            return file.read()
    except OSError as error:
        raise InvalidRequest("files", f"{content} for {path!r} cannot be read: {error.strerror}") from error


def _mapping(field: str, given: object, what: str) -> None:
    if given is not None and not isinstance(given, Mapping):
        raise InvalidRequest(field, f"it must map {what}, not {type(given).__name__}")


def _arguments(args: object) -> list[Any]:
    # A str would become its letters, a mapping its keys.
    if isinstance(args, str | bytes | bytearray | Mapping) or not isinstance(args, Iterable):
        raise InvalidRequest("args", f"it must be a list of str, not {type(args).__name__}")
    return list(args)


class Exchange:
    """One run of *code* on an engine; arguments as ``Sandbox.run`` documents them."""

    def __init__(
        self,
        code: str | bytes,
        *,
        policy: str | None,
        base_limits: Mapping[str, LimitValue],
        language: str,
        limits: Limits | None,
        args: Iterable[str],
        files: Mapping[str, FileContent] | None,
        stdin: bytes | str | None,
        env: Mapping[str, str] | None,
        filename: str,
        results: bool,
        on_stdout: TextCallback | None,
        on_stderr: TextCallback | None,
        tools: ToolHost | None = None,
    ) -> None:
        _mapping("files", files, "guest paths to bytes, str or a Path")
        _mapping("env", env, "str to str")
        for field, callback in (("on_stdout", on_stdout), ("on_stderr", on_stderr)):
            if callback is not None and not callable(callback):
                raise InvalidRequest(field, f"it must be a function of one str, not {type(callback).__name__}")
        words = check_args(_arguments(args))
        contents = {path: _content(path, content) for path, content in (files or {}).items()}
        text = check_code(code)
        if results is not True and results is not False:
            raise InvalidRequest("results", f"{shown(results)} is not allowed; it must be true or false")
        given = _stdin(stdin.encode() if isinstance(stdin, str) else stdin)
        _check_limits(limits)
        source = text.encode()
        header = build_header(
            code_bytes=len(source),
            stdin_bytes=None if given is None else len(given),
            files=check_files((path, len(content)) for path, content in contents.items()),
            args=words,
            env=check_env(dict(env or {}), words),
            limits={} if limits is None else limits.plain(),
            language=check_language(language),
            filename=check_filename(filename),
            stream=on_stdout is not None or on_stderr is not None,
            results=results,
            tools=None if tools is None else Tools(tools.module, tools.calls),
        )
        asked = header["limits"]
        if base_limits:
            # The handle's own limits bind its runs; the engine compares the outcome with the policy's.
            narrow({**dict.fromkeys(asked), **base_limits}, asked)
            header["limits"] = {**base_limits, **asked}
        self._message = {"op": Operation.RUN, "policy": policy, "run": header}
        self.request = header
        self._payload: list[Buffer] = [source, given or b"", *contents.values()]
        self._callbacks = {1: on_stdout, 2: on_stderr}
        self._decoders = {number: codecs.getincrementaldecoder("utf-8")("replace") for number in (1, 2)}
        self._tools = tools
        self._queued = False
        self.sent = False
        self.answered = False
        """The last packet of the run has come, whether it was fed or not."""
        self.result: Result | None = None

    def packet(self) -> tuple[list[Buffer], int]:
        """The request, packed: buffers and a memfd or -1, which the caller sends and closes."""
        return packets.pack(self._message, self._payload)

    def lost(self) -> ConnectionLost:
        """The error for a connection that ended before the answer came."""
        return ConnectionLost(self.sent and not self._queued)

    def feed(self, packet: Packet) -> bool:
        """Take one packet; True when the run is over and ``result`` is there.

        Calls the callbacks. Raises what the engine refused with, or what a callback raised, or ProtocolError.
        """
        message = packet.message
        self.note(packet)
        try:
            operation = message.get("op")
            if operation == Operation.OUTPUT:
                self._output(message.get("stream"), bytes(packet.take_bytes()))
                return False
            if operation == Operation.HELLO:
                return False
            if operation in (Operation.QUEUED, Operation.ADMITTED):
                self._queued = operation == Operation.QUEUED
                return False
            if operation == Operation.TOOLS and self._tools is not None and len(packet.fds) == 1:
                self._tools.begin(packet.fds.pop(), str(message.get("run")))
                return False
            if operation == Operation.REFUSED and isinstance(message.get("error"), dict):
                raise from_plain(message["error"])
            if operation == Operation.RESULT and isinstance(message.get("result"), dict):
                self.flush()
                payload, packet.payload = packet.payload, b""
                self.result = Result.from_wire(message["result"], payload)
                return True
            raise ProtocolError(f"The engine sent {str(operation)[:40]!r}, which is no answer.")
        finally:
            packet.close()

    def note(self, packet: Packet) -> None:
        """See whether *packet* is the last one."""
        self.answered = self.answered or packet.message.get("op") in LAST

    def _output(self, stream: object, data: bytes) -> None:
        if stream not in (1, 2) or not isinstance(stream, int):
            raise ProtocolError("The engine sent output of a stream that is none.")
        callback = self._callbacks[stream]
        text = self._decoders[stream].decode(data)
        if callback is not None and text:
            callback(text)

    def flush(self) -> None:
        """Give the callbacks what is left of the streams' text; of no effect when that is done."""
        for stream, callback in self._callbacks.items():
            text = self._decoders[stream].decode(b"", final=True)
            if callback is not None and text:
                callback(text)
