"""The life of a cell: the table holds every event that can happen, and no run is ever stuck."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.engine.cells.state import TRANSITIONS, Event, Life, State

ORDINARY = [
    (Event.MADE, State.SEALING),
    (Event.WALLS_UP, State.SEALED),
    (Event.GO, State.RUNNING),
    (Event.FINISHED, State.ENDING),
    (Event.DEAD, State.COLLECTING),
    (Event.LET_GO, State.GONE),
]


def test_an_ordinary_run() -> None:
    life = Life()
    assert life.state is State.MAKING
    for event, state in ORDINARY:
        assert life.on(event) is state
        assert life.state is state


def test_every_state_has_a_row_and_only_the_last_has_no_way_out() -> None:
    assert set(TRANSITIONS) == set(State)
    assert [state for state, row in TRANSITIONS.items() if not row] == [State.GONE]


def test_every_event_happens_somewhere() -> None:
    assert {event for row in TRANSITIONS.values() for event in row} == set(Event)


@pytest.mark.parametrize("state", [state for state in State if state is not State.GONE])
def test_a_caller_may_leave_at_any_time(state: State) -> None:
    assert {Event.CANCELLED, Event.DISCARDED} & set(TRANSITIONS[state])


@pytest.mark.parametrize("state", [state for state in State if state not in (State.COLLECTING, State.GONE)])
def test_a_zygote_may_be_lost_while_anything_lives_and_then_nothing_does(state: State) -> None:
    assert TRANSITIONS[state][Event.LOST] is State.COLLECTING


@pytest.mark.parametrize("state", [State.SEALING, State.SEALED, State.RUNNING])
@pytest.mark.parametrize("event", [Event.CANCELLED, Event.EXITED, Event.FAILED])
def test_a_cell_that_has_anything_goes_through_its_end(state: State, event: Event) -> None:
    # Never straight to GONE: what exists by then has to be taken down.
    assert TRANSITIONS[state][event] is State.ENDING


@pytest.mark.parametrize("state", list(State))
def test_there_is_a_way_to_the_end_from_everywhere(state: State) -> None:
    reached, pending = {state}, [state]
    while pending:
        for following in TRANSITIONS[pending.pop()].values():
            if following not in reached:
                reached.add(following)
                pending.append(following)
    assert State.GONE in reached


def test_an_end_is_not_taken_back() -> None:
    after = {State.ENDING: {State.ENDING, State.COLLECTING}, State.COLLECTING: {State.COLLECTING, State.GONE}}
    for state, allowed in after.items():
        assert set(TRANSITIONS[state].values()) <= allowed


def test_only_the_death_of_the_namespace_leads_to_collecting() -> None:
    ways = {(state, event) for state, row in TRANSITIONS.items() for event, to in row.items() if to is State.COLLECTING}
    lost = {(state, Event.LOST) for state in State if state not in (State.COLLECTING, State.GONE)}
    refused = (State.MAKING, Event.FAILED)  # by the nursery: nothing was made
    assert {way for way in ways if way[0] is not State.COLLECTING} == {(State.ENDING, Event.DEAD), refused, *lost}


def test_a_program_runs_only_behind_walls() -> None:
    ways = [(state, event) for state, row in TRANSITIONS.items() for event, to in row.items() if to is State.RUNNING]
    assert ways == [(State.SEALED, Event.GO)]


@given(st.lists(st.sampled_from(Event), max_size=30))
def test_an_event_is_in_the_table_or_an_error_that_changes_nothing(events: list[Event]) -> None:
    life = Life()
    for event in events:
        before = life.state
        if event in TRANSITIONS[before]:
            assert life.on(event) is TRANSITIONS[before][event]
        else:
            with pytest.raises(RuntimeError, match=f"{event.name} cannot happen to a cell that is {before.value}"):
                life.on(event)
            assert life.state is before
