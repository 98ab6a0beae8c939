"""A client that may open the socket and sends what it likes: refused or dropped, and the others never notice."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import grp
import json
import mmap
import os
import random
import re
import select
import socket
import struct
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandboxd._util import disposal
from sandboxd.client.connections import greet
from sandboxd.engine.clients import connection, outbox
from sandboxd.engine.clients.connection import Connection
from sandboxd.engine.fair_share import FairShare, Shares
from sandboxd.engine.held_time import HeldTime
from sandboxd.errors import Busy, ConnectionLost, ProtocolError
from sandboxd.protocol import packets as protocol
from tests.support import daemons, leftovers
from tests.support.daemons import Raw, Served, as_user, header, request
from tests.support.promptness import prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandboxd.engine.engine import Engine

HOSTILE = 61_003
GID = grp.getgrnam(daemons.GROUP).gr_gid
MIB = 1 << 20


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with daemons.directory() as home, daemons.served(home, max_running=2, pool=leftovers.UNPARKED) as made:
        assert made.serves()
        yield made


@pytest.fixture(autouse=True)
def unharmed(served: Served, request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test the daemon serves, runs nothing, and holds the descriptors and threads that it held before."""

    def open_there() -> dict[int, str]:
        # The leaf of a slot that was used stays open, as many as there are slots; on v1 with an eventfd for its OOM.
        own = ("/sandboxd.", "[eventfd]")
        return {fd: link for fd, link in leftovers.fds(served.pid).items() if not any(word in link for word in own)}

    def threads() -> int:
        return len(os.listdir(f"/proc/{served.pid}/task"))

    fds, tasks = open_there(), threads()
    if request.node.get_closest_marker("operator"):
        yield
    else:
        with served.sandbox() as operator, prompt(operator):
            yield
    served.idle()
    assert served.serves()
    new: dict[int, str] = {}

    def back() -> bool:
        now = open_there()
        new.clear()
        new.update({fd: link for fd, link in now.items() if fd not in fds})
        return len(now) <= len(fds)

    try:
        leftovers.eventually(back, 10, "the daemon's descriptors are back")
    except AssertionError:
        pytest.fail(f"descriptors that are still open: {new}")
    # Threads of the executor that reads files may have been made.
    assert threads() <= tasks + 8
    assert "Traceback" not in served.said(), served.said()


# Requests that are well formed, and ask for too much

ASKS: list[tuple[str, dict[str, Any], str, str]] = [
    ("policy-text", request('name = "mine"\n[limits]\n'), "PolicyError", "by its name"),
    ("policy-table", request({"name": "mine"}), "PolicyError", "by its name"),
    ("policy-list", request(["default"]), "PolicyError", "by its name"),
    ("policy-number", request(1), "PolicyError", "by its name"),
    ("policy-empty", request(""), "PolicyError", "by its name"),
    ("policy-path", request("/etc/sandboxd/policies/default.toml"), "PolicyError", "by its name"),
    ("policy-dots", request(".."), "PolicyError", "by its name"),
    ("policy-parent", request("../policies/default"), "PolicyError", "by its name"),
    ("policy-file", request("default.toml"), "PolicyError", "by its name"),
    ("policy-nul", request("default\0"), "PolicyError", "by its name"),
    ("policy-newline", request("default\n"), "PolicyError", "by its name"),
    ("policy-control", request("\x1b[2Jdefault"), "PolicyError", "by its name"),
    ("policy-surrogate", request("\ud800"), "PolicyError", "by its name"),
    ("policy-huge", request("d" * (4 * MIB)), "PolicyError", "by its name"),
    ("policy-unknown", request("defualt"), "PolicyError", "Did you mean 'default'"),
    ("interpreter", {**request(), "interpreter": "/bin/sh"}, "PolicyError", "interpreter"),
    ("config", {**request(), "engine": {"walls_down": ["seccomp"]}}, "PolicyError", "engine"),
    ("many-keys", {**request(), **{f"k{i}": 1 for i in range(1000)}}, "PolicyError", r"\.\.\."),
    ("no-policy", {"op": "run", "run": header()}, "PolicyError", "policy"),
    ("no-run", {"op": "run", "policy": None}, "PolicyError", "run"),
    ("run-list", {"op": "run", "policy": None, "run": []}, "PolicyError", "run"),
    ("header-interpreter", request(interpreter="/bin/sh"), "ProtocolError", "interpreter"),
    ("header-control", request(**{"\x1b[2J": 1}), "ProtocolError", r"\\x1b"),
    ("wider", request(limits={"wall_seconds": 1e6}), "PolicyError", "wider"),
    ("unlimited", request(limits={"pids": None}), "PolicyError", "wider"),
    ("negative-limit", request(limits={"pids": -1}), "PolicyError", "pids"),
    ("zero-limit", request(limits={"wall_seconds": 0}), "PolicyError", "wall_seconds"),
    ("limit-text", request(limits={"memory_bytes": "1T"}), "PolicyError", "memory_bytes"),
    ("limit-bool", request(limits={"pids": True}), "PolicyError", "pids"),
    ("limit-huge", request(limits={"pids": 10**4000}), "PolicyError", "pids"),
    ("limit-unknown", request(limits={"walls": 0}), "PolicyError", "walls"),
    ("host-path", request(files=[["/etc/passwd", 0]]), "InvalidRequest", "relative"),
    ("parent-path", request(files=[["../x", 0]]), "InvalidRequest", r"\.\."),
    ("nul-path", request(files=[["a\0b", 0]]), "InvalidRequest", "NUL"),
    ("twice", request(files=[["a", 0], ["a", 0]]), "InvalidRequest", "twice"),
    ("file-and-directory", request(files=[["a", 0], ["a/b", 0]]), "InvalidRequest", "directory"),
    ("file-descriptor", request(files=[["a", "fd:3"]]), "InvalidRequest", "size"),
    ("file-negative", request(files=[["a", -4]], code_bytes=8), "InvalidRequest", "size"),
    ("file-triple", request(files=[["a", 0, "/etc/passwd"]]), "ProtocolError", "file"),
    ("too-many-files", request(files=[[f"{i}", 0] for i in range(100_001)]), "InvalidRequest", "too many"),
    ("deep-files", request(files=[[f"{i}/" + "a/" * 2000 + "x", 0] for i in range(1500)]), "InvalidRequest", "files"),
    ("negative-code", request(code_bytes=-1, stdin_bytes=5), "ProtocolError", "lengths"),
    ("long-code", request(code_bytes=1 << 40), "ProtocolError", "lengths"),
    ("short-code", request(code_bytes=3), "ProtocolError", "lengths"),
    ("code-bool", request(code_bytes=True), "ProtocolError", "code_bytes"),
    ("code-float", request(code_bytes=4.0), "ProtocolError", "code_bytes"),
    ("language", request(language="/bin/sh"), "InvalidRequest", "language"),
    ("filename", request(filename="../main.py"), "InvalidRequest", "filename"),
    ("filename-slash", request(filename="/etc/passwd"), "InvalidRequest", "filename"),
    ("args", request(args=[1]), "InvalidRequest", "args"),
    ("args-nul", request(args=["\0"]), "InvalidRequest", "NUL"),
    ("args-long", request(args=["x" * 200_000]), "InvalidRequest", "at most"),
    ("env-preload", request(env={"LD_PRELOAD": "/tmp/x.so"}), "InvalidRequest", "LD_PRELOAD"),
    ("env-name", request(env={"A=B": ""}), "InvalidRequest", "name"),
    ("env-value", request(env={"A": 1}), "InvalidRequest", "env"),
    ("stream-number", request(stream=1), "ProtocolError", "stream"),
    ("operation", {"op": "shutdown"}, "ProtocolError", "shutdown"),
    ("operation-table", {"op": {"run": 1}}, "ProtocolError", "no request"),
    ("no-operation", {}, "ProtocolError", "no request"),
    ("hello-again", protocol.hello(), "ProtocolError", "no request"),
]


@pytest.mark.parametrize(("message", "kind", "words"), [pytest.param(*rest, id=name) for name, *rest in ASKS])
@pytest.mark.operator
def test_a_request_for_too_much_is_refused(served: Served, message: dict[str, Any], kind: str, words: str) -> None:
    # As JSON escapes it: what Python's own client would not send.
    payload = b"pass" if "run" in message else b""
    text = json.dumps(message).encode()
    with Raw(served) as raw:
        if len(text) < protocol.INLINE_BYTES:
            raw.send_bytes(
                protocol._HEAD.pack(protocol.MAGIC, protocol.VERSION, 0, 0, len(text), len(payload)) + text + payload
            )
        else:
            send_memfd(raw, text, payload)
        found, said = raw.refusal()
        assert found == kind
        assert re.search(words, said), said
        assert len(said) < 2000
        assert served.runs() == []
        if kind == "ProtocolError":
            assert raw.answer() == {}  # dropped
        else:
            raw.send(request(), b"pass")
            assert raw.answer()["op"] == "result"


def send_memfd(raw: Raw, text: bytes, payload: bytes = b"", size: int | None = None) -> None:
    fd = protocol.sealed([payload, text])
    head = protocol._HEAD.pack(
        protocol.MAGIC, protocol.VERSION, 1, 0, len(text), len(payload) if size is None else size
    )
    raw.send_bytes(head, [fd])
    os.close(fd)


# Packets that are none


def packet(message: bytes, content: bytes = b"", /, **changes: int) -> bytes:
    """A packet as it should be, but for *changes* in its head."""
    head = {
        "version": protocol.VERSION,
        "flags": 0,
        "zero": 0,
        "text": len(message),
        "payload": len(content),
        **changes,
    }
    return protocol._HEAD.pack(protocol.MAGIC, *head.values()) + message + content


PACKETS: list[tuple[str, bytes]] = [
    ("one-byte", b"x"),
    ("head-only", b"SBXD"),
    ("http", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("other-magic", b"SBXE" + packet(b"{}")[4:]),
    ("version-0", packet(b"{}", version=0)),
    ("version-255", packet(b"{}", version=255)),
    ("flags", packet(b"{}", flags=2)),
    ("memfd-without", packet(b"", flags=1)),
    ("reserved", packet(b"{}", zero=1)),
    ("text-longer", packet(b"{}", text=3)),
    ("text-shorter", packet(b"{}", text=1)),
    ("text-4g", packet(b"{}", text=0xFFFFFFFF)),
    ("payload-longer", packet(b"{}", payload=1)),
    ("payload-2^64", packet(b"{}", payload=(1 << 64) - 1)),
    ("sum-wraps", packet(b"{}", text=0, payload=2)),
    ("not-json", packet(b"{")),
    ("not-utf8", packet(b'{"op":"\xff\xfe"}')),
    ("utf16", packet('{"op":"ps"}'.encode("utf-16"))),
    ("list", packet(b"[]")),
    ("null", packet(b"null")),
    ("nan", packet(b'{"op":NaN}')),
    ("infinity", packet(b'{"op":-Infinity}')),
    ("twice", packet(b'{"op":"ps","op":"run"}')),
    ("twice-inside", packet(b'{"op":"ps","x":{"a":1,"a":2}}')),
    ("long-number", packet(b'{"op":' + b"9" * 20_000 + b"}")),
    ("deep-lists", packet(b'{"op":' + b"[" * 30_000 + b"]" * 30_000 + b"}")),
    ("deep-open", packet(b'{"op":' + b"[" * 60_000)),
    ("deep-tables", packet(b'{"a":' * 9_000 + b"1" + b"}" * 9_000)),
    ("deep-33", packet(b'{"op":' + b"[" * 33 + b"]" * 33 + b"}")),
    ("crossed", packet(b'{"op":' + b"][" * 100 + b"}")),
    ("too-long", b"SBXD" + bytes(protocol.INLINE_BYTES * 2)),
]


@pytest.mark.parametrize("greet", [True, False], ids=["greeted", "first"])
@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in PACKETS])
def test_a_packet_that_is_none_ends_the_connection(served: Served, data: bytes, greet: bool) -> None:
    with Raw(served, greet) as raw:
        raw.send_bytes(data)
        assert raw.refusal()[0] in ("ProtocolError", "")
        assert raw.answer() == {}


@pytest.mark.parametrize(
    "text",
    [
        b'{"op":[' + b"[]," * (2 * MIB) + b"1]}",
        b'{"op":[' + b"1," * (3 * MIB) + b"1]}",
        b'{"op":[' + b'"",' * (2 * MIB) + b"1]}",
        b'{"op":' + b"[" * (7 * MIB),
        b'{"op":' + b"[" * (3 * MIB) + b"]" * (3 * MIB) + b"}",
        b'{"op":"' + b'\\"' * (3 * MIB),
        b"{" * 50 + b'"' + b'\\"' * (3 * MIB) + b"\\",
        b'{"op":{' + b",".join(b'"%x":1' % number for number in range(600_000)) + b"}}",
    ],
    ids=["lists", "numbers", "strings", "open", "nested", "escapes", "unterminated", "keys"],
)
@pytest.mark.operator
def test_a_json_bomb_costs_little(served: Served, text: bytes) -> None:
    before = leftovers.rss_bytes(served.pid)
    with Raw(served) as raw:
        begun = time.monotonic()
        send_memfd(raw, text)
        assert raw.refusal()[0] == "ProtocolError"
        assert time.monotonic() - begun < 5
    assert leftovers.rss_bytes(served.pid) - before < 64 * MIB


STRANGERS_BOMBS = {
    "lists": b'{"op":[' + b"[]," * 39_000 + b"1]}",
    "strings": b'{"op":[' + b'"",' * 24_000 + b"1]}",
    "escapes": b'{"op":"' + b"\\u0041" * 85_000 + b'"}',
    "quotes": b'{"op":"' + b'\\"' * 49_000 + b'"}',
    "keys": b'{"op":{' + b",".join(b'"%x":1' % number for number in range(24_000)) + b"}}",
    "numbers": b'{"op":' + b"1" * 500_000 + b"}",
    "brackets": b'{"op":[' + b"[]," * 19_000 + b'"' + b"\\u0041" * 70_000 + b'"]}',
}


@pytest.mark.parametrize("text", STRANGERS_BOMBS.values(), ids=STRANGERS_BOMBS)
def test_strangers_bombs_are_looked_at_one_in_an_iteration(served: Served, text: bytes) -> None:
    """The most of each kind that a client may send who is not trusted, from eight connections at a time."""

    def throw() -> int:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Raw(served)) for _ in range(8)]
            for raw in clients:
                send_memfd(raw, text)
            return len([raw.refusal() for raw in clients])

    throwers = [daemons.Child(throw, HOSTILE + number, GID) for number in range(2)]
    assert [thrower.result() for thrower in throwers] == [8, 8]


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.one_of(
    st.binary(max_size=200),
    st.builds(
        packet, st.binary(max_size=60), st.binary(max_size=30),
        flags=st.integers(0, 255), text=st.integers(0, 80), payload=st.integers(0, 80),
    ),
    st.builds(packet, st.binary(max_size=60)),
    st.builds(lambda value: packet(json.dumps(value).encode()), st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
            st.sampled_from(["op", "policy", "run", "code_bytes", "files"]) | st.text(max_size=5), inner, max_size=5,
        ),
        max_leaves=12,
    )),
    st.builds(
        lambda key, value: packet(json.dumps(request(**{key: value})).encode(), b"pass"),
        st.sampled_from(sorted(header())),
        st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4).filter(lambda text: text != "python")
        | st.lists(st.lists(st.text(max_size=3) | st.integers(-3, 3), max_size=3), min_size=1, max_size=3),
    ),
), min_size=1, max_size=20))  # fmt: skip
def test_random_packets_do_no_harm(served: Served, packets: list[bytes]) -> None:
    with Raw(served) as raw:
        raw.sock.setblocking(False)
        for data in packets:
            with contextlib.suppress(BlockingIOError, ConnectionResetError):
                raw.send_bytes(data)


def test_a_valid_request_with_any_byte_changed_does_no_harm(served: Served) -> None:
    whole = packet(json.dumps(request()).encode(), b"pass")
    chance = random.Random(7)  # noqa: S311
    for position in range(0, len(whole), 2):
        with Raw(served) as raw:
            raw.send_bytes(whole[:position] + bytes([chance.randrange(256)]) + whole[position + 1 :])
            assert raw.answer().get("op") in ("refused", "result", None)


# Descriptors


def memfd(size: int, seals: int) -> int:
    fd = os.memfd_create("x", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, b" " * size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def sparse() -> int:
    fd = os.memfd_create("x", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    text = b'{"op":"ps"}'
    os.ftruncate(fd, 4096 - len(text))
    os.pwrite(fd, text, 1 << 30)
    os.ftruncate(fd, (1 << 30) + len(text))
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, protocol._SEALS)
    return fd


def pair_end() -> int:
    one, other = socket.socketpair()
    other.close()
    return one.detach()


def lingering() -> int:
    """A TCP connection whose close(2) would block for minutes: nobody reads at the other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock = socket.create_connection(listener.getsockname())
        keep.append(listener.accept()[0])
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 5))
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(1 << 16))
    return sock.detach()


keep: list[socket.socket] = []
SIZE = 100
DESCRIPTORS: list[tuple[str, Callable[[], int], int]] = [
    ("unsealed", lambda: memfd(SIZE, 0), SIZE),
    ("no-write-seal", lambda: memfd(SIZE, protocol._SEALS & ~fcntl.F_SEAL_WRITE), SIZE),
    ("no-shrink-seal", lambda: memfd(SIZE, protocol._SEALS & ~fcntl.F_SEAL_SHRINK), SIZE),
    ("no-grow-seal", lambda: memfd(SIZE, protocol._SEALS & ~fcntl.F_SEAL_GROW), SIZE),
    ("no-seal-seal", lambda: memfd(SIZE, protocol._SEALS & ~fcntl.F_SEAL_SEAL), SIZE),
    ("future-write", lambda: memfd(SIZE, (protocol._SEALS & ~fcntl.F_SEAL_WRITE) | 0x10), SIZE),
    ("shrunk", lambda: memfd(SIZE - 1, protocol._SEALS), SIZE),
    ("grown", lambda: memfd(SIZE + 1, protocol._SEALS), SIZE),
    ("empty", lambda: memfd(0, protocol._SEALS), SIZE),
    ("holes", sparse, (1 << 30) + 11),
    ("pipe", lambda: os.pipe()[0], SIZE),
    ("socket", pair_end, SIZE),
    ("null", lambda: os.open("/dev/null", os.O_RDWR), SIZE),
    ("zero", lambda: os.open("/dev/zero", os.O_RDONLY), SIZE),
    ("directory", lambda: os.open("/", os.O_RDONLY), SIZE),
    ("path-only", lambda: os.open("/etc/passwd", os.O_PATH), SIZE),
    ("file", lambda: os.open("/etc/passwd", os.O_RDONLY), os.stat("/etc/passwd").st_size),
    ("proc-mem", lambda: os.open("/proc/self/mem", os.O_RDONLY), SIZE),
    ("pidfd", lambda: os.pidfd_open(os.getpid()), SIZE),
    ("lingering", lingering, SIZE),
]


@pytest.mark.parametrize(("make", "size"), [pytest.param(make, size, id=name) for name, make, size in DESCRIPTORS])
def test_a_descriptor_that_is_no_sealed_memfd_is_refused(served: Served, make: Callable[[], int], size: int) -> None:
    before = leftovers.rss_bytes(served.pid)
    text_bytes = 11
    head = protocol._HEAD.pack(protocol.MAGIC, protocol.VERSION, 1, 0, text_bytes, size - text_bytes)
    with Raw(served) as raw:
        fd = make()
        raw.send_bytes(head, [fd])
        os.close(fd)
        begun = time.monotonic()
        assert raw.refusal()[0] == "ProtocolError"
        with Raw(served) as other:
            other.send({"op": "ps"})
            assert other.answer()["op"] == "ps"
        assert time.monotonic() - begun < 2
        assert raw.answer() == {}
    assert leftovers.rss_bytes(served.pid) - before < 16 * MIB
    while keep:
        keep.pop().close()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 253])
def test_descriptors_beyond_the_one_are_refused_and_closed(served: Served, count: int) -> None:
    for flags in (0, 1):
        text = b'{"op":"ps"}'
        fd = protocol.sealed([text])
        with Raw(served) as raw:
            raw.send_bytes(packet(text if not flags else b"", flags=flags, text=len(text)), [fd] * count)
            assert raw.refusal()[0] == "ProtocolError"
            assert raw.answer() == {}
        os.close(fd)


@pytest.mark.parametrize("unread", [True, False], ids=["unread", "second"])
def test_no_descriptor_is_closed_in_the_engines_thread(served: Served, unread: bool) -> None:
    with Raw(served) as raw:
        fds = [lingering(), lingering()]
        # Something to work on first, so that what follows is there when it is done.
        if unread:
            send_memfd(raw, b'{"op":"cancel","x":[' + b"[]," * 100_000 + b'"\\u0041"]}')
            raw.send_bytes(b"")
            raw.send_bytes(b"x", fds)
        else:
            raw.send({"op": "ps", "x": "y" * 30_000})
            raw.send_bytes(packet(b"", flags=1, text=11), fds)
        for fd in fds:
            os.close(fd)
        begun = time.monotonic()
        if not unread:
            assert raw.answer()["op"] == "ps"
        assert raw.refusal()[0] == "ProtocolError"
        assert raw.answer() == {}
        for _ in range(3):
            with Raw(served) as other:
                other.send({"op": "ps"})
                assert other.answer()["op"] == "ps"
        assert time.monotonic() - begun < 3
    while keep:
        keep.pop().close()


def test_descriptors_in_packets_that_nobody_reads_go_with_the_connection(served: Served) -> None:
    with Raw(served) as raw, open(os.devnull, "rb") as null:
        raw.send(request(code_bytes=len(daemons.SLEEP)), daemons.SLEEP.encode())
        for _ in range(5):
            raw.send_bytes(b"x", [null.fileno()] * 100)


def test_a_sealed_memfd_that_is_still_mapped_cannot_change(served: Served) -> None:
    # The kernel refuses the seal while a writable mapping is there, so there is nothing to send.
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.write(fd, b" " * 4096)
    with mmap.mmap(fd, 4096), pytest.raises(OSError, match="busy"):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, protocol._SEALS)
    os.close(fd)
    assert served.runs() == []


# Many, and slow


def test_a_thousand_connections_leave_nothing(served: Served) -> None:
    def connect() -> None:
        for number in range(1000):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.connect(str(served.path))
                if number % 3 == 0:
                    protocol.send(sock, protocol.hello())
                if number % 3 == 1:
                    with contextlib.suppress(BrokenPipeError):
                        sock.send(b"")

    connect()
    held = leftovers.rss_bytes(served.pid)
    connect()
    served.idle()
    assert leftovers.rss_bytes(served.pid) - held < 4 * MIB


def test_one_uid_has_a_quarter_of_the_connections(served: Served) -> None:
    def crowd() -> tuple[list[str], str]:
        with contextlib.ExitStack() as stack:
            said = []
            for _ in range(300):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                sock.connect(str(served.path))
                raw = Raw(sock, greet=False)
                with contextlib.suppress(BrokenPipeError):
                    protocol.send(sock, protocol.hello())
                message = raw.answer()
                said.append(message["op"])
            with pytest.raises(Busy) as caught:
                served.serves()
            return said, str(caught.value)

    child = daemons.Child(crowd, HOSTILE, GID)
    # Others are let in meanwhile.
    assert served.serves()
    said, message = child.result()
    assert said == ["hello"] * 256 + ["refused"] * 44
    assert "was not started" in message
    assert "turned away" in served.said()


def test_a_thousand_runs_in_one_connection_leave_nothing_in_memory(served: Served) -> None:
    def runs(count: int) -> int:
        with Raw(served) as raw:
            for _ in range(count):
                raw.send(request(code_bytes=16 * 4096), b"pass" + b" " * (16 * 4096 - 4))
                assert raw.answer()["op"] == "result"
        return leftovers.rss_bytes(served.pid)

    held = runs(30)
    assert runs(60) - held < 4 * MIB


def test_who_reads_nothing_stops_nobody_and_its_run_ends(served: Served) -> None:
    flood = "while True: print('x' * 1000)"
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            raw = stack.enter_context(Raw(served))
            raw.send(request(code_bytes=len(flood), stream=True, limits={"wall_seconds": 1.0}), flood.encode())
        leftovers.eventually(lambda: len(served.runs()) == 2, 5, "both run")
        begun = time.monotonic()
        with Raw(served) as other:
            other.send({"op": "ps"})
            assert other.answer()["op"] == "ps"
        assert time.monotonic() - begun < 1
        # Their turns and slots are free as soon as the clock ends them, though nobody has taken their output.
        served.idle(4)
        assert served.serves()
    assert "is lost" not in served.said()
    assert "still there" not in served.said()


def test_who_leaves_with_output_and_files_untaken_leaves_nothing(served: Served) -> None:
    code = "open('f', 'wb').write(bytes(1 << 20))\nprint('x' * 2_000_000, flush=True)"
    for _ in range(3):
        with Raw(served) as raw:
            raw.send(request(code_bytes=len(code), stream=True, limits={"wall_seconds": 1.0}), code.encode())
            assert raw.answer()["op"] == "output"
            served.idle(5)  # over, and waiting for its reader


def test_a_cancel_that_comes_when_only_output_is_left_changes_nothing(served: Served) -> None:
    size = 300 << 10
    code = f"import os; os.write(1, bytes({size}))"
    with Raw(served) as raw:
        raw.send(request(code_bytes=len(code), stream=True), code.encode())
        served.idle(5)
        raw.send({"op": "cancel"})
        ops = []
        while (answer := raw.answer()) and answer["op"] == "output":
            ops.append(answer)
        assert answer["op"] == "result"
        assert answer["result"]["status"] == "ok"
        assert len(ops) > 1


def test_who_sends_during_its_run_ends_it(served: Served) -> None:
    with Raw(served) as raw:
        raw.send(request(code_bytes=len(daemons.SLEEP)), daemons.SLEEP.encode())
        leftovers.eventually(lambda: [run["state"] for run in served.runs()] == ["running"], 5, "it runs")
        raw.send(request(), b"pass")
        served.idle(3)


def test_who_cancels_gets_the_result_and_may_go_on(served: Served) -> None:
    with Raw(served) as raw:
        for _ in range(3):
            raw.send(request(code_bytes=len(daemons.SLEEP)), daemons.SLEEP.encode())
            leftovers.eventually(lambda: [run["state"] for run in served.runs()] == ["running"], 5, "it runs")
            raw.send(protocol.CANCEL)
            answer = raw.answer()
            assert answer["result"]["status"] == "cancelled"
            raw.send(protocol.CANCEL)  # too late: nothing is there
        raw.send(request(), b"pass")
        assert raw.answer()["result"]["status"] == "ok"


def test_a_cancel_that_crosses_with_the_result_hides_nothing(served: Served) -> None:
    for delay in range(20):
        with Raw(served) as raw:
            raw.send(request(), b"pass")
            threading.Event().wait(delay / 1000)
            raw.send(protocol.CANCEL)
            answer = raw.answer()
            assert answer["op"] in ("result", "refused")
            if answer["op"] == "result":
                assert answer["result"]["status"] in ("ok", "cancelled")


def test_a_cancel_that_means_no_run_is_refused(served: Served) -> None:
    with Raw(served) as raw:
        raw.send(protocol.CANCEL)
        assert raw.refusal()[0] == "ProtocolError"
    with Raw(served) as raw:
        raw.send(request(), b"pass")
        assert raw.answer()["op"] == "result"
        raw.send(protocol.CANCEL)
        raw.send(protocol.CANCEL)
        assert raw.refusal()[0] == "ProtocolError"
        assert raw.answer() == {}


@contextlib.contextmanager
def too_many_references() -> Iterator[None]:
    """The kernel lets as many descriptors of a uid wait in sockets as RLIMIT_NOFILE says; what is more is not sent."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ETOOMANYREFS:
            raise


def test_who_sends_large_requests_in_a_row_stops_nobodys_clock(served: Served) -> None:
    # What costs the most of what is taken, on a connection that goes on: the refusal is of the policy.
    text = b'{"op":"run","policy":"!","run":{"x":[' + b"[]," * 19_000 + b'"' + b"\\u0041" * 70_000 + b'"]}}'
    head = protocol._HEAD.pack(protocol.MAGIC, protocol.VERSION, 1, 0, len(text), 0)
    read, write = os.pipe()

    def flood() -> int:
        fd = protocol.sealed([text])
        answers = 0
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Raw(served)) for _ in range(8)]
            for raw in clients:
                raw.sock.setblocking(False)
            os.write(write, b"x")
            until = time.monotonic() + 5
            while time.monotonic() < until:
                for raw in clients:
                    with contextlib.suppress(BlockingIOError), too_many_references():
                        while True:
                            raw.send_bytes(head, [fd])
                    with contextlib.suppress(BlockingIOError):
                        while protocol.receive(raw.sock) is not None:
                            answers += 1
                time.sleep(0.01)
        return answers

    child = daemons.Child(flood, HOSTILE, GID)
    os.read(read, 1)
    with Raw(served) as raw:
        begun = time.monotonic()
        raw.send(request(code_bytes=len(daemons.SLEEP), limits={"wall_seconds": 1.0}), daemons.SLEEP.encode())
        while time.monotonic() - begun < 0.8:
            with Raw(served) as other:
                asked = time.monotonic()
                other.send({"op": "ps"})
                assert other.answer()["op"] == "ps"
                assert time.monotonic() - asked < 1
        assert raw.answer()["result"]["status"] == "timeout"
        assert time.monotonic() - begun < 3
    assert child.result() > 10
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("free", [False, True])
def test_a_uid_has_half_of_the_engines_time(free: bool) -> None:
    async def main() -> tuple[float, int]:
        share = FairShare(free)
        until = time.monotonic() + 1
        spent = 0.0
        ticks = 0

        async def connection() -> None:
            nonlocal spent
            while time.monotonic() < until:
                await share.turn()
                with share.counted():
                    time.sleep(0.02)
                    spent += 0.02

        async def another() -> None:
            nonlocal ticks
            while time.monotonic() < until:
                await asyncio.sleep(0.001)
                ticks += 1

        await asyncio.gather(connection(), connection(), connection(), another())
        return spent, ticks

    spent, ticks = asyncio.run(main())
    assert ticks > 1
    if not free:
        assert spent < 0.65


def test_large_programs_of_one_uid_wait_outside(served: Served) -> None:
    code = b"import time; time.sleep(20) #" + "é".encode() * (8 * MIB - 64)

    def queue() -> list[str]:
        answers: list[str] = []
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Raw(served)) for _ in range(6)]
            for raw in clients:
                raw.send(request(code_bytes=len(code)), code)
                # One that is taken says "queued", or nothing while it runs.
                raw.sock.settimeout(0.5 if len(answers) < 2 else 10)
                try:
                    answers.append(raw.answer()["op"])
                except TimeoutError:
                    answers.append("runs")
        return answers

    assert as_user(queue, HOSTILE, GID) == ["runs", "runs", "queued", "refused", "refused", "refused"]


# What a program can do to its own answer


def test_a_program_with_the_longest_names_still_has_a_result(served: Served) -> None:
    code = (
        "import os\nname = '\\x01' * 250\nfor i in range(16):\n d = f'{i:04}{name}'\n os.mkdir(d)\n"
        " for j in range(240):\n  open(f'{d}/{j:04}{name}', 'w').close()\n"
    )
    with served.sandbox() as sandbox, sandbox.run(code) as result:
        assert result.status == "ok", result.stderr
        assert len(result.files) + result.files_skipped == 16 * 240
        assert result.files_skipped > 0


# Deadlines, on one connection without a daemon


def drive(
    seconds: str, monkeypatch: pytest.MonkeyPatch, act: Callable[[socket.socket], None], length: int = 30_000
) -> list[str]:
    """What a connection answers whose deadline *seconds* is short, when the client only does *act* and reads at its
    end; an answer to ps is *length* long.
    """
    monkeypatch.setattr(connection if hasattr(connection, seconds) else outbox, seconds, 0.2)

    engine = types.SimpleNamespace(
        shares=Shares(),
        resources=types.SimpleNamespace(held=HeldTime()),
        live=types.SimpleNamespace(facts=lambda _: [{"id": "x" * length}]),
    )

    async def main() -> list[str]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            one = Connection(cast("Engine", engine), theirs, {"uid": 1, "pid": 1}, cast("Any", None), False)
            act(ours)
            begun = time.monotonic()
            await asyncio.wait_for(one.serve(), 5)
            assert theirs.fileno() == -1
            assert 0.15 < time.monotonic() - begun < 2
            raw = Raw(ours, greet=False)
            answers = []
            while answer := raw.answer():
                answers.append(answer["op"])
            return answers

    return asyncio.run(main())


def test_who_says_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drive("HELLO_SECONDS", monkeypatch, lambda _: None) == []


def test_who_takes_no_answer_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(sock: socket.socket) -> None:
        sock.setblocking(False)
        protocol.send(sock, protocol.hello())
        with contextlib.suppress(BlockingIOError):
            while True:
                protocol.send(sock, {"op": "ps"})

    assert drive("SEND_SECONDS", monkeypatch, ask)[:2] == ["hello", "ps"]


def test_one_memfd_at_a_time_waits_to_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(sock: socket.socket) -> None:
        protocol.send(sock, protocol.hello())
        for _ in range(3):
            protocol.send(sock, {"op": "ps"})

    assert drive("SEND_SECONDS", monkeypatch, ask, 2 * protocol.INLINE_BYTES) == ["hello", "ps"]


def test_a_run_waits_until_the_last_files_are_read(served: Served) -> None:
    code = b"open('f', 'wb').write(bytes(1 << 20))"
    with Raw(served) as raw:
        raw.send(request(code_bytes=len(code)), code)
        leftovers.eventually(lambda: select.select([raw.sock], [], [], 0)[0] != [], 10, "the answer is there")
        served.idle()
        raw.send(request(code_bytes=len(daemons.SLEEP)), daemons.SLEEP.encode())
        time.sleep(0.3)
        assert served.runs() == []
        assert raw.answer()["op"] == "result"
        leftovers.eventually(lambda: len(served.runs()) == 1, 5, "the second begins")


def test_whose_descriptors_cannot_be_closed_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disposal, "pending", lambda _: disposal.PENDING_MAX + 1)

    async def main() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            engine = types.SimpleNamespace(shares=Shares(), resources=types.SimpleNamespace(held=HeldTime()))
            one = Connection(cast("Engine", engine), theirs, {"uid": 1, "pid": 1}, cast("Any", None), False)
            protocol.send(ours, protocol.hello())
            await asyncio.wait_for(one.serve(), 5)
            assert "cannot be closed" in Raw(ours, greet=False).refusal()[1]

    asyncio.run(main())


def test_the_clients_side_is_as_strict() -> None:
    """A false daemon: what it sends is no Result, and nothing of it is believed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, ThreadPoolExecutor(1) as pool:

        def lie() -> None:
            with Raw(theirs, greet=False) as raw:
                assert raw.answer()["op"] == "hello"
                raw.send({"op": "hello"})

        done = pool.submit(lie)
        greet(ours)
        done.result(5)
        with pytest.raises(ConnectionLost):
            greet(ours)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        protocol.send(theirs, {"op": "welcome"})
        with pytest.raises(ProtocolError):
            greet(ours)
