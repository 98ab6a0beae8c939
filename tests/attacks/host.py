"""Time, names, modules, power, and facts of the host's kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.attacks.base import Attack

if TYPE_CHECKING:
    from collections.abc import Iterator

_ADMIN = {"seccomp": "EPERM", "ids": "EPERM", "caps": "EPERM"}
_FILTER = {"seccomp": "EPERM"}
_HOST_CAPABILITY = "needs a capability over the host, which the user namespace cannot give; the filter says the same"

_FACTS = (
    "/proc/kallsyms",
    "/proc/kcore",
    "/proc/keys",
    "/proc/key-users",
    "/proc/config.gz",
    "/proc/cmdline",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/modules",
    "/proc/sched_debug",
    "/proc/timer_list",
    "/proc/sysrq-trigger",
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/modprobe",
    "/proc/bus",
    "/proc/irq",
    "/proc/fs",
    "/sys/kernel/notes",
    "/sys/firmware",
    "/sys/fs/cgroup/cgroup.procs",
    "/sys/kernel/debug",
    "/dev/kmsg",
)


def _facts() -> Iterator[Attack]:
    for path in _FACTS:
        yield Attack(
            f"fact{path.replace('/', '-')}",
            f"open {path}",
            f'os.open("{path}", os.O_RDONLY)',
            "ENOENT",
            why="there is no such file in the cell's tree",
        )


ATTACKS = (
    *_facts(),
    Attack("clock-settime", "set the clock", 'call("clock_settime", 0, 8)', "EPERM", _FILTER, opens=("EFAULT",)),
    Attack(
        "settimeofday", "set the clock the old way", 'call("settimeofday", 8, 0)', "EPERM", _FILTER, opens=("EFAULT",)
    ),
    Attack("adjtimex", "bend the clock", 'call("adjtimex", ctypes.create_string_buffer(256))', "EPERM", _FILTER),
    Attack(
        "clock-adjtime", "bend a clock", 'call("clock_adjtime", 0, ctypes.create_string_buffer(256))', "EPERM", _FILTER
    ),
    Attack("sethostname", "another host name", 'call("sethostname", b"owned", 5)', "EPERM", _ADMIN),
    Attack("setdomainname", "another domain name", 'call("setdomainname", b"owned", 5)', "EPERM", _ADMIN),
    Attack("reboot", "reboot", 'call("reboot", 0, 0, 0, 0)', "EPERM", _ADMIN, opens=("EINVAL",)),
    Attack("kexec", "another kernel", 'call("kexec_load", 0, 0, 0, 0xFFFF)', "EPERM", why=_HOST_CAPABILITY),
    Attack(
        "kexec-file",
        "another kernel from a file",
        'call("kexec_file_load", -1, -1, 0, 0, 0xFFFF)',
        "EPERM",
        why=_HOST_CAPABILITY,
    ),
    Attack("init-module", "a kernel module", 'call("init_module", 8, 0, 8)', "EPERM", why=_HOST_CAPABILITY),
    Attack(
        "finit-module", "a kernel module from a file", 'call("finit_module", -1, 8, 0)', "EPERM", why=_HOST_CAPABILITY
    ),
    Attack("delete-module", "one module less", 'call("delete_module", 8, 0)', "EPERM", why=_HOST_CAPABILITY),
    Attack("swapon", "swap space", 'call("swapon", 8, 0)', "EPERM", why=_HOST_CAPABILITY),
    Attack("swapoff", "no swap space", 'call("swapoff", 8)', "EPERM", why=_HOST_CAPABILITY),
    Attack("acct", "process accounting", 'call("acct", 8)', "EPERM", why=_HOST_CAPABILITY),
    Attack("vhangup", "hang a terminal up", 'call("vhangup")', "EPERM", why=_HOST_CAPABILITY),
    Attack("syslog", "the kernel's log", 'call("syslog", 10, 0, 0)', "EPERM", _FILTER, absent=("EPERM", "ENOSYS")),
    Attack(
        "quotactl",
        "disk quotas",
        'call("quotactl", 0x800000FF, 8, 0, 0)',
        "EPERM",
        _FILTER,
        opens=("EINVAL",),
        absent=("ENOSYS",),
    ),
    Attack(
        "quotactl-fd",
        "disk quotas by descriptor",
        'call("quotactl_fd", -1, 0x80000000, 0, 0)',
        "EPERM",
        _FILTER,
        opens=("EBADF",),
        absent=("ENOSYS",),
    ),
    Attack("iopl", "ports", 'call("iopl", 0)', "EPERM", _FILTER, absent=("ENOSYS",)),
    Attack("ioperm", "ports by number", 'call("ioperm", 0, 1, 0)', "EPERM", _FILTER, absent=("ENOSYS",)),
)
