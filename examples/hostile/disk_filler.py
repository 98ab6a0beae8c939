"""Fills the workspace: one huge file, a sparse one, then very many small ones.

Answer: the workspace is a tmpfs of 64 MiB and 4,096 files. A large write ends with ENOSPC (or EFBIG), the sparse one
may be no longer than file_bytes, and the small files end with ENOSPC when the file system has no inode left. The
host's disks are never written.
"""

from __future__ import annotations

import itertools
import os
import signal

# Outside a sandbox this would do what it says. In every cell, both of these are /workspace.
if (os.getcwd(), os.environ.get("HOME")) != ("/workspace", "/workspace"):
    raise SystemExit(f"for a sandbox only: sandboxd run {__file__}")

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then RLIMIT_FSIZE answers EFBIG
block = b"x" * (1 << 20)

written = 0
try:
    with open("large", "wb", buffering=0) as file:
        while True:
            written += file.write(block)
except OSError as error:
    print(f"large: {error.strerror} after {written >> 20} MiB")
os.unlink("large")

try:
    with open("sparse", "wb", buffering=0) as file:
        file.truncate(10 << 30)
        print("sparse: 10 GiB long, without a block of it")
except OSError as error:
    print(f"sparse: {error.strerror}")

made = 0
try:
    for made in itertools.count():
        os.close(os.open(f"small-{made}", os.O_CREAT | os.O_WRONLY))
except OSError as error:
    print(f"small: {error.strerror} after {made} files")
