"""A descriptor with one owner."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Fd"]


class Fd:
    """Owns a descriptor: closes it once, at ``close``, at the end of a ``with`` block, or with the last reference.

    ``os`` and ``select`` take it as it is, by its ``fileno``.
    """

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        """The descriptor, which stays this object's. Raises ValueError once it is closed or taken."""
        if self._number < 0:
            raise ValueError("the descriptor is closed, or somebody else's")
        return self._number

    @property
    def is_open(self) -> bool:
        """Whether there is something to close."""
        return self._number >= 0

    def take(self) -> int:
        """The descriptor, now the caller's to close; -1 when it is closed."""
        number, self._number = self._number, -1
        return number

    def close(self) -> None:
        """Idempotent."""
        number = self.take()
        if number >= 0:
            os.close(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Fd({self._number})"
