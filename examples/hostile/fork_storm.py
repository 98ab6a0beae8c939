"""Forks without end, in every child as well, and never gives up.

Answer: pids.max bounds the number at any moment, cpu.max the share of a processor, and the wall clock ends it: status
*timeout* (or *cpu*), limits_hit names pids too. SIGKILL to the pid namespace's first process takes the whole tree at
once, also children that are being born.
"""

from __future__ import annotations

import contextlib
import os

# Outside a sandbox this would do what it says. In every cell, both of these are /workspace.
if (os.getcwd(), os.environ.get("HOME")) != ("/workspace", "/workspace"):
    raise SystemExit(f"for a sandbox only: sandboxd run {__file__}")

while True:
    with contextlib.suppress(OSError):
        os.fork()
