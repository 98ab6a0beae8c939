"""examples/agent_loop.py: the story of the third quarter, told in both forms, ends with a chart."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from sandboxd.tools.code.pictures import _checked
from tests.conftest import EXAMPLES
from tests.docs.test_examples import needs_data, needs_engine

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [needs_data, needs_engine]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the example prints, and the directory that it wrote to. It has no key and may not warn."""
    directory = tmp_path_factory.mktemp("story")
    environment = {name: value for name, value in os.environ.items() if "KEY" not in name}
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / "agent_loop.py", directory / "out"],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout, directory / "out"


@pytest.mark.parametrize("form", ["openai", "anthropic"])
def test_the_first_program_fails_and_the_second_is_right(told: tuple[str, Path], form: str) -> None:
    story = told[0].split(f"--- in the form of {form} ---")[1].split("---")[0]

    first, failed, second, right, end = (
        story.index(text)
        for text in (
            '["amount"]',
            "| KeyError: 'Column not found: amount'",
            "figure.savefig",
            "status: ok, ",
            "after 2 attempts of 3",
        )
    )
    assert first < failed < second < right < end
    assert "attempt 1 of 3 failed; 2 left." in story


def test_both_forms_tell_the_same_story(told: tuple[str, Path]) -> None:
    _, one, other = told[0].split("--- in the form of ")
    differs = ("status:", "- chart.png", "The chart is")  # times, run ids, names
    same = [[line for line in story.splitlines()[1:] if not line.strip().startswith(differs)] for story in (one, other)]

    assert same[0] == same[1]


@pytest.mark.parametrize("form", ["openai", "anthropic"])
def test_the_chart_is_a_picture(told: tuple[str, Path], form: str) -> None:
    assert _checked((told[1] / f"q3-{form}.png").read_bytes()) == "image/png"


def test_what_the_model_says_at_the_end_is_so(told: tuple[str, Path]) -> None:
    difference: Counter[str] = Counter()
    with open(EXAMPLES / "sales.csv", newline="") as file:
        for row in csv.DictReader(file):
            difference[row["month"]] += int(row["revenue"]) - int(row["target"])
    quarter = {month: value for month, value in difference.items() if "2025-07" <= month <= "2025-09"}

    assert {month for month, value in quarter.items() if value < 0} == {"2025-07"}
    assert f"by {-quarter['2025-07']:,} euros" in told[0]
    assert all(str(value) in told[0] for value in quarter.values())
