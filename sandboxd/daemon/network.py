"""The second opinion on the network wall, before a daemon is ready: what is in the cells' network namespace."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, Final, Self

from sandboxd.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

__all__ = ["NetworkCheck"]

SECONDS: Final = 30.0


class NetworkCheck:
    """Asks the kernel by ``netns_check``. Within ``async with`` it may be asked once.

    Root enters the namespace in a thread. Who is not root has to enter the user namespace first, which only a process
    with one thread may: one that is started before it is needed, for Python's start is most of what it takes.
    """

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        if os.geteuid() == 0:
            asyncio.get_running_loop().run_in_executor(None, _checker)  # while the zygote starts
        else:
            pipe = asyncio.subprocess.PIPE
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "sandboxd.kernel.netns", "-", stdin=pipe, stdout=pipe, stderr=pipe
            )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def ask(self, zygote: int) -> None:
        """Raises Unavailable unless the network namespace of process *zygote* is as the kernel makes it."""
        path = f"/proc/{zygote}/ns/net"
        found = await (self._looked(path) if self._process is None else self._told(self._process, path))
        if found:
            fix = "a new network namespace must hold nothing but lo, down; see sandboxd doctor"
            what = f"the cells' network namespace is not empty: {'; '.join(found)[:500]}"
            raise Unavailable("self-test", what, fix=fix)

    @staticmethod
    async def _looked(path: str) -> list[str]:
        try:
            return await asyncio.to_thread(lambda: _checker()(path))
        except OSError as error:
            raise _unseen(str(error)) from error

    @staticmethod
    async def _told(process: asyncio.subprocess.Process, path: str) -> list[str]:
        try:
            said, complaint = await asyncio.wait_for(process.communicate(path.encode()), SECONDS)
        except TimeoutError:
            raise _unseen(f"nothing was said within {SECONDS:.0f} s") from None
        if process.returncode != 0:
            last = complaint.decode("utf-8", "replace").strip().splitlines()[-1:]
            raise _unseen(last[0][:500] if last else f"the check ended with status {process.returncode}")
        found = None
        with contextlib.suppress(ValueError):
            found = json.loads(said)
        if not isinstance(found, list):
            raise _unseen(f"this is no answer: {said[:200]!r}")
        return [str(one) for one in found]


def _checker() -> Callable[[str], list[str]]:
    from sandboxd.kernel.netns import check_empty

    return check_empty


def _unseen(why: str) -> Unavailable:
    fix = "let the daemon enter its own zygotes' namespaces; sandboxd doctor tries the same"
    return Unavailable("self-test", f"the cells' network namespace cannot be looked into: {why}", fix=fix)
