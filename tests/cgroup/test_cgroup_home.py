"""Where an engine may live on v2, over faked trees, and what is said to systemd, with a thread in its place."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd.cgroup import Hierarchy, home, refusal, systemd
from sandboxd.cgroup.dbus import Message, Reader, Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CONTROLLERS = ("memory", "pids", "cpu")
USER = 1000
MANAGER = f"user.slice/user-{USER}.slice/user@{USER}.service"


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


def hierarchy(mount: Path, own: str, controllers: tuple[str, ...] = CONTROLLERS) -> Hierarchy:
    (mount / own).mkdir(parents=True, exist_ok=True)
    return Hierarchy(2, str(mount), controllers, str(mount / own).rstrip("/"))


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of directories that bear the system manager's mark."""
    names: set[str] = set()
    monkeypatch.setattr(home, "_is_marked", lambda path: os.path.basename(path) in names)
    return names


def as_host(monkeypatch: pytest.MonkeyPatch, *, managed: bool, uid: int = 0, delegated: tuple[str, ...] = ()) -> None:
    monkeypatch.setattr(systemd, "is_manager", lambda: managed)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(systemd, "unit_is_delegated", lambda unit: unit in delegated)


def roots(found: Hierarchy) -> list[str]:
    return [os.path.relpath(path, found.mount_point) for path in home.v2_roots(found)]


@pytest.mark.parametrize(
    ("own", "marks", "expected"),
    [
        ("system.slice/a.service", [], []),
        ("system.slice/a.service", ["a.service"], ["system.slice/a.service"]),
        ("system.slice/a.service/main", ["a.service"], ["system.slice/a.service"]),
        ("system.slice/a.service/main", [], []),
        (
            "system.slice/a.service/sandboxd.7.8/engine",  # of another engine, whose child this process is
            ["a.service"],
            ["system.slice/a.service"],
        ),
        ("user.slice/user-0.slice/user@0.service/app.slice/a.service", ["user@0.service"], []),
        (".", [], []),
    ],
)
def test_roots_engine_takes_only_what_systemd_delegated(
    mount: Path, marked: set[str], monkeypatch: pytest.MonkeyPatch, own: str, marks: list[str], expected: list[str]
) -> None:
    marked.update(marks)
    as_host(monkeypatch, managed=True)
    assert roots(hierarchy(mount, own)) == expected


def test_roots_engine_takes_nothing_that_somebody_else_owns(
    mount: Path, marked: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An owner may set the mark, and move processes about in it."""
    marked.add("a.service")
    as_host(monkeypatch, managed=True)
    found = hierarchy(mount, "system.slice/a.service")
    os.chown(mount / "system.slice/a.service", 64001, 64001)
    assert roots(found) == []


def test_root_of_a_host_with_systemd_is_not_taken_though_its_runtime_directory_is_hidden(
    mount: Path, marked: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not marked
    as_host(monkeypatch, managed=False)
    (mount / "init.scope").mkdir(parents=True)
    assert roots(hierarchy(mount, "system.slice/docker-1.scope")) == []


@pytest.mark.parametrize(
    ("own", "expected"),
    [(".", ["."]), ("job", ["job", "."]), ("sandboxd.7.8/engine", ["."])],
)
def test_without_systemd_root_takes_its_own_or_what_it_sees(
    mount: Path, marked: set[str], monkeypatch: pytest.MonkeyPatch, own: str, expected: list[str]
) -> None:
    assert not marked
    as_host(monkeypatch, managed=False)
    assert roots(hierarchy(mount, own)) == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="gives directories to another uid, which needs root")
@pytest.mark.parametrize(
    ("own", "delegated", "expected"),
    [
        ("app.slice/a.service", (), []),
        ("app.slice/a.service", ("a.service",), ["app.slice/a.service"]),
        ("app.slice/a.service/main", ("a.service",), ["app.slice/a.service/main", "app.slice/a.service"]),
        ("app.slice/sandboxd-7-8.scope", (), ["app.slice/sandboxd-7-8.scope"]),
        ("app.slice/sandboxd-7-8.scope/sandboxd.7.8/engine", (), ["app.slice/sandboxd-7-8.scope"]),
        ("init.scope", (), []),
    ],
)
def test_user_never_takes_what_is_the_users_managers(
    mount: Path,
    marked: set[str],
    monkeypatch: pytest.MonkeyPatch,
    own: str,
    delegated: tuple[str, ...],
    expected: list[str],
) -> None:
    found = hierarchy(mount, f"{MANAGER}/{own}")
    for directory, _, _ in os.walk(mount / MANAGER):
        os.chown(directory, USER, USER)
    marked.add(os.path.basename(MANAGER))
    as_host(monkeypatch, managed=True, uid=USER, delegated=delegated)
    assert roots(found) == [f"{MANAGER}/{path}" for path in expected]


@pytest.mark.skipif(os.geteuid() != 0, reason="gives directories to another uid, which needs root")
@pytest.mark.parametrize("below", ["", "/main", "/sandboxd.7.8/engine"])
def test_system_service_of_a_user_takes_what_it_was_given(
    mount: Path, marked: set[str], monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    assert not marked  # a version of systemd that marks what only root can read
    unit = "system.slice/sandboxd.service"
    found = hierarchy(mount, f"{unit}{below}")
    for directory, _, _ in os.walk(mount / unit):
        os.chown(directory, USER, USER)
    as_host(monkeypatch, managed=True, uid=USER)
    assert roots(found) == ([f"{unit}/main", unit] if below == "/main" else [unit])


def test_read_only_mount_is_not_asked_for(mount: Path) -> None:
    with pytest.raises(systemd.Refused, match="read-only"):
        home.ask_systemd(Hierarchy(2, str(mount), CONTROLLERS, str(mount), read_only=True))


# What is said to people


@pytest.mark.parametrize(
    ("managed", "uid", "number", "asked", "words"),
    [
        (True, 0, errno.EACCES, "no answer", "Delegate=yes and DelegateSubgroup=main"),
        (True, USER, errno.EACCES, "no such file", f"loginctl enable-linger {USER}"),
        (True, USER, errno.ENOENT, "", "Delegate=cpu cpuset io memory pids"),
        (True, 0, errno.EROFS, "", "writable cgroup mount"),
        (False, 0, errno.EBUSY, "", "mkdir /cg/own/init"),
        (False, 0, errno.EACCES, "", "--cgroupns=private"),
        (False, USER, errno.EACCES, "", "belongs to this user"),
        (False, 0, errno.ENOENT, "", "+memory +pids +cpu"),
        (False, 0, errno.ENOSPC, "", "cgroup.max.descendants"),
        (False, 0, errno.EMFILE, "", "ulimit"),
    ],
)
def test_every_refusal_names_what_mends_it(
    monkeypatch: pytest.MonkeyPatch, managed: bool, uid: int, number: int, asked: str, words: str
) -> None:
    as_host(monkeypatch, managed=managed, uid=uid)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nonexistent")
    place = Hierarchy(2, "/cg", CONTROLLERS, "/cg/own")
    found = refusal.unavailable(OSError(number, os.strerror(number), "/cg/own"), place, asked)
    assert words in found.fix
    assert asked in str(found)


# D-Bus


def message(kind: int, fields: list[tuple[int, str, str | int]], body: Writer) -> bytes:
    head = Writer()
    head.data += bytes([ord("l"), kind, 0, 1])
    head.number(len(body.data))
    head.number(99)
    at = head.array(8)
    for code, signature, value in fields:
        head.align(8)
        head.data.append(code)
        if isinstance(value, int):
            head.signature(signature)
            head.number(value)
        else:
            head.variant(signature, value)
    head.end(at, 8)
    head.align(8)
    return bytes(head.data + body.data)


def strings(*values: str, number: int | None = None) -> Writer:
    body = Writer()
    if number is not None:
        body.number(number)
    for value in values:
        body.string(value)
    return body


JOB = "/org/freedesktop/systemd1/job/7"


def returned(serial: int) -> bytes:
    return message(2, [(5, "u", serial), (8, "g", "o")], strings(JOB))


def refused(serial: int, words: str) -> bytes:
    return message(3, [(4, "s", "org.freedesktop.DBus.Error.X"), (5, "u", serial), (8, "g", "s")], strings(words))


def removed(job: str, result: str) -> bytes:
    return message(4, [(3, "s", "JobRemoved"), (8, "g", "uoss")], strings(job, "a.scope", result, number=7))


class Manager:
    """One connection's worth of systemd: *answer* turns the number of a call into bytes; None hangs up."""

    def __init__(self, path: Path, answer: Callable[[int], bytes | None]) -> None:
        self.calls: list[bytes] = []
        self._answer = answer
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(os.fspath(path))
        self._listening.listen(1)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listening.accept()
        with connection, connection.makefile("rb") as stream:
            assert stream.readline().startswith(b"\0AUTH EXTERNAL ")
            connection.sendall(b"OK 0123456789abcdef\r\n")
            assert stream.readline() == b"BEGIN\r\n"
            while head := stream.read(16):
                body, _serial, fields = struct.unpack_from("<III", head, 4)
                self.calls.append(head + stream.read(fields + -fields % 8 + body))
                answer = self._answer(len(self.calls))
                if answer is None:
                    return
                connection.sendall(answer)

    def close(self) -> None:
        self._listening.close()
        self._thread.join(10)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Callable[[Callable[[int], bytes | None]], tuple[Path, Manager]]]:
    started: list[Manager] = []

    def start(answer: Callable[[int], bytes | None]) -> tuple[Path, Manager]:
        path = tmp_path / "private"
        started.append(Manager(path, answer))
        return path, started[-1]

    yield start
    for one in started:
        one.close()


Start = Any


def test_scope_is_asked_for_and_its_job_awaited(manager: Start) -> None:
    path, served = manager(
        lambda serial: (
            removed("/other", "failed") + returned(serial) + removed("/other", "failed") + removed(JOB, "done")
        )
    )
    systemd.start_scope("sandboxd-1-2.scope", "Sandbox engine 1", path)
    (call,) = served.calls
    body = Message(call).body
    assert (body.string(), body.string()) == ("sandboxd-1-2.scope", "fail")
    for words in (b"Delegate", b"TasksMax", b"OOMPolicy", b"CollectMode", b"inactive-or-failed", b"PIDs"):
        assert words in call


def test_scope_is_asked_for_without_a_property_that_this_systemd_has_not(manager: Start) -> None:
    path, served = manager(
        lambda serial: (
            refused(serial, "Cannot set property OOMPolicy, or unknown property.")
            if serial == 1
            else returned(serial) + removed(JOB, "done")
        )
    )
    systemd.start_scope("sandboxd-1-2.scope", "", path)
    assert [b"OOMPolicy" in call for call in served.calls] == [True, False]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda serial: refused(serial, "Interactive authentication required."), "Interactive authentication"),
        (lambda serial: returned(serial) + removed(JOB, "failed"), "ended as 'failed'"),
        (lambda _: None, "closed"),
        (lambda serial: returned(serial), "no answer within"),
        (lambda _: b"l\2\0\1" + b"\xff" * 12, "no D-Bus message"),
        (lambda _: b"B" * 16, "no D-Bus message"),
        (lambda serial: message(2, [(5, "u", serial)], Writer()), "no D-Bus message"),
    ],
    ids=["refused", "failed", "hung-up", "silent", "endless", "big-endian", "without-a-job"],
)
def test_manager_that_gives_no_scope_is_told(
    manager: Start, monkeypatch: pytest.MonkeyPatch, answer: Callable[[int], bytes | None], words: str
) -> None:
    monkeypatch.setattr(systemd, "_SECONDS", 0.5)
    path, _ = manager(answer)
    with pytest.raises(systemd.Refused, match=words):
        systemd.start_scope("sandboxd-1-2.scope", "", path)


def test_no_manager_is_told(tmp_path: Path) -> None:
    with pytest.raises(systemd.Refused, match="No such file"):
        systemd.start_scope("sandboxd-1-2.scope", "", tmp_path / "absent")


@pytest.mark.parametrize("delegated", [True, False])
def test_unit_is_asked_whether_it_was_delegated(manager: Start, delegated: bool) -> None:
    answer = Writer()
    answer.variant("b", delegated)
    path, served = manager(lambda serial: message(2, [(5, "u", serial), (8, "g", "v")], answer))
    assert systemd.unit_is_delegated("my-app@1.service", path) is delegated
    (call,) = served.calls
    assert b"/org/freedesktop/systemd1/unit/my_2dapp_401_2eservice\0" in call
    assert b"org.freedesktop.systemd1.Service\0" in call


def test_strings_that_do_not_end_are_refused() -> None:
    with pytest.raises(ValueError, match="end"):
        Reader(struct.pack("<I", 2) + b"abc").string()
    with pytest.raises(IndexError):
        Reader(struct.pack("<I", 200) + b"abc").string()
