"""Classifiers that read the first token alone: values and gradients are those of all tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers.modeling_outputs import SequenceClassifierOutput

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


def computed(model: Any) -> tuple[Any, dict[str, torch.Tensor], int]:
    """The loss of two rows of unlike length, the gradients, and how many tokens leave the last layer."""
    ids = torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    norm = [module for module in model.modules() if type(module).__name__.endswith("LayerNorm")][-1]
    seen: list[int] = []
    hook = norm.register_forward_hook(lambda module, given, output: seen.append(output.shape[1]))
    loss = model(input_ids=ids * mask, attention_mask=mask, labels=torch.tensor([0, 1])).loss
    hook.remove()
    model.zero_grad()
    loss.backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return loss.detach(), found, seen[0]


@pytest.mark.parametrize("kind", _KINDS)
def test_losses_and_gradients_are_those_of_all_tokens(kind: str) -> None:
    """In training and in the trainer's evaluations the last layer computes one token.

    Elsewhere it computes all, as somebody may read them.
    """
    model = made(kind)
    loss, gradients, tokens = computed(model)
    assert tokens == 9
    trainer = trainer_of(model)
    assert obstacle(trainer) is None
    assert model.training
    read_first_(trainer)
    read_first_(trainer)  # once is enough
    assert [len(each._forward_pre_hooks) for each in model.modules() if each._forward_pre_hooks] == [1]
    found, others, tokens = computed(model)
    assert tokens == 1
    assert torch.allclose(found, loss, rtol=1e-12)
    assert others.keys() == gradients.keys()
    for name, value in gradients.items():
        assert (others[name] - value).abs().max() <= 1e-9 * max(1e-3, float(value.abs().max())), name
    whole, evaluated = computed(model.eval()), trainer.evaluation_loop()
    assert (whole[2], evaluated[2]) == (9, 1)
    assert torch.allclose(evaluated[0], whole[0], rtol=1e-12)


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
