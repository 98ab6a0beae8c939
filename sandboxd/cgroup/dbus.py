"""As much of D-Bus as one method call and its answers take, over a Unix socket that leads straight to a service.

A module of its own rather than a bus library or busctl: an engine starts in tens of milliseconds, and on a small host
there is no bus daemon. Source: dbus.freedesktop.org/doc/dbus-specification.html.
"""

from __future__ import annotations

import os
import struct
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import socket

__all__ = ["CallError", "Connection", "Message", "Writer"]

_MOST_BYTES: Final = 1 << 20
_CALL, _RETURN, _SIGNAL = 1, 2, 4
_PATH, _INTERFACE, _MEMBER, _ERROR_NAME, _REPLY_SERIAL, _DESTINATION, _SIGNATURE = 1, 2, 3, 4, 5, 6, 8


class CallError(Exception):
    """The service's refusal: *name* for programs, the text for people."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


class Writer:
    """Values one after the other, little-endian; alignment counts from the start."""

    def __init__(self) -> None:
        self.data = bytearray()

    def align(self, size: int) -> None:
        self.data += bytes(-len(self.data) % size)

    def number(self, value: int, size: int = 4) -> None:
        self.align(size)
        self.data += value.to_bytes(size, "little")

    def string(self, text: str) -> None:
        encoded = text.encode()
        self.number(len(encoded))
        self.data += encoded + b"\0"

    def signature(self, text: str) -> None:
        self.data += bytes([len(text)]) + text.encode("ascii") + b"\0"

    def array(self, size: int) -> int:
        """Begin an array of elements aligned to *size*; ``end`` takes what this returns."""
        self.number(0)
        at = len(self.data) - 4
        self.align(size)
        return at

    def end(self, at: int, size: int) -> None:
        start = at + 4 + -(at + 4) % size
        self.data[at : at + 4] = (len(self.data) - start).to_bytes(4, "little")

    def variant(self, kind: str, value: object) -> None:
        self.signature(kind)
        match kind, value:
            case ("s" | "o", str()):
                self.string(value)
            case ("g", str()):
                self.signature(value)
            case ("b", bool()):
                self.number(int(value))
            case ("t", int()):
                self.number(value, 8)
            case ("au", list()):
                at = self.array(4)
                for one in value:
                    self.number(one)
                self.end(at, 4)
            case ("as", list()):
                at = self.array(4)
                for one in value:
                    self.string(one)
                self.end(at, 4)
            case _:
                raise TypeError(f"no variant {kind} of {value!r}")


class Reader:
    """Of *data* from *at* on. Raises ValueError, IndexError, struct.error for what it is not."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self._data = data
        self.at = at

    def align(self, size: int) -> None:
        self.at += -self.at % size

    def byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def number(self) -> int:
        self.align(4)
        (value,) = struct.unpack_from("<I", self._data, self.at)
        self.at += 4
        return int(value)

    def _text(self, length: int) -> str:
        start, self.at = self.at, self.at + length + 1
        if self._data[self.at - 1]:
            raise ValueError("a string without its end")
        return self._data[start : start + length].decode("utf-8", "replace")

    def string(self) -> str:
        return self._text(self.number())

    def signature(self) -> str:
        return self._text(self.byte())

    def variant(self) -> str | int:
        kind = self.signature()
        if kind in ("s", "o"):
            return self.string()
        if kind == "g":
            return self.signature()
        if kind in ("u", "b"):
            return self.number()
        raise ValueError(f"a value of type {kind!r}")


class Message:
    """One whole message; *body* reads its values."""

    def __init__(self, data: bytes) -> None:
        self.kind = data[1]
        reader = Reader(data, 12)
        end = 16 + reader.number()
        self._fields: dict[int, str | int] = {}
        while reader.at < end:
            reader.align(8)
            code = reader.byte()
            self._fields[code] = reader.variant()
        reader.align(8)
        self.body = Reader(data[reader.at :])

    def answers(self, serial: int) -> bool:
        return self._fields.get(_REPLY_SERIAL) == serial

    def is_signal(self, member: str) -> bool:
        return self.kind == _SIGNAL and self._fields.get(_MEMBER) == member

    def error(self) -> CallError:
        name = str(self._fields.get(_ERROR_NAME))
        return CallError(name, self.body.string() if self._fields.get(_SIGNATURE) == "s" else name)


class Connection:
    """To one service, up to *deadline* of time.monotonic(). It does not own the connected *sock*.

    Raises OSError (TimeoutError at the deadline), and ValueError, IndexError, struct.error for what is no D-Bus.
    """

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline
        self._serial = 0

    def _patience(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)

    def _send(self, data: bytes) -> None:
        self._patience()
        self._sock.sendall(data)

    def _receive(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            self._patience()
            part = self._sock.recv(length - len(parts))
            if not part:
                raise ConnectionResetError(104, "the connection was closed")
            parts += part
        return bytes(parts)

    def authenticate(self) -> None:
        """As the uid that the kernel tells the service."""
        self._send(b"\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\r\n")
        line = b""
        while not line.endswith(b"\r\n"):
            if len(line) > 1000:
                raise ValueError("a line without its end")
            line += self._receive(1)
        if not line.startswith(b"OK "):
            raise PermissionError(13, f"it answered {line.decode('ascii', 'replace').strip()!r}")
        self._send(b"BEGIN\r\n")

    def next(self) -> Message:
        """The next message, whatever it is."""
        start = self._receive(16)
        if start[:1] != b"l":
            raise ValueError("not little-endian")
        body, _serial, fields = struct.unpack_from("<III", start, 4)
        rest = fields + -fields % 8 + body
        if rest > _MOST_BYTES:
            raise ValueError("a message of more than 1 MiB")
        return Message(start + self._receive(rest))

    def call(self, destination: str, path: str, method: str, signature: str, body: Writer) -> Message:
        """The answer to INTERFACE.MEMBER *method* of *path*. Raises CallError."""
        interface, _, member = method.rpartition(".")
        self._serial += 1
        header = Writer()
        header.data += bytes([ord("l"), _CALL, 0, 1])
        header.number(len(body.data))
        header.number(self._serial)
        at = header.array(8)
        for code, kind, text in (
            (_PATH, "o", path),
            (_DESTINATION, "s", destination),
            (_INTERFACE, "s", interface),
            (_MEMBER, "s", member),
            (_SIGNATURE, "g", signature),
        ):
            header.align(8)
            header.data.append(code)
            header.variant(kind, text)
        header.end(at, 8)
        header.align(8)
        self._send(bytes(header.data + body.data))
        while True:
            message = self.next()
            if message.answers(self._serial):
                if message.kind != _RETURN:
                    raise message.error()
                return message
