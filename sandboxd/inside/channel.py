"""The cell's channel as bytes: what its packets are, and how they are written and read.

A SOCK_SEQPACKET socket between a cell (descriptor 3) and its engine, so a packet is whole or not there. Both ends
import this module: the engine, the client and the host's program as ``sandboxd.inside.channel``, the cell, which sees
this directory alone, as ``channel``. It imports only what every cell has in memory anyway.

    engine -> cell    the program, once: a length of eight bytes, then one JSON object, over as many packets as it takes
                      ANSWER, a tool frame: the outcome of a call
    cell -> engine    "SBXC", a struct that C writes when the last wall is up (native/inside/cell.c)
                      "P": parked
                      "T", a tool frame: a CALL
                      "{", one JSON object: the program has ended, and how

A tool frame is a fixed head and a part of a body. The body, JSON, is the program's and the dispatcher's affair; the
engine looks at heads only, and passes packets on as they came, to and from the host's program. A body of several
packets is split into parts of PART_BYTES, numbered by *index*.

    CALL        cell -> engine -> host    a call; its number is not in use by another one of this run
    ANSWER      host -> engine -> cell    its outcome
    FREEZE      host -> engine            stop the cell while this call waits for an approval
    FROZEN      engine -> host            it is stopped; or, with a body, why it could not be
    THAW        host -> engine            the approval is over
"""

from __future__ import annotations

import json
import os
import struct

TYPE_CHECKING = False  # typing itself is not imported here: every cell would carry it
if TYPE_CHECKING:
    from typing import Any

CHANNEL = 3
"""The descriptor of the cell's end."""
PACKET_BYTES = 1 << 18
"""The longest packet that is read whole, at either end."""
PARKED = b"P"
FINISHED_BYTES = 180_000
"""The longest finished frame: below the smallest usual socket buffer (net.core.wmem_default, 212992)."""

LENGTH_BYTES = 8
INLINE_CHARACTERS = 24 << 10
"""A source up to this length travels with the program's arguments, too: the cell need not read the file."""

TOOL_HEAD = struct.Struct("<BBHII")  # magic, kind, index, number, bytes of the whole body
TOOL_MAGIC = 0x54  # "T"
CALL, ANSWER, FREEZE, FROZEN, THAW = 1, 2, 3, 4, 5
PART_BYTES = 60 << 10
TOOL_PACKET_BYTES = TOOL_HEAD.size + PART_BYTES
CALL_BYTES = 1 << 20
"""The longest body of a call."""
ANSWER_BYTES = (8 << 20) + (64 << 10)
"""The longest body of an answer: 8 MiB of result, and what is around it."""
OUTSTANDING = 64
"""Calls of one run at a time."""
CALL_BEGINS = rb'\{"tool": "([A-Za-z][A-Za-z0-9_]{0,63})", "arguments": '
"""How the body of a call begins, as a pattern: its tool is known, for the record, without reading the rest."""

_encode = json.JSONEncoder().encode


# The program


def program_message(
    args: list[str] | tuple[str, ...],
    env: dict[str, str],
    filename: str,
    results: bool,
    code: str,
    tools: str | None = None,
) -> bytes:
    """What hands a program over; *tools* is the source text of the functions that it may call."""
    fields = f'"args":{_encode(args) if args else "[]"},"env":{_encode(env) if env else "{}"}'
    fields += f',"filename":{_encode(filename)},"results":{"true" if results else "false"}'
    if len(code) <= INLINE_CHARACTERS:
        fields += f',"code":{_encode(code)}'
    if tools is not None:
        fields += f',"tools":{_encode(tools)}'
    text = f"{{{fields}}}".encode()
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def receive_program(fd: int) -> dict[str, Any]:
    """The program that comes over *fd*, as a dict of ``program_message``'s arguments; waits for it. "code" is left out
    when it is to be read from its file, "tools" when there are none. Raises EOFError.
    """
    data = os.read(fd, PACKET_BYTES)
    size = int.from_bytes(data[:LENGTH_BYTES], "little")
    data = data[LENGTH_BYTES:]
    if len(data) < size:
        parts, got = [data], len(data)
        while got < size:
            parts.append(os.read(fd, PACKET_BYTES))
            if not parts[-1]:
                raise EOFError
            got += len(parts[-1])
        data = b"".join(parts)
    program: dict[str, Any] = json.loads(data)
    return program


# Tool calls


class FrameError(ValueError):
    """A packet is no tool frame; the text says why."""


class ToolHead:
    """What a tool frame says of itself; *body* is how many bytes of the body came with it."""

    __slots__ = ("body", "index", "kind", "number", "total")

    def __init__(self, kind: int, index: int, number: int, total: int, body: int) -> None:
        self.kind, self.index, self.number, self.total, self.body = kind, index, number, total, body


def tool_frame(kind: int, number: int, body: bytes = b"", index: int = 0, total: int | None = None) -> bytes:
    """One packet."""
    return TOOL_HEAD.pack(TOOL_MAGIC, kind, index, number, len(body) if total is None else total) + body


def tool_frames(kind: int, number: int, body: bytes) -> list[bytes]:
    """The packets of one message."""
    if len(body) <= PART_BYTES:
        return [tool_frame(kind, number, body)]
    return [
        tool_frame(kind, number, body[start : start + PART_BYTES], start // PART_BYTES, len(body))
        for start in range(0, len(body), PART_BYTES)
    ]


def parse_tool_frame(data: bytes, most_bytes: int) -> ToolHead:
    """The head of a packet that may be hostile. Raises FrameError when it is none, or not one of a body of at most
    *most_bytes* that is split as it should be.
    """
    if len(data) < TOOL_HEAD.size or len(data) > TOOL_PACKET_BYTES:
        raise FrameError("a frame's length is out of bounds")
    magic, kind, index, number, total = TOOL_HEAD.unpack_from(data)
    body = len(data) - TOOL_HEAD.size
    if magic != TOOL_MAGIC or not CALL <= kind <= THAW:
        raise FrameError("a frame of no kind")
    start = index * PART_BYTES
    if total > most_bytes or start > total or body != min(PART_BYTES, total - start) or (index and not body):
        raise FrameError("a frame's lengths do not add up")
    return ToolHead(kind, index, number, total, body)
