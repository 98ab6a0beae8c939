"""Run a command as an ordinary user that this host does not have, and leave nothing of it behind. As root:

    python -m tests.support.plain --mode rootless[,no-cgroup] COMMAND ...

The user exists in a mount namespace of the command's own: its /etc/passwd, group, subuid and subgid lie over the host's
there, with subordinate ids or (``rootless-one-id``) without. What the interpreter and the tree need is made reachable
where a directory above them is root's alone. The host's files are not changed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["GID", "NAME", "SUBORDINATE", "UID", "run"]

NAME: Final = "sandboxd-test"
UID: Final = 64001
GID: Final = 64001
SUBORDINATE: Final = (2_000_000, 1 << 20)
TREE: Final = Path(__file__).resolve().parents[2]
_ETC: Final = ("passwd", "group", "subuid", "subgid")


def run(
    command: Sequence[str], mode: str, capabilities: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run *command* as that user and wait. With *capabilities* it runs as systemd starts a service that has them: they
    are ambient, nothing else is in the bounding set, and no_new_privs is on.
    """
    inside = [sys.executable, "-m", "tests.support.plain", "--inside", "--mode", mode]
    inside += [f"--capability={name}" for name in capabilities]
    with tempfile.TemporaryDirectory(prefix="sandboxd-plain-") as place, ExitStack() as stack:
        os.chmod(place, 0o755)  # noqa: S103 (the user has to get there)
        Path(place, "home").mkdir()
        os.chown(Path(place, "home"), UID, GID)
        given = {
            **{name: os.environ[name] for name in ("PATH", "LANG", "CI") if name in os.environ},
            "HOME": f"{place}/home",
            "TMPDIR": f"{place}/home",
            "PYTHONDONTWRITEBYTECODE": "1",
            "SANDBOXD_TEST_MODE": mode,
            "SANDBOXD_TEST_PLACE": place,
            **_bait(stack),
            **(environment or {}),
        }
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", *inside, "--", *command],
            env=given,
            cwd=TREE,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )


def _bait(stack: ExitStack) -> dict[str, str]:
    """What the attack table aims at can be made by root only; it is the user's then."""
    from tests.attacks.bait import bait

    place = stack.enter_context(bait(UID, GID))
    return {"SANDBOXD_TEST_BAIT": str(place)}


def _inside(mode: str, capabilities: Sequence[str], command: Sequence[str]) -> None:
    place = Path(os.environ.pop("SANDBOXD_TEST_PLACE"))
    granted = "" if mode.startswith("rootless-one-id") else f"{NAME}:{SUBORDINATE[0]}:{SUBORDINATE[1]}\n"
    more = {
        "passwd": f"{NAME}:x:{UID}:{GID}::{place}/home:/bin/sh\n",
        "group": f"{NAME}:x:{GID}:\n",
        "subuid": granted,
        "subgid": granted,
    }
    for name in _ETC:
        own, host = place / name, Path("/etc", name)
        text = host.read_text("utf-8") if host.exists() and name in ("passwd", "group") else ""
        own.write_text(text + more[name])
        own.chmod(0o644)
        if not host.exists():
            raise SystemExit(f"{host} is not there: apt-get install passwd")
        _mount("--bind", str(own), str(host))
    _uncover([Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), TREE], place)
    sets = ",".join(["-all", *(f"+{name}" for name in capabilities)])
    confined = [f"--inh-caps={sets}", f"--ambient-caps={sets}", f"--bounding-set={sets}", "--no-new-privs"]
    os.execvp(  # noqa: S606
        "setpriv",
        [
            "setpriv",
            f"--reuid={UID}",
            f"--regid={GID}",
            "--clear-groups",
            *(confined if capabilities else ()),
            *command,
        ],
    )


def _uncover(paths: Sequence[Path], place: Path) -> None:
    """Put an empty directory in the place of each that others may not search, with only *paths* in it."""
    closed: dict[Path, list[Path]] = {}
    for path in dict.fromkeys(paths):
        above = next((one for one in reversed(path.parents) if not one.stat().st_mode & 0o001), None)
        if above is not None:
            closed.setdefault(above, []).append(path)
    for count, (above, below) in enumerate(closed.items()):
        staged: list[tuple[Path, Path]] = []
        for path in below:
            stage = place / f"stage-{count}-{len(staged)}"
            stage.mkdir()
            _mount("--rbind", str(path), str(stage))
            staged.append((stage, path))
        _mount("-t", "tmpfs", "-o", "mode=755", "none", str(above))
        for stage, path in staged:
            path.mkdir(parents=True, exist_ok=True)
            _mount("--rbind", str(stage), str(path))


def _mount(*arguments: str) -> None:
    subprocess.run([shutil.which("mount") or "/bin/mount", *arguments], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", default="rootless,no-cgroup")
    parser.add_argument("--capability", action="append", default=[])
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if given.command[:1] == ["--"]:
        del given.command[0]
    if given.inside:
        _inside(given.mode, given.capability, given.command)
    done = run(given.command, given.mode, given.capability)
    sys.stdout.write(done.stdout)
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
