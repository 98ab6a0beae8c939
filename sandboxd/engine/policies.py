"""The policies in force: made when first asked for, proved, replaced, and made again when their zygote is lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, Final

from sandboxd.engine.cells import selftest
from sandboxd.engine.cells.active_policy import DEFAULT_POLICY, ActivePolicy, ZygotePool, activate, zygote_key
from sandboxd.engine.cells.zygote import ZygoteLost
from sandboxd.engine.runs.run import CellRun
from sandboxd.errors import SandboxError, Unavailable
from sandboxd.limits import defaults
from sandboxd.protocol.run_header import Run
from sandboxd.rootfs.interpreter import Interpreter

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable

    from sandboxd.engine.cells.resources import Resources
    from sandboxd.engine.runs.live import LiveRuns
    from sandboxd.engine.tally import Tally

__all__ = ["RESTART_SECONDS", "Policies"]

log = logging.getLogger("sandboxd.engine")

RESTART_SECONDS: Final = 1.0
"""How long a policy that could not be brought into force answers with the same error before it is tried again."""
RETIRE_SECONDS: Final = 60.0
"""After a zygote could not be replaced, so long until the next attempt."""
PROVE_SECONDS: Final = 60.0
"""A first cell that has not run its self-test by then never will."""
OUTLIVE_SECONDS: Final = 0.05
"""How often a zygote that was replaced is looked at."""


class Policies:
    """Of one engine, by the key that who asks has for each."""

    def __init__(self, resources: Resources, live: LiveRuns, tally: Tally) -> None:
        self._tally = tally
        self._resources = resources
        self._live = live
        self._zygotes = ZygotePool(resources)
        self._active: dict[str, ActivePolicy] = {}
        self._making: dict[str, asyncio.Task[ActivePolicy]] = {}
        self._retired: dict[asyncio.Task[None], str] = {}
        """What replaces a zygote, or waits for the end of the last run of one that was, with its policy's key."""
        self._guess: asyncio.Task[ActivePolicy] | None = None
        self._closed = False

    def prestart(self, likely: bool) -> None:
        """Before the policy comes: start a zygote on this interpreter, and where it is *likely* that a policy without
        libraries of its own will be asked for, make that ready. A refusal is told only when it is asked for.
        """
        with contextlib.suppress(SandboxError):
            self._zygotes.prestart(Interpreter.current())
            if likely:
                self._guess = asyncio.get_running_loop().create_task(self._proved(DEFAULT_POLICY))

    # Bringing into force

    async def get(self, key: str, plain: dict[str, Any]) -> ActivePolicy:
        """Policy *plain* in force, its zygote alive; made when first asked for, and again when its zygote was lost.

        The making belongs to the engine, not to who asked first: a client that leaves does not stop it for the others.
        Raises Unavailable, PolicyError; the same again for RESTART_SECONDS, so that nobody can keep the engine busy
        with attempts.
        """
        found = self._active.get(key)
        if found is not None and not found.zygote.lost:
            return found
        self._check_open()
        making = self._making.get(key)
        if making is None:
            making = self._making[key] = asyncio.get_running_loop().create_task(self._make(key, plain))
            making.add_done_callback(lambda done: self._made(key, done))
        return await asyncio.shield(making)

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("engine", "the engine is closing", fix="start a new one")

    def _made(self, key: str, making: asyncio.Task[ActivePolicy]) -> None:
        if making.cancelled() or making.exception() is None:
            self._making.pop(key, None)
        else:
            making.get_loop().call_later(RESTART_SECONDS, self._try_again, key, making)

    def _try_again(self, key: str, failed: asyncio.Task[ActivePolicy]) -> None:
        if self._making.get(key) is failed:
            del self._making[key]

    async def _make(self, key: str, plain: dict[str, Any]) -> ActivePolicy:
        lost = self._active.pop(key, None)
        if lost is not None:
            log.error("the zygote of policy %s was lost: %s", lost.name, lost.zygote.last_words())
            self._tally.restarts[lost.name] += 1
            await lost.close()
        guess, self._guess = self._guess, None
        if guess is not None and zygote_key(plain) != zygote_key(DEFAULT_POLICY):
            try:
                await _forget(guess)
            except asyncio.CancelledError:
                self._guess = guess  # close() waits for its end
                raise
            guess = None
        if guess is None:
            made = await self._proved(plain)
        else:
            made = await guess
            made.rename(plain)
        await self._zygotes.close()  # one that was prestarted for another interpreter
        self._active[key] = made
        made.pool.open()
        return made

    def current(self, active: ActivePolicy) -> ActivePolicy | None:
        """What serves *active*'s policy now."""
        return next((one for one in self._active.values() if one.name == active.name), None)

    def filter_hash(self, key: str) -> str:
        """Of the system call filter that the policy of *key* has now; "" when it is not in force."""
        found = self._active.get(key)
        return "" if found is None else found.profile_sha256

    def parked(self) -> list[tuple[str, int]]:
        """Cells that wait for a program, by policy; those that are lent included."""
        return [(one.name, one.pool.waiting) for one in self._active.values()]

    # Replacing

    def _rotate(self, old: ActivePolicy) -> None:
        """Put a new zygote in the place of *old*'s, which is closed once its runs are over."""
        key = next((key for key, one in self._active.items() if one is old), None)
        if key is None or self._closed or key in self._making or key in self._retired.values():
            return
        self._retire(key, self._replace_worn(key, old))

    def _retire(self, key: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._retired[task] = key
        task.add_done_callback(self._retired.pop)

    async def _replace_worn(self, key: str, old: ActivePolicy) -> None:
        try:
            made = await self._proved(old.plain)
        except (SandboxError, ZygoteLost, OSError) as error:
            log.warning("policy %s: no new zygote: %s", old.name, error)
            await asyncio.sleep(RETIRE_SECONDS)
            return
        if self._active.get(key) is not old or self._closed:
            await made.close()
            return
        self._active[key] = made
        made.pool.open()
        await self._outlive(old)

    async def _outlive(self, old: ActivePolicy) -> None:
        """Close *old*, which nobody is given any more, once its runs are over, those that queue included."""
        old.pool.close()
        try:
            while not old.zygote.lost:
                await asyncio.sleep(OUTLIVE_SECONDS)  # first: a request may have been given it just now
                # Files of a dead cell are read with the help of its zygote's broker.
                if not old.zygote.alive and not any(run.serves(old) for run in self._live):
                    break
        finally:
            await old.close()

    async def replace(self, changed: dict[str, dict[str, Any]], removed: Iterable[str]) -> None:
        """Put the policies *changed* (key to plain values) into force in the place of those of the same keys, and take
        those of *removed* out; what they replace ends with its last run.

        All or nothing: every new zygote is proved first. Raises what ``get`` raises; nothing is changed then.
        """
        made: dict[str, ActivePolicy] = {}
        keys = [*changed, *removed]
        try:
            for key, plain in changed.items():
                made[key] = await self._proved(plain)
            # Those that are being made from what was valid before.
            while making := [task for key in keys if (task := self._making.get(key)) is not None and not task.done()]:
                await asyncio.wait(making)
            self._check_open()
        except BaseException:
            for one in made.values():
                await one.close()
            raise
        for key in keys:
            self._making.pop(key, None)  # a failure that is still being told
            old = self._active.pop(key, None)
            if key in made:
                self._active[key] = made[key]
                made[key].pool.open()
            if old is not None:
                self._retire(key, self._outlive(old))

    # Proving

    async def _proved(self, plain: dict[str, Any]) -> ActivePolicy:
        """*plain* in force, with a first cell that tried to cross every wall."""
        made = await activate(self._resources, self._zygotes, plain, self._rotate)
        try:
            if not self._resources.config.walls_down:
                await self._prove(made)
        except BaseException:
            await made.close()
            raise
        return made

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
            what = f"the first cell ended with {header['status']}: {complaint[-500:]}"
            raise Unavailable("self-test", what, fix="look at what it says, and at sandboxd doctor")
        slot_ids, ids = self._resources.slot_ids, self._resources.ids
        guest = slot_ids.guest_uid(int(header["isolation"]["uid"]) - slot_ids.host_uid(0))
        selftest.verify(said, guest, made.zygote.facts.landlock_abi, made.profile, ids.shared is not None)

    async def probe(self, active: ActivePolicy) -> None:
        """Run a program of our own, beside the queue. Raises Unavailable when it does not end as it should."""
        header, _, complaint = await self._own_run(active, "pass", "probe")
        if header["status"] != "ok":
            raise Unavailable("probe", f"{header['status']}: {complaint[-500:]}", fix="look at the engine's log")

    async def _own_run(self, active: ActivePolicy, code: str, name: str) -> tuple[dict[str, Any], str, str]:
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
        run = CellRun(self._resources, active, limits, name)
        try:
            header, texts, collected = await run.execute(request)
        finally:
            cell = run.cell
            run.close()
            if cell is not None:
                await cell.death()  # its slot is the first run's
        collected.close()
        return header, texts[0].decode("utf-8", "replace"), texts[1].decode("utf-8", "replace")

    # The end

    async def stop(self) -> None:
        """Make none any more; what is being made ends. ``close`` comes once the runs were told to end."""
        self._closed = True
        making = [one for one in self._making.values() if not one.done()]
        for task in [*making, *self._retired]:
            task.cancel()
        if making:
            await asyncio.wait(making, timeout=2)
        if self._retired:
            await asyncio.wait([*self._retired], timeout=2)

    async def close(self) -> None:
        """End every zygote, and with it every cell."""
        for active in self._active.values():
            await active.close()
        self._active.clear()
        if self._guess is not None:
            await _forget(self._guess)
        await self._zygotes.close()


async def _forget(guess: asyncio.Task[ActivePolicy]) -> None:
    """Nobody asked for it."""
    guess.cancel()
    await asyncio.wait({guess})
    if not guess.cancelled() and guess.exception() is None:
        await guess.result().close()
