"""The runs of an engine that are not over yet, and who asked for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandboxd.engine.runs.run import CellRun

__all__ = ["LiveRuns"]


class LiveRuns:
    """By id. *owner* is what ``ps`` shows of a client: its uid and pid."""

    def __init__(self) -> None:
        self._runs: dict[str, tuple[CellRun, dict[str, Any]]] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[CellRun]:
        return iter([run for run, _ in self._runs.values()])

    def add(self, run: CellRun, owner: dict[str, Any]) -> None:
        """*owner* asked for *run*."""
        self._runs[run.id] = run, owner

    def remove(self, run: CellRun) -> None:
        """It is over."""
        self._runs.pop(run.id, None)

    def of(self, uid: object) -> Iterator[CellRun]:
        """The runs of *uid*; of everybody when it is None."""
        return (run for run, owner in self._runs.values() if uid is None or owner.get("uid") == uid)

    def facts(self, visible: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """For ``ps``: the runs whose owner *visible* accepts."""
        return [{**run.facts(), "client": owner} for run, owner in self._runs.values() if visible(owner)]
