"""Tests of an engine that is not root's; tests/engine/test_rootless.py runs them as an ordinary user, in every mode."""
