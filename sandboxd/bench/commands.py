"""Other programs, timed from exec to exit."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from typing import TYPE_CHECKING, Final

from sandboxd.bench.stats import Failed

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["time_command"]

TIMEOUT_SECONDS: Final = 60.0
KEPT_BYTES: Final = 4096


def time_command(
    arguments: Sequence[str],
    environment: dict[str, str],
    expected: str,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> float:
    """Seconds until *arguments*, an absolute path first, has ended and been reaped. Raises Failed.

    Its stdout must be *expected* and its status 0. posix_spawn does not copy our page tables, so that our own size does
    not add to its time; it becomes a process group, which a timeout kills.
    """
    with contextlib.ExitStack() as undo:
        ends = []
        for _ in range(2):
            read, write = os.pipe2(os.O_CLOEXEC)
            undo.callback(os.close, read)
            ends.append((read, undo.enter_context(open(write, "wb", closefd=True))))
        (out, out_write), (err, err_write) = ends
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, out_write.fileno(), 1),
            (os.POSIX_SPAWN_DUP2, err_write.fileno(), 2),
        ]
        begun = time.perf_counter()
        try:
            pid = os.posix_spawn(arguments[0], list(arguments), environment, file_actions=actions, setpgroup=0)
        except OSError as error:
            raise Failed(f"{arguments[0]}: {error.strerror}") from error
        out_write.close()
        err_write.close()
        try:
            texts = _read({out: bytearray(), err: bytearray()}, begun + timeout_seconds)
            status = _wait(pid, begun + timeout_seconds)
        except BaseException:
            _kill(pid)
            raise
        took = time.perf_counter() - begun
    said, complaint = (bytes(text).decode("utf-8", "replace").strip() for text in (texts[out], texts[err]))
    code = os.waitstatus_to_exitcode(status)
    if code or said != expected:
        last = (complaint or said).splitlines()[-1:] or ["no output"]
        raise Failed(f"exit status {code}: {last[0][:200]}")
    return took


def _read(texts: dict[int, bytearray], deadline: float) -> dict[int, bytearray]:
    """What comes out of the descriptors until their ends; the first KEPT_BYTES of each. Raises Failed."""
    poll = select.poll()
    for fd in texts:
        poll.register(fd, select.POLLIN)
    left = set(texts)
    while left:
        ready = poll.poll(max(0.0, deadline - time.perf_counter()) * 1e3)
        if not ready:
            raise Failed("timeout")
        for fd, _ in ready:
            data = os.read(fd, 1 << 16)
            texts[fd] += data[: KEPT_BYTES - len(texts[fd])]
            if not data:
                poll.unregister(fd)
                left.discard(fd)
    return texts


def _wait(pid: int, deadline: float) -> int:
    """The wait status of *pid*, which is expected to end at once. Raises Failed at the *deadline*."""
    pidfd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.perf_counter()) * 1e3):
            raise Failed("timeout")
    finally:
        os.close(pidfd)
    return os.waitpid(pid, 0)[1]


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
