"""Files into and out of a directory that was a cell's: by name only beneath it, plain files only, bounded."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandboxd.engine.cells import workspace
from sandboxd.engine.cells.files import CellFiles, HostRoot
from sandboxd.errors import InvalidRequest
from sandboxd.outcome.collected import Collected, Known, is_untouched
from sandboxd.protocol import run_header
from tests.support.leftovers import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

UID = 12345
HANDS = HostRoot(0)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory that stands for a cell's /workspace."""
    made = tmp_path / "workspace"
    made.mkdir()
    if os.geteuid() == 0:
        for parent in (tmp_path, *tmp_path.parents):
            if parent.stat().st_uid == 0 and not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o011)  # the cell's uid has to get there
        os.chown(made, UID, UID)
    return made


@pytest.fixture
def fd(place: Path) -> Iterator[int]:
    """The engine's descriptor of it."""
    number = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    yield number
    os.close(number)


def put(fd: int, **files: bytes) -> Known:
    """Input files; "__" in a name stands for a slash."""
    return workspace.put_files(
        HANDS, fd, [(name.replace("__", "/"), memoryview(data)) for name, data in files.items()], UID
    )


def taken(fd: int, known: Known | None = None, most: int = 1 << 30) -> tuple[dict[str, bytes], int]:
    """What is collected, by path, and how many were skipped."""
    collected = workspace.collect(HANDS, fd, known or {}, most)
    try:
        found = {path: os.pread(collected.fd, size, at) for path, size, at in collected.files}
        assert [path for path, _, _ in collected.files] == sorted(found)
        return found, collected.skipped
    finally:
        collected.close()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="giving files to another uid needs CAP_CHOWN")


@needs_root
def test_inputs_belong_to_the_cell_and_parents_are_made(place: Path, fd: int) -> None:
    put(fd, a=b"1", b__c__d=b"22", b__e=b"")
    assert {str(path.relative_to(place)) for path in place.rglob("*")} == {"a", "b", "b/c", "b/c/d", "b/e"}
    assert (place / "b/c/d").read_bytes() == b"22"
    for path in place.rglob("*"):
        assert (path.stat().st_uid, path.stat().st_gid) == (UID, UID)


@needs_root
def test_an_input_never_replaces_or_follows_anything(place: Path, fd: int, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o777)
    outside.chmod(0o777)
    (place / "link").symlink_to(outside)
    (place / "file-link").symlink_to(outside / "victim")
    for name in ("link__x", "file-link"):
        with pytest.raises(InvalidRequest, match="files: "):
            put(fd, **{name: b"x"})
    assert list(outside.iterdir()) == []


@needs_root
def test_a_failed_input_leaks_no_descriptor(place: Path, fd: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    (place / "a").mkdir()
    for _ in range(10):
        with pytest.raises(InvalidRequest):
            put(fd, a=b"x")
    assert len(os.listdir("/proc/self/fd")) == before


@needs_root
def test_unchanged_inputs_are_not_collected(place: Path, fd: int) -> None:
    known = put(fd, same=b"1", changed=b"2", gone=b"3", b__same=b"4")
    (place / "changed").write_bytes(b"9")
    (place / "gone").unlink()
    assert taken(fd, known) == ({"changed": b"9"}, 0)


@needs_root
def test_a_time_that_was_set_back_hides_no_change(place: Path, fd: int) -> None:
    known = put(fd, f=b"1")
    eventually(lambda: workspace.settled(known), 2, "the clock of ctime goes on")  # as a run does
    before = (place / "f").stat()
    (place / "f").write_bytes(b"2")
    os.utime(place / "f", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert taken(fd, known) == ({"f": b"2"}, 0)


@needs_root
def test_a_program_begins_when_a_change_would_show(fd: int) -> None:
    known = put(fd, f=b"1")
    eventually(lambda: workspace.settled(known), 2, "the clock of ctime goes on")
    assert not workspace.settled({**known, "later": (1, time.time_ns() + 10**9)})
    assert workspace.settled({})


@needs_root
def test_another_file_in_the_place_of_an_input(place: Path, fd: int) -> None:
    known = put(fd, f=b"1")
    (place / "g").write_bytes(b"1")
    os.replace(place / "g", place / "f")
    assert taken(fd, known) == ({"f": b"1"}, 0)


def test_everything_is_collected_whole_and_sorted(place: Path, fd: int) -> None:
    (place / "z").write_bytes(b"z" * 100_000)
    (place / "d/e").mkdir(parents=True)
    (place / "d/e/f").write_bytes(b"")
    (place / "d/a").write_bytes(bytes(range(256)))
    assert taken(fd) == ({"z": b"z" * 100_000, "d/e/f": b"", "d/a": bytes(range(256))}, 0)


def test_an_empty_place_needs_no_memfd(fd: int) -> None:
    collected = workspace.collect(HANDS, fd, {}, 100)
    assert (collected.files, collected.skipped, collected.fd) == ([], 0, -1)
    collected.close()


def test_a_sparse_file_is_as_long_as_it_says(place: Path, fd: int) -> None:
    with open(place / "sparse", "wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    assert taken(fd)[0]["sparse"] == bytes(1 << 20) + b"end"


def test_other_kinds_are_skipped_without_being_opened(place: Path, fd: int, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"host")
    (place / "link").symlink_to(secret)
    (place / "dir-link").symlink_to(tmp_path)
    os.mkfifo(place / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(place / "socket"))
    os.link(secret, place / "hard")
    (place / "fine").write_bytes(b"x")
    assert taken(fd) == ({"fine": b"x"}, 5)


def test_names_that_cannot_be_told_are_skipped(place: Path, fd: int) -> None:
    with open(os.fsencode(place) + b"/\xff", "wb"):
        pass
    (place / "fine").write_bytes(b"")
    assert taken(fd) == ({"fine": b""}, 1)


def test_what_is_over_the_size_is_skipped(place: Path, fd: int) -> None:
    for name in ("a", "b", "c"):
        (place / name).write_bytes(b"x" * 40)
    assert taken(fd, most=100) == ({"a": b"x" * 40, "b": b"x" * 40}, 1)
    assert taken(fd, most=0)[1] == 3


def test_what_is_too_deep_is_skipped(place: Path, fd: int) -> None:
    here = place
    for n in range(run_header.DEPTH + 2):
        here = here / "d"
        here.mkdir()
        (here / "f").write_bytes(str(n).encode())
    found, skipped = taken(fd)
    assert len(found) == run_header.DEPTH
    assert skipped == 1


def test_a_file_that_another_took_the_place_of_is_not_followed(
    place: Path, fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody can do this once the cell is dead; the walk must not depend on it.
    secret = tmp_path / "secret"
    secret.write_bytes(b"host")
    (place / "f").write_bytes(b"x")
    walk = workspace._walk

    def switch(by: CellFiles, directory: int, found: Collected) -> list[str]:
        wanted = walk(by, directory, found)
        (place / "f").unlink()
        (place / "f").symlink_to(secret)
        return wanted

    monkeypatch.setattr(workspace, "_walk", switch)
    assert taken(fd) == ({}, 1)


def test_collecting_leaks_no_descriptor(place: Path, fd: int) -> None:
    (place / "d").mkdir()
    (place / "d/f").write_bytes(b"x")
    os.mkfifo(place / "fifo")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        taken(fd)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_source_is_readable_and_not_to_be_changed(place: Path, fd: int) -> None:
    source = workspace.make_source(HANDS, fd, "main.py", os.getuid())
    os.write(source, b"print(1)")
    os.close(source)
    assert (place / "main.py").read_bytes() == b"print(1)"
    assert (place / "main.py").stat().st_mode & 0o777 == 0o444


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_the_engines_umask_does_not_show(place: Path, fd: int, umask: int) -> None:
    before = os.umask(umask)
    try:
        os.close(workspace.make_source(HANDS, fd, "main.py", os.getuid()))
    finally:
        os.umask(before)
    assert (place / "main.py").stat().st_mode & 0o777 == 0o444


def test_untouched(tmp_path: Path) -> None:
    shm = Path(f"/dev/shm/sandboxd-test-{os.getpid()}")  # a tmpfs, as the workspace is
    shm.mkdir()
    fd = os.open(shm, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert is_untouched(fd, {})
        assert not is_untouched(fd, {"f": (1, 1)})
        (shm / "f").write_bytes(b"")
        assert not is_untouched(fd, {})
        (shm / "f").unlink()
        (shm / "d").mkdir()
        assert not is_untouched(fd, {})
        (shm / "d").rmdir()
        assert is_untouched(fd, {})
    finally:
        os.close(fd)
        shm.rmdir()
