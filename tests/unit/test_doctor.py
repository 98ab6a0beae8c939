"""What doctor says of a host: the probes on the real kernel, each also where it is made to refuse; the rest is pure."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sandboxd.cli import cli
from sandboxd.diagnostics import doctor, host_facts, probe
from sandboxd.kernel.netns import check_empty, messages

PATIENCE_SECONDS = 120

ANSWERS: dict[str, Any] = {
    **{name: {"errno": 0, "step": "", "detail": []} for name in {**probe.USER, **probe.COMMON, **probe.OWN}},
    "landlock": {"errno": 0, "step": "", "detail": 7},
    "own_ids": {"errno": 0, "step": "", "detail": {"base": 100000, "count": 65536}},
    "subordinate_ids": {
        "errno": 0,
        "step": "",
        "detail": {"helpers": ["/usr/bin/newuidmap", "/usr/bin/newgidmap"], "ranges": [[100000, 65536]]},
    },
    "cgroups": {"errno": 0, "step": "", "detail": {"version": "v2", "controllers": ["memory"], "missing": []}},
}


def refused(number: int | None) -> dict[str, Any]:
    return {"errno": number, "step": "a step", "detail": "why" if number is None else None}


# The probes, on this kernel


@pytest.mark.kernel
@pytest.mark.parametrize("name", [*probe.USER, *probe.COMMON])
def test_probe_gets_through_here(name: str) -> None:
    answer = probe.attempt({**probe.USER, **probe.COMMON}[name])
    assert answer["errno"] == 0, answer


@pytest.mark.parametrize(
    ("name", "call", "refusal"),
    [
        ("namespaces", 272, errno.EPERM),  # unshare
        ("rootfs", probe.NR["fsopen"], errno.ENOSYS),
        ("rootfs", probe.NR["mount_setattr"], errno.ENOSYS),
        ("rootfs", probe.NR["pivot_root"], errno.EPERM),
        ("proc", 165, errno.EPERM),  # mount
        ("process_calls", probe.NR["clone3"], errno.ENOSYS),
        ("process_calls", probe.NR["close_range"], errno.ENOSYS),
        ("process_calls", probe.NR["openat2"], errno.EPERM),
        ("process_calls", 434, errno.EPERM),  # pidfd_open
        ("privileges", 126, errno.EPERM),  # capset
        ("landlock", probe.NR["landlock_create_ruleset"], errno.EOPNOTSUPP),
        ("seccomp", probe.NR["seccomp"], errno.EINVAL),
    ],
)
def test_probe_reports_what_the_kernel_refuses(name: str, call: int, refusal: int) -> None:
    def with_a_refusal() -> Any:
        probe.refuse(call, refusal)
        return {**probe.USER, **probe.COMMON}[name]()

    answer = probe.attempt(with_a_refusal)
    assert answer["errno"] == refusal
    assert answer["step"]


def test_probe_reports_used_up_user_namespaces() -> None:
    def with_none_left() -> Any:
        probe.enter_userns()
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
        return probe.namespaces()

    assert probe.attempt(with_none_left)["errno"] == errno.ENOSPC


def test_probe_survives_a_child_that_dies() -> None:
    answer = probe.attempt(os.abort)
    assert answer["errno"] is None
    assert "wait status" in answer["detail"]


def test_probe_leaves_this_process_as_it_was() -> None:
    def state() -> tuple[Any, ...]:
        links = tuple(os.readlink(f"/proc/self/ns/{name}") for name in sorted(os.listdir("/proc/self/ns")))
        return links, len(os.listdir("/proc/self/fd")), os.getcwd(), os.geteuid()

    before = state()
    for run in {**probe.USER, **probe.COMMON}.values():
        probe.attempt(run)
    assert state() == before


def test_survey_covers_every_mode_and_can_be_json() -> None:
    report = doctor.survey()
    assert all(set(wall.modes) == set(doctor.MODES) for wall in report.walls)
    for wall in report.walls:
        for finding in wall.modes.values():
            assert (finding.fix == "") == (finding.state == "in force"), (wall.name, finding)
    assert json.loads(json.dumps(report.to_dict()))["mode"] == report.mode


@pytest.mark.kernel
def test_survey_leaves_no_cgroup_behind() -> None:
    def directories() -> set[str]:
        return {str(path) for path in Path("/sys/fs/cgroup").glob("**/sandboxd.*")}

    before = directories()
    doctor.survey()
    # Engines of other tests may come and go meanwhile; ours bear the pid of a process that is gone.
    assert not {path for path in directories() - before if not Path(f"/proc/{path.split('.')[-2]}").exists()}


# The network


def test_an_untouched_namespace_is_empty() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sandboxd.kernel.netns"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    assert json.loads(done.stdout) == []


def test_a_namespace_with_a_loopback_that_is_up_is_not_empty() -> None:
    code = (
        "import json, sys\n"
        "from pyroute2 import IPRoute\n"
        "from sandboxd.kernel import netns as n\n"
        "n._call('unshare', n.CLONE_NEWUSER | n.CLONE_NEWNET)\n"
        "with IPRoute() as kernel: kernel.link('set', index=1, state='up')\n"
        "sys.stdout.write(json.dumps(n.check_empty()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True
    )
    found = json.loads(done.stdout)
    assert "interface lo is up" in found
    assert any(problem.startswith("IPv4 address 127.0.0.1") for problem in found)


@pytest.mark.kernel
@pytest.mark.parametrize("how", ["path", "fd"])
def test_another_process_namespace_is_checked_from_outside(how: str) -> None:
    code = (
        "import sys\n"
        "from sandboxd.kernel import netns as n\n"
        "n._call('unshare', n.CLONE_NEWNET)\n"
        "sys.stdout.write('x'); sys.stdout.flush(); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.read(1) == b"x", "unshare was refused: this test needs root"
        path = f"/proc/{process.pid}/ns/net"
        if how == "path":
            assert check_empty(path) == []
        else:
            fd = os.open(path, os.O_RDONLY)
            assert check_empty(fd) == []
            os.close(fd)
        process.stdin.close()


def test_everything_that_another_library_sees_in_a_namespace_is_found() -> None:
    code = (
        "import json, sys\n"
        "from pyroute2 import IPRoute\n"
        "from sandboxd.kernel import netns as n\n"
        "n._call('unshare', n.CLONE_NEWUSER | n.CLONE_NEWNET)\n"
        "with IPRoute() as kernel:\n"
        "    kernel.link('set', index=1, state='up')\n"
        "    kernel.link('add', ifname='v0', kind='veth', peer='v1')\n"
        "    v0 = kernel.link_lookup(ifname='v0')[0]\n"
        "    kernel.addr('add', index=v0, address='192.0.2.7', prefixlen=24)\n"
        "    kernel.link('set', index=v0, state='up')\n"
        "    kernel.route('add', dst='198.51.100.0/24', gateway='192.0.2.1')\n"
        "    names = [one.get_attr('IFLA_IFNAME') for one in kernel.get_links()]\n"
        "    addresses = [one.get_attr('IFA_ADDRESS') for one in kernel.get_addr()]\n"
        "    routes = [f\"{one.get_attr('RTA_DST') or 'default'}/{one['dst_len']}\" for f in (2, 10)\n"
        "              for one in kernel.get_routes(family=f)]\n"
        "sys.stdout.write(json.dumps([n.check_empty(), names, addresses, routes]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    found, names, addresses, routes = json.loads(done.stdout)
    assert {"v0", "v1"} <= set(names)
    assert "198.51.100.0/24" in routes
    words = [problem.split() for problem in found]
    assert sorted(one[1] for one in words if one[0] == "interface") == sorted(names)
    assert sorted(one[2] for one in words if one[1] == "address") == sorted(addresses)
    assert sorted(one[3] for one in words if one[1] == "route") == sorted(routes)


@pytest.mark.parametrize(
    ("data", "number"),
    [
        (b"\x14\0\0\0", errno.EPROTO),
        (struct.pack("=IHHII", 15, 3, 0, 18, 0), errno.EPROTO),
        (struct.pack("=IHHII", 20, 3, 0, 18, 0), errno.EPROTO),
        (struct.pack("=IHHII", 16, 3, 0, 17, 0), errno.EPROTO),
        (struct.pack("=IHHIIi", 20, 2, 0, 18, 0, -errno.EPERM), errno.EPERM),
        (struct.pack("=IHHII", 16, 16, 0x10, 18, 0), errno.EINTR),
        (struct.pack("=IHHII", 16, 3, 0x12, 18, 0), errno.EINTR),
    ],
    ids=["head", "short", "long", "another-answer", "error", "changed", "changed-at-the-end"],
)
def test_an_answer_that_is_not_whole_is_no_answer(data: bytes, number: int) -> None:
    with pytest.raises(OSError, match="netlink") as refused:
        list(messages(data, 18))
    assert refused.value.errno == number


def test_a_namespace_that_is_gone_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        check_empty("/proc/4194305/ns/net")


# Host facts, from files of our own making


@pytest.mark.parametrize(
    ("path", "name", "good", "bad"),
    [
        ("proc/sys/kernel/core_pattern", "core_pattern", "core", "|/usr/lib/handler %p"),
        ("proc/sys/dev/tty/legacy_tiocsti", "legacy_tiocsti", "0", "1"),
        ("proc/sys/fs/protected_symlinks", "protected_symlinks", "1", "0"),
        ("proc/sys/fs/protected_hardlinks", "protected_hardlinks", "1", "0"),
        ("proc/sys/fs/protected_fifos", "protected_fifos", "2", "0"),
        ("proc/sys/fs/protected_regular", "protected_regular", "1", "0"),
        ("proc/sys/kernel/io_uring_disabled", "io_uring_disabled", "2", "0"),
        ("proc/sys/kernel/unprivileged_bpf_disabled", "unprivileged_bpf_disabled", "1", "0"),
        ("sys/kernel/mm/ksm/run", "ksm", "0", "1"),
        ("sys/devices/system/cpu/smt/active", "smt", "0", "1"),
        ("proc/sys/user/max_user_namespaces", "max_user_namespaces", "100", "0"),
        ("proc/sys/kernel/unprivileged_userns_clone", "unprivileged_userns_clone", "1", "0"),
        (
            "proc/sys/kernel/apparmor_restrict_unprivileged_userns",
            "apparmor_restrict_unprivileged_userns",
            "0",
            "1",
        ),
        ("proc/sys/kernel/yama/ptrace_scope", "yama", "1", "0"),
    ],
)
def test_switch_is_judged(tmp_path: Path, path: str, name: str, good: str, bad: str) -> None:
    def fact(value: str) -> host_facts.Fact:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{value}\n")
        return next(fact for fact in host_facts.facts(tmp_path) if fact.name == name)

    assert (fact(good).state, fact(good).value, fact(good).fix) == ("ok", good, "")
    assert fact(bad).state == "attention"
    assert fact(bad).fix


def test_processor_flaws_are_judged(tmp_path: Path) -> None:
    directory = tmp_path / "sys/devices/system/cpu/vulnerabilities"
    directory.mkdir(parents=True)
    (directory / "l1tf").write_text("Not affected\n")

    def state() -> str:
        return next(fact.state for fact in host_facts.facts(tmp_path) if fact.name == "mitigations")

    assert state() == "ok"
    (directory / "retbleed").write_text("Vulnerable\n")
    assert state() == "attention"


@pytest.mark.parametrize(
    ("answer", "value", "state"),
    [
        (False, "off", "ok"),
        (True, "on", "attention"),
        (OSError(errno.EPERM, "AUDIT_GET"), "not known", "unknown"),
        (OSError(errno.ECONNREFUSED, "AUDIT_GET"), "not known", "unknown"),
        (OSError(errno.EPROTONOSUPPORT, "socket"), "not there", "ok"),
    ],
)
def test_audit_is_judged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: bool | OSError, value: str, state: str
) -> None:
    def audit_enabled() -> bool:
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(host_facts, "audit_enabled", audit_enabled)
    (fact,) = (one for one in host_facts.facts(tmp_path) if one.name == "audit")
    assert (fact.value, fact.state, bool(fact.fix)) == (value, state, state == "attention")


def test_audit_is_asked_of_the_kernel() -> None:
    try:
        answer = "on" if host_facts.audit_enabled() else "off"
    except OSError as error:
        answer = errno.errorcode[error.errno or 0]
    assert answer in ("on", "off", "EPERM", "ECONNREFUSED", "EPROTONOSUPPORT")


def test_facts_of_an_empty_host_are_unknown_not_errors(tmp_path: Path) -> None:
    assert {fact.state for fact in host_facts.facts(tmp_path)} <= {"ok", "attention", "unknown"}


@pytest.mark.parametrize(
    ("release", "version"),
    [("6.1.0-18-amd64", (6, 1)), ("6.18-rc1", (6, 18)), ("7.0", (7, 0)), ("odd", (0, 0)), ("", (0, 0))],
)
def test_kernel_version(release: str, version: tuple[int, int]) -> None:
    assert host_facts.kernel_version(release) == version


@pytest.mark.parametrize(
    ("machine", "release", "python", "count"),
    [
        ("x86_64", "6.1.0", (3, 11), 0),
        ("aarch64", "6.1.0", (3, 11), 1),
        ("x86_64", "5.10.0", (3, 11), 1),
        ("x86_64", "6.1.0", (3, 10), 1),
    ],
)
def test_platform_problems(machine: str, release: str, python: tuple[int, int], count: int) -> None:
    assert len(host_facts.platform_problems(machine, release, python)) == count


@pytest.mark.parametrize(
    ("kinds", "mode"),
    [(["cgroup2"], "v2"), (["cgroup"], "v1"), (["cgroup", "cgroup2"], "hybrid"), (["proc"], "none"), ([], "none")],
)
def test_cgroup_mode(kinds: list[str], mode: str) -> None:
    assert host_facts.cgroup_mode("\n".join(f"31 23 0:28 / /x rw - {kind} none rw" for kind in kinds)) == mode


# From answers to walls


def states(mode: doctor.Mode, walls: list[doctor.Wall]) -> dict[str, str]:
    return {wall.name: wall.modes[mode].state for wall in walls}


def test_all_is_in_force_for_root_when_nothing_was_refused() -> None:
    assert set(states("root", doctor.walls("root", ANSWERS, ANSWERS)).values()) == {"in force"}


@pytest.mark.parametrize(
    ("name", "wall"),
    [
        ("namespaces", "namespaces"),
        ("rootfs", "rootfs"),
        ("proc", "proc"),
        ("network", "network"),
        ("cgroups", "cgroup"),
        ("own_ids", "own-uid"),
        ("process_calls", "process-calls"),
        ("privileges", "privileges"),
        ("landlock", "landlock"),
        ("seccomp", "seccomp"),
        ("native", "extension"),
        ("libseccomp", "libseccomp"),
    ],
)
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, None])
def test_a_refusal_is_a_missing_wall_with_a_fix(name: str, wall: str, number: int | None) -> None:
    found = doctor.walls("root", {**ANSWERS, name: refused(number)}, ANSWERS)
    finding = next(one for one in found if one.name == wall).modes["root"]
    assert finding.state == "missing"
    assert finding.fix
    report = doctor.Report("root", found, [])
    assert not report.ok


def test_a_network_that_is_not_empty_is_a_missing_wall() -> None:
    found = doctor.walls(
        "root", {**ANSWERS, "network": {"errno": 0, "step": "", "detail": ["interface eth0"]}}, ANSWERS
    )
    assert states("root", found)["network"] == "missing"


def test_the_words_of_unavailable_are_passed_on() -> None:
    detail = {"unavailable": {"fix": "mount it"}, "text": "no controllers"}
    found = doctor.walls("root", {**ANSWERS, "cgroups": {"errno": 0, "step": "", "detail": detail}}, ANSWERS)
    finding = next(wall for wall in found if wall.name == "cgroup").modes["root"]
    assert finding == doctor.Finding("missing", "no controllers", "mount it")


def test_root_is_told_what_users_are_not_given() -> None:
    detail = {
        "version": "v2",
        "controllers": ["memory", "pids", "cpu"],
        "missing": [],
        "where": "below /sys/fs/cgroup/x",
    }
    users = {"lacking": ["cpu"], "fix": "delegate it"}
    found = doctor.walls(
        "root", {**ANSWERS, "cgroups": {"errno": 0, "step": "", "detail": {**detail, "users": users}}}, ANSWERS
    )
    modes = next(wall for wall in found if wall.name == "cgroup").modes
    assert modes["root"] == doctor.Finding("in force", "v2: memory, pids, cpu, below /sys/fs/cgroup/x")
    for mode in ("rootless", "rootless-one-id"):
        assert (modes[mode].state, modes[mode].fix) == ("missing", "delegate it")
        assert "cannot hand on cpu" in modes[mode].detail


def test_root_sees_what_an_ordinary_user_lacks() -> None:
    found = doctor.walls("root", ANSWERS, {**ANSWERS, "namespaces": refused(errno.EPERM)})
    assert states("root", found)["namespaces"] == "in force"
    assert states("rootless", found)["namespaces"] == "missing"


def test_one_id_is_never_a_uid_of_its_own() -> None:
    assert states("rootless-one-id", doctor.walls("rootless-one-id", ANSWERS, None))["own-uid"] == "missing"


@pytest.mark.parametrize(
    ("uid", "ranges", "helpers", "mode"),
    [
        (0, [], [None, None], "root"),
        (1000, [[100000, 65536]], ["/usr/bin/newuidmap", "/usr/bin/newgidmap"], "rootless"),
        (1000, [[100000, 65536]], ["/usr/bin/newuidmap", None], "rootless-one-id"),
        (1000, [], ["/usr/bin/newuidmap", "/usr/bin/newgidmap"], "rootless-one-id"),
    ],
)
def test_current_mode(uid: int, ranges: list[Any], helpers: list[Any], mode: str) -> None:
    assert doctor.current_mode(uid, ranges, helpers) == mode


def test_a_proof_that_failed_is_not_ok() -> None:
    found = doctor.walls("root", ANSWERS, ANSWERS)
    assert doctor.Report("root", found, []).ok
    assert not doctor.Report("root", found, [], doctor.Proof(ok=False, isolation=None, problem="no")).ok


# The command


@pytest.mark.parametrize("ok", [True, False])
def test_exit_status_follows_the_verdict(monkeypatch: pytest.MonkeyPatch, ok: bool) -> None:
    answers = ANSWERS if ok else {**ANSWERS, "landlock": refused(errno.EOPNOTSUPP)}
    report = doctor.Report(
        "root", doctor.walls("root", answers, ANSWERS), [host_facts.Fact("x", "1\x1b", "ok", "m\x1b")]
    )
    monkeypatch.setattr(doctor, "survey", lambda: report)
    monkeypatch.setattr(doctor, "prove", lambda: doctor.Proof(ok=True, isolation={"uid": 1, "missing": []}))
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.exit_code == (0 if ok else 1), done.output
    assert "\x1b" not in done.output
    assert ("A cell was sealed here" in done.output) is ok
    assert ("lsm=landlock" in done.output) is not ok
    assert json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)["ok"] is ok


@pytest.mark.kernel
def test_doctor_seals_a_cell_and_shows_the_receipt() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sandboxd", "doctor", "--json"],
        capture_output=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    report = json.loads(done.stdout)
    assert report["ok"], [wall for wall in report["walls"] if wall["modes"][report["mode"]]["state"] != "in force"]
    assert done.returncode == 0
    assert report["proof"]["isolation"]["network"]


def own_uid(mode: doctor.Mode, **changed: Any) -> doctor.Finding:
    """What is said of ids in *mode* when the subordinate ids are as *changed*."""
    answers = {**ANSWERS, "subordinate_ids": {**ANSWERS["subordinate_ids"]}}
    answers["subordinate_ids"]["detail"] = {**ANSWERS["subordinate_ids"]["detail"], **changed}
    found = doctor.walls(mode, answers, None if mode != "root" else answers)
    return next(wall for wall in found if wall.name == "own-uid").modes["rootless"]


def test_helpers_without_rights_are_missing() -> None:
    finding = own_uid("rootless", problems=["is neither setuid root nor has file capabilities", ""])
    assert finding.state == "missing"
    assert finding.detail.startswith("newuidmap is neither")
    assert "uidmap" in finding.fix


def test_no_new_privs_makes_helpers_useless_and_capabilities_do_without_them() -> None:
    finding = own_uid("rootless", no_new_privs=True)
    assert finding.state == "missing"
    assert "no_new_privs" in finding.detail
    assert own_uid("rootless", no_new_privs=True, capable=True, helpers=[None, None]).state == "in force"
    assert own_uid("root", no_new_privs=True).state == "unknown"  # it is this process's, not that user's


def test_every_user_may_run_an_engine() -> None:
    for mode in doctor.MODES:
        found = doctor.walls(mode, ANSWERS, ANSWERS if mode == "root" else None)
        assert next(wall for wall in found if wall.name == "engine").modes[mode].state == "in force"


def test_the_switch_behind_a_refusal_is_named_for_ordinary_users_only() -> None:
    switch = ["kernel.apparmor_restrict_unprivileged_userns is 1", "a profile"]
    answers = {
        **ANSWERS,
        "rootfs": refused(errno.EACCES),
        "switches": {"errno": 0, "step": "", "detail": [switch]},
    }
    modes = next(wall for wall in doctor.walls("root", ANSWERS | {"switches": answers["switches"]}, answers)).modes
    assert modes["root"].state == "in force"
    rootfs = next(wall for wall in doctor.walls("rootless", answers, None) if wall.name == "rootfs")
    assert rootfs.modes["rootless"].fix == "a profile"
    assert "apparmor_restrict" in rootfs.modes["rootless"].detail


def test_nothing_of_the_current_directory_is_imported(tmp_path: Path) -> None:
    """Root may be anywhere when it asks, also where others write."""
    for name in ("ctypes", "json", "socket", "struct", "click"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(3)\n")
    command = [sys.executable, "-P", "-m", "sandboxd", "doctor", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert json.loads(done.stdout)["walls"]
    assert not (tmp_path / "ran").exists()
