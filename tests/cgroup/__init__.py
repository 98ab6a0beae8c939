"""Cgroup directories, v1 and v2, against the kernel."""
