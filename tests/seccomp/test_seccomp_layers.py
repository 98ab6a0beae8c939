"""One profile in two filters: what both do together, what each is for, and whether the spawn path gets through.

The programs are read by the tests' own evaluator first, then installed in a child of the test, one upon the other.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd import seccomp
from sandboxd._util.diskcache import HEAD_BYTES, MAGIC
from sandboxd.errors import Unavailable
from sandboxd.seccomp import ALLOW as PERMIT
from sandboxd.seccomp import KILL, LOG, Layers, Profile, Rule, Test, bpf, cache, refuse
from sandboxd.seccomp import layers as seccomp_layers
from sandboxd.seccomp.layers import SPAWN, Need, split
from sandboxd.seccomp.syscalls import NAMES, NEWEST, NUMBERS
from tests.seccomp.test_seccomp_kernel import ALONE, MARKER, call, in_child, install
from tests.seccomp.test_seccomp_program import (
    ALL_NUMBERS,
    ALLOW,
    ERRNO,
    I386,
    KILL_PROCESS,
    REGISTERS,
    X86_64,
    actions,
    answer,
    evaluate,
    some_tests,
    words,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from sandboxd.seccomp import Decision

NATIVE = Path(__file__).resolve().parents[2] / "native"
OCI = Path(__file__).parents[1] / "fixtures" / "seccomp" / "engine.json"
REGISTER = (1 << 64) - 1
SPAWNED = sorted({need.call for need in SPAWN})
NUMBERS_OF_SPAWN = {NUMBERS[name] for name in SPAWNED}

PROFILES: dict[str, Callable[[], Profile]] = {
    "default": lambda: seccomp.effective("default"),
    "strict": lambda: seccomp.effective("strict"),
    "oci": lambda: seccomp.effective(OCI),
    "more-denied": lambda: seccomp.effective("default", deny=["setns", "mount", "openat", "prctl", "recvmsg", "fork"]),
    "more-allowed": lambda: seccomp.effective("default", allow=["ptrace", "clone3", "prctl", "seccomp"]),
    "by-arguments": lambda: Profile(
        "odd",
        refuse(1),
        (
            Rule(NUMBERS["setns"], PERMIT, (Test(1, "==", 0x20000000),)),
            Rule(NUMBERS["setns"], refuse(2), (Test(1, ">", 1 << 40, REGISTER),)),
            Rule(NUMBERS["prlimit64"], refuse(3), (Test(1, "==", 7), Test(0, "==", 0, REGISTER))),
            Rule(NUMBERS["prlimit64"], LOG, (Test(1, "==", 8),)),
            Rule(NUMBERS["prlimit64"], KILL),
            Rule(NUMBERS["mmap"], refuse(4), (Test(2, "!=", 0, 4),)),
            Rule(NUMBERS["mmap"], PERMIT),
        ),
    ),
    "all-allowed": lambda: Profile("open", PERMIT, ()),
    "all-logged": lambda: Profile("told", LOG, ()),
    "all-refused": lambda: Profile("shut", refuse(1), ()),
    "all-killed": lambda: Profile("shut", KILL, (Rule(NUMBERS["read"], PERMIT), Rule(NUMBERS["setns"], refuse(1)))),
}
MADE: dict[str, tuple[Profile, Layers]] = {}


@pytest.fixture(params=PROFILES)
def made(request: pytest.FixtureRequest) -> tuple[Profile, Layers]:
    """A profile, and its layers: compiled once for all tests."""
    return layers_of(request.param)


def layers_of(name: str) -> tuple[Profile, Layers]:
    if name not in MADE:
        profile = PROFILES[name]()
        MADE[name] = profile, seccomp.compile_layers(profile)
    return MADE[name]


def together(layers: Layers, architecture: int, number: int, arguments: Sequence[int] = (0,) * 6) -> int:
    """What the kernel makes of both: newest first, the least action as a signed number, the first of equals."""

    def rank(returned: int) -> int:
        (signed,) = struct.unpack("=i", struct.pack("=I", returned & 0xFFFF0000))
        return int(signed)

    return min((evaluate(one, architecture, number, arguments) for one in (layers.own, layers.inherited)), key=rank)


def cases(profile: Profile, numbers: Iterable[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Registers for each thing that *profile* or one of its layers does with a number, with and without high bits."""
    rules = (profile, *split(profile))
    for number in numbers:
        for arguments in {one.arguments for some in rules for one in some.verdict(number) if one.arguments}:
            yield number, arguments
            yield number, tuple(one & 0xFFFFFFFF for one in arguments)
            yield number, tuple(one | 1 << 32 for one in arguments)
        for registers in REGISTERS:
            yield number, registers


def needed(profile: Profile, number: int, arguments: Sequence[int]) -> bool:
    """Is this call let through for the spawn path? What *profile* refuses in any case is, whatever the arguments."""
    needs = [need for need in SPAWN if NUMBERS[need.call] == number]
    whole = len(profile.rows(number)) <= 1
    return any(whole or all(test.holds(arguments) for test in need.tests) for need in needs)


def shown(number: int, arguments: Sequence[int]) -> str:
    return f"{NAMES.get(number, number)} {[hex(argument) for argument in arguments]}"


def assert_the_same(layers: Layers, profile: Profile, numbers: Sequence[int]) -> None:
    for number, arguments in cases(profile, numbers):
        action = profile.decide(number, arguments)
        wanted = answer(action.kind, action.errno)
        assert together(layers, X86_64, number, arguments) == wanted, shown(number, arguments)


def test_both_together_do_what_the_profile_says(made: tuple[Profile, Layers]) -> None:
    profile, layers = made
    assert_the_same(layers, profile, ALL_NUMBERS)


def test_no_call_is_refused_by_both(made: tuple[Profile, Layers]) -> None:
    # Else the errno would be that of the layer that was installed last.
    profile, layers = made
    for number, arguments in cases(profile, range(NEWEST + 64)):
        answers = [evaluate(program, X86_64, number, arguments) for program in (layers.inherited, layers.own)]
        assert [one & 0xFFFF0000 for one in answers].count(ERRNO) < 2, shown(number, arguments)


def test_other_architectures_and_x32_numbers_are_killed(made: tuple[Profile, Layers]) -> None:
    _, layers = made
    for number in range(0, 600, 3):
        assert together(layers, I386, number) == KILL_PROCESS
        assert together(layers, X86_64, 0x40000000 | number) == KILL_PROCESS


def test_the_inherited_layer_lets_through_what_the_spawn_path_needs(made: tuple[Profile, Layers]) -> None:
    profile, layers = made
    for number, arguments in cases(profile, sorted(NUMBERS_OF_SPAWN)):
        if needed(profile, number, arguments):
            assert evaluate(layers.inherited, X86_64, number, arguments) == ALLOW, shown(number, arguments)


def test_the_inherited_layer_gives_nothing_but_that(made: tuple[Profile, Layers]) -> None:
    profile, layers = made
    for number, arguments in cases(profile, range(NEWEST + 64)):
        if not needed(profile, number, arguments):
            action = profile.decide(number, arguments)
            wanted = answer(action.kind, action.errno)
            assert evaluate(layers.inherited, X86_64, number, arguments) == wanted, shown(number, arguments)


def test_the_own_layer_asks_about_nothing_else(made: tuple[Profile, Layers]) -> None:
    profile, layers = made
    for number, arguments in cases(profile, ALL_NUMBERS):
        if not needed(profile, number, arguments):
            assert evaluate(layers.own, X86_64, number, arguments) == ALLOW, shown(number, arguments)


@pytest.mark.parametrize("name", ["default", "strict", "oci"])
def test_marker_is_the_answer_of_both(name: str) -> None:
    profile, _ = layers_of(name)
    layers = seccomp.compile_layers(profile, marker_errno=MARKER)
    for number in range(NEWEST + 64):
        for possible in profile.verdict(number):
            kind = possible.action.kind
            wanted = answer("errno", MARKER) if possible.action.answers else answer(kind)
            assert possible.arguments is not None
            assert together(layers, X86_64, number, possible.arguments) == wanted, NAMES.get(number, number)


def test_marker_that_no_call_can_answer() -> None:
    with pytest.raises(ValueError, match="errno 4095"):
        seccomp.compile_layers(layers_of("default")[0], marker_errno=4095)


@st.composite
def some_profiles(draw: st.DrawFn) -> Profile:
    """Like those of the whole programs, but mostly about calls that both layers have a say in."""
    spawned = st.sampled_from(sorted(NUMBERS_OF_SPAWN))
    numbers = draw(st.lists(spawned | st.integers(0, 600), unique=True, max_size=20))
    needs = {
        number: [test for need in SPAWN if NUMBERS[need.call] == number for test in need.tests] for number in numbers
    }
    rules: list[Rule] = []
    for number in numbers:
        test = some_tests() | st.sampled_from(needs[number]) if needs[number] else some_tests()
        conditions = draw(st.lists(st.lists(test, max_size=3), max_size=4))
        rules += [Rule(number, draw(actions), tuple(tests)) for tests in conditions]
    return Profile("any", draw(actions), tuple(rules))


@settings(max_examples=12, deadline=None)
@given(profile=some_profiles(), registers=st.lists(st.tuples(*[words] * 6), min_size=1, max_size=8))
def test_any_profile_is_split_without_a_change_of_meaning(profile: Profile, registers: list[tuple[int, ...]]) -> None:
    layers = seccomp.compile_layers(profile)
    numbers = [*profile.numbers, *NUMBERS_OF_SPAWN, 601, 0x40000000, 0xFFFFFFFF]
    assert_the_same(layers, profile, numbers)
    for number, arguments in itertools.product(numbers, registers):
        action = profile.decide(number, arguments)
        assert together(layers, X86_64, number, arguments) == answer(action.kind, action.errno)


@settings(max_examples=200, deadline=None)
@given(test=some_tests(), given=st.lists(some_tests(), min_size=1, max_size=3), registers=st.tuples(*[words] * 6))
def test_what_is_known_of_a_condition_is_true_of_every_call_of_a_need(
    test: Test, given: list[Test], registers: tuple[int, ...]
) -> None:
    near = [replace(one, argument=test.argument) for one in given]  # else they seldom have to do with each other
    fitting = list(registers)
    for one in near:
        if one.op == "==":
            fitting[one.argument] = fitting[one.argument] & ~one.mask | one.value
    known = seccomp_layers._known(test, near)
    if known is not None and all(one.holds(fitting) for one in near):
        assert test.holds(fitting) == known


@pytest.mark.parametrize(
    ("test", "given", "known"),
    [
        (Test(0, "==", 4), Test(0, "==", 47), False),
        (Test(0, "==", 4), Test(0, "==", 4), True),
        (Test(0, "==", 4), Test(1, "==", 4), None),
        (Test(0, ">", 9, 0xFF), Test(0, "==", 4), False),
        (Test(0, ">", 9, REGISTER), Test(0, "==", 4), None),  # what is above the int is open
        (Test(0, "==", 1 << 32, REGISTER), Test(0, "==", 4), False),
        (Test(0, "!=", 0, 0x40000), Test(0, "==", 0, 0x40000), False),
        (Test(0, "==", 12), Test(0, "!=", 12), False),
        (Test(0, "!=", 12), Test(0, "!=", 12), True),
        (Test(0, "==", 12, 0xFF), Test(0, "!=", 12), None),
    ],
    ids=str,
)
def test_what_is_known_of_a_condition(test: Test, given: Test, known: bool | None) -> None:
    assert seccomp_layers._known(test, [given]) is known


# ----------------------------------------------------------------------------------------------------- how short it is


@pytest.mark.parametrize("name", ["default", "strict"])
def test_the_own_layer_is_short(name: str) -> None:
    _, layers = layers_of(name)
    assert len(layers.own) // 8 < 40
    assert len(layers.inherited) // 8 < 700


def test_what_a_profile_allows_anyway_is_in_neither_layer() -> None:
    profile, layers = layers_of("all-allowed")
    assert split(profile)[0].rules == ()
    assert layers.own == struct.pack("=HBBI", 0x06, 0, 0, ALLOW)


def test_arguments_that_the_profile_allows_are_no_matter_of_the_own_layer() -> None:
    names = {NAMES[number] for number in split(layers_of("default")[0])[1].numbers}
    assert "prctl" in names
    assert not names & {"mmap", "madvise", "memfd_create", "fcntl", "prlimit64"}


def test_upper_filter_that_refuses_by_default_is_an_error() -> None:
    with pytest.raises(ValueError, match="no filter to lay upon another"):
        bpf.compile_upper(layers_of("default")[0])


def test_more_numbers_than_a_small_tree_spans_are_an_error() -> None:
    rules = tuple(Rule(number, refuse(1)) for number in range(300))
    with pytest.raises(ValueError, match="too many for a small tree"):
        bpf.compile_upper(Profile("wide", PERMIT, rules))


def test_layers_that_do_something_else_together_are_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(profile: Profile) -> tuple[Profile, Profile]:
        lower, upper = split(profile)
        return lower, Profile(upper.name, PERMIT, tuple(rule for rule in upper.rules if rule.syscall != "setns"))

    monkeypatch.setattr(seccomp_layers, "split", forgetful)
    with pytest.raises(Unavailable, match=f"does not do for call {NUMBERS['setns']}"):
        seccomp.compile_layers(layers_of("default")[0])


# ----------------------------------------------------------------------------------- the list, against what the C says


def functions() -> dict[str, str]:
    """Name and body of each function that the cell's object is made of, and of the table of its steps."""
    found: dict[str, str] = {}
    for name in ("lib/fd.c", "lib/ids.c", "lib/landlock.c", "lib/seccomp.c", "inside/cell.c"):
        text = (NATIVE / name).read_text()
        found |= dict(re.findall(r"^(\w+)\([^;]*?\)\n\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
        found |= dict(re.findall(r"^\} (\w+)\[\] = \{\n(.*?)^\};", text, re.MULTILINE | re.DOTALL))
    return found


def reached(start: str) -> str:
    """All code that *start* can come to."""
    bodies = functions()
    todo, seen = [start], {start}
    while todo:
        for name in set(re.findall(r"\w+", bodies[todo.pop()])) & set(bodies) - seen:
            seen.add(name)
            todo.append(name)
    return "\n".join(bodies[name] for name in sorted(seen))


@pytest.fixture(scope="module")
def spawn_path() -> str:
    code = reached("cell_serve")
    assert "SBX_NR_clone3" in code
    assert "SBX_NR_landlock_restrict_self" in code
    return code


def test_every_call_of_the_spawn_path_is_in_the_list(spawn_path: str) -> None:
    assert sorted(set(re.findall(r"SBX_NR_(\w+)", spawn_path)) - set(SPAWNED)) == []


def test_every_prctl_of_the_spawn_path_is_in_the_list(spawn_path: str) -> None:
    value = dict(re.findall(r"#define SBX_(PR_\w+) (\d+)", (NATIVE / "include" / "syscall.h").read_text()))
    options = re.findall(r"SBX_NR_prctl, SBX_(PR_\w+)(?:, SBX_(PR_\w+))?", spawn_path)
    assert len(options) == spawn_path.count("SBX_NR_prctl")
    for option, more in options:
        arguments = (int(value[option]), int(value.get(more, "0")), 0, 0, 0, 0)
        needs = [need for need in SPAWN if need.call == "prctl" and all(test.holds(arguments) for test in need.tests)]
        assert needs, option


def test_every_need_has_a_reason_and_is_listed_once() -> None:
    assert all(need.reason for need in SPAWN)
    assert len({(need.call, need.tests) for need in SPAWN}) == len(SPAWN)


# ----------------------------------------------------------------------------------------------------- the real kernel


def under_both(layers: Layers, work: Callable[[int], None]) -> tuple[bytes, int]:
    """What *work* wrote, and the wait status, of a child that installed both layers in their order."""

    def upper(writer: int) -> None:
        install(layers.own)
        work(writer)

    return in_child(layers.inherited, upper)


def answers(layers: Layers, calls: Sequence[tuple[int, Decision]]) -> list[int]:
    """The errno of each call, made one after the other under both layers."""

    def work(writer: int) -> None:
        for number, possible in calls:
            os.write(writer, struct.pack("=i", call(number, possible.arguments or ())))

    said, status = under_both(layers, work)
    found = [value for (value,) in struct.iter_unpack("=i", said)]
    assert status == 0, f"died ({status}) at {calls[len(found)]}"
    return found


def sweep(profile: Profile) -> list[tuple[int, Decision]]:
    return [
        (number, possible)
        for number in range(NEWEST + 64)
        if NAMES.get(number) not in ALONE
        for possible in profile.verdict(number)
    ]


@pytest.mark.parametrize("name", ["default", "strict"])
def test_exactly_the_allowed_calls_reach_the_kernel(name: str) -> None:
    profile, _ = layers_of(name)
    rows = sweep(profile)
    found = answers(seccomp.compile_layers(profile, marker_errno=MARKER), rows)
    wrong = [
        f"{NAMES.get(number, number)} {possible}, got {got}"
        for (number, possible), got in zip(rows, found, strict=True)
        if (got != MARKER) != possible.action.permits
    ]
    assert wrong == []


@pytest.mark.parametrize("name", ["default", "strict", "more-denied"])
def test_refused_calls_answer_their_own_errno(name: str) -> None:
    profile, layers = layers_of(name)
    # With openat among the refused this also shows that the upper layer goes in under any profile.
    rows = [(number, possible) for number, possible in sweep(profile) if possible.action.answers]
    found = answers(layers, rows)
    wrong = [
        f"{NAMES.get(number, number)} {possible}, got {got}"
        for (number, possible), got in zip(rows, found, strict=True)
        if got != possible.action.errno
    ]
    assert wrong == []


def test_x32_number_kills() -> None:
    _, status = under_both(layers_of("default")[1], lambda writer: (call(0x40000000 | 39, (0,) * 6), None)[1])
    assert os.WTERMSIG(status) == signal.SIGSYS


def test_what_the_inherited_layer_lets_through_the_own_one_refuses() -> None:
    _, layers = layers_of("default")
    setns = (NUMBERS["setns"], (REGISTER,) * 6)

    def before_and_after(writer: int) -> None:
        before = call(*setns)
        install(layers.own)
        os.write(writer, bytes([before, call(*setns)]))

    said, _ = in_child(layers.inherited, before_and_after)
    assert said == bytes([9, 1])  # EBADF is the kernel's, EPERM the filter's


# ----------------------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the profiles that the cache had to compile."""
    names: list[str] = []
    real = seccomp.compile_layers

    def counting(profile: Profile) -> Layers:
        names.append(profile.name)
        return real(profile)

    monkeypatch.setattr(cache, "compile_layers", counting)
    return names


def test_second_time_comes_from_the_cache(tmp_path: Path, compiled: list[str]) -> None:
    profile, layers = layers_of("default")
    assert seccomp.cached_layers(profile, tmp_path / "cache") == layers
    assert seccomp.cached_layers(profile, tmp_path / "cache") == layers
    assert compiled == ["default"]


def test_another_list_has_another_file(tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    profile, _ = layers_of("default")
    seccomp.cached_layers(profile, tmp_path / "cache")
    monkeypatch.setattr(seccomp_layers, "SPAWN", (*SPAWN, Need("ptrace", "not really")))
    seccomp.cached_layers(profile, tmp_path / "cache")
    assert compiled == ["default", "default"]


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Replaces what a file holds, with the right sum."""

    def write(path: Path) -> None:
        content = change(path.read_bytes()[HEAD_BYTES:])
        path.write_bytes(MAGIC + hashlib.sha256(content).digest() + content)

    return write


ODD: dict[str, Callable[[Path], object]] = {
    "one-bit-off": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\xff"),
    "readable-by-others": lambda path: path.chmod(0o644),
    "no-length": rewritten(lambda content: content[:3]),
    "length-past-the-end": rewritten(lambda content: struct.pack("<I", 1 << 31) + content[4:]),
    "cut-elsewhere": rewritten(lambda content: struct.pack("<I", 24 * 8) + content[4:]),
    "no-own-layer": rewritten(lambda content: content[: 4 + struct.unpack_from("<I", content)[0]]),
    "unguarded": rewritten(lambda content: struct.pack("<IHBBI", 8, 6, 0, 0, ALLOW) * 2),
}


@pytest.mark.parametrize("oddity", ODD)
def test_odd_file_is_not_believed(tmp_path: Path, compiled: list[str], oddity: str) -> None:
    profile, layers = layers_of("default")
    seccomp.cached_layers(profile, tmp_path / "cache")
    (stored,) = (tmp_path / "cache").iterdir()
    ODD[oddity](stored)
    assert seccomp.cached_layers(profile, tmp_path / "cache") == layers
    assert compiled == ["default", "default"]


def test_cached_layers_need_neither_pyseccomp_nor_ctypes(tmp_path: Path) -> None:
    profile, _ = layers_of("default")
    seccomp.cached_layers(profile, tmp_path / "cache")
    code = (
        "import sys; from pathlib import Path; from sandboxd import seccomp\n"
        f"seccomp.cached_layers(seccomp.effective('default'), Path({str(tmp_path / 'cache')!r}))\n"
        "print([name for name in ('pyseccomp', 'ctypes', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
