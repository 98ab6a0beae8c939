"""The cell's side of one run: receive it, run the source as ``python main.py`` would, say how it ended.

Runs in the cell, every wall up, as the cell's own uid. Descriptors: 0 to 2 the program's streams, 3 the channel to the
engine. What is said here is the program's word only: limits, times and kills are the engine's to know.

A cell is forked ahead of its request, and made ready for it (warmup.py): above all it becomes a process of its own
(`settle`). What the zygote prepares for all its cells is a `WarmState`.
"""

from __future__ import annotations
import __future__

import _thread
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

import _image  # type: ignore[import-not-found]  # beside this file, for the interpreter of the image
import channel  # type: ignore[import-not-found]
import toolcalls  # type: ignore[import-not-found]
from channel import CHANNEL

TYPE_CHECKING = False  # typing itself is not imported here: every cell would carry it
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

CO_NESTED = 0x10  # which a feature of 2.1 still names
NAME_CHARACTERS = 256
INT_END = 1 << 31
# The syntax tree as objects takes up to 250 bytes a character: of a longer source no last expression's value is kept.
TREE_CHARACTERS = 256 << 10
FUTURES = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names} - {CO_NESTED})
USER_DIRECTORIES = ("/code/", "/workspace/", "/tmp/", "/dev/shm/")  # noqa: S108 - the cell's own
MESSAGE_CHARACTERS = 4096
TRACEBACK_CHARACTERS = 16384
RESULT_CHARACTERS = 32768
ENCODER = json.JSONEncoder(ensure_ascii=False)


def clip(text: str, characters: int) -> str:
    """*text*, its middle replaced by a mark when it is longer than *characters*."""
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"


def is_users(filename: str) -> bool:
    """Whether a frame of *filename* belongs to the user's own code."""
    if filename.startswith("<"):
        return not filename.startswith("<frozen")
    return filename.startswith(USER_DIRECTORIES)


def small(number: object) -> int | None:
    """*number* when it is an int of the frame's range, else None: attributes of an exception may hold anything."""
    return number if type(number) is int and 0 <= number < INT_END else None


def without_ours(trace: types.TracebackType | None) -> types.TracebackType | None:
    """*trace* from the user's first frame on, and not into a tool's call."""
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    one = trace
    while one is not None and one.tb_next is not None:
        if one.tb_next.tb_frame.f_code.co_filename in (toolcalls.FILE, toolcalls.__file__):
            one.tb_next = None
        one = one.tb_next
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
        self.source: str | None = request.get("code")
        self.exit_code = 0
        self.error: dict[str, Any] | None = None
        self.results: list[dict[str, str]] = []
        self.last_loaded = next(reversed(sys.modules))
        self.collections = collections()
        module = self.module = types.ModuleType("__main__")
        module.__dict__.update(__file__=self.path, __builtins__=builtins, __cached__=None, __annotations__={})
        sys.modules["__main__"] = module
        self.names = module.__dict__
        if "tools" in request:
            self.names["tools"] = toolcalls.module(request["tools"])
        sys.argv = [self.path, *request["args"]]
        sys.orig_argv[1:] = sys.argv
        environment = request["env"]
        if environment:
            os.environ.update(environment)
            if "TZ" in environment:
                time.tzset()

    def execute(self) -> None:
        """Compile and run; the value of a last expression is kept when the caller wants results."""
        source, self.source = self.source, None
        if source is None:
            with io.open_code(self.path) as file:
                # The engine wrote text as UTF-8: a coding cookie, which may say otherwise, counts only for bytes.
                source = file.read().decode()
        body, last = self.compiled(source.removeprefix("\ufeff"))
        del source
        if body is not None:
            exec(body, self.names)  # noqa: S102 - what a cell is for
        if last is None:
            return
        value = eval(last, self.names)  # noqa: S307 - as above
        if value is not None:
            self.results.append({"text/plain": clip(repr(value), RESULT_CHARACTERS)})

    def compiled(self, source: str) -> tuple[types.CodeType | None, types.CodeType | None]:
        """What is to be executed, and then the expression whose value is wanted; either may be missing."""
        if self.wants_results and len(source) <= TREE_CHARACTERS:
            found = self.cut(source) or self.split(source)
            if found is not None:
                return found
        return compile(source, self.path, "exec", dont_inherit=True), None

    def cut(self, source: str) -> tuple[types.CodeType | None, types.CodeType] | None:
        """The lines before the last, and that as an expression, when each stands for itself; else nothing, and a tree
        has to tell, which takes ten times as long.
        """
        text = source.rstrip(" \t\n\f")
        start = text.rfind("\n") + 1
        line = text[start:]
        # What could warn of a mistake (an escape sequence) before it turns out to be no expression is left to the tree.
        if line[:1].isspace() or "\\" in line or ";" in line or "\r" in text:
            return None
        try:
            last = compile("\n" * text.count("\n", 0, start) + line, self.path, "eval", dont_inherit=True)
            if start == 0:
                return None, last
            body = compile(text[:start], self.path, "exec", dont_inherit=True)
        except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
            return None  # if it is an error there too, it is said there
        return None if body.co_flags & FUTURES else (body, last)

    def split(self, source: str) -> tuple[types.CodeType, types.CodeType] | None:
        """The program without its last expression, and that; nothing when there is none, or when only the compiler
        itself, which goes deeper than a tree of objects may, can tell what is wrong with it.
        """
        try:
            tree: Any = compile(source, self.path, "exec", flags=ast.PyCF_ONLY_AST, dont_inherit=True)
            if not tree.body or not isinstance(tree.body[-1], ast.Expr):
                return None
            last = ast.Expression(tree.body.pop().value)
            return (
                compile(tree, self.path, "exec", dont_inherit=True),
                compile(last, self.path, "eval", dont_inherit=True),
            )
        except (RecursionError, MemoryError):
            return None

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
        if os.getpid() == SELF.pid:
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
        self.join_threads()
        self.guard(atexit._run_exitfuncs)
        self.join_threads()
        self.flush()
        self.guard(self.let_go)
        self.flush()

    def join_threads(self) -> None:
        """Wait for threads that are no daemons. Where none was started there is nothing to wait for, and the look of
        every pool at its queues, which a library may have brought along, is saved.
        """
        if _thread._count() or thread_exits() != SELF.thread_exits:
            self.guard(threading._shutdown)  # type: ignore[attr-defined]

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
        # What no collection has seen yet is all of the youngest generation. A full one also empties the free lists.
        gc.collect(0 if collections() == self.collections else 2)

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

    def finished(self) -> bytes:
        """The frame that says how it ended."""
        frame = {"exit_code": self.exit_code, "error": self.error, "results": self.results}
        data = ENCODER.encode(frame).encode("utf-8", "backslashreplace")
        limit = RESULT_CHARACTERS
        while len(data) > channel.FINISHED_BYTES and limit > 64:
            limit //= 2
            if self.error:
                self.error["traceback"] = clip(self.error["traceback"], limit)
                self.error["message"] = clip(self.error["message"], limit)
            self.results[:] = [{kind: clip(text, limit) for kind, text in one.items()} for one in self.results]
            data = ENCODER.encode(frame).encode("utf-8", "backslashreplace")
        return data

    def report(self) -> None:
        """Send it. A child of the program that came this far says nothing: the program is its parent."""
        if os.getpid() == SELF.pid and os.path.samestat(os.fstat(CHANNEL), SELF.channel):
            os.write(CHANNEL, self.finished())  # else descriptor 3 is a file of the program's own by now


def collections() -> int:
    """How often the garbage collector has run."""
    return sum(one["collections"] for one in gc.get_stats())


def thread_exits() -> int:
    """How many functions, of pools for instance, wait for the end of the main thread."""
    return len(getattr(threading, "_threading_atexits", ()))


class WarmState:
    """What the zygote has found out for its cells.

    *hooks*: what libraries registered for os.fork(), as keyword arguments of os.register_at_fork; *states*: address and
    length of each random generator's state that may be filled with random bytes; *reseed*: what else draws numbers
    anew; *warmup*: the statements of the operator's warm-up, if cells are to have done it themselves; *hurry*: a run
    waits for this very cell.
    """

    def __init__(self, hooks: list[dict[str, Callable[[], object]]]) -> None:
        self.hooks = hooks
        self.states: list[tuple[int, int]] = []
        self.reseed: list[Callable[[], object]] = []
        self.warmup: list[types.CodeType] = []
        self.hurry = False

    def repeat(self, source: str) -> None:
        """Have cells run *source* before they are parked, statement by statement."""
        for statement in ast.parse(source, "<warmup>").body:
            self.warmup.append(compile(ast.Module([statement], []), "<warmup>", "exec"))

    def run_warmup(self, stop: Callable[[], bool]) -> bool:
        """Run it in names that are thrown away. False when *stop* said so in between."""
        names = {"__name__": "__warmup__"}
        for statement in self.warmup:
            if stop():
                return False
            try:
                exec(statement, names)  # noqa: S102 - the operator's own text
            except Exception:
                break  # it ran once, in the zygote; the rest would lack what this was to make
        return True


class SelfId:
    """What tells the cell's own process and channel from those that its program may make: set once in each cell."""

    pid = 0
    thread_exits = 0
    channel: os.stat_result


SELF = SelfId()


def needed(hook: Callable[[], object]) -> bool:
    """Whether a library's hook does anything for a cell. No lock is held when the zygote forks, and of threads and
    random numbers `settle` takes care.
    """
    owner = getattr(hook, "__self__", None)
    return not (
        getattr(hook, "__module__", None) in ("threading", "random", "logging")
        or type(owner).__module__ in ("_thread", "random", "threading")
    )


def settle(state: WarmState) -> None:
    """Make the process one of its own: nothing that it draws or calls itself is shared with another cell.

    The interpreter ran no library's at-fork hook, as the zygote kept them from it; a fork of the program's runs them.
    """
    SELF.pid = os.getpid()
    SELF.channel = os.fstat(CHANNEL)
    SELF.thread_exits = thread_exits()
    threading.main_thread()._set_native_id()  # type: ignore[attr-defined]
    for address, length in state.states:
        _image.fill_random(address, length)
    for again in state.reseed:
        again()
    for hooks in state.hooks:
        os.register_at_fork(**hooks)
        if "after_in_child" in hooks and needed(hooks["after_in_child"]):
            try:
                if "before" in hooks:
                    hooks["before"]()
                hooks["after_in_child"]()
            except Exception:  # noqa: S112 - as the interpreter does with it, and nobody is there to be told
                continue


def main(ready: Callable[[], None]) -> None:
    """From the fork to the end of the process; never returns. *ready* prepares it for a program, see warmup.park()."""
    code = 1
    program = None
    try:
        ready()
        program = Program(channel.receive_program(CHANNEL))
        program.run()
        code = program.exit_code
        program.report()
    except BaseException:
        # The channel was closed by the program, or memory is gone: the wait status must do.
        code = code or (program.exit_code if program else 1)
    finally:
        os._exit(code)
