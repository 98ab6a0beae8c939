"""``only(condition)``: a test that has no meaning in this mode is not collected, which is no skip."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "only(condition): collect it only when that holds")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if all(mark.args[0] for mark in item.iter_markers("only"))]
