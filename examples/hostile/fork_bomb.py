"""Forks without end.

Answer: pids.max of the cell's cgroup. fork(2) fails with EAGAIN at the limit of 64 processes and threads, for this
run alone. Status *ok*, since the program ends well; limits_hit names pids. Everything it started dies with it.
"""

from __future__ import annotations

import os
import time

# Outside a sandbox this would do what it says. In every cell, both of these are /workspace.
if (os.getcwd(), os.environ.get("HOME")) != ("/workspace", "/workspace"):
    raise SystemExit(f"for a sandbox only: sandboxd run {__file__}")

children = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(3600)
            os._exit(0)
        children += 1
except OSError as error:
    print(f"stopped after {children} children: {error.strerror}")
