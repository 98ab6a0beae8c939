"""The set-up steps of native/ in words: what failed and what mends it. The numbers are those of enum sbx_stage."""

from __future__ import annotations

import enum
import errno
from typing import Final

from sandboxd.errors import Unavailable

__all__ = ["Stage", "unavailable"]


class Stage(enum.IntEnum):
    """Where a set-up stood when the kernel refused."""

    NONE = 0
    CLONE = 1
    MAPS = 2
    PRIVATE = 3
    ROOT = 4
    MOUNTS = 5
    PIVOT = 6
    HOSTNAME = 7
    FDS = 8
    EXEC = 9
    TMPFS = 10
    PIPES = 11
    NETNS = 12
    PROC = 13
    ATTACH = 14
    CGROUP = 15
    NAMESPACES = 16
    CGROUPNS = 17
    SESSION = 18
    OOM = 19
    RLIMITS = 20
    IDS = 21
    CAPS = 22
    NNP = 23
    LANDLOCK = 24
    SECCOMP = 25
    REQUEST = 26
    THREADS = 27
    FORGO = 28
    ORDINARY = 29


_WORDS: Final[dict[Stage, tuple[str, str]]] = {
    Stage.CLONE: (
        "making the namespaces (clone3)",
        "user namespaces must be allowed: sysctl user.max_user_namespaces above 0, no seccomp or AppArmor rule of a "
        "container against clone3 and unshare",
    ),
    Stage.MAPS: (
        "mapping the ids",
        "the engine needs CAP_SETUID and CAP_SETGID, and the range of [ids] must be its own",
    ),
    Stage.PRIVATE: ("making mounts private", "mounting must be allowed in user namespaces here"),
    Stage.ROOT: (
        "mounting the root tmpfs",
        "tmpfs must be mountable in a user namespace; /tmp, /mnt or /srv must exist",
    ),
    Stage.MOUNTS: ("building the root file system", "the named path must exist and be mountable in a user namespace"),
    Stage.PIVOT: ("entering the root (pivot_root)", "the engine must not run in a chroot or on an initramfs root"),
    Stage.HOSTNAME: ("setting the hostname", "uts namespaces must be allowed"),
    Stage.FDS: ("placing descriptors", "Linux 5.9 or later is needed (close_range); raise the engine's RLIMIT_NOFILE"),
    Stage.EXEC: ("executing the nursery", "sysctl vm.memfd_noexec must be 0 or 1; the package must be installed whole"),
    Stage.TMPFS: (
        "mounting the cell's tmpfs",
        "the sizes asked for must fit; tmpfs must be mountable in a user namespace",
    ),
    Stage.PIPES: ("making pipes", "raise fs.pipe-user-pages-soft or the engine's RLIMIT_NOFILE"),
    Stage.NETNS: ("making a network namespace", "sysctl user.max_net_namespaces must be above the number of cells"),
    Stage.PROC: (
        "mounting /proc",
        "the host's own /proc must not be covered: in a container run without masked paths "
        "(systempaths=unconfined, procMount: Unmasked); Linux 5.8 or later for hidepid=invisible",
    ),
    Stage.ATTACH: ("attaching the cell's file systems", "this is a fault of sandboxd; please report it"),
    Stage.CGROUP: ("entering the cgroup leaf", "the engine must own its cgroup subtree; nothing else may remove it"),
    Stage.NAMESPACES: ("joining the cell's namespaces", "Linux 5.8 or later is needed (setns with a pidfd)"),
    Stage.CGROUPNS: (
        "making a cgroup namespace",
        "sysctl user.max_cgroup_namespaces must be above the number of cells",
    ),
    Stage.SESSION: ("entering /workspace", "this is a fault of sandboxd; please report it"),
    Stage.OOM: ("raising oom_score_adj", "this is a fault of sandboxd; please report it"),
    Stage.RLIMITS: (
        "setting resource limits",
        "a limit of the policy (open_files, file_bytes) lies above the engine's own hard limit: lower it, or raise "
        "LimitNOFILE/LimitFSIZE of the engine",
    ),
    Stage.IDS: ("becoming the cell's own uid", "the id range of [ids] must be mapped whole"),
    Stage.CAPS: ("dropping capabilities", "this is a fault of sandboxd; please report it"),
    Stage.NNP: ("setting no_new_privs", "this is a fault of sandboxd; please report it"),
    Stage.LANDLOCK: (
        "restricting paths (Landlock)",
        "boot with lsm=landlock,... and a kernel with CONFIG_SECURITY_LANDLOCK",
    ),
    Stage.SECCOMP: ("loading the seccomp filter", "the kernel needs CONFIG_SECCOMP_FILTER"),
    Stage.REQUEST: ("reading the engine's request", "engine and helpers are of different builds: reinstall sandboxd"),
    Stage.ORDINARY: (
        "giving up the caller's priorities and personality",
        "start the engine without a realtime policy, with nice 0 or above, and not under setarch",
    ),
    Stage.FORGO: (
        "giving up the session keyring and further user namespaces",
        "raise kernel.keys.maxkeys for the engine's uid; /proc/sys/user must be writable in a user namespace, "
        "or read-only",
    ),
    Stage.THREADS: (
        "forking the zygote",
        "a preloaded library keeps a thread running; take it out of [runtime] preload and warmup",
    ),
}


def unavailable(stage: int, number: int, detail: str = "") -> Unavailable:
    """The error for a refusal *number* (an errno) at *stage*."""
    try:
        known = Stage(stage)
        words, fix = _WORDS[known]
        name = known.name.lower()
    except (ValueError, KeyError):
        name, words, fix = (
            "setup",
            f"an unknown step {stage}",
            "engine and helpers are of different builds: reinstall sandboxd",
        )
    if number == errno.ENOMEM:
        fix = f"memory ran out; {fix}"
    return Unavailable(name, f"{words}{f' at {detail}' if detail else ''} was refused", errno=number or None, fix=fix)
