"""Small helpers that know nothing of sandboxd: closing, waiting, a cache on disk, who may change a file."""
