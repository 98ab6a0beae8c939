"""The example programs: the harmless ones also on their own, the hostile ones in a cell only."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
HOSTILE = sorted((EXAMPLES / "hostile").glob("*.py"))
PNG = b"\x89PNG\r\n\x1a\n"

needs_data = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("matplotlib", "pandas")),
    reason="matplotlib and pandas are not installed (the extra: data)",
)
needs_engine = pytest.mark.skipif(
    any(importlib.util.find_spec(f"sandboxd.{name}") is None for name in ("engine", "client")),
    reason="this build has no engine",
)


def on_its_own(program: str, *arguments: str, cwd: Path) -> str:
    """Standard output of a harmless example, run without a sandbox."""
    environment = {**os.environ, "MPLCONFIGDIR": str(cwd / ".matplotlib")}
    return subprocess.run(
        [sys.executable, EXAMPLES / program, *arguments],
        cwd=cwd,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def sandboxd_run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`sandboxd run` as a user types it, from a directory without a copy of the package."""
    command = [sys.executable, "-m", "sandboxd", "run", *(str(argument) for argument in arguments)]
    return subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True, timeout=120)


def result_of(*arguments: str | Path, cwd: Path) -> tuple[dict[str, Any], int]:
    """The Result of a run, and the exit status of the command."""
    done = sandboxd_run("--json", *arguments, cwd=cwd)
    assert done.stdout, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result, done.returncode


@needs_data
def test_sales_report_marks_the_months_below_target_and_draws_a_chart(tmp_path: Path) -> None:
    (tmp_path / "sales.csv").write_bytes((EXAMPLES / "sales.csv").read_bytes())
    table = on_its_own("sales_report.py", cwd=tmp_path)
    assert [line[:3] for line in table.splitlines() if " * " in line] == ["Jan", "Mar", "Jul"]
    assert "3 of 12 months were below target" in table
    assert (tmp_path / "chart.png").read_bytes().startswith(PNG)


def test_sales_data_has_each_region_in_each_month() -> None:
    header, *rows = [line.split(",") for line in (EXAMPLES / "sales.csv").read_text().splitlines()]
    assert header == ["month", "region", "revenue", "target"]
    assert len(rows) == len({(month, region) for month, region, *_ in rows}) == 12 * 4


def test_compound_interest_agrees_with_the_closed_formula(tmp_path: Path) -> None:
    last = on_its_own("compound_interest.py", "1000", "100", "6", "10", cwd=tmp_path).splitlines()[-1].split()
    growth = 1.005**120
    exact = 1000 * growth + 100 * (growth - 1) / 0.005
    assert float(last[3].replace(",", "")) == pytest.approx(exact, abs=0.60)  # rounded to cents 120 times


def test_monte_carlo_comes_near_pi(tmp_path: Path) -> None:
    said = on_its_own("monte_carlo.py", "200000", cwd=tmp_path)
    assert float(said.split()[3]) == pytest.approx(3.14159, abs=0.03)  # eight standard deviations


@pytest.mark.parametrize("program", HOSTILE, ids=lambda path: path.stem)
def test_hostile_program_says_what_it_does_and_refuses_to_run_outside(program: Path) -> None:
    module = ast.parse(program.read_text(encoding="utf-8"))
    assert "\n\nAnswer: " in (ast.get_docstring(module) or "")

    # Judged by its text: to try it outside would be to trust it.
    first = next(node for node in module.body[1:] if not isinstance(node, ast.Import | ast.ImportFrom))
    assert isinstance(first, ast.If)
    assert ast.unparse(first.test) == "(os.getcwd(), os.environ.get('HOME')) != ('/workspace', '/workspace')"
    assert isinstance(first.body[0], ast.Raise)


@needs_data
@needs_engine
def test_sales_report_runs_in_a_cell_and_its_chart_comes_out(tmp_path: Path) -> None:
    done = sandboxd_run(
        *("--policy", "default", "--input", EXAMPLES / "sales.csv", "--output-dir", tmp_path / "out"),
        EXAMPLES / "sales_report.py",
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 of 12 months were below target" in done.stdout
    assert (tmp_path / "out" / "chart.png").read_bytes().startswith(PNG)
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["chart.png"]


@needs_engine
@pytest.mark.parametrize(
    ("program", "arguments", "text"),
    [
        ("compound_interest.py", ["1000", "100", "6", "10"], "balance"),
        ("monte_carlo.py", ["10000"], "pi is about 3."),
    ],
)
def test_example_runs_in_a_cell(program: str, arguments: list[str], text: str, tmp_path: Path) -> None:
    done = sandboxd_run(EXAMPLES / program, "--", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert text in done.stdout


# Program: how it may end, the command's exit status, a limit that must be named, and what it prints.
OUTCOMES: dict[str, tuple[set[str], int, str | None, str]] = {
    "become_root": ({"ok"}, 0, None, "clone3: Function not implemented"),
    "crash": ({"killed"}, 139, None, "about to crash"),
    "descriptor_hog": ({"ok"}, 0, None, "Too many open files"),
    "disk_filler": ({"ok"}, 0, "workspace_files", "small: No space left on device"),
    "endless_loop": ({"timeout"}, 124, "wall_seconds", "looping"),
    "fork_bomb": ({"ok"}, 0, "pids", "Resource temporarily unavailable"),
    "fork_storm": ({"timeout", "cpu"}, 124, "pids", ""),
    "kill_parent": ({"ok"}, 0, None, "still here"),
    "memory_hog": ({"memory"}, 137, "memory_bytes", "16 MiB"),
    "memory_hog_child": ({"memory"}, 137, "memory_bytes", ""),
    "network": ({"ok"}, 0, None, "tcp to loopback: "),
    "outlive": ({"ok"}, 0, None, "the main program ends now"),
    "output_flood": ({"output"}, 153, "output_stop_bytes", "dull boy"),
    "read_host_files": ({"ok"}, 0, None, "/etc/shadow: No such file or directory"),
    "shared_memory_hog": ({"ok"}, 0, "shm_bytes", "/dev/shm/fill: No space left on device"),
    "swallow_sigterm": ({"timeout"}, 124, "wall_seconds", "not listening"),
    "thread_bomb": ({"ok"}, 0, "pids", "can't start new thread"),
}


@needs_engine
@pytest.mark.parametrize("name", OUTCOMES)
def test_hostile_program_is_contained_and_named(name: str, tmp_path: Path) -> None:
    statuses, exit_status, limit, text = OUTCOMES[name]
    seconds = "2" if "timeout" in statuses else "5"
    result, returned = result_of("--timeout", seconds, EXAMPLES / "hostile" / f"{name}.py", cwd=tmp_path)
    assert result["status"] in statuses, result
    assert returned == exit_status
    assert text in result["stdout"]
    assert "it worked" not in result["stdout"]
    assert limit is None or limit in {hit["limit"] for hit in result["limits_hit"]}


@needs_engine
def test_no_program_can_write_its_own_verdict(tmp_path: Path) -> None:
    result, returned = result_of(EXAMPLES / "hostile" / "break_result.py", cwd=tmp_path)
    assert result["status"] != "ok"
    assert returned != 0
    assert result["usage"]["memory_peak_bytes"] != 1


def test_every_hostile_program_has_an_expected_outcome() -> None:
    assert {path.stem for path in HOSTILE} == {*OUTCOMES, "break_result"}
