"""The table of a run's tool calls: who may call, who may answer, and what ends the hearing of either."""

from __future__ import annotations

from typing import Final

import pytest

from sandboxd.engine.runs import call_table
from sandboxd.engine.runs.call_table import GONE, CallTable, Refusal
from sandboxd.errors import ProtocolError
from sandboxd.inside import channel

BODY: Final = b'{"tool": "echo", "arguments": {}}'
LONG: Final = BODY[:-1] + b" " * 2 * channel.PART_BYTES + b"}"  # three parts


class Table:
    """A table, and what its run was told."""

    def __init__(self, calls: int = 100) -> None:
        self.waits: list[bool] = []
        self.table = CallTable(calls, self.waits.append)

    def send(self, data: bytes) -> tuple[Refusal | None, bool] | None:
        """A packet of the cell's."""
        return self.table.call_part(channel.parse_tool_frame(data, channel.CALL_BYTES), data)

    def call(self, number: int, body: bytes = BODY) -> str | None:
        """A whole call: the code of its refusal, if it is refused."""
        for data in channel.tool_frames(channel.CALL, number, body):
            judged = self.send(data)
        assert judged is not None
        assert judged[1]
        return judged[0][0] if judged[0] is not None else None

    def answer(self, number: int, kind: int = channel.ANSWER, body: bytes = b"{}") -> None:
        """A packet of the host's, and what the relay makes of it."""
        for data in channel.tool_frames(kind, number, body):
            head = channel.parse_tool_frame(data, channel.ANSWER_BYTES)
            self.table.check_host(head)
            if kind == channel.ANSWER and self.table.answer_part(head)[0]:
                self.table.finish(number)


def test_run_waits_from_its_first_call_to_its_last_answer() -> None:
    one = Table()
    assert [one.call(1), one.call(2)] == [None, None]
    one.answer(1)
    assert one.waits == [True]
    one.answer(2, body=b"x" * (2 * channel.PART_BYTES))
    assert one.waits == [True, False]


def test_calls_are_counted_in_all_and_at_a_time() -> None:
    one = Table(calls=channel.OUTSTANDING + 1)
    assert {one.call(number) for number in range(channel.OUTSTANDING)} == {None}
    assert one.call(1000) == "busy"
    one.answer(0)
    assert one.call(1000) is None
    assert one.call(1001) == "budget_exceeded"


def test_call_without_the_form_is_refused_and_costs_no_call() -> None:
    one = Table(calls=1)
    assert one.call(1, b'{"arguments": {}}') == "invalid_arguments"
    assert one.call(1) is None


def test_refusals_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_table, "REFUSALS", 3)
    one = Table(calls=0)
    for number in range(3):
        assert one.call(number) == "budget_exceeded"
    with pytest.raises(ProtocolError, match="flood"):
        one.call(3)


def test_part_that_comes_twice_is_dropped() -> None:
    one = Table()
    first, second, third = channel.tool_frames(channel.CALL, 1, LONG)
    assert one.send(first) == (None, False)
    assert one.send(first) is None
    assert one.send(second) == (None, False)
    assert one.send(second) is None
    assert one.send(third) == (None, True)


PARTS: Final = channel.tool_frames(channel.CALL, 1, LONG)
WHOLE: Final = channel.tool_frame(channel.CALL, 2, BODY)

BROKEN: Final = [
    ("number-in-use", [WHOLE, channel.tool_frame(channel.CALL, 3, BODY), WHOLE]),
    ("from-the-middle", [PARTS[1]]),
    ("part-left-out", [PARTS[0], PARTS[2]]),
    ("another-call-in-between", [PARTS[0], WHOLE]),
    ("empty", [channel.tool_frame(channel.CALL, 1)]),
    ("no-call", [channel.tool_frame(channel.ANSWER, 1, BODY)]),
]


@pytest.mark.parametrize("packets", [pytest.param(packets, id=name) for name, packets in BROKEN])
def test_cell_that_breaks_the_form_is_a_protocol_error(packets: list[bytes]) -> None:
    one = Table()
    for data in packets[:-1]:
        one.send(data)
    with pytest.raises(ProtocolError):
        one.send(packets[-1])


@pytest.mark.parametrize("kind", [channel.CALL, channel.FROZEN])
def test_host_may_not_send_what_is_not_its_own(kind: int) -> None:
    one = Table()
    one.call(1)
    with pytest.raises(ProtocolError, match="not the host's"):
        one.answer(1, kind)


def test_host_answers_each_call_once_and_after_its_last_part() -> None:
    one = Table()
    one.send(PARTS[0])
    with pytest.raises(ProtocolError, match="to no call"):
        one.answer(1)
    for data in PARTS[1:]:
        one.send(data)
    one.answer(1)
    with pytest.raises(ProtocolError, match="to no call"):
        one.answer(1)


def test_cell_stands_still_until_every_call_that_froze_it_is_thawed() -> None:
    one = Table()
    one.call(1)
    one.call(2)
    one.table.freeze(1)
    one.table.freeze(2)
    assert one.table.thaw(1) is False
    assert one.table.is_frozen
    assert one.table.thaw(2) is True
    assert one.table.thaw(2) is False
    with pytest.raises(ProtocolError, match="second freeze"):
        one.table.freeze(2)


def test_lost_host_leaves_every_call_to_be_answered() -> None:
    one = Table()
    one.call(1)
    one.send(channel.tool_frames(channel.CALL, 3, LONG)[0])
    assert one.table.lose_host() == [1, 3]
    assert one.table.refuse_rest(1) is False
    assert one.table.refuse_rest(3) is True  # its last part has yet to come
    rest = [one.send(data) for data in channel.tool_frames(channel.CALL, 3, LONG)[1:]]
    assert rest == [(GONE, False), (GONE, True)]
    assert one.call(4) == "unavailable"
