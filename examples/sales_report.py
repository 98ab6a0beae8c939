"""Which months of 2025 missed their sales target, and where: a table on stdout and chart.png.

Reads sales.csv from the working directory: month, region, revenue and target, one row for each month and region.

    sandboxd run --input examples/sales.csv --output-dir out examples/sales_report.py
"""

from __future__ import annotations

import os
import tempfile

# Matplotlib writes a font cache into its configuration directory; in the home directory it would be one of our results.
os.environ.setdefault("MPLCONFIGDIR", tempfile.mkdtemp())

import matplotlib as mpl

mpl.use("Agg")  # draws into a file: no display is needed

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import FuncFormatter

INK = "#22313f"
MUTED = "#7b8794"
MET = "#8fb8de"
MISSED = "#d1495b"


def read_sales(path: str) -> pd.DataFrame:
    """The rows of *path*, with month as the first day of it."""
    sales = pd.read_csv(path)
    sales["month"] = pd.to_datetime(sales["month"], format="%Y-%m")
    return sales


def by_month(sales: pd.DataFrame) -> pd.DataFrame:
    """Revenue and target of all regions together for each month, and by how much the target was missed or passed."""
    months = sales.groupby("month")[["revenue", "target"]].sum()
    months["difference"] = months["revenue"] - months["target"]
    months["missed"] = months["difference"] < 0
    behind = sales[sales["revenue"] < sales["target"]]
    months["behind"] = behind.groupby("month")["region"].agg(", ".join)
    months["behind"] = months["behind"].fillna("")
    return months


def print_table(months: pd.DataFrame) -> None:
    """The months as a table; a star marks those below target."""
    line = "{:9} {:>9,.0f} {:>9,.0f} {:>+8,.0f} {} {}"
    print(f"{'month':9} {'revenue':>9} {'target':>9} {'diff':>8}   regions behind")
    for month, row in months.iterrows():
        star = "*" if row["missed"] else " "
        numbers = (row["revenue"], row["target"], row["difference"])
        print(line.format(f"{month:%b %Y}", *numbers, star, row["behind"]).rstrip())
    print(line.format("total", *months[["revenue", "target", "difference"]].sum(), "", "").rstrip())
    print(f"\n{months['missed'].sum()} of {len(months)} months were below target (*).")


def draw(months: pd.DataFrame, path: str) -> None:
    """Bars for revenue, a line for the target, the missed months in another colour and labelled."""
    plt.rcParams.update({"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK})
    figure, axes = plt.subplots(figsize=(10, 5.4))
    figure.subplots_adjust(left=0.07, right=0.97, top=0.8, bottom=0.08)
    names = [f"{month:%b}" for month in months.index]

    colours = [MISSED if missed else MET for missed in months["missed"]]
    bars = axes.bar(names, months["revenue"], color=colours, width=0.7, zorder=2)
    (target,) = axes.plot(names, months["target"], color=INK, linewidth=1.6, marker="o", markersize=4, zorder=3)

    for bar, (_, row) in zip(bars, months.iterrows(), strict=True):
        if row["missed"]:
            # Above the target's marker, which stands higher than the bar.
            axes.annotate(
                f"{row['difference'] / row['target']:.1%}".replace("-", "\N{MINUS SIGN}"),
                (bar.get_x() + bar.get_width() / 2, row["target"]),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                color=MISSED,
                fontweight="bold",
            )

    missed = int(months["missed"].sum())
    title = f"Revenue was below target in {missed} of {len(months)} months"
    figure.suptitle(title, x=0.07, y=0.965, ha="left", fontsize=15, fontweight="bold")
    axes.set_title(f"All regions, {months.index[0]:%Y}", loc="left", color=MUTED, fontsize=10.5, pad=30)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:,.0f}k" if value else "0"))
    axes.margins(x=0.02)
    axes.set_ylim(0, months[["revenue", "target"]].to_numpy().max() * 1.12)
    axes.grid(axis="y", color="#e4e7eb", zorder=0)
    axes.tick_params(length=0, colors=MUTED)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#cbd2d9")

    met_bar = plt.Rectangle((0, 0), 1, 1, color=MET)
    missed_bar = plt.Rectangle((0, 0), 1, 1, color=MISSED)
    axes.legend(
        [met_bar, missed_bar, target],
        ["Revenue, target met", "Revenue, below target", "Target"],
        loc="lower left",
        bbox_to_anchor=(-0.012, 1.0),
        ncols=3,
        frameon=False,
        borderpad=0,
        borderaxespad=0.8,
    )
    figure.savefig(path, dpi=150)


def main() -> None:
    months = by_month(read_sales("sales.csv"))
    print_table(months)
    draw(months, "chart.png")


if __name__ == "__main__":
    main()
