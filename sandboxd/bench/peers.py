"""Peers: other ways to a sealed Python that are found on this host, each asked for as much as it offers on one line.

None is asked for less than its documentation suggests for untrusted code, and none gives all that a cell has: ``note``
says what stands around the program. A peer is tried once before it counts; one that does not run here is reported with
its own words, not measured.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from sandboxd.bench.commands import time_command
from sandboxd.bench.contest import Contestant
from sandboxd.bench.stats import Failed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

__all__ = ["EXPECTED", "Peers", "Task", "peers_directory"]

EXPECTED: Final = "2"
ANSWER_SECONDS: Final = 120.0
CLONES: Final = 50


def peers_directory() -> Path:
    """The environment that scripts/peers.sh makes for peers from PyPI."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("SANDBOXD_PEERS") or os.path.join(cache, "sandboxd", "peers"))


@dataclass(frozen=True)
class Task:
    """What each peer does: *python*, whose files are below *trees*, imports *preload* and prints 1 + 1."""

    python: str
    trees: tuple[str, ...]
    environment: dict[str, str]
    scratch: str
    """A directory of the caller's, where libraries keep what they would else make anew each time: HOME and caches."""
    preload: tuple[str, ...] = ()

    @property
    def code(self) -> str:
        """The program."""
        return "".join(f"import {name}\n" for name in self.preload) + "print(1 + 1)"

    @property
    def command(self) -> list[str]:
        """The program, run by the interpreter, without any sandbox."""
        return [self.python, "-I", "-c", self.code]

    def visible(self) -> list[str]:
        """The host's /usr family and the interpreter's own trees: what a sealed Python needs to see."""
        chosen = [path for path in ("/usr", "/bin", "/lib", "/lib64", "/etc") if os.path.exists(path)]
        for tree in self.trees:
            if not any(tree == path or tree.startswith(f"{path}/") for path in chosen):
                chosen.append(tree)
        return chosen


def bwrap(binary: str, task: Task) -> list[str]:
    """bubblewrap: all namespaces, no capabilities, the host's files read-only."""
    walls = "--unshare-all --die-with-parent --new-session --cap-drop ALL --ro-bind / / --dev /dev --proc /proc"
    return [binary, *walls.split(), "--tmpfs", "/tmp", "--bind", task.scratch, task.scratch, *task.command]  # noqa: S108


def firejail(binary: str, task: Task) -> list[str]:
    """firejail without a profile of some application."""
    walls = "--quiet --noprofile --net=none --private-dev --caps.drop=all --nonewprivs --seccomp"
    # A whitelist in /tmp hides the rest of it, as --private-tmp would.
    return [binary, *walls.split(), f"--whitelist={task.scratch}", "--", *task.command]


def nsjail(binary: str, task: Task) -> list[str]:
    """nsjail, one run of a command in all namespaces, the host's files read-only."""
    walls = "--mode o --really_quiet --chroot / --time_limit 60 --keep_env"
    return [binary, *walls.split(), "--bindmount", task.scratch, "--", *task.command]


_COMMANDS: Final[dict[str, tuple[Callable[[str, Task], list[str]], str]]] = {
    "bwrap": (bwrap, "namespaces; no seccomp, no cgroup"),
    "firejail": (firejail, "namespaces, seccomp deny-list; no cgroup"),
    "nsjail": (nsjail, "namespaces; no seccomp, no cgroup"),
}


def bundle(directory: Path, task: Task) -> None:
    """An OCI bundle in *directory*: config.json and an empty root, into which the visible trees are bound."""
    (directory / "rootfs").mkdir()
    mounts: list[dict[str, Any]] = [
        {"destination": path, "source": path, "type": "bind", "options": ["rbind", "ro"]} for path in task.visible()
    ]
    for place, kind in (("/proc", "proc"), ("/dev", "tmpfs"), ("/tmp", "tmpfs")):  # noqa: S108
        mounts.append({"destination": place, "source": kind, "type": kind})
    mounts.append({"destination": task.scratch, "source": task.scratch, "type": "bind", "options": ["rbind", "rw"]})
    sets = ("bounding", "effective", "inheritable", "permitted", "ambient")
    config = {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": task.command,
            "env": [f"{name}={value}" for name, value in task.environment.items()],
            "cwd": "/",
            "capabilities": {name: [] for name in sets},
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": False},
        "mounts": mounts,
        "linux": {"namespaces": [{"type": name} for name in ("pid", "network", "ipc", "uts", "mount")]},
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


class Sandlock:
    """sandlock in a process of its own, under the interpreter it is installed for. One request at a time."""

    def __init__(self, interpreter: str, task: Task) -> None:
        """Raises Failed."""
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(ANSWER_SECONDS)
        with theirs:
            self._process = subprocess.Popen(
                [interpreter, "-I", str(Path(__file__).with_name("_sandlock.py"))],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=task.environment,
            )
        packages = [str(path) for tree in task.trees for path in Path(tree).glob("lib/python3.*/site-packages")]
        config = {
            "python": task.python,
            "code": task.code,
            "expected": EXPECTED,
            "readable": [*task.visible(), "/dev"],
            "preload": list(task.preload),
            "paths": packages,
        }
        try:
            self.ask(json.dumps(config))
        except BaseException:
            self.close()
            raise

    def ask(self, request: str) -> float:
        """Seconds, or Failed with its words."""
        try:
            self._sock.send(request.encode())
            answer = json.loads(self._sock.recv(1 << 12) or b'{"error": "it ended"}')
        except OSError as error:
            raise Failed(str(error)) from error
        if "error" in answer:
            raise Failed(answer["error"])
        return float(answer["seconds"])

    def close(self) -> None:
        """End it."""
        self._sock.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Peers:
    """The peers found here, as contestants. A context manager: it owns bundles and helper processes."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._undo = contextlib.ExitStack()
        self.absent: list[dict[str, str]] = []
        """Those that are not measured, and why."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._undo.close()

    def find(self) -> list[Contestant]:
        """Every peer that gave the right answer once, with nothing counted yet."""
        found: list[Contestant] = []
        for key, ways in self._candidates():
            problem = "not found on this host"
            for contestant in ways:
                try:
                    contestant.sample()
                except (Failed, OSError) as error:
                    problem = str(error)
                else:
                    found.append(contestant)
                    break
            else:
                self.absent.append({"key": key, "why": problem})
        return found

    def _candidates(self) -> Iterator[tuple[str, Sequence[Contestant]]]:
        """Each peer with the ways to ask for it, the best first."""
        for key, (command, note) in _COMMANDS.items():
            binary = shutil.which(key)
            yield (
                key,
                [self._command(key, f"{key}, whole process", note, command(binary, self._task))] if binary else [],
            )
        for key, note in (("crun", "namespaces; no seccomp"), ("runsc", "gVisor: a kernel in user space")):
            binary = shutil.which(key)
            yield key, list(self._containers(key, note, binary)) if binary else []
        interpreter = self._sandlock_interpreter()
        boxes: list[Contestant] = []
        clones: list[Contestant] = []
        if interpreter is not None:
            try:
                box = Sandlock(interpreter, self._task)
            except Failed as error:
                problem = Failed(str(error))
                yield "sandlock", [_broken("sandlock", problem)]
                return
            self._undo.callback(box.close)
            note = "Landlock, seccomp; no namespaces, no cgroup"
            boxes = [Contestant("sandlock", "sandlock, run of a Python", "peer", lambda: box.ask("run"), note)]
            what = f"sandlock, clone of a warm Python, mean of {CLONES}"
            note = "Landlock, seccomp; no request or answer"
            clones = [Contestant("sandlock-clone", what, "peer", lambda: box.ask(f"clones {CLONES}"), note)]
        yield "sandlock", boxes
        yield "sandlock-clone", clones

    def _command(self, key: str, what: str, note: str, command: list[str]) -> Contestant:
        return Contestant(key, what, "peer", lambda: time_command(command, self._task.environment, EXPECTED), note)

    def _containers(self, key: str, note: str, binary: str) -> Iterator[Contestant]:
        place = Path(self._undo.enter_context(tempfile.TemporaryDirectory(prefix=f"sandboxd-bench-{key}-")))
        (place / "bundle").mkdir()
        bundle(place / "bundle", self._task)
        switches = {
            "crun": ["--cgroup-manager=disabled"],
            "runsc": ["--network=none", "--ignore-cgroups"],
        }[key]
        numbers = itertools.count()
        base = [binary, "--root", str(place / "state"), *switches, "run", "--bundle", str(place / "bundle")]

        def plainly() -> float:
            name = f"sandboxd-bench-{os.getpid()}-{next(numbers)}"
            return time_command([*base, name], self._task.environment, EXPECTED)

        yield Contestant(key, f"{key}, whole process", "peer", plainly, note)
        unshare, unified = shutil.which("unshare"), "/sys/fs/cgroup/unified"
        if key == "crun" and unshare is not None and os.path.ismount(unified):

            def hidden() -> float:
                # It refuses a hybrid host whose v2 hierarchy has controllers, so it is not shown one.
                script = f'umount {unified} && exec "$@"'
                name = f"sandboxd-bench-{os.getpid()}-{next(numbers)}"
                command = [unshare, "--mount", "/bin/sh", "-c", script, "sh", *base, name]
                return time_command(command, self._task.environment, EXPECTED)

            yield Contestant(key, "crun, whole process, behind unshare and sh", "peer", hidden, note)

    def _sandlock_interpreter(self) -> str | None:
        for python in (str(peers_directory() / "bin" / "python"), self._task.python):
            if not os.access(python, os.X_OK):
                continue
            look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sandlock') is None)"
            if subprocess.run([python, "-I", "-c", look], stderr=subprocess.DEVNULL, check=False).returncode == 0:
                return python
        return None


def _broken(key: str, problem: Failed) -> Contestant:
    def fail() -> float:
        raise problem

    return Contestant(key, key, "peer", fail)
