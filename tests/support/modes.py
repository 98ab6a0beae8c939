"""As whom the tests' engines run: SANDBOXD_TEST_MODE, one of MODES, and ``,no-cgroup`` where none is delegated.

Without the variable it is what this process can be, with cgroups. The mode picks the policy: a shipped one whose
``[require]`` is lowered by exactly what the mode lacks. A mode that is named must be one that this process is in: a
test never passes because less was asked for than is there.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from sandboxd import policy
from sandboxd.ids import rootless

if TYPE_CHECKING:
    from sandboxd.policy import Policy

__all__ = ["HAS_CGROUP", "MODE", "MODES", "ONE_ID", "ROOT", "policy_of"]

MODES: Final = ("root", "rootless", "rootless-one-id")


def _mine() -> str:
    if os.geteuid() == 0:
        return "root"
    return "rootless" if rootless.why_one_id() is None else "rootless-one-id"


_asked, _, _lacks = os.environ.get("SANDBOXD_TEST_MODE", "").partition(",")
MODE: Final = _asked or _mine()
HAS_CGROUP: Final = _lacks != "no-cgroup"
ROOT: Final = MODE == "root"
ONE_ID: Final = MODE == "rootless-one-id"

if MODE not in MODES or _lacks not in ("", "no-cgroup") or _mine() != MODE:
    raise RuntimeError(f"SANDBOXD_TEST_MODE is {_asked!r},{_lacks!r}, but this process is in mode {_mine()!r}")


def policy_of(name: str = "default") -> Policy:
    """The shipped policy *name*, lowered for this mode."""
    shipped = policy.load(name)
    lowered: dict[str, object] = {}
    if ONE_ID:
        lowered["own_uid"] = False
    if not HAS_CGROUP:
        lowered["cgroup"] = ()
    return shipped.model_copy(update={"require": shipped.require.model_copy(update=lowered)}) if lowered else shipped
