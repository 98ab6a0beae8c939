"""Pictures that a run made: PNG and JPEG, looked at closely enough that a vendor's service will take them. Pure.

They are a program's output, so nothing is decoded here: sizes, checksums and markers are read, no pixel. A picture that
a service would refuse is left out and said so: one refused picture ends a whole conversation.

The run is over when its pictures are looked at, so no limit of it holds here. A picture is read once from its beginning
to its end, in time that grows with its length, and what is looked at in one Result is bounded in count and in bytes,
whatever becomes of it. That can still take some tens of milliseconds: not in a thread that has others to serve.
"""

from __future__ import annotations

import binascii
import re
import struct
import zlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandboxd.client.result import Result

__all__ = [
    "LOOKED_AT",
    "LOOKED_AT_BYTES",
    "MOST_PICTURES",
    "PICTURE_BYTES",
    "PICTURE_PIXELS",
    "Picture",
    "pictures_of",
    "short",
]

MOST_PICTURES: Final = 4
PICTURE_BYTES: Final = 3 << 20
"""Services take about 5 MB in base64, which is a third longer."""
PICTURE_PIXELS: Final = 8000
"""The longest side that services take."""
LOOKED_AT: Final = 16
"""Pictures of one Result that are looked at, those that are left out after that included."""
LOOKED_AT_BYTES: Final = 16 << 20
"""Bytes of all of them together."""
PARTS: Final = 10_000
"""Chunks of a PNG, or segments of a JPEG before its first scan: encoders make hundreds at most, and each costs a
microsecond.
"""

MOST_LEFT_OUT: Final = 10
"""Pictures that are not shown, of which a line says so."""
NAME_CHARACTERS: Final = 100

_SUFFIXES: Final = (".png", ".jpg", ".jpeg")
_PNG: Final = b"\x89PNG\r\n\x1a\n"
# Start-of-frame markers of JPEG, which carry the size; 0xC4, 0xC8 and 0xCC are others. ITU-T T.81, table B.1
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SCAN: Final = 0xDA
_FILL: Final = re.compile(rb"\xff*")


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture: the file's path or the displayed value's name, its type, its bytes."""

    name: str
    mime: Literal["image/png", "image/jpeg"]
    data: bytes


def pictures_of(result: Result) -> tuple[list[Picture], list[str]]:
    """The pictures among the files and displayed values of *result*, at most four, and lines about those left out.

    Raises ValueError when the Result was closed.
    """
    pictures: list[Picture] = []
    left_out: list[str] = []
    untold = looked_at = 0
    bytes_left = LOOKED_AT_BYTES
    for name, size, read in _candidates(result):
        if len(pictures) == MOST_PICTURES:
            why = f"only {MOST_PICTURES} pictures are"
        elif size > PICTURE_BYTES:
            why = f"{size:,} bytes are more than {PICTURE_BYTES:,}"
        elif looked_at == LOOKED_AT or size > bytes_left:
            why = f"only {LOOKED_AT} pictures, and {LOOKED_AT_BYTES >> 20} MiB of them, are looked at"
        else:
            looked_at += 1
            bytes_left -= size
            try:
                data = read()
                pictures.append(Picture(name, _checked(data), data))
                continue
            except _Unfit as unfit:
                why = str(unfit)
        if len(left_out) < MOST_LEFT_OUT:
            left_out.append(f"picture {short(name)}: not shown, {why}")
        else:
            untold += 1
    if untold:
        left_out.append(f"and {untold} more pictures: not shown")
    return pictures, left_out


def short(name: str) -> str:
    """*name*, which a program chose, cut to a length that can be read."""
    return name if len(name) <= NAME_CHARACTERS else f"{name[: NAME_CHARACTERS - 3]}..."


class _Unfit(Exception):
    """Why a picture is left out."""


def _candidates(result: Result) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    for number, shown in enumerate(result.results):
        for kind, text in shown.mime.items():
            if kind in ("image/png", "image/jpeg"):
                yield f"results/{number}", len(text) * 3 // 4, partial(_decoded, text)
    for file in result.files:
        if file.path.lower().endswith(_SUFFIXES):
            yield file.path, file.size_bytes, file.read


def _decoded(text: str) -> bytes:
    try:
        return binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    except (ValueError, UnicodeEncodeError):
        raise _Unfit("it is not base64") from None


def _checked(data: bytes) -> Literal["image/png", "image/jpeg"]:
    if data.startswith(_PNG):
        _fits(_png_size(data))
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        _fits(_jpeg_size(data))
        return "image/jpeg"
    raise _Unfit("it is neither PNG nor JPEG")


def _fits(size: tuple[int, int]) -> None:
    if not all(1 <= side <= PICTURE_PIXELS for side in size):
        raise _Unfit(f"{size[0]} x {size[1]} pixels; the longest side may have {PICTURE_PIXELS}")


def _png_size(data: bytes) -> tuple[int, int]:
    """Width and height of a PNG whose chunks are whole. PNG specification, section 5."""
    size: tuple[int, int] | None = None
    at, seen = len(_PNG), False
    whole = memoryview(data)  # a chunk is not copied to be summed
    for _ in range(PARTS):
        if at + 12 > len(data):
            break
        length = int.from_bytes(data[at : at + 4], "big")
        end = at + 12 + length
        if end > len(data) or zlib.crc32(whole[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            break
        kind = data[at + 4 : at + 8]
        if size is None:
            if kind != b"IHDR" or length != 13:
                break
            size = struct.unpack(">II", data[at + 8 : at + 16])
        seen = seen or kind == b"IDAT"
        if kind == b"IEND" and seen:
            return size
        at = end
    else:
        raise _Unfit(f"the PNG has more than {PARTS:,} chunks")
    raise _Unfit("the PNG is damaged")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Width and height of a JPEG that has a frame, a scan and an end. ITU-T T.81, annex B.

    The segments up to the first scan are walked by their lengths. Behind that one stands entropy-coded data, which has
    no lengths: the end is sought there, once.
    """
    size: tuple[int, int] | None = None
    at = 2
    for _ in range(PARTS):
        if at + 4 > len(data) or data[at] != 0xFF:
            break
        fill = _FILL.match(data, at)  # any number of them may stand before a marker's code
        assert fill is not None  # noqa: S101 (it takes nothing, too)
        at = fill.end()
        kind, length = data[at : at + 1], int.from_bytes(data[at + 1 : at + 3], "big")
        if not kind or length < 2:  # the length counts itself
            break
        if kind[0] in _FRAMES and at + 8 <= len(data):
            height, width = struct.unpack(">HH", data[at + 4 : at + 8])
            size = (width, height)
        if kind[0] == _SCAN:
            if size is not None and data.find(b"\xff\xd9", at) >= 0:
                return size
            break
        at += 1 + length
    else:
        raise _Unfit(f"the JPEG has more than {PARTS:,} segments")
    raise _Unfit("the JPEG is damaged")
