"""A sequence classifier and its tokenizer, loaded from a folder or by hub name."""

from collections.abc import Sequence
from typing import Any

import attrs
import torch
import transformers
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tunerkit import TunerkitError


class ModelError(TunerkitError):
    """A model or its tokenizer cannot be loaded as a sequence classifier."""


@attrs.frozen(eq=False)
class Classifier:
    """A model, its tokenizer, the classes in the order of the logits, and the paths of its untrained heads."""

    model: nn.Module
    tokenizer: Any
    classes: tuple[str, ...]
    heads: tuple[str, ...]


def load_classifier(source: str, classes: Sequence[str], *, seed: int) -> Classifier:
    """Load ``source`` (a local folder or a hub name) in fp32, with a new head for ``classes`` initialised by ``seed``.

    Raises `ModelError` with transformers' message, on one line.
    """
    transformers.logging.set_verbosity_error()  # it would report that the head is new
    transformers.logging.disable_progress_bar()  # it would break our own progress bar
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
    if tokenizer.pad_token_id is None:  # decoders have none; padding is masked out anyway
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return Classifier(model=model, tokenizer=tokenizer, classes=tuple(classes), heads=_heads(model))


def _heads(model: Any) -> tuple[str, ...]:
    """The children with parameters outside the pretrained part: the new layers, to be trained in full."""
    return tuple(
        name for name, child in model.named_children() if name != model.base_model_prefix and list(child.parameters())
    )
