"""From evidence to status, line by line; and what a cell may say about its own end."""

from __future__ import annotations

import errno
import json
import os
import signal
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.cgroup import Counters
from sandboxd.errors import ProtocolError
from sandboxd.limits import defaults, value_of
from sandboxd.outcome.judge import Evidence, Finished, Outcome, Space, judge, parse_finished

QUIET = Counters(
    cpu_usec=5000,
    cpu_user_usec=3000,
    cpu_system_usec=2000,
    throttled_usec=0,
    memory_peak_bytes=10 << 20,
    memory_current_bytes=0,
    memory_limit_hits=0,
    oom_kills=0,
    pids_peak=1,
    pids_limit_hits=0,
)
OWN_OOM = replace(QUIET, oom_kills=1, memory_limit_hits=3)
HOST_OOM = replace(QUIET, oom_kills=1)
CPU_SPENT = replace(QUIET, cpu_usec=60_000_000)

NO_WALL = {**defaults(), "wall_seconds": None}

EXIT = os.CLD_EXITED
KILL = os.CLD_KILLED
DUMP = os.CLD_DUMPED
ERROR = {"type": "E", "message": "m", "traceback": "t", "line": 1}
SHOWN = [{"mime": {"text/plain": "1"}}]
PLACES = {"workspace": "/workspace", "tmp": "/tmp", "shm": "/dev/shm"}
FULL, NO_INODE = (0, 100), (1 << 20, 0)


def finished(code: int = 0, number: int | None = None) -> Finished:
    """What a program said: with an error when it failed, with a result when not."""
    return Finished(code, ERROR if code else None, SHOWN if code == 0 else [], number)


def judged(**seen: Any) -> Outcome:
    """The outcome of a run of which only *seen* is out of the ordinary."""
    facts: dict[str, Any] = {
        "cause": None, "wait": None, "finished": None, "counters": QUIET, "limits": defaults(), "run_seconds": 1.0,
    }  # fmt: skip
    free = {place: seen.pop(place, (1 << 20, 100)) for place in PLACES}
    spaces = [Space(path, *free[place]) for place, path in PLACES.items() if free[place] is not None]
    return judge(Evidence(**{**facts, "spaces": spaces, **seen}))


TABLE: list[tuple[str, dict[str, Any], tuple[str, int | None, int | None]]] = [
    # an ordinary end
    ("said-ok", {"finished": finished(), "wait": (KILL, 9)}, ("ok", 0, None)),
    ("said-ok-nobody-could-ask", {"finished": finished()}, ("ok", 0, None)),
    ("said-error", {"finished": finished(1), "wait": (KILL, 9)}, ("error", 1, None)),
    ("exit-0", {"wait": (EXIT, 0)}, ("ok", 0, None)),
    ("exit-7", {"wait": (EXIT, 7)}, ("error", 7, None)),
    # signals
    ("abort", {"wait": (DUMP, signal.SIGABRT)}, ("killed", None, 6)),
    ("segfault", {"wait": (KILL, signal.SIGSEGV)}, ("killed", None, 11)),
    ("sigkill-itself", {"wait": (KILL, signal.SIGKILL)}, ("killed", None, 9)),
    ("sigsys", {"wait": (KILL, signal.SIGSYS)}, ("denied", None, 31)),
    ("sigxcpu-of-the-belt", {"wait": (KILL, signal.SIGXCPU), "counters": CPU_SPENT}, ("cpu", None, 24)),
    ("sigxcpu-itself", {"wait": (KILL, signal.SIGXCPU)}, ("killed", None, 24)),
    ("sigxcpu-uncounted", {"wait": (KILL, signal.SIGXCPU), "counters": None}, ("killed", None, 24)),
    ("sigxfsz", {"wait": (KILL, signal.SIGXFSZ)}, ("killed", None, 25)),
    # limits
    ("timeout", {"cause": "timeout", "wait": (KILL, 9)}, ("timeout", None, 9)),
    ("cpu", {"cause": "cpu", "wait": (KILL, 9)}, ("cpu", None, 9)),
    ("output", {"cause": "output", "wait": (KILL, 9)}, ("output", None, 9)),
    ("memory", {"cause": "memory", "wait": (KILL, 9), "counters": OWN_OOM}, ("memory", None, 9)),
    ("memory-seen-by-the-counter-only", {"wait": (KILL, 9), "counters": OWN_OOM}, ("memory", None, 9)),
    ("memory-of-a-child", {"finished": finished(), "counters": OWN_OOM}, ("memory", None, 9)),
    ("memory-of-a-child-then-an-error", {"finished": finished(1), "counters": OWN_OOM}, ("memory", None, 9)),
    ("memory-of-the-host", {"wait": (KILL, 9), "counters": HOST_OOM}, ("killed", None, 9)),
    ("memory-of-the-host-cause", {"cause": "memory", "wait": (KILL, 9), "counters": HOST_OOM}, ("killed", None, 9)),
    ("memory-of-the-host-child", {"finished": finished(), "counters": HOST_OOM}, ("killed", None, 9)),
    # a limit outranks what the program said
    ("timeout-and-said-ok", {"cause": "timeout", "finished": finished()}, ("timeout", None, 9)),
    ("cpu-and-said-ok", {"cause": "cpu", "finished": finished()}, ("cpu", None, 9)),
    ("output-and-said-error", {"cause": "output", "finished": finished(1)}, ("output", None, 9)),
    ("timeout-and-exit", {"cause": "timeout", "wait": (EXIT, 0)}, ("timeout", None, 9)),
    # ties
    ("timeout-and-memory", {"cause": "timeout", "counters": OWN_OOM, "wait": (KILL, 9)}, ("timeout", None, 9)),
    ("cpu-with-the-wall-reached", {"cause": "cpu", "wait": (KILL, 9), "run_seconds": 30.0}, ("timeout", None, 9)),
    ("output-with-the-wall-reached", {"cause": "output", "run_seconds": 30.1}, ("timeout", None, 9)),
    ("memory-with-the-wall-reached", {"counters": OWN_OOM, "run_seconds": 30.1}, ("timeout", None, 9)),
    ("ok-with-the-wall-reached", {"finished": finished(), "run_seconds": 30.1}, ("ok", 0, None)),
    ("cpu-without-a-wall", {"cause": "cpu", "run_seconds": 1e6, "limits": NO_WALL}, ("cpu", None, 9)),
    ("memory-and-cpu", {"cause": "cpu", "counters": OWN_OOM}, ("memory", None, 9)),
    # the caller, and the engine's own
    ("cancelled", {"cause": "cancelled", "wait": (KILL, 9)}, ("cancelled", None, 9)),
    ("cancelled-and-said-ok", {"cause": "cancelled", "finished": finished()}, ("cancelled", None, 9)),
    ("cancelled-before-it-began", {"cause": "cancelled", "counters": None}, ("cancelled", None, 9)),
    ("lost", {"cause": "lost"}, ("internal", None, None)),
    ("no-evidence", {}, ("internal", None, None)),
    ("no-evidence-no-counters", {"counters": None}, ("internal", None, None)),
]  # fmt: skip


@pytest.mark.parametrize(("seen", "outcome"), [pytest.param(s, o, id=i) for i, s, o in TABLE])
def test_status_exit_code_and_signal(seen: dict[str, Any], outcome: tuple[str, int | None, int | None]) -> None:
    found = judged(**seen)
    assert (found.status, found.exit_code, found.signal) == outcome


@pytest.mark.parametrize(("seen", "outcome"), [pytest.param(s, o, id=i) for i, s, o in TABLE])
def test_error_and_results_only_for_an_end_of_its_own(seen: dict[str, Any], outcome: tuple[str, Any, Any]) -> None:
    found = judged(**seen)
    said = seen.get("finished")
    assert found.error == (ERROR if outcome[0] == "error" and said else None)
    assert found.results == (SHOWN if outcome[0] == "ok" and said else [])


HITS: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("none", {"finished": finished()}, []),
    ("wall", {"cause": "timeout"}, [("wall_seconds", "clock")]),
    ("wall-tied", {"cause": "cpu", "run_seconds": 31.0}, [("wall_seconds", "clock"), ("cpu_seconds", "cgroup")]),
    ("cpu", {"cause": "cpu"}, [("cpu_seconds", "cgroup")]),
    ("cpu-belt", {"wait": (KILL, 24), "counters": CPU_SPENT}, [("cpu_seconds", "wait")]),
    ("memory", {"counters": OWN_OOM}, [("memory_bytes", "cgroup")]),
    ("memory-of-the-host", {"counters": HOST_OOM, "wait": (KILL, 9)}, [("memory_bytes", "cgroup")]),
    ("memory-touched", {"counters": replace(QUIET, memory_limit_hits=5), "finished": finished()}, []),
    ("pids", {"counters": replace(QUIET, pids_limit_hits=2), "finished": finished()}, [("pids", "cgroup")]),
    ("cpus", {"counters": replace(QUIET, throttled_usec=10), "finished": finished()}, [("cpus", "cgroup")]),
    ("output", {"cause": "output", "dropped_bytes": 9}, [("output_stop_bytes", "reader"), ("output_bytes", "reader")]),
    ("output-dropped", {"dropped_bytes": 9, "finished": finished()}, [("output_bytes", "reader")]),
    ("workspace-full", {"workspace": FULL, "finished": finished()}, [("workspace_bytes", "statfs")]),
    ("files-full", {"workspace": NO_INODE, "finished": finished()}, [("workspace_files", "statfs")]),
    ("tmp-full", {"tmp": FULL, "finished": finished()}, [("tmp_bytes", "statfs")]),
    ("tmp-part-of-a-page-free", {"tmp": (4095, 9), "finished": finished()}, [("tmp_bytes", "statfs")]),
    ("tmp-a-page-free", {"tmp": (4096, 1), "finished": finished()}, []),
    ("tmp-files-full", {"tmp": NO_INODE, "finished": finished()}, [("tmp_bytes", "statfs")]),
    ("tmp-all-full", {"tmp": (0, 0), "finished": finished()}, [("tmp_bytes", "statfs")]),
    ("shm-full", {"shm": FULL, "finished": finished()}, [("shm_bytes", "statfs")]),
    ("shm-files-full", {"shm": NO_INODE, "finished": finished()}, [("shm_bytes", "statfs")]),
    ("shm-full-sigbus", {"shm": FULL, "wait": (KILL, signal.SIGBUS)}, [("shm_bytes", "statfs")]),
    ("sigbus-with-room", {"wait": (KILL, signal.SIGBUS)}, []),
    (
        "all-full",
        {"workspace": (0, 0), "tmp": FULL, "shm": NO_INODE, "cause": "timeout"},
        [(one, "statfs" if one != "wall_seconds" else "clock")
         for one in ("wall_seconds", "workspace_bytes", "workspace_files", "tmp_bytes", "shm_bytes")],
    ),
    ("enospc-elsewhere", {"finished": finished(1, errno.ENOSPC)}, []),
    ("enospc-unseen", {"finished": finished(1, errno.ENOSPC), "workspace": None, "tmp": None, "shm": None}, []),
    ("enospc-full", {"finished": finished(1, errno.ENOSPC), "workspace": FULL}, [("workspace_bytes", "statfs")]),
    ("enospc-files", {"finished": finished(1, errno.ENOSPC), "workspace": NO_INODE}, [("workspace_files", "statfs")]),
    ("enospc-of-tmp", {"finished": finished(1, errno.ENOSPC), "tmp": FULL}, [("tmp_bytes", "statfs")]),
    ("emfile", {"finished": finished(1, errno.EMFILE)}, [("open_files", "program")]),
    ("efbig", {"finished": finished(1, errno.EFBIG)}, [("file_bytes", "program")]),
    ("sigxfsz", {"wait": (KILL, 25)}, [("file_bytes", "wait")]),
    ("other-errno", {"finished": finished(1, errno.EACCES)}, []),
    ("denied", {"wait": (KILL, 31)}, [("syscall", "seccomp")]),
    ("self-signalled", {"wait": (KILL, 24)}, []),
]  # fmt: skip


@pytest.mark.parametrize(("seen", "hits"), [pytest.param(s, h, id=i) for i, s, h in HITS])
def test_limits_hit_names_what_evidence_shows(seen: dict[str, Any], hits: list[tuple[str, str]]) -> None:
    found = judged(**seen)
    assert [(one["limit"], one["evidence"]["source"]) for one in found.limits_hit] == hits
    for one in found.limits_hit:
        assert one["value"] == ("unknown" if one["limit"] == "syscall" else value_of(defaults(), one["limit"]))
        assert one["evidence"]["detail"]


def test_an_oom_of_the_whole_host_is_said_so() -> None:
    (one,) = judged(counters=HOST_OOM, wait=(KILL, 9)).limits_hit
    assert "engine or host" in one["evidence"]["detail"]
    assert "this run's own limit was not met" in one["evidence"]["detail"]


def test_a_limit_of_memory_says_how_often_it_was_met() -> None:
    (one,) = judged(counters=OWN_OOM, wait=(KILL, 9)).limits_hit
    assert one["evidence"]["detail"] == (
        f"1 killed for want of memory; the limit was met 3 times; peak {10 << 20} bytes"
    )


def test_a_file_system_that_was_full_only_for_a_while_is_told_by_the_error_alone() -> None:
    found = judged(finished=finished(1, errno.ENOSPC))
    assert (found.status, found.limits_hit, found.error) == ("error", [], ERROR)


@pytest.mark.parametrize(("place", "path"), PLACES.items())
def test_a_sigbus_is_put_down_to_the_file_system_that_is_full(place: str, path: str) -> None:
    found = judged(wait=(KILL, signal.SIGBUS), **{place: FULL})
    assert (found.status, found.signal) == ("killed", signal.SIGBUS)
    (one,) = found.limits_hit
    assert one["evidence"]["detail"] == (
        f"0 bytes free in {path} at the end; SIGBUS is how a mapped file says that it has no room"
    )
    (other,) = judged(wait=(KILL, signal.SIGSEGV), **{place: FULL}).limits_hit
    assert other["evidence"]["detail"] == f"0 bytes free in {path} at the end"


@given(
    cause=st.sampled_from([None, "timeout", "cpu", "output", "memory", "cancelled", "lost"]),
    wait=st.none() | st.tuples(st.sampled_from([EXIT, KILL, DUMP]), st.integers(0, 255)),
    said=st.none() | st.builds(finished, st.integers(0, 255), st.none() | st.integers(0, 200)),
    counters=st.none() | st.sampled_from([QUIET, OWN_OOM, HOST_OOM, CPU_SPENT]),
    run_seconds=st.floats(0, 100),
    dropped_bytes=st.integers(0, 10),
    workspace=st.none() | st.tuples(st.integers(0, 10_000), st.integers(0, 2)),
    tmp=st.none() | st.tuples(st.integers(0, 10_000), st.integers(0, 2)),
    shm=st.none() | st.tuples(st.integers(0, 10_000), st.integers(0, 2)),
)
def test_every_combination_of_evidence_has_one_consistent_outcome(**seen: Any) -> None:
    said = seen.pop("said")
    found = judged(finished=said, **seen)
    names = [one["limit"] for one in found.limits_hit]
    assert len(names) == len(set(names))
    assert (found.exit_code is not None) == (found.status in ("ok", "error"))
    assert (found.exit_code == 0) == (found.status == "ok")
    if found.status in ("killed", "denied", "timeout", "cpu", "memory", "output", "cancelled"):
        assert found.signal is not None
    if found.status == "memory":
        assert seen["counters"] is OWN_OOM
        assert "memory_bytes" in names
    for status, limit in (("timeout", "wall_seconds"), ("cpu", "cpu_seconds"), ("output", "output_stop_bytes")):
        if found.status == status:
            assert limit in names


# --- the finished frame is hostile --------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "exit_code": 1,
    "error": {"type": "E", "message": "m", "traceback": "t", "line": 3, "errno": 24},
    "results": [{"text/plain": "x"}],
}


def frame(**changes: Any) -> bytes:
    """A finished frame with *changes* at its top."""
    return json.dumps({**GOOD, **changes}).encode()


def with_error(**changes: Any) -> bytes:
    """A finished frame with *changes* in its error."""
    return frame(error={**GOOD["error"], **changes})


def test_a_good_frame() -> None:
    found = parse_finished(frame())
    assert found == Finished(1, ERROR | {"line": 3}, [{"mime": {"text/plain": "x"}}], 24)


BAD = {
    "nothing": b"",
    "not-json": b"x",
    "a-list": b"[]",
    "not-utf8": b'{"\xff": 1}',
    "no-key": b"{}",
    "a-key-more": frame(more=1),
    "twice": b'{"exit_code": 0, "exit_code": 1, "error": null, "results": []}',
    "nan": b'{"exit_code": NaN, "error": null, "results": []}',
    "deep": b'{"exit_code": 0, "error": ' + b"[" * 5000 + b"]" * 5000 + b', "results": []}',
    "code-bool": frame(exit_code=True),
    "code-float": frame(exit_code=0.0),
    "code-negative": frame(exit_code=-1),
    "code-256": frame(exit_code=256),
    "code-null": frame(exit_code=None),
    "code-digits": b'{"exit_code": ' + b"9" * 10_000 + b', "error": null, "results": []}',
    "error-text": frame(error="x"),
    "error-empty": frame(error={}),
    "error-more": with_error(more=1),
    "type-number": with_error(type=5),
    "type-long": with_error(type="x" * 1025),
    "message-long": with_error(message="x" * 10_000),
    "traceback-long": with_error(traceback="x" * 70_000),
    "line-text": with_error(line="3"),
    "line-bool": with_error(line=True),
    "line-negative": with_error(line=-1),
    "line-large": with_error(line=1 << 31),
    "errno-float": with_error(errno=1.5),
    "results-null": frame(results=None),
    "results-many": frame(results=[{}] * 17),
    "result-text": frame(results=["x"]),
    "result-other-kind": frame(results=[{"text/html": "x"}]),
    "result-number": frame(results=[{"text/plain": 5}]),
    "result-long": frame(results=[{"text/plain": "x" * (257 << 10)}]),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_a_frame_that_is_not_exactly_one_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_finished(data)


def test_a_frame_cut_anywhere_is_refused() -> None:
    whole = frame()
    for length in range(len(whole)):
        with pytest.raises(ProtocolError):
            parse_finished(whole[:length])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_other_error_than_protocolerror(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_finished(data)


@given(st.sampled_from(list(GOOD)), JSON, st.sampled_from(list(GOOD["error"])))
def test_whatever_stands_in_a_field_is_checked(key: str, value: Any, inner: str) -> None:
    for data in (frame(**{key: value}), with_error(**{inner: value})):
        try:
            found = parse_finished(data)
        except ProtocolError:
            continue
        assert 0 <= found.exit_code <= 255
        assert all(type(one["mime"].get("text/plain", "")) is str for one in found.results)
