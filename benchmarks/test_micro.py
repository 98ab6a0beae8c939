"""What do the parts cost that run once for each request or each start? For pytest-benchmark; not part of the tests.

python -m pytest benchmarks/test_micro.py [--benchmark-json=FILE]
"""

from __future__ import annotations

import copy
import json
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd import Result, Sandbox, policy, seccomp
from sandboxd.protocol import packets as protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_benchmark.fixture import BenchmarkFixture

HEADER: dict[str, Any] = {
    "id": "r1",
    "status": "ok",
    "exit_code": 0,
    "signal": None,
    "stdout": [0, 6],
    "stderr": [6, 0],
    "stdout_dropped_bytes": 0,
    "stderr_dropped_bytes": 0,
    "error": None,
    "results": [{"mime": {"text/plain": "2"}}],
    "files": [],
    "files_skipped": 0,
    "limits_hit": [],
    "usage": {
        "wall_seconds": 0.001,
        "cpu_user_seconds": 0.001,
        "cpu_system_seconds": 0.001,
        "memory_peak_bytes": 4096,
        "pids_peak": 1,
        "throttled_seconds": 0.0,
    },
    "timings": {"queued_seconds": 0.0, "setup_seconds": 0.001, "run_seconds": 0.001},
    "warm": False,
    "isolation": {
        "namespaces": ["user", "pid", "mount", "network", "ipc", "uts", "cgroup"],
        "cgroup": {"version": "v2", "controllers": ["memory", "pids", "cpu"]},
        "seccomp": {"policy": "default", "sha256": "0" * 64},
        "landlock_abi": 7,
        "uid": 2013266920,
        "network": "none",
        "rootfs": "host",
        "kernel": "Linux 6.18",
        "missing": [],
    },
    "state": None,
}


@pytest.fixture
def packets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a connection."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def test_result_from_wire(benchmark: BenchmarkFixture) -> None:
    result = benchmark(lambda: Result.from_wire(HEADER, b"hello\n"))
    assert result.stdout == "hello\n"


def test_header_as_json(benchmark: BenchmarkFixture) -> None:
    assert benchmark(lambda: json.loads(json.dumps(HEADER))) == HEADER


def test_protocol_there(benchmark: BenchmarkFixture, packets: tuple[socket.socket, socket.socket]) -> None:
    """Pack, send, receive and parse one answer, in one thread."""
    ours, theirs = packets
    message = {"op": "result", "result": copy.deepcopy(HEADER)}

    def there() -> dict[str, Any]:
        protocol.send(ours, message, [b"hello\n"])
        packet = protocol.receive(theirs)
        assert packet is not None
        packet.close()
        return packet.message

    assert benchmark(there)["op"] == "result"


@pytest.mark.parametrize("name", ["default", "data"])
def test_policy_load(benchmark: BenchmarkFixture, name: str) -> None:
    assert benchmark(lambda: policy.load(name)).name == name


def test_policy_sha256(benchmark: BenchmarkFixture) -> None:
    loaded = policy.load("default")
    assert len(benchmark(lambda: loaded.sha256)) == 64


@pytest.mark.parametrize("profile", ["default", "strict"])
def test_seccomp_compile(benchmark: BenchmarkFixture, profile: str) -> None:
    effective = seccomp.effective(profile, (), ())
    benchmark(lambda: seccomp.compile(effective))


def test_run(benchmark: BenchmarkFixture) -> None:
    """The whole, for comparison: one after the other, without a pause."""
    if os.geteuid() != 0:
        pytest.skip("an embedded engine needs root")
    with Sandbox() as sandbox:
        run: Callable[[], Result] = lambda: sandbox.run("1+1")  # noqa: E731
        assert benchmark(run).status == "ok"
