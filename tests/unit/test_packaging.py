"""What a wheel and an sdist of this tree hold, and that they work away from it. No index is asked: dependencies and
the build tools are those of the running environment."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("pip", reason="wheels are built by pip")

TREE = Path(__file__).resolve().parents[2]
LEFTOVERS = {".git", ".hypothesis", "__pycache__", "build", "dist", "nursery", "out"}

EXTENSIONS = ("sandboxd/_native.abi3.so", "sandboxd/inside/_cell.abi3.so", "sandboxd/inside/_image.abi3.so")
NURSERY = "sandboxd/inside/nursery"
BUILT = {*EXTENSIONS, NURSERY}


def leftovers(directory: str, names: list[str]) -> set[str]:
    """What a build, a tool or a virtual environment left in *directory*: a fresh clone has none of it."""
    return {
        name
        for name in names
        if name in LEFTOVERS
        or name.endswith((".so", ".o", ".egg-info", "_cache"))
        or Path(directory, name, "pyvenv.cfg").exists()
    }


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Standard output of *command*, which must succeed; a failure shows all it said."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SANDBOXD_", "PYTHON", "LD_"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build_wheel(source: Path, into: Path) -> Path:
    """The wheel of *source* (a tree or an sdist), built without an index."""
    into.mkdir()
    options = ("--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", into, source, cwd=into)
    (wheel,) = into.glob("*.whl")
    return wheel


def make_environment(where: Path) -> Path:
    """A virtual environment that sees this one's packages, but neither this tree nor an installed sandboxd.

    Returns its interpreter.
    """
    run(sys.executable, "-m", "venv", "--without-pip", where, cwd=where.parent)
    python = where / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=where).strip())
    # Its lines are added to sys.path; .pth files found there are not read, so no editable install comes along.
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in sorted(paths)))
    return python


def install(python: Path, *what: str | Path) -> None:
    options = ("--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--ignore-installed")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=python.parent)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree as a fresh clone would have it."""
    copy = tmp_path_factory.mktemp("clean") / "tree"
    shutil.copytree(TREE, copy, ignore=leftovers, symlinks=True)
    return copy


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("sdist")
    program = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", program, into, cwd=tree)
    (archive,) = into.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tree, tmp_path_factory.mktemp("wheel") / "out")


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site-packages of an environment into which the wheel was installed."""
    python = make_environment(tmp_path_factory.mktemp("installed") / "venv")
    install(python, wheel)
    return Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))", cwd=python.parent).strip())


def python_of(site: Path) -> Path:
    return site.parents[2] / "bin" / "python"


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def program_headers(elf: bytes) -> dict[int, int]:
    """Type and flags of each program header of a 64-bit ELF file (elf(5))."""
    offset, size, count = struct.unpack_from("<32xQ14xHH", elf)
    return dict(struct.unpack_from("<II", elf, offset + index * size) for index in range(count))


def test_one_wheel_serves_every_interpreter_from_3_11(wheel: Path) -> None:
    assert re.fullmatch(r"sandboxd-[^-]+-cp311-abi3-linux_x86_64\.whl", wheel.name)


def test_wheel_holds_native_parts_types_and_policies(wheel: Path, tree: Path) -> None:
    held = contents(wheel)
    policies = {f"sandboxd/{path.relative_to(tree)}": path.read_bytes() for path in tree.glob("policies/**/*.toml")}
    assert policies
    assert set(held) >= {*BUILT, "sandboxd/py.typed", *policies}
    assert {name: held[name] for name in policies} == policies


def test_wheel_holds_every_module_and_nothing_but_the_package(wheel: Path, tree: Path) -> None:
    held = contents(wheel)
    modules = {str(path.relative_to(tree)) for path in tree.glob("sandboxd/**/*.py")}
    assert {name for name in held if name.endswith(".py")} == modules
    assert {name.split("/")[0].split("-")[0] for name in held} == {"sandboxd"}
    assert not [name for name in held if name.endswith((".c", ".h", ".cdef", ".o"))]


def test_nursery_is_a_static_executable(site: Path) -> None:
    nursery = site / NURSERY
    load, dynamic, interpreter, stack = 1, 2, 3, 0x6474E551  # PT_LOAD, PT_DYNAMIC, PT_INTERP, PT_GNU_STACK
    executable_type, executable_flag = 2, 1  # ET_EXEC, PF_X

    elf = nursery.read_bytes()
    headers = program_headers(elf)

    assert os.access(nursery, os.X_OK)
    assert struct.unpack_from("<H", elf, 16) == (executable_type,)
    assert load in headers
    assert dynamic not in headers
    assert interpreter not in headers
    assert not headers[stack] & executable_flag


@pytest.mark.parametrize("name", EXTENSIONS)
def test_extension_needs_only_libc_and_is_bound_at_load(site: Path, name: str) -> None:
    dynamic = run("readelf", "--wide", "--dynamic", "--program-headers", site / name, cwd=site)
    assert set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)) <= {"libc.so.6"}
    assert "BIND_NOW" in dynamic
    assert "GNU_RELRO" in dynamic
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)


@pytest.mark.parametrize("interpreter", ["python3.11", "python3.12", "python3.13", "python3.14"])
def test_cells_extension_loads_in_interpreters_other_than_the_builder(site: Path, interpreter: str) -> None:
    program = "import sys; sys.path[:0] = sys.argv[1:]; import _cell; print(_cell.__file__)"
    try:
        subprocess.run([interpreter, "-c", ""], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"no {interpreter} here")
    inside = site / "sandboxd" / "inside"
    assert run(interpreter, "-I", "-c", program, inside, cwd=site).strip() == str(inside / "_cell.abi3.so")


def test_installed_package_works_away_from_the_tree(site: Path, tmp_path: Path) -> None:
    program = """
import pathlib, sandboxd, sandboxd._native, sandboxd.cli, sandboxd.policy
from sandboxd.inside import _cell
print(pathlib.Path(sandboxd.__file__).parent)
print(pathlib.Path(sandboxd._native.__file__).parent)
print(pathlib.Path(_cell.__file__).parent.parent)
print(sandboxd.policy.policies_dir().parent)
"""
    printed = run(python_of(site), "-c", program, cwd=tmp_path).split()
    assert printed == [str(site / "sandboxd")] * 4


def test_console_script_runs(site: Path, tmp_path: Path) -> None:
    assert "run" in run(python_of(site).parent / "sandboxd", "--help", cwd=tmp_path)


def test_sdist_holds_what_a_build_and_the_tests_need_and_no_leftovers(sdist: Path, tree: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = ("native", "policies", "sandboxd", "tests", "examples", "scripts")
    files = (path for top in wanted for path in (tree / top).rglob("*") if path.is_file())
    source = {str(path.relative_to(tree)) for path in files if "__pycache__" not in path.parts}  # a build leaves one
    assert source - held == set()
    assert not [name for name in held if name.endswith((".so", ".o", ".pyc")) or name == NURSERY]


def test_wheel_of_the_sdist_equals_the_wheel_of_the_tree(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    ours, theirs = contents(wheel), contents(build_wheel(sdist, tmp_path / "out"))
    assert set(theirs) == set(ours)
    assert [name for name in ours if theirs[name] != ours[name]] == []


def test_editable_install_builds_native_parts_in_place(tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy, ignore=leftovers, symlinks=True)
    python = make_environment(tmp_path / "venv")
    install(python, "--editable", copy)

    program = (
        "import sandboxd._native as n, sandboxd.inside._cell as c, sandboxd.inside._image as i;"
        "print(n.__file__, c.__file__, i.__file__)"
    )
    assert run(python, "-c", program, cwd=tmp_path).split() == [str(copy / name) for name in EXTENSIONS]
    assert os.access(copy / NURSERY, os.X_OK)
