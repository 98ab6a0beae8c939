"""The Results of the latest runs of ``run_code``, kept so that host code can read what a model is told by reference.

A reference names a run and a file or value of it: ``RUN/files/chart.png``, ``RUN/results/0/image/png``.
"""

from __future__ import annotations

import base64
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sandboxd.client.result import Result

__all__ = ["KEPT_BYTES", "KEPT_RUNS", "Kept", "file_reference", "value_reference"]

KEPT_RUNS: Final = 64
KEPT_BYTES: Final = 256 << 20
"""Of file contents; the latest run's are kept however large they are."""


def file_reference(run: str, path: str) -> str:
    return f"{run}/files/{path}"


def value_reference(run: str, number: int, kind: str) -> str:
    return f"{run}/results/{number}/{kind}"


class Kept:
    """A bounded store of Results, the oldest closed and dropped first. Thread-safe."""

    def __init__(self, runs: int = KEPT_RUNS, size_bytes: int = KEPT_BYTES) -> None:
        self._runs = runs
        self._size_bytes = size_bytes
        self._lock = threading.Lock()
        self._results: OrderedDict[str, Result] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._total = 0
        self._closed = False

    def add(self, result: Result) -> None:
        """Own *result* from now on."""
        size = sum(file.size_bytes for file in result.files)  # once: a program may leave 100,000 files
        dropped: list[Result] = []
        with self._lock:
            if self._closed:
                dropped.append(result)
            else:
                self._results[result.id] = result
                self._total += size - self._sizes.get(result.id, 0)
                self._sizes[result.id] = size
                while len(self._results) > 1 and (len(self._results) > self._runs or self._total > self._size_bytes):
                    identity, oldest = self._results.popitem(last=False)
                    self._total -= self._sizes.pop(identity)
                    dropped.append(oldest)
        for one in dropped:
            one.close()

    def result(self, run: str) -> Result:
        """The Result of the run with that id. Raises KeyError when it is unknown, or no longer kept."""
        with self._lock:
            found = self._results.get(run)
        if found is None:
            raise KeyError(f"No result of a run {run!r} is kept.")
        return found

    def read(self, reference: str) -> bytes:
        """What *reference* names. Raises KeyError when that is unknown, or no longer kept."""
        run, _, rest = reference.partition("/")
        kind, _, name = rest.partition("/")
        result = self.result(run)
        if kind == "files":
            for file in result.files:
                if file.path == name:
                    try:
                        return file.read()
                    except ValueError:  # dropped meanwhile by another thread
                        break
        elif kind == "results":
            number, _, mime = name.partition("/")
            if number.isascii() and number.isdigit() and len(number) < 9 and int(number) < len(result.results):
                text = result.results[int(number)].mime.get(mime)
                if text is not None:
                    return text.encode("utf-8", "surrogatepass") if mime.startswith("text/") else base64.b64decode(text)
        raise KeyError(f"{reference!r} is not kept.")

    def close(self) -> None:
        """Drop everything; what is added later is dropped at once."""
        with self._lock:
            self._closed = True
            results, self._results = list(self._results.values()), OrderedDict()
            self._sizes, self._total = {}, 0
        for one in results:
            one.close()
