"""Two adapters that multiply one layer: what each changes is added, and one warning names both."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit import hooks
from tunerkit_testing.checks.probing import fill_

# Its rows replace the base's, so ΔW depends on W too, and nothing is multiplied.
REPLACES = "trainable-tokens"
SETTINGS: dict[str, dict[str, Any]] = {
    "ln-tuning": {"targets": ["norm"]},
    REPLACES: {"tokens": [1, 2], "targets": ["ids"]},
}
OURS = sorted(
    name for name, info in tunerkit.methods().items() if info.distribution == "tunerkit-methods" and info.error is None
)


def wrapped(method: str, seed: int, *names: str) -> Any:
    torch.manual_seed(seed)
    norm = nn.LayerNorm(8)
    nn.init.uniform_(norm.weight)
    model = nn.ModuleDict({"ids": nn.Embedding(8, 8), "layer": nn.Linear(8, 8), "norm": norm})
    for name in names:
        tunerkit.wrap(model, method, SETTINGS.get(method, {"targets": ["layer"]}), adapter=name, seed=0)
    return model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything that the adapters hold, also what they made of the weight at their start and do not save."""
    every = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in every.items() if ".tunerkit." in name}


def change(model: nn.Module) -> Tensor:
    """ΔW of the adapter, by merging."""
    (target,) = tunerkit.tuner(model).targets
    before = target.module.get_parameter("weight").detach().clone()
    tunerkit.merge(model)
    return target.module.get_parameter("weight").detach() - before


@pytest.mark.parametrize("method", OURS)
def test_a_method_multiplies_if_its_change_depends_on_the_weight(method: str) -> None:
    """The same adapter on two bases. What adds the same to both is right beside any other adapter."""
    one, other = wrapped(method, 0, "a"), wrapped(method, 1, "a")
    fill_(one, 0.1)
    for name, tensor in tensors(other).items():
        tensor.data = tensors(one)[name].data.clone()
    depends = not torch.allclose(change(one), change(other), atol=1e-5)
    assert depends == (hooks.registry.get(method).multiplies or method == REPLACES)


@pytest.mark.parametrize("method", ["ia3", "oft", "lora-fa"])
def test_two_adapters_that_multiply_are_warned_of_once_by_wrap_and_activate(method: str) -> None:
    """Where they are active together; others, and taking turns, are right. The sum is what both add alone."""
    texts = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", tunerkit.TunerkitWarning)
        model = wrapped(method, 0, "a", "b")
        texts.append([str(each.message) for each in told])
        for names in (["a"], ["b"], ["b", "a"]):
            told.clear()
            tunerkit.activate(model, names)
            texts.append([str(each.message) for each in told])
    said = [len(each) for each in texts]
    assert said == ([1, 0, 0, 1] if hooks.registry.get(method).multiplies else [0, 0, 0, 0])
    assert all("multiply 'layer': their changes to the base are added" in text for each in texts for text in each)
    assert not texts[3] or texts[3][0].startswith("adapters 'b' and 'a'")
    fill_(model, 0.1)
    x, outputs = torch.randn(3, 8), {}
    for active in ([], ["a"], ["b"], ["a", "b"]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", tunerkit.TunerkitWarning)
            tunerkit.activate(model, active)
        outputs[tuple(active)] = model["layer"](x).detach()
    added = outputs[("a",)] + outputs[("b",)] - outputs[()]
    assert torch.allclose(outputs["a", "b"], added, atol=1e-5)
