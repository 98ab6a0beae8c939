"""A second reading of classic BPF, written from the manual and not from sandboxd's own evaluation.

Follows Documentation/networking/filter.rst for what seccomp(2) admits, and fails loudly on everything else.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

X86_64 = 0xC000003E
I386 = 0x40000003

KILL_PROCESS = 0x80000000
ERRNO = 0x00050000
LOG = 0x7FFC0000
ALLOW = 0x7FFF0000


def seccomp_data(architecture: int, number: int, arguments: Sequence[int]) -> bytes:
    """``struct seccomp_data`` of linux/seccomp.h, little-endian; the instruction pointer is of no interest."""
    return struct.pack("<iIQ6Q", number - (1 << 32) if number >> 31 else number, architecture, 0, *arguments)


def evaluate(program: bytes, architecture: int, number: int, arguments: Sequence[int] = (0,) * 6) -> int:
    """The value that *program* returns for one call."""
    data = seccomp_data(architecture, number, arguments)
    instructions = list(struct.iter_unpack("<HBBI", program))
    a = pc = 0
    for _ in range(len(instructions)):
        code, jt, jf, k = instructions[pc]
        pc += 1
        match code & 0x07:
            case 0x00:  # BPF_LD
                assert code == 0x20, "only BPF_W | BPF_ABS is admitted"
                (a,) = struct.unpack_from("<I", data, k)
            case 0x04:  # BPF_ALU
                assert code == 0x54, "only BPF_AND | BPF_K is used"
                a &= k
            case 0x05:  # BPF_JMP
                match code & 0xF0:
                    case 0x00:
                        pc += k
                    case 0x10:
                        pc += jt if a == k else jf
                    case 0x20:
                        pc += jt if a > k else jf
                    case 0x30:
                        pc += jt if a >= k else jf
                    case _:
                        raise AssertionError(f"unknown jump {code:#x}")
            case 0x06:  # BPF_RET
                assert code == 0x06, "only BPF_K is used"
                return int(k)
            case _:
                raise AssertionError(f"unknown instruction {code:#x}")
    raise AssertionError("the program did not return")


def answer(kind: str, errno: int = 0) -> int:
    """The return value of an action."""
    return {"allow": ALLOW, "log": LOG, "kill": KILL_PROCESS, "errno": ERRNO | errno}[kind]
