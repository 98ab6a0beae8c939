"""``sandboxd serve``, its configuration, its clients, and its service."""
