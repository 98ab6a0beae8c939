"""The cell's side of one run: receive it, run the source as ``python main.py`` would, say how it ended.

Runs in the cell, every wall up, as the cell's own uid. Descriptors: 0 to 2 the program's streams, 3 the channel to the
engine. What is said here is the program's word only: limits, times and kills are the engine's to know.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import gc
import io
import json
import os
import stat
import sys
import threading
import time
import traceback
import types

TYPE_CHECKING = False  # typing itself is not imported here: every cell would carry it
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

CHANNEL = 3
PACKET = 1 << 18
HEAD_BYTES = 8  # of the first packet: how long the request is, over all its packets
NAME_CHARACTERS = 256
INT_END = 1 << 31
# The syntax tree as objects takes up to 250 bytes a character: of a longer source no last expression's value is kept.
TREE_CHARACTERS = 256 << 10
USER_DIRECTORIES = ("/code/", "/workspace/", "/tmp/", "/dev/shm/")  # noqa: S108 - the cell's own
MESSAGE_CHARACTERS = 4096
TRACEBACK_CHARACTERS = 16384
RESULT_CHARACTERS = 32768
FRAME_BYTES = 180_000  # below the smallest usual socket buffer (net.core.wmem_default, 212992)


def clip(text: str, characters: int) -> str:
    """*text*, its middle replaced by a mark when it is longer than *characters*."""
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"


def reseed() -> None:
    """What the zygote drew from is shared by its cells: everything random starts anew from the kernel.

    The `random` module does so by its own at-fork hook. tempfile compares pids, OpenSSL too; numpy does nothing.
    """
    modules = sys.modules
    if "numpy.random" in modules:
        modules["numpy.random"].seed()
    if "random" in modules:
        modules["random"].seed()
    if "tempfile" in modules:
        modules["tempfile"]._name_sequence = None  # type: ignore[attr-defined]
    if "uuid" in modules:
        modules["uuid"]._last_timestamp = None  # type: ignore[attr-defined]
    if "_ssl" in modules:
        modules["_ssl"].RAND_add(os.urandom(32), 32.0)


def is_users(filename: str) -> bool:
    """Whether a frame of *filename* belongs to the user's own code."""
    if filename.startswith("<"):
        return not filename.startswith("<frozen")
    return filename.startswith(USER_DIRECTORIES)


def small(number: object) -> int | None:
    """*number* when it is an int of the frame's range, else None: attributes of an exception may hold anything."""
    return number if type(number) is int and 0 <= number < INT_END else None


def without_ours(trace: types.TracebackType | None) -> types.TracebackType | None:
    """*trace* from the user's first frame on."""
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace


def only_users(report: traceback.TracebackException) -> None:
    """Drop library frames from *report* and from all that it was raised from."""
    seen = set()
    pending: list[traceback.TracebackException | None] = [report]
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        one.stack[:] = [frame for frame in one.stack if is_users(frame.filename)]
        pending += [one.__cause__, one.__context__, *(one.exceptions or [])]


def described(error: BaseException, path: str) -> dict[str, Any]:
    """*error* as the Result has it, with the errno of an OSError for the engine's limits_hit."""
    kind = type(error)
    plain = kind.__module__ in ("builtins", "__main__")
    name = kind.__qualname__ if plain else f"{kind.__module__}.{kind.__qualname__}"
    name = clip(name, NAME_CHARACTERS)
    try:
        message = str(error)
    except Exception:
        message = f"<{name} whose str() failed>"
    line = None
    if isinstance(error, SyntaxError) and error.filename == path:
        line = error.lineno
        if isinstance(error.msg, str):
            message = error.msg  # str() adds the file and the line, which have their own places
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    try:
        report = traceback.TracebackException(kind, error, error.__traceback__, compact=True)
        only_users(report)
        text = "".join(report.format())
    except Exception:
        text = f"{name}: {message}\n"
    return {
        "type": name,
        "message": clip(message, MESSAGE_CHARACTERS),
        "traceback": clip(text, TRACEBACK_CHARACTERS),
        "line": small(line),
        "errno": small(error.errno) if isinstance(error, OSError) else None,
    }


class Program:
    """One program: its source, its module, and what came of it."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.path = f"/code/{request['filename']}"
        self.wants_results = request["results"]
        self.pid = os.getpid()
        self.channel = os.fstat(CHANNEL)
        self.exit_code = 0
        self.error: dict[str, Any] | None = None
        self.results: list[dict[str, str]] = []
        self.last_loaded = next(reversed(sys.modules))
        module = self.module = types.ModuleType("__main__")
        module.__dict__.update(__file__=self.path, __builtins__=builtins, __cached__=None, __annotations__={})
        sys.modules["__main__"] = module
        self.names = module.__dict__
        # Its own at-fork hook forgets that before 3.13.
        threading.main_thread()._set_native_id()  # type: ignore[attr-defined]
        sys.argv = [self.path, *request["args"]]
        sys.orig_argv[1:] = sys.argv
        os.environ.update(request["env"])
        if "TZ" in request["env"]:
            time.tzset()
        sys.path_importer_cache.pop("/workspace", None)

    def execute(self) -> None:
        """Compile and run; the value of a last expression is kept when the caller wants results."""
        with io.open_code(self.path) as file:
            # The engine wrote text as UTF-8: a coding cookie, which may say otherwise, counts only for bytes.
            source = file.read().decode().removeprefix("\ufeff")
        body, last = self.split(source) if self.wants_results and len(source) <= TREE_CHARACTERS else (None, None)
        if body is None:
            body = compile(source, self.path, "exec", dont_inherit=True)
        del source
        exec(body, self.names)  # noqa: S102 - what a cell is for
        if last is None:
            return
        value = eval(last, self.names)  # noqa: S307 - as above
        if value is not None:
            self.results.append({"text/plain": clip(repr(value), RESULT_CHARACTERS)})

    def split(self, source: str) -> tuple[types.CodeType | None, types.CodeType | None]:
        """The program without its last expression, and that; nothing when there is none, or when only the compiler
        itself, which goes deeper than a tree of objects may, can tell what is wrong with it.
        """
        try:
            tree: Any = compile(source, self.path, "exec", flags=ast.PyCF_ONLY_AST, dont_inherit=True)
            if not tree.body or not isinstance(tree.body[-1], ast.Expr):
                return None, None
            last = ast.Expression(tree.body.pop().value)
            return (
                compile(tree, self.path, "exec", dont_inherit=True),
                compile(last, self.path, "eval", dont_inherit=True),
            )
        except (RecursionError, MemoryError):
            return None, None

    def ended_by(self, error: BaseException) -> None:
        """As the interpreter treats what leaves a program: SystemExit is an exit, all else a traceback and status 1."""
        if isinstance(error, SystemExit):
            code = error.code
            if code is None:
                self.exit_code = 0
            elif isinstance(code, int):
                self.exit_code = code & 0xFF
            else:
                print(code, file=sys.stderr)  # noqa: T201
                self.exit_code = 1
            return
        self.exit_code = 130 if isinstance(error, KeyboardInterrupt) else 1
        error.__traceback__ = without_ours(error.__traceback__)
        if os.getpid() == self.pid:
            self.error = described(error, self.path)
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except SystemExit:
            raise
        except BaseException as failure:
            print("Error in sys.excepthook:", file=sys.stderr)  # noqa: T201
            traceback.print_exception(type(failure), failure, without_ours(failure.__traceback__))
            print("\nOriginal exception was:", file=sys.stderr)  # noqa: T201
            sys.__excepthook__(type(error), error, error.__traceback__)

    def run(self) -> None:
        try:
            self.execute()
        except BaseException as error:
            self.guard(self.ended_by, error)
        # The order of Py_FinalizeEx: threads, atexit, streams, then what the modules held, which may print again.
        self.guard(threading._shutdown)  # type: ignore[attr-defined]
        self.guard(atexit._run_exitfuncs)
        self.flush()
        self.guard(self.let_go)
        self.flush()

    def flush(self) -> None:
        """Write out the streams, also those that the program put others in the place of."""
        for stream in {id(one): one for one in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)}.values():
            try:
                if stream is not None and not stream.closed:
                    stream.flush()
            except BaseException:
                self.exit_code = self.exit_code or 120  # as Py_FinalizeEx does when a flush fails

    def let_go(self) -> None:
        """Drop what the program's modules hold: files are written out, ``__del__`` runs, as at an interpreter's end.

        There daemon threads stop before that; here they cannot be stopped, so they keep their globals, and only the
        files are written out.
        """
        if len(sys._current_frames()) > 1:
            for one in gc.get_objects():
                if type(one) in (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom):
                    try:
                        # Another kind may block for as long as its reader likes.
                        if not one.closed and stat.S_ISREG(os.fstat(one.fileno()).st_mode):
                            one.flush()
                    except Exception:  # noqa: S112 - the next file; nobody is left to tell
                        continue
            return
        # sys.modules keeps the order of insertion. A look at all that the zygote loaded would touch, and so copy, each.
        own = [self.module]
        for name in reversed(sys.modules):
            if name == self.last_loaded:
                break
            own.append(sys.modules[name])
        for module in own:
            names = module.__dict__ if type(module) is types.ModuleType else {}
            path = names.get("__file__")
            if type(path) is str and path.startswith(USER_DIRECTORIES):
                known = [name for name in names if type(name) is str and name != "__builtins__"]
                # Private names first, as _PyModule_ClearDict does.
                for name in sorted(known, key=lambda name: name[:1] != "_" or name[:2] == "__"):
                    names[name] = None
        gc.collect()

    def guard(self, step: Callable[..., object], *arguments: object) -> None:
        """Run a step of the end, which may itself run the user's code (excepthook, atexit) and fail."""
        try:
            step(*arguments)
        except SystemExit as error:
            self.exit_code = error.code & 0xFF if isinstance(error.code, int) else self.exit_code
        except BaseException as error:
            self.exit_code = self.exit_code or 1
            try:
                traceback.print_exception(type(error), error, without_ours(error.__traceback__))
            except BaseException:
                return

    def report(self) -> None:
        """The finished frame. A child of the program that came this far says nothing: the program is its parent."""
        if os.getpid() != self.pid or not os.path.samestat(os.fstat(CHANNEL), self.channel):
            return  # descriptor 3 may be a file of the program's own by now
        frame = {"exit_code": self.exit_code, "error": self.error, "results": self.results}
        data = json.dumps(frame, ensure_ascii=False).encode("utf-8", "backslashreplace")
        limit = RESULT_CHARACTERS
        while len(data) > FRAME_BYTES and limit > 64:
            limit //= 2
            if self.error:
                self.error["traceback"] = clip(self.error["traceback"], limit)
                self.error["message"] = clip(self.error["message"], limit)
            self.results[:] = [{kind: clip(text, limit) for kind, text in one.items()} for one in self.results]
            data = json.dumps(frame, ensure_ascii=False).encode("utf-8", "backslashreplace")
        os.write(CHANNEL, data)


def receive() -> dict[str, Any]:
    """The engine's request: packets of one JSON object, the first led by its length."""
    data = os.read(CHANNEL, PACKET)
    size, parts = int.from_bytes(data[:HEAD_BYTES], "little"), [data[HEAD_BYTES:]]
    got = len(parts[0])
    while got < size:
        parts.append(os.read(CHANNEL, PACKET))
        if not parts[-1]:
            raise EOFError
        got += len(parts[-1])
    request: dict[str, Any] = json.loads(b"".join(parts))
    return request


def main() -> None:
    """From the fork to the end of the process; never returns."""
    code = 1
    program = None
    try:
        request = receive()
        reseed()
        program = Program(request)
        program.run()
        code = program.exit_code
        program.report()
    except BaseException:
        # The channel was closed by the program, or memory is gone: the wait status must do.
        code = code or (program.exit_code if program else 1)
    finally:
        os._exit(code)
