"""Policies as a daemon's start reads them: what a file meant is remembered, for pydantic takes a third of a start."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import sandboxd
from sandboxd._util import ownership
from sandboxd._util.diskcache import cached
from sandboxd.errors import PolicyError
from sandboxd.policy import files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandboxd.policy import Policy

__all__ = ["check_references", "plain_policy"]

_DECIDING: Final = (
    ("sandboxd.policy", "model.py"),
    ("sandboxd.policy", "files.py"),
    ("sandboxd", "limits.py"),
    ("pydantic", "version.py"),
)
"""Packages, and files in them, that decide what a policy's text means: with another one nothing is remembered."""


class _NotToBeKept(Exception):
    """For this policy more than its text counts."""

    def __init__(self, plain: dict[str, Any]) -> None:
        super().__init__()
        self.plain = plain


def plain_policy(file: Path, name: str, directory: Path | None = None) -> dict[str, Any]:
    """The plain values of the policy *name*, whose *file* is named for it, from the cache in *directory* (default:
    ``cache_directory()``) when the same text was read before. Raises PolicyError, also when others could change the
    file or what it refers to.
    """
    plain = _plain_policy(files.read(file, ownership.check_daemons_file), file, name, directory)
    check_references(plain, file)
    return plain


def check_references(plain: dict[str, Any], file: Path) -> None:
    """Raises PolicyError when others could change the files that the policy *plain*, of *file*, has the daemon read or
    execute on the host: its filter's profile, its interpreter.
    """
    profile, interpreter = plain["seccomp"]["profile"], plain["runtime"]["interpreter"]
    try:
        if os.path.isabs(profile):
            _asked(ownership.check, profile, "seccomp.profile")
        if interpreter is not None:
            _asked(ownership.check_interpreter, interpreter, "runtime.interpreter")
    except PolicyError as problem:
        from sandboxd.policy.model import located

        raise located(problem, file) from None


def _asked(check: Callable[[str, str], None], path: str, key: str) -> None:
    try:
        check(path, key)
    except OSError as error:
        raise PolicyError(f"{key}: {error.filename}: {error.strerror}.", key=key) from None


def _plain_policy(text: str, file: Path, name: str, directory: Path | None) -> dict[str, Any]:
    try:
        key = json.dumps(["policy", *_identity(), name, os.fsdecode(file), text])
    except OSError:
        return _meant(text, file).plain()
    try:
        content = cached(
            f"{hashlib.sha256(key.encode()).hexdigest()}.json",
            lambda kept: _checked(kept, name),
            lambda: _made(text, file),
            directory,
        )
    except _NotToBeKept as made:
        return made.plain
    return _checked(content, name)


def _identity() -> Iterator[str]:
    """What changes with the deciding modules: their content, for packages are built with one time for all of their
    files. Raises OSError where they are no files.
    """
    yield sandboxd.__version__
    for package, module in _DECIDING:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(package)
        yield hashlib.sha256(Path(spec.origin).with_name(module).read_bytes()).hexdigest()


def _meant(text: str, file: Path) -> Policy:
    from sandboxd.policy.model import meant

    return meant(text, file, named=True)


def _made(text: str, file: Path) -> bytes:
    """Of this very *text*: what the file holds by now may be another one."""
    from sandboxd.policy.model import SHIPPED_PROFILES

    found = _meant(text, file)
    plain = found.plain()
    chosen = found.seccomp
    if chosen.allow or chosen.deny or chosen.profile not in SHIPPED_PROFILES:
        raise _NotToBeKept(plain)  # checked against a profile's file, and against the table of calls
    return json.dumps(plain, allow_nan=False, ensure_ascii=False).encode()


def _checked(content: bytes, name: str) -> dict[str, Any]:
    """The plain values that *content* holds. Raises ValueError."""
    plain = json.loads(content)
    if not isinstance(plain, dict) or plain.get("name") != name:
        raise ValueError("these are not the values of that policy")
    return plain
