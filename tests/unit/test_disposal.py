"""What may be slow to close is closed by other threads, and each owner waits for its own."""

from __future__ import annotations

import os
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from sandboxd._util import disposal
from sandboxd.protocol import packets
from tests.support.leftovers import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two connected ends; neither waits for ever."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.settimeout(10)
        theirs.settimeout(10)
        yield ours, theirs


class Stuck:
    """Stands for close(2): a descriptor in *fds* blocks until ``release``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *fds: int) -> None:
        self.release = threading.Event()
        self._fds = fds
        self._real = disposal._end
        monkeypatch.setattr(disposal, "_end", self._end)

    def _end(self, fd: int) -> None:
        if fd in self._fds:
            self.release.wait(10)
        self._real(fd)


def closers() -> int:
    """How many threads close."""
    return sum(thread.name == "sandboxd-close" for thread in threading.enumerate())


def null() -> int:
    """A descriptor that is no memfd."""
    return os.open(os.devnull, os.O_RDONLY)


def test_a_stuck_close_holds_up_its_owner_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    held = null()
    stuck = Stuck(monkeypatch, held)
    disposal.close(held, "one")
    for _ in range(50):
        disposal.close(null(), "one")
    for _ in range(50):
        disposal.close(null(), "other")
    eventually(lambda: disposal.pending("other") == 0, 5, "the other's are closed")
    assert disposal.pending("one") == 51
    assert closers() <= 2
    stuck.release.set()
    eventually(lambda: disposal.pending("one") == 0 and closers() == 0, 5, "all are closed")


def test_closing_threads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [null() for _ in range(40)]
    stuck = Stuck(monkeypatch, *held)
    for number, fd in enumerate(held):
        disposal.close(fd, number)
    assert closers() == disposal._THREADS
    stuck.release.set()
    eventually(lambda: not any(map(disposal.pending, range(40))) and closers() == 0, 5, "all are closed")


def test_without_threads_descriptors_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        disposal.close(null(), "one")
        assert disposal.pending("one") == 1
    disposal.close(null(), "two")
    eventually(lambda: disposal.pending("one") + disposal.pending("two") == 0, 5, "both are closed")


@pytest.mark.parametrize("lead", [None, b"", b"x" * 30_000], ids=["alone", "behind-empty", "behind-large"])
def test_closing_a_socket_closes_unread_descriptors_elsewhere(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, lead: bytes | None
) -> None:
    if lead is not None:
        pair[0].send(lead)
    fd = null()
    socket.send_fds(pair[0], [b""], [fd])
    os.close(fd)
    number = pair[1].fileno()
    stuck = Stuck(monkeypatch, number)
    disposal.close_socket(pair[1], "one")
    assert pair[1].fileno() == -1
    assert disposal.pending("one") == 1
    with pytest.raises(BrokenPipeError):
        pair[0].send(b"more")
    stuck.release.set()
    eventually(lambda: disposal.pending("one") == 0, 5, "closed")


def test_closing_a_socket_with_nothing_unread_needs_no_thread(pair: Pair) -> None:
    packets.send(pair[1], {"a": 1})
    disposal.close_socket(pair[1], "one")
    assert closers() == 0
    packet = packets.receive(pair[0])
    assert packet is not None
    assert packet.message == {"a": 1}
    assert packets.receive(pair[0]) is None
    disposal.close_socket(pair[1], "one")
