"""``sandboxd logs``: what it prints of a record, how it follows one, and what it says of a broken one."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result

from sandboxd.audit import AuditLog
from sandboxd.cli import cli
from sandboxd.cli import logs as command
from tests.support import daemons

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMMAND = [sys.executable, "-m", "sandboxd", "logs"]
CODE = "print('a')\n\tx = 1\n2026-01-01T00:00:00.000000Z run_ended forged\r\x1b[2J\u202e"


@pytest.fixture(autouse=True)
def no_daemon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A daemon of this host's is none of these tests'."""
    monkeypatch.setattr(command, "DEFAULT_ADDRESS", f"unix:{tmp_path / 'no-socket'}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "audit.jsonl"
    base = {"client": {"uid": 1000, "pid": 7, "name": "ann"}, "policy": {"name": "default", "sha256": "0"}}
    started = {"event": "run_started", "id": "0a", "language": "python", "filename": "main.py", "code": CODE}
    called: dict[str, Any] = {"event": "tool_called", "id": "0a", "tool": "query\x1b[31m", "caller": "code"}
    called["arguments"] = {"q": "\u202e"}
    hit = [{"limit": "wall_seconds", "value": 1.0}]
    ended = {"event": "run_ended", "id": "0a", "status": "timeout", "exit_code": None, "signal": 9, "limits_hit": hit}
    with AuditLog(found) as audit:
        audit.append({"event": "log_opened"})
        audit.append({**base, **started})
        audit.append(
            {**base, **called, "arguments": {"q": "\u202e"}, "result": [1], "ok": True, "code": None, "seconds": 0.25}
        )
        audit.append({**base, **ended, "usage": {"wall_seconds": 1.5}, "error": {"message": "a\nb\x1b"}})
        audit.append({**base, "event": "run_ended", "id": "0b", "status": "busy", "code_bytes": 3})
    return found


def logs(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["logs", *map(str, arguments)])


def test_each_event_is_one_line(path: Path) -> None:
    done = logs("--file", path)
    assert done.exit_code == 0
    assert [line.split(" ", 1)[1] for line in done.stdout.splitlines()] == [
        "log_opened   - -",
        f"run_started  0a ann default python main.py, {len(CODE.encode())} bytes",
        "tool_called  0a ann query\\x1b[31m, from code: ok 0.250 s",
        "run_ended    0a ann timeout signal 9 (wall_seconds) 1.500 s",
        "run_ended    0b ann busy",
    ]


def test_calls_that_were_refused_together_are_told_with_their_reasons(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as audit:
        refused = {"busy": 2, "invalid_arguments": 30}
        audit.append({"event": "tool_called", "id": "0a", "tool": None, "caller": "code", "refused": refused})
    assert logs("--file", path).stdout.split(" ", 1)[1] == (
        "tool_called  0a - calls refused by the engine: 2 busy, 30 invalid_arguments\n"
    )


def test_one_run_is_shown_whole_and_nothing_of_it_looks_like_ours(path: Path) -> None:
    done = logs("--file", path, "--run", "0a")
    shown = done.stdout.split("\n")
    at = shown.index("  code:")
    assert shown[at + 1 : at + 4] == [
        "  | print('a')",
        "  | \tx = 1",
        "  | 2026-01-01T00:00:00.000000Z run_ended forged\\r\\x1b[2J\\u202e",
    ]
    assert [line.split()[1] for line in shown if line.startswith("2026") or line[:2] == "20"] == [
        "run_started",
        "tool_called",
        "run_ended",
    ]
    assert '  arguments: {"q": "\\u202e"}' in shown
    assert "0b" not in done.stdout
    assert all(char.isprintable() or char in "\n\t" for char in done.stdout)


def test_json_is_the_lines_themselves(path: Path) -> None:
    assert logs("--file", path, "--json").stdout.encode() == path.read_bytes()


def test_a_line_that_is_no_record_is_shown_escaped(path: Path) -> None:
    path.write_bytes(b'\x1b[2J\xff no record\n[1]\n{"event":"\\u001b"}\n')
    done = logs("--file", path)
    assert done.stdout == "\\x1b[2J\\xff no record\n[1]\nNone \\x1b            - -\n"


def test_verify_says_how_much_and_the_last_hash(path: Path) -> None:
    done = logs("--file", path, "--verify")
    assert done.exit_code == 0
    assert done.stdout.startswith("unbroken: 5 records\nlast: number 5, sha256 ")
    told = json.loads(logs("--file", path, "--verify", "--json").stdout)
    assert (told["ok"], told["records"], told["last"]) == (True, 5, 5)
    assert told["sha256"] in done.stdout


def test_verify_names_file_and_line_of_a_break(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"wall_seconds", b"cpu_seconds", 1))
    done = logs("--file", path, "--verify")
    assert done.exit_code == 1
    assert f"{path}:4: edited: its hash is not the one that record 5 names\nBROKEN: " in done.stdout
    told = json.loads(logs("--file", path, "--verify", "--json").stdout)
    assert (told["ok"], told["problems"][0]["line"]) == (False, 4)


@pytest.mark.parametrize(
    "arguments",
    [["--file", "x", "--connect", "unix:/x"], ["--verify", "--follow"], ["--verify", "--connect", "unix:/x"]],
)
def test_options_that_exclude_each_other(arguments: list[str]) -> None:
    assert logs(*arguments).exit_code == 2


@pytest.mark.parametrize("arguments", [[], ["--verify"], ["--follow"]])
def test_a_file_that_is_not_there(tmp_path: Path, arguments: list[str]) -> None:
    done = logs("--file", tmp_path / "none", *arguments)
    assert done.exit_code == 125
    assert "ENOENT" in done.stderr
    assert "--file" in done.stderr


def follow(*arguments: object) -> subprocess.Popen[bytes]:
    command = [*COMMAND, "--follow", "--json", *map(str, arguments)]
    # Unbuffered: what select(2) looks at is all that there is.
    return subprocess.Popen(command, bufsize=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def following(process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    while select.select([process.stdout], [], [], 60)[0] and (line := process.stdout.readline()):
        yield json.loads(line)


def test_following_goes_on_across_rotation_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path, max_bytes=1000, keep=100) as audit:
        audit.append({"event": "test", "n": 0})
        with follow("--file", path) as process:
            found = following(process)
            assert next(found)["n"] == 0
            for number in range(1, 40):
                audit.append({"event": "test", "n": number})
            read = [next(one["n"] for one in found if one["event"] == "test") for _ in range(39)]
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
            assert process.stderr is not None
            assert process.stderr.read() == b""
    assert read == list(range(1, 40))


def test_following_ends_when_nobody_reads(path: Path) -> None:
    with follow("--file", path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(20) == 141
        assert process.stderr is not None
        assert process.stderr.read() == b""


@pytest.mark.skipif(os.geteuid() != 0, reason="an engine needs root")
def test_a_daemon_is_asked_and_followed() -> None:
    with daemons.directory() as home, daemons.served(home) as daemon, daemon.sandbox() as sandbox:
        first = sandbox.run("print('first')").id
        with follow("--connect", daemon.address) as process:
            found = following(process)
            assert next(one for one in found if one["event"] == "run_ended")["id"] == first
            second = sandbox.run("print('second')").id
            assert [(next(found)["id"]) for _ in range(2)] == [second, second]
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
        done = logs("--connect", daemon.address, "--run", second)
        assert "  code:\n  | print('second')\n" in done.stdout
        assert first not in done.stdout


def test_what_is_no_id_of_a_run_is_told() -> None:
    done = CliRunner().invoke(cli, ["logs", "--run", "nope"])
    assert done.exit_code == 2
    assert "'nope' is none" in done.output
