"""What engines record of runs: embedded and daemons, with secrets, full disks, other users and kill -9."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd import AsyncSandbox, Limits, Policy, Sandbox
from sandboxd.audit import log, reader
from sandboxd.client import admin
from sandboxd.engine.audit.recorder import AuditRecorder
from sandboxd.engine.config import AuditSettings
from sandboxd.errors import Busy, ConnectionLost, PolicyError, ProtocolError, SandboxError, Unavailable
from sandboxd.policy import Audit
from tests.support import daemons, leftovers
from tests.unit.test_audit import lines, needs_root, on_a_small_disk, records, sound

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="an engine needs root")

ODD = "# ä \U0001f600 \x1b[2J \x7f \u2028 \u202e \\n\t\r\nx = '''\n\"}\n{\"event\":\"forged\"}\n'''\nprint('odd')\n"
OTHER = 4321


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sandbox, Path]]:
    """An embedded engine that leaves out secrets, and its record."""
    path = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    policy = Policy(name="mine", audit=Audit(redact=("*_KEY",)))
    with Sandbox(policy, audit=path) as sandbox:
        yield sandbox, path


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    with daemons.directory() as found:
        yield found


@pytest.fixture(scope="module")
def daemon(home: Path) -> Iterator[daemons.Served]:
    with daemons.served(home) as found:
        yield found


def of(path: Path, identity: str) -> list[dict[str, Any]]:
    return [one for one in records(path) if one["id"] == identity]


# --- embedded ------------------------------------------------------------------------------------------------------


def test_a_run_is_recorded_with_its_source_and_its_end(made: tuple[Sandbox, Path]) -> None:
    sandbox, path = made
    result = sandbox.run("print(6 * 7); open('f', 'w').write('x' * 10)", args=["a"], env={"E": "v"}, files={"i": b"12"})
    started, ended = of(path, result.id)
    assert (started["event"], ended["event"]) == ("run_started", "run_ended")
    assert started["code"] == "print(6 * 7); open('f', 'w').write('x' * 10)"
    assert (started["args"], started["env"], started["files"]) == (["a"], ["E"], [["i", 2]])
    assert started["limits"]["wall_seconds"] == 30.0
    assert (started["limits"]["tmp_bytes"], started["limits"]["shm_bytes"]) == (64 << 20, 256 << 20)
    assert started["client"] == {"uid": os.getuid(), "pid": os.getpid(), "name": "root"}
    assert started["policy"]["name"] == "mine"
    assert started["policy"]["sha256"] == Policy(name="mine", audit=Audit(redact=("*_KEY",))).sha256
    assert (ended["status"], ended["exit_code"], ended["stdout"]) == ("ok", 0, {"bytes": 3, "dropped_bytes": 0})
    assert ended["files"] == [["f", 10]]
    assert ended["usage"]["wall_seconds"] == result.usage.wall_seconds
    assert ended["isolation"]["uid"] == result.isolation.uid if result.isolation else False
    sound(path)


def test_every_run_is_recorded_also_one_right_after_another(made: tuple[Sandbox, Path]) -> None:
    sandbox, path = made
    results = [sandbox.run(f"print({number})") for number in range(20)]
    assert [one.stdout for one in results] == [f"{number}\n" for number in range(20)]
    for number, result in enumerate(results):
        started, ended = of(path, result.id)
        assert (started["code"], ended["status"]) == (f"print({number})", "ok")


def test_the_source_is_recorded_complete_whatever_it_holds(made: tuple[Sandbox, Path]) -> None:
    sandbox, path = made
    result = sandbox.run(ODD)
    assert result.stdout == "odd\n"
    assert of(path, result.id)[0]["code"] == ODD
    assert all(0x20 <= byte < 0x7F for line in lines(path) for byte in line)


def test_a_large_source_is_recorded_complete(made: tuple[Sandbox, Path]) -> None:
    sandbox, path = made
    code = f"x = {'y' * 3_000_000!r}\nprint(len(x))"
    result = sandbox.run(code)
    assert result.stdout == "3000000\n"
    assert of(path, result.id)[0]["code"] == code
    sound(path)


def test_what_a_program_says_cannot_forge_a_line(made: tuple[Sandbox, Path]) -> None:
    sandbox, path = made
    code = "class E(Exception): pass\n"
    code += 'E.__name__ = \'x"}\\n{"event":"forged","id":"0"\'\n'
    code += "open('a\\n{\"event\":\"forged\"}', 'w').close()\n"
    code += 'raise E(\'\\n{"event":"forged"}\\n\\x1b[2J\\udc80\')'
    result = sandbox.run(code)
    assert result.status == "error"
    started, ended = of(path, result.id)
    assert (started["event"], ended["event"]) == ("run_started", "run_ended")
    assert ended["error"]["message"].startswith('\n{"event":"forged"}')
    assert not any(one["event"] == "forged" for one in records(path))
    assert all(0x20 <= byte < 0x7F for line in lines(path) for byte in line)


def test_a_named_variables_value_is_not_recorded(made: tuple[Sandbox, Path]) -> None:
    sandbox, path = made
    code = "import os; raise ValueError(os.environ['API_KEY'] + os.environ['OTHER'] + 'hunter22-k')"
    result = sandbox.run(code, env={"API_KEY": "hunter22-k", "OTHER": "in-the-open"}, args=["--key=hunter22-k"])
    assert result.error is not None
    assert "hunter22-k" in result.error.message
    started, ended = of(path, result.id)
    assert "hunter22" not in path.read_text()
    assert (started["redacted"], ended["redacted"]) == (True, True)
    assert ended["error"]["message"] == "[redacted]in-the-open[redacted]"
    assert started["env"] == ["API_KEY", "OTHER"]


def test_a_limit_that_fired_is_recorded(made: tuple[Sandbox, Path]) -> None:
    sandbox, path = made
    result = sandbox.run("while True: pass", limits=Limits(wall_seconds=0.2))
    started, ended = of(path, result.id)
    assert started["limits"]["wall_seconds"] == 0.2
    assert ended["status"] == "timeout"
    assert ended["limits_hit"][0]["limit"] == "wall_seconds"


def test_a_request_that_is_wrong_is_no_run(made: tuple[Sandbox, Path]) -> None:
    sandbox, path = made
    before = len(records(path))
    with pytest.raises(PolicyError):
        sandbox.run("1", limits=Limits(wall_seconds=31))
    assert len(records(path)) == before


def test_without_audit_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Sandbox(pool={"maximum": 1}) as sandbox:
        sandbox.run("1")
    assert list(tmp_path.iterdir()) == []


def test_a_relative_path_is_of_the_callers_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    async def run() -> None:
        sandbox = AsyncSandbox(audit="audit.jsonl", pool={"maximum": 1})
        os.chdir("/")
        async with sandbox:
            await sandbox.run("1")

    asyncio.run(run())
    events = [one["event"] for one in records(tmp_path / "audit.jsonl")]
    assert events == ["log_opened", "run_started", "run_ended", "log_closed"]


def test_two_engines_may_share_a_record(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with Sandbox(audit=path, pool={"maximum": 1}) as one, Sandbox(audit=path, pool={"maximum": 1}) as two:
        ids = [sandbox.run("1").id for sandbox in (one, two, one, two)]
    assert [one["id"] for one in records(path) if one["event"] == "run_ended"] == ids
    sound(path)


@pytest.mark.parametrize(
    ("path", "number"), [("/nowhere/audit.jsonl", errno.ENOENT), ("/proc", errno.EISDIR), ("/dev/null", errno.EINVAL)]
)
def test_an_engine_whose_record_cannot_be_opened_does_not_start(path: str, number: int) -> None:
    with pytest.raises(Unavailable, match=path) as caught:
        Sandbox(audit=path)
    assert (caught.value.stage, caught.value.errno) == ("audit", number)


@pytest.mark.parametrize("path", ["", "a\0b", 3])
def test_a_path_that_is_none_is_refused(path: Any) -> None:
    with pytest.raises(PolicyError, match="audit must be the path of a file"):
        Sandbox(audit=path)


def test_an_engines_bounds_are_the_logs(tmp_path: Path) -> None:
    settings = AuditSettings(str(tmp_path))
    assert (settings.max_bytes, settings.keep) == (log.MAX_BYTES, log.KEEP)


@pytest.mark.parametrize(
    ("plain", "key"),
    [
        ({"path": "audit.jsonl"}, "audit.path"),
        ({"path": "/x", "keep": True}, "audit.keep"),
        ({"path": "/x", "max_bytes": 0}, "audit.max_bytes"),
        ({"path": "/x", "on_failure": "wait"}, "audit.on_failure"),
        ({"path": "/x", "fsync": 1}, "audit.fsync"),
        ({"path": "/x", "colour": 1}, "audit.colour"),
        ("/x", "audit"),
    ],
)
def test_settings_are_checked(plain: Any, key: str) -> None:
    with pytest.raises(PolicyError) as caught:
        AuditSettings.from_plain(plain)
    assert caught.value.key == key


@needs_root
def test_a_full_disk_stops_new_runs_and_loses_no_record(tmp_path: Path) -> None:
    on_a_small_disk(
        tmp_path,
        """
        import threading
        from sandboxd import Sandbox
        from sandboxd.errors import Unavailable
        with Sandbox(audit=path) as sandbox:
            first = sandbox.run("print(1)")
            started = threading.Event()
            under_way = []
            # Records that do not fit into what is left of the file's last page.
            program = "print('up', flush=True)\\nimport time; time.sleep(1.5)\\nraise ValueError('x' * 9000)"
            thread = threading.Thread(target=lambda: under_way.append(
                sandbox.run(program, on_stdout=lambda text: started.set())))
            thread.start()
            assert started.wait(20)
            fill()
            for _ in range(3):
                try:
                    sandbox.run("print('never')#" + 9000 * "x")
                except Unavailable as error:
                    assert (error.stage, error.errno) == ("audit", errno.ENOSPC), error
                else:
                    raise AssertionError("it ran")
            thread.join()
            assert under_way[0].status == "error"
            filling.unlink()
            last = sandbox.run("print(2)")
            assert last.stdout == "2\\n"
        found = [json.loads(line) for line in path.read_text().splitlines()]
        ids = [(one["event"], one["id"]) for one in found]
        assert ids == [
            ("log_opened", None), ("run_started", first.id), ("run_ended", first.id), ("run_started", under_way[0].id),
            ("run_ended", under_way[0].id), ("run_started", last.id), ("run_ended", last.id), ("log_closed", None),
        ], ids
        assert reader.verify(str(path)).problems == []
        """,
    )


@needs_root
def test_what_waits_is_written_also_when_no_run_comes(tmp_path: Path) -> None:
    on_a_small_disk(
        tmp_path,
        """
        import threading, time
        from sandboxd import Sandbox
        with Sandbox(audit=path) as sandbox:
            started = threading.Event()
            program = "print('up', flush=True)\\nimport time; time.sleep(1)\\nraise ValueError('x' * 9000)"
            thread = threading.Thread(target=lambda: sandbox.run(program, on_stdout=lambda text: started.set()))
            thread.start()
            assert started.wait(20)
            fill()
            thread.join()
            assert events()[-1] == "run_started"
            filling.unlink()
            deadline = time.monotonic() + 20
            while events()[-1] != "run_ended":
                assert time.monotonic() < deadline
                time.sleep(0.05)
        """,
    )


# --- without an engine ---------------------------------------------------------------------------------------------


def _prepared() -> Any:
    return SimpleNamespace(name="mine", serial=1, plain=Policy(name="mine", audit=Audit(redact=("*_key",))).plain())


def _request(**changes: Any) -> Any:
    plain: dict[str, Any] = {"code": "1", "language": "python", "filename": "main.py", "args": (), "env": {}}
    return SimpleNamespace(**{**plain, "stdin": None, "files": (), **changes})


def test_a_tool_call_of_a_run_is_recorded_between_its_beginning_and_its_end(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"

    async def run() -> None:
        trail = AuditRecorder(AuditSettings(str(path)))
        trail.open()

        async def one() -> None:
            request = _request(env={"my_key": "hunter22"})
            async with trail.run("0a", _prepared(), request, {}, {"uid": 0, "pid": 1}):
                call = {"tool": "query", "caller": "code", "arguments": {"q": "hunter22", "api_key": "abc"}}
                trail.tool("0a", {**call, "result": {"ok": True, "value": "abcabc", "error": None}})
                trail.tool("0b", {"tool": "of nobody's run"})
                raise Unavailable("cell", errno=errno.EIO, fix="")

        with pytest.raises(Unavailable):
            await one()
        trail.close()

    asyncio.run(run())
    found = of(path, "0a")
    assert [one["event"] for one in found] == ["run_started", "tool_called", "run_ended"]
    assert found[1]["arguments"] == {"q": "[redacted]", "api_key": "[redacted]"}
    assert found[1]["client"] == {"uid": 0, "pid": 1, "name": "root"}
    assert found[2]["status"] is None
    assert found[2]["failure"]["stage"] == "cell"
    assert "nobody" not in path.read_text()


def test_a_lock_on_the_record_holds_up_one_run_and_not_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandboxd.audit.file.LOCK_SECONDS", 10.0)
    path = tmp_path / "audit.jsonl"

    async def run() -> None:
        trail = AuditRecorder(AuditSettings(str(path)))
        trail.open()
        owner = {"uid": 0, "pid": 1}
        async with trail.run("0a", _prepared(), _request(), {}, owner):
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                trail.tool("0a", {"tool": "query", "caller": "code", "arguments": {}, "result": None})
                # Whoever waits in the loop's own thread waits in vain: it is the loop that takes the lock away.
                asyncio.get_running_loop().call_later(0.2, fcntl.flock, file, fcntl.LOCK_UN)
                async with trail.run("0b", _prepared(), _request(), {}, owner):
                    pass
        trail.close()

    asyncio.run(run())
    assert [one["event"] for one in of(path, "0a")] == ["run_started", "tool_called"]
    assert [one["event"] for one in of(path, "0b")] == ["run_started"]
    sound(path)


def test_a_lock_that_stays_refuses_runs_and_what_was_kept_is_written_when_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandboxd.audit.file.LOCK_SECONDS", 0.1)
    path = tmp_path / "audit.jsonl"

    async def run() -> None:
        trail = AuditRecorder(AuditSettings(str(path)))
        trail.open()
        owner = {"uid": 0, "pid": 1}
        async with trail.run("0a", _prepared(), _request(), {}, owner):
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                for code in ("1", "x" * 1_000_000):
                    with pytest.raises(Unavailable) as caught:
                        async with trail.run("0b", _prepared(), _request(code=code), {}, owner):
                            raise AssertionError("it began")
                    assert (caught.value.stage, caught.value.errno) == ("audit", errno.EBUSY)
                trail.tool("0a", {"tool": "query", "caller": "code", "arguments": {}, "result": None})
                assert len(of(path, "0a")) == 1
            async with asyncio.timeout(20):  # no run comes meanwhile
                while len(of(path, "0a")) < 2:
                    await asyncio.sleep(0.01)
        trail.close()

    asyncio.run(run())
    assert of(path, "0b") == []
    sound(path)


def test_a_run_that_the_engines_end_cut_short_has_an_end(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"

    async def run() -> None:
        trail = AuditRecorder(AuditSettings(str(path)))
        trail.open()

        async def one(code: str) -> None:
            async with trail.run(code[:2], _prepared(), _request(code=code), {}, {"uid": 0, "pid": 1}):
                await asyncio.sleep(60)

        tasks = [asyncio.create_task(one("0a")), asyncio.create_task(one("0b"))]
        while len(records(path)) < 3:
            await asyncio.sleep(0.001)
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        trail.close()
        tasks[1].cancel()
        await asyncio.wait(tasks)

    asyncio.run(run())
    assert of(path, "0a")[-1]["status"] == "cancelled"
    assert of(path, "0b")[-1]["failure"]["kind"] == "Closed"


def test_a_run_whose_caller_leaves_while_it_is_written_has_both_records_or_none(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    code = "x" * 2_000_000

    async def run() -> None:
        trail = AuditRecorder(AuditSettings(str(path)))
        trail.open()

        async def one(identity: str) -> None:
            async with trail.run(identity, _prepared(), _request(code=code), {}, {"uid": 0, "pid": 1}):
                raise AssertionError("it began")

        for steps in range(6):
            size = path.stat().st_size
            task = asyncio.create_task(one(f"{steps:02x}"))
            for _ in range(steps):
                await asyncio.sleep(0)
            while steps == 5 and path.stat().st_size == size:
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, AssertionError):
                await task
        trail.close()

    asyncio.run(run())
    counts = [[one["event"] for one in of(path, f"{steps:02x}")] for steps in range(6)]
    assert all(one in ([], ["run_started", "run_ended"]) for one in counts), counts
    assert counts[5] == ["run_started", "run_ended"]


# --- a daemon ------------------------------------------------------------------------------------------------------


def seen(address: str, run: str | None = None) -> list[dict[str, Any]]:
    with admin.pages(address, run) as fetch:
        return [json.loads(line) for line in reader.follow(fetch, None)]


def test_a_daemon_records_and_shows_everything_to_root(daemon: daemons.Served) -> None:
    with daemon.sandbox() as sandbox:
        result = sandbox.run(ODD)
    started, ended = of(daemon.audit, result.id)
    assert (started["code"], ended["status"]) == (ODD, "ok")
    assert seen(daemon.address)[0]["event"] == "log_opened"
    assert seen(daemon.address, result.id) == [started, ended]
    assert daemon.audit.stat().st_mode & 0o777 == 0o600


def test_another_user_sees_its_own_runs_only(daemon: daemons.Served) -> None:
    with daemon.sandbox() as sandbox:
        mine = sandbox.run("secret = 'of root'\nprint('{\"client\":{\"uid\":4321}}')").id

    def other() -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
        with daemon.sandbox() as sandbox:
            identity = sandbox.run("print('theirs')").id
        return identity, seen(daemon.address), seen(daemon.address, mine)

    gid = os.stat(daemon.path).st_gid
    theirs, everything, roots = daemons.as_user(other, OTHER, gid)
    assert [one["id"] for one in everything] == [theirs, theirs]
    assert {one["client"]["uid"] for one in everything} == {OTHER}
    assert roots == []
    assert {one["id"] for one in seen(daemon.address)} >= {mine, theirs, None}


@pytest.mark.parametrize(
    "request_",
    [
        {"op": "logs"},
        {"op": "logs", "cursor": None},
        {"op": "logs", "cursor": [1], "run": None},
        {"op": "logs", "cursor": [1, -1], "run": None},
        {"op": "logs", "cursor": [1, 1 << 70], "run": None},
        {"op": "logs", "cursor": [True, 0], "run": None},
        {"op": "logs", "cursor": None, "run": "../x"},
        {"op": "logs", "cursor": None, "run": 3},
        {"op": "logs", "cursor": None, "run": None, "path": "/etc/shadow"},
    ],
)
def test_a_request_for_logs_is_read_strictly(daemon: daemons.Served, request_: dict[str, Any]) -> None:
    with daemons.Raw(daemon) as raw:
        raw.send(request_)
        assert raw.refusal()[0] == "ProtocolError"
    assert daemon.serves()


def test_a_cursor_of_nowhere_begins_somewhere(daemon: daemons.Served) -> None:
    with daemons.Raw(daemon) as raw:
        for cursor in ([0, 5], [1, 1 << 62], [daemon.audit.stat().st_ino, 3]):
            raw.send({"op": "logs", "cursor": cursor, "run": None})
            assert raw.answer()["op"] == "logs"


def test_a_run_that_is_turned_away_is_recorded_as_busy(home: Path) -> None:
    with (
        daemons.served(home, "busy", max_running=1, max_queued=1) as daemon,
        daemon.sandbox(limits=Limits(queue_seconds=0.2)) as sandbox,
    ):
        up = threading.Event()

        def first() -> None:
            with contextlib.suppress(SandboxError):
                sandbox.run(daemons.SLEEP, on_stdout=lambda _text: up.set())

        thread = threading.Thread(target=first)
        thread.start()
        assert up.wait(20)
        with pytest.raises(Busy):
            sandbox.run("print('never')")
        busy = [one for one in records(daemon.audit) if one.get("status") == "busy"]
        assert len(busy) == 1
        assert busy[0]["event"] == "run_ended"
        assert busy[0]["code_bytes"] == len("print('never')")
        assert [one["event"] for one in of(daemon.audit, busy[0]["id"])] == ["run_ended"]
        daemon.end()
        thread.join()
    ended = [one for one in records(daemon.audit) if one["event"] == "run_ended"]
    assert ended[-1]["status"] == "cancelled"
    assert records(daemon.audit)[-1]["event"] == "log_closed"


def test_a_client_that_leaves_has_its_run_recorded_as_cancelled(daemon: daemons.Served) -> None:
    with daemons.Raw(daemon) as raw:
        code = daemons.SLEEP.encode()
        raw.send(daemons.request(code_bytes=len(code), stream=True), code)
        assert raw.answer()["op"] == "output"
    daemon.idle()
    leftovers.eventually(lambda: records(daemon.audit)[-1]["event"] == "run_ended", 10, "its end is not recorded")
    assert records(daemon.audit)[-1]["status"] == "cancelled"


def test_a_daemon_without_a_record_says_so(home: Path) -> None:
    with daemons.served(home, "off", audit={"enabled": False}) as daemon:
        assert daemon.serves()
        assert not daemon.audit.exists()
        with pytest.raises(Unavailable, match="nothing is recorded"):
            seen(daemon.address)


def test_a_daemon_rotates_and_shows_all_that_it_kept(home: Path) -> None:
    with daemons.served(home, "rotating", audit={"max_bytes": "8K", "keep": 100}) as daemon:
        with daemon.sandbox() as sandbox:
            ids = [sandbox.run("1").id for _ in range(20)]
        assert Path(f"{daemon.audit}.3").exists()
        assert [one["id"] for one in seen(daemon.address) if one["event"] == "run_started"] == ids
    sound(daemon.audit)


def test_a_daemon_makes_the_directory_of_its_record(home: Path) -> None:
    path = home / "made" / "audit.jsonl"
    with daemons.served(home, "making", audit={"path": str(path)}) as daemon:
        assert daemon.serves()
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert sound(path).records == 4


@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_a_daemon_whose_record_cannot_be_opened(home: Path, on_failure: str) -> None:
    name = f"blocked-{on_failure}"
    audit: dict[str, int | str] = {"path": "/proc/nowhere/audit.jsonl", "on_failure": on_failure}
    if on_failure == "stop":
        refused = daemons.start(home, name, audit=audit)
        assert refused.process.wait(20) == 125
        assert "audit: /proc/nowhere" in refused.said()
        assert not refused.path.exists()
        return
    with daemons.served(home, name, audit=audit) as daemon:
        assert daemon.serves()
        assert "ERROR: the audit log cannot be written: /proc/nowhere/audit.jsonl" in daemon.said()


@pytest.mark.alone
def test_kill_9_of_a_daemon_under_load_leaves_a_record_that_can_be_checked(home: Path) -> None:
    code = f"print(1)\n#{'x' * 200_000}"
    for attempt in range(3):
        with daemons.served(home, "killed", audit={"max_bytes": "1M", "keep": 1000}) as daemon:
            count = [0]

            def load(counter: list[int] = count, daemon: daemons.Served = daemon) -> None:
                with contextlib.suppress(ConnectionLost, Unavailable, ProtocolError), daemon.sandbox() as sandbox:
                    while True:
                        sandbox.run(code)
                        counter[0] += 1

            threads = [threading.Thread(target=load) for _ in range(4)]
            for one in threads:
                one.start()
            leftovers.eventually(lambda: count[0] >= 20 * (attempt + 1), 60, "nothing runs")  # noqa: B023
            daemon.end(signal.SIGKILL)
            for one in threads:
                one.join()
    with daemons.served(home, "killed", audit={"max_bytes": "1M", "keep": 1000}) as daemon:
        assert daemon.serves()
    sound(daemon.audit)
    found = records(daemon.audit)
    ended = [one for one in found if one["event"] == "run_ended"]
    assert len(ended) >= 120
    assert [one["event"] for one in found].count("log_opened") == 4
