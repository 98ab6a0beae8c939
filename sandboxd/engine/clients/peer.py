"""Who is at the other end of a connection, and what that one may see and take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sandboxd.protocol import packets

if TYPE_CHECKING:
    from sandboxd.engine.fair_share import FairShare

__all__ = ["Peer"]


@dataclass(frozen=True, slots=True)
class Peer:
    """One client. *facts* are the kernel's word: uid and pid; *sees_all*: it is the engine's operator; *share* is its
    part of the engine's time.
    """

    facts: dict[str, Any]
    sees_all: bool
    share: FairShare

    @property
    def uid(self) -> Any:
        """On whose account what it sent is closed."""
        return self.facts.get("uid")

    @property
    def bound_uid(self) -> Any:
        """Whose bounds count, and whose runs it sees; None for an operator, who has no such bounds and sees all."""
        return None if self.sees_all else self.facts.get("uid")

    @property
    def bounds(self) -> packets.Bounds:
        """What its messages may hold."""
        return packets.ANYTHING if self.sees_all else packets.REQUESTS

    def may_see(self, owner: dict[str, Any]) -> bool:
        """Whether it may see a run of *owner*'s."""
        return self.sees_all or owner.get("uid") == self.uid
