"""How long after its start does a daemon answer? From the exec of `sandboxd serve` to the Result of a first run.

    python benchmarks/restart.py [--json] [--starts N] [--policies default,data]

Each start takes turns with the same policy's libraries and warm-up in a plain interpreter, to which the figure stands
as a ratio. The first program is `1+1`, then in a start of its own a small groupby. *all foreseen* is the zygote's word
in the daemon's log: from then on new cells have what the warm-up touches.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

from sandboxd import Policy, Sandbox
from sandboxd.bench.load import check
from sandboxd.bench.stats import Failed, Series
from sandboxd.bench.warm import plain_environment
from sandboxd.errors import SandboxError

POLL_SECONDS = 0.002
PATIENCE_SECONDS = 120.0
FIRST = {
    "1+1": ("1+1", "2"),
    "groupby": (
        "import pandas as pd\n"
        "table = pd.DataFrame({'a': [1, 1, 2], 'b': [1.0, 2.0, 3.0]})\n"
        "len(table.groupby('a')['b'].mean())",
        "2",
    ),
}
TARGETS = {"default": 300.0, "data": 1500.0}
FORESEEN = re.compile(r"known, ([0-9.]+) s after")


def plainly(chosen: Policy, scratch: str) -> float:
    """Seconds of a whole process that imports and warms what *chosen* names, without any isolation. Raises Failed."""
    code = "\n".join([f"import {name}" for name in chosen.runtime.preload]) + f"\n{chosen.runtime.warmup}"
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], env=plain_environment(scratch), capture_output=True, check=False
    )
    if done.returncode:
        raise Failed(done.stderr.decode("utf-8", "replace")[-500:])
    return time.perf_counter() - begun


def restart(name: str, program: str, directory: Path) -> tuple[float, float, float | None]:
    """Seconds from exec to the first Result; those of that run alone; and until all was foreseen, from the zygote's
    birth. Raises Failed, SandboxError.
    """
    path, config, said = directory / "socket", directory / "config.toml", directory / "log"
    config.write_text(
        f'socket = "{path}"\ndefault_policy = "{name}"\n[audit]\npath = "{directory / "audit.jsonl"}"\n', "utf-8"
    )
    source, value = FIRST[program]
    command = [sys.executable, "-m", "sandboxd", "serve", "--config", str(config)]
    with said.open("wb") as log:
        begun = time.perf_counter()
        process = subprocess.Popen(command, stderr=log)
        try:
            while True:
                with contextlib.suppress(SandboxError, OSError):
                    sandbox = Sandbox.connect(f"unix:{path}")
                    break
                if process.poll() is not None or time.perf_counter() - begun > PATIENCE_SECONDS:
                    raise Failed(f"no daemon: {said.read_text('utf-8', 'replace')[-500:]}")
                time.sleep(POLL_SECONDS)
            with sandbox:
                connected = time.perf_counter()
                result = sandbox.run(source)
                ended = time.perf_counter()
                check(result, value)
                found = FORESEEN.search(said.read_text("utf-8", "replace"))
                while found is None and name == "data" and time.perf_counter() - ended < PATIENCE_SECONDS:
                    time.sleep(POLL_SECONDS)
                    found = FORESEEN.search(said.read_text("utf-8", "replace"))
        finally:
            process.terminate()
            process.wait()
    return ended - begun, ended - connected, None if found is None else float(found[1])


def main() -> None:
    """Measure, then print a table or JSON."""
    parser = common.parser(__doc__)
    parser.add_argument("--starts", type=int, default=7, metavar="N", help="of each policy and program (default 7)")
    parser.add_argument("--policies", default="default,data", metavar="A,B", help="policies (default default,data)")
    options = parser.parse_args()
    record = common.Record(options)
    for name in common.pairs(options.policies):
        chosen = common.image(name)
        with tempfile.TemporaryDirectory(prefix="sandboxd-bench-") as scratch:
            floor, foreseen = Series(), Series()
            programs = ["1+1", "groupby"] if "pandas" in chosen.runtime.preload else ["1+1"]
            whole, alone = ({program: Series() for program in programs} for _ in range(2))
            for number in range(options.starts + 1):
                for program in programs:
                    plain = plainly(chosen, scratch)
                    started, first, known = restart(name, program, Path(scratch))
                    if number:  # the first fills the host's caches
                        floor.samples.append(plain)
                        whole[program].samples.append(started)
                        alone[program].samples.append(first)
                        if known is not None:
                            foreseen.samples.append(known)
        record.series(f"{name}: plain interpreter, the same libraries and warm-up", floor)
        for program in programs:
            record.series(f"{name}: exec to the first {program}", whole[program])
            record.series(f"{name}: that run alone", alone[program])
        if foreseen.samples:
            record.series(f"{name}: all foreseen, from the zygote's birth", foreseen)
        median = whole["1+1"].p(0.5)
        record.figure(f"{name}: of the plain interpreter", median / floor.p(0.5), "times")
        if name in TARGETS:
            record.target(f"{name}: restart to first run, p50", median * 1e3, "most", TARGETS[name], "ms")
    record.done()


if __name__ == "__main__":
    main()
