"""What surrounds a cell whatever it does: descriptors, secrets, randomness, what a run before it left, its end."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import psutil
import pytest

from sandboxd import Limits, Sandbox
from sandboxd.policy import load
from tests.support.patience import SLOWER

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CALLER = """
import os, sys
from sandboxd import Sandbox
for path in ("/", sys.argv[1], sys.argv[1]):
    for _ in range(20):
        os.set_inheritable(os.open(path, os.O_RDONLY), True)
os.dup2(os.open("/", os.O_RDONLY), 100, inheritable=True)
with Sandbox() as sandbox:
    result = sandbox.run(sys.argv[2])
    sys.stdout.write(result.stdout + result.stderr)
"""


def test_cell_has_three_pipes_and_its_channel(sandbox: Sandbox) -> None:
    code = (
        "import json, os; print(json.dumps([os.readlink(f'/proc/self/fd/{fd}').partition(':')[0] for fd in range(4)]))"
    )
    assert json.loads(sandbox.run(code).stdout) == ["pipe", "pipe", "pipe", "socket"]


def test_descriptors_that_the_caller_leaks_do_not_arrive(tmp_path: Path) -> None:
    """The caller holds the host's root and a secret open without close-on-exec (CVE-2024-21626)."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    code = """
    import json, os
    found = []
    for fd in range(256):
        try:
            os.fstat(fd)
        except OSError:
            continue
        found.append(fd)
    print(json.dumps([found, os.getcwd()]))
    """
    answer = subprocess.run(
        [sys.executable, "-c", CALLER, str(secret), textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        close_fds=False,
        timeout=60,
    )
    assert json.loads(answer.stdout) == [[0, 1, 2, 3], "/workspace"]


# Every mapping of its own that can be read, for two halves of a secret that stand together.
SEARCH = """
import os, re
first, second = FIRST, SECOND
found = []
with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", buffering=0) as memory:
    for line in maps:
        span, mode = line.split()[:2]
        start, end = (int(part, 16) for part in span.split("-"))
        if "r" not in mode or "[v" in line:
            continue
        memory.seek(start)
        try:
            content = memory.read(end - start)
        except OSError:
            continue
        places = [match.end() for match in re.finditer(re.escape(first), content)]
        found += [start + place for place in places if content.startswith(second, place)]
        del content
print(found)
"""


def search_for(secret: str) -> str:
    half = len(secret) // 2
    return SEARCH.replace("FIRST", repr(secret[:half].encode())).replace("SECOND", repr(secret[half:].encode()))


def test_search_finds_a_secret_that_is_there(sandbox: Sandbox) -> None:
    secret = secrets.token_hex(16)
    result = sandbox.run(search_for(secret), stdin=b"x", env={"KEPT": secret})
    assert result.stdout.strip() not in ("", "[]"), result.stderr


def test_no_secret_of_the_caller_or_of_another_run_is_in_memory(
    monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox
) -> None:
    secret = secrets.token_hex(16)
    monkeypatch.setenv("SANDBOXD_TEST_SECRET", secret)
    with Sandbox() as fresh:
        for one in (sandbox, fresh):
            before = one.run(f"kept = {secret!r}; print(kept)", args=[secret], stdin=secret, env={"KEPT": secret})
            assert before.stdout.strip() == secret
            after = one.run(search_for(secret))
            assert (after.status, after.stdout.strip()) == ("ok", "[]"), after.stderr


RANDOM = """
import json, os, random, secrets, ssl, sys, tempfile, uuid
drawn = {
    "random": random.random(),
    "getrandbits": random.getrandbits(64),
    "urandom": os.urandom(8).hex(),
    "secrets": secrets.token_hex(8),
    "ssl": ssl.RAND_bytes(8).hex(),
    "uuid1": str(uuid.uuid1()),
    "uuid4": str(uuid.uuid4()),
    "mktemp": tempfile.mktemp(),
    "mkdtemp": tempfile.mkdtemp(),
}
if "numpy" in sys.modules:
    import numpy
    drawn["numpy"] = numpy.random.random()
    drawn["default_rng"] = numpy.random.default_rng().random()
print(json.dumps(drawn))
"""
WARMUP = """
import os, random, secrets, ssl, tempfile, uuid
random.random(), secrets.token_hex(8), ssl.RAND_bytes(8), uuid.uuid4(), uuid.uuid1(), tempfile.mktemp()
"""


@pytest.fixture(scope="module")
def warmed() -> Iterator[Sandbox]:
    """A zygote whose generators have all been used: what they hold is what its cells begin with."""
    plain = load("default")
    preload = ["random", "secrets", "ssl", "tempfile", "uuid"]
    warmup = WARMUP
    try:
        import numpy  # noqa: F401
    except ImportError:
        pass
    else:
        preload.append("numpy.random")
        warmup += "import numpy; numpy.random.random()\n"
    runtime = plain.runtime.model_copy(update={"preload": tuple(preload), "warmup": warmup})
    with Sandbox(plain.model_copy(update={"runtime": runtime})) as sandbox:
        yield sandbox


def test_cells_of_one_zygote_draw_different_numbers(warmed: Sandbox) -> None:
    results = [warmed.run(RANDOM) for _ in range(3)]
    assert [result.stderr for result in results] == [""] * 3
    drawn = [json.loads(result.stdout) for result in results]
    assert {name: len({one[name] for one in drawn}) for name in drawn[0]} == dict.fromkeys(drawn[0], 3)


def test_processes_of_a_program_draw_different_numbers(warmed: Sandbox) -> None:
    """The at-fork hooks of libraries are there in a cell as in any program."""
    result = warmed.run("""
import os, random
for _ in range(4):
    if os.fork() == 0:
        print(random.random(), flush=True)
        os._exit(0)
    os.wait()
""")
    assert len(set(result.stdout.split())) == 4, result.stderr


@pytest.mark.cgroup
def test_nothing_of_a_run_is_there_for_the_next(sandbox: Sandbox) -> None:
    planted = sandbox.run("""
import json, os, sys
for place in ("/workspace", "/tmp", "/dev/shm"):
    open(place + "/planted", "w").close()
open("/workspace/json.py", "w").write("planted = True")
open("/workspace/sitecustomize.py", "w").write("raise SystemExit('planted')")
json.planted = sys.planted = True
os.environ["PLANTED"] = "1"
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.close(1); os.close(2)
        while True:
            open("/tmp/alive", "w").close()
""")
    assert planted.status == "ok", planted.stderr
    found = sandbox.run("""
import json, os, sys
found = {place: os.listdir(place) for place in ("/workspace", "/tmp", "/dev/shm", "/code")}
found["state"] = [hasattr(json, "planted"), hasattr(sys, "planted"), "PLANTED" in os.environ]
found["processes"] = [name for name in os.listdir("/proc") if name.isdigit() and name != str(os.getpid())]
print(json.dumps(found))
""")
    assert json.loads(found.stdout) == {
        "/workspace": [],
        "/tmp": [],
        "/dev/shm": [],
        "/code": ["main.py"],
        "state": [False, False, False],
        "processes": [],
    }


@pytest.mark.cgroup
def test_no_process_of_a_run_outlives_it(sandbox: Sandbox) -> None:
    result = sandbox.run(
        """
import os, signal
for _ in range(20):
    if os.fork() == 0:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.fork()
        while True:
            os.sched_yield()
""",
        limits=Limits(wall_seconds=3 * SLOWER),
    )
    assert result.status == "ok"
    assert result.isolation is not None
    uid = result.isolation.uid
    owners = [process.info["uids"] for process in psutil.process_iter(["uids"])]
    assert not [one for one in owners if one and uid in one]


def test_two_engines_never_share_a_host_id(sandbox: Sandbox) -> None:
    with Sandbox() as other:
        ids = set()
        for one in (sandbox, other):
            result = one.run("1")
            assert result.isolation is not None
            ids.add(result.isolation.uid)
    assert len(ids) == 2
    assert 0 not in ids


def test_receipt_of_a_lowered_wall_says_so() -> None:
    with Sandbox(_walls_down=["landlock"]) as lowered:
        result = lowered.run("1")
    assert result.isolation is not None
    assert "wall left out: landlock" in result.isolation.missing
