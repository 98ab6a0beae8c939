"""Ignores every signal that can be ignored, and sleeps.

Answer: status *timeout*. No signal that a program can catch is used to end a cell: the first process of its pid
namespace gets SIGKILL, and the kernel takes the rest.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

# Outside a sandbox this would do what it says. In every cell, both of these are /workspace.
if (os.getcwd(), os.environ.get("HOME")) != ("/workspace", "/workspace"):
    raise SystemExit(f"for a sandbox only: sandboxd run {__file__}")

for number in signal.valid_signals():
    with contextlib.suppress(OSError, ValueError):  # SIGKILL and SIGSTOP cannot be ignored
        signal.signal(number, signal.SIG_IGN)
print("not listening", flush=True)
while True:
    time.sleep(3600)
