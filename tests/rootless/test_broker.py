"""The broker opens what its engine may have, as whom it says, and nothing else; and no cell gets at it."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import stat
import struct
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd.engine.cells.files import Broker
from sandboxd.engine.config import EngineConfig
from sandboxd.engine.engine import Engine
from sandboxd.rootfs.interpreter import Interpreter
from tests.support.engine import take_zygote
from tests.support.leftovers import eventually
from tests.support.modes import ONE_ID
from tests.support.patience import SLOWER

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from sandboxd import Sandbox
    from sandboxd.engine.cells.zygote import Zygote

OWNER = 0 if ONE_ID else 1007
ROOT = 0xFFFFFFFF


@asynccontextmanager
async def nursery() -> AsyncIterator[Zygote]:
    """A nursery with its broker, and a zygote that no policy has touched."""
    engine = Engine(EngineConfig())
    engine.start()
    try:
        zygote = take_zygote(engine, Interpreter.current())
        try:
            yield zygote
        finally:
            await zygote.close()
    finally:
        await engine.close()


def with_broker(ask: Callable[[Broker], None]) -> bool:
    """Call *ask* in a thread, as the engine's collector does; whether nursery and broker lived through it."""

    async def main() -> bool:
        async with nursery() as zygote:
            assert isinstance(zygote.files, Broker)
            await asyncio.to_thread(ask, zygote.files)
            if await asyncio.to_thread(answers, zygote.files):
                return not zygote.lost
            async with asyncio.timeout(20 * SLOWER):
                while not zygote.lost:
                    await asyncio.sleep(0.01)
            return False

    return asyncio.run(main())


def answers(broker: Broker) -> bool:
    """Whether it still does, to an ordinary question."""
    root = os.open("/", os.O_PATH | os.O_DIRECTORY)
    try:
        return refusal(broker.open_directory, root, ".") == "done"
    finally:
        os.close(root)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory that everybody may write, as a cell's /tmp is; searchable for strangers from the root on."""
    made = tmp_path / "cell"
    made.mkdir()
    made.chmod(0o777)
    return made


@pytest.fixture
def fd(place: Path) -> Iterator[int]:
    """What the engine holds of it."""
    number = os.open(place, os.O_PATH | os.O_DIRECTORY)
    yield number
    os.close(number)


def refusal(call: Callable[..., object], *arguments: object) -> str:
    """The name of the errno, or "done"."""
    try:
        found = call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    if isinstance(found, int) and found > 2:
        os.close(found)
    return "done"


def test_what_it_makes_belongs_to_the_owner_with_the_mode_to_the_letter(place: Path, fd: int) -> None:
    before = os.umask(0o077)
    found: list[os.stat_result] = []

    def ask(broker: Broker) -> None:
        broker.mkdir(fd, "d", 0o755, OWNER)
        broker.mkdir(fd, "d/e", 0o700, OWNER)
        made = broker.create(fd, "d/e/f", 0o640, OWNER)
        os.write(made, b"content")
        found.append(os.fstat(made))
        os.close(made)
        again = broker.open(fd, "d/e/f")
        assert os.read(again, 100) == b"content"
        os.close(again)

    try:
        assert with_broker(ask)
    finally:
        os.umask(before)
    assert found[0].st_mode == stat.S_IFREG | 0o640
    assert (place / "d").stat().st_uid == found[0].st_uid
    assert found[0].st_uid == found[0].st_gid or ONE_ID
    assert (found[0].st_uid == os.getuid()) is ONE_ID


def test_what_a_program_made_for_itself_alone_is_read(place: Path, fd: int) -> None:
    def ask(broker: Broker) -> None:
        for name, mode in (("secret", 0o600), ("nothing", 0)):
            made = broker.create(fd, name, mode, OWNER)
            os.write(made, name.encode())
            os.close(made)
            if not ONE_ID or mode == 0:
                assert refusal(os.open, place / name, os.O_RDONLY) == "EACCES"
            read = broker.open(fd, name)
            assert os.read(read, 100) == name.encode()
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.write(read, b"x")
            os.close(read)

    assert with_broker(ask)


def test_it_does_not_open_what_is_not_beneath(place: Path, fd: int, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    (place / "link").symlink_to(tmp_path / "outside")
    (place / "up").symlink_to("..")
    (place / "magic").symlink_to("/proc/self/root")
    names = {
        "link": "ELOOP",
        "up/outside": "ELOOP",
        "magic/etc/passwd": "ELOOP",
        "../outside": "EXDEV",
        "/etc/passwd": "EXDEV",
        "": "ENOENT",
        "x" * 300: "ENAMETOOLONG",
        "d/" * 3000 + "f": "ENAMETOOLONG",
    }

    def ask(broker: Broker) -> None:
        for name, expected in names.items():
            assert refusal(broker.open, fd, name) == expected, name
            assert refusal(broker.create, fd, name, 0o644, OWNER) in (expected, "EEXIST"), name
            assert refusal(broker.mkdir, fd, name, 0o755, OWNER) != "done", name
            assert refusal(broker.rename, fd, "link", name, OWNER) != "done", name
        assert refusal(broker.rename, fd, "../outside", "in", OWNER) == "EINVAL"
        assert refusal(broker.mkdir, fd, "..", 0o755, OWNER) == "EINVAL"
        assert refusal(broker.open, fd, "x" * 10_000) == "ENAMETOOLONG"

    assert with_broker(ask)
    assert sorted(os.listdir(place)) == ["link", "magic", "up"]
    assert (tmp_path / "outside").read_text() == "x"


def test_a_fifo_or_a_socket_holds_nobody_up(place: Path, fd: int) -> None:
    os.mkfifo(place / "fifo", 0o666)
    os.mknod(place / "sock", stat.S_IFSOCK | 0o666)

    def ask(broker: Broker) -> None:
        assert refusal(broker.open, fd, "fifo") == "done"
        assert refusal(broker.open, fd, "sock") == "ENXIO"
        assert refusal(broker.create, fd, "fifo", 0o600, OWNER) == "EEXIST"

    assert with_broker(ask)


def test_as_an_owner_it_has_no_right_beyond_the_owners(place: Path, fd: int) -> None:
    closed = place / "closed"
    closed.mkdir(mode=0o700)

    def ask(broker: Broker) -> None:
        if ONE_ID:
            return  # the owner is the engine's own id there
        assert refusal(broker.create, fd, "closed/f", 0o600, OWNER) == "EACCES"
        assert refusal(broker.mkdir, fd, "closed/d", 0o700, OWNER) == "EACCES"

    assert with_broker(ask)
    assert os.listdir(closed) == []


def test_an_id_that_is_not_mapped_is_nobody(place: Path, fd: int) -> None:
    def ask(broker: Broker) -> None:
        assert refusal(broker.create, fd, "f", 0o600, 3_000_000) == "EPERM"
        assert refusal(broker.create, fd, "f", 0o600, OWNER) == "done"  # it goes on

    assert with_broker(ask)


def packed(operation: int, owner: int = ROOT, mode: int = 0, flags: int = 0, path: bytes = b".\0") -> bytes:
    return struct.pack("=IIIIQ", operation, owner, mode, 0, flags) + path


def exchange(broker: Broker, data: bytes, fds: list[int]) -> bytes:
    """Whatever is answered to *data*; b"" when nobody does any more."""
    channel: Any = broker._channel
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
    try:
        channel.sendmsg([data], rights)
        answer, control, _, _ = channel.recvmsg(64, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    except OSError:
        return b""
    for _, _, raw in control:
        os.close(struct.unpack("i", raw[:4])[0])
    return bytes(answer)


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (b"x", 1),
        (packed(1)[:24], 1),
        (packed(1, path=b"no end"), 1),
        (packed(1), 0),
        (packed(1), 2),
        (packed(1, path=b"x" * 9000 + b"\0"), 1),
    ],
    ids=["short", "without a path", "without an end", "without a directory", "two directories", "too long"],
)
def test_a_message_that_is_none_is_its_end_and_the_nurserys(fd: int, data: bytes, count: int) -> None:
    def ask(broker: Broker) -> None:
        assert exchange(broker, data, [fd] * count) == b""
        assert refusal(broker.open, fd, ".") == "EPIPE"

    assert not with_broker(ask)


@pytest.mark.parametrize(
    "data",
    [
        packed(0),
        packed(4),
        packed(0xFFFFFFFF),
        packed(1, flags=os.O_RDWR),
        packed(1, flags=os.O_TRUNC),
        packed(1, flags=os.O_PATH),
        packed(1, flags=os.O_TMPFILE | os.O_WRONLY),
        packed(1, flags=1 << 40),
        packed(1, mode=0o4755, flags=os.O_CREAT | os.O_WRONLY, path=b"suid\0"),
        packed(2, mode=0o2755, path=b"d\0"),
        packed(3, path=b"one\0"),
        packed(3, path=b"a\0b/c\0"),
    ],
)
def test_what_it_does_not_do_is_refused(place: Path, fd: int, data: bytes) -> None:
    def ask(broker: Broker) -> None:
        assert exchange(broker, data, [fd]) == struct.pack("=i", errno.EINVAL)

    assert with_broker(ask)
    assert os.listdir(place) == []


def test_many_threads_get_their_own_answers(place: Path, fd: int) -> None:
    wrong: list[str] = []

    def ask(broker: Broker) -> None:
        def worker(number: int) -> None:
            for count in range(20):
                name = f"{number}-{count}"
                made = broker.create(fd, name, 0o644, OWNER)
                os.write(made, name.encode())
                os.close(made)
                read = broker.open(fd, name)
                if os.read(read, 100) != name.encode():
                    wrong.append(name)
                os.close(read)

        threads = [threading.Thread(target=worker, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert with_broker(ask)
    assert wrong == []
    assert len(os.listdir(place)) == 80


def test_it_leaks_no_descriptor_here(place: Path, fd: int) -> None:
    def ask(broker: Broker) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            assert refusal(broker.open, fd, "missing") == "ENOENT"
            assert refusal(broker.open_directory, fd, ".") == "done"
        assert len(os.listdir("/proc/self/fd")) == before

    assert with_broker(ask)


SEARCH = """
import os, json
seen = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
links = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(4)]
killed = []
for pid in range(2, 400):
    if pid != os.getpid():
        try:
            os.kill(pid, 9)
            killed.append(pid)
        except OSError:
            pass
try:
    os.kill(-1, 9)
except OSError:
    pass
print(json.dumps([seen == [os.getpid()], killed, len(os.listdir("/proc/self/fd"))]))
open("out", "w").write("1")
os.chmod("out", 0)
"""


def test_no_cell_sees_or_reaches_it(sandbox: Sandbox) -> None:
    for _ in range(2):
        with sandbox.run(SEARCH) as result:
            assert (result.status, result.stdout) == ("ok", "[true, [], 5]\n"), result
            assert [one.path for one in result.files] == ["out"]


def broker_of(zygote: Zygote) -> dict[str, str]:
    """What /proc/PID/status says of the broker of a nursery: of its processes the one by that name. Source:
    proc_pid_status(5).
    """
    found: dict[str, str] = {}

    def look() -> bool:
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{name}/status", encoding="ascii", errors="replace") as file:
                    fields = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
            except OSError:
                continue
            if fields["Name"] == "broker" and fields["PPid"] == str(zygote.pid):
                found.update(fields)
        return found.get("Seccomp") == "2"

    eventually(look, 10, "no broker is there")
    return found


def test_its_process_has_few_rights() -> None:
    """Filtered, not dumpable, two capabilities."""

    async def main() -> dict[str, str]:
        async with nursery() as zygote:
            return await asyncio.to_thread(broker_of, zygote)

    fields = asyncio.run(main())
    few = 1 << 1 | 1 << 2 | 1 << 6 | 1 << 7
    assert int(fields["CapPrm"], 16) == int(fields["CapEff"], 16) == few
    assert [int(fields[name], 16) for name in ("CapInh", "CapBnd", "CapAmb")] == [0, 0, 0]
    assert fields["NoNewPrivs"] == "1"


def test_a_broker_that_answers_late_is_given_up_with_its_zygote(
    fd: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zygote whose cells can have no files serves nobody."""
    monkeypatch.setattr("sandboxd.engine.cells.files.ANSWER_SECONDS", 1.0)

    async def main() -> bool:
        async with nursery() as zygote:
            assert isinstance(zygote.files, Broker)
            pid = int((await asyncio.to_thread(broker_of, zygote))["Pid"])
            os.kill(pid, signal.SIGSTOP)  # who made a user namespace has every right over what is in it
            try:
                assert await asyncio.to_thread(refusal, zygote.files.mkdir, fd, "late", 0o755, OWNER) == "EPIPE"
            finally:
                os.kill(pid, signal.SIGCONT)
            assert refusal(zygote.files.mkdir, fd, "next", 0o755, OWNER) == "EPIPE"
            async with asyncio.timeout(20 * SLOWER):
                while not zygote.lost:
                    await asyncio.sleep(0.01)
            return "next" in os.listdir(place)

    assert not asyncio.run(main())
