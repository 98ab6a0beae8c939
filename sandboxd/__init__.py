"""sandboxd: run code that a language model wrote, in a sealed Linux process, and say precisely how it ended.

    from sandboxd import Sandbox, Limits

    with Sandbox(policy="default") as sandbox:
        result = sandbox.run("print(6 * 7)")
        print(result.status, result.stdout)

The names below are imported when they are first used: a command that needs only some of them starts faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sandboxd.client.async_sandbox import AsyncSandbox
    from sandboxd.client.result import Result
    from sandboxd.client.sandbox import Sandbox
    from sandboxd.errors import (
        Busy,
        ConnectionLost,
        InvalidRequest,
        PolicyError,
        ProtocolError,
        SandboxError,
        Unavailable,
    )
    from sandboxd.policy import Limits, Policy

__version__ = "0.1.0"

__all__ = [
    "AsyncSandbox",
    "Busy",
    "ConnectionLost",
    "InvalidRequest",
    "Limits",
    "Policy",
    "PolicyError",
    "ProtocolError",
    "Result",
    "Sandbox",
    "SandboxError",
    "Unavailable",
]

_HOMES = {
    "AsyncSandbox": "client.async_sandbox",
    "Sandbox": "client.sandbox",
    "Limits": "policy.model",
    "Policy": "policy.model",
    "Result": "client.result",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sandboxd' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"sandboxd.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
