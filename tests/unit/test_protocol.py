"""Packets: what was sent arrives, and nothing else is ever taken for a packet, whatever the other side does."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandboxd.errors import ProtocolError
from sandboxd.protocol import packets
from tests.support.leftovers import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

HEAD = struct.Struct("<4sBBHIQ")
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
LARGE = packets.INLINE_BYTES + 1

Pair = tuple[socket.socket, socket.socket]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 60), 1 << 60) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=20,
)
OBJECTS = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), JSON, max_size=5)

same_pair = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two connected ends; neither waits for ever."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.settimeout(10)
        theirs.settimeout(10)
        yield ours, theirs


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = open_fds()
    yield
    eventually(lambda: open_fds() <= before, 5, "every descriptor closed")


def open_fds() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def raw(sock: socket.socket, data: bytes, *fds: int) -> None:
    """Send *data* and descriptors as they are."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
    sock.sendmsg([data], rights)


def head(
    text: int, payload: int, flags: int = 0, magic: bytes = b"SBXD", version: int = packets.VERSION, zero: int = 0
) -> bytes:
    """A packet's head."""
    return HEAD.pack(magic, version, flags, zero, text, payload)


def memfd(content: bytes, seals: int = SEALS) -> int:
    """A memfd with *content* and *seals*."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def refused(pair: Pair, data: bytes, *fds: int) -> str:
    """Why the other end does not take it; no descriptor of it stays open there."""
    raw(pair[0], data, *fds)
    before = open_fds()
    with pytest.raises(ProtocolError) as error:
        packets.receive(pair[1])
    eventually(lambda: open_fds() == before, 5, "what came with it closed")
    return str(error.value)


# --- what was sent arrives ----------------------------------------------------------------------------------------


@same_pair
@given(message=OBJECTS, payload=st.lists(st.binary(max_size=100), max_size=5))
def test_a_small_packet_arrives(pair: Pair, message: dict[str, Any], payload: list[bytes]) -> None:
    packets.send(pair[0], message, payload)
    packet = packets.receive(pair[1])
    assert packet is not None
    assert packet.message == message
    assert packet.take_bytes() == b"".join(payload)


@pytest.mark.parametrize("size", [0, 1, packets.INLINE_BYTES - 9, LARGE, 5 << 20])
def test_a_payload_of_any_size_arrives(pair: Pair, size: int) -> None:
    content = os.urandom(1024) * (size // 1024) + b"x" * (size % 1024)
    packets.send(pair[0], {"a": "ü"}, [content])
    packet = packets.receive(pair[1])
    assert packet is not None
    assert (packet.message, packet.payload_bytes) == ({"a": "ü"}, size)
    taken = packet.take_bytes()
    assert bytes(taken) == content
    with pytest.raises(TypeError):
        memoryview(taken)[:1] = b"y"
    del taken
    packet.close()


def test_a_large_message_arrives(pair: Pair) -> None:
    message = {"text": "x" * (2 << 20)}
    packets.send(pair[0], message)
    packet = packets.receive(pair[1])
    assert packet is not None
    assert packet.message == message
    assert packet.take_bytes() == b""


def test_a_payload_in_very_many_pieces(pair: Pair) -> None:
    packets.send(pair[0], {}, [b"x", b""] * 3000)
    packet = packets.receive(pair[1])
    assert packet is not None
    assert packet.take_bytes() == b"x" * 3000


def test_a_memfd_that_was_filled_before(pair: Pair) -> None:
    fd = os.memfd_create("filled", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, b"payload")
    buffers, out = packets.pack({"a": 1}, filled=fd)
    packets.send_packed(pair[0], buffers, out)
    os.close(out)
    packet = packets.receive(pair[1])
    assert packet is not None
    assert (packet.message, bytes(packet.take_bytes())) == ({"a": 1}, b"payload")


def test_a_packet_that_nobody_takes_is_closed(pair: Pair) -> None:
    packets.send(pair[0], {}, [bytes(LARGE)])
    packet = packets.receive(pair[1])
    assert packet is not None
    assert isinstance(packet.payload, int)
    assert not os.get_inheritable(packet.payload)
    packet.close()
    packet.close()


def test_packets_stay_apart_and_in_order(pair: Pair) -> None:
    for n in range(20):
        packets.send(pair[0], {"n": n}, [b"p" * n])
    for n in range(20):
        packet = packets.receive(pair[1])
        assert packet is not None
        assert (packet.message, packet.take_bytes()) == ({"n": n}, b"p" * n)


def test_the_end_is_none(pair: Pair) -> None:
    pair[0].close()
    assert packets.receive(pair[1]) is None


def test_nothing_there_is_blockingioerror(pair: Pair) -> None:
    pair[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        packets.receive(pair[1])


def test_a_lone_surrogate_does_not_break_the_sender(pair: Pair) -> None:
    packets.send(pair[0], {"a": "\ud800"})
    packet = packets.receive(pair[1])
    assert packet is not None
    assert packet.message == {"a": "?"}


def test_what_is_too_large_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="too large"):
        packets.pack({"a": "x" * packets.JSON_BYTES})


def test_nan_is_not_sent() -> None:
    with pytest.raises(ValueError, match="JSON"):
        packets.pack({"a": float("nan")})


# --- nothing else is a packet -------------------------------------------------------------------------------------

TEXT = b'{"a":1}'

FORGED = {
    "short": b"SBXD",
    "magic": head(7, 0, magic=b"HTTP") + TEXT,
    "version": head(7, 0, version=packets.VERSION + 1) + TEXT,
    "flags": head(7, 0, flags=2) + TEXT,
    "zero": head(7, 0, zero=1) + TEXT,
    "text-too-long": head(8, 0) + TEXT,
    "text-too-short": head(6, 0) + TEXT,
    "payload-that-is-not-there": head(7, 5) + TEXT,
    "payload-not-announced": head(7, 0) + TEXT + b"more",
    "json-over-the-bound": head(packets.JSON_BYTES + 1, 0) + TEXT,
    "payload-over-the-bound": head(7, packets.PAYLOAD_BYTES + 1) + TEXT,
    "payload-of-2-64": head(7, (1 << 64) - 1) + TEXT,
    "memfd-that-is-not-there": head(7, 0, flags=1),
    "memfd-and-text": head(7, 0, flags=1) + TEXT,
    "no-text": head(0, 0),
    "not-json": head(3, 0) + b"{a}",
    "a-list": head(2, 0) + b"[]",
    "a-number": head(1, 0) + b"5",
    "nan": head(9, 0) + b'{"a":NaN}',
    "infinity": head(15, 0) + b'{"a":-Infinity}',
    "key-twice": head(13, 0) + b'{"a":1,"a":1}',
    "inner-key-twice": head(19, 0) + b'{"b":{"a":1,"a":1}}',
    "not-utf8": head(9, 0) + b'{"a":"\xff"}',
    "cut-surrogate": head(4, 0) + b'{"a\xed',
    "trailing": head(8, 0) + b'{"a":1}}',
}


@pytest.mark.parametrize("data", FORGED.values(), ids=FORGED.keys())
def test_a_forged_packet_is_refused(pair: Pair, data: bytes) -> None:
    assert refused(pair, data)


def test_the_version_is_named(pair: Pair) -> None:
    said = refused(pair, head(7, 0, version=77) + TEXT)
    assert "77" in said
    assert str(packets.VERSION) in said


@pytest.mark.parametrize("length", range(1, HEAD.size + len(TEXT)))
def test_a_packet_cut_anywhere_is_refused(pair: Pair, length: int) -> None:
    assert refused(pair, (head(len(TEXT), 0) + TEXT)[:length])


def test_an_overlong_packet_is_refused(pair: Pair) -> None:
    assert "longer" in refused(pair, head(7, 100_000) + TEXT + bytes(100_000))


@same_pair
@given(data=st.binary(min_size=1, max_size=200))
def test_noise_is_refused(pair: Pair, data: bytes) -> None:
    assert refused(pair, data)


@same_pair
@given(
    data=st.binary(max_size=60),
    text=st.integers(0, 70),
    payload=st.integers(0, 70),
    flags=st.integers(0, 3),
    zero=st.integers(0, 1),
)
def test_noise_behind_a_good_head_is_a_packet_only_when_it_is_one(
    pair: Pair, data: bytes, text: int, payload: int, flags: int, zero: int
) -> None:
    raw(pair[0], head(text, payload, flags=flags, zero=zero) + data)
    try:
        packet = packets.receive(pair[1])
    except ProtocolError:
        return
    assert packet is not None
    assert (flags, zero, len(data)) == (0, 0, text + payload)
    assert json.loads(data[:text]) == packet.message


@same_pair
@given(at=st.integers(0, HEAD.size + 40), bit=st.integers(0, 7), inline=st.booleans())
def test_one_flipped_bit(pair: Pair, at: int, bit: int, inline: bool) -> None:
    fd = -1
    if inline:
        data = bytearray(head(7, 30) + TEXT + bytes(30))
    else:
        data = bytearray(head(7, 30, flags=1))
        fd = memfd(bytes(30) + TEXT)
    data[at % len(data)] ^= 1 << bit
    raw(pair[0], bytes(data), *([fd] if fd >= 0 else []))
    if fd >= 0:
        os.close(fd)
    try:
        packet = packets.receive(pair[1])
    except ProtocolError:
        return
    assert packet is not None  # the flip was in the message or the payload
    packet.close()
    assert inline


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 10_000,
        b'{"a":' * 5000,
        b'{"a":' + b"[" * 40 + b"]" * 40 + b"}",
        b'{"a":"' + b"[" * 40 + b'",' + b'"b":' + b"[" * 33 + b"]" * 33 + b"}",
    ],
)
def test_a_nested_message_is_refused(pair: Pair, text: bytes) -> None:
    assert "deep" in refused(pair, head(len(text), 0) + text)


@pytest.mark.parametrize(
    "message", [{"a": "[" * 100}, {"a": '"]}' * 50 + "\\" * 3}, {"a": [[]] * 100}, {"a": '\\"' * 100 + "[" * 100}]
)
def test_brackets_that_are_not_depth_are_fine(message: dict[str, Any]) -> None:
    assert packets.loads(json.dumps(message).encode()) == message


@pytest.mark.parametrize("unit", [b"[],", b'"[",', b'"\\"",'])
def test_a_message_of_the_largest_size_is_judged_in_good_time(unit: bytes) -> None:
    text = b'{"a":[' + unit * ((packets.JSON_BYTES - 20) // len(unit)) + b"0]}"
    begun = time.monotonic()
    with contextlib.suppress(ProtocolError):
        packets.loads(text)
    assert time.monotonic() - begun < 5


def test_too_many_values_are_refused() -> None:
    for unit in (b"[],", b"1,", b'{"":0},'):
        with pytest.raises(ProtocolError, match="values"):
            packets.loads(b'{"a":[' + unit * (packets.JSON_VALUES + 10) + b"0]}")
    assert len(packets.loads(b'{"a":[' + b"1," * 300_000 + b"0]}")["a"]) == 300_001


def test_an_unclosed_string_of_the_largest_size_is_judged_in_good_time() -> None:
    for text in (b'{"' + b"\\" * (4 << 20), b'{"' + b"[" * (4 << 20), b'"' * (4 << 20) + b"[" * 100):
        begun = time.monotonic()
        with pytest.raises(ProtocolError):
            packets.loads(text)
        assert time.monotonic() - begun < 5


# --- descriptors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seals",
    [
        0,
        fcntl.F_SEAL_SHRINK,
        SEALS & ~fcntl.F_SEAL_WRITE,
        SEALS & ~fcntl.F_SEAL_SHRINK,
        SEALS & ~fcntl.F_SEAL_GROW,
        SEALS & ~fcntl.F_SEAL_SEAL,
    ],
)
def test_a_memfd_that_can_still_be_changed_is_refused(pair: Pair, seals: int) -> None:
    fd = memfd(b"payload" + TEXT, seals)
    assert "sealed" in refused(pair, head(7, 7, flags=1), fd)
    os.close(fd)


def test_a_memfd_with_holes_is_refused(pair: Pair) -> None:
    # Looking at it would make the receiver pay for pages that the sender never had.
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(fd, 1 << 30)
    os.pwrite(fd, TEXT, 1 << 30)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    assert "holes" in refused(pair, head(len(TEXT), 1 << 30, flags=1), fd)
    os.close(fd)


@pytest.mark.parametrize("kind", ["pipe", "socket", "null", "file", "directory", "zero"])
def test_a_descriptor_of_another_kind_is_refused(pair: Pair, kind: str) -> None:
    if kind == "pipe":
        fd, other = os.pipe()
        os.close(other)
    elif kind == "socket":
        fd = socket.socket(socket.AF_UNIX).detach()
    else:
        path = {"null": "/dev/null", "zero": "/dev/zero", "file": __file__, "directory": "/"}[kind]
        fd = os.open(path, os.O_RDONLY)
    assert "sealed" in refused(pair, head(7, 7, flags=1), fd)
    os.close(fd)


@pytest.mark.parametrize(("text", "payload"), [(7, 8), (8, 7), (6, 7), (7, 6), (0, 14), (14, 0)])
def test_a_memfd_whose_size_is_not_what_was_said(pair: Pair, text: int, payload: int) -> None:
    fd = memfd(b"payload" + TEXT)
    assert refused(pair, head(text, payload, flags=1), fd)
    os.close(fd)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_more_descriptors_than_one_are_refused_and_closed(pair: Pair, count: int) -> None:
    fd = memfd(b"payload" + TEXT)
    assert refused(pair, head(7, 7, flags=1), *[fd] * count)
    os.close(fd)


def test_the_kernel_drops_no_descriptor(pair: Pair) -> None:
    # It would close them in the receiver's own thread, for as long as their sender likes.
    fd = memfd(b"payload" + TEXT)
    assert "add up" in refused(pair, head(7, 7, flags=1), *[fd] * 253)
    os.close(fd)


def test_inline_takes_no_memfd_and_looks_into_none(pair: Pair) -> None:
    fd = memfd(b"not JSON")
    raw(pair[0], head(8, 0, flags=1), fd)
    with pytest.raises(ProtocolError, match="Only a request"):
        packets.receive(pair[1], inline=True)
    packets.send(pair[0], {"a": 1})
    packet = packets.receive(pair[1], inline=True)
    assert packet is not None
    assert packet.message == {"a": 1}
    os.close(fd)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a":"' + b"x" * (1 << 20) + b'"}', "longer than 524,288"),
        (b'{"a":[' + b"[]," * 40_000 + b"1]}", "40,000 values"),
        (b'{"a":[' + b'"[",' * 100_000 + b"1]}", "quotation marks"),
    ],
    ids=["long", "values", "strings"],
)
def test_a_request_has_closer_bounds(pair: Pair, text: bytes, words: str) -> None:
    fd = memfd(text)
    for bounds in (packets.REQUESTS, packets.ANYTHING):
        raw(pair[0], head(len(text), 0, flags=1), fd)
        if bounds is packets.REQUESTS:
            with pytest.raises(ProtocolError, match=words):
                packets.receive(pair[1], bounds=bounds)
        else:
            packet = packets.receive(pair[1], bounds=bounds)
            assert packet is not None
            packet.close()
    os.close(fd)


def test_a_request_may_name_ten_thousand_files() -> None:
    files = [[f"directory/another/{number:06}.txt", 1000] for number in range(10_000)]
    assert len(packets.loads(json.dumps({"files": files}).encode(), packets.REQUESTS)["files"]) == 10_000


def test_a_descriptor_with_an_inline_packet_is_refused(pair: Pair) -> None:
    fd = memfd(b"")
    assert "add up" in refused(pair, head(7, 0) + TEXT, fd)
    os.close(fd)


def test_an_empty_packet_with_a_descriptor_is_not_the_end(pair: Pair) -> None:
    fd = memfd(b"")
    assert "short" in refused(pair, b"", fd)
    os.close(fd)


def test_a_refused_packet_does_not_end_the_conversation(pair: Pair) -> None:
    refused(pair, b"noise")
    packets.send(pair[0], {"a": 1})
    packet = packets.receive(pair[1])
    assert packet is not None
    assert packet.message == {"a": 1}
