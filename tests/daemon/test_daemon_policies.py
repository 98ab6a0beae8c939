"""What a daemon remembers of its policies' texts, and when it reads anew; what its network check says."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandboxd import policy
from sandboxd._util import diskcache
from sandboxd._util.diskcache import HEAD_BYTES, MAGIC
from sandboxd.daemon import policy_cache
from sandboxd.daemon.network import NetworkCheck
from sandboxd.daemon.policy_cache import plain_policy
from sandboxd.errors import PolicyError, Unavailable
from tests.support.modes import ROOT

MINE = 'name = "mine"\n[limits]\nwall_seconds = {seconds}\n'
QUIETLY = """
import sys
from pathlib import Path
from sandboxd.daemon.policy_cache import plain_policy
plain = plain_policy(Path(sys.argv[1]), "mine", Path(sys.argv[2]))
print(plain["limits"]["wall_seconds"], "pydantic" in sys.modules)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(MINE.format(seconds=7))
    return path


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.mark.parametrize("name", policy.installed([policy.policies_dir()]))
def test_shipped_policy_means_the_same_from_the_cache(name: str, kept: Path) -> None:
    path = policy.policies_dir() / f"{name}.toml"
    found = [plain_policy(path, name, kept) for _ in range(2)]
    assert found == [policy.load(path).plain()] * 2
    assert len(list(kept.iterdir())) == 1


def test_text_that_is_known_needs_no_pydantic(file: Path, kept: Path) -> None:
    command = [sys.executable, "-c", QUIETLY, str(file), str(kept)]
    said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert said == ["7.0 True\n", "7.0 False\n"]


def test_other_text_or_another_version_is_read_anew(file: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plain_policy(file, "mine", kept)["limits"]["wall_seconds"] == 7
    file.write_text(MINE.format(seconds=8))
    assert plain_policy(file, "mine", kept)["limits"]["wall_seconds"] == 8
    for path in kept.iterdir():
        forge(path, b'"wall_seconds": 8.0', b'"wall_seconds": 9.0')
    assert plain_policy(file, "mine", kept)["limits"]["wall_seconds"] == 9  # it was believed: it is the user's own
    monkeypatch.setattr(policy_cache, "_identity", lambda: iter(["another"]))
    assert plain_policy(file, "mine", kept)["limits"]["wall_seconds"] == 8


def forge(path: Path, old: bytes, new: bytes) -> None:
    """Change what is kept as its owner could."""
    content = path.read_bytes()[HEAD_BYTES:].replace(old, new)
    path.write_bytes(MAGIC + hashlib.sha256(content).digest() + content)


@pytest.mark.parametrize("how", ["torn", "of others", "no policy", "another policy"])
def test_file_that_is_not_as_it_was_kept_is_not_believed(file: Path, kept: Path, how: str) -> None:
    expected = plain_policy(file, "mine", kept)
    (path,) = kept.iterdir()
    if how == "torn":
        path.write_bytes(path.read_bytes().replace(b"7.0", b"9.0"))
    elif how == "of others":
        forge(path, b"7.0", b"9.0")
        path.chmod(0o644)
    elif how == "no policy":
        forge(path, path.read_bytes()[HEAD_BYTES:], b"[]")
    else:
        forge(path, b'"name": "mine"', b'"name": "yours"')
    assert plain_policy(file, "mine", kept) == expected


def test_file_that_changes_while_it_is_read_is_kept_as_what_was_read(
    file: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept for a text must be its own meaning: it is believed as long as the text is the same."""
    meant = policy_cache._meant

    def meanwhile(text: str, path: Path) -> policy.Policy:
        file.write_text(MINE.format(seconds=9))
        return meant(text, path)

    monkeypatch.setattr(policy_cache, "_meant", meanwhile)
    assert plain_policy(file, "mine", kept)["limits"]["wall_seconds"] == 7
    monkeypatch.undo()
    assert plain_policy(file, "mine", kept)["limits"]["wall_seconds"] == 9
    file.write_text(MINE.format(seconds=7))
    assert plain_policy(file, "mine", kept)["limits"]["wall_seconds"] == 7


def test_policy_is_read_also_where_nothing_can_be_remembered(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    place.mkdir()
    (place / "mine.toml").write_text(MINE.format(seconds=7))
    assert plain_policy(place / "mine.toml", "mine", kept)["limits"]["wall_seconds"] == 7
    monkeypatch.setattr(policy_cache, "_DECIDING", (("sandboxd", "no_such.py"),))
    assert plain_policy(place / "mine.toml", "mine", kept)["limits"]["wall_seconds"] == 7
    assert len(list(kept.iterdir())) == 1


def test_a_deciding_module_counts_by_its_content(
    tmp_path: Path, file: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "decides.py"
    monkeypatch.setattr(policy_cache, "_DECIDING", (("sandboxd", module.name),))
    monkeypatch.setattr(Path, "with_name", lambda _, name: tmp_path / name)
    for text in ("old", "new"):
        module.write_text(text)
        os.utime(module, (0, 0))
        plain_policy(file, "mine", kept)
    assert len(list(kept.iterdir())) == 2


def test_cache_does_not_grow_without_end(file: Path, kept: Path) -> None:
    kept.mkdir(0o700)
    (kept / "other").write_text("not ours")
    os.utime(kept / "other", (0, 0))
    for seconds in range(1, diskcache.MOST_FILES + 2):
        file.write_text(MINE.format(seconds=seconds))
        plain_policy(file, "mine", kept)
    assert len(list(kept.glob("*.json"))) == diskcache.MOST_FILES // 2
    assert plain_policy(file, "mine", kept)["limits"]["wall_seconds"] == diskcache.MOST_FILES + 1
    assert len(list(kept.glob("*.json"))) == diskcache.MOST_FILES // 2  # the newest is among them
    assert (kept / "other").exists()


@pytest.mark.parametrize("chosen", ['allow = ["ptrace"]', 'deny = ["uname"]'])
def test_policy_that_is_checked_against_more_than_its_text_is_not_kept(file: Path, kept: Path, chosen: str) -> None:
    file.write_text(f'name = "mine"\n[seccomp]\n{chosen}\n')
    assert plain_policy(file, "mine", kept) == policy.load(file).plain()
    assert list(kept.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"), [('name = "yours"\n', "differs from the file"), ("name = 1\n", "name"), ("no toml", "TOML")]
)
def test_wrong_policy_is_refused_each_time(file: Path, kept: Path, text: str, words: str) -> None:
    file.write_text(text)
    for _ in range(2):
        with pytest.raises(PolicyError, match=words):
            plain_policy(file, "mine", kept)


@pytest.mark.skipif(not ROOT, reason="needs root: an ordinary user's check is in tests/rootless")
def test_network_that_is_not_empty_is_told() -> None:
    async def main() -> None:
        async with NetworkCheck() as network:
            await network.ask(os.getpid())

    with pytest.raises(Unavailable, match=r"not empty: .*lo is up") as caught:
        asyncio.run(main())
    assert caught.value.stage == "self-test"


@pytest.mark.skipif(not ROOT, reason="needs root: an ordinary user's check is in tests/rootless")
def test_network_that_cannot_be_entered_is_told() -> None:
    async def main() -> None:
        async with NetworkCheck() as network:
            await network.ask(1 << 22)

    with pytest.raises(Unavailable, match=r"cannot be looked into: .*No such file"):
        asyncio.run(main())
