"""Tests of an engine that is not root's; tests/test_rootless.py runs them as an ordinary user, in every mode."""
