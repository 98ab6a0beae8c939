"""What does the dispatcher itself cost? `dispatcher.call` of tools that do nothing, beside a plain call of them.

    python benchmarks/dispatch.py [--json] [--calls N]

Tools without a sandbox, in one thread: the whole pipeline and nothing else. With the audit record buffered, as it is
when `audit=PATH` is given; then in variations, which take turns. Code's calls cross a channel besides: see inside.py.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import common
from pydantic import BaseModel

from sandboxd.bench.stats import Series
from sandboxd.tools import Dispatcher, tool

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 50


class Row(BaseModel):
    """One row of a result."""

    region: str
    amount: float


@tool
def empty(quarter: Literal["Q1", "Q2", "Q3", "Q4"], limit: int = 10) -> int:
    """Nothing."""
    return limit


@tool(timeout=60)
def timed(quarter: Literal["Q1", "Q2", "Q3", "Q4"], limit: int = 10) -> int:
    """Nothing, in a thread."""
    return limit


@tool
async def asynchronous(quarter: Literal["Q1", "Q2", "Q3", "Q4"], limit: int = 10) -> int:
    """Nothing, on a loop."""
    return limit


ROWS = [Row(region="north", amount=number) for number in range(100)]


@tool
def rows(quarter: Literal["Q1", "Q2", "Q3", "Q4"]) -> list[Row]:
    """A hundred rows."""
    return ROWS


ARGUMENTS = {"quarter": "Q3", "limit": 5}
QUARTER = {"quarter": "Q3"}


def take(series: Series, call: Callable[[], object], count: int) -> None:
    """*count* more samples."""
    for _ in range(count):
        begun = time.perf_counter()
        call()
        series.samples.append(time.perf_counter() - begun)


async def take_async(series: Series, dispatcher: Dispatcher, count: int) -> None:
    """``take`` of an asynchronous tool, awaited."""
    for _ in range(count):
        begun = time.perf_counter()
        await dispatcher.acall("asynchronous", ARGUMENTS)
        series.samples.append(time.perf_counter() - begun)


def main() -> None:
    """Measure, then print."""
    parser = common.parser(__doc__)
    parser.add_argument("--calls", type=int, default=20_000, metavar="N", help="calls of each kind (default 20000)")
    options = parser.parse_args()
    record = common.Record(options)
    tools = [empty, timed, asynchronous, rows]
    with (
        tempfile.TemporaryDirectory() as directory,
        Dispatcher(tools, audit=Path(directory) / "audit.jsonl") as audited,
        Dispatcher(tools) as bare,
    ):
        calls: dict[str, Callable[[], object]] = {
            "function alone": lambda: empty("Q3", 5),
            "call, audit buffered": lambda: audited.call("empty", ARGUMENTS),
            "call, no audit": lambda: bare.call("empty", ARGUMENTS),
            "call, refused for its arguments": lambda: bare.call("empty", {"quarter": "Q5"}),
            "call, with a timeout (a thread)": lambda: bare.call("timed", ARGUMENTS),
            "call, asynchronous (a loop's thread)": lambda: bare.call("asynchronous", ARGUMENTS),
            "call, a hundred rows": lambda: bare.call("rows", QUARTER),
        }
        assert audited.call("empty", ARGUMENTS).value == bare.call("timed", ARGUMENTS).value == 5
        series = {name: Series() for name in [*calls, "acall, asynchronous"]}
        each = max(1, options.calls // ROUNDS)
        for _ in range(ROUNDS):
            for name, call in calls.items():
                take(Series(), call, max(1, each // 20))
                take(series[name], call, each)
            asyncio.run(take_async(series["acall, asynchronous"], bare, each))
    for name, found in series.items():
        record.series(name, found)
    p50 = series["call, audit buffered"].p(0.5) * 1e6
    record.target("dispatcher.call of an empty typed tool, audit buffered, p50", p50, "most", 30, "us")
    record.done()


if __name__ == "__main__":
    main()
