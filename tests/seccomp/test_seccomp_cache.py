"""The cache of compiled filters: used when beyond doubt, else compiled anew."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandboxd import seccomp
from sandboxd._util.diskcache import HEAD_BYTES, MAGIC, cache_directory
from sandboxd.seccomp import cache as seccomp_cache

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.seccomp import Profile

ALLOW = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)
EPERM = struct.pack("=HBBI", 0x06, 0, 0, 0x00050001)


@pytest.fixture(scope="module")
def default() -> Profile:
    return seccomp.effective("default")


@pytest.fixture(scope="module")
def strict() -> Profile:
    return seccomp.effective("strict")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the profiles that the cache had to compile."""
    names: list[str] = []
    real = seccomp.compile_layers

    def counting(profile: Profile) -> seccomp.Layers:
        names.append(profile.name)
        return real(profile)

    monkeypatch.setattr(seccomp_cache, "compile_layers", counting)
    return names


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "cache"


def stored(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


def test_second_time_comes_from_the_cache(default: Profile, cache: Path, compiled: list[str]) -> None:
    first = seccomp.cached_layers(default, cache)
    assert seccomp.cached_layers(default, cache) == first
    assert compiled == ["default"]
    assert (cache.stat().st_mode & 0o7777, stored(cache).stat().st_mode & 0o7777) == (0o700, 0o600)


def test_mode_does_not_depend_on_the_umask(default: Profile, cache: Path) -> None:
    before = os.umask(0o777)
    try:
        cache.parent.parent.joinpath("deep").mkdir()
        os.chmod(cache.parent, 0o755)  # noqa: S103 - the parent may be readable
        cache.mkdir()
        os.chmod(cache, 0o700)
        seccomp.cached_layers(default, cache)
    finally:
        os.umask(before)
    assert stored(cache).stat().st_mode & 0o7777 == 0o600


def test_other_rules_have_another_file(default: Profile, strict: Profile, cache: Path, compiled: list[str]) -> None:
    assert seccomp.cached_layers(default, cache) != seccomp.cached_layers(strict, cache)
    assert compiled == ["default", "strict"]


def test_another_libseccomp_has_another_file(
    default: Profile, cache: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seccomp.cached_layers(default, cache)
    monkeypatch.setattr(seccomp_cache, "_library_identity", lambda: "another")
    seccomp.cached_layers(default, cache)
    assert compiled == ["default", "default"]


def weaken(path: Path) -> None:
    """An attacker's file: every refusal becomes a permission, and the sum is right."""
    content = path.read_bytes()
    program = content[HEAD_BYTES:].replace(EPERM, ALLOW)
    path.write_bytes(MAGIC + hashlib.sha256(program).digest() + program)


def to_symlink(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def to_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def unguarded(path: Path) -> None:
    program = ALLOW
    path.write_bytes(MAGIC + hashlib.sha256(program).digest() + program)


def writable(path: Path) -> None:
    weaken(path)
    path.chmod(0o660)


def hard_linked(path: Path) -> None:
    weaken(path)
    os.link(path, path.parent.parent / "twin")


def to_directory(path: Path) -> None:
    path.unlink()
    path.mkdir(0o600)


def open_directory(path: Path) -> None:
    weaken(path)
    path.parent.chmod(0o755)


ODD: dict[str, Callable[[Path], object]] = {
    "readable-by-others": lambda path: path.chmod(0o644),
    "writable-by-the-group": writable,
    "hard-linked": hard_linked,
    "symlink": to_symlink,
    "fifo": to_fifo,
    "directory": to_directory,
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "empty": lambda path: path.write_bytes(b""),
    "one-bit-off": flip,
    "unguarded": unguarded,
    "endless": lambda path: os.truncate(path, 1 << 30),
    "directory-open-to-others": open_directory,
}


@pytest.mark.parametrize("oddity", ODD)
def test_odd_file_is_not_believed(default: Profile, cache: Path, compiled: list[str], oddity: str) -> None:
    good = seccomp.cached_layers(default, cache)
    ODD[oddity](stored(cache))
    assert seccomp.cached_layers(default, cache) == good
    assert compiled == ["default", "default"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["file", "directory"])
def test_another_owner_is_not_believed(default: Profile, cache: Path, compiled: list[str], what: str) -> None:
    good = seccomp.cached_layers(default, cache)
    weaken(stored(cache))
    os.chown(stored(cache) if what == "file" else cache, 12345, 12345)
    assert seccomp.cached_layers(default, cache) == good
    assert compiled == ["default", "default"]


def test_odd_file_is_replaced(default: Profile, cache: Path, compiled: list[str]) -> None:
    seccomp.cached_layers(default, cache)
    flip(stored(cache))
    seccomp.cached_layers(default, cache)
    seccomp.cached_layers(default, cache)
    assert compiled == ["default", "default"]


def test_symlinked_directory_is_not_used(default: Profile, tmp_path: Path, compiled: list[str]) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    seccomp.cached_layers(default, tmp_path / "link")
    assert list((tmp_path / "real").iterdir()) == []


def test_cache_that_cannot_be_made_is_no_error(default: Profile, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert seccomp.cached_layers(default, tmp_path / "file" / "cache") == seccomp.compile_layers(default)


def test_nothing_is_left_behind_when_writing_fails(
    default: Profile, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    descriptors = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "rename", refused)
    seccomp.cached_layers(default, cache)
    assert list(cache.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_default_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert cache_directory() == Path("/var/cache/sandboxd")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_directory() == Path("/somewhere/sandboxd")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_directory() == Path("/home/someone/.cache/sandboxd")


def test_cached_program_needs_neither_pyseccomp_nor_ctypes(cache: Path, default: Profile) -> None:
    seccomp.cached_layers(default, cache)
    code = (
        "import sys; from pathlib import Path; from sandboxd import seccomp\n"
        f"seccomp.cached_layers(seccomp.effective('default'), Path({str(cache)!r}))\n"
        "print([name for name in ('pyseccomp', 'ctypes', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
