"""Waiting for a descriptor on the running loop, in one place: asyncio offers callbacks, coroutines want to await."""

from __future__ import annotations

import asyncio

__all__ = ["readable", "resolve", "writable"]


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
