"""Blocks of host ids: parsing, planning, and the lock that keeps a block to one engine."""

from __future__ import annotations

import errno
import os
import pwd
import stat
import subprocess
import sys
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest

from sandboxd.errors import Unavailable
from sandboxd.ids import ranges
from sandboxd.ids.ranges import FALLBACK, FIRST_CELL_ID, MAX_SLOTS, IdRange, SlotIds

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root claims blocks of ids")

WHOLE = IdRange(0, 0xFFFF_FFFF)


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """An /etc without users and without subordinate ids."""
    directory = tmp_path / "etc"
    directory.mkdir()
    return directory


@pytest.fixture
def lock_file(tmp_path: Path) -> Path:
    return tmp_path / "ids.lock"


def grant(etc: Path, line: str) -> None:
    for name in ("subuid", "subgid"):
        (etc / name).write_text(line + "\n")


# Parsing


def test_subordinate_ids_are_parsed_in_order() -> None:
    text = "alice:100000:65536\n1000:165536:65536\n"
    assert ranges.parse_subordinate(text) == [("alice", IdRange(100_000, 65_536)), ("1000", IdRange(165_536, 65_536))]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "# a comment",
        "alice",
        "alice:1",
        "alice:1:2:3",
        "alice:-1:5",
        "alice:1:0",
        ":1:2",
        "alice:0x10:5",
        "alice:1:99999999999",
        "alice:4294967295:2",
        "alice:\u0661:5",
    ],
)
def test_malformed_subordinate_lines_are_left_out(line: str) -> None:
    assert ranges.parse_subordinate(f"{line}\nbob:300000:10\n") == [("bob", IdRange(300_000, 10))]


def test_configured_range_is_parsed() -> None:
    assert ranges.parse_config(" 1000000:65536 ") == IdRange(1_000_000, 65_536)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "base:count"),
        ("1000000", "base:count"),
        ("1000000-65536", "base:count"),
        ("a:b", "base:count"),
        ("-5:65536", "base:count"),
        ("1000000:100", "at least 2048"),
        ("0:65536", "must lie in"),
        ("4294900000:90000", "must lie in"),
        ("60000:8192", "nobody"),
    ],
)
def test_wrong_configured_range_says_what_is_allowed(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ranges.parse_config(text)


def test_id_map_names_the_ids_that_are_valid_here() -> None:
    text = "         0     100000      65536\n     65536     300000       1000\n"
    assert ranges.parse_id_map(text) == [IdRange(0, 65_536), IdRange(65_536, 1_000)]


def test_login_ids_are_the_third_column() -> None:
    assert ranges.login_ids("root:x:0:0::/:\nbad\nx:y:z:q\nbob:x:1000:1000::/:\n") == [IdRange(0, 1), IdRange(1000, 1)]


# Planning


@pytest.mark.parametrize(
    ("source", "size", "expected"),
    [
        (IdRange(100_000, 65_536), 8_192, [IdRange(100_000 + 8_192 * i, 8_192) for i in range(8)]),
        (IdRange(100_000, 10_000), 8_192, [IdRange(100_000, 8_192)]),
        (IdRange(100_000, 5_000), 8_192, [IdRange(100_000, 5_000)]),
        (IdRange(100_000, 2_047), 8_192, []),
    ],
    ids=["even", "remainder-dropped", "small-whole", "too-small"],
)
def test_range_is_cut_into_blocks(source: IdRange, size: int, expected: list[IdRange]) -> None:
    assert list(ranges.cut(source, size)) == expected


def test_blocks_of_one_range_never_overlap() -> None:
    blocks = list(ranges.cut(FALLBACK, ranges.FALLBACK_BLOCK))
    assert len(blocks) > 1000
    assert all(first.end == second.base for first, second in pairwise(blocks))
    assert all(FALLBACK.contains(block) for block in blocks)


@pytest.mark.parametrize("start", [0, 1, 5, 9, 10, 25])
def test_blocks_of_several_ranges_are_all_offered_from_any_start(start: int) -> None:
    areas = [IdRange(100_000, 65_536), IdRange(300_000, 5_000), IdRange(400_000, 100), IdRange(500_000, 10_000)]
    whole = [block for area in areas for block in ranges.cut(area, 8_192)]
    assert len(whole) == 10
    first = start % 10
    assert list(ranges.cut_all(areas, 8_192, start)) == whole[first:] + whole[:first]
    assert list(ranges.cut_all(areas[2:3], 8_192, start)) == []


@pytest.mark.parametrize(
    "other",
    [
        IdRange(0, 0x80000),  # logins, system and dynamic users
        IdRange(0x80000, 0x70000000 - 0x80000),  # systemd-nspawn
        IdRange(0x7FFE0000, 0x10000),  # systemd's foreign images
        IdRange(200_000, 2_000_000_000),  # SSSD's Active Directory range
        IdRange(1 << 31, 1 << 31),  # read as negative by parts of the kernel
    ],
)
def test_fallback_range_belongs_to_nobody_else(other: IdRange) -> None:
    assert not FALLBACK.overlaps(other)


def test_fallback_blocks_are_aligned_to_sixteen_bits() -> None:
    assert all(block.base & 0xFFFF == 0 for block in ranges.cut(FALLBACK, ranges.FALLBACK_BLOCK))


def test_blocks_with_taken_or_unmapped_ids_are_passed_over() -> None:
    blocks = list(ranges.cut(IdRange(100_000, 4 * 8_192), 8_192))
    taken = [IdRange(blocks[1].end - 1, 1)]
    mapped = [IdRange(0, blocks[3].end - 1)]
    assert list(ranges.usable(blocks, mapped, taken)) == [blocks[0], blocks[2]]


def test_common_ids_of_two_lists() -> None:
    uids = [IdRange(100, 50), IdRange(500, 10)]
    assert ranges.intersect(uids, [IdRange(120, 1000)]) == [IdRange(120, 30), IdRange(500, 10)]


# Slots


def test_every_slot_has_an_id_of_its_own_inside_the_block() -> None:
    block = IdRange(FALLBACK.base, ranges.EXPLICIT_BLOCK)
    slots = SlotIds(block.base)
    host = [slots.host_uid(slot) for slot in range(slots.capacity)]
    assert len(set(host)) == MAX_SLOTS
    assert all(block.contains(IdRange(uid, 1)) for uid in host)
    assert [slots.guest_uid(slot) for slot in range(slots.capacity)] == list(slots.guest_uids)


def test_guest_ids_start_after_zygote_and_init() -> None:
    slots = SlotIds(0x78000000)
    assert (slots.guest_uid(0), slots.host_uid(7)) == (FIRST_CELL_ID, 0x78000000 + 1007)
    assert {ranges.ZYGOTE_ID, ranges.INIT_ID}.isdisjoint(slots.guest_uids)


@pytest.mark.parametrize("slot", [-1, 8, MAX_SLOTS])
def test_slot_out_of_range_is_an_error(slot: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.7"):
        SlotIds(0x78000000, 8).host_uid(slot)


@pytest.mark.parametrize("capacity", [0, -1, MAX_SLOTS + 1])
def test_capacity_is_bounded(capacity: int) -> None:
    with pytest.raises(ValueError, match="capacity"):
        SlotIds(0x78000000, capacity)


# Claims


@needs_root
def test_claim_without_any_grant_takes_a_fallback_block(etc: Path, lock_file: Path) -> None:
    with ranges.claim(etc=etc, lock_file=lock_file) as block:
        assert FALLBACK.contains(IdRange(block.base, block.count))
        assert block.count == ranges.FALLBACK_BLOCK
        assert block.uid_map == block.gid_map == f"0 {block.base} 65536\n"
        assert block.slots().capacity == MAX_SLOTS


@needs_root
def test_subordinate_ids_of_root_come_before_the_fallback(etc: Path, lock_file: Path) -> None:
    grant(etc, "root:100000:8192")
    with ranges.claim(etc=etc, lock_file=lock_file) as block:
        assert (block.base, block.count) == (100_000, 8_192)


@needs_root
def test_only_ids_granted_as_uid_and_as_gid_are_used(etc: Path, lock_file: Path) -> None:
    (etc / "subuid").write_text("root:100000:8192\n")
    (etc / "subgid").write_text("root:104096:8192\n")
    with ranges.claim(etc=etc, lock_file=lock_file) as block:
        assert (block.base, block.count) == (104_096, 4_096)
        assert block.slots().capacity == 4_096 - FIRST_CELL_ID


@needs_root
def test_configured_range_comes_before_subordinate_ids(etc: Path, lock_file: Path) -> None:
    grant(etc, "root:100000:8192")
    with ranges.claim("300000:8192", etc=etc, lock_file=lock_file) as block:
        assert block.base == 300_000


@needs_root
def test_fallback_leaves_other_users_subordinate_ids_alone(etc: Path, lock_file: Path) -> None:
    grant(etc, f"alice:{FALLBACK.base}:{FALLBACK.count - ranges.FALLBACK_BLOCK}")
    with ranges.claim(etc=etc, lock_file=lock_file) as block:
        assert block.base == FALLBACK.end - ranges.FALLBACK_BLOCK


@needs_root
def test_block_with_a_login_in_it_is_passed_over(etc: Path, lock_file: Path) -> None:
    (etc / "passwd").write_text("bob:x:300005:300005::/home/bob:/bin/sh\n")
    with ranges.claim("300000:16384", etc=etc, lock_file=lock_file) as block:
        assert block.base == 308_192


@needs_root
def test_claimed_block_holds_no_login_of_this_host(lock_file: Path) -> None:
    with ranges.claim(lock_file=lock_file) as block:
        claimed = IdRange(block.base, block.count)
        assert not [entry for entry in pwd.getpwall() if claimed.overlaps(IdRange(entry.pw_uid, 1))]


@needs_root
def test_two_claims_of_one_process_differ(etc: Path, lock_file: Path) -> None:
    with ranges.claim(etc=etc, lock_file=lock_file) as one, ranges.claim(etc=etc, lock_file=lock_file) as other:
        assert not IdRange(one.base, one.count).overlaps(IdRange(other.base, other.count))


@needs_root
def test_exhausted_range_says_so_and_is_usable_again_after_close(etc: Path, lock_file: Path) -> None:
    with ExitStack() as held:
        blocks = [held.enter_context(ranges.claim("300000:65536", etc=etc, lock_file=lock_file)) for _ in range(8)]
        assert len({block.base for block in blocks}) == 8
        with pytest.raises(Unavailable) as refusal:
            ranges.claim("300000:65536", etc=etc, lock_file=lock_file)
        assert (refusal.value.stage, refusal.value.errno) == ("ids", errno.EUSERS)
        blocks[3].close()
        blocks[3].close()
        with ranges.claim("300000:65536", etc=etc, lock_file=lock_file) as again:
            assert again.base == blocks[3].base


@needs_root
def test_blocks_of_different_size_conflict_where_they_overlap(etc: Path, lock_file: Path) -> None:
    with ranges.claim("300000:8192", etc=etc, lock_file=lock_file):
        with pytest.raises(Unavailable, match="EUSERS"):
            ranges.claim("308000:2048", etc=etc, lock_file=lock_file)
        with ranges.claim("308192:2048", etc=etc, lock_file=lock_file):
            pass


HOLDER = """
import sys
from pathlib import Path
from sandboxd.ids import ranges as ids
block = ids.claim("300000:8192", etc=Path(sys.argv[1]), lock_file=Path(sys.argv[2]))
print(block.base, flush=True)
sys.stdin.read()
"""


@needs_root
def test_block_of_another_process_is_refused_until_that_is_killed(etc: Path, lock_file: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, etc, lock_file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "300000\n"
        with pytest.raises(Unavailable, match="EUSERS"):
            ranges.claim("300000:8192", etc=etc, lock_file=lock_file)
        other.kill()
        other.wait()
        with ranges.claim("300000:8192", etc=etc, lock_file=lock_file) as block:
            assert block.base == 300_000


@needs_root
def test_claimed_block_is_not_inherited_by_an_executed_child(etc: Path, lock_file: Path) -> None:
    with ranges.claim("300000:8192", etc=etc, lock_file=lock_file):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        ranges.claim("300000:8192", etc=etc, lock_file=lock_file).close()
    finally:
        child.kill()
        child.wait()


@needs_root
def test_kernel_accepts_the_block_as_the_map_of_a_user_namespace(etc: Path, lock_file: Path) -> None:
    script = "echo; read line; cat /proc/self/uid_map /proc/self/gid_map"
    with (
        ranges.claim(etc=etc, lock_file=lock_file) as block,
        subprocess.Popen(
            ["unshare", "--user", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child,
    ):
        assert child.stdout is not None
        child.stdout.readline()
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{child.pid}/{name}").write_text(block.uid_map)
        shown, _ = child.communicate("\n")
        assert [line.split() for line in shown.splitlines()] == [["0", str(block.base), str(block.count)]] * 2


@needs_root
def test_lock_file_is_made_for_root_alone(etc: Path, lock_file: Path) -> None:
    previous = os.umask(0)
    try:
        ranges.claim(etc=etc, lock_file=lock_file).close()
    finally:
        os.umask(previous)
    assert stat.S_IMODE(lock_file.stat().st_mode) == 0o600


@needs_root
@pytest.mark.parametrize("what", ["symlink", "fifo", "directory", "open-to-others", "two-names", "foreign"])
def test_wrong_lock_file_is_refused(what: str, etc: Path, lock_file: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    if what == "symlink":
        lock_file.symlink_to(victim)
    elif what == "fifo":
        os.mkfifo(lock_file, 0o600)
    elif what == "directory":
        lock_file.mkdir()
    else:
        lock_file.touch(0o644 if what == "open-to-others" else 0o600)
        if what == "two-names":
            victim.hardlink_to(lock_file)
        if what == "foreign":
            os.chown(lock_file, 12_345, 12_345)
    with pytest.raises(Unavailable, match="lock file") as refusal:
        ranges.claim(etc=etc, lock_file=lock_file)
    assert refusal.value.stage == "ids"
    assert not victim.exists() or what == "two-names"


@needs_root
@pytest.mark.parametrize("lock", ["missing/ids.lock"])
def test_missing_directory_of_the_lock_file_is_named(lock: str, etc: Path, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="ENOENT") as refusal:
        ranges.claim(etc=etc, lock_file=tmp_path / lock)
    assert refusal.value.errno == errno.ENOENT


@needs_root
@pytest.mark.parametrize("_attempt", range(3))
def test_refused_claim_leaves_no_descriptor(_attempt: int, etc: Path, lock_file: Path) -> None:
    with ranges.claim("300000:8192", etc=etc, lock_file=lock_file):
        before = os.listdir("/proc/self/fd")
        with pytest.raises(Unavailable):
            ranges.claim("300000:8192", etc=etc, lock_file=lock_file)
        assert len(os.listdir("/proc/self/fd")) == len(before)


@needs_root
def test_wrong_configuration_is_unavailable_with_the_reason(etc: Path, lock_file: Path) -> None:
    with pytest.raises(Unavailable, match="base:count") as refusal:
        ranges.claim("many", etc=etc, lock_file=lock_file)
    assert refusal.value.errno == errno.EINVAL


@needs_root
def test_range_that_logins_fill_is_unavailable(etc: Path, lock_file: Path) -> None:
    (etc / "passwd").write_text("bob:x:300005:300005::/home/bob:/bin/sh\n")
    with pytest.raises(Unavailable, match="ERANGE"):
        ranges.claim("300000:8192", etc=etc, lock_file=lock_file)
    assert not lock_file.exists()


def test_subordinate_ranges_are_found_by_name_and_by_number(etc: Path) -> None:
    (etc / "subuid").write_text("root:100000:10\n0:200000:10\nother:300000:10\n")
    assert ranges.subordinate_ranges("root", etc) == ([IdRange(100_000, 10), IdRange(200_000, 10)], [])


def test_subordinate_ranges_of_an_unknown_user_go_by_name(etc: Path) -> None:
    grant(etc, "no-such-user:100000:10")
    assert ranges.subordinate_ranges("no-such-user", etc) == ([IdRange(100_000, 10)],) * 2
