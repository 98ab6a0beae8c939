"""Policies: what a program may do and how much of the host it may use.

The names below are those of ``model``, imported when they are first used: it needs pydantic, which takes longer to
import than all else that a client needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sandboxd.policy.files import find, installed, policies_dir
    from sandboxd.policy.model import (
        Audit,
        Filesystem,
        Limits,
        Network,
        Policy,
        PolicyLimits,
        Require,
        Runtime,
        Seccomp,
        check,
        load,
        located,
        parse_toml,
    )

__all__ = [
    "Audit",
    "Filesystem",
    "Limits",
    "Network",
    "Policy",
    "PolicyLimits",
    "Require",
    "Runtime",
    "Seccomp",
    "check",
    "find",
    "installed",
    "load",
    "located",
    "parse_toml",
    "policies_dir",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sandboxd.policy' has no attribute {name!r}")
    from sandboxd.policy import model

    value = getattr(model, name)
    globals()[name] = value
    return value
