"""Lets a child take the memory and goes on itself.

Answer: status *memory* here too. The limit is the whole cell's, so a death in any of its processes ends all of them.
"""

from __future__ import annotations

import os

# Outside a sandbox this would do what it says. In every cell, both of these are /workspace.
if (os.getcwd(), os.environ.get("HOME")) != ("/workspace", "/workspace"):
    raise SystemExit(f"for a sandbox only: sandboxd run {__file__}")

child = os.fork()
held = []
while child == 0:
    held.append(bytearray(16 << 20))
os.waitpid(child, 0)
print("the child is gone and this line should not be seen")
while True:
    pass
