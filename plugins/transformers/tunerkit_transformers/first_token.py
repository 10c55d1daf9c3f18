"""Classifiers that read the first token alone: behind its attention, their last layer computes no other token.

The loss and its gradients stay the same, but for the draws of dropout, whose masks there have another shape.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from tunerkit.plugin.trainers import inside

_MARK: Final = "_tunerkit_reads_first"
_KINDS: Final = ("bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "roberta", "xlm-roberta")
# The ends of paths: what follows the attention of a layer, and takes tensors (rows, tokens, width) alone.
_ATTENDED: Final = (".attention.output", ".sa_layer_norm")
_RETURNED: Final = ("output_hidden_states", "output_attentions")  # what has all tokens
_ROWS, _TOKENS = 2, 8  # that are tried
_WITHIN: Final = 1e-3  # of the greatest logit: those of other tokens differ by more


def obstacle(trainer: Any) -> str | None:
    """Return why `read_first_` cannot change a trainer's model (a sentence fragment); None if it can."""
    model = inside(trainer.model)
    name, config = type(model).__name__, getattr(model, "config", None)
    if not name.endswith("ForSequenceClassification") or getattr(config, "model_type", None) not in _KINDS:
        return f"{name} is no classifier of BERT's kind"
    if any(getattr(config, each, False) for each in _RETURNED):
        return "the model returns more than logits"
    return None if _reads_first(model) else f"{name} reads more than the first token"


def read_first_(trainer: Any) -> None:
    """Leave out what no logit depends on, in training mode and in the trainer's evaluations; call `obstacle` first."""
    model = inside(trainer.model)
    if not hasattr(model, _MARK):
        cut = _Cut()
        setattr(model, _MARK, cut)
        cut.into_(model)
        trainer.evaluation_loop = partial(cut.evaluate, trainer.evaluation_loop)


class _Cut:
    """Hooks that leave the first token alone, in forwards of the classifier that return nothing of other tokens.

    The base model may be called by itself, and then computes all of them. What is decided as its forward begins is
    valid until its next one: gradient checkpointing runs the layer again after the classifier's forward has ended.
    """

    def __init__(self, *, evaluating: bool = False) -> None:
        self.evaluating, self.classifying, self.cuts = evaluating, False, False

    def into_(self, model: Any) -> list[Any]:
        """Add the hooks, and return their handles."""
        return [
            model.register_forward_pre_hook(self.enter),
            model.register_forward_hook(self.leave, always_call=True),
            model.base_model.register_forward_pre_hook(self.decide, with_kwargs=True),
            _attended(model).register_forward_pre_hook(self.first),
        ]

    def enter(self, model: nn.Module, given: object) -> None:
        self.classifying = True

    def leave(self, model: nn.Module, given: object, output: object) -> None:
        self.classifying = False

    def decide(self, base: Any, given: object, settings: Mapping[str, Any]) -> None:
        wants_all = any(settings.get(each) or getattr(base.config, each, False) for each in _RETURNED)
        self.cuts = self.classifying and not wants_all and (base.training or self.evaluating)

    def first(self, place: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Return the first token of (rows, tokens, width)."""
        return tuple(each[:, :1] for each in given) if self.cuts else None

    def evaluate(self, loop: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a trainer's evaluation loop."""
        self.evaluating = True
        try:
            return loop(*args, **kwargs)
        finally:
            self.evaluating = False


def _attended(model: nn.Module) -> nn.Module:
    """Return what follows the attention of the last layer."""
    places: list[nn.Module] = [module for path, module in model.named_modules() if f".{path}".endswith(_ATTENDED)]
    return places[-1]


@torch.no_grad()
def _reads_first(model: Any) -> bool:
    """Whether the logits of two random texts need no other token there."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (_ROWS, _TOKENS), generator=random).to(model.device)
    modes = [(each, each.training) for each in model.modules()]
    hooks: list[Any] = []
    counts: list[int] = []  # of tokens
    try:
        own = model.eval()(input_ids=ids).logits
        hooks += _Cut(evaluating=True).into_(model)
        hooks.append(_attended(model).register_forward_hook(lambda _, given, output: counts.append(output.shape[1])))
        found = model(input_ids=ids).logits
    except Exception:  # whatever a forward raises that needs other inputs, or other shapes
        return False
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    return counts == [1] and bool((found - own).abs().max() <= _WITHIN * own.abs().max())
