"""What an operator may set for a whole engine, and the host's share that it takes by default."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from sandboxd.engine.pool import PoolSettings
from sandboxd.errors import PolicyError

__all__ = ["EngineConfig", "host_memory_bytes"]

_PIDS_PER_RUN: Final = 256  # four times what a run may have by default
_ENGINE_PIDS: Final = 1024


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


def host_memory_bytes(proc: Path = Path("/proc")) -> int:
    """Memory of the host, or of the cgroup that this process is bound by. Source: meminfo, memory.max,
    memory.limit_in_bytes.
    """
    total = 0
    for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemTotal:"):
            total = int(line.split()[1]) << 10
    for line in (proc / "self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        for root, file in (
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes") if "memory" in controllers.split(",") else ("", ""),
            ("/sys/fs/cgroup", "memory.max") if not controllers else ("", ""),
        ):
            if not root:
                continue
            try:
                text = Path(f"{root}{path}/{file}").read_text(encoding="ascii").strip()
            except OSError:
                continue
            if text.isdigit() and 0 < int(text) < total:
                total = int(text)
    return total
