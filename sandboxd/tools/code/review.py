"""The host's look at what a run made, after the program ended well and before a model sees it.

A hook, sync or async, gets a ``Review`` and returns None or True when it has nothing against it, else an objection: a
sentence for the model, or False. An objection is part of the answer, so the model can mend what is wrong.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from sandboxd.client.result import Result
    from sandboxd.tools.code.pictures import Picture

__all__ = ["Review", "Reviewer", "review", "review_async"]

OBJECTION_CHARACTERS: Final = 4000


@dataclass(frozen=True, slots=True)
class Review:
    """What a hook looks at: the source text, the whole Result (files can be read), the answer that the model would
    get, and the pictures among files and displayed values.
    """

    code: str
    result: Result
    value: Mapping[str, Any]
    pictures: Sequence[Picture]


if TYPE_CHECKING:
    Verdict = bool | str | None
    Reviewer = Callable[[Review], Verdict | Awaitable[Verdict]]
else:
    Reviewer = object


def review(hook: Reviewer, subject: Review, wait: Callable[[Awaitable[Any]], Any]) -> str | None:
    """The objection, or None; *wait* waits for the answer of a hook that is asynchronous.

    Raises what the hook raises, TypeError when its answer is no verdict.
    """
    verdict: Any = hook(subject)
    if inspect.isawaitable(verdict):
        verdict = wait(verdict)
    return _objection(verdict)


async def review_async(
    hook: Reviewer, subject: Review, in_thread: Callable[[Callable[[], Any]], Awaitable[Any]]
) -> str | None:
    """As ``review``, on the caller's loop; a hook that is not asynchronous is called by *in_thread*."""
    if inspect.iscoroutinefunction(hook):
        verdict: Any = hook(subject)
    else:
        verdict = await in_thread(partial(hook, subject))
    if inspect.isawaitable(verdict):
        verdict = await verdict
    return _objection(verdict)


def _objection(verdict: object) -> str | None:
    if verdict is None or verdict is True:
        return None
    if verdict is False:
        return "The reviewer did not accept it and gave no reason."
    if isinstance(verdict, str):
        text = verdict.strip() or "The reviewer did not accept it and gave no reason."
        return text if len(text) <= OBJECTION_CHARACTERS else f"{text[:OBJECTION_CHARACTERS]}..."
    raise TypeError(f"A review returns None, True, False or a sentence, not {type(verdict).__name__}.")
