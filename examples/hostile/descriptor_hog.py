"""Opens descriptors without end.

Answer: RLIMIT_NOFILE, 256 descriptors: EMFILE for this process, with no effect on any other.
"""

from __future__ import annotations

import os

# Outside a sandbox this would do what it says. In every cell, both of these are /workspace.
if (os.getcwd(), os.environ.get("HOME")) != ("/workspace", "/workspace"):
    raise SystemExit(f"for a sandbox only: sandboxd run {__file__}")

opened = []
try:
    while True:
        opened.append(os.open("/dev/null", os.O_RDONLY))
except OSError as error:
    print(f"stopped after {len(opened)} descriptors: {error.strerror}")
