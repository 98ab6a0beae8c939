"""Policies and limits: what is accepted, what is refused and in which words, and what the engine gets."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from sandboxd import errors, policy
from sandboxd.cli import cli
from sandboxd.errors import PolicyError
from sandboxd.limits import LIMITS, LimitValue, defaults, narrow, parse, resolved, spell, value_of
from sandboxd.policy import Limits, Policy, PolicyLimits, Require, Runtime, Seccomp

if TYPE_CHECKING:
    from collections.abc import Callable

SOURCE = Path(__file__).resolve().parents[2]

# The defaults as the documentation promises them, written out a second time on purpose.
PROMISED = {
    "wall_seconds": 30,
    "cpu_seconds": 60,
    "cpus": 1.0,
    "memory_bytes": 512 << 20,
    "pids": 64,
    "workspace_bytes": 64 << 20,
    "workspace_files": 4096,
    "tmp_bytes": 64 << 20,
    "shm_bytes": None,  # half of memory_bytes
    "open_files": 256,
    "file_bytes": 512 << 20,
    "output_bytes": 1 << 20,
    "output_stop_bytes": 8 << 20,
    "queue_seconds": 30,
    "tool_wait_seconds": 60,
    "approval_seconds": 300,
}

# A word of the kernel object, or of the engine's part, that each limit must name.
KERNEL_OBJECTS = {
    "wall_seconds": "CLOCK_MONOTONIC",
    "cpu_seconds": "cpu.stat",
    "cpus": "cpu.max",
    "memory_bytes": "memory.max",
    "pids": "pids.max",
    "workspace_bytes": "size=",
    "workspace_files": "nr_inodes=",
    "tmp_bytes": "tmpfs on /tmp",
    "shm_bytes": "tmpfs on /dev/shm",
    "open_files": "RLIMIT_NOFILE",
    "file_bytes": "RLIMIT_FSIZE",
    "output_bytes": "engine's reader",
    "output_stop_bytes": "engine's reader",
    "queue_seconds": "engine's queue",
    "tool_wait_seconds": "engine's clock",
    "approval_seconds": "engine's clock",
}


def written(directory: Path, text: str, name: str = "mine.toml") -> Path:
    file = directory / name
    file.write_text(text, encoding="utf-8")
    return file


def refused(directory: Path, text: str) -> PolicyError:
    with pytest.raises(PolicyError) as caught:
        policy.load(written(directory, text))
    return caught.value


# --- the table of limits ------------------------------------------------------------------------------------------


def test_every_limit_is_in_each_place_that_has_to_know_it() -> None:
    names = list(PROMISED)
    assert list(LIMITS) == names
    assert list(Limits.model_fields) == names
    assert list(PolicyLimits.model_fields) == names
    assert set(KERNEL_OBJECTS) == set(names)


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_names_its_kernel_object_and_the_reason_of_its_floor(name: str) -> None:
    limit = LIMITS[name]
    assert KERNEL_OBJECTS[name] in limit.kernel
    assert limit.floor_reason
    assert limit.lowest <= limit.default <= limit.highest


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_has_the_promised_default(name: str) -> None:
    assert getattr(PolicyLimits(), name) == PROMISED[name] == defaults()[name]


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize(
    "value",
    [0, -1, 0.0, math.nan, math.inf, -math.inf, True, False, "", "many", "1s", [], {}, 10**400, -(10**400)],
    ids=lambda value: repr(value)[:12],
)
def test_a_value_that_is_no_limit_is_refused_by_name(name: str, value: Any) -> None:
    for attempt in (lambda: parse(name, value), lambda: Limits(**{name: value}), lambda: resolved(name, value)):
        with pytest.raises(PolicyError) as caught:
            attempt()
        assert caught.value.key == f"limits.{name}"
        assert str(caught.value).startswith(f"limits.{name}: ")
        assert LIMITS[name].allowed in str(caught.value)


@pytest.mark.parametrize("name", LIMITS)
def test_the_range_ends_where_the_message_says(name: str) -> None:
    limit = LIMITS[name]
    assert parse(name, limit.lowest) == limit.lowest
    assert parse(name, limit.highest) == limit.highest
    step = 1 if limit.unit in ("bytes", "count") else limit.lowest / 10
    for beyond in (limit.lowest - step, limit.highest + max(step, 1)):
        with pytest.raises(PolicyError):
            parse(name, beyond)


@pytest.mark.parametrize("name", [name for name, limit in LIMITS.items() if limit.unit in ("bytes", "count")])
def test_a_fraction_of_a_whole_thing_is_refused(name: str) -> None:
    with pytest.raises(PolicyError, match="whole number"):
        parse(name, 4096.0)


@pytest.mark.parametrize("name", [name for name, limit in LIMITS.items() if limit.unlimited is None])
def test_no_limit_is_spelled_out(name: str) -> None:
    assert parse(name, "unlimited") is None
    given: dict[str, Any] = {name: "unlimited"}
    assert getattr(PolicyLimits(**given), name) is None
    assert Limits(**given).plain() == {name: None}
    with pytest.raises(PolicyError, match='"unlimited", never 0'):
        parse(name, 0)


@pytest.mark.parametrize("name", [name for name, limit in LIMITS.items() if limit.unlimited])
def test_a_limit_that_must_be_there_says_why(name: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse(name, "unlimited")
    assert str(LIMITS[name].unlimited) in str(caught.value)
    if not LIMITS[name].half_of:
        with pytest.raises(PolicyError):
            resolved(name, None)


def test_half_is_spelled_out_where_a_limit_follows_another() -> None:
    assert [name for name, limit in LIMITS.items() if limit.half_of] == ["shm_bytes"]
    assert parse("shm_bytes", "half") is None
    assert resolved("shm_bytes", None) is None
    assert PolicyLimits.model_validate({"shm_bytes": "half"}).shm_bytes is None
    assert Limits(shm_bytes="half").plain() == {"shm_bytes": None}
    assert spell("shm_bytes", None) == "half"
    assert LIMITS["shm_bytes"].allowed.endswith('or "half" of memory_bytes')
    for name in ("memory_bytes", "tmp_bytes"):
        with pytest.raises(PolicyError):
            parse(name, "half")


def test_half_follows_the_other_limit() -> None:
    limits = defaults()
    assert value_of(limits, "shm_bytes") == LIMITS["shm_bytes"].default == 256 << 20
    assert value_of({**limits, "memory_bytes": 100 << 20}, "shm_bytes") == 50 << 20
    assert value_of({**limits, "shm_bytes": 8 << 10}, "shm_bytes") == 8 << 10
    assert value_of({"shm_bytes": None, "memory_bytes": None}, "shm_bytes") is None
    assert value_of({"shm_bytes": None, "memory_bytes": 4096}, "shm_bytes") == 1 << 20
    assert value_of(limits, "memory_bytes") == 512 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16777216", 16 << 20),
        ("16777216B", 16 << 20),
        ("65536K", 64 << 20),
        ("256M", 256 << 20),
        ("256m", 256 << 20),
        ("256MiB", 256 << 20),
        ("256 MiB", 256 << 20),
        ("2G", 2 << 30),
        ("1T", 1 << 40),
    ],
)
def test_sizes_are_written_as_people_write_them(text: str, size: int) -> None:
    assert parse("memory_bytes", text) == size


@pytest.mark.parametrize("text", ["256MB", "1.5G", "-1M", "M", "256 M B", "\u0662M", "1e9", "256M ", "9" * 400 + "M"])
def test_a_size_with_another_unit_is_refused(text: str) -> None:
    with pytest.raises(PolicyError, match='a string like "256M"'):
        parse("memory_bytes", text)


@pytest.mark.parametrize("name", ["pids", "wall_seconds", "cpus"])
def test_only_sizes_take_units(name: str) -> None:
    with pytest.raises(PolicyError):
        parse(name, "16M")


@pytest.mark.parametrize("name", LIMITS)
def test_what_is_spelled_is_parsed_back(name: str) -> None:
    for value in (LIMITS[name].default, LIMITS[name].lowest, LIMITS[name].highest):
        spelled = spell(name, value)
        number: Any = spelled if LIMITS[name].unit == "bytes" else float(spelled)
        assert parse(name, int(number) if LIMITS[name].unit == "count" else number) == value
    assert spell(name, None) == ("half" if LIMITS[name].half_of else "unlimited")


# --- limits of a run ----------------------------------------------------------------------------------------------


def test_a_run_narrows() -> None:
    asked = Limits(wall_seconds=5, memory_bytes="256M").plain()
    assert narrow(defaults(), asked) == {**defaults(), "wall_seconds": 5.0, "memory_bytes": 256 << 20}


@pytest.mark.parametrize("name", LIMITS)
def test_a_run_may_ask_for_what_the_sandbox_has(name: str) -> None:
    assert narrow(defaults(), {name: defaults()[name]}) == defaults()
    assert narrow(defaults(), {name: LIMITS[name].default}) == {**defaults(), name: LIMITS[name].default}


@pytest.mark.parametrize("name", LIMITS)
def test_a_run_cannot_widen(name: str) -> None:
    wider = LIMITS[name].default + 1
    with pytest.raises(PolicyError) as caught:
        narrow(defaults(), {name: wider})
    assert caught.value.key == f"limits.{name}"
    assert spell(name, wider) in str(caught.value)
    assert spell(name, LIMITS[name].default) in str(caught.value)


@pytest.mark.parametrize("name", [name for name, limit in LIMITS.items() if limit.unlimited is None])
def test_unlimited_is_the_widest_of_all(name: str) -> None:
    with pytest.raises(PolicyError, match="unlimited is wider"):
        narrow(defaults(), {name: None})
    without = {**defaults(), name: None}
    assert narrow(without, {name: None})[name] is None
    assert narrow(without, {name: LIMITS[name].default})[name] == LIMITS[name].default


def test_shared_memory_narrows_with_the_memory_it_is_half_of() -> None:
    def shm(base: Any, **asked: Any) -> LimitValue:
        return value_of(narrow({**defaults(), **base}, Limits(**asked).plain()), "shm_bytes")

    assert shm({}, memory_bytes="128M") == 64 << 20
    assert shm({}, memory_bytes="128M", shm_bytes="100M") == 100 << 20
    assert shm({"shm_bytes": 8 << 20}, memory_bytes="256M") == 8 << 20
    assert shm({"shm_bytes": 8 << 20}, shm_bytes="half", memory_bytes="16M") == 8 << 20
    with pytest.raises(PolicyError, match="half is wider than the 8M"):
        shm({"shm_bytes": 8 << 20}, shm_bytes="half")
    with pytest.raises(PolicyError, match="257M is wider than the 256M"):
        shm({}, shm_bytes="257M")
    # Of a daemon's sandbox a client may know nothing.
    assert narrow({"shm_bytes": None}, {"shm_bytes": 1 << 30}) == {"shm_bytes": 1 << 30}


def test_narrowing_refuses_a_limit_that_does_not_exist() -> None:
    with pytest.raises(PolicyError, match="wall_seconds, cpu_seconds"):
        narrow(defaults(), {"seconds": 5})


def test_limits_that_were_not_given_are_absent() -> None:
    assert Limits().plain() == {}
    assert Limits(pids=None).plain() == {}


def test_an_unknown_limit_names_the_nearest() -> None:
    with pytest.raises(PolicyError, match="did you mean 'memory_bytes'"):
        Limits(memory_byte=1)  # type: ignore[call-arg]


def test_limits_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Limits().pids = 3


def test_an_operator_may_widen() -> None:
    wide = policy.load("default").with_limits(Limits(wall_seconds="unlimited", memory_bytes="2G", pids=4))
    assert (wide.limits.wall_seconds, wide.limits.memory_bytes, wide.limits.pids) == (None, 2 << 30, 4)
    assert wide.limits.cpus == 1.0
    assert wide.sha256 != policy.load("default").sha256


# --- each key wrong once ------------------------------------------------------------------------------------------

WRONG = [  # the section and the line in it, the key's path, what the message must hold
    ("", "name = 'Default'", "name", "a-z, 0-9, _ and -"),
    ("", "name = 3", "name", "must be a string"),
    ("", "limits = 3", "limits", "[limits]"),
    ("", "memory_bytes = 3", "memory_bytes", "runtime, limits, filesystem"),
    ("runtime", "language = 'perl'", "runtime.language", '"python"'),
    ("runtime", "interpreter = 'python3'", "runtime.interpreter", "absolute path"),
    ("runtime", "interpreter = '/usr/../bin/python3'", "runtime.interpreter", "absolute path"),
    ("runtime", "interpreter = false", "runtime.interpreter", "must be a string"),
    ("runtime", "preload = 'numpy'", "runtime.preload", "list of strings"),
    ("runtime", "preload = ['numpy', 3]", "runtime.preload", "strings"),
    ("runtime", "preload = ['os; import sys']", "runtime.preload", "module's name"),
    ("runtime", "preload = ['os', 'os']", "runtime.preload", "twice"),
    ("runtime", "warmup = ['x = 1']", "runtime.warmup", "must be a string"),
    ("runtime", 'warmup = "\\u0000"', "runtime.warmup", "NUL"),
    ("runtime", "warm_up = 'x = 1'", "runtime.warm_up", "did you mean 'warmup'"),
    *[("limits", f"{name} = true", f"limits.{name}", limit.allowed) for name, limit in LIMITS.items()],
    ("limits", "memory = '256M'", "limits.memory", "did you mean 'memory_bytes'"),
    ("filesystem", "image = 'debian'", "filesystem.image", '"host"'),
    ("filesystem", "read_only = ['data']", "filesystem.read_only", "absolute path"),
    ("filesystem", "writable = '/srv'", "filesystem.writable", "list of strings"),
    ("filesystem", "proc = 'full'", "filesystem.proc", '"pid" or "masked"'),
    ("filesystem", "readonly = []", "filesystem.readonly", "did you mean 'read_only'"),
    ("network", "mode = 'host'", "network.mode", '"none"'),
    ("network", "hosts = []", "network.hosts", "mode"),
    ("seccomp", "profile = 'a b'", "seccomp.profile", "strict"),
    ("seccomp", "profile = 'profile.json'", "seccomp.profile", "absolute path"),
    ("seccomp", "allow = ['Open']", "seccomp.allow", "system call's name"),
    ("seccomp", "deny = 'open'", "seccomp.deny", "list of strings"),
    ("seccomp", "report = 'no'", "seccomp.report", "true or false"),
    ("seccomp", "report = 1", "seccomp.report", "true or false"),
    ("require", "cgroup = ['memory', 'io']", "require.cgroup", "memory, pids, cpu"),
    ("require", "landlock_abi = -1", "require.landlock_abi", "least is 0"),
    ("require", "landlock_abi = 1.0", "require.landlock_abi", "whole number"),
    ("require", "landlock_abi = true", "require.landlock_abi", "whole number"),
    ("require", "landlock_abi = 1000", "require.landlock_abi", "most is 64"),
    ("require", "own_uid = 1", "require.own_uid", "true or false"),
    ("require", "own_pid = true", "require.own_pid", "did you mean 'own_uid'"),
    ("audit", "redact = 'API_KEY'", "audit.redact", "must be a list of strings"),
    ("audit", "redact = ['*']", "audit.redact", "the name of a variable or key"),
    ("audit", "redact = ['a b']", "audit.redact", "the name of a variable or key"),
]


@pytest.mark.parametrize(("section", "line", "key", "words"), [pytest.param(*row, id=row[1]) for row in WRONG])
def test_a_wrong_key_is_told_with_its_path_and_line(
    tmp_path: Path, section: str, line: str, key: str, words: str
) -> None:
    before = "# a comment\n" + (f"\n[{section}]\n" if section else "")
    problem = refused(tmp_path, f"{before}{line}\n")
    assert problem.key == key
    assert problem.line == before.count("\n") + 1
    assert problem.file == str(tmp_path / "mine.toml")
    assert words in problem.message
    assert str(problem).startswith(f"{problem.file}:{problem.line}: {key}: ")


LATER = [
    ("runtime", "language = 'bash'"),
    ("runtime", "language = 'node'"),
    ("filesystem", "read_only = ['/srv/data']"),
    ("filesystem", "writable = ['/srv/out']"),
    ("filesystem", "proc = 'masked'"),
    ("seccomp", "report = true"),
]


@pytest.mark.parametrize(("section", "line"), [pytest.param(*row, id=row[1]) for row in LATER])
def test_what_is_not_built_yet_is_refused_and_says_so(tmp_path: Path, section: str, line: str) -> None:
    problem = refused(tmp_path, f"[{section}]\n{line}\n")
    assert "this version does not offer" in problem.message
    assert problem.key == f"{section}.{line.split(' ')[0]}"
    assert problem.line == 2


def test_a_policy_made_in_python_is_checked_too() -> None:
    with pytest.raises(PolicyError, match="this version does not offer"):
        Policy(name="mine", runtime=Runtime(language="bash"))
    with pytest.raises(PolicyError, match="name: 'A'"):
        Policy(name="A")
    with pytest.raises(PolicyError, match="keep it in one"):
        Policy(name="mine", seccomp=Seccomp(allow=("mount",), deny=("mount",)))


def test_every_problem_of_a_file_is_found_in_order(tmp_path: Path) -> None:
    file = written(tmp_path, "[require]\nown_uid = 3\n[limits]\npids = 0\ncpus = 'x'\n")
    found, problems = policy.check(file)
    assert found is None
    assert [(problem.line, problem.key) for problem in problems] == [
        (2, "require.own_uid"),
        (4, "limits.pids"),
        (5, "limits.cpus"),
    ]


def test_what_is_not_built_yet_is_told_beside_other_problems(tmp_path: Path) -> None:
    text = (
        "name = 3\n[filesystem]\nproc = 'masked'\nread_only = 'x'\nnone = 1\n[limits]\npids = 0\n"
        "[runtime]\nlanguage = 'bash'\n[seccomp]\nallow = ['mount']\ndeny = ['mount']\n"
    )
    found, problems = policy.check(written(tmp_path, text))
    assert found is None
    assert [(problem.line, problem.key) for problem in problems] == [
        (1, "name"),
        (3, "filesystem.proc"),
        (4, "filesystem.read_only"),
        (5, "filesystem.none"),
        (7, "limits.pids"),
        (9, "runtime.language"),
        (12, "seccomp.deny"),
    ]


# --- lines in odd files -------------------------------------------------------------------------------------------

LINES = [
    ("limits.pids = 0\n", 1),
    ("limits = { wall_seconds = 3, pids = 0 }\n", 1),
    ('"limits"."pids" = 0\n', 1),
    ("[ limits ] # why\n\n  pids=0\n", 3),
    ("[runtime]\nwarmup = '''\n[limits]\npids = 3\n'''\n\n[limits]\npids = 0\n", 8),
    ('[runtime]\nwarmup = """\npids = 3\n[limits]"""\n[limits]\npids = 0\n', 6),
    ("[runtime]\nwarmup = '''x = 1'''\n[limits]\npids = 0\n", 4),
    ("[runtime]\npreload = [\n  'os',\n  'json',\n]\n[limits]\r\npids = 0\r\n", 7),
    ("[runtime]\nwarmup = 'pids = 0'\n[limits]\nwall_seconds = 1\npids = 0", 5),
]


@pytest.mark.parametrize(("text", "line"), LINES)
def test_the_line_is_found_in_whatever_form_the_key_is_written(text: str, line: int, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(text.encode())
    _, problems = policy.check(file)
    assert [(problem.key, problem.line) for problem in problems] == [("limits.pids", line)]


# --- files --------------------------------------------------------------------------------------------------------

UNREADABLE = [  # content, line, words
    (b"name = \n", 1, "not TOML"),
    (b"[limits]\npids = 1\npids = 2\n", 3, "not TOML"),
    (b"[limits]\nx = \xff\n", 2, "UTF-8"),
    (b"#" * ((1 << 20) + 1), None, "at most"),
    (b"x = " + b"[" * 100_000, None, "nested"),
]


@pytest.mark.parametrize(("content", "line", "words"), UNREADABLE, ids=["syntax", "twice", "bytes", "long", "deep"])
def test_a_file_that_is_no_toml_is_told_with_its_line(
    content: bytes, line: int | None, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(content)
    with pytest.raises(PolicyError, match=words) as caught:
        policy.load(file)
    assert (caught.value.file, caught.value.line) == (str(file), line)


def test_a_missing_file_and_a_directory_are_told() -> None:
    with pytest.raises(PolicyError, match="No such file"):
        policy.load("./nowhere.toml")
    with pytest.raises(PolicyError, match="directory"):
        policy.load("/etc/")
    with pytest.raises(PolicyError, match="null byte"):
        policy.load("a\0b/c.toml")


def test_an_unknown_name_lists_the_known_and_the_nearest() -> None:
    with pytest.raises(PolicyError, match=r"Did you mean 'default'\? The known ones: data, default, strict"):
        policy.load("defualt")


@pytest.mark.parametrize("name", ["", ".", "..", "Default", "a b", "default\n", "x" * 300])
def test_a_name_is_never_a_path(name: str) -> None:
    with pytest.raises(PolicyError, match="There is no policy named"):
        policy.load(name)


def test_a_name_is_searched_in_the_order_of_the_directories(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    written(first, "limits.pids = 1", "mine.toml")
    written(second, "limits.pids = 2", "mine.toml")
    written(second, "limits.pids = 3", "other.toml")
    written(second, "", "Not-A-Name.toml")
    places = [tmp_path / "nowhere", first, second]
    assert list(policy.installed(places)) == ["mine", "other"]
    assert policy.load("mine", places).limits.pids == 1
    assert policy.load("other", places).limits.pids == 3


def test_an_installed_policy_bears_its_files_name(tmp_path: Path) -> None:
    written(tmp_path, "\nname = 'other'", "mine.toml")
    with pytest.raises(PolicyError, match="differs from the file's name") as caught:
        policy.load("mine", [tmp_path])
    assert caught.value.line == 2
    assert policy.load(tmp_path / "mine.toml").name == "other"


def test_a_policy_is_its_own_name(tmp_path: Path) -> None:
    loaded = policy.load(written(tmp_path, ""))
    assert loaded.name == "mine"
    assert policy.load(loaded) is loaded


# --- what a policy is worth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", policy.installed([policy.policies_dir()]))
def test_a_shipped_policy_is_valid(name: str) -> None:
    assert policy.load(name, [policy.policies_dir()]).name == name


def test_the_default_policy_spells_out_every_key_with_its_default() -> None:
    text = (policy.policies_dir() / "default.toml").read_text(encoding="utf-8")
    assert policy.load("default", [policy.policies_dir()]) == Policy(name="default")
    table = tomllib.loads(text)
    for section, values in Policy(name="default").plain().items():
        if section != "name":
            assert set(table[section]) | {"interpreter"} == set(values) | {"interpreter"}


def test_the_strict_policy_is_nowhere_wider() -> None:
    strict = policy.load("strict", [policy.policies_dir()])
    assert narrow(defaults(), strict.limits.plain()) == strict.limits.plain()
    assert strict.seccomp.profile == "strict"


def test_plain_values_are_json_and_hold_every_key() -> None:
    plain = Policy(name="mine", limits=PolicyLimits(pids="unlimited")).plain()  # type: ignore[arg-type]
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert list(plain) == ["name", "runtime", "limits", "filesystem", "network", "seccomp", "require", "audit"]
    assert plain["limits"]["pids"] is None
    assert plain["require"] == {"cgroup": ["memory", "pids", "cpu"], "landlock_abi": 1, "own_uid": True}
    for section, values in plain.items():
        if section != "name":
            annotation: Any = Policy.model_fields[section].annotation
            assert list(values) == list(annotation.model_fields)


def test_the_hash_follows_the_meaning(tmp_path: Path) -> None:
    one = policy.load(written(tmp_path, "[limits]\nmemory_bytes = '256M'\npids = 64\n"))
    two = policy.load(written(tmp_path, "# other words\nlimits.memory_bytes = 268435456\n"))
    three = policy.load(written(tmp_path, "limits.memory_bytes = 268435457\n"))
    assert one.sha256 == two.sha256 != three.sha256
    assert len(one.sha256) == 64


def test_a_policy_is_frozen_all_the_way_down() -> None:
    loaded = Policy(name="mine", require=Require(cgroup=("memory",)))
    with pytest.raises(ValidationError):
        loaded.name = "other"
    with pytest.raises(ValidationError):
        loaded.require.own_uid = False
    assert isinstance(loaded.require.cgroup, tuple)


def test_the_engines_side_imports_no_pydantic() -> None:
    code = "import sys, sandboxd.limits, sandboxd.protocol.run_header; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SOURCE, check=False).returncode == 0


def test_the_data_policys_warmup_runs_without_a_warning(tmp_path: Path) -> None:
    for module in ("numpy", "pandas", "scipy", "matplotlib"):
        pytest.importorskip(module)
    runtime = policy.load("data", [policy.policies_dir()]).runtime
    code = f"import {', '.join(runtime.preload)}\nimport warnings\nwarnings.simplefilter('error')\n{runtime.warmup}"
    environment = {"HOME": str(tmp_path), "PATH": os.defpath, "MPLCONFIGDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- errors -------------------------------------------------------------------------------------------------------

RAISED = [
    errors.PolicyError("limits.pids: 0 is not allowed", "a.toml", 3, "limits.pids"),
    errors.PolicyError("no file"),
    errors.InvalidRequest("code", "it is not text"),
    errors.Unavailable("landlock", "the kernel has no Landlock", errno=38, fix="boot with lsm=landlock"),
    errors.Unavailable("libraries", fix="pip install numpy"),
    errors.Busy(0.5),
    errors.ConnectionLost(True),
    errors.ConnectionLost(False),
    errors.ProtocolError("a frame is too long"),
]


def copied(error: errors.SandboxError) -> errors.SandboxError:
    again = pickle.loads(pickle.dumps(error))  # noqa: S301  bytes of our own
    assert isinstance(again, errors.SandboxError)
    return again


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "travel",
    [copied, lambda e: errors.from_plain(json.loads(json.dumps(e.plain())))],
    ids=["pickle", "plain"],
)
def test_an_error_survives_its_way(
    error: errors.SandboxError, travel: Callable[[errors.SandboxError], errors.SandboxError]
) -> None:
    again = travel(error)
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.plain() == error.plain()


def test_unavailable_shows_stage_errno_and_fix() -> None:
    assert str(RAISED[3]) == (
        "landlock: the kernel has no Landlock (ENOSYS: Function not implemented). To mend it: boot with lsm=landlock"
    )


@pytest.mark.parametrize(
    "plain",
    [
        {},
        {"kind": "OSError", "message": "x"},
        {"kind": ["PolicyError"]},
        {"kind": "ProtocolError"},
        {"kind": "ProtocolError", "message": 3},
        {"kind": "ProtocolError", "message": "x", "more": 1},
        {"kind": "Busy", "retry_after": True},
        {"kind": "ConnectionLost", "may_have_started": 1},
    ],
)
def test_a_forged_error_is_a_protocol_error(plain: dict[str, Any]) -> None:
    with pytest.raises(errors.ProtocolError, match="The other side"):
        errors.from_plain(plain)


# --- the command --------------------------------------------------------------------------------------------------


def test_policy_list_names_the_shipped_ones() -> None:
    done = CliRunner().invoke(cli, ["policy", "list", "--json"])
    assert done.exit_code == 0
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert {"data", "default", "strict"} <= set(rows)
    assert rows["default"]["sha256"] == policy.load("default").sha256
    done = CliRunner().invoke(cli, ["policy", "list"])
    assert "default" in done.stdout


@pytest.mark.parametrize("name", ["default", "strict", "data"])
def test_policy_show_prints_a_policy_that_means_the_same(name: str) -> None:
    done = CliRunner().invoke(cli, ["policy", "show", name])
    assert done.exit_code == 0, done.output
    values, _, calls = done.stdout.partition("# sha256 of the system calls below: ")
    found, problems = policy.parse_toml(values, "shown")
    assert problems == []
    assert found == policy.load(name)
    assert found is not None
    assert found.sha256 in values
    assert "openat" in calls


def test_policy_show_json_holds_the_filter_and_its_hash() -> None:
    done = CliRunner().invoke(cli, ["policy", "show", "default", "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert shown["policy"] == policy.load("default").plain()
    assert shown["sha256"] == policy.load("default").sha256
    assert len(shown["seccomp"]["sha256"]) == 64
    assert all(rule["reason"] for rule in shown["seccomp"]["rules"])


def test_policy_show_follows_allow_and_deny(tmp_path: Path) -> None:
    file = written(tmp_path, "seccomp.deny = ['symlink']\n")
    done = CliRunner().invoke(cli, ["policy", "show", str(file), "--json"])
    assert done.exit_code == 0, done.output
    plain = json.loads(CliRunner().invoke(cli, ["policy", "show", "default", "--json"]).stdout)
    shown = json.loads(done.stdout)
    assert shown["seccomp"]["sha256"] != plain["seccomp"]["sha256"]


def test_policy_check_tells_every_problem_and_exits_2(tmp_path: Path) -> None:
    file = written(tmp_path, "[limits]\npids = 0\nmemory = 3\n")
    done = CliRunner().invoke(cli, ["policy", "check", str(file)])
    assert done.exit_code == 2
    assert f"{file}:2: limits.pids: " in done.stderr
    assert f"{file}:3: limits.memory: " in done.stderr
    done = CliRunner().invoke(cli, ["policy", "check", str(file), "--json"])
    assert done.exit_code == 2
    told = json.loads(done.stdout)
    assert (told["ok"], [(p["line"], p["key"]) for p in told["problems"]]) == (
        False,
        [(2, "limits.pids"), (3, "limits.memory")],
    )


@pytest.mark.parametrize("line", ["allow = ['opnat']", "profile = 'defualt'"])
def test_policy_check_knows_the_system_calls(tmp_path: Path, line: str) -> None:
    file = written(tmp_path, f"[seccomp]\n{line}\n")
    done = CliRunner().invoke(cli, ["policy", "check", str(file)])
    assert done.exit_code == 2, done.output
    assert f"{file}:2: " in done.stderr


@pytest.mark.parametrize("line", ["allow = ['opnat']", "deny = ['read']", "profile = 'defualt'"])
def test_a_policy_whose_filter_cannot_be_made_is_told_with_its_line(tmp_path: Path, line: str) -> None:
    file = written(tmp_path, f"[seccomp]\n{line}\n")
    with pytest.raises(PolicyError) as caught:
        policy.load(file)
    assert (caught.value.file, caught.value.line) == (str(file), 2)


def test_policy_check_accepts_what_is_right(tmp_path: Path) -> None:
    file = written(tmp_path, "limits.pids = 3\n")
    done = CliRunner().invoke(cli, ["policy", "check", str(file)])
    assert done.exit_code == 0, done.output
    assert policy.load(file).sha256 in done.stdout
    told = json.loads(CliRunner().invoke(cli, ["policy", "check", str(file), "--json"]).stdout)
    assert (told["ok"], told["name"], told["problems"]) == (True, "mine", [])


def test_policy_check_of_a_missing_file_exits_2() -> None:
    done = CliRunner().invoke(cli, ["policy", "check", "nowhere.toml"])
    assert done.exit_code == 2
    assert "No such file" in done.stderr
