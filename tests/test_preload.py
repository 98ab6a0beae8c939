"""What imports and the warm-up leave in the zygote: no second thread, and nothing writable that cells would share."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest

from sandboxd import Result, Sandbox
from tests.modes import policy_of


def inside(sandbox: Sandbox, code: str, **arguments: Any) -> Result:
    """Run *code*, whose indentation is the test's; it must end well."""
    result = sandbox.run(textwrap.dedent(code), **arguments)
    assert result.status == "ok", (result.status, result.stderr)
    return result


# --- threads ------------------------------------------------------------------------------------------------------


def test_the_data_policy_starts_where_pyarrow_is_installed() -> None:
    """pandas imports it, and its jemalloc would start a thread."""
    pytest.importorskip("pyarrow")
    code = """
        import os, sys
        print("pyarrow" in sys.modules, len(os.listdir("/proc/self/task")))
        import pandas, pyarrow
        table = pandas.DataFrame({
            "number": range(1000), "text": ["a", "\u00fc"] * 500, "day": pandas.date_range("2024-01-01", periods=1000)
        })
        table.to_parquet("table.parquet")
        print(pandas.read_parquet("table.parquet").equals(table), pyarrow.Table.from_pandas(table).num_rows)
        pool = pyarrow.jemalloc_memory_pool()
        kept = pyarrow.allocate_buffer(1 << 20, memory_pool=pool)
        print(pool.backend_name, kept.size)
    """
    with Sandbox(policy_of("data")) as sandbox:
        assert inside(sandbox, code).stdout == "True 1\nTrue 1000\njemalloc 1048576\n"
