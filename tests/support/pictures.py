"""Small pictures for tests."""

from __future__ import annotations

import struct
import zlib


def png(width: int, height: int) -> bytes:
    """A valid PNG of that size, all white."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\xff" * width) * height  # each row led by its filter
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def jpeg(width: int, height: int) -> bytes:
    """The frame of a JPEG of that size: its markers, with tables and a scan that hold nothing."""
    frame = struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\x01\x11\x00"
    scan = struct.pack(">HB", 8, 1) + b"\x01\x00\x00\x3f\x00"
    return b"\xff\xd8\xff\xfe\x00\x02" + b"\xff\xc0" + frame + b"\xff\xda" + scan + b"\0" + b"\xff\xd9"


def endless_jpeg(size: int) -> bytes:
    """*size* bytes that begin as a JPEG: a frame, then scans over and over that hold nothing, and no end."""
    frame = b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 11, 8, 2, 2, 1) + b"\x01\x11\x00"
    return frame + b"\xff\xda\x00\x02" * ((size - len(frame)) // 4)


def damaged_png(size: int) -> bytes:
    """*size* bytes that begin as a PNG: chunks over and over that hold nothing, and no end."""
    empty = b"\0\0\0\0tEXt" + struct.pack(">I", zlib.crc32(b"tEXt"))
    return png(1, 1)[:-12] + empty * ((size - len(png(1, 1))) // len(empty))
