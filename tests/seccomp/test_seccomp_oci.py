"""OCI seccomp profiles: what a file means in a cell, never weaker than it asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd import seccomp
from sandboxd.errors import PolicyError
from sandboxd.seccomp import oci
from sandboxd.seccomp.syscalls import NUMBERS

if TYPE_CHECKING:
    from sandboxd.seccomp import Profile
from sandboxd.seccomp.bpf import AUDIT_ARCH_I386, AUDIT_ARCH_X86_64

FIXTURES = Path(__file__).parents[1] / "fixtures" / "seccomp"
HIGH = 1 << 32


def parse(**document: Any) -> Profile:
    return oci.parse(json.dumps({"defaultAction": "SCMP_ACT_ERRNO", **document}), "profile.json", (6, 1))


def decide(profile: Profile, call: str, *arguments: int) -> str:
    return str(profile.decide(NUMBERS[call], (*arguments, *(0,) * (6 - len(arguments)))))


def entry(names: list[str], action: str = "SCMP_ACT_ALLOW", **more: Any) -> dict[str, Any]:
    return {"names": names, "action": action, **more}


def arguments_of(index: int, value: int, op: str, two: int = 0) -> list[dict[str, Any]]:
    return [{"index": index, "value": value, "op": f"SCMP_CMP_{op}", "valueTwo": two}]


RUNTIME = [
    ("read", (), "allow"),
    ("openat", (), "ENOSYS"),
    ("ptrace", (), "kill"),
    ("uname", (), "log"),
    ("bpf", (), "EPERM"),
    ("keyctl", (), "EPERM"),
    ("socket", (1, 1), "allow"),
    ("socket", (1, 2), "ENOSYS"),
    ("socket", (2, 1), "ENOSYS"),
    ("personality", (0,), "allow"),
    ("personality", (0xFFFFFFFF,), "allow"),
    ("personality", (8,), "ENOSYS"),
    ("clone", (0x1200011,), "allow"),
    ("clone", (0x10000000,), "ENOSYS"),
    ("ioctl", (0, 0x5401), "allow"),
    ("ioctl", (0, 0x5412), "ENOTTY"),
    ("ioctl", (0, 0x5412 | HIGH), "ENOTTY"),  # though the file compares 64 bits
    ("fcntl", (0, 1), "allow"),
    ("fcntl", (0, 1024), "ENOSYS"),
    ("fcntl", (0, 1024 | HIGH), "ENOSYS"),
]


@pytest.mark.parametrize(("call", "arguments", "answer"), RUNTIME, ids=[f"{c}-{a}" for c, a, _ in RUNTIME])
def test_profile_of_the_runtime_specification(call: str, arguments: tuple[int, ...], answer: str) -> None:
    assert decide(seccomp.effective(str(FIXTURES / "runtime.json")), call, *arguments) == answer


ENGINE = {
    "read": "allow",
    "ptrace": "allow",  # asked for by kernel version
    "dup": "EPERM",
    "dup2": "EPERM",
    "arch_prctl": "allow",
    "pipe": "EPERM",  # another architecture's
    "poll": "EPERM",
    "mount": "EPERM",  # a cell has no capability
    "clone3": "ENOSYS",
    "getpid": "allow",  # docker's older form with one name
    "openat": "EPERM",
}


@pytest.mark.parametrize("call", ENGINE)
def test_profile_in_the_form_of_an_engine(call: str) -> None:
    assert decide(seccomp.effective(FIXTURES / "engine.json"), call) == ENGINE[call]


@pytest.mark.parametrize("name", ["runtime.json", "engine.json"])
def test_program_means_what_the_file_says(name: str) -> None:
    profile = seccomp.effective(FIXTURES / name)
    program = seccomp.compile(profile)
    for number in range(600):
        for answer in profile.verdict(number):
            assert answer.arguments is not None
            got = seccomp.run(program, AUDIT_ARCH_X86_64, number, answer.arguments)
            permitted = got in (0x7FFF0000, 0x7FFC0000)
            assert permitted == answer.action.permits
            assert permitted or got == (0x80000000 if answer.action.kind == "kill" else 0x50000 | answer.action.errno)


@pytest.mark.parametrize("default", ["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_LOG", "SCMP_ACT_KILL_PROCESS"])
def test_guards_stand_before_every_profile(default: str) -> None:
    program = seccomp.compile(
        oci.parse(
            json.dumps({"defaultAction": default, "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]}), "x.json"
        )
    )
    assert seccomp.run(program, AUDIT_ARCH_I386, 20) == 0x80000000
    assert seccomp.run(program, AUDIT_ARCH_X86_64, 0x40000000 | 39) == 0x80000000


def test_names_that_are_no_calls_here_are_told() -> None:
    assert seccomp.effective(FIXTURES / "runtime.json").ignored == ("chown32", "socketcall")


def test_whole_config_json() -> None:
    text = json.dumps({"linux": {"seccomp": {"defaultAction": "SCMP_ACT_KILL", "syscalls": [entry(["read"])]}}})
    profile = oci.parse(text, "config.json")
    assert (decide(profile, "read"), decide(profile, "write")) == ("allow", "kill")


def test_most_restrictive_rule_decides_in_either_order() -> None:
    rules = [entry(["dup"]), entry(["dup"], "SCMP_ACT_KILL"), entry(["dup"], "SCMP_ACT_LOG")]
    for syscalls in (rules, rules[::-1]):
        assert decide(parse(syscalls=syscalls), "dup") == "kill"


def test_refusal_of_arguments_holds_beside_a_permission() -> None:
    rules = [entry(["dup"], "SCMP_ACT_ERRNO", errnoRet=9, args=arguments_of(0, 7, "EQ")), entry(["dup"])]
    for syscalls in (rules, rules[::-1]):
        profile = parse(syscalls=syscalls)
        assert (decide(profile, "dup", 7), decide(profile, "dup", 8)) == ("EBADF", "allow")


def test_errno_zero_is_success_without_the_kernel_and_less_than_any_refusal() -> None:
    succeeds = entry(["dup"], "SCMP_ACT_ERRNO", errnoRet=0)
    for others, wanted in (
        ([], "succeed"),
        ([entry(["dup"])], "succeed"),
        ([entry(["dup"], "SCMP_ACT_ERRNO")], "EPERM"),
    ):
        for syscalls in ([succeeds, *others], [*others, succeeds]):
            profile = parse(syscalls=syscalls)
            assert decide(profile, "dup") == wanted
    program = seccomp.compile(parse(syscalls=[succeeds]))
    assert seccomp.run(program, AUDIT_ARCH_X86_64, NUMBERS["dup"]) == 0x00050000


COMPARISONS = [  # operator and value; what a permission then lets pass, and what not
    ("EQ", 5, 0, (5,), (4, 6, 5 | HIGH)),
    ("NE", 5, 0, (4, 6, HIGH), (5, 5 | HIGH)),
    ("LT", 5, 0, (0, 4), (5, 6, HIGH)),
    ("LE", 5, 0, (0, 5), (6, HIGH)),
    ("GT", 5, 0, (6,), (5, 0, HIGH)),
    ("GE", 5, 0, (5, 6), (4, HIGH)),
    ("MASKED_EQ", 0xF0, 0x10, (0x10, 0x1F, 0x10 | HIGH), (0x20, 0, 0x30)),
    ("EQ", HIGH, 0, (HIGH,), (0, HIGH | 1)),
    ("GT", HIGH, 0, (HIGH + 1, HIGH << 1), (HIGH, 5)),
]


@pytest.mark.parametrize(("op", "value", "two", "passing", "stopped"), COMPARISONS)
def test_permission_by_comparison(
    op: str, value: int, two: int, passing: tuple[int, ...], stopped: tuple[int, ...]
) -> None:
    profile = parse(syscalls=[entry(["dup"], args=arguments_of(0, value, op, two))])
    assert {decide(profile, "dup", given) for given in passing} == {"allow"}
    assert {decide(profile, "dup", given) for given in stopped} == {"EPERM"}


REFUSALS = [  # what a refusal stops, and what it lets pass
    ("EQ", 5, (5, 5 | HIGH), (4,)),
    ("NE", 5, (4, HIGH, 5 | HIGH), (5,)),
    ("LT", 5, (4, 4 | HIGH), (5, 6)),
    ("LE", 5, (5, 5 | HIGH), (6,)),
    ("GT", 5, (6, HIGH), (5,)),
    ("GE", 5, (5, HIGH), (4,)),
]


@pytest.mark.parametrize(("op", "value", "stopped", "passing"), REFUSALS)
def test_refusal_by_comparison(op: str, value: int, stopped: tuple[int, ...], passing: tuple[int, ...]) -> None:
    rule = entry(["dup"], "SCMP_ACT_ERRNO", args=arguments_of(0, value, op))
    profile = parse(defaultAction="SCMP_ACT_ALLOW", syscalls=[rule])
    assert {decide(profile, "dup", given) for given in stopped} == {"EPERM"}
    assert {decide(profile, "dup", given) for given in passing} == {"allow"}


def test_refusal_of_a_call_of_another_architecture_is_left_out() -> None:
    rule = entry(["socketcall", "chown32"], "SCMP_ACT_ERRNO")
    assert parse(defaultAction="SCMP_ACT_ALLOW", syscalls=[rule]).ignored == ("chown32", "socketcall")


def test_refusal_of_a_call_that_nobody_knows_is_an_error() -> None:
    rule = entry(["opennat"], "SCMP_ACT_ERRNO")
    with pytest.raises(PolicyError, match=r"syscalls\[0\]\.names: 'opennat' .* did you mean openat"):
        parse(defaultAction="SCMP_ACT_ALLOW", syscalls=[rule])


def test_policy_adds_to_and_takes_from_a_file() -> None:
    profile = seccomp.effective(FIXTURES / "engine.json", allow=["openat"], deny=["ptrace"])
    assert (decide(profile, "openat"), decide(profile, "ptrace")) == ("allow", "EPERM")


def test_file_that_refuses_what_every_cell_needs(tmp_path: Path) -> None:
    path = tmp_path / "closed.json"
    path.write_text('{"defaultAction": "SCMP_ACT_KILL"}')
    with pytest.raises(PolicyError, match=r"seccomp.profile: read is refused"):
        seccomp.effective(path)


ARG = {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"defaultAction": "SCMP_ACT_TRAP"}, "defaultAction: 'SCMP_ACT_TRAP' is not supported"),
    ({"defaultAction": None}, "defaultAction: None is not supported"),
    ({"defaultErrnoRet": 0}, "defaultErrnoRet: it must be an errno from 1 to 4094"),
    ({"syscalls": [entry(["dup"], "SCMP_ACT_ERRNO", errnoRet=-1)]}, "errnoRet: it must be an errno from 0 to 4094"),
    ({"defaultErrnoRet": 4095}, "defaultErrnoRet: it must be an errno from 1 to 4094"),
    ({"architectures": ["SCMP_ARCH_AARCH64"]}, "architectures: SCMP_ARCH_X86_64 is not among them"),
    ({"archMap": [{"architecture": "SCMP_ARCH_ARM"}]}, "archMap: SCMP_ARCH_X86_64 is not among them"),
    ({"flags": ["SECCOMP_FILTER_FLAG_NEW"]}, "flags[0]: 'SECCOMP_FILTER_FLAG_NEW' is not known"),
    ({"listenerPath": "/run/x"}, "listenerPath: no process answers"),
    ({"sysCalls": []}, "sysCalls: there is no such key"),
    ({"syscalls": {}}, "syscalls: it must be a list"),
    ({"syscalls": [3]}, "syscalls[0]: it must be an object"),
    ({"syscalls": [entry([])]}, "syscalls[0].names: it must be a list of names"),
    ({"syscalls": [entry(["dup"]), entry(["dup"], "SCMP_ACT_NOTIFY")]}, "syscalls[1].action: 'SCMP_ACT_NOTIFY' is not"),
    ({"syscalls": [entry(["dup"], "SCMP_ACT_TRACE")]}, "syscalls[0].action: 'SCMP_ACT_TRACE' is not supported"),
    ({"syscalls": [entry(["dup"], "SCMP_ACT_TRAP")]}, "syscalls[0].action: 'SCMP_ACT_TRAP' is not supported"),
    ({"syscalls": [entry(["dup"], errnoRet=1)]}, "syscalls[0].errnoRet: SCMP_ACT_ALLOW answers no errno"),
    ({"syscalls": [entry(["dup"], priority=1)]}, "syscalls[0].priority: there is no such key"),
    ({"syscalls": [entry(["dup"], args=[{**ARG, "index": 6}])]}, "syscalls[0].args[0]: there is no argument 6"),
    (
        {"syscalls": [entry(["dup"], args=[{**ARG, "value": -1}])]},
        "syscalls[0].args[0].value: it must be a whole number",
    ),
    ({"syscalls": [entry(["dup"], args=[{**ARG, "value": 1 << 64}])]}, "args[0].value: it must be a whole number"),
    ({"syscalls": [entry(["dup"], args=[{**ARG, "value": 1.5}])]}, "args[0].value: it must be a whole number"),
    ({"syscalls": [entry(["dup"], args=[{**ARG, "op": "EQ"}])]}, "args[0].op: 'EQ' is no comparison"),
    ({"syscalls": [entry(["dup"], args=[{**ARG, "size": 4}])]}, "args[0].size: there is no such key"),
    ({"syscalls": [entry(["dup"], args=arguments_of(0, 1, "MASKED_EQ", 2))]}, "args[0]: 0x2 is not within the mask"),
    ({"syscalls": [entry(["dup"], includes={"kernel": "5"})]}, "syscalls[0].includes.kernel: there is no such key"),
    ({"syscalls": [entry(["dup"], includes={"minKernel": "five"})]}, "includes.minKernel: it must be a version"),
    ({"syscalls": [entry(["dup"] * 20000)]}, "there are more than 500 rules for dup"),
]


@pytest.mark.parametrize(("document", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_file_is_refused_by_its_key(document: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse(**document)
    assert message in str(caught.value)
    assert caught.value.file == "profile.json"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"defaultAction": "SCMP_ACT_ERRNO", "defaultAction": "SCMP_ACT_ALLOW"}',
        "[" * 100000,
        "3",
        "\x00",
    ],
    ids=["empty", "list", "torn", "twice", "deep", "number", "nul"],
)
def test_text_that_is_no_profile(text: str) -> None:
    with pytest.raises(PolicyError):
        oci.parse(text, "profile.json")


def test_file_that_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(PolicyError, match="at most"):
        seccomp.effective(path)
