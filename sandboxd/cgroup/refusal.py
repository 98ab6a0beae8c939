"""A refusal of the host's in words, with the one line that mends it."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from sandboxd.cgroup import systemd
from sandboxd.errors import Unavailable

if TYPE_CHECKING:
    from sandboxd.cgroup.discovery import Hierarchy

__all__ = ["delegate_to_users", "unavailable"]

# A command that embeds an engine lives beside it, so it needs a leaf of its own; systemd 254.
_DELEGATED = "systemd-run{user} --pipe --wait -p Delegate=yes -p DelegateSubgroup=main COMMAND"
_UNIT = "for a service, the unit's lines Delegate=yes and DelegateSubgroup=main"
_DROP_IN = "/etc/systemd/system/user@.service.d"


def unavailable(error: OSError, hierarchy: Hierarchy, asked: str = "") -> Unavailable:
    """*asked* is why systemd gave no scope, empty when it was not asked or gave one."""
    names = ", ".join(hierarchy.controllers) or "no controllers"
    text = f"cgroup v{hierarchy.version} ({names}), {error.filename or hierarchy.mount_point}: {error.strerror}"
    if asked:
        text += f"; systemd was asked for a scope: {asked}"
    return Unavailable("cgroup", text, errno=error.errno, fix=_fix(error, hierarchy, asked))


def _fix(error: OSError, hierarchy: Hierarchy, asked: str) -> str:
    mount = hierarchy.mount_point
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n)"
    if error.errno == errno.ENOSPC:
        return f"raise cgroup.max.descendants and cgroup.max.depth above {error.filename}"
    if error.errno == errno.EROFS or hierarchy.read_only:
        return f"mount -o remount,rw {mount} (in a container: start it with a writable cgroup mount)"
    if hierarchy.version == 2 and systemd.is_manager():
        return _fix_managed(error, hierarchy, asked)
    if error.errno in (errno.EACCES, errno.EPERM) and os.geteuid() == 0:
        return "let it have a cgroup namespace of its own, with a writable mount (docker run --cgroupns=private)"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "run it as root, or in a cgroup that belongs to this user: its directory and what is in it"
    if error.errno == errno.EBUSY and hierarchy.version == 2:
        own = hierarchy.own or mount
        return (
            "other processes live in its cgroup: start it alone there; in a container, before it: "
            f"mkdir {own}/init && for p in $(cat {own}/cgroup.procs); "
            f"do echo $p > {own}/init/cgroup.procs || true; done"  # cat, for one, is gone
        )
    if error.errno == errno.ENOENT and hierarchy.version == 2:
        wanted = " ".join(f"+{name}" for name in hierarchy.controllers)
        return f"enable them from the top down: echo '{wanted}' > {mount}/cgroup.subtree_control"
    return "use a kernel with CONFIG_MEMCG, CONFIG_CGROUP_PIDS and CONFIG_CFS_BANDWIDTH"


def _fix_managed(error: OSError, hierarchy: Hierarchy, asked: str) -> str:
    """Where systemd runs, and what it delegated does not do."""
    uid = os.geteuid()
    if error.errno == errno.ENOENT and uid != 0 and not asked:
        return delegate_to_users(uid)
    if error.errno == errno.ENOENT and not asked:
        wanted = " ".join(f"+{name}" for name in hierarchy.controllers)
        return f"enable them from the top down: echo '{wanted}' > {hierarchy.mount_point}/cgroup.subtree_control"
    if uid != 0 and not systemd.private_socket(uid).exists():
        return f"start this user's service manager: loginctl enable-linger {uid}; {_UNIT}"
    user = "" if uid == 0 else " --user"
    return f"start it in a delegated cgroup: {_DELEGATED.format(user=user)}; {_UNIT}"


def delegate_to_users(uid: int | str = "UID") -> str:
    """The line that lets the service managers of users have every controller that a policy may require."""
    return (
        f"let users have those controllers, as root: mkdir -p {_DROP_IN} && "
        f"printf '[Service]\\nDelegate=cpu cpuset io memory pids\\n' > {_DROP_IN}/delegate.conf && "
        f"systemctl daemon-reload && systemctl restart user@{uid}.service (which ends what this user runs)"
    )
