"""docs/tools.md says what is so: its programs print what stands below them, its tables are those of the code."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

import pytest

from sandboxd.inside.channel import ANSWER_BYTES, CALL_BYTES, OUTSTANDING
from sandboxd.tools import CODES, Budget, Dispatcher, tool
from sandboxd.tools.code.kept import KEPT_RUNS
from sandboxd.tools.code.offer import MOST_FILES
from sandboxd.tools.code.pictures import LOOKED_AT, LOOKED_AT_BYTES, MOST_PICTURES, PICTURE_BYTES, PICTURE_PIXELS
from sandboxd.tools.code.view import STREAM_CHARACTERS
from sandboxd.tools.dispatcher import RESULT_BYTES
from sandboxd.tools.schema.signature import SET_ITEMS, SET_OBJECTS
from tests.conftest import EXAMPLES
from tests.docs.test_readme import agree, blocks, table_rows

if TYPE_CHECKING:
    from pathlib import Path

DOC: Final = EXAMPLES.parent / "docs" / "tools.md"
BLOCKS: Final = blocks(DOC)
PROGRAMS: Final = [
    pytest.param(one, after, id=f"line-{one.line}")
    for one, after in zip(BLOCKS, [*BLOCKS[1:], None], strict=True)
    if one.language == "python"
]


@pytest.mark.parametrize(("block", "after"), PROGRAMS)
def test_program_prints_what_stands_below_it(block: Any, after: Any, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block.text],
        capture_output=True,
        cwd=tmp_path,
        timeout=120,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert after is not None
    assert after.language == "text"
    agree(after.text, done.stdout)


@pytest.mark.parametrize("block", [pytest.param(one, id=f"line-{one.line}") for one in BLOCKS if one.language == "py"])
def test_programs_that_need_a_key_are_python_at_least(block: Any) -> None:
    ast.parse(block.text)


def test_error_codes_are_those_of_the_code() -> None:
    assert tuple(row[0].strip("`") for row in table_rows(DOC, "| code | means")) == CODES


def test_options_of_a_tool_are_those_of_the_code() -> None:
    named = [name for row in table_rows(DOC, "| option | default") for name in re.findall(r"`(\w+)`", row[0])]
    parameters = inspect.signature(tool.__globals__["Tool"].__init__).parameters

    assert set(named) == set(parameters) - {"self", "function", "namespace"}


def test_arguments_of_run_code_are_those_of_its_schema() -> None:
    run_code = Dispatcher().tool("run_code")
    assert run_code is not None

    assert [row[0].strip("`") for row in table_rows(DOC, "| argument | is")] == [
        *run_code.arguments_schema["properties"]
    ]


def test_numbers_are_those_of_the_code() -> None:
    text = " ".join(DOC.read_text("utf-8").split())

    assert f"up to {MOST_FILES} input files" in text
    assert f"first and last {STREAM_CHARACTERS // 2:,} characters" in text
    assert f"among the latest {KEPT_RUNS} " in text
    assert f"at most four, {PICTURE_BYTES >> 20} MiB and {PICTURE_PIXELS:,} pixels a side" in text
    assert MOST_PICTURES == 4
    assert f"{LOOKED_AT} pictures are looked at, and {LOOKED_AT_BYTES >> 20} MiB of them" in text
    assert f"at most {SET_ITEMS:,} items, of models and dataclasses {SET_OBJECTS}:" in text
    assert (
        f"{OUTSTANDING} at a time. Arguments have at most {CALL_BYTES >> 20} MiB, results {ANSWER_BYTES >> 20} MiB"
        in text
    )
    assert f"{RESULT_BYTES['model'] >> 10} KiB for a model, {RESULT_BYTES['code'] >> 20} MiB for code" in text
    assert f"calls_per_run={Budget().calls_per_run}" in text
