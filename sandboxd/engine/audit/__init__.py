"""What the engine writes to the audit record about runs and tool calls."""
