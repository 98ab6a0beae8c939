"""Where engines live on a host with systemd and pure cgroup v2, and what becomes of them there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pwd
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd import Limits, Sandbox
from sandboxd.cgroup import Bounds, Instance, LeafLimits, discover, sweep, systemd
from tests.support import leftovers
from tests.support.engine import pid_of

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
MOUNT = Path("/sys/fs/cgroup")
HERE = systemd.is_manager() and discover().version == "v2" and os.geteuid() == 0

pytestmark = pytest.mark.skipif(
    not HERE and not os.environ.get("SANDBOXD_VM"), reason="needs systemd and pure cgroup v2 (run tests/vm/run)"
)

ENGINE = r"sandboxd\.\d+\.\d+/engine"
SCOPE = r"/system\.slice/sandboxd-\d+-\d+\.scope/"
HOG = "x = [bytearray(1 << 20) for _ in range(400)]"


def unit(code: str, *options: str, timeout: float = 180) -> Any:
    """What Python *code*, the main process of a transient unit, prints as JSON."""
    command = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", *options, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def scopes() -> set[Path]:
    return {path for path in MOUNT.rglob("sandboxd-*.scope") if path.is_dir()}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Other tests' engines may live; of ours no scope stays, and nothing is made in systemd's own root."""
    before = scopes()
    yield
    leftovers.eventually(lambda: scopes() <= before, 20, "the scopes of this test's engines go")
    assert list(MOUNT.glob("sandboxd*")) == []


def engine_of(sandbox: Sandbox) -> leftovers.Process:
    found = leftovers.process(pid_of(sandbox))
    assert found is not None
    return found


# An embedded engine: the caller, and where its engine is.

OWN = """
def own(pid="self"):
    return next(line[3:].strip() for line in open(f"/proc/{pid}/cgroup") if line.startswith("0::"))
"""
EMBEDDED = f"""
import json, time
{OWN}
from sandboxd import Sandbox
before, started = own(), time.monotonic()
with Sandbox() as sandbox:
    result = sandbox.run("print(6 * 7)")
    answer = {{"before": before, "after": own(), "engine": own(sandbox._handle.engine.pid), "stdout": result.stdout}}
    answer["seconds"] = time.monotonic() - started
    answer["cgroup"] = result.isolation.cgroup.model_dump()
    answer["missing"] = result.isolation.missing
print(json.dumps(answer))
"""


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ((), SCOPE),
        (("-p", "Delegate=yes"), SCOPE),
        (("-p", "Delegate=yes", "-p", "DelegateSubgroup=main"), r"/system\.slice/run-[^/]+\.service/"),
        (("--user", "--machine=root@"), SCOPE),
    ],
    ids=["plain", "delegated", "subgroup", "session-of-root"],
)
def test_embedded_engine_finds_a_cgroup_and_leaves_its_caller_alone(options: tuple[str, ...], where: str) -> None:
    answer = unit(EMBEDDED, *options)
    assert answer["stdout"] == "42\n"
    assert answer["before"] == answer["after"]
    assert re.fullmatch(where + ENGINE, answer["engine"]), answer
    assert answer["cgroup"] == {"version": "v2", "controllers": ["memory", "pids", "cpu"]}
    assert not [one for one in answer["missing"] if one.startswith("cgroup")], answer


# An engine that is its unit's main process, as a daemon is.

MAIN = f"""
import json, os, time
{OWN}
from sandboxd.cgroup import Bounds, Instance, discover, sweep
from sandboxd.errors import Unavailable
layout = discover()
sweep(layout)
before, started = own(), time.monotonic()
try:
    with Instance.create(layout, Bounds(memory_bytes=256 << 20, pids=100)) as instance:
        answer = {{"before": before, "engine": own(), "seconds": time.monotonic() - started}}
        with instance.make_leaf(0) as leaf:
            from sandboxd.cgroup import LeafLimits
            leaf.set_limits(LeafLimits(memory_bytes=32 << 20, pids=10, cpus=0.5))
            leaf.begin()
            pid = os.fork()
            if not pid:
                time.sleep(0.5)
                bytearray(64 << 20)
                os._exit(0)
            leaf.attach(pid)
            answer["status"] = os.waitpid(pid, 0)[1]
            answer["kills"] = leaf.counters().oom_kills
            answer["hits"] = leaf.counters().memory_limit_hits
        answer["left"] = instance.close()
except Unavailable as error:
    answer = {{"errno": error.errno, "fix": error.fix, "text": str(error)}}
print(json.dumps(answer))
"""


def assert_enforced(answer: dict[str, Any]) -> None:
    assert (answer["status"], answer["kills"], answer["left"]) == (signal.SIGKILL, 1, []), answer
    assert answer["hits"] > 0, answer


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ((), SCOPE),
        (("-p", "Delegate=yes"), r"/system\.slice/run-[^/]+\.service/"),
        (("-p", "Delegate=yes", "-p", "DelegateSubgroup=main"), r"/system\.slice/run-[^/]+\.service/"),
    ],
    ids=["plain", "delegated", "subgroup"],
)
def test_engine_as_main_process_takes_what_its_unit_was_given(options: tuple[str, ...], where: str) -> None:
    answer = unit(MAIN, *options)
    assert re.fullmatch(where + ENGINE, answer["engine"]), answer
    assert_enforced(answer)


# A plain user


@pytest.fixture(scope="module")
def user() -> Iterator[pwd.struct_passwd]:
    """A user with a service manager of its own, as after a login."""
    name = "sandboxd-test-cg"
    subprocess.run(["useradd", "--create-home", name], check=True)
    try:
        subprocess.run(["loginctl", "enable-linger", name], check=True)
        entry = pwd.getpwnam(name)
        leftovers.eventually(lambda: manager_is_up(entry), 120, "the user's service manager")
        yield entry
        subprocess.run(["loginctl", "disable-linger", name], check=True)
        subprocess.run(["loginctl", "terminate-user", name], check=False)
        leftovers.eventually(lambda: not Path(f"/run/user/{entry.pw_uid}").exists(), 60, "the user's manager ends")
    finally:
        subprocess.run(["userdel", "--remove", name], check=False, stderr=subprocess.DEVNULL)


def manager_is_up(entry: pwd.struct_passwd) -> bool:
    asked = ["systemctl", "is-system-running", "--user", f"--machine={entry.pw_name}@"]
    state = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return state in ("running", "degraded") and systemd.private_socket(0).exists()


def as_user(entry: pwd.struct_passwd) -> tuple[str, ...]:
    return ("--user", f"--machine={entry.pw_name}@")


@pytest.mark.parametrize("subgroup", [(), ("-p", "DelegateSubgroup=main")], ids=["delegated", "subgroup"])
def test_system_service_of_a_user_lives_in_its_unit(user: pwd.struct_passwd, subgroup: tuple[str, ...]) -> None:
    answer = unit(MAIN, f"--uid={user.pw_name}", "-p", "Delegate=yes", *subgroup)
    assert "engine" in answer, answer
    assert re.fullmatch(r"/system\.slice/run-[^/]+\.service/" + ENGINE, answer["engine"]), answer
    assert_enforced(answer)


@pytest.mark.parametrize("given", ["service-of-root", "plain", "delegated", "subgroup"])
def test_users_engine_lives_below_the_users_manager(user: pwd.struct_passwd, given: str) -> None:
    slice_ = rf"/user\.slice/user-{user.pw_uid}\.slice/user@{user.pw_uid}\.service/app\.slice/"
    options = {
        "service-of-root": (f"--uid={user.pw_name}",),
        "plain": as_user(user),
        "delegated": (*as_user(user), "-p", "Delegate=yes"),
        "subgroup": (*as_user(user), "-p", "Delegate=yes", "-p", "DelegateSubgroup=main"),
    }[given]
    where = r"run-[^/]+\.service/" if given in ("delegated", "subgroup") else r"sandboxd-\d+-\d+\.scope/"
    answer = unit(MAIN, *options)
    assert "engine" in answer, answer
    assert re.fullmatch(slice_ + where + ENGINE, answer["engine"]), answer
    assert_enforced(answer)


def test_user_without_a_manager_is_told_how_to_get_one() -> None:
    answer = unit(MAIN, "--uid=nobody")
    assert answer["errno"] == errno.EACCES
    assert "loginctl enable-linger 65534" in answer["fix"]
    assert "/run/user/65534/systemd/private" in answer["text"]


def test_controller_that_users_are_not_given_is_named_and_the_fix_mends_it(user: pwd.struct_passwd) -> None:
    uid = user.pw_uid
    drop_in = Path(f"/run/systemd/system/user@{uid}.service.d/less.conf")
    mended = Path("/etc/systemd/system/user@.service.d/delegate.conf")
    drop_in.parent.mkdir(parents=True, exist_ok=True)
    drop_in.write_text("[Service]\nDelegate=\nDelegate=memory pids\n")
    try:
        subprocess.run(["systemctl", "daemon-reload"], check=True)
        subprocess.run(["systemctl", "restart", f"user@{uid}.service"], check=True)
        leftovers.eventually(lambda: manager_is_up(user), 120, "the user's service manager")
        answer = unit(MAIN, *as_user(user))
        assert answer["errno"] == errno.ENOENT, answer
        assert "cpu" in answer["text"]
        drop_in.unlink()
        fix = re.search(r"mkdir .* systemctl restart user@\d+\.service", answer["fix"])
        assert fix, answer
        subprocess.run(["sh", "-c", fix[0]], check=True)
        leftovers.eventually(lambda: manager_is_up(user), 120, "the user's service manager")
        assert_enforced(unit(MAIN, *as_user(user)))
    finally:
        for path in (drop_in, mended):
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()
        subprocess.run(["systemctl", "daemon-reload"], check=True)
        subprocess.run(["systemctl", "restart", f"user@{uid}.service"], check=True)


# Without systemd: a container, whose first process and engine are in the root of its cgroup namespace

CONTAINER = """
mount -t tmpfs none /run/systemd && mount -t cgroup2 none /sys/fs/cgroup && "$@"
"""


def test_container_needs_its_root_to_be_empty_and_the_fix_empties_it() -> None:
    code = f"""
import json, subprocess, sys
run = [sys.executable, "-c", {MAIN!r}]
first = json.loads(subprocess.run(run, stdout=-1, check=True).stdout)
fix = first["fix"].partition("before it: ")[2]
subprocess.run(["sh", "-ec", fix], check=True)
print(json.dumps([first, json.loads(subprocess.run(run, stdout=-1, check=True).stdout)]))
"""
    command = ["unshare", "--cgroup", "--mount", "sh", "-ec", CONTAINER, "sh", sys.executable, "-c", code]
    first, second = unit(f"import os\nos.execvp('unshare', {command!r})", "-p", "Delegate=yes")
    assert first["errno"] == errno.EBUSY, first
    assert second["before"] == "/init"
    assert re.fullmatch("/" + ENGINE, second["engine"]), second
    assert_enforced(second)


# What becomes of an engine


def test_scope_goes_when_the_engine_is_killed() -> None:
    sandbox = Sandbox()
    try:
        assert sandbox.run("print(1)").stdout == "1\n"
        engine = engine_of(sandbox)
        scope = MOUNT / f"system.slice/sandboxd-{engine.pid}-{engine.started}.scope"
        assert scope.is_dir()
        os.kill(engine.pid, signal.SIGKILL)
        leftovers.eventually(lambda: not scope.exists(), 20, "the scope goes")
    finally:
        sandbox.close()


def test_dead_engine_with_living_processes_in_its_scope_is_swept() -> None:
    code = """
import os, signal, subprocess, sys
from sandboxd.cgroup import Bounds, Instance, discover
instance = Instance.create(discover(), Bounds())
leaf = instance.make_leaf(0)
sleeper = subprocess.Popen(["sleep", "infinity"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
leaf.attach(sleeper.pid)
print(sleeper.pid, instance.paths()[-1], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    pid, path = done.stdout.split()
    assert re.fullmatch(re.escape(str(MOUNT)) + SCOPE + ENGINE.removesuffix("/engine"), path)
    assert os.path.isdir(path)
    sleeper = leftovers.process(int(pid))
    assert sleeper is not None
    assert sleeper.name == "sleep"
    (swept,) = [found for found in sweep(discover()) if found.name == os.path.basename(path)]
    assert (swept.killed, swept.left) == (1, [])
    leftovers.eventually(lambda: not leftovers.lives(sleeper), 10, "the process ends")


@pytest.mark.parametrize("subgroup", [(), ("-p", "DelegateSubgroup=main")], ids=["delegated", "subgroup"])
def test_service_whose_engine_was_killed_starts_again(subgroup: tuple[str, ...], tmp_path: Path) -> None:
    # What the first left, controllers handed on and a process in a leaf, must not be in the way of the second.
    state = tmp_path / "state"
    code = f"""
import os, pathlib, signal, subprocess
from sandboxd.cgroup import Bounds, Instance, discover, sweep
state = pathlib.Path({str(state)!r})
sweep(discover())
instance = Instance.create(discover(), Bounds())
leaf = instance.make_leaf(0)
if not state.exists():
    leaf.attach(subprocess.Popen(["sleep", "infinity"]).pid)
    state.write_text("killed")
    os.kill(os.getpid(), signal.SIGKILL)
leaf.remove()
instance.close()
state.write_text(instance.paths()[-1])
"""
    options = ("-p", "Delegate=yes", *subgroup, "-p", "Restart=on-failure", "-p", "RestartSec=100ms")
    unit_name = f"sandboxd-test-{os.getpid()}-{len(subgroup)}"
    command = ["systemd-run", "--quiet", "--collect", f"--unit={unit_name}", *options, sys.executable, "-c", code]
    subprocess.run(command, check=True)
    try:
        leftovers.eventually(lambda: state.exists() and "sandboxd." in state.read_text(), 60, "the second engine")
    finally:
        subprocess.run(["systemctl", "stop", unit_name], check=False, stderr=subprocess.DEVNULL)
    assert f"/{unit_name}.service/sandboxd." in state.read_text()


def test_memory_hog_is_memory_and_the_engine_lives() -> None:
    with Sandbox(limits=Limits(memory_bytes=64 * MIB)) as sandbox:
        engine = engine_of(sandbox)
        for _ in range(3):
            assert sandbox.run(HOG).status == "memory"
        assert sandbox.run("print(1)").stdout == "1\n"
        assert leftovers.lives(engine)


def test_out_of_memory_of_the_whole_engine_takes_a_run_and_never_the_engine() -> None:
    with Sandbox(memory_bytes=192 * MIB, limits=Limits(memory_bytes=1024 * MIB), pool=leftovers.UNPARKED) as sandbox:
        engine = engine_of(sandbox)
        for _ in range(3):
            result = sandbox.run(HOG)
            assert result.status == "killed", result
            (hit,) = [one for one in result.limits_hit if one.limit == "memory_bytes"]
            assert "whole engine or host" in hit.evidence.detail
            assert leftovers.lives(engine)
        assert sandbox.run("print(1)").stdout == "1\n"


def test_bounds_stand_where_the_engine_is_not() -> None:
    with Sandbox(memory_bytes=512 * MIB) as sandbox:
        own = Path(f"/proc/{engine_of(sandbox).pid}/cgroup").read_text().partition("::")[2].strip()
        engine = MOUNT / own.lstrip("/")
        cells = engine.parent / "cells"
        assert (cells / "memory.max").read_text().strip() == str(512 * MIB)
        assert (cells / "pids.max").read_text().strip() != "max"
        for directory in (engine, engine.parent, engine.parent.parent):  # that is the scope
            assert (directory / "memory.max").read_text().strip() == "max"
            assert (directory / "pids.max").read_text().strip() == "max"


def test_oom_of_the_engine_is_not_the_leafs_own_though_it_met_its_limit_before() -> None:
    # Page cache, of a file on a disk, meets the limit and makes room again, which memory.events counts as "max".
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as file:
        for _ in range(96):
            file.write(bytes(MIB))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        meet_both_limits(file.name)


def meet_both_limits(big: str) -> None:
    code = f"""
import sys
sys.stdin.readline()
with open({big!r}, "rb", buffering=0) as file:
    while file.read(1 << 20):
        pass
print(flush=True)
sys.stdin.readline()
x = bytearray(44 << 20)
"""
    holder = """
import sys, time
open("/proc/self/oom_score_adj", "w").write("-900")
sys.stdin.readline()
x = bytearray(60 << 20)
print(flush=True)
time.sleep(600)
"""
    with (
        Instance.create(discover(), Bounds(memory_bytes=96 * MIB)) as instance,
        instance.make_leaf(0) as leaf,
        instance.make_leaf(1) as other,
        python(code) as first,
        python(holder) as second,
    ):
        leaf.set_limits(LeafLimits(memory_bytes=64 * MIB))
        leaf.begin()
        leaf.attach(first.pid)
        other.attach(second.pid)
        step(first)
        events = Path(instance.paths()[-1], "cells", leaf.name, "memory.events").read_text()
        assert re.search(r"^max [1-9]", events, re.MULTILINE), events
        step(second)
        assert first.stdin is not None
        first.stdin.write("\n")
        first.stdin.flush()
        assert first.wait(timeout=60) == -signal.SIGKILL
        counters = leaf.counters()
        assert counters.oom_kills == 1
        assert counters.memory_limit_hits == 0


@contextlib.contextmanager
def python(code: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-I", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def step(process: subprocess.Popen[str]) -> None:
    """Let it go on, until it says something."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "\n"


# What it costs


def test_asking_for_a_scope_is_quick() -> None:
    answers = [unit(MAIN) for _ in range(3)]
    seconds = sorted(answer["seconds"] for answer in answers)
    print("Instance.create with a new scope:", [f"{one * 1000:.0f} ms" for one in seconds])  # noqa: T201
    assert seconds[0] < 5
