"""What an engine writes into its audit record: each run's beginning, before its program exists, and its end.

Recorded is what was admitted: a run that its caller took back while it waited, or whose request was wrong, is none. One
that was turned away because the engine was full has a ``run_ended`` alone, with the status "busy".

The engine's loop waits for nobody who holds the record: the beginning of a run is then written by a thread, and all
else is kept, and written as soon as possible.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import os
from typing import TYPE_CHECKING, Any, Final

from sandboxd.audit.log import AuditError, AuditLog
from sandboxd.audit.record import capped, policy_sha256
from sandboxd.audit.redact import Redactor
from sandboxd.engine.audit.sink import AuditSink
from sandboxd.engine.audit.tool_calls import CallRecords
from sandboxd.errors import SandboxError, Unavailable
from sandboxd.limits import value_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from sandboxd.engine.cells.active_policy import ActivePolicy
    from sandboxd.engine.config import AuditSettings
    from sandboxd.limits import LimitValue
    from sandboxd.outcome.answer import RunAnswer
    from sandboxd.protocol.run_header import Run

__all__ = ["AuditRecorder", "unavailable"]

log = logging.getLogger("sandboxd.engine")

LARGE_CHARACTERS: Final = 1 << 18
"""A source from this length on is written by another thread; one at a time, for escaped it can be six times as long."""
SEARCHED_CHARACTERS: Final = 1 << 14
"""The same for a source in which secrets are sought."""
SOON_SECONDS: Final = 0.02
RETRY_SECONDS: Final = 1.0
"""The longest pause between two attempts to write what waits; the first comes soon, each next one later."""
NAMES: Final = 256

_FIXES: Final = {
    errno.ENOSPC: "make room where the audit record is",
    errno.EDQUOT: "make room where the audit record is",
    errno.EACCES: "choose a place for the audit record that the engine's user may write to",
    errno.EBUSY: "find out who holds the lock on the audit record: lslocks shows it",
    errno.ENOENT: "make the directory of the audit record",
    errno.ELOOP: "the audit record must not be a symbolic link",
    errno.EPERM: "the audit record must be a file that only its owner may write, with one name, not append-only",
}


class AuditRecorder(AuditSink):
    """Into the file of *settings*."""

    def __init__(self, settings: AuditSettings) -> None:
        self.path = settings.path
        self._settings = settings
        self._log: AuditLog | None = None
        self._runs: dict[str, tuple[dict[str, Any], Redactor]] = {}
        self._policies: dict[tuple[int, str], dict[str, str]] = {}
        self._names: dict[int, str | None] = {}
        self._retry: asyncio.TimerHandle | None = None
        self._pause = SOON_SECONDS
        self._large = asyncio.Lock()

    def open(self) -> None:
        """Raises Unavailable when it cannot be opened and the operator wants no run without it."""
        settings = self._settings
        try:
            self._log = AuditLog(
                settings.path,
                max_bytes=settings.max_bytes,
                keep=settings.keep,
                on_failure=settings.on_failure,
                fsync=settings.fsync,
            )
            self._log.append({"event": "log_opened", "engine": os.getpid()})
        except AuditError as error:
            if self._log is not None:
                self._log.close()
            self._log = None
            raise unavailable(error, settings.path) from error

    def close(self) -> None:
        """Write what waits, and that this engine ended in an orderly way. Idempotent."""
        if self._retry is not None:
            self._retry.cancel()
        for identity in list(self._runs):
            self._end(identity, {"status": None, "failure": {"kind": "Closed", "text": "the engine ended before it"}})
        audit, self._log = self._log, None
        if audit is not None:
            audit.append({"event": "log_closed", "engine": os.getpid()}, late=True, wait=False)
            audit.close()

    @contextlib.asynccontextmanager
    async def run(
        self,
        identity: str,
        active: ActivePolicy,
        request: Run,
        limits: Mapping[str, LimitValue],
        owner: Mapping[str, Any],
    ) -> AsyncIterator[Callable[[RunAnswer], None]]:
        """Around one run, from its admission on: records its beginning, and however it ends. What it gives is to be
        told the answer. Raises Unavailable when the beginning cannot be recorded: then it must not begin.
        """
        assert self._log is not None  # noqa: S101 (``open`` came first)
        base = await self._base(identity, active, owner)
        redactor = Redactor(active.plain["audit"]["redact"], request.env)
        append = functools.partial(self._log.append, _started(base, request, limits), redactor=redactor)
        begun = ended = False

        def begin(wait: bool) -> None:
            nonlocal begun
            append(wait=wait)
            begun = True

        def tell(answer: RunAnswer) -> None:
            nonlocal ended
            ended = True
            self._end(identity, _outcome(*answer))

        self._runs[identity] = (base, redactor)
        try:
            await self._begin(begin, len(request.code) < (SEARCHED_CHARACTERS if redactor.seeks else LARGE_CHARACTERS))
            yield tell
        except BaseException as error:
            if begun and not ended:
                self._end(identity, _failure(error))
            if isinstance(error, AuditError):
                self._later()
                raise unavailable(error) from error
            raise
        finally:
            self._runs.pop(identity, None)

    async def _begin(self, begin: Callable[[bool], None], small: bool) -> None:
        """Call *begin*, here if that is done at once. Raises AuditError."""
        if small:
            with contextlib.suppress(BlockingIOError):
                begin(False)
                return
        async with self._large:
            if small:
                # Whoever was before this one may have waited in vain.
                with contextlib.suppress(BlockingIOError):
                    begin(False)
                    return
            await _in_thread(functools.partial(begin, True))

    async def busy(self, identity: str, active: ActivePolicy, request: Run, owner: Mapping[str, Any]) -> None:
        """A run was turned away before it began."""
        if self._log is not None:
            base = await self._base(identity, active, owner)
            size = len(request.code.encode())
            self._append({**base, "event": "run_ended", "status": "busy", "code_bytes": size}, Redactor())

    def calls(self, identity: str) -> CallRecords:
        """As ``AuditSink``."""
        return CallRecords(functools.partial(self.tool, identity))

    def tool(self, identity: str, record: Mapping[str, Any]) -> None:
        """The program of run *identity* called a tool; *record* holds tool, caller, arguments and result, and becomes
        this one's.
        """
        found = self._runs.get(identity)
        if found is not None:
            base, redactor = found
            self._append({**base, **record, "event": "tool_called"}, redactor)

    def _end(self, identity: str, outcome: dict[str, Any]) -> None:
        base, redactor = self._runs[identity]
        self._append({**base, "event": "run_ended", **outcome}, redactor)

    def _append(self, record: dict[str, Any], redactor: Redactor) -> None:
        """Of something that has happened: never an error."""
        if self._log is not None:
            self._log.append(record, late=True, redactor=redactor, wait=False)
            self._later()

    def _later(self) -> None:
        """What waits to be written is tried again, also when no run comes that would do so."""
        if self._log is None or not self._log.is_behind:
            self._pause = SOON_SECONDS
        elif self._retry is None:
            self._retry = asyncio.get_running_loop().call_later(self._pause, self._again)
            self._pause = min(2 * self._pause, RETRY_SECONDS)

    def _again(self) -> None:
        self._retry = None
        if self._log is not None:
            with contextlib.suppress(AuditError, BlockingIOError):
                self._log.flush(wait=False)
            self._later()

    async def _base(self, identity: str, active: ActivePolicy, owner: Mapping[str, Any]) -> dict[str, Any]:
        """What every record of a run begins with."""
        uid = owner.get("uid")
        if isinstance(uid, int) and uid not in self._names:
            if len(self._names) >= NAMES:
                self._names.clear()
            self._names[uid] = await asyncio.to_thread(_user_name, uid)  # a directory service may take its time
        name = self._names.get(uid) if isinstance(uid, int) else None
        key = (active.serial, active.name)
        policy = self._policies.get(key)
        if policy is None:
            if len(self._policies) >= NAMES:
                self._policies.clear()
            policy = self._policies[key] = {"name": active.name, "sha256": policy_sha256(active.plain)}
        # The order is the readers', who look for the uid.
        client = {"uid": uid, "pid": owner.get("pid"), "name": name}
        return {"event": "", "id": identity, "client": client, "policy": policy}


def unavailable(error: AuditError, path: str | None = None) -> Unavailable:
    """The refusal of a run, or with *path* of a start, whose record cannot be written."""
    fix = _FIXES.get(error.errno or 0, "look at the engine's log, and at the file system of the audit record")
    what = "nothing is run that cannot be recorded"
    return Unavailable("audit", what if path is None else f"{path}: {what}", errno=error.errno, fix=fix)


async def _in_thread(function: Callable[[], None]) -> None:
    """Call *function* in a thread, and wait for it also when this task is cancelled: it must be known whether it did
    it. A cancellation goes before what it raises.
    """
    call = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        await asyncio.shield(call)
    except asyncio.CancelledError:
        while not call.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({call})
        call.exception()  # seen
        raise


def _started(base: Mapping[str, Any], request: Run, limits: Mapping[str, LimitValue]) -> dict[str, Any]:
    return {
        **base,
        "event": "run_started",
        "language": request.language,
        "filename": request.filename,
        "limits": {name: value_of(limits, name) for name in limits},
        "args": capped(list(request.args)),
        "env": capped(sorted(request.env)),
        "stdin_bytes": None if request.stdin is None else len(request.stdin),
        "files": capped([[path, len(content)] for path, content in request.files]),
        "code": request.code,
    }


def _outcome(header: dict[str, Any], _texts: list[bytes], _files: Any) -> dict[str, Any]:
    """Of a Result's header what an auditor wants: how it ended, by what evidence, what it used; no output."""
    return {
        **{key: header[key] for key in ("status", "exit_code", "signal")},
        "error": capped(header["error"]),
        "limits_hit": header["limits_hit"],
        "usage": header["usage"],
        "timings": header["timings"],
        "warm": header["warm"],
        "stdout": {"bytes": header["stdout"][1], "dropped_bytes": header["stdout_dropped_bytes"]},
        "stderr": {"bytes": header["stderr"][1], "dropped_bytes": header["stderr_dropped_bytes"]},
        "results": len(header["results"]),
        "files": capped([[entry["path"], entry["size_bytes"]] for entry in header["files"]]),
        "files_skipped": header["files_skipped"],
        "isolation": header["isolation"],
    }


def _failure(error: BaseException) -> dict[str, Any]:
    """A run that has no Result: the engine ended it with itself, or could not raise a wall."""
    if isinstance(error, SandboxError):
        return {"status": None, "failure": {**error.plain(), "text": str(error)}}
    if isinstance(error, asyncio.CancelledError):
        return {"status": "cancelled", "failure": None}
    return {"status": None, "failure": {"kind": type(error).__name__, "text": str(error)}}


def _user_name(uid: int) -> str | None:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None
