"""Rare corners of the kernel: the calls that most exploits begin with, foreign ABIs, and terminals.

Where a call could do harm or needs much set-up, it gets arguments that the kernel refuses in its own words: EFAULT or
EBADF means that the call was reached, the filter's errno that it was not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.attacks.base import Attack

if TYPE_CHECKING:
    from collections.abc import Iterator

# name: (what, arguments, refusal, what the kernel says itself, words for "not there")
_CALLS: dict[str, tuple[str, str, str, tuple[str, ...], tuple[str, ...]]] = {
    "bpf": ("load a program into the kernel", "0, 8, 48", "EPERM", ("EFAULT",), ("ENOSYS", "EPERM")),
    "userfaultfd": ("answer page faults in user space", "1", "EPERM", ("done",), ("ENOSYS", "EPERM")),
    "perf_event_open": ("count events", "8, 0, -1, -1, 0", "EPERM", ("EFAULT",), ("ENOSYS",)),
    "io_uring_setup": (
        "operations that pass by the filter",
        "1, ctypes.create_string_buffer(120)",
        "ENOSYS",
        ("done",),
        ("ENOSYS", "EPERM"),
    ),
    "io_uring_enter": (
        "operations that pass by the filter",
        "-1, 1, 0, 0, 0, 0",
        "ENOSYS",
        ("EBADF",),
        ("ENOSYS", "EPERM"),
    ),
    "io_uring_register": (
        "operations that pass by the filter",
        "-2, 0, 0, 0",
        "ENOSYS",
        ("EBADF", "EINVAL"),
        ("ENOSYS", "EPERM"),
    ),
    "fanotify_init": ("watch whole file systems", "0x200, 0", "EPERM", ("done",), ("ENOSYS", "EPERM")),
    "fanotify_mark": (
        "watch whole file systems",
        "-1, 1, 1, -100, 8",
        "EPERM",
        ("EBADF", "EINVAL", "EFAULT"),
        ("ENOSYS",),
    ),
    "memfd_secret": ("memory hidden from the kernel", "0", "EPERM", ("done",), ("ENOSYS",)),
    "vmsplice": ("pages gifted to a pipe", "-1, 0, 0, 0", "EPERM", ("EBADF",), ()),
    "remap_file_pages": ("non-linear mappings", "1, 0, 0, 0, 0", "EPERM", ("EINVAL",), ("ENOSYS",)),
    "modify_ldt": ("the segment table", "0, 0, 0", "EPERM", ("done", "EFAULT"), ("ENOSYS",)),
    "mbind": ("where memory lies", "1, 0, 0, 0, 0, 0", "EPERM", ("EINVAL",), ("ENOSYS",)),
    "set_mempolicy": ("where memory lies", "99, 0, 0", "EPERM", ("EINVAL",), ("ENOSYS",)),
    "migrate_pages": ("move memory", "0, 0, 8, 8", "EPERM", ("EINVAL", "EFAULT", "done"), ("ENOSYS",)),
    "move_pages": ("where another's pages lie", "0, 1, 8, 0, 8, 99", "EPERM", ("EINVAL",), ("ENOSYS",)),
    "io_setup": ("asynchronous I/O", "0, 8", "EPERM", ("EFAULT", "EINVAL"), ("ENOSYS",)),
    "io_submit": ("asynchronous I/O", "0, 1, 8", "EPERM", ("EINVAL",), ("ENOSYS",)),
    "lookup_dcookie": ("a path by its cookie", "1, 8, 8", "EPERM", ("EINVAL",), ("ENOSYS", "EPERM")),
    "add_key": (
        "keep a key, which is in no namespace",
        'b"user", b"sandboxd", b"x", 1, -2',
        "EPERM",
        ("done",),
        ("ENOSYS",),
    ),
    "keyctl": ("ask for a keyring", "0, -3, 1", "EPERM", ("done",), ("ENOSYS",)),
    "request_key": ("look a key up", 'b"user", b"sandboxd", 0, 0', "EPERM", ("ENOKEY",), ("ENOSYS",)),
    "shmget": ("a System V segment", "0, 4096, 0o1600", "EPERM", ("done",), ("ENOSYS",)),
    "semget": ("System V semaphores", "0, 1, 0o1600", "EPERM", ("done",), ("ENOSYS",)),
    "msgget": ("a System V queue", "0, 0o1600", "EPERM", ("done",), ("ENOSYS",)),
    "mq_open": ("a POSIX queue", 'b"sandboxd", 0o102, 0o600, 0', "EPERM", ("done",), ("ENOSYS",)),
    "mq_unlink": ("remove a POSIX queue", 'b"sandboxd-none"', "EPERM", ("ENOENT",), ("ENOSYS",)),
    "seccomp": ("one more filter, from the budget of the host", "1, 0, 8", "EPERM", ("EFAULT",), ()),
    "cachestat": ("what of a file is in the page cache", "-1, 8, 8, 0", "ENOSYS", ("EBADF",), ("ENOSYS",)),
    "lsm_list_modules": ("which security modules there are", "8, 8, 0", "ENOSYS", ("EFAULT",), ("ENOSYS",)),
    "sched_setscheduler": ("another scheduling class", '0, 3, struct.pack("i", 0)', "EPERM", ("done",), ()),
    "sched_setattr": ("a deadline class", "0, 8, 0", "EPERM", ("EFAULT",), ()),
    "ioprio_set": ("a better disk priority", "1, 0, 0x4000", "EPERM", ("done",), ()),
    "readahead": ("fill the page cache", "-1, 0, 0", "EPERM", ("EBADF",), ()),
    "syncfs": ("write back file systems that others use", "-1", "EPERM", ("EBADF",), ()),
    "uselib": ("an old loader", "8", "EPERM", ("EFAULT", "ENOSYS"), ()),
    "sysfs": ("file systems by number", "99, 0, 0", "EPERM", ("EINVAL", "ENOSYS"), ()),
    "ustat": ("another file system's free space", "0, 8", "EPERM", ("EINVAL",), ()),
}


_ALSO = {"mq_open": {"rlimits": "EMFILE", "landlock": "EACCES"}}
"""Walls beside the filter that stop the call alone."""


def _calls() -> Iterator[Attack]:
    for name, (what, arguments, refusal, opens, absent) in _CALLS.items():
        code = f'call("{name}", {arguments})'
        walls = {"seccomp": refusal, **_ALSO.get(name, {})}
        yield Attack(f"call-{name}", what, code, refusal, walls, opens=opens, absent=absent)


_HUGE_PAGES = (
    Attack(
        "memfd-hugetlb",
        "memory from the host's pool of huge pages, which no limit counts",
        'call("memfd_create", b"huge", 4)',
        "EINVAL",
        {"seccomp": "EINVAL"},
        absent=("ENOSYS",),
    ),
    Attack(
        "mmap-hugetlb",
        "memory from the host's pool of huge pages, which no limit counts",
        'call("mmap", 0, 1 << 21, 3, 0x40022, -1, 0)',
        "ENOMEM",
        why="the filter; a kernel whose pool is empty says the same",
    ),
    Attack(
        "madvise-collapse",
        "huge pages of the image that all cells share",
        """
        area = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area.write(bytes(8 << 20))
        start = -(-ctypes.addressof(ctypes.c_char.from_buffer(area)) // (2 << 20)) * (2 << 20)
        call("madvise", start, 2 << 20, 25)
        """,
        "EINVAL",
        {"seccomp": "EINVAL"},
        absent=("EAGAIN", "ENOMEM", "EBUSY"),
    ),
    Attack(
        "madvise-pageout",
        "pages of the image that all cells share written out",
        """
        page = mmap.mmap(-1, 4096)
        call("madvise", ctypes.addressof(ctypes.c_char.from_buffer(page)), 4096, 21)
        """,
        "EINVAL",
        {"seccomp": "EINVAL"},
    ),
    Attack(
        "madvise-mergeable",
        "find pages of others by the time that merged ones take to be written",
        """
        page = mmap.mmap(-1, 4096)
        call("madvise", ctypes.addressof(ctypes.c_char.from_buffer(page)), 4096, 12)
        """,
        "EINVAL",
        {"seccomp": "EINVAL"},
    ),
)

_I386 = """
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))  # mov eax, getpid; int 0x80; ret
run = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
if run() != os.getpid():
    raise Refused("no-i386")
"""
_THREAD = """
import threading
seen = []
def attempt():
    try:
        call("keyctl", 0, -3, 1)
    except OSError as error:
        seen.append(error)
thread = threading.Thread(target=attempt)
thread.start()
thread.join()
if seen:
    raise seen[0]
"""
_CHILD = """
import subprocess
source = "import ctypes; l = ctypes.CDLL(None, use_errno=True); l.syscall(250, 0, -3, 1); print(ctypes.get_errno())"
number = int(subprocess.run([sys.executable, "-c", source], capture_output=True, text=True).stdout)
if number:
    raise OSError(number, "keyctl")
"""

_IOCTLS = {
    "tiocsti": (0x5412, "EPERM", "type into a terminal (CVE-2017-5226)"),
    "tioclinux": (0x541C, "EPERM", "paste into a console (CVE-2023-28100)"),
    "tiocsctty": (0x540E, "ENOTTY", "take a terminal over"),
}


def _ioctls() -> Iterator[Attack]:
    for name, (number, refusal, what) in _IOCTLS.items():
        for suffix, bits in (("", 0), ("-high-bits", 1 << 32)):
            # A pipe has no terminal's ioctl: the kernel's own ENOTTY shows that it was reached.
            code = f'call("ioctl", 0, {number | bits:#x}, b"x")'
            if refusal == "ENOTTY":
                yield Attack(
                    f"ioctl-{name}{suffix}",
                    what,
                    code,
                    refusal,
                    why="there is no terminal, so the kernel says the same",
                )
            else:
                yield Attack(f"ioctl-{name}{suffix}", what, code, refusal, {"seccomp": refusal}, opens=("ENOTTY",))


# The kernel would say EBADF, or ENOMEM for memory that is not mapped: only the filter can answer with success.
_FLUSHES = {
    "fsync": ("have the host's disk flush its cache, by a file that can only be read", "-1", "EBADF"),
    "fdatasync": ("have the host's disk flush its cache, by a file that can only be read", "-1", "EBADF"),
    "sync_file_range": ("have a file of the host written back", "-1, 0, 0, 7", "EBADF"),
    "msync": ("have the host's disk flush its cache, by a mapping", "4096, 4096, 4", "ENOMEM"),
    "fadvise64": ("drop pages of a file that others use from the page cache", "-1, 0, 0, 4", "EBADF"),
}


def _flushes() -> Iterator[Attack]:
    for name, (what, arguments, kernels) in _FLUSHES.items():
        code = f'call("{name}", {arguments})\nraise Refused("not-asked")'
        yield Attack(f"call-{name}", what, code, "not-asked", {"seccomp": "not-asked"}, opens=(kernels,))


ATTACKS = (
    *_calls(),
    *_flushes(),
    *_HUGE_PAGES,
    *_ioctls(),
    Attack(
        "i386-call",
        "a system call of another ABI by int 0x80",
        _I386,
        "denied",
        {"seccomp": "denied"},
        absent=("killed",),
    ),
    Attack(
        "x32-call",
        "a number of the x32 ABI",
        "call(39 | 0x40000000)",
        "denied",
        {"seccomp": "denied"},
        absent=("ENOSYS",),
    ),
    Attack(
        "x32-only-call",
        "a number that only x32 has",
        "call(520 | 0x40000000)",
        "denied",
        {"seccomp": "denied"},
        opens=("EFAULT",),
        absent=("ENOSYS",),
    ),
    Attack("unknown-call", "a number of tomorrow", "call(9999)", "ENOSYS", why="the kernel says the same"),
    Attack("from-a-thread", "a refused call from a new thread", _THREAD, "EPERM", {"seccomp": "EPERM"}),
    Attack("from-a-child", "a refused call after fork and exec", _CHILD, "EPERM", {"seccomp": "EPERM"}),
    Attack(
        "open-terminal",
        "the controlling terminal",
        'os.open("/dev/tty", os.O_RDWR)',
        "ENOENT",
        why="there is no such device in the cell's /dev",
    ),
    Attack(
        "open-ptmx",
        "a new pseudo-terminal",
        'os.open("/dev/ptmx", os.O_RDWR)',
        "ENOENT",
        why="there is no such device in the cell's /dev",
    ),
    Attack(
        "file-flags",
        "flags that only root may set",
        """
        with open("/tmp/x", "w") as file:
            fcntl.ioctl(file, 0x80086601, bytes(8))
        """,
        "ENOTTY",
        {"seccomp": "ENOTTY"},
        absent=("ENOTTY",),
    ),
    Attack(
        "lease",
        "hold up whoever opens a file",
        'fcntl.fcntl(os.open("/tmp/x", os.O_CREAT), 1024, fcntl.F_RDLCK)',
        "EPERM",
        {"seccomp": "EPERM"},
    ),
    Attack(
        "pipe-size",
        "use up the pages that the engine's pipes may have",
        "fcntl.fcntl(os.pipe()[1], 1031, 1 << 17)",
        "EPERM",
        {"seccomp": "EPERM"},
    ),
    Attack(
        "socket-cookie",
        "a number that counts the sockets of the host",
        "socket.socketpair()[0].getsockopt(1, 57, 8)",
        "ENOPROTOOPT",
        {"seccomp": "ENOPROTOOPT"},
    ),
    Attack(
        "notify",
        "watch a directory",
        'fcntl.fcntl(os.open("/tmp", os.O_RDONLY), 1026, 1)',
        "EPERM",
        {"seccomp": "EPERM"},
        absent=("EINVAL",),
    ),
)
