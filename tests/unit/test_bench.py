"""sandboxd bench: its figures are well formed, its failures counted. How fast anything is, is no test's affair."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from sandboxd.bench import facts, plot, report
from sandboxd.bench.commands import time_command
from sandboxd.bench.contest import Contestant, alternate
from sandboxd.bench.load import check, closed_loop
from sandboxd.bench.peers import EXPECTED, Peers, Task
from sandboxd.bench.stats import Failed, Series, percentile, ratio_interval
from sandboxd.bench.warm import WarmProcess, forking_loops
from sandboxd.cli import cli

if TYPE_CHECKING:
    from pathlib import Path

    from sandboxd import Sandbox

SHELL = {"PATH": os.defpath}


# Figures from samples


@pytest.mark.parametrize(
    ("samples", "share", "expected"),
    [([3.0], 0.5, 3.0), ([4.0, 1.0, 3.0, 2.0], 0.5, 2.0), ([1.0, 2.0, 3.0], 0.99, 3.0), ([1.0, 2.0], 0.0, 1.0)],
)
def test_percentile_is_the_nearest_rank(samples: list[float], share: float, expected: float) -> None:
    assert percentile(samples, share) == expected


def test_percentile_of_a_hundred_is_no_rank_too_high() -> None:
    assert percentile([float(i) for i in range(1, 101)], 0.99) == 99.0
    assert percentile([float(i) for i in range(1, 101)], 0.95) == 95.0


def test_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 0.5)


def test_series_without_samples_has_no_figures() -> None:
    series = Series()
    series.failures["timeout"] += 2
    plain = series.plain()
    assert (plain["n"], plain["failures"], plain["p50_ms"], plain["samples_ms"]) == (0, 2, None, [])
    assert math.isnan(series.p(0.5))


def test_ratio_of_sides_that_are_disturbed_together_is_exact() -> None:
    noise = [1.0, 5.0, 2.0, 9.0, 1.5, 3.0]
    ratio = ratio_interval([2 * value for value in noise], noise)
    assert ratio == pytest.approx((2.0, 2.0, 2.0))


def test_ratio_of_equal_sides_holds_one() -> None:
    ratio = ratio_interval([1.0, 1.2, 0.9, 1.1, 1.0, 0.8], [1.1, 0.9, 1.0, 1.2, 0.8, 1.0])
    assert ratio.low <= 1 <= ratio.high
    assert ratio.low <= ratio.estimate <= ratio.high


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0])])
def test_ratio_of_what_cannot_be_compared_is_refused(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match="a ratio wants"):
        ratio_interval(ours, theirs)


def test_busy_time_counts_neither_idle_nor_stolen() -> None:
    found = facts.busy("cpu  100 20 30 4000 500 6 7 80 90 10\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert found == pytest.approx((163 * tick, 4500 * tick, 80 * tick))
    assert facts.busy().since(facts.busy()).busy_seconds <= 0


def test_uss_is_what_is_private() -> None:
    rollup = "55-7f ---p 0 0:0 0 [rollup]\nRss: 90 kB\nPss: 50 kB\nPrivate_Clean: 4 kB\nPrivate_Dirty: 16 kB\n"
    assert facts.uss_bytes(rollup) == (20 << 10, 50 << 10)


@pytest.mark.parametrize(
    ("milliseconds", "words"), [(None, "-"), (0.0346, "0.035"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234")]
)
def test_three_digits_are_shown(milliseconds: float | None, words: str) -> None:
    assert report.shown(milliseconds) == words


# Whose turn it is


def contestant(key: str, seconds: float) -> Contestant:
    """One whose sample takes *seconds*."""

    def sample() -> float:
        time.sleep(seconds)
        return seconds

    return Contestant(key, key, "peer", sample)


def test_everyone_is_measured_once_at_least() -> None:
    rows = [contestant("slow", 0.2), contestant("quick", 0.001)]
    alternate(rows, 0.05)
    assert all(row.series.samples for row in rows)
    assert len(rows[0].series.samples) == 1


def test_slow_ones_take_no_samples_from_the_others() -> None:
    rows = [contestant(f"slow {i}", 0.2) for i in range(3)] + [contestant("quick", 0.001)]
    alternate(rows, 0.4)
    assert [len(row.series.samples) for row in rows[:3]] == [1, 1, 1]
    assert rows[3].spent_seconds >= 0.1


def test_turns_are_shared_by_time() -> None:
    rows = [contestant("slow", 0.02), contestant("quick", 0.002)]
    alternate(rows, 0.5)
    assert len(rows[1].series.samples) > len(rows[0].series.samples)


def test_failure_is_counted_and_never_a_sample(sandbox: Sandbox) -> None:
    codes = iter(["1/0", "1+2", "1+1", "None"])

    def sample() -> float:
        begun = time.perf_counter()
        check(sandbox.run(next(codes)), "2")
        return time.perf_counter() - begun

    row = Contestant("x", "x", "sandboxd", sample)
    said = [row.attempt() for _ in range(4)]
    assert [reason is None for reason in said] == [False, False, True, False]
    assert row.plain()["failures"] == 3
    assert row.plain()["n"] == len(row.plain()["samples_ms"]) == 1
    assert "status error" in (said[0] or "")


def test_closed_loop_counts_what_failed(sandbox: Sandbox) -> None:
    load = closed_loop(lambda: check(sandbox.run("1+1"), "3"), 2, 0.05)
    assert load.series.failed >= 2
    assert load.series.samples == []
    assert load.per_second == 0


# Other programs


def test_command_that_says_the_right_thing_is_timed() -> None:
    assert 0 < time_command(["/bin/sh", "-c", "echo 2"], SHELL, EXPECTED) < 60


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["/bin/sh", "-c", "echo 3"], "exit status 0: 3"),
        (["/bin/sh", "-c", "echo 2; echo no such wall >&2; exit 7"], "exit status 7: no such wall"),
        (["/nowhere/at/all"], "No such file"),
        (["/bin/sh", "-c", "kill -9 $$"], "exit status -9"),
    ],
)
def test_command_that_fails_is_no_sample(command: list[str], words: str) -> None:
    with pytest.raises(Failed, match=words):
        time_command(command, SHELL, EXPECTED)


@pytest.mark.parametrize("script", ["sleep 60", "exec >&- 2>&-; sleep 60"])
def test_command_that_hangs_is_killed_with_its_children(script: str) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(Failed, match="timeout"):
        time_command(["/bin/sh", "-c", script], SHELL, EXPECTED, timeout_seconds=0.1)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_peer_is_measured_only_when_it_runs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, line in (
        ("bwrap", 'while [ "${1#*/bin/python}" = "$1" ]; do shift; done; exec "$@"'),
        ("nsjail", "echo 5"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SANDBOXD_PEERS", str(tmp_path))
    with Peers(Task(sys.executable, (sys.prefix, sys.base_prefix), SHELL, str(tmp_path))) as peers:
        found = {row.key: row for row in peers.find()}
        assert "bwrap" in found
        assert found["bwrap"].series.samples == []  # the first try is not counted
        assert found["bwrap"].attempt() is None
    absent = {row["key"]: row["why"] for row in peers.absent}
    assert absent["nsjail"] == "exit status 0: 5"
    assert absent["firejail"] == "not found on this host"


# The floor


def test_floor_forks_a_warmed_interpreter() -> None:
    with WarmProcess(("json",), "import json; json.dumps([1])") as warm:
        assert warm.fork() > 0
        assert warm.ping() > 0
        assert forking_loops([warm], 0.05) > 0


@pytest.mark.parametrize(("preload", "warmup"), [(("no_such_module",), ""), ((), "1/0"), ((), "raise SystemExit")])
def test_floor_that_cannot_be_warmed_says_why(preload: tuple[str, ...], warmup: str) -> None:
    with pytest.raises(Failed, match=r"did not start: error (ModuleNotFoundError|ZeroDivisionError|SystemExit)"):
        WarmProcess(preload, warmup)


# The command


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One short measurement, as JSON, and its picture."""
    pytest.importorskip("matplotlib")
    picture = tmp_path_factory.mktemp("bench") / "bench.png"
    arguments = ["bench", "--quick", "--seconds", "1.5", "--json", "--no-peers", "--plot", str(picture)]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout), picture


def test_figures_are_well_formed(measured: tuple[dict[str, Any], Path]) -> None:
    found = measured[0]
    rows = {row["key"]: row for row in found["rows"]}
    assert {"sandboxd", "fork", "round-trip", "python", "python-pass"} <= set(rows)
    for row in rows.values():
        assert row["n"] == len(row["samples_ms"]) > 0, row["key"]
        assert row["failures"] == 0, row["reasons"]
        assert 0 < row["least_ms"] <= row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
    assert all(row["per_second"] > 0 for row in found["throughput"])
    assert 0 <= rows["sandboxd"]["warm"] <= rows["sandboxd"]["n"]


def test_figures_say_where_they_come_from(measured: tuple[dict[str, Any], Path]) -> None:
    found = measured[0]
    assert set(found["host"]) >= {
        "kernel",
        "cpu",
        "cpus",
        "load_1min",
        "load_1min_after",
        "mounts",
        "python",
        "sandboxd",
    }
    assert found["policy"]["name"] == "default"
    assert len(found["policy"]["sha256"]) == 64
    assert found["isolation"]["seccomp"]["policy"] == "default"
    assert "user" in found["isolation"]["namespaces"]


def test_ratios_are_over_ours(measured: tuple[dict[str, Any], Path]) -> None:
    found = measured[0]
    medians = {row["key"]: row["p50_ms"] for row in found["rows"]}
    assert report.ratios(found)["python-pass"] == pytest.approx(medians["python-pass"] / medians["sandboxd"], rel=0.01)


def test_picture_is_a_png(measured: tuple[dict[str, Any], Path]) -> None:
    assert measured[1].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_table_has_every_row(measured: tuple[dict[str, Any], Path]) -> None:
    lines = list(report.rows(measured[0]))
    assert len(lines) == len(measured[0]["rows"])
    assert all(len(line) == len(report.HEAD) for line in lines)
    assert lines[0][0].startswith("sandboxd, embedded")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--loud"], "No such option"),
        (["--seconds", "0"], "range"),
        (["--plot", "/nowhere/at/all.png"], "no directory"),
        (["--policy", "no-such-policy"], "no policy named"),
    ],
)
def test_wrong_arguments_exit_2(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(cli, ["bench", *arguments])
    assert done.exit_code == 2
    assert words in done.output


def test_run_that_gives_another_value_is_a_failure(tmp_path: Path) -> None:
    policy = tmp_path / "wrong.toml"
    policy.write_text("[runtime]\nwarmup = 'import builtins; builtins.repr = lambda value: str(3)'\n")
    done = CliRunner().invoke(cli, ["bench", "--quick", "--no-peers", "--json", "--policy", str(policy)])
    assert done.exit_code == 1
    assert "status ok, value '3', expected '2'" in done.output


def test_picture_without_matplotlib_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plot, "available", lambda: False)
    done = CliRunner().invoke(cli, ["bench", "--plot", str(tmp_path / "x.png")])
    assert done.exit_code == 2
    assert "pip install matplotlib" in done.output


def test_other_commands_do_not_import_it() -> None:
    code = "import sys, sandboxd.client.sandbox, sandboxd.cli.run; print([m for m in sys.modules if 'bench' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
