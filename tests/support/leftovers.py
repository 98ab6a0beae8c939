"""What sandboxd makes outside its own memory, counted: taken before and after, the difference must be empty.

Engines of other programs on the same machine are left out: a cgroup named for a process that lives and is no descendant
of ours, and everything below such a process, is not ours to judge.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.patience import SLOWER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

UNPARKED = {"maximum": 0}
"""For ``Sandbox(pool=...)``: no cell but those of runs, where a test counts processes or follows one run's steps."""

PARKING: set[int] = set()
"""The pids of daemons of this process that park cells, which come and go by themselves."""

_CGROUP = re.compile(r"sandboxd(?:\.(\d+)\.(\d+)(?:\.\d+)?|-(\d+)-(\d+)\.scope)")
_NAMESPACES = ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup")
_NAMESPACE = re.compile(rf"(?:{'|'.join(_NAMESPACES)}):\[\d+\]")
_ENGINE_WORDS = ("sandboxd.engine", "sandboxd.daemon", "sandboxd\0serve", "sandboxd.cli")


@dataclass(frozen=True)
class Process:
    """One process; pid and start time together name it for good."""

    pid: int
    started: int
    parent: int
    state: str
    name: str

    def __str__(self) -> str:
        # Not the state and not the parent: both may differ between two looks at the same process.
        return f"{self.name}[{self.pid}], started {self.started}"


def process(pid: int) -> Process | None:
    """Process *pid*, None when there is none. Source: /proc/PID/stat, proc_pid_stat(5)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    name, _, rest = stat.partition("(")[2].rpartition(")")
    fields = rest.split()
    return Process(pid, int(fields[19]), int(fields[1]), fields[0], name)


def lives(one: Process) -> bool:
    """Whether that very process is still there, be it as a zombie."""
    now = process(one.pid)
    return now is not None and now.started == one.started


def processes() -> dict[int, Process]:
    """Every process, by pid. An embedded engine, which is init's child, counts as its owner's."""
    found = (process(int(name)) for name in os.listdir("/proc") if name.isdigit())
    table = {one.pid: one for one in found if one is not None}
    for pid, one in table.items():
        if (owner := _owner(pid)) is not None:
            table[pid] = replace(one, parent=owner)
    return table


def _owner(pid: int) -> int | None:
    """Whose engine *pid* is: its descriptor 4 is a pidfd of the caller. None for other processes, and for orphans."""
    with suppress(OSError):
        if b"sandboxd.engine.__main__" in Path(f"/proc/{pid}/cmdline").read_bytes():
            for line in Path(f"/proc/{pid}/fdinfo/4").read_text("ascii").splitlines():
                if line.startswith("Pid:"):
                    owner = int(line.split()[1])
                    return owner if owner > 0 else None
    return None


def engines() -> list[Process]:
    """The embedded engines of this process."""
    return [one for one in processes().values() if _owner(one.pid) == os.getpid()]


def descendants(root: int, among: dict[int, Process] | None = None) -> list[Process]:
    """The processes below *root*, parents before their children."""
    table = processes() if among is None else among
    children: dict[int, list[Process]] = {}
    for one in table.values():
        children.setdefault(one.parent, []).append(one)
    below: list[Process] = []
    pending = [root]
    while pending:
        for child in children.get(pending.pop(), []):
            below.append(child)
            pending.append(child.pid)
    return below


def fds(pid: int | str = "self") -> dict[int, str]:
    """The open descriptors of a process and what each is."""
    found: dict[int, str] = {}
    directory = f"/proc/{pid}/fd"
    with suppress(FileNotFoundError, ProcessLookupError):
        for name in os.listdir(directory):
            with suppress(FileNotFoundError, ProcessLookupError):
                found[int(name)] = os.readlink(f"{directory}/{name}")
    if pid in ("self", os.getpid()):
        # The listing's own descriptor was closed before its link was read.
        return {
            fd: link for fd, link in found.items() if os.path.basename(link) != "fd" or not link.startswith("/proc")
        }
    return found


def rss_bytes(pid: int) -> int:
    """Resident memory. Source: VmRSS in /proc/PID/status, which the kernel keeps per thread and may lag by some pages;
    the sum of smaps_rollup is exact.
    """
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii", "replace").splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) << 10
    return 0


def namespaces(pids: Iterable[int]) -> set[str]:
    """The namespaces that *pids* are in or hold open, as "net:[4026532000]"."""
    found: set[str] = set()
    for pid in pids:
        for kind in (*_NAMESPACES, "pid_for_children"):
            with suppress(OSError):
                found.add(os.readlink(f"/proc/{pid}/ns/{kind}"))
        found.update(link for link in fds(pid).values() if _NAMESPACE.fullmatch(link))
    return found


def _engine_cgroups() -> Iterator[tuple[str, int, str]]:
    """The directories of engines and their scopes, with the engine's pid and start: on v1 at the mount points, on v2
    wherever an engine may live.
    """
    for line in set(Path("/proc/self/mountinfo").read_text("utf-8").splitlines()):
        fields = line.split()
        tail = fields[fields.index("-") + 1 :]
        if tail[0] not in ("cgroup", "cgroup2"):
            continue
        for directory, names, _ in os.walk(fields[4]):
            for name in names:
                if match := _CGROUP.fullmatch(name):
                    pid, started = (one for one in match.groups() if one is not None)
                    yield f"{directory}/{name}", int(pid), started
            if tail[0] == "cgroup":
                break
            names[:] = [name for name in names if not name.startswith("sandboxd.")]  # engines are not nested


def _foreign(pid: int, started: str, ours: set[int], among: dict[int, Process]) -> bool:
    owner = among.get(pid)
    return owner is not None and str(owner.started) == started and owner.state not in "ZX" and pid not in ours


def _engine_like(pid: int) -> bool:
    with suppress(OSError):
        line = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
        return any(word in line for word in _ENGINE_WORDS)
    return False


def _ns(pid: int, kind: str) -> str | None:
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    return None


@dataclass(frozen=True)
class Snapshot:
    """What there is at one moment, kind by kind, in words that a failing test may show."""

    cgroups: frozenset[str]
    mounts: frozenset[str]
    processes: frozenset[str]
    zombies: frozenset[str]
    namespaces: frozenset[str]
    fds: frozenset[str]
    shm: frozenset[str]
    of_engines: dict[tuple[int, int], frozenset[str]] = field(default_factory=dict)
    """What of it belongs to each engine and each daemon in PARKING of this process that lives, by pid and start."""


def _cgroups(ours: set[int], among: dict[int, Process]) -> tuple[set[str], set[int]]:
    """Our cgroup directories, and the processes in them."""
    paths: set[str] = set()
    inside: set[int] = set()
    for top, pid, started in _engine_cgroups():
        if _foreign(pid, started, ours, among):
            continue
        for directory, _, _ in os.walk(top):
            paths.add(directory)
            with suppress(OSError):
                inside.update(map(int, Path(directory, "cgroup.procs").read_text("ascii").split()))
    return paths, inside - {0}


def snapshot() -> Snapshot:
    """Everything of ours, now."""
    table = processes()
    below = {one.pid for one in descendants(os.getpid(), table)}
    cgroups, inside = _cgroups(below | {os.getpid()}, table)
    home = _ns(os.getpid(), "user")
    # In a user namespace and not below a living engine of somebody else's: an orphan.
    orphans = set()
    for one in table.values():
        if one.pid in below or one.state in "ZX" or _ns(one.pid, "user") in (None, home):
            continue
        top = one
        while top.parent in table and _ns(top.parent, "user") not in (None, home):
            top = table[top.parent]
        if top.parent in (0, 1) or (top.parent in below) or not _engine_like(top.parent):
            orphans.add(one.pid)
    ours = below | inside | orphans
    of_engines: dict[tuple[int, int], frozenset[str]] = {}
    for pid in below:
        if _owner(pid) == os.getpid() or pid in PARKING:
            family = [one for one in descendants(pid, table) if one.pid in ours]
            held = {str(one) for one in family} | namespaces(one.pid for one in family)
            name = f"/sandboxd.{pid}.{table[pid].started}/"
            held |= {path for path in cgroups if name in path}
            of_engines[pid, table[pid].started] = frozenset(held)
    return Snapshot(
        of_engines=of_engines,
        cgroups=frozenset(cgroups),
        mounts=frozenset(Path("/proc/self/mountinfo").read_text("utf-8").splitlines()),
        processes=frozenset(str(table[pid]) for pid in ours if pid in table and table[pid].state not in "ZX"),
        zombies=frozenset(str(table[pid]) for pid in ours if pid in table and table[pid].state in "ZX"),
        namespaces=frozenset(namespaces(ours | {os.getpid()})),
        fds=frozenset(f"{fd}: {link}" for fd, link in fds().items()),
        shm=frozenset(os.listdir("/dev/shm")),
    )


def difference(before: Snapshot, after: Snapshot | None = None) -> dict[str, list[str]]:
    """What *after* (default: now) has that *before* had not, by kind; empty when nothing was left. An engine of this
    process, or a daemon that parks cells, which lived then and lives now may have other cells.
    """
    now = snapshot() if after is None else after
    theirs = {one for engine, held in now.of_engines.items() if engine in before.of_engines for one in held}
    found: dict[str, list[str]] = {}
    for kind in Snapshot.__dataclass_fields__:
        if kind == "of_engines":
            continue
        new = sorted(getattr(now, kind) - getattr(before, kind) - theirs)
        if new:
            found[kind] = new
    return found


def eventually(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Look again and again until *condition* is true; fails after *seconds*."""
    deadline = time.monotonic() + seconds * SLOWER
    pause = 0.001
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def assert_nothing_new(before: Snapshot, seconds: float = 5.0, ignore: Iterable[str] = ()) -> None:
    """Until nothing is left that *before* had not. *ignore* names kinds that are not looked at."""
    left: dict[str, list[str]] = {}

    def clean() -> bool:
        left.clear()
        left.update((kind, items) for kind, items in difference(before).items() if kind not in ignore)
        return not left

    deadline = time.monotonic() + seconds * SLOWER
    pause = 0.002
    while not clean() and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    assert not left, f"left behind: {left}"
