"""One virtual machine: made, booted, given what to do, and its results brought back. README.md tells of its parts."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.vm.plan import Leg, Machine

HERE = Path(__file__).resolve().parent
TREE = HERE.parent.parent
BROKEN = 125
RESULTS_BYTES = 256 << 20  # sparse
START_SECONDS = 420  # until the guest's first word; 25 s on an idle host
END_SECONDS = 180  # from the end of the legs' own time limits to power-off
CONSOLE_LINES = 60
STEP_SECONDS = 0.5

# TCG only: with -cx16, as this qemu's emulation of cmpxchg16b (7.2) corrupts the guest's slab sooner or later.
QEMU = ("qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "Nehalem,-cx16")
# From mitigations on: what costs an emulator much and shows nothing here, such as pages that are cleared twice.
CMDLINE = (
    "root=/dev/vda rw console=ttyS0 panic=-1 systemd.show_status=false quiet mitigations=off"
    " init_on_alloc=0 hardened_usercopy=off randomize_kstack_offset=off nokaslr"
)
FIRST_PROCESS = "/usr/local/sbin/first-process"
"""The init of a machine without systemd; build puts it into the disk."""


class Built(NamedTuple):
    """What build made, by its files."""

    disk: str
    kernel: str
    initrd: str
    older_kernel: str
    older_initrd: str
    newest_kernel: str
    newest_initrd: str
    wheel: str
    package: str


def build() -> Built:
    """Make or find the files. Raises CalledProcessError."""
    done = subprocess.run([HERE / "build"], stdout=subprocess.PIPE, check=True, text=True)
    return Built(*done.stdout.splitlines())


@dataclass(frozen=True)
class Outcome:
    """What became of a machine: pytest's worst exit status, or BROKEN; one line for each leg; what went wrong."""

    status: int
    lines: list[str]
    wrong: str | None = None


def boot(built: Built, machine: Machine, results: Path, *, memory: int, say: Callable[[str], None]) -> Outcome:
    """From power-on to power-off; the machine is gone afterwards in any case. *results* gets its files."""
    legs = machine.legs
    _empty(results)
    with tempfile.TemporaryDirectory(dir=Path(built.disk).parent, prefix="run.") as name:
        work = Path(name)
        _pack(work / "payload", built, legs)
        with (work / "results").open("wb") as file:
            file.truncate(RESULTS_BYTES)
        wrong = _power(_command(built, machine, work, memory), work, sum(leg.seconds for leg in legs), say)
        _unpack(work, results)
    statuses = {leg.name: _status(results / leg.name) for leg in legs}
    lines = [f"{leg.name}: status {statuses[leg.name]}; {_summary(results / leg.name)}" for leg in legs]
    missing = [name for name, status in statuses.items() if status is None]
    if wrong is None and missing:
        wrong = f"it powered off without results of {', '.join(missing)}"
    if wrong is not None:
        tail = (results / "console.txt").read_text("utf-8", "replace").splitlines()[-CONSOLE_LINES:]
        return Outcome(BROKEN, lines, "\n".join([wrong, "--- its console ends with:", *tail]))
    return Outcome(max((status or 0 for status in statuses.values()), default=0), lines)


def _pack(target: Path, built: Built, legs: Sequence[Leg]) -> None:
    """One tar file: the tree as it is now without the package, which comes from the wheel, and what is to be done."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate"],
        cwd=TREE,
        capture_output=True,
        check=True,
    ).stdout
    names = [name for name in map(os.fsdecode, listed.split(b"\0")) if name and not name.startswith("sandboxd/")]
    passed = {
        "LANG": "C.UTF-8",
        "SANDBOXD_VM": "1",
        "SANDBOXD_DEB": f"/srv/{Path(built.package).name}",
        **{name: os.environ[name] for name in ("CI",) if name in os.environ},
    }
    texts = {"environment": "".join(f"{name}={value}\0" for name, value in passed.items())}
    for number, leg in enumerate(legs):
        place = f"legs/{number:02}-{leg.name}"
        texts[f"{place}/mode"] = leg.mode
        texts[f"{place}/seconds"] = str(leg.seconds)
        texts[f"{place}/ends_by_reset"] = "yes" if leg.ends_by_reset else "no"
        texts[f"{place}/arguments"] = "".join(f"{one}\0" for one in leg.arguments)
    with tarfile.open(target, "w") as archive:
        for name in names:
            if os.path.lexists(TREE / name):
                archive.add(TREE / name, name, recursive=False)
        for brought in (Path(built.wheel), Path(built.package)):
            archive.add(brought, brought.name)
        for name, text in texts.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))


def _command(built: Built, machine: Machine, work: Path, memory: int) -> list[str]:
    kernel, initrd = {
        "6.1": (built.older_kernel, built.older_initrd),
        "6.12": (built.kernel, built.initrd),
        "newest": (built.newest_kernel, built.newest_initrd),
    }[machine.kernel]
    cmdline = " ".join([CMDLINE, *machine.cmdline, *(() if machine.systemd else (f"init={FIRST_PROCESS}",))])
    drives = (
        f"file={built.disk},snapshot=on,cache=unsafe",
        f"file={work / 'payload'},readonly=on",
        f"file={work / 'results'},cache=unsafe",
    )
    return [
        *QEMU,
        *("-smp", str(machine.cpus), "-m", str(memory)),
        *("-kernel", kernel, "-initrd", initrd, "-append", cmdline),
        *("-nodefaults", "-no-user-config", "-display", "none", "-device", "virtio-rng-pci"),
        *(() if machine.resets else ("-no-reboot",)),  # a panic ends it
        *("-serial", f"file:{work / 'console'}", "-serial", f"file:{work / 'output'}"),
        *(word for drive in drives for word in ("-drive", f"{drive},if=virtio,format=raw")),
    ]


def _power(command: list[str], work: Path, seconds: int, say: Callable[[str], None]) -> str | None:
    """Boot, and wait for the end; returns what went wrong."""
    started = time.monotonic()
    for name in ("console", "output"):
        (work / name).touch()
    offset = 0
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(work)}) as machine:
        _running.add(machine)
        try:
            while True:
                status: int | None = None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = machine.wait(STEP_SECONDS)
                with (work / "output").open("rb") as file:
                    file.seek(offset)
                    new = file.read()
                offset += len(new)
                say(new.decode("utf-8", "replace").replace("\r", ""))
                if status is not None:
                    return f"qemu ended with status {status}" if status else None
                spent = time.monotonic() - started
                if not offset and spent > START_SECONDS:
                    return f"it said nothing for {START_SECONDS} s"
                if spent > START_SECONDS + seconds + END_SECONDS:
                    return f"it did not power off within {spent:.0f} s"
        finally:
            _running.discard(machine)
            machine.kill()  # nothing to a machine that has ended


_running: set[subprocess.Popen[bytes]] = set()


def end_all() -> None:
    """Power off every machine of this process."""
    for machine in list(_running):
        machine.kill()


def _unpack(work: Path, results: Path) -> None:
    for name in ("console", "output"):
        shutil.copyfile(work / name, results / f"{name}.txt")
    with contextlib.suppress(tarfile.TarError, FileNotFoundError), tarfile.open(work / "results") as archive:
        archive.extractall(results, filter="data")


def _status(leg: Path) -> int | None:
    """pytest's, as the guest wrote it; None when there is none."""
    try:
        return int((leg / "status").read_text())
    except (FileNotFoundError, ValueError):
        return None


def _summary(leg: Path) -> str:
    try:
        suite = next(ET.parse(leg / "junit.xml").iter("testsuite"))  # noqa: S314 - our own guest's
    except (OSError, ET.ParseError, StopIteration):
        return "no JUnit XML"
    counts = ", ".join(f"{suite.get(name)} {name}" for name in ("tests", "failures", "errors", "skipped"))
    return f"{counts}, {float(suite.get('time', 'nan')):.0f} s"


def _empty(results: Path) -> None:
    """Make the directory, without what an earlier run put there. Raises FileExistsError when it holds other things."""
    if results.exists() and any(results.iterdir()):
        if not (results / "console.txt").exists():
            raise FileExistsError(f"{results} holds other things than results")
        shutil.rmtree(results)
    results.mkdir(parents=True, exist_ok=True)
