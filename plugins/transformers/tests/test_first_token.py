"""Classifiers that read the first token alone: values and gradients are those of all tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers.modeling_outputs import SequenceClassifierOutput

import tunerkit
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin
from tunerkit_transformers.first_token import _KINDS, obstacle, read_first_

SMALL: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 16, "embedding_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 32, "hidden_dim": 32, "pad_token_id": 0},
}


def made(kind: str, make: Any = AutoModelForSequenceClassification, **more: Any) -> Any:
    torch.manual_seed(0)
    model = make.from_config(AutoConfig.for_model(kind, **SMALL, **more)).double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def trainer_of(model: Any) -> Any:
    return SimpleNamespace(model=model, evaluation_loop=lambda: computed(model))


def computed(model: Any, **more: Any) -> tuple[Any, dict[str, torch.Tensor], int]:
    """The loss of two rows of unlike length, the gradients, and how many tokens leave the last layer."""
    ids = torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    norm = [module for module in model.modules() if type(module).__name__.endswith("LayerNorm")][-1]
    seen: list[int] = []
    hook = norm.register_forward_hook(lambda module, given, output: seen.append(output.shape[1]))
    loss = model(input_ids=ids * mask, attention_mask=mask, labels=torch.tensor([0, 1]), **more).loss
    hook.remove()
    model.zero_grad()
    loss.backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return loss.detach(), found, seen[0]


def assert_same(found: Any, wanted: Any) -> None:
    """The loss and the gradients."""
    assert torch.allclose(found[0], wanted[0], rtol=1e-12)
    assert found[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        assert (found[1][name] - value).abs().max() <= 1e-9 * max(1e-3, float(value.abs().max())), name


KINDS = [
    *((kind, False, None) for kind in _KINDS),
    *((kind, True, reentrant) for kind in ("bert", "deberta", "distilbert") for reentrant in (False, True)),
]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated", "ignore:pre_classifier may be new")
@pytest.mark.parametrize(("kind", "adapted", "reentrant"), KINDS)
def test_losses_and_gradients_are_those_of_all_tokens(kind: str, adapted: bool, reentrant: bool | None) -> None:
    """In training and in the trainer's evaluations the last layer computes one token.

    Elsewhere it computes all, as somebody may read them. Gradient checkpointing runs the layer as the forward did.
    """
    model = made(kind)
    if adapted:  # also the layers behind the attention
        with registered(LowRankPlugin()):
            tunerkit.wrap(model, "toy-low-rank", {"targets": "all-linear", "train_modules": ["classifier"]})
        for each in model.double().parameters():
            each.data += each.requires_grad * 0.1
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    whole = computed(model)
    assert whole[2] == 9
    trainer = trainer_of(model)
    hooks = hooks_of(model)
    assert obstacle(trainer) is None
    assert model.training
    assert hooks_of(model) == hooks
    read_first_(trainer)
    read_first_(trainer)  # once is enough
    assert hooks_of(model) == hooks + 4
    found = computed(model)
    assert found[2] == 1
    assert_same(found, whole)
    model.eval()
    evaluated, whole = trainer.evaluation_loop(), computed(model)
    assert (whole[2], evaluated[2]) == (9, 1)
    assert_same(evaluated, whole)


def hooks_of(model: Any) -> int:
    return sum(len(each._forward_pre_hooks) + len(each._forward_hooks) for each in model.modules())


@pytest.mark.parametrize("kind", ["bert", "deberta", "distilbert"])
def test_hidden_states_that_are_asked_for_are_those_of_all_tokens(kind: str) -> None:
    """In a call, as a loss of one's own may pool them; also after a forward that has failed, and in the base alone."""
    model = made(kind)
    ids = torch.full((2, 7), 3)
    wanted = model(ids, output_hidden_states=True).hidden_states[-1]
    read_first_(trainer_of(model))
    assert computed(model)[2] == 1
    assert computed(model, output_attentions=True)[2] == 9
    assert torch.equal(model(ids, output_hidden_states=True).hidden_states[-1], wanted)
    with pytest.raises(IndexError):
        model(ids + 64)
    assert torch.equal(model.base_model(ids).last_hidden_state, wanted)
    assert computed(model)[2] == 1


def test_models_that_read_other_tokens_stay_as_they_are() -> None:
    """Other tasks and kinds, hidden states that are asked for, and what a trial shows."""
    mean = made("bert")
    kind = type(mean)

    class MeanForSequenceClassification(kind):  # type: ignore[misc, valid-type]  # a class of transformers
        def forward(self, input_ids: torch.Tensor) -> SequenceClassifierOutput:
            return SequenceClassifierOutput(logits=self.classifier(self.bert(input_ids).last_hidden_state.mean(1)))

    mean.__class__ = MeanForSequenceClassification
    found = {
        "is no classifier of BERT's kind": (made("gpt2"), made("bert", AutoModelForTokenClassification)),
        "the model returns more than logits": (made("bert", output_hidden_states=True),),
        "MeanForSequenceClassification reads more than the first token": (mean,),
    }
    for text, models in found.items():
        for model in models:
            assert str(obstacle(trainer_of(model))).endswith(text)
