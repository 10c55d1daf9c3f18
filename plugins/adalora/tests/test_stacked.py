"""LoRA and AdaLoRA beside each other and beside methods that read outputs or weights, on a BERT and a Llama."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tests.support.toy_readers import DirectionPlugin, ScalePlugin, SecretivePlugin
from tunerkit_testing.registering import registered

pytest.importorskip("tunerkit_lora", reason="LoRA is another distribution")
pytest.importorskip("transformers")
from tunerkit_testing import transformers_cases

METHODS = ("lora", "adalora", "toy-scale", "toy-direction")
PAIRS = list(itertools.product(METHODS, repeat=2))
IDS = torch.randint(61, (4, 7), generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore:.*new")  # heads, which these tests leave alone


@pytest.fixture(autouse=True, scope="module")
def _toys() -> Iterator[None]:
    with registered(ScalePlugin(), DirectionPlugin(), SecretivePlugin()):
        yield


def stacked(model: nn.Module, methods: tuple[str, ...]) -> Any:
    """``model`` with an adapter of each method at all linear layers, with random values, in eval mode."""
    for number, method in enumerate(methods):
        tunerkit.wrap(model, method, {"targets": ["all-linear"]}, adapter=f"a{number}", seed=number)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".tunerkit." in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("build", [transformers_cases.bert, transformers_cases.llama], ids=["bert", "llama"])
@pytest.mark.parametrize("methods", PAIRS, ids="+".join)
@torch.no_grad()
def test_every_pair_in_both_orders_merges_to_what_it_computes(
    build: Callable[[], nn.Module], methods: tuple[str, str]
) -> None:
    """Each pair of a method that adds and one that reads, also a method beside itself; unmerged bit for bit."""
    model = stacked(build(), methods)
    adapted = model(IDS).logits
    with tunerkit.disabled(model):
        assert (model(IDS).logits - adapted).abs().max() > 1e-3 * adapted.abs().max()
    tunerkit.merge(model)
    assert (model(IDS).logits - adapted).abs().max() <= 1e-5 * adapted.abs().max()
    tunerkit.unmerge(model)
    assert torch.equal(model(IDS).logits, adapted)


@pytest.mark.parametrize("other", ["lora", "adalora"])
def test_a_reader_that_does_not_say_so_is_given_the_base_s_own_output(other: str) -> None:
    """What they add is not seen by it, so all of them merge."""
    model = stacked(transformers_cases.bert(), (other, "toy-secretive"))
    with torch.no_grad():
        adapted = model(IDS).logits
        merged = tunerkit.merge(model)(IDS).logits
    assert (merged - adapted).abs().max() <= 1e-5 * adapted.abs().max()


def test_adapters_are_merged_without_running_a_layer() -> None:
    """Also those that read outputs, or do not say whether they do."""
    model = stacked(transformers_cases.bert(), ("lora", "adalora", "toy-scale", "toy-secretive"))
    ran: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, args: ran.append(module))
    tunerkit.merge(model)
    assert not ran
