"""A run's answer as one packet: the result, the output, and the files, which are in a memfd already."""

from __future__ import annotations

import json
import logging
import os
from typing import TYPE_CHECKING, Any, Final

from sandboxd._util.fdwait import in_thread
from sandboxd.protocol import packets
from sandboxd.protocol.operations import Operation

if TYPE_CHECKING:
    from sandboxd.outcome.collected import Collected

__all__ = ["packed"]

log = logging.getLogger("sandboxd.engine")

FEW_FILES: Final = 64
"""Of a result; the names of more are counted and encoded by another thread."""


async def packed(header: dict[str, Any], texts: list[bytes], files: Collected) -> tuple[list[Any], int]:
    """The buffers of the packet, and a memfd that goes with it or -1; as ``packets.pack``."""
    message = {"op": Operation.RESULT, "result": header}
    if files.fd < 0:
        return packets.pack(message, texts)
    try:
        if len(header["files"]) <= FEW_FILES:
            return _with_files(message, header, texts, files)
        return await in_thread(_with_files, message, header, texts, files, discard=_close_packed)
    except OSError as error:
        # The program ran: that must be told, with what there is.
        log.error("the files of run %s cannot be sent: %s", header["id"], error)
        header.update(status="internal", files=[], files_skipped=header["files_skipped"] + len(header["files"]))
        header.update(stdout=[0, len(texts[0])], stderr=[len(texts[0]), len(texts[1])])
        return packets.pack(message, texts)


def _with_files(
    message: dict[str, Any], header: dict[str, Any], texts: list[bytes], files: Collected
) -> tuple[list[Any], int]:
    """The packed result: the texts go behind the files, and the offsets follow."""
    fd = files.take()
    try:
        size = os.fstat(fd).st_size
        lead = len(texts[0]) + len(texts[1])
        header["stdout"][0] += size
        header["stderr"][0] += size
        _shorten(header)
        for entry in header["files"]:
            entry["offset"] -= lead
        os.pwrite(fd, texts[0] + texts[1], size)
    except BaseException:
        os.close(fd)
        raise
    return packets.pack(message, filled=fd)


def _close_packed(given: tuple[list[Any], int]) -> None:
    """Nobody will send it."""
    os.close(given[1])


def _shorten(header: dict[str, Any]) -> None:
    """Leave out the last files when their names, which the program chose, are more than a message can hold."""
    room = packets.JSON_BYTES // 2
    files = header["files"]
    for index, entry in enumerate(files):
        room -= len(json.dumps(entry))
        if room < 0:
            header["files_skipped"] += len(files) - index
            del files[index:]
            return
