"""Where an engine may live on cgroup v2. docs/cgroups.md tells it in full.

Where systemd runs, every cgroup is its own but those that it delegated; so the engine takes a delegated one, or asks
for a scope. Elsewhere (containers, other inits) it takes its own cgroup or the root of what it sees.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from sandboxd.cgroup import systemd
from sandboxd.cgroup.discovery import discover
from sandboxd.cgroup.place import NAME, start_time

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.cgroup.discovery import Hierarchy

__all__ = ["SCOPE", "ask_systemd", "scope_parents", "v2_roots"]

SCOPE: Final = re.compile(r"sandboxd-(\d+)-(\d+)\.scope")
"""Pid and start time of the engine that asked for it."""
_UNIT: Final = re.compile(r".+\.(?:service|scope|slice|socket|mount|swap)")
_MARKS: Final = ("user.delegate", "trusted.delegate")


def _is_marked(path: str) -> bool:
    """By systemd's system manager, of any version. Source: systemd.io/CGROUP_DELEGATION."""
    try:
        return any(os.getxattr(path, mark) == b"1" for mark in {*os.listxattr(path)}.intersection(_MARKS))
    except OSError:
        return False


def _is_delegated(path: str, managed: bool) -> bool:
    """Whether a directory was handed over to us: marked so, or our uid's (root's is every one, so that says nothing).

    The system's manager gives a directory to a user (User=) only when it delegates it. A user's own manager owns all of
    its directories, too: a unit there is ours only if that manager says so, which marks none.
    """
    name = os.path.basename(path)
    try:
        if os.geteuid() == 0:
            # Who owns a directory may mark it, and move our cells about in it: user@UID.service, and all below.
            return os.stat(path).st_uid == 0 and _is_marked(path)
        mine = os.stat(path).st_uid == os.geteuid() and os.access(path, os.W_OK)
    except OSError:
        return False
    if not mine or not managed or not _UNIT.fullmatch(name) or SCOPE.fullmatch(name):
        return mine
    if not name.endswith((".service", ".scope")) or name.startswith("user@"):
        return False
    if "/user@" not in path:
        return True
    try:
        return systemd.unit_is_delegated(name)
    except systemd.Refused:
        return False


def _own_and_above(hierarchy: Hierarchy) -> Iterator[str]:
    """Our cgroup, unless it lies in the directory of another engine (then what holds that), and all above it."""
    mount, path = hierarchy.mount_point, hierarchy.own
    if path is None:
        return
    engines = [above for above in _upwards(path, mount) if NAME.fullmatch(os.path.basename(above))]
    yield from _upwards(os.path.dirname(engines[-1]) if engines else path, mount)


def _upwards(path: str, mount: str) -> Iterator[str]:
    while True:
        yield path
        if path in (mount, "/"):
            return
        path = os.path.dirname(path)


def v2_roots(hierarchy: Hierarchy) -> list[str]:
    """Where an instance may be made on v2, best first: each a directory that is ours to use, if nobody lives in it.

    With systemd only what was delegated; without it also our own cgroup, and for root the root of what is seen. A twin
    has no controllers that anybody could lose, so it may also lie there.
    """
    managed = bool(hierarchy.controllers) and (
        systemd.is_manager() or os.path.isdir(f"{hierarchy.mount_point}/init.scope")
    )
    roots: list[str] = []
    for path in _own_and_above(hierarchy):
        if _is_delegated(path, managed) or (not managed and not roots):
            roots.append(path)
        elif not managed or _UNIT.fullmatch(os.path.basename(path)):
            break  # what is above belongs to whoever made this
    if not managed and os.geteuid() == 0 and hierarchy.mount_point not in roots:
        roots.append(hierarchy.mount_point)
    return roots


def ask_systemd(hierarchy: Hierarchy) -> Hierarchy:
    """Move this process into a scope of its own; *hierarchy* with it as our own cgroup. Raises systemd.Refused.

    Once there, asking again changes nothing.
    """
    if hierarchy.read_only:
        raise systemd.Refused(f"{hierarchy.mount_point} is mounted read-only")
    pid = os.getpid()
    name = f"sandboxd-{pid}-{start_time(pid)}.scope"
    own = _own(hierarchy)
    if own is None or os.path.basename(own) != name:
        systemd.start_scope(name, f"Sandbox engine {pid}")
        own = _own(hierarchy)
    if own is None or os.path.basename(own) != name:
        raise systemd.Refused(f"{name} was started, but {hierarchy.mount_point} does not show it")
    return replace(hierarchy, own=own)


def _own(hierarchy: Hierarchy) -> str | None:
    now = discover().v2
    if now is None or now.mount_point != hierarchy.mount_point:
        raise systemd.Refused(f"{hierarchy.mount_point} is not where this process sees its cgroup")
    return now.own


def scope_parents(hierarchy: Hierarchy) -> list[str]:
    """Where the scopes of this user's engines lie: systemd puts them into these slices."""
    uid, mount = os.geteuid(), hierarchy.mount_point
    if uid == 0:
        return [f"{mount}/system.slice"]
    return [f"{mount}/user.slice/user-{uid}.slice/user@{uid}.service/app.slice"]
