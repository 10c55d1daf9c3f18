"""The benchmark of converting: a small conversion, whose numbers are plausible."""

import json
from pathlib import Path

import pytest

for _module in ("transformers", "typer", "rich", "yaml", "tunerkit_lora", "tunerkit_peft"):
    pytest.importorskip(_module, reason=f"the benchmark needs {_module}")

from rich.console import Console  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from benchmarks import convert  # noqa: E402


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_the_benchmark_measures_a_conversion(tmp_path: Path) -> None:
    """What the process of one conversion prints: seconds and memory; the adapter is written."""
    base = convert.write_base(tmp_path / "base", convert.SMALL)
    adapter = convert.write_adapter(tmp_path / "peft", convert.SMALL, base)
    done = CliRunner().invoke(
        convert.app, ["--child", str(adapter), "tunerkit", str(tmp_path / "own"), str(base)], catch_exceptions=False
    )
    found = convert.Cost(name="small", adapter=1, **json.loads(done.stdout.splitlines()[-1]))
    assert 0 < found.seconds < found.whole
    assert found.memory >= 0
    assert (tmp_path / "own" / "adapter.safetensors").is_file()
    console = Console(width=200, record=True)
    console.print(convert.table([found]))
    assert "small" in console.export_text()
