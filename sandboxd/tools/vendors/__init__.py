"""The forms that Anthropic, OpenAI and MCP give to tools, calls and results."""
