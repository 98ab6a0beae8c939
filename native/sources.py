"""Which C files make which binary. Read by setup.py and native/build.py; nothing else lists them."""

from __future__ import annotations

from pathlib import Path

NATIVE = Path("native")  # relative to the top of the tree, where every build runs
INCLUDE = NATIVE / "include"

# Used by the engine, by the zygote and by the nursery: raw system calls only, no libc, no Python.
SHARED = ("lib/fd.c", "lib/mount.c", "lib/ids.c", "lib/landlock.c", "lib/seccomp.c")

ENGINE = (*SHARED, "engine/spawn.c", "engine/numbers.c", "engine/direct.c")  # sandboxd._native, with cffi's glue
CELL = (*SHARED, "inside/cell.c")  # sandboxd.inside._cell
IMAGE = ("lib/fd.c", "inside/image.c")  # sandboxd.inside._image
NURSERY = (*SHARED, "inside/broker.c", "inside/nursery.c")  # sandboxd/inside/nursery

LIMITED_API = "0x030b0000"  # CPython 3.11: the oldest that may load the extensions

# cffi writes C that these would complain about, so its glue is compiled without.
WARNINGS = (
    "-Wall",
    "-Wextra",
    "-Wshadow",
    "-Wconversion",
    "-Wstrict-prototypes",
    "-Wmissing-prototypes",
    "-Wvla",
    "-Wformat=2",
)

COMPILE = ("-std=gnu17", "-O2", "-fvisibility=hidden")

HARDEN = ("-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=3", "-fstack-protector-strong")
HARDEN_LINK = ("-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,noexecstack", "-Wl,--as-needed")

# FORTIFY_SOURCE and AddressSanitizer both replace the memory functions.
SANITIZE = (
    "-U_FORTIFY_SOURCE",
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
)
SANITIZE_LINK = ("-fsanitize=address,undefined",)

# The nursery has no libc: no loader, no thread pointer (so no stack protector), no start files. It defines _start, and
# memcpy, memmove, memset and memcmp, which a compiler may call even here.
FREESTANDING = (
    "-std=gnu17",
    "-O2",
    "-ffreestanding",
    "-fno-stack-protector",
    "-U_FORTIFY_SOURCE",
    "-fno-pie",
    "-fno-asynchronous-unwind-tables",
    "-ffunction-sections",
    "-fdata-sections",
)
FREESTANDING_LINK = (
    "-nostdlib",
    "-static",
    "-Wl,--gc-sections",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
    "-Wl,-z,separate-code",
)


def paths(names: tuple[str, ...]) -> list[str]:
    """*names* as paths from the top of the tree."""
    return [str(NATIVE / name) for name in names]


def headers() -> list[str]:
    """Every header, as paths from the top of the tree."""
    return sorted(str(path) for path in INCLUDE.glob("*.h"))


def declarations() -> list[Path]:
    """The cdef files: in the order of ENGINE, then those that belong to no source, by name."""
    order = {Path(name).stem: index for index, name in enumerate(ENGINE)}
    return sorted(NATIVE.rglob("*.cdef"), key=lambda path: (order.get(path.stem, len(order)), path.name))
