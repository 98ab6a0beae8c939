"""Policies as a daemon's start reads them: what a file meant is remembered, for pydantic takes a third of a start."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import sandboxd
from sandboxd import limits, policyfiles
from sandboxd.cache import cached
from sandboxd.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["plain_policy"]

_MEANING: Final = ("policy.py", Path(limits.__file__).name)
"""The modules that decide what a policy's text means: with another one of them nothing is remembered."""


class _NotToBeKept(Exception):
    """For this file more than its text counts; its value is what it means now."""

    def __init__(self, plain: dict[str, Any]) -> None:
        super().__init__()
        self.plain = plain


def plain_policy(file: Path, name: str, directory: Path | None = None) -> dict[str, Any]:
    """The plain values of the policy *name* in *file*, from the cache in *directory* (default: ``cache_directory()``)
    when the same text was read before. Raises PolicyError.
    """
    text = policyfiles.read(file)
    key = hashlib.sha256("\n".join(("policy", *_identity(), name, str(file), text)).encode()).hexdigest()
    try:
        content = cached(f"{key}.json", lambda kept: _checked(kept, name), lambda: _made(file, name), directory)
    except _NotToBeKept as made:
        return made.plain
    return _checked(content, name)


def _identity() -> Iterator[str]:
    yield sandboxd.__version__
    for module in _MEANING:
        status = Path(sandboxd.__file__).with_name(module).stat()
        yield f"{module} {status.st_size} {status.st_mtime_ns}"


def _made(file: Path, name: str) -> bytes:
    from sandboxd.policy import SHIPPED_PROFILES, load

    found = load(file)
    if found.name != name:
        raise PolicyError(f"The file of the policy {name!r} names itself {found.name!r}.", file=str(file), key="name")
    plain = found.plain()
    chosen = found.seccomp
    if chosen.allow or chosen.deny or chosen.profile not in SHIPPED_PROFILES:
        raise _NotToBeKept(plain)  # checked against a profile's file, and against the table of calls
    return json.dumps(plain, allow_nan=False).encode()


def _checked(content: bytes, name: str) -> dict[str, Any]:
    """The plain values that *content* holds. Raises ValueError."""
    plain = json.loads(content)
    if not isinstance(plain, dict) or plain.get("name") != name:
        raise ValueError("these are not the values of that policy")
    return plain
