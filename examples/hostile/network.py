"""Tries to talk to the world: TCP, UDP, name resolution, raw packets, netlink, the cloud's metadata service, its own
loopback.

Answer: the network namespace holds nothing but a loopback device that is down, and the system-call filter refuses
every socket family but AF_UNIX, so that not even the kernel's code for the others is reached.
"""

from __future__ import annotations

import os
import socket

# Outside a sandbox this would do what it says. In every cell, both of these are /workspace.
if (os.getcwd(), os.environ.get("HOME")) != ("/workspace", "/workspace"):
    raise SystemExit(f"for a sandbox only: sandboxd run {__file__}")


def connect(address: tuple[str, int]) -> None:
    with socket.socket() as connection:
        connection.settimeout(2)
        connection.connect(address)


ATTEMPTS = {
    "tcp to a public address": lambda: connect(("192.0.2.1", 443)),
    "tcp to the metadata service": lambda: connect(("169.254.169.254", 80)),
    "tcp to loopback": lambda: connect(("127.0.0.1", 22)),
    "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "ipv6": lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM),
    "raw": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
    "packet": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "vsock": lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM),
    "a name": lambda: socket.getaddrinfo("example.com", 443),
}

for title, attempt in ATTEMPTS.items():
    try:
        attempt()
        print(f"{title}: it worked")
    except OSError as error:
        print(f"{title}: {error.strerror or error}")
