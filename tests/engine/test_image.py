"""The zygote's memory: moved into a sealed memfd and given to cells ahead of time, with nothing to be noticed of it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd import Limits, Result, Sandbox
from sandboxd.engine.cells.zygote_spawn import INSIDE

if TYPE_CHECKING:
    from collections.abc import Iterator

POLICY = """
name = "random"
[runtime]
preload = ["random", "uuid", "tempfile", "secrets", "ssl", "logging", "concurrent.futures"%s]
warmup = '''
import builtins, os, random, tempfile, uuid
random.random(), uuid.uuid1(), next(tempfile._get_candidate_names())
builtins.seen = []
os.register_at_fork(before=lambda: seen.append("before"), after_in_child=lambda: seen.append("child"),
                    after_in_parent=lambda: seen.append("parent"))
builtins.block = bytearray(b"x") * (48 << 20)
builtins.kept = {"list": list(range(200_000)), "text": "unchanged"}
%s'''
"""


def has(name: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {name}"], check=False, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """An engine whose zygote has drawn from every random source, registered a hook and made large objects."""
    scipy = has("scipy.stats")
    path = tmp_path_factory.mktemp("policy") / "random.toml"
    more = "import numpy\nnumpy.random.rand(3), numpy.random.standard_normal()\n" if scipy else ""
    path.write_text(POLICY % (', "numpy", "scipy.stats"' if scipy else "", more))
    with Sandbox(policy=path) as made:
        yield made


def inside(sandbox: Sandbox, code: str, **arguments: Any) -> Result:
    """Run *code*, whose indentation is the test's; it must end well."""
    result = sandbox.run(textwrap.dedent(code), **arguments)
    assert result.status == "ok", (result.status, result.stderr)
    return result


# --- what cells draw ----------------------------------------------------------------------------------------------

DRAWN = {
    "random": "import random; random.random()",
    "gauss": "import random; random.gauss(0, 1)",
    "secrets": "import secrets; secrets.token_hex()",
    "uuid4": "import uuid; uuid.uuid4()",
    "uuid1": "import uuid; uuid.uuid1()",
    "tempfile": "import tempfile; tempfile.mktemp()",
    "ssl": "import ssl; ssl.RAND_bytes(16).hex()",
    "urandom": "import os; os.urandom(16).hex()",
}
DRAWN_BY_NUMPY = {
    "rand": "import numpy; numpy.random.rand()",
    "standard_normal": "import numpy; numpy.random.standard_normal()",
    "legacy_bytes": "import numpy; numpy.random.bytes(16).hex()",
    "default_rng": "import numpy; numpy.random.default_rng().random()",
    "scipy": "from scipy import stats; stats.norm.rvs()",
}


@pytest.mark.parametrize("code", DRAWN.values(), ids=DRAWN)
def test_three_cells_draw_different_numbers(prepared: Sandbox, code: str) -> None:
    drawn = {inside(prepared, code.replace("; ", "\n")).results[-1].mime["text/plain"] for _ in range(3)}
    assert len(drawn) == 3


@pytest.mark.parametrize("code", DRAWN_BY_NUMPY.values(), ids=DRAWN_BY_NUMPY)
def test_three_cells_draw_different_numbers_of_numpy(prepared: Sandbox, code: str) -> None:
    pytest.importorskip("scipy.stats")
    drawn = {inside(prepared, code.replace("; ", "\n")).results[-1].mime["text/plain"] for _ in range(3)}
    assert len(drawn) == 3


def test_numpys_legacy_generator_may_be_seeded_and_is_the_documented_one(prepared: Sandbox) -> None:
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("scipy.stats")
    code = """
        import numpy
        numpy.random.rand()
        numpy.random.seed(5)
        print(numpy.random.get_state()[0], numpy.random.rand())
    """
    assert inside(prepared, code).stdout == f"MT19937 {numpy.random.RandomState(5).rand()}\n"


# --- hooks --------------------------------------------------------------------------------------------------------


def test_a_librarys_hook_has_run_once_in_a_cell(prepared: Sandbox) -> None:
    assert inside(prepared, "print(seen)").stdout == "['before', 'child']\n"


def test_a_fork_of_the_program_runs_the_hooks_of_libraries(prepared: Sandbox) -> None:
    code = """
        import os, random
        seen.clear()
        read, write = os.pipe()
        state = random.getstate()
        if os.fork() == 0:
            os.write(write, repr((seen, random.getstate() == state)).encode())
            os._exit(0)
        os.wait()
        print(os.read(read, 100).decode(), seen, random.getstate() == state)
    """
    assert inside(prepared, code).stdout == "(['before', 'child'], False) ['before', 'parent'] True\n"


def test_register_at_fork_is_the_interpreters_own(prepared: Sandbox) -> None:
    code = "import os, posix; print(os.register_at_fork is posix.register_at_fork, os.register_at_fork.__module__)"
    assert inside(prepared, code).stdout == "True posix\n"


# --- one cell and another -----------------------------------------------------------------------------------------


def test_what_one_cell_writes_no_other_sees(prepared: Sandbox) -> None:
    code = """
        import ctypes
        before = kept["text"], kept["list"][7], block[:3], len(kept)
        kept["list"][7] = "mine"; kept["new"] = 1; block[:3] = b"own"
        ctypes.memset(id(kept["text"]) + type(kept["text"]).__basicsize__ - 8, ord("!"), 3)
        print(before, kept["list"][7], block[:3])
    """
    expected = "('unchanged', 7, bytearray(b'xxx'), 2) mine bytearray(b'own')\n"
    for _ in range(3):
        assert inside(prepared, code).stdout == expected


def test_the_memfd_cannot_be_opened_from_a_cell(prepared: Sandbox) -> None:
    code = """
        import os
        tried = []
        for name in os.listdir("/proc/self/fd"):
            try:
                tried.append("sandboxd-image" in os.readlink(f"/proc/self/fd/{name}"))
            except FileNotFoundError:
                pass
        areas = [line.split() for line in open("/proc/self/maps") if "sandboxd-image" in line]
        refused = 0
        for area in areas:
            try:
                os.open(f"/proc/self/map_files/{area[0]}", os.O_RDWR)
            except (PermissionError, FileNotFoundError):
                refused += 1
        kinds = {area[1] for area in areas}
        print(any(tried), refused == len(areas), all(kind[2:] == "-p" for kind in kinds))
    """
    assert inside(prepared, code).stdout == "False True True\n"


def test_reading_what_is_shared_costs_a_cell_nothing_and_writing_it_is_charged(prepared: Sandbox) -> None:
    if inside(prepared, "open('/proc/self/maps').read().count('sandboxd-image')").results[0].mime["text/plain"] == "0":
        pytest.skip("no sealed memfd in this kernel")
    few = Limits(memory_bytes="32M")
    assert inside(prepared, "print(block.count(b'x') >> 20)", limits=few).stdout == "48\n"
    assert prepared.run("block[::4096] = bytes(len(block) >> 12)", limits=few).status == "memory"


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("kept['list'].extend(range(3_000_000)); print(len(kept['list']), kept['list'][200_000])", "3200000 0"),
        ("block.extend(bytes(40 << 20)); print(len(block) >> 20, block[-1], block[0])", "88 0 120"),
        ("del block[1 << 20:]; block.extend(b'y' * (2 << 20)); print(len(block) >> 20)", "3"),
        ("import builtins; del builtins.block, builtins.kept; x = bytes(60 << 20); print(len(x))", str(60 << 20)),
        ("x = [bytes(100_000) for n in range(400)]; print(all(one.count(0) == 100_000 for one in x))", "True"),
        ("x = [bytearray(n) for n in range(2000)]; print(not any(map(any, x)))", "True"),
        ("import gc, sys; gc.unfreeze(); gc.collect(); sys.modules.pop('uuid'); gc.collect(); print(1)", "1"),
        (
            "import ctypes; f = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(lambda n: n + 1); print(f(4))",
            "5",
        ),
        ("import threading; t = threading.Thread(target=print, args=('in',)); t.start(); t.join()", "in"),
        (
            "from concurrent.futures import ThreadPoolExecutor as E; e = E(2); print(sum(e.map(abs, [-1, 2])))",
            "3",
        ),
    ],
    ids=["list", "bytearray", "shrink", "free", "malloc", "pymalloc", "collect", "callback", "thread", "pool"],
)
def test_moved_memory_grows_shrinks_and_goes_as_any_other(prepared: Sandbox, code: str, printed: str) -> None:
    assert inside(prepared, code).stdout == f"{printed}\n"


# --- nothing to be noticed ----------------------------------------------------------------------------------------


def test_a_parked_cell_has_nothing_of_its_rehearsal(sandbox: Sandbox) -> None:
    code = """
        import atexit, linecache, sys, threading, warnings, __main__
        print(sorted(n for n in vars(__main__) if not n.startswith("__")))
        print(sys.argv, [n for n in dir(sys) if n.startswith("last_")], linecache.cache)
        print(threading.active_count(), getattr(warnings, "onceregistry", {}), sys.exc_info())
        print("_image" in sys.modules, "_cell" in sys.modules, "program" in sys.modules)
    """
    names = "['__main__', 'atexit', 'linecache', 'sys', 'threading', 'warnings']"
    printed = inside(sandbox, code).stdout.splitlines()
    assert printed[0] == names.replace("'__main__', ", "")
    assert printed[1] == "['/code/main.py'] [] {}"
    assert printed[2] == "1 {} (None, None, None)"
    assert printed[3] == "False False False"


LAST = [
    ("1+1", "2"),
    ("1 + 1  # two\n\n", "2"),
    ("x = 3\nx * 2", "6"),
    ("x = [\n    1]\nx", "[1]"),
    ("(1 +\n1)", "2"),
    ("'''a\nb'''", "'a\\nb'"),
    ("'''\nabc\n'''\n'b'", "'b'"),
    ("(y := 5)", "5"),
    ("if True:\n    y = 4\ny", "4"),
    ("from __future__ import annotations\n3", "3"),
    ("1; 2", "2"),
    ("a = 1\r\na\r\n", "1"),
    ("a = 1\ra", "1"),
    ("\ufeff7", "7"),
    ("'doc'\n__doc__", "'doc'"),
    ("import sys\nsys._getframe().f_lineno", "2"),
    ("x = '\\\\'\nx", "'\\\\'"),
    ("x = 5", None),
    ("x = 1 \\\n-2", None),
    ("x = [1,\n2]", None),
    ("print(1,\n2)", None),
    ("for n in []:\n    pass\nelse:\n    n = 3", None),
    ("# nothing", None),
    ("", None),
]


@pytest.mark.parametrize(("code", "value"), LAST)
def test_the_last_expressions_value_is_kept_and_only_that(sandbox: Sandbox, code: str, value: str | None) -> None:
    result = sandbox.run(code)
    assert (result.status, [one.mime["text/plain"] for one in result.results]) == ("ok", [value] if value else [])


@pytest.mark.parametrize(
    ("code", "kind", "line"),
    [
        ("1/0", "ZeroDivisionError", 1),
        ("\n\n\n1/0", "ZeroDivisionError", 4),
        ("def f():\n    1/0\n\nf()", "ZeroDivisionError", 2),
        ("x = 1\n x", "IndentationError", 2),
        ("await x", "SyntaxError", 1),
        ("x = (\ny", "SyntaxError", 1),
        ("return 1", "SyntaxError", 1),
        ("1 + 1\u00a0", "SyntaxError", 1),
    ],
)
def test_an_error_names_its_line_whichever_way_the_program_was_compiled(
    sandbox: Sandbox, code: str, kind: str, line: int | None
) -> None:
    error = sandbox.run(code).error
    assert error is not None
    assert (error.type, error.line) == (kind, line)


def test_a_warning_of_the_compiler_is_said_once(sandbox: Sandbox) -> None:
    result = inside(sandbox, "x = 1\nprint('a', x is 1)")
    assert result.stderr.count("SyntaxWarning") == 1


# --- the module itself, in an interpreter of its own ---------------------------------------------------------------

BEFORE = """
import json, os, sys
sys.path.insert(0, {inside!r})
import _image
_image.gather_heap()
table = {{str(n): [n, float(n)] for n in range(50_000)}}
large = bytearray(b"z") * (3 << 20)
memfd = [0]
def areas():
    return [line.split() for line in open("/proc/self/maps") if "sandboxd-image" in line]
def in_child(step):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, json.dumps(step()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        data = file.read()
    assert os.waitpid(pid, 0)[1] == 0
    return json.loads(data)
"""


def alone(code: str) -> Any:
    """What *code* printed as JSON, in a new interpreter, after a heap was made."""
    program = BEFORE.format(inside=str(INSIDE)) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_heap_is_moved_whole_and_holds_what_it_held() -> None:
    moved, sums, kinds, open_files = alone("""
        moved = _image.share_heap()
        sums = [sum(one[0] for one in table.values()), large.count(b"z")]
        files = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")[:-1]]
        print(json.dumps([moved, sums, sorted({area[1] for area in areas()}), [f for f in files if "memfd" in f]]))
    """)
    assert moved > 8 << 20
    assert sums == [50_000 * 49_999 // 2, 3 << 20]
    assert set(kinds) <= {"rw-p", "r--p"}
    assert open_files == []


def test_the_file_is_sealed_and_has_no_hole() -> None:
    if not Path("/proc/self/map_files").exists():
        pytest.skip("no map_files in this kernel")
    size, mapped, allocated, refused = alone("""
        _image.share_heap()
        first = areas()[0]
        mapped = sum(int(b, 16) - int(a, 16) for a, b in (area[0].split("-") for area in areas()))
        fd = os.open("/proc/self/map_files/" + "-".join(f"{int(n, 16):x}" for n in first[0].split("-")), os.O_RDWR)
        refused = []
        for step in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 1 << 40), lambda: os.ftruncate(fd, 0)):
            try:
                step()
            except PermissionError:
                refused.append(True)
        status = os.fstat(fd)
        print(json.dumps([status.st_size, mapped, status.st_blocks * 512, refused]))
    """)
    assert size == mapped == allocated
    assert refused == [True] * 3


def test_children_write_into_pages_of_their_own() -> None:
    assert alone("""
        _image.share_heap()
        def scribble():
            for one in table.values():
                one[0] = -1
            large[:] = bytes(len(large))
            return [sum(one[0] for one in table.values()), large.count(0)]
        first, second = in_child(scribble), in_child(scribble)
        print(json.dumps([first, second, sum(one[0] for one in table.values()), large.count(0)]))
    """) == [[-50_000, 3 << 20], [-50_000, 3 << 20], 50_000 * 49_999 // 2, 0]


def test_without_it_nothing_is_moved() -> None:
    assert alone("print(json.dumps([_image.share_heap(False), areas()]))") == [0, []]


def test_a_second_move_does_nothing() -> None:
    first, second = alone("print(json.dumps([_image.share_heap(), _image.share_heap()]))")
    assert first > 0
    assert second == 0


FORESEEN = """
    import socket
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _image.share_heap()
    def step():
        for n in range(0, 50_000, 50):
            table[str(n)][0] += 1
    read, write = os.pipe()
    if os.fork() == 0:
        step()
        _image.record(write)
        os._exit(0)
    os.close(write)
    pages = _image.load_survey(read)
    os.wait()
"""


def test_a_child_is_given_ahead_what_another_was_seen_to_touch() -> None:
    pages, populated, missed, given = alone(
        FORESEEN
        + """
    import resource
    def faults(ahead):
        populated = _image.populate(theirs.fileno()) if ahead else None
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step()
        return [populated, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]
    (_, missed), (populated, given) = in_child(lambda: faults(False)), in_child(lambda: faults(True))
    print(json.dumps([pages, populated, missed, given]))
    """
    )
    if populated is False:
        pytest.skip("no MADV_POPULATE_WRITE in this kernel")
    assert pages > 100
    assert given < missed / 4


def test_populating_stops_when_a_request_waits() -> None:
    assert alone(
        FORESEEN
        + """
    ours.send(b"go")
    print(json.dumps([_image.waiting(theirs.fileno()), in_child(lambda: _image.populate(theirs.fileno()))]))
    """
    ) == [True, False]


def test_a_range_of_zeros_parts_what_is_done_before_parking_from_the_rest() -> None:
    first, own_first, second, own_second, third = alone("""
        import mmap, socket
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        room = mmap.mmap(-1, 64 << 12, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        import ctypes
        at = ctypes.addressof(ctypes.c_char.from_buffer(room))
        def write(start, pages):
            return (at + start * 4096 | 1).to_bytes(8, "little") + (at + (start + pages) * 4096).to_bytes(8, "little")
        read, end = os.pipe()
        os.write(end, write(0, 8) + bytes(16) + write(20, 4))
        os.close(end)
        _image.load_survey(read)
        def own():
            with open("/proc/self/pagemap", "rb") as file:
                file.seek(at // 4096 * 8)
                return sum(word >> 63 for word in memoryview(file.read(64 * 8)).cast("Q"))
        def step():
            fd = theirs.fileno()
            return [_image.populate(fd), own(), _image.populate(fd), own(), _image.populate(fd)]
        print(json.dumps(in_child(step)))
    """)
    if not first:
        pytest.skip("no MADV_POPULATE_WRITE in this kernel")
    assert (own_first, second, own_second, third) == (8, True, 12, False)


def test_random_bytes_go_where_they_are_told() -> None:
    assert alone("""
        import ctypes
        room = ctypes.create_string_buffer(4096)
        _image.fill_random(ctypes.addressof(room) + 100, 3000)
        print(json.dumps([any(room[:100]), any(room[3100:]), room[100:3100].count(0) < 100]))
    """) == [False, False, True]
