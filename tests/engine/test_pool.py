"""What parks and lends cells, part by part: settings, clock, shapes, counters, and who may send descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd import PolicyError, ProtocolError, Result, Sandbox
from sandboxd.cgroup.reading import Counters, Reading, Role, Row
from sandboxd.engine.cells.shape import BUILT_IN, same_spec
from sandboxd.engine.clock import Clock
from sandboxd.engine.config import PoolSettings
from sandboxd.limits import defaults
from sandboxd.outcome.answer import Durations, answer, clean_exit_header, hit_no_limit
from sandboxd.outcome.collected import Collected
from sandboxd.outcome.collector import Collector
from sandboxd.outcome.judge import Evidence, Finished
from sandboxd.protocol import packets
from tests.engine.test_crash import all_gone, named
from tests.engine.test_parked import FIXED, engine_of, settled
from tests.support import daemons, leftovers
from tests.support.engine import connect as connect_to_engine
from tests.support.engine import lease_slots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT: Final = pytest.mark.skipif(os.geteuid() != 0, reason="an embedded engine needs root")
FDS: Final = 64


# Settings


def test_a_pool_has_its_defaults() -> None:
    assert PoolSettings.from_plain({}) == PoolSettings()


def test_every_setting_can_be_set() -> None:
    plain = {
        "minimum": 1,
        "maximum": 3,
        "memory_bytes": 1,
        "age_seconds": 1,
        "zygote_cells": 1,
        "zygote_seconds": 0.1,
    }
    made = PoolSettings.from_plain(plain)
    assert {name: getattr(made, name) for name in PoolSettings.__dataclass_fields__} == plain


@pytest.mark.parametrize(("maximum", "minimum"), [(0, 0), (1, 1), (2, 2), (9, 2)])
def test_a_small_maximum_is_the_minimum_too(maximum: int, minimum: int) -> None:
    assert PoolSettings.from_plain({"maximum": maximum}).minimum == minimum


@pytest.mark.parametrize(
    ("plain", "key"),
    [
        (None, "pool"),
        ([], "pool"),
        ("minimum", "pool"),
        (5, "pool"),
        ({"size": 1}, "pool.size"),
        ({"minimum": -1}, "pool.minimum"),
        ({"minimum": 1.0}, "pool.minimum"),
        ({"minimum": True}, "pool.minimum"),
        ({"minimum": "1"}, "pool.minimum"),
        ({"minimum": None}, "pool.minimum"),
        ({"minimum": 3, "maximum": 2}, "pool.minimum"),
        ({"minimum": 17}, "pool.minimum"),
        ({"maximum": -1}, "pool.maximum"),
        ({"maximum": 1 << 51}, "pool.maximum"),
        ({"memory_bytes": -1}, "pool.memory_bytes"),
        ({"memory_bytes": "1M"}, "pool.memory_bytes"),
        ({"zygote_cells": 0}, "pool.zygote_cells"),
        ({"age_seconds": 0}, "pool.age_seconds"),
        ({"age_seconds": 0.09}, "pool.age_seconds"),
        ({"age_seconds": float("nan")}, "pool.age_seconds"),
        ({"age_seconds": float("inf")}, "pool.age_seconds"),
        ({"age_seconds": True}, "pool.age_seconds"),
        ({"zygote_seconds": "1"}, "pool.zygote_seconds"),
        ({"zygote_seconds": 1e10}, "pool.zygote_seconds"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(plain: object, key: str) -> None:
    with pytest.raises(PolicyError) as refused:
        PoolSettings.from_plain(plain)
    assert refused.value.key == key


@ROOT
def test_a_wrong_setting_starts_no_sandbox() -> None:
    before = leftovers.snapshot()
    with pytest.raises(PolicyError, match=r"pool\.minimum"):
        Sandbox(pool={"minimum": 3, "maximum": 2})
    with pytest.raises(PolicyError, match="pool must map"):
        Sandbox(pool=5)  # type: ignore[arg-type]
    leftovers.assert_nothing_new(before)


# The clock


class Fake:
    """A run under the clock."""

    def __init__(self, wall: float = float("inf"), cpu: float = float("inf")) -> None:
        now = time.monotonic()
        self.wall_end, self.cpu_look = now + wall, now + cpu
        self.ticks: list[float] = []
        self.again: list[float] = []

    def tick(self, now: float) -> None:
        self.ticks.append(now)
        self.wall_end = float("inf")
        self.cpu_look = self.again.pop() if self.again else float("inf")


def clocked(work: Callable[[Clock], list[Fake]], wait: Callable[[list[Fake]], bool]) -> list[Fake]:
    """The runs that *work* put under a clock, once *wait* says that it is over."""

    async def main() -> list[Fake]:
        clock = Clock()
        runs = work(clock)
        async with asyncio.timeout(10):
            while not wait(runs):
                await asyncio.sleep(0.001)
        clock.close()
        return runs

    return asyncio.run(main())


def test_the_clock_ticks_for_each_run_that_is_due() -> None:
    def work(clock: Clock) -> list[Fake]:
        runs = [Fake(wall=0.05), Fake(cpu=0.02), Fake(wall=60), Fake(wall=0.03, cpu=60), Fake()]
        for run in runs:
            clock.add(run)
        assert len(clock) == 5
        return runs

    runs = clocked(work, lambda runs: all(runs[index].ticks for index in (0, 1, 3)))
    assert [len(run.ticks) for run in runs] == [1, 1, 0, 1, 0]


def test_the_clock_never_rings_early() -> None:
    ends: list[float] = []

    def work(clock: Clock) -> list[Fake]:
        runs = [Fake(wall=delay) for delay in (0.04, 0.01, 0.02)]
        ends.extend(run.wall_end for run in runs)
        for run in runs:
            clock.add(run)
        return runs

    for run, end in zip(clocked(work, lambda runs: all(run.ticks for run in runs)), ends, strict=True):
        assert run.ticks[0] >= end


def test_a_run_that_is_added_last_and_due_first_is_first() -> None:
    def work(clock: Clock) -> list[Fake]:
        runs = [Fake(wall=60), Fake(wall=0.02)]
        for run in runs:
            clock.add(run)
        return runs

    late, soon = clocked(work, lambda runs: bool(runs[1].ticks))
    assert (len(late.ticks), len(soon.ticks)) == (0, 1)


def test_a_run_may_be_due_again() -> None:
    def work(clock: Clock) -> list[Fake]:
        run = Fake(cpu=0.01)
        run.again = [time.monotonic() + 0.03, time.monotonic() + 0.02]
        clock.add(run)
        return [run]

    (run,) = clocked(work, lambda runs: len(runs[0].ticks) == 3)
    assert run.ticks == sorted(run.ticks)


def test_a_run_that_was_removed_is_not_told() -> None:
    def work(clock: Clock) -> list[Fake]:
        runs = [Fake(wall=0.01), Fake(wall=0.03)]
        for run in runs:
            clock.add(run)
        clock.remove(runs[0])
        clock.remove(runs[0])
        assert len(clock) == 1
        return runs

    removed, other = clocked(work, lambda runs: bool(runs[1].ticks))
    assert (removed.ticks, len(other.ticks)) == ([], 1)


def test_a_run_that_is_over_while_the_clock_rings_does_no_harm() -> None:
    class Last(Fake):
        def tick(self, now: float) -> None:
            super().tick(now)
            self.clock.remove(self)

        clock: Clock

    def work(clock: Clock) -> list[Fake]:
        runs: list[Fake] = []
        for _ in range(3):
            one = Last(wall=0.01)
            one.clock = clock
            clock.add(one)
            runs.append(one)
        return runs

    assert [len(run.ticks) for run in clocked(work, lambda runs: all(run.ticks for run in runs))] == [1, 1, 1]


def test_a_closed_clock_rings_no_more() -> None:
    async def main() -> tuple[Fake, Fake]:
        clock, early, late = Clock(), Fake(wall=0.01), Fake(wall=0.0)
        clock.add(early)
        clock.close()
        clock.add(late)
        await asyncio.sleep(0.05)
        return early, late

    assert [run.ticks for run in asyncio.run(main())] == [[], []]


# Shapes


@pytest.mark.parametrize("name", sorted(defaults()))
def test_a_cell_serves_runs_whose_built_in_limits_are_its_own(name: str) -> None:
    limits = defaults()
    value = limits[name]
    other = {**limits, name: None if value is not None else 1}
    assert same_spec(limits, limits)
    assert same_spec(limits, other) is (name not in BUILT_IN)
    assert same_spec(other, limits) is (name not in BUILT_IN)


# Counters


def reading(*rows: tuple[Role, int, int], limit: int | None = None, floor: int = 1) -> Counters:
    """Of rows of (role, value at the start, value now)."""
    made = Reading(tuple(Row(role) for role, _, _ in rows), tuple(was for _, was, _ in rows), limit, floor)
    return made.counters(tuple(now for _, _, now in rows))


def test_counters_are_what_was_added() -> None:
    seen = reading(("cpu", 100, 150), ("user", 70, 100), ("throttled", 5, 7), ("kills", 1, 2), ("pids_hits", 3, 7))
    assert (seen.cpu_usec, seen.cpu_user_usec, seen.cpu_system_usec) == (50, 30, 20)
    assert (seen.throttled_usec, seen.oom_kills, seen.pids_limit_hits) == (2, 1, 4)


def test_levels_are_as_they_are() -> None:
    seen = reading(("peak", 100, 150), ("current", 90, 80))
    assert (seen.memory_peak_bytes, seen.memory_current_bytes) == (150, 80)


def test_hits_of_two_kinds_are_added() -> None:
    assert reading(("hits", 1, 3), ("hits", 10, 15)).memory_limit_hits == 7


def test_units_are_divided() -> None:
    made = Reading((Row("cpu", 1000), Row("throttled", 1000)), (5_000, 1_000), None, 1)
    seen = made.counters((12_999, 3_000))
    assert (seen.cpu_usec, seen.throttled_usec) == (7, 2)


@pytest.mark.parametrize(
    ("user", "system", "parts"),
    [(3, 1, (750, 250)), (0, 0, (1000, 0)), (0, 5, (0, 1000)), (7, 0, (1000, 0)), (1, 2, (333, 667))],
)
def test_ticks_give_the_ratio_of_the_two_parts(user: int, system: int, parts: tuple[int, int]) -> None:
    seen = reading(("cpu", 0, 1000), ("user", 10, 10 + user), ("system", 20, 20 + system))
    assert (seen.cpu_user_usec, seen.cpu_system_usec) == parts


@pytest.mark.parametrize(("now", "user"), [(95, 0), (100, 0), (130, 30), (200, 50)])
def test_a_part_that_the_kernel_scaled_is_never_negative_nor_above_the_whole(now: int, user: int) -> None:
    seen = reading(("cpu", 0, 50), ("user", 100, now))
    assert (seen.cpu_user_usec, seen.cpu_system_usec) == (user, 50 - user)


@pytest.mark.parametrize(
    ("was", "now", "peak"),
    [
        pytest.param(1, 1, 1, id="nobody-was-above-the-floor"),
        pytest.param(2, 5, 5, id="it-rose"),
        pytest.param(2, 2, 2, id="at-the-floor"),
        pytest.param(7, 7, None, id="an-earlier-run-was-higher"),
        pytest.param(7, 9, 9, id="higher-than-an-earlier-run"),
    ],
)
def test_the_peak_of_tasks_is_told_only_when_it_is_the_runs_own(was: int, now: int, peak: int | None) -> None:
    assert reading(("pids_peak", was, now), floor=2).pids_peak == peak


def test_a_peak_that_nobody_reads_is_unknown() -> None:
    assert reading(("cpu", 0, 1)).pids_peak is None


@pytest.mark.parametrize(
    ("peak", "limit", "counted", "hits"),
    [
        pytest.param(1 << 30, 1 << 30, 0, 1, id="met-but-not-counted"),
        pytest.param((1 << 30) - 1, 1 << 30, 0, 1, id="less-than-a-charge-was-left"),
        pytest.param((1 << 30) - (1 << 20), 1 << 30, 0, 0, id="room-was-left"),
        pytest.param(1 << 30, 1 << 30, 3, 3, id="counted"),
        pytest.param(1 << 30, None, 0, 0, id="always-counted-here"),
    ],
)
def test_a_limit_that_was_met_shows_in_the_peak(peak: int, limit: int | None, counted: int, hits: int) -> None:
    assert reading(("peak", 0, peak), ("hits", 0, counted), limit=limit).memory_limit_hits == hits


def test_tasks_are_read_by_their_row() -> None:
    made = Reading((Row("cpu"), Row("tasks"), Row("peak")), (0, 0, 0), None, 1)
    assert made.tasks((5, 3, 9)) == 3


def test_a_reading_survives_its_journey() -> None:
    made = Reading((Row("cpu", 1000), Row("hits"), Row("tasks")), (1, 2, 3), 1 << 30, 2)
    assert Reading.from_plain(json.loads(json.dumps(made.plain()))) == made


# Packets with descriptors


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected ends; every descriptor is closed at the end."""
    before = leftovers.fds()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.settimeout(10)
        theirs.settimeout(10)
        yield ours, theirs
    leftovers.eventually(lambda: leftovers.fds() == before, 5, "every descriptor is closed")


def send_fds(sock: socket.socket, data: bytes, count: int) -> None:
    """Send *data* with *count* descriptors."""
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
    try:
        socket.send_fds(sock, [data], fds)
    finally:
        for fd in fds:
            os.close(fd)


Pair = tuple[socket.socket, socket.socket]


@pytest.mark.parametrize("count", [1, 6, FDS])
def test_descriptors_arrive_with_their_packet(pair: Pair, count: int) -> None:
    send_fds(pair[0], packets.with_descriptors({"op": "lease", "x": [1]}), count)
    packet = packets.receive(pair[1], descriptors=FDS)
    assert packet is not None
    assert (packet.message, len(packet.fds)) == ({"op": "lease", "x": [1]}, count)
    assert not any(map(os.get_inheritable, packet.fds))
    fds = list(packet.fds)
    packet.close()
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_packet_with_descriptors_may_come_without_any(pair: Pair) -> None:
    pair[0].send(packets.with_descriptors({"op": "lease"}))
    packet = packets.receive(pair[1], descriptors=FDS)
    assert packet is not None
    assert packet.fds == []


@pytest.mark.parametrize(("allowed", "count"), [(0, 0), (0, 1), (0, 6), (1, 2), (5, 6)], ids=lambda number: str(number))
def test_descriptors_that_nobody_asked_for_are_refused_and_closed(pair: Pair, allowed: int, count: int) -> None:
    data = packets.with_descriptors({"op": "lease"})
    if count:
        send_fds(pair[0], data, count)
    else:
        pair[0].send(data)
    before = leftovers.fds()
    with pytest.raises(ProtocolError):
        packets.receive(pair[1], descriptors=allowed)
    leftovers.eventually(lambda: leftovers.fds() == before, 5, "what came is closed")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda data: data + b"x", id="longer"),
        pytest.param(lambda data: data[:-1], id="shorter"),
        pytest.param(lambda data: data[:12] + b"\x01" + data[13:], id="with-a-payload"),
        pytest.param(lambda data: data.replace(b'"op"', b'"op'), id="not-json"),
        pytest.param(lambda data: data[:5] + b"\x03" + data[6:], id="two-kinds-at-once"),
    ],
)
def test_a_wrong_packet_with_descriptors_is_refused_and_closed(pair: Pair, change: Callable[[bytes], bytes]) -> None:
    send_fds(pair[0], change(packets.with_descriptors({"op": "lease"})), 3)
    before = leftovers.fds()
    with pytest.raises(ProtocolError):
        packets.receive(pair[1], descriptors=FDS)
    leftovers.eventually(lambda: leftovers.fds() == before, 5, "what came is closed")


def test_a_message_with_descriptors_must_be_short() -> None:
    with pytest.raises(ProtocolError):
        packets.with_descriptors({"op": "x" * packets.INLINE_BYTES})


# Who is lent cells, and who may speak of them


@pytest.fixture(scope="module")
def served() -> Iterator[daemons.Served]:
    """A daemon with parked cells."""
    with daemons.directory() as home, daemons.served(home, pool=FIXED) as daemon:
        yield daemon


def greeted(served: daemons.Served) -> daemons.Raw:
    """A client that would like to be lent cells."""
    raw = daemons.Raw(served, greet=False)
    packets.send(raw.sock, packets.hello(direct=True))
    assert raw.answer()["op"] == "hello"
    return raw


@ROOT
def test_a_daemon_lends_nobody_a_cell(served: daemons.Served) -> None:
    with greeted(served) as raw:
        for _ in range(3):
            raw.send(daemons.request(), b"pass")
            assert raw.answer()["op"] == "result"
            settled(served.pid)
            # A lease would have come before this answer.
            raw.send({"op": "ps"})
            assert raw.answer()["op"] == "ps"


@ROOT
@pytest.mark.parametrize(
    "message",
    [
        {"op": "done", "lease": "0" * 16, "status": "ok"},
        {"op": "take", "seconds": 0.0, "lease": "0" * 16, "stdout": 0, "stderr": 0, "frame": 0},
        {"op": "lease", "lease": "0" * 16},
        {"op": "revoked", "lease": "0" * 16},
    ],
    ids=lambda message: str(message["op"]),
)
@pytest.mark.parametrize("after_a_run", [False, True])
def test_a_daemons_client_may_not_speak_of_leases(
    served: daemons.Served, message: dict[str, Any], after_a_run: bool
) -> None:
    with greeted(served) as raw:
        if after_a_run:
            raw.send(daemons.request(), b"pass")
            assert raw.answer()["op"] == "result"
        raw.send(message)
        kind, text = raw.refusal()
        assert (kind, "There is no request" in text) == ("ProtocolError", True), (kind, text)
        assert raw.answer() == {}
    assert served.serves()


@ROOT
@pytest.mark.parametrize("count", [0, 1, 6])
def test_a_daemon_takes_no_packet_with_descriptors(served: daemons.Served, count: int) -> None:
    with daemons.Raw(served) as raw:
        settled(served.pid)
        before = len(leftovers.fds(served.pid))
        data = packets.with_descriptors({"op": "ps"})
        if count:
            send_fds(raw.sock, data, count)
        else:
            raw.sock.send(data)
        assert raw.refusal()[0] == "ProtocolError"
        leftovers.eventually(lambda: len(leftovers.fds(served.pid)) <= before, 5, "what came is closed")
    assert served.serves()


def serve_falsely(listener: socket.socket, answer: bytes) -> None:
    """One client: it is greeted, and its run is answered with *answer* and descriptors."""
    with listener, listener.accept()[0] as sock:
        for number in range(2):
            packet = packets.receive(sock)
            assert packet is not None
            packet.close()
            if number:
                send_fds(sock, answer, 8)
            else:
                packets.send(sock, {"op": "hello"})
        with contextlib.suppress(ConnectionResetError):
            packets.receive(sock)


def test_a_client_of_a_false_daemon_takes_no_cell_from_it() -> None:
    before = leftovers.fds()
    lease = {"op": "lease", "lease": "x", "leaf": 1, "before": [], "known": {}}
    with daemons.directory() as home, ThreadPoolExecutor(1) as pool:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(f"{home}/socket")
        listener.listen()
        done = pool.submit(serve_falsely, listener, packets.with_descriptors(lease))
        with Sandbox.connect(f"unix:{home}/socket") as client:
            with pytest.raises(ProtocolError):
                client.run("1")
            assert not lease_slots(client)
        done.result(10)
    leftovers.eventually(lambda: leftovers.fds() == before, 5, "what came is closed")


# A caller of an embedded engine that does not keep to the rules


@pytest.fixture
def own() -> Iterator[Sandbox]:
    """An engine of this test alone, and a look at what it left."""
    before = leftovers.snapshot()
    with Sandbox(pool=FIXED) as made:
        yield made
    leftovers.assert_nothing_new(before)


def borrowed(sandbox: Sandbox) -> tuple[socket.socket, dict[str, Any], list[int]]:
    """A connection of its own, the lease that came, and its descriptors: channel, streams, workspace, source, alarm."""
    sock = connect_to_engine(sandbox)
    sock.settimeout(20)
    packets.send(sock, packets.hello(direct=True))
    packets.send(sock, daemons.request(), [b"pass"])
    seen = []
    while True:
        packet = packets.receive(sock, descriptors=FDS)
        assert packet is not None
        seen.append(packet.message["op"])
        if seen[-1] == "lease":
            fds, packet.fds = packet.fds, []
            assert seen == ["hello", "result", "lease"]
            return sock, packet.message, fds
        packet.close()


NONSENSE: Final[list[dict[str, Any]]] = [
    {},
    {"stdout": 1, "stderr": 0, "frame": 0},
    {"stdout": 0, "stderr": 0, "frame": 5},
    {"stdout": -1, "stderr": 1, "frame": 0},
    {"stdout": True, "stderr": 0, "frame": 0},
    {"stdout": 0.0, "stderr": 0, "frame": 0},
    {"stdout": "0", "stderr": 0, "frame": 0},
    {"stdout": None, "stderr": 0, "frame": 0},
    {"stdout": 1 << 62, "stderr": 0, "frame": 0},
    {"stdout": 0, "stderr": 0},
]


@ROOT
@pytest.mark.parametrize("sizes", NONSENSE, ids=str)
def test_nonsense_about_a_lent_cell_ends_the_connection_and_the_cell(own: Sandbox, sizes: dict[str, Any]) -> None:
    sock, message, fds = borrowed(own)
    try:
        before = settled(engine_of(own))
        packets.send(sock, {"op": "take", "seconds": 0.0, "lease": message["lease"], **sizes})
        raw = daemons.Raw(sock, greet=False)
        assert raw.refusal()[0] == "ProtocolError"
        assert raw.answer() == {}
        leftovers.eventually(lambda: any(all_gone([one]) for one in before), 5, "the lent cell was ended")
        after = {one.pid for one in settled(engine_of(own))}
        assert len(after - {one.pid for one in before}) == 1
    finally:
        for fd in fds:
            os.close(fd)
        sock.close()
    assert own.run("print(1)").stdout == "1\n"


@ROOT
def test_done_without_a_start_ends_the_cell_and_lends_another(own: Sandbox) -> None:
    sock, message, fds = borrowed(own)
    try:
        before = settled(engine_of(own))
        packets.send(sock, {"op": "done", "lease": message["lease"], "status": "ok"})
        packet = packets.receive(sock, descriptors=FDS)
        assert packet is not None
        assert packet.message["op"] == "lease"
        assert packet.message["lease"] != message["lease"]
        packet.close()
        leftovers.eventually(lambda: any(all_gone([one]) for one in before), 5, "the first was ended")
    finally:
        for fd in fds:
            os.close(fd)
        sock.close()
    assert own.run("print(1)").stdout == "1\n"


@ROOT
@pytest.mark.parametrize("name", ["0" * 16, None, 5, [], {}], ids=str)
def test_a_lease_that_there_is_not_is_nobodys(own: Sandbox, name: Any) -> None:
    sock, _, fds = borrowed(own)
    try:
        before = {one.pid for one in settled(engine_of(own))}
        packets.send(sock, {"op": "done", "lease": name, "status": "ok"})
        packets.send(sock, {"op": "take", "seconds": 0.0, "lease": name, "stdout": 0, "stderr": 0, "frame": 0})
        packet = packets.receive(sock, descriptors=FDS)
        assert packet is not None
        assert packet.message == {"op": "revoked", "lease": name, "taken": True}
        assert {one.pid for one in settled(engine_of(own))} == before
    finally:
        for fd in fds:
            os.close(fd)
        sock.close()


@ROOT
def test_a_forged_frame_of_the_callers_is_parsed_as_a_programs(own: Sandbox) -> None:
    """It is the caller's own run: what it may say is what a program may say, and nothing more."""
    sock, message, fds = borrowed(own)
    try:
        frame = b'{"exit_code": 0, "error": null, "results": [], "status": "ok"}'
        sizes = {"stdout": 0, "stderr": 0, "frame": len(frame)}
        packets.send(sock, {"op": "take", "seconds": 0.0, "lease": message["lease"], **sizes}, [frame])
        packets.send(sock, packets.CANCEL)
        answer = daemons.Raw(sock, greet=False).answer()
        assert (answer["op"], answer["result"]["status"]) == ("result", "cancelled")
    finally:
        for fd in fds:
            os.close(fd)
        sock.close()


@ROOT
def test_a_caller_that_hangs_up_gives_its_lease_back(own: Sandbox) -> None:
    sock, _, fds = borrowed(own)
    before = settled(engine_of(own))
    sock.close()
    leftovers.eventually(lambda: any(all_gone([one]) for one in before), 5, "the lent cell was ended")
    for fd in fds:
        os.close(fd)
    settled(engine_of(own))
    assert len(named(engine_of(own), "cell")) == FIXED["maximum"]


@ROOT
def test_a_caller_that_would_not_hold_cells_is_lent_none(own: Sandbox) -> None:
    with daemons.Raw(connect_to_engine(own), greet=True) as raw:
        raw.send(daemons.request(), b"pass")
        assert raw.answer()["op"] == "result"
        settled(engine_of(own))
        raw.send({"op": "ps"})
        assert raw.answer()["op"] == "ps"
        raw.send({"op": "done", "lease": "0" * 16})
        assert raw.refusal()[0] == "ProtocolError"


# No more descriptors than there may be

CROWD: Final = """
import errno, json, os, resource, sys, threading
resource.setrlimit(resource.RLIMIT_NOFILE, (700, 700))
from sandboxd import Limits, Sandbox, Unavailable
with Sandbox(max_running=80, pool={"maximum": 0}) as sandbox:
    begun, ended = threading.Semaphore(0), []

    def sleeper():
        try:
            ended.append(sandbox.run("import time; print(1, flush=True); time.sleep(60)", limits=Limits(wall_seconds=4),
                                     on_stdout=lambda text: begun.release()).status)
        except Unavailable as error:
            ended.append(errno.errorcode.get(error.errno))
            begun.release()

    threads = [threading.Thread(target=sleeper) for _ in range(60)]
    for thread in threads:
        thread.start()
        begun.acquire()
    for thread in threads:
        thread.join()
    print(json.dumps([sorted(set(ended)), sandbox.run("print(7)").stdout]))
"""


def test_an_engine_that_is_short_of_descriptors_refuses_by_name_and_keeps_its_cells() -> None:
    found = subprocess.run([sys.executable, "-c", CROWD], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == [["EMFILE", "timeout"], "7\n"]


# The short way to an answer is the long one


@given(
    st.tuples(*[st.integers(0, 1 << 40)] * 3),
    st.one_of(st.none(), st.integers(1, 64)),
    st.tuples(st.binary(max_size=40), st.binary(max_size=40)),
    st.tuples(*[st.floats(0, 1e6)] * 2),
    st.lists(st.text(max_size=8), max_size=1),
)
def test_the_plain_answer_is_the_answer(
    usage: tuple[int, int, int],
    pids: int | None,
    outputs: tuple[bytes, bytes],
    seconds: tuple[float, float],
    texts: list[str],
) -> None:
    user, system, peak = usage
    counters = Counters(user + system, user, system, 0, peak, peak // 2, 0, 0, pids, 0)
    assert hit_no_limit(counters)
    results = [{"mime": {"text/plain": text}} for text in texts]
    streams = (Collector(64), Collector(64))
    for stream, data in zip(streams, outputs, strict=True):
        stream.add(data)
    run = Durations(0.0, *seconds)
    limits = {**defaults(), "wall_seconds": None, "cpu_seconds": None}
    evidence = Evidence(None, None, Finished(0, None, results, None), counters, limits, seconds[1])
    long, texts_kept, _ = answer("0" * 16, evidence, streams, Collected(), run, True, None)
    assert clean_exit_header("0" * 16, results, counters, outputs, run) == long
    assert texts_kept == list(outputs)


@pytest.mark.parametrize("field", ["oom_kills", "memory_limit_hits", "pids_limit_hits", "throttled_usec"])
def test_a_limit_that_was_met_is_remarkable(field: str) -> None:
    assert not hit_no_limit(replace(Counters(0, 0, 0, 0, 0, 0, 0, 0, 1, 0), **{field: 1}))


def test_an_assembled_result_is_that_of_the_wire() -> None:
    counters = Counters(3, 2, 1, 0, 5, 4, 0, 0, 1, 0)
    results = [{"mime": {"text/plain": "2"}}]
    with Sandbox() as sandbox:
        isolation = sandbox.run("1").isolation
    assert isolation is not None
    header = clean_exit_header("0" * 16, results, counters, (b"out", b"\xff"), Durations(0.0, 0.1, 0.2))
    wire = Result.from_wire({**header, "isolation": isolation.model_dump()}, b"out\xff")
    made = Result.assembled(header, (b"out", b"\xff"), isolation)
    assert made.to_dict() == wire.to_dict()
    assert made == wire
    assert repr(made) == repr(wire)
    made.close()
