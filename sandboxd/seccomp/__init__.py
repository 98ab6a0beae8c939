"""seccomp: from a profile's name to the rules in force, and to the BPF program that the kernel enforces.

``effective`` reads a profile, ours (TOML) or an OCI one (JSON), and applies a policy's ``allow`` and ``deny``;
``compile`` makes the program, ``compile_layers`` the two that a zygote and its cells install instead, and the
``cached_`` forms keep them. All run in the engine, as the engine, before any tenant's code exists; a zygote gets the
finished bytes. The filter is one wall of several: it narrows what of the kernel can be reached, and the kernel's
documentation says itself that filtering is no sandbox.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sandboxd.errors import PolicyError
from sandboxd.seccomp import oci
from sandboxd.seccomp import profile as seccomp_profile
from sandboxd.seccomp.bpf import check, compile, run
from sandboxd.seccomp.cache import cached_layers
from sandboxd.seccomp.layers import Layers, compile_layers
from sandboxd.seccomp.rules import ALLOW, KILL, LOG, SUCCEED, Action, Arguments, Decision, Profile, Rule, Test, refuse
from sandboxd.seccomp.syscalls import NAMES, NEWEST, NUMBERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "ALLOW",
    "CELLS_NEED",
    "KILL",
    "LOG",
    "SUCCEED",
    "Action",
    "Arguments",
    "Decision",
    "Layers",
    "Profile",
    "Rule",
    "Test",
    "cached_layers",
    "check",
    "compile",
    "compile_layers",
    "effective",
    "lint",
    "profiles",
    "profiles_dir",
    "refuse",
    "run",
]

_NAME: Final = re.compile(r"[a-z0-9_-]{1,64}")
_FILE_BYTES: Final = 1 << 20

# What the interpreter and the code around it call before they can report anything. A profile that refuses one of these
# would only turn every run into a mystery.
_ESSENTIAL: Final = ("read", "write", "close", "mmap", "munmap", "brk", "futex", "rt_sigreturn", "exit", "exit_group")
CELLS_NEED: Final = ("openat", "newfstatat", "sendmsg")
"""And what a cell calls between its walls and its program; the engine refuses a policy that refuses these."""

_HEADERS: Final = (
    Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    Path("/usr/include/asm/unistd_64.h"),
)


def profiles_dir() -> Path:
    """The directory of the shipped profiles: package data when installed, else beside the package in a source tree."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "policies" / "seccomp"
    return installed if installed.is_dir() else package.parent / "policies" / "seccomp"


def profiles() -> tuple[str, ...]:
    """The names of the shipped profiles."""
    return tuple(sorted(path.stem for path in profiles_dir().glob("*.toml")))


def effective(profile: str | Path, allow: Sequence[str] = (), deny: Sequence[str] = ()) -> Profile:
    """The rules in force: *profile* with what a policy adds and takes away.

    *profile* is a shipped profile's name, or the path of a file: ``.json`` is an OCI profile, ``.toml`` one of our own
    form. A name in *allow* is allowed whatever its arguments: it lifts a refusal and an argument rule alike, because
    the operator named the call, and clone3 or io_uring have nothing that a rule could look at; who wants less writes a
    profile. A name in *deny* answers EPERM, unless the profile refuses it already: then its errno stays. What the
    profile answers with success is not refused.

    Raises PolicyError for a profile that is missing or wrong, an unknown name (with the nearest known), a name in both
    lists, and for a result that refuses what every cell needs.
    """
    chosen = _load(profile)
    for key, names in (("seccomp.allow", allow), ("seccomp.deny", deny)):
        for name in names:
            if name not in NUMBERS:
                raise seccomp_profile.unknown_call(name, key)
    if both := sorted(set(allow) & set(deny)):
        problem = f"seccomp.deny: {', '.join(both)} is also in seccomp.allow; keep it in one."
        raise PolicyError(problem, key="seccomp.deny")
    replaced: dict[int, Rule] = {}
    for name in allow:
        replaced[NUMBERS[name]] = Rule(NUMBERS[name], ALLOW, (), "the policy allows it, with any arguments")
    for name in deny:
        number = NUMBERS[name]
        if any(answer.action.permits or answer.action == SUCCEED for answer in chosen.verdict(number)):
            replaced[number] = Rule(number, refuse(1), (), "the policy denies it")
    rules = (*(rule for rule in chosen.rules if rule.number not in replaced), *replaced.values())
    result = Profile(chosen.name, chosen.default_action, rules, chosen.description, chosen.ignored)
    for name in _ESSENTIAL:
        if not any(answer.action.permits for answer in result.verdict(NUMBERS[name])):
            key = "seccomp.deny" if name in deny else "seccomp.profile"
            raise PolicyError(f"{key}: {name} is refused, but nothing can run without it.", key=key)
    return result


@functools.cache  # a shipped profile is read once: TOML takes 10 ms
def _shipped(path: Path) -> Profile:
    return seccomp_profile.parse(_read(path), str(path))


def _load(profile: str | Path) -> Profile:
    if isinstance(profile, str) and _NAME.fullmatch(profile):
        path = profiles_dir() / f"{profile}.toml"
        if not path.is_file():
            shipped = ", ".join(profiles())
            raise PolicyError(
                f"seccomp.profile: there is no profile {profile!r}; there are {shipped} and OCI files ending in .json.",
                key="seccomp.profile",
            )
        return _shipped(path)
    path = Path(profile)
    text = _read(path)
    match path.suffix:
        case ".json":
            return oci.parse(text, str(path))
        case ".toml":
            return seccomp_profile.parse(text, str(path))
        case _:
            raise PolicyError(
                f"seccomp.profile: {str(profile)!r} is neither a profile's name nor a file ending in .json or .toml.",
                key="seccomp.profile",
            )


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_FILE_BYTES + 1)
        if len(content) > _FILE_BYTES:
            problem = f"a seccomp profile has at most {_FILE_BYTES} bytes."
            raise PolicyError(problem, file=str(path), key="seccomp.profile")
        return content.decode("utf-8")
    except OSError as error:
        raise PolicyError(
            f"seccomp.profile: the file cannot be read: {error.strerror}.", file=str(path), key="seccomp.profile"
        ) from None
    except UnicodeDecodeError:
        raise PolicyError("a seccomp profile is UTF-8 text.", file=str(path), key="seccomp.profile") from None


def lint(header: Path | None = None) -> list[str]:
    """What a maintainer has to look at in the shipped profiles; empty when nothing.

    Every number of our table must stand in every profile by name with a reason, nothing above it may, and no profile
    but the default may allow what the default refuses. *header* is a kernel's ``asm/unistd_64.h`` (default: this
    host's, where it has one); calls that it has and our table lacks are reported, so that new ones are reviewed.
    """
    return [*_unknown_to_us(header), *(problem for name in profiles() for problem in _unreviewed(name))]


def _unknown_to_us(header: Path | None) -> Iterator[str]:
    chosen = header or next((path for path in _HEADERS if path.is_file()), None)
    if chosen is None:
        return
    for name, number in re.findall(r"^#define __NR_(\w+) (\d+)$", chosen.read_text("utf-8"), re.MULTILINE):
        ours = NAMES.get(int(number), "nothing")
        if ours != name:
            yield f"{chosen}: {name} is number {number}; sandboxd/seccomp/syscalls.py has {ours} there"


def _unreviewed(name: str) -> Iterator[str]:
    profile, default = effective(name), effective("default")
    for number, call in NAMES.items():
        rows = profile.rows(number)
        if not rows:
            yield f"{name}: {call} (number {number}) is neither allowed nor denied by name"
        yield from (f"{name}: {call} ({row.condition or 'always'}) has no reason" for row in rows if not row.reason)
        for answer in profile.verdict(number):
            if answer.arguments is None:
                yield f"{name}: a case of {call} can never be reached"
            elif answer.action.permits and not default.decide(number, answer.arguments).permits:
                yield f"{name}: {call} is allowed here and refused by default"
    yield from (f"{name}: number {number} is above the newest we know" for number in profile.numbers if number > NEWEST)
