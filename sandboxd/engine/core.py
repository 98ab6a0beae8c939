"""The engine: owner of cgroups, host ids, slots and zygotes; admits runs and lets them be executed.

Crash-only. Its state is in the kernel: cgroup directories under a lock that dies with it, an id range under another,
pid namespaces whose first process exits when the engine's end of a channel is closed. Nothing is written that a restart
would have to repair; ``start`` sweeps what a dead engine left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import secrets
import time
import weakref
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Final

from sandboxd import cgroup
from sandboxd._util.fdwait import in_thread
from sandboxd.engine import held_time
from sandboxd.engine.audit.sink import trail
from sandboxd.engine.cells import selftest
from sandboxd.engine.cells.active_policy import (
    DEFAULT_POLICY,
    ActivePolicy,
    ZygotePool,
    kernel_release,
    prepare,
    zygote_key,
)
from sandboxd.engine.cells.reaper import Reaper
from sandboxd.engine.cells.shape import NoCgroups
from sandboxd.engine.cells.slots import Slots
from sandboxd.engine.cells.zygote import ZygoteLost
from sandboxd.engine.fair_share import FairShare, Floor
from sandboxd.engine.held_time import HeldTime
from sandboxd.engine.runs.clock import Clock
from sandboxd.engine.runs.run import CellRun, Emit, LendTools
from sandboxd.engine.tally import Tally
from sandboxd.errors import Busy, PolicyError, SandboxError, Unavailable
from sandboxd.ids import ranges
from sandboxd.kernel import calls
from sandboxd.limits import LimitValue, defaults, narrow
from sandboxd.protocol.run_header import Run, check_inputs_fit
from sandboxd.rootfs.interpreter import Interpreter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator

    from sandboxd.engine.clients.leases import Leases
    from sandboxd.engine.config import EngineConfig
    from sandboxd.outcome.answer import RunAnswer

__all__ = ["Engine"]

log = logging.getLogger("sandboxd.engine")

RESTART_SECONDS: Final = 1.0
"""How long a policy that could not be brought into force answers with the same error before it is tried again."""
HELD_BYTES: Final = 64 << 20
"""Source texts and JSON of one uid's requests, waiting or running; as Python's objects they take several times that."""
DRAINING_SECONDS: Final = 1.0
"""After it, who was turned away because the engine ends may ask again: another one may be there."""
RETIRE_SECONDS: Final = 60.0
"""After a zygote could not be replaced, so long until the next attempt."""
PROVE_SECONDS: Final = 60.0
"""A first cell that has not run its self-test by then never will."""
OUTLIVE_SECONDS: Final = 0.05
"""How often a zygote that was replaced is looked at."""
FEW_FILES: Final = 64
"""More are counted by another thread than the loop's."""
SPARE_SLOTS: Final = 64
"""Slots beyond max_running: a run that is dying slowly keeps its own."""


class Engine:
    """One engine. ``start``, then ``prepared`` and ``run`` from any number of tasks, then ``close``."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.cpus = os.cpu_count() or 1
        self.most_running = config.running()
        self.descriptors = 1 << 20
        self.crowded = False
        """Nearly as many descriptors are open as may be: a cell whose do not arrive costs the whole zygote."""
        self.kernel = kernel_release()
        self.instance: cgroup.Instance
        self.ids: ranges.IdBlock
        self.slot_ids: ranges.SlotIds
        self.slots: Slots
        self.no_cgroups: NoCgroups | None = None
        self.live: dict[str, CellRun] = {}
        self.owners: dict[str, dict[str, Any]] = {}
        self._prepared: dict[str, ActivePolicy] = {}
        self._preparing: dict[str, asyncio.Task[ActivePolicy]] = {}
        self._running = 0
        self._queued = 0
        self.clock = Clock()
        self.reaper = Reaper()
        self.makers = max(2, self.cpus)
        self._leases: dict[Leases, None] = {}
        self._retired: dict[asyncio.Task[None], str] = {}
        """What replaces a zygote, or waits for the end of the last run of one that was, with its policy's key."""
        self._held: Counter[object] = Counter()
        self._floor = Floor()
        self._shares: weakref.WeakValueDictionary[object, FairShare] = weakref.WeakValueDictionary()
        # By the uid that asked, in the order in which the uids are served.
        self._waiting: dict[object, deque[asyncio.Future[None]]] = {}
        self._undo = contextlib.ExitStack()
        self._closed = False
        self._draining = False
        self.served = 0
        """Runs that came to an end of their own or by a limit: a sign of life of everything that a run needs."""
        self.bodies = ZygotePool(self)
        self.tally = Tally()
        self.held = HeldTime()
        self.trail = trail(config.audit)
        self.reading = asyncio.Lock()
        """Of who reads the audit record."""
        self._guess: asyncio.Task[ActivePolicy] | None = None

    def start(self) -> None:
        """Sweep, claim cgroups and ids. Raises Unavailable; nothing is left then."""
        calls.hide_self()
        self.held = held_time.of(asyncio.get_running_loop())
        # Every cell takes some thirty descriptors here; what cells may open is their own limit.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        if most != resource.RLIM_INFINITY:
            self.descriptors = most
        layout = cgroup.discover()
        for swept in cgroup.sweep(layout):
            log.info("swept what a dead engine left in %s; processes killed: %d", swept.name, swept.killed)
            if swept.left:
                log.warning("could not be removed, and is tried again by the next engine: %s", ", ".join(swept.left))
        running = self.most_running
        with contextlib.ExitStack() as undo:
            self.trail.open()
            undo.callback(self.trail.close)
            bounds = cgroup.Bounds(memory_bytes=self.config.memory(), pids=self.config.tasks())
            try:
                self.instance = undo.enter_context(cgroup.Instance.create(layout, bounds))
            except Unavailable as refusal:
                # Whether that will do is the policy's to say: [require] cgroup (active_policy.py).
                self.instance = undo.enter_context(cgroup.NoInstance(refusal))
            # Beside those that run: parked ones, and those that are dying.
            wanted = running + max(SPARE_SLOTS, running + 2 * self.config.pool.maximum)
            self.ids = undo.enter_context(ranges.claim(self.config.ids, slots=wanted))
            self.slot_ids = self.ids.slots(wanted)
            if running > self.slot_ids.capacity:
                raise Unavailable(
                    "ids",
                    f"{running} cells at once need as many ids; the range has {self.slot_ids.capacity}",
                    fix="give the engine a larger range of ids, or lower max_running",
                )
            if isinstance(self.instance, cgroup.NoInstance):
                self.no_cgroups = NoCgroups(own_uid=self.ids.shared is None)
            self.instance.clone_owner(self.ids.base)
            self.slots = Slots(self.instance, min(wanted, self.slot_ids.capacity), self.ids.base)
            undo.callback(self.slots.close)
            self._undo = undo.pop_all()

    def prestart(self, likely: bool = True) -> None:
        """Before the policy comes: start a zygote on this interpreter, and where it is *likely* that a policy without
        libraries of its own will be asked for, make that ready. A refusal is told only when it is asked for.
        """
        with contextlib.suppress(SandboxError):
            self.bodies.prestart(Interpreter.current())
            if likely:
                self._guess = asyncio.get_running_loop().create_task(self._proved(DEFAULT_POLICY))

    # Policies

    async def prepared(self, key: str, plain: dict[str, Any]) -> ActivePolicy:
        """Policy *plain* in force, its zygote alive; made when first asked for, and again when its zygote was lost.

        The making belongs to the engine, not to who asked first: a client that leaves does not stop it for the others.
        Raises Unavailable, PolicyError; the same again for RESTART_SECONDS, so that nobody can keep the engine busy
        with attempts.
        """
        found = self._prepared.get(key)
        if found is not None and not found.zygote.lost:
            return found
        if self._closed:
            raise Unavailable("engine", "the engine is closing", fix="start a new one")
        making = self._preparing.get(key)
        if making is None:
            making = self._preparing[key] = asyncio.get_running_loop().create_task(self._make(key, plain))
            making.add_done_callback(lambda done: self._made(key, done))
        return await asyncio.shield(making)

    def _made(self, key: str, making: asyncio.Task[ActivePolicy]) -> None:
        if making.cancelled() or making.exception() is None:
            self._preparing.pop(key, None)
        else:
            making.get_loop().call_later(RESTART_SECONDS, self._try_again, key, making)

    def _is_preparing(self, key: str) -> bool:
        making = self._preparing.get(key)
        return making is not None and not making.done()

    def _try_again(self, key: str, failed: asyncio.Task[ActivePolicy]) -> None:
        if self._preparing.get(key) is failed:
            del self._preparing[key]

    async def _make(self, key: str, plain: dict[str, Any]) -> ActivePolicy:
        lost = self._prepared.pop(key, None)
        if lost is not None:
            log.error("the zygote of policy %s was lost: %s", lost.name, lost.zygote.last_words())
            self.tally.restarts[lost.name] += 1
            await lost.close()
        guess, self._guess = self._guess, None
        if guess is not None and zygote_key(plain) != zygote_key(DEFAULT_POLICY):
            try:
                await self._forget(guess)
            except asyncio.CancelledError:
                self._guess = guess  # close() waits for its end
                raise
            guess = None
        if guess is None:
            made = await self._proved(plain)
        else:
            made = await guess
            made.rename(plain)
        await self.bodies.close()  # one that was foreseen for another interpreter
        self._prepared[key] = made
        made.pool.open()
        return made

    @property
    def busy(self) -> bool:
        """Whether a program runs, or one waits to: what can wait, then, should."""
        return bool(len(self.clock) or self._waiting)

    # Turns that callers of an embedded engine hold for cells that they start themselves

    def reserve(self, holder: Leases) -> bool:
        """Take a turn for *holder*'s lease, if nobody waits for one."""
        if self._closed or self._waiting or self._running >= self.most_running:
            return False
        self._running += 1
        self._leases[holder] = None
        return True

    def unreserve(self, holder: Leases) -> None:
        """Give it back."""
        if self._leases.pop(holder, self) is not self:
            self._leave()

    def _revoke(self) -> bool:
        """Take the turn of the lease that has waited longest."""
        return any(holder.revoke() for holder in list(self._leases))

    def current(self, prepared: ActivePolicy) -> ActivePolicy | None:
        """What serves *prepared*'s policy now."""
        return next((one for one in self._prepared.values() if one.name == prepared.name), None)

    def rotate(self, old: ActivePolicy) -> None:
        """Put a new zygote in the place of *old*'s, which is closed once its runs are over."""
        key = next((key for key, one in self._prepared.items() if one is old), None)
        if key is None or self._closed or key in self._preparing or key in self._retired.values():
            return
        self._retire(key, self._rotate(key, old))

    def _retire(self, key: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._retired[task] = key
        task.add_done_callback(self._retired.pop)

    async def _rotate(self, key: str, old: ActivePolicy) -> None:
        try:
            made = await self._proved(old.plain)
        except (SandboxError, ZygoteLost, OSError) as error:
            log.warning("policy %s: no new zygote: %s", old.name, error)
            await asyncio.sleep(RETIRE_SECONDS)
            return
        if self._prepared.get(key) is not old or self._closed:
            await made.close()
            return
        self._prepared[key] = made
        made.pool.open()
        await self._outlive(old)

    async def _outlive(self, old: ActivePolicy) -> None:
        """Close *old*, which nobody is given any more, once its runs are over, those that queue included."""
        old.pool.close()
        try:
            while not old.zygote.lost:
                await asyncio.sleep(OUTLIVE_SECONDS)  # first: a request may have been given it just now
                # Files of a dead cell are read with the help of its zygote's broker.
                if not old.zygote.alive and not any(run.serves(old) for run in self.live.values()):
                    break
        finally:
            await old.close()

    def filter_hash(self, key: str) -> str:
        """Of the system call filter that the policy of *key* has now; "" when it is not in force."""
        found = self._prepared.get(key)
        return "" if found is None else found.profile_sha256

    async def replace(self, changed: dict[str, dict[str, Any]], removed: Iterable[str]) -> None:
        """Put the policies *changed* (key to plain values) into force in the place of those of the same keys, and take
        those of *removed* out; what they replace ends with its last run.

        All or nothing: every new zygote is proved first. Raises what ``prepared`` raises; nothing is changed then.
        """
        made: dict[str, ActivePolicy] = {}
        keys = [*changed, *removed]
        try:
            for key, plain in changed.items():
                made[key] = await self._proved(plain)
            # Those that are being made from what was valid before.
            while making := [
                task for key in keys if (task := self._preparing.get(key)) is not None and not task.done()
            ]:
                await asyncio.wait(making)
            if self._closed:
                raise Unavailable("engine", "the engine is closing", fix="start a new one")
        except BaseException:
            for one in made.values():
                await one.close()
            raise
        for key in keys:
            self._preparing.pop(key, None)  # a failure that is still being told
            old = self._prepared.pop(key, None)
            if key in made:
                self._prepared[key] = made[key]
                made[key].pool.open()
            if old is not None:
                self._retire(key, self._outlive(old))

    async def _proved(self, plain: dict[str, Any]) -> ActivePolicy:
        """*plain* in force, with a first cell that tried to cross every wall."""
        made = await prepare(self, plain)
        try:
            if not self.config.walls_down:
                await self._prove(made)
        except BaseException:
            await made.close()
            raise
        return made

    @staticmethod
    async def _forget(guess: asyncio.Task[ActivePolicy]) -> None:
        """Nobody asked for it."""
        guess.cancel()
        await asyncio.wait({guess})
        if not guess.cancelled() and guess.exception() is None:
            await guess.result().close()

    async def _prove(self, made: ActivePolicy) -> None:
        """Run the self-test in a first cell. Raises Unavailable."""
        try:
            async with asyncio.timeout(PROVE_SECONDS):
                header, said, complaint = await self._own_run(made, selftest.PROGRAM, "self-test")
        except TimeoutError:
            fix = "look at the load of this host; sandboxd doctor seals a cell step by step"
            what = f"the first cell did not run its self-test within {PROVE_SECONDS:.0f} s"
            raise Unavailable("self-test", what, fix=fix) from None
        if header["status"] != "ok":
            raise Unavailable(
                "self-test",
                f"the first cell ended with {header['status']}: {complaint[-500:]}",
                fix="look at what it says, and at sandboxd doctor",
            )
        guest = self.slot_ids.guest_uid(int(header["isolation"]["uid"]) - self.slot_ids.host_uid(0))
        keeps_groups = self.ids.shared is not None
        selftest.verify(said, guest, made.zygote.landlock_abi, made.profile, keeps_groups)

    async def probe(self, prepared: ActivePolicy) -> None:
        """Run a program of our own, beside the queue. Raises Unavailable when it does not end as it should."""
        header, _, complaint = await self._own_run(prepared, "pass", "probe")
        if header["status"] != "ok":
            raise Unavailable("probe", f"{header['status']}: {complaint[-500:]}", fix="look at the engine's log")

    async def _own_run(self, prepared: ActivePolicy, code: str, name: str) -> tuple[dict[str, Any], str, str]:
        """A run that takes no turn and is not recorded: header, stdout, stderr. Its slot is free afterwards."""
        limits = {**defaults(), "wall_seconds": 20.0}
        request = Run(
            code=code,
            language="python",
            filename=f"{name}.py",
            args=(),
            env={},
            stdin=None,
            files=(),
            limits={},
            stream=False,
            results=False,
        )
        run = CellRun(self, prepared, request, limits, name, None)
        try:
            header, texts, collected = await run.execute(0.0)
        finally:
            cell = run.cell
            run.close()
            if cell is not None:
                await cell.death()  # its slot is the first run's
        collected.close()
        return header, texts[0].decode("utf-8", "replace"), texts[1].decode("utf-8", "replace")

    # Runs

    async def run(
        self,
        prepared: ActivePolicy,
        request: Run,
        owner: dict[str, Any],
        emit: Emit | None,
        announce: Callable[[CellRun], None],
        notice: Callable[[str], Awaitable[None]] | None = None,
        lend_tools: LendTools | None = None,
        share: FairShare | None = None,
    ) -> RunAnswer:
        """One run under *prepared*'s limits, narrowed by the request's. *announce* gets it as soon as it can be
        cancelled; *notice* is told "queued" when it has to wait, and then "admitted"; *lend_tools* gets the host's end
        of its tool calls, if it has tools; *share* is the client's part of the engine's time.

        Raises PolicyError, InvalidRequest, Busy, Unavailable: nothing of the program ran then.
        """
        if self._closed:
            raise Unavailable("engine", "the engine is closing", fix="start a new one")
        if self._draining:
            raise Busy(DRAINING_SECONDS)
        limits: dict[str, LimitValue] = narrow(prepared.limits, request.limits)
        sizes = [(path, len(content)) for path, content in request.files]
        if len(sizes) <= FEW_FILES:
            check_inputs_fit(sizes, limits)
        else:
            await in_thread(check_inputs_fit, sizes, limits)
        identity = secrets.token_hex(8)
        run = CellRun(self, prepared, request, limits, identity, emit, lend_tools, share)
        queued = time.monotonic()
        self.live[identity] = run
        self.owners[identity] = owner
        announce(run)
        try:
            wait = limits["queue_seconds"]
            try:
                await self._admit(owner.get("uid"), None if wait is None else float(wait), notice)
                if prepared.zygote.lost:  # while the run queued; whoever asks next has a new one made
                    self._leave()
                    raise Busy(RESTART_SECONDS)
            except Busy:
                self.tally.count(owner.get("uid"), prepared.name, "busy")
                await self.trail.busy(identity, prepared, request, owner)
                raise
            try:
                async with self.trail.run(identity, prepared, request, limits, owner) as tell:
                    answer = await run.execute(time.monotonic() - queued)
                    self.served += answer[0]["status"] != "internal"
                    self.tally.count(owner.get("uid"), prepared.name, answer[0]["status"])
                    tell(answer)
            finally:
                self._leave()
        except BaseException:
            run.close()
            raise
        finally:
            del self.live[identity], self.owners[identity]
        # The answer goes first: what follows takes the kernel a while, on the same cores.
        asyncio.get_running_loop().call_soon(run.close)
        try:
            await run.delivered()
        except BaseException:
            answer[2].close()
            raise
        return answer

    def share(self, who: object) -> FairShare:
        """*who*'s share of this thread, the same for all its connections; None is not bounded."""
        if who is None:
            return FairShare(True, self._floor)
        found = self._shares.get(who)
        if found is None:
            found = self._shares[who] = FairShare(False, self._floor)
        return found

    @contextlib.contextmanager
    def hold(self, who: object, size_bytes: int) -> Iterator[None]:
        """Count a request of *size_bytes* among what *who* has in the engine's memory; None is not counted. Raises Busy
        when it is more than HELD_BYTES with the others.
        """
        if who is None:
            yield
            return
        if self._held[who] and self._held[who] + size_bytes > HELD_BYTES:
            raise Busy(1.0)
        self._held[who] += size_bytes
        try:
            yield
        finally:
            self._held[who] -= size_bytes
            if not self._held[who]:
                del self._held[who]

    async def _admit(
        self, who: object, wait_seconds: float | None, notice: Callable[[str], Awaitable[None]] | None
    ) -> None:
        """Take one of max_running turns. The uids that wait are served in rotation, the runs of one uid in their order:
        who asks for a hundred runs stands in nobody's way. Raises Busy.
        """
        if not self._waiting and (self._running < self.most_running or self._revoke()):
            self._running += 1
            return
        if self._queued >= self.config.max_queued:
            raise Busy(1.0)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        mine = self._waiting.setdefault(who, deque())
        mine.append(turn)
        self._queued += 1
        try:
            async with asyncio.timeout(wait_seconds):
                if notice is not None:
                    await notice("queued")
                await turn
                if notice is not None:
                    await notice("admitted")
        except BaseException as error:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._leave()  # it had become our turn just then
            if isinstance(error, TimeoutError):
                raise Busy(1.0) from None
            raise
        finally:
            self._queued -= 1
            with contextlib.suppress(ValueError):
                mine.remove(turn)
            if not mine and self._waiting.get(who) is mine:
                del self._waiting[who]

    def drain(self) -> None:
        """Begin nothing any more: what is asked for, and what waits for its turn, is *busy*; what runs goes on."""
        self._draining = True
        for mine in self._waiting.values():
            for turn in mine:
                if not turn.done():
                    turn.set_exception(Busy(DRAINING_SECONDS))
        self._waiting.clear()

    def _leave(self) -> None:
        """Give the turn to the next in the queue."""
        while self._waiting:
            who = next(iter(self._waiting))
            mine = self._waiting.pop(who)
            turn = mine.popleft()
            if mine:
                self._waiting[who] = mine  # behind the others
            if not turn.done():
                turn.set_result(None)
                return
        self._running -= 1

    def parked(self) -> list[tuple[str, int]]:
        """Cells that wait for a program, by policy; those that are lent included."""
        return [(one.name, one.pool.waiting) for one in self._prepared.values()]

    def list_runs(self, visible: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Facts of the live runs whose owner *visible* accepts."""
        return [
            {**run.facts(), "client": self.owners[identity]}
            for identity, run in self.live.items()
            if visible(self.owners[identity])
        ]

    async def close(self) -> None:
        """End every run and every zygote, remove cgroups, give ids back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        making = list(self._preparing.values())
        for task in making:
            task.cancel()
        for run in list(self.live.values()):
            run.cancel()
        if making:
            await asyncio.wait(making, timeout=2)
        retired = [*self._retired]
        for one in retired:
            one.cancel()
        if retired:
            await asyncio.wait(retired, timeout=2)
        for prepared in self._prepared.values():
            await prepared.close()
        self._prepared.clear()
        if self._guess is not None:
            await self._forget(self._guess)
        await self.bodies.close()
        deadline = time.monotonic() + 2
        while self.live and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        self.clock.close()
        self.reaper.close()
        self._undo.close()

    @staticmethod
    def policy_error(name: str) -> PolicyError:
        """For a policy that is not there."""
        return PolicyError(f"There is no policy {name!r} here.", key="policy")
