"""A descriptor is closed once, by its owner."""

from __future__ import annotations

import os

import pytest

from sandboxd.kernel.fd import Fd


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


@pytest.fixture
def number() -> int:
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def test_close_closes_once(number: int) -> None:
    fd = Fd(number)
    fd.close()
    assert not is_open(number)
    again = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)  # the number may be another file's by now
    fd.close()
    assert is_open(again)
    os.close(again)
    with pytest.raises(ValueError, match="closed"):
        fd.fileno()


def test_what_is_taken_stays_open(number: int) -> None:
    with Fd(number) as fd:
        assert fd.take() == number
        assert not fd.is_open
    assert is_open(number)
    os.close(number)


def test_the_last_reference_closes(number: int) -> None:
    fd = Fd(number)
    assert os.fstat(fd.fileno())
    del fd
    assert not is_open(number)
