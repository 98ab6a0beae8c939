"""Shared by all tests: engines that live as long as the session, and a look at what is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sandboxd import Sandbox

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    """An embedded engine with the shipped `default` policy."""
    with Sandbox() as made:
        yield made
