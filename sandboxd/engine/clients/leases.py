"""Parked cells in the caller's hand: the request path of an embedded engine without the engine.

Theory of operation
    The caller of an embedded Sandbox is its engine's operator, and holds what the engine holds of one parked cell: the
    channel, the streams, the file systems, the source's file, the leaf's counters. It hands its program over itself
    and, when that ended at once and cleanly, reads the answer itself. The engine is told, and does what needs its
    rights and its clock:

        engine -> caller   lease, with descriptors: a parked cell, which has taken one of max_running's turns
        (the caller sets the alarm, a timerfd of the engine's that came along, and hands its program over)
        caller -> engine   done: it ended by its own word and left nothing; the cell dies, the next lease is on its way
                    or     take: anything else. What came so far is handed over, and the run goes on as any other
        (the alarm rings)  neither came within 10 ms: the clocks run from the time when it was set, OOM is watched
        engine -> caller   revoked: the lease is over before it was used: its turn was wanted, or it is stale

    Nothing of what the walls and limits do is the caller's: a limit that fires kills the cell here, and the caller
    finds the channel at its end and says "take". A daemon's clients never get a lease.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import struct
from typing import TYPE_CHECKING, Any, Final

from sandboxd._native import lib
from sandboxd.engine.cells.state import Event, State
from sandboxd.engine.runs.run import CellRun
from sandboxd.protocol import packets
from sandboxd.protocol.operations import Operation

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.engine.cells.active_policy import ActivePolicy
    from sandboxd.engine.cells.cell import Cell
    from sandboxd.engine.cells.resources import Resources
    from sandboxd.engine.runs.live import LiveRuns
    from sandboxd.engine.tally import Tally

__all__ = ["Lease", "Leases"]

log = logging.getLogger("sandboxd.engine")

ALARM_SECONDS: Final = 0.01


class Lease:
    """One cell that a caller may start a program in. As ``cell.RunEvents`` it hears what happens before that."""

    def __init__(self, leases: Leases, active: ActivePolicy, cell: Cell, identity: str, alarm: int) -> None:
        self._leases = leases
        self.active = active
        self.cell = cell
        self.identity = identity
        self.alarm = alarm
        self._started = False

    def spoke(self, data: bytes) -> None:
        """The caller reads the channel."""

    def wrote(self, number: int) -> None:
        """The caller reads the streams."""

    def ran_out(self) -> None:
        """Not watched yet."""

    def rang(self) -> None:
        """A program runs for ALARM_SECONDS already."""
        self._leases.start(ALARM_SECONDS)

    def is_started(self) -> bool:
        """Whether the caller has set the alarm. That it rang can be asked once, so the answer is kept."""
        self._started = self._started or lib.sbx_alarm_is_set(self.alarm) != 0
        return self._started

    def exited(self) -> None:
        """It died: while it waited, or with a program that the caller has handed over."""
        run = self._leases.begun()
        if run is not None:
            run.exited()
        else:
            self._leases.end()

    def lost(self) -> None:
        """The zygote is gone."""
        if self.is_started():
            self._leases.lost()
        else:
            self._leases.end()


class Leases:
    """One connection's: at most one lease that waits, or one run that was started in it."""

    def __init__(
        self,
        resources: Resources,
        live: LiveRuns,
        tally: Tally,
        current: Callable[[ActivePolicy], ActivePolicy | None],
        client: dict[str, Any],
        send: Callable[[bytes, list[int]], bool],
    ) -> None:
        """*current* is what serves a policy now; *send* delivers a packet with descriptors now: False when the peer's
        queue is full, or it has left.
        """
        self._resources = resources
        self._live = live
        self._tally = tally
        self._current = current
        self._client = client
        self._send = send
        self._leaves: dict[tuple[str, int], int] = {}
        self._known = 0
        self._active: ActivePolicy | None = None
        self.lease: Lease | None = None
        self.run: CellRun | None = None
        self._closed = False

    # Offering

    def want(self, active: ActivePolicy) -> None:
        """Offer a cell of *active*'s as soon as one is parked and nobody else wants it."""
        if self._active is not None and self._active is not active:
            self._active.pool.unlend(self)
        self._active = active
        if not self._closed and self.lease is None and self.run is None:
            active.pool.lend(self)

    def offer(self, cell: Cell) -> bool:
        """From the pool: *cell* is parked. False when it cannot be given: then it stays the pool's."""
        if self._closed or self.lease is not None or self.run is not None or not cell.leaf.counts:
            return False
        if self._active is None or not self._resources.admission.reserve(self):
            return False
        alarm = lib.sbx_alarm_new()
        lease = Lease(self, self._active, cell, secrets.token_hex(8), alarm)
        if alarm < 0 or not self._announce(lease):
            lib.sbx_close_all([alarm], 1)
            self._resources.admission.unreserve(self)
            return False
        cell.stop_reading()
        cell.attach(lease)
        cell.watch_alarm(alarm)
        self.lease = lease
        return True

    def _announce(self, lease: Lease) -> bool:
        active, cell = lease.active, lease.cell
        assert cell.fds is not None  # noqa: S101
        assert cell.channel is not None  # noqa: S101
        assert cell.slot is not None  # noqa: S101
        leaf = cell.leaf
        reading = leaf.reading()
        # What does not change from run to run is told once for each leaf.
        name = (leaf.name, active.serial)
        held = cell.fds
        fds = list(
            packets.LeaseFds(
                channel=cell.channel.fileno(),
                stdout=held.stdout,
                stderr=held.stderr,
                workspace=held.workspace,
                tmp=held.tmp,
                shm=held.shm,
                source=cell.source_fd,
                alarm=lease.alarm,
            )
        )
        known = self._leaves.get(name)
        if known is not None:
            return self._send(packets.lease(lease.identity, known, reading.before), fds)
        if len(self._leaves) >= packets.LEAVES:
            self._leaves.clear()
        known = self._known = self._known + 1
        numbers = leaf.numbers()
        order = list(dict.fromkeys(number.fd for number in numbers))
        fds += order
        message: dict[str, Any] = {
            "op": Operation.LEASE,
            "lease": lease.identity,
            "leaf": known,
            "before": reading.before,
            "known": {
                "limits": active.limits,
                "isolation": active.receipt(cell.slot.index),
                "reading": reading.plain(),
                "numbers": [[order.index(number.fd), number.key] for number in numbers],
            },
        }
        if not self._send(packets.with_descriptors(message), fds):
            return False
        self._leaves[name] = known
        return True

    def revoke(self, again: bool = True) -> bool:
        """Somebody else needs the turn, or the cell is stale, or one too many: then not *again*, before the next run.
        False when its program has started.
        """
        if self.lease is None or self.begun() is not None:
            return False
        self.end(again)
        return True

    def end(self, again: bool = True) -> None:
        """The lease is over before it was used."""
        lease, self.lease = self.lease, None
        if lease is None or self.run is not None:
            return
        buffers, _ = packets.pack({"op": Operation.REVOKED, "lease": lease.identity})
        self._send(b"".join(buffers), [])
        self._resources.admission.unreserve(self)
        lease.cell.discard()
        lease.cell.let_go()
        if again:  # but not at once: the turn is somebody else's
            asyncio.get_running_loop().call_soon(self._again)

    # Using

    def start(self, ago_seconds: float) -> CellRun | None:
        """The caller's program went so long ago; None when the lease was over before that, and its cell dead."""
        lease = self.lease
        if self.run is not None or lease is None:
            return self.run
        cell = lease.cell
        if cell.life.state is not State.SEALED:
            return None
        run = self.run = CellRun(self._resources, lease.active, lease.active.limits, lease.identity)
        run.start_leased(cell, ago_seconds)
        self._live.add(run, self._client)
        return run

    def lost(self) -> None:
        """The zygote was lost, and with it a program that the caller has handed over: never to be handed over again."""
        lease = self.lease
        if lease is None or self.run is not None:
            return
        cell = lease.cell
        run = self.run = CellRun(self._resources, lease.active, lease.active.limits, lease.identity)
        run.start_lost(cell)
        self._live.add(run, self._client)

    def done(self, identity: object, status: str) -> None:
        """It ended cleanly, and the caller has its answer."""
        lease, run = self.lease, self.run
        if lease is None or lease.identity != identity:
            return
        self._tally.count(self._client.get("uid"), lease.active.name, status)
        if run is not None:
            self.finish(run)
            return
        self._finish(None)
        lease.cell.end(Event.CANCELLED)
        lease.cell.let_go()
        self._again()

    def reclaim(self, identity: object, ago_seconds: float) -> CellRun | None:
        """The run that is the engine's from now on, started so long ago by its caller's word; None when there is none
        of that name. ``finish`` comes last.
        """
        if self.lease is None or self.lease.identity != identity:
            return None
        run = self.start(ago_seconds)
        if run is not None:
            run.clock.began(ago_seconds)  # the alarm may have been told late
        return run

    def begun(self) -> CellRun | None:
        """The run that the caller has started, if there is one."""
        if self.run is None and self.lease is not None and self.lease.is_started():
            self.start(0.0)
        return self.run

    def finish(self, run: CellRun) -> None:
        """A run that was taken back is answered."""
        self._finish(run)
        run.close()
        self._again()

    def _finish(self, run: CellRun | None) -> None:
        self.run = self.lease = None
        if run is not None:
            self._live.remove(run)
        self._resources.admission.unreserve(self)

    def _again(self) -> None:
        if self._active is not None and not self._closed:
            current = self._current(self._active)
            if current is not None:
                self.want(current)

    def close(self) -> None:
        """The connection is over, and with it whatever runs."""
        self._closed = True
        if self._active is not None:
            self._active.pool.unlend(self)
        run, lease = self.run, self.lease
        if run is not None:
            self._finish(run)
            run.close()
        elif lease is not None:
            self.lease = None
            self._resources.admission.unreserve(self)
            lease.cell.discard()
            lease.cell.let_go()


def send_now(sock: socket.socket, data: bytes, fds: list[int]) -> bool:
    """One packet with descriptors, if there is room for it."""
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
    try:
        sock.sendmsg([data], control, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
    except OSError:
        return False
    return True
