"""The Python that runs in the cells: where it lives and what it is.

The engine's own (``Interpreter.current()``) or one that a policy names (``Interpreter.probe()``). A policy may name a
launcher, such as a pyenv shim: what the interpreter says of itself counts, never the path that started it.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from sandboxd.errors import Unavailable

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping

OLDEST = (3, 11)
PROBE_TIMEOUT_SECONDS = 10.0
PROBE_OUTPUT_BYTES = 65_536

# Runs in the other interpreter. -I keeps the environment, the working directory and the user's site-packages out; site
# itself must run, since it is what finds a virtual environment.
_PROBE = """\
import json, os, sys
print(json.dumps({
    "executable": sys.executable,
    "prefix": sys.prefix,
    "base_prefix": sys.base_prefix,
    "exec_prefix": sys.exec_prefix,
    "base_exec_prefix": sys.base_exec_prefix,
    "version": list(sys.version_info[:3]),
    "implementation": sys.implementation.name,
    "stdlib": os.path.dirname(os.__file__),
    "platform": sys.platform + "-" + os.uname().machine + ("" if sys.maxsize > 1 << 32 else "-32bit"),
    "free_threaded": "t" in sys.abiflags,
}))
"""


class Interpreter(NamedTuple):
    """A CPython >= 3.11 for x86-64 Linux. Paths are absolute and as the interpreter spells them, links unresolved."""

    executable: str
    """sys.executable: what to exec inside. In a virtual environment its path, not its target, decides the prefix."""
    prefix: str
    base_prefix: str
    exec_prefix: str
    base_exec_prefix: str
    version: tuple[int, int, int]
    implementation: str
    stdlib: str
    """The directory of the standard library's Python files."""

    @property
    def trees(self) -> tuple[str, ...]:
        """The directories that must be visible for it to run, without repetition."""
        found = (self.prefix, self.base_prefix, self.exec_prefix, self.base_exec_prefix, self.stdlib)
        return tuple(dict.fromkeys(found))

    @classmethod
    def current(cls) -> Interpreter:
        """The interpreter of this process. Raises Unavailable when it cannot serve, as probe() does."""
        return cls._checked(
            {
                "executable": sys.executable,
                "prefix": sys.prefix,
                "base_prefix": sys.base_prefix,
                "exec_prefix": sys.exec_prefix,
                "base_exec_prefix": sys.base_exec_prefix,
                "version": list(sys.version_info[:3]),
                "implementation": sys.implementation.name,
                "stdlib": os.path.dirname(os.__file__),
                "platform": sys.platform + "-" + os.uname().machine + ("" if sys.maxsize > 1 << 32 else "-32bit"),
                "free_threaded": "t" in sys.abiflags,
            },
            "the running interpreter",
        )

    @classmethod
    def probe(cls, path: str, timeout_seconds: float = PROBE_TIMEOUT_SECONDS) -> Interpreter:
        """Ask the interpreter that *path* starts what it is.

        Runs *path* on the host, as the engine, with an empty environment: the operator chose it. Raises Unavailable
        (stage ``interpreter``): the errno of a start that failed, ETIMEDOUT, EINVAL for a relative path, ENOEXEC for
        what does not answer as Python does, ENOTSUP for a Python that cannot serve.
        """
        if not os.path.isabs(path):
            raise _unavailable(errno.EINVAL, f"[runtime] interpreter must be an absolute path, not {path!r}")
        import json  # here and below: what only a named interpreter needs, an engine's start should not wait for

        answer = _ask(path, timeout_seconds)
        try:
            facts = json.loads(answer)
        except (ValueError, RecursionError):
            facts = None
        if not isinstance(facts, dict):
            raise _unavailable(errno.ENOEXEC, f"{path} does not answer as a Python interpreter does")
        return cls._checked(cast("dict[str, Any]", facts), path)

    @classmethod
    def _checked(cls, facts: Mapping[str, Any], source: str) -> Interpreter:
        """An Interpreter from what one said of itself. Raises Unavailable as probe() does."""
        version = cast("list[Any]", facts["version"]) if isinstance(facts.get("version"), list) else []
        words = {name: facts.get(name) for name in (*_PATHS, "implementation", "platform")}
        if (
            len(version) != 3
            or not all(type(part) is int for part in version)
            or not all(isinstance(word, str) and "\0" not in word for word in words.values())
        ):
            raise _unavailable(errno.ENOEXEC, f"{source} does not answer as a Python interpreter does")
        if words["implementation"] != "cpython":
            raise _unavailable(errno.ENOTSUP, f"{source} is {words['implementation']}, not CPython")
        if tuple(version[:2]) < OLDEST:
            raise _unavailable(errno.ENOTSUP, f"{source} is Python {'.'.join(map(str, version))}, older than 3.11")
        if words["platform"] != "linux-x86_64":
            raise _unavailable(errno.ENOTSUP, f"{source} is built for {words['platform']}, not for linux-x86_64")
        if facts.get("free_threaded"):
            # The extension for the cells uses the limited API, which free-threaded builds do not load.
            raise _unavailable(errno.ENOTSUP, f"{source} is a free-threaded build, not an ordinary one")
        for name in _PATHS:
            if not os.path.isabs(str(words[name])):
                raise _unavailable(errno.ENOTSUP, f"{source} does not know its own {name} ({words[name]!r})")
        return cls(
            executable=str(words["executable"]),
            prefix=str(words["prefix"]),
            base_prefix=str(words["base_prefix"]),
            exec_prefix=str(words["exec_prefix"]),
            base_exec_prefix=str(words["base_exec_prefix"]),
            version=(version[0], version[1], version[2]),
            implementation=str(words["implementation"]),
            stdlib=str(words["stdlib"]),
        )


_PATHS = ("executable", "prefix", "base_prefix", "exec_prefix", "base_exec_prefix", "stdlib")


def _ask(path: str, timeout_seconds: float) -> bytes:
    """What *path* prints for the probe. Its process group is killed when it is late or too talkative."""
    import subprocess
    import time

    deadline = time.monotonic() + timeout_seconds
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            process = subprocess.Popen(
                [path, "-I", "-c", _PROBE],
                env={},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=writer,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise _unavailable(error.errno or errno.EIO, f"{path} does not start") from error
        finally:
            os.close(writer)
        with process:
            try:
                answer = _read_until(reader, deadline)
                status = process.wait(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise _unavailable(errno.ETIMEDOUT, f"{path} did not answer within {timeout_seconds:g} s") from None
            except subprocess.TimeoutExpired:
                raise _unavailable(errno.ETIMEDOUT, f"{path} did not end within {timeout_seconds:g} s") from None
            except OverflowError:
                raise _unavailable(errno.ENOEXEC, f"{path} does not answer as a Python interpreter does") from None
            finally:
                _kill_group(process)
    finally:
        os.close(reader)
    if status != 0:
        raise _unavailable(errno.ENOEXEC, f"{path} ended with status {status} when asked what it is")
    return answer


def _read_until(fd: int, deadline: float) -> bytes:
    """All of *fd*. Raises OverflowError past PROBE_OUTPUT_BYTES, TimeoutError when no end comes before *deadline*."""
    import select
    import time

    poller = select.poll()
    poller.register(fd, select.POLLIN)
    answer = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(left * 1000):
            raise TimeoutError
        chunk = os.read(fd, PROBE_OUTPUT_BYTES)
        if not chunk:
            return answer
        answer += chunk
        if len(answer) > PROBE_OUTPUT_BYTES:
            raise OverflowError


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for what the probe started. The group's id stays reserved while its leader is not reaped."""
    import signal

    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)


def _unavailable(number: int, message: str) -> Unavailable:
    return Unavailable(
        stage="interpreter",
        errno=number,
        message=message,
        fix="name a CPython 3.11 or later for x86-64 by its absolute path in [runtime] interpreter",
    )
