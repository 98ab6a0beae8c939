"""The table of calls, the shipped profiles, and what a policy makes of them: rules, no programs yet."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sandboxd import seccomp
from sandboxd.errors import PolicyError
from sandboxd.seccomp import KILL, SUCCEED, Action, Profile, Rule, Test, refuse
from sandboxd.seccomp import profile as seccomp_profile
from sandboxd.seccomp.syscalls import NAMES, NEWEST, NUMBERS, SINCE, nearest

SHIPPED = ("default", "strict")
REGISTER = (1 << 64) - 1


def decide(profile: Profile, call: str, *arguments: int) -> str:
    """The answer to *call* in a word; arguments that are not given are 0."""
    return str(profile.decide(NUMBERS[call], (*arguments, *(0,) * (6 - len(arguments)))))


@pytest.fixture(scope="module")
def default() -> Profile:
    return seccomp.effective("default")


@pytest.fixture(scope="module")
def strict() -> Profile:
    return seccomp.effective("strict")


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
    text = (tmp_path / "default.toml").read_text()
    (tmp_path / "default.toml").write_text(text.replace('"ptrace", ', ""))
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
    # Traced: Python's standard library, multiprocessing in its three ways, numpy and scipy, node, bash.
    measured = (Path(__file__).parents[1] / "fixtures" / "seccomp" / "measured.txt").read_text().split()
    refused = {call for call in measured if all(one.action.kind == "errno" for one in default.verdict(NUMBERS[call]))}
    # libc falls back to clone; BLAS does without.
    assert refused == {"clone3", "mbind"}


# fmt: off
REFUSED = {
    "EPERM": [
        "unshare", "setns", "mount", "umount2", "pivot_root", "chroot", "fsopen", "fsmount", "move_mount",
        "open_tree", "mount_setattr", "open_tree_attr", "fspick", "fsconfig", "ptrace", "process_vm_readv",
        "process_vm_writev", "process_madvise", "kcmp", "pidfd_getfd", "keyctl", "add_key", "request_key", "bpf",
        "perf_event_open", "userfaultfd", "seccomp", "kexec_load", "kexec_file_load", "init_module", "finit_module",
        "delete_module", "reboot", "swapon", "swapoff", "acct", "syslog", "quotactl", "ioperm", "iopl", "modify_ldt",
        "sethostname", "clock_settime", "settimeofday", "adjtimex", "clock_adjtime", "vhangup", "name_to_handle_at",
        "open_by_handle_at", "fanotify_init", "fanotify_mark", "mbind", "set_mempolicy", "migrate_pages",
        "move_pages", "memfd_secret", "vmsplice", "shmget", "semget", "msgget", "mq_open", "setuid", "setgroups",
        "capset", "uselib", "lookup_dcookie", "io_setup", "io_submit", "sync", "syncfs",
    ],
    "ENOTSUP": [
        "setxattr", "lsetxattr", "fsetxattr", "setxattrat", "removexattr",
    ],
    "ENOSYS": [
        "clone3", "pidfd_open", "pidfd_send_signal", "io_uring_setup", "io_uring_enter", "io_uring_register",
        "statmount", "listmount", "cachestat", "create_module",
    ],
}
# fmt: on


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize(("call", "answer"), [(call, answer) for answer, calls in REFUSED.items() for call in calls])
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
    ("setsockopt", (3, 6, 1), "ENOTSUP", "ENOTSUP"),  # TCP_NODELAY
    ("setsockopt", (3, 0, 1), "ENOTSUP", "ENOTSUP"),  # IP_TOS
    ("setsockopt", (3, 41, 26), "ENOTSUP", "ENOTSUP"),
    ("setsockopt", (3, 1, 76), "ENOPROTOOPT", "ENOPROTOOPT"),  # SO_PASSPIDFD
    ("setsockopt", (3, 1, 46), "ENOPROTOOPT", "ENOPROTOOPT"),  # SO_BUSY_POLL
    ("setsockopt", (3, 1 | HIGH, 7 | HIGH), "allow", "allow"),
    ("getsockopt", (3, 1, 4), "allow", "allow"),  # SO_ERROR
    ("getsockopt", (3, 1, 77), "ENOPROTOOPT", "ENOPROTOOPT"),  # SO_PEERPIDFD
    ("getsockopt", (3, 1 | HIGH, 77 | HIGH), "ENOPROTOOPT", "ENOPROTOOPT"),
    ("getsockopt", (3, 1, 57), "ENOPROTOOPT", "ENOPROTOOPT"),  # SO_COOKIE
    ("getsockopt", (3, 6, 77), "ENOTSUP", "ENOTSUP"),
    ("ioctl", (0, 0x5401), "allow", "allow"),
    ("ioctl", (0, 0x5401 | HIGH), "allow", "allow"),
    ("ioctl", (0, 0x5412), "EPERM", "EPERM"),  # TIOCSTI
    ("ioctl", (0, 0x5412 | HIGH), "EPERM", "EPERM"),
    ("ioctl", (0, 0x541C | 7 << 40), "EPERM", "EPERM"),  # TIOCLINUX
    ("ioctl", (0, 0x540E), "ENOTTY", "ENOTTY"),  # TIOCSCTTY
    ("fcntl", (0, 1), "allow", "allow"),
    ("fcntl", (0, 1024), "EPERM", "EPERM"),  # F_SETLEASE
    ("fcntl", (0, 1026 | HIGH), "EPERM", "EPERM"),  # F_NOTIFY
    ("fcntl", (0, 1031, 1 << 20), "EPERM", "EPERM"),  # F_SETPIPE_SZ
    ("fcntl", (0, 1031 | HIGH, 4096), "EPERM", "EPERM"),
    ("fcntl", (0, 1032), "allow", "allow"),  # F_GETPIPE_SZ
    ("fcntl", (0, 1036), "EINVAL", "EINVAL"),  # F_SET_RW_HINT
    ("fcntl", (0, 1039), "EINVAL", "EINVAL"),  # F_GETDELEG, 6.19
    ("fcntl", (0, 1033 | HIGH), "allow", "allow"),  # F_ADD_SEALS
    ("madvise", (0, 0, 4 | HIGH), "allow", "allow"),  # MADV_DONTNEED
    ("madvise", (0, 0, 12 | HIGH), "EINVAL", "EINVAL"),  # MADV_MERGEABLE
    ("madvise", (0, 0, 26), "EINVAL", "EINVAL"),
    ("madvise", (0, 0, 100), "EINVAL", "EINVAL"),  # MADV_HWPOISON
    ("arch_prctl", (0x1002,), "allow", "allow"),  # ARCH_SET_FS
    ("arch_prctl", (0x1002 | HIGH,), "allow", "allow"),
    ("arch_prctl", (0x2002,), "EINVAL", "EINVAL"),  # ARCH_MAP_VDSO_32
    ("arch_prctl", (0x5006,), "EINVAL", "EINVAL"),
    ("fsync", (REGISTER,), "succeed", "succeed"),
    ("fdatasync", (0,), "succeed", "succeed"),
    ("sync_file_range", (0,), "succeed", "succeed"),
    ("msync", (0, 0, 4), "succeed", "succeed"),  # MS_SYNC
    ("msync", (0, 0, 6 | HIGH), "succeed", "succeed"),  # MS_SYNC, MS_INVALIDATE
    ("msync", (0, 0, 3), "allow", "allow"),  # MS_ASYNC, MS_INVALIDATE
    ("fadvise64", (0, 0, 0, 4 | HIGH), "succeed", "succeed"),  # POSIX_FADV_DONTNEED
    ("fadvise64", (0, 0, 0, 3), "allow", "allow"),  # POSIX_FADV_WILLNEED
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


def test_allow_lifts_a_refusal() -> None:
    assert decide(seccomp.effective("default", allow=["keyctl"]), "keyctl") == "allow"


def test_allow_lifts_an_argument_rule() -> None:
    assert decide(seccomp.effective("default", allow=["socket"]), "socket", 2) == "allow"


def test_deny_answers_eperm() -> None:
    profile = seccomp.effective("default", deny=["execve", "socket"])
    assert (decide(profile, "execve"), decide(profile, "socket", 1)) == ("EPERM", "EPERM")


def test_deny_keeps_the_errno_of_a_refusal() -> None:
    assert decide(seccomp.effective("default", deny=["clone3"]), "clone3") == "ENOSYS"


def test_deny_refuses_what_the_profile_answers_with_success() -> None:
    profile = seccomp.effective("default", deny=["fsync", "msync"])
    assert (decide(profile, "fsync"), decide(profile, "msync", 0, 0, 4)) == ("EPERM", "EPERM")


def test_allow_lets_through_what_the_profile_answers_with_success() -> None:
    profile = seccomp.effective("default", allow=["fsync", "msync"])
    assert (decide(profile, "fsync"), decide(profile, "msync", 0, 0, 4)) == ("allow", "allow")


def test_deny_of_an_unlisted_call_of_a_profile_that_allows_by_default(tmp_path: Path) -> None:
    path = tmp_path / "open.json"
    path.write_text('{"defaultAction": "SCMP_ACT_ALLOW"}')
    assert decide(seccomp.effective(path, deny=["ptrace"]), "ptrace") == "EPERM"


@pytest.mark.parametrize("key", ["allow", "deny"])
def test_unknown_name_is_an_error_with_the_nearest(key: str) -> None:
    with pytest.raises(PolicyError, match=rf"seccomp\.{key}: 'sockt' .* did you mean socket"):
        seccomp.effective("default", **{key: ["sockt"]})


def test_name_in_both_lists_is_an_error() -> None:
    with pytest.raises(PolicyError, match=r"seccomp\.deny: bpf is also in seccomp.allow"):
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
    (
        "[[rule]]\ncalls = ['dup']\nreason = 'x'\notherwise = 'allow'",
        "rule[0]: it has no refuse, succeed or allow case",
    ),
    ("[[rule]]\ncalls = ['dup']\nreason = 'x'\nallow = [{arg = 0, is = 1, reason = 'x'}]", "rule[0].otherwise"),
    ("[succeed.x]\ncalls = ['dup']", "succeed.x.reason: a text is missing here"),
    ("[succeed.x]\nreason = 'x'\ncalls = ['read']", "succeed.x.calls: read already stands in allow.all.read"),
    ("[succeed.x]\nerrno = 'EPERM'\nreason = 'x'\ncalls = ['dup']", "succeed.x.errno: there is no such key"),
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


@pytest.mark.parametrize("word", ["allow", "succeed"])
def test_default_that_does_not_refuse_is_an_error(word: str) -> None:
    with pytest.raises(PolicyError, match="default: it must be the name of an errno"):
        seccomp_profile.parse(MINIMAL.replace('"ENOSYS"', f'"{word}"'), "small.toml")


SUCCEEDS = """
[succeed.hints]
reason = "r"
calls = ["fsync"]
[[rule]]
calls = ["fadvise64"]
reason = "r"
refuse = [{ arg = 3, is = 9, errno = "EINVAL", reason = "r" }]
succeed = [{ arg = 3, is = 4, reason = "r" }, { arg = 3, is = 9, reason = "r" }]
allow = [{ arg = 3, is = 4, reason = "r" }, { arg = 3, is = 3, reason = "r" }]
otherwise = "EPERM"
[[rule]]
calls = ["readahead"]
reason = "r"
refuse = [{ arg = 0, is = 3, errno = "EBADF", reason = "r" }]
otherwise = "succeed"
"""


def test_success_without_the_kernel_is_asked_between_refusals_and_permissions() -> None:
    profile = seccomp_profile.parse(MINIMAL + SUCCEEDS, "small.toml")
    advices = [decide(profile, "fadvise64", 0, 0, 0, advice) for advice in (9, 4, 3, 0)]
    assert advices == ["EINVAL", "succeed", "allow", "EPERM"]
    assert [decide(profile, "fsync"), decide(profile, "readahead", 3), decide(profile, "readahead")] == [
        "succeed",
        "EBADF",
        "succeed",
    ]


def test_case_of_success_has_no_errno() -> None:
    text = MINIMAL + SUCCEEDS.replace("is = 4, reason", "is = 4, errno = 'EPERM', reason", 1)
    with pytest.raises(PolicyError, match=r"rule\[0\].succeed\[0\].errno: "):
        seccomp_profile.parse(text, "small.toml")


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


def test_actions_read_well() -> None:
    assert [str(Action("allow")), str(SUCCEED), str(KILL), str(refuse(1)), str(refuse(4000))] == [
        "allow",
        "succeed",
        "kill",
        "EPERM",
        "errno 4000",
    ]
    assert str(Test(1, "==", 0x5401)) == "int(arg1) == 0x5401"
    assert str(Test(1, "!=", 0, 0xF000)) == "(arg1 & 0xf000) != 0x0"
    assert str(Test(1, "<", 5, REGISTER)) == "arg1 < 0x5"
