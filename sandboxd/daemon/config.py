"""The daemon's configuration file: TOML, checked whole before anything is used.

Read at the start and again by a reload; what is wrong is named with file, line and key.
"""

from __future__ import annotations

import grp
import logging
import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sandboxd._util.ownership import check, check_daemons_file
from sandboxd.engine.config import AuditSettings, EngineConfig
from sandboxd.errors import PolicyError
from sandboxd.ids.ranges import parse_config as parse_range
from sandboxd.limits import LIMITS, parse, shown

__all__ = ["CONFIG", "GROUP", "SOCKET", "DaemonConfig", "directories", "find_policy", "group_id", "load_config"]

log = logging.getLogger("sandboxd")

SOCKET: Final = Path("/run/sandboxd/sandboxd.sock")
CONFIG: Final = Path("/etc/sandboxd/sandboxd.toml")
GROUP: Final = "sandboxd"
AUDIT: Final = Path("/var/log/sandboxd/audit.jsonl")
DRAIN_SECONDS: Final = 20.0
_MOST_DRAIN_SECONDS: Final = 86_400.0
_ENGINE_KEYS: Final = ("max_running", "max_queued", "max_clients", "memory_bytes", "pids", "ids", "pool", "audit")
_TEXT_KEYS: Final = ("socket", "group", "policies_dir", "default_policy")


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """The configuration file's keys; a command line option for the socket goes before it."""

    socket: Path = SOCKET
    group: str | None = GROUP
    policies_dir: Path | None = None
    default_policy: str = "default"
    drain_seconds: float = DRAIN_SECONDS
    """So long a stop waits for runs that are under way."""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(audit=AuditSettings(str(AUDIT))))


def load_config(path: Path | None) -> DaemonConfig:
    """Read a TOML file; without *path* the default one if it is there. Raises PolicyError that names file and key."""
    chosen = path or CONFIG
    try:
        return _read_config(chosen, path is None)
    except PolicyError as error:
        from sandboxd.policy.model import located

        raise located(error, chosen) from None


def _read_config(chosen: Path, may_be_missing: bool) -> DaemonConfig:
    try:
        with open(chosen, "rb") as file:
            check_daemons_file(chosen, file.fileno())
            table = tomllib.load(file)
    except FileNotFoundError:
        if may_be_missing:
            config = DaemonConfig()
            _check_directory(config)
            return config
        raise PolicyError("there is no such file", file=str(chosen)) from None
    except (OSError, ValueError) as error:
        raise PolicyError(f"it cannot be read: {error}", file=str(chosen)) from None
    known = (*_TEXT_KEYS, "drain_seconds", *_ENGINE_KEYS)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise PolicyError(f"{key!r} is not a setting. They are {', '.join(known)}.", key=key)
        if key in _TEXT_KEYS and not (isinstance(value, str) and value):
            raise PolicyError(f"{key} must be a string, not {shown(value)}.", key=key)
        values[key] = value
    if "memory_bytes" in values:
        values["memory_bytes"] = _size("memory_bytes", values["memory_bytes"])
    if "drain_seconds" in values:
        values["drain_seconds"] = _seconds("drain_seconds", values["drain_seconds"])
    values["audit"] = _audit(values.get("audit", {}))
    engine = EngineConfig.from_plain({key: values.pop(key) for key in _ENGINE_KEYS if key in values})
    if engine.ids is not None:
        try:
            parse_range(engine.ids)
        except ValueError as error:
            raise PolicyError(f"{error}.", key="ids") from None
    for key in ("socket", "policies_dir"):
        if key in values:
            values[key] = Path(values[key])
    config = DaemonConfig(**values, engine=engine)
    if "group" in values:
        group_id(config.group)
    if config.policies_dir is not None and not (config.policies_dir.is_absolute() and config.policies_dir.is_dir()):
        what = (
            f"policies_dir must be the absolute path of a directory that exists, not {shown(str(config.policies_dir))}"
        )
        raise PolicyError(f"{what}.", key="policies_dir")
    _check_directory(config)
    if "default_policy" in values:
        find_policy(config, config.default_policy, "default_policy")
    return config


def _check_directory(config: DaemonConfig) -> None:
    """Raises PolicyError when others could add policies to those of the operator."""
    from sandboxd.policy.files import SYSTEM_DIR, policies_dir

    directory, key = config.policies_dir or SYSTEM_DIR, "policies_dir" if config.policies_dir is not None else None
    if directory == policies_dir():
        return  # as safe as the program that it belongs to
    try:
        check(directory, key)
    except FileNotFoundError:
        return  # of the default one, which need not be there
    except OSError as error:
        raise PolicyError(f"policies_dir: {error.filename}: {error.strerror}.", key=key) from None


def _size(key: str, value: object) -> int:
    """Bytes from a number or a string such as "4G". Raises PolicyError."""
    limit = LIMITS["memory_bytes"]
    try:
        return int(parse(limit.name, value) or 0)
    except PolicyError:
        raise PolicyError(f"{key}: {shown(value)} is not allowed; allowed: {limit.allowed}.", key=key) from None


def _seconds(key: str, value: object) -> float:
    """A span that may be 0. Raises PolicyError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST_DRAIN_SECONDS:
        most = f"{_MOST_DRAIN_SECONDS:,.0f}"
        raise PolicyError(f"{key} must be a number of seconds from 0 to {most}, not {shown(value)}.", key=key)
    return float(value)


def _audit(table: object) -> dict[str, Any] | None:
    """[audit] as the engine's setting: on unless ``enabled`` is false. Raises PolicyError."""
    if not isinstance(table, dict):
        raise PolicyError(f"audit must be a table, [audit], not {shown(table)}.", key="audit")
    plain: dict[str, Any] = {"path": str(AUDIT), **table}
    enabled = plain.pop("enabled", True)
    if type(enabled) is not bool:
        raise PolicyError(f"audit.enabled must be true or false, not {shown(enabled)}.", key="audit.enabled")
    if "max_bytes" in plain:
        try:
            plain["max_bytes"] = int(parse("workspace_bytes", plain["max_bytes"]) or 0)
        except PolicyError:
            what = f"{shown(plain['max_bytes'])} is not allowed; allowed: {LIMITS['workspace_bytes'].allowed}"
            raise PolicyError(f"audit.max_bytes: {what}.", key="audit.max_bytes") from None
    AuditSettings.from_plain(plain)  # also when it is off: a mistake should not wait until it is on
    return plain if enabled else None


def directories(config: DaemonConfig) -> list[Path]:
    """Where policies are looked for, in this order: the operator's directory, then the shipped ones."""
    from sandboxd.policy.files import SYSTEM_DIR, policies_dir

    return [config.policies_dir or SYSTEM_DIR, policies_dir()]


def find_policy(config: DaemonConfig, name: str, key: str | None = None) -> Path:
    """The file of the policy *name*. Raises PolicyError, for *key*."""
    from sandboxd.policy.files import find

    try:
        return find(name, directories(config))
    except PolicyError as error:
        raise PolicyError(error.message, key=key) from None


def group_id(group: str | None) -> int:
    """The group's id; -1, which changes nothing, when the default group was never made."""
    if group is None:
        return -1
    try:
        gid = grp.getgrnam(group).gr_gid
        if group == GROUP and os.geteuid() != 0 and gid not in (os.getegid(), *os.getgroups()):
            return -1  # an ordinary user's own daemon, which nobody gave a group: its user connects
        return gid
    except KeyError:
        if group == GROUP:
            if os.geteuid() == 0:
                log.warning("there is no group %s: only root can connect; groupadd --system %s", group, group)
            return -1
        raise PolicyError(f"there is no group {group!r} on this host.", key="group") from None
