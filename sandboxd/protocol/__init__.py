"""The bytes between a client and an engine: packets, the header of a run, frames of tool calls."""
