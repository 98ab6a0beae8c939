"""The programs and figures of the README and docs."""
