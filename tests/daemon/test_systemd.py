"""The service as ``sandboxd install-service`` makes it, on a host with systemd and pure cgroup v2.

Users, units and daemons here are real. Bounds are generous: the machine may be emulated.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandboxd import Sandbox
from sandboxd.client import admin
from sandboxd.errors import Busy, ConnectionLost, SandboxError, Unavailable
from tests import attacks
from tests.attacks.bait import bait
from tests.support import leftovers
from tests.vm.plan import REFUSED, SAMPLE

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(
    os.environ.get("SANDBOXD_VM") != "1", reason="needs systemd and pure cgroup v2 (run tests/vm/run)"
)

ADDRESS = "unix:/run/sandboxd/sandboxd.sock"
SOCKET = Path("/run/sandboxd/sandboxd.sock")
COMMAND = Path(sys.prefix, "bin", "sandboxd")
UNIT = "sandboxd.service"
CGROUP = Path("/sys/fs/cgroup/system.slice/sandboxd.service")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MEMBER, STRANGER = "sbxmember", "sbxstranger"
START_SECONDS = 120.0
RWX = """
import ctypes, mmap
memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
memory.write(bytes.fromhex("b82a000000c3"))  # mov eax, 42; ret
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))())
"""


def run(*command: str | Path, check: bool = True, seconds: float = 240) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
    assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}\n{journal()}"
    return done


def journal(lines: int = 40) -> str:
    words = ["journalctl", "--unit=sandboxd.service", "--no-pager", f"--lines={lines}", "--output=short-monotonic"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout


def show(name: str, unit: str = UNIT) -> str:
    return run("systemctl", "show", "--value", f"--property={name}", unit).stdout.strip()


def systemctl(*words: str) -> None:
    run("systemctl", *words)


def as_user(name: str, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run("runuser", "-u", name, "--", *command, check=check)


def ready() -> None:
    """The service serves."""
    with Sandbox.connect(ADDRESS) as sandbox:
        assert sandbox.run("print(6 * 7)").stdout == "42\n"


def below(cgroup: Path = CGROUP) -> list[int]:
    """Pids of everything in the unit."""
    found: list[int] = []
    for path, _, files in os.walk(cgroup):
        if "cgroup.procs" in files:
            with contextlib.suppress(OSError):
                found += [int(word) for word in Path(path, "cgroup.procs").read_text().split()]
    return found


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[str]:
    """The service, and two users: one in its group, one not. What the first installation said."""
    said = run(COMMAND, "install-service").stdout
    try:
        for name in (MEMBER, STRANGER):
            run("useradd", "--create-home", name)
        run("usermod", "--append", "--groups", "sandboxd", MEMBER)
        systemctl("start", "sandboxd.socket")
        yield said
    finally:
        for name in (MEMBER, STRANGER):
            run("userdel", "--remove", name, check=False)
        run(COMMAND, "install-service", "--uninstall", check=False)
        shutil.rmtree("/var/log/sandboxd", ignore_errors=True)


@pytest.fixture(autouse=True)
def rested() -> Iterator[None]:
    """No test is refused for the starts of those before it."""
    run("systemctl", "reset-failed", "sandboxd.service", "sandboxd.socket", check=False)
    yield
    shutil.rmtree("/etc/systemd/system/sandboxd.service.d", ignore_errors=True)


def test_installation_says_what_it_does_and_again_nothing(installed: str) -> None:
    for words in ("write /etc/systemd/system/sandboxd.service", "systemd-sysusers", "give sandboxd 65,536 ids"):
        assert words in installed
    assert run(COMMAND, "install-service").stdout == "Everything is installed already.\n"
    assert f"ExecStart={COMMAND} serve" in Path("/etc/systemd/system/sandboxd.service").read_text()
    for path, mode, owner in (("/run/sandboxd", 0o750, "root"), ("/etc/sandboxd/policies", 0o755, "root")):
        status = Path(path).stat()
        assert (status.st_mode & 0o7777, pwd.getpwuid(status.st_uid).pw_name) == (mode, owner)
    assert Path("/run/sandboxd").group() == "sandboxd"
    assert (SOCKET.group(), SOCKET.owner(), SOCKET.stat().st_mode & 0o777) == ("sandboxd", "root", 0o660)


def test_service_runs_as_its_user_with_two_capabilities() -> None:
    ready()
    pid = int(show("MainPID"))
    status = Path(f"/proc/{pid}/status").read_text()
    assert Path(f"/proc/{pid}").stat().st_uid in (0, pwd.getpwnam("sandboxd").pw_uid)  # 0: not dumpable
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert {int(word) for word in fields["Uid"].split()} == {pwd.getpwnam("sandboxd").pw_uid}
    both = 1 << 6 | 1 << 7  # CAP_SETGID, CAP_SETUID
    assert [int(fields[name], 16) for name in ("CapEff", "CapPrm", "CapBnd")] == [both] * 3
    assert fields["NoNewPrivs"] == "1"
    assert Path("/var/log/sandboxd").owner() == "sandboxd"
    assert Path("/var/log/sandboxd").stat().st_mode & 0o777 == 0o700
    assert any(Path("/var/cache/sandboxd").iterdir())


def test_cells_have_every_wall_and_may_map_code() -> None:
    with Sandbox.connect(ADDRESS) as sandbox:
        result = sandbox.run(RWX)
        assert (result.status, result.stdout) == ("ok", "42\n"), result.stderr
        isolation = result.isolation
        assert isolation is not None
        assert isolation.missing == []
        assert isolation.cgroup.version == "v2"
        assert set(isolation.cgroup.controllers) >= {"memory", "pids", "cpu"}
        assert isolation.uid > 100_000


def test_attacks_are_refused_in_its_cells() -> None:
    """In cells that have the unit's own restrictions, too; what is aimed at is the service's."""
    entry = pwd.getpwnam("sandboxd")
    with bait(entry.pw_uid, entry.pw_gid) as place:
        given = {**os.environ, "SANDBOXD_TEST_ADDRESS": ADDRESS, "SANDBOXD_TEST_BAIT": str(place)}
        words = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *REFUSED, *SAMPLE]
        done = subprocess.run(words, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"\b(\d+) passed", done.stdout)
    assert passed is not None, done.stdout[-500:]
    assert int(passed[1]) > len(attacks.SAMPLE)


def test_sales_report_runs_for_a_member_of_the_group(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = Path(f"/home/{MEMBER}")
    for name in ("sales_report.py", "sales.csv"):
        shutil.copy(EXAMPLES / name, home)
        os.chmod(home / name, 0o644)
    words: list[str | Path] = ["run", "--connect", ADDRESS, "--timeout", "30", "--input", home / "sales.csv"]
    done = as_user(MEMBER, COMMAND, *words, "--output-dir", home / "out", home / "sales_report.py")
    assert done.stdout.endswith("3 of 12 months were below target (*).\n")
    chart = home / "out" / "chart.png"
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert chart.owner() == MEMBER


def test_stranger_is_refused_with_the_group_to_ask_for() -> None:
    done = as_user(STRANGER, COMMAND, "run", "--connect", ADDRESS, "-c", "pass", check=False)
    assert done.returncode == 125
    assert "group" in done.stderr


def test_memory_hog_ends_alone() -> None:
    ready()
    pid = show("MainPID")
    with Sandbox.connect(ADDRESS) as sandbox:
        for _ in range(3):
            result = sandbox.run("data = []\nwhile True: data.append(bytearray(1 << 24))")
            assert result.status == "memory", result
        assert sandbox.run("print(1)").stdout == "1\n"
    assert show("MainPID") == pid
    assert show("ActiveState") == "active"
    assert show("NRestarts") == "0"


def test_two_hundred_runs_at_once() -> None:
    with Sandbox.connect(ADDRESS) as sandbox, ThreadPoolExecutor(200) as pool:
        results = list(pool.map(lambda number: sandbox.run(f"print({number})"), range(200)))
    assert [result.status for result in results] == ["ok"] * 200
    assert [result.stdout for result in results] == [f"{number}\n" for number in range(200)]


class Load:
    """Clients that run programs one after the other until the end, each on a handle of its own for every run."""

    def __init__(self, threads: int = 4) -> None:
        self.over = threading.Event()
        self.seen: Counter[str] = Counter()
        self.bad: list[str] = []
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads)
        self._futures = [self._pool.submit(self._go, number) for number in range(threads)]

    def _go(self, thread: int) -> None:
        number = 0
        while not self.over.is_set():
            number += 1
            what = f"{thread}.{number}"
            try:
                with Sandbox.connect(ADDRESS) as sandbox:
                    result = sandbox.run(f"print('{what}')")
                outcome = "ok" if result.stdout == f"{what}\n" else f"wrong: {result.status} {result.stdout!r}"
            except Busy:
                outcome = "busy"
            except ConnectionLost as error:
                outcome = "may have started" if error.may_have_started else "not started"
            except SandboxError as error:
                outcome = f"{error}"
            with self._lock:
                self.seen[outcome] += 1

    def ran(self, count: int, seconds: float = 120) -> None:
        before = self.seen["ok"]
        leftovers.eventually(lambda: self.seen["ok"] >= before + count, seconds, f"nothing runs: {self.seen}")

    def end(self) -> Counter[str]:
        self.over.set()
        self._pool.shutdown(wait=True)
        for future in self._futures:
            future.result()
        return self.seen


def test_reload_under_load_loses_nothing() -> None:
    ready()
    pid = show("MainPID")
    policy = Path("/etc/sandboxd/policies/default.toml")
    load = Load()
    try:
        load.ran(4)
        policy.write_text('name = "default"\n[limits]\nwall_seconds = 33.0\n')
        systemctl("reload", UNIT)
        load.ran(4)
        policy.write_text('name = "default"\n[limits]\nwall_secnods = 33.0\n')
        refused = run("systemctl", "reload", UNIT, check=False)
        assert refused.returncode != 0
        assert show("ActiveState") == "active"
        assert "Not reloaded" in show("StatusText")
        assert "wall_secnods" in journal()
        load.ran(4)
        policy.unlink()
        systemctl("reload", UNIT)
        load.ran(4)
    finally:
        policy.unlink(missing_ok=True)
        seen = load.end()
    assert set(seen) == {"ok"}
    assert show("MainPID") == pid


def test_restart_under_load_is_seen_by_no_client_as_a_refusal() -> None:
    ready()
    pid = show("MainPID")
    load = Load()
    try:
        load.ran(4)
        systemctl("restart", UNIT)
        load.ran(8)
    finally:
        seen = load.end()
    assert show("MainPID") != pid
    assert set(seen) <= {"ok", "busy", "not started"}, seen


def test_killed_daemon_is_started_anew_and_nothing_is_left_of_it() -> None:
    ready()
    pid = int(show("MainPID"))
    before = {path.name for path in CGROUP.glob("sandboxd.*")}
    assert before
    load = Load()
    try:
        load.ran(4)
        os.kill(pid, signal.SIGKILL)
        load.ran(8)
    finally:
        seen = load.end()
    assert int(show("MainPID")) not in (0, pid)
    assert set(seen) <= {"ok", "busy", "not started", "may have started"}, seen
    assert before.isdisjoint(path.name for path in CGROUP.rglob("sandboxd.*"))
    assert show("NRestarts") != "0"
    ready()


def test_daemon_that_hangs_is_killed_by_the_watchdog() -> None:
    drop_in = Path("/etc/systemd/system/sandboxd.service.d/watchdog.conf")
    drop_in.parent.mkdir(exist_ok=True)
    drop_in.write_text("[Service]\nWatchdogSec=8\n")
    systemctl("daemon-reload")
    systemctl("restart", UNIT)
    pid = int(show("MainPID"))
    time.sleep(20)  # it feeds the watchdog while nothing runs
    assert int(show("MainPID")) == pid
    os.kill(pid, signal.SIGSTOP)
    leftovers.eventually(lambda: int(show("MainPID")) not in (0, pid), START_SECONDS, journal())
    drop_in.unlink()
    systemctl("daemon-reload")
    ready()
    assert "watchdog" in run("journalctl", "--no-pager", "--lines=400").stdout.lower()


def test_stop_leaves_nothing_in_the_slice() -> None:
    ready()
    assert below()
    with Sandbox.connect(ADDRESS) as sandbox, ThreadPoolExecutor(1) as pool:
        up = threading.Event()
        running = pool.submit(
            sandbox.run,
            "import time\nprint('up', flush=True)\ntime.sleep(2)\nprint('end')",
            on_stdout=lambda _: up.set(),
        )
        assert up.wait(60)
        systemctl("stop", "sandboxd.socket", UNIT)
        assert running.result(60).stdout == "up\nend\n"  # it was drained
    assert not CGROUP.exists()
    assert show("Result") == "success"
    assert list(Path("/sys/fs/cgroup/system.slice").glob("**/sandboxd.[0-9]*")) == []
    with pytest.raises(Unavailable):
        admin.ps(ADDRESS)
    systemctl("start", "sandboxd.socket")
    ready()


def test_journal_holds_the_daemons_lines_with_their_priority() -> None:
    ready()
    words = ["journalctl", "--unit=sandboxd.service", "--no-pager", "--output=json", "--grep=ready on"]
    entries = [json.loads(line) for line in run(*words).stdout.splitlines()]
    assert entries
    assert entries[-1]["PRIORITY"] == "6"
    assert entries[-1]["MESSAGE"] == f"ready on {SOCKET}"
    assert entries[-1]["SYSLOG_IDENTIFIER"] == "sandboxd"


def test_exposure_is_what_the_documentation_says() -> None:
    said = run("systemd-analyze", "security", "--no-pager", UNIT).stdout
    line = next(line for line in said.splitlines() if "Overall exposure level" in line)
    figure = float(line.split(":")[1].split()[0])
    assert figure <= 3.0, said


def test_removal_takes_everything_back_but_the_record() -> None:
    ready()
    uid = pwd.getpwnam("sandboxd").pw_uid
    said = run(COMMAND, "install-service", "--uninstall").stdout
    try:
        assert "kept: /var/log/sandboxd" in said
        assert Path("/var/log/sandboxd/audit.jsonl").owner() == "root"
        for path in ("/etc/sandboxd", "/run/sandboxd", "/var/lib/sandboxd", "/var/cache/sandboxd"):
            assert not Path(path).exists()
        assert not list(Path("/etc/systemd/system").rglob("sandboxd.*"))
        assert "sandboxd" not in Path("/etc/subuid").read_text() + Path("/etc/subgid").read_text()
        with pytest.raises(KeyError):
            pwd.getpwnam("sandboxd")
        assert not any(one.stat().st_uid == uid for one in Path("/proc").iterdir() if one.name.isdigit())
        assert not CGROUP.exists()
        assert run(COMMAND, "install-service", "--uninstall").stdout.endswith("Nothing to do.\n")
    finally:
        run(COMMAND, "install-service")


DEB = os.environ.get("SANDBOXD_DEB", "")


def test_package_installs_runs_and_goes() -> None:
    assert DEB, "SANDBOXD_DEB names no package"
    run(COMMAND, "install-service", "--uninstall")
    try:
        run("dpkg", "--install", DEB)
        assert show("ActiveState", "sandboxd.socket") == "active"
        ready()
        assert Path(f"/proc/{show('MainPID')}/exe").resolve().name.startswith("python3")
        with Sandbox.connect(ADDRESS) as sandbox:
            assert sandbox.run("import pandas\nprint(pandas.Series([1, 2]).sum())").stdout == "3\n"
        run("dpkg", "--install", DEB)  # an upgrade
        ready()
        run("dpkg", "--remove", "sandboxd")
        assert not CGROUP.exists()
        assert Path("/etc/sandboxd/sandboxd.toml").exists()
        assert Path("/var/log/sandboxd/audit.jsonl").exists()
        run("dpkg", "--purge", "sandboxd")
        for path in (
            "/etc/sandboxd",
            "/var/log/sandboxd",
            "/var/lib/sandboxd",
            "/var/cache/sandboxd",
            "/usr/lib/sandboxd",
        ):
            assert not Path(path).exists(), path
        assert "sandboxd" not in Path("/etc/subuid").read_text()
        with pytest.raises(KeyError):
            pwd.getpwnam("sandboxd")
    finally:
        run("dpkg", "--purge", "sandboxd", check=False)
        run(COMMAND, "install-service")
