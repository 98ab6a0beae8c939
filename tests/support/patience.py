"""How much longer things may take than on a developer's machine: an emulated processor is slow."""

from __future__ import annotations

import os
from typing import Final

SLOWER: Final = 8 if os.environ.get("SANDBOXD_VM") else 1
"""For bounds that no test is about: how long to wait for what must come, or how long a program has that must end."""
