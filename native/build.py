"""sandboxd._native: the C of native/ as the engine sees it, through cffi in API mode.

setup.py names ``ffi`` in cffi_modules. Each facility declares what it offers in ``native/<facility>.cdef``; a constant
is declared as ``#define NAME ...`` there, so that the compiler supplies its value.
"""

from __future__ import annotations

import sysconfig

from cffi import FFI

import sources


def make_ffi() -> FFI:
    """The declarations of every facility, with the sources that define them."""
    builder = FFI()
    for path in sources.declarations():
        # The line marker makes cffi's errors name this file and its own lines.
        builder.cdef(f'# 1 "{path}"\n{path.read_text(encoding="utf-8")}')

    # A free-threaded CPython has no limited API before 3.15; cffi drops it there as well.
    limited = not sysconfig.get_config_var("Py_GIL_DISABLED")
    builder.set_source(
        "sandboxd._native",
        '#include "spawn.h"\n',
        sources=sources.paths(sources.ENGINE),
        include_dirs=[str(sources.INCLUDE)],
        depends=sources.headers(),
        define_macros=[("_GNU_SOURCE", "1"), *([("Py_LIMITED_API", sources.LIMITED_API)] if limited else [])],
        py_limited_api=limited,
    )
    return builder


ffi = make_ffi()
