"""``Dispatcher.handle``: every call of one message, side by side, answered in the message's order."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import queue
import threading
from typing import TYPE_CHECKING, Any, Final, Protocol

from sandboxd.tools.pipeline.running import aside
from sandboxd.tools.result import Refused, refusal
from sandboxd.tools.schema import values
from sandboxd.tools.vendors import forms, vendors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sandboxd.client.result import Result
    from sandboxd.tools.code.attempts import Attempts
    from sandboxd.tools.pipeline.tool import Caller, Tool
    from sandboxd.tools.result import ToolResult
    from sandboxd.tools.vendors.forms import Call, Event

__all__ = ["ahandle", "handle"]

_LOG = logging.getLogger("sandboxd.tools")

AT_ONCE: Final = 16
"""Calls of one message that are under way at the same time."""


class Dispatching(Protocol):
    """The part of a Dispatcher that is needed here."""

    def call(self, name: str, arguments: Any, caller: Caller = "model") -> ToolResult: ...
    async def acall(self, name: str, arguments: Any, caller: Caller = "model") -> ToolResult: ...
    def _refuse(self, name: str, arguments: Any, caller: Caller, result: ToolResult) -> ToolResult: ...
    def _usable(self, caller: str) -> None: ...
    def tool(self, name: str) -> Tool | None: ...
    def result(self, run: str) -> Result: ...


def handle(dispatcher: Dispatching, message: object, attempts: Attempts | None, pictures: bool) -> list[dict[str, Any]]:
    """The messages that answer *message*. Raises ValueError as ``forms.calls_of`` does, and RuntimeError when the
    dispatcher is closed; once a call has begun, nothing but what ends the program (KeyboardInterrupt, SystemExit).
    """
    steps = _steps(dispatcher, message, attempts, pictures)
    if len(steps) == 1:
        return forms.replies([steps[0].answered(steps[0].called())])
    answers: list[Event | None] = [None] * len(steps)
    failures: list[BaseException] = []
    pending: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(steps)):
        pending.put(number)

    def work() -> None:
        while not failures:
            try:
                number = pending.get_nowait()
            except queue.Empty:
                return
            try:
                answers[number] = steps[number].answered(steps[number].called())
            except BaseException as error:
                failures.append(error)

    # Daemon threads: a call that hangs must not delay the interpreter's end.
    threads: list[threading.Thread] = []
    try:
        while len(threads) < min(len(steps), AT_ONCE):
            context = contextvars.copy_context()
            thread = threading.Thread(target=context.run, args=(work,), name="sandboxd-handle", daemon=True)
            thread.start()
            threads.append(thread)
    except (RuntimeError, MemoryError):  # no more threads in this process; calls have begun, so there is no way back
        _LOG.warning("A message's calls have %d threads and that of the caller: no more can be started.", len(threads))
        work()
    except BaseException as interrupt:
        failures.append(interrupt)  # no further call begins
        raise
    try:
        for thread in threads:
            thread.join()
    except BaseException as interrupt:
        failures.append(interrupt)
        raise
    if failures:
        raise failures[0]
    return forms.replies([one for one in answers if one is not None])


async def ahandle(
    dispatcher: Dispatching, message: object, attempts: Attempts | None, pictures: bool
) -> list[dict[str, Any]]:
    """As ``handle``, on the caller's loop; when it is cancelled, so are the calls. The loop awaits: answers, and the
    pictures in them, are made in threads.
    """
    steps = _steps(dispatcher, message, attempts, pictures)
    room = asyncio.Semaphore(AT_ONCE)

    async def answer(step: _Step) -> Event:
        async with room:
            return await aside(step.answered, await step.acalled())

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answer(step)) for step in steps]
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from None
    answers = [task.result() for task in tasks]
    return await aside(forms.replies, answers) if any(one.pictures for one in answers) else forms.replies(answers)


def _steps(dispatcher: Dispatching, message: object, attempts: Attempts | None, pictures: bool) -> Sequence[_Step]:
    calls = forms.calls_of(message)
    if calls:
        dispatcher._usable("model")  # misuse raises here, before any call has begun
    if not calls and attempts is not None:
        attempts.answered()
    # Attempts are counted here, in the message's order, not in the order in which threads come to them.
    return [_Step(dispatcher, call, attempts, pictures) for call in calls]


class _Step:
    """One call, from the message to its answer."""

    def __init__(self, dispatcher: Dispatching, call: Call, attempts: Attempts | None, pictures: bool) -> None:
        self._dispatcher = dispatcher
        self._call = call
        self._attempts = attempts if call.name == forms.RUN_CODE else None
        self._number = None if self._attempts is None else self._attempts.begin()
        self._pictures = pictures

    def called(self) -> ToolResult:
        call = self._call
        try:
            return self._too_many() or self._dispatcher.call(call.name, self._arguments(), call.caller)
        except Exception:
            return self._failed()

    async def acalled(self) -> ToolResult:
        call = self._call
        try:
            refused = self._too_many()
            if refused is not None:
                return refused
            is_small = values.is_small(call.arguments)
            arguments = self._arguments() if is_small else await aside(self._arguments)
            return await self._dispatcher.acall(call.name, arguments, call.caller)
        except Exception:
            return self._failed()

    def _failed(self) -> ToolResult:
        """Of a dispatcher that was closed meanwhile, most likely. Raising would lose what the other calls did."""
        _LOG.exception("The call of %s failed in the dispatcher.", self._call.name)
        return refusal("internal", "The call failed in the host program.", "Do not repeat it; tell the user.")

    def _too_many(self) -> ToolResult | None:
        if self._attempts is None or self._number is not None:
            return None
        call = self._call
        return self._dispatcher._refuse(call.name, call.arguments, call.caller, self._attempts.used_up())

    def _arguments(self) -> Any:
        """What the dispatcher is to check; text that is no JSON goes there as it is and is refused there."""
        call = self._call
        if call.form == "anthropic":
            return call.arguments
        arguments = call.arguments
        if isinstance(arguments, str):
            try:
                arguments = values.parse(arguments)
                values.check(arguments)
            except Refused:
                return call.arguments
        tool = self._dispatcher.tool(call.name)
        return arguments if tool is None or not isinstance(arguments, dict) else vendors.from_openai(tool, arguments)

    def answered(self, result: ToolResult) -> Event:
        call = self._call
        note = ""
        if self._attempts is not None and self._number is not None:
            note = self._attempts.end(self._number, result)
        pictures, more = self._shown(result)
        note = "\n".join(part for part in (more, note) if part)
        text = forms.text_of(call.name, result, call.caller, note)
        return forms.Event(call, text, not result.ok, pictures)

    def _shown(self, result: ToolResult) -> tuple[Sequence[Any], str]:
        if not (self._pictures and result.ok and self._call.name == forms.RUN_CODE and self._call.caller == "model"):
            return (), ""
        try:
            kept = self._dispatcher.result(result.value["id"])
        except KeyError:  # made room for others already
            return (), ""
        return forms.picture_notes(kept)
