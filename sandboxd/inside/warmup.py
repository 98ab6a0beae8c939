"""What a cell does before its program is there: it makes the memory its own that a run touches, and says so.

Runs in the cell, every wall up, except for the survey. A page is copied when a cell first writes to it, and a run would
wait for that. So a cell that nobody waits for goes through what a run goes through (`warm_up`), then through the
operator's warm-up, and is *parked* when its pages are there: the packet ``P``.

The zygote can find out beforehand which pages those are (`survey_cell`, `survey_warmup`, in children of its own that
never serve). Then a cell takes them all at once (_image.populate()) and runs nothing.
"""

from __future__ import annotations

import functools
import io
import json
import linecache
import os
import sys

import _image  # type: ignore[import-not-found]  # beside this file, for the interpreter of the image
import channel  # type: ignore[import-not-found]
from channel import CHANNEL
from program import Program, settle  # type: ignore[import-not-found]

TYPE_CHECKING = False  # typing itself is not imported here: every cell would carry it
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from program import WarmState

PROGRAMS = (
    "1+1",
    "for n in range(2):\n    print(n, f'{n:>2}')\n[str(n) for n in range(2)]",
    "def half(n):\n    return 1 / n\nhalf(0)",
)
PAGE_SHIFT = 12
NOTHING = bytes(16)  # a range that ends the part which a cell does before it is parked
STEP_SECONDS = 10  # for a statement of the warm-up that does not end
FORESEEN = 2  # of the programs; a traceback alone takes half a megabyte, and whoever waits for one has time


def warm_up(stop: Callable[[], bool]) -> bool:
    """Run small programs through all that a program goes through, with nothing to be seen of it afterwards: caches of
    the interpreter are filled, pages are this process's own. False when *stop* said so in between.
    """
    main, streams = sys.modules["__main__"], (sys.stdout, sys.stderr)
    argv, orig_argv = sys.argv, sys.orig_argv[:]
    path = "/code/main.py"
    try:
        for source in PROGRAMS:
            if stop():
                return False
            sys.stdout = sys.stderr = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", line_buffering=True)
            request = {"args": [], "env": {}, "filename": "main.py", "results": True, "code": source}
            one = Program(json.loads(json.dumps(request)))
            try:
                one.execute()
            except ZeroDivisionError as error:
                one.ended_by(error)
            one.flush()
            one.let_go()
            one.finished()
    finally:
        sys.modules["__main__"] = main
        sys.stdout, sys.stderr = streams
        sys.argv, sys.orig_argv[:] = argv, orig_argv
        linecache.cache.pop(path, None)
    return True


def has_request() -> bool:
    """Whether the engine has spoken, or is gone."""
    waiting: bool = _image.waiting(CHANNEL)
    return waiting


def park(state: WarmState) -> None:
    """Become a process of its own; unless the request is there, make ready what every run touches and say so."""
    # The pages that the zygote foresaw, all at once, before the first of them is missed.
    populated = not has_request() and _image.populate(CHANNEL)
    settle(state)
    if state.hurry:
        return
    if not populated:
        if not warm_up(has_request):
            return
        if not state.run_warmup(has_request):
            return
    if populated and not has_request():
        _image.populate(CHANNEL)  # what the warm-up touches: as long as nobody waits
    if not has_request():
        os.write(CHANNEL, channel.PARKED)  # last: what is used from now on is the run's


def warm_up_all(state: WarmState, messages: list[bytes]) -> None:
    """What every cell does, from its settling to its frame, with the programs of *messages*. Descriptors 1 and 2 lead
    nowhere, 3 back to itself.
    """
    settle(state)
    for message in messages:
        os.write(CHANNEL, message)
        one = Program(channel.receive_program(CHANNEL))
        one.run()
        one.report()
        os.read(CHANNEL, channel.PACKET_BYTES)


def foreseen() -> list[bytes]:
    """Small programs as the engine hands them over; made beforehand, for no cell makes such a message."""
    return [channel.program_message((), {}, "main.py", True, source) for source in PROGRAMS[:FORESEEN]]


def touched(step: Callable[[], object]) -> tuple[set[int], set[int]]:
    """Which pages a child makes its own and which it maps while it does *step*, by number; none when that fails."""
    own: set[int] = set()
    mapped: set[int] = set()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            sys.modules["_signal"].alarm(STEP_SECONDS)
            step()
            _image.record(write)
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        data = file.read()
    os.waitpid(pid, 0)
    words = memoryview(data[: len(data) & ~15]).cast("Q")
    for start, end in zip(words[::2], words[1::2], strict=True):
        (own if start & 1 else mapped).update(range(start >> PAGE_SHIFT, end >> PAGE_SHIFT))
    return own, mapped


def survey_cell(state: WarmState) -> bytes:
    """In a child of the zygote that serves nobody: what every cell will touch, in the form of _image.record()."""
    messages = foreseen()
    own, mapped = touched(lambda: warm_up_all(state, messages))
    return b"".join((*as_ranges(own, 1), *as_ranges(mapped - own, 0)))


def survey_warmup(state: WarmState, most: int) -> bytes:
    """In such a child: what the warm-up touches beyond that, behind the mark of a new part; enough to make *most* own
    pages in all: those that many of its statements need, the first of them above all.
    """
    messages = foreseen()
    own, mapped = touched(lambda: warm_up_all(state, messages))
    wanted: dict[int, float] = {}
    seen: dict[int, int] = {}
    names = {"__name__": "__warmup__"}
    for rank, statement in enumerate(state.warmup, 1):
        step = functools.partial(exec, statement, names)
        its_own, its_mapped = touched(step)
        for page in its_own:
            wanted[page] = wanted.get(page, 0.0) + 1 / rank
        for page in its_mapped:
            seen[page] = seen.get(page, 0) + 1
        try:
            step()
        except Exception:
            break  # as in a cell
    warm = {page for page in wanted if page not in own}
    if len(warm) > most - len(own):
        warm = set(sorted(warm, key=wanted.__getitem__, reverse=True)[: max(0, most - len(own))])
    known = own | mapped | warm
    warm_mapped = {page for page, count in seen.items() if count > 1 and page not in known}
    return b"".join((NOTHING, *as_ranges(warm, 1), *as_ranges(warm_mapped, 0)))


def as_ranges(pages: set[int], mark: int) -> Iterator[bytes]:
    """*pages* as ranges of addresses, *mark* in the lowest bit of each start."""
    start = end = -1
    for page in [*sorted(pages), -1]:
        if page != end:
            if end > start:
                yield (start << PAGE_SHIFT | mark).to_bytes(8, "little") + (end << PAGE_SHIFT).to_bytes(8, "little")
            start = page
        end = page + 1


def load_survey(fd: int) -> int:
    """Have cells take from now on what a survey found, which comes over *fd*; closed here. How many pages that is."""
    try:
        pages: int = _image.load_survey(fd)
        return pages
    finally:
        os.close(fd)
