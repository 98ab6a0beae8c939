"""The host's end of one run's tool calls: packets in, answers out, several at a time.

Theory of operation
    The engine hands over a socket when the run is about to start. Daemon threads wait at it, any of them takes the next
    packet (the kernel wakes one) and carries its call to the end; before the last one that waits turns to a call, one
    more is sent there. So calls of several of the program's threads go side by side, and a tool that hangs holds
    nothing but its own thread. When the run is over the engine closes its end, and every thread finds that out.

Who calls is the socket: it belongs to one run, and nothing in a packet says anything else.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import threading
from typing import TYPE_CHECKING, Any, Final

from sandboxd.errors import ProtocolError, Unavailable
from sandboxd.inside import channel
from sandboxd.tools.pipeline.running import NoThread, Threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["RunTools", "ToolCall"]

log = logging.getLogger("sandboxd.tools")

WAITING: Final = 2
"""Threads that stay at a run's socket when their call is over: while one is at work, the other hears the next call."""


class ToolCall:
    """One call that a run's program made. ``run`` is the same object for all calls of a run."""

    __slots__ = ("_number", "run")

    def __init__(self, run: RunTools, number: int) -> None:
        self.run = run
        self._number = number

    @property
    def id(self) -> str | None:
        """The run's id, as its Result has it."""
        return self.run.id

    def frozen(self) -> contextlib.AbstractContextManager[None]:
        """The cell stands still, and its clocks, within the block. Raises Unavailable when it cannot be stopped, or is
        over.
        """
        return self.run.frozen(self._number)


class RunTools:
    """What one run's program may call; of one run only. As ``sandboxd.client.exchange.ToolHost``.

    *module* is the source text of the functions that the program sees, *calls* how many calls it may make, *call* what
    carries one out: it gets the body and a ToolCall and returns the answer's body, in one of several threads; it never
    raises. ``state`` is for its use.
    """

    def __init__(self, module: str, calls: int, call: Callable[[bytes, ToolCall], bytes]) -> None:
        self.module = module
        self.calls = calls
        self.id: str | None = None
        self.state: Any = None
        self._call = call
        self._lock = threading.Lock()
        self._sending = threading.Condition()
        self._sock: socket.socket | None = None
        self._waiting = self._threads = 0
        self._ended = False
        self._partial: dict[int, tuple[bytearray, list[int]]] = {}
        self._frozen: dict[int, Reply] = {}
        self._cancels: list[Callable[[], None]] = []

    # The run

    def begin(self, fd: int, run: str) -> None:
        """As ``ToolHost``."""
        sock = socket.socket(fileno=fd)
        with self._lock:
            if self._ended or self._sock is not None:
                sock.close()
                return
            self.id = run
            self._sock = sock
            self._threads = self._waiting = 1  # many runs call nothing
        try:
            _threads.start(self._serve)
        except NoThread:
            log.error("run %s: its tools cannot be served: no more threads can be started", run)
            self._leave(sock)

    def end(self) -> None:
        """As ``ToolHost``. Calls that are under way go on, and their answers are dropped."""
        with self._lock:
            self._ended = True
            sock, asking = self._sock, list(self._frozen.values())
            cancelled, self._cancels = self._cancels, []
        for answer in asking:
            answer.give(OVER)
        for cancel in cancelled:
            cancel()
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes those that wait

    # Calls

    def _serve(self) -> None:
        """Of one thread, until the run is over or there are enough others."""
        sock = self._sock
        assert sock is not None  # noqa: S101
        try:
            while (call := self._next(sock)) is not None:
                number, body = call
                self._answer(sock, number, self._call(body, ToolCall(self, number)))
                with self._lock:
                    if self._waiting >= WAITING:
                        return
                    self._waiting += 1
        except Exception:
            log.exception("a run's tool calls cannot be served any more")
            self.end()
        finally:
            self._leave(sock)

    def _leave(self, sock: socket.socket) -> None:
        with self._lock:
            self._threads -= 1
            last = not self._threads
        if last:
            self.end()
            sock.close()

    def _next(self, sock: socket.socket) -> tuple[int, bytes] | None:
        """The next call, whole; None at the end. This thread waits until it has one, and then no more."""
        while True:
            try:
                data = sock.recv(channel.TOOL_PACKET_BYTES)
            except OSError:
                data = b""
            call = None
            if data:
                try:
                    call = self._take(data)
                except (channel.FrameError, ProtocolError) as error:
                    log.warning("a run's tool calls: the engine sent %s", error)
                    data = b""
            if data and call is None:
                continue
            with self._lock:
                self._waiting -= 1
                more = bool(data) and not self._waiting and self._threads <= channel.OUTSTANDING
                if more:
                    self._waiting += 1
                    self._threads += 1
            if more:
                try:
                    _threads.start(self._serve)
                except NoThread:  # those that are there come back to it
                    with self._lock:
                        self._waiting -= 1
                        self._threads -= 1
            if not data:
                self.end()
            return call

    def _take(self, data: bytes) -> tuple[int, bytes] | None:
        """A packet; the call that it completes."""
        head = channel.parse_tool_frame(data, channel.CALL_BYTES)
        body = data[channel.TOOL_HEAD.size :]
        if head.kind == channel.FROZEN:
            with self._lock:
                answer = self._frozen.get(head.number)
            if answer is not None:
                answer.give(body)
            return None
        if head.kind != channel.CALL:
            raise ProtocolError("a frame that is not an engine's to send")
        if head.body == head.total:
            return head.number, body
        with self._lock:  # the parts of a call may come to several threads
            found, missing = self._partial.setdefault(head.number, (bytearray(head.total), [head.total]))
            start = head.index * channel.PART_BYTES
            found[start : start + head.body] = body
            missing[0] -= head.body
            if missing[0] > 0:
                return None
            del self._partial[head.number]
        return head.number, bytes(found)

    def _answer(self, sock: socket.socket, number: int, body: bytes) -> None:
        if len(body) > channel.ANSWER_BYTES:
            raise ValueError("an answer to a tool call is longer than may be")
        with contextlib.suppress(OSError), self._sending:  # the run is over: nobody wants it any more
            # A frozen cell takes nothing, and what waits for it would stand before the thaw.
            self._sending.wait_for(lambda: not self._frozen or self._ended)
            for packet in channel.tool_frames(channel.ANSWER, number, body):
                sock.send(packet, socket.MSG_NOSIGNAL)

    @contextlib.contextmanager
    def cancelling(self, cancel: Callable[[], None]) -> Iterator[None]:
        """*cancel* is called when the run ends within the block, or is over already."""
        with self._lock:
            over = self._ended
            self._cancels.append(cancel)
        try:
            if over:
                cancel()
            yield
        finally:
            with self._lock, contextlib.suppress(ValueError):
                self._cancels.remove(cancel)

    # Approval

    @contextlib.contextmanager
    def frozen(self, number: int) -> Iterator[None]:
        """See ToolCall."""
        answer = Reply()
        sock = self._sock
        assert sock is not None  # noqa: S101
        try:
            with contextlib.suppress(OSError), self._sending:
                with self._lock:
                    self._frozen[number] = answer
                    if self._ended:
                        answer.give(OVER)
                sock.send(channel.tool_frame(channel.FREEZE, number), socket.MSG_NOSIGNAL)
            why = answer.wait()
            if why:
                fix = "" if why == OVER else "see sandboxd doctor: the cgroup freezer is needed"
                raise Unavailable("freezer", why.decode("utf-8", "replace"), fix=fix)
            yield
            if self._is_over(sock):  # a yes for a program that is gone is none
                raise Unavailable("freezer", OVER.decode(), fix="")
        finally:
            with self._sending:
                with self._lock:
                    self._frozen.pop(number, None)
                with contextlib.suppress(OSError):
                    sock.send(channel.tool_frame(channel.THAW, number), socket.MSG_NOSIGNAL)
                self._sending.notify_all()

    def _is_over(self, sock: socket.socket) -> bool:
        """Whether the engine has closed its end, if nobody has read so far as to know."""
        if not self._ended:
            try:
                self._ended = not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            except OSError:
                self._ended = True
        return self._ended


OVER: Final = b"The run is over."


class Reply:
    """A value that one thread waits for."""

    __slots__ = ("_found", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._found: bytes | None = None

    def give(self, value: bytes) -> None:
        """The first one counts."""
        if self._found is None:
            self._found = value
            with contextlib.suppress(RuntimeError):
                self._lock.release()

    def wait(self) -> bytes:
        """Until it is there."""
        with self._lock:
            return self._found or b""


_threads: Final = Threads(most_abandoned=1, most_threads=math.inf)  # each run has some, for as long as it lasts
