"""Asking a person, or the program for one, before a call is made.

A grant is for one call with exactly the arguments that were shown. When code asked, its whole cell stands still until
the answer is there, so that it can neither go on nor change anything meanwhile. One run asks one question at a time,
and none after some were refused: a program must not wear out whoever answers.
"""

from __future__ import annotations

import inspect
import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from sandboxd.errors import SandboxError
from sandboxd.tools.result import Refused
from sandboxd.tools.schema import values

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from sandboxd.tools.code.link import ToolCall
    from sandboxd.tools.pipeline.rates import RunState
    from sandboxd.tools.pipeline.running import Coroutines, Threads

    Approve = Callable[[str, dict[str, Any], str, str | None], Any]

REFUSALS: Final = 3
"""After which a run's further calls are refused without a question."""

_LOG = logging.getLogger("sandboxd.tools")


class Question:
    """One call that needs a yes: *tool* with the arguments of which *text* is the JSON, asked for by *caller*.

    *approve* is the host program's callback; None refuses, and so does anything but True, or an exception.
    """

    def __init__(self, approve: Approve | None, tool: str, text: str, caller: str, run: ToolCall | None) -> None:
        self._approve = approve
        self._tool = tool
        self._text = text
        self._caller = caller
        self._run = run

    def ask(self, coroutines: Coroutines, loop: asyncio.AbstractEventLoop | None) -> None:
        """Ask in this thread; an asynchronous callback runs on *loop*, or on one of *coroutines*. Raises Refused."""
        if self._run is None or self._approve is None:
            self._judge(self._answer(coroutines, loop))
            return
        state: RunState = self._run.run.state
        with state.asking:  # before the cell is frozen: those that wait hold nothing that the one who asks needs
            if state.refused >= REFUSALS:
                raise Refused(
                    "approval_denied",
                    f"{self._tool} was not called: {REFUSALS} approvals were refused to this run, "
                    "and it can ask for no more.",
                    "Make no more calls that need an approval; go on without them, or tell the user what you need.",
                )
            try:
                with self._run.frozen():
                    answer = self._answer(coroutines, loop)
            except (OSError, SandboxError) as error:  # also when the run was over before the answer came
                _LOG.warning("A run could not be kept frozen for an approval: %s", error)
                raise Refused(
                    "unavailable",
                    f"{self._tool} needs an approval, which cannot be asked for now.",
                    "Go on without it.",
                ) from None
            if answer is not True:
                state.refused += 1
        self._judge(answer)

    def _answer(self, coroutines: Coroutines, loop: asyncio.AbstractEventLoop | None) -> Any:
        try:
            answer = self._asked()
            if inspect.isawaitable(answer):
                answer = coroutines.run_elsewhere(partial(_awaited, answer), None, loop)
        except Exception:
            self._failed()
            return None
        return answer

    async def ask_async(self, threads: Threads) -> None:
        """Ask on the running loop; a synchronous callback gets a thread, since it may wait for long. Raises Refused."""
        answer: Any = None
        try:
            if inspect.iscoroutinefunction(self._approve):
                answer = await self._asked()
            else:
                answer = await threads.run_async(self._asked, None)
                if inspect.isawaitable(answer):
                    answer = await answer
        except Exception:
            self._failed()
            answer = None
        self._judge(answer)

    def _asked(self) -> Any:
        if self._approve is None:
            return None
        # A copy of its own: nothing that the callback does to it changes what the function gets.
        shown = values.plain_copy(self._text)
        return self._approve(self._tool, shown, self._caller, None if self._run is None else self._run.id)

    def _failed(self) -> None:
        _LOG.exception("The approval callback failed for %s; that refuses the call.", self._tool)

    def _judge(self, answer: object) -> None:
        if answer is not True:
            raise Refused(
                "approval_denied",
                f"{self._tool} was not approved with these arguments, and was not called.",
                "Do not repeat the call; go on without it, or tell the user what you need it for.",
            )


async def _awaited(awaitable: Any) -> Any:
    return await awaitable
