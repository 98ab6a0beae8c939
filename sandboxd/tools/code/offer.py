"""What ``run_code`` offers: its schema, its description, and the arguments of a run that they become.

They name a program, its time and its input files, nothing else: no policy, no other limit, no environment. A time may
only narrow what the sandbox allows.
"""

from __future__ import annotations

import base64
import binascii
import inspect
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from sandboxd.limits import LIMITS, shown, spell
from sandboxd.policy import Limits, Policy, load
from sandboxd.tools.pipeline.tool import tool
from sandboxd.tools.result import Refused
from sandboxd.tools.schema import stubs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sandboxd.client.async_sandbox import AsyncSandbox
    from sandboxd.client.sandbox import Sandbox
    from sandboxd.tools.pipeline.tool import Tool

__all__ = ["DESCRIPTION_CHARACTERS", "InputFile", "as_tool", "longest_timeout", "run_arguments"]

NAME: Final = "run_code"
DESCRIPTION_CHARACTERS: Final = 1024
"""OpenAI's service takes no longer one."""
RESULT_BYTES: Final = 1 << 20
"""Above what a value can be: each of its texts is bounded."""
MOST_FILES: Final = 64


class InputFile(BaseModel):
    """A file for the program, below /workspace."""

    model_config = ConfigDict(extra="forbid")

    path: Annotated[
        str, Field(description='Relative to the working directory, such as "data/in.csv".', max_length=4096)
    ]
    content: Annotated[str, Field(description="The text of the file, or its bytes in base64.")]
    encoding: Annotated[Literal["text", "base64"], Field(description="What content is.")] = "text"


def as_tool(run: Callable[..., Any], sandbox: Sandbox | AsyncSandbox | None, granted: Sequence[Tool]) -> Tool:
    """*run* as the tool: with the annotations that its schema is made from, and a description that names what *granted*
    lets code call.
    """
    policy, widest = _known(sandbox)
    highest = Annotated[
        float,
        Field(
            ge=LIMITS["wall_seconds"].lowest,
            le=widest,
            description="Seconds after which the program is stopped; left out, the sandbox's own limit.",
        ),
    ]

    async def run_code_async(code: Any, language: Any = "python", timeout: Any = None, files: Any = None) -> Any:
        return await run(code, language, timeout, files)

    def run_code(code: Any, language: Any = "python", timeout: Any = None, files: Any = None) -> Any:
        return run(code, language, timeout, files)

    function: Any = run_code_async if inspect.iscoroutinefunction(run) else run_code
    function.__annotations__ = {
        "code": Annotated[str, Field(description="The whole program.")],
        "language": Annotated[Literal["python"], Field(description="The language of the program.")],
        "timeout": highest | None,
        "files": Annotated[
            list[InputFile] | None,
            Field(max_length=MOST_FILES, description="Files to put into /workspace before it starts."),
        ],
        "return": dict[str, Any],
    }
    made: Tool = tool(name=NAME, callers=("model",), max_result_bytes=RESULT_BYTES)(function)
    return made.replaced(description=_described(policy, granted))  # as it is, not read as a docstring


def _described(policy: Policy | None, granted: Sequence[Tool]) -> str:
    parts = [
        "Run a Python program in a fresh sandbox; answers with its output, the value of a last expression, its "
        "error and the files it made. Nothing persists between calls: send a whole program each time. It has no "
        "network and no input from a keyboard; the working directory is /workspace."
    ]
    if policy is not None:
        limits = policy.limits
        wall = "" if limits.wall_seconds is None else f"{spell('wall_seconds', limits.wall_seconds)} s, "
        parts.append(f"Limits: {wall}memory {spell('memory_bytes', limits.memory_bytes)}.")
        if policy.runtime.preload:
            modules = dict.fromkeys(one.partition(".")[0] for one in policy.runtime.preload)
            parts.append(f"Ready to import, beside the standard library: {', '.join(modules)}.")
    if granted:
        parts.append("The program may call these functions of the module `tools`, which is there already:")
    text = " ".join(parts)
    for lines in (map(stubs.signature, granted), (one.name for one in granted)):
        whole = "\n".join([text, *(f"tools.{line}" for line in lines)])
        if len(whole) <= DESCRIPTION_CHARACTERS:
            return whole
    return f"{text[: DESCRIPTION_CHARACTERS - 40]}\nhelp(tools) prints them."


def longest_timeout(sandbox: Sandbox | AsyncSandbox | None) -> float | None:
    """The longest timeout that may be asked for, in seconds; None when it is not known, or there is no bound."""
    longest = _known(sandbox)[1]
    return None if longest == LIMITS["wall_seconds"].highest else longest


def _known(sandbox: Sandbox | AsyncSandbox | None) -> tuple[Policy | None, float]:
    """The policy, when the sandbox is this process's own, and the widest timeout that may be asked for: of a daemon's
    policy only the daemon knows.
    """
    policy, limits = getattr(sandbox, "_declared", (None, None))
    widest = float(LIMITS["wall_seconds"].highest)
    if policy is not None:
        policy = load(policy)
        policy = policy if limits is None else policy.with_limits(limits)
        asked = policy.limits.wall_seconds
    else:
        asked = None if limits is None else limits.plain().get("wall_seconds")
    return policy, widest if asked is None else min(widest, float(asked))


def run_arguments(language: str, timeout: float | None, files: Sequence[InputFile]) -> dict[str, Any]:
    contents: dict[str, bytes] = {}
    for number, file in enumerate(files):
        if file.path in contents:
            raise Refused(
                "invalid_arguments", f"files.{number}.path: {shown(file.path)} is given twice.", "Name it once."
            )
        contents[file.path] = _content(number, file)
    return {
        "language": language,
        "limits": None if timeout is None else Limits(wall_seconds=timeout),
        "files": contents or None,
    }


def _content(number: int, file: InputFile) -> bytes:
    if file.encoding == "text":
        return file.content.encode()
    try:
        return base64.b64decode(file.content.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise Refused(
            "invalid_arguments",
            f"files.{number}.content: it is not base64.",
            'Give it in base64, or as text with "encoding": "text".',
        ) from None
