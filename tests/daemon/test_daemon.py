"""``sandboxd serve`` and ``Sandbox.connect``: who gets in, what a client may ask for, and how it all ends."""

from __future__ import annotations

import errno
import grp
import os
import signal
import socket
import stat
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from sandboxd import Limits, Result, Sandbox, daemon
from sandboxd.client.connections import parse_address
from sandboxd.daemon.config import group_id
from sandboxd.errors import Busy, ConnectionLost, PolicyError, ProtocolError, Unavailable
from sandboxd.protocol import packets
from tests.engine.test_crash import named
from tests.support import daemons, leftovers
from tests.support.daemons import SLEEP, Child, Served, as_user

if TYPE_CHECKING:
    from collections.abc import Iterator

MEMBER, STRANGER, OTHER = 61_001, 61_002, 61_003
GID = grp.getgrnam(daemons.GROUP).gr_gid
FOREVER = "print('up', flush=True)\nwhile True: pass"


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    with daemons.directory() as path:
        policies = path / "policies"
        policies.mkdir()
        (policies / "brief.toml").write_text('name = "brief"\n[limits]\nwall_seconds = 3.0\nqueue_seconds = 0.2\n')
        (policies / "lacking.toml").write_text('[runtime]\npreload = ["json", "no_such_one.x", "no_such_two"]\n')
        (policies / "broken.toml").write_text('name = "broken"\n[limits]\nwall_secnods = 3.0\n')
        yield path


@pytest.fixture(scope="module")
def served(home: Path) -> Iterator[Served]:
    with daemons.served(home, max_running=4, policies_dir=str(home / "policies")) as made:
        yield made


@pytest.fixture
def sandbox(served: Served) -> Iterator[Sandbox]:
    with served.sandbox() as made:
        yield made


class Started:
    """Runs in threads, each known to have begun."""

    def __init__(self, sandbox: Sandbox, count: int, code: str = SLEEP, **options: Any) -> None:
        self.pool = ThreadPoolExecutor(count)
        up = threading.Semaphore(0)
        self.futures: list[Future[Result]] = [
            self.pool.submit(sandbox.run, code, on_stdout=lambda _: up.release(), **options) for _ in range(count)
        ]
        for _ in range(count):
            assert up.acquire(timeout=15), [future.exception() for future in self.futures if future.done()]

    def errors(self) -> list[BaseException | None]:
        self.pool.shutdown(wait=True)
        return [future.exception(15) for future in self.futures]


# The socket


def test_it_says_that_it_is_ready(served: Served) -> None:
    assert f"ready on {served.path}" in served.said()
    assert served.serves()


def test_the_socket_is_for_the_group_alone(served: Served) -> None:
    socket_facts, directory_facts = served.path.stat(), served.path.parent.stat()
    assert stat.S_ISSOCK(socket_facts.st_mode)
    assert stat.S_IMODE(socket_facts.st_mode) == 0o660
    assert stat.S_IMODE(directory_facts.st_mode) == 0o750
    assert (socket_facts.st_uid, socket_facts.st_gid) == (0, GID)
    assert (directory_facts.st_uid, directory_facts.st_gid) == (0, GID)


def test_connections_of_all_uids_together_are_bounded_and_the_operator_gets_in(home: Path) -> None:
    up_read, up = os.pipe()
    with daemons.served(home, "few", max_clients=2) as served:

        def hold() -> NoReturn:
            with daemons.Raw(served):
                os.write(up, b"x")
                while True:
                    signal.pause()

        def is_let_in() -> bool:
            try:
                return served.serves()
            except Busy:
                return False

        holders = [Child(hold, uid, GID) for uid in (MEMBER, STRANGER)]
        try:
            for _ in holders:
                assert os.read(up_read, 1) == b"x"
            assert not as_user(is_let_in, OTHER, GID)
            assert served.serves()
        finally:
            for holder in holders:
                holder.kill()
        leftovers.eventually(lambda: as_user(is_let_in, OTHER, GID), 10, "there is room for another client")
    for fd in (up_read, up):
        os.close(fd)


def test_a_second_daemon_on_the_same_socket_is_refused(served: Served) -> None:
    second = daemons.start(served.path.parent.parent, served.path.parent.name)
    assert second.process.wait(20) == 125
    assert "a daemon serves" in served.said()
    assert served.serves()


def test_what_is_no_socket_is_not_replaced(home: Path) -> None:
    (home / "file").mkdir()
    (home / "file" / "socket").write_text("mine")
    refused = daemons.start(home, "file")
    assert refused.process.wait(20) == 125
    assert "is no socket" in refused.said()
    assert (home / "file" / "socket").read_text() == "mine"
    assert [entry.name for entry in (home / "file").iterdir()] == ["socket"]


def test_the_bound_socket_is_changed_not_what_a_link_in_its_place_points_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, path = tmp_path / "victim", tmp_path / "s"
    victim.write_text("")
    victim.chmod(0o600)
    real = os.umask

    def swap(mask: int) -> int:
        if path.exists():  # just bound
            path.unlink()
            path.symlink_to(victim)
        return real(mask)

    monkeypatch.setattr(os, "umask", swap)
    with pytest.raises(Unavailable), daemon.listen(path, daemons.GROUP):
        pass
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600


# The end


def test_sigterm_leaves_nothing(home: Path) -> None:
    before = leftovers.snapshot()
    with daemons.served(home, "ends", max_running=2) as made:
        assert made.end() == 0
    assert list((home / "ends").iterdir()) == []
    leftovers.assert_nothing_new(before)


def test_sigterm_ends_live_runs_and_their_clients_know(home: Path) -> None:
    before = leftovers.snapshot()
    with daemons.served(home, "busy", max_running=2) as made, made.sandbox() as sandbox:
        running = Started(sandbox, 2)
        with ThreadPoolExecutor(1) as pool:
            queued = pool.submit(sandbox.run, "pass")
            leftovers.eventually(lambda: len(made.runs()) == 3, 5, "the third waits")
            begun = time.monotonic()
            assert made.end() == 0
            assert time.monotonic() - begun < 4
            assert [may_have_started(error) for error in running.errors()] == [True, True]
            assert isinstance(queued.exception(5), Busy)
    assert list((home / "busy").iterdir()) == []
    leftovers.assert_nothing_new(before)


@pytest.mark.alone
def test_after_sigkill_the_next_one_sweeps_and_serves(home: Path) -> None:
    before = leftovers.snapshot()
    with daemons.served(home, "killed", max_running=3) as made, made.sandbox() as sandbox:
        running = Started(sandbox, 3)
        with ThreadPoolExecutor(1) as pool:
            queued = pool.submit(sandbox.run, "pass")
            leftovers.eventually(lambda: len(made.runs()) == 4, 5, "the fourth waits")
            made.end(signal.SIGKILL)
            assert [may_have_started(error) for error in running.errors()] == [True] * 3
            assert may_have_started(queued.exception(5)) is False
        assert made.path.is_socket()  # stale
        with daemons.served(home, "killed", max_running=3) as again:
            assert again.runs() == []
            assert "INFO: swept what a dead engine left in sandboxd." in again.said()
            assert "Swept(" not in again.said()
            # The same handle goes on, on a connection of its own.
            assert sandbox.run("print(1)").stdout == "1\n"
    leftovers.assert_nothing_new(before)


def may_have_started(error: BaseException | None) -> bool:
    assert isinstance(error, ConnectionLost), error
    return error.may_have_started


# Who


def test_who_is_not_in_the_group_cannot_connect(served: Served) -> None:
    with pytest.raises(Unavailable) as caught:
        as_user(served.serves, STRANGER, STRANGER)
    assert caught.value.errno == errno.EACCES
    assert "group" in caught.value.fix


def test_a_member_of_the_group_runs_programs(served: Served) -> None:
    assert as_user(served.serves, MEMBER, MEMBER, [GID])
    assert as_user(served.serves, MEMBER, GID)


def test_ps_shows_ones_own_runs_and_all_to_root(served: Served, sandbox: Sandbox) -> None:
    mine = Started(sandbox, 1)

    def sleep() -> str:
        with served.sandbox() as own:
            return own.run(SLEEP).status

    member = Child(sleep, MEMBER, GID)
    try:
        leftovers.eventually(lambda: len(served.runs()) == 2, 10, "two runs")
        assert {(run["client"]["uid"], run["client"]["pid"]) for run in served.runs()} == {
            (0, os.getpid()),
            (MEMBER, member.pid),
        }
        assert [run["client"]["uid"] for run in as_user(served.runs, MEMBER, GID)] == [MEMBER]
        assert as_user(served.runs, STRANGER, GID) == []
    finally:
        member.kill()
        sandbox.close()
    # The member's run goes with it, and so does ours with its handle.
    served.idle()
    assert all(isinstance(error, RuntimeError) for error in mine.errors())


# What


def test_policies_are_those_of_the_directory_and_the_shipped_ones(served: Served) -> None:
    with served.sandbox(policy="brief") as brief:
        assert brief.run(FOREVER).limits_hit[0].value == 3.0
    with served.sandbox(policy="strict") as strict:
        isolation = strict.run("pass").isolation
        assert isolation is not None
        assert isolation.seccomp.policy == "strict"


def test_an_unknown_policy_is_refused_with_the_nearest_name(served: Served) -> None:
    with served.sandbox(policy="breif") as sandbox, pytest.raises(PolicyError, match="Did you mean 'brief'") as caught:
        sandbox.run("pass")
    assert "default" in str(caught.value)


def test_a_broken_policy_is_refused_with_its_line(served: Served) -> None:
    with served.sandbox(policy="broken") as sandbox, pytest.raises(PolicyError, match="wall_secnods") as caught:
        sandbox.run("pass")
    assert caught.value.line == 3


def test_all_missing_libraries_of_a_policy_are_named_at_once(served: Served) -> None:
    with served.sandbox(policy="lacking") as sandbox, pytest.raises(Unavailable) as caught:
        sandbox.run("pass")
    assert caught.value.stage == "preload"
    assert caught.value.message.endswith("imports: no_such_one.x, no_such_two")
    assert caught.value.fix.endswith("-m pip install no_such_one no_such_two")


@pytest.mark.parametrize("policy", ["/etc/passwd", "../brief", "brief.toml", Path("brief"), b"brief"])
def test_a_policy_file_is_refused_before_anything_is_sent(served: Served, policy: Any) -> None:
    with pytest.raises(PolicyError):
        served.sandbox(policy=policy)


def test_the_limits_of_a_handle_narrow_each_of_its_runs(served: Served) -> None:
    with served.sandbox(limits=Limits(wall_seconds=1.0)) as sandbox:
        assert sandbox.run(FOREVER).status == "timeout"
        assert sandbox.run(FOREVER, limits=Limits(wall_seconds=0.1)).limits_hit[0].value == 0.1
        with pytest.raises(PolicyError, match=r"limits\.wall_seconds: 2 is wider than the 1"):
            sandbox.run("pass", limits=Limits(wall_seconds=2.0))
        assert sandbox.run("pass", limits=Limits(pids=8)).status == "ok"


def test_limits_wider_than_the_policys_are_refused(served: Served) -> None:
    with served.sandbox(policy="brief", limits=Limits(wall_seconds=4.0)) as sandbox:
        with pytest.raises(PolicyError, match=r"limits\.wall_seconds: 4 is wider than the 3"):
            sandbox.run("pass")
        assert sandbox.run("pass", limits=Limits(wall_seconds=2.0)).status == "ok"


def test_a_run_that_waits_too_long_is_busy(served: Served, sandbox: Sandbox) -> None:
    running = Started(sandbox, 4)
    with served.sandbox(limits=Limits(queue_seconds=0.2)) as impatient:
        begun = time.monotonic()
        with pytest.raises(Busy) as caught:
            impatient.run("pass")
        assert 0.1 < time.monotonic() - begun < 5
        assert caught.value.retry_after > 0
    sandbox.close()
    running.errors()
    served.idle()
    assert served.serves()


# The whole way


def test_a_run_through_the_socket_is_like_any_other(sandbox: Sandbox) -> None:
    big = os.urandom(3 << 20)
    code = (
        "import sys, hashlib, pathlib\n"
        "data = sys.stdin.buffer.read()\n"
        "print(hashlib.sha256(data).hexdigest(), sys.argv[1:], flush=True)\n"
        "print('oops', file=sys.stderr)\n"
        "pathlib.Path('out.bin').write_bytes(pathlib.Path('in/x').read_bytes()[::-1])\n"
        "len(data)"
    )
    chunks: list[str] = []
    with sandbox.run(code, stdin=big, args=["ä"], files={"in/x": big}, on_stdout=chunks.append) as result:
        assert result.status == "ok", result.stderr
        assert "".join(chunks) == result.stdout
        assert result.stderr == "oops\n"
        assert result.results[0].mime["text/plain"] == str(len(big))
        assert [file.path for file in result.files] == ["out.bin"]
        assert result.files[0].read() == big[::-1]


def test_streamed_text_is_whole_also_when_it_is_much(sandbox: Sandbox) -> None:
    chunks: list[str] = []
    result = sandbox.run("print('é' * 1_500_000)", on_stdout=chunks.append)
    assert "".join(chunks) == "é" * 1_500_000 + "\n"
    assert result.stdout_dropped_bytes > 0


def test_a_reader_that_is_slow_at_the_end_still_gets_everything(sandbox: Sandbox) -> None:
    chunks: list[str] = []
    slow = threading.Event()

    def take(text: str) -> None:
        slow.wait(0.02)
        chunks.append(text)

    assert sandbox.run("print('x' * 2_000_000)", on_stdout=take).status == "ok"
    assert sum(map(len, chunks)) == 2_000_001


def test_fifty_threads_share_one_handle(sandbox: Sandbox) -> None:
    with ThreadPoolExecutor(50) as pool:
        results = list(pool.map(lambda number: sandbox.run(f"print({number})").stdout, range(50)))
    assert results == [f"{number}\n" for number in range(50)]


# The caller


def test_a_long_run_on_an_old_zygote_keeps_no_other_policys_from_being_replaced(home: Path) -> None:
    with daemons.served(home, "rotating", pool={"minimum": 1, "maximum": 1, "zygote_seconds": 1}) as served:
        with served.sandbox() as one, served.sandbox(policy="strict") as other:
            assert other.run("1").status == "ok"
            long = Started(one, 1)
            seen: set[int] = set()

            def replaced() -> bool:
                seen.update(process.pid for process in named(served.pid, "zygote"))
                return len(seen) >= 8

            leftovers.eventually(replaced, 24, "many zygotes")  # while the run of 25 s goes on, which holds its own
            assert not long.futures[0].done()
        long.errors()


def test_after_fork_the_childs_copy_is_closed(sandbox: Sandbox) -> None:
    assert sandbox.run("pass").status == "ok"
    sockets = [link for link in leftovers.fds().values() if link.startswith("socket:")]

    def child() -> tuple[str, list[str]]:
        with pytest.raises(RuntimeError, match="after fork") as caught:
            sandbox.run("pass")
        return str(caught.value), list(leftovers.fds().values())

    said, open_there = as_user(child, 0, 0)
    assert "process that made it" in said
    assert sockets
    assert not set(sockets) & set(open_there)
    assert sandbox.run("print(1)").stdout == "1\n"


def test_a_caller_that_is_killed_takes_its_run_along(served: Served) -> None:
    def sleep() -> str:
        with served.sandbox() as own:
            return own.run(SLEEP).status

    child = Child(sleep, 0, 0)
    leftovers.eventually(lambda: [run["state"] for run in served.runs()] == ["running"], 10, "the run")
    pid = served.runs()[0]["pid"]
    cell = leftovers.process(pid)
    assert cell is not None
    child.kill()
    served.idle()
    assert not leftovers.lives(cell)


def test_keyboard_interrupt_kills_the_run_and_propagates(served: Served, sandbox: Sandbox) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            sandbox.run(SLEEP, on_stdout=lambda _: os.kill(os.getpid(), signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert served.runs() == []
    assert sandbox.run("print(1)").stdout == "1\n"


@pytest.mark.parametrize("error", [ValueError("mine"), BrokenPipeError("mine"), ConnectionResetError("mine")])
def test_what_a_callback_raises_kills_the_run_and_is_raised(served: Served, sandbox: Sandbox, error: Exception) -> None:
    def fail(_: str) -> None:
        raise error

    with pytest.raises(type(error), match="mine"):
        sandbox.run(SLEEP, on_stdout=fail)
    assert served.runs() == []
    assert sandbox.run("print(1)").stdout == "1\n"


def test_close_ends_the_runs_of_other_threads(served: Served, sandbox: Sandbox) -> None:
    running = Started(sandbox, 2)
    sandbox.close()
    sandbox.close()
    assert [type(error) for error in running.errors()] == [RuntimeError] * 2
    served.idle()
    with pytest.raises(RuntimeError, match="closed"):
        sandbox.run("pass")


def test_no_connection_is_left_open(served: Served) -> None:
    before = leftovers.fds()
    with served.sandbox() as sandbox, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: sandbox.run("pass"), range(16)))
    assert leftovers.fds() == before


# Words


@pytest.mark.parametrize(("path", "number"), [("nowhere", errno.ENOENT), ("plain", errno.ECONNREFUSED)])
def test_no_daemon_is_unavailable(tmp_path: Path, path: str, number: int) -> None:
    (tmp_path / "plain").touch()
    with pytest.raises(Unavailable) as caught:
        Sandbox.connect(f"unix:{tmp_path / path}")
    assert caught.value.errno == number
    assert "sandboxd serve --socket" in caught.value.fix


@pytest.mark.parametrize("address", ["", "unix:", "/run/x", "tcp:1", "unix"])
def test_an_address_has_one_form(address: str) -> None:
    with pytest.raises(ValueError, match="unix:"):
        parse_address(address)


def test_another_version_is_told_so_by_the_daemon(served: Served) -> None:
    with daemons.Raw(served, greet=False) as raw:
        text = b'{"op":"hello"}'
        raw.send_bytes(packets._HEAD.pack(packets.MAGIC, 9, 0, 0, len(text), 0) + text)
        raw.send_bytes(b"more, which nobody reads")
        kind, message = raw.refusal()
        assert kind == "ProtocolError"
        assert f"version 9 of the protocol; this side speaks {packets.VERSION}" in message
        assert raw.answer() == {}


def test_another_version_is_told_so_by_the_client(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()

        def answer() -> None:
            with listener.accept()[0] as sock:
                sock.send(packets._HEAD.pack(packets.MAGIC, 9, 0, 0, 2, 0) + b"{}")
                sock.recv(100)

        with ThreadPoolExecutor(1) as pool:
            pool.submit(answer)
            with pytest.raises(ProtocolError, match="version 9"):
                Sandbox.connect(f"unix:{tmp_path / 's'}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sokcet = 'x'", "'sokcet' is not a setting"),
        ("socket = 3", "socket must be a string"),
        ("max_running = 0", "max_running must be a whole number from 1"),
        ("max_clients = true", "max_clients must be a whole number"),
        ("memory_bytes = '1Q'", "memory_bytes"),
        ("walls_down = ['seccomp']", "'walls_down' is not a setting"),
        ("marker_errno = 5", "'marker_errno' is not a setting"),
        ("audit = '/x'", "audit must be a table"),
        ("audit = {path = 'x'}", "audit.path must be the absolute path"),
        ("audit = {on_failure = 'ignore'}", 'audit.on_failure must be "stop" or "continue"'),
        ("audit = {enabled = 1}", "audit.enabled must be true or false"),
        ("audit = {max_bytes = '1Q'}", "audit.max_bytes: '1Q' is not allowed; allowed: bytes from 4K"),
        ("audit = {keep = 0}", "audit.keep must be a whole number from 1"),
        ("audit = {paht = '/x'}", "'paht' is not a setting of audit"),
        ("memory_bytes = 1", "memory_bytes: 1 is not allowed; allowed: bytes from 16M"),
        ("ids = '5'", "ids must be spelled 'base:count'"),
        ("ids = '5:65536'", "ids must lie in"),
        ("group = 'no-such-group-here'", "no group 'no-such-group-here'"),
        ("policies_dir = 'policies'", "policies_dir must be the absolute path of a directory"),
        ("policies_dir = '/no/such/directory'", "policies_dir must be the absolute path of a directory"),
        ("default_policy = 'defualt'", "Did you mean 'default'"),
    ],
)
def test_a_wrong_configuration_is_named_with_file_line_and_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f"# ours\n{text}\n")
    with pytest.raises(PolicyError, match=message.replace("[", r"\[")) as caught:
        daemon.load_config(file)
    assert (caught.value.file, caught.value.line) == (str(file), 2)
    assert (caught.value.key or "").partition(".")[0] == text.partition(" ")[0]


def test_a_configuration_that_is_no_toml_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[")
    with pytest.raises(PolicyError, match="cannot be read") as caught:
        daemon.load_config(tmp_path / "c.toml")
    assert caught.value.file == str(tmp_path / "c.toml")


@pytest.mark.parametrize("config", [{"default_policy": "nowhere"}, {"policies_dir": "/nowhere"}, {"ids": "1"}])
def test_a_daemon_with_a_wrong_configuration_ends_with_2(tmp_path: Path, config: dict[str, Any]) -> None:
    refused = daemons.start(tmp_path, **config)
    assert refused.process.wait(20) == 2
    assert f"{tmp_path / 'sandboxd.toml'}:3: " in refused.said()
    assert not refused.path.exists()


def test_a_default_policy_that_is_wrong_ends_with_2(home: Path) -> None:
    refused = daemons.start(home, "wrong", policies_dir=str(home / "policies"), default_policy="broken")
    assert refused.process.wait(20) == 2
    assert "broken.toml:3: limits.wall_secnods" in refused.said()
    assert list((home / "wrong").iterdir()) == []


def test_an_unknown_group_is_an_error_except_the_default_one() -> None:
    with pytest.raises(PolicyError, match="no group"):
        group_id("no-such-group-here")
    assert group_id(None) == -1
