"""Look into a network namespace and say what is in it that should not be: the second opinion on the network wall.

A cell's namespace is never configured, so it holds a loopback interface that is down, no address and no route. This
module asks the kernel by rtnetlink, through pyroute2, and is used by the self-test, ``doctor`` and the tests; nothing
on the path of a request imports it.

``python -m sandboxd.netns_check [PATH]`` checks PATH, or makes a fresh user and network namespace and checks that, and
prints a JSON array of problems.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

from pyroute2 import IPRoute

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["check_empty", "problems"]

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
NS_GET_USERNS = 0xB701  # ioctl_ns(2)
IFF_UP = 0x1
IFF_LOOPBACK = 0x8

_FAMILIES = ((socket.AF_INET, "IPv4"), (socket.AF_INET6, "IPv6"))


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
    """The problems of the calling thread's network namespace."""
    with IPRoute() as kernel:
        links = list(kernel.get_links())
        addresses = [(name, message) for family, name in _FAMILIES for message in kernel.get_addr(family=family)]
        routes = [(name, message) for family, name in _FAMILIES for message in kernel.get_routes(family=family)]
    return problems(links, addresses, routes)


def problems(
    links: Iterable[Any], addresses: Iterable[tuple[str, Any]], routes: Iterable[tuple[str, Any]]
) -> list[str]:
    """Words for every link, address and route that an untouched namespace lacks. Pure; messages are pyroute2's."""
    found = []
    loopbacks = 0
    for link in links:
        name, flags = link.get_attr("IFLA_IFNAME"), link["flags"]
        if not flags & IFF_LOOPBACK:
            found.append(f"interface {name}")
            continue
        loopbacks += 1
        if flags & IFF_UP:
            found.append(f"interface {name} is up")
    if loopbacks != 1:
        found.append(f"{loopbacks} loopback interfaces instead of one")
    found += [f"{family} address {address.get_attr('IFA_ADDRESS')}" for family, address in addresses]
    found += [
        f"{family} route to {route.get_attr('RTA_DST') or 'default'}/{route['dst_len']} in table {route['table']}"
        for family, route in routes
    ]
    return found


def main() -> None:
    """Check the namespace that the first argument names, or a fresh one of our own making; for a process that does
    nothing else.
    """
    import json

    netns: int | None = None
    if len(sys.argv) > 1:
        netns = os.open(sys.argv[1], os.O_RDONLY | os.O_CLOEXEC)
        if os.geteuid() != 0:  # who made its user namespace has every right there, once inside
            owner = fcntl.ioctl(netns, NS_GET_USERNS)
            _call("setns", owner, CLONE_NEWUSER)
            os.close(owner)
    else:
        _call("unshare", CLONE_NEWUSER | CLONE_NEWNET)
    sys.stdout.write(json.dumps(check_empty(netns)))


if __name__ == "__main__":
    main()
