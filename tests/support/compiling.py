"""Checks of a method in models that `torch.compile` has compiled."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit.layers import torch_private
from tunerkit.plugin import Tuner
from tunerkit_testing import transformers_cases

# The models by name, with targets in each.
TARGETS: Mapping[str, tuple[str, ...]] = {
    "bert": ("query", "output.dense", "word_embeddings"),
    "gpt2": ("c_attn", "c_fc"),
    "llama": ("q_proj", "up_proj"),
    "tiny": ("embed", "layers.0", "layers.2"),
}
# Models with backends of `torch.compile`: each architecture, and each backend that needs no accelerator, once at least.
MODELS = (("gpt2", "eager"), ("llama", "eager"), ("bert", "aot_eager"), ("tiny", "inductor"))
each_model = pytest.mark.parametrize(("name", "backend"), MODELS)
_IDS = torch.randint(0, 61, (4, 7), generator=torch.Generator().manual_seed(1))


class Tiny(nn.Module):
    """(N, L) ids to (N, L, 5): what inductor compiles in seconds; the same at each construction."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(61, 8)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.layers(self.embed(input_ids))
        return found


@attrs.frozen(eq=False)
class Training:
    """What `train` saw: the outputs of each step and the graphs compiled by then, last those in eval mode."""

    tuner: Tuner
    outputs: list[Tensor]
    compilations: list[int]


@contextmanager
def fresh() -> Iterator[None]:
    """Forget what was compiled, before the block and after it. The checks do so themselves; it also decorates tests."""
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()


def base_of(name: str) -> nn.Module:
    """The model of that name in `TARGETS`, in training mode."""
    build = Tiny if name == "tiny" else getattr(transformers_cases, name)
    model: nn.Module = build().train()
    return model


def wrapped(name: str, method: str, config: Mapping[str, object]) -> nn.Module:
    """`base_of` with an adapter at its `TARGETS`."""
    return tunerkit.wrap(base_of(name), method, {"targets": TARGETS[name], **config}, seed=0)


def logits(model: Any) -> Tensor:
    """The output of a model for one batch of ids, whether it is a tensor or has ``logits``."""
    found = model(input_ids=_IDS)
    result: Tensor = found if isinstance(found, Tensor) else found.logits
    return result


def train(model: nn.Module, called: Any, steps: int, counter: Any = None) -> Training:
    """Train a wrapped model through ``called`` (the same, or compiled with ``counter``), then run it in eval mode."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    tunerkit.attach(model, optimizer, total_steps=steps)
    training = Training(tunerkit.tuner(model), [], [])
    for number in range(steps + 1):
        model.train(number < steps)
        optimizer.zero_grad()
        training.outputs.append(logits(called))
        if number < steps:
            training.outputs[-1].square().mean().backward()
            optimizer.step()
        training.compilations.append(counter.frame_count if counter else 0)
    return training


@fresh()
def check_trains_in_one_graph(
    name: str, method: str, config: Mapping[str, object], *, backend: str, steps: int
) -> Training:
    """A wrapped model is compiled without a graph break and trains as without compilation; returns the training."""
    model = wrapped(name, method, config)
    eager = copy.deepcopy(model)
    counter = torch_private.compile_counter(backend)
    found = train(model, torch.compile(model, backend=counter, fullgraph=True), steps, counter)
    assert_same(found, train(eager, eager, steps))
    assert not torch.allclose(found.outputs[0], found.outputs[steps - 1])
    return found


@fresh()
def check_adapts_what_was_compiled(
    name: str, method: str, config: Mapping[str, object], *, backend: str, steps: int
) -> Training:
    """A model compiled, run and frozen before it is wrapped does not run its old code; returns the training."""
    base = base_of(name).requires_grad_(False)
    compiled: Any = torch.compile(base, backend=backend)
    before = logits(compiled)
    tunerkit.wrap(compiled, method, {"targets": TARGETS[name], **config}, seed=0)
    eager = wrapped(name, method, config)
    found = train(base, compiled, steps)
    assert_same(found, train(eager, eager, steps))
    assert torch.allclose(found.outputs[0], before, atol=1e-6)
    assert not torch.allclose(found.outputs[steps - 1], before, atol=1e-3)
    return found


def assert_same(found: Training, expected: Training) -> None:
    """The outputs agree within 1e-4 of the largest one at each step, and the ranks and their history exactly."""
    for one, other in zip(found.outputs, expected.outputs, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()
    assert found.tuner.ranks() == expected.tuner.ranks()
    assert found.tuner.history == expected.tuner.history
