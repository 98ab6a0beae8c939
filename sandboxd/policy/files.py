"""The files of policies: where they lie, what they are named, and their text. Nothing here knows what is in one: a
daemon's start looks for its policies before pydantic is imported.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sandboxd.errors import PolicyError
from sandboxd.limits import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["NAME", "SYSTEM_DIR", "file_of", "find", "installed", "is_name", "nearest", "policies_dir", "read"]

SYSTEM_DIR: Final = Path("/etc/sandboxd/policies")
NAME: Final = re.compile(r"[a-z0-9_-]{1,64}")
_MAX_FILE_BYTES: Final = 1 << 20
_LATER: Final = ("shell",)


def policies_dir() -> Path:
    """The directory of the shipped policies: package data of an installed sandboxd, else policies/ of a source tree."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "policies"
    return shipped if shipped.is_dir() else package.parent / "policies"


def installed(directories: Sequence[Path] | None = None) -> dict[str, Path]:
    """Every policy that can be named, with its file; an operator's shadows a shipped one of the same name.

    *directories* are searched in order; None is /etc/sandboxd/policies, then the shipped ones.
    """
    found: dict[str, Path] = {}
    for directory in (SYSTEM_DIR, policies_dir()) if directories is None else directories:
        try:
            files = sorted(directory.iterdir())
        except OSError:
            continue
        for file in files:
            if file.suffix == ".toml" and NAME.fullmatch(file.stem):
                found.setdefault(file.stem, file)
    return dict(sorted(found.items()))


def find(name: str, directories: Sequence[Path] | None = None) -> Path:
    """The file of the policy *name*. Raises PolicyError that lists the known names."""
    known = installed(directories)
    if name in known:
        return known[name]
    if name in _LATER:
        raise PolicyError(f"The policy {name!r} comes in a later version. The known ones: {', '.join(known)}.")
    near = nearest(name, known)
    hint = f" Did you mean {near!r}?" if near else ""
    names = ", ".join(known) or "none"
    raise PolicyError(
        f"There is no policy named {shown(name)}.{hint} The known ones: {names}. "
        "A file is named by a path that ends in .toml or holds a slash."
    )


def file_of(policy: str | Path, directories: Sequence[Path] | None = None) -> Path:
    """The file that ``load`` reads for *policy*, a name or a file. Raises PolicyError for an unknown name."""
    return find(str(policy), directories) if is_name(policy) else Path(policy)


def is_name(policy: str | Path) -> bool:
    """Whether *policy* names an installed one, and not a file."""
    return isinstance(policy, str) and not (policy.endswith(".toml") or "/" in policy)


def read(file: Path, believe: Callable[[Path, int], None] | None = None) -> str:
    """The text of *file*. Raises PolicyError.

    *believe* gets the file and its descriptor and raises PolicyError or OSError unless what stands in it may be put
    into force (``ownership``). Shipped policies are not asked about: they are as safe as the program that they are
    part of.
    """
    try:
        with file.open("rb") as stream:
            if believe is not None and file.parent != policies_dir():
                believe(file, stream.fileno())
            content = stream.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise PolicyError(f"The policy cannot be read: {reason}.", str(file)) from None
    if len(content) > _MAX_FILE_BYTES:
        raise PolicyError(f"A policy is at most {_MAX_FILE_BYTES:,} bytes.", str(file))
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise PolicyError("A policy is UTF-8 text.", str(file), line) from None


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of *known* that was probably meant by *word*."""
    import difflib  # only errors need it

    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)
