"""What this host can enforce: ``sandboxd doctor`` and the probe that it runs."""
