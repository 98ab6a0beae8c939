"""Head and tail of a stream: exact counts, whole characters, memory that does not grow."""

from __future__ import annotations

import re
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.outcome.collector import Collector

MARKER = re.compile(rb"\n\[\.\.\. (\d+) bytes left out \.\.\.\]\n")


def kept(keep: int, *chunks: bytes) -> tuple[bytes, int]:
    """What a collector of *keep* bytes has after *chunks*."""
    collector = Collector(keep)
    for chunk in chunks:
        collector.add(chunk)
    assert collector.total_bytes == sum(map(len, chunks))
    return collector.kept()


EXACT = [
    (10, [], b"", 0),
    (10, [b""], b"", 0),
    (10, [b"short"], b"short", 0),
    (10, [b"exactly10!"], b"exactly10!", 0),
    (10, [b"exactly", b"10!"], b"exactly10!", 0),
    (10, [b"0123456789a"], b"01234\n[... 1 bytes left out ...]\n6789a", 1),
    (10, [b"0123456789", b"a"], b"01234\n[... 1 bytes left out ...]\n6789a", 1),
    (10, [b"x"] * 10 + [b"abcde"], b"xxxxx\n[... 5 bytes left out ...]\nabcde", 5),
    (3, [b"abcdef"], b"a\n[... 3 bytes left out ...]\nef", 3),
    (1, [b"abc"], b"\n[... 2 bytes left out ...]\nc", 2),
    (1, [b"a"], b"a", 0),
    # Characters of two, three and four bytes are kept whole or not at all, and counted.
    (10, ["ééééééé".encode()], "éé\n[... 6 bytes left out ...]\néé".encode(), 6),
    (8, ["a€€€€b".encode()], "a€\n[... 6 bytes left out ...]\n€b".encode(), 6),
    (10, ["🙂🙂🙂🙂".encode()], "🙂\n[... 8 bytes left out ...]\n🙂".encode(), 8),
    # What is no UTF-8 is nobody's half character.
    (8, [b"\xff" * 20], b"\xff" * 4 + b"\n[... 12 bytes left out ...]\n" + b"\xff" * 4, 12),
]


@pytest.mark.parametrize(("keep", "chunks", "text", "dropped"), EXACT)
def test_head_marker_and_tail(keep: int, chunks: list[bytes], text: bytes, dropped: int) -> None:
    assert kept(keep, *chunks) == (text, dropped)


@given(st.integers(1, 50), st.lists(st.binary(max_size=40), max_size=20))
def test_the_count_is_exact_and_the_parts_are_the_streams_own(keep: int, chunks: list[bytes]) -> None:
    whole = b"".join(chunks)
    text, dropped = kept(keep, *chunks)
    if len(whole) <= keep:
        assert (text, dropped) == (whole, 0)
        return
    matches = [match for match in MARKER.finditer(text) if int(match[1]) == dropped]
    assert any(
        whole.startswith(text[: match.start()])
        and whole.endswith(text[match.end() :])
        and match.start() + len(text) - match.end() + dropped == len(whole)
        and match.start() + len(text) - match.end() <= keep
        for match in matches
    )


@given(st.integers(1, 60), st.lists(st.text(max_size=20), max_size=20))
def test_text_stays_text(keep: int, chunks: list[str]) -> None:
    kept(keep, *(chunk.encode() for chunk in chunks))[0].decode()


@given(st.integers(1, 60), st.binary(max_size=200), st.data())
def test_how_the_stream_was_cut_into_chunks_makes_no_difference(keep: int, whole: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=10)))
    chunks = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert kept(keep, *chunks) == kept(keep, whole)


def test_looking_twice_changes_nothing() -> None:
    collector = Collector(10)
    collector.add(b"0123456789abcdef")
    assert collector.kept() == collector.kept()
    collector.add(b"g")
    assert collector.kept() == (b"01234\n[... 7 bytes left out ...]\ncdefg", 7)


@pytest.mark.parametrize("chunk", [1, 100, 1 << 16])
def test_memory_does_not_grow_with_the_stream(chunk: int) -> None:
    keep = 64 << 10
    collector = Collector(keep)
    block = b"x" * chunk
    tracemalloc.start()
    try:
        for _ in range(min(200_000, (64 << 20) // chunk)):
            collector.add(block)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * keep
    text, dropped = collector.kept()
    assert dropped == collector.total_bytes - keep
    assert len(MARKER.sub(b"", text)) == keep
