"""Crashes the interpreter: reads from address zero.

Answer: status *killed*, signal 11, exit status 139, as for any program. No core file is written.
"""

from __future__ import annotations

import ctypes
import os

# Outside a sandbox this would do what it says. In every cell, both of these are /workspace.
if (os.getcwd(), os.environ.get("HOME")) != ("/workspace", "/workspace"):
    raise SystemExit(f"for a sandbox only: sandboxd run {__file__}")

print("about to crash", flush=True)
ctypes.string_at(0)
