"""The synthetic /etc of an image: what libraries look for there, and nothing else of the host's.

Pure but for reads through HostTree: the result is a list of files and symlinks that plan.py turns into operations.
Host files are copied by name from the lists below, when every user of the host may read them; all else (shadow,
machine-id, the host's users, names, resolvers, package managers' credentials) has no way in. No bind mount reaches the
host's /etc, so nothing added there later shows up inside.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, NamedTuple

from sandboxd.rootfs.hosttree import MAX_LINKS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sandboxd.ids.ranges import SlotIds
    from sandboxd.rootfs.hosttree import HostTree

HOSTNAME = "sandbox"
NOBODY = 65_534

MAX_FILE_BYTES = 4 << 20
MAX_TOTAL_BYTES = 16 << 20
MAX_NAMES = 2_048
"""Names read of one directory."""

# Files, by their path below /etc.
FILES = (
    "ld.so.cache",
    "ld.so.conf",
    "locale.alias",
    "matplotlibrc",  # Debian's system-wide one
    "mime.types",
    "os-release",
    "protocols",
    "services",
    "ssl/ca-bundle.pem",  # SUSE
    "ssl/cert.pem",  # Alpine
    "ssl/openssl.cnf",
    "pki/tls/cert.pem",  # Fedora and its kin, as the next one
    "pki/tls/openssl.cnf",
)

# Directories copied whole: regular files and symlinks. Private keys live beside some of them (ssl/private,
# pki/tls/private), never below. The number is how many levels of directories are read.
TREES = {
    "alternatives": 1,
    "crypto-policies/back-ends": 1,
    "fonts": 3,
    "ld.so.conf.d": 1,
    "pki/ca-trust/extracted/pem": 1,
    "pki/tls/certs": 1,
    "ssl/certs": 1,
}

# What may come of a tree, by the end of its name; everything where nothing is said.
SUFFIXES: dict[str, tuple[str, ...]] = {"ld.so.conf.d": (".conf",)}
# What does not. Manual pages: most of the alternatives of a Debian, and of no use to a program.
SKIPPED_SUFFIXES: dict[str, tuple[str, ...]] = {"alternatives": (".gz",)}

# The smallest time zone file, RFC 9636: one local time type, UTC, in both blocks, then the TZ string.
_UTC_BLOCK = b"".join(n.to_bytes(4, "big") for n in (0, 0, 0, 0, 1, 4)) + bytes(6) + b"UTC\0"
UTC = b"TZif2" + bytes(15) + _UTC_BLOCK + b"TZif2" + bytes(15) + _UTC_BLOCK + b"\nUTC0\n"


class EtcFile(NamedTuple):
    """A regular file, mode 0644. *path* is below /etc."""

    path: str
    data: bytes


class EtcLink(NamedTuple):
    """A symlink. *path* is below /etc."""

    path: str
    text: str


def passwd(slots: SlotIds) -> bytes:
    """/etc/passwd: root, nobody, and every id that a cell may have, all by the name "sandbox"."""
    lines = ["root:x:0:0:root:/root:/bin/sh", f"nobody:x:{NOBODY}:{NOBODY}:nobody:/nonexistent:/bin/false"]
    lines += [f"sandbox:x:{uid}:{uid}:sandbox:/workspace:/bin/sh" for uid in slots.guest_uids]
    return ("\n".join(lines) + "\n").encode()


def group(slots: SlotIds) -> bytes:
    """/etc/group, to go with passwd()."""
    lines = ["root:x:0:", f"nogroup:x:{NOBODY}:"]
    lines += [f"sandbox:x:{gid}:" for gid in slots.guest_uids]
    return ("\n".join(lines) + "\n").encode()


def invented(slots: SlotIds) -> list[EtcFile]:
    """The files that are the same whatever the host has."""
    return [
        EtcFile("passwd", passwd(slots)),
        EtcFile("group", group(slots)),
        EtcFile("hosts", f"127.0.0.1\tlocalhost {HOSTNAME}\n::1\tlocalhost {HOSTNAME}\n".encode()),
        EtcFile("hostname", f"{HOSTNAME}\n".encode()),
        EtcFile("nsswitch.conf", b"".join(b"%s: files\n" % name for name in _NSS_DATABASES)),
        EtcFile("resolv.conf", b""),
    ]


_NSS_DATABASES = (b"passwd", b"group", b"shadow", b"hosts", b"networks", b"protocols", b"services", b"ethers", b"rpc")


def content(host: HostTree, slots: SlotIds, visible: Callable[[str], bool]) -> list[EtcFile | EtcLink]:
    """The whole /etc. *visible* tells whether a real path of the host is bound into the image.

    A symlink of the host's is kept as one when its end is visible or copied too; a link from a named file to elsewhere
    in /etc becomes a copy of what it points to; other links are left out. So is, without a word, each copied file that
    is missing, too large or not for everyone: all of them are optional.
    """
    return [*invented(slots), EtcFile("localtime", _localtime(host)), *_Copies(host, visible).collect()]


def _localtime(host: HostTree) -> bytes:
    real = host.resolve("/etc/localtime")
    data = host.read(real, 64 << 10) if real is not None and real.startswith(("/usr/share/", "/etc/")) else None
    return data if data is not None and data.startswith(b"TZif") else UTC


class _Copies:
    """What is copied of the host's /etc, under one bound for all of it."""

    def __init__(self, host: HostTree, visible: Callable[[str], bool]) -> None:
        self._host = host
        self._visible = visible
        self._left_bytes = MAX_TOTAL_BYTES
        self._files: dict[str, bytes] = {}
        self._links: dict[str, str] = {}  # of trees: their texts
        self._shortcuts: dict[str, str] = {}  # of named files: where they end
        self._resolved: dict[str, _Directory | None] = {}  # as spelled in the texts
        self._ends: dict[str, bool] = {}  # outside of /etc: whether the image has them

    def collect(self) -> list[EtcFile | EtcLink]:
        for name in FILES:
            self._file(name)
        for tree, depth in TREES.items():
            self._tree(tree, SUFFIXES.get(tree, ("",)), SKIPPED_SUFFIXES.get(tree, ()), depth)
        kept = [EtcLink(path, text) for path, text in self._links.items() if self._leads_somewhere(path, text)]
        return [
            *(EtcFile(path, data) for path, data in self._files.items()),
            *(EtcLink(path, text) for path, text in self._shortcuts.items()),
            *kept,
        ]

    def _file(self, path: str) -> None:
        """A file wanted by name: what it ends at counts, wherever in /usr or /etc that is."""
        real = self._host.resolve(f"/etc/{path}")
        if real is None:
            return
        if self._visible(real):
            # Not the host's text: it may go through links of /etc that are not copied.
            self._shortcuts[path] = real
        elif real.startswith("/etc/"):
            self._copy(path, real)

    def _tree(self, path: str, suffixes: tuple[str, ...], skipped: tuple[str, ...], depth: int) -> None:
        if self._host.resolve(f"/etc/{path}") != f"/etc/{path}":
            return  # missing, or reached through a symlink that is not copied
        for name, kind in self._host.entries(f"/etc/{path}", MAX_NAMES):
            below = f"{path}/{name}"
            if kind == stat.S_IFDIR:
                if depth > 1:
                    self._tree(below, suffixes, skipped, depth - 1)
            elif name.endswith(skipped) or not name.endswith(suffixes):
                continue
            elif kind == stat.S_IFREG:
                self._copy(below, f"/etc/{below}")
            elif kind == stat.S_IFLNK:
                text = self._host.text(f"/etc/{below}")
                if text:
                    self._links[below] = text

    def _copy(self, path: str, real: str) -> None:
        data = self._host.read(real, min(MAX_FILE_BYTES, self._left_bytes))
        if data is not None:
            self._left_bytes -= len(data)
            self._files[path] = data

    def _leads_somewhere(self, path: str, text: str) -> bool:
        """Whether the image has what the copied symlink *path* ends at, and each link of /etc on the way.

        Most links share their directories with others and end one or two steps on: each directory is resolved once, and
        only the last component is looked up.
        """
        for _ in range(MAX_LINKS):
            above, _, name = text.rpartition("/")
            if text[0] == "/":
                spelled = above or "/"
            else:
                here = path.rpartition("/")[0]
                spelled = f"/etc/{here}/{above}" if above else f"/etc/{here}"
            directory = self._resolved[spelled] if spelled in self._resolved else self._directory(spelled)
            if directory is None:
                return False
            end = f"{directory.prefix}{name}"
            if name in ("", ".", ".."):
                return self._walks_inside(f"{spelled}/{name}")
            if not end.startswith("/etc/"):
                known = self._ends.get(end)
                if known is None:
                    kind = self._host.kind(end)
                    if kind == stat.S_IFLNK:
                        known = self._walks_inside(end)
                    else:
                        known = kind != 0 and (directory.visible or self._visible(end))
                    self._ends[end] = known
                return known
            path = end[len("/etc/") :]
            if path in self._files:
                return True
            if path not in self._links:
                return False
            text = self._links[path]
        return False

    def _directory(self, spelled: str) -> _Directory | None:
        """The directory that the path *spelled* leads to; None when the image's own path would not."""
        found = None
        try:
            walk = self._host.walk(f"{spelled.rstrip('/')}/.")
        except OSError:
            pass
        else:
            if self._has_all(walk.links):
                found = _Directory(f"{walk.real.rstrip('/')}/", self._visible(walk.real))
        self._resolved[spelled] = found
        return found

    def _walks_inside(self, path: str) -> bool:
        """_leads_somewhere() for any path, by a whole walk."""
        try:
            walk = self._host.walk(path)
        except OSError:
            return False
        return self._has_all(walk.links) and (
            self._visible(walk.real) or walk.real.removeprefix("/etc/") in self._files
        )

    def _has_all(self, links: Sequence[tuple[str, str]]) -> bool:
        """Whether those of *links*, as a Walk lists them, that lie in /etc are copied."""
        return all(where.removeprefix("/etc/") in self._links for where, _ in links if where.startswith("/etc/"))


class _Directory(NamedTuple):
    """A directory of the host. *prefix* is its real path with a slash behind."""

    prefix: str
    visible: bool
