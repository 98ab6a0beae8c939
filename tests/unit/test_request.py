"""Runs as callers ask for them and as they travel: what is refused at the client's edge, and again by the engine."""

from __future__ import annotations

import json
import math
import mmap
import os
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd.client.exchange import Exchange
from sandboxd.client.sandbox import RUN_DEFAULTS
from sandboxd.errors import InvalidRequest, PolicyError, ProtocolError
from sandboxd.limits import defaults
from sandboxd.policy import Limits
from sandboxd.protocol.run_header import (
    ARGS_ENV_MAX_BYTES,
    CODE_MAX_BYTES,
    FILES_MAX,
    Run,
    check_files,
    check_guest_path,
    check_inputs_fit,
    parse_header,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def asked(**given: Any) -> Exchange:
    """What ``Sandbox.run`` makes of its arguments."""
    return Exchange(**{"code": "", **RUN_DEFAULTS, "results": False, "policy": None, "base_limits": {}, **given})


def sent(exchange: Exchange) -> Run:
    """*exchange*'s request as the engine reads it."""
    return parse_header(json.loads(json.dumps(exchange.request)), b"".join(exchange._payload))


# --- what arrives is what was asked -------------------------------------------------------------------------------


def test_a_run_arrives_as_it_was_asked_for() -> None:
    request = asked(
        code="print('häßlich', '🎉')\n",
        filename="report.py",
        args=["--fast", "", "a b"],
        env={"MODE": "x=y", "_": ""},
        files={"in.csv": b"abc", "a/b/c.bin": b"", "ünï": "de"},
        stdin=b"\x00\xff",
        limits=Limits(wall_seconds=5, memory_bytes="256M", pids="unlimited"),
        results=True,
        on_stdout=print,
    )
    run = sent(request)
    assert run.code == "print('häßlich', '🎉')\n"
    assert (run.language, run.filename, run.args) == ("python", "report.py", ("--fast", "", "a b"))
    assert run.env == {"MODE": "x=y", "_": ""}
    assert run.stdin is not None
    assert bytes(run.stdin) == b"\x00\xff"
    assert [(path, bytes(content)) for path, content in run.files] == [
        ("in.csv", b"abc"),
        ("a/b/c.bin", b""),
        ("ünï", b"de"),
    ]
    assert run.limits == {"wall_seconds": 5.0, "memory_bytes": 256 << 20, "pids": None}
    assert (run.results, run.stream) == (True, True)


def test_the_least_run_is_source_alone() -> None:
    run = sent(asked())
    assert run == Run("", "python", "main.py", (), {}, None, (), {}, False, False)


def test_absent_stdin_differs_from_an_empty_one() -> None:
    assert asked().request["stdin_bytes"] is None
    assert sent(asked(stdin=b"")).stdin == memoryview(b"")


@pytest.mark.parametrize(
    "code", [b"x = 1", bytearray(b"x = 1"), memoryview(b"x = 1"), "x = 1"], ids=lambda c: type(c).__name__
)
def test_source_may_be_text_or_bytes(code: Any) -> None:
    assert sent(asked(code=code)).code == "x = 1"


def test_source_keeps_every_character() -> None:
    code = "\ufeffs = '\r\n\x0c\x7f\u2028\U0010ffff'"
    assert sent(asked(code=code)).code == code


@pytest.mark.parametrize(
    "code", ["#" * CODE_MAX_BYTES, "é" * (CODE_MAX_BYTES // 2), b"#" * CODE_MAX_BYTES], ids=["ascii", "utf8", "bytes"]
)
def test_source_of_16_mib_is_taken(code: str | bytes) -> None:
    assert asked(code=code).request["code_bytes"] == CODE_MAX_BYTES


def test_the_contents_are_views_and_no_copies() -> None:
    payload = bytearray(b"xabc")
    run = parse_header(asked(code="x", files={"f": b"abc"}).request, payload)
    payload[1:4] = b"new"
    assert bytes(run.files[0][1]) == b"new"


# --- each argument wrong ------------------------------------------------------------------------------------------

WRONG: list[tuple[str, dict[str, Any], str, str]] = [  # name, arguments, field, words
    ("code None", {"code": None}, "code", "str, or bytes in UTF-8"),
    ("code a list", {"code": ["x"]}, "code", "str, or bytes in UTF-8"),
    ("code not UTF-8", {"code": b"x = '\xff'"}, "code", "byte 5 cannot be decoded"),
    ("code UTF-16", {"code": "x".encode("utf-16")}, "code", "UTF-8"),
    ("code with NUL", {"code": "ab\0"}, "code", "NUL at character 2"),
    ("code bytes with NUL", {"code": b"ab\0"}, "code", "NUL at character 2"),
    ("code with a surrogate", {"code": "a\udc80"}, "code", "surrogate at character 1"),
    ("code too long", {"code": "#" * (CODE_MAX_BYTES + 1)}, "code", "at most 16,777,216 bytes"),
    ("code too long in UTF-8", {"code": "é" * (CODE_MAX_BYTES // 2 + 1)}, "code", "at most 16,777,216 bytes"),
    ("code bytes too long", {"code": b"#" * (CODE_MAX_BYTES + 1)}, "code", "at most 16,777,216 bytes"),
    ("bash", {"code": "", "language": "bash"}, "language", "comes later"),
    ("node", {"code": "", "language": "node"}, "language", "comes later"),
    ("perl", {"code": "", "language": "perl"}, "language", 'allowed: "python"'),
    ("no language", {"code": "", "language": None}, "language", 'allowed: "python"'),
    ("an unhashable language", {"code": "", "language": ["python"]}, "language", 'allowed: "python"'),
    ("filename with a slash", {"code": "", "filename": "a/b.py"}, "filename", "without a slash"),
    ("filename empty", {"code": "", "filename": ""}, "filename", "empty"),
    ("filename dots", {"code": "", "filename": ".."}, "filename", '".."'),
    ("filename with NUL", {"code": "", "filename": "a\0"}, "filename", "NUL"),
    ("filename too long", {"code": "", "filename": "a" * 256}, "filename", "255"),
    ("filename no text", {"code": "", "filename": 3}, "filename", "without a slash"),
    ("args a string", {"code": "", "args": "abc"}, "args", "list of str"),
    ("args a number", {"code": "", "args": [1]}, "args[0]", "str, not int"),
    ("args with NUL", {"code": "", "args": ["a", "b\0"]}, "args[1]", "NUL"),
    ("args with a surrogate", {"code": "", "args": ["\udc80"]}, "args[0]", "UTF-8"),
    ("args too long", {"code": "", "args": ["x" * ARGS_ENV_MAX_BYTES]}, "args", "at most 131,072"),
    ("env a list", {"code": "", "env": [("A", "b")]}, "env", "map str to str"),
    ("env name empty", {"code": "", "env": {"": "b"}}, "env", "not a variable's name"),
    ("env name with =", {"code": "", "env": {"A=B": "b"}}, "env", "not a variable's name"),
    ("env name with a digit first", {"code": "", "env": {"1A": "b"}}, "env", "no digit first"),
    ("env name not ASCII", {"code": "", "env": {"Ä": "b"}}, "env", "not a variable's name"),
    ("env name with newline", {"code": "", "env": {"A\n": "b"}}, "env", "not a variable's name"),
    ("env name no text", {"code": "", "env": {1: "b"}}, "env", "not a variable's name"),
    ("env value no text", {"code": "", "env": {"A": 1}}, "env['A']", "str, not int"),
    ("env value with NUL", {"code": "", "env": {"A": "\0"}}, "env['A']", "NUL"),
    ("LD_PRELOAD", {"code": "", "env": {"LD_PRELOAD": "x.so"}}, "env", "would do nothing"),
    ("GLIBC_TUNABLES", {"code": "", "env": {"GLIBC_TUNABLES": "x"}}, "env", "would do nothing"),
    ("PYTHONPATH", {"code": "", "env": {"PYTHONPATH": "/x"}}, "env", "would do nothing"),
    ("args and env together", {"code": "", "args": ["x" * 70_000], "env": {"A": "y" * 70_000}}, "args", "131,072"),
    ("files a list", {"code": "", "files": ["a"]}, "files", "map guest paths"),
    ("files a bad path", {"code": "", "files": {"/etc/passwd": b"x"}}, "files", "relative"),
    ("limits a dict", {"code": "", "limits": {"pids": 3}}, "limits", "sandboxd.Limits"),
    ("results no bool", {"code": "", "results": 1}, "results", "true or false"),
]


@pytest.mark.parametrize(("given", "field", "words"), [pytest.param(*row[1:], id=row[0]) for row in WRONG])
def test_a_wrong_argument_is_refused_by_name(given: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        asked(**given)
    assert caught.value.field == field
    assert words in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value)) < 300


PATHS = [
    "/etc/passwd",
    "..",
    "../x",
    "a/../b",
    "a/..",
    "",
    ".",
    "./a",
    "a/./b",
    "a//b",
    "a/",
    "a\0b",
    "\udc80",
    "x" * 256,
    "é" * 128,
    "/".join(["x" * 250] * 17),
    "/".join(["x"] * 66),
]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ascii(path)[:20])
def test_a_path_that_is_not_plainly_below_the_workspace_is_refused(path: str) -> None:
    with pytest.raises(InvalidRequest, match="files: the path"):
        check_guest_path(path)


@pytest.mark.parametrize("path", ["a", "a/b", "...", "..a", "a b\n", "-rf", "é" * 127, "x" * 255, "/".join(["x"] * 65)])
def test_any_other_path_is_taken_as_it_is(path: str) -> None:
    assert check_guest_path(path) == path


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([("a", 1), ("a", 1)], "there twice"),
        ([("a", 1), ("a/b", 1)], "directory of another"),
        ([("a/b/c/d", 1), ("a/b", 1)], "directory of another"),
        ([(f"{i}", 0) for i in range(FILES_MAX + 1)], "at most 100,000"),
    ],
    ids=["twice", "parent", "grandparent", "many"],
)
def test_files_that_cannot_all_exist_are_refused(files: list[tuple[object, object]], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        check_files(files)


def test_neighbours_with_the_same_beginning_are_no_conflict() -> None:
    assert check_files([("a", 1), ("ab/c", 1), ("a.b", 2)]) == (("a", 1), ("ab/c", 1), ("a.b", 2))


@pytest.mark.parametrize(
    ("files", "fits"),
    [
        ([("a", 4096)], True),
        ([("a", 4097)], False),  # two pages
        ([("a", 1), ("b", 1)], False),  # a page each
        ([("a", 0), ("b", 0), ("c", 0)], True),
        ([("a", 0), ("b", 0), ("c", 0), ("d", 0)], False),
        ([("a/b/c", 0)], True),
        ([("a/b/c/d", 0)], False),
    ],
)
def test_files_are_counted_as_tmpfs_counts(files: list[tuple[str, int]], fits: bool) -> None:
    limits = {**defaults(), "workspace_bytes": 4096, "workspace_files": 3}
    if fits:
        check_inputs_fit(files, limits)
    else:
        with pytest.raises(InvalidRequest, match="workspace_"):
            check_inputs_fit(files, limits)


def test_a_wrong_limit_is_a_policy_error() -> None:
    with pytest.raises(PolicyError, match=r"limits\.wall_seconds: -1 is not allowed"):
        asked(limits=Limits(wall_seconds=-1))


# --- a hostile header ---------------------------------------------------------------------------------------------


def header(**changes: Any) -> dict[str, Any]:
    """The header of a small run, with *changes*; its payload is b"codestdin-filefile2"."""
    own: dict[str, Any] = {
        "code_bytes": 4,
        "stdin_bytes": 5,
        "files": [["a", 5], ["b/c", 5]],
        "args": ["x"],
        "env": {"A": "b"},
        "limits": {"pids": 3},
        "language": "python",
        "filename": "main.py",
        "stream": False,
        "results": True,
    }
    return {**own, **changes}


PAYLOAD = b"codestdin-filefile2"


def test_the_header_that_the_others_are_made_from_is_good() -> None:
    run = parse_header(header(), PAYLOAD)
    assert (run.code, run.stdin) == ("code", memoryview(b"stdin"))
    assert [bytes(content) for _, content in run.files] == [b"-file", b"file2"]


def test_a_payload_may_be_any_buffer() -> None:
    fd = os.memfd_create("payload")
    try:
        os.write(fd, PAYLOAD)
        with mmap.mmap(fd, len(PAYLOAD), prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
            run = parse_header(header(files=[], stdin_bytes=15), view)
            assert run.stdin is not None
            assert bytes(run.stdin) == PAYLOAD[4:]
            run.stdin.release()
            del run
    finally:
        os.close(fd)


MISFITS: list[tuple[str, Callable[[], dict[str, Any]]]] = [
    ("empty", lambda: {}),
    ("a key more", lambda: header(policy="default")),
    *[(f"without {key}", lambda key=key: {k: v for k, v in header().items() if k != key}) for key in header()],
    *[(f"{key} null", lambda key=key: header(**{key: None})) for key in header() if key != "stdin_bytes"],
    *[(f"{key} a float", lambda key=key: header(**{key: 4.0})) for key in header()],
    ("code_bytes true", lambda: header(code_bytes=True)),
    ("code_bytes negative", lambda: header(code_bytes=-1, stdin_bytes=10)),
    ("stdin_bytes negative", lambda: header(stdin_bytes=-1, code_bytes=10)),
    ("stdin_bytes true", lambda: header(stdin_bytes=True)),
    ("code_bytes huge", lambda: header(code_bytes=1 << 80)),
    ("too short", lambda: header(code_bytes=5)),
    ("too long", lambda: header(code_bytes=3)),
    ("stdin absent, bytes there", lambda: header(stdin_bytes=None)),
    ("a file of three", lambda: header(files=[["a", 5, 0], ["b/c", 5]])),
    ("a file of one", lambda: header(files=[["a"], ["b/c", 5]])),
    ("a file as text", lambda: header(files=["ab"])),
    ("a file longer than all", lambda: header(files=[["a", 5], ["b/c", 6]])),
    ("stream a number", lambda: header(stream=0)),
]


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in MISFITS])
def test_a_header_that_is_not_of_the_protocol_is_refused(make: Callable[[], dict[str, Any]]) -> None:
    with pytest.raises(ProtocolError):
        parse_header(make(), PAYLOAD)


INVALID: list[tuple[str, dict[str, Any]]] = [
    ("language", {"language": "bash"}),
    ("filename", {"filename": "../main.py"}),
    ("args", {"args": [1]}),
    ("env", {"env": {"LD_PRELOAD": "x"}}),
    ("env of lists", {"env": {"A": ["b"]}}),
    ("absolute path", {"files": [["/a", 5], ["b/c", 5]]}),
    ("path climbing out", {"files": [["a", 5], ["../c", 5]]}),
    ("path twice", {"files": [["a", 5], ["a", 5]]}),
    ("path below a file", {"files": [["a", 5], ["a/c", 5]]}),
    ("path no text", {"files": [[["a"], 5], ["b/c", 5]]}),
    ("size negative", {"files": [["a", -5], ["b/c", 15]]}),
    ("size true", {"files": [["a", True], ["b/c", 9]]}),
    ("size a float", {"files": [["a", 5.0], ["b/c", 5]]}),
]


@pytest.mark.parametrize("changes", [pytest.param(changes, id=name) for name, changes in INVALID])
def test_the_engine_checks_the_arguments_again(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        parse_header(header(**changes), PAYLOAD)


@pytest.mark.parametrize("code", [b"ab\0d", b"ab\xffd"], ids=["nul", "not-utf8"])
def test_the_engine_checks_the_source_again(code: bytes) -> None:
    with pytest.raises(InvalidRequest, match="code: it is not text"):
        parse_header(header(), code + PAYLOAD[4:])


def test_the_engine_refuses_source_that_is_too_long() -> None:
    payload = b"#" * (CODE_MAX_BYTES + 1)
    with pytest.raises(InvalidRequest, match="at most 16,777,216 bytes"):
        parse_header(header(code_bytes=len(payload), stdin_bytes=None, files=[]), payload)


@pytest.mark.parametrize(
    "limits",
    [
        {"seconds": 3},
        {"pids": 0},
        {"pids": "3"},
        {"pids": "unlimited"},
        {"pids": 3.0},
        {"pids": True},
        {"memory_bytes": None},
        {"memory_bytes": "256M"},
        {"wall_seconds": math.nan},
        {"wall_seconds": math.inf},
        {"wall_seconds": [3]},
    ],
    ids=repr,
)
def test_the_engine_checks_the_limits_again(limits: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="limit"):
        parse_header(header(limits=limits), PAYLOAD)
