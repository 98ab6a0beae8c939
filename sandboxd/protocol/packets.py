"""Packets between a client and an engine, over a SOCK_SEQPACKET Unix socket.

A packet is a fixed head, then a JSON object, then a binary payload. The kernel keeps packets whole, so there is no
half-read frame and no length that a peer could announce and not deliver. What does not fit into INLINE_BYTES travels in
one sealed memfd instead: payload first, JSON behind it. The receiver checks the seals and the size before it reads, so
that the sender can neither change what was checked nor make a read block (a descriptor of FUSE or a pipe would); and
that it has no holes, whose pages would be made, and paid for, by the receiver when it looks at them.

Conversation: the client says ``hello`` with its version, the engine answers ``hello``; then one request at a time is
made and answered. During a run the client may send ``cancel`` or close the connection, which is the same. What else may
be said is in ``operations``. Pure standard library; both sides import it.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sandboxd._util import disposal
from sandboxd.errors import ProtocolError
from sandboxd.protocol.operations import Operation

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "CANCEL",
    "JSON_BYTES",
    "PAYLOAD_BYTES",
    "REQUESTS",
    "VERSION",
    "Bounds",
    "Packet",
    "hello",
    "pack",
    "receive",
    "send",
]

VERSION: Final = 1
MAGIC: Final = b"SBXD"
_HEAD: Final = struct.Struct("<4sBBHIQ")  # magic, version, flags, zero, JSON bytes, payload bytes
_IN_MEMFD: Final = 1
_WITH_FDS: Final = 2  # of an engine to its own caller: descriptors come along

INLINE_BYTES: Final = 64 << 10  # well below net.core.wmem_default, the largest packet that can be sent
JSON_BYTES: Final = 8 << 20
JSON_DEPTH: Final = 32
JSON_VALUES: Final = 500_000  # 100,000 files are 300,000
PAYLOAD_BYTES: Final = 4 << 30
LEAVES: Final = 3
"""Cgroup leaves whose descriptors a caller of an embedded engine keeps; with one more it forgets them all."""

_LEASE: Final = struct.Struct("<4s16sII24q")  # magic, identity, leaf, count, the leaf's numbers at the start
_LEASE_MAGIC: Final = b"SBXL"
_NUMBERS: Final = 24

_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

Buffer = bytes | bytearray | memoryview

CANCEL: Final = {"op": Operation.CANCEL}


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a message may hold: bytes of JSON, values, and quotation marks, which cost the most to be looked at."""

    text_bytes: int = JSON_BYTES
    values: int = JSON_VALUES
    quotes: int = JSON_BYTES


ANYTHING: Final = Bounds()
REQUESTS: Final = Bounds(512 << 10, 40_000, 50_000)
"""Of a client that is not trusted: some 10,000 files, judged in 5 to 10 ms."""


def hello(direct: bool = False) -> dict[str, Any]:
    """A client's first packet on a connection; *direct*: it would hold cells itself, if it is the engine's caller."""
    found: dict[str, Any] = {"op": Operation.HELLO, "version": VERSION, "client": "sandboxd-python"}
    return {**found, "direct": True} if direct else found


@dataclass(slots=True)
class Packet:
    """One received packet. *payload* is bytes, or the descriptor of a sealed memfd that begins with it; whoever takes
    the packet owns the descriptor.
    """

    message: dict[str, Any]
    payload: bytes | int
    payload_bytes: int
    text_bytes: int = 0
    """Length of the message as JSON."""
    fds: list[int] = field(default_factory=list)
    """Descriptors that came along; whoever empties the list owns them."""
    owner: object = None
    """On whose account the payload is closed."""

    def close(self) -> None:
        """Close descriptors that nobody took."""
        payload, self.payload = self.payload, b""
        if isinstance(payload, int):
            disposal.close(payload, self.owner)
        while self.fds:
            os.close(self.fds.pop())

    def take_bytes(self) -> Buffer:
        """The payload as a buffer: a read-only mapping when it came in a memfd. The descriptor is closed."""
        if isinstance(self.payload, bytes):
            return self.payload
        try:
            if self.payload_bytes == 0:
                return b""
            return memoryview(mmap.mmap(self.payload, self.payload_bytes, prot=mmap.PROT_READ))
        finally:
            self.close()


def sealed(parts: Iterable[Buffer]) -> int:
    """A close-on-exec memfd that holds *parts* end to end and that nobody can change any more."""
    fd = os.memfd_create("sandboxd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        for part in parts:
            view = memoryview(part).cast("B") if len(part) else memoryview(b"")
            while len(view):
                view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def pack(
    message: dict[str, Any], payload: Sequence[Buffer] = (), filled: int | None = None
) -> tuple[list[Buffer], int]:
    """The buffers of one packet, and a memfd that goes with it or -1; the caller sends and closes it.

    *payload* is one or more buffers. *filled* is instead an unsealed memfd that already holds the payload; it becomes
    this packet's.
    """
    text = _ENCODER.encode(message).encode("utf-8", "replace")
    size = os.fstat(filled).st_size if filled is not None else sum(len(part) for part in payload)
    if len(text) > JSON_BYTES or size > PAYLOAD_BYTES:
        if filled is not None:
            os.close(filled)
        raise ProtocolError(f"A message of {len(text):,} + {size:,} bytes is too large to be sent.")
    if filled is None and len(text) + size <= INLINE_BYTES:
        # Joined: sendmsg(2) takes 1,024 pieces (UIO_MAXIOV), and a run may have more files than that.
        return [_HEAD.pack(MAGIC, VERSION, 0, 0, len(text), size), text, b"".join(payload)], -1
    if filled is None:
        fd = sealed((*payload, text))
    else:
        fd = filled
        try:
            os.pwrite(fd, text, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
    return [_HEAD.pack(MAGIC, VERSION, _IN_MEMFD, 0, len(text), size)], fd


def with_descriptors(message: dict[str, Any]) -> bytes:
    """A packet that descriptors go along with; of an engine to its own caller. Raises ProtocolError when it is long."""
    text = _ENCODER.encode(message).encode()
    if len(text) > INLINE_BYTES:
        raise ProtocolError("A message with descriptors is too long.")
    return _HEAD.pack(MAGIC, VERSION, _WITH_FDS, 0, len(text), 0) + text


class LeaseFds(NamedTuple):
    """The descriptors of a leased cell, in the order in which they are sent; a leaf's control files may follow."""

    channel: int
    stdout: int
    stderr: int
    workspace: int
    tmp: int
    shm: int
    source: int
    """The program's file, to be written once."""
    alarm: int
    """A timerfd of the engine's, to be set when the program is handed over."""


def lease(identity: str, leaf: int, before: Sequence[int]) -> bytes:
    """A lease in a leaf that its caller knows already, as short as can be: a request has to read it."""
    numbers = (*before, *(0,) * (_NUMBERS - len(before)))
    return _LEASE.pack(_LEASE_MAGIC, identity.encode("ascii"), leaf, len(before), *numbers)


def send(sock: socket.socket, message: dict[str, Any], payload: Sequence[Buffer] = ()) -> None:
    """Send one packet. Raises OSError as sendmsg(2) does, BlockingIOError on a full non-blocking socket."""
    buffers, fd = pack(message, payload)
    try:
        send_packed(sock, buffers, fd)
    finally:
        if fd >= 0:
            os.close(fd)


def send_packed(sock: socket.socket, buffers: Sequence[Buffer], fd: int) -> None:
    """Send what ``pack`` made; the descriptor stays the caller's."""
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))] if fd >= 0 else []
    sock.sendmsg(buffers, control, socket.MSG_NOSIGNAL)


def receive(
    sock: socket.socket,
    flags: int = 0,
    *,
    inline: bool = False,
    bounds: Bounds = ANYTHING,
    owner: object = None,
    descriptors: int = 0,
) -> Packet | None:
    """One packet, or None at the end of the connection. With *inline* one in a memfd is refused before it is looked at.
    Up to *descriptors* may come along with a packet that says so.
    Descriptors that are no packet's are closed on *owner*'s account, see ``disposal``.

    Raises ProtocolError for anything that is not a packet, BlockingIOError when none is there on a non-blocking socket.
    """
    raw = take(sock, flags, owner)
    return None if raw is None else parse(raw, inline=inline, bounds=bounds, owner=owner, descriptors=descriptors)


@dataclass(frozen=True, slots=True)
class Raw:
    """One packet as it came, to be parsed: that closes the descriptors, or hands them on."""

    data: bytes
    fds: list[int]

    @property
    def is_large(self) -> bool:
        """Whether it is one that came in a memfd."""
        return len(self.data) == _HEAD.size and self.data[5] == _IN_MEMFD


def take(sock: socket.socket, flags: int = 0, owner: object = None) -> Raw | None:
    """``receive`` without a look at what came: a large packet is better parsed in another thread."""
    # recv_fds() drops its flags (gh-107898): a descriptor would be open across exec for a moment.
    size, room = INLINE_BYTES + _HEAD.size, disposal.RIGHTS_ROOM
    data, control, got, _ = sock.recvmsg(size, room, flags | socket.MSG_CMSG_CLOEXEC)
    fds = disposal.rights(control)
    try:
        if not data and not fds:
            return None
        if got & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ProtocolError("A packet is longer than the protocol allows.")
    except BaseException:
        for fd in fds:
            disposal.close(fd, owner)
        raise
    return Raw(data, fds)


def parse(
    raw: Raw, *, inline: bool = False, bounds: Bounds = ANYTHING, owner: object = None, descriptors: int = 0
) -> Packet:
    """The packet that *raw* is. As ``receive``."""
    try:
        packet = _parse(raw.data, raw.fds, inline, bounds, descriptors)
    except BaseException:
        for fd in raw.fds:
            disposal.close(fd, owner)
        raise
    packet.owner = owner
    return packet


def _parse(data: bytes, fds: list[int], inline: bool, bounds: Bounds, descriptors: int) -> Packet:
    if len(data) < _HEAD.size:
        raise ProtocolError("A packet is too short to be one.")
    if descriptors and len(data) == _LEASE.size and data.startswith(_LEASE_MAGIC):
        _, identity, leaf, count, *numbers = _LEASE.unpack(data)
        message = {"op": Operation.LEASE, "lease": identity.decode("ascii"), "leaf": leaf, "before": numbers[:count]}
        return Packet(message, b"", 0, len(data), fds)
    magic, version, flags, zero, text_bytes, payload_bytes = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise ProtocolError("The other side does not speak sandboxd's protocol.")
    if version != VERSION:
        raise ProtocolError(f"The other side speaks version {version} of the protocol; this side speaks {VERSION}.")
    if flags not in (0, _IN_MEMFD, _WITH_FDS if descriptors else 0) or zero or payload_bytes > PAYLOAD_BYTES:
        raise ProtocolError("A packet's head is out of bounds.")
    if text_bytes > bounds.text_bytes:
        raise ProtocolError(f"A message is longer than {bounds.text_bytes:,} bytes: its head is out of bounds.")
    if flags == _WITH_FDS:
        if len(fds) > descriptors or len(data) != _HEAD.size + text_bytes + payload_bytes or payload_bytes:
            raise ProtocolError("A packet's lengths do not add up.")
        return Packet(loads(data[_HEAD.size :], bounds), b"", 0, text_bytes, fds)
    if flags == 0:
        if fds or len(data) != _HEAD.size + text_bytes + payload_bytes:
            raise ProtocolError("A packet's lengths do not add up.")
        text = data[_HEAD.size : _HEAD.size + text_bytes]
        return Packet(loads(text, bounds), data[_HEAD.size + text_bytes :], payload_bytes, text_bytes)
    if inline:
        raise ProtocolError("Only a request for a run may come in a memfd.")
    if len(fds) != 1 or len(data) != _HEAD.size:
        raise ProtocolError("A packet's lengths do not add up.")
    try:
        held = fcntl.fcntl(fds[0], fcntl.F_GET_SEALS)
    except OSError:
        held = 0
    if held & _SEALS != _SEALS:
        raise ProtocolError("A packet's descriptor is not a sealed memfd.")
    facts = os.fstat(fds[0])
    if facts.st_size != text_bytes + payload_bytes:
        raise ProtocolError("A packet's lengths do not add up.")
    if facts.st_blocks * 512 < facts.st_size:
        raise ProtocolError("A packet's memfd has holes.")
    return Packet(loads(os.pread(fds[0], text_bytes, payload_bytes), bounds), fds[0], payload_bytes, text_bytes)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ProtocolError("A message has a key twice.")
    return found


def _no_constant(name: str) -> Any:
    raise ProtocolError(f"A message holds {name}, which is not JSON.")


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))

_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_ALIKE: Final = bytes.maketrans(b"{}", b"[]")


def _check_shape(text: bytes, bounds: Bounds) -> None:
    """Raises ProtocolError when *text* nests more than JSON_DEPTH deep or holds more values than *bounds*: millions
    of small objects take a hundred times the room of their text. In passes over the whole, for a loop over the bytes of
    a large message takes a second.
    """
    if text.count(b'"') > bounds.quotes:
        raise ProtocolError(f"A message holds more than {bounds.quotes:,} quotation marks.")
    if text.count(b"[") + text.count(b"{") > JSON_DEPTH or text.count(b",") > bounds.values:
        text = _outside_strings(text)
        if text.count(b"[") + text.count(b"{") + text.count(b",") > bounds.values:
            raise ProtocolError(f"A message holds more than {bounds.values:,} values.")
        brackets = text.translate(_ALIKE, _NO_BRACKETS)
        for _ in range(JSON_DEPTH):
            if not brackets:
                break
            brackets = brackets.replace(b"[]", b"")
        if brackets:
            raise ProtocolError(f"A message is nested more than {JSON_DEPTH} deep, or its brackets do not match.")


def _outside_strings(text: bytes) -> bytes:
    """*text* without its strings, in a few passes: a regular expression takes ten times as long, with the interpreter's
    lock held.

    A run of backslashes begins with one that is not escaped, so they pair from its left; a quote behind one that is
    left over is escaped. Outside of strings a backslash is no JSON: the decoder gets no further than that, and what
    stands before it is seen as it is.
    """
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    return b"".join(text.split(b'"')[::2])


def loads(data: bytes, bounds: Bounds = ANYTHING) -> dict[str, Any]:
    """A JSON object from an untrusted side: bounded depth and size, no NaN, no key twice. Raises ProtocolError."""
    _check_shape(data, bounds)
    try:
        # Decoded here: json would also take UTF-16, whose brackets and quotes were not seen above.
        found = _DECODER.decode(str(data, "utf-8"))
    except ProtocolError:
        raise
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"A message is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ProtocolError("A message is not a JSON object.")
    return found
