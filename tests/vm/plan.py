"""What runs in the virtual machines: which tests, as whom, under which kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["root", "rootless", "rootless-one-id"]


@dataclass(frozen=True)
class Leg:
    """One call of pytest. *mode*: root in a system unit; an ordinary user with subordinate ids, or without, in a unit
    of that user's manager. *seconds* is its time limit.
    """

    name: str
    mode: Mode
    arguments: tuple[str, ...]
    seconds: int = 2400
    ends_by_reset: bool = False
    """It resets the machine; the next leg begins with the next boot."""


@dataclass(frozen=True)
class Machine:
    """One boot and its legs, one after the other."""

    name: str
    legs: tuple[Leg, ...]
    older_kernel: bool = False

    @property
    def resets(self) -> bool:
        """Whether it may boot more than once."""
        return any(leg.ends_by_reset for leg in self.legs)


# Every row with all walls up, without the repetition under `strict`, and who lives beside whom.
REFUSED = "attack_is_refused and not strict or neighbour or bait or size"
# Under a kernel with less Landlock, where some walls alone hold less.
WALLED = "attack_is_refused and not strict or out_of_reach or size"

MACHINES = (  # those that take longest first, for two run at a time
    Machine(
        "root",
        (
            Leg(
                "root",
                "root",
                (
                    *("tests/test_cgroup.py", "tests/test_cgroup_discovery.py", "tests/test_cgroup_v2.py"),
                    *("tests/test_walls.py", "tests/test_limits_hold.py", "tests/test_workspace.py"),
                    *("tests/test_results.py", "tests/test_tool_calls.py", "tests/test_syscall_sweep.py"),
                    *("-k", "not thousand and not flood"),
                ),
            ),
        ),
    ),
    Machine(
        "service",
        (
            Leg(
                "service",
                "root",
                ("tests/test_systemd.py", "tests/test_attacks.py", "-k", f"test_systemd or {REFUSED}"),
            ),
            Leg("until-reset", "root", ("tests/test_reset.py", "-k", "until"), 300, ends_by_reset=True),
            Leg("after-reset", "root", ("tests/test_reset.py", "-k", "after"), 300),
        ),
    ),
    Machine(
        "older",
        (
            Leg(
                "kernel-6.1",
                "root",
                (
                    *("tests/test_doctor.py", "tests/test_walls.py", "tests/test_seccomp_kernel.py"),
                    *("tests/test_cgroup.py", "tests/test_attacks.py"),
                    *("-k", f"not test_attacks and not git or {WALLED}"),  # git is not installed there
                ),
            ),
        ),
        older_kernel=True,
    ),
    Machine(
        "user",
        (
            Leg(
                "rootless",
                "rootless",
                ("tests/test_attacks.py", "tests/rootless", "-k", f"rootless or {REFUSED}"),
            ),
            Leg(
                "one-id",
                "rootless-one-id",
                ("tests/test_attacks.py", "tests/rootless", "-k", f"rootless or {REFUSED}"),
            ),
        ),
    ),
)
