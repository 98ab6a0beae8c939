"""Tests that start no engine."""
