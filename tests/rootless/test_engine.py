"""Runs of an ordinary user's engine: files, receipts, refusals, and what stands in the place of cgroups."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandboxd import Limits, Sandbox, Unavailable, policy
from sandboxd.ids import ranges, rootless
from tests.support.engine import pid_of
from tests.support.leftovers import eventually
from tests.support.modes import HAS_CGROUP, MODE, ONE_ID, policy_of
from tests.support.promptness import prompt

if TYPE_CHECKING:
    from sandboxd.policy import Policy

FILES = """
import os
me = os.getuid()
assert os.stat("in/deep/a.txt").st_uid == me and os.stat("in").st_uid == me
with open("in/deep/a.txt", "a") as file:
    file.write("more")
os.mkdir("made")
for name, mode in (("private", 0o600), ("nothing", 0), ("made/inner", 0o400)):
    with open(name, "w") as file:
        file.write(name)
    os.chmod(name, mode)
os.chmod("made", 0)
os.mkfifo("fifo")
os.symlink("/etc/passwd", "link")
os.link("private", "again")
"""


def test_files_go_in_as_the_cells_and_come_out_whatever_their_mode(sandbox: Sandbox) -> None:
    with sandbox.run(FILES, files={"in/deep/a.txt": b"in", "in/same": b"same"}) as result:
        assert result.status == "ok", result.stderr
        found = {one.path: one.read() for one in result.files}
    assert found == {"in/deep/a.txt": b"inmore", "nothing": b"nothing", "made/inner": b"made/inner"}
    assert result.files_skipped == 4  # private and its second name, fifo, link


@pytest.mark.parametrize(
    "files",
    [
        {f"{'d/' * 64}{number}": b"x" for number in range(500)},
        {f"{number % 63}/{number}": b"x" for number in range(2000)},
    ],
    ids=["deep", "many"],
)
def test_files_that_a_broker_makes_do_not_hold_the_loop(sandbox: Sandbox, files: dict[str, bytes]) -> None:
    with prompt(sandbox):
        result = sandbox.run("import os\nprint(sum(len(f) for _, _, f in os.walk('.')))", files=files)
    assert (result.status, result.stdout) == ("ok", f"{len(files)}\n")


def test_the_source_bears_the_name_that_was_asked_for(sandbox: Sandbox) -> None:
    result = sandbox.run("print(__file__)\nopen('/code/report.py').read()", filename="report.py")
    assert (result.status, result.stdout) == ("ok", "/code/report.py\n"), result.stderr


def test_the_source_is_not_the_programs_to_change(sandbox: Sandbox) -> None:
    result = sandbox.run("import os\nos.unlink('/code/main.py')")
    assert result.status == "error"
    assert result.error is not None
    assert result.error.type in ("PermissionError", "OSError")


def test_receipt_says_what_was_in_force(sandbox: Sandbox) -> None:
    results = [sandbox.run("import os; print(os.getuid(), os.getresgid())") for _ in range(3)]
    for result in results:
        isolation = result.isolation
        assert isolation is not None
        missing = " ".join(isolation.missing)
        assert (isolation.uid == os.getuid()) is ONE_ID
        assert ("own uid" in missing) is ONE_ID
        assert isolation.cgroup.controllers == (["memory", "pids", "cpu"] if HAS_CGROUP else [])
        assert (isolation.cgroup.version == "none") is not HAS_CGROUP
        assert ("cgroup: " in missing) is not HAS_CGROUP or HAS_CGROUP
        assert (result.usage.memory_peak_bytes is None) is not HAS_CGROUP
        if not ONE_ID:
            granted = ranges.intersect(*ranges.subordinate_ranges())
            assert any(area.base <= isolation.uid < area.end for area in granted)
            guest = int(result.stdout.split()[0])
            assert guest >= ranges.FIRST_CELL_ID


def demanding(**require: object) -> Policy:
    """The mode's policy with some of what it lowers asked for after all."""
    found = policy_of()
    return found.model_copy(update={"require": found.require.model_copy(update=require)})


@pytest.mark.only(ONE_ID)
def test_a_policy_that_wants_own_uids_is_refused_with_the_fix() -> None:
    with pytest.raises(Unavailable) as caught, Sandbox(demanding(own_uid=True)):
        pass
    assert caught.value.stage == "ids"
    assert "usermod --add-subuids" in caught.value.fix
    assert "own_uid" in str(caught.value)


@pytest.mark.only(not HAS_CGROUP)
@pytest.mark.parametrize("names", [("memory",), ("pids", "cpu")])
def test_a_policy_that_wants_controllers_is_refused_with_the_fix(names: tuple[str, ...]) -> None:
    with pytest.raises(Unavailable) as caught, Sandbox(demanding(cgroup=names)):
        pass
    assert caught.value.stage == "cgroup"
    assert "cgroup" in caught.value.fix


@pytest.mark.parametrize("name", ["default", "strict"])
def test_shipped_policies_are_refused_where_a_wall_is_missing(name: str) -> None:
    shipped = policy.load(name)
    if HAS_CGROUP and not ONE_ID:
        with Sandbox(shipped) as sandbox:
            assert sandbox.run("print(1)").stdout == "1\n"
    else:
        with pytest.raises(Unavailable) as caught, Sandbox(shipped):
            pass
        assert caught.value.fix


def test_rlimits_hold_where_there_is_no_cgroup(sandbox: Sandbox) -> None:
    hog = sandbox.run("x = bytearray(1 << 30)")
    assert hog.status in ("error", "memory"), hog
    if not HAS_CGROUP:
        assert hog.error is not None
        assert hog.error.type == "MemoryError"
    spin = sandbox.run("while True: pass", limits=Limits(cpu_seconds=1, wall_seconds=20))
    assert spin.status == "cpu", spin
    if not ONE_ID or HAS_CGROUP:
        forks = "import os, time\nfor n in range(200):\n    if os.fork() == 0:\n        time.sleep(5); os._exit(0)"
        bomb = sandbox.run(forks)
        assert bomb.status == "error"
        assert bomb.error is not None
        assert bomb.error.type == "BlockingIOError"
    assert sandbox.run("print(6 * 7)").stdout == "42\n"


def test_a_run_that_will_not_end_is_ended_with_all_its_processes(sandbox: Sandbox) -> None:
    code = (
        "import os, time\nfor _ in range(4):\n    os.fork()\nos.setsid() if os.getpid() != 2 else None\ntime.sleep(60)"
    )
    result = sandbox.run(code, limits=Limits(wall_seconds=1))
    assert result.status == "timeout"
    assert result.timings.run_seconds < 5
    assert result.signal == signal.SIGKILL


# Ids


def test_engines_of_one_user_never_share_an_id() -> None:
    with Sandbox(policy_of()) as one, Sandbox(policy_of()) as other:
        uids = [sandbox.run("pass").isolation for sandbox in (one, other)]
        assert uids[0] is not None
        assert uids[1] is not None
        assert (uids[0].uid == uids[1].uid) is ONE_ID


def places_of(directories: list[Path]) -> list[str]:
    names = [str(one) for one in directories]
    return [os.readlink(f"/proc/self/fd/{fd}") for fd in rootless.lock_directories(names)]


def test_only_directories_of_this_user_alone_hold_locks(tmp_path: Path) -> None:
    good, open_, link = tmp_path / "good", tmp_path / "open", tmp_path / "link"
    good.mkdir(mode=0o700)
    open_.mkdir()
    open_.chmod(0o777)
    link.symlink_to(good)
    file = tmp_path / "file"
    file.write_text("")
    assert places_of([good, open_, link, file, tmp_path / "missing", Path("/tmp"), Path("/run")]) == [str(good)]


@pytest.mark.only(not ONE_ID)
def test_a_claim_holds_in_every_place_that_two_engines_share(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    for one in (first, second, third):
        one.mkdir(mode=0o700)
    with rootless.claim(None, slots=100) as small, rootless.claim(None, slots=2000) as large:
        assert (small.count, large.count) == (ranges.MIN_BLOCK, ranges.EXPLICIT_BLOCK)
        assert not small.base <= large.base < small.base + small.count
    config = f"{ranges.intersect(*ranges.subordinate_ranges())[0].base}:8192"
    with rootless.claim(config, places=[str(first), str(second)]) as held:
        assert held.helpers is not rootless.privileges()[0]
        with pytest.raises(Unavailable, match="held by a running engine"):
            rootless.claim(config, places=[str(second), str(third)])
        # What could be locked before that was given back.
        with rootless.claim(config, places=[str(third)]):
            pass
    with rootless.claim(config, places=[str(second), str(third)]):
        pass


@pytest.mark.only(not ONE_ID)
def test_without_a_place_for_locks_there_is_no_claim(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        rootless.claim(None, places=[str(tmp_path / "missing")])
    assert "linger" in caught.value.fix


@pytest.mark.only(not ONE_ID)
def test_a_configured_range_must_be_granted() -> None:
    with pytest.raises(Unavailable) as caught:
        rootless.claim("1900000000:65536")
    assert "usermod" in caught.value.fix


def test_mode_is_the_one_that_was_asked_for() -> None:
    assert os.environ.get("SANDBOXD_TEST_MODE", MODE).partition(",")[0] == MODE


def processes_of(low: int, high: int) -> list[str]:
    """The names of processes whose host uid is from *low* on and below *high*."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text("ascii", "replace").splitlines())
        except (OSError, ValueError):
            continue
        if low <= int(fields["Uid"].split()[1]) < high:
            found.append(fields["Name"])
    return found


@pytest.mark.only(not ONE_ID)
def test_nothing_of_a_killed_engine_lives_on_and_the_next_one_starts() -> None:
    engine = Sandbox(policy_of())
    try:
        result = engine.run("import os; print(os.getuid())")
        assert result.isolation is not None
        base = result.isolation.uid - int(result.stdout)
        assert "broker" in processes_of(base, base + ranges.MIN_BLOCK)
        os.kill(engine._handle.engine.pid, signal.SIGKILL)  # type: ignore[union-attr]
        eventually(lambda: not processes_of(base, base + ranges.MIN_BLOCK), 10, "processes of a dead engine are there")
    finally:
        engine.close()
    with Sandbox(policy_of()) as after:
        assert after.run("print(6 * 7)").stdout == "42\n"


@pytest.mark.only(HAS_CGROUP)
def test_only_what_a_birth_needs_is_open_to_all(sandbox: Sandbox) -> None:
    """cgroup.procs of leaves and of what holds them; not that of the engine's or the zygotes' directory."""
    sandbox.run("pass")
    own = Path(f"/proc/{pid_of(sandbox)}/cgroup").read_text().splitlines()[-1].partition("::")[2]
    home = Path("/sys/fs/cgroup", own.lstrip("/")).parent
    modes = {str(path.parent.relative_to(home)): path.stat().st_mode & 0o777 for path in home.rglob("cgroup.procs")}
    assert modes.pop("cells") == 0o666
    assert {modes.pop(name) for name in ("engine", "cells/zygotes", ".")} == {0o644}
    assert modes
    assert set(modes.values()) == {0o666}
