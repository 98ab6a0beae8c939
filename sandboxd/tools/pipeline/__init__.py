"""The way of one call: rates, approval, running, the answer, the record."""
