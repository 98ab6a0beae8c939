"""What an operator may set for a whole engine, and the host's share that it takes by default."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from sandboxd.errors import PolicyError
from sandboxd.limits import shown

__all__ = ["AuditSettings", "EngineConfig", "PoolSettings", "host_memory_bytes"]

_PIDS_PER_RUN: Final = 256  # four times what a run may have by default
_ENGINE_PIDS: Final = 1024


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """An operator's bounds on the parked cells of each policy."""

    minimum: int = 2
    """Parked when nothing happens. 0: only after a first run has come."""
    maximum: int = 16
    """Parked at most; 0 parks none."""
    memory_bytes: int = 256 << 20
    """Of all parked cells together, what is their own."""
    age_seconds: float = 300.0
    """A parked cell that waited longer is replaced."""
    zygote_cells: int = 20_000
    """So many cells are forked before the zygote is replaced by a new one, with other addresses and hash seeds."""
    zygote_seconds: float = 3600.0
    """So long it serves at most."""

    @classmethod
    def from_plain(cls, plain: object) -> PoolSettings:
        """Raises PolicyError for a key or a value that cannot be."""
        if not isinstance(plain, dict):
            raise PolicyError("pool must be a table.", key="pool")
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in plain.items():
            if key not in known:
                what = f"{key!r} is not a setting of the pool. They are {', '.join(sorted(known))}."
                raise PolicyError(what, key=f"pool.{key}")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if key.endswith("_seconds"):
                if not number or not 0.1 <= value <= 1e9:
                    raise PolicyError(f"pool.{key} must be a number of seconds from 0.1.", key=f"pool.{key}")
                value = float(value)
            elif type(value) is not int or not (1 if key == "zygote_cells" else 0) <= value <= 1 << 50:
                raise PolicyError(f"pool.{key} must be a whole number that is not negative.", key=f"pool.{key}")
            values[key] = value
        if "maximum" in values:
            values.setdefault("minimum", min(cls().minimum, values["maximum"]))
        made = cls(**values)
        if made.minimum > made.maximum:
            raise PolicyError(f"pool.minimum ({made.minimum}) is above pool.maximum.", key="pool.minimum")
        return made


@dataclass(frozen=True, slots=True)
class AuditSettings:
    """Where an engine writes its audit record, and what happens when it cannot."""

    path: str
    """Absolute; its directory must be there."""
    max_bytes: int = 64 << 20
    """A file that would grow beyond it is rotated."""
    keep: int = 8
    """Rotated files that are kept."""
    on_failure: Literal["stop", "continue"] = "stop"
    """While nothing can be written: no new run begins, or runs go on and their number is recorded afterwards."""
    fsync: bool = False
    """Whether each record is on the disk before the run goes on."""

    @classmethod
    def from_plain(cls, plain: object) -> AuditSettings:
        """Raises PolicyError for a key or a value that cannot be."""
        known = [one.name for one in fields(cls)]
        if not isinstance(plain, dict):
            raise PolicyError(f"audit must be a table of {', '.join(known)}, not {shown(plain)}.", key="audit")
        for key, value in plain.items():
            name = f"audit.{key}"
            if key not in known:
                raise PolicyError(f"{key!r} is not a setting of audit. They are {', '.join(known)}.", key=name)
            if key in ("max_bytes", "keep") and (type(value) is not int or value < 1):
                raise PolicyError(f"{name} must be a whole number from 1, not {shown(value)}.", key=name)
            if key == "on_failure" and value not in ("stop", "continue"):
                raise PolicyError(f'{name} must be "stop" or "continue", not {shown(value)}.', key=name)
            if key == "fsync" and type(value) is not bool:
                raise PolicyError(f"{name} must be true or false, not {shown(value)}.", key=name)
        path = plain.get("path")
        if not isinstance(path, str) or not os.path.isabs(path) or "\0" in path or path.endswith("/"):
            raise PolicyError(f"audit.path must be the absolute path of a file, not {shown(path)}.", key="audit.path")
        return cls(**plain)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Bounds of one engine. None takes the default that the field names."""

    max_running: int | None = None
    """Cells that run at once; the others queue. Default: 4 for each CPU."""
    max_queued: int = 10_000
    """Runs that wait for their turn; one more is *busy* at once."""
    max_clients: int = 1024
    """Connections of a daemon."""
    memory_bytes: int | None = None
    """Of engine, zygotes and cells together. Default: 80 % of what the host or the container has."""
    pids: int | None = None
    """Tasks of zygotes and cells together. Default: 256 for each of max_running, and 1,024."""
    ids: str | None = None
    """Host ids for user namespaces, "base:count"; else /etc/subuid, else a documented range."""
    pool: PoolSettings = field(default_factory=PoolSettings)
    """Parked cells of each policy, and how long a zygote serves."""
    audit: AuditSettings | None = None
    """The audit record. Default: none."""
    zygote: dict[str, Any] = field(default_factory=dict)
    """What zygotes are told in addition, for measurements of single ideas."""
    walls_down: tuple[str, ...] = ()
    """Names of walls that are left out, for tests of the others. Every receipt lists them as missing."""
    marker_errno: int | None = None
    """What every refusal of the seccomp filter answers instead of its own errno, for the sweep over all system calls:
    an errno that the kernel never gives tells the two apart. Every receipt lists it as missing."""

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> EngineConfig:
        """Raises PolicyError for a key or a value that cannot be."""
        known = {one.name for one in fields(cls)}
        for key, value in plain.items():
            if key not in known:
                raise PolicyError(f"{key!r} is not an engine's setting. They are {', '.join(sorted(known))}.", key=key)
            if key in ("max_running", "max_queued", "max_clients", "memory_bytes", "pids", "marker_errno"):
                if value is not None and (type(value) is not int or value < 1):
                    raise PolicyError(f"{key} must be a whole number from 1, not {value!r}.", key=key)
            elif key == "ids" and not (value is None or isinstance(value, str)):
                raise PolicyError(f'ids must be a string like "1879048192:65536", not {value!r}.', key=key)
        return cls(
            **{
                **plain,
                "walls_down": tuple(plain.get("walls_down", ())),
                "pool": PoolSettings.from_plain(plain.get("pool") or {}),
                "audit": None if plain.get("audit") is None else AuditSettings.from_plain(plain["audit"]),
                "zygote": dict(plain.get("zygote") or {}),
            }
        )

    def running(self) -> int:
        """max_running with its default."""
        return self.max_running or 4 * (os.cpu_count() or 1)

    def memory(self) -> int:
        """memory_bytes with its default."""
        return self.memory_bytes or host_memory_bytes() * 8 // 10

    def tasks(self) -> int:
        """pids with its default."""
        return self.pids or self.running() * _PIDS_PER_RUN + _ENGINE_PIDS


def host_memory_bytes(proc: Path = Path("/proc"), mounts: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory of the host, or of the closest of the cgroups that this process is bound by. Source: meminfo, memory.max,
    memory.limit_in_bytes.
    """
    total = 0
    for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemTotal:"):
            total = int(line.split()[1]) << 10
    for line in (proc / "self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, file = mounts, "memory.max"
        elif "memory" in controllers.split(","):
            root, file = mounts / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = PurePosixPath(path)
        for above in (own, *own.parents):
            try:
                text = Path(f"{root}{above}", file).read_text(encoding="ascii").strip()
            except OSError:
                continue
            if text.isdigit() and 0 < int(text) < total:
                total = int(text)
    return total
