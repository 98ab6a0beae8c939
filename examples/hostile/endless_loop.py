"""Never ends.

Answer: the engine's clock. After wall_seconds (30, or --timeout) the cell is killed: status *timeout*, exit status
124.
"""

from __future__ import annotations

import os

# Outside a sandbox this would do what it says. In every cell, both of these are /workspace.
if (os.getcwd(), os.environ.get("HOME")) != ("/workspace", "/workspace"):
    raise SystemExit(f"for a sandbox only: sandboxd run {__file__}")

print("looping", flush=True)
while True:
    pass
