"""Estimates pi from random points in a square, and says how far off the estimate may be.

    sandboxd run examples/monte_carlo.py -- 2000000

Argument: number of points. Uses numpy where it is installed, else the standard library.
"""

from __future__ import annotations

import math
import random
import sys

try:
    import numpy as np
except ImportError:
    np = None

CHUNK = 100_000  # points at a time: memory stays flat whatever the number


def hits(count: int) -> int:
    """How many of *count* random points of the unit square lie in the quarter circle."""
    if np is None:
        return sum(random.random() ** 2 + random.random() ** 2 <= 1 for _ in range(count))
    x, y = np.random.default_rng().random((2, count))
    return int(np.count_nonzero(x * x + y * y <= 1))


def main(points: int) -> None:
    inside = 0
    for done in range(0, points, CHUNK):
        inside += hits(min(CHUNK, points - done))
    share = inside / points
    error = 4 * math.sqrt(share * (1 - share) / points)  # one standard deviation of a binomial share
    print(f"pi is about {4 * share:.5f} \N{PLUS-MINUS SIGN} {error:.5f} ({points:,} points)")
    print(f"off by {abs(4 * share - math.pi):.5f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
