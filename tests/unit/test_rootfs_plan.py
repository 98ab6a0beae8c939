"""The plan of image "host": computed from fabricated hosts, without mounting anything."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from datetime import datetime, timedelta
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import pytest

from sandboxd.errors import PolicyError, Unavailable
from sandboxd.ids.ranges import SlotIds
from sandboxd.rootfs import etc
from sandboxd.rootfs import plan as rootfs
from sandboxd.rootfs.hosttree import HostTree
from sandboxd.rootfs.interpreter import Interpreter
from sandboxd.rootfs.plan import DEVICES, Kind, Op, encode, plan_host
from tests.support.rootfs import iterate

if TYPE_CHECKING:
    from collections.abc import Sequence

SLOTS = SlotIds(0x78000000, 4)
SETUP = Path(__file__).resolve().parents[2] / "scripts" / "setup.sh"


class Host:
    """A small host below a directory, with a merged /usr and Python 3.11 in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(mode=0o755)
        self.python("/usr")
        for name in ("bin", "sbin", "lib", "lib64"):
            self.directory(f"/usr/{name}")
            self.link(f"/{name}", f"usr/{name}")
        self.file("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/home/user:/bin/sh\n")
        self.file("/etc/shadow", "root:$6$secret\n", 0o600)
        self.file("/etc/machine-id", "0123456789abcdef0123456789abcdef\n")
        self.file("/etc/hosts", "192.0.2.7 intranet.example\n")
        self.file("/etc/resolv.conf", "nameserver 192.0.2.1\n")
        for device in DEVICES:
            self.file(f"/dev/{device}", "")

    def path(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def directory(self, path: str, mode: int = 0o755) -> None:
        place = self.path(path)
        for parent in (*reversed(place.relative_to(self.root).parents[:-1]), place.relative_to(self.root)):
            (self.root / parent).mkdir(exist_ok=True)
            (self.root / parent).chmod(0o755)
        place.chmod(mode)

    def file(self, path: str, content: str | bytes, mode: int = 0o644) -> None:
        self.directory(os.path.dirname(path))
        self.path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
        self.path(path).chmod(mode)

    def link(self, path: str, text: str) -> None:
        self.directory(os.path.dirname(path))
        self.path(path).symlink_to(text)

    def python(self, prefix: str) -> None:
        """An installed Python at *prefix*."""
        self.file(f"{prefix}/bin/python3.11", "ELF", 0o755)
        self.file(f"{prefix}/lib/python3.11/os.py", "")

    def venv(self, prefix: str, base: str) -> None:
        """A virtual environment at *prefix* made from the Python at *base*."""
        self.directory(f"{prefix}/lib/python3.11/site-packages")
        self.link(f"{prefix}/bin/python", f"{base}/bin/python3.11")

    def plan(self, python: Interpreter, extra: Sequence[tuple[str, str]] = ()) -> list[Op]:
        return plan_host(python, extra, slots=SLOTS, host=self.root)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "host")


def interpreter(prefix: str = "/usr", base: str | None = None, **changes: Any) -> Interpreter:
    base = base or prefix
    facts: dict[str, Any] = {
        "executable": f"{prefix}/bin/{'python3.11' if base == prefix else 'python'}",
        "prefix": prefix,
        "base_prefix": base,
        "exec_prefix": prefix,
        "base_exec_prefix": base,
        "version": (3, 11, 2),
        "implementation": "cpython",
        "stdlib": f"{base}/lib/python3.11",
    }
    return Interpreter(**(facts | changes))


def binds(plan: list[Op]) -> list[str]:
    """Targets of the directory binds, without the devices."""
    return [op.target for op in plan if op.kind is Kind.BIND and not op.target.startswith("dev/")]


def node(plan: list[Op], target: str) -> Op:
    """The one operation that makes the file, symlink or directory *target*."""
    (found,) = [op for op in plan if op.target == target and op.kind in (Kind.DIR, Kind.FILE, Kind.SYMLINK)]
    return found


def has(plan: list[Op], target: str) -> bool:
    return any(op.target == target for op in plan)


def resolve(plan: list[Op], path: str) -> str:
    """Where *path* leads in the image, by the plan's own symlinks, as the kernel would go; stops in a bound tree."""
    nodes = {op.target: op for op in plan if op.kind is not Kind.BIND}
    bound = binds(plan)
    todo, here = path.strip("/").split("/"), ""
    for _ in range(200):
        if not todo:
            return f"/{here}"
        name = todo.pop(0)
        if name == "..":
            here = here.rpartition("/")[0]
            continue
        target = f"{here}/{name}".strip("/")
        if any(target == root or target.startswith(f"{root}/") for root in bound):
            return "/" + "/".join([target, *todo])
        op = nodes[target]
        if op.kind is Kind.SYMLINK:
            if op.source.startswith("/"):
                here = ""
            todo = [part for part in op.source.split("/") if part] + todo
        else:
            here = target
    raise AssertionError(f"symlink loop at {path}")


def assert_well_formed(plan: list[Op]) -> None:
    """Parents before children, one node a place, mounts after all nodes and on nodes, nothing written below a bind."""
    nodes: dict[str, Op] = {}
    mounted: list[str] = []
    for op in plan:
        if op.kind in (Kind.BIND, Kind.PROC, Kind.TMPFS):
            assert op.target in nodes
            assert not any(op.target.startswith(f"{place}/") for place in mounted)
            mounted.append(op.target)
            continue
        assert not mounted
        assert op.target not in nodes
        parent = op.target.rpartition("/")[0]
        assert not parent or nodes[parent].kind is Kind.DIR
        nodes[op.target] = op
    for op in plan:
        assert op.kind is Kind.BIND or not any(op.target.startswith(f"{place}/") for place in mounted)


# Trees


def test_system_python_needs_one_tree(host: Host) -> None:
    plan = host.plan(interpreter())
    assert_well_formed(plan)
    assert binds(plan) == ["usr"]
    (usr,) = [op for op in plan if op.target == "usr" and op.kind is Kind.BIND]
    assert usr.source == f"{host.root}/usr"
    assert usr.flags == rootfs.RDONLY | rootfs.NOSUID | rootfs.NODEV


def test_merged_usr_symlinks_are_copied(host: Host) -> None:
    plan = host.plan(interpreter())
    assert [node(plan, name).source for name in ("bin", "sbin", "lib", "lib64")] == [
        "usr/bin",
        "usr/sbin",
        "usr/lib",
        "usr/lib64",
    ]
    assert not has(plan, "lib32")


def test_real_directories_beside_usr_are_bound(host: Host) -> None:
    host.path("/lib").unlink()
    host.file("/lib/ld-musl-x86_64.so.1", "ELF", 0o755)
    plan = host.plan(interpreter())
    assert_well_formed(plan)
    assert binds(plan) == ["lib", "usr"]


def test_bin_that_leads_out_of_usr_is_left_out(host: Host) -> None:
    host.path("/bin").unlink()
    host.file("/srv/bin/sh", "")
    host.link("/bin", "srv/bin")
    assert not has(host.plan(interpreter()), "bin")


@pytest.mark.parametrize("prefix", ["/usr/local", "/usr/lib/envs/one"])
def test_prefix_inside_usr_needs_no_mount_of_its_own(host: Host, prefix: str) -> None:
    host.python(prefix)
    assert binds(host.plan(interpreter(prefix))) == ["usr"]


def test_environment_and_its_base_are_bound_at_their_own_paths(host: Host) -> None:
    host.python("/root/pythons/3.11")
    host.path("/root").chmod(0o700)
    host.venv("/home/user/project/.venv", "/root/pythons/3.11")
    plan = host.plan(interpreter("/home/user/project/.venv", "/root/pythons/3.11"))
    assert_well_formed(plan)
    assert binds(plan) == ["home/user/project/.venv", "root/pythons/3.11", "usr"]
    for parent in ("home", "home/user", "home/user/project", "root", "root/pythons"):
        assert node(plan, parent) == Op(Kind.DIR, parent, mode=0o755)


def test_environment_inside_its_base_is_bound_once(host: Host) -> None:
    host.python("/opt/conda")
    host.venv("/opt/conda/envs/data", "/opt/conda")
    assert binds(host.plan(interpreter("/opt/conda/envs/data", "/opt/conda"))) == ["opt/conda", "usr"]


def test_neighbour_whose_name_begins_alike_is_no_part_of_a_tree(host: Host) -> None:
    host.python("/opt/py")
    host.venv("/opt/py-env", "/opt/py")
    plan = host.plan(interpreter("/opt/py-env", "/opt/py"))
    assert binds(plan) == ["opt/py", "opt/py-env", "usr"]


def test_tree_inside_another_is_found_whatever_sorts_between(host: Host) -> None:
    host.python("/opt/py")
    host.venv("/opt/py-env", "/opt/py")
    host.directory("/opt/py/exec")
    plan = host.plan(interpreter("/opt/py-env", "/opt/py", exec_prefix="/opt/py/exec"))
    assert binds(plan) == ["opt/py", "opt/py-env", "usr"]


def test_standard_library_outside_of_the_prefixes_is_bound_too(host: Host) -> None:
    host.python("/opt/py")
    host.file("/opt/stdlib/os.py", "")
    assert "opt/stdlib" in binds(host.plan(interpreter("/opt/py", stdlib="/opt/stdlib")))


@pytest.mark.parametrize(
    ("links", "spelled", "real"),
    [
        ([("/home", "data/home")], "/home/user/env", "/data/home/user/env"),
        ([("/data/env", "../opt/env-1.2")], "/data/env", "/opt/env-1.2"),
        ([("/a/one", "/a/two"), ("/a/two", "three")], "/a/one/env", "/a/three/env"),
        ([("/a/up", "/b/c/../d")], "/a/up/env", "/b/d/env"),
        ([("/usr/local/env", "/opt/env")], "/usr/local/env", "/opt/env"),
    ],
    ids=["home-moved", "relative-up", "chain", "dot-dot-through-a-directory", "link-in-a-bound-tree"],
)
def test_both_spellings_of_a_symlinked_prefix_work(
    host: Host, links: list[tuple[str, str]], spelled: str, real: str
) -> None:
    host.python(real)
    host.directory("/b/c")
    for where, text in links:
        host.link(where, text)
    plan = host.plan(interpreter(spelled))
    assert_well_formed(plan)
    assert set(binds(plan)) == {real.lstrip("/"), "usr"}
    assert resolve(plan, real) == real
    if not spelled.startswith("/usr"):
        assert resolve(plan, f"{spelled}/bin/python3.11") == f"{real}/bin/python3.11"


def test_links_between_an_environment_and_its_python_are_kept(host: Host) -> None:
    host.python("/root/pythons/3.11.9")
    host.link("/root/pythons/3.11", "3.11.9")
    host.venv("/home/user/env", "/root/pythons/3.11")
    plan = host.plan(interpreter("/home/user/env", "/root/pythons/3.11.9"))
    assert resolve(plan, "/root/pythons/3.11/bin/python3.11") == "/root/pythons/3.11.9/bin/python3.11"


# Refusals


@pytest.mark.parametrize(
    "prefix",
    [
        "/",
        "/home",
        "/home/user",
        "/root",
        "/etc",
        "/var",
        "/var/lib",
        "/proc",
        "/sys",
        "/dev",
        "/run",
        "/tmp",
        "/opt",
        "/srv",
        "/mnt",
        "/tmp/env",
        "/var/tmp/env",
        "/run/env",
        "/dev/shm/env",
        "/etc/env",
        "/proc/1/root/env",
        "/sys/env",
        "/workspace",
        "/workspace/.venv",
        "/code/env",
        "/sandboxd/env",
    ],
)
def test_dangerous_prefix_is_refused(host: Host, prefix: str) -> None:
    host.python(prefix.rstrip("/"))
    with pytest.raises(Unavailable, match="move the environment") as refusal:
        host.plan(interpreter(prefix, executable="/usr/bin/python3.11"))
    assert (refusal.value.stage, refusal.value.errno) == ("rootfs", None)
    assert prefix in refusal.value.message


@pytest.mark.parametrize(
    "prefix", ["/env", "/app/.venv", "/opt/env", "/home/user/.venv", "/var/lib/app/env", "/data/x"]
)
def test_directory_of_its_own_is_accepted(host: Host, prefix: str) -> None:
    host.python(prefix)
    assert prefix.lstrip("/") in binds(host.plan(interpreter(prefix)))


def test_link_to_a_dangerous_prefix_is_refused(host: Host) -> None:
    host.python("/home/user")
    host.link("/opt/env", "/home/user")
    with pytest.raises(Unavailable, match=r"/opt/env \(/home/user\)"):
        host.plan(interpreter("/opt/env"))


def test_dots_do_not_hide_a_dangerous_prefix(host: Host) -> None:
    host.python("/opt/env")
    host.directory("/home")
    with pytest.raises(Unavailable, match="is one that must not be seen"):
        host.plan(interpreter("/opt/env", exec_prefix="/opt/env/../../home"))


def test_prefix_that_holds_a_home_directory_is_refused(host: Host) -> None:
    host.file("/etc/passwd", "bob:x:1001:1001::/data/people/bob:/bin/sh\n")
    host.python("/data/people")
    with pytest.raises(Unavailable, match="holds /data/people/bob"):
        host.plan(interpreter("/data/people"))


def test_prefix_reached_through_tmp_is_refused(host: Host) -> None:
    host.python("/opt/env")
    host.link("/data/env", "/tmp/hop")
    host.link("/tmp/hop", "/opt/env")
    with pytest.raises(Unavailable, match=r"/tmp/hop"):
        host.plan(interpreter("/data/env"))


@pytest.mark.parametrize("place", rootfs._NEVER_BELOW)
def test_set_up_refuses_what_a_sandbox_would_before_it_installs(tmp_path: Path, place: str) -> None:
    for name in ("dirname", "realpath"):  # and nothing that could install
        (tmp_path / name).symlink_to(which(name) or name)
    for path in (f"{place}/env", f"/usr/..{place}"):
        done = subprocess.run(
            ["/bin/bash", "-c", 'source "$0"; setup_environment data', str(SETUP)],
            env={"PATH": str(tmp_path), "SANDBOXD_VENV": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert "no sandbox can use an environment in /" in done.stderr
        assert "SANDBOXD_VENV=/path" in done.stderr


def test_set_up_accepts_a_directory_of_its_own(tmp_path: Path) -> None:
    command = ["/bin/bash", "-c", 'source "$0"; check_place', str(SETUP)]
    for path in ("/opt/env", "/tmpfiles/env", "/var/lib/env", "/home/user/clone/.venv"):
        subprocess.run(command, env={"PATH": os.environ["PATH"], "SANDBOXD_VENV": path}, check=True)


def test_missing_prefix_is_named(host: Host) -> None:
    with pytest.raises(Unavailable, match="/opt/gone") as refusal:
        host.plan(interpreter("/opt/gone"))
    assert refusal.value.errno == errno.ENOENT


def test_symlink_loop_is_refused(host: Host) -> None:
    host.link("/opt/a", "b")
    host.link("/opt/b", "a")
    with pytest.raises(Unavailable, match="ELOOP"):
        host.plan(interpreter("/opt/a"))


def test_executable_outside_of_the_prefixes_is_refused(host: Host) -> None:
    host.file("/opt/elsewhere/python3.11", "ELF", 0o755)
    host.venv("/opt/env", "/opt/elsewhere/..")
    host.path("/opt/env/bin/python").unlink()
    host.link("/opt/env/bin/python", "/opt/elsewhere/python3.11")
    with pytest.raises(Unavailable, match="outside of the interpreter's own directories"):
        host.plan(interpreter("/opt/env", "/usr"))


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        ("/opt/env", 0o700),
        ("/opt/env/bin", 0o750),
        ("/opt/env/bin/python3.11", 0o750),
        ("/opt/env/lib/python3.11", 0o700),
        ("/opt/env/lib/python3.11/os.py", 0o600),
    ],
)
def test_interpreter_that_is_not_for_everyone_is_refused(host: Host, path: str, mode: int) -> None:
    host.python("/opt/env")
    host.path(path).chmod(mode)
    with pytest.raises(Unavailable, match=r"chmod -R o\+rX /opt/env") as refusal:
        host.plan(interpreter("/opt/env"))
    assert refusal.value.errno is None
    assert path in refusal.value.message


# /etc


def etc_of(plan: list[Op]) -> dict[str, Op]:
    return {op.target.removeprefix("etc/"): op for op in plan if op.target.startswith("etc/")}


def test_etc_holds_no_bind_and_nothing_unlisted(host: Host) -> None:
    for name in ("pip.conf", "ssh/ssh_host_key", "cron.d/job", "fstab", "sudoers", "ssl/private/key.pem", "group"):
        host.file(f"/etc/{name}", "secret-of-the-host")
    found = etc_of(host.plan(interpreter()))
    assert set(found) == {"passwd", "group", "hosts", "hostname", "nsswitch.conf", "resolv.conf", "localtime"}
    for op in found.values():
        assert op.kind is Kind.FILE
        assert not any(word in op.data for word in (b"secret", b"alice", b"192.0.2", b"0123456789abcdef"))


def test_passwd_and_group_name_every_slot(host: Host) -> None:
    plan = host.plan(interpreter())
    passwd = [line.split(":") for line in node(plan, "etc/passwd").data.decode().splitlines()]
    assert [(row[0], row[2]) for row in passwd] == [("root", "0"), ("nobody", "65534")] + [
        ("sandbox", str(uid)) for uid in range(1000, 1004)
    ]
    assert passwd[2] == ["sandbox", "x", "1000", "1000", "sandbox", "/workspace", "/bin/sh"]
    group = [line.split(":") for line in node(plan, "etc/group").data.decode().splitlines()]
    assert [row[2] for row in group] == [row[3] for row in passwd]


def test_names_resolve_from_files_only(host: Host) -> None:
    plan = host.plan(interpreter())
    assert node(plan, "etc/resolv.conf").data == b""
    assert b"127.0.0.1\tlocalhost" in node(plan, "etc/hosts").data
    assert {line.split()[1] for line in node(plan, "etc/nsswitch.conf").data.splitlines()} == {b"files"}


@pytest.mark.parametrize(
    "path",
    [
        "ld.so.cache",
        "ld.so.conf",
        "mime.types",
        "protocols",
        "services",
        "ssl/openssl.cnf",
        "ld.so.conf.d/libc.conf",
        "ssl/certs/ca-certificates.crt",
        "fonts/fonts.conf",
        "fonts/conf.d/10-x.conf",
        "pki/tls/cert.pem",
    ],
)
def test_listed_file_is_copied(host: Host, path: str) -> None:
    host.file(f"/etc/{path}", "content")
    assert node(host.plan(interpreter()), f"etc/{path}") == Op(Kind.FILE, f"etc/{path}", data=b"content", mode=0o644)


def test_other_names_in_ld_so_conf_d_are_left_out(host: Host) -> None:
    host.file("/etc/ld.so.conf.d/libc.conf.bak", "content")
    assert not has(host.plan(interpreter()), "etc/ld.so.conf.d/libc.conf.bak")


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_file_that_not_everyone_reads_is_left_out(host: Host, mode: int) -> None:
    host.file("/etc/ssl/openssl.cnf", "secret", mode)
    assert not has(host.plan(interpreter()), "etc/ssl/openssl.cnf")


def test_file_in_a_directory_that_not_everyone_enters_is_left_out(host: Host) -> None:
    host.file("/etc/ssl/private/key.pem", "secret")
    host.path("/etc/ssl/private").chmod(0o710 & ~0o010)
    host.link("/etc/ssl/cert.pem", "private/key.pem")
    assert not has(host.plan(interpreter()), "etc/ssl/cert.pem")


def test_file_that_is_too_large_is_left_out(host: Host) -> None:
    host.file("/etc/mime.types", "")
    os.truncate(host.path("/etc/mime.types"), etc.MAX_FILE_BYTES + 1)
    assert not has(host.plan(interpreter()), "etc/mime.types")


def test_all_copies_together_are_bounded(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etc, "MAX_TOTAL_BYTES", 250)
    for number in range(10):
        host.file(f"/etc/fonts/{number}.conf", "x" * 100)
    found = etc_of(host.plan(interpreter()))
    assert [name for name in found if name.startswith("fonts/")] == ["fonts/0.conf", "fonts/1.conf"]


def test_special_files_are_left_out_without_being_opened(host: Host) -> None:
    host.directory("/etc/fonts")
    os.mkfifo(host.path("/etc/mime.types"), 0o644)
    os.mkfifo(host.path("/etc/fonts/fifo"), 0o644)
    found = etc_of(host.plan(interpreter()))
    assert {"mime.types", "fonts/fifo"}.isdisjoint(found)


def test_alternatives_keep_links_that_end_in_the_image(host: Host) -> None:
    host.file("/usr/bin/vim.basic", "")
    host.file("/opt/elsewhere/tool", "")
    host.link("/etc/alternatives/vi", "/usr/bin/vim.basic")
    host.link("/etc/alternatives/sh", "/bin/python3.11")
    host.link("/etc/alternatives/tool", "/opt/elsewhere/tool")
    host.link("/etc/alternatives/gone", "/usr/bin/gone")
    host.link("/etc/alternatives/shadow", "../shadow")
    found = etc_of(host.plan(interpreter()))
    assert {name: op.source for name, op in found.items() if name.startswith("alternatives/")} == {
        "alternatives/vi": "/usr/bin/vim.basic",
        "alternatives/sh": "/bin/python3.11",
    }


def test_link_through_a_link_that_is_not_copied_is_left_out(host: Host) -> None:
    host.link("/etc/hidden/vi", "/usr/bin/python3.11")
    host.link("/etc/alternatives/vi", "/etc/hidden/vi")
    assert not has(host.plan(interpreter()), "etc/alternatives/vi")


def test_manual_pages_among_the_alternatives_are_left_out(host: Host) -> None:
    host.file("/usr/share/man/man1/vim.1.gz", "")
    host.link("/etc/alternatives/vi.1.gz", "/usr/share/man/man1/vim.1.gz")
    assert not has(host.plan(interpreter()), "etc/alternatives/vi.1.gz")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("../../usr/bin/vim.basic", True),
        ("/usr/bin", True),
        ("/usr/bin/.", True),
        ("/usr", True),
        ("/usr/lib/../bin/vim.basic", True),
        ("/usr/bin/vim", True),
        ("vim", True),
        ("/usr/bin/round", True),
        ("/usr/bin/out", False),
        ("/usr/bin/loop", False),
        ("/usr/bin/vim.basic/", False),
        ("/usr/bin/vim.basic/x", False),
        ("/usr/bin/gone/../vim.basic", False),
        ("/home/user/bin/vim", False),
        ("/etc/hidden/bin/vim.basic", False),
        ("/etc/hidden", False),
        ("/etc", False),
        ("/", False),
        (".", False),
        ("vi", False),
        ("one", False),
    ],
)
def test_link_of_a_tree_is_kept_when_the_image_has_its_end(host: Host, text: str, kept: bool) -> None:
    host.file("/usr/bin/vim.basic", "")
    host.file("/home/user/bin/vim", "")
    host.link("/usr/bin/vim", "vim.basic")
    host.link("/usr/bin/round", "/etc/alternatives/vim")
    host.link("/usr/bin/out", "/home/user/bin/vim")
    host.link("/usr/bin/loop", "loop")
    host.link("/etc/hidden/bin", "/usr/bin")
    host.link("/etc/alternatives/vim", "/usr/bin/vim.basic")
    host.link("/etc/alternatives/one", "two")
    host.link("/etc/alternatives/two", "one")
    host.link("/etc/alternatives/vi", text)
    plan = host.plan(interpreter())
    assert has(plan, "etc/alternatives/vi") is kept
    assert not has(plan, "etc/alternatives/one")


def test_tree_reached_through_a_symlink_is_left_out(host: Host) -> None:
    host.file("/home/user/certs/own.pem", "own")
    host.link("/etc/ssl", "/home/user")
    assert not [name for name in etc_of(host.plan(interpreter())) if name.startswith("ssl")]


def test_certificate_links_are_kept_when_their_ends_are(host: Host) -> None:
    host.file("/usr/share/ca-certificates/A.crt", "A")
    host.link("/etc/ssl/certs/A.pem", "/usr/share/ca-certificates/A.crt")
    host.link("/etc/ssl/certs/0a.0", "A.pem")
    host.file("/etc/ssl/certs/own.pem", "own", 0o600)
    host.link("/etc/ssl/certs/0b.0", "own.pem")
    plan = host.plan(interpreter())
    assert resolve(plan, "/etc/ssl/certs/0a.0") == "/usr/share/ca-certificates/A.crt"
    assert {"ssl/certs/own.pem", "ssl/certs/0b.0"}.isdisjoint(etc_of(plan))


def test_named_file_behind_a_link_in_etc_is_copied(host: Host) -> None:
    host.file("/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", "bundle")
    host.link("/etc/pki/tls/cert.pem", "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem")
    assert node(host.plan(interpreter()), "etc/pki/tls/cert.pem").data == b"bundle"


def test_named_file_behind_a_link_into_usr_stays_a_link(host: Host) -> None:
    host.file("/usr/lib/os-release", "ID=x\n")
    host.link("/etc/os-release", "../usr/lib/os-release")
    op = node(host.plan(interpreter()), "etc/os-release")
    assert (op.kind, op.source) == (Kind.SYMLINK, "/usr/lib/os-release")


def test_named_file_behind_a_link_elsewhere_is_left_out(host: Host) -> None:
    host.file("/home/user/secret", "secret")
    host.link("/etc/mime.types", "/home/user/secret")
    assert not has(host.plan(interpreter()), "etc/mime.types")


def test_time_zone_is_the_hosts(host: Host) -> None:
    host.file("/usr/share/zoneinfo/Europe/Oslo", b"TZif2-oslo")
    host.link("/etc/localtime", "/usr/share/zoneinfo/Europe/Oslo")
    assert node(host.plan(interpreter()), "etc/localtime").data == b"TZif2-oslo"


@pytest.mark.parametrize("content", [None, b"root:$6$", b""])
def test_time_zone_is_utc_without_one(host: Host, content: bytes | None) -> None:
    if content is not None:
        host.file("/etc/localtime", content)
    assert node(host.plan(interpreter()), "etc/localtime").data == etc.UTC


def test_invented_time_zone_file_is_valid(tmp_path: Path) -> None:
    (tmp_path / "zone").write_bytes(etc.UTC)
    with (tmp_path / "zone").open("rb") as file:
        zone = ZoneInfo.from_file(file)
    assert datetime(2030, 7, 1, tzinfo=zone).utcoffset() == timedelta(0)


# /dev, /proc, /sys and empty places


def test_devices_are_bound_one_by_one(host: Host) -> None:
    plan = host.plan(interpreter())
    for name in DEVICES:
        assert node(plan, f"dev/{name}").kind is Kind.FILE
        (bind,) = [op for op in plan if op.target == f"dev/{name}" and op.kind is Kind.BIND]
        assert bind.source == f"{host.root}/dev/{name}"
        assert bind.flags == rootfs.RDONLY | rootfs.NOSUID | rootfs.NOEXEC
    listed = {op.target for op in plan if op.target.startswith("dev/")}
    assert listed == {f"dev/{name}" for name in (*DEVICES, "fd", "stdin", "stdout", "stderr", "shm")}
    assert [node(plan, f"dev/{name}").source for name in ("fd", "stdin", "stdout", "stderr")] == [
        "/proc/self/fd",
        "/proc/self/fd/0",
        "/proc/self/fd/1",
        "/proc/self/fd/2",
    ]


def test_proc_is_restricted_and_last(host: Host) -> None:
    proc = host.plan(interpreter())[-1]
    assert proc == Op(
        Kind.PROC, "proc", "subset=pid,hidepid=invisible", flags=rootfs.NOSUID | rootfs.NODEV | rootfs.NOEXEC
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [("0-3\n", b"0-3\n"), ("0,2-5\n", b"0,2-5\n"), ("0-3; rm\n", b"0\n"), ("", b"0\n"), (None, b"0\n")],
)
def test_processors_are_told_by_invented_files(host: Host, content: str | None, expected: bytes) -> None:
    if content is not None:
        host.file("/sys/devices/system/cpu/online", content)
    host.file("/sys/firmware/table", "secret")
    plan = host.plan(interpreter())
    assert node(plan, "sys/devices/system/cpu/online").data == expected
    files = {op.target for op in plan if op.target.startswith("sys/") and op.kind is not Kind.DIR}
    assert files == {"sys/devices/system/cpu/online", "sys/devices/system/cpu/possible"}


@pytest.mark.parametrize("place", ["workspace", "tmp", "dev/shm", "code", "run", "var"])
def test_places_for_a_cell_are_empty_directories(host: Host, place: str) -> None:
    host.file(f"/{place}/of-the-host", "secret")
    plan = host.plan(interpreter())
    assert node(plan, place) == Op(Kind.DIR, place, mode=0o755)
    assert not has(plan, f"{place}/of-the-host")


def test_var_tmp_is_tmp(host: Host) -> None:
    assert resolve(host.plan(interpreter()), "/var/tmp") == "/tmp"


def test_top_level_holds_nothing_else_of_the_host(host: Host) -> None:
    for name in ("boot", "home/user", "root", "srv", "mnt", "media", "opt/tool", "lost+found", "data"):
        host.file(f"/{name}/file", "secret")
    top = {op.target for op in host.plan(interpreter()) if "/" not in op.target}
    assert top == {"usr", "bin", "sbin", "lib", "lib64", "etc", "dev", "proc", "sys", "run", "var"} | {
        "workspace",
        "tmp",
        "code",
    }


# Extra binds


def test_extra_directory_and_file_are_bound_read_only(host: Host, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "alias").symlink_to("inside")
    plan = host.plan(interpreter(), [(f"{tmp_path}/alias", "/sandboxd"), (f"{tmp_path}/file", "/data/file")])
    assert_well_formed(plan)
    assert [(op.source, op.flags) for op in plan if op.target == "sandboxd" and op.kind is Kind.BIND] == [
        (f"{tmp_path}/inside", rootfs.TREE_FLAGS)
    ]
    assert node(plan, "sandboxd").kind is Kind.DIR
    assert node(plan, "data/file").kind is Kind.FILE


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/etc",
        "/etc/passwd",
        "/usr",
        "/usr/share/x",
        "/bin/x",
        "/proc/x",
        "/dev/x",
        "/tmp/x",
        "/workspace/x",
        "/code",
        "relative",
        "/x/../etc",
        "//etc",
        "/run",
    ],
)
def test_extra_bind_over_the_image_is_refused(host: Host, tmp_path: Path, target: str) -> None:
    with pytest.raises(PolicyError):
        host.plan(interpreter(), [(str(tmp_path), target)])


@pytest.mark.parametrize("source", ["relative", "/nonexistent/x", "/dev/null"])
def test_extra_bind_of_what_is_no_file_is_refused(host: Host, source: str) -> None:
    with pytest.raises(PolicyError):
        host.plan(interpreter(), [(source, "/data")])


# Operations and their encoding


@pytest.mark.parametrize("target", ["", "/etc", "a//b", "a/", ".", "a/./b", "..", "a/../b", "a\0b"])
def test_target_must_be_a_plain_relative_path(target: str) -> None:
    with pytest.raises(ValueError, match="target"):
        Op(Kind.DIR, target)


def test_encoding_is_read_back_whole(host: Host) -> None:
    host.file("/etc/mime.types", bytes(range(256)))
    host.link("/etc/fonts/\udce9t\udce9.conf", "/usr/bin/python3.11")
    plan = host.plan(interpreter())
    assert list(iterate(encode(plan))) == plan


def test_encoding_is_as_documented() -> None:
    buffer = encode([Op(Kind.FILE, "ab", data=b"xyz", mode=0o644), Op(Kind.BIND, "c", "/s", flags=7)])
    words = [2, 0, 2, 0, 0o644, 3, 1, 3]
    assert buffer[:32] == b"".join(word.to_bytes(4, "little") for word in words)
    assert buffer[32:40] == b"ab\0\0xyz\0"
    words = [4, 7, 0, 2, 3, 0]
    assert buffer[40:64] == b"".join(word.to_bytes(4, "little") for word in words)
    assert buffer[64:] == b"c\0/s\0\0\0\0"


def test_kinds_and_flags_keep_their_numbers() -> None:
    assert [(kind.name, kind.value) for kind in Kind] == [
        ("DIR", 1),
        ("FILE", 2),
        ("SYMLINK", 3),
        ("BIND", 4),
        ("TMPFS", 5),
        ("PROC", 6),
    ]
    assert (rootfs.RDONLY, rootfs.NOSUID, rootfs.NODEV, rootfs.NOEXEC) == (1, 2, 4, 8)


# The tree reader


def test_long_chain_of_links_is_refused(host: Host) -> None:
    host.directory("/chain/0")
    for number in range(1, 60):
        host.link(f"/chain/{number}", str(number - 1))
    tree = HostTree(host.root)
    assert tree.walk("/chain/30").real == "/chain/0"
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        HostTree(host.root).walk("/chain/59")


def test_links_through_links_end(host: Host) -> None:
    host.directory("/chain/0")
    for number in range(1, 40):
        host.link(f"/chain/{number}", f"{number - 1}/../{number - 1}/../{number - 1}")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        HostTree(host.root).walk("/chain/39")


def test_absolute_links_stay_below_the_root(host: Host) -> None:
    host.link("/opt/up", "/../../usr")
    assert HostTree(host.root).walk("/opt/up").real == "/usr"


@pytest.mark.parametrize("path", ["/usr/bin/python3.11/x", "/usr/bin/python3.11/..", "/usr/bin/python3.11/."])
def test_file_is_no_directory(host: Host, path: str) -> None:
    with pytest.raises(NotADirectoryError):
        HostTree(host.root).walk(path)


# The host that runs the tests


def test_this_host_and_interpreter_can_be_planned() -> None:
    python = Interpreter.current()
    try:
        plan = plan_host(python, slots=SLOTS)
    except Unavailable as refusal:
        pytest.skip(str(refusal))
    assert_well_formed(plan)
    for path in (*python.trees, python.executable):
        assert os.path.realpath(resolve(plan, path)) == os.path.realpath(path)
    for op in plan:
        if op.kind is Kind.BIND:
            assert not stat.S_ISLNK(os.lstat(op.source).st_mode)
