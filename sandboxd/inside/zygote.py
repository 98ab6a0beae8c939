"""The zygote: an interpreter that imports and warms what a policy names, then forks cells until its engine is gone.

Runs as root of its own user namespace, in its own pid, mount, net, ipc and uts namespaces on the read-only root, with
an empty environment but for a few fixed variables; descriptor 3 is the engine's. It is executed as a script by the
image's interpreter and imports the standard library and one native object. No byte that a tenant sent ever comes here:
a cell reads its program after the fork, in its own process.

What takes long and changes nothing for a program is done beside the imports, or while cells are served already, in
children that no cell ever comes from: the list of fonts, and what the warm-up touches (`survey_pages`).

What a cell costs is the memory of this process: page tables to copy, pages to copy when they are written. So small
objects are gathered in one place while libraries are imported, the whole is moved into a sealed memfd afterwards
(native/inside/image.c), and libraries' at-fork hooks, which would run in each cell, are kept from the interpreter. What
cells would share and could write to is made private, or ends the start (inherited.py).
"""

import gc
import io
import json
import os
import sys

TYPE_CHECKING = False  # typing itself is not imported here: every cell would carry it
if TYPE_CHECKING:
    from collections.abc import Callable

ENGINE = 3
NURSERY = 4
IN_A_HURRY, READABLE = 2, 3  # what _cell.serve() returns in a cell for which a run waits, and in the zygote
WARM = (5).to_bytes(4, sys.byteorder) + bytes(24)  # struct sbx_event
PACKET = 1 << 18
MT19937_BYTES = 624 * 4
OWN_BYTES = 5_500_000  # of a parked cell that has a warm-up; a few hundred kilobytes more it has anyway
SURVEY_SECONDS = 30
MANY_OBJECTS = 50_000  # young ones that a collection waits for while libraries are imported: they keep what they make
REFUSED = 20  # threads or mappings that an error names at most
SPECIALISED = 8  # runs after which the interpreter has adapted a function's code (3.11: quickened after eight)

hooks: "list[dict[str, Callable[[], object]]]" = []
real_register_at_fork = os.register_at_fork


def say(message: dict[str, object]) -> None:
    """One packet to the engine."""
    os.write(ENGINE, json.dumps(message).encode())


def note_at_fork(**given: "Callable[[], object]") -> None:
    """Stands in for os.register_at_fork() while libraries are imported."""
    if not given or not given.keys() <= {"before", "after_in_child", "after_in_parent"}:
        real_register_at_fork(**given)  # says what is wrong
    hooks.append(given)


def absent(names: list[str]) -> list[str]:
    """Those of *names* whose top-level package is not installed: all at once, before the slow imports begin."""
    if not names:
        return []
    from importlib.util import find_spec

    return [name for name in names if name not in sys.modules and find_spec(name.partition(".")[0]) is None]


def list_fonts(names: list[str]) -> int:
    """Where matplotlib is among *names*, and there is another CPU, have a child make its list of fonts, which it finds
    in /tmp then: opening them all takes a tenth of a second. Returns the child, or 0.
    """
    if "matplotlib" not in (name.partition(".")[0] for name in names) or len(os.sched_getaffinity(0)) < 2:
        return 0
    pid = os.fork()
    if pid == 0:
        try:
            __import__("matplotlib.font_manager")
        finally:
            os._exit(0)  # what is wrong is told by the import in the zygote
    return pid


def preload(names: list[str], warmup: str, fonts: int, watch: "inherited.Watch") -> None:
    """Import *names*, matplotlib when the child *fonts* has ended, and run *warmup* in a namespace that is thrown away;
    *watch* looks at what each step leaves. The first failure is the engine's to explain.
    """
    step = ""
    try:
        missing = absent(names)
        if missing:
            say({"ok": False, "step": "preload", "missing": missing, "error": ""})
            os._exit(1)
        for step in names:
            if fonts and step.partition(".")[0] == "matplotlib":
                os.waitpid(fonts, 0)
                fonts = 0
            __import__(step)
            watch.look(step)
        if warmup:
            step = "warmup"
            exec(compile(warmup, "<warmup>", "exec"), {"__name__": "__warmup__"})  # noqa: S102 - the operator's own text
            watch.look(step)
    except BaseException as error:
        # Also SystemExit and KeyboardInterrupt: a library that ends the zygote has failed to load.
        missing = [error.name] if isinstance(error, ModuleNotFoundError) and error.name else []
        say({"ok": False, "step": step, "missing": missing, "error": f"{type(error).__name__}: {error}"[:2000]})
        os._exit(1)


def refuse(kind: str, found: list[dict[str, str]]) -> None:
    """End the start if anything was *found* that no cell may inherit: ``threads``, or ``shared`` memory. The engine
    puts it into words.
    """
    if found:
        say({"ok": False, kind: found[:REFUSED]})
        os._exit(1)


def let_go() -> list[str]:
    """Have libraries give up what a cell cannot inherit; what other descriptors remain, as link texts.

    matplotlib keeps fonts with their files open, and drops them by an at-fork hook: in a cell, where the descriptors
    are closed already, that costs a millisecond and prints an error for each.
    """
    fonts = sys.modules.get("matplotlib.font_manager")
    if fonts is not None:
        fonts._get_font.cache_clear()
    gc.collect()
    kept = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            if fd > NURSERY:
                kept.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue  # the listing's own
    return kept


def renew_stdin() -> None:
    """Make ``sys.stdin`` while descriptor 0 is a pipe, as it will be in a cell: whether a file can seek is asked
    once.
    """
    read, write = os.pipe()
    null = os.dup(0)
    os.dup2(read, 0)
    raw = io.FileIO(0, closefd=False)
    raw.name = "<stdin>"
    sys.stdin = io.TextIOWrapper(io.BufferedReader(raw), encoding="utf-8", errors=sys.stdout.errors)
    sys.stdin.mode = "r"  # type: ignore[misc]
    sys.__stdin__ = sys.stdin  # type: ignore[misc]
    os.dup2(null, 0)
    for fd in (read, write, null):
        os.close(fd)


def find_randomness(state: "program.WarmState") -> None:
    """Have every random source that is loaded start anew in each cell.

    OpenSSL does so by itself: it compares pids, and a cell's is never the zygote's. numpy's legacy generator takes 150
    page faults for its own seed(); its state may be filled with any random bits instead.
    """
    modules = sys.modules
    if "random" in modules:
        state.reseed.append(modules["random"].seed)
    if "numpy.random" in modules:
        numpy_random = modules["numpy.random"]
        try:
            name, key, _, _, _ = numpy_random.mtrand._rand.get_state()
            numpy_random.mtrand._rand.seed()  # forgets the zygote's seed sequence too
            numpy_random.mtrand._rand.set_state((name, key, len(key), 0, 0.0))
            generator = numpy_random.mtrand._rand._bit_generator
            if name != "MT19937" or key.nbytes != MT19937_BYTES:
                raise ValueError(name)
            state.states.append((generator.ctypes.state_address, key.nbytes))
        except (AttributeError, TypeError, ValueError):
            state.reseed.append(numpy_random.seed)
    if "tempfile" in modules:
        modules["tempfile"]._name_sequence = None  # type: ignore[attr-defined]
    if "uuid" in modules:
        for name in ("_last_timestamp", "_last_timestamp_v7", "_last_counter_v7"):
            if getattr(modules["uuid"], name, None) is not None:
                setattr(modules["uuid"], name, None)


def survey_pages(survey: "Callable[[], bytes]") -> "tuple[int, int]":
    """Have a child find out by *survey* what cells will touch. Returns the child, and what warmup.load_survey() reads
    that from; nothing comes when it is not to be had here, or takes too long.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            null = os.open(os.devnull, os.O_RDWR)
            itself = os.open(f"/proc/self/fd/{os.pipe()[0]}", os.O_RDWR)
            for fd, number in ((null, 1), (null, 2), (itself, ENGINE), (null, NURSERY)):
                os.dup2(fd, number)
            sys.modules["_signal"].alarm(SURVEY_SECONDS)
            left = memoryview(survey())
            while left:
                left = left[os.write(write, left) :]
        finally:
            os._exit(1)
    os.close(write)
    return pid, read


def main() -> "program.WarmState | None":
    """Prepare, report, serve. What the zygote found out in a cell, None in the zygote at its end."""
    config = json.loads(os.read(ENGINE, PACKET))
    filters = os.read(ENGINE, PACKET), os.read(ENGINE, PACKET)
    wants_memfd = config.get("image") != "anonymous"
    fonts = list_fonts(config["preload"])
    if wants_memfd:
        _image.gather_heap()
    state = program.WarmState(hooks)
    watch = inherited.Watch()
    usual, seldom = gc.get_threshold(), (MANY_OBJECTS, *gc.get_threshold()[1:])
    gc.set_threshold(*seldom)
    preload(config["preload"], config["warmup"], fonts, watch)
    if gc.get_threshold() == seldom:  # else a library has chosen its own
        gc.set_threshold(*usual)
    if config["warmup"] and config.get("rehearsal"):
        state.repeat(config["warmup"])
    # Streams exist before the fork and are the same objects after it, on other files.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a TextIOWrapper: nothing else has come yet
    renew_stdin()
    sys.path[0] = "/workspace"
    sys.path_importer_cache.pop("/workspace", None)
    for name in ("_cell", "_image", "channel", "inherited", "program", "toolcalls", "warmup"):
        del sys.modules[name]
    find_randomness(state)
    os.register_at_fork = sys.modules["posix"].register_at_fork = real_register_at_fork  # type: ignore[attr-defined]
    kept = let_go()
    refuse("threads", watch.other_threads())
    gc.freeze()  # what lives now is shared by all cells, and their collector leaves its pages alone
    for _ in range(SPECIALISED):
        warmup.warm_up(lambda: False)
    gc.collect()
    gc.freeze()
    refuse("shared", watch.make_private())
    image = "memfd" if _image.share_heap(wants_memfd) else "anonymous"
    pages = 0
    if image == "memfd":
        child, found = survey_pages(lambda: warmup.survey_cell(state))
        pages = warmup.load_survey(found)
        os.waitpid(child, 0)
    landlock_abi = _cell.prepare(*filters, config["walls_down"])
    found = -1
    if pages and state.warmup:
        most = config.get("own_bytes", OWN_BYTES) >> 12
        _, found = survey_pages(lambda: warmup.survey_warmup(state, most))
    say(
        {
            "ok": True,
            "landlock_abi": landlock_abi,
            "open_fds": kept,
            "version": list(sys.version_info[:3]),
            "image": image,
            "pages": pages,
            "learning": found >= 0,
        }
    )
    forked: int = _cell.serve(ENGINE, NURSERY, found)
    if forked == READABLE:
        warmup.load_survey(found)  # its child is reaped as cells are
        os.write(ENGINE, WARM)
        forked = _cell.serve(ENGINE, NURSERY)
    state.hurry = forked == IN_A_HURRY
    return state if forked else None


if __name__ == "__main__":
    # Nothing that is imported above registers a hook.
    os.register_at_fork = sys.modules["posix"].register_at_fork = note_at_fork  # type: ignore[assignment,attr-defined]

    import _cell  # type: ignore[import-not-found]  # beside this file, for the interpreter of the image
    import _image  # type: ignore[import-not-found]
    import inherited  # type: ignore[import-not-found]
    import program  # type: ignore[import-not-found]
    import warmup  # type: ignore[import-not-found]

    given = main()
    if given is not None:
        program.main(lambda: warmup.park(given))
    os._exit(0)
