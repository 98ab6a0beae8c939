"""What imports and the warm-up leave in the zygote: no second thread, and nothing writable that cells would share."""

from __future__ import annotations

import itertools
import json
import os
import sysconfig
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd import Policy, Result, Sandbox, Unavailable
from sandboxd.engine.cells.selftest import PROGRAM, verify
from sandboxd.seccomp import effective
from tests.support.modes import policy_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def policy(*preload: str, warmup: str = "") -> Policy:
    """`default` as "leaves", with these modules and this warm-up."""
    usual = policy_of()
    runtime = usual.runtime.model_copy(update={"preload": preload, "warmup": warmup})
    return usual.model_copy(update={"name": "leaves", "runtime": runtime})


@pytest.fixture
def make_module() -> Iterator[Callable[[str], str]]:
    """A function that installs a module of the given source for this interpreter and returns its name."""
    made: list[Path] = []
    numbers = itertools.count()

    def make(source: str) -> str:
        name = f"sandboxd_test_{os.getpid()}_{next(numbers)}"
        made.append(Path(sysconfig.get_path("purelib"), f"{name}.py"))
        try:
            made[-1].write_text(source, "utf-8")
        except PermissionError:
            pytest.skip("the interpreter's site-packages belong to somebody else")
        return name

    yield make
    for path in made:
        path.unlink(missing_ok=True)


def inside(sandbox: Sandbox, code: str, **arguments: Any) -> Result:
    """Run *code*, whose indentation is the test's; it must end well."""
    result = sandbox.run(textwrap.dedent(code), **arguments)
    assert result.status == "ok", (result.status, result.stderr)
    return result


# --- threads ------------------------------------------------------------------------------------------------------


def test_the_data_policy_starts_where_pyarrow_is_installed() -> None:
    """pandas imports it, and its jemalloc would start a thread."""
    pytest.importorskip("pyarrow")
    code = """
        import os, sys
        print("pyarrow" in sys.modules, len(os.listdir("/proc/self/task")))
        import pandas, pyarrow
        table = pandas.DataFrame({
            "number": range(1000), "text": ["a", "\u00fc"] * 500, "day": pandas.date_range("2024-01-01", periods=1000)
        })
        table.to_parquet("table.parquet")
        print(pandas.read_parquet("table.parquet").equals(table), pyarrow.Table.from_pandas(table).num_rows)
        pool = pyarrow.jemalloc_memory_pool()
        kept = pyarrow.allocate_buffer(1 << 20, memory_pool=pool)
        print(pool.backend_name, kept.size)
    """
    with Sandbox(policy_of("data")) as sandbox:
        assert inside(sandbox, code).stdout == "True 1\nTrue 1000\njemalloc 1048576\n"


# Leaves a thread of C's that Python does not know.
C_THREAD = """
import ctypes
libc = ctypes.CDLL(None)
thread = ctypes.c_ulong()
assert libc.pthread_create(ctypes.byref(thread), None, libc.pause, None) == 0
libc.pthread_setname_np(thread, b"of-c")
"""
PYTHON_THREAD = (
    "import threading\nthreading.Thread(target=threading.Event().wait, name='of Python', daemon=True).start()\n"
)


@pytest.mark.parametrize(("code", "name"), [(C_THREAD, "of-c"), (PYTHON_THREAD, "of Python")], ids=["c", "python"])
@pytest.mark.parametrize("step", ["import", "warmup"])
def test_a_thread_is_refused_by_its_name_and_the_step_that_started_it(
    code: str, name: str, step: str, make_module: Callable[[str], str]
) -> None:
    module = make_module(code if step == "import" else "")
    chosen = policy("json", module, "colorsys", warmup="x = 1" if step == "import" else code)
    with pytest.raises(Unavailable) as caught, Sandbox(chosen) as sandbox:
        sandbox.run("")
    assert caught.value.stage == "threads"
    culprit = f"the import of {module!r}" if step == "import" else "the warmup"
    assert (
        f"policy 'leaves': a zygote forks with one thread only, and others still run: {name!r}, there since {culprit}."
        in str(caught.value)
    )
    assert caught.value.fix.startswith(f"have {culprit} start no thread")


def test_threads_that_have_ended_are_no_obstacle(make_module: Callable[[str], str]) -> None:
    code = (
        "from concurrent.futures import ThreadPoolExecutor as Pool\nwith Pool(9) as pool: list(pool.map(abs, [1] * 99))"
    )
    with Sandbox(policy(make_module(code), warmup=code)) as sandbox:
        assert inside(sandbox, "import os; print(len(os.listdir('/proc/self/task')))").stdout == "1\n"


# --- shared memory ------------------------------------------------------------------------------------------------

# Each leaves 8 KiB that begin with b"made" at an address in builtins.
SHARED = {
    "anonymous": "area = mmap.mmap(-1, 8192)\n",
    "dev-zero": "area = mmap.mmap(os.open('/dev/zero', os.O_RDWR), 8192)\n",
    "file": "fd = os.open('/tmp/area', os.O_RDWR | os.O_CREAT)\nos.ftruncate(fd, 8192)\narea = mmap.mmap(fd, 8192)\n",
    "deleted-file": (
        "fd = os.open('/tmp/area', os.O_RDWR | os.O_CREAT)\nos.ftruncate(fd, 8192)\narea = mmap.mmap(fd, 8192)\n"
        "os.unlink('/tmp/area')\n"
    ),
    "memfd": "fd = os.memfd_create('area')\nos.ftruncate(fd, 8192)\narea = mmap.mmap(fd, 8192)\n",
    "system-v": (
        "at = libc.shmat(libc.shmget(0, 8192, 0o1600), None, 0)\nassert at % 4096 == 0\n"
        "area = (ctypes.c_char * 8192).from_address(at)\n"
    ),
    "in-two-pieces": (
        "area = mmap.mmap(-1, 8192)\n"
        "at = ctypes.addressof(ctypes.c_char.from_buffer(area))\n"
        "assert libc.mprotect(ctypes.c_void_p(at + 4096), 4096, 1) == 0\n"
    ),
}
SHARE = """
import builtins, ctypes, mmap, os
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_ssize_t
{how}
area[:4] = b"made"
builtins.shared_area = area
"""
# Read-only ones, which a program may make writable.
READ_ONLY = """
import builtins, ctypes, mmap, os
libc = ctypes.CDLL(None, use_errno=True)
fd = os.memfd_create("area")
os.write(fd, b"made" + bytes(8188))
libc.mmap.restype = ctypes.c_ssize_t
at = libc.mmap(None, 8192, {protection}, mmap.MAP_SHARED, fd, 0)
assert at > 0
builtins.area_at = at
os.close(fd)
"""
ROUND = """
    import mmap
    seen = bytes(shared_area[:4]), bytes(shared_area[10:13])
    shared_area[10:13] = b"mine"[:3]
    print(*seen, bytes(shared_area[10:13]), [line for line in open("/proc/self/maps") if line.split()[1] == "rw-s"])
"""


def test_what_one_run_writes_to_shared_memory_of_the_warmup_the_next_does_not_read() -> None:
    warmup = "import mmap, builtins; builtins.shared_area = mmap.mmap(-1, 4096); shared_area[:4] = b'made'"
    with Sandbox(policy(warmup=warmup)) as sandbox:
        for _ in range(4):
            assert inside(sandbox, ROUND).stdout == "b'made' b'\\x00\\x00\\x00' b'min' []\n"


@pytest.mark.parametrize("step", ["import", "warmup"])
@pytest.mark.parametrize("how", SHARED.values(), ids=SHARED)
def test_shared_memory_of_every_kind_is_made_private(how: str, step: str, make_module: Callable[[str], str]) -> None:
    code = SHARE.format(how=how)
    chosen = policy(make_module(code)) if step == "import" else policy(warmup=code)
    with Sandbox(chosen) as sandbox:
        for _ in range(3):
            assert inside(sandbox, ROUND).stdout == "b'made' b'\\x00\\x00\\x00' b'min' []\n"


@pytest.mark.parametrize("protection", ["mmap.PROT_READ", "0"], ids=["read-only", "no-access"])
def test_what_a_program_can_make_writable_is_made_private(protection: str) -> None:
    code = """
        import ctypes
        libc = ctypes.CDLL(None)
        print(libc.mprotect(ctypes.c_void_p(area_at), 8192, 3))
        area = (ctypes.c_char * 8192).from_address(area_at)
        print(area[:4], area[10:13])
        area[10:13] = b"own"
    """
    with Sandbox(policy(warmup=READ_ONLY.format(protection=protection))) as sandbox:
        for _ in range(3):
            assert inside(sandbox, code).stdout == "0\nb'made' b'\\x00\\x00\\x00'\n"


def test_each_process_of_a_program_has_a_copy() -> None:
    code = """
        import mmap, os
        shared_area.flush()
        shared_area[5000:5003] = b"own"
        if os.fork() == 0:
            shared_area[5000:5003] = b"his"
            os._exit(shared_area[5000:5003] != b"his")
        print(os.wait()[1], shared_area[5000:5003], len(shared_area), shared_area.find(b"made"))
        shared_area.close()
        print(shared_area.closed)
    """
    with Sandbox(policy(warmup=SHARE.format(how=SHARED["anonymous"]))) as sandbox:
        assert inside(sandbox, code).stdout == "0 b'own' 8192 0\nTrue\n"


def test_a_shared_mapping_that_nobody_can_write_to_stays(make_module: Callable[[str], str]) -> None:
    """It costs no memory, and a cell's mprotect is refused."""
    warmup = """
import builtins, mmap
with open(mmap.__file__, "rb") as file:
    builtins.source = mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ)
"""
    code = """
        import ctypes, mmap, os
        line = next(line for line in open("/proc/self/maps") if "r--s" in line and "mmap" in line)
        libc = ctypes.CDLL(None, use_errno=True)
        answer = libc.mprotect(ctypes.c_void_p(int(line.split("-")[0], 16)), 4096, 3)
        print(source[:4], answer, os.strerror(ctypes.get_errno()))
    """
    with Sandbox(policy(warmup=warmup)) as sandbox:
        assert inside(sandbox, code).stdout == "b'\\x7fELF' -1 Permission denied\n"


REFUSED = {
    "mapped-twice": (
        "fd = os.memfd_create('jit')\nos.ftruncate(fd, 4096)\n"
        "builtins.one, builtins.two = mmap.mmap(fd, 4096), mmap.mmap(fd, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)\n",
        "/memfd:jit (deleted), there since {step}: it is mapped twice",
    ),
    "beyond-the-end": (
        "fd = os.memfd_create('short')\nos.ftruncate(fd, 8192)\n"
        "builtins.one = mmap.mmap(fd, 8192)\nos.ftruncate(fd, 4096)\n",
        "/memfd:short (deleted), there since {step}: its pages cannot be copied (Bad address)",
    ),
    "too-large": (
        "builtins.one, builtins.two = mmap.mmap(-1, 200 << 20), mmap.mmap(-1, 100 << 20)\n",
        "/dev/zero (deleted), there since {step}: there are more than 256 MiB of it",
    ),
    "of-the-kernel": (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.syscall(206, 1, ctypes.byref(ctypes.c_ulong())): raise OSError(ctypes.get_errno(), 'io_setup')\n",
        "/[aio] (deleted), there since {step}: it is not ordinary memory",
    ),
}


@pytest.mark.parametrize("step", ["import", "warmup"])
@pytest.mark.parametrize(("code", "said"), REFUSED.values(), ids=REFUSED)
def test_shared_memory_that_cannot_be_made_private_is_refused_with_its_step(
    code: str, said: str, step: str, make_module: Callable[[str], str]
) -> None:
    code = f"import builtins, mmap, os\n{code}"
    module = make_module(code if step == "import" else "")
    chosen = policy("json", module, "colorsys", warmup="x = 1" if step == "import" else code)
    with pytest.raises(Unavailable) as caught, Sandbox(chosen) as sandbox:
        sandbox.run("")
    if "io_setup" in str(caught.value):
        pytest.skip("no io_setup(2) in this kernel")
    culprit = f"the import of {module!r}" if step == "import" else "the warmup"
    assert caught.value.stage == "shared-memory"
    assert said.format(step=culprit) in str(caught.value)
    assert "policy 'leaves'" in str(caught.value)
    assert caught.value.fix.startswith(f"have {culprit} map it MAP_PRIVATE")


def test_a_descriptor_of_shared_memory_does_not_reach_a_cell() -> None:
    warmup = "import builtins, os; builtins.fd = os.memfd_create('x'); os.set_inheritable(fd, True)"
    with Sandbox(policy(warmup=warmup)) as sandbox:
        assert (
            inside(sandbox, "import os\nprint(fd > 3, os.listdir('/proc/self/fd')[:-1])").stdout
            == "True ['0', '1', '2', '3']\n"
        )


def test_the_self_test_sees_shared_memory_that_can_be_written(sandbox: Sandbox) -> None:
    programs = {
        "writable": "held = mmap.mmap(-1, 4096)",
        "may-become": "os.ftruncate(fd := os.memfd_create('x'), 9); held = mmap.mmap(fd, 9, prot=mmap.PROT_READ)",
        "never": "held = mmap.mmap(os.open(mmap.__file__, os.O_RDONLY), 9, prot=mmap.PROT_READ)",
    }
    found = {}
    for name, code in programs.items():
        result = inside(sandbox, f"import mmap, os\n{code}\n{PROGRAM}")
        found[name] = json.loads(result.stdout)[1]["shared-memory"]
    assert found == {"writable": ["/dev/zero (deleted)"], "may-become": ["/memfd:x (deleted)"], "never": []}
    with pytest.raises(Unavailable, match="shared-memory is"):
        verify(
            result.stdout.replace('"shared-memory": []', '"shared-memory": ["x"]'), 0, 0, effective("default", [], [])
        )
