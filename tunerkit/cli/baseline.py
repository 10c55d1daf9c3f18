"""The baseline: train only the heads, on the frozen base model."""

import time
from collections.abc import Sequence

import attrs
from rich.console import Console

import tunerkit
from tunerkit import Tuner
from tunerkit.cli.task import Job, Outcome, Task, fit, say, score
from tunerkit.cli.training import Recipe, Score

# A head trained alone needs a much higher learning rate than adapters. On the demo, lower rates than these are worse.
HEAD_RATES = (3e-2, 1e-1, 3e-1)


def compare(task: Task, job: Job, tuner: Tuner, outcome: Outcome, console: Console) -> dict[str, object]:
    """Train the same heads on the frozen base model: same rows, order and epochs, at three learning rates.

    The best rate is chosen by held-out accuracy, which favours this baseline.
    """
    model = tunerkit.unwrap(task.classifier.model)
    heads = [place.path for place in tuner.copies]
    if not heads:
        say(console, "no baseline: the settings do not train any module in full")
        return {}
    began = time.perf_counter()
    scores = {
        rate: head_only(task, attrs.evolve(job.recipe, learning_rate=rate), heads, console) for rate in HEAD_RATES
    }
    best = max(scores, key=lambda rate: scores[rate].accuracy)
    gain = 100 * (outcome.score.accuracy - scores[best].accuracy)
    say(
        console,
        f"head only: accuracy {scores[best].accuracy:.4f} (base frozen, {', '.join(heads)} trained in full on the same "
        f"rows and epochs; best of learning rates {', '.join(f'{rate:g}' for rate in HEAD_RATES)})",
    )
    say(console, f"{job.method} is {gain:+.1f} points from head-only tuning")
    return {
        "what": "base frozen, heads trained in full; best learning rate by held-out accuracy",
        "heads": heads,
        "accuracy": scores[best].accuracy,
        "learning_rate": best,
        "accuracy_by_learning_rate": {f"{rate:g}": score.accuracy for rate, score in scores.items()},
        "seconds": time.perf_counter() - began,
        "parameters": tunerkit.trainable_parameters(model).trainable,
    }


def head_only(task: Task, recipe: Recipe, heads: Sequence[str], console: Console) -> Score:
    """Run the baseline once, then restore the heads.

    Dropout is off: in the frozen part it only adds noise that slows the head down.
    """
    model = task.classifier.model
    model.requires_grad_(False)
    start = {head: {k: v.clone() for k, v in model.get_submodule(head).state_dict().items()} for head in heads}
    for head in heads:
        model.get_submodule(head).requires_grad_(True)
    fit(task, recipe, console, title=f"head only, {recipe.learning_rate:g}", dropout=False, must_converge=False)
    scored = score(task)
    for head in heads:
        model.get_submodule(head).load_state_dict(start[head])
    return scored
