"""The attack table: every row is refused; where it can be shown, it succeeds without walls and fails at each alone."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
import textwrap
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandboxd import Sandbox
from sandboxd.engine.cells.active_policy import WALLS
from tests.attacks import ATTACKS, SAMPLE, Attack
from tests.attacks.bait import bait
from tests.attacks.base import attempt, program
from tests.attacks.neighbours import PAIRS, Pair
from tests.support import promptness
from tests.support.modes import HAS_CGROUP, ONE_ID, policy_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.usefixtures("prompt")

PROVED = [row for row in ATTACKS if row.alone]
ROWS = [pytest.param(row, id=row.id, marks=() if row.id in SAMPLE else pytest.mark.exhaustive) for row in ATTACKS]
CANARY_NAME = "SANDBOXD_TEST_CANARY"


@pytest.fixture(scope="module")
def surroundings() -> Iterator[dict[str, str]]:
    """What the rows aim at, as variables of the cell: places of the host, none of which may be reached."""
    with (
        tempfile.TemporaryDirectory() as directory,
        bait() as place,
        pytest.MonkeyPatch.context() as patch,
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        marker = Path(directory, "marker")  # not below tmp_path, whose parents every start of pytest closes to others
        marker.write_text("host")
        marker.parent.chmod(0o755)
        patch.setenv(CANARY_NAME, secrets.token_hex(16))
        name = f"sandboxd-test-{secrets.token_hex(8)}"
        abstract.bind(f"\0{name}")
        abstract.listen()
        yield {
            "BAIT": str(place),
            "MARKER": str(marker),
            "HOST_PID": str(os.getpid()),
            "CANARY_NAME": CANARY_NAME,
            "PORT": str(listener.getsockname()[1]),
            "ABSTRACT": name,
        }
        for server in (listener, abstract):
            server.settimeout(0)
            with pytest.raises(BlockingIOError):
                server.accept()


@pytest.fixture(scope="module")
def strict() -> Iterator[Sandbox]:
    with Sandbox(policy_of("strict")) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def walled() -> Iterator[Callable[[str | None], Sandbox]]:
    """Engines with one wall alone, or (None) with none; each is started once."""
    with ExitStack() as stack:
        made: dict[str | None, Sandbox] = {}

        def get(wall: str | None) -> Sandbox:
            if wall not in made:
                made[wall] = stack.enter_context(
                    Sandbox(policy_of(), _walls_down=[name for name in WALLS if name != wall])
                )
            return made[wall]

        yield get


@pytest.fixture
def prompt(request: pytest.FixtureRequest) -> Iterator[None]:
    """As in conftest.py, of the engine that the row is tried on; those without walls are in reach of programs."""
    name = next((name for name in ("strict", "sandbox") if name in request.fixturenames), None)
    if name is None:
        yield
        return
    with promptness.prompt(request.getfixturevalue(name)):
        yield


def expected(row: Attack) -> str:
    """What *row* ends with in this mode."""
    return row.single_id if ONE_ID and row.single_id else row.refusal


@pytest.mark.kernel
@pytest.mark.parametrize("row", ROWS)
def test_attack_is_refused(sandbox: Sandbox, surroundings: dict[str, str], row: Attack) -> None:
    assert attempt(sandbox, row.code, surroundings) == expected(row)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ATTACKS])
def test_attack_is_refused_under_strict(strict: Sandbox, surroundings: dict[str, str], row: Attack) -> None:
    """Its profile refuses more, so what answers may be another wall; none may be missing."""
    found = attempt(strict, row.code, surroundings)
    assert found == expected(row) or found not in ("done", *row.opens)


@pytest.mark.only(not ONE_ID and HAS_CGROUP)  # else walls of the table are missing
@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in PROVED])
def test_attack_succeeds_without_walls_and_fails_at_each_alone(
    walled: Callable[[str | None], Sandbox], surroundings: dict[str, str], row: Attack
) -> None:
    found = attempt(walled(None), row.code, surroundings)
    if found in row.absent and found not in row.opens:
        pytest.skip(f"this kernel answers {found} itself: {row.tries}")
    assert found in row.opens
    assert {wall: attempt(walled(wall), row.code, surroundings) for wall in row.alone} == row.alone


FIRST = """
try:
{first}
except Exception as error:
    print(error)
while True:
    sys.stdout.write("ready.")
    sys.stdout.flush()
    time.sleep(0.01)
"""


class Enough(Exception):
    """The first run may end."""


def beside(sandbox: Sandbox, pair: Pair) -> str:
    """The outcome of *pair*.second while *pair*.first runs at the same time."""
    ready, over = threading.Event(), threading.Event()

    def speaks(_: str) -> None:
        ready.set()
        if over.is_set():
            raise Enough

    def keep_running() -> None:
        code = program(FIRST.replace("{first}", textwrap.indent(textwrap.dedent(pair.first).strip("\n"), "    ")))
        with pytest.raises(Enough):
            sandbox.run(code, on_stdout=speaks, results=False)

    thread = threading.Thread(target=keep_running)
    thread.start()
    try:
        assert ready.wait(10)
        return attempt(sandbox, pair.second)
    finally:
        over.set()
        thread.join()


@pytest.mark.kernel
@pytest.mark.parametrize("pair", [pytest.param(pair, id=pair.id) for pair in PAIRS])
def test_neighbour_is_out_of_reach(sandbox: Sandbox, pair: Pair) -> None:
    assert beside(sandbox, pair) == pair.refusal


@pytest.mark.only(not ONE_ID and HAS_CGROUP)
@pytest.mark.parametrize("pair", [pytest.param(pair, id=pair.id) for pair in PAIRS if pair.alone])
def test_neighbour_is_in_reach_without_walls_and_out_of_it_at_each_alone(
    walled: Callable[[str | None], Sandbox], pair: Pair
) -> None:
    assert beside(walled(None), pair) == "done"
    assert {wall: beside(walled(wall), pair) for wall in pair.alone} == pair.alone


def test_table_has_its_size_and_no_row_twice() -> None:
    names = [row.id for row in ATTACKS] + [pair.id for pair in PAIRS]
    assert len(names) == len(set(names))
    assert len(PROVED) >= 100


@pytest.mark.parametrize("wall", WALLS)
def test_every_wall_alone_stops_some_row(wall: str) -> None:
    assert any(wall in row.alone for row in ATTACKS) or any(wall in pair.alone for pair in PAIRS)


@pytest.mark.kernel
def test_no_attack_reached_the_bait(surroundings: dict[str, str]) -> None:
    """Behind every row of this module: what the host has is as it was."""
    place = Path(surroundings["BAIT"])
    assert (place / "secret.txt").read_text() == "bait"
    assert sorted(os.listdir(place / "open")) == ["a"]
