"""Which steps an installation has, in their order, and which its removal."""

from __future__ import annotations

import grp
import os
import pwd
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd.errors import Unavailable
from sandboxd.install import texts
from sandboxd.install.steps import (
    Directory,
    DropDirectory,
    DropFile,
    DropLogs,
    DropSubids,
    DropUser,
    File,
    Link,
    Run,
    Subids,
)
from sandboxd.install.texts import USER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sandboxd.install.steps import Host, Step

__all__ = ["ADMIN", "PACKAGE", "Layout", "files", "install", "install_for_user", "uninstall", "uninstall_for_user"]

_UNITS = ("sandboxd.socket", "sandboxd.service")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where files of a system-wide installation lie."""

    units: str
    sysusers: str
    tmpfiles: str


ADMIN = Layout("/etc/systemd/system", "/etc/sysusers.d/sandboxd.conf", "/etc/tmpfiles.d/sandboxd.conf")
PACKAGE = Layout("/usr/lib/systemd/system", "/usr/lib/sysusers.d/sandboxd.conf", "/usr/lib/tmpfiles.d/sandboxd.conf")
"""Of a package of the distribution's kind."""

CONFIGURATION = "/etc/sandboxd/sandboxd.toml"
POLICIES = "/etc/sandboxd/policies"
LOGS = "/var/log/sandboxd"
_WANTS = "/etc/systemd/system/sockets.target.wants/sandboxd.socket"


def files(layout: Layout, command: Sequence[str]) -> list[Step]:
    """What is written, for units that start *command*."""
    return [
        File(f"{layout.units}/sandboxd.service", texts.service(command)),
        File(f"{layout.units}/sandboxd.socket", texts.socket()),
        File(layout.sysusers, texts.sysusers()),
        File(layout.tmpfiles, texts.tmpfiles()),
        Directory("/etc/sandboxd"),
        Directory(POLICIES),
        File(CONFIGURATION, texts.configuration(), keep=True),
    ]


def install(host: Host, layout: Layout, command: Sequence[str]) -> list[Step]:
    """Everything but ``files``, which a package brings by itself, comes after them."""
    steps = [] if layout is PACKAGE else files(layout, command)
    if not host.live:
        # systemd makes user and directories at that tree's first start.
        return [*steps, Subids(USER), Link(_WANTS, f"{layout.units}/sandboxd.socket")]
    running = is_running()
    steps += [
        Run("systemd-sysusers", layout.sysusers, wanted=lambda _: not _has_user()),
        Subids(USER),
        Run("systemd-tmpfiles", "--create", layout.tmpfiles, wanted=lambda _: running and not _has_directory()),
        Run("systemctl", "daemon-reload", wanted=lambda host: running and (layout is PACKAGE or _units_changed(host))),
        Run("systemctl", "enable", "sandboxd.socket", wanted=lambda host: not _says(host, "is-enabled")),
        Run("systemctl", "try-restart", *_UNITS, wanted=lambda host: running and _stale(host, layout)),
        Run("systemctl", "start", "sandboxd.socket", wanted=lambda host: running and not _says(host, "is-active")),
    ]
    return steps


def uninstall(host: Host, layout: Layout) -> list[Step]:
    """The way back; what was edited, and what was recorded, stays. A package's own files are the package manager's."""
    steps: list[Step] = []
    if host.live and is_running():
        stop = Run("systemctl", "disable", "--now", *_UNITS, wanted=_is_known, may_fail=layout is PACKAGE)
        steps.append(stop)
    if layout is PACKAGE:
        return steps
    if not host.live:
        steps.append(DropFile(_WANTS))
    steps += [DropFile(f"{layout.units}/{unit}") for unit in _UNITS]
    if host.live and is_running():
        steps += [
            Run("systemctl", "daemon-reload", wanted=_units_changed),
            Run("systemctl", "reset-failed", *_UNITS, wanted=_units_changed, may_fail=True),
        ]
    strangers = not _is_ours(host)
    own: list[Step] = [DropDirectory(texts.HOME, whole=True), DropLogs(LOGS), DropSubids(USER)]
    return [
        *steps,
        *(DropDirectory(f"{layout.units}/{unit}.d") for unit in _UNITS),
        DropFile(layout.tmpfiles),
        DropFile(layout.sysusers),
        DropFile(CONFIGURATION, texts.configuration()),
        DropDirectory(POLICIES),
        DropDirectory("/etc/sandboxd"),
        DropDirectory("/run/sandboxd", whole=True, of_root=strangers),
        DropDirectory("/var/cache/sandboxd", whole=True, of_root=strangers),
        *([] if strangers else own),
        DropUser(USER),
    ]


def install_for_user(host: Host, command: Sequence[str]) -> list[Step]:
    """A service of the caller's own manager."""
    config, state = _own_directories()
    audit = f"{state}/sandboxd/audit.jsonl"
    policies = f"{config}/sandboxd/policies"
    steps: list[Step] = [
        File(f"{config}/systemd/user/sandboxd.service", texts.user_service(command)),
        File(f"{config}/systemd/user/sandboxd.socket", texts.user_socket()),
        Directory(f"{config}/sandboxd", 0o700),
        Directory(policies, 0o700),
        File(f"{config}/sandboxd/sandboxd.toml", texts.user_configuration(policies, audit), 0o600, keep=True),
        Directory(f"{state}/sandboxd", 0o700),
    ]
    if host.live:
        steps += [
            Run("systemctl", "--user", "daemon-reload", wanted=_units_changed),
            Run("systemctl", "--user", "enable", "sandboxd.socket", wanted=lambda host: not _says(host, "is-enabled")),
            Run("systemctl", "--user", "try-restart", *_UNITS, wanted=_units_changed),
            Run("systemctl", "--user", "start", "sandboxd.socket", wanted=lambda host: not _says(host, "is-active")),
        ]
    return steps


def uninstall_for_user(host: Host) -> list[Step]:
    """The way back."""
    config, state = _own_directories()
    audit, policies = f"{state}/sandboxd/audit.jsonl", f"{config}/sandboxd/policies"
    steps: list[Step] = []
    if host.live:
        steps.append(Run("systemctl", "--user", "disable", "--now", *_UNITS, wanted=_is_known))
    steps += [DropFile(f"{config}/systemd/user/{unit}") for unit in _UNITS]
    if host.live:
        steps.append(Run("systemctl", "--user", "daemon-reload", wanted=_units_changed))
    return [
        *steps,
        *(DropDirectory(f"{config}/systemd/user/{unit}.d") for unit in _UNITS),
        DropFile(f"{config}/sandboxd/sandboxd.toml", texts.user_configuration(policies, audit)),
        DropDirectory(policies),
        DropDirectory(f"{config}/sandboxd"),
        DropDirectory(f"{state}/sandboxd"),
    ]


def check(host: Host) -> None:
    """Raises Unavailable unless the caller and the host are of the kind that an installation wants."""
    check_caller(host)
    check_account(host)
    if not host.live:
        return
    if not is_running():
        fix = "run sandboxd serve under the supervisor that there is"
        if not host.user:
            fix += ", or prepare a tree with --root DIR"
        raise Unavailable("install", "this host was not started by systemd", fix=fix)
    if host.user and not host.succeeds("systemctl", "--user", "show-environment"):
        fix = f"log in as this user, or as root: loginctl enable-linger {pwd.getpwuid(os.geteuid()).pw_name}"
        raise Unavailable("install", "no systemd of this user's can be reached", fix=fix)


def check_caller(host: Host) -> None:
    """Raises Unavailable unless the caller is the one whose service it is: all that a removal wants."""
    if not host.user and os.geteuid() != 0:
        fix = "run it as root (sudo), or with --user for a service of your own"
        raise Unavailable("install", "the service of the system is installed by root", fix=fix)
    if host.user and os.geteuid() == 0 and host.live:
        raise Unavailable("install", "root has the service of the system", fix="leave out --user")


def check_account(host: Host) -> None:
    """Raises Unavailable when somebody else has the name: that account would get the right to map any id."""
    if not host.user and not _is_ours(host):
        fix = f"rename it, or, if it was made for this: usermod --comment '{texts.GECOS}' {USER}"
        raise Unavailable("install", f"there is a user {USER} already, which no installation made", fix=fix)


def _is_ours(host: Host) -> bool:
    """Whether the service's user is one that an installation made, or not there."""
    if host.live:
        try:
            return pwd.getpwnam(USER).pw_gecos == texts.GECOS
        except KeyError:
            return True
    try:
        rows = [line.split(":") for line in host.at("/etc/passwd").read_text("utf-8", "replace").splitlines()]
    except FileNotFoundError:
        return True
    return all(row[4:5] == [texts.GECOS] for row in rows if row[0] == USER)


def check_alone(host: Host) -> None:
    """Raises Unavailable when a package has installed the service: its units would be hidden by ours."""
    for directory in (PACKAGE.units, "/lib/systemd/system"):
        if not host.user and host.at(f"{directory}/sandboxd.service").exists():
            fix = "use it (systemctl enable --now sandboxd.socket), or remove the package first"
            raise Unavailable("install", "the package sandboxd has installed the service already", fix=fix)


def is_running() -> bool:
    """Whether systemd is this host's init: sd_booted(3)."""
    return Path("/run/systemd/system").is_dir()


def _own_directories() -> tuple[str, str]:
    """Where the caller's configuration and state lie; XDG Base Directory Specification."""
    home = os.path.expanduser("~")
    found = (os.environ.get("XDG_CONFIG_HOME", ""), os.environ.get("XDG_STATE_HOME", ""))
    config, state = (one if one.startswith("/") else "" for one in found)
    return config or f"{home}/.config", state or f"{home}/.local/state"


def _units_changed(host: Host) -> bool:
    return any(path.endswith(_UNITS) for path in host.changed)


def _stale(host: Host, layout: Layout) -> bool:
    """Whether what runs is of before: the units, or a package's code."""
    return layout is PACKAGE or _units_changed(host)


def _says(host: Host, question: str) -> bool:
    return host.succeeds("systemctl", *(["--user"] if host.user else []), question, "--quiet", "sandboxd.socket")


def _is_known(host: Host) -> bool:
    return host.succeeds("systemctl", *(["--user"] if host.user else []), "cat", *_UNITS)


def _has_user() -> bool:
    try:
        pwd.getpwnam(USER)
        grp.getgrnam(USER)
    except KeyError:
        return False
    return True


def _has_directory() -> bool:
    try:
        status = os.lstat("/run/sandboxd")
        return status.st_mode & 0o7777 == 0o750 and (status.st_uid, status.st_gid) == (0, grp.getgrnam(USER).gr_gid)
    except (OSError, KeyError):
        return False
