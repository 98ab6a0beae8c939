"""Files of the host's in a tree that every cell sees, made to be attacked: open to everybody as far as modes go.

``python -m tests.attacks.bait UID GID``, as root, makes them for a test run of that user, says where, and takes them
away when its input ends.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["bait"]


@contextmanager
def bait(uid: int = 0, gid: int = 0) -> Iterator[Path]:
    """A directory in the interpreter's environment, which is bound into cells at its own path; *uid*'s, as whom the
    engine runs. Only root can make it, and hands its name to a test run of somebody else (tests/support/plain.py).
    """
    made = os.environ.get("SANDBOXD_TEST_BAIT")
    if made is not None:
        yield Path(made)
        return
    place = Path(tempfile.mkdtemp(prefix=".sandboxd-bait-", dir=os.path.realpath(sys.prefix)))
    umask = os.umask(0)
    try:
        place.chmod(0o755)
        (place / "open").mkdir(0o777)
        for name, mode in (("open.txt", 0o666), ("open/a", 0o666), ("secret.txt", 0o600)):
            (place / name).write_text("bait")
            (place / name).chmod(mode)
        os.mkfifo(place / "fifo", 0o666)
        (place / "shadow").symlink_to("/etc/shadow")
        os.mknod(place / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        shutil.copy("/usr/bin/id", place / "suid-id")
        (place / "suid-id").chmod(0o4755)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(place / "host.sock"))
            (place / "host.sock").chmod(0o755)
            server.listen()
            if uid:
                for path in (place, *place.rglob("*")):
                    os.chown(path, uid, gid, follow_symlinks=False)
                (place / "suid-id").chmod(0o4755)  # which chown(2) takes away
            os.umask(umask)  # daemons refuse what tests would write meanwhile
            yield place
    finally:
        os.umask(umask)
        shutil.rmtree(place)


if __name__ == "__main__":
    with bait(int(sys.argv[1]), int(sys.argv[2])) as made_here:
        sys.stdout.write(f"{made_here}\n")
        sys.stdout.flush()
        sys.stdin.read()
