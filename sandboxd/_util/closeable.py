"""What has an end: ``close``, which leaving a ``with`` block calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Closing"]


class Closing:
    """A context manager whose end is ``close``."""

    __slots__ = ()

    def close(self) -> object:
        """End it. Each class has its own: one without would be left open by its ``with``."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
