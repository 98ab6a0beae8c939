"""What a cell sees as its root: the plan of mounts, the generated /etc, and the interpreter it shows."""
