"""What this host can enforce: each wall, for the three ways to run an engine, and how to mend what is missing.

``survey`` asks the kernel by calling it (``diagnostics.probe``, a process of its own) and turns the answers into a
Report of plain data; ``prove`` runs one program in a cell of the default policy and keeps the receipt. Nothing is
judged by a version number where a call can tell; what cannot be asked from here, such as what another user's cgroup
allows, is "unknown".
"""

from __future__ import annotations

import errno as errnos
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from sandboxd.diagnostics import host_facts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["MODES", "Finding", "Mode", "Proof", "Report", "Wall", "current_mode", "prove", "survey", "walls"]

Mode = Literal["root", "rootless", "rootless-one-id"]
State = Literal["in force", "missing", "unknown"]
Answers = dict[str, dict[str, Any]]

MODES: dict[Mode, str] = {
    "root": "root",
    "rootless": "rootless with subordinate ids",
    "rootless-one-id": "rootless without",
}

NOBODY = 65534
PROBE_SECONDS = 120

REPORT_IT = "this is no refusal of the kernel's but a failure of sandboxd or its installation: please report it"
ASK_AS_USER = "run `sandboxd doctor` as that user"


@dataclass(frozen=True)
class Finding:
    """One wall in one mode: *detail* is the evidence, *fix* what mends it (empty when in force)."""

    state: State
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class Wall:
    """One wall: what it stops, and how it stands in each mode."""

    name: str
    stops: str
    modes: dict[Mode, Finding]


@dataclass(frozen=True)
class Proof:
    """A program run in a cell of the default policy: *isolation* is the receipt, *problem* says why there is none."""

    ok: bool
    isolation: dict[str, Any] | None
    problem: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that ``doctor`` found. *mode* is that of this process; *proof* is None until ``prove`` ran."""

    mode: Mode
    walls: list[Wall]
    facts: list[host_facts.Fact]
    proof: Proof | None = None

    @property
    def ok(self) -> bool:
        """Whether the default policy can be enforced in full, here and as this user."""
        return all(wall.modes[self.mode].state == "in force" for wall in self.walls) and (
            self.proof is None or self.proof.ok
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {
            "ok": self.ok,
            "mode": self.mode,
            "walls": [asdict(wall) for wall in self.walls],
            "host": [asdict(fact) for fact in self.facts],
            "proof": None if self.proof is None else asdict(self.proof),
        }


def current_mode(uid: int, ranges: list[Any], helpers: list[Any], capable: bool = False) -> Mode:
    """In which of MODES a process of *uid* is, with the subordinate id *ranges* and mapping *helpers* that it has, or
    *capable* of mapping without them.
    """
    if uid == 0:
        return "root"
    return "rootless" if ranges and (capable or all(helpers)) else "rootless-one-id"


def survey() -> Report:
    """Probe this host. Takes about a second; leaves nothing behind. Raises OSError when no probe can be started."""
    uid = os.geteuid()
    own = _probe([])
    ordinary = _probe(["--as", str(NOBODY)]) if uid == 0 else None
    subordinate = _granted(own)
    usable = [path if not problem else None for path, problem in zip(*_helpers(subordinate), strict=True)]
    mode = current_mode(uid, subordinate["ranges"], usable, subordinate.get("capable", False))
    return Report(mode, walls(mode, own, ordinary), host_facts.facts())


def _probe(arguments: list[str]) -> Answers:
    command = [sys.executable, "-P", "-m", "sandboxd.diagnostics.probe", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise OSError(errnos.ETIMEDOUT, f"the probe did not end within {PROBE_SECONDS} s") from None
    try:
        return dict(json.loads(done.stdout))
    except ValueError:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise OSError(errnos.EIO, f"the probe ended with status {done.returncode}: {last[0]}") from None


def prove() -> Proof:
    """Run one program in a cell of the default policy, with an engine of its own, and keep the receipt."""
    from sandboxd.errors import SandboxError

    try:
        from sandboxd.client.sandbox import Sandbox

        with Sandbox(policy="default") as sandbox:
            result = sandbox.run("print(1)")
    except (SandboxError, OSError, ImportError) as error:
        return Proof(ok=False, isolation=None, problem=str(error))
    isolation = None if result.isolation is None else result.isolation.model_dump()
    if result.status != "ok" or result.stdout != "1\n" or isolation is None:
        return Proof(ok=False, isolation=isolation, problem=f"the program ended with status {result.status!r}")
    return Proof(ok=True, isolation=isolation)


# From answers to walls. Pure.


def walls(mode: Mode, own: Mapping[str, dict[str, Any]], ordinary: Mapping[str, dict[str, Any]] | None) -> list[Wall]:
    """The walls that the answers of ``probe`` show: *own* in our *mode*, *ordinary* as a user without rights.

    *ordinary* is None when we are such a user ourselves. Modes that could not be asked are "unknown".
    """
    user = own if ordinary is None else ordinary
    as_root = own if mode == "root" else None
    switches = own["switches"]["detail"] if own["switches"]["errno"] == 0 else []

    def explained(finding: Finding) -> Finding:
        """With the host's settings that are behind a refusal."""
        if finding.state != "missing" or finding.fix == REPORT_IT or not switches:
            return finding
        why = ", ".join(one[0] for one in switches)
        return Finding("missing", f"{finding.detail}; {why}", "; ".join(one[1] for one in switches))

    def everywhere(
        name: str, stops: str, probe: str, detail: Callable[[Any], str], fix: Callable[[int | None], str]
    ) -> Wall:
        finding = _finding(own[probe], detail, fix)
        return Wall(name, stops, dict.fromkeys(MODES, finding))

    def by_user(
        name: str, stops: str, probe: str, detail: Callable[[Any], str], fix: Callable[[int | None], str]
    ) -> Wall:
        rootless = explained(_finding(user[probe], detail, fix))
        unasked = Finding("unknown", "only root can tell", "run `sandboxd doctor` as root")
        root = unasked if as_root is None else _finding(as_root[probe], detail, fix)
        return Wall(name, stops, {"root": root, "rootless": rootless, "rootless-one-id": rootless})

    return [
        Wall("engine", "nothing by itself: who may run an engine in this version", _engine()),
        everywhere(
            "extension", "nothing by itself: the compiled code that raises the walls", "native", _loaded, _fix_native
        ),
        by_user(
            "namespaces",
            "seeing and reaching processes, mounts, hosts and names of others",
            "namespaces",
            _listed,
            _fix_userns,
        ),
        Wall("own-uid", "touching what belongs to anybody else, other cells included", _own_uid(mode, own)),
        by_user("rootfs", "reading or writing the host's files", "rootfs", _mounted, _fix_mounts),
        by_user("proc", "looking at other processes and at the machine", "proc", _proc_mounted, _fix_proc),
        Wall("network", "talking to anybody", _network(mode, own)),
        Wall("cgroup", "taking more memory, processes and CPU time than allowed", _cgroup(mode, own)),
        everywhere("process-calls", "races between processes and their names", "process_calls", _listed, _fix_kernel),
        everywhere("privileges", "gaining or keeping rights", "privileges", _dropped, _fix_kernel),
        everywhere("landlock", "reaching files that another wall let through", "landlock", _abi, _fix_landlock),
        everywhere("seccomp", "reaching rarely used parts of the kernel", "seccomp", _actions, _fix_seccomp),
        everywhere(
            "libseccomp", "nothing by itself: compiles the seccomp filter", "libseccomp", _loaded, _fix_libseccomp
        ),
    ]


def _words(answer: Mapping[str, Any]) -> str:
    number = answer["errno"]
    if number is None:
        return f"{answer['step']}: {answer['detail']}" if answer["detail"] else str(answer["step"])
    return f"{answer['step']}: {errnos.errorcode.get(number, number)} ({os.strerror(number)})"


def _finding(answer: Mapping[str, Any], detail: Callable[[Any], str], fix: Callable[[int | None], str]) -> Finding:
    if answer["errno"] == 0:
        return Finding("in force", detail(answer["detail"]))
    if answer["errno"] is None and fix in (_fix_native, _fix_libseccomp):  # an ImportError
        return Finding("missing", _words(answer), fix(None))
    return _refusal(answer, fix(answer["errno"]))


def _refusal(answer: Mapping[str, Any], fix: str) -> Finding:
    """A probe that did not get through; without an errno it was no refusal of the kernel's, and *fix* would mislead."""
    return Finding("missing", _words(answer), REPORT_IT if answer["errno"] is None else fix)


def _granted(own: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The subordinate id "ranges" of this user and the mapping "helpers"; empty when they could not be asked."""
    asked = own["subordinate_ids"]
    return dict(asked["detail"]) if asked["errno"] == 0 else {"ranges": [], "helpers": []}


def _helpers(granted: Mapping[str, Any]) -> tuple[list[str | None], list[str]]:
    """newuidmap and newgidmap, and what is wrong with each."""
    paths: list[str | None] = list(granted["helpers"]) or [None, None]
    return paths, list(granted.get("problems") or ("" if path else "is not installed" for path in paths))


def _engine() -> dict[Mode, Finding]:
    problems = host_facts.platform_problems(
        os.uname().machine, os.uname().release, sys.version_info[:2], wide=sys.maxsize > 1 << 32
    )
    if problems:
        return dict.fromkeys(MODES, Finding("missing", "; ".join(problems), "use a supported host"))
    return {
        "root": Finding("in force", "root may"),
        "rootless": Finding("in force", "any user may, with ids of its own for cells"),
        "rootless-one-id": Finding("in force", "any user may, under policies that do not require own_uid"),
    }


def _own_uid(mode: Mode, own: Mapping[str, dict[str, Any]]) -> dict[Mode, Finding]:
    asked = own["own_ids"]
    if mode != "root":
        root = Finding("unknown", "only root can tell", "run `sandboxd doctor` as root")
    elif asked["errno"] != 0:
        root = _refusal(asked, "give this process CAP_SETUID and CAP_SETGID, or run it as root of the host")
    elif "unavailable" in asked["detail"]:
        root = Finding("missing", asked["detail"]["text"], asked["detail"]["unavailable"]["fix"])
    else:
        detail = asked["detail"]
        root = Finding(
            "in force", f"host ids {detail['base']} to {detail['base'] + detail['count'] - 1} were mapped and used"
        )
    granted = _granted(own)
    capable = granted.get("capable", False)
    helpers, problems = _helpers(granted)
    wrong = [
        f"{name} {problem}"
        for name, path, problem in zip(("newuidmap", "newgidmap"), helpers, problems, strict=True)
        if problem or not path
    ]
    if wrong and not capable:
        rootless = Finding(
            "missing", "; ".join(wrong), "install the package uidmap (shadow-utils), whole: its programs are setuid"
        )
    elif mode != "root" and granted.get("no_new_privs") and not capable:
        rootless = Finding(
            "missing",
            "this process is under no_new_privs, so newuidmap has no rights",
            "run it outside of what set that, or give it the ambient capabilities CAP_SETUID and CAP_SETGID",
        )
    elif mode == "root":
        rootless = Finding("unknown", "depends on the user's entries in /etc/subuid and /etc/subgid", ASK_AS_USER)
    elif not granted["ranges"]:
        rootless = Finding(
            "missing",
            "/etc/subuid and /etc/subgid grant this user nothing",
            "usermod --add-subuids 1000000-1065535 --add-subgids 1000000-1065535 USER",
        )
    else:
        base, count = granted["ranges"][0]
        rootless = Finding("in force", f"{count} ids from {base} on are granted")
        if asked["errno"] != 0:
            rootless = _refusal(asked, "see what refuses it: an AppArmor profile, a container's seccomp profile")
        elif "unavailable" in asked["detail"]:
            rootless = Finding("missing", asked["detail"]["text"], asked["detail"]["unavailable"]["fix"])
    one = Finding(
        "missing", "one id can be mapped, so all cells would share it", "grant subordinate ids, or run as root"
    )
    return {"root": root, "rootless": rootless, "rootless-one-id": one}


def _network(mode: Mode, own: Mapping[str, dict[str, Any]]) -> dict[Mode, Finding]:
    asked = own["network"]
    if asked["errno"] != 0:
        here = _refusal(asked, _fix_userns(asked["errno"]))
    elif asked["detail"]:
        here = Finding(
            "missing", f"a fresh namespace holds {', '.join(asked['detail'])}", "find out who configures new namespaces"
        )
    else:
        here = Finding("in force", "a fresh namespace holds lo, down, no address and no route (IPv4 and IPv6)")
    return _mine_only(mode, here)


def _cgroup(mode: Mode, own: Mapping[str, dict[str, Any]]) -> dict[Mode, Finding]:
    asked = own["cgroups"]
    detail = asked["detail"]
    if asked["errno"] != 0:
        here = _refusal(asked, "run it as root, or as a user in a delegated cgroup: docs/cgroups.md")
    elif "unavailable" in detail:
        here = Finding("missing", detail["text"], detail["unavailable"]["fix"])
    else:
        lacks = f"; lacks {', '.join(detail['missing'])}" if detail["missing"] else ""
        home = f", {detail['where']}" if detail["version"] == "v2" and "where" in detail else ""
        here = Finding("in force", f"{detail['version']}: {', '.join(detail['controllers'])}{home}{lacks}")
    found = _mine_only(mode, here)
    users = detail.get("users") if asked["errno"] == 0 else None
    if mode == "root" and users and users["lacking"]:
        text = f"the service managers of users here cannot hand on {', '.join(users['lacking'])}"
        found.update(dict.fromkeys(("rootless", "rootless-one-id"), Finding("missing", text, users["fix"])))
    return found


def _mine_only(mode: Mode, here: Finding) -> dict[Mode, Finding]:
    """*here* for the mode that was asked (both rootless ones are one user), "unknown" for the others."""
    if mode == "root":
        unknown = Finding("unknown", "depends on the user", ASK_AS_USER)
        return {"root": here, "rootless": unknown, "rootless-one-id": unknown}
    unknown = Finding("unknown", "only root can tell", "run `sandboxd doctor` as root")
    return {"root": unknown, "rootless": here, "rootless-one-id": here}


def _listed(detail: Any) -> str:
    return ", ".join(detail)


def _loaded(_: Any) -> str:
    return "loads"


def _mounted(_: Any) -> str:
    return "tmpfs, read-only bind and pivot_root work; writing was tried and refused"


def _proc_mounted(_: Any) -> str:
    return "mounts with subset=pid,hidepid=invisible"


def _dropped(_: Any) -> str:
    return "no_new_privs is on, every capability set is empty"


def _abi(detail: Any) -> str:
    return f"ABI {detail}"


def _actions(detail: Any) -> str:
    return f"a filter was loaded and refused; actions {', '.join(detail)}"


def _fix_native(_: int | None) -> str:
    return "install sandboxd with a C compiler at hand: pip install --force-reinstall --no-binary sandboxd sandboxd"


def _fix_libseccomp(_: int | None) -> str:
    return "install libseccomp (Debian: apt install libseccomp2; Fedora: dnf install libseccomp)"


def _fix_userns(number: int | None) -> str:
    if number in (errnos.ENOSPC, errnos.EUSERS):
        return "raise the limits in /proc/sys/user, such as: sysctl user.max_user_namespaces=10000"
    return (
        "allow user namespaces: kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0 or "
        "an AppArmor profile, and in a container a seccomp profile that lets unshare through"
    )


def _fix_mounts(number: int | None) -> str:
    if number == errnos.ENOSYS:
        return _fix_kernel(number)
    return "let this process mount: " + _fix_userns(number)


def _fix_proc(number: int | None) -> str:
    if number == errnos.EPERM:
        return (
            "a container that covers parts of /proc forbids a fresh one: start it with /proc unmasked "
            "(docker run --security-opt systempaths=unconfined)"
        )
    return _fix_mounts(number)


def _fix_kernel(number: int | None) -> str:
    if number in (errnos.EPERM, errnos.EACCES):
        return "a seccomp profile around this process refuses the call: start the container with one that allows it"
    return "use Linux 6.1 or later; in a container, a runtime whose seccomp profile knows the call"


def _fix_landlock(number: int | None) -> str:
    if number == errnos.EOPNOTSUPP:
        return "boot with landlock among the security modules: lsm=landlock,..."
    return "use a kernel with CONFIG_SECURITY_LANDLOCK; in a container, a seccomp profile that lets landlock_* through"


def _fix_seccomp(number: int | None) -> str:
    return (
        "use a kernel with CONFIG_SECCOMP_FILTER" if number in (errnos.EINVAL, errnos.ENOSYS) else _fix_kernel(number)
    )
