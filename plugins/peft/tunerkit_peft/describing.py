"""Say what a PEFT folder holds, without a model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tunerkit import Description
from tunerkit_peft import files
from tunerkit_peft.settings import Settings, read_settings
from tunerkit_peft.weights import Weights, open_weights

_CLASSES: Final[Mapping[str, str]] = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
# Heads with one row for each class, whatever the module is called. Without a task, the model's class decides.
_MAYBE_CLASSES: Final = ("SEQ_CLS", "TOKEN_CLS", None)


def describe(path: Path) -> Description:
    """Describe the adapter at a path from its settings, and from the names and shapes of its tensors.

    Raises:
        FileError: The files are damaged, or hold what tunerkit cannot.
    """
    found = files.find(path)
    settings = read_settings(found.config)
    weights = open_weights(found.weights)
    fields: Mapping[str, Any] = json.loads(found.config.read_text(encoding="utf-8"))  # `read_settings` has checked it
    return Description(
        method=settings.kind.lower(),
        base=settings.base,
        model_class=_model_class(fields),
        labels=_labels(weights) if fields.get("task_type") in _MAYBE_CLASSES else 0,
        ranks={path: _rank(weights, path) for path in weights.factors},
        settings=_told(settings),
    )


def _model_class(fields: Mapping[str, Any]) -> str:
    """The class of transformers: by the task, or by the class that was wrapped without one."""
    known = _CLASSES.get(str(fields.get("task_type")), "")
    mapping = fields.get("auto_mapping")
    own = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return known or (own if isinstance(own, str) else "")


def _labels(weights: Weights) -> int:
    """The fewest rows of a matrix that is trained in full: a head's last layer. 0 if there is none."""
    shapes = [weights.shape(key) for name, key in weights.others.items() if name.endswith("weight")]
    return min((shape[0] for shape in shapes if len(shape) == 2), default=0)


def _rank(weights: Weights, path: str) -> int:
    """The rows of A; 0 if it is missing, which `read` refuses."""
    name = weights.factors[path].get("A")
    return weights.shape(name)[0] if name else 0


def _told(settings: Settings) -> dict[str, object]:
    told: dict[str, object] = {
        "rank": settings.rank,
        "alpha": settings.alpha,
        "dropout": settings.dropout,
        "rslora": settings.rslora,
        "rank_pattern": dict(settings.ranks),
        "alpha_pattern": dict(settings.alphas),
        "bias": settings.bias,
        "modules_to_save": list(settings.copies),
    }
    if settings.kind == "ADALORA":
        told |= {"target_rank": settings.schedule.target_r, "total_steps": settings.schedule.total_step}
    return told
