"""The Dispatcher: one pipeline for every call of a tool, whoever makes it.

    known tool -> caller allowed -> arguments valid -> rate limit and budget -> approval -> run with timeout
               -> result valid and bounded -> audit

Everything but approval and running is shared between the synchronous and the asynchronous driver. A call always comes
to a ToolResult; only misuse by the host program raises. Safe in threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, cast

from sandboxd._util.closeable import Closing
from sandboxd.tools.code.run_code import RunCode
from sandboxd.tools.pipeline import answers, recording
from sandboxd.tools.pipeline.approval import Question
from sandboxd.tools.pipeline.rates import Bucket, Budget, Spending
from sandboxd.tools.pipeline.recording import ToolCalled
from sandboxd.tools.pipeline.running import Coroutines, Threads, aside
from sandboxd.tools.pipeline.tool import CALLERS, Tool
from sandboxd.tools.result import Refused, ToolResult, refusal, shown
from sandboxd.tools.schema import checking, values
from sandboxd.tools.vendors import vendors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from sandboxd.audit import AuditLog
    from sandboxd.client.async_sandbox import AsyncSandbox
    from sandboxd.client.result import Result
    from sandboxd.client.sandbox import Sandbox
    from sandboxd.tools.code.attempts import Attempts
    from sandboxd.tools.code.link import ToolCall
    from sandboxd.tools.code.review import Reviewer
    from sandboxd.tools.pipeline.approval import Approve

_LOG = logging.getLogger("sandboxd.tools")

RESULT_BYTES = {"model": 64 << 10, "code": 8 << 20}
RUN_CODE = "run_code"
_RESERVED = ("aio", "ToolError")  # what the module `tools` of a cell has besides tools
_FRAME_BYTES = values.ARGUMENTS_BYTES + 4096


class _Call:
    """One call on its way through the pipeline."""

    __slots__ = ("begun", "caller", "given", "name", "plain", "run", "text", "tool")

    def __init__(self, name: str, arguments: Any, caller: str, run: ToolCall | None) -> None:
        self.begun = time.monotonic()
        self.name = name
        self.caller = caller
        self.run = run
        self.plain = arguments  # JSON values, as given
        self.text = ""  # the same as compact JSON
        self.tool: Tool | None = None
        self.given: dict[str, Any] = {}  # what the function gets


class Dispatcher(Closing):
    """Tools, and everything that stands between them and their callers. To be closed, or used with ``with``.

    *tools* are Tools or plain annotated functions; ``run_code`` is there by itself and needs *sandbox*. *approve* is
    asked for tools with approval=True: ``approve(tool, arguments, caller, run_id)``, synchronous or not; anything but
    True refuses. *review* looks at what run_code brings before it is shown. *budget* is a count of calls, or a Budget.
    *audit* is a path, or an AuditLog, for a record of every call. *max_result_bytes* bounds results for both kinds of
    callers (default: 64 KiB of JSON for a model, 8 MiB for code). *max_abandoned*: how many functions may go on after
    their time limit before tools that need a thread are refused as busy.

    Raises ValueError for names that are taken and counts that mean nothing, TypeError for what is no tool, AuditError
    when the log cannot be opened.
    """

    def __init__(
        self,
        tools: Iterable[object] = (),  # a list of several tools is inferred as list[object]
        *,
        sandbox: Sandbox | AsyncSandbox | None = None,
        approve: Approve | None = None,
        review: Reviewer | None = None,
        budget: int | Budget | None = None,
        audit: str | Path | AuditLog | None = None,
        max_result_bytes: int | None = None,
        max_abandoned: int = 8,
    ) -> None:
        self._closed = True
        self.tools: Mapping[str, Tool] = _named(tools)
        if sandbox is not None and (isinstance(sandbox, type) or not hasattr(sandbox, "_run_with_tools")):
            raise TypeError(f"sandbox must be a Sandbox or an AsyncSandbox, not {shown(sandbox)}.")
        for what, callback in (("approve", approve), ("review", review)):
            if callback is not None and not callable(callback):
                raise TypeError(f"{what} must be a function, not {shown(callback)}.")
        self.sandbox = sandbox
        self.review = review
        self.budget = budget if isinstance(budget, Budget) else Budget(budget)
        unknown = [name for name in self.budget.per_tool if name not in self.tools and name != RUN_CODE]
        if unknown:
            raise ValueError(f"The budget names {unknown[0]!r}, and there is no such tool.")
        if max_result_bytes is not None and max_result_bytes < 1:
            raise ValueError(f"max_result_bytes must be positive, not {max_result_bytes!r}.")
        self._approve = approve
        self._result_bytes = RESULT_BYTES if max_result_bytes is None else dict.fromkeys(CALLERS, max_result_bytes)
        self._spending = Spending(self.budget)
        self._buckets = {tool.name: Bucket(tool.rate) for tool in self.tools.values() if tool.rate is not None}
        self._threads = Threads(max_abandoned)
        self._coroutines = Coroutines()
        self._code = RunCode(
            sandbox, self.tools.values(), self.budget, review, self._threads, self._coroutines, self._call_from_code
        )
        self._known: dict[str, Tool] = {**self.tools, RUN_CODE: self._code.tool}
        self._log, self._owns_log = recording.opened(audit)
        self._closed = False

    # What a host program calls

    def call(self, name: str, arguments: Mapping[str, Any] | str | bytes, caller: str = "model") -> ToolResult:
        """Call the tool *name*; *arguments* is a JSON object, or its text. *caller* is "model" or "code".

        Raises RuntimeError when the dispatcher is closed, ValueError for another *caller*.
        """
        self._usable(caller)
        return self._drive(_Call(name, arguments, caller, None), None)

    async def acall(self, name: str, arguments: Mapping[str, Any] | str | bytes, caller: str = "model") -> ToolResult:
        """``call`` for asyncio: asynchronous tools run on this loop, others in threads. Cancelling reaches the tool."""
        self._usable(caller)
        return await self._drive_async(_Call(name, arguments, caller, None))

    def schemas(
        self,
        vendor: Literal["openai", "anthropic", "mcp"],
        *,
        code_execution: str | None = vendors.ANTHROPIC_CODE_CALLER,
    ) -> list[dict[str, Any]]:
        """The tools as *vendor*'s interface takes them; without a sandbox, without run_code. Raises ValueError.

        *code_execution* is what Anthropic's ``allowed_callers`` calls code. None for a request without Anthropic's own
        code execution tool, which those names ask for: tools are then for direct calls alone, and those that only code
        may call are left out. Code in the sandbox may call what it may either way.
        """
        offered = [*self.tools.values(), *([] if self.sandbox is None else [self._code.tool])]
        return vendors.schemas(vendor, offered, code_execution)

    def stubs(self) -> str:
        """The tools that code may call, as typed stubs for a prompt."""
        from sandboxd.tools.schema import stubs

        return stubs.prompt_stubs(list(self.tools.values()))

    def handle(
        self, message: object, *, attempts: Attempts | None = None, pictures: bool = True
    ) -> list[dict[str, Any]]:
        """Do the calls of a model's *message*, in OpenAI's or Anthropic's form; returns the messages that answer it.

        The calls go side by side. *attempts* counts runs of code. *pictures*: those that a program made are shown to
        the model. Raises ValueError for what is no message of either form.
        """
        from sandboxd.tools.vendors import messages

        return messages.handle(self, message, attempts, pictures)

    async def ahandle(
        self, message: object, *, attempts: Attempts | None = None, pictures: bool = True
    ) -> list[dict[str, Any]]:
        """``handle`` for asyncio."""
        from sandboxd.tools.vendors import messages

        return await messages.ahandle(self, message, attempts, pictures)

    def tool(self, name: str) -> Tool | None:
        """The tool of that name, run_code included."""
        return self._known.get(name)

    def result(self, run: str) -> Result:
        """The Result of a latest run of run_code, by its id. Raises KeyError when it is unknown, or no longer kept."""
        return self._code.kept.result(run)

    def file(self, reference: str) -> bytes:
        """What a model was told of by *reference* in a result of run_code. Raises KeyError as ``result`` does."""
        return self._code.kept.read(reference)

    @property
    def abandoned(self) -> int:
        """Functions of tools that are still running after their time limit."""
        return self._threads.abandoned + self._coroutines.abandoned

    @property
    def calls_left(self) -> int | None:
        """Calls left of the budget; None when it has no bound in all."""
        return self._spending.left

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Refuse further calls; asynchronous tools under way are cancelled. The sandbox stays its owner's."""
        self._closed = True
        self._threads.close()
        self._coroutines.close()
        self._code.close()
        log, self._log = self._log, None
        if log is not None and self._owns_log:
            log.close()

    # What code in a cell calls, through link.py

    def _call_from_code(self, body: bytes, run: ToolCall, loop: asyncio.AbstractEventLoop | None = None) -> bytes:
        """One call of the code of *run*: bytes in, bytes out, in a worker thread; never raises.

        *loop*, where the run belongs to an ``acall``, is where asynchronous tools run.
        """
        try:
            return self._from_code(body, run, loop).to_json().encode()
        except BaseException:
            _LOG.exception("A call from code failed in the dispatcher.")
            return refusal("internal", "The call failed in the host program.", "Do not repeat it.").to_json().encode()

    def _from_code(self, body: bytes, run: ToolCall, loop: asyncio.AbstractEventLoop | None) -> ToolResult:
        call = _Call("", None, "code", run)
        try:
            self._check_open()
            call.name, call.plain = _parts(values.parse(body, _FRAME_BYTES))
        except Refused as error:
            return self._ended(call, answers.of_error(None, "", error))
        return self._drive(call, loop)

    # The pipeline

    def _drive(self, call: _Call, loop: asyncio.AbstractEventLoop | None) -> ToolResult:
        try:
            tool = self._admit(call)
            if tool.approval:
                self._question(call).ask(self._coroutines, loop)
                self._check_open()  # a yes that took its time
            if tool.is_async:
                ending = None if call.run is None else call.run.run.cancelling
                value = self._coroutines.run_elsewhere(partial(tool.function, **call.given), tool.timeout, loop, ending)
            elif tool.timeout is None:
                value = tool.function(**call.given)
            else:
                value = self._threads.run(partial(tool.function, **call.given), tool.timeout)
        except BaseException as error:
            result = self._ended(call, answers.of_error(call.tool, call.name, error))
            # Nobody can cancel a thread: that was the tool's own. And code in a cell ends no program on the host.
            if isinstance(error, Exception | asyncio.CancelledError) or call.run is not None:
                return result
            raise
        return self._ended(call, self._answer(call, tool, value))

    async def _drive_async(self, call: _Call) -> ToolResult:
        """``_drive`` on the caller's loop, which long arguments do not hold up: those of code are a program's."""
        is_small = values.is_small(call.plain)
        try:
            tool = self._admit(call) if is_small else await aside(self._admit, call)
            if tool.approval:
                await self._question(call).ask_async(self._threads)
                self._check_open()
            if tool.function_async is not None:
                value = await self._coroutines.run(partial(tool.function_async, **call.given), tool.timeout)
            else:
                value = await self._threads.run_async(partial(tool.function, **call.given), tool.timeout)
        except BaseException as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                self._ended(call, refusal("unavailable", "The caller went away."))
                raise
            refused = answers.of_error(call.tool, call.name, error)
            result = self._ended(call, refused) if is_small else await aside(self._ended, call, refused)
            if isinstance(error, Exception | asyncio.CancelledError):
                return result
            raise
        result = self._answer(call, tool, value)
        return self._ended(call, result) if is_small else await aside(self._ended, call, result)

    def _admit(self, call: _Call) -> Tool:
        """The steps before approval. Raises Refused."""
        name = call.name
        log = self._log
        if log is not None:
            recording.check(log)
        tool = self._known.get(name) if isinstance(name, str) else None  # pyright: ignore[reportUnnecessaryIsInstance]
        if tool is None:
            self._unknown(call)
        call.tool = tool
        if call.caller not in tool.callers:
            self._not_for(call)
        if isinstance(call.plain, str | bytes | bytearray):
            call.plain = values.parse(call.plain)
        elif isinstance(call.plain, Mapping) and not isinstance(call.plain, dict):
            call.plain = dict(cast("Mapping[str, Any]", call.plain))
        call.text = values.arguments_json(call.plain)
        call.given = tool._arguments.read(call.text, call.plain)
        bucket = self._buckets.get(name)
        wait = 0.0 if bucket is None else bucket.take()
        if wait:
            allowed = "" if tool.rate is None else tool.rate.text
            raise Refused(
                "rate_limited",
                f"{name} may be called {allowed}, and was called more often.",
                f"Call it again in {max(wait, 0.1):.1f} seconds; do something else meanwhile.",
            )
        self._spending.take(name, None if call.run is None else call.run.run)
        return tool

    def _unknown(self, call: _Call) -> NoReturn:
        names = sorted(tool.name for tool in self.tools.values() if call.caller in tool.callers)
        if call.caller == "model" and self.sandbox is not None:
            names.append(RUN_CODE)
        near = checking.nearest(call.name, names)
        hint = f"Did you mean {near}? " if near else ""
        known = f"There are: {', '.join(names[:50])}." if names else "There are no tools here."
        raise Refused("unknown_tool", f"There is no tool {shown(call.name)}.", hint + known)

    @staticmethod
    def _not_for(call: _Call) -> NoReturn:
        if call.caller == "model":
            raise Refused(
                "caller_not_allowed",
                f"{call.name} can only be called by code in the sandbox.",
                f"Call it as tools.{call.name}(...) in a program that you give to run_code.",
            )
        raise Refused(
            "caller_not_allowed",
            f"{call.name} cannot be called by code.",
            "The model can call it directly, in a message.",
        )

    def _question(self, call: _Call) -> Question:
        return Question(self._approve, call.name, call.text, call.caller, call.run)

    def _answer(self, call: _Call, tool: Tool, value: Any) -> ToolResult:
        most = tool.max_result_bytes or self._result_bytes[call.caller]
        # More than that no answer to code can hold (sandboxd/inside/channel.py).
        return answers.of_value(tool, value, min(most, RESULT_BYTES["code"]) if call.run is not None else most)

    def _check_open(self) -> None:
        if self._closed:
            raise Refused("unavailable", "The host program has closed its dispatcher.", "No further call will work.")

    def _usable(self, caller: str) -> None:
        if self._closed:
            raise RuntimeError("This Dispatcher is closed.")
        if caller not in CALLERS:
            raise ValueError(f'A caller is "model" or "code", not {caller!r}.')

    def _refuse(self, name: str, arguments: Any, caller: str, result: ToolResult) -> ToolResult:
        """*result*, which refuses a call that does not enter the pipeline at all: it is recorded like any other."""
        return self._ended(_Call(name, arguments, caller, None), result)

    def _ended(self, call: _Call, result: ToolResult) -> ToolResult:
        """The last step: the record."""
        log = self._log
        if log is not None:
            run = None if call.run is None else call.run.id
            if call.tool is self._code.tool and result.ok:
                run = result.value["id"]  # the run that this call made
            record = ToolCalled(call.name, call.caller, run, call.text, call.plain, result, call.begun)
            recording.append(log, record)
        return result


def _parts(frame: object) -> tuple[Any, dict[str, Any]]:
    """Tool and arguments in a frame of code's. Raises Refused."""
    parts = cast("dict[str, Any]", frame) if isinstance(frame, dict) else {}
    if parts.keys() != {"tool", "arguments"} or not isinstance(parts["arguments"], dict):
        raise Refused(
            "invalid_arguments",
            "A call names one tool, and gives an object with its arguments.",
            "Call the functions of the module tools.",
        )
    return parts["tool"], cast("dict[str, Any]", parts["arguments"])


def _named(tools: Iterable[object]) -> dict[str, Tool]:
    if isinstance(tools, Tool) or not isinstance(tools, Iterable):
        raise TypeError("A Dispatcher is made with a list of tools: Dispatcher([query, send]).")
    made: dict[str, Tool] = {}
    for given in tools:
        one = given if isinstance(given, Tool) else Tool(cast("Callable[..., Any]", given))
        if one.name == RUN_CODE:
            raise ValueError("run_code is the dispatcher's own tool; another cannot have its name.")
        if one.name in _RESERVED:
            raise ValueError(f"In a cell tools.{one.name} is something else; give the tool another name.")
        if one.name in made:
            raise ValueError(f"Two tools are called {one.name!r}.")
        made[one.name] = one
    return made
