"""The floor's process: imports and warms what a policy names, then forks on request. No isolation at all.

A script for the policy's own interpreter: the standard library only. Descriptor 0 is a seqpacket socket. The first
packet is JSON, {"preload": [...], "warmup": "..."}. Then each packet is a request, answered by JSON: "ping" by 0,
"fork" by the seconds of one os.fork + os._exit + wait, "loop SECONDS" by how many of them fitted.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import time

TYPE_CHECKING = False  # typing itself would be part of what is measured
if TYPE_CHECKING:
    from typing import Any


def one() -> float:
    """Seconds of one fork, exit and wait. Raises OSError, RuntimeError."""
    begun = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    took = time.perf_counter() - begun
    if status:
        raise RuntimeError(f"wait status {status}")
    return took


def prepare(config: dict[str, Any]) -> None:
    """As the zygote does: import, warm up, collect, and keep the collector off what all children share."""
    for name in config["preload"]:
        __import__(name)
    warmup = config["warmup"]
    if warmup:
        exec(compile(warmup, "<warmup>", "exec"), {"__name__": "__warmup__"})  # noqa: S102 - the operator's own text
    fonts = sys.modules.get("matplotlib.font_manager")
    if fonts is not None:
        fonts._get_font.cache_clear()  # else a hook of theirs costs each child a millisecond
    gc.collect()
    gc.freeze()


def main() -> None:
    """Serve until the other side is gone."""
    sock = socket.socket(fileno=0)
    try:
        prepare(json.loads(sock.recv(1 << 18)))
    except BaseException as error:
        sock.send(f"error {type(error).__name__}: {error}"[:2000].encode())
        return
    sock.send(b"ready")
    while request := sock.recv(1 << 12).decode():
        name, _, argument = request.partition(" ")
        if name == "ping":
            sock.send(b"0")
        elif name == "fork":
            sock.send(repr(one()).encode())
        elif name == "loop":
            begun = time.perf_counter()
            end, count = begun + float(argument), 0
            while time.perf_counter() < end:
                one()
                count += 1
            sock.send(json.dumps({"runs": count, "seconds": time.perf_counter() - begun}).encode())


if __name__ == "__main__":
    main()
