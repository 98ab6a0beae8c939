"""What a cell sends and leaves is hostile: forged frames, odd files. The engine judges by evidence and goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import pytest

from sandboxd import Limits, Sandbox
from tests.support.engine import pid_of

if TYPE_CHECKING:
    from sandboxd import Result

pytestmark = pytest.mark.usefixtures("prompt")

_LIE = '{"exit_code": 0, "error": null, "results": [{"text/plain": "forged"}]}'


def still_serves(sandbox: Sandbox) -> bool:
    return sandbox.run("print(6 * 7)").stdout == "42\n"


# What is no finished frame. Each is sent by a program that then ends on its own with status 7.
FRAMES = {
    "empty-object": 'b"{}"',
    "not-json": 'b"\\xff\\xfe finished"',
    "not-an-object": 'b"[0, null, []]"',
    "deep": 'b"[" * 100_000',
    "deep-inside": 'b\'{"exit_code": 0, "error": null, "results": \' + b"[" * 50_000 + b"]" * 50_000 + b"}"',
    "as-large-as-it-goes": 'b\'{"exit_code": 0, "error": null, "results": ["\' + b"x" * 180_000 + b\'"]}\'',
    "duplicate-keys": 'b\'{"exit_code": 0, "exit_code": 0, "error": null, "results": []}\'',
    "extra-key": 'b\'{"exit_code": 0, "error": null, "results": [], "status": "ok"}\'',
    "not-a-number": 'b\'{"exit_code": NaN, "error": null, "results": []}\'',
    "float-code": 'b\'{"exit_code": 0.0, "error": null, "results": []}\'',
    "true-code": 'b\'{"exit_code": true, "error": null, "results": []}\'',
    "negative-code": 'b\'{"exit_code": -1, "error": null, "results": []}\'',
    "large-code": 'b\'{"exit_code": 256, "error": null, "results": []}\'',
    "endless-code": 'b\'{"exit_code": 1\' + b"0" * 100_000 + b\', "error": null, "results": []}\'',
    "error-is-text": 'b\'{"exit_code": 1, "error": "no", "results": []}\'',
    "error-keys": 'b\'{"exit_code": 1, "error": {"type": "E"}, "results": []}\'',
    "error-line": (
        'b\'{"exit_code": 1, "error": {"type": "E", "message": "", "traceback": "", "line": 1e300, "errno": null}, '
        '"results": []}\''
    ),
    "other-kind-of-result": 'b\'{"exit_code": 0, "error": null, "results": [{"text/html": "<script>"}]}\'',
    "many-results": 'b\'{"exit_code": 0, "error": null, "results": [\' + b",".join([b"{}"] * 5_000) + b"]}"',
    "walls-up-again": 'b"SBXC" + bytes(12)',
    "walls-failed": 'b"SBXC" + bytes([25, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0])',
}


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
def test_what_is_no_frame_is_nobodys_word(sandbox: Sandbox, frame: str) -> None:
    result = sandbox.run(f"import os\nos.write(3, {frame})\nos._exit(7)")
    assert (result.status, result.exit_code, result.error, result.results) == ("error", 7, None, [])
    assert still_serves(sandbox)


def test_frame_beyond_the_channel_is_refused_to_the_cell(sandbox: Sandbox) -> None:
    result = sandbox.run("""
import errno, os
try:
    os.write(3, bytes(1 << 22))
except OSError as error:
    print(errno.errorcode[error.errno])
""")
    assert result.stdout == "EMSGSIZE\n"
    assert still_serves(sandbox)


def test_flood_of_frames_holds_up_only_its_sender(sandbox: Sandbox) -> None:
    """The engine stops listening after the first that is none; the channel fills up, and the sender waits."""
    code = "import os\nfor _ in range(100_000): os.write(3, b'x' * 100)"
    assert sandbox.run(code, limits=Limits(wall_seconds=1)).status == "timeout"
    assert still_serves(sandbox)


def test_program_that_sent_nonsense_ends_as_it_says(sandbox: Sandbox) -> None:
    result = sandbox.run("import os\nos.write(3, b'x')\n6 * 7")
    assert (result.status, [one.mime for one in result.results]) == ("ok", [{"text/plain": "42"}])


def test_forged_end_ends_only_its_sender(sandbox: Sandbox) -> None:
    """Whoever says that it has finished is taken at its word, and killed: as it could have ended itself."""
    result = sandbox.run(f"import os, time\nprint('before')\nos.write(3, {_LIE.encode()!r})\nwhile True: pass")
    assert (result.status, result.exit_code, result.stdout) == ("ok", 0, "before\n")
    assert [one.mime for one in result.results] == [{"text/plain": "forged"}]
    assert result.usage.wall_seconds < 2
    assert still_serves(sandbox)


def test_forged_end_does_not_hide_a_limit(sandbox: Sandbox) -> None:
    """A child fills the memory first; the claim that all is well comes after the kill."""
    result = sandbox.run(
        f"""
import os, signal
pid = os.fork()
if pid == 0:
    kept = bytearray(200 << 20)
    os._exit(0)
os.waitpid(pid, 0)
os.write(3, {_LIE.encode()!r})
""",
        limits=Limits(memory_bytes="64M"),
    )
    assert (result.status, result.results) == ("memory", [])
    assert [hit.limit for hit in result.limits_hit] == ["memory_bytes"]


def test_forged_error_shows_no_more_than_text(sandbox: Sandbox) -> None:
    frame = (
        b'{"exit_code": 1, "error": {"type": "\\u001b[31mE", "message": "m", "traceback": "t", "line": 1, '
        b'"errno": 24}, "results": []}'
    )
    result = sandbox.run(f"import os\nos.write(3, {frame!r})\nos._exit(0)")
    assert result.status == "error"
    assert result.error is not None
    assert result.error.message == "m"
    assert [(hit.limit, hit.evidence.source) for hit in result.limits_hit] == [("open_files", "program")]


@pytest.mark.parametrize(
    "way", ["os.close(3)", "socket.socket(fileno=3).shutdown(2)", "os.dup2(0, 3)", "os.closerange(0, 10)"]
)
def test_closed_channel_leaves_the_wait_status(sandbox: Sandbox, way: str) -> None:
    result = sandbox.run(f"import os, socket, sys\n{way}\nsys.exit(5)")
    assert (result.status, result.exit_code) == ("error", 5)
    assert still_serves(sandbox)


def test_nothing_can_be_read_from_the_channel(sandbox: Sandbox) -> None:
    result = sandbox.run("""
import os
os.set_blocking(3, False)
try:
    print(os.read(3, 1 << 20))
except BlockingIOError:
    print("empty")
""")
    assert result.stdout == "empty\n"


def test_descriptors_sent_over_the_channel_go_nowhere() -> None:
    with Sandbox() as fresh:
        engine = psutil.Process(pid_of(fresh))
        before = engine.num_fds()
        result = fresh.run("""
import array, contextlib, os, socket
# The kernel refuses them (Linux 6.16), or the engine closes them.
with socket.socket(fileno=os.dup(3)) as channel, contextlib.suppress(PermissionError):
    channel.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 200))])
os._exit(0)
""")
        assert result.status == "ok", result.stderr
        assert still_serves(fresh)
        assert engine.num_fds() - before < 50


# Files

BAD_FILES = """
import os
os.symlink("/etc/shadow", "shadow")
os.symlink("/", "root")
os.symlink("../../../../etc/passwd", "up")
os.symlink("plain", "to-plain")
os.mkfifo("fifo")
import socket
server = socket.socket(socket.AF_UNIX); server.bind("socket")
open("one", "w").write("linked"); os.link("one", "two")
os.symlink("/proc/self/environ", "environ")
open("plain", "w").write("kept")
"""


def test_only_plain_files_come_out(sandbox: Sandbox) -> None:
    result = sandbox.run(BAD_FILES)
    assert result.status == "ok", result.stderr
    assert [(file.path, file.read()) for file in result.files] == [("plain", b"kept")]
    assert result.files_skipped == 9


def test_odd_names_come_out_or_are_counted(sandbox: Sandbox) -> None:
    names = ["new\nline", "\x1b[31mred", "-rf", "ümlaut", " space ", "quote'\"", "back\\slash", "con:", "a" * 255]
    result = sandbox.run(f"""
import os
for name in {names!r}:
    open(name, "w").close()
open(b"bad-\\xff-name", "w").close()
os.mkdir(b"dir-\\xff"); open(b"dir-\\xff/inside", "w").close()
""")
    assert result.status == "ok", result.stderr
    assert [file.path for file in result.files] == sorted(names)
    assert result.files_skipped == 2


def test_unreadable_files_are_the_runs_files_all_the_same(sandbox: Sandbox) -> None:
    result = sandbox.run("""
import os
open("secret", "w").write("x"); os.chmod("secret", 0)
os.mkdir("dir"); open("dir/inside", "w").write("y"); os.chmod("dir", 0)
""")
    assert [(file.path, file.read()) for file in result.files] == [("dir/inside", b"y"), ("secret", b"x")]


def test_sparse_file_is_not_copied_out(sandbox: Sandbox) -> None:
    """400 MiB by its size, nothing in the workspace's 64 MiB."""
    result = sandbox.run(
        "import os\nos.truncate(os.open('s', os.O_CREAT | os.O_RDWR), 400 << 20)\nopen('t', 'w').write('t')"
    )
    assert result.status == "ok", result.stderr
    assert [file.path for file in result.files] == ["t"]
    assert result.files_skipped == 1


def test_tree_beyond_the_depth_is_counted(sandbox: Sandbox) -> None:
    result = sandbox.run("""
import os
for depth in range(1000):
    open("file", "w").close()
    os.mkdir("d")
    os.chdir("d")
""")
    assert result.status == "ok", result.stderr
    assert 0 < len(result.files) <= 65
    assert result.files_skipped > 0


def test_names_beyond_the_path_limit_do_no_harm(sandbox: Sandbox) -> None:
    result = sandbox.run("""
import os
for depth in range(60):
    os.mkdir("d" * 200)
    os.chdir("d" * 200)
    open("file", "w").close()
""")
    assert result.status == "ok", result.stderr
    assert len(result.files) + result.files_skipped > 0
    assert all(len(file.path) <= 4095 for file in result.files)


def many(sandbox: Sandbox) -> Result:
    return sandbox.run("for number in range(100_000): open(str(number), 'w').close()")


def test_hundred_thousand_entries_end_at_the_limit(sandbox: Sandbox) -> None:
    result = many(sandbox)
    assert (result.status, result.error and result.error.type) == ("error", "OSError")
    assert len(result.files) + result.files_skipped <= 4096
    assert "workspace_files" in [hit.limit for hit in result.limits_hit]


def test_hundred_thousand_entries_when_allowed() -> None:
    with Sandbox(limits=Limits(workspace_files=110_000, wall_seconds=60)) as wide:
        result = many(wide)
        assert result.status == "ok", result.stderr
        assert len(result.files) + result.files_skipped == 100_000
        assert still_serves(wide)


def test_workspace_named_as_configuration_is_only_files(sandbox: Sandbox) -> None:
    """Bait for whoever runs tools in the output: the engine runs none and imports nothing from there."""
    bait = (".git/hooks/post-checkout", "sitecustomize.py", "x.pth", "package.json", "Makefile", "conftest.py")
    result = sandbox.run(f"""
import os
for name in {bait!r}:
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    open(name, "w").write("raise SystemExit('ran')")
    os.chmod(name, 0o755)
""")
    assert [file.path for file in result.files] == sorted(bait)
    assert still_serves(sandbox)
