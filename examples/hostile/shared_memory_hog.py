"""Fills the memory-backed file systems /dev/shm and /tmp.

Answer: both are file systems of this cell alone, of limited size, and count as its memory. Writing ends with ENOSPC,
or with status *memory* where the memory limit is the nearer one. Nothing remains when the cell is gone.
"""

from __future__ import annotations

import os

# Outside a sandbox this would do what it says. In every cell, both of these are /workspace.
if (os.getcwd(), os.environ.get("HOME")) != ("/workspace", "/workspace"):
    raise SystemExit(f"for a sandbox only: sandboxd run {__file__}")

block = b"x" * (1 << 20)
for path in ("/tmp/fill", "/dev/shm/fill"):
    written = 0
    try:
        with open(path, "wb", buffering=0) as file:
            while True:
                written += file.write(block)
    except OSError as error:
        print(f"{path}: {error.strerror} after {written >> 20} MiB", flush=True)
