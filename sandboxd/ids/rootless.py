"""Host ids for the engine of an ordinary user: which ones it may map, by whose right, and how they are kept apart.

Three ways, the first that is there:

capabilities    the engine has CAP_SETUID and CAP_SETGID (systemd's AmbientCapabilities) and writes the maps itself
helpers         newuidmap and newgidmap write them (package uidmap), by the right that their files have
one id          neither, or no subordinate ids: the user's own id is the only one that can be mapped, and every cell
                has it; a policy that requires ``own_uid`` refuses that

With the first two, ids come from what /etc/subuid and /etc/subgid grant to the engine's own user, so that no process of
a cell has the id of that user, or of anybody. The claim of a block is a lock in every place that is this user's alone:
two engines of one user share at least one, however they were started. None of these places can be made by others.

Sources: user_namespaces(7), newuidmap(1), capabilities(7), proc_pid_status(5).
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sandboxd.errors import Unavailable
from sandboxd.ids import ranges

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from _typeshed import StrPath

__all__ = ["claim", "helper_problem", "lock_directories", "map_ids", "privileges", "why_one_id"]

LOCK_NAME: Final = "sandboxd-ids.lock"
SERVICE_DIRECTORIES: Final = ("/run/sandboxd", "/var/lib/sandboxd")
"""Of the service, whose user has no session; at least the second is that user's own, as its unit's StateDirectory."""
HELPER_SECONDS: Final = 20.0
_SETGID, _SETUID = 6, 7
_GRANT: Final = "usermod --add-subuids 1000000-1065535 --add-subgids 1000000-1065535 {user}"


def privileges(status: str | None = None) -> tuple[bool, bool]:
    """Whether this process may write any id map (CAP_SETUID and CAP_SETGID in force), and whether no_new_privs keeps
    helpers from it. *status* is the text of /proc/self/status.
    """
    text = Path("/proc/self/status").read_text("ascii", "replace") if status is None else status
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    effective = int(fields.get("CapEff", "0").strip() or "0", 16)
    both = 1 << _SETGID | 1 << _SETUID
    return effective & both == both, fields.get("NoNewPrivs", "0").strip() == "1"


def helper_problem(path: str | None) -> str:
    """What keeps a mapping helper from its work; "" when nothing that can be seen does."""
    if path is None:
        return "is not installed"
    try:
        found = os.stat(path)
    except OSError as error:
        return f"cannot be looked at: {error.strerror}"
    if found.st_mode & stat.S_ISUID and found.st_uid == 0:
        return ""
    with suppress(OSError):
        if os.getxattr(path, "security.capability"):
            return ""
    return "is neither setuid root nor has file capabilities"


def user_name() -> str:
    """The engine's user, as /etc/subuid may name it."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def why_one_id(etc: StrPath = "/etc") -> Unavailable | None:
    """Why this user's cells cannot have ids of their own, with what mends it; None when they can."""
    capable, no_new_privs = privileges()
    if not capable:
        if no_new_privs:
            return Unavailable(
                "ids",
                "the engine is under no_new_privs, so newuidmap has no right to map ids for it",
                errno=errno.EPERM,
                fix="start it without no_new_privs, or as a service with AmbientCapabilities=CAP_SETUID CAP_SETGID",
            )
        for name, path in zip(("newuidmap", "newgidmap"), ranges.mapping_helpers(), strict=True):
            problem = helper_problem(path)
            if problem:
                fix = "install newuidmap and newgidmap (Debian: apt install uidmap; Fedora: dnf install shadow-utils)"
                return Unavailable("ids", f"one id can be mapped only: {name} {problem}", fix=fix)
    uids, gids = ranges.subordinate_ranges(etc=etc)
    if not ranges.intersect(uids, gids):
        return Unavailable(
            "ids",
            f"one id can be mapped only: {os.path.join(os.fspath(etc), 'subuid')} and subgid grant {user_name()} no "
            "common ids",
            fix=_GRANT.format(user=user_name()),
        )
    return None


def claim(
    config: str | None, etc: StrPath = "/etc", places: list[str] | None = None, slots: int = ranges.MAX_SLOTS
) -> ranges.IdBlock:
    """As ``ranges.claim``, for an engine that is not root. Without subordinate ids the block is the user's own id,
    shared by all cells: ``IdBlock.shared`` says why. What a user is granted is 65,536 ids as a rule, so an engine takes
    no larger block than *slots* cells need.
    """
    shared = why_one_id(etc)
    if shared is not None:
        return ranges.IdBlock(ranges.IdRange(os.geteuid(), 1), [], gid=os.getegid(), shared=shared)
    granted = ranges.intersect(*ranges.subordinate_ranges(etc=etc))
    few = ranges.FIRST_CELL_ID + slots <= ranges.MIN_BLOCK
    blocks, origin = ranges.own_candidates(config, granted, etc, ranges.MIN_BLOCK if few else ranges.EXPLICIT_BLOCK)
    first = next(blocks, None)
    if first is None:
        raise Unavailable(
            "ids",
            f"{origin}: no block of these ids is granted to {user_name()}, mapped here and free of other users",
            errno=errno.ERANGE,
            fix=f"grant {ranges.MIN_BLOCK:,} consecutive ids at least: {_GRANT.format(user=user_name())}",
        )
    with ExitStack() as undo:
        fds = [fd for directory in lock_directories(places) for fd in _lock_file(directory)]
        for fd in fds:
            undo.callback(os.close, fd)
        if not fds:
            raise Unavailable(
                "ids",
                "there is no directory of this user's alone to keep the claim of ids in",
                errno=errno.ENOENT,
                fix=f"loginctl enable-linger {user_name()}, or give that user a home directory",
            )
        block = first
        while not ranges.lock_all(fds, block):
            found = next(blocks, None)
            if found is None:
                raise ranges.exhausted(origin)
            block = found
        claimed = ranges.IdBlock(block, fds, helpers=not privileges()[0])
        undo.pop_all()
        return claimed


def lock_directories(places: list[str] | None = None, environment: Mapping[str, str] = os.environ) -> Iterator[int]:
    """A descriptor of each directory that is this user's alone; it is closed when the next one is asked for.

    Not the first that is there, but all: /run/user/UID comes and goes with sessions, while engines go on.
    """
    uid = os.geteuid()
    if places is None:
        places = [f"/run/user/{uid}", *SERVICE_DIRECTORIES]
        if environment.get("XDG_RUNTIME_DIR", "").startswith("/"):
            places.append(environment["XDG_RUNTIME_DIR"])
        with suppress(KeyError):
            places += _state_directory(pwd.getpwuid(uid).pw_dir)
    for place in dict.fromkeys(places):
        try:
            fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            found = os.fstat(fd)
            if found.st_uid == uid and not found.st_mode & 0o022:
                yield fd
        finally:
            os.close(fd)


def _state_directory(home: str) -> list[str]:
    """~/.local/state/sandboxd, made when the home directory is the user's own."""
    path = Path(home, ".local/state/sandboxd")
    try:
        if home.startswith("/") and os.stat(home).st_uid == os.geteuid():
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            return [str(path)]
    except OSError:
        pass
    return []


def _lock_file(directory: int) -> Iterator[int]:
    """The lock file of a directory, if it can be had."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(LOCK_NAME, flags, 0o600, dir_fd=directory)
    except OSError:
        return
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1:
        yield fd
    else:
        os.close(fd)


def map_ids(pid: int, block: ranges.IdBlock) -> None:
    """Write the id maps of the user namespace that process *pid* is in; its /proc files must be ours. Raises OSError,
    Unavailable.
    """
    if block.helpers:
        helpers = ranges.mapping_helpers()
        for path, line in zip(helpers, (block.uid_map, block.gid_map), strict=True):
            _run_helper(path, pid, line)
        return
    if block.shared is not None:
        Path(f"/proc/{pid}/setgroups").write_text("deny", "ascii")
    for name, line in (("gid_map", block.gid_map), ("uid_map", block.uid_map)):
        with open(f"/proc/{pid}/{name}", "w", encoding="ascii") as file:
            file.write(line)


def _run_helper(path: str | None, pid: int, line: str) -> None:
    if path is None:
        raise Unavailable(
            "ids", "the mapping helpers have gone", errno=errno.ENOENT, fix="install newuidmap and newgidmap"
        )
    try:
        done = subprocess.run(
            [path, str(pid), *line.split()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={},
            timeout=HELPER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable("ids", f"{path} did not end", fix="look why it hangs") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()[-300:] or f"it ended with status {done.returncode}"
        raise Unavailable(
            "ids",
            f"the ids {line.strip()} were not mapped: {said}",
            errno=errno.EPERM,
            fix=f"look at /etc/subuid and /etc/subgid, and at the rights of {path}: setuid root or file capabilities",
        )
