"""What a daemon and its service manager say to each other: notification, sockets that are handed over, the journal."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandboxd.daemon import journal, listening, watchdog
from sandboxd.daemon.notify import Notifier
from sandboxd.errors import Unavailable
from tests.support import daemons, leftovers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.daemons import Served


class Manager:
    """The receiving end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self.address = address
        self.heard: list[str] = []

    def hear(self) -> list[str]:
        """All lines that have come so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.heard += self.sock.recv(4096, socket.MSG_DONTWAIT).decode().split("\n")
        return self.heard

    def wait(self, line: str, seconds: float = 30) -> None:
        leftovers.eventually(lambda: line in self.hear(), seconds, f"no {line}: {self.heard}")


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify"))
    with made.sock:
        yield made


@pytest.fixture
def home() -> Iterator[Path]:
    with daemons.directory() as path:
        yield path


@pytest.fixture
def listener(home: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as made:
        (home / "given").mkdir()
        made.bind(str(home / "given" / "socket"))
        made.listen(64)
        yield made


# Notification


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_manager_is_told_through_either_kind_of_address(tmp_path: Path, kind: str) -> None:
    address = str(tmp_path / "n") if kind == "path" else f"@sandboxd-test-{os.getpid()}"
    made = Manager(address)
    with made.sock:
        environment = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}
        notifier = Notifier(environment)
        assert environment == {}  # nothing that is started from here may speak in the daemon's name
        assert notifier.watchdog_seconds == 3.0
        notifier.ready("one\nREADY=0\x1b")
        notifier.reloading()
        notifier.alive()
        notifier.extend(1.5)
        notifier.stopping("bye")
        heard = made.hear()
    assert heard[:2] == ["READY=1", "STATUS=one READY=0 "]
    assert heard[2] == "RELOADING=1"
    assert heard[3].startswith("MONOTONIC_USEC=")
    assert abs(int(heard[3].partition("=")[2]) / 1e6 - time.clock_gettime(time.CLOCK_MONOTONIC)) < 60
    assert heard[4:] == ["WATCHDOG=1", "EXTEND_TIMEOUT_USEC=1500000", "STOPPING=1", "STATUS=bye"]


@pytest.mark.parametrize(
    "environment",
    [
        {"WATCHDOG_USEC": "3000000"},
        {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"},
        {"NOTIFY_SOCKET": "vsock:2:1234", "WATCHDOG_USEC": "3000000"},
        {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "soon"},
    ],
)
def test_nobody_looks_or_nobody_hears_and_nothing_fails(environment: dict[str, str]) -> None:
    notifier = Notifier(environment)
    assert notifier.watchdog_seconds == 0
    notifier.ready("x")


def test_manager_hears_ready_only_when_there_is_a_sealed_cell_and_stopping_at_the_end(
    home: Path, manager: Manager
) -> None:
    with daemons.served(home, manager={"NOTIFY_SOCKET": manager.address}) as served:
        manager.wait("READY=1")
        assert "STATUS=Serving; policies in force: default" in manager.heard
        assert served.serves()
        environment = Path(f"/proc/{served.pid}/environ").read_bytes()
        assert b"NOTIFY_SOCKET" in environment  # what it was started with
        assert served.end() == 0
    manager.wait("STOPPING=1")
    assert manager.heard.index("READY=1") < manager.heard.index("STOPPING=1")


def test_manager_does_not_hear_ready_when_the_start_fails(home: Path, manager: Manager) -> None:
    (home / "policies").mkdir()
    (home / "policies" / "default.toml").write_text('[runtime]\npreload = ["no_such_module_here"]\n')
    refused = daemons.start(home, policies_dir=str(home / "policies"), manager={"NOTIFY_SOCKET": manager.address})
    assert refused.process.wait(30) == 125
    assert "READY=1" not in manager.hear()
    assert any("no_such_module_here" in line for line in manager.heard)


# The watchdog


def test_watchdog_is_fed_by_runs_and_by_an_idle_daemons_own(home: Path, manager: Manager) -> None:
    watched = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "400000"}
    with daemons.served(home, manager=watched) as served:
        leftovers.eventually(lambda: manager.hear().count("WATCHDOG=1") >= 5, 30, "it is not fed")
        assert served.runs() == []
        os.kill(served.pid, signal.SIGSTOP)  # the loop hangs
        manager.hear()
        time.sleep(0.5)
        before = len(manager.hear())
        time.sleep(1)
        assert len(manager.hear()) == before
        os.kill(served.pid, signal.SIGCONT)
        leftovers.eventually(lambda: len(manager.hear()) > before, 10, "it is not fed again")


def test_watchdog_starves_while_the_zygote_hangs(home: Path, manager: Manager) -> None:
    watched = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "400000"}
    with daemons.served(home, manager=watched, pool={"maximum": 0}) as served:
        manager.wait("WATCHDOG=1")
        zygotes = [pid for pid in _below(served) if b"zygote" in _command_line(pid)]
        assert zygotes
        for pid in zygotes:
            os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(1.0)  # one that was under way
            before = manager.hear().count("WATCHDOG=1")
            time.sleep(1.5)
            assert manager.hear().count("WATCHDOG=1") == before
        finally:
            for pid in zygotes:
                os.kill(pid, signal.SIGCONT)
        leftovers.eventually(lambda: manager.hear().count("WATCHDOG=1") > before, 20, "it is not fed again")


def _below(served: Served) -> list[int]:
    return [one.pid for one in leftovers.descendants(served.pid)]


def _command_line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def test_watchdog_takes_a_clients_run_for_its_own_and_no_failure_for_life() -> None:
    class Heard(Notifier):
        signs = 0

        def alive(self) -> None:
            self.signs += 1

    async def main() -> None:
        heard = Heard({})
        heard.watchdog_seconds = 0.02
        served, probes = 0, 0

        async def probe() -> None:
            nonlocal probes
            probes += 1
            raise Unavailable("probe", fix="")

        watching = asyncio.create_task(watchdog.watch(heard, lambda: served, probe))
        for _ in range(20):
            served += 1
            await asyncio.sleep(0.01)
        assert heard.signs >= 5
        assert probes <= heard.signs
        signs = heard.signs
        await asyncio.sleep(0.2)
        assert heard.signs <= signs + 1
        assert probes
        watching.cancel()

    asyncio.run(main())


# Sockets that are handed over


def test_socket_that_was_handed_over_is_served_and_kept(home: Path, listener: socket.socket) -> None:
    path = home / "given" / "socket"
    before = path.lstat()
    with daemons.served(home, "given", listener=listener) as served:
        assert f"ready on {path}" in served.said()
        assert served.serves()
        assert not Path(f"{path}.lock").exists()
        environments = [Path(f"/proc/{pid}/environ").read_bytes() for pid in _below(served) if _command_line(pid)]
        assert environments
        assert not any(b"LISTEN_" in environment for environment in environments)
        assert served.end() == 0
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


def test_clients_wait_in_the_backlog_while_no_daemon_is_there(home: Path, listener: socket.socket) -> None:
    with daemons.served(home, "given", listener=listener) as served, served.sandbox() as sandbox:
        assert sandbox.run("print(1)").stdout == "1\n"
        assert served.end() == 0
        with ThreadPoolExecutor(1) as pool:
            # The same handle: its idle connection is closed, and the new one is answered by the next daemon.
            waits = pool.submit(sandbox.run, "print(2)")
            with pytest.raises(TimeoutError):
                waits.result(0.5)
            with daemons.served(home, "given", listener=listener):
                assert waits.result(20).stdout == "2\n"


def _handed(family: int, kind: int, listens: bool, count: int = 1) -> subprocess.CompletedProcess[str]:
    """What ``handed_over`` says in a process that was given such a socket."""
    code = (
        "import os, socket, sys\n"
        f"s = socket.socket({family}, {kind})\n"
        + ("s.bind('\\0sandboxd-test-%d' % os.getpid())\ns.listen()\n" if listens else "")
        + "os.dup2(s.fileno(), 3) if s.fileno() != 3 else None\n"
        f"e = {{'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '{count}', 'LISTEN_FDNAMES': 'a:b'}}\n"
        "from sandboxd.daemon.listening import handed_over\n"
        "from sandboxd.errors import Unavailable\n"
        "try:\n    taken = handed_over(e)\n    print(taken is not None)\n"
        "except Unavailable as x:\n    print(x.errno, x)\n"
        "print(e, os.get_inheritable(3))\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("family", "kind", "listens", "count", "words"),
    [
        (socket.AF_UNIX, socket.SOCK_SEQPACKET, True, 1, "True"),
        (socket.AF_UNIX, socket.SOCK_SEQPACKET, False, 1, "does not listen"),
        (socket.AF_UNIX, socket.SOCK_STREAM, True, 1, "AF_UNIX SOCK_STREAM, not AF_UNIX SOCK_SEQPACKET"),
        (socket.AF_UNIX, socket.SOCK_DGRAM, False, 1, "AF_UNIX SOCK_DGRAM"),
        (socket.AF_INET, socket.SOCK_STREAM, False, 1, "AF_INET SOCK_STREAM"),
        (socket.AF_UNIX, socket.SOCK_SEQPACKET, True, 2, "2 sockets were handed over (a:b) instead of one"),
    ],
)
def test_only_one_listening_seqpacket_socket_is_taken(
    family: int, kind: int, listens: bool, count: int, words: str
) -> None:
    done = _handed(int(family), int(kind), listens, count)
    said, after = done.stdout.splitlines()
    assert words in said, done
    assert words == "True" or (said.startswith(f"{errno.EINVAL} ") and "ListenSequentialPacket" in said)
    assert after.startswith("{}")
    assert count > 1 or after == "{} False"


@pytest.mark.parametrize("pid", ["", "1", "x"])
def test_variables_for_another_process_are_taken_out_and_mean_nothing(pid: str) -> None:
    environment = {"LISTEN_PID": pid, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x", "PATH": "/bin"}
    assert listening.handed_over(environment) is None
    assert environment == {"PATH": "/bin"}


def test_an_empty_count_and_a_wrong_one() -> None:
    assert listening.handed_over({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0"}) is None
    with pytest.raises(Unavailable, match="no number"):
        listening.handed_over({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "-1"})


def test_directory_without_root_is_made_without_a_change_of_owner(home: Path) -> None:
    def bind() -> tuple[int, int]:
        with listening.listen(home / "own" / "s", "daemon") as sock:
            status = (home / "own" / "s").stat()
            assert sock.getsockname() == str(home / "own" / "s")
            return status.st_uid, status.st_mode & 0o777

    os.chmod(home, 0o777)  # noqa: S103 - for another user
    assert daemons.as_user(bind, 61_003, 61_003) == (61_003, 0o660)


# The journal


def _formatted(message: str, *values: object, level: int = logging.INFO) -> str:
    record = logging.LogRecord("sandboxd", level, __file__, 1, message, values, None)
    return journal.JournalFormatter().format(record)


def test_journal_gets_a_priority_and_no_control_characters() -> None:
    assert _formatted("plain %s", "text") == "<6>plain text"
    assert _formatted("late", level=logging.WARNING) == "<4>late"
    assert _formatted("bad", level=logging.ERROR) == "<3>bad"
    assert _formatted("x", level=logging.DEBUG) == "<7>x"
    assert _formatted("a %s", "b\n<0>forged\x1b[2J\u2028\x85") == "<6>a b\\n<0>forged\\x1b[2J\\u2028\\x85"


def test_each_line_of_a_traceback_has_the_priority() -> None:
    try:
        raise ValueError("one\ntwo\x07")
    except ValueError:
        record = logging.LogRecord("s", logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    lines = journal.JournalFormatter().format(record).split("\n")
    assert lines[0] == "<3>failed"
    assert all(line.startswith("<3>") for line in lines)
    assert lines[-1] == "<3>two\\x07"


def test_journal_is_known_by_the_stream_itself(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        status = os.fstat(file.fileno())
        assert journal.leads_to_journal({"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}, file.fileno())
        assert not journal.leads_to_journal({"JOURNAL_STREAM": f"{status.st_dev}:1"}, file.fileno())
        assert not journal.leads_to_journal({"JOURNAL_STREAM": "x"}, file.fileno())
        assert not journal.leads_to_journal({}, file.fileno())


def test_daemon_writes_for_the_journal_when_its_stderr_is_one(home: Path) -> None:
    log = home / "sandboxd.log"
    log.touch()
    status = log.stat()
    with daemons.served(home, manager={"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}) as served:
        assert f"<6>ready on {served.path}\n" in served.said()
