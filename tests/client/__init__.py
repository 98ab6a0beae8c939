"""The caller's side of an engine."""
