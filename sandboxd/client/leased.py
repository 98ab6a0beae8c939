"""A run in the caller's thread: an embedded engine lent this process a parked cell (sandboxd/engine/clients/leases.py).

The source, the arguments and the answer go between this process and the cell without the engine in between: two
wake-ups instead of four. Whatever is not a program that ended at once, by its own word, leaving nothing behind, is
handed back to the engine in the middle, which carries it on: the answer then comes as any other.

This is the shortest way through the library, and much of it is cold when a request comes after a pause. So it does
little, and what belongs together is one call of C (native/engine/direct.c).
"""

from __future__ import annotations

import fcntl
import os
import select
import sys
import termios
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from sandboxd._native import ffi, lib
from sandboxd.cgroup.numbers import Numbers
from sandboxd.cgroup.reading import Reading
from sandboxd.client.result import Isolation, Result
from sandboxd.errors import ProtocolError
from sandboxd.inside import channel
from sandboxd.outcome.answer import Durations, answer, clean_exit_header, hit_no_limit
from sandboxd.outcome.collected import Collected
from sandboxd.outcome.collector import Collector
from sandboxd.outcome.judge import Evidence, ended_cleanly, limit_met, parse_finished
from sandboxd.protocol import cell_socket, packets
from sandboxd.protocol.operations import Operation

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence

__all__ = ["LeafView", "LeaseSlot", "LeasedCell", "message_of"]

MESSAGE_BYTES: Final = 48 << 10
"""One packet that any socket takes."""
FIRST_LOOK_SECONDS: Final = 0.0015
PATIENCE_SECONDS: Final = 0.01
"""What has not ended by then is the engine's to watch."""
SOURCE_BYTES: Final = 24 << 10
STREAM_BYTES: Final = 1 << 16
"""What a pipe holds, pipe(7), unless an operator's profile lets programs make theirs larger (F_SETPIPE_SZ)."""
FDS: Final = len(packets.LeaseFds._fields)


def message_of(source: str, args: Sequence[str], env: Mapping[str, str], results: bool) -> bytes:
    """What a cell is told to run."""
    return channel.program_message(list(args), dict(env), "main.py", results, source)


class LeafView:
    """One cgroup leaf, which serves one run after the other: its counters, by descriptors that the engine sent, and
    what is the same for all its runs.
    """

    def __init__(self, known: dict[str, Any], fds: list[int]) -> None:
        """Of a lease's message; the descriptors are this object's from now on."""
        self._fds = fds
        self.numbers = Numbers()
        self.reading = Reading.from_plain(known["reading"])
        self.limits: dict[str, Any] = known["limits"]
        self.isolation = Isolation.model_validate(known["isolation"])
        for (index, key), row in zip(known["numbers"], self.reading.rows, strict=True):
            self.numbers.add(fds[index], key, row.role, row.divisor)
        self.seen = ffi.new("struct sbx_lookback *")
        self.seen.numbers = self.numbers.cells
        self.seen.count = len(self.reading.rows)
        self._buffer = ffi.new("char[]", 2 * STREAM_BYTES + 2)
        self.seen.buffer = self._buffer
        self.seen.room = 2 * STREAM_BYTES + 2
        self._bytes = ffi.buffer(self._buffer)

    def streams(self) -> tuple[bytes, bytes]:
        """What the last look found in stdout and stderr."""
        out, err = self.seen.out_length, self.seen.err_length
        return self._bytes[0:out], self._bytes[out : out + err]

    def close(self) -> None:
        """Close the descriptors."""
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)


class LeasedCell:
    """One parked cell, lent to this process: ``start`` and ``finish`` once, then ``close``."""

    __slots__ = ("_fds", "_leaf", "_raw", "_reading", "_setup", "_started", "handed_over", "identity")

    def __init__(self, message: dict[str, Any], fds: list[int], leaf: LeafView) -> None:
        """Of a lease's message; the descriptors are this object's from now on, the leaf stays the connection's."""
        self.identity: str = message["lease"]
        self._reading = replace(leaf.reading, before=tuple(message["before"]))
        self._leaf = leaf
        self._fds: packets.LeaseFds | None = packets.LeaseFds(*fds)
        self._raw = (b"", b"")
        self._started = self._setup = 0.0
        self.handed_over = False

    def start(self, source: bytes, message: bytes) -> None:
        """Set the engine's alarm and hand the program over."""
        begun = time.monotonic()
        fds = self._fds
        assert fds is not None  # noqa: S101
        text, packet = ffi.from_buffer("char[]", source), ffi.from_buffer("char[]", message)
        given = ffi.new(
            "struct sbx_handover *",
            (fds.alarm, fds.source, fds.channel, int(PATIENCE_SECONDS * 1e9), text, packet, len(source), len(message)),
        )
        self._started = time.monotonic()
        self.handed_over = lib.sbx_hand_over(given) >= 0  # refused: the cell is dead; the engine will say why
        self._setup = self._started - begun

    def finish(self, sock: socket.socket) -> Result | None:
        """The Result, when it ended at once and cleanly; None when the engine was asked to carry it on. Raises OSError
        when the engine is gone.
        """
        frame = self._frame()
        result = self._clean(frame) if frame else None
        if result is not None:
            packets.send(sock, {"op": Operation.DONE, "lease": self.identity, "status": result.status})
            return result
        payload = [*self._raw, frame]
        sizes = dict(zip(("stdout", "stderr", "frame"), map(len, payload), strict=True))
        ago = time.monotonic() - self._started
        packets.send(sock, {"op": Operation.TAKE, "lease": self.identity, "seconds": ago, **sizes}, payload)
        return None

    def _frame(self) -> bytes:
        """The finished frame; b"" when none came in time, or the cell is dead."""
        assert self._fds is not None  # noqa: S101
        end = self._fds.channel
        poll = select.poll()
        poll.register(end, select.POLLIN)
        for patience in (FIRST_LOOK_SECONDS, PATIENCE_SECONDS):
            while poll.poll(max(0.0, self._started + patience - time.monotonic()) * 1000):
                try:
                    data = cell_socket.read(end)  # one packet; not blocking, by the engine's setting
                except BlockingIOError:
                    continue
                except (OSError, cell_socket.Descriptors):
                    return b""
                if data != channel.PARKED:
                    return data
            if self._is_stuck():
                return b""
        return b""

    def _is_stuck(self) -> bool:
        """Whether a stream is so full that the program may be waiting for its reader. Source: FIONREAD, pipe(7)."""
        assert self._fds is not None  # noqa: S101
        for fd in (self._fds.stdout, self._fds.stderr):
            held = fcntl.ioctl(fd, termios.FIONREAD, bytes(4))
            if int.from_bytes(held, sys.byteorder) > STREAM_BYTES // 2:
                return True
        return False

    def _clean(self, frame: bytes) -> Result | None:
        """What *frame* and the counters come to, when nothing is left for the engine to find out."""
        run = time.monotonic() - self._started
        leaf = self._leaf
        seen = leaf.seen
        fds = self._fds
        assert fds is not None  # noqa: S101
        seen.out, seen.err = fds.stdout, fds.stderr
        seen.workspace, seen.tmp, seen.shm = fds.workspace, fds.tmp, fds.shm
        looked = lib.sbx_look_back(seen)
        self._raw = out, err = leaf.streams()
        try:
            values = leaf.numbers.values()
            finished = parse_finished(frame)
        except (ProtocolError, OSError):
            return None
        if looked < 0 or seen.full:
            return None
        counters, limits = self._reading.counters(values), leaf.limits
        cause = limit_met(limits, run, counters, len(out), len(err))
        if not ended_cleanly(finished, cause, self._reading.tasks(values), not seen.touched):
            return None
        keep = int(limits["output_bytes"])
        seconds = Durations(0.0, self._setup, run)
        if not finished.exit_code and len(out) <= keep and len(err) <= keep and hit_no_limit(counters):
            header = clean_exit_header(self.identity, finished.results, counters, (out, err), seconds)
            return Result.assembled(header, (out, err), leaf.isolation)
        outputs = (Collector(keep), Collector(keep))
        for collector, data in zip(outputs, (out, err), strict=True):
            if data:
                collector.add(data)
        evidence = Evidence(None, None, finished, counters, limits, run, len(out), len(err))
        told = answer(self.identity, evidence, outputs, Collected(), seconds, True, None)
        return Result.assembled(told.header, told.texts, leaf.isolation)

    def close(self) -> None:
        """Close what the engine sent; the cell lives and dies by the engine's word."""
        fds, self._fds = self._fds, None
        if fds is not None:
            lib.sbx_close_all(fds, len(fds))


class LeaseSlot:
    """What one connection was lent: the present lease, and the leaves that it knows by name."""

    def __init__(self) -> None:
        self.lease: LeasedCell | None = None
        self.used: LeasedCell | None = None
        """The one whose program runs; a fork may come in the middle of it."""
        self._leaves: dict[int, LeafView] = {}

    def take(self, message: dict[str, Any], fds: list[int]) -> None:
        """A lease's message. Raises ProtocolError; its descriptors are closed then."""
        self.drop()
        try:
            known = message.get("known")
            if known is not None:
                if len(self._leaves) >= packets.LEAVES:
                    self._forget()
                self._leaves[message["leaf"]] = LeafView(known, fds[FDS:])
                del fds[FDS:]
            if len(fds) != FDS:
                raise ProtocolError("A lease came with other descriptors than it should.")
            self.lease = LeasedCell(message, fds, self._leaves[message["leaf"]])
        except BaseException as error:
            for fd in fds:
                os.close(fd)
            if isinstance(error, KeyError | TypeError | ValueError | IndexError):
                raise ProtocolError(f"A lease is not one: {error!r}.") from None
            raise

    def revoke(self, identity: object) -> None:
        """The engine took it back."""
        if self.lease is not None and self.lease.identity == identity:
            self.drop()

    def drop(self) -> None:
        """Use none."""
        lease, self.lease = self.lease, None
        if lease is not None:
            lease.close()

    def close(self) -> None:
        """The connection is over."""
        self.drop()
        if self.used is not None:
            self.used.close()
        self._forget()

    def _forget(self) -> None:
        leaves, self._leaves = self._leaves, {}
        for leaf in leaves.values():
            leaf.close()
