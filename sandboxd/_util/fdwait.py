"""Waiting for a descriptor on the running loop, in one place: asyncio offers callbacks, coroutines want to await."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["in_thread", "readable", "resolve", "writable"]

T = TypeVar("T")


def resolve(future: asyncio.Future[None]) -> None:
    """Set *future*, unless it is over; as a callback."""
    if not future.done():
        future.set_result(None)


async def readable(fd: int) -> None:
    """Until *fd* can be read, or is at its end. One waiter for each descriptor."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(fd, resolve, ready)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def writable(fd: int) -> None:
    """Until *fd* can be written, or its other end is gone. One waiter for each descriptor."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_writer(fd, resolve, ready)
    try:
        await ready
    finally:
        loop.remove_writer(fd)


async def in_thread(function: Callable[..., T], *arguments: Any, discard: Callable[[T], object] | None = None) -> T:
    """What *function* returns in a thread of the loop's executor. It has returned when this does: also when the caller
    is cancelled, which is raised afterwards, and the result goes to *discard*. So its descriptors stay valid.
    """
    work = asyncio.get_running_loop().run_in_executor(None, functools.partial(function, *arguments))
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return work.result()
    if discard is not None and work.exception() is None:
        discard(work.result())
    raise cancelled
