"""The shipped profiles, what a policy makes of them, and the programs they compile to: all without a kernel."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import bpf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd import seccomp, seccomp_bpf, seccomp_cache, seccomp_profile
from sandboxd.errors import PolicyError, Unavailable
from sandboxd.seccomp import ALLOW, KILL, LOG, Action, Profile, Rule, Test, refuse
from sandboxd.seccomp_rules import Operator
from sandboxd.syscalls import NAMES, NEWEST, NUMBERS, SINCE, nearest

SHIPPED = ("default", "strict")
REGISTER = (1 << 64) - 1

# Traced from real programs: Python's standard library, multiprocessing in its three ways, numpy and scipy, node, bash.
MEASURED = """
accept4 access arch_prctl bind brk capget chdir chmod clock_nanosleep clone clone3 close close_range connect dup2
epoll_create1 epoll_ctl epoll_pwait epoll_wait eventfd2 execve exit exit_group faccessat2 fadvise64 fchown fcntl fdatasync
fstat ftruncate futex getcwd getdents64 getegid geteuid getgid getpeername getpgrp getpid getppid getrandom getsockname
getsockopt gettid getuid ioctl kill link listen lseek madvise mbind mkdir mmap mprotect munmap newfstatat openat pipe2
pkey_alloc poll pread64 prlimit64 pwrite64 read readlink recvfrom recvmsg rename rmdir rseq rt_sigaction rt_sigprocmask
rt_sigreturn sched_getaffinity sendfile sendmsg sendto set_robust_list set_tid_address setitimer shutdown sigaltstack
socket socketpair statfs statx symlink sysinfo uname unlink unlinkat utimensat vfork wait4 write
""".split()


def decide(profile: Profile, call: str, *arguments: int) -> str:
    """The answer to *call* in a word; arguments that are not given are 0."""
    return str(profile.decide(NUMBERS[call], (*arguments, *(0,) * (6 - len(arguments)))))


@pytest.fixture(scope="module")
def default() -> Profile:
    return seccomp.effective("default")


@pytest.fixture(scope="module")
def strict() -> Profile:
    return seccomp.effective("strict")


# ---------------------------------------------------------------------------------------------------------- the table


def test_table_has_every_number_of_the_two_ranges() -> None:
    assert list(NAMES) == [*range(337), *range(424, NEWEST + 1)]


def test_table_agrees_with_the_headers_of_this_host() -> None:
    assert [problem for problem in seccomp.lint() if "unistd" in problem] == []


def test_since_names_calls_of_the_table() -> None:
    assert set(SINCE) <= set(NUMBERS)
    assert {name for name, number in NUMBERS.items() if number > NUMBERS["process_madvise"]} <= set(SINCE)


@pytest.mark.parametrize(
    ("name", "number"), [("read", 0), ("rseq", 334), ("pidfd_send_signal", 424), ("mseal", 462), ("file_setattr", 469)]
)
def test_anchors_of_the_table(name: str, number: int) -> None:
    assert NUMBERS[name] == number


def test_nearest_name() -> None:
    assert (nearest("openatt"), nearest("zzzzzz")) == ("openat", None)


# ------------------------------------------------------------------------------------------------- the shipped profiles


def test_lint_finds_nothing() -> None:
    assert seccomp.lint() == []


def test_lint_reports_a_call_that_a_newer_kernel_has(tmp_path: Path) -> None:
    header = tmp_path / "unistd_64.h"
    header.write_text(f"#define __NR_read 0\n#define __NR_brand_new {NEWEST + 1}\n")
    (problem,) = seccomp.lint(header)
    assert f"brand_new is number {NEWEST + 1}" in problem


def test_lint_reports_what_a_profile_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SHIPPED:
        shutil.copy(seccomp.profiles_dir() / f"{name}.toml", tmp_path)
    text = (tmp_path / "strict.toml").read_text()
    (tmp_path / "strict.toml").write_text(text.replace('"add_key", ', "").replace('"socket"]', '"socket", "add_key"]', 1))
    default_text = (tmp_path / "default.toml").read_text()
    (tmp_path / "default.toml").write_text(default_text.replace('"ptrace", ', ""))
    monkeypatch.setattr(seccomp, "profiles_dir", lambda: tmp_path)
    assert [problem for problem in seccomp.lint() if "ptrace" in problem] == [
        "default: ptrace (number 101) is neither allowed nor denied by name"
    ]


def test_lint_reports_what_strict_allows_and_default_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SHIPPED:
        shutil.copy(seccomp.profiles_dir() / f"{name}.toml", tmp_path)
    text = (tmp_path / "strict.toml").read_text()
    (tmp_path / "strict.toml").write_text(
        text.replace('"ptrace", ', "").replace("[allow.system]", '[allow.system]\nptrace = "a mistake"')
    )
    monkeypatch.setattr(seccomp, "profiles_dir", lambda: tmp_path)
    assert seccomp.lint() == ["strict: ptrace is allowed here and refused by default"]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_row_has_a_reason(name: str) -> None:
    profile = seccomp.effective(name)
    assert all(rule.reason for rule in profile.rules)
    assert {rule.number for rule in profile.rules} == set(NAMES)


def test_rules_are_sorted_by_number(default: Profile) -> None:
    numbers = [rule.number for rule in default.rules]
    assert numbers == sorted(numbers)


def test_default_allows_what_was_measured(default: Profile) -> None:
    refused = {
        call for call in MEASURED if not any(answer.action.permits for answer in default.verdict(NUMBERS[call]))
    }
    # libc falls back to clone; BLAS does without.
    assert refused == {"clone3", "mbind"}


REFUSED = [
    *((call, "EPERM") for call in "unshare setns mount umount2 pivot_root chroot fsopen fsmount move_mount".split()),
    *((call, "EPERM") for call in "open_tree mount_setattr open_tree_attr fspick fsconfig".split()),
    *((call, "EPERM") for call in "ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_getfd".split()),
    *((call, "EPERM") for call in "keyctl add_key request_key bpf perf_event_open userfaultfd seccomp".split()),
    *((call, "EPERM") for call in "kexec_load kexec_file_load init_module finit_module delete_module reboot".split()),
    *((call, "EPERM") for call in "swapon swapoff acct syslog quotactl ioperm iopl modify_ldt sethostname".split()),
    *((call, "EPERM") for call in "clock_settime settimeofday adjtimex clock_adjtime vhangup".split()),
    *((call, "EPERM") for call in "name_to_handle_at open_by_handle_at fanotify_init fanotify_mark".split()),
    *((call, "EPERM") for call in "mbind set_mempolicy migrate_pages move_pages memfd_secret vmsplice".split()),
    *((call, "EPERM") for call in "shmget semget msgget mq_open setxattr setxattrat setuid setgroups capset".split()),
    *((call, "EPERM") for call in "uselib lookup_dcookie io_setup io_submit sync syncfs".split()),
    *((call, "ENOSYS") for call in "clone3 pidfd_open pidfd_send_signal io_uring_setup io_uring_enter".split()),
    *((call, "ENOSYS") for call in "io_uring_register statmount listmount cachestat create_module".split()),
]


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize(("call", "answer"), REFUSED, ids=[call for call, _ in REFUSED])
def test_call_is_refused_whatever_its_arguments(name: str, call: str, answer: str) -> None:
    (only,) = seccomp.effective(name).verdict(NUMBERS[call])
    assert str(only.action) == answer


THREAD = 0x3D0F00  # VM FS FILES SIGHAND THREAD SYSVSEM SETTLS PARENT_SETTID CHILD_CLEARTID, as glibc calls it
PROCESS = 0x1200011  # CHILD_CLEARTID CHILD_SETTID SIGCHLD
HIGH = 1 << 32

BY_ARGUMENTS = [
    ("clone", (THREAD,), "allow", "allow"),
    ("clone", (THREAD | HIGH,), "allow", "allow"),
    ("clone", (PROCESS,), "allow", "EPERM"),
    ("clone", (0x4111,), "allow", "EPERM"),  # vfork as posix_spawn does it
    *(
        (("clone", (PROCESS | 1 << bit,), "EPERM", "EPERM"))
        for bit in (17, 25, 26, 27, 28, 29, 30)  # NEWNS NEWCGROUP NEWUTS NEWIPC NEWUSER NEWPID NEWNET
    ),
    ("clone", (THREAD | 0x10000000,), "EPERM", "EPERM"),
    ("clone", (HIGH | 0x10000000,), "EPERM", "EPERM"),
    ("clone", (PROCESS | 0x8000,), "EPERM", "EPERM"),  # CLONE_PARENT
    ("clone", (PROCESS | 0x80,), "allow", "EPERM"),  # not CLONE_NEWTIME here: part of the exit signal
    ("socket", (1, 1), "allow", "EAFNOSUPPORT"),
    ("socket", (1 | HIGH, 1), "allow", "EAFNOSUPPORT"),
    *((("socket", (family, 1), "EAFNOSUPPORT", "EAFNOSUPPORT")) for family in (0, 2, 10, 16, 17, 38, 40, 2 | HIGH)),
    ("socketpair", (1, 1), "allow", "allow"),
    ("socketpair", (2, 1), "EAFNOSUPPORT", "EAFNOSUPPORT"),
    ("setsockopt", (3, 1, 7), "allow", "allow"),
    ("setsockopt", (3, 1, 26), "EPERM", "EPERM"),  # SO_ATTACH_FILTER
    ("setsockopt", (3, 1 | HIGH, 26 | HIGH), "EPERM", "EPERM"),
    ("setsockopt", (3, 6, 26), "allow", "allow"),  # another level's option
    ("ioctl", (0, 0x5401), "allow", "allow"),
    ("ioctl", (0, 0x5401 | HIGH), "allow", "allow"),
    ("ioctl", (0, 0x5412), "EPERM", "EPERM"),  # TIOCSTI
    ("ioctl", (0, 0x5412 | HIGH), "EPERM", "EPERM"),
    ("ioctl", (0, 0x541C | 7 << 40), "EPERM", "EPERM"),  # TIOCLINUX
    ("ioctl", (0, 0x540E), "ENOTTY", "ENOTTY"),  # TIOCSCTTY
    ("fcntl", (0, 1), "allow", "allow"),
    ("fcntl", (0, 1024), "EPERM", "EPERM"),  # F_SETLEASE
    ("fcntl", (0, 1026 | HIGH), "EPERM", "EPERM"),  # F_NOTIFY
    ("prctl", (15,), "allow", "allow"),  # PR_SET_NAME
    ("prctl", (4, 1), "EPERM", "EPERM"),  # PR_SET_DUMPABLE
    ("prctl", (22, 2), "EPERM", "EPERM"),  # PR_SET_SECCOMP
    ("prctl", (35,), "EPERM", "EPERM"),  # PR_SET_MM
    ("prctl", (53,), "EPERM", "EPERM"),  # PR_SET_SPECULATION_CTRL
    ("prctl", (0x59616D61,), "EPERM", "EPERM"),  # PR_SET_PTRACER
    ("prctl", (47, 1), "allow", "EPERM"),  # PR_CAP_AMBIENT, IS_SET
    ("prctl", (47, 2), "EPERM", "EPERM"),  # PR_CAP_AMBIENT, RAISE
    ("prctl", (47, 1 | HIGH), "EPERM", "EPERM"),
    ("prlimit64", (0, 7), "allow", "allow"),
    ("prlimit64", (1, 7), "EPERM", "EPERM"),
    ("prlimit64", (REGISTER, 7), "EPERM", "EPERM"),
    ("personality", (0,), "allow", "EPERM"),
    ("personality", (0xFFFFFFFF,), "allow", "EPERM"),
    ("personality", (0x0400000,), "EPERM", "EPERM"),  # READ_IMPLIES_EXEC
    ("mknod", (0, 0o10644), "allow", "EPERM"),
    ("mknod", (0, 0o20644), "EPERM", "EPERM"),
    ("mknod", (0, 0o60644 | HIGH), "EPERM", "EPERM"),
    ("mknodat", (0, 0, 0o10644), "allow", "EPERM"),
    ("mknodat", (0, 0, 0o20644), "EPERM", "EPERM"),
    ("execve", (), "allow", "EPERM"),
    ("fork", (), "allow", "EPERM"),
]


@pytest.mark.parametrize(
    ("call", "arguments", "in_default", "in_strict"),
    BY_ARGUMENTS,
    ids=[f"{call}-{'-'.join(map(hex, arguments))}" for call, arguments, _, _ in BY_ARGUMENTS],
)
def test_arguments_decide(
    default: Profile, strict: Profile, call: str, arguments: tuple[int, ...], in_default: str, in_strict: str
) -> None:
    assert (decide(default, call, *arguments), decide(strict, call, *arguments)) == (in_default, in_strict)


@pytest.mark.parametrize("name", SHIPPED)
def test_unknown_numbers_answer_enosys_and_x32_ones_kill(name: str) -> None:
    profile = seccomp.effective(name)
    assert {str(profile.decide(number)) for number in (337, 423, NEWEST + 1, 547, 5000, 0xFFFFFFFF)} == {"ENOSYS"}
    assert {str(profile.decide(0x40000000 | number)) for number in (0, 39, 59, 520)} == {"kill"}


@pytest.mark.parametrize("name", SHIPPED)
def test_verdict_has_an_example_for_every_row(name: str) -> None:
    profile = seccomp.effective(name)
    for number in range(600):
        answers = profile.verdict(number)
        assert answers
        for answer in answers:
            assert answer.arguments is not None, NAMES[number]
            assert profile.decide(number, answer.arguments) == answer.action


# ---------------------------------------------------------------------------------------------- a policy's allow and deny


def test_allow_lifts_a_refusal() -> None:
    assert decide(seccomp.effective("default", allow=["keyctl"]), "keyctl") == "allow"


def test_allow_lifts_an_argument_rule() -> None:
    assert decide(seccomp.effective("default", allow=["socket"]), "socket", 2) == "allow"


def test_deny_answers_eperm() -> None:
    profile = seccomp.effective("default", deny=["execve", "socket"])
    assert (decide(profile, "execve"), decide(profile, "socket", 1)) == ("EPERM", "EPERM")


def test_deny_keeps_the_errno_of_a_refusal() -> None:
    assert decide(seccomp.effective("default", deny=["clone3"]), "clone3") == "ENOSYS"


def test_deny_of_an_unlisted_call_of_a_profile_that_allows_by_default(tmp_path: Path) -> None:
    path = tmp_path / "open.json"
    path.write_text('{"defaultAction": "SCMP_ACT_ALLOW"}')
    assert decide(seccomp.effective(path, deny=["ptrace"]), "ptrace") == "EPERM"


@pytest.mark.parametrize("key", ["allow", "deny"])
def test_unknown_name_is_an_error_with_the_nearest(key: str) -> None:
    with pytest.raises(PolicyError, match=rf"seccomp\.{key}: 'sockt' .* did you mean socket"):
        seccomp.effective("default", **{key: ["sockt"]})


def test_name_in_both_lists_is_an_error() -> None:
    with pytest.raises(PolicyError, match="seccomp.deny: bpf is also in seccomp.allow"):
        seccomp.effective("default", allow=["bpf"], deny=["bpf"])


def test_what_every_cell_needs_cannot_be_denied() -> None:
    with pytest.raises(PolicyError, match=r"seccomp.deny: exit_group is refused") as caught:
        seccomp.effective("default", deny=["exit_group"])
    assert caught.value.key == "seccomp.deny"


def test_hash_is_of_what_is_in_force(default: Profile) -> None:
    assert default.sha256 == seccomp.effective("default", deny=["clone3"]).sha256
    assert default.sha256 != seccomp.effective("default", deny=["execve"]).sha256
    reworded = Profile("other", default.default_action, tuple(Rule(r.number, r.action, r.tests) for r in default.rules))
    assert reworded.sha256 == default.sha256
    assert len(default.sha256) == 64


# ------------------------------------------------------------------------------------------------ reading our own format

MINIMAL = """
name = "small"
description = "for a test"
default = "ENOSYS"
[allow.all]
read = "r"
write = "r"
close = "r"
mmap = "r"
munmap = "r"
brk = "r"
futex = "r"
rt_sigreturn = "r"
exit = "r"
exit_group = "r"
"""


def test_file_of_our_form_is_read_by_path(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(MINIMAL)
    profile = seccomp.effective(path)
    assert (profile.name, decide(profile, "read"), decide(profile, "openat")) == ("small", "allow", "ENOSYS")


WRONG = [
    ("[allow.more]\nraed = 'x'", "allow.more.raed: 'raed' is no known system call of x86-64; did you mean read?"),
    ("[allow.more]\nread = 'x'", "allow.more.read: read already stands in allow.all.read"),
    ("[allow.more]\ndup = ''", "allow.more.dup: a text is missing here"),
    ("[allow.more]\ndup = 3", "allow.more.dup: a text is missing here"),
    ("[deny.x]\nerrno = 'EPERN'\nreason = 'x'\ncalls = ['dup']", "deny.x.errno: 'EPERN' is no errno"),
    ("[deny.x]\nerrno = 'EPERM'\ncalls = ['dup']", "deny.x.reason: a text is missing here"),
    ("[deny.x]\nerrno = 'EPERM'\nreason = 'x'\ncalls = []", "deny.x.calls: it must be a list of names"),
    ("[deny.x]\nerrno = 'EPERM'\nreason = 'x'\ncalls = ['dup']\nnote = 'x'", "deny.x.note: there is no such key"),
    ("[[rule]]\ncalls = ['dup']\nreason = 'x'\notherwise = 'allow'", "rule[0]: it has neither a refuse nor an allow case"),
    ("[[rule]]\ncalls = ['dup']\nreason = 'x'\nallow = [{arg = 0, is = 1, reason = 'x'}]", "rule[0].otherwise"),
    ("[other]", "other: there is no such key"),
    ("read = 'again'", "this is not TOML"),
]
CASES = [
    ("{arg = 6, is = 1, reason = 'x'}", "there is no argument 6"),
    ("{is = 1, reason = 'x'}", "arg: it is missing"),
    ("{arg = 0, reason = 'x'}", "exactly one of is, has, lacks"),
    ("{arg = 0, is = 1, has = 1, reason = 'x'}", "exactly one of is, has, lacks"),
    ("{arg = 0, is = '1', reason = 'x'}", "is: it must be a whole number"),
    ("{arg = 0, is = true, reason = 'x'}", "is: it must be a whole number"),
    ("{arg = 0, is = -1, reason = 'x'}", "is not an unsigned 64-bit number"),
    ("{arg = 0, is = 0x100000000, reason = 'x'}", "is not within the mask"),
    ("{arg = 0, is = 3, mask = 2, reason = 'x'}", "is not within the mask"),
    ("{arg = 0, has = 0x100000000, reason = 'x'}", "it names bits above 32"),
    ("{arg = 0, has = 1, mask = 1, reason = 'x'}", "has names the bits itself"),
    ("{arg = 0, has = 0, reason = 'x'}", "or empty"),
    ("{arg = 0, is = 1, bits = 16, reason = 'x'}", "it must be 32 or 64"),
    ("{arg = 0, is = 1}", "reason: a text is missing"),
    ("{arg = 0, is = 1, reason = 'x', then = 'y'}", "then: there is no such key"),
    ("{arg = 0, is = 1, reason = 'x', and = [{arg = 1}]}", "and[0]: exactly one of"),
]
RULE = "[[rule]]\ncalls = ['dup']\nreason = 'x'\notherwise = 'EPERM'\nallow = [%s]"


@pytest.mark.parametrize(("addition", "message"), [*WRONG, *((RULE % case, message) for case, message in CASES)])
def test_wrong_profile_is_refused_by_its_key(addition: str, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        seccomp_profile.parse(MINIMAL + addition + "\n", "small.toml")
    assert message in str(caught.value)
    assert caught.value.file == "small.toml"


def test_default_that_allows_is_refused() -> None:
    with pytest.raises(PolicyError, match="default: it must be the name of an errno"):
        seccomp_profile.parse(MINIMAL.replace('"ENOSYS"', '"allow"'), "small.toml")


@pytest.mark.parametrize("name", ["nothing", "Default", "../default", "/etc/passwd", "default.txt", ""])
def test_profile_that_is_not_there(name: str) -> None:
    with pytest.raises(PolicyError, match=r"seccomp\.profile"):
        seccomp.effective(name)


def test_file_that_is_too_long_or_not_text(tmp_path: Path) -> None:
    path = tmp_path / "big.toml"
    path.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(PolicyError, match="at most"):
        seccomp.effective(path)
    path.write_bytes(b"\xff")
    with pytest.raises(PolicyError, match="UTF-8"):
        seccomp.effective(path)


# --------------------------------------------------------------------------------------------------------- the programs


def assert_means(program: bytes, profile: Profile, numbers: list[int], registers: list[tuple[int, ...]]) -> None:
    """*program* does what *profile* says for these numbers, with each row's example and with *registers*."""
    for number in numbers:
        examples = [answer.arguments for answer in profile.verdict(number) if answer.arguments is not None]
        for arguments in (*examples, *registers):
            action = profile.decide(number, arguments)
            assert bpf.evaluate(program, bpf.X86_64, number, arguments) == bpf.answer(action.kind, action.errno), (
                f"{NAMES.get(number, number)} {[hex(argument) for argument in arguments]}"
            )


ALL_NUMBERS = [*range(601), 0x3FFFFFFF, *(0x40000000 | n for n in range(0, 601, 7)), 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
REGISTERS = [(0,) * 6, (REGISTER,) * 6, (1,) * 6, (1 << 32,) * 6, (0x5412,) * 6, (0x10000000,) * 6, (0x110000000,) * 6]


@pytest.mark.parametrize("name", SHIPPED)
def test_program_means_what_the_profile_says(name: str) -> None:
    profile = seccomp.effective(name)
    assert_means(seccomp.compile(profile), profile, ALL_NUMBERS, REGISTERS)


@pytest.mark.parametrize("name", SHIPPED)
def test_other_architectures_are_killed(name: str) -> None:
    program = seccomp.compile(seccomp.effective(name))
    for architecture in (bpf.I386, 0xC00000B7, 0x4000003E, 0, 0xFFFFFFFF):
        for number in range(0, 600, 11):
            assert bpf.evaluate(program, architecture, number) == bpf.KILL_PROCESS


@pytest.mark.parametrize("name", SHIPPED)
def test_architecture_and_x32_are_asked_before_anything_else(name: str) -> None:
    instructions = list(struct.iter_unpack("=HBBI", seccomp.compile(seccomp.effective(name))))
    assert instructions[0] == (0x20, 0, 0, 4)  # load the architecture
    assert instructions[1][0::3] == (0x15, bpf.X86_64)
    assert instructions[2] == (0x20, 0, 0, 0)  # load the number
    assert instructions[3][0::3] == (0x35, 0x40000000)


@pytest.mark.parametrize("name", SHIPPED)
def test_marker_replaces_every_refusal_and_nothing_else(name: str) -> None:
    profile = seccomp.effective(name)
    program = seccomp.compile(profile, marker_errno=4000)
    for number in ALL_NUMBERS:
        for answer in profile.verdict(number):
            assert answer.arguments is not None
            expected = bpf.answer("errno", 4000) if answer.action.kind == "errno" else bpf.answer(answer.action.kind)
            assert bpf.evaluate(program, bpf.X86_64, number, answer.arguments) == expected


def test_calls_that_libseccomp_does_not_know_are_in_the_program() -> None:
    profile = seccomp.effective("default", allow=["listns", "rseq_slice_yield"])
    program = seccomp.compile(profile)
    assert bpf.evaluate(program, bpf.X86_64, NUMBERS["rseq_slice_yield"]) == bpf.ALLOW
    assert bpf.evaluate(program, bpf.X86_64, NUMBERS["mseal"]) == bpf.ALLOW
    assert bpf.evaluate(program, bpf.X86_64, NUMBERS["setxattrat"]) == bpf.answer("errno", errno.EPERM)


def test_programs_are_short() -> None:
    lengths = [len(seccomp.compile(seccomp.effective(name))) // 8 for name in SHIPPED]
    assert max(lengths) < 520


def test_allowed_calls_do_not_look_at_arguments(default: Profile) -> None:
    # The kernel answers such numbers from a bitmap, without running the program (since 5.11).
    program = list(struct.iter_unpack("=HBBI", seccomp.compile(default)))
    for call in ("read", "futex", "mmap", "newfstatat", "gettid"):
        position = accumulator = 0
        while program[position][0] != 0x06:
            code, jt, jf, k = program[position]
            position += 1
            if code == 0x20:
                assert k in (0, 4), call
                accumulator = NUMBERS[call] if k == 0 else bpf.X86_64
            elif code == 0x05:
                position += k
            else:
                taken = {0x15: accumulator == k, 0x25: accumulator > k, 0x35: accumulator >= k}[code]
                position += jt if taken else jf


OPERATORS: list[Operator] = ["==", "!=", "<", "<=", ">", ">="]
actions = st.sampled_from([ALLOW, LOG, KILL, refuse(errno.EPERM), refuse(errno.ENOTTY), refuse(4095)])
words = st.sampled_from([0, 1, 2, 0x7F, 0x80000000, 0xFFFFFFFF, 1 << 32, (1 << 32) + 1, 1 << 63, REGISTER])
masks = st.sampled_from([1, 0xFF, 0xFFFFFFFF, 0xF0000000F0, 0xFFFFFFFF00000000, REGISTER])


@st.composite
def some_tests(draw: st.DrawFn) -> Test:
    mask = draw(masks)
    op = draw(st.sampled_from(OPERATORS))
    value = draw(words) & mask if op in ("==", "!=") else min(draw(words), mask)
    return Test(draw(st.integers(0, 5)), op, value, mask)


@st.composite
def some_profiles(draw: st.DrawFn) -> Profile:
    rules = []
    for number in draw(st.lists(st.integers(0, 1000), unique=True, max_size=40)):
        for tests in draw(st.lists(st.lists(some_tests(), max_size=3), max_size=4)):
            rules.append(Rule(number, draw(actions), tuple(tests)))
    return Profile("any", draw(actions), tuple(rules))


@settings(max_examples=60, deadline=None)
@given(profile=some_profiles(), registers=st.lists(st.tuples(*[words] * 6), min_size=1, max_size=8))
def test_any_profile_compiles_to_its_meaning(profile: Profile, registers: list[tuple[int, ...]]) -> None:
    numbers = [*profile.numbers, 0, 500, 1001, 0x40000000, 0xFFFFFFFF]
    assert_means(seccomp.compile(profile), profile, numbers, registers)


def test_long_lists_of_values_span_more_than_one_jump() -> None:
    values = random.Random(1).sample(range(1 << 32), 700)
    rules = [Rule(16, refuse(errno.ENOTTY), (Test(1, "==", value),)) for value in values[:500]]
    rules += [Rule(16, ALLOW, (Test(1, "==", value),)) for value in values[500:]]
    profile = Profile("long", refuse(errno.ENOSYS), tuple(rules))
    program = seccomp.compile(profile)
    for value in (*values, 7):
        action = profile.decide(16, (0, value, 0, 0, 0, 0))
        expected = bpf.answer(action.kind, action.errno)
        assert bpf.evaluate(program, bpf.X86_64, 16, (0, value, 0, 0, 0, 0)) == expected


def test_program_longer_than_the_kernel_takes_is_an_error() -> None:
    rules = [Rule(16, ALLOW, (Test(index % 6, "==", index, REGISTER),)) for index in range(2000)]
    with pytest.raises(PolicyError, match="the kernel takes 4096"):
        seccomp.compile(Profile("huge", refuse(errno.ENOSYS), tuple(rules)))


def test_filter_that_is_not_what_was_asked_is_never_returned(default: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    real = seccomp_bpf._link

    def broken(frame: list[seccomp_bpf._Instruction], sections: list[list[seccomp_bpf._Instruction]]) -> object:
        return [
            seccomp_bpf._Instruction(one.code, 0x7FFF0000) if one.code == 0x06 and one.k == 0x50061 else one
            for one in real(frame, sections)
        ]

    monkeypatch.setattr(seccomp_bpf, "_link", broken)
    with pytest.raises(Unavailable, match="does not do for call 41"):
        seccomp.compile(default)


def test_missing_libseccomp_is_unavailable_with_the_fix(default: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    with pytest.raises(Unavailable, match="libseccomp2") as caught:
        seccomp.compile(default)
    assert caught.value.stage == "seccomp"


def instruction(code: int, k: int = 0, jt: int = 0, jf: int = 0) -> bytes:
    return struct.pack("=HBBI", code, jt, jf, k)


GUARD = instruction(0x20, 4) + instruction(0x15, bpf.X86_64, 0, 2) + instruction(0x20) + instruction(0x35, 0x40000000, 0, 1)
GUARDED = GUARD + instruction(0x06, bpf.KILL_PROCESS) + instruction(0x06, bpf.ALLOW)


def test_check_takes_a_guarded_program() -> None:
    seccomp.check(GUARDED)


@pytest.mark.parametrize(
    "program",
    [
        b"",
        GUARDED[:-1],
        GUARDED * 700,
        GUARDED + instruction(0x20),  # no return at the end
        instruction(0x06, bpf.ALLOW),  # no guard
        GUARDED[:8] + GUARDED[16:],
        GUARD + instruction(0x06, 0) + instruction(0x06, bpf.ALLOW),  # kills the thread only
        instruction(0x20, 64) + GUARDED,  # load past seccomp_data
        instruction(0x20, 2) + GUARDED,
        instruction(0x05, 100) + GUARDED,
        instruction(0x15, 0, 200, 0) + GUARDED,
        instruction(0x87) + GUARDED,  # an instruction that seccomp does not take
    ],
    ids=["empty", "torn", "long", "endless", "open", "no-arch", "thread", "far", "odd", "jump", "branch", "unknown"],
)
def test_check_refuses(program: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        seccomp.check(program)


# ------------------------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the profiles that the cache had to compile."""
    names: list[str] = []
    real = seccomp_cache.compile

    def counting(profile: Profile) -> bytes:
        names.append(profile.name)
        return real(profile)

    monkeypatch.setattr(seccomp_cache, "compile", counting)
    return names


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "cache"


def stored(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


def test_second_time_comes_from_the_cache(default: Profile, cache: Path, compiled: list[str]) -> None:
    first = seccomp.cached_compile(default, cache)
    assert seccomp.cached_compile(default, cache) == first
    assert compiled == ["default"]
    assert (cache.stat().st_mode & 0o7777, stored(cache).stat().st_mode & 0o7777) == (0o700, 0o600)


def test_mode_does_not_depend_on_the_umask(default: Profile, cache: Path) -> None:
    before = os.umask(0o777)
    try:
        cache.parent.parent.joinpath("deep").mkdir()
        os.chmod(cache.parent, 0o755)  # noqa: S103 - the parent may be readable
        cache.mkdir()
        os.chmod(cache, 0o700)
        seccomp.cached_compile(default, cache)
    finally:
        os.umask(before)
    assert stored(cache).stat().st_mode & 0o7777 == 0o600


def test_other_rules_have_another_file(default: Profile, strict: Profile, cache: Path, compiled: list[str]) -> None:
    assert seccomp.cached_compile(default, cache) != seccomp.cached_compile(strict, cache)
    assert compiled == ["default", "strict"]


def test_another_libseccomp_has_another_file(
    default: Profile, cache: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seccomp.cached_compile(default, cache)
    monkeypatch.setattr(seccomp_cache, "_library_identity", lambda: "another")
    seccomp.cached_compile(default, cache)
    assert compiled == ["default", "default"]


def weaken(path: Path) -> None:
    """An attacker's file: every refusal becomes a permission, and the sum is right."""
    content = path.read_bytes()
    program = content[seccomp_cache._HEAD_BYTES :].replace(struct.pack("=I", 0x50001), struct.pack("=I", bpf.ALLOW))
    path.write_bytes(seccomp_cache._MAGIC + hashlib.sha256(program).digest() + program)


def to_symlink(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def to_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def unguarded(path: Path) -> None:
    program = instruction(0x06, bpf.ALLOW)
    path.write_bytes(seccomp_cache._MAGIC + hashlib.sha256(program).digest() + program)


ODD = {
    "readable-by-others": lambda path: path.chmod(0o644),
    "writable-by-the-group": lambda path: (weaken(path), path.chmod(0o660)),
    "hard-linked": lambda path: (weaken(path), os.link(path, path.parent.parent / "twin")),
    "symlink": to_symlink,
    "fifo": to_fifo,
    "directory": lambda path: (path.unlink(), path.mkdir(0o600)),
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "empty": lambda path: path.write_bytes(b""),
    "one-bit-off": flip,
    "unguarded": unguarded,
    "endless": lambda path: os.truncate(path, 1 << 30),
    "directory-open-to-others": lambda path: (weaken(path), path.parent.chmod(0o755)),
}


@pytest.mark.parametrize("oddity", ODD)
def test_odd_file_is_not_believed(default: Profile, cache: Path, compiled: list[str], oddity: str) -> None:
    good = seccomp.cached_compile(default, cache)
    ODD[oddity](stored(cache))
    assert seccomp.cached_compile(default, cache) == good
    assert compiled == ["default", "default"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["file", "directory"])
def test_another_owner_is_not_believed(default: Profile, cache: Path, compiled: list[str], what: str) -> None:
    good = seccomp.cached_compile(default, cache)
    weaken(stored(cache))
    os.chown(stored(cache) if what == "file" else cache, 12345, 12345)
    assert seccomp.cached_compile(default, cache) == good
    assert compiled == ["default", "default"]


def test_odd_file_is_replaced(default: Profile, cache: Path, compiled: list[str]) -> None:
    seccomp.cached_compile(default, cache)
    flip(stored(cache))
    seccomp.cached_compile(default, cache)
    seccomp.cached_compile(default, cache)
    assert compiled == ["default", "default"]


def test_symlinked_directory_is_not_used(default: Profile, tmp_path: Path, compiled: list[str]) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    seccomp.cached_compile(default, tmp_path / "link")
    assert list((tmp_path / "real").iterdir()) == []


def test_cache_that_cannot_be_made_is_no_error(default: Profile, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert seccomp.cached_compile(default, tmp_path / "file" / "cache") == seccomp.compile(default)


def test_nothing_is_left_behind_when_writing_fails(
    default: Profile, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    descriptors = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "rename", refused)
    seccomp.cached_compile(default, cache)
    assert list(cache.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_default_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert seccomp_cache.cache_directory() == Path("/var/cache/sandboxd")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert seccomp_cache.cache_directory() == Path("/somewhere/sandboxd")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert seccomp_cache.cache_directory() == Path("/home/someone/.cache/sandboxd")


def test_cached_program_needs_neither_pyseccomp_nor_ctypes(cache: Path, default: Profile) -> None:
    seccomp.cached_compile(default, cache)
    code = (
        "import sys; from pathlib import Path; from sandboxd import seccomp\n"
        f"seccomp.cached_compile(seccomp.effective('default'), Path({str(cache)!r}))\n"
        "print([name for name in ('pyseccomp', 'ctypes', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_actions_read_well() -> None:
    assert [str(Action("allow")), str(KILL), str(refuse(1)), str(refuse(4000))] == ["allow", "kill", "EPERM", "errno 4000"]
    assert str(Test(1, "==", 0x5401)) == "int(arg1) == 0x5401"
    assert str(Test(1, "!=", 0, 0xF000)) == "(arg1 & 0xf000) != 0x0"
    assert str(Test(1, "<", 5, REGISTER)) == "arg1 < 0x5"
