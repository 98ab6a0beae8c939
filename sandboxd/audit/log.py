"""AuditLog: append records to a file, at once or in the background, and what happens when that fails.

A record that cannot be written is an AuditError ("stop", the default: nothing may happen unrecorded), or is counted and
told by a record ``gap`` as soon as writing works again ("continue"). What tells the end of something that was recorded
when it began (*late*) is never an error: it is kept in memory, within bounds, and written first when there is room.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import os
import threading
import time
import warnings
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Literal

from sandboxd._util.closeable import Closing
from sandboxd.audit.file import LOCK_SECONDS, LOCKED, ChainFile
from sandboxd.audit.record import body, stamp
from sandboxd.audit.redact import Redactor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["KEEP", "MAX_BYTES", "AuditError", "AuditLog"]

log = logging.getLogger("sandboxd.audit")

MAX_BYTES: Final = 64 << 20
KEEP: Final = 8
PENDING_BYTES: Final = 16 << 20
"""Of records that could not be written yet."""
QUEUE: Final = 10_000
"""Records that wait for the background thread; with more, whoever appends writes them itself."""
BATCH: Final = 500
GATHER_SECONDS: Final = 0.02
RETRY_SECONDS: Final = 0.5

_Entry = tuple[int, "Mapping[str, Any]", "Redactor | None"]


class AuditError(OSError):
    """The audit record cannot be written or opened; errno and file name as of the system call that failed."""


class AuditLog(Closing):
    """The audit record at *path*: append-only, 0600, shared by whoever opens the same path. Thread-safe.

    A file that would grow beyond *max_bytes* becomes ``PATH.1``; *keep* such are kept. *fsync*: each write is on the
    disk before it returns, which takes milliseconds; without, a power cut loses the last seconds, a crash of this
    program nothing. *buffered*: ``append`` only queues, and a thread writes within 50 ms. *redact* names keys of
    arguments and results whose values are left out ("*" stands for anything).

    Raises AuditError when it cannot be opened, unless *on_failure* is "continue".
    """

    # More than 15 attributes: the file, what waits to be written in two forms, what was lost, the writing thread.

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int = MAX_BYTES,
        keep: int = KEEP,
        buffered: bool = False,
        on_failure: Literal["stop", "continue"] = "stop",
        redact: Iterable[str] = (),
        fsync: bool = False,
    ) -> None:
        if max_bytes < 1 or keep < 1:
            raise ValueError("max_bytes and keep are whole numbers from 1.")
        self._closed = True
        self.path = os.path.abspath(path)
        self.on_failure = on_failure
        self._file = ChainFile(self.path, max_bytes, keep, fsync)
        self._redactor = Redactor(redact)
        self._buffered = buffered
        self._lock = threading.Lock()
        self._error: OSError | None = None
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._lost = 0
        self._since = 0
        self._kept_out = 0.0  # when another process was first found to hold the lock, time.monotonic()
        self._queue: deque[_Entry] = deque()
        self._aside: deque[bytes] = deque()  # late ones that came while somebody else was writing
        self._aside_bytes = 0
        self._counts = threading.Lock()  # of what is aside, and of what is lost: held for no longer than it takes
        self._wake = threading.Event()
        self._awake = False
        self._thread: threading.Thread | None = None
        try:
            self._file.open()
        except OSError as error:
            self._file.close()
            if on_failure == "stop":
                raise self._as_ours(error) from error
            self._failed(error)
        self._closed = False
        _open.add(self)

    def append(
        self, record: Mapping[str, Any], *, late: bool = False, redactor: Redactor | None = None, wait: bool = True
    ) -> None:
        """Write *record*, which holds at least ``event`` and is this log's from now on: nobody changes it any more.

        The time is that of the call. ``id``, ``client`` and ``policy`` are null where they are not given; arguments and
        results are cut at 16 KiB. *redactor* is used instead of the log's own names.

        Raises AuditError when it could not be written, or, buffered, when earlier ones could not; RuntimeError after
        ``close``. Whoever else writes, here or in another process, is waited for, for seconds at most. Without *wait*,
        which is for a thread that has others to serve, nobody is: BlockingIOError says that it should be tried again
        in a thread that may wait. Where that has been in vain, it is an AuditError at once. What is late is kept.
        """
        entry = (time.time_ns(), record, redactor)
        if self._closed:
            raise RuntimeError("This audit log is closed.")
        if not self._buffered:
            begun = self._body(entry)
            if late:
                self._put_aside(begun)
                self._put_in(wait)
            else:
                with self._held(wait):
                    self._write([begun], False, wait)
            return
        if self._error is not None and self.on_failure == "stop" and not late:
            raise self._as_ours(self._error)
        if len(self._queue) >= QUEUE:
            self._drain()
        self._queue.append(entry)
        if not self._awake:
            self._awake = True
            if self._thread is None:
                self._start()
            self._wake.set()

    @property
    def is_behind(self) -> bool:
        """Whether something waits to be written that could not be before."""
        return bool(self._pending or self._lost or self._aside)

    def flush(self, *, wait: bool = True) -> None:
        """Write what waits. Raises AuditError when it cannot be written; it goes on waiting then. *wait* is as of
        ``append``.
        """
        if self._buffered:
            self._drain()
        with self._held(wait):
            if self.is_behind:
                self._write([], False, wait)
            if self._error is not None and self.on_failure == "stop":
                raise self._as_ours(self._error)

    def close(self) -> None:
        """Write what waits and close the file; what cannot be written is logged as lost. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._wake.set()
        self._drain()
        with self._lock:
            for begun in self._take_aside():
                self._keep(begun)
            if self.is_behind:
                self._try([])
            lost = self._lost + len(self._pending)
            if lost:
                log.error("%s: %d records of the audit log are lost: %s", self.path, lost, self._error)
            self._file.close()
        _open.discard(self)

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"unclosed audit log {self.path}", ResourceWarning, source=self, stacklevel=1)
            self.close()

    @contextlib.contextmanager
    def _held(self, wait: bool = True) -> Iterator[None]:
        """The lock; whoever gives it back writes what came meanwhile."""
        if not self._lock.acquire(blocking=wait):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        try:
            yield
        finally:
            self._lock.release()
            self._put_in(wait and self._error is None)

    def _put_aside(self, begun: bytes) -> None:
        with self._counts:
            if self._aside_bytes + len(begun) <= PENDING_BYTES:
                self._aside.append(begun)
                self._aside_bytes += len(begun)
                return
        self._lose(1)

    def _take_aside(self) -> list[bytes]:
        with self._counts:
            taken = list(self._aside)
            self._aside.clear()
            self._aside_bytes = 0
        return taken

    def _put_in(self, wait: bool) -> None:
        """Write late records, unless somebody writes just now, who will then do it: the end of a run waits for no other
        thread that writes many megabytes.
        """
        while self._aside and self._lock.acquire(blocking=False):
            try:
                for begun in self._take_aside():
                    self._write([begun], True, wait)
                    wait = wait and self._error is None  # once in vain is enough
            finally:
                self._lock.release()

    # Writing; the lock is held

    def _write(self, bodies: list[bytes], late: bool, wait: bool = True) -> None:
        # While nothing can be written, what is late does not try it each time.
        error = self._error if late and not wait else None
        error = error or self._try(bodies, wait)
        if error is None:
            return
        if late:
            for begun in bodies:
                self._keep(begun)
        elif self._error is None:
            raise error  # nobody has waited yet
        elif self.on_failure == "stop":
            raise self._as_ours(error) from error
        else:
            self._lose(len(bodies))

    def _try(self, bodies: list[bytes], wait: bool = True) -> OSError | None:
        """Write *bodies*, and before them what waits."""
        behind = list(self._pending)
        lost = self._lost
        if lost:
            behind.append(body({"event": "gap", "lost": lost, "since": stamp(self._since)}, time.time_ns()))
        try:
            self._file.append([*behind, *bodies], wait)
        except BlockingIOError as error:
            now = time.monotonic()
            self._kept_out = self._kept_out or now
            if now - self._kept_out > LOCK_SECONDS:
                self._failed(OSError(errno.EBUSY, LOCKED, self.path))
            return self._error or error
        except OSError as error:
            self._failed(error)
            return error
        if self._error is not None:
            log.warning("%s: the audit log is written again; records lost: %d", self.path, lost)
        self._error = None
        self._kept_out = 0.0
        self._pending, self._pending_bytes = [], 0
        with self._counts:
            self._lost -= lost
        return None

    def _failed(self, error: OSError) -> None:
        if self._error is None or self._error.errno != error.errno:
            log.error("the audit log cannot be written: %s: %s", self.path, error.strerror or error)
        self._error = error

    def _keep(self, begun: bytes) -> None:
        if self._pending_bytes + len(begun) > PENDING_BYTES:
            self._lose(1)
            return
        self._pending.append(begun)
        self._pending_bytes += len(begun)

    def _lose(self, count: int) -> None:
        with self._counts:
            if not self._lost:
                self._since = time.time_ns()
            self._lost += count

    def _as_ours(self, error: OSError) -> AuditError:
        number = error.errno or errno.EIO
        return AuditError(number, error.strerror or os.strerror(number), self.path)

    def _body(self, entry: _Entry) -> bytes:
        nsec, record, redactor = entry
        return body((redactor or self._redactor)(record), nsec)

    # In the background

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=_work, args=(weakref.ref(self),), name="audit", daemon=True)
                self._thread.start()

    def _drain(self) -> None:
        """Write the queue; what cannot be written is kept."""
        with self._lock:
            while self._queue:
                entries = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
                self._write([self._body(entry) for entry in entries], True)

    def _after_fork(self) -> None:
        """In the child: what waits is the parent's, and so is the lock on the open file."""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._awake, self._thread = False, None
        self._queue.clear()
        self._counts = threading.Lock()
        self._aside.clear()
        self._aside_bytes = 0
        self._pending, self._pending_bytes, self._lost = [], 0, 0
        self._file.close()


def _work(reference: weakref.ref[AuditLog]) -> None:
    """The thread of a buffered log; ends with it."""
    while True:
        audit = reference()
        if audit is None or audit._closed:
            return
        wake, behind = audit._wake, audit.is_behind
        del audit  # so that one that nobody needs any more goes
        if wake.wait(RETRY_SECONDS if behind else None):
            time.sleep(GATHER_SECONDS)
        audit = reference()
        if audit is None or audit._closed:
            return
        wake.clear()
        audit._awake = False
        audit._drain()
        if behind:
            with audit._lock:
                audit._try([])


_open: weakref.WeakSet[AuditLog] = weakref.WeakSet()


def _close_all() -> None:
    for one in list(_open):
        one.close()


def _after_fork_in_child() -> None:
    for one in list(_open):
        one._after_fork()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_after_fork_in_child)
