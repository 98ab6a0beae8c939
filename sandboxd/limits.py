"""The limits of a run: what each one is in the kernel or the engine, its default, its range, and how values are
compared.

One table, ``LIMITS``, is the source for policies, requests, the command line and the engine. No pydantic here: the
engine imports this module and must start fast. In plain values ``None`` is "unlimited"; a person writes the word. One
limit follows another: shm_bytes is half of memory_bytes unless it has a number of its own. There ``None`` is "half", so
that it is still half when a run narrows memory_bytes alone; ``value_of`` says what that comes to.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from sandboxd.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "HALF",
    "LIMITS",
    "UNLIMITED",
    "Limit",
    "LimitValue",
    "defaults",
    "narrow",
    "parse",
    "resolved",
    "shown",
    "spell",
    "value_of",
]

UNLIMITED: Final = "unlimited"
HALF: Final = "half"
LimitValue = int | float | None
"""A resolved limit: bytes, counts and whole numbers are int, seconds and CPUs are float, None is unlimited (or
half, where a limit follows another)."""

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30
_PIB = 1 << 50  # above the physical memory of any x86-64 host, and far from where the kernel's page counters overflow
_YEAR: Final = 365 * 86_400.0

_SIZE = re.compile(r"([0-9]{1,18}) ?(?:([KMGT])(?:iB)?|B)?", re.IGNORECASE)
_POWERS = {"K": 10, "M": 20, "G": 30, "T": 40}


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit. *kernel* names the object that enforces it, *floor_reason* why nothing below *lowest* is accepted.

    *unlimited* is None when "unlimited" may be asked for, else the reason why it may not. *half_of* names the limit of
    which this one is half when it has no number, and *default* is what that comes to by default.
    """

    name: str
    unit: Literal["seconds", "cpus", "bytes", "count"]
    default: int | float
    lowest: int | float
    highest: int | float
    kernel: str
    floor_reason: str
    unlimited: str | None = None
    half_of: str | None = None

    @property
    def word(self) -> str | None:
        """What a person writes for None; None when it may not be asked for."""
        if self.half_of:
            return HALF
        return None if self.unlimited else UNLIMITED

    @property
    def allowed(self) -> str:
        """The accepted values in words, with their unit."""
        if self.unit == "bytes":
            span = f"from {spell_size(self.lowest)} to {spell_size(self.highest)}"
            number = f'bytes {span}, a number or a string like "256M"'
        elif self.unit == "count":
            number = f"a whole number from {self.lowest:,} to {self.highest:,}"
        else:
            number = f"{'seconds' if self.unit == 'seconds' else 'CPUs'} from {self.lowest:g} to {self.highest:,.0f}"
        of = f" of {self.half_of}" if self.half_of else ""
        return number if self.word is None else f'{number}, or "{self.word}"{of}'


_TABLE = (
    Limit(
        "wall_seconds", "seconds", 30.0, 0.001, _YEAR,
        "the engine's clock (CLOCK_MONOTONIC) from the program's start, then SIGKILL to the cell's pid 1",
        "the engine's clock fires in milliseconds",
    ),
    Limit(
        "cpu_seconds", "seconds", 60.0, 0.001, _YEAR,
        "usage_usec in cpu.stat (v2) or cpuacct.usage (v1) of the leaf, read by the engine; RLIMIT_CPU as a belt",
        "the engine compares in milliseconds",
    ),
    Limit(
        "cpus", "cpus", 1.0, 0.01, 8192.0,
        "cpu.max (v2), cpu.cfs_quota_us (v1): quota / period",
        "the kernel accepts no quota below 1 ms, and the longest period in use is 100 ms",
    ),
    Limit(
        "memory_bytes", "bytes", 512 * _MIB, 16 * _MIB, _PIB,
        "memory.max with memory.swap.max 0 (v2), memory.limit_in_bytes (v1); tmpfs counts",
        "an interpreter needs that much to start and to report a MemoryError",
        unlimited="without a limit of its own a cell would be killed, or kill others, at the engine's bound",
    ),
    Limit(
        "pids", "count", 64, 1, 1 << 22,
        "pids.max; threads count",
        "the interpreter itself is one",
    ),
    Limit(
        "workspace_bytes", "bytes", 64 * _MIB, 4 * _KIB, _PIB,
        "size= of the tmpfs on /workspace; counts as memory",
        "tmpfs counts in pages",
        unlimited="the workspace is memory; ask for as much as memory_bytes instead",
    ),
    Limit(
        "workspace_files", "count", 4096, 1, (1 << 31) - 1,
        "nr_inodes= of the tmpfs on /workspace; directories and links count",
        "a workspace without an inode cannot hold a file",
        unlimited="each file costs kernel memory even when it is empty; ask for a number instead",
    ),
    Limit(
        "tmp_bytes", "bytes", 64 * _MIB, 4 * _KIB, _PIB,
        "size= of the tmpfs on /tmp; counts as memory",
        "tmpfs counts in pages",
        unlimited="it is memory; ask for as much as memory_bytes instead",
    ),
    Limit(
        "shm_bytes", "bytes", 256 * _MIB, 4 * _KIB, _PIB,
        "size= of the tmpfs on /dev/shm; counts as memory",
        "tmpfs counts in pages",
        unlimited="it is memory; ask for as much as memory_bytes instead",
        half_of="memory_bytes",
    ),
    Limit(
        "open_files", "count", 256, 16, 1 << 20,
        "RLIMIT_NOFILE of each process",
        "an import opens several files beside the streams and the cell's channel",
        unlimited="the kernel has no such value: fs.nr_open bounds RLIMIT_NOFILE",
    ),
    Limit(
        "file_bytes", "bytes", 512 * _MIB, 1, _PIB,
        "RLIMIT_FSIZE of each process",
        "0 would forbid every write to a file",
    ),
    Limit(
        "output_bytes", "bytes", _MIB, 1, 256 * _MIB,
        "the engine's reader: how much of each stream it keeps, first and last half",
        "0 would drop all output",
        unlimited="the engine keeps this much of each stream in its own memory",
    ),
    Limit(
        "output_stop_bytes", "bytes", 8 * _MIB, 1, _PIB,
        "the engine's reader: a stream that wrote more than this ends the run",
        "0 would end every run that prints",
    ),
    Limit(
        "queue_seconds", "seconds", 30.0, 0.001, _YEAR,
        "the engine's queue: how long a run may wait before it is started, then Busy",
        "the engine's clock fires in milliseconds",
    ),
    Limit(
        "tool_wait_seconds", "seconds", 60.0, 0.001, _YEAR,
        "the engine's clock: how long a program may wait for tools, all calls together; its wall clock stands still",
        "the engine's clock fires in milliseconds",
    ),
    Limit(
        "approval_seconds", "seconds", 300.0, 0.001, _YEAR,
        "the engine's clock: how long a cell may be frozen while somebody decides whether its tool calls may go on",
        "the engine's clock fires in milliseconds",
    ),
)  # fmt: skip

LIMITS: Final[Mapping[str, Limit]] = {limit.name: limit for limit in _TABLE}


def defaults() -> dict[str, LimitValue]:
    """Every limit with the value it has when a policy does not mention it."""
    return {name: None if limit.half_of else limit.default for name, limit in LIMITS.items()}


def value_of(limits: Mapping[str, LimitValue], name: str) -> LimitValue:
    """What the limit *name* comes to among *limits*: "half" as a number, at least 1 MiB. None is unlimited."""
    value, half_of = limits[name], LIMITS[name].half_of
    if value is None and half_of:
        whole = limits.get(half_of)
        return None if whole is None else max(_MIB, int(whole) // 2)
    return value


def spell_size(value: float) -> str:
    """*value* bytes with the largest unit that divides it: 536870912 is "512M"."""
    for letter, power in reversed(_POWERS.items()):
        if value and value % (1 << power) == 0:
            return f"{int(value) >> power}{letter}"
    return f"{int(value)}"


def spell(name: str, value: LimitValue) -> str:
    """*value* of the limit *name* as a policy would write it, with its unit where the name does not give it away."""
    if value is None:
        return HALF if LIMITS[name].half_of else UNLIMITED
    if LIMITS[name].unit == "bytes":
        return spell_size(value)
    return str(int(value)) if float(value).is_integer() else str(value)


def parse(name: str, value: object) -> LimitValue:
    """A person's *value* for the limit *name*: a number in the field's unit, a size such as "256M", "unlimited" or
    "half".

    K, M, G and T are powers of 1,024; "256MiB" is the same as "256M". Raises PolicyError that names the limit, the
    value and what is allowed; a bool is no number, and NaN and infinities are no limits. KeyError for a name that is
    no limit.
    """
    limit = LIMITS[name]
    if isinstance(value, str):
        if value == limit.word:
            return None
        if value == UNLIMITED:
            raise _refusal(limit, value, limit.unlimited or "")
        size = _SIZE.fullmatch(value) if limit.unit == "bytes" else None
        if size is None:
            raise _refusal(limit, value, "")
        number: int | float = int(size[1]) << _POWERS.get((size[2] or "").upper(), 0)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise _refusal(limit, value, "")
    else:
        number = value
    return _in_range(limit, number, value)


def resolved(name: str, value: object) -> LimitValue:
    """*value* of the limit *name* as it comes over a channel: a number in range, or None for unlimited or
    half.

    Raises PolicyError like ``parse``; words and sizes with units are refused, since the other side resolved them
    already.
    """
    limit = LIMITS[name]
    if value is None and limit.word is not None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refusal(limit, value, "")
    return _in_range(limit, value, value)


def narrow(base: Mapping[str, LimitValue], asked: Mapping[str, object]) -> dict[str, LimitValue]:
    """The limits of one run: *base*, those of the sandbox, with what the run *asked* for.

    A run may only narrow: a value wider than the sandbox's is a PolicyError that names the limit, the value asked for
    and the widest one allowed. *asked* holds plain values (None is unlimited, the widest of all) and is checked like
    any input. What is half of another limit is compared by what it comes to.
    """
    limits = dict(base)
    for name, value in asked.items():
        if name not in LIMITS:
            raise PolicyError(f"{name!r} is not a limit. The limits are {', '.join(LIMITS)}.", key="limits")
        limits[name] = resolved(name, value)
    for name in asked:
        wanted, widest = value_of(limits, name), value_of(base, name)
        if widest is not None and (wanted is None or wanted > widest):
            raise PolicyError(
                f"limits.{name}: {spell(name, limits[name])} is wider than the {spell(name, widest)} of this sandbox. "
                "A run may only narrow the limits of its sandbox.",
                key=f"limits.{name}",
            )
    return limits


def shown(value: object) -> str:
    """*value* for an error message: its repr, cut to a readable length."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than sys.get_int_max_str_digits
        return "an integer too long to print"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _in_range(limit: Limit, number: float, given: object) -> int | float:
    if limit.unit in ("bytes", "count"):
        if not isinstance(number, int):
            raise _refusal(limit, given, "it must be a whole number")
    elif isinstance(number, int):
        # Not float(number): an integer beyond 1e308 would overflow there instead of being refused below.
        number = float(max(min(number, 1 << 62), -(1 << 62)))
    if isinstance(number, float) and not math.isfinite(number):
        raise _refusal(limit, given, f'no limit is spelled "{UNLIMITED}"' if limit.unlimited is None else "")
    if number < limit.lowest:
        if number == 0 and limit.unlimited is None:
            raise _refusal(limit, given, f'no limit is spelled "{UNLIMITED}", never 0')
        raise _refusal(limit, given, limit.floor_reason if number >= 0 else "")
    if number > limit.highest:
        raise _refusal(limit, given, "")
    return number


def _refusal(limit: Limit, given: object, why: str) -> PolicyError:
    reason = f" ({why})" if why else ""
    key = f"limits.{limit.name}"
    return PolicyError(f"{key}: {shown(given)} is not allowed{reason}; allowed: {limit.allowed}.", key=key)
