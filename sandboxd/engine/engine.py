"""The engine: owner of cgroups, host ids, slots and zygotes; admits runs and lets them be executed.

Crash-only. Its state is in the kernel: cgroup directories under a lock that dies with it, an id range under another,
pid namespaces whose first process exits when the engine's end of a channel is closed. Nothing is written that a restart
would have to repair; ``start`` sweeps what a dead engine left.

This is the facade. What an engine consists of, ground first: ``resources`` (cgroups, ids, slots, clock, turns), the
runs that are ``live``, the ``policies`` in force, and what is told to the ``audit`` record.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from typing import TYPE_CHECKING, Any, Final

from sandboxd._util.fdwait import in_thread
from sandboxd.engine import tally
from sandboxd.engine.audit.sink import AuditSink
from sandboxd.engine.cells.resources import Resources
from sandboxd.engine.fair_share import Shares
from sandboxd.engine.policies import RESTART_SECONDS, Policies
from sandboxd.engine.runs.live import LiveRuns
from sandboxd.engine.runs.run import CellRun
from sandboxd.engine.tally import Tally
from sandboxd.errors import Busy, PolicyError, Unavailable
from sandboxd.kernel import calls
from sandboxd.limits import LimitValue, narrow
from sandboxd.protocol.run_header import check_inputs_fit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sandboxd.engine.cells.active_policy import ActivePolicy
    from sandboxd.engine.config import AuditSettings, EngineConfig
    from sandboxd.engine.fair_share import FairShare
    from sandboxd.engine.runs.frames import LendTools
    from sandboxd.engine.runs.streams import Emit
    from sandboxd.outcome.answer import RunAnswer
    from sandboxd.protocol.operations import Operation
    from sandboxd.protocol.run_header import Run

__all__ = ["Engine"]

FEW_FILES: Final = 64
"""More are counted by another thread than the loop's."""


class Engine:
    """One engine. ``start``, then ``policies.get`` and ``run`` from any number of tasks, then ``close``."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.resources = Resources(config)
        self.live = LiveRuns()
        self.tally = Tally()
        self.policies = Policies(self.resources, self.live, self.tally)
        self.shares = Shares()
        self.audit = _audit_sink(config.audit)
        self.served = 0
        """Runs that came to an end of their own or by a limit: a sign of life of everything that a run needs."""
        self.reading = asyncio.Lock()
        """Of who reads the audit record."""
        self._closed = False

    def start(self) -> None:
        """Sweep, claim cgroups and ids. Raises Unavailable; nothing is left then."""
        calls.hide_self()
        self.audit.open()
        try:
            self.resources.open()
        except BaseException:
            self.audit.close()
            raise

    def prestart(self, likely: bool = True) -> None:
        """See ``Policies.prestart``."""
        self.policies.prestart(likely)

    async def run(
        self,
        active: ActivePolicy,
        request: Run,
        owner: dict[str, Any],
        emit: Emit | None,
        announce: Callable[[CellRun], None],
        notice: Callable[[Operation], Awaitable[None]] | None = None,
        lend_tools: LendTools | None = None,
        share: FairShare | None = None,
    ) -> RunAnswer:
        """One run under *active*'s limits, narrowed by the request's. *announce* gets it as soon as it can be
        cancelled; *notice* is told "queued" when it has to wait, and then "admitted"; *lend_tools* gets the host's end
        of its tool calls, if it has tools; *share* is the client's part of the engine's time.

        Raises PolicyError, InvalidRequest, Busy, Unavailable: nothing of the program ran then.
        """
        if self._closed:
            raise Unavailable("engine", "the engine is closing", fix="start a new one")
        admission = self.resources.admission
        admission.check_open()
        limits: dict[str, LimitValue] = narrow(active.limits, request.limits)
        sizes = [(path, len(content)) for path, content in request.files]
        if len(sizes) <= FEW_FILES:
            check_inputs_fit(sizes, limits)
        else:
            await in_thread(check_inputs_fit, sizes, limits)
        run = CellRun(self.resources, active, limits, secrets.token_hex(8), emit)
        queued = time.monotonic()
        self.live.add(run, owner)
        announce(run)
        try:
            wait = limits["queue_seconds"]
            try:
                await admission.enter(owner.get("uid"), None if wait is None else float(wait), notice)
                if active.zygote.lost:  # while the run queued; whoever asks next has a new one made
                    admission.leave()
                    raise Busy(RESTART_SECONDS)
            except Busy:
                self.tally.count(owner.get("uid"), active.name, "busy")
                await self.audit.busy(run.id, active, request, owner)
                raise
            try:
                async with self.audit.run(run.id, active, request, limits, owner) as tell:
                    records = self.audit.calls(run.id)
                    answer = await run.execute(request, time.monotonic() - queued, share, lend_tools, records)
                    self.served += answer.header["status"] != "internal"
                    self.tally.count(owner.get("uid"), active.name, answer.header["status"])
                    tell(answer)
            finally:
                admission.leave()
        except BaseException:
            run.close()
            raise
        finally:
            self.live.remove(run)
        # The answer goes first: what follows takes the kernel a while, on the same cores.
        asyncio.get_running_loop().call_soon(run.close)
        try:
            await run.delivered()
        except BaseException:
            answer.collected.close()
            raise
        return answer

    def stats(self, uid: object) -> dict[str, Any]:
        """The counters of this engine, of *uid*'s runs or, for None, all (``tally.stats``)."""
        return tally.stats(self.tally, self.live, self.policies.parked(), self.resources.held, uid)

    def drain(self) -> None:
        """Begin nothing any more: what is asked for, and what waits for its turn, is *busy*; what runs goes on."""
        self.resources.admission.drain()

    async def close(self) -> None:
        """End every run and every zygote, remove cgroups, give ids back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.resources.admission.close()
        for run in self.live:
            run.cancel()
        await self.policies.stop()
        await self.policies.close()
        deadline = time.monotonic() + 2
        while self.live and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        with contextlib.ExitStack() as undo:
            undo.callback(self.audit.close)
            undo.callback(self.resources.close)

    @staticmethod
    def policy_error(name: str) -> PolicyError:
        """For a policy that is not there."""
        return PolicyError(f"There is no policy {name!r} here.", key="policy")


def _audit_sink(settings: AuditSettings | None) -> AuditSink:
    """The one that *settings* ask for; not open yet."""
    if settings is None:
        return AuditSink()
    from sandboxd.engine.audit.recorder import AuditRecorder  # not on the way of engines that record nothing

    return AuditRecorder(settings)
