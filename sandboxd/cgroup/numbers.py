"""The numbers of one leaf's control files, read together: each is a few bytes, and a system call costs more than it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from sandboxd._native import ffi, lib
from sandboxd.cgroup.reading import Row

if TYPE_CHECKING:
    from sandboxd.cgroup.files import File
    from sandboxd.cgroup.reading import Role

__all__ = ["Number", "Numbers"]

_ROOM: Final = 24


class Number:
    """One number: behind *key* in *file*, or its only one. Those of one file should be added in a row."""

    __slots__ = ("_all", "_file", "_index", "key")

    def __init__(self, numbers: Numbers, index: int, file: File | int, key: str) -> None:
        self._all = numbers
        self._file = file
        self._index = index
        self.key = key

    @property
    def fd(self) -> int:
        """The descriptor of its file."""
        return self._file if isinstance(self._file, int) else self._file.fd

    def now(self) -> int:
        """Read it alone. Raises OSError."""
        return self._all.read(self._index)

    @property
    def last(self) -> int:
        """As the last ``Numbers.refresh`` found it. Raises OSError when the kernel refused then."""
        return self._all.last(self._index)


class Numbers:
    """Up to 24 of them. The descriptors stay their owners'."""

    def __init__(self) -> None:
        self._cells = ffi.new("struct sbx_number[]", _ROOM)
        self._added: list[Number] = []
        self.rows: list[Row] = []

    def add(self, file: File | int, key: str = "", role: Role | None = None, divisor: int = 1) -> Number:
        """One more. Those with a *role* come first: they are a run's counters. Raises IndexError beyond the room."""
        index = len(self._added)
        if index == _ROOM:
            raise IndexError(f"a leaf has at most {_ROOM} numbers")
        number = Number(self, index, file, key)
        self._cells[index].fd = number.fd
        self._cells[index].key = key.encode("ascii")
        self._added.append(number)
        if role is not None:
            self.rows.append(Row(role, divisor))
        return number

    @property
    def counted(self) -> list[Number]:
        """Those with a role, in the order of ``rows``."""
        return self._added[: len(self.rows)]

    @property
    def cells(self) -> Any:
        """struct sbx_number[], for C that reads them with other things."""
        return self._cells

    def rebind(self) -> None:
        """The files were opened anew."""
        for index, number in enumerate(self._added):
            self._cells[index].fd = number.fd

    def values(self) -> tuple[int, ...]:
        """What the counted ones were at the last reading. Raises OSError when the kernel refused one."""
        values = tuple(int(self._cells[index].value) for index in range(len(self.rows)))
        if min(values) < 0:
            for index in range(len(self.rows)):
                self.last(index)
        return values

    def refresh(self) -> None:
        """Read all of them anew, one system call for each file."""
        lib.sbx_read_numbers(self._cells, len(self._added))

    def last(self, index: int) -> int:
        """Number *index* of the last reading. Raises OSError."""
        value = int(self._cells[index].value)
        if value < 0:
            number = self._added[index]
            raise OSError(-value, f"pread: {os.strerror(-value)}", number.key or f"descriptor {number.fd}")
        return value

    def read(self, index: int) -> int:
        """Number *index*, read alone. Raises OSError."""
        lib.sbx_read_numbers(self._cells + index, 1)
        return self.last(index)
