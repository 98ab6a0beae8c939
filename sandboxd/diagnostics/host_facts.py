"""Facts about this host that no wall depends on, but that a careful operator wants to know: each with what it means.

Everything is read from files below one root directory, so that tests can hand in another; memory and CPUs come from
psutil, and the kernel's audit is asked by netlink. A fact is "ok", deserves "attention", or is "unknown" where this
kernel does not say.
"""

from __future__ import annotations

import errno
import os
import platform
import socket
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "OLDEST_KERNEL",
    "OLDEST_PYTHON",
    "Fact",
    "audit_enabled",
    "cgroup_mode",
    "facts",
    "kernel_version",
    "platform_problems",
]

OLDEST_KERNEL = (6, 1)
OLDEST_PYTHON = (3, 11)

NETLINK_AUDIT = 9
_AUDIT_GET, _NLMSG_ERROR, _NLM_F_REQUEST = 1000, 2, 1
_AUDIT_SECONDS = 2
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr

State = Literal["ok", "attention", "unknown"]


@dataclass(frozen=True)
class Fact:
    """One fact: *value* as the kernel says it, *meaning* in one line, *fix* when it deserves attention (else empty)."""

    name: str
    value: str
    state: State
    meaning: str
    fix: str = ""


@dataclass(frozen=True)
class _Switch:
    """A file of the kernel's with one word, how it is judged, and what to say."""

    name: str
    path: str
    good: Callable[[str], bool]
    meaning: str
    fix: str
    absent: State = "unknown"


def _at_least(number: int) -> Callable[[str], bool]:
    return lambda text: text.lstrip("-").isdigit() and int(text) >= number


_SWITCHES = (
    _Switch(
        "core_pattern",
        "proc/sys/kernel/core_pattern",
        lambda text: not text.startswith(("|", "@")),
        "a pipe or socket hands a crashed cell to a root process of the host, whatever RLIMIT_CORE says",
        "sysctl kernel.core_pattern=core",
    ),
    _Switch(
        "legacy_tiocsti",
        "proc/sys/dev/tty/legacy_tiocsti",
        lambda text: text == "0",
        "1 lets a program push input into a terminal; cells have none, other programs do",
        "sysctl dev.tty.legacy_tiocsti=0",
    ),
    _Switch(
        "protected_symlinks",
        "proc/sys/fs/protected_symlinks",
        _at_least(1),
        "0 lets links in shared directories such as /tmp lead other users' programs astray",
        "sysctl fs.protected_symlinks=1",
    ),
    _Switch(
        "protected_hardlinks",
        "proc/sys/fs/protected_hardlinks",
        _at_least(1),
        "0 lets a user make hard links to files of others",
        "sysctl fs.protected_hardlinks=1",
    ),
    _Switch(
        "protected_fifos",
        "proc/sys/fs/protected_fifos",
        _at_least(1),
        "0 lets programs be made to write into somebody else's FIFO in a shared directory",
        "sysctl fs.protected_fifos=1",
    ),
    _Switch(
        "protected_regular",
        "proc/sys/fs/protected_regular",
        _at_least(1),
        "0 lets programs be made to write into somebody else's file in a shared directory",
        "sysctl fs.protected_regular=1",
    ),
    _Switch(
        "io_uring_disabled",
        "proc/sys/kernel/io_uring_disabled",
        _at_least(1),
        "io_uring has a long record of kernel bugs; cells cannot reach it, other programs can",
        "sysctl kernel.io_uring_disabled=2, if nothing here needs it",
    ),
    _Switch(
        "unprivileged_bpf_disabled",
        "proc/sys/kernel/unprivileged_bpf_disabled",
        _at_least(1),
        "0 lets every user load BPF programs; cells cannot",
        "sysctl kernel.unprivileged_bpf_disabled=1",
        absent="ok",
    ),
    _Switch(
        "ksm",
        "sys/kernel/mm/ksm/run",
        lambda text: text != "1",
        "merging equal pages of different processes tells them about each other",
        "echo 2 > /sys/kernel/mm/ksm/run",
        absent="ok",
    ),
    _Switch(
        "smt",
        "sys/devices/system/cpu/smt/active",
        lambda text: text == "0",
        "threads of one core share caches and buffers: a cell beside another tenant can watch it",
        "echo off > /sys/devices/system/cpu/smt/control, if tenants do not trust each other",
        absent="ok",
    ),
    _Switch(
        "max_user_namespaces",
        "proc/sys/user/max_user_namespaces",
        _at_least(1),
        "0 forbids user namespaces, which every cell needs",
        "sysctl user.max_user_namespaces=10000",
    ),
    _Switch(
        "unprivileged_userns_clone",
        "proc/sys/kernel/unprivileged_userns_clone",
        _at_least(1),
        "0 forbids user namespaces to everybody but root (Debian's switch); it matters only without root",
        "sysctl kernel.unprivileged_userns_clone=1, if sandboxd shall run without root",
        absent="ok",
    ),
    _Switch(
        "apparmor_restrict_unprivileged_userns",
        "proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        lambda text: text == "0",
        "1 makes user namespaces useless to all but root (Ubuntu's switch); it matters only without root",
        "an AppArmor profile with 'userns,' for the interpreter, if sandboxd shall run without root",
        absent="ok",
    ),
    _Switch(
        "yama",
        "proc/sys/kernel/yama/ptrace_scope",
        _at_least(1),
        "0 lets a user's programs trace each other; cells cannot trace at all",
        "sysctl kernel.yama.ptrace_scope=1",
        absent="ok",
    ),
)


def read_word(root: Path, path: str) -> str | None:
    """The text of a file of the kernel's below *root*, stripped; None when it is not there or not ours to read."""
    try:
        return (root / path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def kernel_version(release: str) -> tuple[int, int]:
    """The first two numbers of a kernel release, (0, 0) when there are none."""
    numbers = release.replace("-", ".").split(".")[:2]
    if len(numbers) < 2 or not all(number.isascii() and number.isdigit() for number in numbers):
        return (0, 0)
    return int(numbers[0]), int(numbers[1])


def platform_problems(machine: str, release: str, python: tuple[int, int], *, wide: bool = True) -> list[str]:
    """Why sandboxd does not run on such a host at all: Linux on x86-64, *release* and *python* not too old. Pure."""
    found = []
    if machine != "x86_64" or not wide:
        found.append(
            f"the processor or the interpreter is {machine}, {'64' if wide else '32'} bit; sandboxd needs x86-64"
        )
    if kernel_version(release) < OLDEST_KERNEL:
        found.append(f"Linux {release}; sandboxd needs {OLDEST_KERNEL[0]}.{OLDEST_KERNEL[1]} or later")
    if python < OLDEST_PYTHON:
        found.append(f"Python {python[0]}.{python[1]}; sandboxd needs {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or later")
    return found


def cgroup_mode(mountinfo: str) -> str:
    """The text of /proc/self/mountinfo as "v2", "v1", "hybrid" (controllers on v1, a v2 tree beside them) or "none"."""
    kinds = {
        tail[0]
        for _, dash, back in (line.partition(" - ") for line in mountinfo.splitlines())
        if (tail := back.split())
    }
    return {
        frozenset({"cgroup2"}): "v2",
        frozenset({"cgroup"}): "v1",
        frozenset({"cgroup", "cgroup2"}): "hybrid",
    }.get(frozenset(kinds & {"cgroup", "cgroup2"}), "none")


def facts(root: Path = Path("/")) -> list[Fact]:
    """All facts of this host. The kernel's files are looked up below *root*."""
    return [*_identity(root), *_switches(root), _audit(), *_mitigations(root), *_resources()]


def _identity(root: Path) -> Iterator[Fact]:
    release = platform.release()
    problems = platform_problems(platform.machine(), release, sys.version_info[:2], wide=sys.maxsize > 1 << 32)
    yield Fact(
        "platform",
        f"Linux {release}, {platform.machine()}, Python {platform.python_version()}",
        "attention" if problems else "ok",
        "; ".join(problems) or "kernel, processor and interpreter are ones that sandboxd supports",
        "use a supported host" if problems else "",
    )
    mode = cgroup_mode(read_word(root, "proc/self/mountinfo") or "")
    meanings = {
        "v2": "one hierarchy for limits and life-cycle",
        "hybrid": "limits on v1, life-cycle on the v2 tree beside it",
        "v1": "limits on v1; without a v2 tree, cells are killed process by process and their end is seen later",
        "none": "no cgroup file system is mounted, so nothing can be limited",
    }
    yield Fact(
        "cgroup mode",
        mode,
        "ok" if mode in ("v2", "hybrid") else "attention",
        meanings[mode],
        ""
        if mode in ("v2", "hybrid")
        else "mount cgroup2 (mount -t cgroup2 none DIR), or boot with systemd's unified hierarchy",
    )
    modules = read_word(root, "sys/kernel/security/lsm")
    yield Fact(
        "security modules",
        modules or "",
        "unknown" if modules is None else "ok",
        "the kernel's active security modules"
        if modules
        else "securityfs is not mounted here, so the kernel does not say",
    )


def _switches(root: Path) -> Iterator[Fact]:
    for switch in _SWITCHES:
        value = read_word(root, switch.path)
        if value is None:
            yield Fact(switch.name, "not there", switch.absent, "this kernel has no such switch")
            continue
        good = switch.good(value)
        yield Fact(switch.name, value, "ok" if good else "attention", switch.meaning, "" if good else switch.fix)


def audit_enabled() -> bool:
    """Whether the kernel's audit is on: AUDIT_GET of NETLINK_AUDIT, as ``auditctl -s`` asks it.

    Raises OSError: EPROTONOSUPPORT where the kernel has no audit, EPERM or ECONNREFUSED when we may not ask, which
    takes CAP_AUDIT_CONTROL and the first user and pid namespaces.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_AUDIT) as asking:
        asking.settimeout(_AUDIT_SECONDS)
        asking.sendto(_HEADER.pack(_HEADER.size, _AUDIT_GET, _NLM_F_REQUEST, 1, 0), (0, 0))
        answer = asking.recv(1 << 12)
    _, kind, _, _, _ = _HEADER.unpack_from(answer)
    first, second = struct.unpack_from("=iI", answer, _HEADER.size)
    if kind == _NLMSG_ERROR:
        raise OSError(-first, f"AUDIT_GET: {os.strerror(-first)}")
    return bool(second)  # struct audit_status: mask, enabled


def _audit() -> Fact:
    """Landlock is told to keep a cell's denials to itself (native/lib/landlock.c). The filter's kills cannot be:
    without audit the kernel logs them all the same, though at a bounded rate (audit_seccomp in kernel/auditsc.c).
    """
    try:
        enabled = audit_enabled()
    except OSError as error:
        if error.errno == errno.EPROTONOSUPPORT:
            return Fact("audit", "not there", "ok", "this kernel has no audit, or it was switched off at boot")
        return Fact("audit", "not known", "unknown", "only root outside of containers can ask the kernel")
    if not enabled:
        return Fact(
            "audit", "off", "ok", "a program that the filter kills leaves a line in the kernel's log, at a bounded rate"
        )
    return Fact(
        "audit",
        "on",
        "attention",
        "every process of a cell that the filter kills (SECCOMP) or that crashes (ANOM_ABEND) is a record: a program"
        " can fill the log with them; what Landlock refuses is not recorded",
        "auditctl -a never,exclude -F msgtype=SECCOMP, and the same with ANOM_ABEND, unless you need these records",
    )


def _mitigations(root: Path) -> Iterator[Fact]:
    directory = root / "sys/devices/system/cpu/vulnerabilities"
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        yield Fact("mitigations", "not there", "unknown", "the kernel does not say which processor flaws it answers")
        return
    open_ones = [name for name in names if (read_word(directory, name) or "").startswith("Vulnerable")]
    yield Fact(
        "mitigations",
        f"unanswered: {', '.join(open_ones)}" if open_ones else f"all {len(names)} answered",
        "attention" if open_ones else "ok",
        "processor flaws that let one process read another's memory, and whether the kernel answers them",
        "update the processor's microcode, and do not boot with mitigations=off" if open_ones else "",
    )


def _resources() -> Iterator[Fact]:
    import psutil

    memory = psutil.virtual_memory()
    enough = memory.available >= 1 << 30
    yield Fact(
        "memory",
        f"{memory.total >> 20:,} MiB, {memory.available >> 20:,} MiB available",
        "ok" if enough else "attention",
        "an engine takes about 24 MiB, and a cell up to its policy's memory_bytes (512 MiB)",
        "" if enough else "stop something else, or set a lower memory_bytes",
    )
    swap = psutil.swap_memory()
    yield Fact(
        "swap",
        f"{swap.total >> 20:,} MiB" if swap.total else "none",
        "attention" if swap.total else "ok",
        "cells never swap, but the engine and the caller may: what they hold of a run can reach the disk",
        "swapoff -a, or encrypt the swap, if programs or their data are secret" if swap.total else "",
    )
    usable = len(os.sched_getaffinity(0))
    yield Fact(
        "cpus", f"{psutil.cpu_count()} ({usable} usable here)", "ok", "at most 4 runs a CPU at once, the rest queues"
    )
