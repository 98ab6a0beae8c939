"""Many clients at once: closed loops, each client asking again as soon as it has its answer."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sandboxd.bench.stats import Failed, Series
from sandboxd.errors import SandboxError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd import Result

__all__ = ["Load", "check", "closed_loop"]


def check(result: Result, value: str) -> None:
    """Raise Failed unless *result* ended well and its last expression is *value* ("" for none)."""
    shown = result.results[0].mime.get("text/plain", "") if result.results else ""
    if result.status != "ok" or shown != value:
        raise Failed(f"status {result.status}, value {shown[:80]!r}, expected {value!r}")


@dataclass
class Load:
    """What came of it: latencies seen by the clients, and how long all of it took."""

    clients: int
    seconds: float = 0.0
    series: Series = field(default_factory=Series)

    @property
    def per_second(self) -> float:
        """Runs that ended well, per second."""
        return len(self.series.samples) / self.seconds if self.seconds else 0.0

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "clients": self.clients,
            "seconds": round(self.seconds, 3),
            "per_second": round(self.per_second, 1),
            **self.series.plain(),
        }


def closed_loop(run: Callable[[], None], clients: int, seconds: float) -> Load:
    """*clients* threads call *run* again and again for *seconds*; it raises what failed. What is under way at the
    end is waited for, and counted with its time.
    """
    load = Load(clients)
    lock = threading.Lock()
    start = threading.Barrier(clients + 1)
    end = [0.0]

    def client() -> None:
        own = Series()
        start.wait()
        while time.perf_counter() < end[0]:
            begun = time.perf_counter()
            try:
                run()
            except (Failed, OSError, SandboxError) as error:
                own.failures[str(error) or type(error).__name__] += 1
            else:
                own.samples.append(time.perf_counter() - begun)
        with lock:
            load.series.samples += own.samples
            load.series.failures += own.failures

    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    begun = time.perf_counter()
    end[0] = begun + seconds
    start.wait()
    for thread in threads:
        thread.join()
    load.seconds = time.perf_counter() - begun
    return load
