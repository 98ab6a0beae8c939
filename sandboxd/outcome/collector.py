"""What a program writes to one stream: counted, its head and tail kept, the rest dropped."""

from __future__ import annotations

from collections import deque
from typing import Final

__all__ = ["Collector"]

_CHUNK: Final = 1 << 16


class Collector:
    """The first and the last half of at most *keep_bytes*; constant memory, whatever comes."""

    __slots__ = ("_half", "_head", "_tail", "_tail_bytes", "_whole", "total_bytes")

    def __init__(self, keep_bytes: int) -> None:
        self.total_bytes = 0
        self._whole = keep_bytes
        self._half = keep_bytes // 2
        self._head = bytearray()
        self._tail: deque[bytearray] = deque()
        self._tail_bytes = 0

    def add(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        self.total_bytes += len(data)
        room = self._half - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        if not data:
            return
        if (
            self._tail and len(self._tail[-1]) < _CHUNK
        ):  # a program that writes byte by byte must not cost an object each
            self._tail[-1] += data
        else:
            self._tail.append(bytearray(data))
        self._tail_bytes += len(data)
        most = self._whole - self._half
        while self._tail_bytes - len(self._tail[0]) >= most:
            self._tail_bytes -= len(self._tail.popleft())

    def kept(self) -> tuple[bytes, int]:
        """The text as bytes, and how many bytes of the stream are not in it.

        When any are missing a marker line stands in their place, and both halves are cut between characters.
        """
        tail = b"".join(self._tail)
        if self.total_bytes <= self._whole:
            return bytes(self._head) + tail, 0
        head = _without_partial_end(bytes(self._head))
        tail = _without_partial_start(tail[len(tail) - (self._whole - self._half) :])
        dropped = self.total_bytes - len(head) - len(tail)
        return head + f"\n[... {dropped} bytes left out ...]\n".encode() + tail, dropped


def _without_partial_end(data: bytes) -> bytes:
    # A character takes at most four bytes; its first says how many.
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        needs = 1 if byte < 0x80 else 2 if byte >> 5 == 6 else 3 if byte >> 4 == 14 else 4 if byte >> 3 == 30 else 1
        return data[:-back] if needs > back else data
    return data


def _without_partial_start(data: bytes) -> bytes:
    for skip in range(min(4, len(data))):
        if data[skip] & 0xC0 != 0x80:
            return data[skip:]
    # Nothing but the rest of one character; four such bytes are no character at all.
    return data if len(data) > 3 else b""
