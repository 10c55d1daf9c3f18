"""What ``tunerkit show`` prints of a folder."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tunerkit.cli.running.telling import say
from tunerkit.cli.settings import write_settings
from tunerkit.integrations.output_folder import read_run
from tunerkit.report.rank_map import rank_map
from tunerkit.report.terminal import rank_table


def show_run(folder: Path, console: Console) -> None:
    """Print method, base, metrics, ranks, sizes, config and training of a folder."""
    run = read_run(folder)
    record = run.record
    facts = Table(show_header=False, box=None)
    for name, value in _facts(folder, run.source, record).items():
        facts.add_row(name, escape(value))
    console.print(facts)
    if ranks := record.get("ranks"):
        console.print(rank_table(rank_map(ranks), initial=max(record.get("caps", ranks).values())))
    say(console, "config:")
    say(console, write_settings(dict(record.get("config", {}))))


def _facts(folder: Path, source: str, record: Any) -> dict[str, str]:
    parameters, recipe = record.get("parameters", {}), record.get("recipe", {})
    size = (folder / "adapter.safetensors").stat().st_size if (folder / "adapter.safetensors").is_file() else 0
    facts = {
        "task": str(record["task"]),
        "method": str(record.get("method")),
        "base": source,
        "labels": ", ".join(record.get("labels", [])[:20]),
        "rows": ", ".join(f"{count} {name}" for name, count in record.get("rows", {}).items()),
        "metrics": ", ".join(f"{name} {value:.4f}" for name, value in record.get("metrics", {}).items()),
        "parameters": f"{parameters.get('trained', 0):,} of {parameters.get('all', 0):,} trained",
        "file": f"{size / 2**20:.2f} MiB",
        "steps": str(record.get("steps")),
        "training": ", ".join(f"{name}={value}" for name, value in recipe.get("training", {}).items()),
    }
    return {name: value for name, value in facts.items() if value}
