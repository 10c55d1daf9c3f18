"""The baseline: the head alone, on what the frozen base computes for it. scikit-learn fits it."""

import time
from typing import Any

import torch
from torch import Tensor, nn

from tunerkit import TunerkitError
from tunerkit_cli.tasks.base import Task
from tunerkit_cli.tasks.texts import short_to_long
from tunerkit_transformers.pretrained import Pretrained

_BATCH = 64


def head_alone(task: Task, loaded: Pretrained, path: str, rows: tuple[Any, Any]) -> dict[str, Any]:
    """Fit the head at a path on the frozen base, by the first encoded rows, and measure it on the others."""
    import numpy
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    began = time.perf_counter()
    head = loaded.model.get_submodule(path)
    (features, labels), (held_out, truth) = (_features(task, loaded, head, part) for part in rows)
    if not (numpy.isfinite(features).all() and numpy.isfinite(held_out).all()):
        raise TunerkitError("no baseline: what the base computes is not finite everywhere")
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(features, labels)
    logits = numpy.full((len(truth), loaded.model.config.num_labels), -numpy.inf)
    logits[:, fitted.classes_] = fitted.predict_log_proba(held_out)  # a class may be in the held-out rows alone
    loss = -float(logits[numpy.arange(len(truth)), truth].mean())
    return {
        "what": "the head alone, as logistic regression on the frozen base",
        "metrics": {**task.scores(logits, truth), "loss": loss},
        "heads": [path],
        "parameters": sum(p.numel() for p in head.parameters()),
        "seconds": time.perf_counter() - began,
    }


@torch.inference_mode()
def _features(task: Task, loaded: Pretrained, head: nn.Module, rows: Any) -> tuple[Any, Any]:
    """What the base computes as the head's input, without dropout (rows, width), and the class numbers (rows,)."""
    import numpy
    from torch.utils.data import DataLoader

    kept: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, args: kept.append(args[0].float().cpu()))
    order = short_to_long(rows)
    inputs = rows.remove_columns("labels").select(order)
    loaded.model.eval()
    try:
        for batch in DataLoader(inputs, _BATCH, collate_fn=task.trainer_settings(loaded)["data_collator"]):
            loaded.model(**{name: value.to(loaded.model.device) for name, value in batch.items()})
    finally:
        hook.remove()
    if any(features.dim() != 2 for features in kept):
        raise TunerkitError("no baseline: the head takes more than one vector for each row")
    return torch.cat(kept).numpy(), numpy.array(list(rows["labels"]))[order]
