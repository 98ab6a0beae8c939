"""What a reload changes: the operator's files read again and compared with what is in force. Pure but for reading.

Everything is checked before anything is changed: the configuration, every policy of the operator's directory, and every
policy in force, whose zygotes are then made and proved by the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from sandboxd._util.ownership import check_daemons_file
from sandboxd.daemon.config import DaemonConfig, directories
from sandboxd.daemon.policy_cache import check_references
from sandboxd.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Plan", "plan"]

_ENGINE_LIVE: Final = ("max_clients", "max_queued")
_ENGINE_FIXED: Final = ("max_running", "memory_bytes", "pids", "ids", "pool", "audit")


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be in force: *config*; of the policies that were, *changed* with their new values, and *removed*."""

    config: DaemonConfig
    changed: dict[str, dict[str, Any]]
    removed: list[str]
    said: list[str]
    """A sentence for each thing that the operator should know."""


def plan(now: DaemonConfig, new: DaemonConfig, in_force: Mapping[str, tuple[dict[str, Any], str]]) -> Plan:
    """From *now* to *new*; *in_force* are plain values and filter's hash of each policy. Raises PolicyError that names
    all mistakes.
    """
    from sandboxd import seccomp
    from sandboxd.policy import load
    from sandboxd.policy.files import installed, policies_dir

    places = directories(new)
    known = installed(places)
    wrong: list[PolicyError] = []
    plains: dict[str, dict[str, Any]] = {}
    for name, file in known.items():
        if name in in_force or name == new.default_policy or file.parent != policies_dir():
            try:
                plains[name] = load(name, places, check_daemons_file).plain()
                check_references(plains[name], file)
            except PolicyError as error:
                wrong.append(error)
    if new.default_policy not in known:
        message = f"There is no policy {new.default_policy!r} any more, which is the default."
        wrong.append(PolicyError(message, key="default_policy"))
    if wrong:
        raise wrong[0] if len(wrong) == 1 else PolicyError("\n".join(str(one) for one in wrong))
    said: list[str] = []
    changed: dict[str, dict[str, Any]] = {}
    for name, (plain, sha256) in in_force.items():
        if name in plains:
            chosen = plains[name]["seccomp"]
            profile = seccomp.effective(chosen["profile"], chosen["allow"], chosen["deny"])
            if plains[name] != plain or profile.sha256 != sha256:
                changed[name] = plains[name]
                said.append(f"policy {name}: changed")
    if new.default_policy not in in_force:
        changed[new.default_policy] = plains[new.default_policy]
    if new.default_policy != now.default_policy:
        said.append(f"the default policy is {new.default_policy} now")
    removed = [name for name in in_force if name not in known]
    said += [f"policy {name}: removed" for name in removed]
    config, late = _merged(now, new)
    if late:
        said.append(f"from the next restart on: {', '.join(late)}")
    return Plan(config, changed, removed, said)


def _merged(now: DaemonConfig, new: DaemonConfig) -> tuple[DaemonConfig, list[str]]:
    """*new*, with what cannot be changed while the daemon runs as it is *now*, and the names of those keys."""
    late = [key for key in ("socket", "group") if getattr(now, key) != getattr(new, key)]
    late += [key for key in _ENGINE_FIXED if getattr(now.engine, key) != getattr(new.engine, key)]
    engine = replace(now.engine, **{key: getattr(new.engine, key) for key in _ENGINE_LIVE})
    return replace(new, socket=now.socket, group=now.group, engine=engine), late
