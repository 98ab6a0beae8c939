"""What figures depend on: kernel, CPU, load, mounts, interpreter; and the machine's busy time. Source: /proc."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Busy", "busy", "cpus", "host", "uss_bytes"]


def cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def host() -> dict[str, Any]:
    """The host at this moment; ``load_1min`` is the load before what is measured next."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    from sandboxd import __version__

    return {
        "kernel": platform.release(),
        "cpu": model,
        "cpus": cpus(),
        "hypervisor": any(
            " hypervisor" in line
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("flags")
        ),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_1min": round(os.getloadavg()[0], 2),
        "mounts": len(Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()),
        "processes": sum(name.isdigit() for name in os.listdir("/proc")),
        "python": platform.python_version(),
        "executable": sys.executable,
        "sandboxd": __version__,
    }


class Busy(NamedTuple):
    """CPU seconds of the whole machine since its boot. *stolen* is what the hypervisor gave to others."""

    busy_seconds: float
    idle_seconds: float
    stolen_seconds: float

    def since(self, earlier: Busy) -> Busy:
        """What was spent between two looks."""
        return Busy(*(now - then for now, then in zip(self, earlier, strict=True)))


def busy(text: str | None = None) -> Busy:
    """Now, or from *text* in the form of /proc/stat (proc_stat(5)); resolution is one tick, 10 ms, of each CPU."""
    line = (text or Path("/proc/stat").read_text(encoding="ascii")).splitlines()[0]
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, line.split()[1:9])
    tick = 1 / os.sysconf("SC_CLK_TCK")
    # guest and guest_nice, the last two, are in user and nice already.
    return Busy((user + nice + system + irq + softirq) * tick, (idle + iowait) * tick, steal * tick)


def uss_bytes(rollup: str) -> tuple[int, int]:
    """(USS, PSS) from the text of /proc/PID/smaps_rollup: private pages, and those shared pro rata."""
    uss = pss = 0
    for line in rollup.splitlines():
        key, _, value = line.partition(":")
        if key == "Pss":
            pss += int(value.split()[0]) << 10
        elif key in ("Private_Clean", "Private_Dirty", "Private_Hugetlb"):
            uss += int(value.split()[0]) << 10
    return uss, pss
