"""What an ordinary user's engine is, shown as root: the tests of tests/rootless and the attack table, run as somebody
else, in each mode that this host can have. With cgroups they run where systemd delegates them: in tests/vm.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandboxd.errors import Unavailable
from sandboxd.ids import rootless
from sandboxd.kernel import userns
from sandboxd.kernel.stages import Stage, unavailable
from tests.support import plain
from tests.support.modes import ROOT
from tests.vm.plan import REFUSED, SAMPLE

if TYPE_CHECKING:
    import subprocess

CAPABLE = ("setuid", "setgid")
WAYS = {
    "helpers": ("rootless,no-cgroup", ()),
    "capabilities": ("rootless,no-cgroup", CAPABLE),
    "one id": ("rootless-one-id,no-cgroup", ()),
}

pytestmark = pytest.mark.skipif(not ROOT, reason="needs root: tests/rootless runs by itself")


def pytest_as_user(mode: str, capabilities: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *arguments]
    return plain.run(command, mode, capabilities)


@pytest.mark.parametrize("way", WAYS)
def test_engine_of_an_ordinary_user_works_and_refuses_attacks(way: str) -> None:
    """With all walls up; the proof of each wall alone is the same code, and root's."""
    # How ids come to be mapped is all in which the ways with ids differ: what else is tested is tested for one of them.
    tests = ("tests/rootless/test_engine.py", *SAMPLE) if way == "capabilities" else ("tests/rootless",)
    done = pytest_as_user(*WAYS[way], *tests, *REFUSED)
    assert done.returncode == 0, done.stdout[-6000:]


def test_the_hosts_files_are_as_they_were() -> None:
    before = {name: Path("/etc", name).read_bytes() for name in ("passwd", "group", "subuid", "subgid")}
    done = plain.run(["cat", "/etc/subuid"], "rootless")
    assert done.stdout == f"{plain.NAME}:{plain.SUBORDINATE[0]}:{plain.SUBORDINATE[1]}\n"
    assert {name: Path("/etc", name).read_bytes() for name in before} == before


# Pure


def test_rights_are_read_from_the_status() -> None:
    assert rootless.privileges("CapEff:\t00000000000000c0\nNoNewPrivs:\t1\n") == (True, True)
    assert rootless.privileges("CapEff:\t0000000000000080\nNoNewPrivs:\t0\n") == (False, False)
    assert rootless.privileges("") == (False, False)


def test_a_helper_without_rights_is_told(tmp_path: Path) -> None:
    program = tmp_path / "newuidmap"
    assert rootless.helper_problem(None) == "is not installed"
    assert "No such file" in rootless.helper_problem(str(program))
    program.write_text("")
    program.chmod(0o755)
    assert rootless.helper_problem(str(program)) == "is neither setuid root nor has file capabilities"
    program.chmod(0o4755)
    assert rootless.helper_problem(str(program)) == ""
    os.chown(program, plain.UID, plain.GID)
    program.chmod(0o4755)
    assert rootless.helper_problem(str(program)) != ""


def switch(root: Path, **values: str) -> Path:
    for name, value in values.items():
        path = root / "proc/sys" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return root


def test_each_switch_is_named_with_its_fix(tmp_path: Path) -> None:
    assert userns.causes(tmp_path) == []
    root = switch(
        tmp_path,
        user__max_user_namespaces="0",
        kernel__unprivileged_userns_clone="0",
        kernel__apparmor_restrict_unprivileged_userns="1",
    )
    reasons, fixes = zip(*userns.causes(root), strict=True)
    assert [one.split()[0].rpartition(".")[2] for one in reasons] == [
        "max_user_namespaces",
        "unprivileged_userns_clone",
        "apparmor_restrict_unprivileged_userns",
    ]
    assert all("sysctl -w" in one for one in fixes)
    assert "userns," in fixes[2]
    assert "/etc/apparmor.d/" in fixes[2]


def test_switches_that_are_open_explain_nothing(tmp_path: Path) -> None:
    root = switch(
        tmp_path,
        user__max_user_namespaces="10000",
        kernel__unprivileged_userns_clone="1",
        kernel__apparmor_restrict_unprivileged_userns="0",
    )
    assert userns.causes(root) == []


@pytest.mark.parametrize("stage", [Stage.CLONE, Stage.MAPS, Stage.PRIVATE, Stage.MOUNTS])
def test_a_refusal_says_which_switch_is_behind_it(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = switch(tmp_path, kernel__apparmor_restrict_unprivileged_userns="1")
    refusal = unavailable(stage, 1)
    assert userns.explained(refusal, root) is refusal  # root is not concerned
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    told = userns.explained(refusal, root)
    assert isinstance(told, Unavailable)
    assert (told.stage, told.errno) == (refusal.stage, refusal.errno)
    assert "apparmor_restrict_unprivileged_userns is 1" in str(told)
    assert userns.explained(unavailable(stage, 12), root).fix != told.fix
    assert userns.explained(unavailable(Stage.SECCOMP, 1), root).stage == "seccomp"
