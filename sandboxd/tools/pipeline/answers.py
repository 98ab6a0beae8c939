"""From what a function returned or raised to the ToolResult that its caller gets."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any

from sandboxd.tools.pipeline.running import NoThread, TimedOut
from sandboxd.tools.result import Refused, ToolError, ToolResult, readable, refusal
from sandboxd.tools.schema import values

if TYPE_CHECKING:
    from sandboxd.tools.pipeline.tool import Tool

_LOG = logging.getLogger("sandboxd.tools")


def of_value(tool: Tool, value: Any, most: int) -> ToolResult:
    """The result for what *tool* returned: checked, plain, at most *most* bytes of JSON."""
    try:
        values.measure(value, most)
        if tool._returns is not None:
            value = tool._returns.check(value)
        plain, text = values.result_json(value, most)
    except values.TooLarge as error:
        size = f"more than {most}" if error.size is None else f"{error.size}"
        return refusal(
            "result_too_large",
            f"The result of {tool.name} is {size} bytes of JSON, and {most} are allowed.",
            "Ask for less: fewer rows or fields, a narrower filter, or one part at a time.",
        )
    except values.NotPlain as error:
        _LOG.warning("The result of %s was refused: %s", tool.name, error)
        return refusal(
            "invalid_result",
            f"{tool.name} returned something that it must not: {error}.",
            "The tool has a bug; other arguments may work, the same ones will not.",
        )
    except Exception as error:  # of a serializer or a property of its classes, or of a value that changed meanwhile
        _LOG.warning("The result of %s could not be read.", tool.name, exc_info=error)
        return refusal(
            "invalid_result",
            f"{tool.name} returned something that could not be read ({_class_name(error)}).",
            "The tool has a bug; do not repeat the same call.",
        )
    finally:
        if inspect.iscoroutine(value):  # a forgotten await: nobody will
            value.close()
    return ToolResult(True, plain, None, text)


def of_error(tool: Tool | None, name: str, error: BaseException) -> ToolResult:
    """The result for what came out of the pipeline, or out of the function of *tool* (None: there is none)."""
    match error:
        case Refused():
            return ToolResult(False, None, error.failure)
        case ToolError():
            return refusal("tool_failed", error.message or f"{name} failed.", error.hint)
        case TimedOut(started=True):
            seconds = f" within {tool.timeout:g} seconds" if tool is not None and tool.timeout is not None else ""
            return refusal(
                "timeout",
                f"{name} did not finish{seconds}; it may still have an effect.",
                "Ask for less in one call. Repeat it only if doing it twice does no harm.",
            )
        case TimedOut() | NoThread():
            return refusal(
                "busy",
                f"{name} was not called: too many earlier calls still run.",
                "Try again in some seconds.",
            )
        case _:
            # Its words may hold paths, locals and secrets: they are for the operator alone.
            _LOG.warning("The tool %s raised %s.", name, _class_name(error), exc_info=error)
            return refusal(
                "tool_failed",
                f"{name} failed with {_class_name(error)}.",
                "The arguments were well formed. Other values may work; if not, go on without this tool.",
            )


def _class_name(error: BaseException) -> str:
    return readable(type(error).__name__, 100)
