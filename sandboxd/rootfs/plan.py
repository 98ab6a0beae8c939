"""Plan of the root file system of image "host": a list of operations, computed here and performed in C.

The root is a small tmpfs: the host's /usr family and the interpreter's directories bound read-only at their own paths,
a synthetic /etc, five devices, a restricted /proc, and empty directories that each cell mounts its own tmpfs on.
Nothing else of the host is there: no /home, /root, /var, /run, /sys, no /etc.

Who performs a plan, and as whom. The C side works in a fresh user and mount namespace, before pivot_root, like this:

1. With the engine's own ids, just after clone3 and before it becomes the mapped 0: ``open_tree(source,
   OPEN_TREE_CLONE | AT_RECURSIVE | AT_SYMLINK_NOFOLLOW)`` for every BIND. A source may lie below a directory that only
   host root may search (/root, 0700), and to the namespace's 0 host root is a stranger.
2. As the mapped 0, with umask 0: mounts the root tmpfs, performs the operations in order, and seals the root with
   MOUNT_ATTR_RDONLY. Before it is 0 its id has no mapping and the tmpfs answers EOVERFLOW.

A source has no symlink in it when it is planned; AT_SYMLINK_NOFOLLOW covers its last component. Every parent directory
and every mount point is an operation of its own, ahead of what needs it, so C creates nothing that is not listed.

What a read-only mount does not stop: a connect to a socket, or a write to a fifo, that the host has in a bound tree and
gives everybody write access to (path_resolution(7), mount(2)). The environment's owner answers for what is in it.
"""

from __future__ import annotations

import enum
import errno
import os
import stat
import struct
import sys
from typing import TYPE_CHECKING, NamedTuple, Self

from sandboxd.errors import PolicyError, Unavailable
from sandboxd.rootfs import etc
from sandboxd.rootfs.hosttree import HostTree, Walk

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from _typeshed import StrPath

    from sandboxd.ids.ranges import SlotIds
    from sandboxd.rootfs.interpreter import Interpreter


class Kind(enum.IntEnum):
    """What an operation makes. The numbers are part of the encoding."""

    DIR = 1
    FILE = 2
    SYMLINK = 3
    BIND = 4
    TMPFS = 5
    PROC = 6


# MOUNT_ATTR_* of mount_setattr(2), Linux 5.12.
RDONLY = 1
NOSUID = 2
NODEV = 4
NOEXEC = 8


_NOT_PLAIN = frozenset(("", ".", ".."))


class _OpFields(NamedTuple):
    kind: Kind
    target: str
    source: str
    data: bytes
    mode: int
    flags: int


class Op(_OpFields):
    """One operation below the new root.

    *target* is relative to the new root, without empty, "." or ".." components. *source* is the absolute host path of
    a BIND, the text of a SYMLINK, the options of a TMPFS or PROC. *flags* are attributes of the mount; a BIND clones
    recursively and sets them on the whole clone. A BIND's target is there already: a directory, or a file for a file.
    """

    __slots__ = ()

    def __new__(
        cls, kind: Kind, target: str, source: str = "", data: bytes = b"", mode: int = 0, flags: int = 0
    ) -> Self:
        if not _NOT_PLAIN.isdisjoint(target.split("/")):
            raise ValueError(f"target must be a plain relative path, not {target!r}")
        if "\0" in target or "\0" in source:
            raise ValueError("target and source must not hold a NUL")
        return tuple.__new__(cls, (kind, target, source, data, mode, flags))


TREE_FLAGS = RDONLY | NOSUID | NODEV
DEVICE_FLAGS = RDONLY | NOSUID | NOEXEC
"""No NODEV, for devices they are. RDONLY keeps mode and owner; the kernel does not ask it when a device is written."""
PROC_FLAGS = NOSUID | NODEV | NOEXEC

PROC_OPTIONS = "subset=pid,hidepid=invisible"
"""proc(5). Both words since Linux 5.8; before, hidepid took numbers only."""

DEVICES = ("null", "zero", "full", "random", "urandom")
CODE_DIRECTORY = "/code"
"""Where a cell finds its program's source, read-only."""
INSIDE_DIRECTORY = "/sandboxd"
"""Where the zygote finds the package's ``inside`` directory."""

_EMPTY = ("workspace", "tmp", "dev/shm", "code", "run", "var", "proc")

# The host's /usr and what stands beside it for programs: symlinks into it, or directories of their own (unmerged).
_SYSTEM = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")

# An environment that *is* one of these would carry the rest of the host inside with it.
_NEVER_WHOLE = ("/", "/boot", "/etc", "/home", "/media", "/mnt", "/opt", "/root", "/srv", "/var", "/var/lib")
# An environment at or below one of these meets what a cell has there, or is the kernel's or the host's state.
_NEVER_BELOW = (
    CODE_DIRECTORY,
    INSIDE_DIRECTORY,
    "/dev",
    "/etc",
    "/proc",
    "/run",
    "/sys",
    "/tmp",  # noqa: S108
    "/var/run",
    "/var/tmp",  # noqa: S108
    "/workspace",
)
# A symlink here is out of reach inside: the kernel's files or a cell's own tmpfs cover it.
_COVERED = ("/dev", "/proc", "/tmp", "/var/tmp", "/workspace")  # noqa: S108


def plan_host(
    python: Interpreter,
    extra: Sequence[tuple[str, str]] = (),
    *,
    slots: SlotIds,
    host: StrPath = "/",
) -> list[Op]:
    """The operations that build image "host" for *python*, parents before children.

    *extra* are further read-only binds, (host path, guest path). What lies outside of the interpreter's own prefixes is
    not bound: directories of PYTHONPATH, targets of editable installs and of .pth files. *host* is the directory to
    take for "/", for tests.

    Reads the host's file system and changes nothing. Raises Unavailable (stage ``rootfs``) when the interpreter cannot
    be shown inside without showing what must not be, or could not be used there; PolicyError for a wrong *extra*.
    """
    tree = HostTree(host)
    plan = _Plan(tree)
    system = _system_walks(tree)
    prefixes = [_walk(tree, path, python) for path in python.trees]
    executable = _walk(tree, python.executable, python)
    homes = _homes(tree)
    never_whole = sorted({*_NEVER_WHOLE, *homes})
    for walk in prefixes:
        _refuse_dangerous(walk, never_whole)
    try:
        plan.bind_trees([*system, *prefixes])
        plan.links([*system, *prefixes, executable])
        _refuse_unusable(tree, plan, python, executable)
        _add_etc(plan, tree, slots)
        _add_devices(plan, tree)
        _add_cpu_files(plan, tree)
        for directory in _EMPTY:
            plan.directory(directory)
        plan.symlink("var/tmp", "../tmp")
    except _Conflict as conflict:
        raise Unavailable(
            stage="rootfs",
            message=f"the interpreter {python.executable} cannot be shown inside: {conflict}",
            fix="move the environment elsewhere, or name it by a path without symlinks",
        ) from conflict
    for source, target in extra:
        _add_extra(plan, source, target)
    plan.mount(Op(Kind.PROC, "proc", PROC_OPTIONS, flags=PROC_FLAGS))
    return plan.operations()


_COUNT = struct.Struct("<II")
_HEADER = struct.Struct("<6I")
_ZEROS = bytes(8)


def encode(operations: Sequence[Op]) -> bytes:
    """*operations* as one flat buffer for C, little-endian.

    u32 count and u32 zero; then for each operation a header of six u32: kind, flags, mode, target_len, source_len,
    data_len; right behind it the target and the source, each with a NUL that its length counts, then the data, then
    zeros up to the next multiple of 8 from the buffer's start. Lengths are in bytes; an empty source has length 1.
    """
    encoding, errors = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()  # os.fsencode(), in bulk
    parts = [_COUNT.pack(len(operations), 0)]
    for kind, target, source, data, mode, flags in operations:
        where, what = target.encode(encoding, errors), source.encode(encoding, errors)
        length = len(where) + len(what) + len(data) + 2
        header = _HEADER.pack(kind, flags, mode, len(where) + 1, len(what) + 1, len(data))
        parts += (header, where, b"\0", what, b"\0", data, _ZEROS[: -length % 8])  # the header's length is 24
    return b"".join(parts)


class _Conflict(Exception):
    """Two things are wanted at one place of the image."""


class _Plan:
    """The operations so far: nodes of the root tmpfs by path, then mounts."""

    def __init__(self, tree: HostTree) -> None:
        self._tree = tree
        self._nodes: dict[str, Op] = {}
        self._mounts: list[Op] = []
        self._bound: list[str] = []

    def operations(self) -> list[Op]:
        """Nodes first: what is written must land in the tmpfs, never through a mount."""
        return [*self._nodes.values(), *self._mounts]

    def bound_root(self, real: str) -> str | None:
        """The bound tree that the real host path *real* is in; what is in one has the same path in the image."""
        return next((root for root in self._bound if _is_within(real, root)), None)

    def visible(self, real: str) -> bool:
        """Whether the real host path *real* is inside a bound tree."""
        return self.bound_root(real) is not None

    def is_used(self, target: str) -> bool:
        """Whether there is a node at *target*, hence perhaps something below it."""
        return target in self._nodes

    def directory(self, target: str, mode: int = 0o755) -> None:
        """A directory and its parents; nothing when it is there. Raises _Conflict, as the next two."""
        self._node(Op(Kind.DIR, target, mode=mode))

    def file(self, target: str, data: bytes) -> None:
        """A regular file, mode 0644, and its parents."""
        self._node(Op(Kind.FILE, target, data=data, mode=0o644))

    def symlink(self, target: str, text: str) -> None:
        """A symlink at *target*, and its parents."""
        self._node(Op(Kind.SYMLINK, target, text))

    def mount(self, op: Op) -> None:
        """A mount on a node that exists."""
        self._mounts.append(op)

    def bind_trees(self, walks: Iterable[Walk]) -> None:
        """Bind the real directory of each walk at its own path, unless one above it is bound. Comes before all else."""
        for real in sorted({walk.real for walk in walks}, key=lambda path: path.split("/")):
            if not self.visible(real):
                target = real.lstrip("/")
                self.directory(target)
                self.mount(Op(Kind.BIND, target, self._tree.source(real), flags=TREE_FLAGS))
                self._bound.append(real)

    def links(self, walks: Iterable[Walk]) -> None:
        """Make the paths of *walks* resolve inside as they do on the host."""
        for walk in walks:
            for path in walk.passed:
                if not self.visible(path):
                    self.directory(path.lstrip("/"))
            for where, text in walk.links:
                if any(_is_within(where, place) for place in _COVERED):
                    raise _Conflict(
                        f"its path leads through the symlink {where}, and a cell has files of its own there"
                    )
                if not self.visible(where):
                    self.symlink(where.lstrip("/"), text)

    def _node(self, op: Op) -> None:
        there = self._nodes.get(op.target)
        if there is not None:
            if there != op:
                raise _Conflict(f"/{op.target} would have to be two things")
            return
        parent = op.target.rpartition("/")[0]
        above = self._nodes.get(parent)
        # Below a node that is no mount nothing is bound yet: bind_trees() makes a node for each tree.
        if above is None or above.kind is not Kind.DIR or f"/{parent}" in self._bound:
            if self.visible(f"/{op.target}"):
                raise _Conflict(f"/{op.target} lies in a directory that is bound read-only")
            if parent:
                self._node(Op(Kind.DIR, parent, mode=0o755))
        self._nodes[op.target] = op


def _is_within(path: str, root: str) -> bool:
    """Whether *path* is *root* or below it; both normalised and absolute."""
    return path.startswith(root) and (len(path) == len(root) or path[len(root)] == "/" or root == "/")


def _walk(tree: HostTree, path: str, python: Interpreter) -> Walk:
    try:
        return tree.walk(path)
    except OSError as error:
        raise Unavailable(
            stage="rootfs",
            errno=error.errno,
            message=f"{path}, which {python.executable} needs, cannot be reached",
            fix="repair the interpreter's environment, or name another with [runtime] interpreter",
        ) from error


def _system_walks(tree: HostTree) -> list[Walk]:
    """/usr and its companions in the root directory, as far as the host has them."""
    usr = tree.resolve("/usr") or "/usr"
    walks: list[Walk] = []
    for name in _SYSTEM:
        try:
            walk = tree.walk(f"/{name}")
        except OSError:
            continue
        # A merged /usr has /bin -> usr/bin. What a link to elsewhere brings inside nobody can foresee: left out.
        if not walk.links or _is_within(walk.real, usr):
            walks.append(walk)
    return walks


def _homes(tree: HostTree) -> set[str]:
    """The home directories that /etc/passwd names, real and as spelled, outside of /usr."""
    data = tree.read("/etc/passwd", 1 << 20) or b""
    spelled = [os.fsdecode(row[5]).rstrip("/") for line in data.splitlines() if len(row := line.split(b":")) >= 6]
    found = {path for home in spelled if home.startswith("/") for path in (home, tree.resolve(home) or home)}
    return {path for path in found if path.split("/")[1] not in _SYSTEM}


def _refuse_dangerous(walk: Walk, never_whole: Sequence[str]) -> None:
    """Raise Unavailable when binding *walk* would bring more inside than an environment, as *never_whole* would."""
    for path in dict.fromkeys((os.path.normpath(walk.path), walk.real)):
        whole = next((place for place in never_whole if _is_within(place, path)), None)
        if whole is not None:
            raise _dangerous(
                walk, "is one" if whole == path else f"holds {whole},", "that must not be seen in a sandbox"
            )
        below = next((place for place in _NEVER_BELOW if _is_within(path, place)), None)
        if below is not None:
            raise _dangerous(walk, f"lies in {below},", "which a sandbox has for itself")


def _dangerous(walk: Walk, how: str, why: str) -> Unavailable:
    shown = walk.path if walk.path == walk.real else f"{walk.path} ({walk.real})"
    return Unavailable(
        stage="rootfs",
        message=f"the interpreter's directory {shown} {how} {why}",
        fix="move the environment to a directory of its own, such as /opt/sandbox-env, and name its bin/python with "
        "[runtime] interpreter",
    )


def _refuse_unusable(tree: HostTree, plan: _Plan, python: Interpreter, executable: Walk) -> None:
    """Raise Unavailable when the interpreter could not run inside: not bound, or not for everyone."""
    if not plan.visible(executable.real):
        raise Unavailable(
            stage="rootfs",
            message=f"{python.executable} is {executable.real}, outside of the interpreter's own directories",
            fix="make the environment anew from an installed Python, or name another with [runtime] interpreter",
        )
    for path in (executable.real, f"{python.stdlib}/os.py"):
        real = tree.resolve(path)
        root = None if real is None else plan.bound_root(real)
        if real is None or root is None:
            continue  # the start of the zygote will tell what is missing
        closed = tree.for_everyone(real, root)
        if closed is not None:
            raise Unavailable(
                stage="rootfs",
                message=f"{closed} is not readable for everyone, and a cell runs as an id that owns nothing",
                fix=f"chmod -R o+rX {root}",
            )


def _add_etc(plan: _Plan, tree: HostTree, slots: SlotIds) -> None:
    plan.directory("etc")
    for entry in etc.content(tree, slots, plan.visible):
        if isinstance(entry, etc.EtcFile):
            plan.file(f"etc/{entry.path}", entry.data)
        else:
            plan.symlink(f"etc/{entry.path}", entry.text)


def _add_devices(plan: _Plan, tree: HostTree) -> None:
    for name in DEVICES:
        plan.file(f"dev/{name}", b"")
        plan.mount(Op(Kind.BIND, f"dev/{name}", tree.source(f"/dev/{name}"), flags=DEVICE_FLAGS))
    plan.symlink("dev/fd", "/proc/self/fd")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        plan.symlink(f"dev/{name}", f"/proc/self/fd/{number}")


def _add_cpu_files(plan: _Plan, tree: HostTree) -> None:
    """Two files in the place of /sys, which is never mounted: node and some BLAS count processors there."""
    for name in ("online", "possible"):
        text = (tree.read(f"/sys/devices/system/cpu/{name}", 4096) or b"").strip()
        if not _is_cpu_list(text):
            text = b"0"
        plan.file(f"sys/devices/system/cpu/{name}", text + b"\n")


def _is_cpu_list(text: bytes) -> bool:
    """Whether *text* is like 0-3,8: "List format" of cpuset(7), without a stride."""
    areas = [area.split(b"-") for area in text.split(b",")]
    return all(len(ends) <= 2 and all(end.isdigit() for end in ends) for ends in areas)


def _add_extra(plan: _Plan, source: str, target: str) -> None:
    if not os.path.isabs(source) or not os.path.isabs(target):
        raise PolicyError(f"A bind needs absolute paths on both sides, not {source!r} at {target!r}.")
    guest = "/" + os.path.normpath(target).lstrip("/")
    real = os.path.realpath(source)
    try:
        mode = os.lstat(real).st_mode
    except OSError as error:
        raise PolicyError(f"{source} cannot be bound at {target}: {os.strerror(error.errno or errno.EIO)}.") from error
    if plan.is_used(guest[1:]) or guest == "/" or any(_is_within(guest, place) for place in _COVERED):
        raise PolicyError(f"{source} cannot be bound at {target}: a sandbox has files of its own there.")
    try:
        if stat.S_ISDIR(mode):
            plan.directory(guest[1:])
        elif stat.S_ISREG(mode):
            plan.file(guest[1:], b"")
        else:
            raise PolicyError(f"{source} cannot be bound: it is neither a directory nor a regular file.")
    except _Conflict as conflict:
        raise PolicyError(f"{source} cannot be bound at {target}: {conflict}.") from conflict
    plan.mount(Op(Kind.BIND, guest[1:], real, flags=TREE_FLAGS))
