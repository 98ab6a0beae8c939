"""What an interpreter says of itself, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd.errors import Unavailable
from sandboxd.rootfs.interpreter import PROBE_OUTPUT_BYTES, Interpreter

if TYPE_CHECKING:
    from pathlib import Path

FACTS: dict[str, Any] = {
    "executable": "/opt/python/bin/python3",
    "prefix": "/opt/python",
    "base_prefix": "/opt/python",
    "exec_prefix": "/opt/python",
    "base_exec_prefix": "/opt/python",
    "version": [3, 12, 1],
    "implementation": "cpython",
    "stdlib": "/opt/python/lib/python3.12",
    "platform": "linux-x86_64",
    "free_threaded": False,
}


def script(directory: Path, body: str) -> str:
    """An executable shell script in the place of an interpreter."""
    path = directory / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def impostor(directory: Path, **changes: Any) -> str:
    """A script that answers the probe with FACTS and *changes*."""
    return script(directory, f"cat <<'END'\n{json.dumps(FACTS | changes)}\nEND")


def refusal_of(path: str, timeout_seconds: float = 10.0) -> Unavailable:
    with pytest.raises(Unavailable) as refusal:
        Interpreter.probe(path, timeout_seconds)
    assert refusal.value.stage == "interpreter"
    assert "[runtime] interpreter" in refusal.value.fix
    return refusal.value


def test_probe_of_the_running_interpreter_agrees_with_current() -> None:
    assert Interpreter.probe(sys.executable) == Interpreter.current()


def test_current_describes_this_process() -> None:
    python = Interpreter.current()
    assert (python.executable, python.prefix, python.base_prefix) == (sys.executable, sys.prefix, sys.base_prefix)
    assert python.version == sys.version_info[:3]
    assert os.path.isfile(f"{python.stdlib}/os.py")


def test_virtual_environment_is_recognised_by_its_own_path(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--symlinks", tmp_path / "env"], check=True)
    path = str(tmp_path / "env/bin/python")
    python = Interpreter.probe(path)
    assert (python.executable, python.prefix, python.base_prefix) == (path, str(tmp_path / "env"), sys.base_prefix)


def test_launcher_script_counts_for_what_it_starts(tmp_path: Path) -> None:
    assert Interpreter.probe(script(tmp_path, f'exec "{sys.executable}" "$@"')) == Interpreter.current()


def test_probe_runs_with_an_empty_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    monkeypatch.setenv("SECRET", "token")
    seen = tmp_path / "seen"
    Interpreter.probe(script(tmp_path, f'cat /proc/$$/environ > "{seen}"; exec "{sys.executable}" "$@"'))
    assert seen.read_bytes() == b""


def test_facts_become_an_interpreter(tmp_path: Path) -> None:
    python = Interpreter.probe(impostor(tmp_path))
    assert python.version == (3, 12, 1)
    assert python.trees == ("/opt/python", "/opt/python/lib/python3.12")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"implementation": "pypy"}, "pypy, not CPython"),
        ({"version": [3, 10, 14]}, r"Python 3\.10\.14, older"),
        ({"version": [2, 7, 18]}, r"Python 2\.7\.18, older"),
        ({"platform": "linux-aarch64"}, "built for linux-aarch64"),
        ({"platform": "linux-i686"}, "built for linux-i686"),
        ({"free_threaded": True}, "free-threaded"),
        ({"executable": ""}, "its own executable"),
        ({"prefix": "relative"}, "its own prefix"),
    ],
)
def test_interpreter_that_cannot_serve_is_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    refusal = refusal_of(impostor(tmp_path, **changes))
    assert refusal.errno == errno.ENOTSUP
    with pytest.raises(Unavailable, match=reason):
        raise refusal


@pytest.mark.parametrize(
    "body",
    [
        "echo hello",
        "echo '[]'",
        "echo '{}'",
        ":",
        "exit 3",
        "kill -9 $$",
        "yes",
        f"head -c {PROBE_OUTPUT_BYTES + 1} /dev/zero",
        "head -c 60000 /dev/zero | tr '\\0' '['",
        f"echo '{json.dumps(FACTS | {'version': ['3', 12, 1]})}'",
        f"echo '{json.dumps(FACTS | {'version': [True, 12, 1]})}'",
        f"echo '{json.dumps(FACTS | {'prefix': None})}'",
        f"echo '{json.dumps(FACTS)}'; exit 1",
    ],
)
def test_what_is_no_python_is_refused(tmp_path: Path, body: str) -> None:
    assert refusal_of(script(tmp_path, body)).errno == errno.ENOEXEC


def test_nul_in_a_path_is_refused(tmp_path: Path) -> None:
    assert refusal_of(impostor(tmp_path, prefix="/opt/a\0b")).errno == errno.ENOEXEC


@pytest.mark.parametrize(
    ("path", "number"),
    [("python3", errno.EINVAL), ("bin/python3", errno.EINVAL), ("/nonexistent/python3", errno.ENOENT)],
)
def test_path_that_cannot_be_started_is_refused(path: str, number: int) -> None:
    assert refusal_of(path).errno == number


def test_file_without_the_right_to_execute_is_refused(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\n")
    assert refusal_of(str(tmp_path / "python")).errno == errno.EACCES


@pytest.mark.parametrize("body", ["sleep 60", "exec >&-; sleep 60", "sleep 60 & wait"])
def test_interpreter_that_never_answers_is_killed_with_its_children(tmp_path: Path, body: str) -> None:
    pids = tmp_path / "pids"
    path = script(tmp_path, f'echo $$ > "{pids}"; {body}')
    began = time.monotonic()
    assert refusal_of(path, timeout_seconds=0.5).errno == errno.ETIMEDOUT
    assert time.monotonic() - began < 10
    leader = int(pids.read_text())
    # The group dies asynchronously; a member may still be seen as a zombie of whoever adopted it.
    deadline = time.monotonic() + 10
    while alive_in_group(leader) and time.monotonic() < deadline:
        pass
    assert not alive_in_group(leader)


def alive_in_group(group: int) -> list[int]:
    """Processes of *group* that are no zombies."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            found.append(int(name))
    return found
