"""What pyproject.toml cannot say: the native parts, and policies/ as data of the package.

Environment: CC names the compiler (gcc or clang); SANDBOXD_WERROR=1 makes warnings in our own C errors;
SANDBOXD_SANITIZE=1 builds the extensions with AddressSanitizer and UndefinedBehaviorSanitizer (gcc, not for use).
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "native"))
import sources

LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")
WERROR = os.environ.get("SANDBOXD_WERROR") == "1"
SANITIZE = os.environ.get("SANDBOXD_SANITIZE") == "1"


class Program(Extension):
    """A freestanding static executable, installed beside the modules of its package under its bare name."""


class BuildNative(build_ext):
    """build_ext that compiles our C with warnings, cffi's glue without, and links programs as well as extensions."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # The compiler and the switches above are no files, so a comparison of dates would miss a change of them.
        self.force = True

    def run(self) -> None:
        if sys.platform != "linux" or platform.machine() != "x86_64":
            raise SystemExit(f"sandboxd runs on x86-64 Linux only; this is {sys.platform} on {platform.machine()}")
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        ext = self.ext_map.get(fullname)
        if isinstance(ext, Program):
            return os.path.join(*fullname.split("."))
        if ext is not None and ext.py_limited_api:
            # The engine names these by path, for interpreters other than the one that builds.
            return os.path.join(*fullname.split(".")) + ".abi3.so"
        filename: str = super().get_ext_filename(fullname)  # type: ignore[no-untyped-call]  # the stub has no types
        return filename

    def build_extensions(self) -> None:
        # A run path of the building interpreter would be a place to load libraries from on the user's machine.
        self.compiler.linker_so = [a for a in self.compiler.linker_so if not a.startswith(("-L", "-Wl,-rpath"))]
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        warnings = [*sources.WARNINGS, *(["-Werror"] if WERROR else [])]
        relocatable = f"-ffile-prefix-map={os.getcwd()}=."  # no path of the building machine in debug information
        if isinstance(ext, Program):
            self.build_program(ext, [*warnings, relocatable])
            return

        flags = [*sources.COMPILE, *(sources.SANITIZE if SANITIZE else sources.HARDEN), relocatable]
        ours = [name for name in ext.sources if sources.NATIVE in Path(name).parents]
        objects = self.compiler.compile(
            ours,
            # A directory for each extension: they share sources, not macros.
            output_dir=os.path.join(self.build_temp, ext.name),
            macros=ext.define_macros,
            include_dirs=ext.include_dirs,
            extra_postargs=[*flags, *warnings],
        )
        ext.extra_objects = [*ext.extra_objects, *objects]
        ext.sources = [name for name in ext.sources if name not in ours]
        ext.extra_compile_args = flags
        ext.extra_link_args = [*(sources.SANITIZE_LINK if SANITIZE else sources.HARDEN_LINK)]
        super().build_extension(ext)

    def build_program(self, ext: Program, flags: list[str]) -> None:
        """Compile and link in one step, without the interpreter's CFLAGS and LDFLAGS: they presume a libc."""
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
        options = [*sources.FREESTANDING, *flags, *(f"-I{name}" for name in ext.include_dirs)]
        options += [f"-D{name}={value}" for name, value in ext.define_macros]
        self.spawn([*compiler, *options, *ext.sources, *sources.FREESTANDING_LINK, "-o", str(output)])
        output.chmod(0o755)


def inside(name: str, files: tuple[str, ...]) -> Extension:
    """A module of sandboxd.inside, for the interpreter of any image."""
    return Extension(
        f"sandboxd.inside.{name}",
        sources=sources.paths(files),
        include_dirs=[str(sources.INCLUDE)],
        depends=sources.headers(),
        define_macros=[("_GNU_SOURCE", "1"), *([("Py_LIMITED_API", sources.LIMITED_API)] if LIMITED else [])],
        py_limited_api=LIMITED,
    )


nursery = Program(
    "sandboxd.inside.nursery",
    sources=sources.paths(sources.NURSERY),
    include_dirs=[str(sources.INCLUDE)],
    depends=sources.headers(),
    define_macros=[("_GNU_SOURCE", "1")],
)

setup(
    packages=[*find_packages(include=["sandboxd", "sandboxd.*"]), "sandboxd.policies", "sandboxd.policies.seccomp"],
    package_dir={"sandboxd.policies": "policies", "sandboxd.policies.seccomp": "policies/seccomp"},
    package_data={
        "sandboxd": ["py.typed", "*.pyi"],
        "sandboxd.policies": ["*.toml"],
        "sandboxd.policies.seccomp": ["*.toml"],
    },
    ext_modules=[inside("_cell", sources.CELL), inside("_image", sources.IMAGE), nursery],
    cffi_modules=["native/build.py:ffi"],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED else {},
    zip_safe=False,
)
