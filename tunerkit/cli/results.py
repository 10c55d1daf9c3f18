"""The metrics and plots of a run, as files."""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console

import tunerkit
from tunerkit import Tuner
from tunerkit.cli.task import Job, Outcome, Task, say
from tunerkit.report.rank_map import rank_map


def metrics(task: Task, job: Job, tuner: Tuner, outcome: Outcome) -> dict[str, Any]:
    """Collect all metrics of the run, as values that JSON can hold."""
    owner = tunerkit.methods()[job.method]
    return {
        "method": job.method,
        "model": task.source,
        "data": task.data,
        "classes": list(task.classifier.classes),
        "rows": {"train": len(task.train.ids), "held_out": len(task.held_out.ids)},
        "accuracy": outcome.score.accuracy,
        "loss": outcome.score.loss,
        "train_losses": [round(loss, 6) for loss in outcome.losses],
        "seconds": outcome.seconds,
        "device": str(task.device),
        "parameters": {"trained": outcome.parameters.trainable, "all": outcome.parameters.total},
        "steps": tuner.steps,
        "budget": {"start": outcome.history[0].budget, "end": tuner.budget(), "live": sum(tuner.ranks().values())},
        "ranks": tuner.ranks(),
        "history": [
            {"step": change.step, "budget": change.budget, "ranks": list(change.ranks.values())}
            for change in outcome.history
        ],
        "config": tunerkit.unstructure(tuner.config),
        "recipe": {**attrs.asdict(job.recipe), "max_length": job.max_length},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "tunerkit")},
            owner.distribution: owner.version,
        },
    }


def write_json(path: Path, record: Mapping[str, object]) -> None:
    """Write ``record`` as indented, standard JSON."""
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_pictures(folder: Path, method: str, tuner: Tuner, outcome: Outcome, console: Console) -> None:
    """Write ``ranks.png`` and ``budget.png``. Without matplotlib, print a line that says how to install it."""
    try:
        from tunerkit.report import plots  # needs the extra [plot], which [cli] does not include
    except ModuleNotFoundError:
        say(console, 'no plots: matplotlib is not installed; pip install "tunerkit[plot]"')
        return
    initial = max(outcome.history[0].ranks.values(), default=None)
    title = f"{method}: live ranks after {tuner.steps} steps"
    plots.draw_ranks(rank_map(tuner.ranks()), title=title, initial=initial).savefig(folder / "ranks.png", dpi=150)
    unit = str(tunerkit.unstructure(tuner.config).get("budget_unit", "rank"))
    figure = plots.draw_budget(outcome.history, title=f"{method}: budget and ranks", unit=unit)
    figure.savefig(folder / "budget.png", dpi=150)
