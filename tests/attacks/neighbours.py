"""Two runs of one engine: what one has must not be reached by another at the same time, or be there for the next.

*first* runs until *second* has ended, beside it. *second* has an outcome like any row (base.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PAIRS", "Pair"]


@dataclass(frozen=True, slots=True)
class Pair:
    """As ``Attack``; *second* is the attempt. What *first* fails at is no matter: its failure may be the wall."""

    id: str
    tries: str
    first: str
    second: str
    refusal: str
    alone: Mapping[str, str] = field(default_factory=dict)
    why: str = ""


_MOUNTS = "the mount namespace cannot be taken down: the program's source is in it"
_PIDS = "the pid namespace cannot be taken down: killing its init is how a run is ended"

PAIRS = (
    Pair(
        "abstract-socket",
        "connect to a neighbour's abstract socket",
        """
        server = socket.socket(socket.AF_UNIX)
        server.bind("\\0sandboxd-neighbour")
        server.listen()
        """,
        """
        with socket.socket(socket.AF_UNIX) as client:
            client.connect("\\0sandboxd-neighbour")
        """,
        "ECONNREFUSED",
        {"network": "ECONNREFUSED", "landlock": "EPERM"},
    ),
    Pair(
        "loopback",
        "connect to a neighbour's port",
        """
        server = socket.socket(socket.AF_INET)
        fcntl.ioctl(server, 0x8914, struct.pack("16sH14x", b"lo", 0x49))
        server.bind(("127.0.0.1", 4711))
        server.listen()
        """,
        """
        with socket.socket(socket.AF_INET) as client:
            fcntl.ioctl(client, 0x8914, struct.pack("16sH14x", b"lo", 0x49))
            client.connect(("127.0.0.1", 4711))
        """,
        "EAFNOSUPPORT",
        {"network": "ECONNREFUSED", "landlock": "EACCES", "seccomp": "EAFNOSUPPORT", "ids": "EPERM", "caps": "EPERM"},
    ),
    Pair(
        "system-v-memory",
        "attach a neighbour's System V segment",
        'call("shmget", 4711, 4096, 0o1666)',
        'call("shmat", call("shmget", 4711, 4096, 0), 0, 0)',
        "EPERM",
        {"ipc": "ENOENT", "seccomp": "EPERM"},
    ),
    Pair(
        "system-v-semaphore",
        "take a neighbour's semaphore",
        'call("semget", 4711, 1, 0o1666)',
        'call("semget", 4711, 1, 0)',
        "EPERM",
        {"ipc": "ENOENT", "seccomp": "EPERM"},
    ),
    Pair(
        "host-name",
        "read a message from a neighbour in the host's name",
        'call("sethostname", b"message", 7)',
        """
        if socket.gethostname() != "message":
            raise Refused("own")
        call("sethostname", b"sandbox", 7)
        """,
        "own",
        {"uts": "own", "seccomp": "own", "ids": "own", "caps": "own"},
    ),
    Pair(
        "shared-memory",
        "open a neighbour's POSIX shared memory",
        'open("/dev/shm/neighbour", "w").close(); os.chmod("/dev/shm/neighbour", 0o666)',
        'open("/dev/shm/neighbour")',
        "ENOENT",
        why=_MOUNTS,
    ),
    Pair(
        "temporary-file",
        "read a neighbour's temporary file",
        'open("/tmp/neighbour", "w").close(); os.chmod("/tmp/neighbour", 0o666)',
        'open("/tmp/neighbour")',
        "ENOENT",
        why=_MOUNTS,
    ),
    Pair(
        "workspace-file",
        "read a neighbour's workspace",
        'open("/workspace/neighbour", "w").close(); os.chmod("/workspace/neighbour", 0o666)',
        'open("/workspace/neighbour")',
        "ENOENT",
        why=_MOUNTS,
    ),
    Pair(
        "path-socket",
        "connect to a neighbour's socket",
        'server = socket.socket(socket.AF_UNIX); server.bind("/tmp/s"); os.chmod("/tmp/s", 0o777); server.listen()',
        'client = socket.socket(socket.AF_UNIX); client.connect("/tmp/s")',
        "ENOENT",
        why=_MOUNTS,
    ),
    Pair(
        "neighbours-processes",
        "find a neighbour's processes by number",
        "pass",
        """
        for pid in range(2, 40_000):
            if pid == os.getpid():
                continue
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                continue
            return
        raise Refused("none")
        """,
        "none",
        why=_PIDS,
    ),
    Pair(
        "watch-shared-files",
        "watch which shared files a neighbour opens",
        """
        while True:
            open("/usr/bin/env", "rb").close()
            sys.stdout.write(".")
            sys.stdout.flush()
        """,
        """
        import select
        watch = call("inotify_init1", 0)
        call("inotify_add_watch", watch, b"/usr/bin", 0x20)
        if not select.select([watch], [], [], 5)[0]:
            raise Refused("nothing")
        """,
        "ENOSYS",
        {"seccomp": "ENOSYS"},
    ),
    Pair(
        "lock-shared-file",
        "signal to a neighbour by a lock on a file of the image",
        'kept = os.open("/usr/bin/env", os.O_RDONLY); fcntl.flock(kept, fcntl.LOCK_EX)',
        'fcntl.flock(os.open("/usr/bin/env", os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)',
        "EAGAIN",
        why="a known limit: locks are the shared file's own; the row would say 'done' if cells had files of their own",
    ),
)
