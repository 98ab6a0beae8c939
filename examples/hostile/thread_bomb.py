"""Starts threads without end.

Answer: pids.max counts threads too. The start fails at the limit of 64, which Python reports as RuntimeError;
limits_hit names pids.
"""

from __future__ import annotations

import os
import threading

# Outside a sandbox this would do what it says. In every cell, both of these are /workspace.
if (os.getcwd(), os.environ.get("HOME")) != ("/workspace", "/workspace"):
    raise SystemExit(f"for a sandbox only: sandboxd run {__file__}")

stop = threading.Event()
started = 0
try:
    while True:
        threading.Thread(target=stop.wait, daemon=True).start()
        started += 1
except RuntimeError as error:
    print(f"stopped after {started} threads: {error}")
finally:
    stop.set()
