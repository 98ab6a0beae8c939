"""Programs and callers that would keep the engine's one loop busy: their runs end in time, and nobody else waits.

What a loop did is the engine's own account (tests/support/promptness.py); how much a neighbour feels of it is measured
by benchmarks/neighbours.py.
"""

from __future__ import annotations

import textwrap
import time
from typing import TYPE_CHECKING, Any, Final

import psutil
import pytest

from sandboxd import InvalidRequest, Limits, Result, Sandbox
from tests.support import leftovers
from tests.support.patience import SLOWER
from tests.support.promptness import prompt

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB: Final = 1 << 20


@pytest.fixture
def alone() -> Iterator[Sandbox]:
    """An engine whose loop nobody else uses: its iterations can be counted."""
    with Sandbox(pool=leftovers.UNPARKED, max_running=4) as sandbox:
        sandbox.run("pass")
        yield sandbox


def run(sandbox: Sandbox, code: str, **limits: Any) -> Result:
    return sandbox.run(textwrap.dedent(code), limits=Limits(**limits), on_stdout=lambda _: None)


# The first process is gone; its children send one packet after the other for as long as they live. It makes the engine
# busy for the moment of its end, by a memfd that the engine would have to free, so that there are packets when its end
# is told.
ORPHANS_SEND: Final = """
    import array, contextlib, ctypes, os, socket, time

    packet = ctypes.create_string_buffer({packet!r}, {size})
    class Vector(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
    class Message(ctypes.Structure):
        _fields_ = [("name", ctypes.c_void_p), ("name_size", ctypes.c_uint), ("vectors", ctypes.POINTER(Vector)),
                    ("count", ctypes.c_size_t), ("control", ctypes.c_void_p), ("control_size", ctypes.c_size_t),
                    ("flags", ctypes.c_long), ("sent", ctypes.c_long)]
    vector = Vector(ctypes.addressof(packet), {size})
    many = (Message * 500)()
    for message in many:
        message.vectors, message.count = ctypes.pointer(vector), 1
    channel = socket.socket(fileno=os.dup(3))
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    memory = os.memfd_create("memory")
    os.posix_fallocate(memory, 0, 200 << 20)
    wait, wake = os.pipe()
    for processor in os.sched_getaffinity(0):
        if os.fork() == 0:
            os.close(wake)
            os.close(memory)
            os.sched_setaffinity(0, {{processor}})
            os.read(wait, 1)
            send, end = ctypes.CDLL(None).sendmmsg, time.monotonic() + 30
            while time.monotonic() < end:
                send(3, many, len(many), 0)
    time.sleep(0.4)  # the share of a processor that it may save up is whole again
    with contextlib.suppress(PermissionError):
        channel.sendmsg([b"P"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [memory]))])
    os.close(memory)
    os._exit(0)
"""
FINISHED: Final = b'{"exit_code":0,"error":null,"results":[]}'


@pytest.mark.parametrize("packet", [FINISHED, b"P", b"", b"{"], ids=["finished", "parked", "empty", "malformed"])
def test_orphans_that_send_for_ever_end_with_their_parent(sandbox: Sandbox, packet: bytes) -> None:
    begun = time.monotonic()
    with prompt(sandbox):
        result = run(
            sandbox, ORPHANS_SEND.format(packet=packet, size=len(packet)), wall_seconds=min(4.0 * SLOWER, 30.0)
        )
    assert (result.status, result.exit_code) == ("ok", 0)
    assert time.monotonic() - begun < 3 * SLOWER


def test_of_many_finished_frames_the_first_counts(sandbox: Sandbox) -> None:
    code = f"""
        import os
        os.write(3, {FINISHED.replace(b"0", b"7")!r})
        os.write(3, {FINISHED!r})
        os.kill(os.getpid(), 9)
    """
    result = run(sandbox, code)
    assert result.status != "ok" or result.exit_code == 7


SENDS_DESCRIPTORS: Final = """
    import array, errno, os, socket, time
    channel = socket.socket(fileno=os.dup(3))
    memory = os.memfd_create("memory")
    os.posix_fallocate(memory, 0, 100 << 20)
    refused = 0
    for fds in ([memory], [memory] * 253, [channel.fileno()]):
        try:
            channel.sendmsg([b"P"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        except OSError as error:
            refused += error.errno == errno.EPERM
    os.close(memory)
    print(refused)
"""


@pytest.mark.kernel
def test_descriptors_over_the_channel_cost_the_engine_nothing(sandbox: Sandbox) -> None:
    from sandboxd.protocol import cell_socket

    with prompt(sandbox):
        result = run(sandbox, SENDS_DESCRIPTORS)
    assert result.status == "ok"
    # Where the kernel cannot refuse them, the engine disposes of them, and hears no more of that program.
    assert result.stdout == ("0\n" if cell_socket.may_carry_descriptors() else "3\n")


@pytest.mark.parametrize("kept", [False, True], ids=["streamed", "kept"])
def test_single_bytes_do_not_wake_the_engine_each(alone: Sandbox, kept: bool) -> None:
    code = """
        import os, time
        end = time.monotonic() + 2
        while time.monotonic() < end:
            os.write(1, b"x")
            os.write(2, b"x")
    """
    before = alone.stats()["held_seconds"]["iterations"]
    seen = None if kept else (lambda _: None)
    result = alone.run(textwrap.dedent(code), limits=Limits(cpus=0.9), on_stdout=seen)
    iterations = alone.stats()["held_seconds"]["iterations"] - before
    assert result.status == "ok"
    assert len(result.stdout) > 1000
    assert iterations < 4000 * SLOWER  # two streams, each at most some 150 times a second; before, at each write


@pytest.mark.cgroup
def test_a_program_at_its_memory_limit_does_not_wake_the_engine(alone: Sandbox) -> None:
    # Anonymous memory up to just below the limit, and page cache that the kernel has to reclaim for every file.
    code = """
        import glob, os, time
        held = bytearray(MEMORY)
        end = time.monotonic() + 4
        files = [path for path in glob.glob("/usr/lib/**/*", recursive=True) if os.path.isfile(path)][:3000]
        while time.monotonic() < end:
            for path in files:
                try:
                    with open(path, "rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                        file.read(1 << 20)
                except OSError:
                    pass
                if time.monotonic() > end:
                    break
    """.replace("MEMORY", str(50 * MIB))
    engine = psutil.Process(alone.stats()["pid"])
    before, begun = sum(engine.cpu_times()[:2]), time.monotonic()
    with prompt(alone):
        result = run(alone, code, memory_bytes=72 * MIB)
    used, passed = sum(engine.cpu_times()[:2]) - before, time.monotonic() - begun
    assert result.status in ("ok", "memory")
    assert used < 0.3 * passed  # on cgroup v2 there is a notice each 10 ms; what it costs is a look


# --- what a caller sends --------------------------------------------------------------------------------------------


def chain(levels: int) -> str:
    return "/".join(["d"] * levels)


@pytest.mark.parametrize(
    "files",
    [
        {f"{chain(64)}/{number}": b"x" for number in range(1000)},
        {f"{number % 63}/{number}": b"x" for number in range(4000)},
        {f"{number}": b"x" for number in range(4000)},
        {"large": bytes(60 * MIB)},
    ],
    ids=["deep", "in-directories", "flat", "large"],
)
def test_input_files_are_written_beside_the_loop(sandbox: Sandbox, files: dict[str, bytes]) -> None:
    with prompt(sandbox):
        result = sandbox.run("import os\nprint(sum(len(f) for _, _, f in os.walk('.')))", files=files)
    assert (result.status, result.stdout) == ("ok", f"{len(files)}\n")


def test_an_input_s_path_has_a_depth(sandbox: Sandbox) -> None:
    deep = f"{chain(64)}/f"
    assert sandbox.run(f"print(open({deep!r}).read())", files={deep: b"deep"}).stdout == "deep\n"
    with pytest.raises(InvalidRequest, match="at most 64 directories deep"):
        sandbox.run("pass", files={f"{chain(65)}/f": b""})


def test_a_long_source_is_written_beside_the_loop(sandbox: Sandbox) -> None:
    with prompt(sandbox):
        assert sandbox.run("#" * (15 * MIB) + "\nprint(1)").stdout == "1\n"


# --- what a program leaves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "open('f', 'wb').write(bytes(60 << 20))",
        "for n in range(4000): open(str(n), 'w').close()",
        "open('/tmp/f', 'wb').write(bytes(60 << 20))",
        "open('/dev/shm/f', 'wb').write(bytes(60 << 20))",
    ],
    ids=["workspace", "many-files", "tmp", "shm"],
)
def test_what_a_program_leaves_is_freed_beside_the_loop(sandbox: Sandbox, code: str) -> None:
    with prompt(sandbox):
        assert sandbox.run(code).status == "ok"
        assert sandbox.run("print(1)").stdout == "1\n"
