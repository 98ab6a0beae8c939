"""Typed Python stubs of tools: as text for a prompt, and as the source of the module ``tools`` in a cell. Pure.

Both are made from the tools' JSON Schemas, so what a model or a program reads is what is checked. Every text in them is
the host program's own, but none may break out of its place: literals are written by ``ascii``, docstrings are escaped.
"""

from __future__ import annotations

import keyword
import re
import unicodedata
from typing import TYPE_CHECKING, Any, NamedTuple

from sandboxd.protocol.run_header import MODULE_BYTES
from sandboxd.tools.schema.annotations import Names, Record, Types, explained, is_object, spelled_value

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sandboxd.tools.pipeline.tool import Tool

__all__ = ["cell_module", "prompt_stubs", "signature"]


class _Parameter(NamedTuple):
    name: str
    kind: str
    default: str | None  # as it is shown; None: required
    text: str


class _Stub(NamedTuple):
    """One tool, ready to be written down."""

    name: str
    parameters: list[_Parameter]
    returns: str
    description: str


def signature(tool: Tool) -> str:
    """``query_sales(quarter: Literal['Q1', 'Q2'], limit: int = 10) -> list[Row]``."""
    return _signature(_stub(tool, Names()))


def prompt_stubs(tools: Iterable[Tool]) -> str:
    """What code may call, as Python text for a prompt: typed functions with docstrings, and a TypedDict for each object
    type. Only tools that code may call are in it; empty when there is none.
    """
    names = Names()
    stubs = [_stub(tool, names) for tool in tools if "code" in tool.callers]
    if not stubs:
        return ""
    parts = [
        "# The module `tools` is there in every program; call its functions as tools.NAME(argument=value).\n"
        "# A call that is refused or fails raises tools.ToolError (its attributes: code, message, hint)."
    ]
    parts += [_class(record) for record in names.records.values()]
    for stub in stubs:
        body = _indented(_docstring(_document(stub)))
        parts.append(f"def {_signature(stub)}:\n{body}")
    return "\n\n".join(parts) + "\n"


def cell_module(tools: Iterable[Tool]) -> str:
    """The source of the module ``tools`` in a cell: a function for each tool that code may call.

    It is executed in names that hold ``_call(name, arguments)`` and ``_Default``, which stands for "not given" and
    shows the default. Raises ValueError when the text is longer than a cell takes.
    """
    parts: list[str] = []
    for tool in tools:
        if "code" not in tool.callers:
            continue
        names = Names()
        stub = _stub(tool, names)
        document = _document(stub, names.records.values())
        if all(_is_plain(one.name) for one in stub.parameters):
            shown = ", ".join(
                f"{one.name}: {one.kind!a}" + (f" = _Default({one.default!a})" if one.default else "")
                for one in stub.parameters
            )
            given = ", ".join(f"{one.name!a}: {one.name}" for one in stub.parameters)
            given = f"{{{given}}}"
        else:  # JSON has names that Python has not
            shown, given = "**arguments", "arguments"
        parts.append(
            f"def {tool.name}({shown}) -> {stub.returns!a}:\n"
            f"    {document!a}\n"
            f"    return _call({tool.name!a}, {given})\n"
        )
    source = "\n\n".join(parts)
    size = len(source.encode())
    if size > MODULE_BYTES:
        raise ValueError(
            f"The signatures and docstrings of the tools for code take {size:,} bytes; "
            f"a cell takes {MODULE_BYTES:,}. Shorten them or grant fewer."
        )
    return source


def _stub(tool: Tool, names: Names) -> _Stub:
    schema = tool.arguments_schema
    types = Types(schema, names)
    required = set(schema.get("required", ()))
    parameters = [
        _Parameter(
            name,
            types.spelled(inner, f"{tool.name}_{name}"),
            None if name in required else _default(inner),
            explained(inner),
        )
        for name, inner in schema.get("properties", {}).items()
    ]
    parameters.sort(key=lambda one: one.default is not None)  # Python wants those with a default last
    result = tool.result_schema
    returns = "Any" if result is None else Types(result, names).spelled(result, f"{tool.name}_result")
    return _Stub(tool.name, parameters, returns, tool.description)


def _signature(stub: _Stub) -> str:
    shown = ", ".join(
        f"{one.name}: {one.kind}" + ("" if one.default is None else f" = {one.default}") for one in stub.parameters
    )
    if not all(_is_plain(one.name) for one in stub.parameters):
        shown = "**arguments: Any"
    return f"{stub.name}({shown}) -> {stub.returns}"


def _document(stub: _Stub, records: Iterable[Record] = ()) -> str:
    """The docstring: description, arguments that have more to say than their type, object types."""
    parts = [stub.description] if stub.description else []
    said = [f"    {one.name}: {_hanging(one.text)}" for one in stub.parameters if one.text]
    if said:
        parts.append("\n".join(["Args:", *said]))
    parts += [
        f"{record.name} is a dict:\n" + "\n".join(f"    {line}" for line in _fields(record)) for record in records
    ]
    return "\n\n".join(parts)


def _fields(record: Record) -> Iterator[str]:
    for key, kind, always in record.fields:
        text = explained(record.schema["properties"][key])
        name = key if _is_plain(key) else ascii(key)
        yield f"{name}: {kind}{'' if always else ' (may be missing)'}" + (f"  {_hanging(text)}" if text else "")


def _class(record: Record) -> str:
    """*record* as a TypedDict, or as a call of it when a key is no name in Python."""
    shown = [(key, kind if always else f"NotRequired[{kind}]") for key, kind, always in record.fields]
    if not all(_is_plain(key) for key, _ in shown):
        inner = ", ".join(f"{key!a}: {kind!a}" for key, kind in shown)
        return f"{record.name} = TypedDict({record.name!a}, {{{inner}}})"
    lines = [f"class {record.name}(TypedDict):"]
    about = record.schema.get("description")
    if isinstance(about, str) and about.strip():
        lines.append(_indented(_docstring(about.strip())))
    for key, kind in shown:
        text = explained(record.schema["properties"][key])
        lines.append(f"    {key}: {kind}" + (f"  # {_one_line(text)}" if text else ""))
    return "\n".join(lines)


def _default(schema: Any) -> str:
    """The default of an argument as it is shown; one that JSON cannot say is an ellipsis."""
    return spelled_value(schema["default"]) if is_object(schema) and "default" in schema else "..."


def _is_plain(name: str) -> bool:
    """Whether *name* can stand in Python source, and means itself there (the compiler normalises names)."""
    return (
        name.isidentifier()
        and not keyword.iskeyword(name)
        and not name.startswith("__")
        and name not in ("_call", "_Default")
        and unicodedata.normalize("NFKC", name) == name
    )


def _hanging(text: str) -> str:
    """Later lines below the first, further in."""
    return text.replace("\n", "\n        ")


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.split("\n"))


def _one_line(text: str) -> str:
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())


def _docstring(text: str) -> str:
    """*text* as a readable literal in triple quotes: what would end it, or cannot be printed, is escaped."""
    safe = re.sub(r'"(?="|\Z)', r"\"", text.replace("\\", "\\\\"))
    safe = "".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in safe)
    tail = "\n" if "\n" in safe else ""
    return f'"""{safe}{tail}"""'
