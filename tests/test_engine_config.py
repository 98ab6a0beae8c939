"""The engine's settings and its guess at the policy that comes."""

from __future__ import annotations

import pytest

from sandboxd.engine.config import EngineConfig, host_memory_bytes
from sandboxd.engine.prepared import LIKELY, essence
from sandboxd.errors import PolicyError
from sandboxd.policy import load


def test_what_an_engine_makes_ready_early_is_the_shipped_default_policy() -> None:
    assert load("default").plain() == LIKELY


def test_name_and_limits_do_not_make_another_zygote() -> None:
    other = load("default").plain()
    other["name"], other["limits"] = "mine", {}
    assert essence(other) == essence(LIKELY)
    assert essence(load("data").plain()) != essence(LIKELY)


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
