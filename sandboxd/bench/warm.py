"""The floor: what the kernel alone takes to fork, end and reap the same warmed interpreter, without any isolation."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sandboxd._util.closeable import Closing
from sandboxd.bench.stats import Failed

__all__ = ["WarmProcess", "forking_loops", "plain_environment"]

READY_SECONDS = 120.0
ANSWER_SECONDS = 60.0


def plain_environment(scratch: str) -> dict[str, str]:
    """What unsandboxed Pythons get, as cells do: one thread for each mathematical library, caches in *scratch*."""
    threads = ("OMP", "OPENBLAS", "GOTO", "MKL", "BLIS", "VECLIB_MAXIMUM", "NUMEXPR", "NUMBA")
    return {
        "PATH": os.defpath,
        "HOME": scratch,
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        **{("VECLIB_MAXIMUM_THREADS" if name.startswith("VECLIB") else f"{name}_NUM_THREADS"): "1" for name in threads},
        "JE_ARROW_MALLOC_CONF": "background_thread:false",
        "MPLBACKEND": "Agg",
        "MPLCONFIGDIR": scratch,
        "XDG_CACHE_HOME": scratch,
    }


class WarmProcess(Closing):
    """One such interpreter, in a process of its own. A context manager; one request at a time."""

    def __init__(self, preload: tuple[str, ...] = (), warmup: str = "", interpreter: str | None = None) -> None:
        """Start it, and return when it is warm. Raises Failed."""
        self._scratch = tempfile.TemporaryDirectory(prefix="sandboxd-bench-")
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [interpreter or sys.executable, "-I", str(Path(__file__).with_name("_warm.py"))]
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=plain_environment(self._scratch.name),
                cwd=self._scratch.name,
            )
        self._sock.settimeout(READY_SECONDS)
        try:
            self._sock.send(json.dumps({"preload": list(preload), "warmup": warmup}).encode())
            said = self._sock.recv(1 << 12).decode("utf-8", "replace")
            if said != "ready":
                raise Failed(f"the floor's interpreter did not start: {said or 'it ended'}")
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise Failed(f"the floor's interpreter did not start: {error}") from error
            raise
        self._sock.settimeout(ANSWER_SECONDS)

    @property
    def pid(self) -> int:
        """Of the interpreter that forks; what its children used is in its own times once they are reaped."""
        return self._process.pid

    def _ask(self, request: str) -> Any:
        try:
            self._sock.send(request.encode())
            answer = self._sock.recv(1 << 12)
        except OSError as error:
            raise Failed(f"the floor's interpreter: {error}") from error
        if not answer:
            raise Failed("the floor's interpreter ended")
        return json.loads(answer)

    def fork(self) -> float:
        """Seconds of one os.fork + os._exit + wait there, by its own clock. Raises Failed."""
        return float(self._ask("fork"))

    def ping(self) -> float:
        """Seconds of a packet there and back. Raises Failed."""
        begun = time.perf_counter()
        self._ask("ping")
        return time.perf_counter() - begun

    def begin_loop(self, seconds: float) -> None:
        """Have it fork in a loop; ``end_loop`` waits."""
        self._sock.settimeout(seconds + ANSWER_SECONDS)
        self._sock.send(f"loop {seconds}".encode())

    def end_loop(self) -> tuple[int, float]:
        """Forks done by the loop, and its seconds. Raises Failed."""
        try:
            answer = json.loads(self._sock.recv(1 << 12) or b"null")
        except OSError as error:
            raise Failed(f"the floor's loop: {error}") from error
        if answer is None:
            raise Failed("the floor's interpreter ended")
        return int(answer["runs"]), float(answer["seconds"])

    def close(self) -> None:
        """End it; idempotent."""
        self._sock.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._scratch.cleanup()


def forking_loops(processes: list[WarmProcess], seconds: float) -> float:
    """Forks per second of all *processes* at once: the naive floor of throughput. Raises Failed."""
    for process in processes:
        process.begin_loop(seconds)
    return sum(count / took for count, took in [process.end_loop() for process in processes])
