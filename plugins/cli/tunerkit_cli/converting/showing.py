"""What ``tunerkit show`` prints of an adapter: an output folder, or files of any format."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tunerkit.errors import cut
from tunerkit_cli.converting.description import Shown, describe_adapter
from tunerkit_cli.converting.printing import ranks_in_words, size_in_words
from tunerkit_cli.report.rank_map import rank_map, rank_table
from tunerkit_cli.report.record import VERSION, read
from tunerkit_cli.report.verdict import failure
from tunerkit_cli.settings import write_settings
from tunerkit_cli.telling import say
from tunerkit_transformers.output_folder import read_run
from tunerkit_transformers.run_folder import NAME as RECORD, RECIPE

_LONGEST = 20_000  # characters of settings that are printed as YAML, which takes a second for a megabyte
_WIDEST = 16  # columns of a table; a UNet has a hundred


def show_adapter(source: str, console: Console, *, as_json: bool = False) -> None:
    """Print method, base, ranks, size and config; of an output folder also its metrics and its training."""
    if not os.path.isfile(os.path.join(source, RECORD)) and not _has_only_begun(source):
        found = describe_adapter(source)
        _print(console, _facts(found), found.ranks, found.settings, attrs.asdict(found) if as_json else None)
        return
    run = read_run(source)
    record = run.record
    facts = _facts_of_run(Path(source), run.source, record)
    full = max(record.get("caps", record.get("ranks", {})).values(), default=None)
    _print(console, facts, record.get("ranks", {}), record.get("config", {}), record if as_json else None, full=full)


def _has_only_begun(source: str) -> bool:
    """Whether it is the folder of a run that has not ended: it has a recipe, and no adapter yet."""
    if not os.path.isfile(os.path.join(source, RECIPE)):
        return False
    from tunerkit_transformers.adapter_files import has_no_record  # imports torch

    return not has_no_record(source)


def _print(
    console: Console,
    facts: Mapping[str, str],
    ranks: Mapping[str, int],
    settings: Mapping[str, Any],
    record: Mapping[str, Any] | None,
    *,
    full: int | None = None,
) -> None:
    """Print JSON if there is a ``record``, else lines. A rank of ``full`` has the full colour."""
    if record is not None:
        say(console, json.dumps(record, indent=2, ensure_ascii=False, default=str))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, escape(cut(value)))
    console.print(table)
    if ranks and len((drawn := rank_map(ranks)).matrices) <= _WIDEST:
        console.print(rank_table(drawn, initial=full))
    say(console, "config:")
    text = json.dumps(settings, ensure_ascii=False, default=str)
    say(console, text if len(text) > _LONGEST else write_settings(dict(settings)))


def _facts(found: Shown) -> dict[str, str]:
    facts = {
        "format": found.format,
        "method": found.method,
        "base": found.base,
        "class": found.model_class,
        "labels": str(found.labels or ""),
        "ranks": ranks_in_words(found.ranks) if found.ranks else "",
        "copies": ", ".join(found.copies),
        "parameters": "" if found.parameters is None else f"{found.parameters:,}",
        "size": size_in_words(found.size) if found.size else "",
        "steps": "" if found.steps is None else str(found.steps),
    }
    return {name: value for name, value in facts.items() if value}


def _facts_of_run(folder: Path, source: str, record: Any) -> dict[str, str]:
    parameters, recipe = record.get("parameters", {}), record.get("recipe", {})
    size = (folder / "adapter.safetensors").stat().st_size if (folder / "adapter.safetensors").is_file() else 0
    known = {name: record[name] for name in ("problems", "restarts") if record.get(name)}
    wrong = read({"version": VERSION, "task": "", "method": "", **known})
    facts = {
        "problems": failure(wrong.problems),
        "restarts": "; ".join(map(str, wrong.restarts)),
        "task": str(record["task"]),
        "method": str(record.get("method")),
        "base": source,
        "quantisation": str(record.get("model", {}).get("quantisation") or ""),
        "labels": ", ".join(record.get("labels", [])[:20]),
        "rows": ", ".join(f"{count} {name}" for name, count in record.get("rows", {}).items()),
        "left out": "; ".join(
            f"{count} {name}: {why}"
            for name, reasons in record.get("left_out", {}).items()
            for why, count in reasons.items()
        ),
        "metrics": ", ".join(f"{name} {value:.4f}" for name, value in record.get("metrics", {}).items()),
        "parameters": f"{parameters.get('trained', 0):,} of {parameters.get('all', 0):,} trained",
        "file": f"{size / 2**20:.2f} MiB",
        "steps": str(record.get("steps")),
        "precision": str(record.get("precision") or ""),
        "training": ", ".join(f"{name}={value}" for name, value in recipe.get("training", {}).items()),
    }
    return {name: value for name, value in facts.items() if value}
