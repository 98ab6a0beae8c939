"""Leaves, instances and sweeps on the running kernel's hierarchies. Needs root and the right to make cgroups."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import importlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd.cgroup import Bounds, Counters, Hierarchy, Instance, Layout, Leaf, LeafLimits, discover, sweep, v2
from sandboxd.cgroup import files as cgroup_files
from sandboxd.cgroup.files import Fds, Group
from sandboxd.cgroup.home import v2_roots
from sandboxd.cgroup.instance import _without
from sandboxd.cgroup.leaf import cpu_quota
from sandboxd.cgroup.numbers import Numbers
from sandboxd.cgroup.place import remove_quietly, start_time
from sandboxd.cgroup.reading import Reading
from sandboxd.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
BOUNDS = Bounds(memory_bytes=1 << 30, pids=500)
NOBODY = 65534

pytestmark = [
    pytest.mark.cgroup,
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups here needs root"),
]


def without_v2(layout: Layout) -> Layout:
    """The same host as if cgroup v2 was not mounted."""
    return dataclasses.replace(layout, v2=None)


def roots() -> list[str]:
    layout = discover()
    found = [hierarchy.mount_point for hierarchy in layout.v1]
    if layout.v2 is not None:
        found += v2_roots(layout.v2)
    found += [hierarchy.mount_point for hierarchy in (layout.accounting, layout.freezer) if hierarchy is not None]
    return found


def own_directories() -> list[str]:
    """Instance directories of this process, in every hierarchy."""
    prefix = f"sandboxd.{os.getpid()}."
    return [f"{root}/{name}" for root in roots() for name in os.listdir(root) if name.startswith(prefix)]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = descriptors()
    yield
    assert own_directories() == []
    assert descriptors() == before


@pytest.fixture
def layout() -> Layout:
    layout = discover()
    if layout.missing or any(hierarchy.read_only for hierarchy in layout.v1):
        pytest.skip("no writable cgroup hierarchies with memory, pids and cpu")
    return layout


@pytest.fixture(params=["host", "without-v2"])
def any_layout(request: pytest.FixtureRequest, layout: Layout) -> Layout:
    """What the host has, and on hosts with v1 controllers also the way without cgroup v2."""
    if request.param == "host":
        return layout
    if not layout.v1 or layout.v2 is None or layout.v2.controllers:
        pytest.skip("controllers are on v2 here")
    return without_v2(layout)


@pytest.fixture
def instance(any_layout: Layout) -> Iterator[Instance]:
    with Instance.create(any_layout, BOUNDS) as instance:
        yield instance


@pytest.fixture
def twin_instance(layout: Layout) -> Iterator[Instance]:
    """An instance with a v2 directory, as twin or with controllers."""
    with Instance.create(layout, BOUNDS) as instance:
        if instance.make_leaf(99).clone_fd is None:
            pytest.skip("no writable cgroup v2 mount")
        yield instance


@contextmanager
def child(code: str, *arguments: str, pass_fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """A Python process that waits for a line on stdin before it runs *code*; killed and reaped at the end."""
    program = "import os, signal, sys\nsys.stdin.readline()\n" + textwrap.dedent(code)
    with subprocess.Popen(
        [sys.executable, "-I", "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=pass_fds,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def line_from(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def run_in(leaf: Leaf, code: str, *arguments: str) -> int:
    """Run *code* as the leaf's only process; returns its status as subprocess tells it."""
    with child(code, *arguments) as process:
        leaf.attach(process.pid)
        go(process)
        return process.wait(timeout=30)


def readable(fd: int, timeout: float = 10) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture
def adopt() -> Iterator[None]:
    """Orphans of our children become ours, so a test can reap them; not every pid 1 does."""
    libc = ctypes.CDLL(None)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    yield
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0


def reap_all() -> None:
    """Wait for every child, own and adopted; subprocess must have waited for its own before."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


# Limits and what the counters say of them


def test_no_stranger_can_hold_an_engines_lock(instance: Instance) -> None:
    for path in instance.paths():
        assert os.stat(path).st_mode & 0o777 == 0o711


def test_oom_kill_is_counted_and_announced(instance: Instance) -> None:
    with instance.make_leaf(0) as leaf:
        leaf.set_limits(LeafLimits(memory_bytes=32 * MIB))
        leaf.begin()
        assert not readable(leaf.oom_fd, timeout=0)
        assert run_in(leaf, "bytearray(64 << 20)") == -signal.SIGKILL
        assert readable(leaf.oom_fd)
        counters = leaf.counters()
        assert counters.oom_kills == 1  # though with memory.oom.group the kernel counts the first victim twice
        assert leaf.oom_kills() >= 1
        assert counters.memory_limit_hits > 0
        assert 31 * MIB < counters.memory_peak_bytes <= 32 * MIB
        leaf.oom_clear()
        assert not readable(leaf.oom_fd, timeout=0)


def test_memory_below_the_limit_is_no_oom(instance: Instance) -> None:
    with instance.make_leaf(0) as leaf:
        leaf.set_limits(LeafLimits(memory_bytes=64 * MIB))
        leaf.begin()
        assert run_in(leaf, "bytearray(16 << 20)") == 0
        counters = leaf.counters()
        assert (counters.oom_kills, counters.memory_limit_hits) == (0, 0)
        assert 16 * MIB < counters.memory_peak_bytes < 40 * MIB
        assert not readable(leaf.oom_fd, timeout=0)


def test_instance_bounds_the_sum_of_its_leaves(any_layout: Layout) -> None:
    # Less than this process has: it is not below that bound, and must not be what the kernel chooses.
    ours = bytearray(96 * MIB)
    with Instance.create(any_layout, Bounds(memory_bytes=64 * MIB)) as instance, instance.make_leaf(0) as leaf:
        leaf.set_limits(LeafLimits(memory_bytes=256 * MIB))
        leaf.begin()
        assert run_in(leaf, "bytearray(128 << 20)") == -signal.SIGKILL
        assert len(ours) == 96 * MIB
        counters = leaf.counters()
        assert counters.oom_kills >= 1
        assert counters.memory_limit_hits == 0  # not the leaf's own limit


FORK_UNTIL_REFUSED = """
    children = 0
    try:
        while os.fork():
            children += 1
    except OSError as error:
        print(children, error.errno, flush=True)
    signal.pause()
"""


def test_instance_bounds_the_tasks_of_its_leaves(any_layout: Layout) -> None:
    with (
        Instance.create(any_layout, Bounds(pids=8)) as instance,
        instance.make_leaf(0) as first,
        instance.make_leaf(1) as second,
    ):
        for leaf in (first, second):
            leaf.set_limits(LeafLimits(pids=5))
            leaf.begin()
        with child(FORK_UNTIL_REFUSED) as one, child(FORK_UNTIL_REFUSED) as other:
            for leaf, process in ((first, one), (second, other)):
                leaf.attach(process.pid)
                go(process)
                children = 4 if leaf is first else 2  # the leaf's own limit, and what is left of 8
                assert line_from(process) == f"{children} {errno.EAGAIN}"
            for leaf, process in ((first, one), (second, other)):
                leaf.kill()
                assert process.wait(timeout=10) == -signal.SIGKILL


def test_fork_beyond_pids_limit_is_refused_and_counted(instance: Instance) -> None:
    with instance.make_leaf(0) as leaf:
        leaf.set_limits(LeafLimits(pids=4))
        leaf.begin()
        with child(FORK_UNTIL_REFUSED) as process:
            leaf.attach(process.pid)
            go(process)
            assert line_from(process) == f"3 {errno.EAGAIN}"
            counters = leaf.counters()
            assert counters.pids_limit_hits == 1
            assert counters.pids_peak in (4, None)
            leaf.kill()
            assert process.wait(timeout=10) == -signal.SIGKILL


def test_cpu_quota_throttles(instance: Instance) -> None:
    with instance.make_leaf(0) as leaf:
        leaf.set_limits(LeafLimits(cpus=0.2))
        leaf.begin()
        started = time.monotonic()
        assert run_in(leaf, "import time\nend = time.process_time() + 0.1\nwhile time.process_time() < end: pass") == 0
        wall_usec = (time.monotonic() - started) * 1e6
        counters = leaf.counters()
        assert counters.throttled_usec > 0
        assert counters.cpu_usec == counters.cpu_user_usec + counters.cpu_system_usec == leaf.cpu_usec()
        assert 90_000 < counters.cpu_usec < wall_usec * 0.5


@pytest.mark.usefixtures("adopt")
def test_counters_start_at_begin(instance: Instance) -> None:
    with instance.make_leaf(0, pids_floor=2) as leaf:
        leaf.set_limits(LeafLimits(memory_bytes=32 * MIB, pids=2, cpus=0.2))
        leaf.begin()
        code = """
            import time
            end = time.process_time() + 0.05
            while time.process_time() < end: pass
            if os.fork() == 0:
                signal.pause()
            try:
                os.fork()
            except OSError:
                bytearray(64 << 20)
        """
        run_in(leaf, code)
        assert leaf.counters().oom_kills >= 1
        leaf.kill()
        reap_all()
        assert leaf.is_empty()
        leaf.begin()
        counters = leaf.counters()
        assert counters.oom_kills == counters.memory_limit_hits == counters.pids_limit_hits == 0
        assert counters.cpu_usec == counters.throttled_usec == leaf.cpu_usec() == 0
        # Before Linux 6.12 v2's peak is for good; such a leaf is not used again.
        assert counters.memory_peak_bytes < 4 * MIB if leaf._memory.peak_resettable else not leaf.reusable()
        assert not readable(leaf.oom_fd, timeout=0)


def test_limits_can_be_raised_and_lowered(instance: Instance) -> None:
    with instance.make_leaf(0) as leaf:
        for memory, pids, cpus in ((64 * MIB, 8, 1.0), (256 * MIB, 64, 0.05), (16 * MIB, 2, 4.0), (None, None, None)):
            leaf.set_limits(LeafLimits(memory, pids, cpus))
        leaf.set_limits(LeafLimits(32 * MIB))
        leaf.begin()
        assert run_in(leaf, "bytearray(64 << 20)") == -signal.SIGKILL


def test_refused_limit_is_an_error_that_names_the_file(instance: Instance) -> None:
    with instance.make_leaf(0) as leaf:
        with pytest.raises(OSError, match=r"write '-5'") as caught:
            leaf.set_limits(LeafLimits(pids=-5))
        assert caught.value.errno == errno.EINVAL
        assert str(caught.value.filename).endswith("/c0.0/pids.max")


def test_unlimited_swap_is_out_of_reach_of_a_leaf(instance: Instance) -> None:
    with instance.make_leaf(0) as leaf:
        leaf.set_limits(LeafLimits(memory_bytes=32 * MIB))
        values = {
            file.name: file.read_text().strip()
            for path in instance.paths()
            for file in Path(path).glob(f"**/{leaf.name}/memory.*")
            if file.name in ("memory.memsw.limit_in_bytes", "memory.swappiness", "memory.swap.max")
        }
        expected = {
            "memory.memsw.limit_in_bytes": str(32 * MIB),
            "memory.swappiness": "0",
            "memory.swap.max": "0",
        }
        assert values == {name: expected[name] for name in values}
        assert values or "swap accounting" in instance.facts()["missing"]


@pytest.mark.parametrize(
    ("cpus", "expected"),
    [
        (None, (None, 10_000)),
        (1.0, (10_000, 10_000)),
        (2.5, (25_000, 10_000)),
        (0.1, (1_000, 10_000)),
        (0.05, (1_000, 20_000)),
        (0.001, (1_000, 1_000_000)),
    ],
)
def test_quota_and_period_make_the_share(cpus: float | None, expected: tuple[int | None, int]) -> None:
    assert cpu_quota(cpus) == expected


@pytest.mark.parametrize("cpus", [0.0, -1.0, 0.0009, float("inf"), float("nan")])
def test_share_the_kernel_cannot_give_is_refused(cpus: float) -> None:
    with pytest.raises(ValueError, match=r"at least 0\.001"):
        cpu_quota(cpus)


# Entering


def test_process_enters_by_itself_through_inherited_descriptors(instance: Instance) -> None:
    with instance.make_leaf(0) as leaf:
        if not (entries := leaf.entry_fds()):
            pytest.skip("no v1 hierarchies")
        code = """
            os.setresuid(65534, 65534, 65534)
            for fd in sys.argv[1:]:
                os.write(int(fd), b"0")
            print(open("/proc/self/cgroup").read().count("/c0.0"), flush=True)
            signal.pause()
        """
        with child(code, *map(str, entries), pass_fds=tuple(entries)) as process:
            go(process)
            assert line_from(process) == str(len(entries))
            assert not leaf.is_empty()


# clone3(2) into the cgroup of descriptor argv[1] as uid argv[2]; prints 0 or the errno.
CLONE_CHILD = """
    import ctypes, struct
    os.setgroups([])
    os.setresgid(int(sys.argv[2]), int(sys.argv[2]), int(sys.argv[2]))
    os.setresuid(int(sys.argv[2]), int(sys.argv[2]), int(sys.argv[2]))
    libc = ctypes.CDLL(None, use_errno=True)
    args = struct.pack("11Q", 0x200000000, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, int(sys.argv[1]))
    pid = libc.syscall(435, args, len(args))
    if pid == 0:
        os._exit("/c0.0" not in open("/proc/self/cgroup").read())
    print(ctypes.get_errno() if pid < 0 else os.waitpid(pid, 0)[1], flush=True)
"""


def attach_to_zygotes(instance: Instance, pid: int) -> None:
    for place in instance._places():
        place.below("zygotes").attach(pid)


def clone_into(instance: Instance, leaf: Leaf, uid: int) -> int:
    assert leaf.clone_fd is not None
    with child(CLONE_CHILD, str(leaf.clone_fd), str(uid), pass_fds=(leaf.clone_fd,)) as process:
        attach_to_zygotes(instance, process.pid)
        go(process)
        return int(line_from(process))


def test_clone_into_a_leaf_needs_its_owner(twin_instance: Instance) -> None:
    with twin_instance.make_leaf(0) as leaf:
        assert clone_into(twin_instance, leaf, NOBODY) == errno.EACCES
        leaf.clone_owner(NOBODY)
        assert clone_into(twin_instance, leaf, NOBODY) == errno.EACCES
        twin_instance.clone_owner(NOBODY)
        assert clone_into(twin_instance, leaf, NOBODY) == 0
        assert clone_into(twin_instance, leaf, NOBODY - 1) == errno.EACCES


def test_zygotes_of_two_uids_clone_each_into_their_own_leaf(twin_instance: Instance) -> None:
    for uid in (NOBODY, NOBODY - 1):
        twin_instance.clone_owner(uid)
    with twin_instance.make_leaf(0) as leaf:
        leaf.clone_owner(NOBODY - 1)
        assert clone_into(twin_instance, leaf, NOBODY - 1) == 0
        assert clone_into(twin_instance, leaf, NOBODY) == errno.EACCES


# The end of a run


def test_kill_takes_frozen_processes_too(twin_instance: Instance) -> None:
    with twin_instance.make_leaf(0) as leaf, child("signal.pause()") as process:
        leaf.attach(process.pid)
        frozen(leaf)
        assert not leaf.reusable()
        leaf.kill()
        assert process.wait(timeout=10) == -signal.SIGKILL
        assert leaf.is_empty()
        assert not leaf.reusable()
        leaf.freeze(False)
        assert not leaf.is_frozen()


def frozen(leaf: Leaf) -> None:
    leaf.freeze(True)
    deadline = time.monotonic() + 10
    while not leaf.is_frozen():
        assert time.monotonic() < deadline


def test_what_is_frozen_stops_until_it_is_thawed(instance: Instance) -> None:
    with instance.make_leaf(0) as leaf, child("print('on', flush=True)\nsys.stdin.readline()") as process:
        leaf.attach(process.pid)
        frozen(leaf)
        go(process)
        assert process.stdout is not None
        assert not readable(process.stdout.fileno(), 0.1)
        leaf.thaw()
        assert line_from(process) == "on"
        assert not leaf.is_frozen()


def test_kill_takes_frozen_processes_on_any_host(instance: Instance) -> None:
    with instance.make_leaf(0) as leaf, child("print('on', flush=True)") as process:
        leaf.attach(process.pid)
        frozen(leaf)
        go(process)
        leaf.kill()
        leaf.thaw()
        assert process.wait(timeout=10) == -signal.SIGKILL
        assert process.stdout is not None
        assert process.stdout.read() == ""
        assert leaf.is_empty()


def test_zombie_keeps_a_leaf_from_being_empty(instance: Instance) -> None:
    with instance.make_leaf(0) as leaf, child("") as process:
        leaf.attach(process.pid)
        assert not leaf.is_empty()
        go(process)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not leaf.is_empty()
        process.wait(timeout=10)
        assert leaf.is_empty()


def test_leaf_without_v2_and_without_a_freezer_says_so(layout: Layout) -> None:
    if not layout.v1 or (layout.v2 is not None and layout.v2.controllers):
        pytest.skip("controllers are on v2 here")
    bare = dataclasses.replace(without_v2(layout), freezer=None)
    with Instance.create(bare, BOUNDS) as instance, instance.make_leaf(0) as leaf:
        assert instance.facts()["version"] == "v1"
        assert not instance.facts()["twin"]
        assert leaf.clone_fd is None
        with pytest.raises(OSError, match="freezer") as caught:
            leaf.freeze(True)
        assert caught.value.errno == errno.ENOTSUP


@pytest.mark.usefixtures("adopt")
def test_fork_chain_does_not_outrun_the_kill(instance: Instance) -> None:
    # Each link forks the next and exits; the first process adopts the dead ones, and the kernel reaps them for it.
    code = """
        import ctypes
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        links = 0
        if os.fork():
            while True:
                signal.pause()
        while True:
            if os.fork():
                os._exit(0)
            links += 1
            if links == 50:
                os.write(1, b"running\\n")
    """
    with instance.make_leaf(0) as leaf, child(code) as process:
        leaf.set_limits(LeafLimits(pids=32))
        leaf.attach(process.pid)
        go(process)
        assert line_from(process) == "running"
        leaf.kill()
        assert process.wait(timeout=10) == -signal.SIGKILL
        reap_all()
        assert leaf.is_empty()


def test_leaf_with_memory_left_is_not_reusable(instance: Instance) -> None:
    left_behind = Path(f"/dev/shm/sandboxd-test.{os.getpid()}")
    with instance.make_leaf(0) as leaf:
        assert leaf.reusable()
        try:
            assert run_in(leaf, f"open({str(left_behind)!r}, 'wb').write(bytes(4 << 20))") == 0
            assert leaf.is_empty()
            assert not leaf.reusable()
            assert leaf.counters().memory_current_bytes > 4 * MIB
        finally:
            left_behind.unlink(missing_ok=True)
        leaf.reclaim()
        assert leaf.reusable()


def test_names_that_a_leaf_asked_for_are_reclaimed(instance: Instance) -> None:
    def charged() -> int:
        leaf.reusable()
        return leaf.memory_seen()

    with instance.make_leaf(0) as leaf:
        ask = "for n in range(40_000):\n    try: os.stat(f'/usr/lib/{os.getpid()}-{n}')\n    except OSError: pass"
        assert run_in(leaf, ask) == 0
        before = charged()
        assert before > 40_000 * 192
        assert leaf.reclaim_names()
        deadline = time.monotonic() + 10
        while charged() > before // 4 and time.monotonic() < deadline:  # they are freed after a grace period of RCU
            time.sleep(0.01)
        assert charged() <= before // 4


def test_file_content_that_a_leaf_read_first_is_kept(instance: Instance) -> None:
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as cold, instance.make_leaf(0) as leaf:
        cold.write(os.urandom(8 * MIB))
        cold.flush()
        os.fsync(cold.fileno())
        os.posix_fadvise(cold.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert run_in(leaf, "open(sys.argv[1], 'rb').read()", cold.name) == 0
        assert not leaf.reusable()
        if leaf.memory_seen() < 8 * MIB:
            pytest.skip("files of this file system are charged to nobody")
        assert not leaf.reclaim_names(), "the next run would read it from the disk again"
        assert not leaf.reusable()


def test_leaf_whose_peaks_are_stained_is_not_reusable(instance: Instance) -> None:
    fork_once = "if os.fork() == 0: os._exit(0)\nos.wait()"
    for floor, expected in ((1, False), (2, True)):
        with instance.make_leaf(0, pids_floor=floor) as leaf:
            leaf.begin()
            assert run_in(leaf, fork_once) == 0
            peak = leaf.counters().pids_peak
            if peak is None:
                pytest.skip("no pids.peak in this kernel")
            assert peak == 2
            leaf.reclaim()
            assert leaf.reusable() is (expected and leaf._memory.peak_resettable)
            leaf.begin()
            assert run_in(leaf, "") == 0
            assert leaf.counters().pids_peak == (2 if expected else None)


def test_remove_refuses_while_a_task_lives_and_works_after(instance: Instance) -> None:
    leaf = instance.make_leaf(0)
    with child("signal.pause()") as process:
        leaf.attach(process.pid)
        assert not leaf.remove()
        assert leaf.remove_wait(10)
        assert process.wait(timeout=10) == -signal.SIGKILL
    assert leaf.remove()
    assert not any(Path(path, leaf.name).exists() for path in instance.paths())


def test_generations_of_a_slot_have_names_of_their_own(instance: Instance) -> None:
    with instance.make_leaf(7) as first, instance.make_leaf(7) as second, instance.make_leaf(8) as other:
        assert [first.name, second.name, other.name] == ["c7.0", "c7.1", "c8.0"]


# Instances


def test_close_kills_and_removes_everything(any_layout: Layout) -> None:
    instance = Instance.create(any_layout, BOUNDS)
    leaf = instance.make_leaf(0)
    with child("signal.pause()") as cell, child("signal.pause()") as zygote:
        leaf.attach(cell.pid)
        attach_to_zygotes(instance, zygote.pid)
        assert instance.close() == []
        assert cell.wait(timeout=10) == zygote.wait(timeout=10) == -signal.SIGKILL
    assert instance.close() == []


def test_facts_name_what_is_in_force(layout: Layout) -> None:
    with Instance.create(layout, BOUNDS) as instance:
        facts = instance.facts()
        assert facts["version"] == layout.version
        assert facts["controllers"] == ["memory", "pids", "cpu"]
        assert facts["twin"] is (layout.version == "hybrid")


def inheritable() -> list[int]:
    return [int(path.name) for path in Path("/proc/self/fdinfo").iterdir() if not close_on_exec(path)]


def close_on_exec(fdinfo: Path) -> bool:
    try:
        flags = next(line for line in fdinfo.read_text().splitlines() if line.startswith("flags:"))
    except FileNotFoundError:
        return True
    return bool(int(flags.split()[1], 8) & os.O_CLOEXEC)


def test_every_descriptor_is_close_on_exec(any_layout: Layout) -> None:
    before = inheritable()
    with Instance.create(any_layout, BOUNDS) as instance, instance.make_leaf(0) as leaf:
        assert leaf.name
        assert inheritable() == before


@pytest.mark.parametrize("kind", ["forbidden", "no-hierarchy", "absent"])
def test_refused_controller_leaves_nothing_and_names_the_fix(layout: Layout, tmp_path: Path, kind: str) -> None:
    place = {"forbidden": "/sys/kernel", "no-hierarchy": str(tmp_path), "absent": str(tmp_path / "absent")}[kind]
    broken = Hierarchy(1, place, ("cpu",), None)
    kept = tuple(hierarchy for hierarchy in layout.v1 if "cpu" not in hierarchy.controllers)
    with pytest.raises(Unavailable) as caught:
        Instance.create(dataclasses.replace(layout, v1=(*kept, broken)), BOUNDS)
    assert caught.value.stage == "cgroup"
    assert caught.value.errno in ((errno.EPERM, errno.EACCES) if kind == "forbidden" else (errno.ENOENT,))
    assert caught.value.fix
    assert place in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_missing_controller_is_unavailable_before_anything_is_made() -> None:
    with pytest.raises(Unavailable, match="memory, pids, cpu"):
        Instance.create(discover("", ""), BOUNDS)


def failing_at(number: int, counter: list[int]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wraps functions so that the call *number* of all of them together fails."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            counter[0] += 1
            if counter[0] == number:
                raise OSError(errno.EIO, os.strerror(errno.EIO), "injected")
            return function(*arguments, **options)

        return call

    return wrap


def inject(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    counter = [0]
    wrap = failing_at(number, counter)
    for name in ("make", "open", "write"):
        monkeypatch.setattr(Group, name, wrap(getattr(cgroup_files.Group, name)))
    return counter


def test_each_step_of_an_instance_may_fail(any_layout: Layout) -> None:
    before = descriptors()
    for number in range(1, 1000):
        with pytest.MonkeyPatch.context() as monkeypatch:
            counter = inject(monkeypatch, number)
            try:
                instance = Instance.create(any_layout, BOUNDS)
            except Unavailable:
                instance = None
            reached = counter[0] >= number
        if instance is not None:
            instance.close()  # also when the twin was refused and done without
        assert own_directories() == []
        assert descriptors() == before
        if not reached:
            break
    assert number > 5


def test_each_step_of_a_leaf_may_fail(instance: Instance) -> None:
    before = descriptors()
    for number in range(1, 1000):
        with pytest.MonkeyPatch.context() as monkeypatch:
            counter = inject(monkeypatch, number)
            try:
                leaf = instance.make_leaf(0)
            except OSError:
                leaf = None
            reached = counter[0] >= number
        if leaf is not None:
            assert leaf.remove()
        below = [name for path in instance.paths() for _, names, _ in os.walk(path) for name in names]
        assert not [name for name in below if name.startswith("c0.")]
        assert descriptors() == before
        if not reached:
            break
    assert number > 15


# Sweeps

# The children below run isolated from the environment, so they are told where the package is.
IMPORTS = f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"

# Makes an instance with one process in a leaf and one among the zygotes, and tells where.
ENGINE = """
    import subprocess
    from sandboxd.cgroup import Bounds, Instance, discover
    import dataclasses
    layout = discover()
    if sys.argv[1] == "without-v2":
        layout = dataclasses.replace(layout, v2=None)
    instance = Instance.create(layout, Bounds())
    leaf = instance.make_leaf(0)
    program = [sys.executable, "-I", "-c", "import signal; signal.pause()"]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    cell, zygote = subprocess.Popen(program, **quiet), subprocess.Popen(program, **quiet)
    leaf.attach(cell.pid)
    for place in instance._places():
        place.below("zygotes").attach(zygote.pid)
    print(cell.pid, zygote.pid, *instance.paths(), flush=True)
    signal.pause()
"""


@contextmanager
def engine(layout: Layout) -> Iterator[tuple[subprocess.Popen[str], list[int], list[str]]]:
    with child(IMPORTS + textwrap.dedent(ENGINE), "host" if layout.v2 is not None else "without-v2") as process:
        go(process)
        first, second, *paths = line_from(process).split()
        yield process, [int(first), int(second)], paths


def test_dead_engine_is_swept_with_its_live_processes(any_layout: Layout) -> None:
    with engine(any_layout) as (process, pids, paths):
        times = [start_time(pid) for pid in pids]
        assert None not in times
        process.kill()
        # Dead, not reaped: a zombie owner is as dead as none.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        name = os.path.basename(paths[0])
        (swept,) = [found for found in sweep(any_layout) if found.name == name]
        assert swept.left == []
        assert swept.killed == 2
        assert not any(map(os.path.exists, paths))
        assert [start_time(pid) == before for pid, before in zip(pids, times, strict=True)] == [False, False]


def test_living_engine_is_not_swept(layout: Layout) -> None:
    with engine(layout) as (process, pids, paths):
        assert os.path.basename(paths[0]) not in [found.name for found in sweep(layout)]
        assert all(map(os.path.isdir, paths))
        assert all(start_time(pid) for pid in pids)
        process.kill()
        process.wait(timeout=10)
        assert [found.left for found in sweep(layout) if found.name == os.path.basename(paths[0])] == [[]]


@contextmanager
def directory(path: str) -> Iterator[int]:
    """A cgroup directory and a descriptor of it; gone at the end."""
    os.mkdir(path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)
        if os.path.isdir(path):
            os.rmdir(path)


def test_unlocked_directory_of_a_living_owner_is_not_swept(layout: Layout) -> None:
    path = f"{roots()[0]}/sandboxd.{os.getpid()}.{start_time(os.getpid())}.7"
    with directory(path):
        assert os.path.basename(path) not in [found.name for found in sweep(layout)]
        assert os.path.isdir(path)


def test_locked_directory_is_not_swept_though_its_owner_cannot_be_seen(layout: Layout) -> None:
    # As an engine in another pid namespace has it: no such process here. pid_max is at most 2^22.
    path = f"{roots()[0]}/sandboxd.{1 << 22}.{os.getpid()}"
    with directory(path) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert os.path.basename(path) not in [found.name for found in sweep(layout)]
        assert os.path.isdir(path)
        fcntl.flock(fd, fcntl.LOCK_UN)
        assert os.path.basename(path) in [found.name for found in sweep(layout)]
        assert not os.path.isdir(path)


def test_name_taken_in_one_hierarchy_is_not_used_in_any(layout: Layout) -> None:
    name = f"sandboxd.{os.getpid()}.{start_time(os.getpid())}"
    with directory(f"{roots()[0]}/{name}"), Instance.create(layout, BOUNDS) as instance:
        assert {os.path.basename(path) for path in instance.paths()} == {f"{name}.1"}


def test_two_instances_live_side_by_side(layout: Layout) -> None:
    with Instance.create(layout, BOUNDS) as first, Instance.create(layout, BOUNDS) as second:
        assert not set(first.paths()) & set(second.paths())
        names = {os.path.basename(path) for path in (*first.paths(), *second.paths())}
        assert not names & {found.name for found in sweep(layout)}
        with first.make_leaf(0) as one, second.make_leaf(0) as other:
            assert one.is_empty()
            assert other.is_empty()
    # On v2 this process, which was the second's engine, could not leave that while the first was there.
    for path in second.paths():
        remove_quietly(f"{path}/engine")
        remove_quietly(path)


def test_sweeps_that_cannot_see_the_owner_leave_new_instances_alone(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As from another pid namespace: only the locks protect, also between mkdir and flock.
    monkeypatch.setattr(importlib.import_module("sandboxd.cgroup.sweep"), "start_time", lambda _pid: None)
    done = threading.Event()

    def sweep_on() -> None:
        while not done.is_set():
            sweep(layout)

    with ThreadPoolExecutor(2) as pool:
        sweepers = [pool.submit(sweep_on) for _ in range(2)]
        try:
            for _ in range(50):
                with Instance.create(layout, BOUNDS) as instance, instance.make_leaf(0) as leaf:
                    assert all(map(os.path.isdir, instance.paths()))
                    assert leaf.is_empty()
        finally:
            done.set()
        for sweeper in sweepers:
            sweeper.result()


# v2 with controllers, on a v2 directory of the running kernel that stands for a delegated one

CONTROLLER = "hugetlb"  # needs no resource of the machine, and is what a v2 mount beside v1 controllers often has


@pytest.fixture
def delegated(layout: Layout) -> Iterator[Layout]:
    """A layout whose v2 root is a directory of its own, with controllers to hand on; this process is not in it."""
    if layout.v2 is None or layout.v2.own is None:
        pytest.skip("no writable cgroup v2 mount")
    mount = Path(layout.v2.mount_point)
    controllers = layout.v2.controllers or (CONTROLLER,)
    if not set(controllers) <= set((mount / "cgroup.controllers").read_text().split()):
        pytest.skip(f"no {CONTROLLER} controller on v2")
    root = mount / f"sandboxd-test.{os.getpid()}"
    added = v2.enable_controllers(Group(-1, "", str(mount)), controllers)
    root.mkdir()
    os.setxattr(root, "trusted.delegate", b"1")
    try:
        yield dataclasses.replace(layout, v2=Hierarchy(2, str(root), controllers, str(root)))
    finally:
        Path(layout.v2.own, "cgroup.procs").write_text(str(os.getpid()))
        root.rmdir()
        if added:
            (mount / "cgroup.subtree_control").write_text(" ".join(f"-{name}" for name in added))


def own_v2() -> str:
    return next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))


def enter(root: Path) -> None:
    (root / "cgroup.procs").write_text(str(os.getpid()))


def test_engine_moves_out_of_the_inner_node_and_back(delegated: Layout) -> None:
    assert delegated.v2 is not None
    root = Path(delegated.v2.mount_point)
    enter(root)
    with Instance.create(delegated, BOUNDS) as instance:
        directory = Path(instance.paths()[-1])
        assert directory.parent == root
        assert own_v2().endswith(f"{directory.name}/engine")
        controllers = set(delegated.v2.controllers)
        assert set((root / "cgroup.subtree_control").read_text().split()) == controllers
        with instance.make_leaf(0) as leaf, child("signal.pause()") as process:
            cells = directory / "cells"
            assert controllers <= set((cells / leaf.name / "cgroup.controllers").read_text().split())
            assert (cells / "zygotes").is_dir()
            leaf.attach(process.pid)
            leaf.kill()
            assert process.wait(timeout=10) == -signal.SIGKILL
    assert own_v2().endswith(root.name)
    assert (root / "cgroup.subtree_control").read_text().split() == []
    assert [path for path in root.iterdir() if path.is_dir()] == []


def test_strangers_in_the_inner_node_make_v2_unavailable(delegated: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    assert delegated.v2 is not None
    root = Path(delegated.v2.mount_point)
    # The stranger stands for the caller's program, which is never moved.
    with child("signal.pause()") as stranger:
        (root / "cgroup.procs").write_text(str(stranger.pid))
        enter(root)
        with pytest.raises(Unavailable, match=r"Delegate=yes|mkdir .*/init") as caught:
            Instance.create(delegated, BOUNDS)
        assert caught.value.errno == errno.EBUSY
        assert own_v2().endswith(root.name)
        assert [path for path in root.iterdir() if path.is_dir()] == []


def test_controller_that_is_not_handed_down_is_unavailable(delegated: Layout) -> None:
    assert delegated.v2 is not None
    root = Path(delegated.v2.mount_point)
    wanted = dataclasses.replace(delegated.v2, controllers=(*delegated.v2.controllers, "absent"))
    with pytest.raises(Unavailable, match=r"cgroup\.subtree_control|Delegate=yes") as caught:
        Instance.create(dataclasses.replace(delegated, v2=wanted), BOUNDS)
    assert caught.value.errno == errno.ENOENT
    assert [path for path in root.iterdir() if path.is_dir()] == []


LAST_ENGINE = """
    import dataclasses
    from sandboxd.cgroup import Bounds, Counters, Hierarchy, Instance, discover
    root = sys.argv[1]
    open(f"{root}/cgroup.procs", "w").write("0")
    v2 = Hierarchy(2, root, tuple(sys.argv[2:]), root)
    instance = Instance.create(dataclasses.replace(discover(), v2=v2), Bounds())
    print(flush=True)
    sys.stdin.readline()
    print(*instance.close(), flush=True)
"""


def test_engine_that_cannot_leave_is_swept_later(delegated: Layout) -> None:
    assert delegated.v2 is not None
    root = Path(delegated.v2.mount_point)
    controllers = delegated.v2.controllers
    other = root / "other"
    with child(IMPORTS + textwrap.dedent(LAST_ENGINE), str(root), *controllers) as process:
        go(process)
        line_from(process)
        # Another engine below the same root keeps controllers on: nobody can move into the root itself now.
        other.mkdir()
        (other / "cgroup.subtree_control").write_text(f"+{controllers[0]}")
        go(process)
        left = line_from(process)
        assert os.path.dirname(left) == str(root)
        assert process.wait(timeout=10) == 0
    assert [(found.name, found.left) for found in sweep(delegated)] == [(os.path.basename(left), [])]
    other.rmdir()
    (root / "cgroup.subtree_control").write_text(" ".join(f"-{name}" for name in controllers))


# v2's files, where the running kernel has none of them


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[tuple[Group, Path]]:
    """A directory with the names of v2's control files and no kernel behind them."""
    texts = {
        "memory.max": "max\n",
        "memory.swap.max": "max\n",
        "memory.oom.group": "0\n",
        "memory.current": "4096\n",
        "memory.events": "low 0\nhigh 0\nmax 3\noom 1\noom_kill 2\noom_group_kill 1\n",
        "memory.peak": "8192\n",
        "cpu.max": "max 100000\n",
        "cpu.max.burst": "0\n",
        "cpu.stat": "usage_usec 70\nuser_usec 50\nsystem_usec 20\nnr_throttled 2\nthrottled_usec 900\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield Group(fd, str(tmp_path), "."), tmp_path
    os.close(fd)


def test_v2_bandwidth_writes_quota_period_and_burst(fake: tuple[Group, Path]) -> None:
    group, path = fake
    fds, numbers = Fds(), Numbers()
    bandwidth = v2.Bandwidth(group, fds, numbers)
    v2.CpuUsage(group, fds, numbers)
    before = (0,) * len(numbers.rows)
    numbers.refresh()
    bandwidth.set_quota(5_000, 10_000)
    assert (path / "cpu.max").read_text().startswith("5000 10000")
    assert (path / "cpu.max.burst").read_text().startswith("5000")
    counters = Reading(tuple(numbers.rows), before, None, 1).counters(numbers.values())
    assert counters.throttled_usec == 900
    assert (counters.cpu_usec, counters.cpu_user_usec, counters.cpu_system_usec) == (70, 50, 20)
    fds.close()


class Deaf:
    """A notifier for files that no kernel changes."""

    fd = -1

    def __init__(self, _watched: int, _fds: Fds) -> None:
        return


def counted(group: Group, monkeypatch: pytest.MonkeyPatch) -> tuple[v2.Memory, Counters]:
    """What the memory files of *group* say of a run that began at zero."""
    monkeypatch.setattr(v2, "Notifier", Deaf)
    fds, numbers = Fds(), Numbers()
    memory = v2.Memory(group, fds, numbers)
    numbers.refresh()
    counters = Reading(tuple(numbers.rows), (0,) * len(numbers.rows), None, 1).counters(numbers.values())
    fds.close()
    return memory, counters


@pytest.mark.parametrize(
    ("events", "hits", "kills"),
    [
        ("low 0\nhigh 0\nmax 7\noom 0\noom_kill 2\noom_group_kill 1\n", 0, 1),  # the engine's bound, or the host's
        ("low 0\nhigh 0\nmax 7\noom 1\noom_kill 4\noom_group_kill 1\n", 1, 3),
        ("low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\noom_group_kill 1\n", 1, 1),  # gone before it was counted again
        ("low 0\nhigh 0\nmax 9\noom 0\noom_kill 0\n", 0, 0),
    ],
)
def test_v2_leaf_tells_its_own_oom_from_its_engines(
    fake: tuple[Group, Path], monkeypatch: pytest.MonkeyPatch, events: str, hits: int, kills: int
) -> None:
    group, path = fake
    (path / "memory.events").write_text(events)
    refuse_writing(monkeypatch, "memory.peak")
    _, counters = counted(group, monkeypatch)
    assert (counters.memory_limit_hits, counters.oom_kills) == (hits, kills)


def refuse_writing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As a kernel whose file *name* can only be read; root could open a plain file all the same."""

    def open_(group: Group, file: str, flags: int = os.O_RDONLY) -> int:
        if file == name and flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), file)
        return real(group, file, flags)

    real = Group.open
    monkeypatch.setattr(Group, "open", open_)


def test_v2_peak_that_cannot_be_reset_is_still_read(fake: tuple[Group, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_writing(monkeypatch, "memory.peak")  # before Linux 6.12
    memory, counters = counted(fake[0], monkeypatch)
    assert not memory.peak_resettable
    assert counters.memory_peak_bytes == 8192


def test_what_v2_is_done_without_is_told(fake: tuple[Group, Path]) -> None:
    group, path = fake
    assert _without(("memory", "pids", "cpu"), group) == ["pids.peak"]
    (path / "pids.peak").touch()
    (path / "cpu.max.burst").unlink()
    assert _without(("memory", "pids", "cpu"), group) == ["cpu.max.burst"]
    fds, numbers = Fds(), Numbers()
    v2.Bandwidth(group, fds, numbers).set_quota(5_000, 10_000)
    assert (path / "cpu.max").read_text().startswith("5000 10000")
    fds.close()


def test_v2_instance_is_bounded_without_swap(fake: tuple[Group, Path]) -> None:
    group, path = fake
    v2.bound_memory(group, 1 << 30)
    assert (path / "memory.max").read_text().startswith(str(1 << 30))
    assert (path / "memory.swap.max").read_text().startswith("0")


def test_numbers_of_control_files_are_parsed(tmp_path: Path) -> None:
    keyed, plain = tmp_path / "keyed", tmp_path / "plain"
    keyed.write_text("low 0\nmaximum 9\nmax 3\noom_kill 2\n\nsome avg10=0.00\nbad\nx -1\nhuge 99999999999999999999\n")
    plain.write_text("4096\n")
    fds, numbers = Fds(), Numbers()
    first, second = (fds.own(os.open(path, os.O_RDONLY)) for path in (keyed, plain))
    found = {key: numbers.add(first, key) for key in ("low", "max", "oom_kill", "absent", "huge", "bad", "some", "x")}
    only, wrong = numbers.add(second), numbers.add(-1)
    numbers.refresh()
    values = {key: number.last for key, number in found.items() if key not in ("some", "x")}
    assert values == {"low": 0, "max": 3, "oom_kill": 2, "absent": 0, "huge": (1 << 63) - 1, "bad": 0}
    assert only.last == 4096
    for refused, number in ((errno.EINVAL, found["some"]), (errno.EINVAL, found["x"]), (errno.EBADF, wrong)):
        with pytest.raises(OSError, match="pread") as raised:
            number.now()
        assert raised.value.errno == refused
    plain.write_text("8192\n")
    assert (only.last, only.now()) == (4096, 8192)
    fds.close()
