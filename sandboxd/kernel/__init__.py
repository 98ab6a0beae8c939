"""What the kernel is asked directly: system calls through cffi, mount plans, user and network namespaces."""
