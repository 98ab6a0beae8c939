"""Shared by all tests: engines that live as long as the session, and a look at what is left behind."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from sandboxd import Sandbox
from tests.modes import ROOT, policy_of

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

# What a host may lack and CI cannot install: kernel features, the other kinds of cgroup host, other interpreters.
MAY_LACK: Final = re.compile(
    r"this kernel answers|in this kernel|is filtered before Linux|no python3\.\d+ here|node is not installed"
    r"|controllers are on v2 here|no v1 hierarchies|cgroup v2 mount|v2 mount beside|controller on v2"
    r"|hard links are refused" + ("" if os.environ.get("SANDBOXD_VM") else "|needs systemd and pure cgroup v2")
)
collect_ignore = ["rootless"] if ROOT else []  # as root, test_rootless.py has them run as somebody else
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    """An embedded engine with the shipped `default` policy, as far as SANDBOXD_TEST_MODE has it; or, where
    SANDBOXD_TEST_ADDRESS names one, a daemon.
    """
    address = os.environ.get("SANDBOXD_TEST_ADDRESS")
    with Sandbox.connect(address) if address else Sandbox(policy_of()) as made:
        yield made


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "only(condition): without meaning, and so not collected, unless that holds")


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
