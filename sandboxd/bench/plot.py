"""The measurements as a picture: one line for each row, from its median to its 99th percentile, on a log scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sandboxd.bench.report import shown

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["available", "draw"]

# A ground of its own, so that the picture reads the same on a light and on a dark page.
_GROUND, _INK, _FAINT = "#f6f8fa", "#1f2328", "#59636e"
_COLOURS = {"sandboxd": "#1a7f37", "floor": "#59636e", "plain": "#0969da", "peer": "#bc4c00"}
_LEGEND = {
    "sandboxd": "sandboxd, all walls up",
    "floor": "the kernel's floor, no isolation",
    "plain": "plain Python, no isolation",
    "peer": "peers",
}


def available() -> bool:
    """Whether matplotlib can be imported, without importing it."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Write a PNG to *file*. Raises OSError; ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = [row for row in found["rows"] if row["p50_ms"] is not None]
    rows.sort(key=lambda row: row["p50_ms"], reverse=True)
    figure = Figure(figsize=(9.6, 1.9 + 0.34 * len(rows)), dpi=160, facecolor=_GROUND, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=_GROUND)
    axes.set_xscale("log")
    for height, row in enumerate(rows):
        colour = _COLOURS[row["group"]]
        axes.plot([row["p50_ms"], row["p99_ms"]], [height, height], color=colour, linewidth=2.5, alpha=0.55)
        axes.plot(row["p99_ms"], height, marker="|", markersize=9, color=colour)
        axes.plot(row["p50_ms"], height, marker="o", markersize=7, color=colour)
        axes.annotate(
            f"{shown(row['p50_ms'])} ms",
            (row["p99_ms"], height),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            fontweight="bold" if row["group"] == "sandboxd" else "normal",
            color=_INK,
        )
    axes.set_yticks(range(len(rows)), [_wrapped(row["what"]) for row in rows], fontsize=9, color=_INK)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row["group"] == "sandboxd" else "normal")
    if rows:
        least, most = min(row["p50_ms"] for row in rows), max(row["p99_ms"] for row in rows)
        axes.set_xlim(least / 1.6, most * 4)
    axes.set_xlabel("milliseconds, log scale: dot p50 (labelled), bar p99", fontsize=9, color=_FAINT)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="x", which="major", color="#d1d9e0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_FAINT, which="both", labelsize=9)
    axes.tick_params(axis="y", length=0, labelcolor=_INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    host, policy = found["host"], found["policy"]
    axes.set_title(
        f"One run of 1+1, policy {policy['name']}: Linux {host['kernel'].partition('-')[0]}, {host['cpus']} CPUs, "
        f"Python {host['python']}",
        loc="left",
        fontsize=11,
        color=_INK,
    )
    groups = [group for group in _LEGEND if any(row["group"] == group for row in rows)]
    figure.legend(
        [Line2D([], [], color=_COLOURS[group], marker="o", linewidth=2.5) for group in groups],
        [_LEGEND[group] for group in groups],
        loc="outside lower center",
        ncols=len(groups),
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
    )
    figure.savefig(file, format="png", facecolor=_GROUND)


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 44)[:2])
