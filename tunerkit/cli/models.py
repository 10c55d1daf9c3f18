"""A sequence classifier with its tokenizer, from a folder or a hub name."""

from collections.abc import Sequence
from typing import Any

import attrs
import torch
import transformers
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tunerkit.errors import TunerkitError


class ModelError(TunerkitError):
    """A model or its tokenizer cannot be loaded as a sequence classifier."""


@attrs.frozen(eq=False)
class Classifier:
    """A model, its tokenizer, the classes in the order of its outputs, and the paths of its untrained heads."""

    model: nn.Module
    tokenizer: Any
    classes: tuple[str, ...]
    heads: tuple[str, ...]


def load_classifier(source: str, classes: Sequence[str], *, seed: int) -> Classifier:
    """Load ``source`` (a local folder or a hub name) in fp32, with a head for ``classes`` drawn by ``seed``.

    Raises `ModelError` with what transformers said, in one line.
    """
    transformers.logging.set_verbosity_error()  # a report on the new head
    transformers.logging.disable_progress_bar()  # theirs would break ours
    transformers.set_seed(seed)
    names = dict(enumerate(classes))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForSequenceClassification.from_pretrained(
            source, id2label=names, label2id={name: number for number, name in names.items()}, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as problem:
        reason = " ".join(str(problem).split())
        raise ModelError(f"cannot load {source!r} as a classifier of {len(classes)} classes: {reason}") from problem
    model.config.problem_type = "single_label_classification"
    if tokenizer.pad_token_id is None:  # decoders have none; what stands there is masked out anyway
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return Classifier(model=model, tokenizer=tokenizer, classes=tuple(classes), heads=_heads(model))


def _heads(model: Any) -> tuple[str, ...]:
    """The children with parameters beside the pretrained part: what a fresh classifier must learn in full."""
    return tuple(
        name for name, child in model.named_children() if name != model.base_model_prefix and list(child.parameters())
    )
