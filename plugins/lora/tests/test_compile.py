"""Tests of LoRA in compiled models."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import tunerkit

cases = pytest.importorskip("tunerkit.testing.transformers_cases")
IDS = torch.randint(0, 61, (4, 7), generator=torch.Generator().manual_seed(1))
TARGETS = {"bert": ["query", "output.dense", "word_embeddings"], "gpt2": ["c_attn", "c_fc"], "llama": ["q_proj"]}
TARGETS["tiny"] = ["embed", "layers.0", "layers.2"]


class Tiny(nn.Module):
    """What inductor compiles in seconds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(61, 8)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.layers(self.embed(input_ids))
        return found


@pytest.fixture(autouse=True)
def _forget_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(name: str) -> Any:
    return (Tiny() if name == "tiny" else getattr(cases, name)()).train()


def wrapped(name: str, **changes: Any) -> Any:
    return tunerkit.wrap(model_of(name), "lora", {"rank": 3, "targets": TARGETS[name], **changes}, seed=0)


def logits(model: Any) -> Tensor:
    found = model(input_ids=IDS)
    return found if isinstance(found, Tensor) else found.logits


def trained(model: Any, owner: nn.Module, steps: int = 4) -> list[Tensor]:
    """The outputs of ``model`` while ``owner``, the module in it, is trained; then one in eval mode."""
    optimizer = torch.optim.AdamW([p for p in owner.parameters() if p.requires_grad], lr=0.05)
    tunerkit.attach(owner, optimizer)
    outputs = []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs.append(logits(model))
        outputs[-1].square().mean().backward()
        optimizer.step()
    owner.eval()
    return [*outputs, logits(model)]


def assert_close(one: list[Tensor], other: list[Tensor]) -> None:
    for found, expected in zip(one, other, strict=True):
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "backend"),
    [("bert", "eager"), ("gpt2", "eager"), ("llama", "eager"), ("bert", "aot_eager"), ("tiny", "inductor")],
)
def test_a_wrapped_model_trains_in_one_graph_compiled_once(name: str, backend: str) -> None:
    """No graph break, forward and backward; one compilation for training and one for eval mode; eager's outputs."""
    model = wrapped(name)
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend(backend)
    outputs = trained(torch.compile(model, backend=counter, fullgraph=True), model)
    assert counter.frame_count == 2
    assert_close(outputs, trained(eager, eager))
    assert not torch.allclose(outputs[0], outputs[3])


@pytest.mark.parametrize(("name", "backend"), [("bert", "eager"), ("tiny", "inductor")])
def test_adapters_take_part_in_a_model_compiled_before(name: str, backend: str) -> None:
    """Code compiled before wrapping is not run after it, though the base was frozen then too."""
    base = model_of(name).requires_grad_(False)
    compiled: Any = torch.compile(base, backend=backend)
    before = logits(compiled)
    tunerkit.wrap(compiled, "lora", {"rank": 3, "targets": TARGETS[name]}, seed=0)
    assert torch.allclose(logits(compiled), before, atol=1e-6)
    eager = wrapped(name)
    outputs = trained(compiled, base)
    assert_close(outputs, trained(eager, eager))
    assert not torch.allclose(outputs[3], before, atol=1e-3)
