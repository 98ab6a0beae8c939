"""What runs inside: the zygote's program, the cell's program, and their two native objects.

Nothing here imports the rest of sandboxd or anything beyond the standard library: it may run under another interpreter.
"""
