"""Other processes: seeing, steering, signalling them. pid 1 of the cell is the one other process that is there."""

from __future__ import annotations

from tests.attacks.base import Attack

_PIDS = "the pid namespace cannot be taken down: killing its init is how a run is ended"
_CHILD = """
pid = os.fork()
if pid == 0:
    signal.pause()
try:
    {try_it}
finally:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


def _on_child(code: str) -> str:
    return _CHILD.replace("{try_it}", code)


_READ = (
    'call("process_vm_readv", {pid}, struct.pack("QQ", ctypes.addressof(SCRATCH), 8), 1, struct.pack("QQ", 8, 8), 1, 0)'
)

ATTACKS = (
    Attack(
        "ptrace-init",
        "trace pid 1",
        'call("ptrace", 0x4206, 1, 0, 0)',
        "EPERM",
        {"seccomp": "EPERM", "ids": "EPERM", "caps": "EPERM", "landlock": "EPERM"},
    ),
    Attack(
        "ptrace-child",
        "trace a child",
        _on_child('call("ptrace", 0x4206, pid, 0, 0)'),
        "EPERM",
        {"seccomp": "EPERM", "ids": "EPERM"},
    ),
    Attack(
        "ptrace-traceme",
        "be traced",
        'call("ptrace", 0, 0, 0, 0)',
        "EPERM",
        {"seccomp": "EPERM"},
        absent=("EPERM",),
    ),
    Attack(
        "read-init",
        "the memory of pid 1",
        _READ.format(pid=1),
        "EPERM",
        {"seccomp": "EPERM", "ids": "EPERM", "caps": "EPERM", "landlock": "EPERM"},
        opens=("EFAULT",),
    ),
    Attack(
        "read-child",
        "the memory of a child",
        _on_child(_READ.format(pid="pid")),
        "EPERM",
        {"seccomp": "EPERM", "ids": "EPERM"},
        opens=("EFAULT",),
    ),
    Attack(
        "write-child",
        "write the memory of a child",
        _on_child(_READ.format(pid="pid").replace("readv", "writev")),
        "EPERM",
        {"seccomp": "EPERM", "ids": "EPERM"},
        opens=("EFAULT",),
    ),
    Attack(
        "mem-of-init",
        "the memory of pid 1 as a file",
        'open("/proc/1/mem", "rb")',
        "ENOENT",
        {"ids": "ENOENT", "caps": "ENOENT", "landlock": "ENOENT"},
    ),
    Attack(
        "environ-of-init",
        "the environment of pid 1",
        'open("/proc/1/environ").read()',
        "ENOENT",
        {"ids": "ENOENT", "caps": "ENOENT", "landlock": "ENOENT"},
    ),
    Attack(
        "fds-of-init",
        "the descriptors of pid 1",
        'os.listdir("/proc/1/fd")',
        "ENOENT",
        {"ids": "ENOENT", "caps": "ENOENT", "landlock": "ENOENT"},
    ),
    Attack("pidfd", "a descriptor for a process", 'call("pidfd_open", 1, 0)', "ENOSYS", {"seccomp": "ENOSYS"}),
    Attack(
        "pidfd-signal",
        "a signal through one",
        'call("pidfd_send_signal", -1, 9, 0, 0)',
        "ENOSYS",
        {"seccomp": "ENOSYS"},
        opens=("EBADF",),
    ),
    Attack(
        "pidfd-getfd",
        "another's descriptor",
        'call("pidfd_getfd", -1, 0, 0)',
        "EPERM",
        {"seccomp": "EPERM"},
        opens=("EBADF",),
    ),
    Attack(
        "process-madvise",
        "advise another's memory away",
        'call("process_madvise", -1, 8, 1, 4, 0)',
        "EPERM",
        {"seccomp": "EPERM"},
        opens=("EBADF", "EFAULT"),
    ),
    Attack(
        "process-mrelease",
        "reap another's memory",
        'call("process_mrelease", -1, 0)',
        "EPERM",
        {"seccomp": "EPERM"},
        opens=("EBADF",),
    ),
    Attack(
        "kcmp",
        "compare kernel objects",
        'call("kcmp", os.getpid(), os.getpid(), 0, 0, 0)',
        "EPERM",
        {"seccomp": "EPERM"},
        absent=("ENOSYS",),
    ),
    Attack(
        "limits-of-init",
        "the limits of pid 1",
        'call("prlimit64", 1, 7, 0, ctypes.create_string_buffer(16))',
        "EPERM",
        {"seccomp": "EPERM", "ids": "EPERM", "caps": "EPERM"},
    ),
    Attack(
        "limits-of-self-by-pid",
        "its own limits by number: a filter cannot tell whose",
        'call("prlimit64", os.getpid(), 7, 0, ctypes.create_string_buffer(16))',
        "EPERM",
        {"seccomp": "EPERM"},
    ),
    Attack(
        "raise-descriptors",
        "more descriptors than the policy allows",
        'call("prlimit64", 0, 7, struct.pack("QQ", 512, 512), 0)',
        "EPERM",
        {"rlimits": "EPERM"},
    ),
    Attack(
        "raise-core",
        "core files",
        'call("prlimit64", 0, 4, struct.pack("QQ", 1 << 20, 1 << 20), 0)',
        "EPERM",
        why="the zygote has given core files up for good",
    ),
    Attack(
        "dump-core",
        "a core file, or the host's handler for one",
        """
        pid = os.fork()
        if pid == 0:
            os.abort()
        if not os.WCOREDUMP(os.waitpid(pid, 0)[1]):
            raise Refused("none")
        """,
        "none",
        why="the zygote has given core files up for good",
    ),
    Attack(
        "lock-memory",
        "memory that cannot be swapped",
        'call("mlock", ctypes.create_string_buffer(1 << 20), 1 << 20)',
        "ENOMEM",
        {"rlimits": "ENOMEM"},
        absent=("ENOMEM",),
    ),
    Attack(
        "queue-signals",
        "the host's budget of pending signals",
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, [40])
        for _ in range(400):
            call("rt_sigqueueinfo", os.getpid(), 40, struct.pack("3i116x", 40, 0, -1))
        """,
        "EAGAIN",
        {"rlimits": "EAGAIN"},
    ),
    Attack(
        "nice",
        "a higher priority",
        "os.setpriority(os.PRIO_PROCESS, 0, -5)",
        "EACCES",
        why="needs a capability over the host",
    ),
    Attack(
        "kill-init",
        "kill pid 1",
        "os.kill(1, signal.SIGKILL)",
        "EPERM",
        {"ids": "EPERM", "caps": "EPERM", "landlock": "EPERM"},
    ),
    Attack(
        "probe-init",
        "ask whether pid 1 could be signalled",
        "os.kill(1, 0)",
        "EPERM",
        {"ids": "EPERM", "caps": "EPERM", "landlock": "EPERM"},
    ),
    Attack("kill-everyone", "kill all that may be killed", "os.kill(-1, signal.SIGTERM)", "ESRCH", why=_PIDS),
    Attack(
        "kill-host",
        "signal the program that uses the Sandbox",
        'os.kill(int(os.environ["HOST_PID"]), 0)',
        "ESRCH",
        why=_PIDS,
    ),
    Attack(
        "kill-parent-group",
        "the group of whoever made the cell",
        """
        if os.getpgrp() == os.getpid() == os.getsid(0):
            raise Refused("own-group")
        """,
        "own-group",
        why="a session of its own is no wall of the tests': nothing but the cell could be in its group",
    ),
    Attack(
        "see-processes",
        "other processes in /proc",
        """
        if {name for name in os.listdir("/proc") if name.isdigit()} == {str(os.getpid())}:
            raise Refused("alone")
        """,
        "alone",
        {"ids": "alone", "caps": "alone", "landlock": "alone"},
    ),
    Attack(
        "host-environment",
        "the caller's environment",
        """
        if os.environ["CANARY_NAME"] not in os.environ:
            raise Refused("clean")
        """,
        "clean",
        why="the nursery is executed with a fixed environment",
    ),
    Attack(
        "signal-owner",
        "have SIGIO sent to the program that uses the Sandbox",
        'fcntl.fcntl(0, fcntl.F_SETOWN, int(os.environ["HOST_PID"]))',
        "ESRCH",
        why=_PIDS,
    ),
    Attack(
        "forge-sender",
        "a queued signal that claims to come from elsewhere",
        'call("rt_sigqueueinfo", 1, 10, struct.pack("3i116x", 10, 0, 0))',
        "EPERM",
        why="the kernel refuses forged senders to everybody",
    ),
    Attack(
        "peer-pidfd",
        "a descriptor of the engine's process, from the channel: pid namespaces do not stop it",
        """
        with socket.socket(fileno=os.dup(3)) as channel:
            channel.getsockopt(socket.SOL_SOCKET, 77, 4)
        """,
        "ENOPROTOOPT",
        {"seccomp": "ENOPROTOOPT"},
        absent=("ENOPROTOOPT",),
    ),
    Attack(
        "message-pidfd",
        "the same with each message of the engine's",
        """
        with socket.socket(fileno=os.dup(3)) as channel:
            channel.setsockopt(socket.SOL_SOCKET, 76, 1)
        """,
        "ENOPROTOOPT",
        {"seccomp": "ENOPROTOOPT"},
        absent=("ENOPROTOOPT",),
    ),
    Attack(
        "peer-credentials",
        "the engine's pid and uid, from the channel",
        """
        with socket.socket(fileno=os.dup(3)) as channel:
            pid, uid, gid = struct.unpack("3i", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if (pid, uid, gid) == (0, 0, 0):  # the root of the cell's own user namespace, who made the channel
            raise Refused("nobody")
        """,
        "nobody",
        why="pid and user namespace translate them, and cannot be taken down",
    ),
)
