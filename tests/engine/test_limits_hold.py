"""Every limit, met by a program that does not stop by itself: ended or contained there, with the evidence named."""

# ruff: noqa: E501 - a program of a table stands on one line

from __future__ import annotations

import signal
import textwrap
import time
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd import Limits, PolicyError, Result, Sandbox
from tests.support.patience import SLOWER

if TYPE_CHECKING:
    from pathlib import Path

    from sandboxd.client.result import LimitHit

pytestmark = pytest.mark.usefixtures("prompt")

LEEWAY_SECONDS = 2.0
"""What ends at a limit is over this much later at the latest, as the caller's clock sees it."""

MIB = 1 << 20


def inside(sandbox: Sandbox, code: str, **limits: Any) -> Result:
    """Run *code*, whose indentation is the test's, under narrower *limits*."""
    return sandbox.run(textwrap.dedent(code), limits=Limits(**limits))


def untouched(result: Result) -> list[str]:
    """The limits that were met, but for the share of CPUs, which the kernel may hold any program to for a moment."""
    return [found.limit for found in result.limits_hit if found.limit != "cpus"]


def hit(result: Result, limit: str) -> LimitHit:
    """The one entry of limits_hit for *limit*."""
    found = [one for one in result.limits_hit if one.limit == limit]
    assert len(found) == 1, f"{limit} not once in {result.limits_hit}; {result.status}, {result.stderr[-500:]}"
    return found[0]


def assert_serves(sandbox: Sandbox) -> None:
    """The engine goes on, and the next run has nothing of the last one's."""
    result = sandbox.run("print(6 * 7)")
    assert (result.status, result.stdout) == ("ok", "42\n")
    assert {one.limit for one in result.limits_hit} <= {"cpus"}


# --- wall clock ---------------------------------------------------------------------------------------------------

ENDLESS = [
    ("loop", "while True: pass"),
    ("loop-in-c", "sum(iter(int, 1))"),
    ("sleep", "import time; time.sleep(3600)"),
    ("ignores-sigterm", "import signal, time\nfor n in range(1, 32):\n    if n not in (9, 19): signal.signal(n, signal.SIG_IGN)\ntime.sleep(3600)"),
    ("stops-itself", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"),
    ("catches-everything", "while True:\n    try:\n        while True: pass\n    except BaseException: pass"),
    ("blocked-read", "import os; r, w = os.pipe(); os.read(r, 1)"),
    ("reads-our-channel", "import os\nwhile True: os.read(3, 1)"),
    ("waits-for-a-child", "import os\nif os.fork() == 0:\n    while True: pass\nos.wait()"),
    ("child-holds-stdout", "import subprocess; subprocess.check_output('sleep 3600 & echo x; wait', shell=True)"),
    ("non-daemon-thread", "import threading; threading.Thread(target=threading.Event().wait).start()"),
    ("atexit-that-never-ends", "import atexit, threading; atexit.register(threading.Event().wait)"),
    ("del-that-never-ends", "import threading\nclass A:\n    def __del__(self): E().wait()\nE = threading.Event\na = [A(), threading.Event().wait]\ndel a[0]"),
    ("repr-that-never-ends", "class A:\n    def __repr__(self):\n        while True: pass\nA()"),
    ("excepthook-that-never-ends", "import sys, threading\nsys.excepthook = lambda *a: threading.Event().wait()\n1/0"),
    ("forked-tree-in-sessions", "import os, signal\nfor _ in range(4):\n    os.fork()\ntry: os.setsid()\nexcept OSError: pass\nwhile True: signal.pause()"),
    ("deep-recursion-of-forks", "import os, time\nfor _ in range(30):\n    if os.fork(): break\ntime.sleep(3600)"),
    ("holds-the-gil", "import re; re.match(r'(a+)+$', 'a' * 64 + 'b')"),
    ("replaced", "import os; os.execvp('sleep', ['sleep', '3600'])"),
    ("stdin-never-read", "import threading; threading.Event().wait()"),
]  # fmt: skip


@pytest.mark.parametrize("code", [pytest.param(c, id=i) for i, c in ENDLESS])
def test_an_endless_program_ends_at_the_wall(sandbox: Sandbox, code: str) -> None:
    begun = time.monotonic()
    result = sandbox.run(f"print('first', flush=True)\n{code}", limits=Limits(wall_seconds=0.3), stdin=b"x" * 200_000)
    passed = time.monotonic() - begun
    assert (result.status, result.exit_code, result.error) == ("timeout", None, None)
    assert result.stdout == "first\n"
    assert 0.3 <= result.usage.wall_seconds <= 0.3 + LEEWAY_SECONDS
    assert passed <= 0.3 + LEEWAY_SECONDS
    found = hit(result, "wall_seconds")
    assert (found.value, found.evidence.source) == (0.3, "clock")


@pytest.mark.cgroup
def test_the_whole_tree_is_gone_after_a_timeout(sandbox: Sandbox) -> None:
    # A child that lived on would go on writing: the streams are read to their end before the result comes.
    code = """
    import os
    for _ in range(3):
        if os.fork() == 0:
            os.setpgid(0, 0)
    while True:
        os.write(1, b"x")
    """
    result = inside(sandbox, code, wall_seconds=0.2 * SLOWER)
    assert result.status == "timeout"
    assert set(result.stdout.replace("\n", "")) >= {"x"}
    assert_serves(sandbox)


def test_output_before_a_timeout_is_kept_on_both_streams(sandbox: Sandbox) -> None:
    code = """
    import sys, time
    for n in range(500):
        print("out", n)
        print("err", n, file=sys.stderr)
    time.sleep(3600)
    """
    result = inside(sandbox, code, wall_seconds=0.5)
    assert result.status == "timeout"
    assert result.stdout == "".join(f"out {n}\n" for n in range(500))
    assert result.stderr == "".join(f"err {n}\n" for n in range(500))


def test_files_before_a_timeout_are_kept(sandbox: Sandbox) -> None:
    result = inside(sandbox, "open('kept.txt', 'w').write('kept')\nwhile True: pass", wall_seconds=0.3)
    assert result.status == "timeout"
    assert [(file.path, file.read()) for file in result.files] == [("kept.txt", b"kept")]


def test_a_program_that_forges_its_end_does_not_outlive_it(sandbox: Sandbox) -> None:
    code = """
    import json, os, time
    os.write(3, json.dumps({"exit_code": 0, "error": None, "results": []}).encode())
    time.sleep(3600)
    """
    begun = time.monotonic()
    assert inside(sandbox, code, wall_seconds=10).status == "ok"
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    "frame",
    ["b'x'", "b'{}'", "b'[' * 100000", "b'x' * 200000", 'b\'{"exit_code": 999, "error": null, "results": []}\''],
)
def test_a_flood_of_nonsense_on_our_channel_changes_nothing(sandbox: Sandbox, frame: str) -> None:
    code = f"""
    import os
    os.set_blocking(3, False)
    try:
        for _ in range(10000): os.write(3, {frame})
    except OSError: pass
    os._exit(4)
    """
    result = inside(sandbox, code, wall_seconds=10)
    assert (result.status, result.exit_code, result.error) == ("error", 4, None)


# --- CPU time -----------------------------------------------------------------------------------------------------


def test_cpu_time_is_not_wall_time(sandbox: Sandbox) -> None:
    result = inside(sandbox, "import time; time.sleep(0.4)", cpu_seconds=0.3, wall_seconds=10)
    assert result.status == "ok"
    assert result.usage.wall_seconds >= 0.4
    assert result.usage.cpu_user_seconds + result.usage.cpu_system_seconds < 0.3


@pytest.mark.cgroup
def test_a_loop_ends_at_its_cpu_time(sandbox: Sandbox) -> None:
    result = inside(sandbox, "print('first')\nwhile True: pass", cpu_seconds=0.3, wall_seconds=20)
    assert (result.status, result.exit_code, result.stdout) == ("cpu", None, "first\n")
    found = hit(result, "cpu_seconds")
    assert (found.value, found.evidence.source) == (0.3, "cgroup")
    used = result.usage.cpu_user_seconds + result.usage.cpu_system_seconds
    assert 0.29 <= used <= 0.3 + LEEWAY_SECONDS


@pytest.mark.cgroup
def test_cpu_time_is_of_the_whole_tree(sandbox: Sandbox) -> None:
    # No process of it uses more than a part, and each one ends: only the sum grows.
    code = """
    import os, time
    while True:
        if os.fork() == 0:
            end = time.process_time() + 0.05
            while time.process_time() < end: pass
            os._exit(0)
        os.wait()
    """
    result = inside(sandbox, code, cpu_seconds=0.4, wall_seconds=20)
    assert result.status == "cpu"
    assert hit(result, "cpu_seconds").evidence.source == "cgroup"


def test_wall_and_cpu_at_once_are_a_timeout(sandbox: Sandbox) -> None:
    result = inside(sandbox, "while True: pass", cpu_seconds=0.3, wall_seconds=0.3)
    assert result.status == "timeout"


@pytest.mark.cgroup
def test_a_share_of_a_cpu_holds_back_and_says_so(sandbox: Sandbox) -> None:
    code = "import time\nend = time.process_time() + 0.1\nwhile time.process_time() < end: pass"
    result = inside(sandbox, code, cpus=0.2, wall_seconds=20)
    assert result.status == "ok"
    assert result.usage.wall_seconds >= 0.3
    found = hit(result, "cpus")
    assert (found.value, found.evidence.source) == (0.2, "cgroup")
    assert result.usage.throttled_seconds is not None
    assert result.usage.throttled_seconds > 0


# --- memory -------------------------------------------------------------------------------------------------------

FILL = "def fill(path):\n    with open(path, 'wb', buffering=0) as f:\n        while True: f.write(bytes(1 << 20))\n"

HOGS = [
    ("python-list", "x = []\nwhile True: x.append(bytearray(1 << 20))"),
    ("python-string", "x = 'x'\nwhile True: x += x"),
    ("small-objects", "x = []\nwhile True: x.append([])"),
    ("numpy", "import numpy as np\nx = []\nwhile True: x.append(np.ones(1 << 17))"),
    ("mmap", "import mmap\nx = mmap.mmap(-1, 1 << 30)\nfor n in range(0, 1 << 30, 4096): x[n] = 1"),
    ("mmap-shared", "import mmap\nx = mmap.mmap(-1, 1 << 30, flags=mmap.MAP_SHARED)\nfor n in range(0, 1 << 30, 4096): x[n] = 1"),
    ("thread", "import threading\ndef f():\n    x = []\n    while True: x.append(bytearray(1 << 20))\nt = threading.Thread(target=f); t.start(); t.join()"),
    ("handler-of-memoryerror", "x = []\nwhile True:\n    try: x.append(bytearray(1 << 20))\n    except MemoryError: pass"),
    ("ignores-everything", "import signal\nfor n in range(1, 32):\n    if n not in (9, 19): signal.signal(n, 1)\nx = []\nwhile True: x.append(bytearray(1 << 20))"),
    ("shm-and-tmp", FILL + "for path in ('/dev/shm/f', '/tmp/f', '/workspace/f'):\n    try: fill(path)\n    except OSError: print('full')\nx = bytearray(40 << 20)"),
    ("repr", "class A:\n    def __repr__(self):\n        x = 'x'\n        while True: x += x\nA()"),
    ("memfd", "import os\nf = os.memfd_create('m')\nwhile True: os.write(f, bytes(1 << 20))"),
]  # fmt: skip


@pytest.mark.cgroup
@pytest.mark.parametrize("code", [pytest.param(c, id=i) for i, c in HOGS])
def test_a_memory_hog_ends_at_its_own_limit(sandbox: Sandbox, code: str) -> None:
    result = inside(sandbox, f"print('first', flush=True)\n{code}", memory_bytes=96 * MIB, wall_seconds=20)
    assert (result.status, result.exit_code, result.signal, result.error) == ("memory", None, 9, None)
    assert result.stdout.startswith("first\n")
    found = hit(result, "memory_bytes")
    assert (found.value, found.evidence.source) == (96 * MIB, "cgroup")
    peak = result.usage.memory_peak_bytes
    assert peak is not None
    assert 48 * MIB < peak <= 96 * MIB
    assert result.usage.wall_seconds < 15


CHILD_HOGS = [
    ("fork", "import os\nif os.fork() == 0:\n    x = []\n    while True: x.append(bytearray(1 << 20))\nos.wait(); signal.pause()"),
    ("subprocess", "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'x = []\\nwhile True: x.append(bytearray(1 << 20))']); signal.pause()"),
    ("shell", "import subprocess\nsubprocess.run(['sh', '-c', 'tail /dev/zero']); signal.pause()"),
    ("several", "import os\nfor _ in range(5):\n    if os.fork() == 0:\n        x = []\n        while True: x.append(bytearray(1 << 20))\nsignal.pause()"),
]  # fmt: skip


@pytest.mark.cgroup
@pytest.mark.parametrize("code", [pytest.param(c, id=i) for i, c in CHILD_HOGS])
def test_a_child_that_hogs_memory_takes_the_rest_with_it(sandbox: Sandbox, code: str) -> None:
    begun = time.monotonic()
    result = inside(sandbox, f"import signal\n{code}", memory_bytes=96 * MIB, wall_seconds=20)
    assert time.monotonic() - begun < 15
    assert result.status == "memory"
    assert hit(result, "memory_bytes").evidence.source == "cgroup"


@pytest.mark.cgroup
def test_a_program_that_survives_its_childs_end_is_still_memory(sandbox: Sandbox) -> None:
    code = "import os\nif os.fork() == 0:\n    x = []\n    while True: x.append(bytearray(1 << 20))\nos.wait()"
    assert inside(sandbox, code, memory_bytes=96 * MIB, wall_seconds=20).status == "memory"


def test_a_refused_allocation_is_an_error_not_memory(sandbox: Sandbox) -> None:
    result = inside(sandbox, "print(1)\nx = bytearray(1 << 60)")
    assert (result.status, result.exit_code) == ("error", 1)
    assert result.error is not None
    assert (result.error.type, result.error.line) == ("MemoryError", 2)
    assert untouched(result) == []


@pytest.mark.cgroup
def test_memory_that_was_nearly_used_up_is_ok(sandbox: Sandbox) -> None:
    result = inside(sandbox, "x = b'x' * (64 << 20); print(len(x))", memory_bytes=128 * MIB)
    assert (result.status, untouched(result)) == ("ok", [])
    peak = result.usage.memory_peak_bytes
    assert peak is not None
    assert 64 * MIB < peak < 128 * MIB


# --- file systems -------------------------------------------------------------------------------------------------


SPACES = {"/workspace": "workspace_bytes", "/tmp": "tmp_bytes", "/dev/shm": "shm_bytes"}


def full_ones(result: Result) -> dict[str, object]:
    """The file systems that were full at the end, by their limits, with the values of these."""
    return {one.limit: one.value for one in result.limits_hit if one.evidence.source == "statfs"}


@pytest.mark.parametrize(("place", "limit"), SPACES.items())
def test_a_full_file_system_is_contained_and_named(sandbox: Sandbox, place: str, limit: str) -> None:
    result = inside(sandbox, f"{FILL}fill('{place}/f')", **{limit: 8 * MIB}, memory_bytes=96 * MIB, wall_seconds=20)
    assert (result.status, result.exit_code) == ("error", 1)
    assert result.error is not None
    assert (result.error.type, result.error.line) == ("OSError", 3)
    assert "No space left" in result.error.message
    assert full_ones(result) == {limit: 8 * MIB}
    assert hit(result, limit).evidence.detail == f"0 bytes free in {place} at the end"
    assert_serves(sandbox)


@pytest.mark.parametrize(("place", "limit"), SPACES.items())
def test_a_full_file_system_is_named_when_the_program_went_on(sandbox: Sandbox, place: str, limit: str) -> None:
    code = f"{FILL}try: fill('{place}/f')\nexcept OSError: print('full')"
    result = inside(sandbox, code, **{limit: 4 * MIB})
    assert (result.status, result.stdout) == ("ok", "full\n")
    assert full_ones(result) == {limit: 4 * MIB}


@pytest.mark.parametrize(("place", "limit"), SPACES.items())
def test_a_file_without_a_name_fills_a_file_system_too(sandbox: Sandbox, place: str, limit: str) -> None:
    code = f"""
    import os, tempfile
    file = tempfile.TemporaryFile(dir="{place}", buffering=0)
    try:
        while True: file.write(bytes(1 << 20))
    except OSError: print("full", flush=True)
    while True: pass
    """
    result = inside(sandbox, code, **{limit: 4 * MIB}, wall_seconds=0.5 * SLOWER)
    assert (result.status, result.stdout) == ("timeout", "full\n")
    assert full_ones(result) == {limit: 4 * MIB}


@pytest.mark.parametrize(("place", "limit"), SPACES.items())
def test_a_mapped_file_without_room_is_a_sigbus_with_its_cause(sandbox: Sandbox, place: str, limit: str) -> None:
    code = f"""
    import mmap
    file = open("{place}/f", "w+b")
    file.truncate(16 << 20)
    mapped = mmap.mmap(file.fileno(), 0)
    for n in range(0, 16 << 20, 4096): mapped[n] = 1
    """
    result = inside(sandbox, code, **{limit: 4 * MIB})
    assert (result.status, result.signal) == ("killed", signal.SIGBUS)
    assert full_ones(result) == {limit: 4 * MIB}
    detail = hit(result, limit).evidence.detail
    assert detail == f"0 bytes free in {place} at the end; SIGBUS is how a mapped file says that it has no room"
    assert_serves(sandbox)


def test_a_mapped_file_that_was_cut_short_is_a_sigbus_of_no_limit(sandbox: Sandbox) -> None:
    code = """
    import mmap
    file = open("/tmp/f", "w+b")
    file.truncate(8192)
    mapped = mmap.mmap(file.fileno(), 0)
    file.truncate(0)
    mapped[0]
    """
    result = inside(sandbox, code)
    assert (result.status, result.signal, full_ones(result)) == ("killed", signal.SIGBUS, {})


def test_shared_memory_that_is_larger_than_its_room(sandbox: Sandbox) -> None:
    code = """
    from multiprocessing import shared_memory
    shared = shared_memory.SharedMemory(create=True, size=16 << 20)
    for n in range(0, 16 << 20, 4096): shared.buf[n] = 1
    """
    result = inside(sandbox, code, shm_bytes=4 * MIB)
    assert (result.status, result.signal) == ("killed", signal.SIGBUS)
    assert full_ones(result) == {"shm_bytes": 4 * MIB}
    fits = inside(sandbox, code.replace("16 <<", "3 <<") + "shared.close(); shared.unlink()", shm_bytes=4 * MIB)
    assert (fits.status, full_ones(fits)) == ("ok", {})


def test_shared_memory_is_half_of_the_memory_unless_it_has_a_size(sandbox: Sandbox) -> None:
    code = "import os; found = os.statvfs('/dev/shm'); print(found.f_blocks * found.f_frsize >> 20)"
    for limits, size in (
        ({}, 256),
        ({"memory_bytes": 96 * MIB}, 48),
        ({"memory_bytes": 96 * MIB, "shm_bytes": 60 * MIB}, 60),
    ):
        assert inside(sandbox, code, **limits).stdout == f"{size}\n"
    full = inside(sandbox, f"{FILL}fill('/dev/shm/f')", memory_bytes=96 * MIB)
    assert (full.status, full_ones(full)) == ("error", {"shm_bytes": 48 * MIB})


@pytest.mark.parametrize("place", ["/tmp", "/dev/shm"])
def test_a_file_system_without_inodes_is_full(sandbox: Sandbox, place: str) -> None:
    code = f"import os\nos.chdir('{place}')\nfor n in range(20_000): os.symlink('x', f'l{{n}}')"
    result = inside(sandbox, code, wall_seconds=20)
    assert result.status == "error"
    found = hit(result, SPACES[place])
    assert (found.evidence.source, found.evidence.detail) == ("statfs", f"no inode free in {place} at the end")
    assert len(full_ones(result)) == 1
    assert_serves(sandbox)


def test_a_policys_own_sizes_hold(tmp_path: Path) -> None:
    file = tmp_path / "small.toml"
    file.write_text('name = "small"\n[limits]\ntmp_bytes = "2M"\nshm_bytes = "1M"\n')
    code = f"{FILL}for place in ('/tmp/f', '/dev/shm/f'):\n    try: fill(place)\n    except OSError: print('full')"
    with Sandbox(file) as sandbox:
        for limits in (None, Limits(tmp_bytes="1M")):
            result = sandbox.run(code, limits=limits)
            assert (result.status, result.stdout) == ("ok", "full\nfull\n")
            assert full_ones(result) == {"tmp_bytes": (1 if limits else 2) * MIB, "shm_bytes": MIB}
        with pytest.raises(PolicyError, match="3M is wider than the 2M"):
            sandbox.run(code, limits=Limits(tmp_bytes="3M"))


def test_a_million_files(sandbox: Sandbox) -> None:
    code = """
    for n in range(1_000_000):
        open(f"f{n}", "w").close()
    """
    result = inside(sandbox, code, wall_seconds=20)
    assert result.status == "error"
    found = hit(result, "workspace_files")
    assert (found.value, found.evidence.source) == (4096, "statfs")
    assert [one.limit for one in result.limits_hit if one.limit == "workspace_bytes"] == []
    assert len(result.files) == 4096
    assert_serves(sandbox)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param("os.mkdir(f'd{n}')", id="directories"),
        pytest.param("os.symlink('x', f'l{n}')", id="links"),
        pytest.param("os.mkfifo(f'p{n}')", id="fifos"),
    ],
)
def test_every_kind_of_name_counts(sandbox: Sandbox, make: str) -> None:
    result = inside(sandbox, f"import os\nfor n in range(10_000): {make}", workspace_files=100)
    assert result.status == "error"
    found = hit(result, "workspace_files")
    assert (found.value, found.evidence.source) == (100, "statfs")
    assert result.files == []


def test_a_deep_tree_is_walked_without_harm(sandbox: Sandbox) -> None:
    code = """
    import os
    try:
        while True:
            os.mkdir("d"); os.chdir("d"); open("f", "w").close()
    except OSError as error:
        print(error.errno)
    """
    result = inside(sandbox, code, wall_seconds=20)
    assert result.status == "ok"
    assert 0 < len(result.files) < 100
    assert result.files_skipped >= 1
    assert_serves(sandbox)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("f = open('big', 'wb', buffering=0)\nwhile True: f.write(bytes(1 << 20))", id="written"),
        pytest.param("f = open('big', 'wb', buffering=0)\nf.seek(10 << 30); f.write(b'x')", id="sparse"),
        pytest.param("open('big', 'wb').truncate(10 << 30)", id="truncated"),
        pytest.param(
            "import os; os.posix_fallocate(os.open('big', os.O_RDWR | os.O_CREAT), 0, 10 << 30)", id="fallocated"
        ),
    ],
)
def test_a_file_of_10_gb(sandbox: Sandbox, code: str) -> None:
    result = inside(sandbox, code, file_bytes=4 * MIB, wall_seconds=20)
    assert result.status == "error"
    found = hit(result, "file_bytes")
    assert (found.value, found.evidence.source) == (4 * MIB, "program")
    for file in result.files:
        assert file.size_bytes <= 4 * MIB


def test_a_program_that_replaced_itself_and_wrote_too_much(sandbox: Sandbox) -> None:
    code = "import os, signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL); os.execvp('dd', ['dd', 'if=/dev/zero', 'of=big', 'bs=1M'])"
    result = inside(sandbox, code, file_bytes=4 * MIB)
    assert (result.status, result.signal) == ("killed", 25)
    assert hit(result, "file_bytes").evidence.source == "wait"


# --- processes and descriptors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import os\nwhile True: os.fork()", id="fork", marks=pytest.mark.cgroup),
        pytest.param("import os, signal\ntry:\n    while True:\n        if os.fork() == 0: signal.pause()\nexcept OSError: signal.pause()", id="fork-and-stay"),
        pytest.param("import threading, signal\ntry:\n    while True: threading.Thread(target=threading.Event().wait, daemon=True).start()\nexcept RuntimeError: signal.pause()", id="thread"),
        pytest.param("import subprocess\nwhile True: subprocess.Popen(['sleep', '3600'])", id="subprocess"),
        pytest.param("import subprocess; subprocess.run(['bash', '-c', 'f() { f | f & }; f; wait'])", id="shell"),
    ],
)  # fmt: skip
def test_a_bomb_of_processes_or_threads(sandbox: Sandbox, code: str) -> None:
    begun = time.monotonic()
    result = inside(sandbox, code, wall_seconds=2 * SLOWER, pids=32)
    assert time.monotonic() - begun <= 2 * SLOWER + LEEWAY_SECONDS
    assert result.status in ("error", "timeout", "ok")
    found = hit(result, "pids")
    assert (found.value, found.evidence.source) == (32, "cgroup")
    if result.usage.pids_peak is not None:
        assert result.usage.pids_peak <= 32
    assert_serves(sandbox)


@pytest.mark.cgroup
def test_a_thread_that_cannot_start_is_an_error_with_the_limit_named(sandbox: Sandbox) -> None:
    code = (
        "import threading\nfor _ in range(1000): threading.Thread(target=threading.Event().wait, daemon=True).start()"
    )
    result = inside(sandbox, code, pids=16, wall_seconds=10)
    assert result.status == "error"
    assert result.error is not None
    assert (result.error.type, result.error.message) == ("RuntimeError", "can't start new thread")
    assert hit(result, "pids").evidence.source == "cgroup"


def test_a_bomb_leaves_other_runs_alone(sandbox: Sandbox) -> None:
    import threading

    ended: list[Result] = []
    started = threading.Event()

    def bomb() -> None:
        code = "import os\nprint('go', flush=True)\nwhile True:\n    try: os.fork()\n    except OSError: pass"
        limits = Limits(wall_seconds=1.5)
        ended.append(sandbox.run(code, limits=limits, on_stdout=lambda text: started.set()))

    thread = threading.Thread(target=bomb)
    thread.start()
    try:
        assert started.wait(10)
        result = sandbox.run("import subprocess; print(subprocess.check_output(['echo', 'x']))")
        assert (result.status, result.stdout) == ("ok", "b'x\\n'\n")
    finally:
        thread.join()
    assert ended[0].status == "timeout"


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import os\nx = [os.open('/dev/null', os.O_RDONLY) for _ in range(100_000)]", id="open"),
        pytest.param("import os\nx = [os.dup(0) for _ in range(100_000)]", id="dup"),
        pytest.param("import socket\nx = [socket.socketpair() for _ in range(100_000)]", id="socketpair"),
        pytest.param("import os\nx = [os.pipe() for _ in range(100_000)]", id="pipe"),
    ],
)
def test_a_hundred_thousand_descriptors(sandbox: Sandbox, code: str) -> None:
    result = sandbox.run(code)
    assert result.status == "error"
    assert result.error is not None
    assert "Too many open files" in result.error.message
    found = hit(result, "open_files")
    assert (found.value, found.evidence.source) == (256, "program")
    assert_serves(sandbox)


def test_a_limit_of_descriptors_cannot_be_raised(sandbox: Sandbox) -> None:
    code = """
    import resource
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_CPU):
        soft, hard = resource.getrlimit(kind)
        try: resource.setrlimit(kind, (soft, hard + 1))
        except ValueError as error: print(error)
    """
    assert inside(sandbox, code).stdout == "not allowed to raise maximum limit\n" * 4


# --- output -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [1, 2])
def test_a_gigabyte_of_output_ends_the_run(sandbox: Sandbox, stream: int) -> None:
    code = f"import os\nblock = b'0123456789abcde\\n' * 4096\nfor _ in range(1 << 14): os.write({stream}, block)"
    result = inside(sandbox, code, wall_seconds=20)
    assert (result.status, result.exit_code, result.signal) == ("output", None, 9)
    stop, kept = hit(result, "output_stop_bytes"), hit(result, "output_bytes")
    assert (stop.value, stop.evidence.source) == (8 * MIB, "reader")
    assert (kept.value, kept.evidence.source) == (1 * MIB, "reader")
    text = result.stdout if stream == 1 else result.stderr
    dropped = result.stdout_dropped_bytes if stream == 1 else result.stderr_dropped_bytes
    marker = f"\n[... {dropped} bytes left out ...]\n"
    head, _, tail = text.partition(marker)
    assert len(head) == len(tail) == MIB // 2
    assert head.startswith("0123456789abcde\n")
    assert 8 * MIB < dropped + len(head) + len(tail) <= 8 * MIB + (256 << 10)  # a read and a full pipe more
    other = (
        (result.stderr, result.stderr_dropped_bytes) if stream == 1 else (result.stdout, result.stdout_dropped_bytes)
    )
    assert other == ("", 0)


def test_output_over_what_is_kept_but_not_over_the_end(sandbox: Sandbox) -> None:
    written = 3 * MIB
    code = f"import sys\nfor n in range({written // 16}): sys.stdout.write(f'{{n:015d}}\\n')"
    result = sandbox.run(code)
    assert result.status == "ok"
    assert hit(result, "output_bytes").value == MIB
    assert result.stdout_dropped_bytes == written - MIB
    whole = "".join(f"{n:015d}\n" for n in range(written // 16))
    marker = f"\n[... {written - MIB} bytes left out ...]\n"
    assert result.stdout == whole[: MIB // 2] + marker + whole[-MIB // 2 :]


def test_output_of_exactly_what_is_kept(sandbox: Sandbox) -> None:
    result = sandbox.run(f"print('x' * {MIB - 1})")
    assert (result.status, result.stdout_dropped_bytes, untouched(result)) == ("ok", 0, [])
    assert len(result.stdout) == MIB


def test_output_byte_by_byte(sandbox: Sandbox) -> None:
    code = "import os\nfor n in range(20000): os.write(1, b'%d' % (n % 10))"
    result = inside(sandbox, code, output_bytes=100)
    assert result.status == "ok"
    assert result.stdout == "0123456789" * 5 + "\n[... 19900 bytes left out ...]\n" + "0123456789" * 5


def test_streaming_gets_what_is_not_kept(sandbox: Sandbox) -> None:
    got: list[str] = []
    result = sandbox.run(f"print('x' * {3 * MIB})", on_stdout=got.append)
    assert sum(map(len, got)) == 3 * MIB + 1
    assert result.stdout_dropped_bytes == 2 * MIB + 1


def test_output_without_an_end_does_not_keep_others_waiting() -> None:
    import threading

    unlimited = Limits.model_validate({"output_stop_bytes": "unlimited", "wall_seconds": 2})
    flood = "import os\nblock = bytes(1 << 16)\nos.write(1, b'x')\nwhile True: os.write(1, block)"
    with Sandbox(limits=unlimited) as sandbox:
        started = threading.Event()
        ended: list[Result] = []

        def run() -> None:
            ended.append(sandbox.run(flood, on_stdout=lambda text: started.set()))

        quiet = threading.Thread(target=lambda: ended.append(sandbox.run(flood)))
        loud = threading.Thread(target=run)
        begun = time.monotonic()
        quiet.start()
        loud.start()
        try:
            assert started.wait(10)
            assert sandbox.run("print(1)").status == "ok"
        finally:
            quiet.join()
            loud.join()
        assert time.monotonic() - begun <= 2 + 2 * LEEWAY_SECONDS
    assert [result.status for result in ended] == ["timeout", "timeout"]


# --- a run's numbers are its own ----------------------------------------------------------------------------------


@pytest.mark.cgroup
def test_usage_is_of_this_run_alone(sandbox: Sandbox) -> None:
    heavy = """
    import os, time
    x = b"x" * (100 << 20)
    for _ in range(20): os.fork() or os._exit(0)
    end = time.process_time() + 0.5
    while time.process_time() < end: pass
    """
    light = "print(1)"
    for _ in range(2):
        big = inside(sandbox, heavy)
        assert big.status == "ok"
        assert big.usage.memory_peak_bytes is not None
        assert big.usage.memory_peak_bytes > 100 * MIB
        assert big.usage.cpu_user_seconds + big.usage.cpu_system_seconds > 0.5
        assert big.usage.pids_peak is None or big.usage.pids_peak >= 2
        small = sandbox.run(light)
        assert small.usage.memory_peak_bytes is not None
        assert small.usage.memory_peak_bytes < 40 * MIB
        assert small.usage.cpu_user_seconds + small.usage.cpu_system_seconds < 0.3
        assert small.usage.pids_peak in (None, 1)
        assert untouched(small) == []


def test_usage_counts_children(sandbox: Sandbox) -> None:
    code = """
    import os, time
    if os.fork() == 0:
        end = time.process_time() + 0.3
        while time.process_time() < end: pass
        os._exit(0)
    os.wait()
    """
    usage = inside(sandbox, code).usage
    assert usage.cpu_user_seconds + usage.cpu_system_seconds >= 0.28


def test_times_add_up(sandbox: Sandbox) -> None:
    begun = time.monotonic()
    result = sandbox.run("import time; time.sleep(0.05)")
    passed = time.monotonic() - begun
    times = result.timings
    assert times.run_seconds == result.usage.wall_seconds
    assert times.run_seconds >= 0.05
    assert times.queued_seconds + times.setup_seconds + times.run_seconds <= passed
