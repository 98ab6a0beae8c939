"""The single actions of an installation. Each knows whether it is still needed, says what it does, and does it.

Run as root (or, for a user's own service, as that user) on paths that they alone may write, below ``Host.root``.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
import stat
import subprocess
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sandboxd.errors import Unavailable
from sandboxd.install import subids
from sandboxd.install.texts import GECOS, MARK

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Directory",
    "DropDirectory",
    "DropFile",
    "DropLogs",
    "DropSubids",
    "DropUser",
    "File",
    "Host",
    "Link",
    "Run",
    "Step",
    "Subids",
]

_COMMAND_SECONDS: Final = 180.0


@dataclass
class Host:
    """Where it is done. *changed* are paths that were written or removed so far, *kept* sentences for the end."""

    root: Path = Path("/")
    user: bool = False
    changed: set[str] = field(default_factory=set)
    kept: list[str] = field(default_factory=list)

    @property
    def live(self) -> bool:
        """Whether it is the running system, not a tree that is being prepared."""
        return self.root == Path("/")

    def at(self, path: str) -> Path:
        """*path* of the host as this process sees it. Raises Unavailable when a link leads out of the tree."""
        found = self.root / path.lstrip("/")
        if not self.live and not found.parent.resolve().is_relative_to(self.root.resolve()):
            fix = "replace the absolute link in it by a relative one"
            raise Unavailable("install", f"{found.parent} leads out of {self.root}", fix=fix)
        return found

    def succeeds(self, *command: str) -> bool:
        """Whether *command* ends with 0; what it says is dropped."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, timeout=_COMMAND_SECONDS, check=False)
            return done.returncode == 0
        return False


class Step(ABC):
    """One action. ``needed`` and ``do`` look at the host as it is when they are called."""

    path = ""
    """What it writes or removes, if it is one thing."""
    text = ""
    """What a file will hold."""

    @abstractmethod
    def __str__(self) -> str: ...

    @abstractmethod
    def needed(self, host: Host) -> bool:
        """Whether ``do`` would change anything. Raises Unavailable when it must not be done."""

    @abstractmethod
    def do(self, host: Host) -> None:
        """Raises OSError, Unavailable."""


class File(Step):
    """A file with *text*. One of others that is in its place is refused, or, with *keep*, left as it is."""

    def __init__(self, path: str, text: str, mode: int = 0o644, keep: bool = False) -> None:
        self.path, self.text, self.mode, self.keep = path, text, mode, keep

    def __str__(self) -> str:
        return f"write {self.path}"

    def needed(self, host: Host) -> bool:
        there = _text_of(host.at(self.path))
        if there is None or there == self.text:
            return there is None
        if self.keep:
            return False
        if not there.startswith(MARK):
            raise Unavailable("install", f"{self.path} is there and was not written by sandboxd", fix="move it away")
        return True

    def do(self, host: Host) -> None:
        target = host.at(self.path)
        target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.new")
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(self.text)
            file.flush()
            os.fchmod(fd, self.mode)
            os.fsync(fd)
        os.rename(draft, target)
        host.changed.add(self.path)


class Directory(Step):
    """A directory of the caller's."""

    def __init__(self, path: str, mode: int = 0o755) -> None:
        self.path, self.mode = path, mode

    def __str__(self) -> str:
        return f"make the directory {self.path} (mode {self.mode:04o})"

    def needed(self, host: Host) -> bool:
        return not host.at(self.path).is_dir()

    def do(self, host: Host) -> None:
        target = host.at(self.path)
        target.mkdir(mode=self.mode, parents=True)
        target.chmod(self.mode)  # whatever the umask is


class Link(Step):
    """A symbolic link: how a unit is enabled in a tree whose systemd does not run."""

    def __init__(self, path: str, target: str) -> None:
        self.path, self.target = path, target

    def __str__(self) -> str:
        return f"link {self.path} to {self.target}"

    def needed(self, host: Host) -> bool:
        return not host.at(self.path).is_symlink()

    def do(self, host: Host) -> None:
        host.at(self.path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        host.at(self.path).symlink_to(self.target)


class Run(Step):
    """A command of the running system, when *wanted* says so."""

    def __init__(self, *command: str, wanted: Callable[[Host], bool], may_fail: bool = False) -> None:
        self.command, self._wanted, self._may_fail = command, wanted, may_fail

    def __str__(self) -> str:
        return f"run {' '.join(self.command)}"

    def needed(self, host: Host) -> bool:
        return self._wanted(host)

    def do(self, host: Host) -> None:
        try:
            done = subprocess.run(
                self.command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_COMMAND_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise Unavailable("install", f"{' '.join(self.command)} did not end", fix="look why it hangs") from error
        except FileNotFoundError as error:
            raise Unavailable(
                "install", f"no {self.command[0]}", errno=error.errno, fix=f"install {self.command[0]}"
            ) from error
        if done.returncode and not self._may_fail:
            said = (done.stderr or done.stdout).decode("utf-8", "replace").strip()[-500:]
            fix = "look at what it says; systemctl status sandboxd.service, journalctl --unit=sandboxd"
            raise Unavailable("install", f"{' '.join(self.command)} ended with {done.returncode}: {said}", fix=fix)


class Subids(Step):
    """Subordinate ids for *user*, who need not be there yet."""

    def __init__(self, user: str) -> None:
        self.user = user

    def __str__(self) -> str:
        return f"give {self.user} {subids.COUNT:,} ids in /etc/subuid and /etc/subgid"

    def needed(self, host: Host) -> bool:
        return not subids.granted(host.at("/etc"), self.user)

    def do(self, host: Host) -> None:
        subids.add(host.at("/etc"), self.user)


# And back


class DropFile(Step):
    """Remove a file of ours; with *unchanged*, only as long as it holds that text. Another one is kept, and named."""

    def __init__(self, path: str, unchanged: str | None = None) -> None:
        self.path, self._unchanged = path, unchanged

    def __str__(self) -> str:
        return f"remove {self.path}"

    def needed(self, host: Host) -> bool:
        target = host.at(self.path)
        if target.is_symlink():
            return self._unchanged is None
        there = _text_of(target)
        if there is None:
            return False
        ours = there.startswith(MARK) if self._unchanged is None else there == self._unchanged
        if not ours:
            host.kept.append(f"{self.path}, which was edited")
        return ours

    def do(self, host: Host) -> None:
        host.at(self.path).unlink()
        host.changed.add(self.path)


class DropDirectory(Step):
    """Remove a directory: with *whole* and all that is in it, otherwise only when it is empty; with *of_root* only when
    it belongs to root. It is kept and named otherwise.
    """

    def __init__(self, path: str, whole: bool = False, of_root: bool = False) -> None:
        self.path, self._whole, self._of_root = path, whole, of_root

    def __str__(self) -> str:
        return f"remove {self.path}{' and what is in it' if self._whole else ''}"

    def needed(self, host: Host) -> bool:
        target = host.at(self.path)
        if target.is_symlink() or not target.is_dir():
            return False
        if self._of_root and target.stat().st_uid != 0:
            host.kept.append(f"{self.path}, which is somebody else's")
            return False
        if not self._whole and any(f"{self.path}/{entry.name}" not in host.changed for entry in target.iterdir()):
            host.kept.append(f"{self.path}, which is not empty")
            return False
        return True

    def do(self, host: Host) -> None:
        if self._whole:
            shutil.rmtree(host.at(self.path))
        else:
            host.at(self.path).rmdir()
        host.changed.add(self.path)


class DropLogs(Step):
    """Logs are kept; they become root's, for the number of the service's user may go to somebody else."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __str__(self) -> str:
        return f"give {self.path} to root, or remove it when it is empty"

    def needed(self, host: Host) -> bool:
        target = host.at(self.path)
        if target.is_symlink() or not target.is_dir():
            return False
        if any(target.iterdir()):
            host.kept.append(f"{self.path}, the audit record (rm -r {self.path})")
            return target.stat().st_uid != 0
        return True

    def do(self, host: Host) -> None:
        target = host.at(self.path)
        if not any(target.iterdir()):
            target.rmdir()
            return
        for path, names, files, fd in os.fwalk(target, topdown=False):
            for name in (*names, *files):
                os.chown(name, 0, 0, dir_fd=fd, follow_symlinks=False)
            if Path(path) == target:
                os.fchown(fd, 0, 0)


class DropSubids(Step):
    """Take the subordinate ids of *user* back."""

    def __init__(self, user: str) -> None:
        self.user = user

    def __str__(self) -> str:
        return f"take the ids of {self.user} out of /etc/subuid and /etc/subgid"

    def needed(self, host: Host) -> bool:
        etc = host.at("/etc")
        lines = [line for name in ("subuid", "subgid") for line in (_text_of(etc / name) or "").splitlines()]
        return any(line.startswith(f"{self.user}:") for line in lines)

    def do(self, host: Host) -> None:
        subids.remove(host.at("/etc"), self.user)


class DropUser(Step):
    """Remove the service's user, and its group, when it is the one that an installation makes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return f"remove the user and the group {self.name}"

    def needed(self, host: Host) -> bool:
        if not host.live:
            return False
        try:
            entry = pwd.getpwnam(self.name)
        except KeyError:
            return False
        if entry.pw_gecos != GECOS:
            host.kept.append(f"the user {self.name}, who was there before")
            return False
        with contextlib.suppress(KeyError):
            members = grp.getgrgid(entry.pw_gid).gr_mem
            if members:
                host.kept.append(f"nothing of the group {self.name}, whose members were {', '.join(members)}")
        return True

    def do(self, host: Host) -> None:
        Run("userdel", self.name, wanted=lambda _: True).do(host)
        with contextlib.suppress(KeyError):
            grp.getgrnam(self.name)
            Run("groupdel", self.name, wanted=lambda _: True).do(host)


def _text_of(path: Path) -> str | None:
    """The text of a regular file; None when there is none. Raises Unavailable when something else is in its place."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise Unavailable("install", f"{path} is there and is no regular file", fix="move it away")
        return path.read_text("utf-8", "replace")
    except FileNotFoundError:
        return None
