"""Is revision B faster than revision A on this machine? Both built from git, measured in turn.

    python benchmarks/ab.py A B [--json] [--rounds N] [--n N] [--policy data] [--clients N]

Each revision becomes a worktree with its native parts built, and an environment of its own: hard links to the packages
of the one that runs this script, sandboxd taken from the worktree. A round asks one, then the other, in alternating
order; the ratio B / A of the rounds' medians has a 95 % bootstrap interval. When that holds 1, nothing was shown.
A revision may be any name git knows; "." is the tree as it stands, uncommitted changes included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import common

from sandboxd.bench.stats import Series, ratio_interval

TREE = Path(__file__).resolve().parent.parent

# Runs in each revision's own environment: the public API only, so that revisions far apart can be compared.
WORKER = """\
import json, sys, threading, time
import sandboxd
from sandboxd import Sandbox
say = lambda value: print(json.dumps(value), flush=True)
def one():
    begun = time.perf_counter()
    result = sandbox.run("1+1")
    took = time.perf_counter() - begun
    if result.status != "ok" or result.results[0].mime["text/plain"] != "2":
        raise SystemExit(f"a run failed: {result!r}")
    return took, result.warm
def client(end, taken):
    while time.perf_counter() < end:
        taken.append(one()[0])
with Sandbox(sys.argv[1]) as sandbox:
    for _ in range(20):
        one()
    say({"file": sandboxd.__file__})
    for line in sys.stdin:
        name, argument = line.split()
        if name == "latency":
            found = []
            for number in range(int(argument)):
                time.sleep(0.005 + 0.015 * (number * 0.618 % 1))
                found.append(one())
            say({"samples": [took for took, _ in found], "warm": sum(warm for _, warm in found)})
        else:
            taken, end = [], time.perf_counter() + 1.0
            threads = [threading.Thread(target=client, args=(end, taken)) for _ in range(int(argument))]
            begun = time.perf_counter()
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            say({"per_second": len(taken) / (time.perf_counter() - begun)})
"""


def home() -> Path:
    """Where worktrees and environments lie: no environment below /tmp can be shown to a cell."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sandboxd"
    cache.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="ab-", dir=cache))


def check_out(revision: str, place: Path, undo: contextlib.ExitStack) -> None:
    """The files of *revision* at *place*: a worktree that *undo* removes, or a copy of the tree for "."."""
    if revision == ".":
        listed = ["git", "-C", str(TREE), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, stdout=subprocess.PIPE, text=True, check=True).stdout.split("\0")
        for name in filter(None, names):
            if (TREE / name).is_file():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(TREE / name, place / name)
        return
    git = ["git", "-C", str(TREE), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(place), revision], check=True)
    undo.callback(subprocess.run, [*git, "remove", "--force", str(place)], check=False)


def environment(place: Path, tree: Path) -> Path:
    """A virtual environment at *place* with our packages as hard links, and sandboxd from *tree*; its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    ours = Path(sysconfig.get_path("purelib"))
    theirs = place / ours.relative_to(sys.prefix)
    shutil.rmtree(theirs)
    shutil.copytree(ours, theirs, copy_function=_link, symlinks=True, ignore=_not_sandboxd)
    (theirs / "sandboxd-ab.pth").write_text(f"{tree}\n", encoding="utf-8")
    return place / "bin" / "python"


def _not_sandboxd(_: str, names: list[str]) -> set[str]:
    return {name for name in names if name.startswith(("sandboxd", "__editable__"))}


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


class Side:
    """One revision, built, with its worker running."""

    def __init__(self, name: str, revision: str, policy: str, where: Path, undo: contextlib.ExitStack) -> None:
        self.name, self.revision = name, revision
        tree = where / name
        tree.mkdir()
        check_out(revision, tree, undo)
        python = environment(where / f"{name}-env", tree)
        build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        subprocess.run(build, cwd=tree, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._process = undo.enter_context(
            subprocess.Popen(
                [str(python), "-c", WORKER, policy], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
            )
        )
        undo.callback(self._end)
        loaded = Path(self._answer()["file"])
        if not loaded.is_relative_to(tree):
            raise SystemExit(f"{revision}: sandboxd came from {loaded}")
        self.samples: list[float] = []
        self.medians: list[float] = []
        self.rates: list[float] = []
        self.warm = 0

    def _end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.revision}: its worker ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, request: str) -> dict[str, Any]:
        """One request of the worker's, and its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{request}\n")
        self._process.stdin.flush()
        return self._answer()

    def round(self, count: int, clients: int) -> None:
        """One latency measurement and one closed loop."""
        found = self.ask(f"latency {count}")
        self.samples += found["samples"]
        self.medians.append(Series(found["samples"]).p(0.5))
        self.warm += found["warm"]
        self.rates.append(self.ask(f"throughput {clients}")["per_second"])


def main() -> None:
    """Measure, then print."""
    parser = common.parser(__doc__)
    parser.add_argument("a", metavar="A", help="a git revision")
    parser.add_argument("b", metavar="B", help="another")
    parser.add_argument("--rounds", type=_positive, default=12, metavar="N", help="of A and B in turn (default 12)")
    parser.add_argument("--n", type=_positive, default=40, metavar="N", help="spaced runs in a round (default 40)")
    parser.add_argument("--clients", type=_positive, default=8, metavar="N", help="of the closed loop (default 8)")
    parser.add_argument("--policy", default="default", help="an installed policy (default default)")
    options = parser.parse_args()
    record = common.Record(options)
    where = home()
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, where, ignore_errors=True)
        sides = [
            Side(name, revision, options.policy, where, undo) for name, revision in (("a", options.a), ("b", options.b))
        ]
        for number in range(options.rounds):
            for side in sides if number % 2 else sides[::-1]:
                side.round(options.n, options.clients)
    for side in sides:
        record.series(f"{side.name.upper()} {side.revision}: run", Series(side.samples), side.warm)
        record.figure(f"{side.name.upper()} {side.revision}: runs", common.mean(side.rates), "per s", rounds=side.rates)
    a, b = sides
    for what, ratio in (
        ("latency, B / A", ratio_interval(b.medians, a.medians)),
        ("throughput, B / A", ratio_interval(b.rates, a.rates)),
    ):
        record.figure(what, ratio.estimate, "times", low=ratio.low, high=ratio.high)
        shown = "nothing was shown" if ratio.low <= 1 <= ratio.high else "a difference"
        record.note(f"{what}: {ratio.estimate:.3f}, 95 % between {ratio.low:.3f} and {ratio.high:.3f}: {shown}")
    record.done()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return number


if __name__ == "__main__":
    main()
