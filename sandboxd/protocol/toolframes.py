"""Frames of tool calls, between a cell and its engine and between the engine and the host's program.

Both ways over SOCK_SEQPACKET, so a packet is whole or not there: a fixed head, then a part of the body. The body, JSON,
is the program's and the dispatcher's affair; the engine looks at heads only, and passes packets on as they came. A body
of several packets is split into parts of PART_BYTES, numbered by *index*. *sandboxd/inside/toolcalls.py* is the cell's
side and repeats these numbers.

    CALL        cell -> engine -> host    a call; its number is not in use by another one of this run
    ANSWER      host -> engine -> cell    its outcome
    FREEZE      host -> engine            stop the cell while this call waits for an approval
    FROZEN      engine -> host            it is stopped; or, with a body, why it could not be
    THAW        host -> engine            the approval is over
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Final

from sandboxd.errors import ProtocolError

__all__ = ["Head", "frame", "parse", "parts"]

HEAD: Final = struct.Struct("<BBHII")
MAGIC: Final = 0x54  # "T"; other packets of a cell begin with "{" or "P"
CALL, ANSWER, FREEZE, FROZEN, THAW = 1, 2, 3, 4, 5
PART_BYTES: Final = 60 << 10
PACKET_BYTES: Final = HEAD.size + PART_BYTES
CALL_BYTES: Final = 1 << 20
"""The longest body of a call."""
ANSWER_BYTES: Final = (8 << 20) + (64 << 10)
"""The longest body of an answer: 8 MiB of result, and what is around it."""
OUTSTANDING: Final = 64
"""Calls of one run at a time."""
CALLS_MOST: Final = 1_000_000
BEGINNING: Final = re.compile(rb'\{"tool": "([A-Za-z][A-Za-z0-9_]{0,63})", "arguments": ')
"""How the body of a call begins, to the letter: so that its tool is known, for the record, without reading the rest."""
MODULE_BYTES: Final = 256 << 10
"""The longest source text of a cell's tools."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a packet says of itself; *body* is how many bytes of the body came with it."""

    kind: int
    index: int
    number: int
    total: int
    body: int


def frame(kind: int, number: int, body: bytes = b"", index: int = 0, total: int | None = None) -> bytes:
    """One packet."""
    return HEAD.pack(MAGIC, kind, index, number, len(body) if total is None else total) + body


def parts(kind: int, number: int, body: bytes) -> list[bytes]:
    """The packets of one message."""
    if len(body) <= PART_BYTES:
        return [frame(kind, number, body)]
    return [
        frame(kind, number, body[start : start + PART_BYTES], start // PART_BYTES, len(body))
        for start in range(0, len(body), PART_BYTES)
    ]


def parse(data: bytes, most_bytes: int) -> Head:
    """The head of a packet that may be hostile. Raises ProtocolError when it is none, or not one of a body of at most
    *most_bytes* that is split as it should be.
    """
    if len(data) < HEAD.size or len(data) > PACKET_BYTES:
        raise ProtocolError("a frame's length is out of bounds")
    magic, kind, index, number, total = HEAD.unpack_from(data)
    body = len(data) - HEAD.size
    if magic != MAGIC or not CALL <= kind <= THAW:
        raise ProtocolError("a frame of no kind")
    start = index * PART_BYTES
    if total > most_bytes or start > total or body != min(PART_BYTES, total - start) or (index and not body):
        raise ProtocolError("a frame's lengths do not add up")
    return Head(kind, index, number, total, body)
