"""The service of an ordinary user's own systemd, as ``sandboxd install-service --user`` makes it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandboxd import Sandbox
from sandboxd.errors import Unavailable
from tests.support.leftovers import eventually
from tests.support.modes import MODE

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("SANDBOXD_VM") != "1", reason="needs systemd and pure cgroup v2 (run tests/vm/run)"
    ),
    pytest.mark.only(MODE == "rootless"),  # the shipped policies want an id for each cell
]

COMMAND = Path(sys.prefix, "bin", "sandboxd")
SOCKET = Path(f"/run/user/{os.getuid()}/sandboxd/sandboxd.sock")
ADDRESS = f"unix:{SOCKET}"
UNIT = "sandboxd.service"
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def systemctl(*words: str) -> None:
    run("systemctl", "--user", *words)


def show(name: str) -> str:
    return run("systemctl", "--user", "show", "--value", f"--property={name}", UNIT).stdout.strip()


def cgroup() -> Path:
    return Path(f"/sys/fs/cgroup{show('ControlGroup')}")


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[str]:
    """What the installation said."""
    said = run(COMMAND, "install-service", "--user").stdout
    yield said
    run(COMMAND, "install-service", "--user", "--uninstall", check=False)


def ready() -> int:
    """The service serves; its pid."""
    with Sandbox.connect(ADDRESS) as sandbox:
        assert sandbox.run("print(6 * 7)").stdout == "42\n"
    return int(show("MainPID"))


def test_installation_is_told_and_not_repeated(installed: str) -> None:
    assert "sandboxd/sandboxd.toml" in installed
    assert run(COMMAND, "install-service", "--user").stdout == "Everything is installed already.\n"
    assert (SOCKET.stat().st_mode & 0o777, SOCKET.stat().st_uid) == (0o600, os.getuid())
    assert SOCKET.parent.stat().st_mode & 0o777 == 0o700


def test_cells_have_every_wall() -> None:
    with Sandbox.connect(ADDRESS) as sandbox:
        result = sandbox.run("import os\nprint(os.getuid())")
    assert result.status == "ok", result.stderr
    isolation = result.isolation
    assert isolation is not None
    assert isolation.missing == []
    assert isolation.cgroup.version == "v2"
    assert set(isolation.cgroup.controllers) >= {"memory", "pids", "cpu"}
    assert isolation.uid >= 100_000


def test_sales_report_runs_and_its_files_are_the_users(tmp_path: Path) -> None:
    words: list[str | Path] = ["run", "--connect", ADDRESS, "--timeout", "30", "--input", EXAMPLES / "sales.csv"]
    done = run(COMMAND, *words, "--output-dir", tmp_path / "out", EXAMPLES / "sales_report.py")
    assert done.stdout.endswith("3 of 12 months were below target (*).\n")
    chart = tmp_path / "out" / "chart.png"
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert chart.stat().st_uid == os.getuid()


def test_memory_hog_ends_alone() -> None:
    pid = ready()
    with Sandbox.connect(ADDRESS) as sandbox:
        result = sandbox.run("data = []\nwhile True: data.append(bytearray(1 << 24))")
        assert result.status == "memory", result
    assert ready() == pid
    assert show("NRestarts") == "0"


def test_reload_keeps_the_process_and_restart_the_socket() -> None:
    pid = ready()
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    policy = config / "sandboxd/policies/default.toml"
    policy.write_text('name = "default"\n[limits]\nwall_seconds = 2.0\n')
    try:
        systemctl("reload", UNIT)
        assert ready() == pid
        with Sandbox.connect(ADDRESS) as sandbox:
            assert sandbox.run("import time\ntime.sleep(60)").status == "timeout"
    finally:
        policy.unlink()
    systemctl("restart", UNIT)
    assert ready() != pid


def test_stop_leaves_nothing_and_removal_neither() -> None:
    ready()
    place = cgroup()
    assert place.is_dir()
    assert list(place.glob("sandboxd.*"))
    systemctl("stop", "sandboxd.socket", UNIT)
    eventually(lambda: not place.exists(), 10, "the unit's cgroup is gone")
    assert show("Result") == "success"
    with pytest.raises(Unavailable):
        Sandbox.connect(ADDRESS)
    systemctl("start", "sandboxd.socket")
    ready()
    said = run(COMMAND, "install-service", "--user", "--uninstall").stdout
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    assert not list((config / "systemd").rglob("sandboxd.*"))
    assert not (config / "sandboxd").exists()
    assert "kept" in said
    assert (state / "sandboxd/audit.jsonl").exists()  # what was recorded stays
    shutil.rmtree(state / "sandboxd")
    assert not place.exists()
