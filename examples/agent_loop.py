"""A model answers a question about sales with two typed tools and a program of its own. No network, no key needed.

The question is which months of the third quarter missed their target. The model may call query_database and
get_targets; both are plain functions of this program, whose arguments are checked. It may also run a program, which is
contained: it can reach nothing but those same two functions. The first program has a bug; the error goes back, and the
second one is right.

The model is a script here, so that the story is the same every time. It is told twice: in the messages of OpenAI's
interface and in those of Anthropic's. docs/tools.md has the same loop with a real one.

    python examples/agent_loop.py [DIRECTORY]           # the chart is written there; out/ if none is named
"""

from __future__ import annotations

import csv
import json
import sqlite3
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sandboxd import Sandbox
from sandboxd.tools import Attempts, Dispatcher, Review, tool

if TYPE_CHECKING:
    from collections.abc import Iterator

Quarter = Literal["Q1", "Q2", "Q3", "Q4"]
Form = Literal["openai", "anthropic"]
Message = dict[str, Any]

QUESTION = "Which months of the third quarter missed their target, and by how much? Draw it."


# The tools. The database stays in this process: the model and its program see rows, never SQL.

DATABASE = sqlite3.connect(":memory:", check_same_thread=False)
DATABASE_LOCK = threading.Lock()  # calls of a program come from threads


def load_database() -> None:
    """Fill the table ``sales`` from sales.csv, which lies beside this file."""
    with open(Path(__file__).with_name("sales.csv"), newline="") as file:
        rows = [(row["month"], row["region"], int(row["revenue"]), int(row["target"])) for row in csv.DictReader(file)]
    DATABASE.execute("CREATE TABLE sales (month TEXT, region TEXT, revenue INTEGER, target INTEGER)")
    DATABASE.executemany("INSERT INTO sales VALUES (?, ?, ?, ?)", rows)


def select(query: str, quarter: Quarter) -> list[dict[str, Any]]:
    """The rows of *query*, which has the first and the last month of *quarter* as its two parameters."""
    last = 3 * int(quarter[1])
    with DATABASE_LOCK:
        found = DATABASE.execute(query, (f"2025-{last - 2:02}", f"2025-{last:02}"))
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found]


@tool(rate="10/s", read_only=True)
def query_database(
    quarter: Quarter, columns: list[Literal["month", "region", "revenue"]]
) -> list[dict[str, str | int]]:
    """Sales of 2025: one row for each month and region of a quarter.

    Args:
        quarter: The quarter of the year.
        columns: What each row is to hold. Months look like 2025-07, revenue is in euros.
    """
    chosen = ", ".join(dict.fromkeys(columns)) or "month"  # nothing but names that were checked
    return select(f"SELECT {chosen} FROM sales WHERE month BETWEEN ? AND ? ORDER BY month, region", quarter)  # noqa: S608


@tool(rate="10/s", read_only=True)
def get_targets(quarter: Quarter) -> list[dict[str, str | int]]:
    """The sales target of each month of a quarter, all regions together: month and target, in euros.

    Args:
        quarter: The quarter of the year.
    """
    return select("SELECT month, SUM(target) AS target FROM sales WHERE month BETWEEN ? AND ? GROUP BY month", quarter)


def chart_is_there(made: Review) -> str | None:
    """What a program made is looked at before the model goes on: an answer without a chart is none."""
    return None if made.pictures else "There is no chart. Save it as chart.png in the working directory."


# The model: what it says, turn by turn. The first program asks for a column that is not there.

FIRST_PROGRAM = """\
import pandas as pd

sales = pd.DataFrame(tools.query_database(quarter="Q3", columns=["month", "revenue"]))
print(sales.groupby("month")["amount"].sum())
"""

SECOND_PROGRAM = """\
import matplotlib.pyplot as plt
import pandas as pd

sales = pd.DataFrame(tools.query_database(quarter="Q3", columns=["month", "revenue"]))
targets = pd.DataFrame(tools.get_targets(quarter="Q3")).set_index("month")
months = sales.groupby("month")[["revenue"]].sum().join(targets)
months["difference"] = months["revenue"] - months["target"]
print(months.to_string())

missed = months["difference"] < 0
figure, axes = plt.subplots(figsize=(7, 4))
axes.bar(months.index, months["revenue"], color=["#d1495b" if one else "#8fb8de" for one in missed])
axes.plot(months.index, months["target"], "o-", color="#22313f", label="target")
for month, row in months[missed].iterrows():
    axes.annotate(f"{row['difference']:,.0f}", (month, row["target"]), (0, 8), textcoords="offset points", ha="center")
axes.set_title("Q3 2025: missed in " + ", ".join(months.index[missed]))
axes.set_ylim(0, months.to_numpy().max() * 1.2)
axes.legend()
figure.savefig("chart.png", dpi=120)
"""

TURNS: list[tuple[str, list[tuple[str, dict[str, Any]]]]] = [
    (
        "I look at the targets and add up the revenue.",
        [("get_targets", {"quarter": "Q3"}), ("run_code", {"code": FIRST_PROGRAM})],
    ),
    ("The column is called revenue. I mend that, and draw the chart.", [("run_code", {"code": SECOND_PROGRAM})]),
    ("July missed its target, by 16,200 euros. August and September were above theirs.", []),
]


def scripted_model(form: Form) -> Iterator[Message]:
    """The messages that a model would send, in the form of one of the two interfaces."""
    for turn, (text, calls) in enumerate(TURNS):
        ids = [f"call_{turn}_{number}" for number in range(len(calls))]
        if form == "openai":
            functions = [{"name": name, "arguments": json.dumps(arguments)} for name, arguments in calls]
            asked = [{"id": id, "type": "function", "function": one} for id, one in zip(ids, functions, strict=True)]
            yield {"role": "assistant", "content": text, **({"tool_calls": asked} if asked else {})}
        else:
            used = [
                {"type": "tool_use", "id": id, "name": name, "input": arguments}
                for id, (name, arguments) in zip(ids, calls, strict=True)
            ]
            yield {"role": "assistant", "content": [{"type": "text", "text": text}, *used]}


# The loop


def tell_story(form: Form, dispatcher: Dispatcher, directory: Path) -> None:
    """Let the model work until a program did what it should, print what happens, and save the chart."""
    print(f"--- in the form of {form} ---\n\nuser: {QUESTION}\n")
    model = scripted_model(form)
    history: list[Message] = [{"role": "user", "content": QUESTION}]
    attempts = Attempts(max=3)
    turns = iter(TURNS)
    while attempts:
        message = next(model)  # of a real one: model(history, tools=dispatcher.schemas(form))
        replies = dispatcher.handle(message, attempts=attempts)
        history += [message, *replies]
        narrate(*next(turns), replies)
    history.append(next(model))  # its last words, now that it has seen the result
    print(f"model: {TURNS[-1][0]}\n")
    if attempts.succeeded and attempts.last:
        (chart,) = attempts.last.value["files"]
        path = directory / f"q3-{form}.png"
        path.write_bytes(dispatcher.file(chart["id"]))
        print(f"The chart is in {path}, after {attempts.used} attempts of {attempts.max}.\n")


def narrate(text: str, calls: list[tuple[str, dict[str, Any]]], replies: list[Message]) -> None:
    """One turn: what the model said and called, and what it was told."""
    print(f"model: {text}\n")
    for (name, arguments), told in zip(calls, texts_of(replies), strict=True):
        shown = arguments.get("code") or ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        print(f"{name}:\n{indented(shown)}\n  answer:\n{indented(told)}\n")


def texts_of(replies: list[Message]) -> list[str]:
    """The text of each answer; the pictures that go along are left out."""
    blocks = [block for reply in replies if reply["role"] == "user" for block in reply["content"]]
    told = [reply["content"] for reply in replies if reply["role"] == "tool"]
    told += [block["content"] for block in blocks if block["type"] == "tool_result"]
    return [one if isinstance(one, str) else one[0]["text"] for one in told]


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines())


def main() -> None:
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
    directory.mkdir(parents=True, exist_ok=True)
    load_database()
    tools = [query_database, get_targets]
    with Sandbox("data") as sandbox, Dispatcher(tools, sandbox=sandbox, review=chart_is_there) as dispatcher:
        for form in ("openai", "anthropic"):
            tell_story(form, dispatcher, directory)


if __name__ == "__main__":
    main()
