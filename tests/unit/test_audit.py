"""The audit log as a file: its chain, what a crash or a full disk does to it, what is left out, who may share it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import resource
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd.audit import AuditError, AuditLog, log, reader, record, redact
from sandboxd.audit.file import rotated
from sandboxd.policy import Audit, Policy, load
from tests.support import leftovers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


def records(path: Path) -> list[dict[str, Any]]:
    """Of all files, oldest first."""
    return [json.loads(line) for name in [*rotated(str(path)), str(path)] for line in lines(Path(name))]


def write(path: Path, count: int, start: int = 0, **options: Any) -> None:
    with AuditLog(path, **options) as audit:
        for number in range(start, start + count):
            audit.append({"event": "test", "n": number})


def numbers(path: Path) -> list[int]:
    return [one["n"] for one in records(path) if one["event"] == "test"]


def sound(path: Path) -> reader.Verdict:
    """The verdict on a chain that must be unbroken."""
    verdict = reader.verify(str(path))
    assert verdict.problems == []
    return verdict


# --- the chain -----------------------------------------------------------------------------------------------------


def test_each_line_holds_the_hash_of_the_line_before(path: Path) -> None:
    write(path, 5)
    previous = "0" * 64
    for number, line in enumerate(lines(path), 1):
        found = json.loads(line)
        assert (found["sequence"], found["previous"]) == (number, previous)
        previous = hashlib.sha256(line).hexdigest()
    verdict = sound(path)
    assert (verdict.records, verdict.first, verdict.last, verdict.sha256) == (5, 1, 5, previous)


def test_the_chain_goes_on_after_a_restart(path: Path) -> None:
    write(path, 3)
    write(path, 3, 3)
    assert numbers(path) == list(range(6))
    assert sound(path).records == 6


def test_the_chain_goes_on_across_rotation(path: Path) -> None:
    write(path, 60, max_bytes=2000, keep=100)
    assert len(rotated(str(path))) > 5
    assert all(Path(name).stat().st_size <= 2000 for name in rotated(str(path)))
    assert numbers(path) == list(range(60))
    assert sound(path).first == 1


def test_no_more_files_are_kept_than_asked_for(path: Path) -> None:
    write(path, 60, max_bytes=2000, keep=5)
    write(path, 60, 60, max_bytes=2000, keep=2)
    assert [Path(name).name for name in rotated(str(path))] == ["audit.jsonl.2", "audit.jsonl.1"]
    assert numbers(path)[-1] == 119
    verdict = sound(path)
    assert 1 < verdict.first < verdict.last


def test_a_line_longer_than_a_file_is_written_all_the_same(path: Path) -> None:
    with AuditLog(path, max_bytes=1000) as audit:
        audit.append({"event": "test", "code": "x" * 5000})
        audit.append({"event": "test", "code": "y" * 5000})
    assert [len(one["code"]) for one in records(path) if one["event"] == "test"] == [5000, 5000]
    sound(path)


def edited(found: list[bytes]) -> list[bytes]:
    return [*found[:4], found[4].replace(b'"n":4', b'"n":5'), *found[5:]]


BREAKS: list[tuple[str, Callable[[list[bytes]], list[bytes]], int, str]] = [
    ("edited", edited, 5, "edited: its hash"),
    ("removed", lambda found: [*found[:4], *found[5:]], 5, "missing: the records 5 to 5"),
    ("swapped", lambda found: [*found[:4], found[5], found[4], *found[6:]], 6, "reordered: record 5"),
    ("put-in", lambda found: [*found[:4], b"{}", *found[4:]], 5, "edited: it is not a record"),
    ("made-unreadable", lambda found: [*found[:4], found[4][:-9], *found[5:]], 5, "edited: it is not a record"),
    ("twice", lambda found: [*found[:5], *found[4:]], 6, "reordered: record 5"),
    ("beginning-cut-off", lambda found: found[2:], 1, "missing: the records before 3"),
]


@pytest.mark.parametrize(("change", "line", "what"), [pytest.param(*row[1:], id=row[0]) for row in BREAKS])
def test_verify_finds_what_was_done_to_a_line(
    path: Path, change: Callable[[list[bytes]], list[bytes]], line: int, what: str
) -> None:
    write(path, 10)
    assert reader.verify(str(path)).problems == []
    path.write_bytes(b"".join(one + b"\n" for one in change(lines(path))))
    problems = reader.verify(str(path)).problems
    assert any((one.file, one.line) == (str(path), line) and one.what.startswith(what) for one in problems), problems


def test_verify_finds_a_missing_file(path: Path) -> None:
    write(path, 60, max_bytes=2000, keep=100)
    Path(f"{path}.3").unlink()
    problems = reader.verify(str(path)).problems
    assert [(one.file, one.line) for one in problems] == [(f"{path}.2", 1)]
    assert problems[0].what.startswith("missing")


def test_a_number_that_somebody_gave_a_copy_is_not_ours(path: Path) -> None:
    write(path, 10)
    theirs = [path.with_name(f"{path.name}.{number}") for number in (202401, 2024)]
    for one in theirs:
        one.write_bytes(path.read_bytes())
        one.chmod(0o600)
    another = path.with_name(f"{path.name}.4")
    another.write_text("notes\n")
    another.chmod(0o600)
    write(path, 60, 10, max_bytes=2000, keep=3)
    assert all(one.exists() for one in (*theirs, another))
    another.unlink()
    assert [Path(name).name for name in rotated(str(path))] == [f"{path.name}.{number}" for number in (3, 2, 1)]
    sound(path)


def test_what_a_larger_keep_left_goes_also_when_a_crash_left_a_number_free(path: Path) -> None:
    write(path, 60, max_bytes=2000, keep=100)
    assert len(rotated(str(path))) > 5
    Path(f"{path}.5").unlink()
    write(path, 60, 60, max_bytes=2000, keep=2)
    assert [Path(name).name for name in rotated(str(path))] == ["audit.jsonl.2", "audit.jsonl.1"]


def test_a_rotated_files_beginning_cannot_be_cut_off_unseen(path: Path) -> None:
    write(path, 60, max_bytes=2000, keep=2)
    oldest = Path(rotated(str(path))[0])
    oldest.write_bytes(b"".join(one + b"\n" for one in lines(oldest)[1:]))
    assert reader.verify(str(path)).problems[0].what.startswith("missing: the records before")


def test_an_edit_of_the_last_line_changes_the_last_hash_alone(path: Path) -> None:
    write(path, 3)
    before = sound(path).sha256
    path.write_bytes(path.read_bytes().replace(b'"n":2', b'"n":3'))
    assert sound(path).sha256 != before


def test_what_follows_a_damaged_line_goes_on_counting(path: Path) -> None:
    write(path, 3)
    with path.open("ab") as file:
        file.write(b"\0" * 100 + b"\n")
    write(path, 2, 3)
    verdict = reader.verify(str(path))
    assert [(one.line, one.what) for one in verdict.problems] == [(4, "edited: it is not a record")]
    assert verdict.last == 5


# --- crashes -------------------------------------------------------------------------------------------------------


def test_a_torn_line_is_kept_as_what_it_is(path: Path) -> None:
    write(path, 3)
    torn = b'{"time":"2026-\xff\x00'
    with path.open("ab") as file:
        file.write(torn)
    assert reader.verify(str(path)).problems[0].what.startswith("torn")
    write(path, 2, 3)
    found = records(path)
    assert [one["event"] for one in found] == ["test", "test", "test", "recovered", "test", "test"]
    assert found[3]["torn"]["text"].encode("latin-1") == torn
    assert found[3]["torn"]["bytes"] == len(torn)
    assert sound(path).recovered == 1
    assert not Path(f"{path}.torn").exists()


@pytest.mark.parametrize("cut", [False, True])
def test_a_crash_while_a_torn_line_is_mended_loses_nothing(path: Path, cut: bool) -> None:
    write(path, 3)
    Path(f"{path}.torn").write_bytes(b"torn")
    if not cut:
        with path.open("ab") as file:
            file.write(b"torn")
    write(path, 1, 3)
    assert [one["torn"]["text"] for one in records(path) if one["event"] == "recovered"] == ["torn"]
    assert sound(path).records == 5


def test_a_file_that_is_all_torn_begins_again(path: Path) -> None:
    path.write_bytes(b"torn")
    write(path, 1)
    assert [one["event"] for one in records(path)] == ["recovered", "test"]
    assert sound(path).first == 1


def test_a_crash_between_the_renames_of_a_rotation_loses_nothing(path: Path) -> None:
    write(path, 20, max_bytes=2000, keep=100)
    path.rename(f"{path}.7")  # as if those between had been moved, and this one not yet: numbers are free
    for name in rotated(str(path))[1:]:
        Path(name).rename(f"{name}0")
    Path(f"{path}.7").rename(f"{path}.1")
    write(path, 20, 20, max_bytes=2000, keep=100)
    assert numbers(path) == list(range(40))
    sound(path)


def test_who_moves_the_file_away_does_not_break_the_chain(path: Path) -> None:
    with AuditLog(path) as audit:
        audit.append({"event": "test", "n": 0})
        path.rename(f"{path}.1")
        audit.append({"event": "test", "n": 1})
        path.rename(path.with_name("elsewhere"))
        audit.append({"event": "test", "n": 2})
    assert [(one["event"], one["sequence"]) for one in map(json.loads, lines(path))] == [
        ("log_rotated", 4),
        ("test", 5),
    ]


# --- a disk that takes no more -------------------------------------------------------------------------------------


def on_a_small_disk(tmp_path: Path, program: str) -> None:
    """Run *program* where /small is a tmpfs of 64 KiB, in a mount namespace of its own."""
    small = tmp_path / "small"
    small.mkdir()
    prelude = f"""
        import errno, json, os
        from pathlib import Path
        from sandboxd.audit import AuditError, AuditLog, reader
        small = Path({str(small)!r})
        path = small / "audit.jsonl"
        filling = small / "filling"
        def fill():
            with filling.open("wb", buffering=0) as file:
                try:
                    while file.write(b"x" * 512): pass
                except OSError as error:
                    assert error.errno == errno.ENOSPC
        def events():
            return [json.loads(line)["event"] for line in path.read_text().splitlines()]
        """
    code = textwrap.dedent(prelude) + textwrap.dedent(program)
    mount = f'mount -t tmpfs -o size=64k none {small} && exec {sys.executable} -c "$0"'
    done = subprocess.run(["unshare", "--mount", "sh", "-c", mount, code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_root
def test_a_full_disk_is_an_error_and_leaves_no_part_of_a_line(tmp_path: Path) -> None:
    on_a_small_disk(
        tmp_path,
        """
        with AuditLog(path) as audit:
            audit.append({"event": "first"})
            fill()
            for _ in range(2):
                try:
                    audit.append({"event": "refused", "code": "x" * 9000})
                except AuditError as error:
                    assert error.errno == errno.ENOSPC and error.filename == str(path)
                else:
                    raise AssertionError
            assert path.read_bytes().endswith(b"\\n") and events() == ["first"]
            audit.append({"event": "kept"}, late=True)
            audit.append({"event": "kept_too", "code": "x" * 9000}, late=True)
            filling.unlink()
            audit.append({"event": "second"})
        assert events() == ["first", "kept", "kept_too", "second"], events()
        assert reader.verify(str(path)).problems == []
        """,
    )


@needs_root
def test_records_that_are_lost_are_counted(tmp_path: Path) -> None:
    on_a_small_disk(
        tmp_path,
        """
        with AuditLog(path, on_failure="continue") as audit:
            audit.append({"event": "first"})
            fill()
            for _ in range(3):
                audit.append({"event": "lost", "code": "x" * 9000})
            filling.unlink()
            audit.append({"event": "second"})
        assert events() == ["first", "gap", "second"], events()
        verdict = reader.verify(str(path))
        assert (verdict.problems, verdict.lost) == ([], 3)
        """,
    )


@needs_root
def test_rotation_on_a_full_disk_goes_on_when_there_is_room(tmp_path: Path) -> None:
    on_a_small_disk(
        tmp_path,
        """
        with AuditLog(path, max_bytes=5000, keep=100) as audit:
            failed = 0
            for number in range(400):
                try:
                    audit.append({"event": "test", "n": number, "text": "x" * 300})
                except AuditError as error:
                    assert error.errno == errno.ENOSPC
                    failed += 1
                    for old in reader.rotated(str(path))[:3]:
                        os.unlink(old)
            assert 0 < failed < 40, failed
        assert reader.verify(str(path)).problems == []
        """,
    )


@contextlib.contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """The kernel writes what fits, then answers EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_short_write_is_taken_back(path: Path) -> None:
    with AuditLog(path) as audit:
        audit.append({"event": "test", "n": 0})
        whole = path.read_bytes()
        with files_no_longer_than(len(whole) + 50), pytest.raises(AuditError) as caught:
            audit.append({"event": "test", "n": 1})
        assert caught.value.errno == errno.EFBIG
        assert path.read_bytes() == whole
        audit.append({"event": "test", "n": 2})
    assert numbers(path) == [0, 2]
    sound(path)


def test_what_is_kept_in_memory_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "PENDING_BYTES", 1000)
    with AuditLog(path) as audit:
        audit.append({"event": "test", "n": 0})
        with files_no_longer_than(path.stat().st_size + 50):
            for number in range(1, 40):
                audit.append({"event": "test", "n": number}, late=True)
        assert audit.is_behind
        audit.flush()
        assert not audit.is_behind
    kept = len(numbers(path))
    assert numbers(path) == list(range(kept))
    assert 1 < kept < 20
    assert sound(path).lost == 40 - kept


@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_a_log_that_cannot_be_opened(tmp_path: Path, on_failure: Any) -> None:
    path = tmp_path / "missing" / "audit.jsonl"
    if on_failure == "stop":
        with pytest.raises(AuditError) as caught:
            AuditLog(path)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(path))
        return
    with AuditLog(path, on_failure="continue") as audit:
        audit.append({"event": "lost"})
        path.parent.mkdir()
        audit.append({"event": "test", "n": 1})
    assert [one["event"] for one in records(path)] == ["gap", "test"]


# --- whose file it is ----------------------------------------------------------------------------------------------


def test_the_files_are_the_owners_alone(path: Path) -> None:
    write(path, 30, max_bytes=2000)
    assert {Path(name).stat().st_mode & 0o777 for name in [*rotated(str(path)), str(path)]} == {0o600}


def test_a_mode_that_the_operator_chose_stays(path: Path) -> None:
    write(path, 1)
    path.chmod(0o640)
    write(path, 30, 1, max_bytes=2000)
    assert path.stat().st_mode & 0o777 == 0o640


def _link(path: Path) -> None:
    path.with_name("target").touch(0o600)
    path.symlink_to(path.with_name("target"))


def _second_name(path: Path) -> None:
    path.with_name("target").touch(0o600)
    path.hardlink_to(path.with_name("target"))


def _open_to_all(path: Path) -> None:
    path.touch()
    path.chmod(0o666)


@pytest.mark.parametrize(
    ("prepare", "number"),
    [
        pytest.param(_link, errno.ELOOP, id="symbolic-link"),
        pytest.param(_second_name, errno.EPERM, id="hard-link"),
        pytest.param(_open_to_all, errno.EPERM, id="writable-by-others"),
        pytest.param(lambda path: os.mkfifo(path, 0o600), errno.EINVAL, id="fifo"),
        pytest.param(lambda path: path.mkdir(), errno.EISDIR, id="directory"),
    ],
)
def test_a_file_that_could_be_somebody_elses_is_refused(
    path: Path, prepare: Callable[[Path], None], number: int
) -> None:
    prepare(path)
    with pytest.raises(AuditError) as caught:
        AuditLog(path)
    assert caught.value.errno == number


@pytest.mark.parametrize("name", ["audit.jsonl.1", "audit.jsonl.torn"])
def test_what_stands_beside_it_is_looked_at_as_closely(path: Path, name: str) -> None:
    _open_to_all(path.with_name(name))
    with pytest.raises(AuditError) as caught:
        AuditLog(path)
    assert caught.value.errno == errno.EPERM


# --- several writers -----------------------------------------------------------------------------------------------


def test_eight_threads_write_one_chain(path: Path) -> None:
    with AuditLog(path, max_bytes=20_000, keep=1000) as audit:

        def work(first: int) -> None:
            for number in range(first, first + 100):
                audit.append({"event": "test", "n": number})

        threads = [threading.Thread(target=work, args=(100 * one,)) for one in range(8)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    assert sorted(numbers(path)) == list(range(800))
    sound(path)


def test_several_processes_write_one_chain(path: Path) -> None:
    children = []
    for one in range(4):
        pid = os.fork()
        if pid == 0:
            status = 1
            with contextlib.suppress(BaseException):
                write(path, 200, 200 * one, max_bytes=20_000, keep=1000)
                status = 0
            os._exit(status)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    assert sorted(numbers(path)) == list(range(800))
    sound(path)


def test_a_writer_that_is_killed_holds_nobody_up(path: Path) -> None:
    program = "import sys; from sandboxd.audit import AuditLog\na = AuditLog(sys.argv[1])\nprint(flush=True)\n"
    program += "while True: a.append({'event': 'other', 'text': 'x' * 100_000})"
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        write(path, 20)
        other.kill()
    write(path, 20, 20)
    assert numbers(path) == list(range(40))
    sound(path)


@pytest.mark.parametrize("buffered", [False, True])
def test_a_forked_child_goes_on_by_itself(path: Path, buffered: bool) -> None:
    with AuditLog(path, buffered=buffered) as audit:
        audit.append({"event": "test", "n": 0})
        pid = os.fork()
        if pid == 0:
            status = 1
            with contextlib.suppress(BaseException):
                audit.append({"event": "test", "n": 1})
                audit.close()
                status = 0
            os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        audit.append({"event": "test", "n": 2})
    assert sorted(numbers(path)) == [0, 1, 2]
    sound(path)


def test_a_late_record_does_not_wait_for_a_writer_and_is_written_by_it(path: Path) -> None:
    with AuditLog(path) as audit:
        with audit._held():
            audit.append({"event": "test", "n": 0}, late=True)
            assert path.read_bytes() == b""
        assert numbers(path) == [0]
        audit.append({"event": "test", "n": 1}, late=True)
        assert numbers(path) == [0, 1]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """What anybody who may read it can do."""
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def test_who_may_not_wait_is_told_to_and_what_is_late_is_kept(path: Path) -> None:
    with AuditLog(path) as audit:
        with locked(path):
            with pytest.raises(BlockingIOError):
                audit.append({"event": "test", "n": 9}, wait=False)
            audit.append({"event": "test", "n": 0}, late=True, wait=False)
            assert audit.is_behind
            with pytest.raises(BlockingIOError):
                audit.flush(wait=False)
        audit.append({"event": "test", "n": 1}, wait=False)
        assert numbers(path) == [0, 1]
    sound(path)


@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_where_waiting_was_in_vain_nobody_waits_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, on_failure: Any
) -> None:
    monkeypatch.setattr("sandboxd.audit.file.LOCK_SECONDS", 0.05)
    with AuditLog(path, on_failure=on_failure) as audit:
        with locked(path):
            for wait in (True, False):
                refused = pytest.raises(AuditError) if on_failure == "stop" else contextlib.nullcontext()
                with refused as caught:
                    audit.append({"event": "test", "n": 9}, wait=wait)
                assert caught is None or caught.value.errno == errno.EBUSY
            audit.append({"event": "test", "n": 0}, late=True, wait=False)
        audit.append({"event": "test", "n": 1}, wait=False)
    assert numbers(path) == [0, 1]
    assert sound(path).lost == (2 if on_failure == "continue" else 0)


def test_what_comes_while_another_thread_writes_is_bounded_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "PENDING_BYTES", 1000)
    with AuditLog(path) as audit:
        with audit._held():
            for number in range(40):
                audit.append({"event": "test", "n": number}, late=True, wait=False)
        audit.flush()
    kept = len(numbers(path))
    assert 1 < kept < 20
    assert sound(path).lost == 40 - kept


# --- in the background ---------------------------------------------------------------------------------------------


def test_a_buffered_log_writes_by_itself(path: Path) -> None:
    with AuditLog(path, buffered=True) as audit:
        for number in range(1000):
            audit.append({"event": "test", "n": number})
        leftovers.eventually(lambda: path.read_bytes().count(b"\n") == 1000, 10, "nothing is written")
    assert numbers(path) == list(range(1000))
    sound(path)


def test_a_buffered_log_is_complete_after_flush(path: Path) -> None:
    with AuditLog(path, buffered=True) as audit:
        for number in range(log.QUEUE + 10):
            audit.append({"event": "test", "n": number})
        audit.flush()
        assert len(lines(path)) == log.QUEUE + 10


def test_a_buffered_log_is_complete_when_the_program_ends(path: Path) -> None:
    program = "import sys; from sandboxd.audit import AuditLog\na = AuditLog(sys.argv[1], buffered=True)\n"
    program += "for n in range(100): a.append({'event': 'test', 'n': n})"
    command = [sys.executable, "-W", "always", "-c", program, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stderr == ""  # nothing was left to the interpreter's own end
    assert numbers(path) == list(range(100))


def test_an_error_in_the_background_surfaces_and_nothing_accepted_is_lost(path: Path) -> None:
    with AuditLog(path, buffered=True) as audit:
        audit.append({"event": "test", "n": 0})
        audit.flush()
        with files_no_longer_than(path.stat().st_size + 50):
            audit.append({"event": "test", "n": 1})
            with pytest.raises(AuditError):
                audit.flush()
            with pytest.raises(AuditError) as caught:
                audit.append({"event": "test", "n": 2})
            assert caught.value.errno == errno.EFBIG
        audit.flush()
        audit.append({"event": "test", "n": 3})
    assert numbers(path) == [0, 1, 3]


def test_the_time_is_that_of_the_call(path: Path) -> None:
    with AuditLog(path, buffered=True) as audit:
        before = time.time_ns()
        audit.append({"event": "test", "n": 0})
        after = time.time_ns()
    assert record.stamp(before) <= records(path)[0]["time"] <= record.stamp(after)


def test_an_append_costs_its_caller_little(path: Path) -> None:
    with AuditLog(path, buffered=True) as audit:
        costs = []
        for _ in range(20):
            begun = time.thread_time_ns()
            for _ in range(100):
                audit.append({"event": "tool_called", "tool": "x", "arguments": {"a": 1}, "result": [1, 2, 3]})
            costs.append((time.thread_time_ns() - begun) / 100)
            audit.flush()
    assert min(costs) < 50_000  # nanoseconds of this thread; 1,500 were measured


def test_a_closed_log_says_so(path: Path) -> None:
    audit = AuditLog(path)
    audit.close()
    audit.close()
    with pytest.raises(RuntimeError, match="closed"):
        audit.append({"event": "test"})


# --- what a line holds ---------------------------------------------------------------------------------------------

HOSTILE = [
    'x","event":"forged"}\n{"time":"2026',
    "\r\n\x1b[2J\x00\x7f\x9b\u2028\u202e",
    "lone \udc80 surrogate",
    "\\u000a \\n \\",
    "\U0001f600 ä",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_can_end_a_line_or_reach_a_terminal(path: Path, text: str) -> None:
    with AuditLog(path) as audit:
        audit.append({"event": "test", "code": text, "arguments": {text: [text]}, "client": {"name": text}})
    data = path.read_bytes()
    assert data.count(b"\n") == 1
    assert all(0x20 <= byte < 0x7F for byte in data[:-1])
    found = records(path)[0]
    assert (found["code"], found["arguments"]) == (text, {text: [text]})
    assert found["event"] == "test"


def test_what_json_cannot_say_is_said_in_words(path: Path) -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    with AuditLog(path) as audit:
        audit.append({"event": "test", "arguments": {"a": float("nan"), "b": object(), "c": b"x"}})
        audit.append({"event": "test", "result": cycle, "tool": "t"})
        audit.append({"event": "test", "text": deep, "tool": "t"})
        audit.append({"event": "test", "text": 10**5000, "tool": "t"})
    found = records(path)
    assert found[0]["arguments"] == {"a": "NaN", "b": {"unrecordable": "object"}, "c": {"unrecordable": "bytes"}}
    assert found[1]["result"] == {"unrecordable": "ValueError"}
    assert found[2]["text"] == {"unrecordable": "RecursionError"}
    assert found[3]["text"] == {"unrecordable": "ValueError"}
    assert all(one["tool"] == "t" for one in found[1:])
    sound(path)


def test_long_arguments_and_results_are_cut_with_length_and_hash(path: Path) -> None:
    value = {"rows": ["x" * 1000] * 20}
    text = json.dumps(value, separators=(",", ":"))
    with AuditLog(path) as audit:
        audit.append({"event": "tool_called", "arguments": value, "result": "short"})
    found = records(path)[0]
    digest = hashlib.sha256(text.encode()).hexdigest()
    begun = found["arguments"].pop("text")
    assert text.startswith(begun)
    assert record.CAP_BYTES - 12 < len(json.dumps(begun)) - 2 <= record.CAP_BYTES
    assert found["arguments"] == {"bytes": len(text), "sha256": digest}
    assert found["result"] == "short"


HALVES = "\ud83d\ude00"
"""Of a character, each for itself: read back from JSON they are that character."""


@pytest.mark.parametrize("one", ["x", "\0", '"', "\\", "ä", "\U0001f600", "a\U0001f600", "\udc80", HALVES])
def test_an_excerpt_is_cut_by_the_length_that_it_has_in_a_line(one: str) -> None:
    text = one * record.CAP_BYTES
    found = record.Excerpt.of(text, 99_999, "hash")
    assert text.startswith(found["text"])
    escaped = len(json.dumps(found["text"])) - 2
    assert record.CAP_BYTES - 12 < escaped <= record.CAP_BYTES or (one == HALVES and 0 < escaped <= record.CAP_BYTES)
    assert (found["bytes"], found["sha256"]) == (99_999, "hash")
    assert record.capped(found) is found


def test_a_long_source_is_the_same_in_pieces(path: Path) -> None:
    code = "".join(HOSTILE) * 20_000
    assert len(code) > 3 * record.CHUNK
    with AuditLog(path) as audit:
        audit.append({"event": "test", "code": code, "n": 1})
    assert (records(path)[0]["code"], records(path)[0]["n"]) == (code, 1)
    sound(path)


def test_nothing_passes_for_a_cut_value() -> None:
    false = {"text": "[1", "bytes": 99999, "sha256": "0"}
    assert record.capped(false)["bytes"] == len(json.dumps(false, separators=(",", ":")))


@pytest.mark.parametrize("name", ["default", "strict", "data"])
def test_a_policys_hash_is_the_same_without_the_model(name: str) -> None:
    assert record.policy_sha256(load(name).plain()) == load(name).sha256


# --- secrets -------------------------------------------------------------------------------------------------------


def test_a_named_variables_value_is_nowhere_in_a_record() -> None:
    clear = redact.Redactor(["API_KEY"], {"API_KEY": "s3cret'\n", "OTHER": "plain"})
    clean = clear(
        {
            "event": "run_ended",
            "code": "key = \"s3cret'\n\"; other = 'plain'",
            "error": {"message": repr("s3cret'\n"), "traceback": json.dumps("a s3cret'\n")},
            "args": ["--key=s3cret'\n"],
            "result": {"s3cret'\n": 1},
        }
    )
    assert "s3cret" not in json.dumps(clean)
    assert clean["redacted"] is True
    assert "plain" in clean["code"]


def test_what_stands_under_a_named_key_is_left_out_wherever_it_comes_again() -> None:
    clear = redact.Redactor(["password", "*_token"])
    clean = clear(
        {
            "event": "tool_called",
            "tool": "login",
            "arguments": {"user": "ann", "Password": "hunter22", "deep": [{"api_token": ["t0ken"], "pin_token": 1234}]},
            "result": {"ok": False, "value": None, "error": {"message": "hunter22 is wrong, t0ken too"}},
        }
    )
    assert clean["arguments"] == {
        "user": "ann",
        "Password": "[redacted]",
        "deep": [{"api_token": "[redacted]", "pin_token": "[redacted]"}],
    }
    assert clean["result"]["error"]["message"] == "[redacted] is wrong, [redacted] too"
    assert clean["tool"] == "login"


def test_a_very_short_secret_goes_only_where_it_stands_alone() -> None:
    clear = redact.Redactor(["PIN"], {"PIN": "1"})
    clean = clear({"event": "x", "code": "1 + 11", "args": ["1", "11"]})
    assert (clean["code"], clean["args"]) == ("1 + 11", ["[redacted]", "11"])


def test_a_secret_is_left_out_before_a_value_is_cut(path: Path) -> None:
    value = "x" * (record.CAP_BYTES - 10) + "s3cret-s3cret-s3cret"
    with AuditLog(path, redact=["key"]) as audit:
        audit.append({"event": "tool_called", "arguments": {"key": "s3cret-s3cret-s3cret"}, "result": value})
    assert b"s3cret" not in path.read_bytes()
    assert records(path)[0]["arguments"] == {"key": "[redacted]"}


def test_a_record_that_nothing_is_left_out_of_is_unchanged() -> None:
    given = {"event": "x", "arguments": {"a": 1}}
    assert redact.Redactor(["key"])(given) is given
    assert redact.Redactor()(given) is given


def test_a_policy_names_secrets_by_patterns_of_names() -> None:
    chosen = Policy(name="x", audit=Audit(redact=("API_KEY", "*_TOKEN")))
    assert chosen.plain()["audit"] == {"redact": ["API_KEY", "*_TOKEN"]}


# --- reading -------------------------------------------------------------------------------------------------------


def fill(path: Path) -> None:
    with AuditLog(path, max_bytes=2500, keep=100) as audit:
        for number in range(40):
            client = {"uid": 1000 + number % 2, "pid": 1, "name": None}
            audit.append({"event": "test", "id": f"{number:04x}", "client": client, "n": number})


def test_a_reader_of_one_user_sees_that_users_records(path: Path) -> None:
    fill(path)
    found = [json.loads(line)["n"] for line in reader.page(str(path), uid=1001).lines]
    assert found == list(range(1, 40, 2))
    assert reader.page(str(path), uid=100).lines == []


def test_a_reader_of_one_run_sees_that_run(path: Path) -> None:
    fill(path)
    assert [json.loads(line)["n"] for line in reader.page(str(path), run="0007").lines] == [7]
    assert reader.page(str(path), run="0007", uid=1000).lines == []


def test_a_record_is_read_page_by_page(path: Path) -> None:
    fill(path)
    cursor, pages, found = reader.START, 0, []
    while True:
        page = reader.page(str(path), cursor, most_bytes=700)
        found += [json.loads(line).get("n") for line in page.lines]
        cursor, pages = page.cursor, pages + 1
        if page.end:
            break
    assert [n for n in found if n is not None] == list(range(40))
    assert pages > 10


def test_a_page_looks_at_no_more_than_it_may(path: Path) -> None:
    fill(path)
    page = reader.page(str(path), uid=5, scan_bytes=1000)
    assert (page.lines, page.end) == ([], False)
    assert page.cursor != reader.START


def test_a_cursor_in_the_middle_of_a_line_gives_no_part_of_it(path: Path) -> None:
    with AuditLog(path) as audit:
        audit.append({"event": "test", "code": '{"time":"x","event":"y","id":null,"client":{"uid":7}}'})
        audit.append({"event": "test", "n": 1})
    inode = path.stat().st_ino
    whole = path.read_bytes().splitlines(keepends=True)
    for at in range(1, path.stat().st_size + 5):
        found = reader.page(str(path), (inode, at)).lines
        assert all(line in whole for line in found)


def test_a_reader_waits_for_the_end_of_a_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, 3)
    line = lines(path)[-1]
    path.write_bytes(b"".join(one + b"\n" for one in lines(path)[:-1]))
    waiting = threading.Event()
    sleep = time.sleep

    def pause(seconds: float) -> None:
        waiting.set()
        sleep(seconds)

    monkeypatch.setattr("sandboxd.audit.reader.time.sleep", pause)
    with path.open("ab", buffering=0) as writer, ThreadPoolExecutor(1) as pool:
        fcntl.flock(writer, fcntl.LOCK_EX)
        writer.write(line[:40])
        verdict = pool.submit(reader.verify, str(path))
        assert waiting.wait(10)
        writer.write(line[40:] + b"\n")
        fcntl.flock(writer, fcntl.LOCK_UN)
        assert (verdict.result(10).problems, verdict.result().records) == ([], 3)


def test_following_goes_on_across_rotations(path: Path) -> None:
    write(path, 5)
    looks = iter(range(100))

    class Enough(Exception):
        pass

    def wait() -> None:
        look = next(looks)
        if look == 20:
            raise Enough
        write(path, 7, 5 + 7 * look, max_bytes=1000, keep=50)

    found: list[dict[str, Any]] = []
    with contextlib.suppress(Enough):
        found.extend(map(json.loads, reader.follow(lambda cursor: reader.page(str(path), cursor), wait)))
    assert [one["n"] for one in found if one["event"] == "test"] == list(range(145))
    assert [one["sequence"] for one in found] == list(range(1, found[-1]["sequence"] + 1))
