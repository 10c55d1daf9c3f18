"""Classifiers that read the first token alone: behind its attention, their last layer computes no other token."""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from tunerkit.plugin.trainers import inside

_MARK: Final = "_tunerkit_reads_first"
_KINDS: Final = ("bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "roberta", "xlm-roberta")
# The ends of paths: what follows the attention of a layer, and takes tensors (rows, tokens, width) alone.
_ATTENDED: Final = ("attention.output", "sa_layer_norm")
_ROWS, _TOKENS = 2, 8  # that are tried
_WITHIN: Final = 1e-3  # of the greatest logit: those of other tokens differ by more


def obstacle(trainer: Any) -> str | None:
    """Return why `read_first_` cannot change a trainer's model (a sentence fragment); None if it can."""
    model = inside(trainer.model)
    name, config = type(model).__name__, getattr(model, "config", None)
    if not name.endswith("ForSequenceClassification") or getattr(config, "model_type", None) not in _KINDS:
        return f"{name} is no classifier of BERT's kind"
    if any(getattr(config, each, False) for each in ("output_hidden_states", "output_attentions")):
        return "the model returns more than logits"
    return None if _reads_first(model) else f"{name} reads more than the first token"


def read_first_(trainer: Any) -> None:
    """Leave out what no logit depends on, in training mode and in the trainer's evaluations; call `obstacle` first."""
    place = _attended(inside(trainer.model))
    if not hasattr(place, _MARK):
        setattr(place, _MARK, True)
        place.register_forward_pre_hook(_first_in_training)
        trainer.evaluation_loop = partial(_with_first, place, trainer.evaluation_loop)


def _with_first(place: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function with the first token alone at ``place``."""
    hook = place.register_forward_pre_hook(_first)
    try:
        return call(*args, **kwargs)
    finally:
        hook.remove()


def _first(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the first token of (rows, tokens, width)."""
    return tuple(each[:, :1] for each in given)


def _first_in_training(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    return _first(module, given) if module.training else None


def _attended(model: nn.Module) -> nn.Module:
    """Return what follows the attention of the last layer."""
    places: list[nn.Module] = [module for path, module in model.named_modules() if path.endswith(_ATTENDED)]
    return places[-1]


@torch.no_grad()
def _reads_first(model: Any) -> bool:
    """Whether the logits of two random texts need no other token there."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (_ROWS, _TOKENS), generator=random).to(model.device)
    modes = [(each, each.training) for each in model.modules()]
    try:
        own = model.eval()(input_ids=ids).logits
        found = _with_first(_attended(model), model, input_ids=ids).logits
    except Exception:  # whatever a forward raises that needs other inputs, or other shapes
        return False
    finally:
        for module, mode in modes:
            module.training = mode
    return bool((found - own).abs().max() <= _WITHIN * own.abs().max())
