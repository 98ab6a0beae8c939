"""Results: the public object, what an engine's answer must be, and the life of file contents."""

from __future__ import annotations

import copy
import errno
import gc
import json
import mmap
import os
import pickle
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from sandboxd.client.result import LimitHit, Result, Usage
from sandboxd.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# The object that users were promised, key by key and in this order.
PROMISED = {
    "id": None,
    "status": None,
    "exit_code": None,
    "signal": None,
    "stdout": None,
    "stderr": None,
    "stdout_dropped_bytes": None,
    "stderr_dropped_bytes": None,
    "error": ["type", "message", "traceback", "line"],
    "results": None,
    "files": None,
    "files_skipped": None,
    "limits_hit": None,
    "usage": [
        "wall_seconds",
        "cpu_user_seconds",
        "cpu_system_seconds",
        "memory_peak_bytes",
        "pids_peak",
        "throttled_seconds",
    ],
    "timings": ["queued_seconds", "setup_seconds", "run_seconds", "tool_wait_seconds"],
    "warm": None,
    "isolation": [
        "namespaces",
        "cgroup",
        "seccomp",
        "landlock_abi",
        "uid",
        "network",
        "rootfs",
        "kernel",
        "missing",
    ],
    "state": None,
}

STDOUT = "grüße\n".encode()
STDERR = b"oops \xff\n"
FIRST, SECOND = b"\x89PNG...", b""
PAYLOAD = STDOUT + STDERR + FIRST + SECOND


def answer(**changes: Any) -> dict[str, Any]:
    """An engine's header for PAYLOAD, with *changes*."""
    own: dict[str, Any] = {
        "id": "7f3c",
        "status": "error",
        "exit_code": 1,
        "signal": None,
        "stdout": [0, len(STDOUT)],
        "stderr": [len(STDOUT), len(STDERR)],
        "stdout_dropped_bytes": 0,
        "stderr_dropped_bytes": 12,
        "error": {"type": "ValueError", "message": "no", "traceback": "Traceback ...", "line": 3},
        "results": [{"mime": {"text/plain": "42"}}],
        "files": [
            {"path": "a/empty", "size_bytes": 0, "offset": len(PAYLOAD)},
            {"path": "chart.png", "size_bytes": len(FIRST), "offset": len(STDOUT + STDERR)},
        ],
        "files_skipped": 1,
        "limits_hit": [
            {"limit": "pids", "value": 64, "evidence": {"source": "cgroup", "detail": "pids.events max 3"}},
            {"limit": "syscall", "value": None, "evidence": {"source": "seccomp", "detail": "SIGSYS"}},
        ],
        "usage": {
            "wall_seconds": 0.25,
            "cpu_user_seconds": 0.125,
            "cpu_system_seconds": 0,
            "memory_peak_bytes": 1 << 20,
            "pids_peak": None,
            "throttled_seconds": 0.0,
        },
        "timings": {"queued_seconds": 0.0, "setup_seconds": 0.001, "run_seconds": 0.25},
        "warm": False,
        "isolation": {
            "namespaces": ["user", "pid", "mnt", "ipc", "uts", "cgroup", "net"],
            "cgroup": {"version": "hybrid", "controllers": ["memory", "pids", "cpu"]},
            "seccomp": {"policy": "default", "sha256": "ab" * 32},
            "landlock_abi": 7,
            "uid": 1_000_000,
            "network": "none",
            "rootfs": "host",
            "kernel": "6.12.0",
            "missing": [],
        },
        "state": None,
    }
    return {**own, **changes}


def memfd(content: bytes) -> int:
    fd = os.memfd_create("answer", os.MFD_CLOEXEC)
    os.write(fd, content)
    return fd


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


# --- the object ---------------------------------------------------------------------------------------------------


def test_the_object_has_the_promised_keys_in_their_order() -> None:
    shown = Result.from_wire(answer(), PAYLOAD).to_dict()
    assert list(shown) == list(PROMISED)
    for key, fields in PROMISED.items():
        if fields is not None:
            assert list(shown[key]) == fields
    assert shown["results"] == [{"mime": {"text/plain": "42"}}]
    assert shown["files"] == [{"path": "a/empty", "size_bytes": 0}, {"path": "chart.png", "size_bytes": len(FIRST)}]
    assert list(shown["limits_hit"][0]) == ["limit", "value", "evidence"]
    assert list(shown["limits_hit"][0]["evidence"]) == ["source", "detail"]
    assert list(shown["isolation"]["cgroup"]) == ["version", "controllers"]
    assert list(shown["isolation"]["seccomp"]) == ["policy", "sha256"]


def test_attributes_reach_what_the_object_shows() -> None:
    result = Result.from_wire(answer(), PAYLOAD)
    assert (result.status, result.exit_code, result.signal) == ("error", 1, None)
    assert result.stdout == "grüße\n"
    assert result.results[0].mime["text/plain"] == "42"
    assert result.error is not None
    assert result.error.line == 3
    assert result.usage.memory_peak_bytes == 1 << 20
    assert result.isolation is not None
    assert result.isolation.seccomp.policy == "default"
    assert result.limits_hit[0].evidence.source == "cgroup"


def test_output_is_utf8_with_replacement() -> None:
    assert Result.from_wire(answer(), PAYLOAD).stderr == "oops \ufffd\n"


def test_json_is_the_object_and_harmless_to_a_terminal() -> None:
    hostile = "\x1b]0;x\x07\x9b31m\u202e\x7f".encode()
    result = Result.from_wire(answer(stdout=[0, len(hostile)], stderr=[0, 0], files=[]), hostile)
    text = result.to_json()
    assert json.loads(text) == result.to_dict()
    assert text.isascii()
    assert text.replace("\x7f", "").isprintable()
    assert json.loads(result.to_json(indent=2)) == result.to_dict()


def test_a_repr_is_short() -> None:
    long = b"x" * 100_000
    shown = repr(Result.from_wire(answer(stdout=[0, len(long)], stderr=[0, 0], files=[]), long))
    assert shown.startswith("Result(status='error', exit_code=1, stdout='xxx")
    assert len(shown) < 200


def test_a_result_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Result.from_wire(answer(), PAYLOAD).status = "ok"


@pytest.mark.parametrize(
    "status",
    ["ok", "error", "timeout", "cpu", "memory", "output", "denied", "killed", "cancelled", "busy", "internal"],
)
def test_every_promised_status_is_known(status: str) -> None:
    assert Result.from_wire(answer(status=status), PAYLOAD).status == status


@pytest.mark.parametrize("source", ["cgroup", "clock", "wait", "statfs", "reader", "seccomp", "program"])
def test_every_promised_source_of_evidence_is_known(source: str) -> None:
    hit = {"limit": "wall_seconds", "value": 0.5, "evidence": {"source": source, "detail": ""}}
    assert LimitHit.model_validate(hit).evidence.source == source


@pytest.mark.parametrize("state", ["preserved", "reset", "lost", None])
def test_every_promised_state_is_known(state: str | None) -> None:
    assert Result.from_wire(answer(state=state), PAYLOAD).state == state


# --- answers that are not Results ---------------------------------------------------------------------------------


def changed(path: str, value: Any) -> dict[str, Any]:
    header = copy.deepcopy(answer())
    *parents, last = path.split(".")
    place: Any = header
    for part in parents:
        place = place[int(part) if part.isdigit() else part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return header


ODD: list[tuple[str, Any]] = [
    *[(key, ...) for key in PROMISED],
    *[(f"usage.{key}", ...) for key in PROMISED["usage"] or ()],
    *[(f"isolation.{key}", ...) for key in PROMISED["isolation"] or ()],
    ("extra", 1),
    ("usage.extra", 1),
    ("files.0.extra", 1),
    ("files.0.offset", ...),
    ("id", 3),
    ("status", "fine"),
    ("exit_code", "0"),
    ("exit_code", True),
    ("stdout", "text"),
    ("stdout", [0]),
    ("stdout", [0, 1, 2]),
    ("stdout", None),
    ("stdout", [0, 1 << 70]),
    ("stdout", [-1, 2]),
    ("stdout", [0, -1]),
    ("stdout", [True, 2]),
    ("stderr", [len(PAYLOAD), 1]),
    ("stdout_dropped_bytes", -1),
    ("error", "ValueError"),
    ("error.line", "3"),
    ("results", {"mime": {}}),
    ("results", [{"mime": {"text/plain": 42}}]),
    ("files", {}),
    ("files", None),
    ("files", ["chart.png"]),
    ("files.0.path", "../x"),
    ("files.0.path", "/etc/passwd"),
    ("files.0.path", None),
    ("files.1.size_bytes", -1),
    ("files.1.size_bytes", 1 << 40),
    ("files.1.offset", len(PAYLOAD)),
    ("files.1.offset", -5),
    ("limits_hit.0.limit", "seconds"),
    ("limits_hit.0.evidence.source", "guess"),
    ("usage.wall_seconds", -1.0),
    ("usage.wall_seconds", float("nan")),
    ("usage.wall_seconds", float("inf")),
    ("usage.memory_peak_bytes", 1.5),
    ("timings.run_seconds", "1"),
    ("warm", 0),
    ("isolation.cgroup.version", "v3"),
    ("isolation.uid", None),
    ("state", "kept"),
]


@pytest.mark.parametrize(("path", "value"), [pytest.param(p, v, id=f"{p}={v!r}"[:50]) for p, v in ODD])
def test_an_odd_answer_is_a_protocol_error_and_leaves_no_descriptor(path: str, value: Any) -> None:
    fd = memfd(PAYLOAD)
    with pytest.raises(ProtocolError, match="The engine's answer"):
        Result.from_wire(changed(path, value), fd)
    assert not is_open(fd)


# --- contents -----------------------------------------------------------------------------------------------------

CARRIERS: list[tuple[str, Callable[[], Any]]] = [
    ("bytes", lambda: PAYLOAD),
    ("memoryview", lambda: memoryview(PAYLOAD)),
    ("descriptor", lambda: memfd(PAYLOAD)),
]


@pytest.mark.parametrize("carrier", [pytest.param(make, id=name) for name, make in CARRIERS])
def test_contents_are_read_until_close(carrier: Callable[[], Any]) -> None:
    result = Result.from_wire(answer(), carrier())
    empty, chart = result.files
    assert (empty.read(), chart.read(), chart.read()) == (b"", FIRST, FIRST)
    result.close()
    result.close()
    for file in result.files:
        with pytest.raises(ValueError, match="was closed"):
            file.read()
    assert result.stdout == "grüße\n"


def test_a_mapping_can_be_closed_after_the_result() -> None:
    fd = memfd(PAYLOAD)
    with mmap.mmap(fd, len(PAYLOAD), prot=mmap.PROT_READ) as mapped:
        os.close(fd)
        with Result.from_wire(answer(), mapped) as result:
            assert result.files[1].read() == FIRST


def test_leaving_the_context_closes_the_descriptor() -> None:
    fd = memfd(PAYLOAD)
    with Result.from_wire(answer(), fd) as result:
        assert is_open(fd)
        assert result.files[1].read() == FIRST
    assert not is_open(fd)


def test_a_collected_result_closes_the_descriptor() -> None:
    fd = memfd(PAYLOAD)
    result = Result.from_wire(answer(), fd)
    assert is_open(fd)
    del result
    gc.collect()
    assert not is_open(fd)


def test_a_file_that_is_kept_keeps_the_contents() -> None:
    fd = memfd(PAYLOAD)
    file = Result.from_wire(answer(), fd).files[1]
    gc.collect()
    assert file.read() == FIRST
    del file
    gc.collect()
    assert not is_open(fd)


def test_a_result_without_files_holds_no_descriptor() -> None:
    fd = memfd(PAYLOAD)
    result = Result.from_wire(answer(files=[]), fd)
    assert not is_open(fd)
    assert result.stdout == "grüße\n"


def test_a_payload_that_shrank_is_a_protocol_error() -> None:
    fd = memfd(PAYLOAD)
    with Result.from_wire(answer(), fd) as result:
        os.ftruncate(fd, len(STDOUT))
        with pytest.raises(ProtocolError, match="shorter"):
            result.files[1].read()


def test_a_result_cannot_be_pickled_and_says_what_can() -> None:
    with Result.from_wire(answer(), memfd(PAYLOAD)) as result, pytest.raises(TypeError, match="to_dict"):
        pickle.dumps(result)


def test_reading_in_threads_while_closing_gives_contents_or_valueerror() -> None:
    big = os.urandom(1 << 20)
    file = {"path": "big", "size_bytes": len(big), "offset": 0}
    wrong: list[object] = []

    def read(result: Result) -> None:
        for _ in range(20):
            try:
                if result.files[0].read() != big:
                    wrong.append("other bytes")
            except ValueError:
                return
            except BaseException as error:
                wrong.append(error)

    for _ in range(10):
        result = Result.from_wire(answer(stdout=[0, 0], stderr=[0, 0], files=[file]), memfd(big))
        threads = [threading.Thread(target=read, args=(result,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        result.close()
        spare = memfd(b"somebody else's")  # most likely the number that has just become free
        for thread in threads:
            thread.join()
        os.close(spare)
    assert wrong == []


# --- saving -------------------------------------------------------------------------------------------------------


def with_file(path: str, content: bytes = b"new") -> Result:
    files = [{"path": path, "size_bytes": len(content), "offset": 0}]
    return Result.from_wire(answer(stdout=[0, 0], stderr=[0, 0], files=files), content)


@pytest.mark.parametrize("by", ["path", "descriptor"])
def test_a_file_is_saved_below_the_directory(by: str, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with_file("a/b/out.txt").files[0].save(tmp_path if by == "path" else fd)
        assert is_open(fd)
    finally:
        os.close(fd)
    assert (tmp_path / "a" / "b" / "out.txt").read_bytes() == b"new"
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["out.txt"]


def test_a_regular_file_is_replaced_and_its_other_names_are_not(tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_bytes(b"a much longer old content")
    os.link(tmp_path / "out.txt", tmp_path / "other name")
    with_file("out.txt").files[0].save(tmp_path)
    assert (tmp_path / "out.txt").read_bytes() == b"new"
    assert (tmp_path / "other name").read_bytes() == b"a much longer old content"


def test_a_link_in_the_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "out.txt").symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError):
        with_file("out.txt").files[0].save(tmp_path)
    assert (tmp_path / "target").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.txt", "target"]


def test_a_link_on_the_way_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError) as caught:  # noqa: PT011  the number is asked below
        with_file("a/out.txt").files[0].save(tmp_path)
    assert caught.value.errno in (errno.ELOOP, errno.ENOTDIR)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_fifo_or_a_directory_in_the_place_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    for name in ("fifo", "directory"):
        with pytest.raises(FileExistsError):
            with_file(name).files[0].save(tmp_path)


def test_the_longest_name_is_saved(tmp_path: Path) -> None:
    name = "x" * 255
    with_file(name).files[0].save(tmp_path)
    assert (tmp_path / name).read_bytes() == b"new"


def test_saving_leaks_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    before = len(os.listdir("/proc/self/fd"))
    with_file("d/e/f").files[0].save(tmp_path)
    with pytest.raises(OSError):  # noqa: PT011  a file where a directory is needed; any errno will do
        with_file("a/f").files[0].save(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


# --- cost ---------------------------------------------------------------------------------------------------------


def test_a_small_result_is_made_in_well_under_a_millisecond() -> None:
    header = answer()
    best = float("inf")
    for _ in range(200):
        start = time.perf_counter()
        Result.from_wire(header, PAYLOAD)
        best = min(best, time.perf_counter() - start)
    assert best < 300e-6  # about 50 µs on an idle machine; a bound that a busy one keeps


def test_what_a_kernel_does_not_count_is_null() -> None:
    usage = answer()["usage"]
    assert Usage.model_validate({**usage, "memory_peak_bytes": None, "throttled_seconds": None}).pids_peak is None


def test_a_run_that_never_had_a_cell_has_no_receipt() -> None:
    assert Result.from_wire(answer(status="busy", isolation=None), PAYLOAD).isolation is None
