"""Ids, capabilities, what a set-user-id program would bring, and what prctl(2) could loosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.attacks.base import Attack

if TYPE_CHECKING:
    from collections.abc import Iterator

_ADMIN = {"seccomp": "EPERM", "ids": "EPERM", "caps": "EPERM"}
_DAC = {"ids": "EPERM", "caps": "EPERM"}
_FILTER = {"seccomp": "EPERM"}

_PRCTL = {  # option, arguments, what the kernel says without the filter, that it is not there, why it is refused
    "dumpable": (4, "0", ("done",), (), "PR_SET_DUMPABLE"),
    "dumpable-high-bits": (4 | 1 << 32, "0", ("done",), (), "PR_SET_DUMPABLE with bit 32 set"),
    "keepcaps": (8, "1", ("done",), (), "PR_SET_KEEPCAPS"),
    "seccomp": (22, "2, 8", ("EFAULT",), (), "PR_SET_SECCOMP: one more filter"),
    "tsc": (26, "1", ("done",), (), "PR_SET_TSC"),
    "mm": (35, "1, 0, 0, 1", ("EINVAL",), (), "PR_SET_MM: rewrite one's own memory map"),
    "speculation": (
        53,
        "0, 2",
        ("done",),
        ("ENODEV", "EINVAL", "EPERM", "ENXIO"),
        "PR_SET_SPECULATION_CTRL: mitigations off",
    ),
    "dispatch": (59, "1, 0, 0, -8", ("EFAULT",), ("EINVAL",), "PR_SET_SYSCALL_USER_DISPATCH"),
    "sched-core": (62, "0, 0, 0, 8", ("EFAULT", "ESRCH", "ENODEV"), ("EINVAL",), "PR_SCHED_CORE"),
    "merge": (67, "1", ("done",), ("EINVAL",), "PR_SET_MEMORY_MERGE: pages merged across cells"),
    "ptracer": (0x59616D61, "1", ("done",), ("EINVAL",), "PR_SET_PTRACER"),
}


def _prctl() -> Iterator[Attack]:
    for name, (option, arguments, opens, absent, what) in _PRCTL.items():
        code = f'call("prctl", {option:#x}, {arguments}{", 0" * (3 - arguments.count(","))})'
        yield Attack(f"prctl-{name}", what, code, "EPERM", _FILTER, opens=opens, absent=absent)


ATTACKS = (
    *_prctl(),
    Attack("setuid-root", "become root", 'call("setuid", 0)', "EPERM", {"seccomp": "EPERM", "ids": "EPERM"}),
    Attack("setresuid-init", "become the id of pid 1", 'call("setresuid", 1, 1, 1)', "EPERM", _ADMIN),
    Attack(
        "setgid-root", "become group root", 'call("setresgid", 0, 0, 0)', "EPERM", {"seccomp": "EPERM", "ids": "EPERM"}
    ),
    Attack("setgroups", "take groups", 'call("setgroups", 1, struct.pack("I", 1))', "EPERM", _ADMIN),
    Attack(
        "setfsuid",
        "other people's files",
        'call("setfsuid", 1)\nif call("setfsuid", -1) != 1: raise Refused("unchanged")',
        "EPERM",
        {"seccomp": "EPERM", "ids": "unchanged", "caps": "unchanged"},
    ),
    Attack(
        "capset-all",
        "all capabilities",
        'call("capset", struct.pack("Ii", 0x20080522, 0), struct.pack("6I", 0x3F, 0x3F, 0, 0, 0, 0))',
        "EPERM",
        _ADMIN,
    ),
    Attack(
        "ambient",
        "an ambient capability, which exec keeps",
        """
        call("capset", struct.pack("Ii", 0x20080522, 0), struct.pack("6I", 1, 1, 1, 0, 0, 0))
        call("prctl", 47, 2, 0, 0, 0)
        """,
        "EPERM",
        why="the zygote gives its bounding set up before it forks: nothing can become inheritable",
    ),
    Attack(
        "bounding-set",
        "a capability that could still be gained",
        """
        if not any(call("prctl", 23, number, 0, 0, 0) for number in range(41)):
            raise Refused("empty")
        """,
        "empty",
        why="the zygote gives its bounding set up before it forks",
    ),
    Attack("securebits", "root without set-up", 'call("prctl", 28, 0, 0, 0, 0)', "EPERM", _ADMIN),
    Attack(
        "file-capabilities",
        "a program with capabilities",
        """
        open("/tmp/program", "w").close()
        value = struct.pack("<5I", 0x02000001, 0x3F, 0, 0, 0)
        call("setxattr", b"/tmp/program", b"security.capability", value, len(value), 0)
        """,
        "ENOTSUP",
        {**_ADMIN, "seccomp": "ENOTSUP"},
    ),
    Attack(
        "chown-root",
        "give a file to root",
        'open("/tmp/x", "w").close()\nos.chown("/tmp/x", 0, 0)',
        "EPERM",
        {"ids": "EPERM"},
        single_id="done",  # it is what the cell is already
    ),
    Attack(
        "chown-other",
        "give a file to another id",
        'open("/tmp/x", "w").close()\nos.chown("/tmp/x", 1, 1)',
        "EPERM",
        _DAC,
        single_id="EINVAL",
    ),
    Attack(
        "set-user-id",
        "run root's set-user-id program",
        """
        answer = os.popen(BAIT + "/suid-id -u").read().strip()
        if answer != "0":
            raise Refused("no-gain")
        """,
        "no-gain",
        why="no_new_privs is set by nursery and zygote already, bound trees are nosuid, and its owner is not mapped",
        single_id="done",  # it was 0 before, and stays without a capability
    ),
    Attack(
        "no-new-privs",
        "take no_new_privs back",
        'call("prctl", 38, 0, 0, 0, 0)',
        "EINVAL",
        why="the kernel knows no way back",
    ),
    Attack(
        "personality",
        "no address randomisation for what is started next",
        'call("personality", 0x0040000)',
        "EPERM",
        _FILTER,
    ),
    Attack(
        "personality-high-bits",
        "the same with bit 32 set",
        'call("personality", 0x0040000 | 1 << 32)',
        "EPERM",
        _FILTER,
    ),
)
