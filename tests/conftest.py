"""Shared by all tests: an ordinary start, whose turn it is, an engine that lives as long as the session."""

from __future__ import annotations

import gc
import os
import re
import resource
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from sandboxd import Sandbox
from tests.support import promptness
from tests.support.modes import ROOT, policy_of
from tests.support.turns import turn

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

# What a host may lack and CI cannot install: kernel features, the other kinds of cgroup host, other interpreters.
MAY_LACK: Final = re.compile(
    r"this kernel answers|in this kernel|is filtered before Linux|no python3\.\d+ here|node is not installed"
    r"|controllers are on v2 here|no v1 hierarchies|cgroup v2 mount|v2 mount beside|controller on v2"
    r"|hard links are refused|are charged to nobody"
    + (
        ""
        if os.environ.get("SANDBOXD_VM")
        else "|needs systemd and pure cgroup v2|needs Landlock's ABI|needs a host whose audit is on"
    )
)
collect_ignore = ["rootless"] if ROOT else []  # as root, test_rootless.py has them run as somebody else
SOFT_LIMITS: Final = {
    resource.RLIMIT_NOFILE: 1 << 14,
    resource.RLIMIT_NPROC: 1 << 15,
    resource.RLIMIT_FSIZE: 1 << 40,
    resource.RLIMIT_AS: 1 << 46,
    resource.RLIMIT_DATA: 1 << 46,
    resource.RLIMIT_STACK: 8 << 20,
    resource.RLIMIT_MEMLOCK: 8 << 20,
}
"""What the tests need at most, where the hard limit allows it."""
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    """An embedded engine with the shipped `default` policy, as far as SANDBOXD_TEST_MODE has it; or, where
    SANDBOXD_TEST_ADDRESS names one, a daemon.
    """
    address = os.environ.get("SANDBOXD_TEST_ADDRESS")
    with Sandbox.connect(address) if address else Sandbox(policy_of()) as made:
        yield made


@pytest.fixture
def prompt(sandbox: Sandbox) -> Iterator[None]:
    """The test, whatever it has programs do, keeps the loop of *sandbox*'s engine from nobody."""
    with promptness.prompt(sandbox):
        yield


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "only(condition): without meaning, and so not collected, unless that holds")
    start_as_usual()


def pytest_collection_finish() -> None:
    """Half a million objects of collected tests stay to the end: no garbage collection need look at them again."""
    gc.collect()
    gc.freeze()


def start_as_usual() -> None:
    """Undo what the way of starting pytest leaves to every process below it: a script's background job ignores SIGINT,
    and nohup SIGHUP; soft limits may be lower than they need be; with a umask of 002 daemons refuse what tests write.
    """
    os.umask(0o022)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for which, wanted in SOFT_LIMITS.items():
        soft, hard = resource.getrlimit(which)
        reachable = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < reachable:
            resource.setrlimit(which, (reachable, hard))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if all(mark.args[0] for mark in item.iter_markers("only"))]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a skip for any other reason is a hole, and so a failure: no root, a missing library or program."""
    report = yield
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not MAY_LACK.search(reason):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} may not be skipped in CI: {reason}"
    return report
