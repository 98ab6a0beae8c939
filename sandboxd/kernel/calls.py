"""The engine's face of native/: typed, raising OSError with the operation's name."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sandboxd._native import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "as_file_owner",
    "c_strings",
    "check",
    "hide_self",
    "landlock_abi",
    "launch",
    "open_beneath",
    "pidfd_kill",
    "pidfd_open",
]


def check(result: int, operation: str, path: str | None = None) -> int:
    """Return *result*, or raise OSError when it is a negated errno."""
    if result >= 0:
        return result
    raise OSError(-result, f"{operation}: {os.strerror(-result)}", path)


def c_strings(words: Sequence[str]) -> tuple[object, list[object]]:
    """A NULL-terminated char *[], and what must be kept alive as long as it is used."""
    kept = [ffi.new("char[]", os.fsencode(word)) for word in words]
    array = ffi.new("char *[]", [*kept, ffi.NULL])
    return array, [array, *kept]


def open_beneath(dirfd: int, path: str | bytes, flags: int, mode: int = 0) -> int:
    """Open *path* inside *dirfd*; no symlink is followed and no mount crossed. Raises OSError; EXDEV when it would
    leave.

    Source: openat2(2).
    """
    return check(lib.sbx_open_beneath(dirfd, os.fsencode(path), flags, mode), "openat2", os.fsdecode(path))


def pidfd_open(pid: int) -> int:
    """A close-on-exec descriptor of process *pid*; readable once it has ended. Source: pidfd_open(2)."""
    return check(lib.sbx_pidfd_open(pid), "pidfd_open")


def pidfd_kill(pidfd: int, signal: int) -> bool:
    """Send *signal*; False when the process is gone already. Source: pidfd_send_signal(2)."""
    result = lib.sbx_pidfd_kill(pidfd, signal)
    if result == -errno.ESRCH:
        return False
    check(result, "pidfd_send_signal")
    return True


def hide_self() -> None:
    """Make this process non-dumpable: no core file, no ptrace by its own uid. Source: PR_SET_DUMPABLE, prctl(2)."""
    check(lib.sbx_hide_self(), "prctl")


def landlock_abi() -> int:
    """The kernel's Landlock ABI, 0 where Landlock is not there or off."""
    return max(0, lib.sbx_landlock_abi())


def launch(arguments: Sequence[str], environment: dict[str, str], fds: Sequence[int]) -> tuple[int, int]:
    """Start a program in a session of its own, its descriptors *fds* as 0, 1, 2, ...; returns pid and pidfd.

    It is no child of the caller's but of init's: no SIGCHLD, and nothing for the caller's waits to see.
    """
    argv, keep_argv = c_strings(arguments)
    envp, keep_envp = c_strings([f"{name}={value}" for name, value in environment.items()])
    path = ffi.new("char[]", os.fsencode(arguments[0]))
    numbers = ffi.new("int[]", list(fds))
    plan = ffi.new("struct sbx_launch *", {"path": path, "argv": argv, "envp": envp, "fds": numbers, "nfds": len(fds)})
    pidfd = ffi.new("int *", -1)
    pid = check(lib.sbx_launch(plan, pidfd), "clone3")
    del keep_argv, keep_envp
    return pid, int(pidfd[0])


@contextmanager
def as_file_owner(uid: int, gid: int) -> Iterator[None]:
    """Within the block this thread's file system access is that of *uid* and *gid*: what it makes belongs to them.

    Raises OSError. Source: setfsuid(2); capabilities that override permissions are dropped with the id.
    """
    before = os.geteuid(), os.getegid()
    try:
        check(lib.sbx_file_ids(uid, gid), "setfsuid")
        yield
    finally:
        check(lib.sbx_file_ids(*before), "setfsuid")
