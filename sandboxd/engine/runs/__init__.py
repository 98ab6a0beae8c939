"""One run in a cell: its input, clocks, streams, tool calls and answer."""
