"""The measurements as a table for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["HEAD", "about", "ratios", "rows", "shown", "throughput"]

HEAD = ("WHAT", "p50 ms", "p95 ms", "p99 ms", "N", "FAILED", "x floor", "AROUND IT")


def shown(milliseconds: float | None) -> str:
    """Three digits, never in exponents; "-" for what is not there."""
    if milliseconds is None:
        return "-"
    if milliseconds >= 100:
        return f"{milliseconds:,.0f}"
    if milliseconds >= 10:
        return f"{milliseconds:.1f}"
    return f"{milliseconds:.2f}" if milliseconds >= 1 else f"{milliseconds:.3f}"


def _p50(found: Mapping[str, Any], key: str) -> float | None:
    for row in found["rows"]:
        if row["key"] == key:
            value: float | None = row["p50_ms"]
            return value
    return None


def rows(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The lines of the table, in the order of their medians within ours, floors, plain Python and peers."""
    floor = _p50(found, "fork")
    groups = ("sandboxd", "floor", "plain", "peer")
    ordered = sorted(found["rows"], key=lambda row: (groups.index(row["group"]), row["p50_ms"] or float("inf")))
    for row in ordered:
        times = f"{row['p50_ms'] / floor:.1f}" if floor and row["p50_ms"] is not None else "-"
        yield (
            row["what"],
            *(shown(row[key]) for key in ("p50_ms", "p95_ms", "p99_ms")),
            str(row["n"]),
            str(row["failures"]),
            times,
            row["note"],
        )


def ratios(found: Mapping[str, Any]) -> dict[str, float]:
    """Median of each other row over the median of our embedded one."""
    ours = _p50(found, "sandboxd")
    if not ours:
        return {}
    return {
        row["key"]: round(row["p50_ms"] / ours, 3)
        for row in found["rows"]
        if row["p50_ms"] is not None and row["key"] != "sandboxd"
    }


def throughput(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What, runs per second, failures."""
    for row in found["throughput"]:
        yield row["what"], f"{row['per_second']:,.0f}", str(row.get("failures", 0))


def about(found: Mapping[str, Any]) -> Iterator[str]:
    """The host, the policy and what the figures are worth, a sentence a line."""
    host, policy, settings = found["host"], found["policy"], found["settings"]
    yield (
        f"{host['cpu']}, {host['cpus']} CPUs{', virtual' if host['hypervisor'] else ''}, Linux {host['kernel']}, "
        f"Python {host['python']}, sandboxd {host['sandboxd']}; load {host['load_1min']:.1f} before, "
        f"{host['load_1min_after']:.1f} after; {host['mounts']} mounts"
    )
    preload = f"; peers and plain Python import {', '.join(policy['preload'])}" if policy["preload"] else ""
    yield f"Policy {policy['name']}, sha256 {policy['sha256']}{preload}"
    low, high = settings["pause_ms"]
    yield (
        f"Rows are measured in turn. What is kept running is asked every {low:.0f} to {high:.0f} ms; everything else "
        "is timed from exec to exit."
    )
    ours = next(row for row in found["rows"] if row["key"] == "sandboxd")
    if ours["n"]:
        yield f"Cells that waited ready served {ours['warm']} of {ours['n'] + ours['failures']} embedded runs."
    if host["load_1min"] > host["cpus"] / 4:
        yield "The machine was not idle: compare within this table only."
