"""Policies: what a person writes about a sandbox, parsed once into frozen models.

A policy is a TOML file. Unknown keys, wrong types and values out of range are PolicyErrors with the file, the line,
the key's path and what is allowed; a valid policy is an immutable ``Policy`` whose ``plain()`` values go to the
engine. Pydantic stays on this side of that line.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, ValidationInfo

from sandboxd.errors import PolicyError
from sandboxd.limits import LIMITS, LimitValue, parse, shown
from sandboxd.policy.files import NAME, file_of, find, installed, is_name, nearest, policies_dir, read
from sandboxd.policy.locate import line_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

__all__ = [
    "Audit",
    "Filesystem",
    "Limits",
    "Network",
    "Policy",
    "PolicyLimits",
    "Require",
    "Runtime",
    "Seccomp",
    "check",
    "find",
    "installed",
    "load",
    "parse_toml",
    "policies_dir",
]

_CONFIG = ConfigDict(frozen=True, extra="forbid", strict=True)


def _asked_limit(value: object, info: ValidationInfo) -> int | float | str | None:
    if value is None:
        return None
    parsed = _resolved_limit(value, info)
    return LIMITS[str(info.field_name)].word if parsed is None else parsed


def _resolved_limit(value: object, info: ValidationInfo) -> LimitValue:
    assert info.field_name is not None  # noqa: S101 (a plain fact about pydantic's fields, for the type checker)
    try:
        return parse(info.field_name, value)
    except PolicyError as error:
        raise ValueError(error) from None  # pydantic collects ValueErrors, so that all wrong keys are told at once


class Limits(BaseModel):
    """Limits that a caller sets for a run or a Sandbox; a field left out, or None, is the policy's.

    Sizes are bytes or strings such as "256M"; "unlimited" is spelled out where the kernel has such a thing, and
    shm_bytes may be "half", of memory_bytes. The fields are those of PolicyLimits, which says what each one is. Raises
    PolicyError for a value or a name that is not allowed.
    """

    # More than 15 attributes: one for each limit.

    model_config = _CONFIG

    wall_seconds: Annotated[float | Literal["unlimited"] | None, PlainValidator(_asked_limit)] = None
    cpu_seconds: Annotated[float | Literal["unlimited"] | None, PlainValidator(_asked_limit)] = None
    cpus: Annotated[float | Literal["unlimited"] | None, PlainValidator(_asked_limit)] = None
    memory_bytes: Annotated[int | str | None, PlainValidator(_asked_limit)] = None
    pids: Annotated[int | Literal["unlimited"] | None, PlainValidator(_asked_limit)] = None
    workspace_bytes: Annotated[int | str | None, PlainValidator(_asked_limit)] = None
    workspace_files: Annotated[int | None, PlainValidator(_asked_limit)] = None
    tmp_bytes: Annotated[int | str | None, PlainValidator(_asked_limit)] = None
    shm_bytes: Annotated[int | str | None, PlainValidator(_asked_limit)] = None
    open_files: Annotated[int | None, PlainValidator(_asked_limit)] = None
    file_bytes: Annotated[int | str | None, PlainValidator(_asked_limit)] = None
    output_bytes: Annotated[int | str | None, PlainValidator(_asked_limit)] = None
    output_stop_bytes: Annotated[int | str | None, PlainValidator(_asked_limit)] = None
    queue_seconds: Annotated[float | Literal["unlimited"] | None, PlainValidator(_asked_limit)] = None
    tool_wait_seconds: Annotated[float | Literal["unlimited"] | None, PlainValidator(_asked_limit)] = None
    approval_seconds: Annotated[float | Literal["unlimited"] | None, PlainValidator(_asked_limit)] = None

    if not TYPE_CHECKING:  # type checkers take the signature from the fields

        def __init__(self, /, **given: Any) -> None:
            try:
                super().__init__(**given)
            except ValidationError as error:
                raise _problems(error, under=("limits",))[0] from None

    def plain(self) -> dict[str, LimitValue]:
        """The limits that were given, None for "unlimited" and "half"; those not given are absent."""
        values = ((name, getattr(self, name)) for name in LIMITS)
        return {name: None if value == LIMITS[name].word else value for name, value in values if value is not None}


class PolicyLimits(BaseModel):
    """[limits]: every limit of a policy, resolved; None is "unlimited", or "half" for shm_bytes. Ranges:
    ``sandboxd.limits``.
    """

    # More than 15 attributes: one for each limit.

    model_config = _CONFIG

    # the engine's clock, from the program's start
    wall_seconds: Annotated[float | None, PlainValidator(_resolved_limit)] = LIMITS["wall_seconds"].default
    # cpu.stat or cpuacct.usage of the whole tree; RLIMIT_CPU as a belt
    cpu_seconds: Annotated[float | None, PlainValidator(_resolved_limit)] = LIMITS["cpu_seconds"].default
    # cpu.max = quota / period
    cpus: Annotated[float | None, PlainValidator(_resolved_limit)] = LIMITS["cpus"].default
    # memory.max; swap is off, tmpfs counts
    memory_bytes: Annotated[int, PlainValidator(_resolved_limit)] = int(LIMITS["memory_bytes"].default)
    # pids.max; threads count
    pids: Annotated[int | None, PlainValidator(_resolved_limit)] = int(LIMITS["pids"].default)
    # size= of the tmpfs on /workspace
    workspace_bytes: Annotated[int, PlainValidator(_resolved_limit)] = int(LIMITS["workspace_bytes"].default)
    # nr_inodes= of that tmpfs
    workspace_files: Annotated[int, PlainValidator(_resolved_limit)] = int(LIMITS["workspace_files"].default)
    # size= of the tmpfs on /tmp
    tmp_bytes: Annotated[int, PlainValidator(_resolved_limit)] = int(LIMITS["tmp_bytes"].default)
    # size= of the tmpfs on /dev/shm; None is half of memory_bytes
    shm_bytes: Annotated[int | None, PlainValidator(_resolved_limit)] = None
    # RLIMIT_NOFILE
    open_files: Annotated[int, PlainValidator(_resolved_limit)] = int(LIMITS["open_files"].default)
    # RLIMIT_FSIZE
    file_bytes: Annotated[int | None, PlainValidator(_resolved_limit)] = int(LIMITS["file_bytes"].default)
    # the engine's reader: kept of each stream
    output_bytes: Annotated[int, PlainValidator(_resolved_limit)] = int(LIMITS["output_bytes"].default)
    # the engine's reader: ends the run
    output_stop_bytes: Annotated[int | None, PlainValidator(_resolved_limit)] = int(LIMITS["output_stop_bytes"].default)
    # the engine's queue, before the program's start
    queue_seconds: Annotated[float | None, PlainValidator(_resolved_limit)] = LIMITS["queue_seconds"].default
    tool_wait_seconds: Annotated[float | None, PlainValidator(_resolved_limit)] = LIMITS["tool_wait_seconds"].default
    approval_seconds: Annotated[float | None, PlainValidator(_resolved_limit)] = LIMITS["approval_seconds"].default

    def plain(self) -> dict[str, LimitValue]:
        """Every limit by name, None for "unlimited" and "half"."""
        return {name: getattr(self, name) for name in LIMITS}


def _tuple_of(check: Callable[[str], str | None]) -> PlainValidator:
    """A list of distinct strings, kept as a tuple; *check* returns what is wrong with one, or None."""

    def validate(value: object) -> tuple[str, ...]:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{shown(value)} is not allowed; it must be a list of strings")
        items: dict[str, None] = {}
        for item in cast("Iterable[object]", value):
            if not isinstance(item, str):
                raise ValueError(f"{shown(item)} is not allowed in this list; it holds strings")
            wrong = check(item)
            if wrong:
                raise ValueError(f"{shown(item)} is not allowed in this list; {wrong}")
            if item in items:
                raise ValueError(f"{shown(item)} stands in this list twice")
            items[item] = None
        return tuple(items)

    return PlainValidator(validate)


def _text(check: Callable[[str], str | None], optional: bool = False) -> PlainValidator:
    def validate(value: object) -> str | None:
        if value is None and optional:
            return None
        if not isinstance(value, str):
            raise ValueError(f"{shown(value)} is not allowed; it must be a string")
        wrong = check(value)
        if wrong:
            raise ValueError(f"{shown(value)} is not allowed; {wrong}")
        return value

    return PlainValidator(validate)


def _not_a_module(name: str) -> str | None:
    if all(part.isidentifier() for part in name.split(".")):
        return None
    return "it must be a module's name, such as numpy or os.path"


def _not_a_path(path: str) -> str | None:
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        return 'it must be an absolute path without ".."'
    return None


def _not_a_call(name: str) -> str | None:
    return None if re.fullmatch(r"[a-z_][a-z0-9_]*", name) else "it must be a system call's name, such as openat"


def _not_a_profile(name: str) -> str | None:
    # A relative path would mean another file in each process that reads the policy.
    if NAME.fullmatch(name) or (name.endswith((".json", ".toml")) and not _not_a_path(name)):
        return None
    return "it must be a profile's name (default, strict), or an absolute path of a .json (OCI) or .toml file"


def _not_a_controller(name: str) -> str | None:
    return None if name in ("memory", "pids", "cpu") else "allowed: memory, pids, cpu"


def _not_a_name(name: str) -> str | None:
    return None if NAME.fullmatch(name) else "a policy's name is 1 to 64 of a-z, 0-9, _ and -"


def _not_a_secrets_name(name: str) -> str | None:
    if re.fullmatch(r"[A-Za-z0-9_.*-]{1,128}", name) and name.strip("*"):
        return None
    return "it must be the name of a variable or key, such as API_KEY or *_token; * stands for anything"


def _not_a_text(text: str) -> str | None:
    return "it must not hold a NUL" if "\0" in text else None


class Runtime(BaseModel):
    """[runtime]: the language, its interpreter (None is the one sandboxd runs on), and what its zygote warms up."""

    model_config = _CONFIG

    language: Literal["python", "bash", "node"] = "python"
    interpreter: Annotated[str | None, _text(_not_a_path, optional=True)] = None
    preload: Annotated[tuple[str, ...], _tuple_of(_not_a_module)] = ()
    warmup: Annotated[str, _text(_not_a_text)] = ""


class Filesystem(BaseModel):
    """[filesystem]: the image the rootfs is built from, more places to bind, and how /proc looks."""

    model_config = _CONFIG

    image: Literal["host"] = "host"
    read_only: Annotated[tuple[str, ...], _tuple_of(_not_a_path)] = ()
    writable: Annotated[tuple[str, ...], _tuple_of(_not_a_path)] = ()
    proc: Literal["pid", "masked"] = "pid"


class Network(BaseModel):
    """[network]: "none" is an empty network namespace, loopback down."""

    model_config = _CONFIG

    mode: Literal["none"] = "none"


class Seccomp(BaseModel):
    """[seccomp]: the profile, and the system calls that are added to it and taken from it."""

    model_config = _CONFIG

    profile: Annotated[str, _text(_not_a_profile)] = "default"
    allow: Annotated[tuple[str, ...], _tuple_of(_not_a_call)] = ()
    deny: Annotated[tuple[str, ...], _tuple_of(_not_a_call)] = ()
    report: bool = False


class Require(BaseModel):
    """[require]: what must be in force, else no run starts. Namespaces, no_new_privs and seccomp always are."""

    model_config = _CONFIG

    cgroup: Annotated[tuple[str, ...], _tuple_of(_not_a_controller)] = ("memory", "pids", "cpu")
    landlock_abi: Annotated[int, Field(ge=0, le=64)] = 1  # 0: Landlock is used where it is there, and not required
    own_uid: bool = True  # each cell has a host uid of its own; needs root or subordinate ids


class Audit(BaseModel):
    """[audit]: environment variables, and keys of tools' arguments and results, whose values no record may hold."""

    model_config = _CONFIG

    redact: Annotated[tuple[str, ...], _tuple_of(_not_a_secrets_name)] = ()


class Policy(BaseModel):
    """One policy, complete: every key has a value. Raises PolicyError when a value is not allowed or not built yet."""

    model_config = _CONFIG

    name: Annotated[str, _text(_not_a_name)]
    runtime: Runtime = Runtime.model_construct()
    limits: PolicyLimits = PolicyLimits.model_construct()
    filesystem: Filesystem = Filesystem.model_construct()
    network: Network = Network.model_construct()
    seccomp: Seccomp = Seccomp.model_construct()
    require: Require = Require.model_construct()
    audit: Audit = Audit.model_construct()

    if not TYPE_CHECKING:

        def __init__(self, /, **given: Any) -> None:
            try:
                super().__init__(**given)
            except ValidationError as error:
                raise _problems(error)[0] from None
            conflicts = _conflicts(self)
            if conflicts:
                raise conflicts[0]

    def plain(self) -> dict[str, Any]:
        """Every effective value as JSON has it: sections are objects, lists are lists, a limit that is "unlimited" or
        "half" is null.
        """
        return {
            "name": self.name,
            "runtime": {**self.runtime.__dict__, "preload": list(self.runtime.preload)},
            "limits": self.limits.plain(),
            "filesystem": {
                **self.filesystem.__dict__,
                "read_only": list(self.filesystem.read_only),
                "writable": list(self.filesystem.writable),
            },
            "network": dict(self.network.__dict__),
            "seccomp": {
                **self.seccomp.__dict__,
                "allow": list(self.seccomp.allow),
                "deny": list(self.seccomp.deny),
            },
            "require": {**self.require.__dict__, "cgroup": list(self.require.cgroup)},
            "audit": {"redact": list(self.audit.redact)},
        }

    @property
    def sha256(self) -> str:
        """Hash over the canonical JSON of ``plain()``: the same for two files that mean the same."""
        canonical = json.dumps(self.plain(), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    def with_limits(self, limits: Limits) -> Policy:
        """This policy with *limits* in place of its own: the operator's way, which may widen as well as narrow."""
        values = {**self.limits.plain(), **limits.plain()}
        own: dict[str, Any] = {name: getattr(self, name) for name in type(self).model_fields}
        own["limits"] = PolicyLimits.model_construct(None, **values)
        return Policy(**own)


# What the file format has and this version does not do; a later version drops the row.
_NOT_YET: Final[tuple[tuple[str, str, Callable[[Any], bool], str], ...]] = (
    ("runtime", "language", lambda value: value != "python", 'only "python" runs now; bash and node come later'),
    ("filesystem", "read_only", bool, "binding more of the host comes later; leave the list empty"),
    ("filesystem", "writable", bool, "more places to write to come later; leave the list empty"),
    ("filesystem", "proc", lambda value: value == "masked", 'only "pid" is there now; "masked" comes later'),
    ("seccomp", "report", bool, "naming the refused call comes later; leave it false"),
)


def _conflicts(policy: Policy) -> list[PolicyError]:
    """What is wrong with a policy whose keys are each valid: not offered yet, or in conflict with another."""
    found: list[PolicyError] = []
    for section, key, refused, words in _NOT_YET:
        value = getattr(getattr(policy, section), key)
        if refused(value):
            path = f"{section}.{key}"
            as_written = list(cast("tuple[str, ...]", value)) if isinstance(value, tuple) else value
            found.append(PolicyError(f"{path}: this version does not offer {shown(as_written)}; {words}.", key=path))
    both = sorted(set(policy.seccomp.allow) & set(policy.seccomp.deny))
    if both:
        message = f"seccomp.deny: {', '.join(both)} is also in seccomp.allow; keep it in one."
        found.append(PolicyError(message, key="seccomp.deny"))
    return found


SHIPPED_PROFILES = ("default", "strict")


def load(
    policy: str | Path | Policy = "default",
    directories: Sequence[Path] | None = None,
    believe: Callable[[Path, int], None] | None = None,
) -> Policy:
    """The policy of that name or file; a Policy is returned as it is.

    A string that ends in ".toml" or holds a slash is a file, any other a name, looked up as ``find`` does. *believe* is
    asked before it is read, as ``policyfiles.read`` says. Raises PolicyError with the file and the line of the first
    problem.
    """
    if isinstance(policy, Policy):
        return policy
    file = file_of(policy, directories)
    return meant(read(file, believe), file, named=is_name(policy))


def meant(text: str, file: Path, named: bool = False) -> Policy:
    """The policy that *text*, the content of *file*, describes; *named*: it was asked for by name, which it must then
    bear. Raises PolicyError.
    """
    loaded, problems = parse_toml(text, str(file), file.stem)
    if loaded is None:
        raise problems[0]
    if named and loaded.name != file.stem:
        # Receipts and audit records would show another name than the one that was asked for.
        message = f"name: {loaded.name!r} differs from the file's name, {file.stem!r}."
        raise PolicyError(message, str(file), line_of(text, "name"), "name")
    chosen = loaded.seccomp
    if chosen.allow or chosen.deny or chosen.profile not in SHIPPED_PROFILES:
        from sandboxd import seccomp

        try:
            seccomp.effective(chosen.profile, chosen.allow, chosen.deny)
        except PolicyError as problem:
            raise located(problem, file) from None
    return loaded


def located(problem: PolicyError, file: Path) -> PolicyError:
    """*problem* with *file* and the line that sets its key, when another room found it in a policy already loaded."""
    if problem.file is None:
        problem.file, problem.line = str(file), line_of(read(file), problem.key or "")
    return problem


def check(file: Path) -> tuple[Policy | None, list[PolicyError]]:
    """The policy in *file* and every problem found in it; the policy is None when there is one."""
    try:
        return parse_toml(read(file), str(file), file.stem)
    except PolicyError as error:
        return None, [error]


def parse_toml(text: str, file: str, default_name: str = "") -> tuple[Policy | None, list[PolicyError]]:
    """The policy that *text* describes, and every problem in it with its line; *file* is named in the problems.

    *default_name* is taken when the text has no ``name``.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"\(at line (\d+), column \d+\)", str(error))
        message = re.sub(r" \(at .*\)$", "", str(error))
        line = int(at[1]) if at else len(text.splitlines()) or 1
        return None, [PolicyError(f"This is not TOML: {message}.", file, line)]
    except RecursionError:
        return None, [PolicyError("This is not a policy: it is nested too deeply.", file)]
    if NAME.fullmatch(default_name):
        table.setdefault("name", default_name)
    policy, problems = _validated(table)
    for problem in problems:
        problem.file, problem.line = file, line_of(text, problem.key or "")
    problems.sort(key=lambda problem: problem.line or 0)
    return (None if problems else policy), problems


def _validated(table: dict[str, Any]) -> tuple[Policy | None, list[PolicyError]]:
    policy = Policy.__new__(Policy)
    try:
        BaseModel.__init__(policy, **table)  # not Policy's own, which raises the first problem alone
    except ValidationError as error:
        problems = _problems(error)
        return None, [*problems, *_conflicts_of_the_rest(table, {problem.key for problem in problems})]
    return policy, _conflicts(policy)


def _conflicts_of_the_rest(table: dict[str, Any], wrong: set[str | None]) -> list[PolicyError]:
    """``_conflicts`` of what is left of *table* without the keys that are *wrong* by themselves."""
    rest: dict[str, Any] = {"name": "rest"}
    for section, keys in table.items():
        if section not in wrong and isinstance(keys, dict):
            rest[section] = {key: value for key, value in keys.items() if f"{section}.{key}" not in wrong}
    policy = Policy.__new__(Policy)
    try:
        BaseModel.__init__(policy, **rest)
    except ValidationError:
        return []
    return _conflicts(policy)


def _problems(error: ValidationError, under: tuple[str, ...] = ()) -> list[PolicyError]:
    """Pydantic's findings in our words; *under* is put before each key's path."""
    found: list[PolicyError] = []
    for detail in error.errors(include_url=False):
        location = (*under, *(str(part) for part in detail["loc"]))
        key = ".".join(location)
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, ValueError) and cause.args and isinstance(cause.args[0], PolicyError):
            found.append(cause.args[0])
        else:
            found.append(PolicyError(f"{key}: {_sentence(detail, location)}.", key=key))
    return found


def _sentence(detail: Any, location: tuple[str, ...]) -> str:
    kind, value = detail["type"], detail["input"]
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    if kind == "extra_forbidden":
        return _unknown_key(location)
    if kind == "missing":
        return "this key is required"
    context = detail.get("ctx", {})
    wanted = {
        "literal_error": f"allowed: {str(context.get('expected')).replace(chr(39), chr(34))}",
        "model_type": f"it must be a table: [{location[-1]}]",
        "bool_type": "it must be true or false",
        "int_type": "it must be a whole number",
        "greater_than_equal": f"the least is {context.get('ge')}",
        "less_than_equal": f"the most is {context.get('le')}",
    }
    return f"{shown(value)} is not allowed; {wanted.get(kind, detail['msg'])}"


def _unknown_key(location: tuple[str, ...]) -> str:
    fields: Iterable[str] = Policy.model_fields
    if len(location) > 1:
        section = Policy.model_fields[location[0]].annotation
        fields = section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else ()
    what = f"[{location[0]}]" if len(location) > 1 else "a policy"
    near = nearest(location[len(location) - 1], fields)
    hint = f"; did you mean {near!r}? Its keys" if near else "; its keys"
    return f"there is no such key in {what}{hint} are {', '.join(fields)}"
