"""The dispatcher (typed tools, code that may call them): not in this version. Importing it says so."""

from __future__ import annotations

raise ImportError("sandboxd.tools comes in a later version of sandboxd", name=__name__)
