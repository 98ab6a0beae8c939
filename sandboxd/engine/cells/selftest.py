"""Once the walls are up, try to cross them: one cell of every new zygote runs this before the engine serves.

The program below runs as any other does, behind the same walls. A refusal that does not come means that a wall is not
there although every call that should have raised it succeeded: then nothing is served.
"""

from __future__ import annotations

import errno
import json
from typing import TYPE_CHECKING, Any, Final

from sandboxd.errors import Unavailable

if TYPE_CHECKING:
    from sandboxd.seccomp import Profile

__all__ = ["PROGRAM", "verify"]

_IOCTL_ABI: Final = 5

PROGRAM: Final = r"""
import ctypes, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)

def call(*arguments):
    ctypes.set_errno(0)
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return 0 if libc.syscall(*words) >= 0 else ctypes.get_errno()

def opened(path, flags):
    try:
        os.close(os.open(path, flags))
        return 0
    except OSError as error:
        return error.errno

descriptors = sorted(map(int, os.listdir("/proc/self/fd")))[:-1]  # without the listing's own, and before more are made
null = os.open("/dev/null", os.O_RDONLY)
status = {}
for line in open("/proc/self/status"):
    key, _, value = line.partition(":")
    status[key] = value.strip()
seen = {
    "unshare-user": call(272, 0x10000000),
    "unshare-mount": call(272, 0x00020000),
    "mount": call(165, b"none", b"/tmp", b"tmpfs", 0, 0),
    "chroot": call(161, b"/tmp"),
    "ptrace": call(101, 16, 1, 0, 0),
    "kill-init": call(62, 1, 9),
    "bpf": call(321, 0, 0, 0),
    "io_uring": call(425, 1, 0),
    "socket-inet": call(41, 2, 1, 0),
    "keyctl": call(250, 0, -3, 0),
    "write-root": opened("/sandboxd-self-test", os.O_WRONLY | os.O_CREAT),
    "write-usr": opened("/usr/sandboxd-self-test", os.O_WRONLY | os.O_CREAT),
    "init-root": opened("/proc/1/root", os.O_RDONLY),
    "host-etc": opened("/etc/shadow", os.O_RDONLY),
}
shared = []  # what is mapped MAP_SHARED, as in every cell, and mprotect(PROT_READ | PROT_WRITE) makes writable
for line in open("/proc/self/maps").readlines():
    if line.split()[1][3] == "s" and call(10, int(line.split("-")[0], 16), 4096, 3) == 0:
        shared.append(line.split(None, 5)[-1].rstrip())
facts = {
    "shared-memory": shared,
    "uid": os.getuid(), "gid": os.getgid(), "groups": os.getgroups(), "pid": os.getpid(), "session": os.getsid(0),
    "cgroup": sorted({line.rstrip("\n").split(":", 2)[2] for line in open("/proc/self/cgroup")}),
    "caps": [status[key] for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
    "writable": [path for path in ("/", "/usr", sys.prefix, sys.base_prefix) if os.statvfs(path).f_flag & 3 != 3],
    "device-ioctl": call(16, null, 0x5401, ctypes.create_string_buffer(64)),
    "nice": max(0, -os.getpriority(os.PRIO_PROCESS, 0)), "policy": os.sched_getscheduler(0),
    "personality": max(0, libc.syscall(135, ctypes.c_ulong(0xFFFFFFFF))),  # -1: this filter lets nobody ask
    "nnp": status["NoNewPrivs"], "seccomp": status["Seccomp"], "filters": int(status["Seccomp_filters"]),
    "fds": descriptors,
    "links": [line.split(":")[0].strip() for line in open("/proc/self/net/dev").readlines()[2:]],
    "routes": len(open("/proc/self/net/route").readlines()[1:]),
    "processes": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
}
print(json.dumps([seen, facts]))
"""


# What the filter alone refuses: a policy that allows such a call has taken that wall down itself, and its hash says so.
LAYERS: Final = 2
"""Of the policy's filter: one that cells inherit, and each cell's own."""
FILTER_ALONE: Final = {"socket-inet": (41, (2, 1, 0, 0, 0, 0)), "keyctl": (250, (0, 2**64 - 3, 0, 0, 0, 0))}


def verify(stdout: str, guest_uid: int, landlock_abi: int, profile: Profile, keeps_groups: bool = False) -> None:
    """Check what the program saw in a cell of *guest_uid* under *landlock_abi* and the filter of *profile*; it
    *keeps_groups* where one id is mapped only, and the receipt says so.

    Raises Unavailable (stage ``self-test``) that names every wall that did not hold.
    """
    try:
        seen, facts = json.loads(stdout)
    except ValueError:
        raise _failed("the first cell did not run the self-test to its end") from None
    held: dict[str, Any] = {
        "uid": guest_uid,
        "gid": guest_uid,
        "groups": [],
        "cgroup": ["/"],
        "caps": ["0000000000000000"] * 5,
        "writable": [],
        "shared-memory": [],
        "nice": 0,
        "policy": 0,
        "personality": 0,
        "nnp": "1",
        "seccomp": "2",
        "filters": filters_of_ours() + LAYERS,
        "fds": [0, 1, 2, 3],
        "links": ["lo"],
        "routes": 0,
    }
    if keeps_groups:
        del held["groups"]
    chosen = {name for name, call in FILTER_ALONE.items() if profile.decide(*call).permits}
    broken = [f"{name} was possible" for name, number in seen.items() if number == 0 and name not in chosen]
    broken += [f"{key} is {facts.get(key)!r}, not {value!r}" for key, value in held.items() if facts.get(key) != value]
    # Where the filter lets it pass, Landlock alone refuses it; without it, it is no terminal.
    if landlock_abi >= _IOCTL_ABI and facts.get("device-ioctl") in (0, errno.ENOTTY, None):
        broken.append("Landlock does not hold")
    if facts.get("pid") == 1 or facts.get("session") != facts.get("pid"):
        broken.append("the program is pid 1 or not the leader of its session")
    if any(number not in (facts.get("pid"),) for number in facts.get("processes", [0])):
        broken.append("other processes are visible in /proc")
    if broken:
        raise _failed("; ".join(broken))


def filters_of_ours() -> int:
    """Seccomp filters that this process is under itself, a container's for example: cells inherit them. Source:
    /proc/self/status, proc_pid_status(5), Linux 5.9.
    """
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("Seccomp_filters:")), 0)


def _failed(what: str) -> Unavailable:
    fix = "do not serve tenants on this host; run sandboxd doctor and report what it says"
    return Unavailable("self-test", f"a wall that was raised does not hold: {what}", fix=fix)
