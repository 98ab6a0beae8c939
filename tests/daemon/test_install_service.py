"""``sandboxd install-service`` on trees that are being prepared, and the texts of units; for real: test_systemd.py."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from sandboxd.cli import cli
from sandboxd.daemon import load_config
from sandboxd.errors import Unavailable
from sandboxd.ids.ranges import IdRange
from sandboxd.install import place, plans, subids, texts
from sandboxd.install.steps import Host

COMMAND = "/usr/bin/sandboxd"
UNITS = "etc/systemd/system"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nodd:x:262144:262144::/:/bin/sh\n")
    (tmp_path / "etc/subuid").write_text("alice:100000:65536")
    (tmp_path / "etc/subgid").write_text("bob:165536:65536\n")
    return tmp_path


def command(tree: Path, *words: str) -> str:
    done = CliRunner().invoke(cli, ["install-service", "--root", str(tree), "--exec", COMMAND, *words])
    assert done.exit_code == 0, done.output
    return done.output


def listing(tree: Path) -> set[str]:
    return {str(path.relative_to(tree)) for path in tree.rglob("*") if not path.is_dir() or path.is_symlink()}


def test_second_time_changes_nothing_and_says_so(tree: Path) -> None:
    before = listing(tree)
    first = command(tree)
    made = listing(tree)
    assert made - before == {
        f"{UNITS}/sandboxd.service",
        f"{UNITS}/sandboxd.socket",
        f"{UNITS}/sockets.target.wants/sandboxd.socket",
        "etc/sysusers.d/sandboxd.conf",
        "etc/tmpfiles.d/sandboxd.conf",
        "etc/sandboxd/sandboxd.toml",
    }
    assert "write /etc/systemd/system/sandboxd.service" in first
    stamps = {name: (tree / name).lstat().st_mtime_ns for name in made}
    assert command(tree) == "Everything is installed already.\n"
    assert {name: (tree / name).lstat().st_mtime_ns for name in made} == stamps


def test_dry_run_shows_the_texts_and_touches_nothing(tree: Path) -> None:
    before = listing(tree)
    said = command(tree, "--dry-run")
    assert listing(tree) == before
    for line in texts.service([COMMAND]).splitlines():
        assert f"    {line}".rstrip() in said.splitlines()
    assert "would give sandboxd 65,536 ids" in said
    command(tree)
    assert "would" not in command(tree, "--dry-run")
    assert "would remove /etc/sandboxd\n" in command(tree, "--uninstall", "--dry-run")


def test_removal_gives_back_the_tree_as_it_was(tree: Path) -> None:
    before = {name: (tree / name).read_text() for name in listing(tree)}
    command(tree)
    command(tree, "--uninstall")
    after = {name: (tree / name).read_text() for name in listing(tree)}
    assert after.pop("etc/subuid") == before.pop("etc/subuid") + "\n"
    assert after == before
    assert command(tree, "--uninstall") == "Nothing to do.\n"


def test_what_was_edited_or_recorded_is_kept_and_named(tree: Path) -> None:
    command(tree)
    (tree / "etc/sandboxd/sandboxd.toml").write_text("max_running = 3\n")
    (tree / "etc/sandboxd/policies/mine.toml").write_text('name = "mine"\n')
    (tree / "var/log/sandboxd").mkdir(parents=True)
    (tree / "var/log/sandboxd/audit.jsonl").write_text("{}\n")
    os.chown(tree / "var/log/sandboxd", 61_005, 61_005)
    os.chown(tree / "var/log/sandboxd/audit.jsonl", 61_005, 61_005)
    assert command(tree) == "Everything is installed already.\n"
    said = command(tree, "--uninstall")
    for kept in ("/etc/sandboxd/sandboxd.toml", "/etc/sandboxd/policies", "/var/log/sandboxd"):
        assert f"kept: {kept}" in said
    assert (tree / "etc/sandboxd/sandboxd.toml").read_text() == "max_running = 3\n"
    # The number of the service's user may go to somebody else.
    assert {(tree / "var/log/sandboxd" / name).stat().st_uid for name in (".", "audit.jsonl")} == {0}


def test_unit_of_somebody_else_is_not_touched(tree: Path) -> None:
    (tree / UNITS).mkdir(parents=True)
    (tree / UNITS / "sandboxd.service").write_text("[Unit]\n")
    done = CliRunner().invoke(cli, ["install-service", "--root", str(tree), "--exec", COMMAND])
    assert done.exit_code == 125
    assert "was not written by sandboxd" in done.output
    assert (tree / UNITS / "sandboxd.service").read_text() == "[Unit]\n"


def test_link_in_the_place_of_a_file_is_not_followed(tree: Path) -> None:
    victim = tree / "victim"
    victim.write_text("mine")
    (tree / "etc/sysusers.d").mkdir()
    (tree / "etc/sysusers.d/sandboxd.conf").symlink_to(victim)
    done = CliRunner().invoke(cli, ["install-service", "--root", str(tree), "--exec", COMMAND])
    assert done.exit_code == 125
    assert "no regular file" in done.output
    assert victim.read_text() == "mine"


def test_older_unit_is_replaced(tree: Path) -> None:
    command(tree)
    CliRunner().invoke(cli, ["install-service", "--root", str(tree), "--exec", "/opt/other/bin/sandboxd"])
    assert "ExecStart=/opt/other/bin/sandboxd serve" in (tree / UNITS / "sandboxd.service").read_text()


def test_package_that_is_there_is_not_hidden(tree: Path) -> None:
    (tree / "usr/lib/systemd/system").mkdir(parents=True)
    (tree / "usr/lib/systemd/system/sandboxd.service").write_text("")
    done = CliRunner().invoke(cli, ["install-service", "--root", str(tree), "--exec", COMMAND])
    assert done.exit_code == 125
    assert "package" in done.output


@pytest.mark.skipif(plans.is_running(), reason="needs a host without systemd (the other way: test_systemd.py)")
def test_host_without_systemd_is_told_so() -> None:
    done = CliRunner().invoke(cli, ["install-service"])
    assert done.exit_code == 125
    assert "not started by systemd" in done.output
    assert "--root DIR" in done.output


def test_exec_is_absolute(tree: Path) -> None:
    assert CliRunner().invoke(cli, ["install-service", "--root", str(tree), "--exec", "sandboxd"]).exit_code == 2


# Subordinate ids


def test_range_overlaps_nothing_and_is_the_same_in_both(tree: Path) -> None:
    command(tree)
    uids, gids = ((tree / "etc" / name).read_text().splitlines() for name in ("subuid", "subgid"))
    assert uids[0] == "alice:100000:65536"
    assert uids[1] == gids[1] == "sandboxd:327680:65536"  # 262144 is a login id
    assert not list((tree / "etc").glob("sub*[.+]*"))  # neither locks nor drafts


def test_free_range_avoids_those_of_systemd_while_it_can() -> None:
    assert subids.free_range([]) == IdRange(100_000, 65_536)
    crowded = [IdRange(100_000, 0x80000 - 100_000 - 1000)]
    found = subids.free_range(crowded)
    assert not any(found.overlaps(area) for area in crowded)
    with pytest.raises(Unavailable):
        subids.free_range([IdRange(0, 0x7000_0000)])


def test_free_range_avoids_ids_of_a_directory_service() -> None:
    assert subids.free_range([], known=lambda first: first < 200_000) == IdRange(262_144, 65_536)
    with pytest.raises(Unavailable):
        subids.free_range([], known=lambda _: True)


STRANGER = "sandboxd:x:61007:61007:a colleague:/var/lib/sandboxd:/bin/sh\n"


def refused(tree: Path, *words: str) -> str:
    done = CliRunner().invoke(cli, ["install-service", "--root", str(tree), "--exec", COMMAND, *words])
    assert done.exit_code == 125, done.output
    return done.output


def test_somebody_else_of_that_name_gets_no_service(tree: Path) -> None:
    with (tree / "etc/passwd").open("a") as file:
        file.write(STRANGER)
    before = listing(tree)
    assert "there is a user sandboxd already" in refused(tree)
    assert "there is a user sandboxd already" in refused(tree, "--packaged")
    assert "would be refused: " in refused(tree, "--dry-run")
    assert listing(tree) == before


def test_removal_leaves_what_belongs_to_somebody_else_of_that_name(tree: Path) -> None:
    command(tree)
    with (tree / "etc/passwd").open("a") as file:
        file.write(STRANGER)
    places = ("var/lib/sandboxd", "var/log/sandboxd", "var/cache/sandboxd", "run/sandboxd")
    for name in places:
        (tree / name).mkdir(parents=True)
        (tree / name / "mine").write_text("mine")
    for name in places[:3]:
        os.chown(tree / name, 61_007, 61_007)
    said = command(tree, "--uninstall")
    assert [(tree / name / "mine").exists() for name in places] == [True, True, True, False]  # the last is root's
    assert (tree / "var/log/sandboxd").stat().st_uid == 61_007
    assert "kept: /var/cache/sandboxd, which is somebody else's" in said
    assert "sandboxd:" in (tree / "etc/subuid").read_text()
    assert not list((tree / UNITS).glob("sandboxd.*"))


def test_removal_wants_nothing_but_the_caller(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that there is no package and no stranger, which an installation wants: units of ours would hide theirs."""
    command(tree)
    (tree / "usr/lib/systemd/system").mkdir(parents=True)
    (tree / "usr/lib/systemd/system/sandboxd.service").write_text("[Unit]\n")
    assert "the package sandboxd has installed the service already" in refused(tree)
    assert "remove /etc/systemd/system/sandboxd.service" in command(tree, "--uninstall")
    monkeypatch.setattr(os, "geteuid", lambda: 61_005)
    assert "installed by root" in refused(tree, "--uninstall")


def test_lock_of_a_living_tool_is_waited_for_and_one_of_a_dead_is_not(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subids, "_LOCK_SECONDS", 0.2)
    lock = tree / "etc/subgid.lock"
    lock.write_text(f"{os.getpid()}\0")
    before = (tree / "etc/subuid").read_text()
    with pytest.raises(Unavailable, match=r"subgid\.lock is held"):
        subids.add(tree / "etc", "sandboxd")
    assert (tree / "etc/subuid").read_text() == before
    assert not (tree / "etc/subuid.lock").exists()
    dead = subprocess.Popen(["true"])
    dead.wait()
    lock.write_text(f"{dead.pid}\0")
    subids.add(tree / "etc", "sandboxd")
    assert not lock.exists()
    assert subids.granted(tree / "etc", "sandboxd")


def test_owner_and_mode_of_the_files_stay(tree: Path) -> None:
    (tree / "etc/subuid").chmod(0o600)
    subids.add(tree / "etc", "sandboxd")
    assert (tree / "etc/subuid").stat().st_mode & 0o777 == 0o600
    subids.remove(tree / "etc", "sandboxd")
    assert (tree / "etc/subuid").read_text() == "alice:100000:65536\n"


# The place of the program


def test_place_that_the_service_cannot_use_is_named(tmp_path: Path) -> None:
    assert "does not see /home" in place.problem("/home/x/venv/bin/sandboxd")
    assert "does not see /root" in place.problem("/root/venv/bin/sandboxd")
    assert place.problem("/usr/bin/env") == ""
    with pytest.raises(Unavailable, match="/opt/sandboxd"):
        place.check("/root/.venv/bin/sandboxd")


def test_place_that_others_may_write_is_refused() -> None:
    where = Path("/opt/sandboxd-test-place")
    where.mkdir(mode=0o755)
    try:
        script = where / "sandboxd"
        script.touch(0o755)
        assert place.problem(str(script)) == ""
        script.chmod(0o775)
        assert "can be written by others" in place.problem(str(script))
        script.chmod(0o700)
        assert "closed to the service's user" in place.problem(str(script))
        script.chmod(0o755)
        where.chmod(0o700)
        assert "closed to the service's user" in place.problem(str(script))
        where.chmod(0o755)
        os.chown(where, 61_005, 0)
        assert "belongs to uid 61005" in place.problem(str(script))
    finally:
        shutil.rmtree(where)


def test_place_behind_a_link_of_somebody_else_is_refused() -> None:
    where = Path("/opt/sandboxd-test-links")
    (where / "real").mkdir(mode=0o755, parents=True)
    try:
        (where / "real" / "sandboxd").touch(0o755)
        (where / "theirs").mkdir(mode=0o755)
        (where / "theirs" / "hop").symlink_to("../real")
        (where / "link").symlink_to(where / "theirs" / "hop")
        assert place.problem(str(where / "link" / "sandboxd")) == ""
        os.chown(where / "theirs", 61_005, 0)
        assert "belongs to uid 61005" in place.problem(str(where / "link" / "sandboxd"))
        (where / "loop").symlink_to("loop")
        assert "symbolic links" in place.problem(str(where / "loop"))
    finally:
        shutil.rmtree(where)


def test_tree_whose_link_leads_out_of_it_is_refused(tmp_path: Path) -> None:
    tree, outside = tmp_path / "tree", tmp_path / "outside"
    (tree / "etc").mkdir(parents=True)
    outside.mkdir()
    (tree / "etc" / "systemd").symlink_to(outside)
    with pytest.raises(Unavailable, match="leads out of"):
        Host(tree).at("/etc/systemd/system/sandboxd.service")


def test_an_account_that_no_installation_made_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    person = pwd.struct_passwd(("sandboxd", "x", 1000, 1000, "Sandy Boxd", "/home/sandboxd", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwnam", lambda _: person)
    with pytest.raises(Unavailable, match="rename it"):
        plans.check_account(Host())


# Texts


def test_exec_line_is_quoted_as_systemd_reads_it() -> None:
    assert texts.exec_line(["/usr/bin/sandboxd", "-m"]) == "/usr/bin/sandboxd -m"
    assert texts.exec_line(['/o p/"x"$%\\']) == '"/o p/\\"x\\"$$%%\\\\"'


def test_configuration_is_valid_also_with_every_line_in_force(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(texts.configuration())
    assert load_config(file) == load_config(None if not Path("/etc/sandboxd/sandboxd.toml").exists() else file)
    settings = [
        line.removeprefix("#") for line in texts.configuration().splitlines() if line.startswith("#") and line[1] != " "
    ]
    (tmp_path / "policies").mkdir()
    file.write_text("\n".join(settings).replace("/etc/sandboxd/policies", str(tmp_path / "policies")))
    config = load_config(file)
    assert config.drain_seconds == 20
    assert config.engine.pool.maximum == 16
    assert config.engine.audit is not None


def test_configuration_of_a_user_names_paths_of_their_own(tmp_path: Path) -> None:
    (tmp_path / 'a"b').mkdir()
    file = tmp_path / "c.toml"
    file.write_text(texts.user_configuration(str(tmp_path / 'a"b'), f"{tmp_path}/audit.jsonl"))
    config = load_config(file)
    assert config.policies_dir == tmp_path / 'a"b'
    assert config.engine.audit is not None
    assert config.engine.audit.path == f"{tmp_path}/audit.jsonl"


def test_user_installation_is_below_their_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    done = CliRunner().invoke(cli, ["install-service", "--user", "--dry-run", "--exec", COMMAND])
    assert done.exit_code == 125, done.output
    assert "would be refused: install: root has the service of the system" in done.output
    paths = [line.split()[2] for line in done.output.splitlines() if line.startswith("would write")]
    assert paths
    assert all(path.startswith(str(tmp_path)) for path in paths)
    assert "NoNewPrivileges=no" in done.output


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("user", [False, True])
def test_units_are_what_systemd_reads(tmp_path: Path, user: bool) -> None:
    words = ["/bin/true"]
    (tmp_path / "sandboxd.service").write_text(texts.user_service(words) if user else texts.service(words))
    (tmp_path / "sandboxd.socket").write_text(texts.user_socket() if user else texts.socket())
    paths = [str(tmp_path / "sandboxd.service"), str(tmp_path / "sandboxd.socket")]
    level = ["--user"] if user else []
    done = subprocess.run(
        ["systemd-analyze", *level, "verify", "--man=no", "--generators=no", *paths],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if "sandboxd" in line]
    assert (done.returncode, said) == (0, []), done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_exposure_stays_below_its_bound(tmp_path: Path) -> None:
    (tmp_path / "sandboxd.service").write_text(texts.service(["/bin/true"]))
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=28", str(tmp_path / "sandboxd.service")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-200:]
