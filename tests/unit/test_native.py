"""The functions of native/ on their own: what they answer, what they refuse, what they leave open.

These also run under AddressSanitizer and UndefinedBehaviorSanitizer: no cell is started, no filter stays installed.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandboxd._native import ffi, lib
from sandboxd.engine.cells.zygote_spawn import INSIDE
from sandboxd.kernel import calls
from sandboxd.kernel.stages import Stage, unavailable
from sandboxd.rootfs import plan as rootfs
from tests.support.rootfs import iterate

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.sanitize

HEADER = Path(__file__).resolve().parents[2] / "native" / "include" / "sandboxd.h"


def test_open_beneath_stays_beneath(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_text("x")
    (tmp_path / "in" / "link").symlink_to("file")
    (tmp_path / "secret").write_text("s")
    directory = os.open(tmp_path / "in", os.O_RDONLY | os.O_DIRECTORY)
    try:
        fd = calls.open_beneath(directory, "file", os.O_RDONLY)
        assert os.read(fd, 9) == b"x"
        assert not os.get_inheritable(fd)
        os.close(fd)
        for path, number in (
            ("../secret", errno.EXDEV),
            ("/etc/passwd", errno.EXDEV),
            ("link", errno.ELOOP),
            ("missing", errno.ENOENT),
        ):
            with pytest.raises(OSError, match="openat2") as refused:
                calls.open_beneath(directory, path, os.O_RDONLY)
            assert refused.value.errno == number, path
    finally:
        os.close(directory)


def test_pidfd_signals_a_process_and_says_when_it_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "import signal; signal.pause()"]) as child:
        pidfd = calls.pidfd_open(child.pid)
        assert calls.pidfd_kill(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], 10)[0]
        assert child.wait() == -signal.SIGKILL
        assert not calls.pidfd_kill(pidfd, signal.SIGKILL)
        os.close(pidfd)
    with pytest.raises(OSError, match="pidfd_open"):
        calls.pidfd_open(-1)


def test_launched_program_has_its_descriptors_and_no_sigchld() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGCHLD, lambda number, _: heard.append(number))
    try:
        read, write = os.pipe()
        null = os.open(os.devnull, os.O_RDWR)
        code = (
            "import os, signal; os.write(1, repr((sorted(map(int, os.listdir('/proc/self/fd')))[:3], os.getcwd(),"
            " os.getsid(0) == os.getpid(), dict(os.environ), signal.getsignal(signal.SIGCHLD).value)).encode())"
        )
        pid, pidfd = calls.launch([sys.executable, "-I", "-S", "-c", code], {"ONLY": "this"}, [null, write, null])
        os.close(write)
        os.close(null)
        assert pid > 0
        assert select.select([pidfd], [], [], 20)[0]
        with pytest.raises(ChildProcessError):
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        said = os.read(read, 4096).decode()
        assert said.startswith("([0, 1, 2], '/', True, {'ONLY': 'this'")
        assert said.endswith(", 0)")
        os.close(read)
        os.close(pidfd)
        assert heard == []
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_program_that_cannot_be_executed_ends() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    _, pidfd = calls.launch(["/nonexistent"], {}, [null, null, null])
    os.close(null)
    assert select.select([pidfd], [], [], 10)[0]
    os.close(pidfd)


def test_files_made_for_another_owner_belong_to_it(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o777)  # noqa: S103 - the other id must be able to write here
    parent = tmp_path
    while parent != parent.parent:
        if not os.stat(parent).st_mode & 0o001:
            os.chmod(parent, os.stat(parent).st_mode | 0o111)  # noqa: S103
        parent = parent.parent
    with calls.as_file_owner(12345, 12346):
        os.close(os.open(tmp_path / "theirs", os.O_CREAT | os.O_WRONLY))
    os.close(os.open(tmp_path / "ours", os.O_CREAT | os.O_WRONLY))
    theirs, ours = os.stat(tmp_path / "theirs"), os.stat(tmp_path / "ours")
    assert (theirs.st_uid, theirs.st_gid) == (12345, 12346)
    assert (ours.st_uid, ours.st_gid) == (os.geteuid(), os.getegid())


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"\1",
        struct.pack("<II", 5, 0),
        struct.pack("<II6I", 1, 0, 4, 0, 0, 2**31, 1, 0) + b"\0" * 8,
        struct.pack("<II6I", 1, 0, 4, 0, 0, 0, 1, 0) + b"\0" * 8,
        struct.pack("<II6I", 1, 0, 4, 0, 0, 2, 2, 0) + b"ab" + b"cd" + b"\0" * 4,
    ],
    ids=["empty", "short", "fewer-than-said", "too-long", "no-target", "no-nul"],
)
def test_root_plan_that_is_none_is_refused_before_anything_is_made(encoded: bytes) -> None:
    """The child reads the plan in its new namespaces, reports and ends."""
    report_read, report_write = os.pipe()
    go_read, go_write = os.pipe()
    null = os.open(os.devnull, os.O_RDWR)
    argv, keep = calls.c_strings(["nursery"])
    buffer = ffi.new("unsigned char[]", encoded + b"\0")
    plan = ffi.new(
        "struct sbx_zygote_plan *",
        {
            "rootfs": buffer,
            "rootfs_length": len(encoded),
            "argv": argv,
            "envp": argv,
            "go_fd": go_read,
            "report_fd": report_write,
            "null_fd": null,
            "log_fd": null,
            "engine_fd": null,
            "zygote_fd": null,
            "owner_fd": null,
            "nursery_fd": null,
            "broker_fd": -1,
            "userns_fd": -1,
            "cgroup_fd": -1,
            "ntasks": 0,
        },
    )
    pidfd = ffi.new("int *", -1)
    pid = lib.sbx_zygote_clone(plan, pidfd)
    assert pid > 0
    os.close(report_write)
    stage, number, _ = struct.unpack("=IiI", os.read(report_read, 64))
    assert (stage, number) == (Stage.MOUNTS, errno.EINVAL)
    assert os.waitpid(pid, 0)[1] == 1 << 8
    for fd in (report_read, go_read, go_write, null, int(pidfd[0])):
        os.close(fd)
    del keep


def test_encoded_plan_is_what_the_c_side_reads() -> None:
    operations = [
        rootfs.Op(rootfs.Kind.DIR, "usr", mode=0o755),
        rootfs.Op(rootfs.Kind.FILE, "etc", data=b"text", mode=0o644),
    ]
    assert [tuple(op) for op in iterate(rootfs.encode(operations))] == [tuple(op) for op in operations]


def in_zygote(act: Callable[[socket.socket, socket.socket], object]) -> int:
    """Run *act* with the engine's and the nursery's ends of the channels to a child that has the cell's extension
    prepared; its exit status.
    """
    code = f"""
import sys, socket
sys.path.insert(0, {str(INSIDE)!r})
import _cell
ends = [int(word) for word in sys.argv[1:]]
allow = b"\\x06\\0\\0\\0\\0\\0\\xff\\x7f"
try:
    _cell.serve(*ends)
except RuntimeError:
    pass
else:
    sys.exit(40)
for wrong in (b"", b"1234567", b"x" * 8 * 4097):
    for pair in ((wrong, allow), (allow, wrong)):
        try:
            _cell.prepare(*pair)
        except ValueError:
            pass
        else:
            sys.exit(41)
assert _cell.prepare(allow, allow) >= 0
try:
    sys.exit(0 if _cell.serve(*ends) == 0 else 42)
except OSError as error:
    sys.exit(50 + (error.errno == 71))
"""
    engine, zygote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    nursery, requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    given = [zygote.fileno(), requests.fileno()]
    command = [sys.executable, "-I", "-S", "-c", code, *map(str, given)]
    with engine, nursery, zygote, requests, subprocess.Popen(command, pass_fds=given) as child:
        zygote.close()
        requests.close()
        act(engine, nursery)
        return child.wait(60)


@pytest.mark.parametrize("which", [0, 1], ids=["engine", "nursery"])
def test_zygote_ends_when_the_engine_or_the_nursery_does(which: int) -> None:
    assert in_zygote(lambda *ends: ends[which].close()) == 0


def test_zygote_refuses_a_packet_of_another_size() -> None:
    assert in_zygote(lambda engine, nursery: nursery.sendall(b"x")) == 51


@pytest.mark.parametrize(
    ("nfds", "has_cgroup", "ntasks", "nlimits"),
    [(4, 0, 0, 0), (5, 1, 0, 0), (5, 0, 1, 0), (5, 0, 2**31, 0), (5, 0, 0, 17), (5, 2, 0, 0)],
)
def test_zygote_refuses_a_request_that_does_not_add_up(nfds: int, has_cgroup: int, ntasks: int, nlimits: int) -> None:
    def ask(engine: socket.socket, nursery: socket.socket) -> None:
        request = struct.pack("=IIIIIIII", 7, 0, 1000, has_cgroup, ntasks, nlimits, 0, 0) + bytes(24 * 16)
        null = os.open(os.devnull, os.O_RDWR)
        socket.send_fds(nursery, [request], [null] * nfds)
        os.close(null)
        kind, identity, _, _, stage, number, _ = struct.unpack("=IIiiIiI", engine.recv(256))
        assert (kind, identity) == (2, 7)
        assert (stage, number) == (Stage.REQUEST, errno.EINVAL)
        nursery.close()

    assert in_zygote(ask) == 0


def test_every_stage_of_the_c_side_has_its_words() -> None:
    text = HEADER.read_text(encoding="utf-8")
    numbers = {
        name: int(value)
        for name, _, value in (
            line.strip().removeprefix("SBX_STAGE_").partition(",")[0].partition(" = ")
            for line in text.splitlines()
            if line.strip().startswith("SBX_STAGE_")
        )
    }
    assert numbers == {stage.name: int(stage) for stage in Stage}
    for stage in list(Stage)[1:]:
        error = unavailable(stage, errno.EPERM)
        assert error.stage == stage.name.lower()
        assert error.fix
