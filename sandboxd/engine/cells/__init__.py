"""Cells: how one is made, parked, handed out and taken down, and the zygotes they are forked from."""
