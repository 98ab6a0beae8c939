"""Where an engine's runs are told to: nobody, by default; ``recorder`` writes them down."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from sandboxd.engine.audit.tool_calls import CallRecords
    from sandboxd.engine.cells.active_policy import ActivePolicy
    from sandboxd.limits import LimitValue
    from sandboxd.outcome.answer import RunAnswer
    from sandboxd.protocol.run_header import Run

__all__ = ["AuditSink"]


class AuditSink:
    """Of an engine that records nothing."""

    path: str | None = None
    """The file that is written."""

    def open(self) -> None:
        """Raises Unavailable when it cannot be opened and the operator wants no run without it."""

    def close(self) -> None:
        """Write what waits, and that this engine ended in an orderly way. Idempotent."""

    @contextlib.asynccontextmanager
    async def run(
        self,
        identity: str,
        active: ActivePolicy,
        request: Run,
        limits: Mapping[str, LimitValue],
        owner: Mapping[str, Any],
    ) -> AsyncIterator[Callable[[RunAnswer], None]]:
        """Around one run, from its admission on: records its beginning, and however it ends. What it gives is to be
        told the answer. Raises Unavailable when the beginning cannot be recorded: then it must not begin.
        """
        yield _nothing

    async def busy(self, identity: str, active: ActivePolicy, request: Run, owner: Mapping[str, Any]) -> None:
        """A run was turned away before it began."""

    def calls(self, identity: str) -> CallRecords | None:
        """What is to see the tool calls of run *identity*, if anything is."""
        return None

    def tool(self, identity: str, record: Mapping[str, Any]) -> None:
        """The program of run *identity* called a tool; *record* holds tool, caller, arguments and result, and becomes
        this one's.
        """


def _nothing(_answer: RunAnswer) -> None:
    """It is told to nobody."""
