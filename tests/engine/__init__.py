"""Engines, their cells, and what programs in them notice."""
