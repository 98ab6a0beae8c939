"""Prints without end.

Answer: the engine reads at its own pace and keeps the first and the last half of output_bytes (1 MiB). At
output_stop_bytes (8 MiB) the cell is ended: status *output*, exit status 153.
"""

from __future__ import annotations

import os

# Outside a sandbox this would do what it says. In every cell, both of these are /workspace.
if (os.getcwd(), os.environ.get("HOME")) != ("/workspace", "/workspace"):
    raise SystemExit(f"for a sandbox only: sandboxd run {__file__}")

line = "all work and no play makes Jack a dull boy " * 20
while True:
    print(line)
