"""The command line: options, exit statuses, streaming, files in and out.

The first half replaces the client by a stand-in (nothing of the kernel is replaced: the command line only calls the
client), the second runs the real command.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import click
import pytest
from click.testing import CliRunner, Result

from sandboxd.cli import cli, failure_status, output
from sandboxd.cli.exit_status import exit_status, reason
from sandboxd.cli.files import BadInput, plan_inputs, split_input
from sandboxd.cli.run import failure
from sandboxd.client import admin
from sandboxd.client.result import OutputFile, _Contents
from sandboxd.client.sandbox import Cancel
from sandboxd.errors import Busy, ConnectionLost, InvalidRequest, PolicyError, ProtocolError, SandboxError, Unavailable
from sandboxd.protocol.run_header import check_inputs_fit
from tests.support.leftovers import eventually, processes

if TYPE_CHECKING:
    from collections.abc import Callable

COMMAND = [sys.executable, "-m", "sandboxd"]
# The interpreter alone costs some of the time that a test may take on a busy machine.
PATIENCE_SECONDS = 60


def ended(status: str = "ok", **fields: Any) -> SimpleNamespace:
    """A Result with *fields*, the rest as after a run that did nothing."""
    usage = SimpleNamespace(wall_seconds=30.04, cpu_user_seconds=59.0, cpu_system_seconds=1.5)
    values: dict[str, Any] = {
        "exit_code": 0,
        "signal": None,
        "error": None,
        "limits_hit": [],
        "files": [],
        "files_skipped": 0,
    }
    return SimpleNamespace(status=status, usage=usage, **(values | fields))


def hit(limit: str, value: Any, source: str, detail: str) -> SimpleNamespace:
    return SimpleNamespace(limit=limit, value=value, evidence=SimpleNamespace(source=source, detail=detail))


# Exit statuses


@pytest.mark.parametrize(
    ("result", "status"),
    [
        (ended("ok"), 0),
        (ended("error", exit_code=1), 1),
        (ended("error", exit_code=3), 3),
        (ended("error", exit_code=255), 255),
        (ended("error", exit_code=None), 1),
        (ended("error", exit_code=0), 1),
        (ended("error", exit_code=256), 1),
        (ended("killed", exit_code=None, signal=signal.SIGSEGV), 139),
        (ended("killed", exit_code=None, signal=signal.SIGABRT), 134),
        (ended("killed", exit_code=None, signal=signal.SIGTERM), 143),
        (ended("killed", exit_code=None), 137),
        (ended("timeout", exit_code=None, signal=signal.SIGKILL), 124),
        (ended("cpu", exit_code=None, signal=signal.SIGXCPU), 124),
        (ended("memory", exit_code=None, signal=signal.SIGKILL), 137),
        (ended("output", exit_code=None, signal=signal.SIGKILL), 153),
        (ended("denied", exit_code=None, signal=signal.SIGSYS), 159),
        (ended("cancelled", exit_code=None, signal=signal.SIGKILL), 130),
        (ended("busy", exit_code=None), 75),
        (ended("internal", exit_code=None), 125),
    ],
)
def test_exit_status(result: SimpleNamespace, status: int) -> None:
    assert exit_status(result) == status


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (PolicyError("no"), 2),
        (InvalidRequest("stdin", "no"), 2),
        (Busy(1.0), 75),
        (Unavailable("cgroup", errno=13, fix="mend it"), 125),
        (ConnectionLost(may_have_started=True), 125),
        (ProtocolError("no"), 125),
    ],
)
def test_exit_status_of_an_error(error: SandboxError, status: int) -> None:
    assert failure_status(error) == status


# Reasons


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (
            ended("timeout", limits_hit=[hit("wall_seconds", 30.0, "clock", "")]),
            "timeout: stopped after 30.0 s of wall clock (limit wall_seconds=30); raise it with --timeout",
        ),
        (
            ended("cpu", limits_hit=[hit("cpu_seconds", 60.0, "cgroup", "")]),
            "cpu: stopped after 60.5 s of CPU time in all its processes (limit cpu_seconds=60); "
            "raise cpu_seconds in the [limits] of a policy",
        ),
        (
            ended("memory", limits_hit=[hit("memory_bytes", 512 << 20, "cgroup", "oom_kill 1")]),
            "memory: the program needed more memory than it may have (limit memory_bytes=512M; cgroup: oom_kill 1); "
            "raise it with --memory",
        ),
        (
            ended("output", limits_hit=[hit("output_stop_bytes", 8 << 20, "reader", "stdout: 8388609 bytes")]),
            "output: stopped because it wrote too much (limit output_stop_bytes=8M; reader: stdout: 8388609 bytes); "
            "raise output_stop_bytes in the [limits] of a policy",
        ),
        (
            ended("denied", limits_hit=[hit("syscall", "ptrace", "seccomp", "")]),
            "denied: killed by the seccomp filter (syscall=ptrace; seccomp); "
            "'sandboxd policy show NAME' lists the system calls that are allowed",
        ),
        (ended("killed", signal=signal.SIGSEGV), "killed: the program ended by signal 11 (SIGSEGV)"),
        (
            ended("killed", signal=signal.SIGBUS, limits_hit=[hit("shm_bytes", 256 << 20, "statfs", "0 bytes free")]),
            "killed: the program ended by signal 7 (SIGBUS); limits reached: shm_bytes=256M (statfs: 0 bytes free)",
        ),
        (ended("error", exit_code=3), "error: the program ended with exit status 3"),
        (
            ended("error", error=SimpleNamespace(type="ValueError", message="no such month", line=12)),
            "error: uncaught ValueError: no such month (line 12)",
        ),
        (
            ended(
                "error",
                error=SimpleNamespace(type="BlockingIOError", message="", line=None),
                limits_hit=[hit("pids", 64, "cgroup", "pids.events max 1")],
            ),
            "error: uncaught BlockingIOError; limits reached: pids=64 (cgroup: pids.events max 1)",
        ),
        (ended("cancelled"), "cancelled: the run was cancelled"),
    ],
)
def test_reason(result: SimpleNamespace, words: str) -> None:
    assert reason(result) == words


def test_reason_of_a_good_end_is_none() -> None:
    assert reason(ended("ok", limits_hit=[hit("pids", 64, "cgroup", "max 1")])) is None


@pytest.mark.parametrize("status", ["timeout", "cpu", "memory", "output", "denied", "killed", "busy", "internal"])
def test_reason_without_evidence_is_still_a_sentence(status: str) -> None:
    assert (reason(ended(status, exit_code=None)) or "").startswith(f"{status}: ")


# Escaping


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("plain text, ünïcode", "plain text, ünïcode"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("two\nlines\r", "two\\nlines\\r"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("bad\udcff", "bad\\udcff"),
    ],
)
def test_escape(text: str, escaped: str) -> None:
    assert output.escape(text) == escaped


def test_json_is_plain_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    output.emit_json({"stdout": "\x1b[31m\x9b\u202e\udcff ü"})
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert printed.rstrip("\n").isprintable()
    assert json.loads(printed) == {"stdout": "\x1b[31m\x9b\u202e\udcff ü"}


# Files in


def test_split_input(tmp_path: Path) -> None:
    (tmp_path / "a:b").touch()
    assert split_input("data/in.csv") == ("data/in.csv", "in.csv")
    assert split_input("in.csv:dir/x.csv") == ("in.csv", "dir/x.csv")
    assert split_input("in.csv:dir/") == ("in.csv", "dir/in.csv")
    assert split_input("tree:.") == ("tree", "")
    assert split_input("tree:./") == ("tree", "tree")
    assert split_input(str(tmp_path / "a:b")) == (str(tmp_path / "a:b"), "a:b")


def test_inputs_of_a_directory_leave_links_out(tmp_path: Path) -> None:
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    (tmp_path / "tree" / "a.txt").write_text("a")
    (tmp_path / "tree" / "sub" / "b.txt").write_text("b")
    (tmp_path / "tree" / "link").symlink_to("/etc/passwd")
    (tmp_path / "tree" / "outside").symlink_to("/etc")
    os.mkfifo(tmp_path / "tree" / "fifo")
    files, skipped = plan_inputs((str(tmp_path / "tree"),))
    assert sorted(files) == ["tree/a.txt", "tree/sub/b.txt"]
    assert sorted(Path(name).name for name in skipped) == ["fifo", "link", "outside"]


@pytest.mark.parametrize(
    "inputs", [("a:x", "b:x"), ("a:x", "b:x/y"), ("a:.",), ("missing",), ("fifo",), ("a:",), ("a:/x",)]
)
def test_inputs_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: tuple[str, ...]) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(name).touch()
    os.mkfifo("fifo")
    with pytest.raises(BadInput):
        plan_inputs(inputs)


# The command with a stand-in for the client


COUNTED: Any = {"runs": {"error": 4, "ok": 1200}, "queued": 0, "running": 1, "parked": 2, "zygote_restarts": 3}
STATS: Any = {
    "uptime_seconds": 77.25,
    **COUNTED,
    "held_seconds": {
        "worst": 0.0123,
        "p99": 0.00025,
        "iterations": 5000,
        "above": {"0.01": 1, "0.05": 0, "0.1": 0, "1": 0},
        "slow": [],
        "worst_bytes": 65536,
        "worst_steps": 3,
    },
    "policies": {"default": COUNTED},
}


class Stand:
    """What the command asked of the client, and what the client answers."""

    def __init__(self) -> None:
        self.opened: dict[str, Any] | None = None
        self.asked: dict[str, Any] = {}
        self.answer: Callable[[dict[str, Any]], Any] = lambda _: ended()

    def sandbox(self, **given: Any) -> Any:
        self.opened = given
        return self

    def connect(self, address: str, **given: Any) -> Any:
        return self.sandbox(address=address, **given)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _run_cancellable(self, _cancel: Cancel, code: str, **given: Any) -> Any:
        self.asked = {"code": code, **given}
        return self.answer(self.asked)


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    stand = Stand()

    class Sandbox:
        connect = stand.connect

        def __new__(cls, **given: Any) -> Any:
            return stand.sandbox(**given)

    module = types.ModuleType("sandboxd.client.sandbox")
    module.Cancel = Cancel  # type: ignore[attr-defined]
    module.Sandbox = Sandbox  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sandboxd.client.sandbox", module)
    row = {"id": "r\x1b1", "policy": "default", "uid": 0, "pid": 1 << 29, "age_seconds": 1.25}
    monkeypatch.setattr(admin, "ps", lambda address: [row])
    monkeypatch.setattr(admin, "stats", lambda address: STATS)
    return stand


def invoke(*args: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(cli, ["run", *args], input=stdin)


def test_code_and_arguments_reach_the_client(stand: Stand) -> None:
    assert invoke("-c", "print(1)", "--env", "A=1", "--env", "B=x=y", "--", "-x", "two words").exit_code == 0
    assert stand.asked["code"] == "print(1)"
    assert stand.asked["args"] == ["-x", "two words"]
    assert stand.asked["env"] == {"A": "1", "B": "x=y"}
    assert stand.asked["stdin"] is None
    assert (stand.asked["filename"], stand.asked["results"]) == ("main.py", True)
    assert stand.opened == {"pool": {"maximum": 1}}


def test_a_file_is_read_and_named(stand: Stand, tmp_path: Path) -> None:
    (tmp_path / "prog.py").write_bytes(b"\xef\xbb\xbfprint('\xc3\xbc')\r\n")
    assert invoke(str(tmp_path / "prog.py"), "--", "a").exit_code == 0
    assert stand.asked["code"] == "print('ü')\r\n"
    assert (stand.asked["filename"], stand.asked["results"]) == ("prog.py", False)
    assert stand.asked["args"] == ["a"]


def test_limits_are_handed_over_as_a_policy_would_say_them(stand: Stand) -> None:
    done = invoke("-c", "1", "--timeout", "2.5", "--memory", "256M", "--cpus", "0.5", "--pids", "unlimited")
    assert done.exit_code == 0, done.output
    assert stand.opened is not None
    assert stand.opened["limits"].plain() == {"wall_seconds": 2.5, "memory_bytes": 256 << 20, "cpus": 0.5, "pids": None}


def test_connect_goes_through_a_daemon(stand: Stand) -> None:
    assert invoke("-c", "1", "--connect", "unix:/x.sock", "--policy", "strict").exit_code == 0
    assert stand.opened == {"address": "unix:/x.sock", "policy": "strict"}


def test_inputs_and_stdin_reach_the_client(stand: Stand, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(b"1,2\n")
    done = invoke("-c", "1", "--input", f"{tmp_path / 'in.csv'}:data/x.csv", "--stdin", str(tmp_path / "in.csv"))
    assert done.exit_code == 0, done.output
    assert stand.asked["files"] == {"data/x.csv": tmp_path / "in.csv"}
    assert stand.asked["stdin"] == b"1,2\n"


def test_streams_pass_through_byte_for_byte(stand: Stand) -> None:
    def answer(asked: dict[str, Any]) -> Any:
        asked["on_stdout"]("ü\x1b[1m\udcff\n")
        asked["on_stderr"]("warned")
        return ended("error", exit_code=3)

    stand.answer = answer
    done = invoke("-c", "1")
    assert done.exit_code == 3
    assert done.stdout_bytes == b"\xc3\xbc\x1b[1m\xff\n"
    assert done.stderr == "warned\nsandboxd: error: the program ended with exit status 3\n"


def test_what_a_daemons_policy_sets_is_not_to_be_raised_by_an_option() -> None:
    result = ended("timeout", limits_hit=[hit("wall_seconds", 3, "clock", "")])
    assert str(reason(result, options={"memory_bytes"})).endswith("raise wall_seconds in the [limits] of a policy")
    assert str(reason(result, options={"wall_seconds"})).endswith("raise it with --timeout")


def test_a_hostile_message_is_escaped_in_the_reason(stand: Stand) -> None:
    error = SimpleNamespace(type="E", message="\x1b]0;owned\x07\nsandboxd: all is well", line=1)
    stand.answer = lambda _: ended("error", exit_code=1, error=error)
    assert "\x1b" not in invoke("-c", "1").stderr
    assert invoke("-c", "1").stderr.count("\n") == 1


def left(*paths: str) -> SimpleNamespace:
    """A Result whose program left files at *paths*."""
    files = []
    for path in paths:
        file = OutputFile(path=path, size_bytes=1)
        file._contents = _Contents(b"x")
        files.append(file)
    return ended(files=files)


def test_output_dir_is_made_and_takes_the_files(stand: Stand, tmp_path: Path) -> None:
    stand.answer = lambda _: left("a/b.txt")
    done = invoke("-c", "1", "--output-dir", str(tmp_path / "new" / "out"))
    assert (done.exit_code, done.stderr) == (0, "")
    assert (tmp_path / "new" / "out" / "a" / "b.txt").read_bytes() == b"x"


def test_files_left_out_are_said(stand: Stand, tmp_path: Path) -> None:
    stand.answer = lambda _: ended(files_skipped=2)
    done = invoke("-c", "1", "--output-dir", str(tmp_path))
    assert (done.exit_code, done.stderr) == (0, "sandboxd: not stored: 2 (links, devices, or beyond a limit)\n")


def test_output_dir_follows_no_link_and_says_so_by_125(stand: Stand, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").symlink_to(tmp_path / "outside")
    (tmp_path / "out" / "b").symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / "out" / "c")
    stand.answer = lambda _: left("a/x", "b", "c", "d")
    done = invoke("-c", "1", "--output-dir", str(tmp_path / "out"))
    assert done.exit_code == 125
    assert done.stderr.count("could not store") == 3
    assert not list((tmp_path / "outside").iterdir())
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "out" / "d").read_bytes() == b"x"


def test_output_dir_is_the_directory_that_was_there_at_the_start(stand: Stand, tmp_path: Path) -> None:
    def answer(_: dict[str, Any]) -> Any:
        (tmp_path / "out").rename(tmp_path / "moved")
        (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
        return left("a.txt")

    (tmp_path / "elsewhere").mkdir()
    stand.answer = answer
    assert invoke("-c", "1", "--output-dir", str(tmp_path / "out")).exit_code == 0
    assert (tmp_path / "moved" / "a.txt").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (Busy(2.0), 75, "busy"),
        (Unavailable("cgroup", errno=13, fix="delegate a subtree"), 125, None),
        (ConnectionLost(may_have_started=True), 125, "internal"),
        (ConnectionLost(may_have_started=False), 125, None),
        (PolicyError("unknown policy 'x'"), 2, None),
    ],
)
def test_errors_become_statuses_and_json(stand: Stand, error: SandboxError, status: int, said: str | None) -> None:
    def answer(_: dict[str, Any]) -> Any:
        raise error

    stand.answer = answer
    done = invoke("-c", "1")
    assert done.exit_code == status
    assert done.stderr == f"sandboxd: {error}\n"
    done = invoke("-c", "1", "--json")
    assert done.exit_code == status
    assert json.loads(done.stdout)["status"] == said
    assert json.loads(done.stdout)["failure"]["kind"] == type(error).__name__


def test_ctrl_c_is_130(stand: Stand) -> None:
    def answer(_: dict[str, Any]) -> Any:
        raise KeyboardInterrupt

    stand.answer = answer
    assert invoke("-c", "1").exit_code == 130
    assert invoke("-c", "1").stderr.startswith("sandboxd: cancelled: ")
    assert json.loads(invoke("-c", "1", "--json").stdout)["status"] == "cancelled"


def test_a_failure_of_ours_is_125_not_1(stand: Stand) -> None:
    def answer(_: dict[str, Any]) -> Any:
        raise ZeroDivisionError

    stand.answer = answer
    assert invoke("-c", "1").exit_code == 125


def test_a_reader_that_went_away_cancels_the_run_quietly(stand: Stand) -> None:
    def answer(_: dict[str, Any]) -> Any:
        raise output.OutputLost("stdout", 32)

    stand.answer = answer
    done = subprocess.run(
        [sys.executable, "-c", READER_GONE], capture_output=True, timeout=PATIENCE_SECONDS, check=False, text=True
    )
    assert (done.returncode, done.stderr) == (141, "")


# A process of its own, because the command points its descriptors 1 and 2 at /dev/null.
READER_GONE = """
import os, sys, types
from contextlib import nullcontext
sys.modules["sandboxd.client.sandbox"] = client = types.ModuleType("sandboxd.client.sandbox")
r, w = os.pipe()
os.close(r)
os.dup2(w, 1)
def run(cancel, code, on_stdout, **given):
    on_stdout("x")
client.Sandbox = lambda **given: nullcontext(types.SimpleNamespace(_run_cancellable=run))
client.Cancel = lambda: None
from sandboxd.cli import cli
cli(["run", "-c", "1"])
"""


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "Nothing to run"),
        (["-", "--stdin", "-"], "both want stdin"),
        (["missing.py"], "No such file"),
        (["/"], "Is a directory"),
        (["-c", "1", "--timeout", "0"], "'--timeout'"),
        (["-c", "1", "--timeout", "soon"], "allowed: seconds"),
        (["-c", "1", "--timeout", "nan"], "'--timeout'"),
        (["-c", "1", "--timeout", "-1"], "'--timeout'"),
        (["-c", "1", "--memory", "256X"], "allowed: bytes"),
        (["-c", "1", "--memory", "unlimited"], "'--memory'"),
        (["-c", "1", "--cpus", "0"], "'--cpus'"),
        (["-c", "1", "--pids", "1.5"], "'--pids'"),
        (["-c", "1", "--env", "A"], "K=V"),
        (["-c", "1", "--env", "=A"], "not a variable's name"),
        (["-c", "1", "--input", "missing.csv"], "--input"),
        (["-c", "1", "--stdin", "missing.txt"], "--stdin"),
        (["-c", "1", "--connect", "tcp:1"], "unix:PATH"),
        (["-c", "1", "--language", "bash"], "later version"),
        (["-c", "1", "--language", "cobol"], "'python'"),
        (["-c", "1", "--output-dir", "/dev/null"], "--output-dir"),
        (["-c", "1", "--nonsense"], "--nonsense"),
        (["missing.py", "--verbose"], "; put the program's own options after --"),
        (["-c", "bad\udcff"], "lone surrogate"),
        (["-c", "1", "--", "bad\udcff"], "UTF-8"),
        (["-c", "1", "--env", "LD_PRELOAD=x"], "would do nothing"),
    ],
)
def test_wrong_usage_is_2_and_starts_nothing(stand: Stand, args: list[str], words: str) -> None:
    done = invoke(*args)
    assert done.exit_code == 2
    assert words in done.stderr.replace("\n", " ")
    assert stand.opened is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"print('\xff')", "byte 7 cannot be decoded"),
        (b"a\0b", "a NUL at character 1"),
        (b"#" * ((16 << 20) + 1), "16,777,216"),
    ],
    ids=["latin-1", "binary", "huge"],
)
def test_source_that_is_no_text_is_2(stand: Stand, tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.py").write_bytes(content)
    done = invoke(str(tmp_path / "x.py"))
    assert done.exit_code == 2
    assert words in done.stderr
    assert stand.opened is None


@pytest.mark.parametrize(
    "content",
    ["# -*- coding: latin-1 -*-\nprint('é')", "#!/usr/bin/python\n# vim: fileencoding=latin-1\nprint('é')"],
    ids=["first line", "second line"],
)
def test_a_file_in_the_encoding_that_it_names(stand: Stand, tmp_path: Path, content: str) -> None:
    (tmp_path / "x.py").write_text(content, encoding="latin-1")
    assert invoke(str(tmp_path / "x.py")).exit_code == 0
    assert stand.asked["code"] == content


@pytest.mark.parametrize("encoding", ["no-such", "ascii", "rot13"])
def test_a_file_in_an_encoding_that_cannot_be_is_2(stand: Stand, tmp_path: Path, encoding: str) -> None:
    (tmp_path / "x.py").write_bytes(b"# coding: %s\nprint('\xff')" % encoding.encode())
    done = invoke(str(tmp_path / "x.py"))
    assert done.exit_code == 2
    assert "encoding" in done.stderr
    assert stand.opened is None


def test_inputs_that_do_not_fit_name_option_and_remedy(stand: Stand) -> None:
    def answer(_: dict[str, Any]) -> Any:
        check_inputs_fit([("x", 9000)], {"workspace_bytes": 4096, "workspace_files": 10})

    stand.answer = answer
    done = invoke("-c", "1")
    assert done.exit_code == 2
    assert done.stderr.startswith("sandboxd: --input: they take 12,288 bytes; limits.workspace_bytes is 4,096; ")
    assert "raise it in the [limits] of the policy" in done.stderr


def test_denied_names_the_policy_to_show(stand: Stand) -> None:
    stand.answer = lambda _: ended("denied", exit_code=None, signal=signal.SIGSYS)
    assert "policy show default'" in invoke("-c", "1").stderr
    assert "policy show strict'" in invoke("-c", "1", "--policy", "strict").stderr
    assert "policy show NAME'" in invoke("-c", "1", "--connect", "unix:/x.sock").stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up root in a process of its own")
def test_a_socket_that_may_not_be_opened_says_so() -> None:
    # Nobody but root may look below /proc/1/root.
    code = (
        "import os; from sandboxd.client.connections import open_daemon\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: open_daemon('/proc/1/root/x.sock')\n"
        "except Exception as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=PATIENCE_SECONDS, check=True)
    assert b"this user may not use /proc/1/root/x.sock (EACCES: " in done.stdout
    assert b"no daemon" not in done.stdout


def test_failure_object_has_the_fields_of_a_result() -> None:
    assert set(failure(None)) >= {
        *("id", "status", "exit_code", "signal", "stdout", "stderr", "stdout_dropped_bytes", "stderr_dropped_bytes"),
        *("error", "results", "files", "files_skipped", "limits_hit", "usage", "timings", "warm", "isolation", "state"),
    }


@pytest.mark.parametrize("name", ["mcp"])
def test_later_commands_say_so(name: str) -> None:
    done = CliRunner().invoke(cli, [name, "--http", "x"])
    assert done.exit_code == 2
    assert "later version" in done.output
    assert name not in CliRunner().invoke(cli, ["--help"]).output.split("Commands:")[1]


def test_every_listed_command_can_be_loaded() -> None:
    context = click.Context(cli)
    for name in cli.list_commands(context):
        assert isinstance(cli.get_command(context, name), click.Command)


def test_ps_prints_a_table_without_escapes(stand: Stand) -> None:
    done = CliRunner().invoke(cli, ["ps"])
    assert done.exit_code == 0, done.output
    assert "r\\x1b1" in done.output
    assert "1.2 s" in done.output
    assert json.loads(CliRunner().invoke(cli, ["ps", "--json"]).output)[0]["policy"] == "default"


def test_stats_prints_a_table_and_the_held_time(stand: Stand) -> None:
    done = CliRunner().invoke(cli, ["stats"])
    assert done.exit_code == 0, done.output
    words = [line.split() for line in done.output.splitlines()]
    assert words[0] == ["POLICY", "QUEUED", "RUNNING", "PARKED", "ZYGOTE", "RESTARTS", "RUNS"]
    assert words[1] == ["default", "0", "1", "2", "3", "1,200", "ok,", "4", "error"]
    assert words[2][0] == "all"
    assert "worst 12.3 ms, p99 0.25 ms, above 50 ms 0 of 5,000 times." in done.output
    assert json.loads(CliRunner().invoke(cli, ["stats", "--json"]).output) == STATS


def test_stats_of_who_is_not_the_operator_has_no_held_time(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ("uptime_seconds", "runs", "queued", "running")
    own = {key: STATS[key] for key in keys} | {"policies": {}}
    monkeypatch.setattr(admin, "stats", lambda address: own)
    done = CliRunner().invoke(cli, ["stats"])
    assert done.exit_code == 0, done.output
    assert "PARKED" not in done.output
    assert "Held" not in done.output


def test_run_does_not_import_what_it_does_not_need() -> None:
    code = (
        "import sys, sandboxd.cli.run\n"
        "print(*{'asyncio', 'psutil', 'pyroute2', 'tomllib', 'rich', 'pydantic', 'subprocess'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True
    )
    assert done.stdout.strip() == ""


# The real command


def command(*args: str, stdin: bytes = b"", **given: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *args], input=stdin, capture_output=True, timeout=PATIENCE_SECONDS, check=False, **given
    )


def test_run_prints_what_the_program_prints() -> None:
    done = command("run", "-c", "print(6 * 7)")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"42\n", b"")


def test_run_reads_a_program_from_stdin() -> None:
    assert command("run", "-", stdin="print('ü')".encode()).stdout == "ü\n".encode()


def test_run_hands_over_arguments_environment_and_stdin() -> None:
    code = "import os, sys; print(sys.argv[1:], os.environ['A'], sys.stdin.read())"
    done = command("run", "-c", code, "--env", "A=b", "--stdin", "-", "--", "-x", stdin=b"in")
    assert done.stdout == b"['-x'] b in\n"


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("import sys; sys.exit(3)", 3, "error: the program ended with exit status 3"),
        ("1/0", 1, "error: uncaught ZeroDivisionError: division by zero (line 1)"),
        ("import os; os.abort()", 134, "killed: the program ended by signal 6 (SIGABRT)"),
        ("import os; os.kill(os.getpid(), 11)", 139, "killed: the program ended by signal 11 (SIGSEGV)"),
        ("import time; time.sleep(60)", 124, "limit wall_seconds=1"),
        (
            "open('/tmp/f', 'wb').write(bytes(80 << 20))",
            1,
            "limits reached: tmp_bytes=64M (statfs: 0 bytes free in /tmp",
        ),
        ("x = b'x' * (1 << 30)", 1, "MemoryError"),
        ("while True: print('x' * 8000)", 153, "limit output_stop_bytes=8M"),
    ],
)
def test_run_says_how_it_ended(code: str, status: int, words: str) -> None:
    done = command("run", "--timeout", "1" if "sleep" in code else "20", "-c", code)
    assert done.returncode in (status, 137 if "MemoryError" in words else status)
    assert words in done.stderr.decode() or done.returncode == 137
    assert done.stderr.decode().splitlines()[-1].startswith("sandboxd: ")


def test_run_json_is_one_result_object() -> None:
    done = command("run", "--json", "-c", "print('out'); 1 + 1")
    result = json.loads(done.stdout)
    assert (result["status"], result["stdout"], result["exit_code"]) == ("ok", "out\n", 0)
    assert result["results"] == [{"mime": {"text/plain": "2"}}]
    assert done.returncode == 0


def test_run_copies_files_in_and_out(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("abc")
    code = "import os; os.mkdir('d'); open('d/out.txt', 'w').write(open('in.txt').read().upper())"
    done = command("run", "--input", str(tmp_path / "in.txt"), "--output-dir", str(tmp_path / "out"), "-c", code)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "d" / "out.txt").read_text() == "ABC"


def test_unknown_policy_is_2() -> None:
    done = command("run", "--policy", "no-such-policy", "-c", "1")
    assert done.returncode == 2
    assert b"no-such-policy" in done.stderr
    assert b"default" in done.stderr


def test_output_comes_while_the_program_runs() -> None:
    code = "import time; print('first', flush=True); time.sleep(60)"
    with subprocess.Popen([*COMMAND, "run", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"first\n"
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_SECONDS) == 130
        assert process.stderr is not None
        assert process.stderr.read() == b"sandboxd: cancelled: the run was cancelled\n"


def test_ctrl_c_keeps_what_there_was(tmp_path: Path) -> None:
    # With --json nothing streams: that the program came so far shows in its name (PR_SET_NAME).
    mark = f"mark{os.getpid()}"
    code = (
        "import ctypes, time; open('f', 'w').write('left'); print('hi', flush=True)\n"
        f"ctypes.CDLL(None).prctl(15, b'{mark}'); time.sleep(60)"
    )
    (tmp_path / "out").mkdir()
    args = ["run", "--json", "--output-dir", str(tmp_path / "out"), "-c", code]
    with subprocess.Popen([*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        eventually(lambda: mark in {one.name for one in processes().values()}, PATIENCE_SECONDS, "the program began")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    result = json.loads(out)
    assert (process.returncode, result["status"], err) == (130, "cancelled", b"")
    assert result["stdout"] == "hi\n"
    assert result["isolation"] is not None
    assert (tmp_path / "out" / "f").read_text() == "left"


@pytest.mark.parametrize("delay_seconds", [0.06, 0.12, 0.2, 0.3])
def test_ctrl_c_in_the_first_moments_shows_no_traceback(delay_seconds: float) -> None:
    # What the interpreter itself does before the command's first line is not ours to quieten.
    code = (
        "import os, signal, sys, threading, time, sandboxd\n"
        f"threading.Timer({delay_seconds} - 0.05, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "sys.argv = ['sandboxd', 'run', '-c', 'import time; time.sleep(60)']\n"
        "from sandboxd.cli import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=PATIENCE_SECONDS, check=False)
    assert done.returncode == 130
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("args", [["run", "--json", "-c", "1"], ["run", "--help"], ["--help"], ["policy", "list"]])
def test_output_that_is_lost_is_said_plainly(args: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, *args], stdout=full, stderr=subprocess.PIPE, timeout=PATIENCE_SECONDS, check=False
        )
    assert done.stderr == b"sandboxd: cannot write to stdout: No space left on device\n"
    assert done.returncode == 125


def test_a_closed_pipe_ends_the_run() -> None:
    code = "import itertools\nfor n in itertools.count(): print(n)"
    with subprocess.Popen([*COMMAND, "run", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(PATIENCE_SECONDS) == 141
        assert process.stderr.read() == b""


def test_run_works_with_its_own_stdout_closed() -> None:
    code = "import sys; print('lost'); print('kept', file=sys.stderr)"
    done = subprocess.run(
        ["/bin/sh", "-c", '"$@" >&-', "sh", *COMMAND, "run", "-c", code],
        stderr=subprocess.PIPE,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"kept\n")
