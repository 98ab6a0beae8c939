"""Takes memory until none is left.

Answer: memory.max of the cell's cgroup, 512 MiB, without swap. The kernel kills the cell, not a neighbour: status
*memory*, exit status 137, with the cgroup's own counters as evidence. What was printed before is kept.
"""

from __future__ import annotations

import os

# Outside a sandbox this would do what it says. In every cell, both of these are /workspace.
if (os.getcwd(), os.environ.get("HOME")) != ("/workspace", "/workspace"):
    raise SystemExit(f"for a sandbox only: sandboxd run {__file__}")

held = []
while True:
    held.append(bytearray(16 << 20))
    print(f"{len(held) * 16} MiB", flush=True)
