"""How a tool's function is run: threads that can be abandoned, coroutines that are cancelled, each with a time limit.

Python cannot stop a function in a thread. One that goes on after its time is abandoned: its caller gets the answer
"timeout" and the thread is counted until the function returns. The threads are daemons of our own and not those of
concurrent.futures, which the interpreter would wait for at its end.

Such threads also do ``aside`` what is too long for a caller's loop: whatever reads, checks or writes what a program
made. Such work is bounded and linear, but its bounds are megabytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

from sandboxd.tools.pipeline.forking import renewed_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

GRACE_SECONDS = 0.5  # that a cancelled coroutine has to end
_IDLE_SECONDS = 10.0  # after which a thread without work ends
_THREADS = 128  # at most at work, abandoned ones not counted; more work waits for one of them

_ASIDE_THREADS = 4

P = ParamSpec("P")
R = TypeVar("R")

Outcome = tuple[bool, Any]  # (True, value) or (False, the exception)


class TimedOut(Exception):
    """The function did not return in time. *started* is False when it was never called."""

    def __init__(self, started: bool) -> None:
        super().__init__(started)
        self.started = started


class NoThread(Exception):
    """Too many abandoned functions are still running."""


class _Job:
    """One function to call in a thread. Guarded by the lock of its Threads, except for ``outcome`` once it is done."""

    __slots__ = ("abandoned", "context", "function", "outcome", "report", "started")

    def __init__(self, function: Callable[[], Any], report: Callable[[], object]) -> None:
        self.function = function
        self.context = contextvars.copy_context()
        self.report = report
        self.outcome: Outcome | None = None
        self.started = False
        self.abandoned = False


class Threads:
    """Daemon threads for functions, used again when they are free.

    At most *most_abandoned* functions may be left behind; then ``run`` and ``run_async`` raise NoThread.
    """

    def __init__(self, most_abandoned: float, most_threads: float = _THREADS) -> None:
        self._most_abandoned = most_abandoned
        self._most_threads = most_threads
        self._closed = False
        renewed_after_fork(self)

    def begin(self) -> None:
        """There are no threads: when it is made, and in the child of a fork."""
        self._changed = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._idle = 0
        self._working = 0
        self.abandoned = 0

    def run(self, function: Callable[[], Any], timeout: float | None) -> Any:
        """What *function* returns or raises, called in a thread with this one's contextvars.

        Raises TimedOut after *timeout* seconds, waiting for a free thread included; NoThread.
        """
        done = threading.Lock()
        done.acquire()
        job = self._submit(function, done.release)
        try:
            done.acquire(timeout=-1 if timeout is None else timeout)
        except BaseException:  # of a signal handler, as KeyboardInterrupt is: nobody waits any more
            self._abandon(job)
            raise
        return self._result(job)

    async def run_async(self, function: Callable[[], Any], timeout: float | None) -> Any:
        """``run`` for a coroutine; the loop goes on meanwhile. A cancelled caller abandons the function."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def finish() -> None:
            if not done.done():
                done.set_result(None)

        def report() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(finish)

        job = self._submit(function, report)
        try:
            await asyncio.wait((done,), timeout=timeout)
        except BaseException:
            self._abandon(job)
            raise
        return self._result(job)

    def start(self, function: Callable[[], None]) -> None:
        """Have *function*, which must not raise, called in a thread; nobody waits for it. Raises NoThread."""
        self._submit(function, _nobody)

    def close(self) -> None:
        """Let idle threads go; those at work end after it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _submit(self, function: Callable[[], Any], report: Callable[[], object]) -> _Job:
        job = _Job(function, report)
        with self._changed:
            if self.abandoned >= self._most_abandoned:
                raise NoThread
            self._waiting.append(job)
            if self._idle >= len(self._waiting):
                self._changed.notify()
            elif self._working + self._idle - self.abandoned < self._most_threads:
                self._working += 1
                try:
                    threading.Thread(target=self._work, name="sandboxd tool", daemon=True).start()
                except RuntimeError:  # no more threads in this process
                    self._working -= 1
                    self._waiting.remove(job)
                    raise NoThread from None
        return job

    def _result(self, job: _Job) -> Any:
        if job.outcome is None and self._abandon(job):
            raise TimedOut(job.started)
        assert job.outcome is not None  # noqa: S101 (what _abandon said)
        ok, value = job.outcome
        if ok:
            return value
        try:
            raise value
        finally:
            del value, job  # the traceback holds this frame

    def _abandon(self, job: _Job) -> bool:
        """Give up on *job*; False when it has ended by now."""
        with self._changed:
            if job.outcome is not None:
                return False
            if job.started:
                job.abandoned = True
                self.abandoned += 1
            else:
                self._waiting.remove(job)
        return True

    def _work(self) -> None:
        while (job := self._next()) is not None:
            outcome: Outcome
            try:
                outcome = (True, job.context.run(job.function))
            except BaseException as error:  # the caller's, whatever it is
                outcome = (False, error)
            with self._changed:
                job.outcome = outcome
                if job.abandoned:
                    self.abandoned -= 1
            if not job.abandoned:
                job.report()
            del job, outcome  # nothing of a call stays while the thread waits

    def _next(self) -> _Job | None:
        with self._changed:
            self._working -= 1
            self._idle += 1
            until = time.monotonic() + _IDLE_SECONDS
            while not self._waiting:
                if self._closed or not self._changed.wait(until - time.monotonic()):
                    break
            self._idle -= 1
            if not self._waiting:
                return None
            self._working += 1
            job = self._waiting.popleft()
            job.started = True
            return job


def _nobody() -> None:
    """Is told that a function has ended."""


_aside: Final = Threads(most_abandoned=math.inf, most_threads=_ASIDE_THREADS)  # nothing there takes long


async def aside(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """What *function* returns or raises, called in a thread with this context while the loop goes on.

    It must end by itself, and soon. A cancelled caller does not wait for it: what it does to an object must be safe in
    threads, and what it takes into its care must not be lost. In a process that can start no thread it is called here.
    """
    call = partial(function, *args, **kwargs)
    try:
        made: R = await _aside.run_async(call, None)
    except NoThread:
        return call()
    return made


async def _outcome(function: Callable[[], Coroutine[Any, Any, Any]]) -> Outcome:
    """Everything that comes out of a coroutine, as a value: SystemExit in a task would end the whole loop."""
    try:
        return True, await function()
    except BaseException as error:
        return False, error


class Coroutines:
    """Coroutines with a time limit, on any loop; and a loop in a daemon thread for callers that have none.

    One that goes on when it has been cancelled is left behind, and counted in ``abandoned`` until it ends.
    """

    def __init__(self) -> None:
        renewed_after_fork(self)

    def begin(self) -> None:
        """As ``Threads.begin``. The loop of the parent is left as it is: its descriptors are the parent's, too."""
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self.abandoned = 0

    async def run(self, function: Callable[[], Coroutine[Any, Any, Any]], timeout: float | None) -> Any:
        """What the coroutine of *function* returns or raises, on the running loop. Raises TimedOut."""
        if timeout is None:
            return await function()
        task = asyncio.ensure_future(_outcome(function))
        try:
            await asyncio.wait((task,), timeout=timeout)
        except BaseException:  # the caller is cancelled, and the function with it
            await self._cancel(task)
            raise
        if not task.done():
            await self._cancel(task)
            raise TimedOut(started=True)
        ok, value = task.result()
        if ok:
            return value
        raise value

    async def _cancel(self, task: asyncio.Task[Outcome]) -> None:
        """Cancel *task* and give it some time to end."""
        task.cancel()
        try:
            await asyncio.wait((task,), timeout=GRACE_SECONDS)
        finally:
            if not task.done():
                self._leave(task)

    def run_elsewhere(
        self,
        function: Callable[[], Coroutine[Any, Any, Any]],
        timeout: float | None,
        loop: asyncio.AbstractEventLoop | None = None,
        ending: Callable[[Callable[[], None]], contextlib.AbstractContextManager[None]] | None = None,
    ) -> Any:
        """``run`` from a thread without a loop, with this thread's contextvars: on *loop*, or on a loop of our own.
        Within *ending*, if there is one, what it gets cancels the coroutine.

        Raises RuntimeError when this thread is the loop's own, which would wait for itself.
        """
        chosen = self._own_loop() if loop is None else loop
        if _running_loop() is chosen:
            raise RuntimeError(
                "call() on the thread of the loop that is to run the tool would wait for itself; await acall()."
            )
        done = threading.Lock()
        done.acquire()
        outcomes: list[Outcome] = []
        tasks: list[asyncio.Task[Outcome]] = []
        context = contextvars.copy_context()

        def ended(task: asyncio.Task[Outcome]) -> None:
            outcomes.append((False, asyncio.CancelledError()) if task.cancelled() else task.result())
            done.release()

        def start() -> None:
            tasks.append(chosen.create_task(_outcome(lambda: self.run(function, timeout)), context=context))
            tasks[0].add_done_callback(ended)

        def cancel() -> None:
            with contextlib.suppress(RuntimeError):
                chosen.call_soon_threadsafe(lambda: [task.cancel() for task in tasks])

        with contextlib.nullcontext() if ending is None else ending(cancel):
            chosen.call_soon_threadsafe(start)
            try:
                while not done.acquire(timeout=1.0):
                    if chosen.is_closed():  # it ended before the task could
                        raise asyncio.CancelledError
            except BaseException:
                cancel()
                raise
        ok, value = outcomes[0]
        if ok:
            return value
        try:
            raise value
        finally:
            del value  # the traceback holds this frame

    def close(self) -> None:
        """Cancel what runs on the loop of our own and let its thread end; nothing is waited for."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            loop.call_soon_threadsafe(loop.stop)

    def _leave(self, task: asyncio.Task[Any]) -> None:
        with self._lock:
            self.abandoned += 1
        # It is counted; asyncio need not print at the interpreter's end that it is still there.
        task._log_destroy_pending = False  # type: ignore[attr-defined]

        def ended(_: object) -> None:
            with self._lock:
                self.abandoned -= 1

        task.add_done_callback(ended)

    def _own_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=_serve, args=(self._loop,), name="sandboxd tool loop", daemon=True
                )
                self._thread.start()
            return self._loop


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=GRACE_SECONDS))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()
