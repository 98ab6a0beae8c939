"""Programs that do what programs do: a run must look from inside as ``python main.py`` does, and end as it would."""

# ruff: noqa: E501, RUF001 - foreign letters are what is tried; a program of a table stands on one line

from __future__ import annotations

import errno
import hashlib
import signal
import textwrap
import time
from typing import Any

import pytest

from sandboxd import Limits, Result, Sandbox


def inside(sandbox: Sandbox, code: str, **arguments: Any) -> Result:
    """Run *code*, whose indentation is the test's."""
    return sandbox.run(textwrap.dedent(code), **arguments)


# --- ends well, with exactly this output --------------------------------------------------------------------------

ENDS_WELL = [
    ("arithmetic", "print(6*7)", "42\n"),
    ("nothing", "", ""),
    ("only-a-comment", "# nothing\n", ""),
    ("unicode", "print('α β – 日本語 🙂', len('🙂'))", "α β – 日本語 🙂 1\n"),
    ("unicode-name", "größe = 3\nprint(größe)", "3\n"),
    ("coding-cookie", "# -*- coding: latin-1 -*-\nprint('é')", "é\n"),
    ("coding-cookie-unknown", "#!x\n# coding: no-such\nprint('é')\n'é'", "é\n"),
    ("byte-order-mark", "\ufeffprint('bom')", "bom\n"),
    ("carriage-returns", "print(1)\r\nprint(2)\r\n", "1\n2\n"),
    ("no-last-newline", "print('x', end='')", "x"),
    ("printed-surrogate", "print('\\udcff')", "\ufffd\n"),
    ("bytes-that-are-not-utf8", "import sys; sys.stdout.buffer.write(b'\\xff\\n')", "\ufffd\n"),
    ("nul-in-output", "print('a\\0b')", "a\0b\n"),
    ("exit-none", "import sys; print(1); sys.exit(None)", "1\n"),
    ("exit-zero", "raise SystemExit(0)", ""),
    ("exit-false", "import sys; sys.exit(False)", ""),
    ("os-exit-zero", "import os; os.write(1, b'raw'); os._exit(0)", "raw"),
    ("deep-expression", "x = " + "+".join(["1"] * 2500) + "\nprint(x)", "2500\n"),
    ("docstring", '"""Said."""\nprint(__doc__)', "Said.\n"),
    ("future", "from __future__ import annotations\ndef f(a: nowhere): pass\nprint(f.__annotations__)", "{'a': 'nowhere'}\n"),
    # the module
    ("main", "print(__name__, __file__, __spec__, __package__, __annotations__)", "__main__ /code/main.py None None {}\n"),
    (
        "main-is-fresh",
        "import sys; print(sorted(n for n in vars(sys.modules['__main__']) if not n.startswith('__')))",
        "['sys']\n",
    ),
    ("main-is-main", "import sys; x = 1; print(sys.modules['__main__'].x, vars(sys.modules['__main__']) is globals())", "1 True\n"),
    ("argv", "import sys; print(sys.argv, sys.orig_argv[1:])", "['/code/main.py'] ['/code/main.py']\n"),
    ("places", "import os, sys; print(os.getcwd(), sys.path[0], os.environ['HOME'])", "/workspace /workspace /workspace\n"),
    ("no-frame-of-ours", "import sys; sys.settrace(None); print(sys._getframe().f_code.co_filename)", "/code/main.py\n"),
    ("tmpdir", "import os, tempfile; print(os.environ['TMPDIR'], tempfile.gettempdir())", "/tmp /tmp\n"),
    (
        "encodings",
        "import sys, locale; print(sys.stdout.encoding, sys.stdin.encoding, sys.flags.utf8_mode, "
        "sys.getfilesystemencoding(), locale.setlocale(locale.LC_CTYPE), open('x', 'w').encoding)",
        "utf-8 utf-8 1 utf-8 C.UTF-8 utf-8\n",
    ),
    (
        "streams",
        "import sys; print(sys.stdin.seekable(), sys.stdin.isatty(), sys.stdin.name, sys.stdin.mode, sys.stdout.name, "
        "sys.stderr.name, sys.stdout.line_buffering, sys.stdin is sys.__stdin__)",
        "False False <stdin> r <stdout> <stderr> True True\n",
    ),
    ("descriptors", "import os; print(sorted(map(int, os.listdir('/proc/self/fd')))[:-1])", "[0, 1, 2, 3]\n"),
    ("not-pid-1", "import os; print(os.getpid() != 1, os.getsid(0) == os.getpid())", "True True\n"),
    ("one-thread", "import threading; print(threading.active_count(), threading.current_thread().name)", "1 MainThread\n"),
    (
        "thread-identity",
        "import threading, os; t = threading.main_thread(); print(t.ident == threading.get_ident(), t.native_id == os.getpid())",
        "True True\n",
    ),
    ("source-is-there", "import inspect\ndef f():\n    return 1\nprint(inspect.getsource(f), end='')", "def f():\n    return 1\n"),
    ("source-is-read-only", "import os\ntry: open(__file__, 'a')\nexcept PermissionError: print('refused')", "refused\n"),
    ("umask", "import os; print(oct(os.umask(0)))", "0o22\n"),
    ("stdin-is-empty", "import sys; print(repr(sys.stdin.read()), sys.stdin.buffer.read())", "'' b''\n"),
    ("input-at-eof", "try: input()\nexcept EOFError: print('eof')", "eof\n"),
    ("import-of-own-module", "open('mine.py', 'w').write('x = 5')\nimport mine; print(mine.x, mine.__file__)", "5 /workspace/mine.py\n"),
    # signals are an ordinary process's
    ("sigpipe-ignored", "import signal; print(signal.getsignal(signal.SIGPIPE))", "1\n"),
    ("sigterm-default", "import signal; print(signal.getsignal(signal.SIGTERM))", "0\n"),
    ("sigint-handler", "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)", "True\n"),
    ("nothing-blocked", "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))", "set()\n"),
    (
        "keyboard-interrupt",
        "import os, signal\ntry: os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt: print('caught')",
        "caught\n",
    ),
    (
        "child-dies-of-sigpipe",
        "import subprocess; print(subprocess.run(['sh', '-c', 'yes | head -n 1'], capture_output=True).stdout)",
        "b'y\\n'\n",
    ),
    (
        "pipe-closed",
        "import os\nr, w = os.pipe(); os.close(r)\ntry: os.write(w, b'x')\nexcept BrokenPipeError: print('EPIPE')",
        "EPIPE\n",
    ),
    # the end
    ("atexit", "import atexit; atexit.register(print, 'last'); print('first')", "first\nlast\n"),
    ("atexit-order", "import atexit\nfor i in range(3): atexit.register(print, i)", "2\n1\n0\n"),
    ("atexit-after-exit", "import atexit, sys; atexit.register(print, 'bye'); sys.exit(0)", "bye\n"),
    (
        "thread-is-joined",
        "import threading\ngo = threading.Event()\n"
        "threading.Thread(target=lambda: (go.wait(), print('thread'))).start()\nprint('main'); go.set()",
        "main\nthread\n",
    ),
    (
        "daemon-thread-is-not-joined",
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\nprint('main')",
        "main\n",
    ),
    ("joined-before-atexit", "import atexit, threading\natexit.register(print, 'atexit')\n"
     "threading.Thread(target=lambda: print('thread')).start()", "thread\natexit\n"),
    ("executor", "from concurrent.futures import ThreadPoolExecutor as P\nP().submit(print, 'done')", "done\n"),
    ("del-of-a-global", "class A:\n    def __del__(self): print('del')\na = A(); print('main')", "main\ndel\n"),
    ("del-in-a-cycle", "class A:\n    def __del__(self): print('del')\na = A(); a.a = a; del a; print('main')", "main\ndel\n"),
    ("partial-line-of-a-replaced-stdout", "import io, sys\nprint('kept', end='')\nsys.stdout = io.StringIO(); print('gone')", "kept"),
    ("stdout-closed", "import sys\nprint('x'); sys.stdout.close()", "x\n"),
    ("stdout-none", "import sys\nprint('x'); sys.stdout = sys.stderr = sys.stdin = None", "x\n"),
    # children
    ("fork", "import os\nif (p := os.fork()) == 0: os._exit(3)\nprint(os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]))", "3\n"),
    (
        "child-falls-off-the-end",
        "import os\nr, w = os.pipe()\nif os.fork() == 0:\n    os.close(r)\nelse:\n"
        "    os.close(w); print(os.read(r, 1), os.waitstatus_to_exitcode(os.wait()[1]))",
        "b'' 0\n",
    ),
    (
        "child-ends-in-an-exception",
        "import os, sys\nif os.fork() == 0:\n    sys.stderr = None\n    raise KeyError\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]))",
        "1\n",
    ),
    ("zombies", "import os\nfor _ in range(30):\n    if os.fork() == 0: os._exit(0)\nprint('fine')", "fine\n"),
    (
        "orphan-is-reaped",
        # Thrice as many as pids allows: each middle process leaves an orphan that init must take.
        "import os\nfor _ in range(200):\n    r, w = os.pipe()\n    if os.fork() == 0:\n"
        "        if os.fork() == 0:\n            os.write(w, b'x')\n        os._exit(0)\n"
        "    os.close(w); os.wait(); assert os.read(r, 2) == b'x' and os.read(r, 1) == b''; os.close(r)\nprint('fine')",
        "fine\n",
    ),
    ("exec", "import os; os.execvp('echo', ['echo', 'replaced'])", "replaced\n"),
    ("subprocess", "import subprocess; print(subprocess.check_output(['echo', 'hi']))", "b'hi\\n'\n"),
    ("shell", "import os; print(os.system('exit 3') >> 8)", "3\n"),
    ("python-child", "import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', 'print(1)']))", "b'1\\n'\n"),
    ("dev-stdout", "open('/dev/stdout', 'w').write('opened\\n')", "opened\n"),
    ("dev-stdout-by-shell", "import os; os.system('echo x > /dev/stdout')", "x\n"),
    ("dev-fd", "open('/dev/fd/1', 'w').write('opened\\n')", "opened\n"),
    ("dev-null", "open('/dev/null', 'w').write('x'); print(open('/dev/null').read())", "\n"),
    ("dev-urandom", "print(len(open('/dev/urandom', 'rb').read(16)))", "16\n"),
    # the library
    ("asyncio", "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 5\nprint(asyncio.run(f()))", "5\n"),
    (
        "asyncio-subprocess",
        "import asyncio\nasync def f():\n    p = await asyncio.create_subprocess_exec('echo', 'a', stdout=-1)\n"
        "    return await p.communicate()\nprint(asyncio.run(f()))",
        "(b'a\\n', None)\n",
    ),
    (
        "sqlite",
        "import sqlite3\nc = sqlite3.connect('d.db'); c.execute('create table t (a)'); c.execute('insert into t values (7)')\n"
        "c.commit(); print(sqlite3.connect('d.db').execute('select * from t').fetchall())",
        "[(7,)]\n",
    ),
    (
        "sqlite-durable",
        "import sqlite3\nfor mode in ('delete', 'wal'):\n    c = sqlite3.connect(mode); c.execute(f'pragma journal_mode={mode}')\n"
        "    c.execute('pragma synchronous=extra'); c.execute('create table t (a)')\n"
        "    for i in range(20):\n        with c: c.execute('insert into t values (?)', (i,))\n"
        "    c.close(); c = sqlite3.connect(mode)\n"
        "    print(c.execute('select sum(a) from t').fetchone(), c.execute('pragma integrity_check').fetchone())",
        "(190,) ('ok',)\n(190,) ('ok',)\n",
    ),
    (
        "durable-file",
        "import os\nwith open('f', 'w') as f:\n    f.write('kept'); f.flush(); os.fsync(f.fileno()); os.fdatasync(f)\n"
        "    os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)\n"
        "d = os.open('.', os.O_RDONLY); os.fsync(d); print(open('f').read())",
        "kept\n",
    ),
    (
        "mmap-of-a-file",
        "import mmap\nwith open('f', 'w+b') as f:\n    f.truncate(8192); m = mmap.mmap(f.fileno(), 8192); m[:4] = b'kept'\n"
        "    print(m.flush(), m.madvise(mmap.MADV_SEQUENTIAL)); m.close()\nprint(open('f', 'rb').read(4))",
        "None None\nb'kept'\n",
    ),
    (
        "record-locks",
        "import fcntl, struct\nf = open('l', 'w')\nfcntl.lockf(f, fcntl.LOCK_EX); fcntl.lockf(f, fcntl.LOCK_UN)\n"
        "print(struct.unpack('hhqqi', fcntl.fcntl(f, fcntl.F_OFD_GETLK, struct.pack('hhqqi', fcntl.F_WRLCK, 0, 0, 0, 0)))[0])",
        "2\n",
    ),
    (
        "socket-options",
        "import socket; a, b = socket.socketpair(); a.settimeout(1); a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)\n"
        "a.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)\n"
        "print(a.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), a.type, socket.socket(fileno=a.detach()).family)",
        "0 1 1\n",
    ),
    (
        "tempfile",
        "import tempfile\nwith tempfile.NamedTemporaryFile('w+') as f:\n    f.write('t'); f.flush()\n"
        "    print(f.name.startswith('/tmp/'), open(f.name).read())",
        "True t\n",
    ),
    (
        "shared-memory",
        "from multiprocessing.shared_memory import SharedMemory\nm = SharedMemory(create=True, size=8); m.buf[0] = 9\n"
        "n = SharedMemory(m.name); print(n.buf[0]); n.close(); m.close(); m.unlink()",
        "9\n",
    ),
    ("mmap", "import mmap; m = mmap.mmap(-1, 4096); m[:2] = b'ab'; print(m[:2])", "b'ab'\n"),
    ("ctypes", "import ctypes; print(ctypes.CDLL(None).abs(-4))", "4\n"),
    ("threads", "import threading\nts = [threading.Thread(target=int) for _ in range(20)]\n"
     "[t.start() for t in ts]; [t.join() for t in ts]; print('ok')", "ok\n"),
    ("socketpair", "import socket; a, b = socket.socketpair(); a.send(b'x'); print(b.recv(1))", "b'x'\n"),
    ("file-lock", "import fcntl; fcntl.flock(open('l', 'w'), fcntl.LOCK_EX); print('held')", "held\n"),
    ("numpy", "import numpy as np; print(np.linalg.inv(np.eye(2) * 2).tolist())", "[[0.5, 0.0], [0.0, 0.5]]\n"),
    ("time-zone", "import time; print(time.tzname[0], time.localtime(0).tm_hour)", "UTC 0\n"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "stdout"), [pytest.param(c, o, id=i) for i, c, o in ENDS_WELL])
def test_it_ends_well_with_this_output(sandbox: Sandbox, code: str, stdout: str) -> None:
    result = sandbox.run(code)
    assert (result.stdout, result.stderr) == (stdout, "")
    assert (result.status, result.exit_code, result.signal, result.error) == ("ok", 0, None, None)


DIFFERS: list[tuple[str, str, str]] = [
    ("fsync", "import os; os.fsync(99)", "none"),
    ("fdatasync", "import os; os.fdatasync(99)", "none"),
    ("dontneed", "import os; os.posix_fadvise(99, 0, 0, os.POSIX_FADV_DONTNEED)", "none"),
    ("other-hints", "import os; os.posix_fadvise(99, 0, 0, os.POSIX_FADV_WILLNEED)", "EBADF"),
    ("sync-of-a-range", "ctypes.CDLL(None).sync_file_range(99, 0, 0, 0) and os.close(99)", "none"),
    ("msync", "libc = ctypes.CDLL(None); libc.msync(4096, 4096, 4) and os.close(99)", "none"),
    ("asynchronous-msync", "libc = ctypes.CDLL(None); libc.msync(4096, 4096, 1) and os.close(99)", "EBADF"),
    ("larger-pipe", "fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 1 << 20)", "EPERM"),
    ("smaller-pipe", "fcntl.fcntl(os.pipe()[0], fcntl.F_SETPIPE_SZ, 4096)", "EPERM"),
    ("subprocess-with-pipesize", "subprocess.Popen(['true'], stdin=subprocess.PIPE, pipesize=1 << 17)", "EPERM"),
    ("command-of-tomorrow", "fcntl.fcntl(1, 1039)", "EINVAL"),
    ("tcp-option", "socket.socketpair()[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)", "EOPNOTSUPP"),
    ("cookie-of-a-socket", "socket.socketpair()[0].getsockopt(socket.SOL_SOCKET, 57, 8)", "ENOPROTOOPT"),
]


@pytest.mark.parametrize(("code", "answer"), [pytest.param(c, a, id=i) for i, c, a in DIFFERS])
def test_it_differs_from_a_program_outside_as_the_policies_page_says(sandbox: Sandbox, code: str, answer: str) -> None:
    result = inside(
        sandbox,
        f"""
        import ctypes, errno, fcntl, os, socket, subprocess
        try:
            {code}
        except OSError as error:
            print(error.errno)
        else:
            print(0)
        """,
    )
    assert result.stdout == f"{getattr(errno, answer, 0)}\n", result.stderr


def test_git_keeps_a_history_with_every_flush_that_it_has(sandbox: Sandbox) -> None:
    code = """
    import shutil, subprocess, sys
    if not shutil.which("git"):
        sys.exit("no git")
    def git(*words):
        return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.fsync=all", *words], check=True)
    git("init", "-q")
    for number in range(3):
        with open("file", "a") as file:
            file.write(f"{number}\\n")
        git("add", "file")
        git("commit", "-q", "-m", f"step {number}")
    git("gc", "-q")
    git("fsck", "--strict")
    sys.stdout.flush()
    git("--no-pager", "log", "--format=%s")
    """
    result = inside(sandbox, code)
    if result.stderr == "no git\n":
        pytest.skip("git is not installed")
    assert (result.status, result.stdout) == ("ok", "step 2\nstep 1\nstep 0\n"), result.stderr


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(sandbox: Sandbox, method: str) -> None:
    code = f"""
    import multiprocessing as mp
    def square(x):
        return x * x
    if __name__ == "__main__":
        with mp.get_context({method!r}).Pool(2) as pool:
            print(pool.map(square, [1, 2, 3]))
    """
    result = inside(sandbox, code)
    assert (result.status, result.stdout, result.stderr) == ("ok", "[1, 4, 9]\n", "")


def test_200_kb_of_source(sandbox: Sandbox) -> None:
    lines = [f"value_{n} = {n}  # filler to make the line longer" for n in range(4500)]
    source = "\n".join(
        [*lines, "print(sum(v for k, v in list(globals().items()) if k.startswith('value_')))", "value_4499"]
    )
    assert len(source) > 200_000
    result = sandbox.run(source)
    assert (result.status, result.stdout) == ("ok", f"{sum(range(4500))}\n")
    assert result.results[0].mime == {"text/plain": "4499"}


def test_a_source_of_16_mib_runs(sandbox: Sandbox) -> None:
    source = "print('start')\n" + "#" * ((16 << 20) - 40) + "\nprint('end')\n"
    assert sandbox.run(source).stdout == "start\nend\n"


def test_source_as_bytes(sandbox: Sandbox) -> None:
    assert sandbox.run("print('ü')".encode()).stdout == "ü\n"


# --- stdin, arguments, environment --------------------------------------------------------------------------------

READ_STDIN = {
    "sys": "import sys; data = sys.stdin.buffer.read()",
    "text": "import sys; data = sys.stdin.read().encode()",
    "dev-stdin": "data = open('/dev/stdin', 'rb').read()",
    "cat": "import subprocess; data = subprocess.check_output(['cat'])",
}


@pytest.mark.parametrize("size", [0, 1, 10 << 20])
@pytest.mark.parametrize("how", READ_STDIN)
def test_stdin_arrives_whole(sandbox: Sandbox, how: str, size: int) -> None:
    content = (b"0123456789abcde\n" * (size // 16 + 1))[:size]
    result = sandbox.run(
        f"{READ_STDIN[how]}\nimport hashlib; print(len(data), hashlib.sha256(data).hexdigest())", stdin=content
    )
    assert result.stdout == f"{size} {hashlib.sha256(content).hexdigest()}\n"


def test_stdin_by_lines_and_as_text(sandbox: Sandbox) -> None:
    result = inside(sandbox, "import sys\nprint(input())\nprint([line for line in sys.stdin])", stdin="ä\r\nb\nc")
    assert result.stdout == "ä\n['b\\n', 'c']\n"


def test_stdin_that_nobody_reads(sandbox: Sandbox) -> None:
    assert sandbox.run("print(1)", stdin=b"x" * (10 << 20)).status == "ok"
    assert sandbox.run("import os; os.close(0); print(1)", stdin=b"x" * (10 << 20)).status == "ok"


def test_arguments_are_data(sandbox: Sandbox) -> None:
    args = ["", "-x", "--", "a b", "$(id)", "`id`", "'\"", "ü🙂", "\n", "*", "\x01"]
    assert sandbox.run("import sys; print(sys.argv[1:])", args=args).stdout == f"{args!r}\n"


@pytest.mark.parametrize(
    "args",
    [
        pytest.param(["\x01" * 130_000], id="one"),
        pytest.param(["a"] * 65_000, id="many"),
        pytest.param(["ü" * 60_000], id="wide"),
    ],
)
def test_as_many_arguments_as_are_allowed(sandbox: Sandbox, args: list[str]) -> None:
    code = (
        "import sys, hashlib; print(len(sys.argv) - 1, hashlib.sha256('\\0'.join(sys.argv[1:]).encode()).hexdigest())"
    )
    digest = hashlib.sha256("\0".join(args).encode()).hexdigest()
    assert sandbox.run(code, args=args).stdout == f"{len(args)} {digest}\n"


def test_code_and_arguments_are_never_interpolated(sandbox: Sandbox) -> None:
    hostile = "'''\"\"\"\\x00{}%s$HOME`id`"
    assert sandbox.run(f"print({hostile!r})").stdout == hostile.replace("\0", "\0") + "\n"


def test_environment_is_fixed_and_env_adds(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_CALLER", "x")
    with Sandbox() as fresh:
        names = fresh.run("import os; print(sorted(os.environ))").stdout
    assert "SECRET_OF_THE_CALLER" not in names
    for foreign in ("USER", "LOGNAME", "SHELL", "VIRTUAL_ENV", "SSH_AUTH_SOCK", "PYTEST_CURRENT_TEST"):
        assert foreign not in names
    code = "import os, subprocess; print(os.environ['ADDED'], subprocess.check_output(['sh', '-c', 'echo $ADDED']))"
    assert sandbox.run(code, env={"ADDED": "a b=ü"}).stdout == "a b=ü b'a b=\\xc3\\xbc\\n'\n"
    assert "ADDED" not in sandbox.run("import os; print(sorted(os.environ))").stdout


def test_env_tz_is_in_force(sandbox: Sandbox) -> None:
    assert sandbox.run("import time; print(time.localtime(0).tm_hour)", env={"TZ": "EST5"}).stdout == "19\n"


def test_programs_of_the_path_are_found(sandbox: Sandbox) -> None:
    result = sandbox.run("import shutil, sys; print(shutil.which('sh'), sys.executable == shutil.which('python'))")
    assert result.stdout.startswith("/usr/bin/sh ")


@pytest.mark.parametrize("name", ["channel", "inherited", "program", "toolcalls", "warmup", "zygote"])
def test_program_imports_its_own_module_of_a_name_of_ours(sandbox: Sandbox, name: str) -> None:
    result = inside(sandbox, f"import {name}\nprint({name}.__file__)", files={f"{name}.py": ""})
    assert result.stdout == f"/workspace/{name}.py\n"


def test_the_filename_is_the_callers(sandbox: Sandbox) -> None:
    result = sandbox.run("print(__file__)\n1/0", filename="my report.py")
    assert result.stdout == "/code/my report.py\n"
    assert result.error is not None
    assert '"/code/my report.py", line 2' in result.error.traceback


# --- errors -------------------------------------------------------------------------------------------------------


def test_a_syntax_error_names_its_line(sandbox: Sandbox) -> None:
    result = inside(sandbox, "print('never')\nx = 1\nif True print(3)\n")
    assert (result.status, result.exit_code, result.stdout) == ("error", 1, "")
    assert result.error is not None
    assert (result.error.type, result.error.line) == ("SyntaxError", 3)
    assert "if True print(3)" in result.error.traceback
    assert "^" in result.error.traceback
    assert result.stderr == result.error.traceback


THREE_FRAMES = """\
import json

def first():
    second()

def second():
    third()

def third():
    raise ValueError("deep")

print("before")
first()
"""


def test_three_frames_deep(sandbox: Sandbox) -> None:
    result = sandbox.run(THREE_FRAMES)
    assert (result.status, result.exit_code, result.signal, result.stdout) == ("error", 1, None, "before\n")
    assert result.error is not None
    assert (result.error.type, result.error.message, result.error.line) == ("ValueError", "deep", 10)
    assert result.error.traceback == textwrap.dedent("""\
        Traceback (most recent call last):
          File "/code/main.py", line 13, in <module>
            first()
          File "/code/main.py", line 4, in first
            second()
          File "/code/main.py", line 7, in second
            third()
          File "/code/main.py", line 10, in third
            raise ValueError("deep")
        ValueError: deep
        """)
    assert result.stderr == result.error.traceback


def test_frames_of_libraries_are_left_out_of_error_but_not_of_stderr(sandbox: Sandbox) -> None:
    result = sandbox.run("import json\n\njson.loads('{')\n")
    assert result.error is not None
    assert result.error.type == "json.decoder.JSONDecodeError"
    assert result.error.line == 3
    assert "json/decoder.py" not in result.error.traceback
    assert "json/decoder.py" in result.stderr


@pytest.mark.parametrize(
    "code",
    [
        "1/0",
        "raise KeyError",
        "int('x')",
        "import json; json.loads('{')",
        "def f(): f()\nf()",
        "exec('1/0')",
        "import nothing_like_it",
        "x = [",
        "class A:\n    def __repr__(self): raise ValueError\nA()",
        "import sys; sys.excepthook = None; 1/0",
        "import atexit; atexit.register(lambda: 1/0)",
        "import threading; threading.Thread(target=lambda: 1/0).start()",
        "try:\n    1/0\nexcept Exception as e:\n    raise ValueError from e",
    ],
)
def test_no_frame_of_ours_anywhere(sandbox: Sandbox, code: str) -> None:
    result = sandbox.run(code)
    said = result.stderr + (result.error.traceback if result.error else "")
    assert "Error" in said
    assert "sandboxd" not in said
    assert "program.py" not in said


@pytest.mark.parametrize(
    ("how", "between"),
    [("from error", "direct cause"), ("", "During handling")],
)
def test_chained_exceptions(sandbox: Sandbox, how: str, between: str) -> None:
    result = sandbox.run(f"try:\n    1/0\nexcept ZeroDivisionError as error:\n    raise KeyError('k') {how}\n")
    assert result.error is not None
    assert (result.error.type, result.error.message, result.error.line) == ("KeyError", "'k'", 4)
    first, second = result.error.traceback.index("ZeroDivisionError:"), result.error.traceback.index("KeyError:")
    assert first < result.error.traceback.index(between) < second


def test_an_exception_group(sandbox: Sandbox) -> None:
    result = sandbox.run("raise ExceptionGroup('several', [ValueError('one'), KeyError('two')])")
    assert result.error is not None
    assert result.error.type == "ExceptionGroup"
    for part in ("several (2 sub-exceptions)", "ValueError: one", "KeyError: 'two'"):
        assert part in result.error.traceback


def test_a_cause_that_is_its_own_cause(sandbox: Sandbox) -> None:
    result = sandbox.run("a = ValueError('a'); b = ValueError('b'); a.__context__ = b; b.__context__ = a\nraise a")
    assert result.error is not None
    assert (result.error.message, result.error.line) == ("a", 2)


EXCEPTIONS = [  # type, message, line
    ("import nothing_like_it", "ModuleNotFoundError", "No module named 'nothing_like_it'", 1),
    ("x = 1\nassert x == 2, 'no'", "AssertionError", "no", 2),
    ("class Mine(Exception): pass\nraise Mine('m')", "Mine", "m", 2),
    ("class A:\n    class Inner(Exception): pass\nraise A.Inner", "A.Inner", "", 3),
    ("import subprocess\nsubprocess.run(['false'], check=True)", "subprocess.CalledProcessError",
     "Command '['false']' returned non-zero exit status 1.", 2),
    ("def f():\n    f()\nf()", "RecursionError", "maximum recursion depth exceeded", 2),
    ("exec('1/0')", "ZeroDivisionError", "division by zero", 1),
    ("x = 1\nexec('x = = 2')", "SyntaxError", "invalid syntax (<string>, line 1)", 2),
    ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E", "E", "<E whose str() failed>", 3),
    ("raise BaseException('base')", "BaseException", "base", 1),
    ("import asyncio\nraise asyncio.CancelledError", "asyncio.exceptions.CancelledError", "", 2),
    ("b'\\xff'.decode()", "UnicodeDecodeError", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte", 1),
    ("class A:\n    def __repr__(self):\n        raise ValueError('r')\nA()", "ValueError", "r", 3),
    ("print(1)\nbytearray(1 << 60)", "MemoryError", "", 2),
    ("x = [0] * (1 << 55)", "MemoryError", "", 1),
    # What an exception says of itself may be anything.
    ("raise OSError(True, 'odd')", "PermissionError", "[Errno True] odd", 1),
    ("raise OSError(10**30, 'odd')", "OSError", f"[Errno {10**30}] odd", 1),
    ("e = SyntaxError('s')\ne.filename, e.lineno = __file__, 10**30\nraise e", "SyntaxError", "s", 3),
    ("class E(Exception):\n    def __str__(self): return '\\ud800'\nraise E", "E", "?", 3),
]  # fmt: skip


@pytest.mark.parametrize(("code", "kind", "message", "line"), EXCEPTIONS)
def test_an_exception_is_described(sandbox: Sandbox, code: str, kind: str, message: str, line: int) -> None:
    result = sandbox.run(code)
    assert (result.status, result.exit_code) == ("error", 1)
    assert result.error is not None
    assert (result.error.type, result.error.message, result.error.line) == (kind, message, line)


def test_what_an_exception_says_is_bounded(sandbox: Sandbox) -> None:
    code = "raise type('T' * 10**6, (Exception,), {})('m' * 10**6)"
    result = sandbox.run(code)
    assert result.error is not None
    assert result.error.line == 1
    for said, most in ((result.error.type, 400), (result.error.message, 5000), (result.error.traceback, 20_000)):
        assert len(said) < most
        assert "characters left out" in said


def test_a_recursion_is_shown_folded(sandbox: Sandbox) -> None:
    result = sandbox.run("def f():\n    f()\nf()")
    assert result.error is not None
    assert "[Previous line repeated" in result.error.traceback
    assert len(result.error.traceback) < 1000


def test_a_custom_excepthook_is_used(sandbox: Sandbox) -> None:
    result = sandbox.run("import sys\nsys.excepthook = lambda *a: print('hook', a[0].__name__)\n1/0")
    assert (result.status, result.stdout, result.stderr) == ("error", "hook ZeroDivisionError\n", "")
    assert result.error is not None


def test_an_excepthook_that_fails_hides_nothing(sandbox: Sandbox) -> None:
    result = sandbox.run("import sys\ndef hook(*a): raise KeyError('hook')\nsys.excepthook = hook\n1/0")
    assert (result.status, result.exit_code) == ("error", 1)
    for part in ("Error in sys.excepthook:", "KeyError: 'hook'", "Original exception was:", "ZeroDivisionError"):
        assert part in result.stderr


EXITS = [  # code, exit status, stderr
    ("import sys; sys.exit(3)", 3, ""),
    ("import sys; sys.exit('text')", 1, "text\n"),
    ("import sys; sys.exit(-1)", 255, ""),
    ("import sys; sys.exit(256 + 7)", 7, ""),
    ("import sys; sys.exit(True)", 1, ""),
    ("import sys; sys.exit((1, 2))", 1, "(1, 2)\n"),
    ("import os; os._exit(7)", 7, ""),
    ("import atexit, sys; atexit.register(sys.exit, 9); sys.exit(4)", 4, None),
    ("import os; os.execvp('sh', ['sh', '-c', 'exit 5'])", 5, ""),
    ("import os; os.closerange(3, 256); raise SystemExit(6)", 6, ""),
    ("exit(8)", 8, ""),
]


@pytest.mark.parametrize(("code", "status", "stderr"), EXITS)
def test_an_exit_status_is_an_error_without_an_exception(
    sandbox: Sandbox, code: str, status: int, stderr: str | None
) -> None:
    result = sandbox.run(code)
    assert (result.status, result.exit_code, result.signal, result.error) == ("error", status, None, None)
    if stderr is not None:
        assert result.stderr == stderr


def test_an_uncaught_keyboard_interrupt(sandbox: Sandbox) -> None:
    result = sandbox.run("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    assert (result.status, result.exit_code) == ("error", 130)
    assert result.error is not None
    assert result.error.type == "KeyboardInterrupt"


def test_the_exit_status_is_the_programs_when_it_closed_our_channel(sandbox: Sandbox) -> None:
    result = sandbox.run("import os\nos.close(3)\nf = open('three.txt', 'w')\nprint(f.fileno())\nf.write('mine')")
    assert (result.status, result.stdout) == ("ok", "3\n")
    assert [(file.path, file.read()) for file in result.files] == [("three.txt", b"mine")]


SIGNALS = [
    ("abort", "import os; os.abort()", signal.SIGABRT),
    ("segfault", "import ctypes; ctypes.string_at(0)", signal.SIGSEGV),
    ("sigkill-itself", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", signal.SIGKILL),
    ("sigterm", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)", signal.SIGTERM),
    ("sigkill-group", "import os, signal; os.killpg(0, signal.SIGKILL)", signal.SIGKILL),
    ("sigkill-by-child", "import os, subprocess; subprocess.run(['sh', '-c', 'kill -9 $PPID'])", signal.SIGKILL),
    ("sigxcpu-itself", "import os, signal; os.kill(os.getpid(), signal.SIGXCPU)", signal.SIGXCPU),
    ("sigusr1", "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)", signal.SIGUSR1),
    ("realtime", "import os, signal; os.kill(os.getpid(), signal.SIGRTMIN)", signal.SIGRTMIN),
    ("alarm", "import signal; signal.setitimer(signal.ITIMER_REAL, 0.01); signal.pause()", signal.SIGALRM),
    ("int-default", "import os, signal; signal.signal(2, signal.SIG_DFL); os.kill(os.getpid(), 2)", signal.SIGINT),
]  # fmt: skip


@pytest.mark.parametrize(("code", "number"), [pytest.param(c, n, id=i) for i, c, n in SIGNALS])
def test_a_signal_of_its_own_is_killed_with_that_signal(sandbox: Sandbox, code: str, number: int) -> None:
    result = sandbox.run(f"print('before', flush=True)\n{code}\nprint('after')")
    assert (result.status, result.exit_code, result.signal, result.error) == ("killed", None, number, None)
    assert result.stdout == "before\n"
    assert result.limits_hit == []


def test_a_segfault_leaves_the_lines_before_it(sandbox: Sandbox) -> None:
    result = sandbox.run(
        "for n in range(1000): print(n)\nprint('unfinished', end='')\nimport ctypes; ctypes.string_at(0)"
    )
    assert result.stdout == "".join(f"{n}\n" for n in range(1000))


def test_init_cannot_be_signalled(sandbox: Sandbox) -> None:
    code = "import os, signal\ntry: os.kill(1, signal.SIGKILL)\nexcept PermissionError: print('refused')"
    assert sandbox.run(code).stdout == "refused\n"


# --- other processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "child",
    [
        pytest.param("import signal; signal.pause()", id="waits"),
        pytest.param(
            "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()", id="ignores-sigterm"
        ),
        pytest.param("import os, signal; os.setsid(); signal.pause()", id="own-session"),
        pytest.param("while True: pass", id="spins"),
        pytest.param("import time\nwhile True: print('x'); time.sleep(0.01)", id="writes"),
    ],
)
def test_children_are_killed_when_the_program_ends(sandbox: Sandbox, child: str) -> None:
    # They hold stdout open, too.
    code = f"import os\nr, w = os.pipe()\nif os.fork() == 0:\n    os.write(w, b'x')\n    exec({child!r})\nos.read(r, 1)\nprint('main')"
    begun = time.monotonic()
    result = sandbox.run(code, limits=Limits(wall_seconds=10))
    assert result.status == "ok"
    assert "main\n" in result.stdout
    assert time.monotonic() - begun < 5


def test_a_daemon_that_left_the_tree_is_killed_and_its_writes_end(sandbox: Sandbox) -> None:
    code = """
    import os
    r, w = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.closerange(0, 3)
        os.write(w, b"x")
        while True:
            with open("beat", "a") as file:
                file.write("x")
    os.wait(); os.read(r, 1)
    """
    result = inside(sandbox, code)
    assert result.status == "ok"


# --- random state -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('random').random()",
        "__import__('uuid').uuid4()",
        "__import__('os').urandom(8)",
        "__import__('secrets').token_hex(8)",
        "__import__('tempfile').mktemp()",
        "__import__('numpy').random.random()",
        "__import__('ssl').RAND_bytes(8)",
    ],
)
def test_random_state_differs_between_runs(sandbox: Sandbox, expression: str) -> None:
    drawn = {sandbox.run(f"print({expression})").stdout for _ in range(3)}
    assert len(drawn) == 3


def test_random_state_differs_when_the_zygote_drew_from_it() -> None:
    from sandboxd import Policy

    preload = ["random", "numpy.random", "tempfile", "uuid", "secrets", "ssl"]
    warmup = "import random, numpy, tempfile, uuid, ssl\n" + "\n".join(
        [
            "random.random()",
            "numpy.random.random()",
            "tempfile.mktemp()",
            "uuid.uuid1()",
            "uuid.uuid4()",
            "ssl.RAND_bytes(8)",
        ]
    )
    policy = Policy.model_validate({"name": "warm", "runtime": {"preload": preload, "warmup": warmup}})
    code = (
        "import random, numpy, tempfile, uuid, ssl\n"
        "for draw in (random.random, numpy.random.random, tempfile.mktemp, uuid.uuid4, lambda: ssl.RAND_bytes(8)): print(draw())"
    )
    with Sandbox(policy) as warm:
        runs = [warm.run(code).stdout.splitlines() for _ in range(3)]
    for drawn in zip(*runs, strict=True):
        assert len(set(drawn)) == 3
    assert len(runs[0]) == 5
