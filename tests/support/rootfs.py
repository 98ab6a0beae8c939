"""A second reader of an encoded plan of mounts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from sandboxd.rootfs.plan import _COUNT, _HEADER, Kind, Op

if TYPE_CHECKING:
    from collections.abc import Iterator


def iterate(buffer: bytes) -> Iterator[Op]:
    """The operations of an encoded plan again."""
    count, _ = _COUNT.unpack_from(buffer)
    at = _COUNT.size
    for _ in range(count):
        kind, flags, mode, target_len, source_len, data_len = _HEADER.unpack_from(buffer, at)
        at += _HEADER.size
        target = os.fsdecode(buffer[at : at + target_len - 1])
        at += target_len
        source = os.fsdecode(buffer[at : at + source_len - 1])
        at += source_len
        yield Op(Kind(kind), target, source, buffer[at : at + data_len], mode, flags)
        at += data_len
        at += -at % 8
