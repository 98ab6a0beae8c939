"""``run_code``: the tool, what it offers, and what the model sees of a run."""
