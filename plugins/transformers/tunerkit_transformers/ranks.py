"""The ranks of an adapter under a Trainer: a summary for its logs, and a file with the rank of every target."""

import json
import os
from collections.abc import MutableMapping
from pathlib import Path

from tunerkit.plugin import Tuner
from tunerkit.plugin.trainers import budget, replace

# An environment variable, as for the Trainer's reporters: logging is a setting of neither the method nor the model.
_EACH_TARGET = "TUNERKIT_LOG_TARGET_RANKS"
_OFF = ("", "0", "false")


def rows_of(tuner: Tuner, logged: MutableMapping[str, int], *, prefix: str) -> dict[str, float]:
    """Return the log entries of an adapter with a budget: the budget, and mean, minimum and maximum rank.

    With ``TUNERKIT_LOG_TARGET_RANKS=1`` in the environment, the first row after an allocation also has the rank of each
    target: hundreds of entries for a large model.

    Args:
        tuner: The adapter's handle.
        logged: The number of logged allocations, by adapter name; it is updated.
        prefix: The prefix of all keys.
    """
    spent = budget(tuner, None)
    if spent is None:
        return {}
    ranks = tuner.ranks()
    row: dict[str, float] = {f"{prefix}budget": spent}
    if ranks:
        row[f"{prefix}rank_mean"] = sum(ranks.values()) / len(ranks)
        row[f"{prefix}rank_min"], row[f"{prefix}rank_max"] = min(ranks.values()), max(ranks.values())
    if os.environ.get(_EACH_TARGET, "").lower() not in _OFF and logged.get(tuner.name) != len(tuner.history):
        logged[tuner.name] = len(tuner.history)
        row |= {f"{prefix}rank/{path}": rank for path, rank in ranks.items()}
    return row


def write_ranks(tuner: Tuner, folder: Path) -> None:
    """Write ``ranks.json`` beside the adapter's file, if the adapter has a budget. Nothing reads it back."""
    spent = budget(tuner, None)
    if spent is not None:
        found = {"step": tuner.steps, "budget": spent, "ranks": tuner.ranks()}
        replace(folder / "ranks.json", [f"{json.dumps(found, indent=1)}\n".encode()])
