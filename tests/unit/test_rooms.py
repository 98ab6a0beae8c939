"""The rooms of the code, and in which direction they may know each other.

``ROOMS`` lists them, ground first. A module may import from its own room and from those above its own in the list;
nobody imports in a circle. Imports inside functions, imports for type checkers and modules that are named as text count
like any other. docs/architecture.md shows the same list.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

TREE: Final = Path(__file__).resolve().parents[2]
MOST_LINES: Final = 600
MOST_ATTRIBUTES: Final = 15
REASON: Final = "# More than 15 attributes: "

ROOMS: Final = """\
errors, limits       what everybody raises, and the limits that a policy has
_native, _util       the C of native/engine and native/lib; small helpers that know nothing of sandboxd
kernel               system calls, mount stages, user and network namespaces
inside               what runs in a cell and in its zygote; the standard library alone
seccomp              from a profile to the program that the kernel enforces
ids                  host ids: which are whose, and how they are mapped
cgroup               cgroup directories and what they count, v1 and v2
rootfs               what a cell sees as its root
policy               policies: the model, the files
protocol             the bytes between a client and an engine
outcome              how a run ended, from evidence alone; for engine and client
audit                the audit record: writing, reading, redacting
client               Sandbox and AsyncSandbox, their connections, the embedded engine's process
sandboxd             the public names
engine.config        what an operator may set
engine.held_time     how long each iteration of the loop held up the others
engine.collecting    the garbage collector, when the engine is idle
engine.fair_share    what one uid may take
engine.admission     turns, and the queue for them
engine.clock         the engine's one timer
engine.cells         cells, from the zygote to the reaper; active_policy, their pools
engine.audit         what the engine writes to the record
engine.runs          one run in a cell
engine.tally         counters
engine.policies      the policies in force
engine.engine        the facade
engine.clients       connections, leases, logs
engine               the process of an embedded engine
tools                the dispatcher: typed tools and run_code
diagnostics          what this host can enforce
daemon               sandboxd serve
install              the systemd service
bench                sandboxd bench
cli                  the command line
"""


def order() -> list[str]:
    """The names in ROOMS, ground first."""
    return [name for line in ROOMS.splitlines() for name in line[:20].replace(",", " ").split()]


def modules(tree: Path = TREE) -> dict[str, Path]:
    """Every module of the package, by its name."""
    found = {}
    for path in sorted((tree / "sandboxd").rglob("*.py")):
        name = ".".join(path.relative_to(tree).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


KNOWN: Final = modules()


def imports(source: str) -> Iterator[tuple[str, int]]:
    """What *source* imports of the package, with the line: modules, or ``package.name`` where that is none."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the package"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in KNOWN:
            # For importlib, python -m, sys.modules. A package's name is a logger's.
            names = [node.value] if KNOWN[node.value].name != "__init__.py" else []
        else:
            continue
        for name in names:
            if name.split(".")[0] == "sandboxd":
                yield name, node.lineno


def module_of(name: str) -> str:
    """The module that *name* is, or is in."""
    while name not in KNOWN and name != "sandboxd._native":
        name = name.rpartition(".")[0]
    return name


def room_of(module: str) -> str:
    """The longest entry of ROOMS that *module* is below."""
    inner = "sandboxd" if module in ("sandboxd", "sandboxd.__main__") else module.removeprefix("sandboxd.")
    if module == "sandboxd.__main__":
        inner = "cli"
    return max((one for one in order() if inner == one or inner.startswith(f"{one}.")), key=len)


def upward(module: str, source: str) -> list[str]:
    """The imports of *module* that reach upward, in words."""
    ranks = {name: rank for rank, name in enumerate(order())}
    own = room_of(module)
    return [
        f"{module}, line {line}, imports {name}: {room_of(module_of(name))} lies above {own}"
        for name, line in imports(source)
        if module_of(name) != module and ranks[room_of(module_of(name))] > ranks[own]
    ]


def test_no_module_reaches_upward() -> None:
    found = [one for name, path in KNOWN.items() for one in upward(name, path.read_text("utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "from sandboxd.engine.engine import Engine",
        "import sandboxd.client.sandbox",
        "def late():\n    from sandboxd.tools import Dispatcher",
        "if TYPE_CHECKING:\n    from sandboxd.engine.clients.leases import Lease",
        'import_module("sandboxd.cli.run")',
    ],
)
def test_an_import_that_reaches_upward_is_told(line: str) -> None:
    assert len(upward("sandboxd.kernel.calls", line)) == 1
    assert upward("sandboxd.cli.verdict", line) == []


def test_nobody_imports_in_a_circle() -> None:
    arrows = {
        name: {module_of(one) for one, _ in imports(path.read_text("utf-8"))} - {name, "sandboxd._native"}
        for name, path in KNOWN.items()
    }
    # A package's __init__ may offer names of its own modules, and those import each other by their own names.
    for name, path in KNOWN.items():
        if path.name == "__init__.py":
            arrows[name] = {one for one in arrows[name] if not one.startswith(f"{name}.")}
    while ends := [name for name, to in arrows.items() if not to]:
        for end in ends:
            del arrows[end]
        for to in arrows.values():
            to.difference_update(ends)
    assert arrows == {}, "these import each other, or what does"


def test_rooms_are_those_of_the_tree() -> None:
    tops = {name.split(".")[1] for name in KNOWN if "." in name} - {"__main__"}
    listed = {name.split(".")[0] for name in order()} - {"sandboxd", "_native"}
    assert tops == listed


def test_what_runs_inside_imports_the_standard_library_alone() -> None:
    for name, path in KNOWN.items():
        if room_of(name) == "inside":
            assert {one for one, _ in imports(path.read_text("utf-8")) if room_of(module_of(one)) != "inside"} == set()


def test_architecture_shows_the_rooms() -> None:
    text = (TREE / "docs" / "architecture.md").read_text("utf-8")
    shown = re.search(r"^```\n(errors, limits.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert shown is not None
    assert shown[1] == ROOMS


def test_modules_are_short() -> None:
    long = {name: n for name, path in KNOWN.items() if (n := path.read_text("utf-8").count("\n")) > MOST_LINES}
    assert long == {}


def attributes(node: ast.ClassDef) -> set[str]:
    """The attributes of its instances: assigned through self, annotated in the class, or in __slots__."""
    found = set()
    for inner in ast.walk(node):
        match inner:
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                found.add(name)
    for inner in node.body:
        if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
            found.add(inner.target.id)
    return found


def test_large_classes_state_their_reason() -> None:
    silent = []
    for name, path in KNOWN.items():
        source = path.read_text("utf-8")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.ClassDef) or (number := len(attributes(node))) <= MOST_ATTRIBUTES:
                continue
            if REASON not in (ast.get_source_segment(source, node) or ""):
                silent.append(f"{name}.{node.name}: {number}")
    assert silent == []
