"""Shared by all tests: engines that live as long as the session, and a look at what is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandboxd import Sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    """An embedded engine with the shipped `default` policy."""
    with Sandbox() as made:
        yield made
