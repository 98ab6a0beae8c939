"""From an engine's start to its first run: what is served early, and what is made ready while it is."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from sandboxd import Sandbox
from tests.support.engine import in_engine

if TYPE_CHECKING:
    from pathlib import Path

ROOT: Final = pytest.mark.skipif(os.geteuid() != 0, reason="an engine in this process tree needs root")


@ROOT
def test_cells_are_served_before_the_warmup_is_foreseen_and_replaced_afterwards() -> None:
    look = """
async def look(engine):
    # The survey runs each statement twice more.
    warmup = "import json, time\\ntime.sleep(0.5)\\njson.dumps([1] * 1000)\\n"
    made = await engine.policies.get("", Policy(name="slow", runtime=Runtime(preload=("json",), warmup=warmup)).plain())
    learning = made.zygote.facts.learning, made.zygote.warm_at
    await until(lambda: len(parked(made)) == made.pool.target)
    early = parked(made)
    still = made.zygote.facts.learning
    await until(lambda: made.zygote.warm_at is not None)
    await until(lambda: len(parked(made)) == made.pool.target and not set(early) & set(parked(made)))
    late = [cell.made_at > made.zygote.warm_at for cell in parked(made)]
    return [learning, still, made.zygote.facts.learning, late]
"""
    learning, still, afterwards, late = in_engine(look)
    assert learning == [True, None]
    assert (still, afterwards) == (True, False)
    assert late == [True, True]


@ROOT
def test_without_a_warmup_there_is_nothing_to_learn() -> None:
    look = """
async def look(engine):
    made = await engine.policies.get("", Policy(name="plain", runtime=Runtime(preload=("json",))).plain())
    return [made.zygote.facts.learning, made.zygote.warm_at]
"""
    assert in_engine(look) == [False, None]


@ROOT
@pytest.mark.parametrize("likely", [True, False])
@pytest.mark.parametrize("preload", [(), ("json",)])
def test_what_was_foreseen_and_not_taken_is_ended(likely: bool, preload: tuple[str, ...]) -> None:
    look = f"""
async def look(engine):
    engine.prestart({likely})
    early = dict(early_zygotes(engine))
    body = next(iter(early.values()), None)
    made = await engine.policies.get("", Policy(name="one", runtime=Runtime(preload={preload!r})).plain())
    return [len(early_zygotes(engine)), guess(engine) is None, body is made.zygote if body else None]
"""
    left, no_guess, taken = in_engine(look)
    assert (left, no_guess) == (0, True)
    if not likely:
        assert taken is True


@ROOT
def test_a_zygote_foreseen_for_another_interpreter_does_not_stay() -> None:
    look = """
async def look(engine):
    engine.prestart(False)
    body = early_zygotes(engine)[Interpreter.current()]
    early_zygotes(engine).clear()
    early_zygotes(engine)["another"] = body
    await engine.policies.get("", Policy(name="one").plain())
    return [len(early_zygotes(engine)), body.lost]
"""
    assert in_engine(look) == [0, True]


@ROOT
def test_a_library_that_sets_the_collector_keeps_its_setting(tmp_path: Path) -> None:
    policy = tmp_path / "collector.toml"
    policy.write_text('name = "collector"\n[runtime]\nwarmup = "import gc; gc.set_threshold(123, 4, 5)"\n')
    with Sandbox(policy=policy) as chosen, Sandbox() as usual:
        code = "import gc\nprint(gc.get_threshold(), gc.isenabled())"
        assert chosen.run(code).stdout == "(123, 4, 5) True\n"
        plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert usual.run(code).stdout == plain


@ROOT
def test_matplotlib_knows_its_fonts_and_leaves_no_file() -> None:
    pytest.importorskip("matplotlib")
    code = (
        "import os, matplotlib.font_manager as m\n"
        "print(os.path.exists(m.findfont('DejaVu Sans')), len(m.fontManager.ttflist) > 10, os.listdir('/tmp'))"
    )
    with Sandbox(policy="data") as sandbox:
        assert sandbox.run(code).stdout == "True True []\n"
