"""What runs in the virtual machines: which tests, as whom, under which kernel, with systemd or without.

A machine is here for what only it can show; docs/contributing.md says what that is. The whole attack table runs on the
host, and once under the oldest kernel: elsewhere a sample of its rows (``tests.attacks.SAMPLE``) is enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["root", "rootless", "rootless-one-id"]
Kernel = Literal["6.1", "6.12", "newest"]
"""Debian 12's, Debian 13's, or the newest that Debian 13's backports have."""


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
    """One boot and its legs, one after the other.

    *cpus* is 1 unless tests need several: a second one costs the emulator a quarter more for the same work. *cmdline*
    is what its kernel is told in addition.
    """

    name: str
    legs: tuple[Leg, ...]
    kernel: Kernel = "6.12"
    systemd: bool = True
    cpus: int = 1
    cmdline: tuple[str, ...] = ()

    @property
    def resets(self) -> bool:
        """Whether it may boot more than once."""
        return any(leg.ends_by_reset for leg in self.legs)


REFUSED = tuple(
    f"tests/attacks/test_attacks.py::{name}"
    for name in ("test_attack_is_refused", "test_neighbour_is_out_of_reach", "test_no_attack_reached_the_bait")
)
"""With every wall up; each wall alone is the host's to show."""
SAMPLE = ("-m", "not exhaustive")

MACHINES = (  # those that take longest first, for two run at a time
    Machine(
        "service",
        (
            Leg("service", "root", ("tests/daemon/test_systemd.py",)),
            Leg("until-reset", "root", ("tests/engine/test_reset.py", "-k", "until"), 300, ends_by_reset=True),
            Leg("after-reset", "root", ("tests/engine/test_reset.py", "-k", "after"), 300),
        ),
    ),
    Machine(
        "user",
        (
            Leg(
                "rootless",
                "rootless",
                ("tests/rootless/test_engine.py", "tests/rootless/test_user_service.py", *REFUSED, *SAMPLE),
            ),
            Leg("one-id", "rootless-one-id", ("tests/rootless/test_engine.py", *REFUSED, *SAMPLE)),
            # Last: it removes users, and logind remembers for a while that their uids linger.
            Leg("scopes", "root", ("tests/cgroup/test_cgroup_v2.py",)),
        ),
    ),
    Machine(
        "older",
        (
            Leg(
                "kernel-6.1",
                "root",
                (
                    *(
                        "tests/cgroup/test_cgroup.py",
                        "tests/unit/test_doctor.py",
                        "tests/seccomp/test_seccomp_kernel.py",
                        *REFUSED,
                    ),
                    *("tests/engine/test_hold_up.py", "tests/engine/test_shared_budgets.py"),
                    *("-m", "kernel", "-k", "not scientific and not git and not compiler"),  # neither is installed
                ),
            ),
        ),
        kernel="6.1",
        systemd=False,
    ),
    Machine(
        "v2",
        (
            Leg(
                "cgroup-v2",
                "root",
                (
                    *("tests/cgroup/test_cgroup.py", "tests/engine/test_walls.py", "tests/engine/test_limits_hold.py"),
                    *(
                        "tests/engine/test_results.py",
                        "tests/engine/test_tool_calls.py",
                        "tests/engine/test_hold_up.py",
                    ),
                    *("tests/engine/test_slots.py", "-m", "cgroup"),
                ),
            ),
        ),
        systemd=False,
        cpus=2,
    ),
    Machine(
        "newest",
        (Leg("kernel-newest", "root", ("tests/engine/test_landlock.py", "-m", "newest"), 300),),
        kernel="newest",
        systemd=False,
        cmdline=("audit=1",),
    ),
)
