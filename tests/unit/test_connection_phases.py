"""The life of a connection: the table holds every event that can happen, and a client that left is not served again."""

from __future__ import annotations

import pytest

from sandboxd.engine.clients.phase import ENDS, TRANSITIONS, ConnectionLife, Event, Phase

DURING_A_RUN = [Phase.RUNNING, Phase.CANCELLED, Phase.LEFT, Phase.DEAF]


def test_requests_and_runs_take_turns() -> None:
    life = ConnectionLife()
    assert life.phase is Phase.GREETING
    assert life.on(Event.GREETED) is Phase.IDLE
    for run in (False, True, True):
        assert life.on(Event.ASKED) is Phase.ANSWERING
        if run:
            assert life.on(Event.BEGUN) is Phase.RUNNING
            assert life.on(Event.OVER) is Phase.ANSWERING
        assert life.on(Event.ANSWERED) is Phase.IDLE
    assert life.on(Event.CLOSE) is Phase.CLOSED


def test_connection_outlives_a_cancelled_run() -> None:
    life = ConnectionLife()
    for event in (Event.GREETED, Event.ASKED, Event.BEGUN, Event.CANCEL, Event.OVER, Event.ANSWERED):
        life.on(event)
    assert life.phase is Phase.IDLE


def test_every_phase_has_a_row_and_can_be_closed() -> None:
    assert set(TRANSITIONS) == set(Phase)
    assert all(row[Event.CLOSE] is Phase.CLOSED for row in TRANSITIONS.values())


def test_every_event_happens_somewhere() -> None:
    assert {event for row in TRANSITIONS.values() for event in row} == set(Event)


@pytest.mark.parametrize("phase", DURING_A_RUN)
def test_run_is_over_and_its_output_blocked_at_any_time(phase: Phase) -> None:
    assert {Event.OVER, Event.BLOCKED} <= set(TRANSITIONS[phase])


@pytest.mark.parametrize("phase", ENDS)
def test_nothing_brings_a_client_back(phase: Phase) -> None:
    assert set(TRANSITIONS[phase].values()) <= set(ENDS)


def test_only_a_run_is_interrupted() -> None:
    assert [phase for phase in Phase if {Event.CANCEL, Event.LEAVE} & set(TRANSITIONS[phase])] == [Phase.RUNNING]


def test_event_that_cannot_happen_is_told() -> None:
    with pytest.raises(RuntimeError, match="BEGUN cannot happen to a connection that is greeting"):
        ConnectionLife().on(Event.BEGUN)
