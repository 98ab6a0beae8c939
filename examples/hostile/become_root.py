"""Tries to gain rights: root's uid, capabilities through new namespaces, mounts, tracing, kernel interfaces.

Answer: the cell holds no capability and cannot gain one (no_new_privs, an empty bounding set), and the system-call
filter refuses each of these before the kernel would look: EPERM for calls it knows, ENOSYS for clone3 and for what it
does not know.
"""

from __future__ import annotations

import ctypes
import os

# Outside a sandbox this would do what it says. In every cell, both of these are /workspace.
if (os.getcwd(), os.environ.get("HOME")) != ("/workspace", "/workspace"):
    raise SystemExit(f"for a sandbox only: sandboxd run {__file__}")

libc = ctypes.CDLL(None, use_errno=True)

# Name, number on x86-64, arguments: none of them does harm where it is not refused.
CALLS = [
    ("setuid(0)", 105, (0,)),
    ("unshare(CLONE_NEWUSER)", 272, (0x10000000,)),
    ("unshare(CLONE_NEWNS)", 272, (0x00020000,)),
    ("mount a tmpfs", 165, (b"none", b"/tmp", b"tmpfs", 0, None)),
    ("chroot(/)", 161, (b"/",)),
    ("ptrace(PTRACE_TRACEME)", 101, (0, 0, 0, 0)),
    ("bpf", 321, (0, None, 0)),
    ("perf_event_open", 298, (None, 0, -1, -1, 0)),
    ("userfaultfd", 323, (0,)),
    ("io_uring_setup", 425, (1, None)),
    ("keyctl", 250, (0, -3, 0)),
    ("init_module", 175, (None, 0, None)),
    ("kexec_load", 246, (0, 0, None, 0)),
    ("clone3", 435, (None, 0)),
]

print(f"uid {os.getuid()}, groups {os.getgroups()}")
for title, number, arguments in CALLS:
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *arguments)
    print(f"{title}: {'it worked' if result >= 0 else os.strerror(ctypes.get_errno())}")
