"""sandlock, timed in its own interpreter: a script for that, with the standard library and sandlock only.

Descriptor 0 is a seqpacket socket. The first packet is JSON: python, code, expected, readable, preload, paths. Then
"run" is one sandboxed interpreter, "clones N" the mean of N copy-on-write clones of one that imported the preload list.
Each answer is JSON, {"seconds": ...} or {"error": ...}.
"""

from __future__ import annotations

import json
import socket
import sys
import time

TYPE_CHECKING = False  # typing itself would be part of what is measured
if TYPE_CHECKING:
    from typing import Any


def run(sandlock: Any, config: dict[str, Any]) -> float:
    """Seconds of one sandboxed interpreter that runs the code."""
    begun = time.perf_counter()
    box = sandlock.Sandbox(
        fs_readable=config["readable"],
        fs_writable=["/tmp"],  # noqa: S108
        max_memory="512M",
        max_processes=64,
    )
    result = box.run([config["python"], "-I", "-c", config["code"]], timeout=60)
    took = time.perf_counter() - begun
    if not result.success or result.stdout.decode().strip() != config["expected"]:
        raise RuntimeError((result.stderr or b"").decode("utf-8", "replace")[-200:] or f"said {result.stdout!r}")
    return took


def clones(sandlock: Any, config: dict[str, Any], count: int) -> float:
    """Seconds between the starts of two clones, mean of *count* in a row: each prints when its work begins."""

    def prepare() -> None:
        for name in config["preload"]:
            __import__(name)

    def work(_: int) -> None:
        print(eval("1 + 1"), time.monotonic_ns(), flush=True)  # noqa: S307, T201

    box = sandlock.Sandbox(fs_readable=["/"], init_fn=prepare, work_fn=work)
    made = box.fork(count + 1)
    said = box.reduce(["/bin/cat"], made).stdout.decode().split()
    begun = sorted(map(int, said[1::2]))
    if said[::2] != ["2"] * (count + 1) or len(begun) != count + 1:
        raise RuntimeError(f"{len(begun)} of {count + 1} clones answered")
    return (begun[-1] - begun[0]) / count / 1e9


def main() -> None:
    """Serve until the other side is gone."""
    sock = socket.socket(fileno=0)
    config = json.loads(sock.recv(1 << 16))
    sys.path += config["paths"]
    try:
        import sandlock  # type: ignore[import-not-found]
    except Exception as error:
        sock.send(json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}).encode())
        return
    sock.send(json.dumps({"seconds": 0}).encode())
    while request := sock.recv(1 << 12).decode():
        name, _, argument = request.partition(" ")
        try:
            seconds = run(sandlock, config) if name == "run" else clones(sandlock, config, int(argument))
            answer: dict[str, Any] = {"seconds": seconds}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        sock.send(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
