"""Who may write what an engine believes: policies, configuration, profiles, interpreters. Needs root."""

from __future__ import annotations

import errno
import os
import struct
import sys
import warnings
from typing import TYPE_CHECKING, Final

import pytest

from sandboxd import Limits, Sandbox
from sandboxd._util import ownership
from sandboxd.client import admin
from sandboxd.daemon import load_config
from sandboxd.daemon.policy_cache import plain_policy
from sandboxd.errors import PolicyError, SandboxError
from tests.support import daemons, leftovers
from tests.support.daemons import as_user

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

OTHER: Final = 61_005
"""A uid that nobody has."""
BRIEF: Final = 'name = "brief"\n[limits]\nwall_seconds = 10.0\n'

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="giving files to others needs root")


@pytest.fixture
def home() -> Iterator[Path]:
    """As tests and operators have them: a directory of root's own, beneath /tmp, which is sticky."""
    with daemons.directory() as path:
        (path / "policies").mkdir()
        (path / "policies" / "brief.toml").write_text(BRIEF)
        yield path


def given(path: Path) -> None:
    os.chown(path, OTHER, -1, follow_symlinks=False)


def linked(path: Path) -> None:
    """A link of another's leads to it."""
    path.rename(path.with_name("real.toml"))
    path.symlink_to("real.toml")
    given(path)


UNSAFE: Final[list[tuple[str, Callable[[Path], None], str, str]]] = [
    ("group", lambda file: file.chmod(0o664), "it can be written by others (mode 0664)", "chmod go-w {file}"),
    ("world", lambda file: file.chmod(0o646), "it can be written by others (mode 0646)", "chmod go-w {file}"),
    ("owner", given, f"it belongs to uid {OTHER}, not to root", "chown root {file}"),
    (
        "directory",
        lambda file: file.parent.chmod(0o775),
        "{directory} can be written by others (mode 0775)",
        "chmod go-w {directory}",
    ),
    (
        "above",
        lambda file: file.parent.parent.chmod(0o777),
        "{above} can be written by others (mode 0777)",
        "chmod go-w {above}",
    ),
    (
        "directory-owner",
        lambda file: given(file.parent),
        f"{{directory}} belongs to uid {OTHER}, not to root",
        "chown root {directory}, or keep",
    ),
    ("link", linked, f"it belongs to uid {OTHER}, not to root", "chown -h root {file}"),
]
cases = pytest.mark.parametrize(("spoil", "wrong", "fix"), [pytest.param(*rest, id=name) for name, *rest in UNSAFE])


def said(text: str, file: Path) -> str:
    return text.format(file=file, directory=file.parent, above=file.parent.parent)


@cases
def test_daemon_refuses_a_policy_that_others_could_change(
    home: Path, spoil: Callable[[Path], None], wrong: str, fix: str
) -> None:
    file = home / "policies" / "brief.toml"
    assert plain_policy(file, "brief", home / "kept")["limits"]["wall_seconds"] == 10
    spoil(file)
    with pytest.raises(PolicyError) as caught:
        plain_policy(file, "brief", home / "kept")
    assert str(caught.value).startswith(f"{file}: {said(wrong, file)}")
    assert f"Fix: {said(fix, file)}" in str(caught.value)


@cases
def test_daemon_refuses_a_configuration_that_others_could_change(
    home: Path, spoil: Callable[[Path], None], wrong: str, fix: str
) -> None:
    (home / "etc").mkdir()
    file = home / "etc" / "sandboxd.toml"
    file.write_text("max_running = 3\n")
    assert load_config(file).engine.max_running == 3
    spoil(file)
    with pytest.raises(PolicyError) as caught:
        load_config(file)
    assert caught.value.file == str(file)
    assert said(wrong, file) in str(caught.value)
    assert f"Fix: {said(fix, file)}" in str(caught.value)


@pytest.mark.parametrize("mode", [0o775, 0o777, 0o1777], ids=oct)
def test_directory_of_policies_that_others_may_add_to_is_refused(home: Path, mode: int) -> None:
    config, policies = home / "sandboxd.toml", home / "policies"
    config.write_text(f'policies_dir = "{policies}"\n')
    assert load_config(config).policies_dir == policies
    policies.chmod(mode)
    with pytest.raises(PolicyError, match=f"chmod go-w {policies}") as caught:
        load_config(config)
    assert (caught.value.file, caught.value.line, caught.value.key) == (str(config), 1, "policies_dir")
    policies.chmod(0o755)
    given(policies)
    with pytest.raises(PolicyError, match=f"belongs to uid {OTHER}"):
        load_config(config)


def test_files_of_root_are_believed_whatever_may_only_be_read(home: Path) -> None:
    file = home / "policies" / "brief.toml"
    link = home / "link"
    link.symlink_to(home / "policies" / ".." / "policies")
    for mode in (0o400, 0o444, 0o640, 0o755):
        file.chmod(mode)
        os.chown(file, 0, OTHER)
        ownership.check(file)
        ownership.check(link / "brief.toml")


def test_relative_path_is_followed_from_the_working_directory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home / "policies")
    ownership.check("../policies/brief.toml")
    home.chmod(0o733)
    with pytest.raises(PolicyError, match=f"{home} can be written"):
        ownership.check("brief.toml")


def test_user_believes_root_and_themselves(home: Path) -> None:
    mine, theirs, roots = (home / name for name in ("mine", "theirs", "roots"))
    for file in (mine, theirs, roots):
        file.touch(0o644)
    given(mine)
    os.chown(theirs, OTHER + 1, -1)

    def look() -> list[str]:
        said = []
        for file in (mine, roots, theirs):
            try:
                ownership.check(file)
                said.append("")
            except PolicyError as error:
                said.append(error.message)
        return said

    assert as_user(look, OTHER, OTHER) == [
        "",
        "",
        f"it belongs to uid {OTHER + 1}, not to root or uid {OTHER}. Fix: chown root {theirs}.",
    ]


def test_acl_shows_in_the_bits_of_the_group(home: Path) -> None:
    file = home / "policies" / "brief.toml"
    # struct posix_acl_xattr_header and entries: the owner, OTHER, the group, the mask, everybody else
    rights = [(0x01, 6, -1), (0x02, 6, OTHER), (0x04, 4, -1), (0x10, 6, -1), (0x20, 4, -1)]
    try:
        acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *one) for one in rights)
        os.setxattr(file, "system.posix_acl_access", acl)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip("ACLs: this kernel answers EOPNOTSUPP")
    with pytest.raises(PolicyError, match="can be written by others"):
        ownership.check(file)


# What a policy refers to


def test_profile_that_others_could_change_is_refused(home: Path) -> None:
    profile, file = home / "mine.json", home / "policies" / "brief.toml"
    allowed = '{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"], "syscalls": []}'
    profile.write_text(allowed)
    file.write_text(f'{BRIEF}[seccomp]\nprofile = "{profile}"\n')
    assert plain_policy(file, "brief", home / "kept")["seccomp"]["profile"] == str(profile)
    profile.chmod(0o666)
    with pytest.raises(PolicyError, match=f"Fix: chmod go-w {profile}") as caught:
        plain_policy(file, "brief", home / "kept")
    assert (caught.value.file, caught.value.line, caught.value.key) == (str(file), 5, "seccomp.profile")


@pytest.fixture
def environment(home: Path) -> Path:
    """The parts of a virtual environment of the system's Python that count."""
    made = home / "environment"
    packages = made / "lib" / f"python3.{sys.version_info[1]}" / "site-packages"
    packages.mkdir(parents=True)
    (made / "bin").mkdir()
    (made / "bin" / "python").symlink_to(os.path.realpath(sys.executable))
    (home / "base" / "bin").mkdir(parents=True)
    (made / "pyvenv.cfg").write_text(f"home = {home}/base/bin\n")
    return made


@pytest.mark.parametrize(
    "part",
    ["bin/python", "bin", "pyvenv.cfg", "lib/python3.*", "lib/python3.*/site-packages", "../base/bin", "../base"],
)
def test_interpreter_that_others_could_change_is_refused(home: Path, environment: Path, part: str) -> None:
    file = home / "policies" / "brief.toml"
    file.write_text(f'{BRIEF}[runtime]\ninterpreter = "{environment}/bin/python"\n')
    plain_policy(file, "brief", home / "kept")
    (found,) = environment.glob(part)
    given(found.parent.resolve() / found.name)
    with pytest.raises(PolicyError, match=f"belongs to uid {OTHER}") as caught:
        plain_policy(file, "brief", home / "kept")
    assert (caught.value.file, caught.value.line, caught.value.key) == (str(file), 5, "runtime.interpreter")


def test_interpreter_is_not_started_before_it_was_looked_at(home: Path) -> None:
    ran, python = home / "ran", home / "python"
    python.write_text(f"#!/bin/sh\ntouch {ran}\n")
    python.chmod(0o777)
    file = home / "policies" / "default.toml"
    file.write_text(f'name = "default"\n[runtime]\ninterpreter = "{python}"\n')
    refused = daemons.start(home, policies_dir=str(home / "policies"))
    assert refused.process.wait(20) == 2
    assert f"{file}:3: runtime.interpreter: {python} can be written by others" in refused.said()
    assert not ran.exists()


# Daemons


@pytest.mark.parametrize("which", ["policies/default.toml", "sandboxd.toml", "policies"])
def test_daemon_does_not_start_from_what_others_could_change(home: Path, which: str) -> None:
    (home / "policies" / "default.toml").write_text('name = "default"\n')
    daemons.configure(home, policies_dir=str(home / "policies"))
    (home / which).chmod(0o777)
    refused = daemons.start(home, policies_dir=str(home / "policies"))
    assert refused.process.wait(20) == 2
    assert f"Fix: chmod go-w {home / which}" in refused.said()
    assert not refused.path.exists()


@pytest.mark.parametrize("which", ["policies/brief.toml", "policies/other.toml", "sandboxd.toml", "policies"])
def test_reload_refuses_what_others_could_change_and_the_old_stays(home: Path, which: str) -> None:
    (home / "policies" / "other.toml").write_text('name = "other"\n')
    with (
        daemons.served(home, policies_dir=str(home / "policies"), pool=leftovers.UNPARKED) as served,
        served.sandbox(policy="brief") as brief,
    ):
        assert brief.run("print(1)").stdout == "1\n"
        (home / "policies" / "brief.toml").write_text(BRIEF.replace("10.0", "1.0"))
        mode = (home / which).stat().st_mode
        (home / which).chmod(0o777)
        with pytest.raises(SandboxError, match=f"Fix: chmod go-w {home / which}"):
            admin.reload(served.address)
        assert "not reloaded, everything is as before" in served.said()
        assert brief.run("print(2)", limits=Limits(wall_seconds=10.0)).stdout == "2\n"
        (home / which).chmod(mode)
        assert admin.reload(served.address) == ["policy brief: changed"]
        with pytest.raises(PolicyError, match="wall_seconds"):
            brief.run("print(3)", limits=Limits(wall_seconds=10.0))


def test_policy_that_a_client_asks_for_is_refused_as_well(home: Path) -> None:
    (home / "policies" / "late.toml").write_text('name = "late"\n')
    with daemons.served(home, policies_dir=str(home / "policies"), pool=leftovers.UNPARKED) as served:
        (home / "policies" / "late.toml").chmod(0o666)
        with pytest.raises(PolicyError, match="can be written by others"), served.sandbox(policy="late") as late:
            late.run("pass")
        assert served.serves()
        (home / "policies" / "late.toml").chmod(0o644)
        with served.sandbox(policy="late") as late:
            assert late.run("pass").status == "ok"


# Embedded engines


@pytest.mark.parametrize(("spoil", "wrong"), [pytest.param(*row[1:3], id=row[0]) for row in UNSAFE[:3]])
def test_roots_own_engine_refuses_anothers_policy_file(home: Path, spoil: Callable[[Path], None], wrong: str) -> None:
    file = home / "policies" / "brief.toml"
    spoil(file)
    with pytest.raises(PolicyError) as caught:
        Sandbox(file)
    assert str(caught.value).startswith(f"{file}: {wrong}")


def test_roots_own_engine_takes_its_own_file_where_others_have_the_directory(home: Path) -> None:
    file = home / "policies" / "brief.toml"
    given(home / "policies")
    with Sandbox(file, pool=leftovers.UNPARKED) as sandbox:
        assert sandbox.run("pass").status == "ok"


def test_user_is_warned_of_anothers_policy_file(home: Path) -> None:
    def look(file: Path) -> list[str]:
        with warnings.catch_warnings(record=True) as caught, file.open("rb") as stream:
            warnings.simplefilter("always")
            ownership.check_embedded_file(file, stream.fileno())
            return [str(one.message) for one in caught]

    def warned(uid: int, gid: int, mode: int) -> list[str]:
        file = home / "policies" / "brief.toml"
        os.chown(file, uid, gid)
        file.chmod(mode)
        return as_user(lambda: look(file), OTHER, OTHER)

    assert warned(0, 0, 0o644) == warned(OTHER, 0, 0o600) == warned(OTHER, OTHER, 0o664) == []
    assert "belongs to uid 61006" in warned(OTHER + 1, OTHER, 0o644)[0]
    assert "can be written by others (mode 0664)" in warned(OTHER, OTHER + 1, 0o664)[0]
    assert "can be written by others (mode 0666)" in warned(OTHER, OTHER, 0o666)[0]


def test_shipped_policies_are_as_safe_as_the_program(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    from sandboxd.policy import files

    given(home / "policies")
    given(home / "policies" / "brief.toml")
    monkeypatch.setattr(files, "policies_dir", lambda: home / "policies")
    assert files.read(home / "policies" / "brief.toml", ownership.check_daemons_file) == BRIEF
