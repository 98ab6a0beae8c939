"""The cell's channel: what one end writes the other end reads, and nothing else passes for it."""

from __future__ import annotations

import ast
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any, Final

import pytest

import sandboxd.inside
from sandboxd.inside import channel

INSIDE: Final = Path(sandboxd.inside.__file__).parent
NATIVE: Final = {"_cell", "_image"}


def received(message: bytes, piece: int) -> dict[str, Any]:
    """The program that *message* hands over, sent in packets of *piece* bytes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        pieces = [message[start : start + piece] for start in range(0, len(message), piece)]
        sender = threading.Thread(target=lambda: [ours.send(one) for one in pieces])
        sender.start()
        try:
            return channel.receive_program(theirs.fileno())
        finally:
            sender.join()


@pytest.mark.parametrize("piece", [9, 100, 1 << 16])
@pytest.mark.parametrize("code", ["1+1", "print('ä\\n\U0001f600')", "x" * channel.INLINE_CHARACTERS])
def test_program_arrives_as_it_was_sent(piece: int, code: str) -> None:
    message = channel.program_message(("a", 'b"'), {"KEY": "ü"}, "main.py", True, code)
    assert received(message, piece) == {
        "args": ["a", 'b"'],
        "env": {"KEY": "ü"},
        "filename": "main.py",
        "results": True,
        "code": code,
    }


def test_program_without_arguments_has_empty_ones() -> None:
    program = received(channel.program_message((), {}, "x.py", False, "1", "def f(): ..."), 1 << 16)
    wanted = {"args": [], "env": {}, "filename": "x.py", "results": False, "code": "1", "tools": "def f(): ..."}
    assert program == wanted


def test_long_source_does_not_travel_with_the_arguments() -> None:
    message = channel.program_message((), {}, "main.py", True, "x" * (channel.INLINE_CHARACTERS + 1))
    assert "code" not in received(message, 1 << 16)


def test_end_of_the_channel_in_the_middle_of_a_program_is_an_error() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        ours.send(channel.program_message((), {}, "main.py", True, "1")[:-1])
        ours.close()
        with pytest.raises(EOFError):
            channel.receive_program(theirs.fileno())


@pytest.mark.parametrize("size", [0, 1, channel.PART_BYTES, channel.PART_BYTES + 1, channel.CALL_BYTES])
def test_parts_of_a_body_parse_and_join(size: int) -> None:
    body = os.urandom(size)
    frames = channel.tool_frames(channel.CALL, 7, body)
    heads = [channel.parse_tool_frame(one, channel.CALL_BYTES) for one in frames]
    assert [(head.kind, head.number, head.index, head.total) for head in heads] == [
        (channel.CALL, 7, index, size) for index in range(len(frames))
    ]
    assert b"".join(one[channel.TOOL_HEAD.size :] for one in frames) == body
    assert sum(head.body for head in heads) == size


WHOLE: Final = b"x" * channel.PART_BYTES

HOSTILE: Final = [
    ("empty", b""),
    ("head-cut-off", channel.tool_frame(channel.CALL, 1)[:-1]),
    ("other-magic", b"{" + channel.tool_frame(channel.CALL, 1, b"{}")[1:]),
    ("kind-0", channel.tool_frame(0, 1, b"{}")),
    ("kind-6", channel.tool_frame(6, 1, b"{}")),
    ("longer-than-a-packet", channel.tool_frame(channel.CALL, 1, WHOLE + b"x")),
    ("longer-than-allowed", channel.tool_frame(channel.CALL, 1, WHOLE, total=channel.CALL_BYTES + 1)),
    ("shorter-than-it-says", channel.tool_frame(channel.CALL, 1, b"{}", total=3)),
    ("longer-than-it-says", channel.tool_frame(channel.CALL, 1, b"{}", total=1)),
    ("part-of-nothing", channel.tool_frame(channel.CALL, 1, b"", index=1, total=0)),
    ("part-beyond-the-end", channel.tool_frame(channel.CALL, 1, b"", index=1, total=channel.PART_BYTES)),
    ("short-part-in-between", channel.tool_frame(channel.CALL, 1, b"x", total=channel.PART_BYTES + 1)),
]


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in HOSTILE])
def test_packet_that_breaks_the_form_is_no_tool_frame(data: bytes) -> None:
    with pytest.raises(channel.FrameError):
        channel.parse_tool_frame(data, channel.CALL_BYTES)


def imports_of(path: Path) -> set[str]:
    """The top-level modules that *path* imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.level == 0
            found.add(node.module.partition(".")[0])
    return found


def test_what_runs_inside_needs_the_standard_library_alone() -> None:
    ours = {path.stem for path in INSIDE.glob("*.py")} | NATIVE
    for path in INSIDE.glob("*.py"):
        foreign = imports_of(path) - ours - sys.stdlib_module_names
        assert foreign <= ({"matplotlib"} if path.stem == "zygote" else set()), path.name


def test_zygote_forgets_every_module_of_its_own() -> None:
    """A program may have modules of the same names."""
    source = (INSIDE / "zygote.py").read_text()
    loops = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.For)]
    (forgotten,) = [set(ast.literal_eval(one.iter)) for one in loops if "del sys.modules" in ast.unparse(one)]
    assert forgotten == ({path.stem for path in INSIDE.glob("*.py")} | NATIVE) - {"__init__", "zygote"}
