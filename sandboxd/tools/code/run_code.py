"""``run_code``: the one tool that is not validated but contained. A program in, the story of its run out.

What may be asked for stands in ``tools.code.offer``, what the model sees in ``tools.code.view``. Tools that
code may call are handed to the run; how their calls travel is ``tools.code.link``'s matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import json
import logging
import re
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from sandboxd.errors import (
    Busy,
    ConnectionLost,
    InvalidRequest,
    PolicyError,
    SandboxError,
    Unavailable,
)
from sandboxd.protocol.run_header import CALLS_MOST
from sandboxd.tools.code import offer, view
from sandboxd.tools.code.advice import Surroundings, advice, missing_module
from sandboxd.tools.code.kept import Kept
from sandboxd.tools.code.link import RunTools
from sandboxd.tools.code.pictures import pictures_of
from sandboxd.tools.code.review import Review, review, review_async
from sandboxd.tools.pipeline.running import aside
from sandboxd.tools.result import Refused
from sandboxd.tools.schema import stubs

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from sandboxd.client.async_sandbox import AsyncSandbox
    from sandboxd.client.result import Result
    from sandboxd.client.sandbox import Sandbox
    from sandboxd.tools.code.link import ToolCall
    from sandboxd.tools.code.offer import InputFile
    from sandboxd.tools.code.review import Reviewer
    from sandboxd.tools.pipeline.rates import Budget
    from sandboxd.tools.pipeline.running import Coroutines, Threads
    from sandboxd.tools.pipeline.tool import Tool

__all__ = ["RunCode"]

PACKAGES: Final = 2000  # of which some are shown

_LOG = logging.getLogger("sandboxd.tools")
_WIDEST: Final = re.compile(r"is wider than the (\S+) of")

_LISTING: Final[dict[str, Any]] = {"filename": "list_packages.py", "results": False}
# Runs in a cell: what could be imported beside the standard library. Nothing is imported for it.
_LIST_PACKAGES: Final = """\
import json, pkgutil, sys
places = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
print(json.dumps(sorted({found.name for found in pkgutil.iter_modules(places)})))
"""


class RunCode:
    """The tool of one dispatcher, and the Results of its latest runs (``kept``)."""

    def __init__(
        self,
        sandbox: Sandbox | AsyncSandbox | None,
        tools: Iterable[Tool],
        budget: Budget,
        reviewer: Reviewer | None,
        threads: Threads,
        coroutines: Coroutines,
        call_from_code: Callable[..., bytes],
    ) -> None:
        """Programs may call those of *tools* that code is granted, through *call_from_code*, as often as *budget* says
        for one run. *threads* and *coroutines* run what would hold up a caller's loop.
        """
        self._sandbox = sandbox
        self._most_calls = min(budget.calls_per_run, CALLS_MOST)
        self._reviewer = reviewer
        self._threads = threads
        self._coroutines = coroutines
        self._call_from_code = call_from_code
        self._granted = [one for one in tools if "code" in one.callers]
        self._module = stubs.cell_module(self._granted)
        self._longest = offer.longest_timeout(sandbox)
        self._packages: list[str] | None = None
        self.kept = Kept()
        is_async = sandbox is not None and inspect.iscoroutinefunction(sandbox.run)
        self.tool: Tool = offer.as_tool(self._run_async if is_async else self._run, sandbox, self._granted)
        if sandbox is not None and not is_async:
            self.tool.function_async = self._run_in_thread

    def close(self) -> None:
        """Free the kept Results."""
        self.kept.close()

    # A call

    def _run(
        self,
        code: str,
        language: str = "python",
        timeout: float | None = None,
        files: list[InputFile] | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> dict[str, Any]:
        """On a Sandbox. Asynchronous tools that the program calls run on *loop*, else on one of the dispatcher's."""
        sandbox = cast("Sandbox | None", self._sandbox)
        if sandbox is None:
            raise Refused("unavailable", "There is no sandbox here, so no code can be run.", "Use the other tools.")
        arguments = offer.run_arguments(language, timeout, files or [])
        calls = _Calls(partial(self._call_from_code, loop=loop))
        try:
            if self._granted:
                result = sandbox._run_with_tools(code, self._toolbox(calls), **arguments)
            else:
                result = sandbox.run(code, **arguments)
        except (SandboxError, RuntimeError) as error:
            raise _refused(error) from error
        if self._wants_packages(result):
            with contextlib.suppress(SandboxError, RuntimeError):  # the advice is shorter then
                self._learn(sandbox.run(_LIST_PACKAGES, **_LISTING))
        value = self._value(result, calls, files or [])
        hook = self._reviewer
        if hook is not None and result.status == "ok":
            with _Judging(result):
                _judge(value, review(hook, self._subject(code, result, value), partial(self._wait, loop)))
        self.kept.add(result)
        return value

    async def _run_in_thread(self, **arguments: Any) -> dict[str, Any]:
        """``_run`` for a caller's loop, which goes on meanwhile."""
        run = partial(self._run, **arguments, loop=asyncio.get_running_loop())
        value: dict[str, Any] = await self._threads.run_async(run, None)
        return value

    async def _run_async(
        self, code: str, language: str = "python", timeout: float | None = None, files: list[InputFile] | None = None
    ) -> dict[str, Any]:
        """On an AsyncSandbox. What the program made is looked at in threads: the loop is the caller's."""
        sandbox = cast("AsyncSandbox", self._sandbox)
        arguments = offer.run_arguments(language, timeout, files or [])
        calls = _Calls(partial(self._call_from_code, loop=asyncio.get_running_loop()))
        try:
            if self._granted:
                result = await sandbox._run_with_tools(code, self._toolbox(calls), **arguments)
            else:
                result = await sandbox.run(code, **arguments)
        except (SandboxError, RuntimeError) as error:
            raise _refused(error) from error
        if self._wants_packages(result):
            with contextlib.suppress(SandboxError, RuntimeError):
                self._learn(await sandbox.run(_LIST_PACKAGES, **_LISTING))
        value = await aside(self._value, result, calls, files or [])
        hook = self._reviewer
        if hook is not None and result.status == "ok":
            with _Judging(result):
                subject = await aside(self._subject, code, result, value)
                _judge(value, await review_async(hook, subject, self._in_thread))
        await aside(self.kept.add, result)  # it may free hundreds of megabytes of earlier ones
        return value

    def _wait(self, loop: asyncio.AbstractEventLoop | None, verdict: Awaitable[Any]) -> Any:
        async def wait() -> Any:
            return await verdict

        return self._coroutines.run_elsewhere(wait, None, loop)

    async def _in_thread(self, function: Callable[[], Any]) -> Any:
        return await self._threads.run_async(function, None)

    def _toolbox(self, calls: _Calls) -> RunTools:
        return RunTools(module=self._module, calls=self._most_calls, call=calls)

    def _value(self, result: Result, calls: _Calls, files: Sequence[InputFile]) -> dict[str, Any]:
        names, paths = [one.name for one in self._granted], sorted(one.path for one in files)
        around = Surroundings(names, paths, self._packages, self._longest)
        return view.value_of(result, tool_calls=calls.count, advice=advice(result, around), review=None)

    @staticmethod
    def _subject(code: str, result: Result, value: dict[str, Any]) -> Review:
        return Review(code, result, value, pictures_of(result)[0])

    # What is installed

    def _wants_packages(self, result: Result) -> bool:
        return self._packages is None and missing_module(result) not in (None, "tools")

    def _learn(self, listed: Result) -> None:
        """Keep the names that the listing printed: what an interpreter has installed stays as it is."""
        try:
            names = json.loads(listed.stdout)
        except ValueError:  # it was stopped
            return
        if isinstance(names, list):
            self._packages = [
                one for one in names[:PACKAGES] if isinstance(one, str) and one.isidentifier() and one[0] != "_"
            ]


class _Calls:
    """The calls of one run, counted on their way to the dispatcher.

    They come from several threads, and see the contextvars of whoever began the run.
    """

    def __init__(self, call: Callable[[bytes, ToolCall], bytes]) -> None:
        self._call = call
        self._each: list[None] = []  # append is atomic, += is not
        self._context = contextvars.copy_context()

    @property
    def count(self) -> int:
        return len(self._each)

    def __call__(self, body: bytes, call: ToolCall) -> bytes:
        self._each.append(None)
        return self._context.copy().run(self._call, body, call)  # only one thread can be in a context


class _Judging:
    """Around a review: what it raises is the host's fault, is logged, and nothing of the run is shown."""

    def __init__(self, result: Result) -> None:
        self._result = result

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        self._result.close()
        if isinstance(error, Exception):
            _LOG.error("the review of run %s failed", self._result.id, exc_info=error)
            raise Refused(
                "internal",
                "The program ran, but the check of its result failed on the host, so the result is withheld.",
                "Say so to the user; another program will most likely fare the same.",
            ) from None


def _judge(value: dict[str, Any], objection: str | None) -> None:
    if objection is not None:
        value["review"] = objection
        value["next"] = "The result was not accepted. Mend what the review says and send the whole program again."


def _refused(error: Exception) -> Refused:
    """What a model is told when a program did not run to its end. Stages, paths and fixes are the log's alone."""
    match error:
        case Busy():
            wait = max(0.1, error.retry_after)
            return Refused(
                "busy", "The sandbox is full, and the program was not started.", f"Send it again in {wait:.1f} s."
            )
        case InvalidRequest():
            return Refused("invalid_arguments", f"{error.field}: {error.problem}.", "Mend it and send the call again.")
        case PolicyError() if error.key == "limits.wall_seconds":
            widest = _WIDEST.search(error.message)
            allowed = f"at most {widest[1]} s" if widest else "less"
            return Refused(
                "invalid_arguments",
                f"timeout: it is more than this sandbox allows, which is {allowed}.",
                f"Ask for {allowed}, or leave it out.",
            )
        case ConnectionLost() if error.may_have_started:
            told = "The sandbox went away: the program may have started, and may have called tools."
            hint = "Send it again only if doing it twice does no harm."
        case ConnectionLost():
            told, hint = "The sandbox went away before the program started.", "Send it again."
        case Unavailable() | PolicyError() | RuntimeError():
            told, hint = "The sandbox cannot run programs now.", "Go on without running code, and say so."
        case _:
            _LOG.error("run_code failed", exc_info=error)
            return Refused("internal", "The sandbox failed; the outcome is unknown.", "Send it again, once.")
    _LOG.error("run_code is unavailable", exc_info=error)
    return Refused("unavailable", told, hint)
