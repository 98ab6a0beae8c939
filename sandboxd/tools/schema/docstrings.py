"""A docstring taken apart: what the tool does, and what each argument means.

Knows the three usual styles: Google ("Args:"), NumPy (underlined "Parameters") and Sphinx (":param name:").
"""

from __future__ import annotations

import inspect
import re
import textwrap

_GOOGLE = re.compile(r"(Args|Arguments|Parameters|Params|Keyword Args|Keyword Arguments):\s*")
_NUMPY = re.compile(r"(Other )?Parameters\s*")
_UNDERLINE = re.compile(r"-{3,}\s*")
_ENTRY = re.compile(r"\*{0,2}(?P<name>\w+)\s*(\([^)]*\)|\[[^]]*\])?\s*:(?:\s+(?P<text>.*)|\s*)")
_SPHINX = re.compile(r":(?:param|parameter|arg|argument|key|keyword)\s+(?:[^:]*?\s)?(?P<name>\w+)\s*:\s*(?P<text>.*)")
_SPHINX_TYPE = re.compile(r":(?:type|vartype)\s+\w+\s*:")
_FIELD = re.compile(r":\w+[^:]*:")


def split(docstring: str | None) -> tuple[str, dict[str, str]]:
    """The text without its per-argument part, and the texts of the arguments by name."""
    lines = inspect.cleandoc(docstring or "").splitlines()
    kept: list[str] = []
    arguments: dict[str, str] = {}
    at = 0
    while at < len(lines):
        line = lines[at]
        if _GOOGLE.fullmatch(line):
            at = _google(lines, at + 1, arguments)
        elif _NUMPY.fullmatch(line) and at + 1 < len(lines) and _UNDERLINE.fullmatch(lines[at + 1]):
            at = _numpy(lines, at + 2, arguments)
        elif (found := _SPHINX.match(line)) or _SPHINX_TYPE.match(line):
            end = at + 1
            while end < len(lines) and lines[end].strip() and not _FIELD.match(lines[end]):
                end += 1
            if found:
                arguments[found["name"]] = _joined([found["text"], *lines[at + 1 : end]])
            at = end
        else:
            kept.append(line)
            at += 1
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip(), arguments


def _google(lines: list[str], at: int, arguments: dict[str, str]) -> int:
    end = at
    while end < len(lines) and (not lines[end].strip() or lines[end][0].isspace()):
        end += 1
    name = ""
    for line in textwrap.dedent("\n".join(lines[at:end])).splitlines():
        found = None if line[:1].isspace() else _ENTRY.fullmatch(line)
        if found:
            name = found["name"]
            arguments[name] = found["text"] or ""
        elif name and line.strip():
            arguments[name] = _joined([arguments[name], line])
    return end


def _numpy(lines: list[str], at: int, arguments: dict[str, str]) -> int:
    names: list[str] = []
    while at < len(lines):
        line = lines[at]
        if at + 1 < len(lines) and line.strip() and _UNDERLINE.fullmatch(lines[at + 1]):
            break
        if line.strip() and not line[0].isspace():
            names = [part.strip().lstrip("*") for part in line.split(":")[0].split(",")]
            if not all(part.isidentifier() for part in names):
                break  # an ordinary sentence: the section is over
            arguments.update(dict.fromkeys(names, ""))
        else:
            for name in names:
                arguments[name] = _joined([arguments[name], line])
        at += 1
    return at


def _joined(lines: list[str]) -> str:
    return " ".join(stripped for line in lines if (stripped := line.strip()))
