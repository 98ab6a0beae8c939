"""README.md and docs/ say what is so: their programs and commands are run, their tables compared with the code."""

from __future__ import annotations

import doctest
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from sandboxd import limits, policy
from sandboxd.engine.cells.state import TRANSITIONS, Event, State
from sandboxd.protocol.operations import Operation
from tests.attacks import ATTACKS
from tests.conftest import EXAMPLES

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = EXAMPLES.parent
README: Final = ROOT / "README.md"
DOCS: Final = sorted((ROOT / "docs").glob("*.md"))
SOCKET: Final = "/run/sandboxd/sandboxd.sock"
"""The socket that the README names; the tests put their own in its place."""
SECONDS: Final = 120

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, the line it begins on."""

    language: str
    text: str
    line: int


def blocks(file: Path) -> list[Block]:
    """Every fenced block of *file*, in order."""
    text = file.read_text("utf-8")
    return [Block(m[1], m[2], text.count("\n", 0, m.start()) + 1) for m in _FENCE.finditer(text)]


def of_language(language: str) -> list[Any]:
    """The README's blocks in *language*, each with the one behind it, as parameters."""
    found = blocks(README)
    pairs = zip(found, [*found[1:], None], strict=True)
    return [pytest.param(one, after, id=f"line-{one.line}") for one, after in pairs if one.language == language]


def table_rows(file: Path, head: str) -> list[list[str]]:
    """The cells of the table in *file* whose head line begins with *head*, without the head."""
    lines = file.read_text("utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(head)) + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def agree(expected: str, got: str) -> None:
    """*got* is *expected*, in which "..." stands for anything."""
    checker = doctest.OutputChecker()
    assert checker.check_output(expected, got, doctest.ELLIPSIS), f"expected:\n{expected}\ngot:\n{got}"


def session(block: Block) -> list[tuple[str, str]]:
    """The commands of a console block, each with its expected output."""
    found: list[tuple[str, str]] = []
    for line in block.text.splitlines(keepends=True):
        if line.startswith("$ "):
            found.append((line[2:].rstrip("\n"), ""))
        else:
            found[-1] = (found[-1][0], found[-1][1] + line)
    return found


@dataclass(frozen=True)
class Place:
    """A directory that looks like a clone's to what runs in it, and a daemon's socket with what the daemon said."""

    directory: Path
    socket: str
    ready: str

    def shell(self, command: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run *command* as after one that ended with *status*; stderr goes where stdout does."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-c", f"(exit {status})\n{command.replace(SOCKET, self.socket)}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.directory,
            env={**os.environ, "PATH": path},
            timeout=SECONDS,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("clone")
    for name in ("examples", "policies"):
        shutil.copytree(ROOT / name, directory / name)
    path = tmp_path_factory.mktemp("run") / "daemon" / "sandboxd.sock"
    config = path.parent.parent / "sandboxd.toml"
    config.write_text(f'[audit]\npath = "{path.parent.parent}/audit.jsonl"\n', "utf-8")
    command = [sys.executable, "-m", "sandboxd", "serve", "--socket", str(path), "--config", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as daemon:
        assert daemon.stderr is not None
        said = ""
        for line in daemon.stderr:
            said += line
            if "ready on" in line:
                break
        try:
            yield Place(directory, str(path), said)
        finally:
            daemon.terminate()
            daemon.communicate(timeout=SECONDS)
    assert daemon.returncode == 0


@pytest.mark.parametrize(("block", "after"), of_language("python"))
def test_program_prints_what_the_readme_says(place: Place, block: Block, after: Block | None) -> None:
    program = block.text.replace(SOCKET, place.socket)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        cwd=place.directory,
        timeout=SECONDS,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert after is not None
    assert after.language == "text", "each program is followed by what it prints"
    agree(after.text, done.stdout)


@pytest.mark.parametrize(("block", "_after"), of_language("console"))
def test_commands_answer_as_the_readme_says(place: Place, block: Block, _after: Block | None) -> None:
    status = 0
    for command, expected in session(block):
        if command.startswith("sandboxd serve"):
            assert expected.replace(SOCKET, place.socket) in place.ready
            continue
        done = place.shell(command, status)
        status = done.returncode
        agree(expected, done.stdout)


@pytest.mark.parametrize(("block", "_after"), of_language("sh"))
def test_commands_that_set_up_are_there(block: Block, _after: Block | None) -> None:
    for line in block.text.splitlines():
        word = line.split()[0]
        assert word in ("python3", ".venv/bin/pip", "usermod") or os.access(ROOT / word, os.X_OK), line


@pytest.mark.parametrize(("block", "_after"), of_language("toml"))
def test_policies_of_the_readme_are_valid(block: Block, _after: Block | None) -> None:
    parsed, problems = policy.parse_toml(block.text, "README.md", "readme")

    assert not problems
    assert parsed is not None


@pytest.mark.parametrize("file", [README, ROOT / "SECURITY.md", *DOCS], ids=lambda file: str(file.name))
def test_links_lead_to_files(file: Path) -> None:
    text = _FENCE.sub("", file.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        found = (file.parent / path).resolve() if path else file
        assert found.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", found.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, target


def test_limits_of_the_readme_are_the_defaults() -> None:
    rows = table_rows(README, "| limit | default")

    assert [(row[0].strip("`"), row[1]) for row in rows] == [
        (name, limits.spell(name, value)) for name, value in limits.defaults().items()
    ]


# docs/policies.md

POLICIES: Final = ROOT / "docs" / "policies.md"


def test_limits_of_the_reference_are_those_of_the_code() -> None:
    assert table_rows(POLICIES, "| limit | default") == [
        [f"`{name}`", limits.spell(name, limits.defaults()[name]), limit.allowed, limit.kernel]
        for name, limit in limits.LIMITS.items()
    ]


def test_keys_of_the_reference_are_those_of_the_model() -> None:
    written = {row[0].strip("`"): row[2] for row in table_rows(POLICIES, "| key | type")}
    default = policy.load("default").plain()
    model = {"name": default.pop("name")}
    model |= {
        f"{section}.{key}": value
        for section, keys in default.items()
        if section != "limits"
        for key, value in keys.items()
    }

    assert written.keys() == model.keys()
    for key, value in model.items():
        shown = _CODE.findall(written[key])
        if key != "name":
            assert shown == ([] if value is None else [json.dumps(value)]), key


def test_shipped_policies_of_the_reference_have_these_values() -> None:
    rows = {row[0].strip("`"): row[1:] for row in table_rows(POLICIES, "| limit | `default`")}
    names = ("default", "strict", "data")
    loaded = [policy.load(name).limits.plain() for name in names]

    assert rows == {name: [limits.spell(name, one[name]) for one in loaded] for name in limits.LIMITS}


# docs/architecture.md


def test_life_of_a_cell_is_that_of_the_code() -> None:
    rows = table_rows(ROOT / "docs" / "architecture.md", "| event")

    assert rows == [
        [
            f"{event.name}: {event.value}",
            *(TRANSITIONS[state][event].name if event in TRANSITIONS[state] else "" for state in State),
        ]
        for event in Event
    ]


def test_operations_are_those_of_the_code() -> None:
    rows = table_rows(ROOT / "docs" / "architecture.md", "| operation")

    assert rows == [
        [
            f"`{one}`",
            one.sender.value,
            one.asker.value,
            ", ".join(f"`{answer}`" for answer in one.answers),
            one.meaning,
        ]
        for one in Operation
    ]


def test_walls_of_a_cell_are_in_the_order_of_the_code() -> None:
    steps = re.findall(
        r"^    \{SBX_STAGE_(\w+), ", (ROOT / "native" / "inside" / "cell.c").read_text("utf-8"), re.MULTILINE
    )
    rows = table_rows(ROOT / "docs" / "architecture.md", "| step")

    assert [row[0].strip("`") for row in rows] == steps


# docs/threat-model.md


def test_tests_that_the_threat_model_names_are_there() -> None:
    known = {attack.id for attack in ATTACKS}
    for row in table_rows(ROOT / "docs" / "threat-model.md", "| an attacker wants"):
        named = _CODE.findall(row[2])
        assert named, row[0]
        for name in named:
            file, _, function = name.partition("::")
            if not file.endswith(".py"):
                assert name in known, name
                continue
            path = ROOT / "tests" / file
            assert path.is_file(), name
            assert not function or f"def {function}(" in path.read_text("utf-8"), name
