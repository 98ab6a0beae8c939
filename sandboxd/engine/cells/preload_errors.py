"""Why a policy's libraries cannot be preloaded, in words that name the import and the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sandboxd.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sandboxd.rootfs.interpreter import Interpreter

__all__ = ["not_preloaded"]


def not_preloaded(answer: Mapping[str, Any], python: Interpreter, policy: str) -> Unavailable:
    """For the *answer* of a zygote on *python* that does not serve *policy*."""
    if answer.get("threads"):
        return _left_threads(answer["threads"], policy)
    if answer.get("shared"):
        return _left_shared(answer["shared"], policy)
    step, missing = answer.get("step"), [str(name) for name in answer.get("missing") or ()]
    if missing:
        packages = " ".join(dict.fromkeys(name.partition(".")[0] for name in missing))
        fix = f"install it for that interpreter: {python.executable} -m pip install {packages}"
        what = f"not installed, which the policy's [runtime] section imports: {', '.join(missing)}"
        return Unavailable("preload", what, fix=fix)
    where = "warmup" if step == "warmup" else f"preload of {step!r}"
    return Unavailable("preload", f"{where} failed: {answer.get('error')}", fix="mend the policy's [runtime] section")


def _left_threads(found: Sequence[dict[str, str]], policy: str) -> Unavailable:
    threads = "; ".join(f"{one['name']!r}, there since {_step(one)}" for one in found)
    what = f"policy {policy!r}: a zygote forks with one thread only, and others still run: {threads}"
    fix = (
        f"have {_step(found[0])} start no thread, by a setting of the library, or end the thread in warmup; or take "
        "that out of [runtime] and leave it to the programs"
    )
    return Unavailable("threads", what, fix=fix)


def _left_shared(found: Sequence[dict[str, str]], policy: str) -> Unavailable:
    areas = "; ".join(f"{one['name']}, there since {_step(one)}: {one['why']}" for one in found)
    what = f"policy {policy!r}: its cells would share memory that they can write to, and a copy will not do: {areas}"
    fix = (
        f"have {_step(found[0])} map it MAP_PRIVATE, or unmap it in warmup; or take that out of [runtime] and leave it "
        "to the programs"
    )
    return Unavailable("shared-memory", what, fix=fix)


def _step(one: dict[str, str]) -> str:
    names = {"warmup": "the warmup", "": "the start"}
    return names.get(one["step"], f"the import of {one['step']!r}")
