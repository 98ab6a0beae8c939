"""The engine: a process that owns cgroups, ids, zygotes and clocks, and runs cells for its clients."""
