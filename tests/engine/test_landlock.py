"""What Landlock can do since some version of its ABI: leave the host's audit alone (7), cover pathname sockets (9)."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import pytest

from sandboxd import Sandbox
from sandboxd.diagnostics import host_facts
from sandboxd.kernel.calls import landlock_abi
from sandboxd.seccomp.syscalls import NUMBERS
from tests.attacks.base import attempt
from tests.support import leftovers
from tests.support.interpose import Interposed
from tests.support.modes import ROOT
from tests.support.patience import SLOWER

if TYPE_CHECKING:
    from collections.abc import Iterator

LOG_SAME_EXEC_OFF, LOG_SUBDOMAINS_OFF = 1 << 0, 1 << 2
SECCOMP, ANOM_ABEND, LANDLOCK_ACCESS, LANDLOCK_DOMAIN = 1326, 1701, 1423, 1424
READLOG = 1  # AUDIT_NLGRP_READLOG
WRITABLE = ("/workspace", "/tmp", "/dev/shm")

needs_log_flags = pytest.mark.skipif(landlock_abi() < 7, reason="needs Landlock's ABI 7, Linux 6.15")


@needs_log_flags
@pytest.mark.only(ROOT)
def test_every_domain_of_an_engine_is_kept_out_of_the_audit() -> None:
    """From its start to the end of a run: by whomever of its processes."""
    with Interposed({"landlock_restrict_self": NUMBERS["landlock_restrict_self"]}) as engine:
        engine.watch()
        engine.start(pool=leftovers.UNPARKED)
        assert engine.run()["status"] == "ok"
        calls = engine.seen()
    assert {one.role for one in calls} == {"cell"}
    assert {one.arguments[1] for one in calls} == {LOG_SAME_EXEC_OFF | LOG_SUBDOMAINS_OFF}


# The audit


class Record(NamedTuple):
    """One record of the kernel's audit: its type and text."""

    kind: int
    text: str

    @property
    def domain(self) -> str | None:
        """Which Landlock domain it is about, if any."""
        found = re.match(r"audit\(\S+\): domain=(\w+)", self.text)
        return found[1] if found and self.kind in (LANDLOCK_ACCESS, LANDLOCK_DOMAIN) else None


class Listener:
    """CellEvents all records, as a reader of the kernel's own multicast group: audit(7) needs no daemon for that."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, host_facts.NETLINK_AUDIT)
        self._socket.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
        self._socket.bind((0, 1 << READLOG - 1))
        self._socket.settimeout(10 * SLOWER)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def until_denied(self, path: Path) -> list[Record]:
        """The records up to the one that tells of a denial of *path*. Raises TimeoutError when none comes."""
        found: list[Record] = []
        while True:
            data = self._socket.recv(1 << 16)
            # The length in the header leaves out the header.
            found.append(Record(struct.unpack_from("=IH", data)[1], data[16:].rstrip(b"\0").decode()))
            if found[-1].kind == LANDLOCK_ACCESS and f'path="{path}"' in found[-1].text:
                return found


@pytest.fixture
def listener() -> Iterator[Listener]:
    enabled = False
    with contextlib.suppress(OSError):
        enabled = host_facts.audit_enabled()
    if not enabled:
        pytest.skip("needs a host whose audit is on")
    with Listener() as made:
        yield made


RESTRICTED = f"""
import ctypes, os, struct, sys

libc = ctypes.CDLL(None, use_errno=True)

def restrict(flags):
    attributes = struct.pack("Q", 1 << 1)  # LANDLOCK_ACCESS_FS_WRITE_FILE, granted nowhere
    ruleset = libc.syscall({NUMBERS["landlock_create_ruleset"]}, attributes, 8, 0)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if ruleset < 0 or libc.syscall({NUMBERS["landlock_restrict_self"]}, ruleset, flags) < 0:
        sys.exit(f"Landlock: errno {{ctypes.get_errno()}}")

def denied(path):
    try:
        os.close(os.open(path, os.O_WRONLY))
    except PermissionError:
        return
    sys.exit(f"{{path}} could be opened")
"""


def denied_outside(path: Path, flags: int) -> None:
    """A program of the host's restricts itself with *flags* and is denied *path*."""
    path.touch()
    code = f"{RESTRICTED}\nrestrict(int(sys.argv[1]))\ndenied(sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, str(flags), str(path)], check=True, timeout=60)


# What Landlock alone refuses in a cell: no other wall forbids to write to this device.
DENIED_IN_A_CELL = f"""{RESTRICTED}
import subprocess
for _ in range(200):
    denied("/dev/urandom")
subprocess.run(["/bin/sh", "-c", "exec 2> /dev/null; echo > /dev/urandom"])
for flags in (0, 1 << 1):  # its own domain, to be logged; after execve(2) too
    if os.fork() == 0:
        open("/tmp/own", "w").close()
        restrict(flags)
        denied("/tmp/own")
        os.execv("/bin/sh", ["sh", "-c", "exec 2> /dev/null; echo > /tmp/own"])
    os.wait()
print("all denied")
"""


@needs_log_flags
@pytest.mark.newest
@pytest.mark.only(ROOT)
def test_denials_in_a_cell_are_no_records_of_the_audit(sandbox: Sandbox, listener: Listener, tmp_path: Path) -> None:
    first, silent, last = (tmp_path / name for name in ("first", "silent", "last"))
    denied_outside(first, 0)  # which the listener sees: else it would prove nothing
    begin = listener.until_denied(first)[-1]
    result = sandbox.run(DENIED_IN_A_CELL)
    assert (result.status, result.stdout) == ("ok", "all denied\n"), result.stderr
    denied_outside(silent, LOG_SAME_EXEC_OFF)
    denied_outside(last, 0)
    *between, end = listener.until_denied(last)
    assert None is not begin.domain != end.domain is not None
    assert {one.domain for one in between} <= {None, begin.domain}
    assert not [one for one in between if one.kind == LANDLOCK_ACCESS]


@needs_log_flags
@pytest.mark.newest
@pytest.mark.only(ROOT)
def test_kills_by_the_filter_and_crashes_are_records_of_the_audit(
    sandbox: Sandbox, listener: Listener, tmp_path: Path
) -> None:
    """As `sandboxd doctor` says."""
    last = tmp_path / "last"
    x32 = f"import ctypes; ctypes.CDLL(None).syscall({NUMBERS['getpid'] | 1 << 30})"
    assert sandbox.run(x32).status == "denied"
    assert sandbox.run("import os; os.abort()").status == "killed"
    denied_outside(last, 0)
    assert {SECCOMP, ANOM_ABEND} <= {one.kind for one in listener.until_denied(last)}
    (fact,) = (one for one in host_facts.facts() if one.name == "audit")
    assert (fact.value, fact.state) == ("on", "attention")


# Pathname sockets


@contextlib.contextmanager
def open_to_everybody() -> Iterator[Path]:
    """A directory of the environment that cells see, with a stream and a datagram socket of mode 0777."""
    place = Path(tempfile.mkdtemp(prefix=".sandboxd-sockets-", dir=os.path.realpath(sys.prefix)))
    try:
        place.chmod(0o755)
        with socket.socket(socket.AF_UNIX) as stream, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
            for server, name in ((stream, "stream"), (datagram, "datagram")):
                server.bind(str(place / name))
                (place / name).chmod(0o777)
            stream.listen()
            yield place
    finally:
        shutil.rmtree(place)


@pytest.mark.skipif(landlock_abi() < 9, reason="needs Landlock's ABI 9, Linux 7.1")
@pytest.mark.newest
@pytest.mark.only(ROOT)
def test_socket_in_the_environment_that_is_open_to_everybody_is_refused(sandbox: Sandbox) -> None:
    connect = "socket.socket(socket.AF_UNIX).connect(BAIT + '/stream')"
    send = "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', BAIT + '/datagram')"
    with open_to_everybody() as place, Sandbox(_walls_down=["landlock"]) as lowered:
        for code in (connect, send):
            assert attempt(sandbox, code, {"BAIT": str(place)}) == "EACCES"
            assert attempt(lowered, code, {"BAIT": str(place)}) == "done"  # no other wall stands before it


@pytest.mark.newest
@pytest.mark.parametrize("place", WRITABLE)
def test_sockets_of_a_program_s_own_can_be_reached(sandbox: Sandbox, place: str) -> None:
    code = f"""
    import os, socket, sys
    with socket.socket(socket.AF_UNIX) as stream, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
        stream.bind("{place}/stream")
        stream.listen()
        datagram.bind("{place}/datagram")
        client = '''if True:
            import socket
            socket.socket(socket.AF_UNIX).connect("{place}/stream")
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"x", "{place}/datagram")
        '''
        exec(client)
        status = os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", client])
        print(status, stream.accept() and stream.accept() and "two came", datagram.recv(9) + datagram.recv(9))
    """
    result = sandbox.run("if True:\n" + code)
    assert (result.status, result.stdout) == ("ok", "0 two came b'xx'\n"), result.stderr
