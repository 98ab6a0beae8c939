"""Making and entering namespaces: the first step of most escapes. One row for each call and flag, high bits too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.attacks.base import Attack

if TYPE_CHECKING:
    from collections.abc import Iterator

_FLAGS = {
    "user": 0x10000000,
    "mnt": 0x00020000,
    "pid": 0x20000000,
    "net": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "cgroup": 0x02000000,
    "time": 0x00000080,
}
_ADMIN = {"seccomp": "EPERM", "ids": "EPERM", "caps": "EPERM"}
_FILTER = {"seccomp": "EPERM"}
_USER = {"seccomp": "EPERM", "userns-limit": "ENOSPC"}

_CLONE = """
pid = call("clone", {flags:#x} | signal.SIGCHLD, 0, 0, 0, 0)
if pid == 0:
    os._exit(0)
os.waitpid(pid, 0)
"""


def _setns(name: str, flag: int) -> Attack:
    tries, code = (
        f"enter a {name} namespace by its file",
        f'call("setns", os.open("/proc/self/ns/{name}", 0), {flag:#x})',
    )
    if name in ("cgroup", "time"):
        return Attack(
            f"setns-{name}", tries, code, "EPERM", why="without its own, the cell is in the host's, whose the right is"
        )
    if name == "user":
        return Attack(f"setns-{name}", tries, code, "EPERM", _FILTER, opens=("EINVAL",))
    return Attack(f"setns-{name}", tries, code, "EPERM", _ADMIN)


def _rows() -> Iterator[Attack]:
    for name, flag in _FLAGS.items():
        walls = _USER if name == "user" else _ADMIN
        yield Attack(f"unshare-{name}", f"a new {name} namespace", f'call("unshare", {flag:#x})', "EPERM", walls)
        yield _setns(name, flag)
        if name != "time":  # clone(2) cannot: the low byte is the exit signal
            yield Attack(
                f"clone-{name}", f"a child in a new {name} namespace", _CLONE.format(flags=flag), "EPERM", walls
            )
            yield Attack(
                f"clone-{name}-high-bits",
                "the same with bit 32 set: the kernel takes 32 bits, a filter that compared 64 would be passed",
                _CLONE.format(flags=flag | 1 << 32),
                "EPERM",
                walls,
            )


ATTACKS = (
    *_rows(),
    Attack(
        "unshare-number-high-bits",
        "the call's number with bit 32 set",
        "call(272 | 1 << 32, 0x10000000)",
        "EPERM",
        _USER,
    ),
    Attack(
        "unshare-flags-high-bits",
        "unshare with bit 63 set beside the flag",
        'call("unshare", 0x10000000 | 1 << 63)',
        "EPERM",
        _FILTER,
        opens=("EINVAL",),
    ),
    Attack(
        "clone3-user",
        "clone3, whose flags lie in memory",
        """
        pid = call("clone3", struct.pack("8Q", 0x10000000, 0, 0, 0, signal.SIGCHLD, 0, 0, 0), 64)
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        """,
        "ENOSYS",
        {"seccomp": "ENOSYS", "userns-limit": "ENOSPC"},
    ),
    Attack(
        "clone3-into-cgroup",
        "a child in another cgroup",
        'call("clone3", struct.pack("11Q", 0x200000000, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, 99), 88)',
        "ENOSYS",
        {"seccomp": "ENOSYS"},
        opens=("EBADF",),
    ),
    Attack(
        "clone-parent",
        "a child for the process outside that made the cell",
        """
        pid = call("clone", 0x8000 | signal.SIGCHLD, 0, 0, 0, 0)
        if pid == 0:
            os._exit(0)
        """,
        "EPERM",
        why="the filter's alone, and not harmless without it: nobody would reap that child",
    ),
    Attack(
        "setns-init",
        "enter the namespaces of pid 1",
        'call("setns", os.open("/proc/1/ns/mnt", os.O_RDONLY), 0)',
        "ENOENT",
        {"seccomp": "EPERM", "ids": "ENOENT", "caps": "ENOENT", "landlock": "ENOENT"},
    ),
    Attack(
        "setns-init-pidfd",
        "enter them through a pidfd",
        'call("setns", call("pidfd_open", 1, 0), 0x00020000)',
        "ENOSYS",
        {"seccomp": "ENOSYS", "ids": "EPERM", "caps": "EPERM", "landlock": "EPERM"},
    ),
    Attack(
        "cgroup-path",
        "learn where in the host's cgroup tree the cell is",
        """
        paths = {line.rstrip("\\n").split(":", 2)[2] for line in open("/proc/self/cgroup")}
        if paths == {"/"}:
            raise Refused("hidden")
        """,
        "hidden",
        {"cgroupns": "hidden"},
    ),
    Attack(
        "parent",
        "name the process that made the cell",
        'if os.getppid() == 0: raise Refused("outside")',
        "outside",
        why="the pid namespace cannot be taken down: killing its init is how a run is ended",
    ),
)
