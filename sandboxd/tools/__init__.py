"""The dispatcher: typed tools for a model, ``run_code`` among them, and code that may call tools.

    from sandboxd.tools import Dispatcher, tool

    @tool(rate="10/s", timeout=5)
    def query_sales(quarter: Literal["Q1", "Q2", "Q3", "Q4"]) -> list[Row]:
        '''Sales rows of one quarter.'''

    with Sandbox() as sandbox, Dispatcher([query_sales], sandbox=sandbox) as dispatcher:
        message = model(history, tools=dispatcher.schemas("openai"))
        history += [message, *dispatcher.handle(message)]

Tool calls are validated, code is contained; data flows between them through one channel.
"""

from __future__ import annotations

from sandboxd.tools.code.attempts import Attempts
from sandboxd.tools.code.review import Review
from sandboxd.tools.dispatcher import Dispatcher
from sandboxd.tools.pipeline.rates import Budget
from sandboxd.tools.pipeline.tool import Tool, tool
from sandboxd.tools.result import CODES, ToolError, ToolFailure, ToolResult

__all__ = [
    "CODES",
    "Attempts",
    "Budget",
    "Dispatcher",
    "Review",
    "Tool",
    "ToolError",
    "ToolFailure",
    "ToolResult",
    "tool",
]
