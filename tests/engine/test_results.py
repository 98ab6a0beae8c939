"""The Result, field by field: what came out of a run, by whose word, and what was refused before it began."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path
from typing import Any

import pytest

from sandboxd import InvalidRequest, Limits, Policy, PolicyError, Result, Sandbox
from sandboxd.protocol import packets
from tests.support.engine import connect as connect_to_engine
from tests.support.leftovers import eventually

PROMISED = [
    "id", "status", "exit_code", "signal", "stdout", "stderr", "stdout_dropped_bytes", "stderr_dropped_bytes", "error",
    "results", "files", "files_skipped", "limits_hit", "usage", "timings", "warm", "isolation", "state",
]  # fmt: skip


def inside(sandbox: Sandbox, code: str, **arguments: Any) -> Result:
    """Run *code*, whose indentation is the test's."""
    return sandbox.run(textwrap.dedent(code), **arguments)


def contents(result: Result) -> dict[str, bytes]:
    """The files of *result* by path."""
    return {file.path: file.read() for file in result.files}


def live_runs(sandbox: Sandbox) -> list[Any]:
    """The runs that the engine of *sandbox* knows at this moment."""
    with connect_to_engine(sandbox) as sock:
        packets.send(sock, packets.hello())
        packets.send(sock, {"op": "ps"})
        while True:
            packet = packets.receive(sock)
            assert packet is not None
            packet.close()
            if packet.message["op"] == "ps":
                runs: list[Any] = packet.message["runs"]
                return runs


# --- the object ---------------------------------------------------------------------------------------------------


@pytest.mark.cgroup
def test_a_real_result_has_every_promised_key_and_survives_json(sandbox: Sandbox) -> None:
    result = sandbox.run("import sys; open('f', 'w'); print(1); print(2, file=sys.stderr); 3")
    plain = json.loads(result.to_json())
    assert list(plain) == PROMISED
    assert plain == result.to_dict()
    assert (type(plain["warm"]), plain["state"], plain["files"]) == (bool, None, [{"path": "f", "size_bytes": 0}])


def test_ids_differ(sandbox: Sandbox) -> None:
    assert sandbox.run("").id != sandbox.run("").id


@pytest.mark.cgroup
def test_the_receipt_says_what_was_in_force(sandbox: Sandbox) -> None:
    seen = inside(sandbox, "import os; print(os.uname().release, os.uname().sysname)")
    receipt = seen.isolation
    assert receipt is not None
    assert set(receipt.namespaces) == {"user", "pid", "mount", "network", "ipc", "uts", "cgroup"}
    assert {"memory", "pids", "cpu"} <= set(receipt.cgroup.controllers)
    assert receipt.seccomp.policy == "default"
    assert len(receipt.seccomp.sha256) == 64
    assert receipt.landlock_abi >= 1
    assert receipt.uid > 0
    assert (receipt.network, receipt.rootfs) == ("none", "host")
    assert seen.stdout.split() == [receipt.kernel.split()[1], receipt.kernel.split()[0]]


def test_streams_are_apart(sandbox: Sandbox) -> None:
    result = sandbox.run("import sys; print('out'); print('err', file=sys.stderr)")
    assert (result.stdout, result.stderr) == ("out\n", "err\n")


def test_the_cell_may_open_its_stderr_again(sandbox: Sandbox) -> None:
    result = inside(sandbox, "import subprocess; subprocess.run(['sh', '-c', 'echo x > /dev/stderr'], check=True)")
    assert (result.status, result.stderr) == ("ok", "x\n")


# --- the last expression ------------------------------------------------------------------------------------------

LAST = [
    ("6 * 7", "42"),
    ("x = 41\nx + 1", "42"),
    ("'text'", "'text'"),
    ("print(1)\n[1, 2]", "[1, 2]"),
    ("def f():\n    return 'v'\nf()", "'v'"),
    ("import numpy as np\nnp.arange(3)", "array([0, 1, 2])"),
    ("import pandas as pd\npd.DataFrame({'a': [1]})", "   a\n0  1"),
    ("5  # comment\n\n# end", "5"),
    ("(yes :=\n 3)", "3"),
    ("class A:\n    def __repr__(self): return '\\ud800'\nA()", "?"),
    ("'🙂\\0'", "'🙂\\x00'"),
]


@pytest.mark.parametrize(("code", "shown"), LAST)
def test_the_last_expression_is_a_result(sandbox: Sandbox, code: str, shown: str) -> None:
    result = sandbox.run(code)
    assert result.status == "ok"
    assert [one.mime for one in result.results] == [{"text/plain": shown}]


@pytest.mark.parametrize(
    "code", ["None", "x = 1", "print(1)", "", "for x in [1]: x", "5\npass", "5; x = 6", "def f(): 5"]
)
def test_no_last_expression_no_result(sandbox: Sandbox, code: str) -> None:
    result = sandbox.run(code)
    assert (result.status, result.results) == ("ok", [])


def test_results_can_be_left_out(sandbox: Sandbox) -> None:
    assert sandbox.run("6 * 7", results=False).results == []


def test_a_program_that_fails_has_no_results(sandbox: Sandbox) -> None:
    result = sandbox.run("import atexit, os\natexit.register(lambda: os._exit(3))\n5")
    assert (result.status, result.exit_code, result.results) == ("error", 3, [])


def test_a_huge_repr_is_cut_in_the_middle(sandbox: Sandbox) -> None:
    shown = sandbox.run("'a' * 5_000_000 + 'z'").results[0].mime["text/plain"]
    assert len(shown) < 40_000
    assert shown.startswith("'aaa")
    assert shown.endswith("az'")
    assert "characters left out" in shown


def test_a_repr_that_writes_wide_characters_still_fits(sandbox: Sandbox) -> None:
    shown = sandbox.run("'\\x01🙂' * 1_000_000").results[0].mime["text/plain"]
    assert "characters left out" in shown


def test_a_repr_that_raises_is_an_error_of_its_line(sandbox: Sandbox) -> None:
    result = sandbox.run("class A:\n    def __repr__(self):\n        return self.nothing\nprint('before')\nA()")
    assert (result.status, result.stdout, result.results) == ("error", "before\n", [])
    assert result.error is not None
    assert (result.error.type, result.error.line) == ("AttributeError", 3)


def test_a_repr_is_under_the_limits(sandbox: Sandbox) -> None:
    code = "class A:\n    def __repr__(self):\n        while True: pass\nprint('before')\nA()"
    result = sandbox.run(code, limits=Limits(wall_seconds=0.3))
    assert (result.status, result.stdout, result.results) == ("timeout", "before\n", [])


def test_a_repr_that_is_no_string(sandbox: Sandbox) -> None:
    result = sandbox.run("class A:\n    def __repr__(self): return 5\nA()")
    assert (result.status, result.error is not None and result.error.type) == ("error", "TypeError")


# --- files in -----------------------------------------------------------------------------------------------------


def test_input_files_arrive_from_every_kind_of_source(sandbox: Sandbox, tmp_path: Path) -> None:
    host = tmp_path / "host.bin"
    host.write_bytes(bytes(range(256)))
    result = inside(
        sandbox,
        """
        import os
        for path in ("a.txt", "b/c/d.bin", "e.bin", "leer", "ü 🙂.txt"):
            facts = os.stat(path)
            assert (facts.st_uid, facts.st_gid) == (os.getuid(), os.getgid())
            print(path, open(path, "rb").read()[:8], facts.st_size, oct(facts.st_mode & 0o777))
        print(os.listdir("b"), os.access("b", os.W_OK))
        """,
        files={"a.txt": "täxt", "b/c/d.bin": b"\0\1", "e.bin": host, "leer": b"", "ü 🙂.txt": "x"},
    )
    assert result.stderr == ""
    assert result.stdout == textwrap.dedent("""\
        a.txt b't\\xc3\\xa4xt' 5 0o644
        b/c/d.bin b'\\x00\\x01' 2 0o644
        e.bin b'\\x00\\x01\\x02\\x03\\x04\\x05\\x06\\x07' 256 0o644
        leer b'' 0 0o644
        ü 🙂.txt b'x' 1 0o644
        ['c'] True
        """)


def test_a_large_input_file(sandbox: Sandbox) -> None:
    import hashlib

    content = os.urandom(1 << 20) * 48
    result = sandbox.run(
        "import hashlib; print(hashlib.sha256(open('in', 'rb').read()).hexdigest())", files={"in": content}
    )
    assert result.stdout == hashlib.sha256(content).hexdigest() + "\n"
    assert result.files == []


def test_as_many_input_files_as_are_allowed(sandbox: Sandbox) -> None:
    files = {f"d{n % 10}/f{n}": str(n) for n in range(4086)}
    code = "import os; print(sum(int(open(os.path.join(d, f)).read()) for d, _, fs in os.walk('.') for f in fs))"
    result = sandbox.run(code, files=files)
    assert (result.stdout, result.files) == (f"{sum(range(4086))}\n", [])


def test_inputs_count_in_the_workspace(sandbox: Sandbox) -> None:
    code = "open('more', 'wb', buffering=0).write(bytes(2 << 20))\nopen('again', 'wb', buffering=0).write(bytes(1))"
    result = sandbox.run(code, files={"in": bytes(2 << 20)}, limits=Limits(workspace_bytes=4 << 20))
    assert result.error is not None
    assert "No space" in result.error.message


def test_a_module_among_the_inputs_is_imported(sandbox: Sandbox) -> None:
    files = {"helper.py": "def double(x):\n    return 2 * x\n\ndef fail():\n    raise ValueError('helper')\n"}
    assert sandbox.run("import helper; print(helper.double(4))", files=files).stdout == "8\n"
    result = sandbox.run("import helper\nhelper.fail()", files=files)
    assert result.error is not None
    assert result.error.line == 2
    assert '"/workspace/helper.py", line 5, in fail' in result.error.traceback


# --- files out ----------------------------------------------------------------------------------------------------


def test_ten_files_are_listed_sorted_and_fetched(sandbox: Sandbox) -> None:
    code = (
        "import os\nos.makedirs('d/e')\nfor n in range(10): open(f'd/e/{n}' if n % 2 else f'f{n}', 'w').write('x' * n)"
    )
    result = sandbox.run(code)
    assert contents(result) == {(f"d/e/{n}" if n % 2 else f"f{n}"): b"x" * n for n in range(10)}
    assert [file.path for file in result.files] == sorted(file.path for file in result.files)
    assert all(file.size_bytes == len(file.read()) for file in result.files)
    assert result.files_skipped == 0


def test_an_unclosed_file_is_written(sandbox: Sandbox) -> None:
    assert contents(sandbox.run("f = open('f', 'w'); f.write('all of it')")) == {"f": b"all of it"}
    with_thread = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    assert contents(sandbox.run(f"{with_thread}f = open('f', 'w'); f.write('all of it')")) == {"f": b"all of it"}


def test_a_file_is_listed_after_a_crash(sandbox: Sandbox) -> None:
    result = sandbox.run("open('f', 'w').write('kept')\nimport os; os.abort()")
    assert (result.status, contents(result)) == ("killed", {"f": b"kept"})


CHANGES = [  # what the program does to in.txt, and what is listed then
    ("nothing", "pass", {}),
    ("reads", "open('in.txt').read()", {}),
    ("appends", "open('in.txt', 'a').write('+')", {"in.txt": b"input+"}),
    ("same-length", "open('in.txt', 'w').write('INPUT')", {"in.txt": b"INPUT"}),
    ("same-length-and-mtime", "import os; s = os.stat('in.txt'); open('in.txt', 'w').write('INPUT')\n"
     "os.utime('in.txt', ns=(s.st_atime_ns, s.st_mtime_ns))", {"in.txt": b"INPUT"}),
    ("in-place-by-mmap", "import mmap; f = open('in.txt', 'r+b'); m = mmap.mmap(f.fileno(), 0)\n"
     "m[:] = b'INPUT'; m.close(); import os; os.utime('in.txt', ns=(0, 0))", {"in.txt": b"INPUT"}),
    ("replaces", "import os; open('new', 'w').write('input'); os.replace('new', 'in.txt')", {"in.txt": b"input"}),
    ("renames", "import os; os.rename('in.txt', 'out.txt')", {"out.txt": b"input"}),
    ("deletes", "import os; os.remove('in.txt')", {}),
    ("truncates", "open('in.txt', 'w')", {"in.txt": b""}),
]  # fmt: skip


@pytest.mark.parametrize(("code", "listed"), [pytest.param(c, f, id=i) for i, c, f in CHANGES])
def test_of_the_inputs_only_the_changed_are_listed(sandbox: Sandbox, code: str, listed: dict[str, bytes]) -> None:
    result = sandbox.run(code, files={"in.txt": "input", "other/untouched.txt": "x"})
    assert result.status == "ok", result.stderr
    assert contents(result) == listed


SKIPPED = [
    ("symlink", "os.symlink('/etc/passwd', 'l')", 1),
    ("dangling", "os.symlink('nowhere', 'l')", 1),
    ("directory-link", "os.symlink('/usr', 'l')", 1),
    ("fifo", "os.mkfifo('p')", 1),
    ("socket", "import socket; socket.socket(socket.AF_UNIX).bind('s')", 1),
    ("hard-link", "os.link('kept', 'k2')", 2),
    ("not-utf8", "open(b'\\xff', 'w')", 1),
]  # fmt: skip


@pytest.mark.parametrize(("code", "skipped"), [pytest.param(c, n, id=i) for i, c, n in SKIPPED])
def test_what_is_no_plain_file_is_counted_as_skipped(sandbox: Sandbox, code: str, skipped: int) -> None:
    result = sandbox.run(f"import os\nopen('kept', 'w').write('x')\n{code}")
    if "os.link" in code and result.status == "error":
        assert result.error is not None
        pytest.skip(f"hard links are refused here: {result.error.message}")
    assert (result.status, result.stderr) == ("ok", "")
    assert result.files_skipped == skipped
    assert set(contents(result)) == ({"kept"} if skipped == 1 else set())


def test_an_unreadable_file_is_the_programs_all_the_same(sandbox: Sandbox) -> None:
    code = (
        "import os\nos.mkdir('d')\nopen('d/f', 'w').write('x')\nos.chmod('d/f', 0)\nos.chmod('d', 0)\nos.chmod('.', 0)"
    )
    assert contents(sandbox.run(code)) == {"d/f": b"x"}


def test_odd_names_are_kept_as_they_are(sandbox: Sandbox) -> None:
    names = ["ü", "a b", "new\nline", "-rf", "\x1b[31m", "🙂"]
    result = sandbox.run(f"for n in {names!r}: open(n, 'w').write(n)")
    assert contents(result) == {name: name.encode() for name in names}
    assert "\x1b" not in result.to_json()


def test_tmp_is_not_the_workspace(sandbox: Sandbox) -> None:
    result = sandbox.run("open('/tmp/f', 'w').write('x'); open('/dev/shm/g', 'w').write('x')")
    assert (result.status, result.files) == ("ok", [])


def test_the_workspace_is_fresh_for_every_run(sandbox: Sandbox) -> None:
    sandbox.run("import os\nfor d in ('.', '/tmp', '/dev/shm'): open(d + '/left', 'w').write('x')")
    result = sandbox.run("import os; print([os.listdir(d) for d in ('.', '/tmp', '/dev/shm')])")
    assert result.stdout == "[[], [], []]\n"


def test_files_are_read_after_the_sandbox_closed_and_not_after_the_result_did() -> None:
    with Sandbox() as sandbox:
        result = sandbox.run("open('f', 'w').write('x' * 1000)")
        other = sandbox.run("open('g', 'w').write('y')")
    assert result.files[0].read() == b"x" * 1000
    assert other.files[0].read() == b"y"
    result.close()
    with pytest.raises(ValueError, match="closed"):
        result.files[0].read()
    other.close()


def test_files_with_much_output(sandbox: Sandbox) -> None:
    result = sandbox.run(
        "print('o' * 500_000); import sys; print('e' * 400_000, file=sys.stderr); open('f', 'w').write('file')"
    )
    assert (len(result.stdout), len(result.stderr), contents(result)) == (500_001, 400_001, {"f": b"file"})


# --- limits of one run --------------------------------------------------------------------------------------------


def test_a_run_may_narrow_its_limits(sandbox: Sandbox) -> None:
    code = (
        "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_FSIZE))"
    )
    assert sandbox.run(code, limits=Limits(open_files=20, file_bytes=1000)).stdout == "(20, 20) (1000, 1000)\n"
    assert sandbox.run(code).stdout == f"(256, 256) ({512 << 20}, {512 << 20})\n"


WIDER: list[tuple[str, Any, str]] = [
    ("wall_seconds", 31, "30"),
    ("cpu_seconds", 61, "60"),
    ("cpus", 1.5, "1"),
    ("memory_bytes", 1 << 30, "512M"),
    ("pids", 65, "64"),
    ("workspace_bytes", 65 << 20, "64M"),
    ("workspace_files", 4097, "4096"),
    ("tmp_bytes", 65 << 20, "64M"),
    ("shm_bytes", (256 << 20) + 1, "256M"),
    ("open_files", 257, "256"),
    ("file_bytes", (512 << 20) + 1, "512M"),
    ("output_bytes", 2 << 20, "1M"),
    ("output_stop_bytes", "unlimited", "8M"),
    ("queue_seconds", 31, "30"),
    ("tool_wait_seconds", 61, "60"),
    ("approval_seconds", "unlimited", "300"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), WIDER)
def test_a_run_may_not_widen_its_limits(sandbox: Sandbox, field: str, value: Any, allowed: str) -> None:
    with pytest.raises(PolicyError) as refused:
        sandbox.run("print(1)", limits=Limits.model_validate({field: value}))
    assert refused.value.key == f"limits.{field}"
    assert f"limits.{field}" in str(refused.value)
    assert allowed in str(refused.value)
    assert live_runs(sandbox) == []
    assert sandbox.run("print(1)").stdout == "1\n"


def test_every_limit_is_among_those_that_may_not_be_widened() -> None:
    from sandboxd.limits import LIMITS

    assert {field for field, _, _ in WIDER} == set(LIMITS)


def test_who_makes_the_sandbox_may_set_any_limit() -> None:
    with Sandbox(limits=Limits(wall_seconds=100, pids=128)) as sandbox:
        assert sandbox.run("print(1)", limits=Limits(wall_seconds=90)).status == "ok"
        with pytest.raises(PolicyError, match="wall_seconds"):
            sandbox.run("print(1)", limits=Limits(wall_seconds=101))


# --- refused before anything began --------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("not-utf8", {"code": b"print(\xff)"}, "code"),
    ("surrogate", {"code": "x = '\ud800'"}, "code"),
    ("nul", {"code": "print(1)\0"}, "code"),
    ("number", {"code": 5}, "code"),
    ("over-16-mib", {"code": "#" * ((16 << 20) + 1)}, "code"),
    ("over-16-mib-bytes", {"code": b"#" * ((16 << 20) + 1)}, "code"),
    ("language", {"language": "perl"}, "language"),
    ("language-of-later", {"language": "bash"}, "language"),
    ("language-case", {"language": "Python"}, "language"),
    ("filename", {"filename": "../x.py"}, "filename"),
    ("args", {"args": [1]}, "args"),
    ("args-nul", {"args": ["a\0b"]}, "args"),
    ("env-name", {"env": {"A=B": "x"}}, "env"),
    ("env-loader", {"env": {"LD_PRELOAD": "x"}}, "env"),
    ("file-absolute", {"files": {"/etc/x": b""}}, "files"),
    ("file-dotdot", {"files": {"a/../../x": b""}}, "files"),
    ("file-is-directory-of-another", {"files": {"a": b"", "a/b": b""}}, "files"),
    ("file-missing", {"files": {"x": Path("/nowhere/at/all")}}, "files"),
    ("file-is-a-directory", {"files": {"x": Path("/usr")}}, "files"),
    ("file-content", {"files": {"x": 5}}, "files"),
    ("file-too-large", {"files": {"x": bytes((64 << 20) + 1)}}, "files"),
    ("files-too-many", {"files": {f"f{n}": b"" for n in range(4097)}}, "files"),
    ("stdin", {"stdin": 5}, "stdin"),
]


@pytest.mark.parametrize(("arguments", "field"), [pytest.param(a, f, id=i) for i, a, f in REFUSED])
def test_a_wrong_argument_is_named_and_nothing_starts(sandbox: Sandbox, arguments: dict[str, Any], field: str) -> None:
    eventually(lambda: live_runs(sandbox) == [], 5, "the engine has heard that the run before is over")
    with pytest.raises(InvalidRequest) as refused:
        sandbox.run(**{"code": "print(1)", **arguments})
    assert refused.value.field.startswith(field)
    assert str(refused.value).startswith(field)
    assert live_runs(sandbox) == []
    assert sandbox.run("print(1)").stdout == "1\n"


@pytest.mark.parametrize("value", [-1, 0, float("nan"), float("inf"), "1s", True, None, [], 10**400])
def test_a_limit_that_is_none_is_refused(value: Any) -> None:
    if value is None:
        assert Limits.model_validate({"wall_seconds": None}).plain() == {}
        return
    with pytest.raises(PolicyError, match="wall_seconds"):
        Limits.model_validate({"wall_seconds": value})


def test_a_limit_that_does_not_exist_is_refused() -> None:
    with pytest.raises(PolicyError, match="wall_secs"):
        Limits.model_validate({"wall_secs": 1})


def test_an_unknown_policy_is_refused_and_leaves_no_engine() -> None:
    with pytest.raises(PolicyError, match="no-such-policy"):
        Sandbox("no-such-policy")


def test_a_policy_of_ones_own() -> None:
    policy = Policy.model_validate({"name": "mine", "limits": {"wall_seconds": 0.3}})
    with Sandbox(policy) as sandbox:
        assert sandbox.run("while True: pass").status == "timeout"
