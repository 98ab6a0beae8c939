"""Reading /proc/self/mountinfo and /proc/self/cgroup: texts of several kinds of host, no root needed."""

from __future__ import annotations

import pytest

from sandboxd.cgroup import Hierarchy, Layout, discover

ALL = ("memory", "pids", "cpu")

PURE_V2 = (
    """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
25 22 0:22 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw
29 25 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
""",
    "0::/system.slice/sandboxd.service\n",
)

V1_WITH_EMPTY_V2 = (
    """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
33 31 0:30 / /sys/fs/cgroup/cpuacct rw,relatime - cgroup cgroup rw,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
""",
    "9:name=systemd:/\n8:pids:/\n4:memory:/jobs/a1\n2:cpuacct:/\n1:cpu:/\n0::/\n",
)

V1_JOINT = (
    """\
30 25 0:26 / /sys/fs/cgroup ro,nosuid,nodev,noexec shared:9 - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/systemd rw,nosuid shared:10 - cgroup cgroup rw,xattr,release_agent=/lib/agent,name=systemd
33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid,nodev,noexec,relatime shared:15 - cgroup cgroup rw,cpu,cpuacct
34 30 0:30 / /sys/fs/cgroup/memory rw,nosuid,nodev,noexec,relatime shared:16 - cgroup cgroup rw,memory
35 30 0:31 / /sys/fs/cgroup/pids rw,nosuid,nodev,noexec,relatime shared:17 - cgroup cgroup rw,pids
""",
    "11:pids:/user.slice\n10:memory:/user.slice\n8:cpu,cpuacct:/user.slice\n1:name=systemd:/user.slice\n",
)

HYBRID_SPLIT = (
    """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
""",
    "4:memory:/\n0::/system.slice/x.service\n",
)

# The container's own cgroup namespace: both root and membership are "/".
DOCKER_V2 = (
    """\
1432 1400 0:201 / / rw,relatime master:320 - overlay overlay rw,lowerdir=/l,upperdir=/u,workdir=/w
1441 1436 0:26 / /sys/fs/cgroup ro,nosuid,nodev,noexec,relatime - cgroup2 cgroup rw,nsdelegate,memory_recursiveprot
""",
    "0::/\n",
)

# The host's cgroup namespace, but only the container's part of the tree is mounted.
DOCKER_V1_HOST_NAMESPACE = (
    """\
640 630 0:29 /docker/c0ffee /sys/fs/cgroup/cpu,cpuacct rw,nosuid master:11 - cgroup cgroup rw,cpu,cpuacct
641 630 0:30 /docker/c0ffee /sys/fs/cgroup/memory rw,nosuid master:12 - cgroup cgroup rw,memory
642 630 0:31 /docker/c0ffee /sys/fs/cgroup/pids rw,nosuid master:13 - cgroup cgroup rw,pids
""",
    "10:memory:/docker/c0ffee/inner\n9:cpu,cpuacct:/docker/c0ffee\n8:pids:/docker/other\n",
)


def hierarchy(layout: Layout, controller: str) -> Hierarchy:
    return next(found for found in layout.v1 if controller in found.controllers)


def test_pure_v2_holds_every_controller() -> None:
    layout = discover(*PURE_V2)
    assert layout.version == "v2"
    assert layout.v1 == ()
    assert layout.v2 == Hierarchy(2, "/sys/fs/cgroup", ALL, "/sys/fs/cgroup/system.slice/sandboxd.service")
    assert layout.missing == ()


def test_controllers_on_v1_leave_the_empty_v2_mount_as_twin() -> None:
    layout = discover(*V1_WITH_EMPTY_V2)
    assert layout.version == "hybrid"
    assert [found.controllers for found in layout.v1] == [("memory",), ("pids",), ("cpu",)]
    assert hierarchy(layout, "memory").own == "/sys/fs/cgroup/memory/jobs/a1"
    assert layout.v2 == Hierarchy(2, "/sys/fs/cgroup/unified", (), "/sys/fs/cgroup/unified")
    assert layout.accounting is not None
    assert layout.accounting.mount_point == "/sys/fs/cgroup/cpuacct"


def test_joint_mount_is_one_hierarchy_and_options_are_no_controllers() -> None:
    layout = discover(*V1_JOINT)
    assert layout.version == "v1"
    assert layout.v2 is None
    assert [found.mount_point for found in layout.v1] == [
        "/sys/fs/cgroup/memory",
        "/sys/fs/cgroup/pids",
        "/sys/fs/cgroup/cpu,cpuacct",
    ]
    assert layout.accounting is not None
    assert layout.accounting.mount_point == hierarchy(layout, "cpu").mount_point
    assert layout.missing == ()


def test_v2_gets_the_controllers_that_no_v1_hierarchy_has() -> None:
    layout = discover(*HYBRID_SPLIT)
    assert layout.version == "hybrid"
    assert [found.controllers for found in layout.v1] == [("memory",)]
    assert layout.v2 == Hierarchy(
        2, "/sys/fs/cgroup/unified", ("pids", "cpu"), "/sys/fs/cgroup/unified/system.slice/x.service"
    )


def test_container_with_its_own_cgroup_namespace_sees_a_read_only_root() -> None:
    layout = discover(*DOCKER_V2)
    assert layout.v2 == Hierarchy(2, "/sys/fs/cgroup", ALL, "/sys/fs/cgroup", read_only=True)


def test_membership_is_translated_through_the_root_of_the_mount() -> None:
    layout = discover(*DOCKER_V1_HOST_NAMESPACE)
    assert hierarchy(layout, "memory").own == "/sys/fs/cgroup/memory/inner"
    assert hierarchy(layout, "cpu").own == "/sys/fs/cgroup/cpu,cpuacct"
    assert hierarchy(layout, "pids").own is None


@pytest.mark.parametrize(
    ("mount_root", "membership"),
    [
        pytest.param("/a", "/ab", id="only-a-common-prefix"),
        pytest.param("/../..", "/", id="root-above-our-namespace"),
        pytest.param("/", "/../sibling", id="cgroup-above-our-namespace"),
    ],
)
def test_cgroup_outside_the_mount_has_no_path(mount_root: str, membership: str) -> None:
    layout = discover(f"29 25 0:26 {mount_root} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", f"0::{membership}\n")
    assert layout.v2 is not None
    assert layout.v2.own is None


def test_writable_mount_that_shows_our_cgroup_is_preferred() -> None:
    mountinfo = """\
28 25 0:26 / /ro ro - cgroup2 cgroup2 rw
29 25 0:26 /elsewhere /part rw - cgroup2 cgroup2 rw
30 25 0:26 / /mnt/with\\040space rw - cgroup2 cgroup2 rw
"""
    layout = discover(mountinfo, "0::/here (deleted)\n")
    assert layout.v2 is not None
    assert layout.v2.own == "/mnt/with space/here"
    assert not layout.v2.read_only


def test_host_without_cgroups_misses_every_controller() -> None:
    layout = discover("22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n", "")
    assert layout == Layout(v1=(), v2=None, accounting=None, missing=ALL)


def test_damaged_lines_are_left_out() -> None:
    layout = discover("29 25 0:26 / /sys/fs/cgroup rw\n\n- cgroup2\nx - cgroup2 y z\n", "nonsense\n0:/\n")
    assert layout.missing == ALL
