"""Sockets of every family, the host's listeners, names, and options of sockets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandboxd.kernel.calls import landlock_abi
from tests.attacks.base import Attack

if TYPE_CHECKING:
    from collections.abc import Iterator

_FAMILIES = {
    "inet": (2, 1),
    "inet-datagram": (2, 2),
    "inet-raw": (2, 3),
    "inet6": (10, 1),
    "netlink": (16, 3),
    "packet": (17, 3),
    "key": (15, 3),
    "rds": (21, 5),
    "can": (29, 3),
    "tipc": (30, 5),
    "bluetooth": (31, 3),
    "alg": (38, 5),
    "nfc": (39, 3),
    "vsock": (40, 1),
    "kcm": (41, 5),
    "qipcrtr": (42, 2),
    "smc": (43, 1),
    "xdp": (44, 3),
}
_FILTER = {"seccomp": "EAFNOSUPPORT"}
# What kernels say where the family is no module or no device is there; the filter's word is the same for all.
_NO_FAMILY = ("EAFNOSUPPORT", "ESOCKTNOSUPPORT", "EPROTONOSUPPORT", "EPERM")


def _rows() -> Iterator[Attack]:
    for name, (family, kind) in _FAMILIES.items():
        yield Attack(
            f"socket-{name}",
            f"a socket of the {name} family",
            f'call("socket", {family}, {kind}, 0)',
            "EAFNOSUPPORT",
            {**_FILTER, "ids": "EPERM", "caps": "EPERM"} if name in ("packet", "xdp") else _FILTER,
            opens=("done", "EPROTONOSUPPORT") if name == "inet-raw" else ("done",),
            absent=_NO_FAMILY,
        )


ATTACKS = (
    *_rows(),
    Attack(
        "socket-inet-high-bits", "AF_INET with bit 32 set", 'call("socket", 2 | 1 << 32, 1, 0)', "EAFNOSUPPORT", _FILTER
    ),
    Attack(
        "socketpair-inet",
        "a pair of AF_INET",
        'call("socketpair", 2, 1, 0, 8)',
        "EAFNOSUPPORT",
        _FILTER,
        opens=("EFAULT", "EOPNOTSUPP"),
    ),
    Attack(
        "bind-tcp",
        "wait for TCP connections",
        """
        with socket.socket(socket.AF_INET) as server:
            server.bind(("0.0.0.0", 0))
        """,
        "EAFNOSUPPORT",
        {"seccomp": "EAFNOSUPPORT", "landlock": "EACCES"},
    ),
    Attack(
        "connect-metadata",
        "the cloud's metadata service",
        """
        with socket.socket(socket.AF_INET) as client:
            client.settimeout(2)
            client.connect(("169.254.169.254", 80))
        """,
        "EAFNOSUPPORT",
        why="the network namespace has no route and cannot be exchanged for the host's; see socket-inet",
    ),
    Attack(
        "resolve-name",
        "ask a name server",
        """
        try:
            socket.getaddrinfo("example.org", 80)
        except socket.gaierror as error:
            raise Refused("no-name") from error
        """,
        "no-name",
        why="the network namespace has no route and cannot be exchanged for the host's; see socket-inet",
    ),
    Attack(
        "raise-loopback",
        "bring an interface up",
        """
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, 0x8914, struct.pack("16sH14x", b"lo", 0x49))
        """,
        "EAFNOSUPPORT",
        {"seccomp": "EAFNOSUPPORT", "ids": "EPERM", "caps": "EPERM"},
    ),
    Attack(
        "interface-ioctl",
        "list interfaces through a socket that is allowed",
        """
        with socket.socket(socket.AF_UNIX) as control:
            fcntl.ioctl(control, 0x8912, struct.pack("iP", 0, 0))
        """,
        "ENOTTY",
        {"seccomp": "ENOTTY"},
    ),
    Attack(
        "attach-filter",
        "BPF code on a socket",
        """
        code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0xFFFF))
        one, _ = socket.socketpair()
        one.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HxxxxxxP", 1, ctypes.addressof(code)))
        """,
        "EPERM",
        {"seccomp": "EPERM"},
    ),
    Attack(
        "forge-credentials",
        "claim to be root in a message",
        """
        one, two = socket.socketpair()
        two.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        one.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, struct.pack("3i", 1, 0, 0))])
        """,
        "EPERM",
        {"ids": "EPERM", "caps": "EPERM"},
    ),
    Attack(
        "host-port",
        "a port that the host listens on",
        """
        with socket.socket(socket.AF_INET) as client:
            client.connect(("127.0.0.1", int(os.environ["PORT"])))
        """,
        "EAFNOSUPPORT",
        why="the network namespace cannot be exchanged for the host's; see loopback in neighbours.py",
    ),
    Attack(
        "host-abstract-socket",
        "an abstract socket of the host's",
        """
        with socket.socket(socket.AF_UNIX) as client:
            client.connect("\\0" + os.environ["ABSTRACT"])
        """,
        "ECONNREFUSED",
        why="the network namespace cannot be exchanged for the host's; see abstract-socket in neighbours.py",
    ),
    Attack(
        "bait-socket",
        "a socket of the host's in a bound tree",
        """
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(BAIT + "/host.sock")
        """,
        "EACCES",
        why="the socket's owner is not mapped, so even the mapped root is a stranger to it",
        single_id="done" if landlock_abi() < 9 else "",  # from ABI 9 on Landlock refuses it
    ),
)
