"""Leaves a daemon behind: a detached grandchild in a session of its own that holds stdout open.

Answer: status *ok*, at once. When the main program ends, everything else in the cell is killed, whatever session it
is in and whatever descriptors it holds.
"""

from __future__ import annotations

import os
import time

# Outside a sandbox this would do what it says. In every cell, both of these are /workspace.
if (os.getcwd(), os.environ.get("HOME")) != ("/workspace", "/workspace"):
    raise SystemExit(f"for a sandbox only: sandboxd run {__file__}")

if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(3600)
        print("still here")
    os._exit(0)
print("the main program ends now", flush=True)
