"""The dispatcher and ``run_code``."""
