"""Parked cells: every wall is up in them, nothing of a run reaches the next, and a program ends as in a fresh cell."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from sandboxd import AsyncSandbox, Limits, Result, Sandbox
from sandboxd.seccomp.syscalls import NUMBERS
from tests.attacks import ATTACKS, SAMPLE, Attack, test_attacks
from tests.attacks.base import outcome, program
from tests.engine.test_crash import all_gone, named
from tests.engine.test_leaks import opened
from tests.support import daemons, leftovers
from tests.support.engine import lease_slots, pid_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="an embedded engine needs root")

CELLS: Final = 3
FIXED: Final = {"minimum": CELLS, "maximum": CELLS}
FEW: Final = 2
WAIT_SECONDS: Final = 20.0
TRIES: Final = 40
WAYS: Final = ("direct", "engine")
"""Through a lease, or handed over by the engine."""

SAMPLED: Final = [pytest.param(row, id=row.id) for row in ATTACKS if row.id in SAMPLE]

DAEMONS: Final[list[daemons.Served]] = []
"""Those of this module that live."""

surroundings = test_attacks.surroundings


# What is there, and which way a run goes


def engine_of(sandbox: Sandbox) -> int:
    """The pid of its engine."""
    return pid_of(sandbox)


def is_asleep(one: leftovers.Process) -> bool:
    """Whether a cell waits for its program: it reads its channel. Source: /proc/PID/syscall, proc_pid_syscall(5)."""
    try:
        return Path(f"/proc/{one.pid}/syscall").read_text("ascii").split()[:2] == [str(NUMBERS["read"]), "0x3"]
    except OSError:
        return False


def settled(engine: int, count: int = CELLS) -> list[leftovers.Process]:
    """The cells of *engine*, as soon as there are exactly *count* and all have rehearsed and sleep."""
    found: list[leftovers.Process] = []

    def quiet() -> bool:
        found[:] = named(engine, "cell")
        return len(found) == count and all(map(is_asleep, found))

    leftovers.eventually(quiet, WAIT_SECONDS, f"{count} cells are parked")
    return found


def is_lent(sandbox: Sandbox) -> bool:
    """Whether this process holds a cell: its lease was noted, or can be read."""
    return any(slot.lease is not None or select.select([sock], [], [], 0)[0] for sock, slot in lease_slots(sandbox))


def went_directly(result: Result) -> bool:
    """Only what never queued says exactly that."""
    return result.warm and result.timings.queued_seconds == 0.0


def directly(sandbox: Sandbox, code: str, **arguments: Any) -> Result:
    """Run *code* in a cell that was lent to this process."""
    leftovers.eventually(
        lambda: is_lent(sandbox) or went_directly(sandbox.run("0")), WAIT_SECONDS, "this process is lent cells"
    )
    leftovers.eventually(lambda: is_lent(sandbox), WAIT_SECONDS, "a cell is lent")
    result = sandbox.run(code, **arguments)
    assert went_directly(result), result.timings
    return result


def by_engine(sandbox: Sandbox, code: str, **arguments: Any) -> Result:
    """Run *code* in a parked cell to which the engine hands it."""
    result = sandbox.run(code, **{"stdin": b"", **arguments})
    assert result.timings.queued_seconds > 0
    return result


def parked(sandbox: Sandbox, code: str, way: str, count: int = CELLS, **arguments: Any) -> Result:
    """Run *code* in a cell that was parked before, one *way* or the other."""
    settled(engine_of(sandbox), count)
    leftovers.eventually(lambda: sandbox.stats()["parked"] == count, WAIT_SECONDS, "the engine knows of them")
    result = (directly if way == "direct" else by_engine)(sandbox, code, **arguments)
    assert result.warm
    return result


@pytest.fixture(scope="module")
def warm() -> Iterator[Sandbox]:
    """An engine with a fixed number of parked cells."""
    with Sandbox(pool=FIXED) as made:
        yield made


@pytest.fixture(scope="module")
def fresh() -> Iterator[Sandbox]:
    """An engine that parks none."""
    with Sandbox(pool=leftovers.UNPARKED) as made:
        yield made


@pytest.fixture(scope="module")
def served() -> Iterator[daemons.Served]:
    """A daemon with a fixed number of parked cells."""
    with daemons.directory() as home, daemons.served(home, pool=FIXED) as daemon:
        DAEMONS.append(daemon)
        yield daemon
        DAEMONS.remove(daemon)


@pytest.fixture(scope="module")
def client(served: daemons.Served) -> Iterator[Sandbox]:
    """A client of that daemon."""
    with served.sandbox() as made:
        yield made


@pytest.fixture
def clean() -> Iterator[None]:
    """Nothing of the test is left afterwards."""
    for daemon in DAEMONS:
        settled(daemon.pid)  # a cell that it makes just now, after another test's run, would look left behind
    before = leftovers.snapshot()
    yield
    leftovers.assert_nothing_new(before)


def warmly(served: daemons.Served, client: Sandbox, code: str, **arguments: Any) -> Result:
    """Run *code* in a parked cell of the daemon's."""
    settled(served.pid)
    result = client.run(code, **arguments)
    assert result.warm
    assert result.timings.queued_seconds > 0
    return result


# Walls


# The whole table runs in test_attacks.py, whose engine parks cells and lends them, too; here it is certain that a cell
# was parked, and which way the program came. What is up when a cell is parked is the same for each way.


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row", SAMPLED)
def test_attack_is_refused_in_a_parked_cell(warm: Sandbox, surroundings: dict[str, str], row: Attack, way: str) -> None:
    assert outcome(parked(warm, program(row.code), way, env=surroundings, results=False)) == row.refusal


@pytest.mark.parametrize("row", SAMPLED)
def test_attack_is_refused_in_a_fresh_cell(fresh: Sandbox, surroundings: dict[str, str], row: Attack) -> None:
    result = fresh.run(program(row.code), env=surroundings, results=False)
    assert not result.warm
    assert outcome(result) == row.refusal


@pytest.mark.parametrize("row", SAMPLED[::3])
def test_attack_is_refused_in_a_parked_cell_of_a_daemon(
    served: daemons.Served, client: Sandbox, surroundings: dict[str, str], row: Attack
) -> None:
    result = warmly(served, client, program(row.code), env=surroundings, results=False)
    assert outcome(result) == row.refusal


# Nothing of one run is there in the next of the same slot. What the first leaves, what the second looks at, and what it
# finds; a run that does both finds something else, or the row proves nothing.

SEARCH: Final = """
import ctypes, re
found = 0
for line in open("/proc/self/maps"):
    where, rights = line.split()[:2]
    if rights.startswith("r") and "[v" not in line:
        start, end = (int(word, 16) for word in where.split("-"))
        found += len(re.findall(rb"Q[Z]XJKVW-\\d{3}", ctypes.string_at(start, end - start)))
print(found > 0)
"""

TRACES: Final[dict[str, tuple[str, str, str]]] = {
    "memory": ('kept = [("QZ" + "XJKVW-%03d" % n) * 50 for n in range(300)]', SEARCH, "False"),
    "anonymous-mapping": (
        'import mmap\nkept = mmap.mmap(-1, 1 << 20)\nkept[:] = b"QZXJKVW-001." * ((1 << 20) // 12) + bytes(4)',
        SEARCH,
        "False",
    ),
    "files": (
        "for place in ('/workspace', '/tmp', '/dev/shm'): open(place + '/left', 'w').write('left')",
        "import os\nprint([os.listdir(place) for place in ('/workspace', '/tmp', '/dev/shm', '/code')])",
        "[[], [], [], ['main.py']]",
    ),
    "room": (
        "import os\nfor place in ('/tmp', '/dev/shm'):\n for n in range(50): os.mkdir(f'{place}/{n}')",
        "import os\nfound = map(os.statvfs, ('/tmp', '/dev/shm'))\n"
        "print([(one.f_files - one.f_ffree, one.f_blocks - one.f_bfree) for one in found])",
        "[(1, 0), (1, 0)]",
    ),
    "abstract-socket": (
        "import socket\nkept = socket.socket(socket.AF_UNIX)\nkept.bind('\\0left')\nkept.listen()",
        "import errno, socket\nprint(errno.errorcode[socket.socket(socket.AF_UNIX).connect_ex('\\0left') or 1])",
        "ECONNREFUSED",
    ),
    "path-socket": (
        "import socket\nkept = socket.socket(socket.AF_UNIX)\nkept.bind('/tmp/left')\nkept.listen()",
        "import errno, socket\nprint(errno.errorcode[socket.socket(socket.AF_UNIX).connect_ex('/tmp/left') or 1])",
        "ENOENT",
    ),
    "shared-memory": (
        "from multiprocessing import shared_memory\nkept = shared_memory.SharedMemory('left', True, 4096)",
        "import os\nprint(os.path.exists('/dev/shm/left'))",
        "False",
    ),
    "semaphore": (
        "import _multiprocessing\nkept = _multiprocessing.SemLock(1, 1, 1, '/left', False)",
        "import os\nprint(os.listdir('/dev/shm'))",
        "[]",
    ),
    "environment": (
        "import os\nos.environ['LEFT'] = 'left'",
        "import os\nprint(os.environ.get('LEFT'), b'LEFT' in os.environb)",
        "None False",
    ),
    "modules": (
        "import sys, types, builtins, json\nsys.modules['left'] = types.ModuleType('left')\n"
        "builtins.left = json.left = 1",
        "import sys, builtins, json\nprint('left' in sys.modules, hasattr(builtins, 'left'), hasattr(json, 'left'))",
        "False False False",
    ),
    "main": ("left = 1", "import __main__\nprint(hasattr(__main__, 'left'), 'left' in globals())", "False False"),
    "arguments": (
        "import sys\nsys.argv.append('left'); sys.path.insert(0, 'left'); sys.flags\nsys.left = 1",
        "import sys\nprint(sys.argv, 'left' in sys.path, hasattr(sys, 'left'))",
        "['/code/main.py'] False False",
    ),
    "signals": (
        "import signal\nsignal.signal(signal.SIGUSR1, print)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])\nsignal.setitimer(signal.ITIMER_PROF, 1000)",
        "import signal\nprint(signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL,"
        " signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.getitimer(signal.ITIMER_PROF))",
        "True set() (0.0, 0.0)",
    ),
    "umask": ("import os\nos.umask(0o077)", "import os\nprint(oct(os.umask(0)))", "0o22"),
    "rlimits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))",
        "import resource\nprint(resource.getrlimit(resource.RLIMIT_NOFILE))",
        "(256, 256)",
    ),
    "directory": ("import os\nos.chdir('/tmp')", "import os\nprint(os.getcwd())", "/workspace"),
    "descriptors": (
        "import os\nkept = [os.open('/code/main.py', os.O_RDONLY) for _ in range(20)]\nos.dup2(1, 90)",
        "import os\nprint([fd for fd in range(256) if os.path.exists(f'/proc/self/fd/{fd}')])",
        "[0, 1, 2, 3]",
    ),
    "priority-and-name": (
        "import ctypes, os\nos.nice(5)\nctypes.CDLL(None).prctl(15, b'left')\nos.sched_setaffinity(0, [0])",
        "import os\nprint(os.getpriority(os.PRIO_PROCESS, 0), open('/proc/self/comm').read().strip())",
        "0 python",
    ),
    "processes": (
        "import os, time\nif os.fork() == 0:\n os.setsid()\n time.sleep(100)",
        "import os\nprint([name for name in os.listdir('/proc') if name.isdigit()])",
        "['2']",
    ),
    "threads": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(100,), daemon=True).start()",
        "import os, threading\nprint(len(os.listdir('/proc/self/task')), threading.active_count())",
        "1 1",
    ),
    "interpreter": (
        "import gc, sys, locale, decimal, warnings, logging\ngc.disable(); sys.setrecursionlimit(5000)\n"
        "sys.setswitchinterval(1); decimal.getcontext().prec = 3; warnings.simplefilter('error')\n"
        "logging.basicConfig(level=1); sys.set_int_max_str_digits(1000)",
        "import gc, sys, decimal, warnings, logging\nprint(gc.isenabled(), sys.getrecursionlimit(),"
        " sys.getswitchinterval(), decimal.getcontext().prec, ('error', None, Warning, None, 0) in warnings.filters,"
        " logging.root.handlers, sys.get_int_max_str_digits())",
        "True 1000 0.005 28 False [] 4300",
    ),
    "exit-functions": (
        "import atexit\natexit.register(print, 'left')",
        "import atexit\nprint(atexit._ncallbacks())",
        "0",
    ),
    "streams": (
        "import sys\nprint('left', end='')\nsys.stdout = sys.stderr\nsys.stdin.close()",
        "import sys\nprint(sys.stdout is sys.__stdout__, sys.stdin.closed, sys.stdout.fileno())",
        "True False 1",
    ),
    "random-state": (
        "import random\nrandom.seed(7)",
        "import random\nprint(random.random() == 0.32383276483316237)",
        "False",
    ),
    "time-zone": (
        "import os, time\nos.environ['TZ'] = 'EST5'\ntime.tzset()",
        "import time\nprint(time.tzname[0], time.timezone)",
        "UTC 0",
    ),
    "last-value": ("_ = 7\nimport sys\nsys.last_value = 7", "import sys\nprint(hasattr(sys, 'last_value'))", "False"),
}


@pytest.fixture(scope="module")
def narrow() -> Iterator[Sandbox]:
    """One run at a time, one parked cell beside the one that is lent: slots come back at once."""
    with Sandbox(max_running=1, pool={"minimum": FEW, "maximum": FEW}) as made:
        yield made


def uid_of(result: Result) -> int:
    """The slot's, which is its own."""
    assert result.isolation is not None
    return result.isolation.uid


def next_of_the_same_slot(first: Callable[[], Result], second: Callable[[], Result]) -> Result:
    """*first*, then *second*, again and again until *second* has a slot that *first* had before."""
    used: set[int] = set()
    for _ in range(TRIES):
        used.add(uid_of(first()))
        for _ in range(3):  # slots may take turns
            result = second()
            if uid_of(result) in used:
                return result
    raise AssertionError(f"no slot came back in {TRIES} runs: {used}")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("trace", TRACES)
def test_nothing_of_a_run_is_in_the_next_of_its_slot(narrow: Sandbox, trace: str, way: str) -> None:
    leave, look, clear = TRACES[trace]
    result = next_of_the_same_slot(lambda: parked(narrow, leave, way, FEW), lambda: parked(narrow, look, way, FEW))
    assert (result.status, result.stdout, result.stderr) == ("ok", clear + "\n", "")


@pytest.mark.parametrize("trace", TRACES)
def test_what_a_run_leaves_would_be_seen(fresh: Sandbox, trace: str) -> None:
    """The rows above can fail."""
    leave, look, clear = TRACES[trace]
    result = fresh.run(f"{leave}\n{look}")
    assert result.stdout != clear + "\n"


@pytest.mark.parametrize("way", WAYS)
def test_inputs_of_a_run_are_not_in_the_next_of_its_slot(narrow: Sandbox, way: str) -> None:
    def first() -> Result:
        settled(engine_of(narrow), FEW)
        given = {"files": {"in": b"left"}, "stdin": b"left" * 1000, "env": {"LEFT": "1", "TZ": "EST5"}}
        return narrow.run("1", args=["left"], filename="left.py", **given)  # type: ignore[arg-type]

    look = (
        "import os, sys, time\n"
        "print(os.listdir(), os.listdir('/code'), sys.stdin.read(), os.environ.get('LEFT'), time.tzname[0], sys.argv)"
    )
    result = next_of_the_same_slot(first, lambda: parked(narrow, look, way, FEW))
    assert result.stdout == "[] ['main.py']  None UTC ['/code/main.py']\n"


@pytest.mark.parametrize("way", WAYS)
def test_usage_is_the_runs_own_also_in_a_used_slot(narrow: Sandbox, way: str) -> None:
    greedy = (
        "import threading, time\nkept = b'x' * (100 << 20)\nbarrier = threading.Barrier(21)\n"
        "for _ in range(20): threading.Thread(target=barrier.wait).start()\nbarrier.wait()\n"
        "while time.process_time() < 0.5: pass"
    )
    first: list[Result] = []

    def run_greedily() -> Result:
        first.append(parked(narrow, greedy, way, FEW))
        return first[0]

    second = next_of_the_same_slot(run_greedily, lambda: parked(narrow, "1", way, FEW)).usage
    usage = first[0].usage
    assert first[0].status == "ok"
    assert usage.cpu_user_seconds + usage.cpu_system_seconds > 0.4
    assert (usage.memory_peak_bytes or 0) > 100 << 20
    assert usage.pids_peak is not None
    assert usage.pids_peak >= 21
    assert second.cpu_user_seconds + second.cpu_system_seconds < 0.25
    assert (second.memory_peak_bytes or 0) < 50 << 20
    assert second.pids_peak in (None, 1, 2)


@pytest.mark.parametrize("way", WAYS)
def test_a_narrowed_limit_ends_with_its_run(narrow: Sandbox, way: str) -> None:
    def first() -> Result:
        settled(engine_of(narrow), FEW)
        narrowed = narrow.run("1", limits=Limits(pids=3, cpus=0.05, cpu_seconds=0.5, wall_seconds=5, output_bytes=10))
        assert narrowed.warm
        return narrowed

    code = (
        "import threading, time\nbarrier = threading.Barrier(11)\n"
        "for _ in range(10): threading.Thread(target=barrier.wait).start()\nbarrier.wait()\n"
        "while time.process_time() < 0.6: pass\nprint('x' * 1000)"
    )
    result = next_of_the_same_slot(first, lambda: parked(narrow, code, way, FEW))
    assert (result.status, len(result.stdout)) == ("ok", 1001), result.stderr
    assert not {"pids", "cpu_seconds"} & {hit.limit for hit in result.limits_hit}


DRAWS: Final = {
    "random": "import random\nprint(random.random())",
    "system-random": "import os\nprint(os.urandom(8).hex())",
    "uuid4": "import uuid\nprint(uuid.uuid4())",
    "uuid1": "import uuid\nprint(uuid.uuid1())",
    "secrets": "import secrets\nprint(secrets.token_hex(8))",
    "openssl": "import ssl\nprint(ssl.RAND_bytes(8).hex())",
    "temporary-names": "import tempfile\nprint(next(tempfile._get_candidate_names()))",
    "in-a-child": (
        "import os, random\nif os.fork() == 0:\n print(random.random(), flush=True)\n os._exit(0)\n"
        "os.wait()\nprint(random.random())"
    ),
    "numpy": "import numpy\nprint(numpy.random.random(), numpy.random.default_rng().random())",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("source", DRAWS)
def test_every_run_draws_its_own_random_numbers(warm: Sandbox, source: str, way: str) -> None:
    results = [parked(warm, DRAWS[source], way) for _ in range(5)]
    if source == "numpy" and "ModuleNotFoundError" in results[0].stderr:
        pytest.skip("numpy is not installed")
    assert {result.status for result in results} == {"ok"}, results[0].stderr
    words = [word for result in results for word in result.stdout.split()]
    assert len(words) == len(set(words))


def test_preloaded_generators_draw_their_own_random_numbers() -> None:
    pytest.importorskip("numpy")
    code = "import numpy\nprint(numpy.random.random(), numpy.random.default_rng().random())"
    with Sandbox("data", pool=FIXED) as sandbox:
        results = [parked(sandbox, code, way) for way in WAYS * 3]
    words = [word for result in results for word in result.stdout.split()]
    assert len(words) == len(set(words)) == 2 * len(results)


# A rehearsal leaves nothing to be seen

INSPECTION: Final = """
import atexit, gc, json, linecache, os, re, signal, socket, sys, threading, warnings
import __main__

def registries():
    return sorted(name for name, module in list(sys.modules.items()) if "__warningregistry__" in vars(module))

umask = os.umask(0)
streams = [sys.stdin, sys.stdout, sys.stderr]
facts = {
    "modules": sorted(sys.modules),
    "main": sorted(vars(__main__)),
    "main-is": [__main__.__file__, __main__.__name__, sys.modules["__main__"] is __main__, repr(__main__.__spec__)],
    "annotations": repr(__main__.__annotations__),
    "linecache": sorted(linecache.cache),
    "filters": [[one[0], repr(one[1]), one[2].__name__, repr(one[3]), one[4]] for one in warnings.filters],
    "registries": registries(),
    "argv": sys.argv,
    "orig_argv": sys.orig_argv,
    "path": sys.path,
    "importers": sorted(sys.path_importer_cache),
    "last": [name for name in vars(sys) if name.startswith("last_")],
    "exception": repr(sys.exc_info()),
    "hooks": [repr(sys.excepthook), repr(sys.displayhook), sys.gettrace(), sys.getprofile()],
    "gc": [gc.isenabled(), gc.get_threshold(), gc.get_debug(), len(gc.garbage), len(gc.callbacks)],
    "frozen": gc.get_freeze_count() > 0,
    "atexit": atexit._ncallbacks(),
    "threads": [threading.active_count(), [one.name for one in threading.enumerate()], len(sys._current_frames())],
    "main-thread": threading.main_thread().native_id == os.getpid() == threading.get_native_id(),
    "streams": [[one.name, one.mode, one.encoding, one.errors, one.line_buffering, one.closed] for one in streams],
    "same-streams": [sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__, sys.stdin is sys.__stdin__],
    "positions": [one.buffer.seekable() for one in streams],
    "directories": [os.listdir(place) for place in ("/workspace", "/tmp", "/dev/shm", "/code")],
    "descriptors": [fd for fd in range(256) if os.path.exists(f"/proc/self/fd/{fd}")],
    "times": [os.stat(place).st_nlink for place in ("/workspace", "/tmp", "/dev/shm", "/code")],
    "environment": sorted(os.environ.items()),
    "signals": [repr(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
    "mask": [sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), sorted(signal.sigpending())],
    "timers": [signal.getitimer(which) for which in (0, 1, 2)],
    "umask": umask,
    "directory": os.getcwd(),
    "ids": [os.getpid(), os.getppid(), os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid(), os.getgroups()],
    "own-id": os.getresuid() == os.getresgid() and len(set(os.getresuid())) == 1,
    "names": [socket.gethostname(), os.uname().nodename],
    "cgroup": open("/proc/self/cgroup").read(),
    "comm": open("/proc/self/comm").read(),
    "status": [line for line in open("/proc/self/status") if line.startswith(
        ("Sig", "Shd", "Cap", "NoNewPrivs", "Seccomp", "Umask", "Threads", "Groups", "TracerPid", "FDSize"))],
    "oom": open("/proc/self/oom_score_adj").read(),
    "mounts": sorted(re.sub("[0-9]+", "N", line.split(" - ")[1]) for line in open("/proc/self/mountinfo")),
    "builtins": sorted(vars(__builtins__)),
    "frames": sys._getframe(0).f_code.co_filename,
    "recursion": sys.getrecursionlimit(),
    "digits": sys.get_int_max_str_digits(),
    "children": [os.times().children_user, os.times().children_system],
}
print(json.dumps(facts))
"""


def inspected(result: Result) -> dict[str, Any]:
    assert result.status == "ok", result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("policy", ["default", "data"])
def test_a_program_cannot_tell_a_parked_cell_from_a_fresh_one(policy: str) -> None:
    with Sandbox(policy, pool=leftovers.UNPARKED) as fresh:
        cold = fresh.run(INSPECTION)
    assert not cold.warm
    expected = inspected(cold)
    with Sandbox(policy, pool=FIXED) as sandbox:
        for way in WAYS:
            found = inspected(parked(sandbox, INSPECTION, way))
            assert {key: (found[key], expected[key]) for key in expected if found[key] != expected[key]} == {}, way


@pytest.mark.parametrize("way", WAYS)
def test_a_parked_cell_counts_its_program_and_nothing_before_it(warm: Sandbox, way: str) -> None:
    """A clock that had run since the cell was made would show more."""
    code = "import time\nprint(time.thread_time() < 5, time.get_clock_info('process_time').adjustable)"
    result = parked(warm, code, way)
    assert result.stdout == "True False\n"
    assert result.usage.pids_peak in (None, 1, 2)
    assert result.usage.wall_seconds == result.timings.run_seconds


# Limits


def hits(result: Result) -> set[str]:
    return {hit.limit for hit in result.limits_hit}


@pytest.mark.parametrize(
    ("limits", "code", "status", "hit"),
    [
        pytest.param({"wall_seconds": 0.3}, "while True: pass", "timeout", "wall_seconds", id="wall"),
        pytest.param({"cpu_seconds": 0.3}, "while True: pass", "cpu", "cpu_seconds", id="cpu"),
        pytest.param(
            {"pids": 4}, "import os\nfor _ in range(9):\n os.fork() or os._exit(0)", "error", "pids", id="pids"
        ),
        pytest.param(
            {"cpus": 0.1}, "import time\nwhile time.process_time() < 0.2: pass", "ok", "cpus", id="share-of-a-cpu"
        ),
        pytest.param({"output_bytes": 100}, "print('x' * 1000)", "ok", "output_bytes", id="output-kept"),
        pytest.param(
            {"output_stop_bytes": 1000}, "while True: print('x' * 100)", "output", "output_stop_bytes", id="output-stop"
        ),
    ],
)
def test_a_limit_that_is_narrowed_holds_in_a_parked_cell(
    warm: Sandbox, limits: dict[str, Any], code: str, status: str, hit: str
) -> None:
    if hit == "pids":
        code = code.replace("os.fork() or os._exit(0)", "os.fork() or __import__('time').sleep(60)")
    settled(engine_of(warm))
    result = warm.run(code, limits=Limits(**limits))
    assert result.warm
    assert (result.status, hit in hits(result)) == (status, True), result.limits_hit


@pytest.mark.parametrize(
    ("limits", "code", "said"),
    [
        pytest.param({"memory_bytes": 32 << 20}, "x = b'x' * (64 << 20)", "memory memory_bytes", id="memory"),
        pytest.param(
            {"workspace_bytes": 1 << 20}, "open('f', 'wb').write(bytes(2 << 20))", "No space left", id="workspace-bytes"
        ),
        pytest.param({"workspace_files": 3}, "for n in range(9): open(str(n), 'w')", "No space left", id="files"),
        pytest.param({"tmp_bytes": 1 << 20}, "open('/tmp/f', 'wb').write(bytes(2 << 20))", "tmp_bytes", id="tmp-bytes"),
        pytest.param(
            {"shm_bytes": 1 << 20}, "open('/dev/shm/f', 'wb').write(bytes(2 << 20))", "shm_bytes", id="shm-bytes"
        ),
        pytest.param(
            {"open_files": 16}, "kept = [open('/dev/null') for _ in range(20)]", "Too many open files", id="open-files"
        ),
        pytest.param(
            {"file_bytes": 1000},
            "with open('f', 'wb') as file: file.write(bytes(2000))",
            "File too large",
            id="file-bytes",
        ),
    ],
)
def test_a_limit_that_is_built_in_gets_a_cell_of_its_own(
    warm: Sandbox, limits: dict[str, Any], code: str, said: str
) -> None:
    settled(engine_of(warm))
    result = warm.run(code, limits=Limits(**limits))
    assert not result.warm
    assert said in result.stderr + f"{result.status} {' '.join(hits(result))}"
    # Nobody else gets that cell.
    assert parked(warm, "kept = [open(f'{n}', 'wb').write(bytes(300_000)) for n in range(10)]", "engine").status == "ok"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", ["/workspace", "/tmp", "/dev/shm"])
def test_a_file_system_that_was_filled_in_a_parked_cell_is_named(way: str, place: str) -> None:
    limits = Limits(workspace_bytes=4 << 20, tmp_bytes=4 << 20, shm_bytes=4 << 20)
    with Sandbox(limits=limits, pool=FIXED) as sandbox:
        for end in ("pass", "print('full')", "raise"):
            code = f"try: open('{place}/f', 'wb').write(bytes(5 << 20))\nexcept OSError: {end}"
            result = parked(sandbox, code, way)
            assert result.status == ("error" if end == "raise" else "ok")
            assert hits(result) - {"cpus"} == {f"{place.rpartition('/')[2]}_bytes"}
        assert hits(parked(sandbox, f"open('{place}/f', 'wb').write(bytes(3 << 20))", way)) <= {"cpus"}


@pytest.mark.parametrize("way", WAYS)
def test_a_memory_hog_in_a_parked_cell_ends_at_its_limit(way: str) -> None:
    with Sandbox(limits=Limits(memory_bytes=64 << 20), pool=FIXED) as sandbox:
        result = parked(sandbox, "print('here', flush=True)\nx = b'x' * (128 << 20)", way)
        assert (result.status, result.signal, result.stdout) == ("memory", signal.SIGKILL, "here\n")
        assert "memory_bytes" in hits(result)
        assert parked(sandbox, "print(1)", way).stdout == "1\n"


# The answer is the same as a fresh cell's

LIE: Final = '{"exit_code": 0, "error": null, "results": [{"text/plain": "forged"}]}'
ENDS: Final[dict[str, str]] = {
    "value": "x = 6\nx * 7",
    "output": "import sys\nprint('out')\nprint('err', file=sys.stderr)",
    "error": "def f():\n    raise ValueError('ä')\nf()",
    "syntax-error": "x = (",
    "exit": "import sys\nsys.exit(3)",
    "exit-text": "import sys\nsys.exit('no')",
    "os-exit": "import os\nprint('lost')\nos.write(1, b'kept')\nos._exit(4)",
    "os-exit-zero": "import os\nos.write(2, b'kept')\nos._exit(0)",
    "kill-self": "import os\nos.write(1, b'kept')\nos.kill(os.getpid(), 9)",
    "terminate-self": "import os\nos.kill(os.getpid(), 15)",
    "abort": "import os\nos.abort()",
    "crash": "import ctypes\nprint('here', flush=True)\nctypes.string_at(0)",
    "exec": "import os\nos.execv('/bin/echo', ['echo', 'other'])",
    "files": "import os\nos.mkdir('d')\nopen('d/f', 'w').write('content')\nopen('e', 'w')",
    "files-and-error": "open('f', 'w').write('content')\n1 / 0",
    "directory-only": "import os\nos.mkdir('d')",
    "removed-file": "import os\nopen('f', 'w').write('x')\nos.remove('f')",
    "tmp-only": "open('/tmp/f', 'w').write('x')",
    "link": "import os\nos.symlink('/etc/passwd', 'l')\nos.mkfifo('p')",
    "child-left": "import os, time\nif os.fork() == 0:\n time.sleep(100)\nprint('parent')",
    "child-left-with-output": (
        "import os, time\nr, w = os.pipe()\nif os.fork() == 0:\n os.write(1, b'child.')\n os.write(w, b'x')\n"
        " time.sleep(100)\nos.read(r, 1)\nprint('parent')"
    ),
    "orphan": "import os, time\nif os.fork() == 0:\n os.setsid()\n os.fork()\n time.sleep(100)",
    "zombie": "import os\nr, w = os.pipe()\nif os.fork() == 0:\n os._exit(0)\nos.close(w)\nos.read(r, 1)",
    "thread": "import threading\nthreading.Thread(target=print, args=('thread',)).start()",
    "daemon-thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(100,), daemon=True).start()",
    "exit-function": "import atexit\natexit.register(print, 'at exit')",
    "slow": "import time\ntime.sleep(0.05)\nprint('slept')\n7",
    "slow-with-early-output": "import time\nprint('early', flush=True)\ntime.sleep(0.05)\nprint('late')",
    "slow-error": "import time\ntime.sleep(0.05)\n1 / 0",
    "closed-channel": "import os\nos.close(3)\nprint('x')\nraise SystemExit(5)",
    "other-channel": "import os\nos.dup2(os.open('/dev/null', os.O_RDWR), 3)\nprint('x')",
    "shut-channel": "import socket\nsocket.socket(fileno=3).shutdown(socket.SHUT_RDWR)\nprint('x')",
    "no-streams": "import os\nos.close(0)\nos.close(1)\nos.close(2)\n7",
    "forged": f"import os, signal\nos.write(3, b'''{LIE}''')\nsignal.pause()",
    "forged-with-output": f"import os, signal\nos.write(1, b'before')\nos.write(3, b'''{LIE}''')\nsignal.pause()",
    "forged-twice": f"import os, signal\nfor _ in range(2): os.write(3, b'''{LIE}''')\nsignal.pause()",
    "forged-then-other": (
        f"import os, signal\nos.write(3, b'''{LIE}''')\nos.write(3, b'''{LIE.replace('0', '9', 1)}''')\nsignal.pause()"
    ),
    "forged-by-a-child": f"import os, signal\nif os.fork() == 0:\n os.write(3, b'''{LIE}''')\nsignal.pause()",
    "forged-with-a-child": f"import os, signal\nos.fork() or signal.pause()\nos.write(3, b'''{LIE}''')\nsignal.pause()",
    "no-frame": "import os\nos.write(3, b'{}')\nos._exit(7)",
    "no-frame-then-frame": f"import os\nos.write(3, b'{{}}')\nos.write(3, b'''{LIE}''')\nos._exit(7)",
    "parked-again": "import os\nos.write(3, b'P')\nprint('x')\n7",
    "parked-again-and-again": "import os\nfor _ in range(3): os.write(3, b'P')\nos._exit(7)",
    "empty-frame": "import os, socket\nsocket.socket(fileno=os.dup(3)).send(b'')\nos._exit(7)",
    "hello-again": "import os\nos.write(3, b'SBXC' + bytes(12))\nos._exit(7)",
    "pipe-full": "import os\nos.write(1, b'o' * 60_000)\nos.write(2, b'e' * 60_000)\n7",
    "pipe-fuller": "import os\nos.write(1, b'o' * 70_000)\nos.write(2, b'e' * 70_000)\n7",
    "large-output": "print('o' * 999_999)\n7",
    "dropped-output": "print('o' * 2_000_000)",
    "up-to-the-stop": "import os\nleft = 8 << 20\nwhile left: left -= os.write(1, b'o' * min(left, 65536))",
    "beyond-the-stop": "import os\nleft = (8 << 20) + 1\nwhile left: left -= os.write(1, b'o' * min(left, 65536))",
    "flood": "while True: print('o' * 10_000)",
    "flood-of-errors": "import sys\nwhile True: print('o' * 10_000, file=sys.stderr)",
    "not-text": "import os\nos.write(1, bytes(range(256)))",
    "large-value": "'x' * 100_000",
    "large-error": "raise ValueError('x' * 100_000)",
    "foreign-abi": "import ctypes\nctypes.CDLL(None).syscall(0x40000000 | 39)",
}


def told(result: Result) -> dict[str, Any]:
    """What a Result says of the program, without what differs from run to run."""
    with result:
        said: dict[str, Any] = {
            "status": result.status,
            "exit_code": result.exit_code,
            "signal": result.signal,
            "error": None if result.error is None else result.error.model_dump(),
            "results": [one.mime for one in result.results],
            "files": sorted((file.path, file.size_bytes, file.read()) for file in result.files),
            "files_skipped": result.files_skipped,
            "limits_hit": sorted((hit.limit, hit.value) for hit in result.limits_hit if hit.limit != "cpus"),
        }
        if result.status != "output":  # how much came until the end is chance
            said["output"] = (result.stdout, result.stderr, result.stdout_dropped_bytes, result.stderr_dropped_bytes)
        return said


@pytest.fixture(scope="module")
def expected(fresh: Sandbox) -> Callable[[str], dict[str, Any]]:
    """How a program of ENDS ends in a fresh cell."""
    known: dict[str, dict[str, Any]] = {}

    def get(name: str) -> dict[str, Any]:
        if name not in known:
            result = fresh.run(ENDS[name])
            assert not result.warm
            known[name] = told(result)
        return known[name]

    return get


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ENDS)
def test_a_program_ends_in_a_parked_cell_as_in_a_fresh_one(
    warm: Sandbox, expected: Callable[[str], dict[str, Any]], name: str, way: str
) -> None:
    assert told(parked(warm, ENDS[name], way)) == expected(name)


@pytest.mark.parametrize("name", ENDS)
def test_a_program_ends_at_a_daemon_as_in_a_fresh_cell(
    served: daemons.Served, client: Sandbox, expected: Callable[[str], dict[str, Any]], name: str
) -> None:
    assert told(warmly(served, client, ENDS[name])) == expected(name)


# Death from outside


def survivors(sandbox: Sandbox, victims: list[leftovers.Process]) -> list[leftovers.Process]:
    """The parked cells, once *victims* are gone and as many others sleep instead."""
    leftovers.eventually(lambda: all_gone(victims), WAIT_SECONDS, "the victims are gone")
    return settled(engine_of(sandbox))


@pytest.mark.parametrize("lent", [False, True], ids=["not-lent", "lent"])
@pytest.mark.parametrize("who", ["cell", "init"])
@pytest.mark.usefixtures("clean")
def test_a_parked_cell_that_is_killed_is_replaced(who: str, lent: bool) -> None:
    with Sandbox(pool=FIXED) as sandbox:
        assert sandbox.run("1").status == "ok"
        if lent:
            directly(sandbox, "1")
        first = settled(engine_of(sandbox))
        makers = [one.pid for one in named(engine_of(sandbox), "zygote")]
        for victim in named(engine_of(sandbox), who):
            if leftovers.lives(victim):  # else a run had it
                os.kill(victim.pid, signal.SIGKILL)
            leftovers.eventually(lambda: all_gone([victim]), WAIT_SECONDS, "the victim is gone")  # noqa: B023
            settled(engine_of(sandbox))
            assert sandbox.run("print(1)").stdout == "1\n"
            settled(engine_of(sandbox))
        leftovers.eventually(lambda: all_gone(first), WAIT_SECONDS, "the first cells are gone")
        assert directly(sandbox, "print(2)").stdout == "2\n"
        leftovers.eventually(
            lambda: [one.pid for one in named(engine_of(sandbox), "zygote")] == makers, 5, "it is the same zygote"
        )


@pytest.mark.parametrize("who", ["cell", "init"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("clean")
def test_all_parked_cells_may_be_killed_at_once(who: str, way: str) -> None:
    with Sandbox(pool=FIXED) as sandbox:
        parked(sandbox, "1", way)
        victims = settled(engine_of(sandbox))
        for one in named(engine_of(sandbox), who):
            os.kill(one.pid, signal.SIGKILL)
        for _ in range(5):
            result = sandbox.run("print(1)") if way == "direct" else by_engine(sandbox, "print(1)")
            # The engine may have handed it over before it heard of the kill, and the program may have come that far.
            assert result.stdout in ("", "1\n"), result
            assert result.status == ("ok" if result.exit_code == 0 else "killed"), result
        survivors(sandbox, victims)
        assert parked(sandbox, "print(2)", way).stdout == "2\n"


@pytest.mark.parametrize("who", ["zygote", "nursery"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("clean")
def test_a_zygote_that_is_killed_while_cells_are_parked_is_replaced(who: str, way: str) -> None:
    with Sandbox(pool=FIXED) as sandbox:
        parked(sandbox, "1", way)
        victims = [*settled(engine_of(sandbox)), *named(engine_of(sandbox), who)]
        os.kill(victims[-1].pid, signal.SIGKILL)
        leftovers.eventually(lambda: all_gone(victims), WAIT_SECONDS, "the zygote and its cells are gone")
        result = sandbox.run("print(1)")
        # Nothing of it had begun: either way the next one is served.
        assert result.status in ("ok", "internal"), result
        leftovers.eventually(lambda: sandbox.run("print(1)").status == "ok", WAIT_SECONDS, "runs go on")
        assert parked(sandbox, "print(2)", way).stdout == "2\n"


@pytest.mark.alone
@pytest.mark.usefixtures("clean")
def test_an_engine_that_is_killed_takes_its_parked_cells_along() -> None:
    with Sandbox(pool=FIXED) as sandbox:
        directly(sandbox, "1")
        cells = settled(engine_of(sandbox))
        victims = [*cells, *leftovers.descendants(engine_of(sandbox))]
        os.kill(engine_of(sandbox), signal.SIGKILL)
        leftovers.eventually(lambda: all_gone(victims), 5, "every process is gone")
    with Sandbox(pool=leftovers.UNPARKED) as following:  # sweeps
        assert following.run("print(1)").status == "ok"


# How many, how long


@pytest.mark.usefixtures("clean")
def test_cells_that_waited_too_long_are_replaced() -> None:
    with Sandbox(pool={"minimum": 2, "maximum": 2, "age_seconds": 0.3}) as sandbox:
        for _ in range(2):
            first = settled(engine_of(sandbox), 2)
            leftovers.eventually(lambda: all_gone(first), WAIT_SECONDS, "stale cells are gone")  # noqa: B023
            assert sandbox.run("print(1)").stdout == "1\n"
        directly(sandbox, "1")
        leased = settled(engine_of(sandbox), 2)
        leftovers.eventually(lambda: all_gone(leased), WAIT_SECONDS, "the stale lease is gone, too")
        assert sandbox.run("print(2)").stdout == "2\n"


@pytest.mark.usefixtures("clean")
def test_the_memory_of_parked_cells_is_bounded() -> None:
    with Sandbox(pool={"minimum": 4, "maximum": 4, "memory_bytes": 1}) as sandbox:
        settled(engine_of(sandbox), 1)
        assert sandbox.run("print(1)").stdout == "1\n"
        settled(engine_of(sandbox), 1)


@pytest.mark.parametrize(("least", "most"), [(0, 2), (1, 4), (4, 4)])
@pytest.mark.usefixtures("clean")
def test_so_many_cells_wait_when_nothing_happens(least: int, most: int) -> None:
    with Sandbox(pool={"minimum": least, "maximum": most}) as sandbox:
        settled(engine_of(sandbox), least)
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(lambda _: sandbox.run("1").status, range(60))) == {"ok"}
        settled(engine_of(sandbox), least)


@pytest.mark.usefixtures("clean")
def test_without_parking_no_cell_waits() -> None:
    with Sandbox(pool=leftovers.UNPARKED) as sandbox:
        for _ in range(5):
            result = sandbox.run("1")
            assert (result.status, result.warm) == ("ok", False)
            settled(engine_of(sandbox), 0)


@pytest.mark.usefixtures("clean")
def test_a_zygote_is_replaced_after_so_many_cells_while_runs_go_on() -> None:
    with Sandbox(pool={"minimum": 2, "maximum": 4, "zygote_cells": 20}) as sandbox:
        (first,) = named(engine_of(sandbox), "zygote")
        hashes: set[str] = set()

        def run(_: int) -> str:
            result = sandbox.run("print(hash('seed'))")
            hashes.add(result.stdout)
            return result.status

        def replaced() -> bool:
            with ThreadPoolExecutor(4) as pool:
                assert set(pool.map(run, range(20))) == {"ok"}
            return first.pid not in {one.pid for one in named(engine_of(sandbox), "zygote")}

        leftovers.eventually(replaced, 30, "another zygote")
        replaced()
        assert len(hashes) > 1
        leftovers.eventually(lambda: len(named(engine_of(sandbox), "zygote")) == 1, WAIT_SECONDS, "only one zygote")


@pytest.mark.usefixtures("clean")
def test_a_zygote_is_replaced_after_some_time_while_nothing_happens() -> None:
    with Sandbox(pool={"minimum": 1, "maximum": 1, "zygote_seconds": 0.5}) as sandbox:
        directly(sandbox, "1")
        first = named(engine_of(sandbox), "zygote")  # two, while one takes the other's place
        assert first
        leftovers.eventually(lambda: not any(map(leftovers.lives, first)), WAIT_SECONDS, "the first zygote is gone")
        assert sandbox.run("print(1)").stdout == "1\n"


# Many runs of every kind


def plain(sandbox: Sandbox) -> str:
    return sandbox.run("print(6 * 7)").stdout


def failing(sandbox: Sandbox) -> str:
    return sandbox.run("1 / 0").status


def writing(sandbox: Sandbox) -> str:
    with sandbox.run("open('f', 'w').write(open('in').read())", files={"in": "x" * 1000}) as result:
        return f"{result.status} {len(result.files)}"


def slow(sandbox: Sandbox) -> str:
    return sandbox.run("while True: pass", limits=Limits(wall_seconds=0.05)).status


def forking(sandbox: Sandbox) -> str:
    return sandbox.run("import os, time\nos.fork() or time.sleep(60)\nprint('x')").status


def chatting(sandbox: Sandbox) -> str:
    heard: list[str] = []
    sandbox.run("print('x' * 1000)", on_stdout=heard.append)
    return "".join(heard)


KINDS: Final[list[tuple[Callable[[Sandbox], str], str]]] = [
    (plain, "42\n"),
    (failing, "error"),
    (plain, "42\n"),
    (writing, "ok 1"),
    (slow, "timeout"),
    (forking, "ok"),
    (chatting, "x" * 1000 + "\n"),
    (plain, "42\n"),
]


def mixed(sandbox: Sandbox, number: int) -> list[tuple[str, str]]:
    """Run *number* of them; what came, where it is not what was expected."""
    kind, right = KINDS[number % len(KINDS)]
    came = kind(sandbox)
    return [] if came == right else [(kind.__name__, came)]


@pytest.mark.usefixtures("clean")
def test_three_hundred_runs_of_every_kind_leave_nothing() -> None:
    most: list[int] = []
    with Sandbox(max_running=4) as sandbox:
        for _ in range(2):
            for number in range(50):
                assert mixed(sandbox, number) == []
            with ThreadPoolExecutor(4) as pool:
                for wrong in pool.map(lambda number: mixed(sandbox, number), range(50)):
                    assert wrong == []
            most.append(sum(opened(engine_of(sandbox)).kinds.values()))
        # A connection and a parked cell have a few descriptors each, and their number is bounded.
        assert most[1] < most[0] + 100

    async def main() -> None:
        async with AsyncSandbox() as sandbox:
            for _ in range(10):
                results = await asyncio.gather(
                    *(sandbox.run("print(1)", stdin=b"x") for _ in range(5)),
                    *(sandbox.run("1 / 0") for _ in range(4)),
                    sandbox.run("open('f', 'w').write('x')"),
                )
                assert [one.status for one in results] == ["ok"] * 5 + ["error"] * 4 + ["ok"]
                results[-1].close()

    asyncio.run(main())


@pytest.mark.usefixtures("clean")
def test_engines_side_by_side_share_no_parked_cell() -> None:
    with ExitStack() as stack:
        both = [stack.enter_context(Sandbox(pool=FIXED)) for _ in range(2)]
        uids = [{uid_of(parked(one, "1", way)) for way in WAYS * 3} for one in both]
    assert not uids[0] & uids[1]


@pytest.mark.usefixtures("clean")
def test_closing_ends_parked_cells() -> None:
    sandbox = Sandbox(pool=FIXED)
    directly(sandbox, "1")
    cells = settled(engine_of(sandbox))
    thread = threading.Thread(target=sandbox.close)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    leftovers.eventually(lambda: all_gone(cells), 5, "the cells are gone")


def test_the_rows_are_written_as_they_should() -> None:
    for leave, look, _ in TRACES.values():
        compile(textwrap.dedent(f"{leave}\n{look}"), "row", "exec")
