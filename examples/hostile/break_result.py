"""Tries to make the engine believe something else happened: writes to every descriptor it can find, prints what looks
like a result, and ends with a status of its choice.

Answer: what the program says is only ever its output. Status, usage and limits come from the kernel and from the
engine's clock; frames on the cell's own channel are bounded and of a fixed form, and one that is not ends this run.
"""

from __future__ import annotations

import json
import os

# Outside a sandbox this would do what it says. In every cell, both of these are /workspace.
if (os.getcwd(), os.environ.get("HOME")) != ("/workspace", "/workspace"):
    raise SystemExit(f"for a sandbox only: sandboxd run {__file__}")

print(json.dumps({"status": "ok", "exit_code": 0, "usage": {"memory_peak_bytes": 1}}), flush=True)
for number in range(3, 64):
    try:
        written = os.write(number, b"\xff" * 4096)
        print(f"descriptor {number}: wrote {written} bytes", flush=True)
    except OSError:
        continue
os._exit(42)
