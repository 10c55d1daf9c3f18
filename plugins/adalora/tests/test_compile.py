"""Tests of AdaLoRA in compiled models."""

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
TARGETS = {
    "bert": ["query", "output.dense", "word_embeddings"],
    "gpt2": ["c_attn", "c_fc"],
    "llama": ["q_proj", "up_proj"],
    "tiny": ["embed", "layers.0", "layers.2"],
}
TOTAL, FINAL = 14, 10
# Allocations after steps 4, 6, 8 and 10, where the distribution is final.
SETTINGS = {"target_rank": 2, "init_rank": 4, "exact_svd": True, "t_init": 2, "t_final": TOTAL - FINAL, "delta_t": 2}


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


def wrapped(name: str, **changes: Any) -> Any:
    model = (Tiny() if name == "tiny" else getattr(cases, name)()).train()
    return tunerkit.wrap(model, "adalora", {**SETTINGS, "targets": TARGETS[name], **changes}, seed=0)


def logits(model: Any) -> Tensor:
    found = model(input_ids=IDS)
    return found if isinstance(found, Tensor) else found.logits


class Run:
    """A training of ``model``, called through ``compiled``: the outputs and how often was compiled, by step."""

    def __init__(self, model: nn.Module, compiled: Any, counter: CompileCounterWithBackend | None = None) -> None:
        self.tuner = tunerkit.tuner(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        tunerkit.attach(model, optimizer, total_steps=TOTAL)
        self.outputs, self.compilations = [], []
        for _ in range(TOTAL):
            optimizer.zero_grad()
            self.outputs.append(logits(compiled))
            self.outputs[-1].square().mean().backward()
            optimizer.step()
            self.compilations.append(counter.frame_count if counter else 0)


@pytest.mark.parametrize(
    ("name", "backend"),
    [("bert", "eager"), ("gpt2", "eager"), ("llama", "eager"), ("bert", "aot_eager"), ("tiny", "inductor")],
)
def test_masks_change_without_compiling_anew(name: str, backend: str) -> None:
    """One graph without a break, compiled once until the distribution is final, then at most once more."""
    model = wrapped(name)
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend(backend)
    run = Run(model, torch.compile(model, backend=counter, fullgraph=True), counter)
    expected = Run(eager, eager)
    assert run.compilations[:FINAL] == [1] * FINAL
    assert run.compilations[-1] <= 2
    assert [change.step for change in run.tuner.history] == [4, 6, 8, FINAL]
    assert sum(run.tuner.ranks().values()) == 2 * len(run.tuner.targets)
    assert run.tuner.ranks() == expected.tuner.ranks()
    for found, other in zip(run.outputs, expected.outputs, strict=True):
        assert (found - other).abs().max() <= 1e-4 * other.abs().max()


@pytest.mark.parametrize("whole", [False, True], ids=["the optimizer's step", "the whole training step"])
def test_a_compiled_step_allocates_as_an_eager_one(whole: bool) -> None:
    """Importance, masks and shrinking happen outside the graph, at the same steps and with the same ranks."""
    tuners = []
    for compiled in (False, True):
        model = wrapped("tiny")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        tunerkit.attach(model, optimizer, total_steps=TOTAL)

        def update(optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()

        def training(model: Any = model, update: Any = update) -> None:
            logits(model).square().mean().backward()
            update()

        if compiled and whole:
            training = torch.compile(training, backend="eager")
        elif compiled:
            update = torch.compile(update, backend="eager")
        for _ in range(TOTAL):
            training(update=update)
            optimizer.zero_grad()
        tuners.append(tunerkit.tuner(model))
    assert tuners[0].history == tuners[1].history
    assert [change.step for change in tuners[1].history] == [4, 6, 8, FINAL]


def test_adapters_take_part_in_a_model_compiled_before() -> None:
    """Code compiled before wrapping is not run after it, though the base was frozen then too."""
    base = cases.bert().train().requires_grad_(False)
    compiled: Any = torch.compile(base, backend="eager")
    before = logits(compiled)
    tunerkit.wrap(compiled, "adalora", {**SETTINGS, "targets": TARGETS["bert"]}, seed=0)
    run = Run(base, compiled)
    assert torch.allclose(run.outputs[0], before, atol=1e-6)
    assert not torch.allclose(run.outputs[-1], before, atol=1e-3)
    assert sum(run.tuner.ranks().values()) == 2 * len(run.tuner.targets)
