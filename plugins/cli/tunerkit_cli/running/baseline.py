"""The baseline: train only the head, on what the frozen base computes for it."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from tunerkit import TunerkitError
from tunerkit_cli.preparing.trainer import build_trainer, trainer_arguments
from tunerkit_cli.tasks.base import Row, Task
from tunerkit_cli.tasks.texts import short_to_long
from tunerkit_cli.watching.callback import Watching
from tunerkit_transformers.pretrained import Pretrained

# A head trained alone needs a much higher learning rate than adapters. On the demo, lower rates than these are worse.
HEAD_RATES = (3e-2, 1e-1, 3e-1)
_BATCH = 64


class NoBaselineError(TunerkitError):
    """The head of this model cannot be trained on features that are computed once."""


class HeadAlone(nn.Module):
    """A head on features that are computed once."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(
        self, features: Tensor, labels: Tensor | None = None, length: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return ``logits`` (rows, classes), and the ``loss`` if there are ``labels`` (rows,)."""
        logits = self.head(features)
        found = {"logits": logits}
        if labels is not None:
            found = {"loss": nn.functional.cross_entropy(logits, labels), **found}
        return found


def head_alone(
    task: Task,
    loaded: Pretrained,
    heads: Sequence[str],
    rows: tuple[Sequence[Row], Sequence[Row]],
    training: dict[str, Any],
    console: Console,
    folder: Path,
) -> dict[str, Any]:
    """Train the same new head on the frozen base: same rows, order and epochs, at three rates; the best counts."""
    began = time.perf_counter()
    (path,) = heads
    head = loaded.model.get_submodule(path)
    # Computed once and kept, without dropout, which in the frozen part would only add noise.
    features = [_features(task, loaded, head, task.encode(part, loaded)) for part in rows]
    start = {name: value.clone() for name, value in head.state_dict().items()}
    scores: dict[float, dict[str, float]] = {}
    for rate in HEAD_RATES:
        head.load_state_dict(start)
        trainer = _trained(task, head, features[0], {**training, "learning_rate": rate}, console, folder)
        scores[rate] = task.evaluate(trainer, features[1]).metrics
    best = max(scores, key=lambda rate: scores[rate][task.main_metric])
    return {
        "what": "the head alone, on the frozen base; the best of three learning rates by held-out rows",
        "metrics": scores[best],
        "learning_rate": best,
        "by_learning_rate": {f"{rate:g}": score[task.main_metric] for rate, score in scores.items()},
        "heads": list(heads),
        "parameters": sum(p.numel() for p in head.parameters()),
        "seconds": time.perf_counter() - began,
    }


def _trained(
    task: Task, head: nn.Module, features: Any, training: dict[str, Any], console: Console, folder: Path
) -> Any:
    """Train the head on its features and return the trainer, which evaluates it. Nothing is written."""
    from transformers import Trainer

    settings = {
        **training,
        "save_strategy": "no",
        "report_to": "none",
        "load_best_model_at_end": False,
    }
    arguments = trainer_arguments(task, settings, folder, precision="fp32", has_eval=False)
    watching = Watching(console, None, f"head alone, {training['learning_rate']:g}")
    model = HeadAlone(head.requires_grad_(True))
    trainer = build_trainer(Trainer, arguments, model=model, train_dataset=features, callbacks=[watching])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a head's operations are so small that sharing them takes longer than they do
    try:  # Ctrl-C stops at once: the adapter is written, and the head's training takes seconds
        trainer.train()
    finally:
        torch.set_num_threads(threads)
        watching.close()
    return trainer


@torch.inference_mode()
def _features(task: Task, loaded: Pretrained, head: nn.Module, dataset: Any) -> Any:
    """What the base computes as the head's input: a dataset of ``features``, ``labels`` and the texts' ``length``."""
    import datasets
    from torch.utils.data import DataLoader

    kept: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, args: kept.append(args[0].float().cpu()))
    collator = task.trainer_settings(loaded)["data_collator"]
    lengths = [len(ids) for ids in dataset["input_ids"]]
    order = short_to_long(dataset)
    inputs = dataset.remove_columns("labels").select(order)
    loaded.model.eval()
    try:
        for batch in DataLoader(inputs, batch_size=_BATCH, collate_fn=collator):
            loaded.model(**{name: value.to(loaded.model.device) for name, value in batch.items()})
    finally:
        hook.remove()
    if any(features.dim() != 2 for features in kept):
        raise NoBaselineError("no baseline: the head takes more than one vector for each row")
    features = torch.empty(len(order), kept[0].shape[1])
    features[order] = torch.cat(kept)
    columns = {"features": features.numpy(), "labels": dataset["labels"], "length": lengths}
    dataset = datasets.Dataset.from_dict(columns)
    return dataset.with_format("torch", columns=["features", "labels"], output_all_columns=True)
