"""Why user namespaces of an ordinary user are refused or of no use here, and what mends it: three switches.

Nothing is judged by them alone; they explain a refusal that came.

Sources: user_namespaces(7), namespaces(7); Ubuntu's "Restricted unprivileged user namespaces"; Debian's kernel patch
"add sysctl to disallow unprivileged CLONE_NEWUSER".
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Final

from sandboxd.errors import Unavailable

__all__ = ["causes", "explained"]

_STAGES: Final = ("clone", "ids", "maps", "private", "root", "mounts", "pivot", "hostname", "proc", "forgo")


def causes(root: Path = Path("/")) -> list[tuple[str, str]]:
    """What of this host's settings stands against user namespaces of ordinary users, each with its fix."""
    found = []
    if _word(root, "user/max_user_namespaces") == "0":
        found.append(("user.max_user_namespaces is 0", "sysctl -w user.max_user_namespaces=10000"))
    if _word(root, "kernel/unprivileged_userns_clone") == "0":
        found.append(
            ("kernel.unprivileged_userns_clone is 0", "sysctl -w kernel.unprivileged_userns_clone=1 (Debian's switch)")
        )
    if _word(root, "kernel/apparmor_restrict_unprivileged_userns") == "1":
        python = os.path.realpath(sys.executable or "/usr/bin/python3")
        found.append(
            (
                "kernel.apparmor_restrict_unprivileged_userns is 1",
                "give the interpreter an AppArmor profile: printf 'abi <abi/4.0>,\\ninclude <tunables/global>\\n"
                f"profile sandboxd {python} flags=(unconfined) {{ userns, }}\\n' > /etc/apparmor.d/sandboxd && "
                "apparmor_parser -r /etc/apparmor.d/sandboxd; or, for every program: "
                "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
            )
        )
    return found


def _word(root: Path, name: str) -> str | None:
    try:
        return (root / "proc/sys" / name).read_text("ascii").strip()
    except OSError:
        return None


def explained(refusal: Unavailable, root: Path = Path("/")) -> Unavailable:
    """*refusal* of a step that user namespaces are for, with the switch that is behind it, if one is."""
    if refusal.stage not in _STAGES or refusal.errno not in (
        errno.EPERM,
        errno.EACCES,
        errno.ENOSPC,
        errno.EUSERS,
    ):
        return refusal
    known = causes(root)
    if os.geteuid() == 0:  # which the other switches do not concern
        known = [one for one in known if one[0].startswith("user.")]
    if not known:
        return refusal
    message = f"{refusal.message}: {', '.join(why for why, _ in known)}"
    return Unavailable(refusal.stage, message, errno=refusal.errno, fix="; ".join(fix for _, fix in known))
