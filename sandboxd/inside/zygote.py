"""The zygote: an interpreter that imports and warms what a policy names, then forks cells until its engine is gone.

Runs as root of its own user namespace, in its own pid, mount, net, ipc and uts namespaces on the read-only root, with
an empty environment but for a few fixed variables; descriptor 3 is the engine's. It is executed as a script by the
image's interpreter and imports the standard library and one native object. No byte that a tenant sent ever comes here:
a cell reads its program after the fork, in its own process.
"""

import gc
import io
import json
import os
import sys

ENGINE = 3
PACKET = 1 << 18


def say(message: dict[str, object]) -> None:
    """One packet to the engine."""
    os.write(ENGINE, json.dumps(message).encode())


def absent(names: list[str]) -> list[str]:
    """Those of *names* whose top-level package is not installed: all at once, before the slow imports begin."""
    if not names:
        return []
    from importlib.util import find_spec

    return [name for name in names if name not in sys.modules and find_spec(name.partition(".")[0]) is None]


def preload(names: list[str], warmup: str) -> None:
    """Import *names* and run *warmup* in a namespace that is thrown away; the first failure is the engine's to
    explain.
    """
    step = ""
    try:
        missing = absent(names)
        if missing:
            say({"ok": False, "step": "preload", "missing": missing, "error": ""})
            os._exit(1)
        for step in names:
            __import__(step)
        if warmup:
            step = "warmup"
            exec(compile(warmup, "<warmup>", "exec"), {"__name__": "__warmup__"})  # noqa: S102 - the operator's own text
    except BaseException as error:
        # Also SystemExit and KeyboardInterrupt: a library that ends the zygote has failed to load.
        missing = [error.name] if isinstance(error, ModuleNotFoundError) and error.name else []
        say({"ok": False, "step": step, "missing": missing, "error": f"{type(error).__name__}: {error}"[:2000]})
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
            if fd > ENGINE:
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


def main() -> bool:
    """Prepare, report, serve. True in a cell, False in the zygote at its end."""
    config = json.loads(os.read(ENGINE, PACKET))
    filter_program = os.read(ENGINE, PACKET)
    preload(config["preload"], config["warmup"])
    # Streams exist before the fork and are the same objects after it, on other files.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a TextIOWrapper: nothing else has come yet
    renew_stdin()
    sys.path[0] = "/workspace"
    for name in ("_cell", "program"):
        del sys.modules[name]
    threads = len(os.listdir("/proc/self/task"))
    landlock_abi = _cell.prepare(filter_program, config["walls_down"])
    kept = let_go()
    gc.freeze()  # last: what lives now is shared by all cells, and their collector leaves its pages alone
    say(
        {
            "ok": True,
            "landlock_abi": landlock_abi,
            "threads": threads,
            "kept": kept,
            "version": list(sys.version_info[:3]),
        }
    )
    in_cell: bool = _cell.serve(ENGINE)
    return in_cell


if __name__ == "__main__":
    import _cell  # type: ignore[import-not-found]  # beside this file, for the interpreter of the image
    import program  # type: ignore[import-not-found]

    if main():
        program.main()
    os._exit(0)
