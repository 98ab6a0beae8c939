"""``python -m sandboxd`` is the ``sandboxd`` command."""

from __future__ import annotations

from sandboxd.cli import main

if __name__ == "__main__":
    main()
