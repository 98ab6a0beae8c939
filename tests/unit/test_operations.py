"""The operations of the protocol: one list, and nobody writes a word of it elsewhere."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from sandboxd.engine.clients import connection
from sandboxd.protocol import packets
from sandboxd.protocol.operations import REQUESTS, Asker, Operation, Sender, operation_of

if TYPE_CHECKING:
    from collections.abc import Iterator

TREE: Final = Path(__file__).resolve().parents[2] / "sandboxd"
HOME: Final = TREE / "protocol" / "operations.py"
OTHER_OPS: Final = TREE / "seccomp" / "oci.py"  # the "op" of a rule


def is_op(node: ast.expr) -> bool:
    """Whether *node* reads the operation of a message."""
    if isinstance(node, ast.Subscript):
        return isinstance(node.slice, ast.Constant) and node.slice.value == "op"
    if isinstance(node, ast.Call):
        return any(isinstance(one, ast.Constant) and one.value == "op" for one in node.args)
    return isinstance(node, ast.Name) and node.id == "operation"


def bare_words(source: str) -> Iterator[int]:
    """The lines of *source* that write an operation as text, or compare one with text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "op" and isinstance(value, ast.Constant):
                    yield node.lineno
        elif isinstance(node, ast.Compare) and is_op(node.left):
            for one in node.comparators:
                for part in ast.walk(one):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield node.lineno


@pytest.mark.parametrize(
    "line",
    [
        'send({"op": "ps"})',
        'if message.get("op") == "ps": ...',
        'if message["op"] in ("result", "refused"): ...',
        'if operation != "ps": ...',
    ],
)
def test_bare_word_is_found(line: str) -> None:
    assert set(bare_words(line)) == {1}


def test_no_operation_is_written_as_a_bare_word() -> None:
    found = [
        f"{path.relative_to(TREE)}:{line}"
        for path in sorted(TREE.rglob("*.py"))
        if path not in (HOME, OTHER_OPS)
        for line in bare_words(path.read_text("utf-8"))
    ]
    assert found == []


def test_names_are_the_words() -> None:
    assert all(one.name == one.value.upper() for one in Operation)


def test_answers_are_operations_of_an_engine() -> None:
    for operation in Operation:
        for answer in operation.answers:
            assert answer.sender is not Sender.CLIENT or operation is Operation.LEASE, operation


def test_every_operation_is_explained_in_a_sentence() -> None:
    assert all(one.meaning[0].isupper() and one.meaning[-1] == "." for one in Operation)


def test_operations_that_only_an_engine_sends_are_nobodys_to_ask() -> None:
    assert {one for one in Operation if one.asker is Asker.NOBODY} == {
        one for one in Operation if one.sender is Sender.ENGINE
    }


def test_engine_answers_every_request() -> None:
    assert list(connection._HANDLERS) == list(REQUESTS)


@pytest.mark.parametrize("operation", Operation)
def test_operation_travels_as_its_word(operation: Operation) -> None:
    found = packets.loads(b"".join(map(bytes, packets.pack({"op": operation})[0]))[20:])
    assert type(found["op"]) is str
    assert found == {"op": operation.value}
    assert operation_of(found) is operation


@pytest.mark.parametrize("message", [{}, {"op": "shutdown"}, {"op": None}, {"op": {"run": 1}}, {"op": ["run"]}])
def test_what_is_not_of_the_list_is_no_operation(message: dict[str, Any]) -> None:
    assert operation_of(message) is None
