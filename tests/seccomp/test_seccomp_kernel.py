"""The compiled filters in the real kernel: which numbers reach it, and which programs still run.

Every filter is installed in a child of the test alone. Calls are made with bad pointers and descriptors, so that
one that reaches the kernel does no harm: any answer but the filter's own errno means that it was reached.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import os
import signal
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from sandboxd import seccomp
from sandboxd.seccomp.syscalls import NAMES, NEWEST, NUMBERS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from sandboxd.seccomp import Decision, Profile

pytestmark = pytest.mark.kernel

SHIPPED = ("default", "strict")
MARKER = 4000
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long

# These come back twice, elsewhere, or not at all when they reach the kernel; each gets a child of its own.
ALONE = {"exit", "exit_group", "fork", "vfork", "pause", "rt_sigreturn", "uretprobe", "uprobe"}


class SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install(program: bytes) -> None:
    """Put this process under *program*, as an unprivileged one would."""
    code = ctypes.create_string_buffer(program, len(program))
    argument = SockFprog(len(program) // 8, ctypes.addressof(code))
    if LIBC.prctl(38, 1, 0, 0, 0) or LIBC.syscall(NUMBERS["seccomp"], 1, 0, ctypes.byref(argument)):
        raise OSError(ctypes.get_errno(), "seccomp")


def call(number: int, arguments: tuple[int, ...]) -> int:
    """The errno that a raw system call answers, 0 when it succeeds."""
    ctypes.set_errno(0)
    values = [ctypes.c_ulong(argument) for argument in arguments]
    return ctypes.get_errno() if LIBC.syscall(ctypes.c_long(number), *values) == -1 else 0


def in_child(program: bytes, work: Callable[[int], None]) -> tuple[bytes, int]:
    """What *work* wrote to the descriptor it gets, under the filter, and the child's wait status."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            faulthandler.disable()  # pytest's: the crashes here are wanted
            signal.alarm(20)
            install(program)
            work(writer)
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read()
    return said, os.waitpid(pid, 0)[1]


def answers(program: bytes, calls: Sequence[tuple[int, tuple[int, ...]]]) -> list[int]:
    """The errno of each call, made one after the other in one child under *program*."""

    def work(writer: int) -> None:
        for number, arguments in calls:
            os.write(writer, struct.pack("=i", call(number, arguments)))

    said, status = in_child(program, work)
    found = [value for (value,) in struct.iter_unpack("=i", said)]
    assert status == 0, f"died ({status}) at {NAMES.get(calls[len(found)][0], calls[len(found)][0])}"
    assert len(found) == len(calls)
    return found


def sweep(profile: Profile) -> list[tuple[int, Decision]]:
    """Every number from 0 to 600, with each thing that can happen to it."""
    return [(number, answer) for number in range(601) for answer in profile.verdict(number)]


@pytest.mark.parametrize("name", SHIPPED)
def test_exactly_the_allowed_calls_reach_the_kernel(name: str) -> None:
    profile = seccomp.effective(name)
    rows = [(number, answer) for number, answer in sweep(profile) if NAMES.get(number) not in ALONE]
    calls = [(number, answer.arguments or ()) for number, answer in rows]
    found = answers(seccomp.compile(profile, marker_errno=MARKER), calls)
    wrong = [
        f"{NAMES.get(number, number)} {answer}, got {got}"
        for (number, answer), got in zip(rows, found, strict=True)
        if (got != MARKER) != answer.action.permits
    ]
    assert wrong == []


@pytest.mark.parametrize("name", SHIPPED)
def test_refused_calls_answer_their_own_errno(name: str) -> None:
    profile = seccomp.effective(name)
    rows = [(number, answer) for number, answer in sweep(profile) if answer.action.answers]
    found = answers(seccomp.compile(profile), [(number, answer.arguments or ()) for number, answer in rows])
    assert [NAMES.get(n, n) for (n, answer), got in zip(rows, found, strict=True) if got != answer.action.errno] == []


@pytest.mark.parametrize("call_name", sorted(ALONE))
@pytest.mark.parametrize("name", SHIPPED)
def test_calls_that_do_not_simply_return(name: str, call_name: str) -> None:
    profile = seccomp.effective(name)
    number = NUMBERS[call_name]

    def work(writer: int) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.2)  # SIGALRM ends a pause
        os.write(writer, struct.pack("=i", call(number, (0,) * 6)))

    said, status = in_child(seccomp.compile(profile, marker_errno=MARKER), work)
    refused = said[:4] == struct.pack("=i", MARKER)
    assert refused != profile.decide(number).permits, (said, status)


def test_uretprobe_passes_a_filter_that_refuses_it() -> None:
    # Why the profiles list it as allowed: the kernel asks no filter (6.14, stable kernels before).
    if tuple(map(int, os.uname().release.split(".")[:2])) < (6, 14):
        pytest.skip("uretprobe is filtered before Linux 6.14")
    profile = seccomp.effective("default", deny=["uretprobe"])
    number = NUMBERS["uretprobe"]
    said, status = in_child(
        seccomp.compile(profile), lambda writer: (os.write(writer, bytes([call(number, (0,) * 6)])), None)[1]
    )
    assert said != bytes([errno.EPERM])
    assert os.WIFSIGNALED(status) or said


@pytest.mark.parametrize(
    "number", [0x40000000, 0x40000000 | 39, 0x40000000 | 59, 0x40000000 | 520, 0x40000000 | NEWEST]
)
def test_x32_numbers_kill(number: int) -> None:
    program = seccomp.compile(seccomp.effective("default"))
    _, status = in_child(program, lambda writer: (call(number, (0,) * 6), None)[1])
    assert os.WTERMSIG(status) == signal.SIGSYS


def test_number_minus_one_is_not_implemented() -> None:
    program = seccomp.compile(seccomp.effective("default"))
    assert answers(program, [(-1, (0,) * 6)]) == [errno.ENOSYS]


def test_i386_calls_kill() -> None:
    import mmap

    def work(writer: int) -> None:
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # mov eax, 20 (getpid); int 0x80; ret
        ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
        os.write(writer, b"reached")

    said, status = in_child(seccomp.compile(seccomp.effective("default")), work)
    assert said == b""
    assert os.WTERMSIG(status) in (signal.SIGSYS, signal.SIGSEGV)  # SEGV where the kernel has no IA32 emulation


def test_kill_takes_the_whole_process_not_the_thread() -> None:
    import threading

    def work(writer: int) -> None:
        thread = threading.Thread(target=call, args=(0x40000000, (0,) * 6))
        thread.start()
        thread.join()
        os.write(writer, b"survived")

    said, status = in_child(seccomp.compile(seccomp.effective("default")), work)
    assert (said, os.WTERMSIG(status)) == (b"", signal.SIGSYS)


def test_threads_and_programs_stay_under_the_filter() -> None:
    def work(writer: int) -> None:
        import threading

        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(call(NUMBERS["unshare"], (0,) * 6)))
        thread.start()
        thread.join()
        os.write(writer, b"%d " % found[0])
        code = "import ctypes; l = ctypes.CDLL(None, use_errno=True); l.unshare(0); print(ctypes.get_errno(), end='')"
        os.write(writer, subprocess.run([sys.executable, "-c", code], capture_output=True).stdout)

    said, _ = in_child(seccomp.compile(seccomp.effective("default")), work)
    assert said == b"1 1"


# ------------------------------------------------------------------------------------------------------- real programs

UNDER = """
import ctypes, os, sys
filter_file, program_file, mode = sys.argv[1:]
program = open(filter_file, "rb").read()
source = open(program_file).read()
class Fprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))
libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer(program, len(program))
fprog = Fprog(len(program) // 8, ctypes.addressof(buffer))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.syscall(317, 1, 0, ctypes.byref(fprog)) == 0, ctypes.get_errno()
if mode == "exec":
    os.execv(sys.executable, [sys.executable, program_file])
exec(compile(source, program_file, "exec"), {"__name__": "__main__"})
"""


def run_under(profile: Profile, source: str, directory: Path, mode: str = "exec") -> subprocess.CompletedProcess[str]:
    """Run *source* as a Python program under *profile*, in *directory*; "here" does it without another execve."""
    for name, content in (
        ("filter", seccomp.compile(profile)),
        ("main.py", source.encode()),
        ("under", UNDER.encode()),
    ):
        (directory / name).write_bytes(content)
    command = [sys.executable, str(directory / "under"), str(directory / "filter"), str(directory / "main.py"), mode]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(directory), "MPLBACKEND": "Agg", "OPENBLAS_NUM_THREADS": "2"}
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )


MULTIPROCESSING = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import shared_memory

def square(x):
    return x * x

if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        assert list(pool.map(square, range(4))) == [0, 1, 4, 9]
    with context.Manager() as manager:
        shared = manager.dict(); shared["a"] = 1
        assert dict(shared) == {{"a": 1}}
    queue = context.Queue(); queue.put(5); assert queue.get() == 5
    block = shared_memory.SharedMemory(create=True, size=64); block.close(); block.unlink()
    print("done")
"""

PURE = {
    "threads": "import threading; e = threading.Event(); threading.Thread(target=e.set).start(); assert e.wait(5)",
    "asyncio": "import asyncio; asyncio.run(asyncio.sleep(0.01)); asyncio.run(asyncio.to_thread(print))",
    "sqlite3": "import sqlite3; c = sqlite3.connect('x.db'); c.execute('create table t (a)'); c.commit(); c.close()",
    "tempfile": "import tempfile; tempfile.TemporaryFile().write(b'x'); tempfile.NamedTemporaryFile(); "
    "tempfile.TemporaryDirectory().cleanup()",
    "resource": "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); resource.getrusage(0)",
    "signal": "import signal, os; signal.signal(10, lambda *a: print('handled')); os.kill(os.getpid(), 10); "
    "signal.signal(14, lambda *a: None); signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01); signal.pause(); "
    "signal.setitimer(signal.ITIMER_REAL, 0)",
    "shutil": "import shutil; open('a', 'w').write('x'); shutil.copy2('a', 'b'); shutil.move('b', 'c'); "
    "shutil.disk_usage('.'); import os; os.mkdir('d'); shutil.copytree('d', 'e'); shutil.rmtree('d')",
    "archives": "import tarfile, zipfile; open('a', 'w').write('x'); t = tarfile.open('t.tgz', 'w:gz'); t.add('a'); "
    "t.close(); tarfile.open('t.tgz').extractall('out', filter='data'); zipfile.ZipFile('z.zip', 'w').write('a')",
    "faulthandler": "import faulthandler; faulthandler.enable(); faulthandler.dump_traceback_later(9); "
    "faulthandler.cancel_dump_traceback_later()",
    "ctypes": "import ctypes; assert ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 7)() == 7",
    "mmap": "import mmap; m = mmap.mmap(-1, 1 << 20); m[:3] = b'abc'; m.flush(); m.resize(1 << 21)",
    "random": "import os, secrets, uuid, random; os.urandom(9); secrets.token_hex(); uuid.uuid4(); random.random()",
    "platform": "import platform, time, locale, os; platform.platform(); time.sleep(0.001); os.cpu_count()",
    "xattr-copy": "import os, shutil; open('a', 'w').close(); os.listxattr('a'); shutil.copystat('a', '.')",
}
MORE = {
    "subprocess": "import subprocess; assert subprocess.run('echo hi | tr h H', shell=True, capture_output=True)"
    ".stdout == b'Hi\\n'",
    "asyncio-subprocess": "import asyncio\nasync def main():\n p = await asyncio.create_subprocess_exec('true')\n "
    "assert await p.wait() == 0\nasyncio.run(main())",
    "unix-socket": "import socket, threading; s = socket.socket(socket.AF_UNIX); s.bind('s'); s.listen(); "
    "c = socket.socket(socket.AF_UNIX); c.connect('s'); a, _ = s.accept(); a.send(b'x'); assert c.recv(1) == b'x'",
    "coreutils": "import subprocess; subprocess.run('set -e; echo x > a; cp -a a b; mv b c; ln -s a l; ln a h; ls -la; "
    "sort a; find . -name a; tar cf t.tar a; tar xf t.tar; mkdir -p p/q; touch -d @0 p; install -m 600 a i; mkfifo f; "
    "rm -r p; df . ; stat a; cat a a > d; head -c 10 /dev/zero | wc -c; nice true; timeout 5 true; date; id', "
    "shell=True, check=True)",
    "nice": "import os; os.nice(1)",
    "timers": "import ctypes; c = ctypes.CDLL(None); assert c.timerfd_create(1, 0) > 0",
    "fifo": "import os; os.mkfifo('f')",
    **{f"multiprocessing-{m}": MULTIPROCESSING.format(method=m) for m in ("fork", "spawn", "forkserver")},
}


@pytest.mark.parametrize("program", [*PURE, *MORE])
def test_program_runs_under_default(program: str, tmp_path: Path) -> None:
    done = run_under(seccomp.effective("default"), (PURE | MORE)[program], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("program", PURE)
def test_program_runs_under_strict(program: str, tmp_path: Path) -> None:
    done = run_under(seccomp.effective("strict"), PURE[program], tmp_path, "here")
    assert (done.returncode, done.stderr) == (0, "")


STRICT_REFUSES = {
    "subprocess": ("import subprocess; subprocess.run(['true'])", "PermissionError"),
    "fork": ("import os; os.fork()", "PermissionError"),
    "exec": ("import os; os.execv('/bin/true', ['true'])", "PermissionError"),
    "unix-socket": ("import socket; socket.socket(socket.AF_UNIX)", "OSError: [Errno 97]"),
    "fifo": ("import os; os.mkfifo('f')", "PermissionError"),
    "multiprocessing": (
        "import multiprocessing; multiprocessing.get_context('fork').Process().start()",
        "PermissionError",
    ),
}


@pytest.mark.parametrize("program", STRICT_REFUSES)
def test_strict_refuses_with_an_ordinary_exception(program: str, tmp_path: Path) -> None:
    source, message = STRICT_REFUSES[program]
    done = run_under(seccomp.effective("strict"), source, tmp_path, "here")
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]


def test_scientific_stack_runs_under_default(tmp_path: Path) -> None:
    for module in ("numpy", "scipy", "pandas", "matplotlib"):
        pytest.importorskip(module)
    source = """
import numpy, pandas, scipy.linalg, scipy.stats
import matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt
a = numpy.random.default_rng(1).normal(size=(300, 300))
scipy.linalg.svd(a); numpy.linalg.eigvals(a); scipy.stats.norm.cdf(0)
frame = pandas.DataFrame({"a": range(9), "b": list("abcabcabc")})
frame.groupby("b").sum(); frame.to_csv("x.csv"); pandas.read_csv("x.csv")
numpy.save("x.npy", a); numpy.load("x.npy", mmap_mode="r")[0, 0]
plt.plot([1, 2]); plt.savefig("x.png")
print("done")
"""
    done = run_under(seccomp.effective("default"), source, tmp_path)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


NODE = """
const {Worker} = require("worker_threads"), fs = require("fs"), net = require("net");
new Worker('require("worker_threads").parentPort.postMessage(1)', {eval: true});
require("child_process").exec("echo child", (error, out) => process.stdout.write(out));
fs.writeFileSync("a.txt", "x"); fs.watchFile("a.txt", () => 0); fs.unwatchFile("a.txt"); fs.promises.readFile("a.txt");
const server = net.createServer(c => c.end("x"));
server.listen("socket", () => net.connect("socket").on("data", () => server.close()));
"""
SHELL = """
for i in 1 2 3; do echo $i; done | sort -r | (read x; [ $x = 3 ]) || exit 1
cat <(echo child); trap : EXIT; sleep 0.01 & wait; ulimit -S -c 0; kill -0 $$
"""
REPOSITORY = "git init -q . && git -c user.name=a -c user.email=a@b commit -q --allow-empty -m x && echo child"


@pytest.mark.parametrize(
    "command",
    [["node", "-e", NODE], ["bash", "-c", SHELL], ["sh", "-c", f"command -v git > /dev/null && {REPOSITORY}"]],
    ids=["node", "bash", "git"],
)
def test_other_programs_run_under_default(command: list[str], tmp_path: Path) -> None:
    needed = "git" if "git" in command[-1] else command[0]
    if subprocess.run(["sh", "-c", f"command -v {needed}"], stdout=subprocess.DEVNULL).returncode:
        pytest.skip(f"{needed} is not installed")
    done = run_under(seccomp.effective("default"), f"import os; os.execvp({command[0]!r}, {command!r})", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "child\n", "")


def test_compiler_runs_under_default(tmp_path: Path) -> None:
    source = (
        "import subprocess; open('a.c', 'w').write('int main(void) { return 7; }')\n"
        "subprocess.run(['gcc', 'a.c'], check=True); assert subprocess.run(['./a.out']).returncode == 7"
    )
    if subprocess.run(["sh", "-c", "command -v gcc"], stdout=subprocess.DEVNULL).returncode:
        pytest.skip("gcc is not installed")
    done = run_under(seccomp.effective("default"), source, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


FAILURES = [
    (
        "abort",
        "import faulthandler, os; faulthandler.enable(); os.abort()",
        -signal.SIGABRT,
        "Fatal Python error: Aborted",
    ),
    (
        "segfault",
        "import faulthandler, ctypes; faulthandler.enable(); ctypes.string_at(0)",
        -signal.SIGSEGV,
        "Segmentation",
    ),
    (
        "memory",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); b'x' * (2 << 30)",
        1,
        "MemoryError",
    ),
    ("recursion", "def f(): f()\nf()", 1, "RecursionError"),
    ("kill-itself", "import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
    ("interrupt", "import signal; signal.raise_signal(2)", -signal.SIGINT, "KeyboardInterrupt"),
    ("exit-status", "raise SystemExit(3)", 3, ""),
]


@pytest.mark.parametrize("mode", ["exec", "here"], ids=["default", "strict"])
@pytest.mark.parametrize(("source", "status", "message"), [case[1:] for case in FAILURES], ids=[c[0] for c in FAILURES])
def test_failure_ends_as_it_would_without_a_filter(
    source: str, status: int, message: str, mode: str, tmp_path: Path
) -> None:
    done = run_under(seccomp.effective("default" if mode == "exec" else "strict"), source, tmp_path, mode)
    assert done.returncode == status
    assert message in done.stderr
