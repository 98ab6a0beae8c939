"""The table of `tests/mutate` is complete and fits the source as it is now; whether tests notice is for the command."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from sandboxd.engine.cells.active_policy import WALLS
from sandboxd.limits import LIMITS
from tests.support.mutations import MUTATIONS, Mutation, mutated

TREE = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mutation", [pytest.param(one, id=one.name) for one in MUTATIONS])
def test_mutation_changes_the_source_and_keeps_it_valid(mutation: Mutation) -> None:
    changed = mutated(mutation, TREE)
    assert changed
    for path, text in changed.items():
        assert text != path.read_text("utf-8")
        ast.parse(text)
    assert all((TREE / one).exists() for one in mutation.likely if one.startswith("tests/"))


def test_every_wall_and_every_limit_has_a_mutation() -> None:
    names = [one.name for one in MUTATIONS]
    assert len(names) == len(set(names))
    assert {f"wall: {name}" for name in WALLS} | {f"limit: {name}" for name in LIMITS} <= set(names)
