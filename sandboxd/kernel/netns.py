"""Look into a network namespace and say what is in it that should not be: the second opinion on the network wall.

A cell's namespace is never configured, so it holds a loopback interface that is down, no address and no route. This
module asks the kernel for all three by rtnetlink(7); the daemon's start, ``doctor`` and the tests use it, and nothing
on the path of a request.

``python -m sandboxd.kernel.netns [PATH | -]`` checks PATH (``-``: which standard input will name), or makes a fresh
user and network namespace and checks that, and prints a JSON array of problems.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import sys
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_empty", "messages"]

CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWNET: Final = 0x40000000
NS_GET_USERNS: Final = 0xB701  # ioctl_ns(2)
IFF_UP: Final = 0x1
IFF_LOOPBACK: Final = 0x8

_FAMILIES: Final = ((socket.AF_INET, "IPv4"), (socket.AF_INET6, "IPv6"))
_ANSWER_SECONDS: Final = 5.0
_ANSWER_BYTES: Final = 1 << 16  # the kernel fills at most half of it at once

# netlink(7), rtnetlink(7); linux/netlink.h, linux/rtnetlink.h
_REQUEST_DUMP: Final = 0x301
_DUMP_INTERRUPTED: Final = 0x10
_ERROR, _DONE = 2, 3
_NEW_LINK, _GET_LINK = 16, 18
_NEW_ADDRESS, _GET_ADDRESS = 20, 22
_NEW_ROUTE, _GET_ROUTE = 24, 26
_HEADER: Final = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_LINK: Final = struct.Struct("=BxHiII")  # family, type, index, flags, change
_ADDRESS: Final = struct.Struct("=BBBBi")  # family, prefix length, flags, scope, index
_ROUTE: Final = struct.Struct("=BBBBBBBBI")  # family, length of destination and source, tos, table, ...
_ATTRIBUTE: Final = struct.Struct("=HH")  # length, type
_IFLA_IFNAME: Final = 3
_IFA_ADDRESS: Final = 1
_RTA_DST: Final = 1


def check_empty(netns: int | str | os.PathLike[str] | None = None) -> list[str]:
    """What the network namespace *netns* holds beyond a loopback interface that is down; empty when nothing.

    *netns* is an open descriptor or a path such as ``/proc/PID/ns/net``; None is the caller's own. The check runs in
    a thread of its own, which alone enters the namespace. Raises OSError when the namespace cannot be opened or
    entered (setns(2): CAP_SYS_ADMIN in its user namespace and in ours).
    """
    fd = (
        -1 if netns is None else os.dup(netns) if isinstance(netns, int) else os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    )
    found: list[str] = []
    failures: list[BaseException] = []

    def look() -> None:
        try:
            if fd >= 0:
                _call("setns", fd, CLONE_NEWNET)
            found.extend(_ask())
        except BaseException as error:  # raised again by the caller's thread
            failures.append(error)

    try:
        thread = threading.Thread(target=look, name="netns-check")
        thread.start()
        thread.join()
    finally:
        if fd >= 0:
            os.close(fd)
    if failures:
        raise failures[0]
    return found


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _ask() -> list[str]:
    """The problems of the calling thread's network namespace. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as kernel:
        kernel.settimeout(_ANSWER_SECONDS)
        kernel.bind((0, 0))
        found = _links(_dump(kernel, _GET_LINK, _NEW_LINK, _LINK.pack(0, 0, 0, 0, 0)))
        for family, name in _FAMILIES:
            body = _ADDRESS.pack(family, 0, 0, 0, 0)
            for message in _dump(kernel, _GET_ADDRESS, _NEW_ADDRESS, body):
                found.append(f"{name} address {_shown(family, _attributes(message, _ADDRESS.size).get(_IFA_ADDRESS))}")
        for family, name in _FAMILIES:
            body = _ROUTE.pack(family, *bytes(8))
            for message in _dump(kernel, _GET_ROUTE, _NEW_ROUTE, body):
                _, length, _, _, table, *_ = _ROUTE.unpack_from(message)
                destination = _shown(family, _attributes(message, _ROUTE.size).get(_RTA_DST))
                found.append(f"{name} route to {destination}/{length} in table {table}")
    return found


def _links(found: Iterator[bytes]) -> list[str]:
    """Words for each interface that an untouched namespace lacks."""
    said = []
    loopbacks = 0
    for message in found:
        _, _, _, flags, _ = _LINK.unpack_from(message)
        name = _attributes(message, _LINK.size).get(_IFLA_IFNAME, b"?").rstrip(b"\0").decode("utf-8", "replace")
        if not flags & IFF_LOOPBACK:
            said.append(f"interface {name}")
            continue
        loopbacks += 1
        if flags & IFF_UP:
            said.append(f"interface {name} is up")
    if loopbacks != 1:
        said.append(f"{loopbacks} loopback interfaces instead of one")
    return said


def _shown(family: int, address: bytes | None) -> str:
    return "default" if address is None else socket.inet_ntop(family, address)


def _dump(kernel: socket.socket, ask: int, answer: int, body: bytes) -> Iterator[bytes]:
    """Every message of the type *answer* in the kernel's answer to a dump request. Raises OSError, also when the answer
    is not whole: what was left out could be what should not be there.
    """
    kernel.sendto(_HEADER.pack(_HEADER.size + len(body), ask, _REQUEST_DUMP, ask, 0) + body, (0, 0))
    while True:
        data, _, flags, (port, _) = kernel.recvmsg(_ANSWER_BYTES)
        if port != 0:
            continue  # another process may send to us as well
        if flags & socket.MSG_TRUNC:
            raise OSError(errno.EMSGSIZE, "netlink: an answer was cut off")
        for kind, found in messages(data, ask):
            if kind == _DONE:
                return
            if kind != answer:
                raise OSError(errno.EPROTO, f"netlink: a message of type {kind} in answer to {ask}")
            yield found


def messages(data: bytes, sequence: int) -> Iterator[tuple[int, bytes]]:
    """Type and content of each message in one answer of the kernel to request *sequence*. Pure. Raises OSError for an
    error that it reports, an answer that changed while it was made, and what is no such answer.
    """
    at = 0
    while at < len(data):
        if len(data) - at < _HEADER.size:
            raise OSError(errno.EPROTO, "netlink: a message is cut off")
        length, kind, flags, number, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size or length > len(data) - at or number != sequence:
            raise OSError(errno.EPROTO, "netlink: a message is not one")
        found = data[at + _HEADER.size : at + length]
        if kind == _ERROR:
            code = -int.from_bytes(found[:4], sys.byteorder, signed=True)
            raise OSError(code, f"netlink: {os.strerror(code)}")
        if flags & _DUMP_INTERRUPTED:
            raise OSError(errno.EINTR, "netlink: what was asked for changed meanwhile")
        yield kind, found
        at += (length + 3) & ~3


def _attributes(message: bytes, start: int) -> dict[int, bytes]:
    """The attributes of a message whose own fields take *start* bytes. Raises OSError."""
    found = {}
    at = start
    while len(message) - at >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(message, at)
        if length < _ATTRIBUTE.size or length > len(message) - at:
            raise OSError(errno.EPROTO, "netlink: an attribute is cut off")
        found[kind & 0x3FFF] = message[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return found


def main() -> None:
    """Check the namespace that the caller names, or a fresh one of our own making; for a process that does nothing
    else.
    """
    import json

    netns: int | None = None
    if len(sys.argv) > 1:
        path = sys.stdin.read() if sys.argv[1] == "-" else sys.argv[1]
        netns = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if os.geteuid() != 0:  # who made its user namespace has every right there, once inside
            owner = fcntl.ioctl(netns, NS_GET_USERNS)
            _call("setns", owner, CLONE_NEWUSER)
            os.close(owner)
    else:
        _call("unshare", CLONE_NEWUSER | CLONE_NEWNET)
    sys.stdout.write(json.dumps(check_empty(netns)))


if __name__ == "__main__":
    main()
