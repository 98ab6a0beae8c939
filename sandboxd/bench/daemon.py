"""A daemon in a process of its own, with one policy, for as long as it is measured."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sandboxd import Sandbox
from sandboxd.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Served", "served"]

START_SECONDS: Final = 180.0
END_SECONDS: Final = 15.0
LOOK_SECONDS: Final = 0.02


class Served:
    """A running ``sandboxd serve``: its address and its process id, which is the engine's."""

    def __init__(self, address: str, pid: int) -> None:
        self.address = address
        self.pid = pid

    def connect(self) -> Sandbox:
        """A handle of this process on it."""
        return Sandbox.connect(self.address)


@contextlib.contextmanager
def served(policy: str, **settings: int | str) -> Iterator[Served]:
    """``sandboxd serve`` with *policy* (a name or a file) as its default, proved and ready. Raises Unavailable."""
    with tempfile.TemporaryDirectory(prefix="sandboxd-bench-") as name:
        home = Path(name)
        values: dict[str, int | str] = {"socket": str(home / "run" / "socket"), **settings}
        values["audit.path"] = str(home / "audit.jsonl")  # on, as everywhere
        with contextlib.suppress(KeyError):  # a group without a name: the daemon's own default then
            values["group"] = grp.getgrgid(os.getegid()).gr_name
        if policy.endswith(".toml") or "/" in policy:
            (home / "policies").mkdir()
            shutil.copy(policy, home / "policies" / Path(policy).name)
            values["policies_dir"], policy = str(home / "policies"), Path(policy).stem
        values["default_policy"] = policy
        config, log = home / "sandboxd.toml", home / "log"
        # A JSON string or number is a TOML one as well.
        config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()), encoding="utf-8")
        command = [sys.executable, "-m", "sandboxd", "serve", "--config", str(config)]
        with log.open("wb") as stderr:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr)
        try:
            deadline = time.monotonic() + START_SECONDS
            while b"ready on" not in log.read_bytes():
                if process.poll() is not None or time.monotonic() > deadline:
                    said = log.read_text("utf-8", "replace").strip().splitlines()[-1:] or ["it said nothing"]
                    raise Unavailable("daemon", said[0], fix="see what `sandboxd serve` says")
                time.sleep(LOOK_SECONDS)
            yield Served(f"unix:{values['socket']}", process.pid)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
