"""What a cell takes over from its caller, and from the run before it: nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time

import pytest

from sandboxd import Limits, Sandbox

ASK = """import ctypes, os
print(os.getpriority(0, 0), os.sched_getscheduler(0), ctypes.CDLL(None).personality(0xFFFFFFFF))
"""


@pytest.mark.parametrize(
    ("before", "seen"),
    [
        (["nice", "-n", "-10"], "0 0 0"),
        (["nice", "-n", "7"], "7 0 0"),  # a lower priority stays: it is the operator's wish, and harms nobody
        (["setarch", "--addr-no-randomize"], "0 0 0"),
        (["chrt", "--fifo", "5"], "0 0 0"),
    ],
    ids=["negative-nice", "positive-nice", "no-aslr", "realtime"],
)
def test_priorities_and_personality_of_the_caller_do_not_arrive(before: list[str], seen: str) -> None:
    assert shutil.which(before[0]), f"{before[0]} belongs to Debian's base system"
    command = [*before, sys.executable, "-m", "sandboxd", "run", "-c", ASK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.returncode) == (seen, 0), done.stderr


def test_address_space_is_random_under_a_caller_without_randomisation() -> None:
    ask = "print(hex(id(object())), open('/proc/self/maps').readline())"
    command = ["setarch", "--addr-no-randomize", sys.executable, "-m", "sandboxd", "run", "-c", ask]
    seen = {subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout for _ in range(2)}
    assert len(seen) == 2


def test_abstract_names_of_a_run_are_not_seen_by_the_next_of_its_slot() -> None:
    """Sockets passed around in a circle outlive their processes, until the kernel's collector comes."""
    leave = (
        "import array, os, socket\n"
        "names = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(60)]\n"
        "for number, one in enumerate(names): one.bind(f'\\0left-by-another-run-{number}')\n"
        "a, b = socket.socketpair()\n"
        "fds = array.array('i', [a.fileno(), b.fileno(), *(one.fileno() for one in names)])\n"
        "for end in (a, b): end.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])\n"
        "print(len(open('/proc/self/net/unix').read().split('left-by-another-run')))"
    )
    with Sandbox(max_running=1) as sandbox:
        for _ in range(30):
            assert int(sandbox.run(leave).stdout) == 61
            assert "left-by-another-run" not in sandbox.run("print(open('/proc/self/net/unix').read())").stdout


def test_killed_tasks_do_not_die_at_the_pace_of_their_cpu_quota() -> None:
    code = (
        "import os, signal\n"
        "block = bytearray(os.urandom(1 << 20)) * 150\n"
        "try:\n"
        "    while os.fork(): pass\n"
        "except OSError: pass\n"
        "while True: signal.pause()"
    )
    with Sandbox(limits=Limits(cpus=0.02, pids=60, memory_bytes="512M"), max_running=1) as sandbox:
        for _ in range(2):
            begun = time.monotonic()
            assert sandbox.run(code, limits=Limits(wall_seconds=4)).status == "timeout"
            assert time.monotonic() - begun < 4 + 6
            assert sandbox.run("print(1)").status == "ok"
