"""How savings grow: a starting sum and a monthly deposit, with and without interest.

    sandboxd run examples/compound_interest.py -- 10000 250 4.5 20

Arguments: starting sum, monthly deposit, interest in per cent a year, years. Standard library only.
"""

from __future__ import annotations

import sys
from decimal import ROUND_HALF_EVEN, Decimal

CENT = Decimal("0.01")


def balances(start: Decimal, monthly: Decimal, percent: Decimal, years: int) -> list[Decimal]:
    """The balance at the end of each year; interest is credited every month and rounded to cents as a bank does."""
    rate = percent / 100 / 12
    balance = start
    result = []
    for month in range(1, years * 12 + 1):
        balance += (balance * rate).quantize(CENT, ROUND_HALF_EVEN) + monthly
        if month % 12 == 0:
            result.append(balance)
    return result


def main(arguments: list[str]) -> int:
    if len(arguments) not in {0, 4}:
        print("usage: compound_interest.py START MONTHLY PERCENT YEARS", file=sys.stderr)
        return 2
    start, monthly, percent = (Decimal(value) for value in (arguments or ["10000", "250", "4.5", "20"])[:3])
    years = int(arguments[3]) if arguments else 20

    print(f"{'year':>4} {'paid in':>12} {'interest':>12} {'balance':>12}")
    for year, balance in enumerate(balances(start, monthly, percent, years), start=1):
        paid = start + monthly * 12 * year
        print(f"{year:>4} {paid:>12,.2f} {balance - paid:>12,.2f} {balance:>12,.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
