"""A host that is reset in the middle of load: two halves, before and after, each a leg of one virtual machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from sandboxd import Sandbox
from tests.support import leftovers

pytestmark = pytest.mark.skipif(
    os.environ.get("SANDBOXD_VM") != "1", reason="needs systemd and pure cgroup v2 (run tests/vm/run)"
)

ADDRESS = "unix:/run/sandboxd/sandboxd.sock"
COMMAND = Path(sys.prefix, "bin", "sandboxd")
ENDED = Path("/var/lib/sandboxd-reset.json")
AUDIT = Path("/var/log/sandboxd/audit.jsonl")
CLIENTS = 8
EACH = 5


def test_load_until_the_reset() -> None:
    """Ends with the machine's power: the runs so far are noted and written to the disk, and the load goes on."""
    subprocess.run([COMMAND, "install-service"], check=True)
    subprocess.run(["systemctl", "start", "sandboxd.socket"], check=True)
    ended: list[str] = []

    def ask() -> None:
        with Sandbox.connect(ADDRESS) as sandbox:
            while True:
                ended.append(sandbox.run("import time; time.sleep(0.05); print('x' * 1000)").id)

    for _ in range(CLIENTS):
        threading.Thread(target=ask, daemon=True).start()
    leftovers.eventually(lambda: len(ended) >= CLIENTS * EACH, 60, "runs end")
    ENDED.write_text(json.dumps(ended))
    os.sync()
    time.sleep(2)
    Path("/proc/sysrq-trigger").write_text("b")
    time.sleep(60)
    pytest.fail("the machine was not reset")


def records() -> list[dict[str, object]]:
    return [json.loads(line) for line in AUDIT.read_text().splitlines()]


def test_after_the_reset_it_starts_clean() -> None:
    state = subprocess.run(
        ["systemctl", "is-active", "sandboxd.socket"], capture_output=True, text=True, check=False
    ).stdout
    assert state == "active\n"  # enabled by the installation
    with Sandbox.connect(ADDRESS) as sandbox:
        result = sandbox.run("print(6 * 7)")
        assert (result.status, result.stdout) == ("ok", "42\n")
        listed = subprocess.run([COMMAND, "ps", "--json"], capture_output=True, text=True, check=True).stdout
        assert json.loads(listed) == []
    engines = sorted(path.name for path in Path("/sys/fs/cgroup").rglob("sandboxd.*.*") if path.is_dir())
    assert len(engines) == 1, engines


def test_after_the_reset_the_record_tells_the_truth() -> None:
    """What had ended and was on the disk is in it once; the chain holds; what was under way is not told as ended."""
    verified = subprocess.run([COMMAND, "logs", "--verify"], capture_output=True, text=True, check=False)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    kinds = Counter((str(one["id"]), str(one["event"])) for one in records() if "id" in one)
    for identity in json.loads(ENDED.read_text()):
        assert kinds[identity, "run_ended"] == 1
    assert not [key for key, count in kinds.items() if count > 1 and key[1] in ("run_started", "run_ended")]
