"""What cells inherit from imports and the warm-up, and must not: threads, and memory that is mapped MAP_SHARED.

Runs in the zygote, before it serves. fork(2) takes only the calling thread along, and a lock that another one holds
stays locked in every cell: a zygote does not start with a second thread. And fork does not copy what is mapped
MAP_SHARED: what one cell writes there, every later cell reads. So each such mapping that is writable, or that
mprotect(2) could make writable, is replaced by a private copy of its content at the same address. A cell finds there
what the zygote left, and keeps its writes to itself; so do processes that it forks. Where a copy would not do, the
start ends with an error:

    memory of a device or of the kernel (io_uring, perf), and huge pages: a copy means nothing, or cannot be made
    an object that is mapped twice: what is written through one mapping must appear in the other
    more than ROOM_BYTES in all, or pages that cannot be read, such as those beyond the end of a file

Mappings that can never become writable stay shared. So do those that fork leaves out (MADV_DONTFORK): no cell has them.
No descriptor leads a cell back to the shared memory, since it has none of the zygote's.
"""

import os
import sys
import time

import _image  # type: ignore[import-not-found]  # beside this file, for the interpreter of the image

TYPE_CHECKING = False  # typing itself is not imported here: every cell would carry it
if TYPE_CHECKING:
    from collections.abc import Iterator

TASKS = "/proc/self/task"
ALONE = 3  # links of that directory while there is one thread: two of its own, and one for each
ENDING_SECONDS = 0.5  # the kernel shows a thread for a moment after it was joined
ROOM_BYTES = 256 << 20
NAME_CHARACTERS = 200
READ, WRITE, EXECUTE = 1, 2, 4
# VmFlags of smaps, proc_pid_smaps(5): device memory, raw frames, both mixed, huge pages, watched by userfaultfd.
EXTRAORDINARY = frozenset({b"io", b"pf", b"mm", b"ht", b"um", b"uw", b"ui"})
MAY_WRITE, NOT_FORKED = b"mw", b"dc"


class Area:
    """One mapping of an *object*: a file, or shared memory, which to the kernel is a file, too."""

    def __init__(self, words: list[bytes]) -> None:
        """*words* are those of its line in maps or smaps."""
        start, _, end = words[0].partition(b"-")
        self.start, self.end = int(start, 16), int(end, 16)
        self.is_shared = words[1][3:] == b"s"
        bits = zip((READ, WRITE, EXECUTE), (b"r", b"w", b"x"), strict=True)
        self.protection = sum(bit for bit, letter in bits if letter in words[1])
        self.offset = int(words[2], 16)
        self.object = words[3], words[4]  # device and inode
        self.name = os.fsdecode(words[5].rstrip(b"\n"))[:NAME_CHARACTERS] if len(words) > 5 else "shared memory"
        self.flags: frozenset[bytes] = frozenset()

    @property
    def is_writable_by_cells(self) -> bool:
        """Whether what one cell writes there would appear in another."""
        return self.is_shared and MAY_WRITE in self.flags and NOT_FORKED not in self.flags

    def can_become_writable(self) -> bool:
        """Whether mprotect(2) makes it writable, as far as that can be told without smaps."""
        may: bool = _image.can_become_writable(self.start, self.end, self.protection)
        return may

    def overlaps(self, other: "Area") -> bool:
        """Whether both map some byte of the same object."""
        return (
            self.object == other.object
            and self.offset < other.offset + other.end - other.start
            and other.offset < self.offset + self.end - self.start
        )


def shared_areas() -> "Iterator[Area]":
    """Every mapping of this process that is shared; without flags, which maps does not have."""
    with open("/proc/self/maps", "rb") as file:
        for line in file:
            if b"s " in line[:64]:  # rarely, and most lines need not be taken apart
                words = line.split(None, 5)
                if words[1][3:] == b"s":
                    yield Area(words)


def mappings_of(objects: set[tuple[bytes, bytes]]) -> list[Area]:
    """Every mapping of one of *objects* in this process, shared or private, with its flags. The kernel takes ten times
    as long for smaps as for maps.
    """
    found = []
    last = None
    with open("/proc/self/smaps", "rb") as file:
        for line in file:
            if line[:1] in b"0123456789abcdef":  # every other line begins with a capital letter
                words = line.split(None, 5)
                last = Area(words) if (words[3], words[4]) in objects else None
                if last is not None:
                    found.append(last)
            elif last is not None and line.startswith(b"VmFlags:"):
                last.flags = frozenset(line.split()[1:])
    return found


def memory_devices() -> set[bytes]:
    """The device numbers, as maps spells them, of file systems that hold memory only: every tmpfs, and the kernel's
    own, which has memfds, System V segments and anonymous shared memory.
    """
    memfd = os.memfd_create("sandboxd-probe", os.MFD_CLOEXEC)
    device = os.fstat(memfd).st_dev
    os.close(memfd)
    pairs = {(os.major(device), os.minor(device))}
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            words = line.split()
            if words[words.index(b"-") + 1] == b"tmpfs":
                major, _, minor = words[2].partition(b":")
                pairs.add((int(major), int(minor)))
    return {b"%02x:%02x" % pair for pair in pairs}


class Watch:
    """Knows after which step of the start, an import or the warm-up, a thread or a shared mapping was first there."""

    def __init__(self) -> None:
        self.step = ""
        self.threads: dict[str, str] = {}
        self.shared: dict[tuple[bytes, bytes], str] = {}

    def look(self, step: str) -> None:
        """Ascribe what has come since the last look to *step*."""
        self.step = step
        threads = os.listdir(TASKS) if os.stat(TASKS).st_nlink != ALONE else []
        self.threads = {thread: self.threads.get(thread, step) for thread in threads}
        self.shared = {area.object: self.shared.get(area.object, step) for area in shared_areas()}

    def other_threads(self) -> list[dict[str, str]]:
        """The threads besides this one that do not end within ENDING_SECONDS: the name of each, and its step."""
        deadline = time.monotonic() + ENDING_SECONDS
        while os.stat(TASKS).st_nlink != ALONE:
            if time.monotonic() > deadline:
                break
            time.sleep(0.001)
        else:
            return []
        self.look(self.step)
        threading = sys.modules.get("threading")
        named = {str(one.native_id): one.name for one in threading.enumerate()} if threading else {}
        found = []
        for thread, step in self.threads.items():
            if int(thread) == os.getpid():
                continue
            try:
                with open(f"{TASKS}/{thread}/comm", encoding="utf-8", errors="replace") as file:
                    name = file.read().rstrip("\n")
            except OSError:
                continue  # it has ended just now
            found.append({"step": step, "name": named.get(thread, name)[:NAME_CHARACTERS]})
        return found

    def make_private(self) -> list[dict[str, str]]:
        """Replace every mapping that cells would share and could write to. Returns those that could not be replaced:
        the name of each, why, and its step. This must be the only thread.
        """
        shared = list(shared_areas())
        objects = {area.object for area in shared if area.protection & WRITE or area.can_become_writable()}
        if not objects:
            return []
        mappings = mappings_of(objects)
        memory = memory_devices()
        room = ROOM_BYTES
        refused = []
        for area in mappings:
            if not area.is_writable_by_cells:
                continue
            room -= area.end - area.start
            why = ""
            if area.object[0] not in memory or EXTRAORDINARY & area.flags:
                why = "it is not ordinary memory"
            elif any(area.overlaps(other) for other in mappings if other is not area):
                why = "it is mapped twice"
            elif room < 0:
                why = f"there are more than {ROOM_BYTES >> 20} MiB of it"
            else:
                try:
                    _image.make_private(area.start, area.end, area.protection)
                except OSError as error:
                    why = f"its pages cannot be copied ({error.strerror})"
            if why:
                refused.append({"step": self.shared.get(area.object, self.step), "name": area.name, "why": why})
        return refused
