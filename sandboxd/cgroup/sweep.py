"""Removing what dead engines left: processes and cgroup directories. place.py says how to tell them apart."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sandboxd.cgroup.files import Group, kill_listed
from sandboxd.cgroup.home import SCOPE, scope_parents, v2_roots
from sandboxd.cgroup.place import NAME, remove_quietly, start_time

if TYPE_CHECKING:
    from sandboxd.cgroup.discovery import Hierarchy, Layout

__all__ = ["Swept", "sweep"]

_SECONDS = 2.0  # for killing, and again for removing


@dataclass(frozen=True)
class Swept:
    """What ``sweep`` found of one dead engine: how many processes it met, and the paths it could not remove."""

    name: str
    killed: int
    left: list[str]


def sweep(layout: Layout) -> list[Swept]:
    """Kill and remove what dead engines left in any hierarchy; engines that live are not touched.

    At most 4 s for each of them. A directory that we may not open or lock is left out.
    """
    roots = {hierarchy.mount_point for hierarchy in layout.v1}
    roots.update(one.mount_point for one in (layout.accounting, layout.freezer) if one is not None)
    if layout.v2 is not None:
        roots.update((layout.v2.mount_point, *v2_roots(layout.v2), *_scopes(layout.v2)))
    found: dict[str, list[str]] = {}
    for root in sorted(roots):
        with suppress(OSError), os.scandir(root) as entries:
            for entry in entries:
                if NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    found.setdefault(entry.name, []).append(entry.path)
    own = None if layout.v2 is None else layout.v2.own
    swept = (_sweep_one(name, paths, own) for name, paths in sorted(found.items()))
    return [result for result in swept if result is not None]


def _scopes(hierarchy: Hierarchy) -> list[str]:
    """The scopes of engines, which systemd keeps for as long as anything lives in them."""
    found: list[str] = []
    for parent in scope_parents(hierarchy):
        with suppress(OSError):
            found += [f"{parent}/{name}" for name in os.listdir(parent) if SCOPE.fullmatch(name)]
    return found


def _sweep_one(name: str, paths: list[str], own: str | None) -> Swept | None:
    match = NAME.fullmatch(name)
    if match is None or start_time(int(match[1])) == match[2]:
        return None
    if own is not None and any(own == path or own.startswith(f"{path}/") for path in paths):
        return None
    with ExitStack() as held:
        directories: list[Group] = []
        for path in paths:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
                held.callback(os.close, fd)
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                kept = os.path.samestat(os.fstat(fd), os.stat(path))
            except FileNotFoundError:
                continue
            except OSError:
                return None
            if not kept:
                # Another sweep removed what we hold, and the name went to a new engine.
                return None
            directories.append(Group(fd, path, "."))
        if not directories:
            return None
        killed = _kill_below(directories)
        left = [group.path for group in directories if not _remove_tree(group.path)]
    return Swept(name, killed, left)


def _below(directory: Group) -> list[Group]:
    """*directory* and every directory below it, parents first."""
    groups = [directory]
    for path, names, _ in os.walk(directory.path):
        relative = os.path.relpath(path, directory.path)
        groups += [Group(directory.parent_fd, directory.path, os.path.normpath(f"{relative}/{name}")) for name in names]
    return groups


def _kill_below(directories: list[Group]) -> int:
    """SIGKILL everything in *directories* and below, and wait; returns how many processes were there."""
    met: set[int] = set()
    for directory in directories:
        for group in _below(directory):
            with suppress(OSError):
                met.update(group.pids())
    for directory in directories:
        with suppress(OSError):
            directory.write("cgroup.kill", "1")
        with suppress(OSError):
            directory.write("pids.max", "0")  # nothing forks below it any more
        for group in _below(directory) if directory.has("freezer.state") else ():
            with suppress(OSError):
                group.write("freezer.state", "THAWED")  # on v1 a frozen process does not even die
    if met:
        kill_listed(
            lambda: [group for directory in directories for group in _below(directory)],
            time.monotonic() + _SECONDS,
            skip=os.getpid(),
        )
    return len(met - {0})


def _remove_tree(path: str) -> bool:
    deadline = time.monotonic() + _SECONDS
    pause = 0.0005
    while True:
        for directory, names, _ in os.walk(path, topdown=False):
            for name in names:
                remove_quietly(f"{directory}/{name}")
        remove_quietly(path)
        if not os.path.isdir(path):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 2, 0.05)
