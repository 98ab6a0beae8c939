"""Sends SIGKILL to its parent, to the first process, and to everything it may signal.

Answer: the cell's processes are alone in their pid namespace, so there is no number that means a process of the host.
The first process is shielded by the kernel from signals out of its own namespace, and kill(-1) reaches this run
alone.
"""

from __future__ import annotations

import os
import signal

# Outside a sandbox this would do what it says. In every cell, both of these are /workspace.
if (os.getcwd(), os.environ.get("HOME")) != ("/workspace", "/workspace"):
    raise SystemExit(f"for a sandbox only: sandboxd run {__file__}")

for title, pid in (("parent", os.getppid()), ("first process", 1), ("pid 2", 2)):
    if pid == os.getpid():
        continue
    if pid == 0:  # to kill(2) a group of one's own; as a parent's number it says that the parent cannot be named here
        print(f"{title}: it has no number here")
        continue
    try:
        os.kill(pid, signal.SIGKILL)
        print(f"{title}: no error for {pid}")
    except OSError as error:
        print(f"{title}: {error.strerror}")

print(f"still here as {os.getpid()}, parent {os.getppid()}", flush=True)
try:
    os.kill(-1, signal.SIGKILL)
    print("everything: no error")
except OSError as error:
    print(f"everything: {error.strerror}")
