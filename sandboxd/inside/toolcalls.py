"""The cell's side of tool calls: the module ``tools`` that a program finds, and the channel that its calls take.

Runs in the cell, as the program itself, behind every wall: what stands here is a convenience, no wall. The frames are
those of channel.py. Who calls is known by the channel; nothing in a call says so.

Threads that wait for an answer take turns at the channel: one of them, the leader, reads for all, and hands over when
its own answer is there. Tasks of a loop have a reader of the loop's, which reads when no thread does.
"""

from __future__ import annotations

import _thread
import errno
import functools
import json
import os
import select
import sys
import time
import types

from channel import (  # type: ignore[import-not-found]  # beside this file, for the interpreter of the image
    ANSWER,
    CALL,
    CALL_BYTES,
    CHANNEL,
    OUTSTANDING,
    PART_BYTES,
    TOOL_HEAD,
    TOOL_PACKET_BYTES,
    tool_frame,
)

TYPE_CHECKING = False  # typing itself is not imported here: every cell would carry it
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

SPIN_SECONDS = 0.0003
LOOK_SECONDS = 0.2  # after which who waits looks whether it was forgotten
ENDS = (errno.EBADF, errno.ECONNRESET, errno.ENOTCONN, errno.ENOTSOCK, errno.EPIPE)
KEPT_BYTES = 256 << 10
KEPT = "/workspace/tool_results"
FILE = "/tools/__init__.py"  # of the functions, for tracebacks; there is no such file


class ToolError(Exception):
    """A tool call was refused, or the tool failed. *code* is one of a closed list, *message* says what was wrong,
    *hint* what to do about it.
    """

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(code, message, hint)
        self.code, self.message, self.hint = code, message, hint

    def __str__(self) -> str:
        return f"{self.code}: {self.message}{' ' if self.hint else ''}{self.hint}"


class UnknownTool(ToolError, AttributeError):
    """There is no tool of that name here."""


for one in (ToolError, UnknownTool):
    one.__module__ = "tools"


class NotGiven:
    """The default of an argument that may be left out; it shows as that default."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


class Slot:
    """One call under way. *lock* is held while its thread waits for it to be released: answered, or asked to read."""

    __slots__ = ("answer", "future", "lock", "parts", "thread")

    def __init__(self, future: Any = None) -> None:
        self.answer: bytes | None = None
        self.parts: dict[int, bytes] = {}
        self.thread = _thread.get_ident()
        self.future = future
        self.lock: Any = _thread.allocate_lock()


class Line:
    """The channel. One for each process; a child that the program made has none.

    What a signal's handler raises may come between any two steps here, in the main thread. So a packet stays in its
    place until it was dealt with, to do which twice does no harm; and who finds that nobody reads any more, reads.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = _thread.allocate_lock()
        self.sending = _thread.allocate_lock()
        self.unsent: Any = None  # number, next part and body of a call that is being sent
        self.slots: dict[int, Slot] = {}
        self.queue: dict[Callable[[], object], None] = {}  # of those that wait until there are fewer calls, in order
        self.loops: dict[Any, int] = {}  # how many tasks of each wait
        self.packet = bytearray(1)  # begins with 0 when there is none; room for one is made when the first is read
        self.leader: Slot | None = None  # who reads
        self.number = 0
        self.ended = False

    def check(self) -> None:
        """Raises ToolError in a process that is not the program's own."""
        if os.getpid() != self.pid:
            raise ToolError(
                "unavailable",
                "Tools can be called from the program's own process only, not from one that it started.",
                "Call them in the main program and hand the data over.",
            )

    def open(self, slot: Slot, again: Callable[[], object]) -> int | None:
        """A number for the call; None when there are as many as may be, and *again* is called when one is over."""
        with self.lock:
            if self.ended:
                raise gone()
            if len(self.slots) >= OUTSTANDING:
                self.queue[again] = None
                return None
            self.queue.pop(again, None)
            while True:
                self.number = (self.number + 1) & 0xFFFFFFFF
                if self.number not in self.slots:
                    self.slots[self.number] = slot
                    return self.number

    # Sending

    def send(self, number: int, body: bytes) -> None:
        """One call. What a signal's handler raises in the middle leaves its parts behind: they go first the next time.
        Whether the part at hand has gone, nobody knows then; one that comes twice is dropped.
        """
        with self.sending:
            self.send_parts()
            if len(body) > PART_BYTES:
                self.unsent = [number, 0, body]
                self.send_parts()
            else:
                self.write(tool_frame(CALL, number, body))

    def send_parts(self) -> None:
        """What is left of a call of several parts."""
        while self.unsent is not None:
            number, index, body = self.unsent
            part = body[index * PART_BYTES : (index + 1) * PART_BYTES]
            if part:
                self.write(tool_frame(CALL, number, part, index, len(body)))
                self.unsent[1] = index + 1
            else:
                self.unsent = None

    def write(self, packet: bytes) -> None:
        """While the channel is full somebody has to read, or the engine, whose answers nobody takes, would not read
        either.
        """
        ready = select.poll()
        ready.register(CHANNEL, select.POLLIN | select.POLLOUT)
        while not (state := ready.poll()[0][1]) & select.POLLOUT:
            if state & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                raise gone()
            heard(self)
        try:
            os.write(CHANNEL, packet)
        except OSError as error:
            if error.errno not in ENDS:
                raise
            raise gone() from error

    # Reading

    def lead(self, slot: Slot) -> bool:
        """Whether *slot*'s thread is to read, under the lock. A leader of the same thread was interrupted, or waits
        below in the same stack.
        """
        if self.leader is not None and self.leader.thread != slot.thread:
            return False
        self.leader = slot
        return True

    def read(self) -> None:
        """Take one packet and give it to whoever waits for it. Only the leader may."""
        if len(self.packet) < TOOL_PACKET_BYTES:
            self.packet = bytearray(TOOL_PACKET_BYTES)
        packet = self.packet
        if not packet[0]:
            self.await_packet()
            try:
                os.readv(CHANNEL, [packet])
            except OSError as error:
                if error.errno not in ENDS:
                    raise  # of a signal's handler: TimeoutError is an OSError, too
        if not packet[0]:
            self.end()
            return
        _, kind, index, number, total = TOOL_HEAD.unpack_from(packet)
        slot = self.slots.get(number)
        if kind == ANSWER and slot is not None:
            if index == 0:
                slot.parts.clear()
            start = index * PART_BYTES
            slot.parts[index] = bytes(packet[TOOL_HEAD.size : TOOL_HEAD.size + min(PART_BYTES, total - start)])
            if len(slot.parts) * PART_BYTES >= total:
                self.answered(number, slot, b"".join(slot.parts[at] for at in sorted(slot.parts)))
        packet[0] = 0

    def await_packet(self) -> None:
        """Look for a while before going to sleep: a processor that has gone idle takes longer to wake up than a quick
        tool takes to answer. Only for a single call.
        """
        if len(self.slots) == 1:
            ready = select.poll()
            ready.register(CHANNEL, select.POLLIN)
            until = time.perf_counter() + SPIN_SECONDS
            while not ready.poll(0) and time.perf_counter() < until:
                continue

    def answered(self, number: int, slot: Slot, answer: bytes) -> None:
        """Wake up who waits, and somebody who waits to call."""
        with self.lock:
            slot.answer = answer
            self.slots.pop(number, None)
            again = next(iter(self.queue), None)
            if again is not None:
                del self.queue[again]
            if slot.lock.locked():
                slot.lock.release()
        if slot.future is not None:
            tell(slot.future)
        if again is not None:
            again()

    def end(self) -> None:
        """The engine answers no more."""
        with self.lock:
            self.ended = True
            waiting = list(self.slots.items())
        for number, slot in waiting:
            self.answered(number, slot, b"")

    def wait(self, slot: Slot) -> bytes:
        """The answer, in a thread. It reads the channel itself while no other one does."""
        try:
            while slot.answer is None:
                with self.lock:
                    mine = self.lead(slot)
                    if not mine and slot.answer is None:
                        slot.lock.acquire(False)
                if mine:
                    self.read()
                elif not slot.lock.acquire(timeout=LOOK_SECONDS):
                    self.replace()
            return slot.answer
        finally:
            self.hand_over(slot)

    def hand_over(self, slot: Slot) -> None:
        """Let another waiting thread read, if there is one; a loop looks by itself."""
        with self.lock:
            if self.leader is not slot:
                return
            self.leader = None
            for other in self.slots.values():
                if other.future is None and other.lock.locked():
                    other.lock.release()
                    return

    def replace(self) -> None:
        """A leader whose call is not on its thread's stack any more was interrupted before it could hand over."""
        with self.lock:
            leader = self.leader
            frame = sys._current_frames().get(leader.thread) if leader is not None else None
            while frame is not None:
                if frame.f_code in (Line.wait.__code__, heard.__code__) and frame.f_locals.get("slot") is leader:
                    return
                frame = frame.f_back
            self.leader = None


def heard(line: Line) -> bool:
    """Take a packet if there is one, unless a thread reads. Whether one was taken."""
    slot = Slot()
    with line.lock:
        if line.ended or not line.lead(slot):
            return False
    try:
        poll = select.poll()
        poll.register(CHANNEL, select.POLLIN)
        there = bool(line.packet[0] or poll.poll(0))
        if there:
            line.read()
        return there
    finally:
        line.hand_over(slot)


def tell(future: Any) -> None:
    """Wake a task up, from any thread; its loop may be over."""
    try:
        future.get_loop().call_soon_threadsafe(wake, future)
    except RuntimeError:
        return


def tell_last(futures: list[Any]) -> None:
    """Wake up who waits for the last of them."""
    tell(futures[-1])


def release(lock: Any) -> None:
    """Release it, unless it is free."""
    if lock.locked():
        lock.release()


def wake(future: Any) -> None:
    """In the loop of whoever waits."""
    if not future.done():
        future.set_result(None)


def gone() -> ToolError:
    """For calls that nobody will answer."""
    return ToolError("unavailable", "The program that holds the tools does not answer any more.")


def plain(value: Any) -> Any:
    """What JSON has no form for, as the tools' side reads it."""
    kind = type(value)
    if kind in (bytes, bytearray, memoryview):
        import base64

        return base64.b64encode(value).decode("ascii")
    if kind in (set, frozenset):
        return list(value)
    for name in ("isoformat", "tolist", "item"):  # dates and times; arrays and their scalars
        if hasattr(kind, name):
            return getattr(value, name)()
    if kind.__module__ in ("decimal", "uuid", "pathlib", "fractions"):
        return str(value)
    if hasattr(kind, "__dataclass_fields__"):
        return {name: getattr(value, name) for name in kind.__dataclass_fields__}
    raise TypeError(f"a {kind.__name__} has no form in JSON; use strings, numbers, lists and dicts")


def body_of(name: str, arguments: dict[str, Any]) -> bytes:
    """The call as it travels. Raises ToolError."""
    given = {key: value for key, value in arguments.items() if type(value) is not NotGiven}
    try:
        body = json.dumps({"tool": name, "arguments": given}, default=plain, allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise ToolError("invalid_arguments", f"The arguments of {name} cannot be sent: {error}.") from None
    if len(body) > CALL_BYTES:
        what = f"The arguments of {name} take {len(body):,} bytes; at most {CALL_BYTES:,} can be sent."
        raise ToolError("invalid_arguments", what, "Send less, or in several calls.")
    return body


def value_of(name: str, number: int, answer: bytes) -> Any:
    """What the tool returned. Raises ToolError."""
    if not answer:
        raise gone()
    found = json.loads(answer)
    if found["ok"]:
        if len(answer) > KEPT_BYTES:
            keep(name, number, answer)
        return found["value"]
    error = found["error"]
    raise ToolError(error["code"], error["message"], error["hint"])


def keep(name: str, number: int, answer: bytes) -> None:
    """A large result also as a file of JSON, for what would rather read it from there. Whether or not there is room."""
    head, tail = b'{"ok":true,"value":', b',"error":null}'
    if answer.startswith(head) and answer.endswith(tail):
        try:
            os.makedirs(KEPT, exist_ok=True)
            with open(f"{KEPT}/{name}-{number}.json", "wb") as file:
                file.write(memoryview(answer)[len(head) : -len(tail)])
        except OSError:
            return


def module(source: str) -> types.ModuleType:
    """The module ``tools``, with the functions of *source*."""
    line = Line()

    def call(name: str, arguments: dict[str, Any]) -> Any:
        line.check()
        body = body_of(name, arguments)
        slot = Slot()
        turn = _thread.allocate_lock()
        again = functools.partial(release, turn)
        while (number := line.open(slot, again)) is None:
            # Nobody may be reading: those whose calls these are may have been interrupted.
            if not heard(line):
                turn.acquire(timeout=LOOK_SECONDS)
        line.send(number, body)
        return value_of(name, number, line.wait(slot))

    def acall(name: str, arguments: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        return asynchronous(line, name, arguments)

    code = compile(source, FILE, "exec", dont_inherit=True)
    names: dict[str, Any] = {"_call": call, "_Default": NotGiven, "__name__": "tools"}
    exec(code, names)  # noqa: S102 - written by the host's program
    granted = {name: one for name, one in names.items() if type(one) is types.FunctionType and name[0] != "_"}

    def missing(name: str) -> Any:
        if name[:2] == "__":
            raise AttributeError(f"module 'tools' has no attribute {name!r}")
        known = ", ".join(granted) or "none"
        raise UnknownTool("unknown_tool", f"There is no tool {name!r} here.", f"The tools are: {known}.")

    def fill(name: str) -> Any:
        """The functions once more, when the first of them is asked for."""
        names = {"_call": acall, "_Default": NotGiven, "__name__": "tools.aio"}
        exec(code, names)  # noqa: S102 - as above
        aio.__dict__.update({name: names[name] for name in granted}, __getattr__=missing, __all__=list(granted))
        return getattr(aio, name)

    lines = ["The tools that this program may call. tools.NAME(...) returns the value or raises tools.ToolError;"]
    lines += [
        "``await tools.aio.NAME(...)`` is the same for asyncio. A value of more than 256 KiB is also kept as a file"
    ]
    lines += [f"of JSON in {KEPT}.", "", "Tools: " + (", ".join(granted) or "none")]
    made = types.ModuleType("tools", "\n".join(lines))
    aio = types.ModuleType("tools.aio", "The same functions, to be awaited.")
    aio.__dict__["__getattr__"] = fill
    made.__dict__.update(granted, ToolError=ToolError, aio=aio, __getattr__=missing, __all__=["ToolError", *granted])
    sys.modules["tools"], sys.modules["tools.aio"] = made, aio
    return made


async def asynchronous(line: Line, name: str, arguments: dict[str, Any]) -> Any:
    """One call from a loop."""
    import asyncio

    line.check()
    body = body_of(name, arguments)
    loop = asyncio.get_running_loop()
    slot = Slot(loop.create_future())
    turns: list[Any] = []
    again = functools.partial(tell_last, turns)
    while True:
        turns.append(loop.create_future())
        number = line.open(slot, again)
        if number is not None:
            break
        if heard(line):
            continue
        later = loop.call_later(LOOK_SECONDS, tell_last, turns)
        try:
            await turns[-1]
        finally:
            later.cancel()
    waiting = line.loops[loop] = line.loops.get(loop, 0) + 1
    if waiting == 1:
        loop.add_reader(CHANNEL, heard, line)
    try:
        line.send(number, body)
        await slot.future
    finally:
        line.loops[loop] -= 1
        if not line.loops[loop]:
            del line.loops[loop]
            loop.remove_reader(CHANNEL)
    return value_of(name, number, slot.answer or b"")
