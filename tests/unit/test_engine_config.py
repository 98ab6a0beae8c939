"""The engine's settings and its guess at the policy that comes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sandboxd.engine.cells.active_policy import DEFAULT_POLICY, zygote_key
from sandboxd.engine.config import EngineConfig, host_memory_bytes
from sandboxd.errors import PolicyError
from sandboxd.policy import load

if TYPE_CHECKING:
    from pathlib import Path


def test_what_an_engine_makes_ready_early_is_the_shipped_default_policy() -> None:
    assert load("default").plain() == DEFAULT_POLICY


def test_name_and_limits_do_not_make_another_zygote() -> None:
    other = load("default").plain()
    other["name"], other["limits"] = "mine", {}
    assert zygote_key(other) == zygote_key(DEFAULT_POLICY)
    assert zygote_key(load("data").plain()) != zygote_key(DEFAULT_POLICY)


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_running", 0), ("max_running", True), ("memory_bytes", "1G"), ("pids", -1), ("ids", 5), ("nonsense", 1)],
)
def test_wrong_setting_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(PolicyError, match=key):
        EngineConfig.from_plain({key: value})


def test_defaults_follow_the_host() -> None:
    config = EngineConfig()
    assert config.running() >= 4
    assert 0 < config.memory() < host_memory_bytes()
    assert config.tasks() > config.running() * 64


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        (
            "0::/a.slice/b.service/main\n",
            {"a.slice/b.service/memory.max": "1048576", "a.slice/memory.max": "max"},
            1 << 20,
        ),
        ("0::/a.slice\n", {"a.slice/memory.max": "max"}, 8 << 20),
        ("0::/a.slice\n", {}, 8 << 20),
        ("4:memory:/x/y\n0::/\n", {"memory/x/memory.limit_in_bytes": "2097152"}, 2 << 20),
    ],
)
def test_memory_is_what_the_closest_bound_above_allows(
    tmp_path: Path, own: str, limits: dict[str, str], expected: int
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  8192 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(own)
    for name, text in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert host_memory_bytes(tmp_path / "proc", tmp_path) == expected
