"""Host ids for user namespaces: who may take which block, and how a block is kept to one engine.

Each engine maps one block of host ids into the user namespaces of its zygotes. Inside, 0 is the zygote, 1 the inits of
the cells, and 1000 + slot the cell in that slot, so that no two live cells share an id, whether they belong to one
engine or to two. A block counts as uids and as gids alike.

Where a block comes from, in this order (as root):

1. the configured range, ``base:count``;
2. the ranges that both /etc/subuid and /etc/subgid hold for ``root`` (by name or number);
3. the range FALLBACK below, which no allocator is known to hand out.

An engine of another user takes its own subordinate ids, and has its own locks: ``rootless``. Blocks that overlap a
login id, another user's subordinate ids (3 only) or that this user namespace does not map are passed over.

Sources: user_namespaces(7), subuid(5), fcntl_locking(2); systemd, "Users, Groups, UIDs and GIDs on systemd Systems"
(systemd.io/UIDS-GIDS).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from sandboxd._util.closeable import Closing
from sandboxd.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from _typeshed import StrPath

ZYGOTE_ID = 0
INIT_ID = 1
FIRST_CELL_ID = 1000
MAX_SLOTS = 4096

FALLBACK_BLOCK = 65_536
"""Blocks of the fallback range are aligned to this, so that the upper 16 bits name the block."""

EXPLICIT_BLOCK = 8_192
"""A range that somebody granted is scarce (65,536 ids as a rule): cut like this it serves eight engines, each with
every slot (1000 + MAX_SLOTS ids)."""

MIN_BLOCK = 2_048
"""A granted range smaller than EXPLICIT_BLOCK is used whole, down to this size: 1,048 slots."""

LOCK_FILE = "/run/sandboxd-ids.lock"

OWNER = "root"


@dataclass(frozen=True, slots=True)
class IdRange:
    """*count* consecutive ids from *base* on."""

    base: int
    count: int

    @property
    def end(self) -> int:
        """The first id after the range."""
        return self.base + self.count

    def overlaps(self, other: IdRange) -> bool:
        """Whether an id lies in both."""
        return self.base < other.end and other.base < self.end

    def contains(self, other: IdRange) -> bool:
        """Whether every id of *other* lies in this range."""
        return self.base <= other.base and other.end <= self.end


# 0x00080000-0x6FFFFFFF is systemd-nspawn's and 0x7FFE0000-0x7FFEFFFF systemd's foreign-image range (UIDS-GIDS); above
# 2^31 parts of the kernel read ids as negative numbers (same source). SSSD hands Active Directory users ids up to
# 2,000,200,000 = 0x7738A140 (sssd-ldap(5), ldap_idmap_range_max): hence not from 0x70000000 on.
FALLBACK = IdRange(0x78000000, 0x7FFE0000 - 0x78000000)

# (uid_t) -1 is no id, nor is (uint16_t) -1; 65534 stands for whatever has no mapping. UIDS-GIDS, "Special Linux UIDs".
_INVALID = IdRange(0xFFFF_FFFF, 1)
_SPECIAL = IdRange(65_534, 2)


@dataclass(frozen=True, slots=True)
class SlotIds:
    """The ids of one block: *base* is the host id of the namespace's 0, *capacity* the number of slots."""

    base: int
    capacity: int = MAX_SLOTS
    shared: bool = False
    """Whether there is but one id, the namespace's 0, for all of them."""

    def __post_init__(self) -> None:
        if not 0 < self.capacity <= MAX_SLOTS:
            raise ValueError(f"capacity must lie in 1..{MAX_SLOTS}, not {self.capacity}")

    @property
    def guest_uids(self) -> range:
        """guest_uid() of every slot."""
        return range(0) if self.shared else range(FIRST_CELL_ID, FIRST_CELL_ID + self.capacity)

    def guest_uid(self, slot: int) -> int:
        """The id of the cell in *slot* as its own user namespace shows it; the gid is the same number.

        Raises ValueError when there is no such slot.
        """
        if not 0 <= slot < self.capacity:
            raise ValueError(f"slot must lie in 0..{self.capacity - 1}, not {slot}")
        return 0 if self.shared else FIRST_CELL_ID + slot

    def host_uid(self, slot: int) -> int:
        """The id of the cell in *slot* as the host shows it. Raises ValueError when there is no such slot."""
        return self.base + self.guest_uid(slot)


class IdBlock(Closing):
    """A claimed block of host ids: this process's own until close() or its death, then free at once.

    The descriptor behind it is close-on-exec; a child forked without exec must close its copy, for it keeps the claim.
    """

    def __init__(
        self,
        block: IdRange,
        fds: Iterable[int],
        *,
        gid: int | None = None,
        helpers: bool = False,
        shared: Unavailable | None = None,
    ) -> None:
        """*fds* hold the locks. *gid* is the first gid where it is not the first uid's number."""
        self._range = block
        self._fds = list(fds)
        self._gid = block.base if gid is None else gid
        self.helpers = helpers
        """Whether newuidmap and newgidmap write the maps."""
        self.shared = shared
        """Why all cells share one id; None when each has its own."""

    @property
    def base(self) -> int:
        """The first host id: what 0 of the user namespace maps to."""
        return self._range.base

    @property
    def count(self) -> int:
        """How many consecutive ids the block holds."""
        return self._range.count

    @property
    def uid_map(self) -> str:
        """The line for /proc/PID/uid_map."""
        return f"0 {self.base} {self.count}\n"

    @property
    def gid_map(self) -> str:
        """The line for /proc/PID/gid_map."""
        return f"0 {self._gid} {self.count}\n"

    def slots(self, wanted: int = MAX_SLOTS) -> SlotIds:
        """The block's slot ids: *wanted* of them, or as many as the block has."""
        if self.shared is not None:
            return SlotIds(self.base, min(wanted, MAX_SLOTS), shared=True)
        return SlotIds(self.base, min(wanted, MAX_SLOTS, self.count - FIRST_CELL_ID))

    def close(self) -> None:
        """Give the block back. Every process that used its ids must be gone. Idempotent."""
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)

    def __repr__(self) -> str:
        return f"IdBlock({self.base}:{self.count})"


# Pure: parsing and planning


def parse_subordinate(text: str) -> list[tuple[str, IdRange]]:
    """The entries (owner, range) of the text of /etc/subuid or /etc/subgid, in order.

    The owner is a login name or a number in decimal. Lines that are not ``owner:base:count`` with a positive count are
    left out, as newuidmap(1) leaves them.
    """
    entries: list[tuple[str, IdRange]] = []
    for line in text.splitlines():
        fields = line.strip().split(":")
        if len(fields) != 3 or not fields[0] or not all(_is_number(field) for field in fields[1:]):
            continue
        base, count = int(fields[1]), int(fields[2])
        if count > 0 and base + count <= 1 << 32:
            entries.append((fields[0], IdRange(base, count)))
    return entries


def parse_config(text: str) -> IdRange:
    """The range that ``base:count`` names. Raises ValueError with the reason, worded for the operator."""
    base_text, colon, count_text = text.strip().partition(":")
    if not colon or not _is_number(base_text) or not _is_number(count_text):
        raise ValueError(f"ids must be spelled 'base:count' in decimal, as in '1000000:65536', not {text!r}")
    found = IdRange(int(base_text), int(count_text))
    if found.count < MIN_BLOCK:
        raise ValueError(f"ids needs at least {MIN_BLOCK} consecutive ids, not {found.count}")
    if found.base < 1000 or found.end > _INVALID.base:
        raise ValueError(f"ids must lie in 1000..{_INVALID.base - 1}, not {found.base}..{found.end - 1}")
    if found.overlaps(_SPECIAL):
        raise ValueError(f"ids must leave out 65534 (nobody) and 65535, not {found.base}..{found.end - 1}")
    return found


def parse_id_map(text: str) -> list[IdRange]:
    """The ids that are valid in the reader's user namespace, from the text of its /proc/self/uid_map."""
    rows = (line.split() for line in text.splitlines())
    return [IdRange(int(row[0]), int(row[2])) for row in rows if len(row) == 3]


def intersect(left: Iterable[IdRange], right: Sequence[IdRange]) -> list[IdRange]:
    """The ranges of ids that are in both lists."""
    common: list[IdRange] = []
    for one in left:
        for other in right:
            base, end = max(one.base, other.base), min(one.end, other.end)
            if base < end:
                common.append(IdRange(base, end - base))
    return common


def cut(source: IdRange, size: int) -> Iterator[IdRange]:
    """*source* in consecutive blocks of *size*; whole when it is smaller but has MIN_BLOCK; a remainder is dropped."""
    return cut_all([source], size, 0)


def cut_all(sources: Iterable[IdRange], size: int, start: int) -> Iterator[IdRange]:
    """What cut() makes of each of *sources*, from block number *start*, modulo how many there are, round to its start.

    Made one by one: a range may hold thousands of blocks, and the first is free as a rule.
    """
    cuts = [
        (range(source.base, source.end - width + 1, width), width)
        for source in sources
        if (width := min(size, source.count)) >= MIN_BLOCK
    ]
    start %= sum(len(bases) for bases, _ in cuts) or 1
    later, earlier = [], []
    for bases, width in cuts:
        later.append((bases[start:], width))
        earlier.append((bases[:start], width))
        start = max(0, start - len(bases))
    return (IdRange(base, width) for bases, width in (*later, *earlier) for base in bases)


def usable(blocks: Iterable[IdRange], mapped: Sequence[IdRange], taken: Sequence[IdRange]) -> Iterator[IdRange]:
    """Those of *blocks* that lie whole in one of *mapped* and touch none of *taken*."""
    for block in blocks:
        if any(area.contains(block) for area in mapped) and not any(block.overlaps(other) for other in taken):
            yield block


def login_ids(text: str) -> list[IdRange]:
    """The ids in the third column of the text of /etc/passwd or /etc/group."""
    rows = (line.split(":") for line in text.splitlines())
    return [IdRange(int(row[2]), 1) for row in rows if len(row) > 3 and _is_number(row[2])]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10


# The host


def subordinate_ranges(user: str | None = None, etc: StrPath = "/etc") -> tuple[list[IdRange], list[IdRange]]:
    """The subordinate uids and gids granted to *user* (default: the caller's), by name or by number.

    What newuidmap(1) would let that user map; empty lists when nothing is granted.
    """
    import pwd

    names = {user} if user is not None else {str(os.getuid())}
    try:
        entry = pwd.getpwnam(user) if user is not None else pwd.getpwuid(os.getuid())
        names |= {entry.pw_name, str(entry.pw_uid)}
    except KeyError:
        pass
    return (_granted(_read(etc, "subuid"), names), _granted(_read(etc, "subgid"), names))


def mapping_helpers() -> tuple[str | None, str | None]:
    """Where newuidmap and newgidmap are, None for one that is not installed: what a rootless engine needs."""
    import shutil

    # Of the system's own directories: whatever the caller's PATH is.
    return shutil.which("newuidmap", path=_HELPERS), shutil.which("newgidmap", path=_HELPERS)


_HELPERS = "/usr/bin:/bin:/usr/sbin:/sbin:/usr/local/bin:/run/wrappers/bin"


def claim(config: str | None = None, *, etc: StrPath = "/etc", lock_file: StrPath = LOCK_FILE) -> IdBlock:
    """Claim a block of host ids that no other engine of this host holds, for any number of cells.

    The claim is an open-file-description write lock on the block's own byte range of *lock_file*, one byte per id:
    blocks of different size conflict exactly when they overlap, and the kernel drops the lock with the last descriptor
    of the open file, so a killed engine leaves nothing behind but the empty file itself. That stays: were it unlinked,
    the next engine would lock another one. Engines that do not see the same /run (other containers) do not see each
    other's claims; their own id maps or *config* keep them apart.

    Runs in the user namespace in which the engine lives, as root; ``rootless`` is for other users. Raises Unavailable
    (stage ``ids``): EUSERS when every block is taken, ERANGE when this user namespace maps none of them or others own
    them all, EINVAL for a *config* that names no range, otherwise the errno of the lock file.
    """
    blocks, origin = _candidates(config, etc)
    first = next(blocks, None)
    if first is None:
        raise Unavailable(
            stage="ids",
            errno=errno.ERANGE,
            message=f"{origin}: no block of these ids is mapped in this user namespace and free of other users",
            fix="put a range that /proc/self/uid_map and gid_map cover and nobody uses, 65,536 ids or 8,192 at least, "
            "into /etc/subuid and /etc/subgid as 'root:BASE:COUNT', or into the daemon's configuration as 'ids'",
        )
    fd = _open_lock(os.fspath(lock_file))
    try:
        for block in chain((first,), blocks):
            if origin == FALLBACK_ORIGIN and known_to_nss(block.base):
                continue
            if _try_lock(fd, block):
                claimed = IdBlock(block, [fd])
                fd = -1
                return claimed
    finally:
        if fd >= 0:
            os.close(fd)
    raise exhausted(origin)


def exhausted(origin: str) -> Unavailable:
    """The error when other engines hold all of *origin*."""
    return Unavailable(
        stage="ids",
        errno=errno.EUSERS,
        message=f"{origin}: every block of these ids is held by a running engine",
        fix="close a Sandbox, or grant more ids (8,192 an engine) in /etc/subuid and /etc/subgid, or with 'ids' in the "
        "daemon's configuration",
    )


def lock_all(fds: Sequence[int], block: IdRange) -> bool:
    """Lock the bytes of *block* in every lock file; False, and in none of them, when one is held."""
    for count, fd in enumerate(fds):
        if not _try_lock(fd, block):
            for held in fds[:count]:
                fcntl.fcntl(
                    held, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, block.base, block.count, 0)
                )
            return False
    return True


def own_candidates(
    config: str | None, granted: Sequence[IdRange], etc: StrPath, size: int
) -> tuple[Iterator[IdRange], str]:
    """As ``_candidates``, in blocks of *size*, for a user whom *granted* is granted: nothing else can be mapped,
    configured or not.
    """
    mapped = intersect(_id_map("uid"), _id_map("gid"))
    taken = [*login_ids(_read(etc, "passwd")), *login_ids(_read(etc, "group"))]
    if config is None:
        return _offers(granted, size, mapped, taken), "what /etc/subuid and /etc/subgid grant"
    configured = _configured(config)
    allowed = [area for area in granted if area.contains(configured)]
    return _offers([configured] if allowed else [], size, mapped, taken), f"the configured range {config}"


def _configured(config: str) -> IdRange:
    try:
        return parse_config(config)
    except ValueError as error:
        raise Unavailable(
            stage="ids", errno=errno.EINVAL, message=str(error), fix="correct 'ids' in the configuration"
        ) from None


FALLBACK_ORIGIN = f"the range {FALLBACK.base}..{FALLBACK.end - 1}"


def _candidates(config: str | None, etc: StrPath) -> tuple[Iterator[IdRange], str]:
    """The blocks to try, in order, and the words for where they come from."""
    mapped = intersect(_id_map("uid"), _id_map("gid"))
    taken = [*login_ids(_read(etc, "passwd")), *login_ids(_read(etc, "group"))]
    if config is not None:
        return _offers([_configured(config)], EXPLICIT_BLOCK, mapped, taken), f"the configured range {config}"
    granted = intersect(*subordinate_ranges(OWNER, etc))
    if granted:
        origin = "what /etc/subuid and /etc/subgid grant to root"
        return _offers(granted, EXPLICIT_BLOCK, mapped, taken), origin
    taken += [area for name in ("subuid", "subgid") for _, area in parse_subordinate(_read(etc, name))]
    return _offers([FALLBACK], FALLBACK_BLOCK, mapped, taken), FALLBACK_ORIGIN


def _offers(
    areas: Sequence[IdRange], size: int, mapped: Sequence[IdRange], taken: Iterable[IdRange]
) -> Iterator[IdRange]:
    """The usable blocks of *areas*. Not from the first: processes of an engine that was just killed may need a moment
    to go.
    """
    near = [other for other in taken if any(other.overlaps(area) for area in areas)]
    return usable(cut_all(areas, size, os.getpid()), mapped, near)


def _granted(text: str, names: set[str]) -> list[IdRange]:
    return [area for owner, area in parse_subordinate(text) if owner in names]


def _id_map(kind: str) -> list[IdRange]:
    return parse_id_map(_read("/proc/self", f"{kind}_map"))


def _read(directory: StrPath, name: str) -> str:
    """The text of a file; empty when there is no such one (each of them is optional)."""
    try:
        with open(os.path.join(directory, name), encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def known_to_nss(identifier: int) -> bool:
    """Whether a directory service has a user with this id; UIDS-GIDS asks container managers to look at the first."""
    import pwd

    try:
        pwd.getpwuid(identifier)
    except KeyError:
        return False
    return True


def _open_lock(path: str) -> int:
    """Open, or make, the lock file: empty, regular, and root's alone, for who cannot open it cannot lock it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise Unavailable(
            stage="ids",
            errno=error.errno or errno.EIO,
            message=f"the lock file {path} cannot be opened",
            fix=f"remove what is there; {os.path.dirname(path)} must be a writable directory",
        ) from error
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077 or info.st_nlink != 1:
        os.close(fd)
        raise Unavailable(
            stage="ids",
            errno=errno.EPERM,
            message=f"the lock file {path} is not a regular file of root's with mode 0600 and one name",
            fix=f"remove {path}",
        )
    return fd


# struct flock of x86-64: l_type, l_whence, l_start, l_len, l_pid. An OFD lock wants l_pid 0, and belongs to the open
# file, not to the process: a second open in the same process conflicts as it should. Linux 3.15; fcntl_locking(2).
_FLOCK = struct.Struct("hhqqi4x")


def _try_lock(fd: int, block: IdRange) -> bool:
    """Lock the bytes of *block*. False when another open file holds one of them."""
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, block.base, block.count, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True
