"""One row of the attack table, and how its code is run in a cell.

The code is the body of a function. What it ends with is the row's outcome, one word on the last line of stdout:
``done`` when it comes to its end, the errno's name for an OSError, the text of a ``Refused``. A run that dies has its
status as its outcome (``denied``: killed by the filter).
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sandboxd import Limits, Result, Sandbox
from sandboxd.seccomp.syscalls import NUMBERS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Attack", "outcome", "program"]


@dataclass(frozen=True, slots=True)
class Attack:
    """*tries* is what is tried by *code*; *refusal* the outcome with every wall up.

    *alone* maps each wall that stops it on its own, all others down, to its refusal. With every wall down the outcome
    is one of *opens*: else the row would prove nothing. That is ``done``, or the errno by which the kernel shows that a
    harmless wrong argument reached it. One of *absent* means that this kernel or its configuration has no such thing.

    *single_id* is the outcome where all cells have the id of the engine's user, if another: an engine of an ordinary
    user without subordinate ids, which the shipped policies refuse. docs/threat-model.md says what is promised then.

    Where no wall can be taken down to prove it, *alone* is empty and *why* says what stops it, or why it is not tried.
    """

    id: str
    tries: str
    code: str
    refusal: str
    alone: Mapping[str, str] = field(default_factory=dict)
    opens: tuple[str, ...] = ("done",)
    absent: tuple[str, ...] = ()
    why: str = ""
    single_id: str = ""

    def __post_init__(self) -> None:
        if bool(self.alone) == bool(self.why):
            raise ValueError(f"{self.id}: either walls that stop it alone, or the reason why none can be shown")
        if set(self.alone.values()) & set(self.opens):
            raise ValueError(f"{self.id}: a wall's refusal could be the kernel's own answer")


PRELUDE = '''
import ctypes, errno, fcntl, mmap, os, signal, socket, stat, struct, sys, time

_libc = ctypes.CDLL(None, use_errno=True)
BAIT = os.environ.get("BAIT", "")
NUMBERS = {numbers}
SCRATCH = ctypes.create_string_buffer(4096)

class Refused(Exception):
    pass

def call(name, *arguments):
    """A bare system call, by name or number, without any filter's or libc's help."""
    ctypes.set_errno(0)
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    number = name if isinstance(name, int) else NUMBERS[name]
    result = _libc.syscall(ctypes.c_long(number), *words)
    if result == -1:
        raise OSError(ctypes.get_errno(), str(name))
    return result

def attack():
{body}

try:
    attack()
except OSError as error:
    found = errno.errorcode.get(error.errno, repr(error))
except Refused as error:
    found = str(error)
else:
    found = "done"
sys.stdout.write("\\n" + found + "\\n")
sys.stdout.flush()
'''

_CALLED = re.compile(r'call\("(\w+)"')


def program(code: str) -> str:
    """*code* as a whole program that prints its outcome."""
    numbers = {name: NUMBERS[name] for name in sorted(set(_CALLED.findall(code)))}
    body = textwrap.indent(textwrap.dedent(code).strip("\n"), "    ")
    return PRELUDE.replace("{numbers}", repr(numbers)).replace("{body}", body)


def outcome(result: Result) -> str:
    """The last line of what the attack printed; the status when it died first."""
    if result.status != "ok":
        return result.status if result.error is None else f"{result.error.type}: {result.error.message}"
    return result.stdout.strip().rpartition("\n")[2]


def attempt(sandbox: Sandbox, code: str, env: Mapping[str, str] | None = None) -> str:
    """Run *code* in a cell of *sandbox*; its outcome."""
    return outcome(sandbox.run(program(code), env=env, limits=Limits(wall_seconds=10), results=False))
