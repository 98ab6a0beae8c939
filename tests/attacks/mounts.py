"""Changing what is mounted, and walking out of the root."""

from __future__ import annotations

from tests.attacks.base import Attack

_ALL = {"seccomp": "EPERM", "ids": "EPERM", "caps": "EPERM", "landlock": "EPERM"}
_ADMIN = {"seccomp": "EPERM", "ids": "EPERM", "caps": "EPERM"}

ATTACKS = (
    Attack("mount-tmpfs", "mount a file system", 'call("mount", b"none", b"/tmp", b"tmpfs", 0, 0)', "EPERM", _ALL),
    Attack(
        "mount-proc",
        "mount a proc without restrictions",
        'call("mount", b"none", b"/tmp", b"proc", 0, 0)',
        "EPERM",
        _ALL,
    ),
    Attack("mount-bind", "bind one place onto another", 'call("mount", b"/usr", b"/tmp", 0, 0x1000, 0)', "EPERM", _ALL),
    Attack(
        "remount-writable", "make /usr writable again", 'call("mount", 0, b"/usr", 0, 0x1000 | 0x20, 0)', "EPERM", _ALL
    ),
    Attack("make-shared", "let mounts propagate", 'call("mount", 0, b"/workspace", 0, 1 << 20, 0)', "EPERM", _ALL),
    Attack("umount-workspace", "look below a mount", 'call("umount2", b"/tmp", 2)', "EPERM", _ALL),
    Attack(
        "move-mount",
        "move a mount elsewhere",
        'call("move_mount", -100, b"/dev/shm", -100, b"/tmp", 0)',
        "EPERM",
        _ALL,
    ),
    Attack("open-tree", "clone a mount tree", 'call("open_tree", -100, b"/usr", 1)', "EPERM", _ADMIN),
    Attack(
        "mount-setattr",
        "clear read-only",
        'call("mount_setattr", -100, b"/usr", 0, struct.pack("4Q", 0, 1, 0, 0), 32)',
        "EPERM",
        _ADMIN,
    ),
    Attack("fsopen", "begin a file system", 'call("fsopen", b"tmpfs", 0)', "EPERM", _ADMIN),
    Attack("fsmount", "make a mount of a context", 'call("fsmount", -1, 0, 0)', "EPERM", _ADMIN, opens=("EBADF",)),
    Attack(
        "fsconfig",
        "configure a context",
        'call("fsconfig", -1, 6, 0, 0, 0)',
        "EPERM",
        {"seccomp": "EPERM"},
        opens=("EINVAL", "EBADF"),
    ),
    Attack("fspick", "reconfigure a file system", 'call("fspick", -100, b"/tmp", 0)', "EPERM", _ADMIN),
    Attack("pivot-root", "another root", 'call("pivot_root", 8, 8)', "EPERM", _ADMIN, opens=("EFAULT",)),
    Attack(
        "chroot-escape",
        "chroot below an open directory, then walk up",
        """
        os.mkdir("/tmp/jail")
        here = os.open("/", os.O_RDONLY)
        call("chroot", b"/tmp/jail")
        os.fchdir(here)
        """,
        "EPERM",
        _ADMIN,
    ),
    Attack(
        "statmount",
        "ask the kernel about mounts",
        'call("statmount", 8, 8, 0, 0)',
        "ENOSYS",
        {"seccomp": "ENOSYS"},
        opens=("EFAULT", "EINVAL"),
        absent=("ENOSYS",),
    ),
    Attack(
        "listmount",
        "list the mounts",
        'call("listmount", 8, 8, 0, 0)',
        "ENOSYS",
        {"seccomp": "ENOSYS"},
        opens=("EFAULT",),
        absent=("ENOSYS",),
    ),
    Attack(
        "name-to-handle",
        "a handle that outlives path checks",
        """
        handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0) + bytes(128))
        call("name_to_handle_at", -100, b"/usr", handle, ctypes.byref(ctypes.c_int()), 0)
        """,
        "EPERM",
        {"seccomp": "EPERM"},
        absent=("EOPNOTSUPP",),
    ),
    Attack(
        "open-by-handle",
        "open a file by its number (Shocker)",
        'call("open_by_handle_at", -100, 8, 0)',
        "EPERM",
        {"seccomp": "EPERM"},
        opens=("EFAULT",),
        absent=("EPERM",),
    ),
    Attack(
        "mount-cgroup",
        "a cgroup file system of its own (CVE-2022-0492)",
        """
        call("unshare", 0x02000000)
        call("mount", b"none", b"/tmp", b"cgroup2", 0, 0)
        """,
        "EPERM",
        _ALL,
    ),
)
