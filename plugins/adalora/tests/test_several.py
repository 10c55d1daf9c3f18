"""Several AdaLoRA adapters in one model, each with a separate allocator and step count."""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import Tensor, nn

import tunerkit
from tunerkit_adalora.training import layers_of, training_of
from tunerkit_testing.small import net

TOTAL = 16
# Schedules and ranks that differ, so that an allocation of one at the time of the other would be seen.
CONFIGS: dict[str, dict[str, Any]] = {
    "a": {"target_rank": 2, "init_rank": 4, "t_init": 3, "t_final": 5, "delta_t": 2, "gamma": 0.1},
    "b": {"target_rank": 3, "init_rank": 5, "t_init": 2, "t_final": 6, "delta_t": 3, "start": "gaussian"},
}
DATA = torch.Generator().manual_seed(1)
BATCHES = {name: [torch.randn(8, 6, generator=DATA) for _ in range(TOTAL)] for name in CONFIGS}
LABELS = torch.randint(0, 3, (8,), generator=DATA)

Make = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=2e-2),
    "adamw loop": lambda parameters: torch.optim.AdamW(parameters, lr=2e-2, foreach=False),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def wrapped(*names: str, **changes: Any) -> nn.Module:
    model = net()
    for name in names:
        config = {**CONFIGS[name], "targets": ["0", "2"], "train_modules": ["4"], **changes}
        tunerkit.wrap(model, "adalora", config, adapter=name, seed=ord(name))
        tunerkit.activate(model, [])
    return model


def attached(model: nn.Module, name: str, *adapters: str) -> torch.optim.Optimizer:
    """One optimizer that contains and drives the named adapters."""
    optimizer = OPTIMIZERS[name]([p for each in adapters for p in tunerkit.tuner(model, each).parameters()])
    for each in adapters:
        tunerkit.attach(model, optimizer, total_steps=TOTAL, adapter=each)
    return optimizer


def step(model: nn.Module, adapter: str, optimizer: torch.optim.Optimizer) -> None:
    """One step of one adapter on its next batch."""
    x = BATCHES[adapter][tunerkit.tuner(model, adapter).steps]
    tunerkit.activate(model, adapter)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), LABELS).backward()
    optimizer.step()
    optimizer.zero_grad()


def end(model: nn.Module, adapter: str, optimizer: torch.optim.Optimizer) -> list[Any]:
    """The complete result of one adapter's training: weights, masks, averages, optimizer state, count, history."""
    tuner = tunerkit.tuner(model, adapter)
    training = training_of(tuner)
    state = [value for p in tuner.parameters() for value in optimizer.state[p].values()]
    masks = [layer.mask for layer in layers_of(tuner)]
    numbers = [tuner.steps, tuner.total_steps, training.last_step, training.in_force, training.phase, tuner.history]
    weights = [p.detach() for p in tuner.parameters()]
    return [*weights, *masks, *itertools.chain(*training.averages), *state, *numbers]


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True)
    )


@functools.cache
def alone(adapter: str, name: str, steps: int = TOTAL) -> list[Any]:
    model = wrapped(adapter)
    optimizer = attached(model, name, adapter)
    for _ in range(steps):
        step(model, adapter, optimizer)
    return end(model, adapter, optimizer)


@given(
    turns=st.lists(st.sampled_from(["a", "b"]), max_size=2 * TOTAL),
    shared=st.booleans(),
    name=st.sampled_from([*OPTIMIZERS]),
)
@example(["a", "b"] * TOTAL, True, "sgd")
@example(["a", "b"] * TOTAL, False, "adamw")
@example(["a", "b"] * 5, True, "adamw loop")
@settings(max_examples=12, deadline=None)
def test_adapters_trained_in_turns_end_as_each_alone(turns: list[str], shared: bool, name: str) -> None:
    """With one active at a time, in any order, each ends bit-identically as in a separate model."""
    model = wrapped("a", "b")
    both = attached(model, name, "a", "b") if shared else None
    optimizers = {adapter: both or attached(model, name, adapter) for adapter in CONFIGS}
    counts = {adapter: min(turns.count(adapter), TOTAL) for adapter in CONFIGS}
    for adapter in turns:
        if tunerkit.tuner(model, adapter).steps < TOTAL:
            step(model, adapter, optimizers[adapter])
    for adapter, count in counts.items():
        assert tunerkit.tuner(model, adapter).steps == count
        assert same(end(model, adapter, optimizers[adapter]), alone(adapter, name, count))
        assert not same(alone(adapter, name, max(count, 1)), alone(adapter, name, max(count, 1) - 1))


@pytest.mark.parametrize("together", [True, False])
def test_adapters_active_together_count_and_allocate_apart(together: bool) -> None:
    """Each step counts for both; masks follow each schedule, and the merged output is that of both."""
    model = wrapped("a", "b", train_modules=())
    optimizer = attached(model, "adamw", "a", "b")
    tunerkit.activate(model, ("a", "b") if together else ("b",))
    for x in BATCHES["a"]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), LABELS).backward()
        optimizer.step()
        for tuner in tunerkit.adapters(model).values():
            assert sum(tuner.ranks().values()) == tuner.budget()
            assert not tuner.steps or tuner.budget() == tuner.budget(tuner.steps)
    assert [t.steps for t in tunerkit.adapters(model).values()] == [TOTAL * together, TOTAL]
    output = model(BATCHES["b"][0])
    merged = tunerkit.merge(model)(BATCHES["b"][0])
    assert (merged - output).abs().max() <= 1e-5 * output.abs().max()


def freeze_and_thaw(model: nn.Module, optimizer: torch.optim.Optimizer, at: int) -> None:
    if at == 4:
        tunerkit.activate(model, "b")
        model(BATCHES["b"][0]).sum().backward()  # a stale gradient
        tunerkit.freeze(model, "b")
    if at == 9:
        tunerkit.thaw(model, "b")


def delete(model: nn.Module, optimizer: torch.optim.Optimizer, at: int) -> None:
    if at == 4:
        tunerkit.delete(model, "b")


def rename(model: nn.Module, optimizer: torch.optim.Optimizer, at: int) -> None:
    tunerkit.rename(model, list(tunerkit.adapters(model))[-1], f"forward {at}")


def add_and_train(model: nn.Module, optimizer: torch.optim.Optimizer, at: int) -> None:
    if at == 4:
        tunerkit.activate(model, [])
        tunerkit.wrap(model, "adalora", {**CONFIGS["b"], "targets": ["0"]}, adapter="new", seed=1)
        optimizer.add_param_group({"params": [*tunerkit.tuner(model, "new").parameters()]})
        tunerkit.attach(model, optimizer, total_steps=TOTAL, adapter="new")
        optimizer.zero_grad()
        model(BATCHES["b"][0]).sum().backward()
        optimizer.step()


CHANGES = {f.__name__: f for f in (freeze_and_thaw, delete, rename, add_and_train)}


@each_optimizer
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_one_in_the_middle_of_training_leaves_the_other_alone(name: str, change: str) -> None:
    """One is frozen, deleted or renamed, or a third is trained. The other ends bit-identically as if alone."""
    model = wrapped("a", "b")
    optimizer = attached(model, name, "a", "b")
    for at in range(TOTAL):
        step(model, "a", optimizer)
        CHANGES[change](model, optimizer, at)
        if "b" in tunerkit.adapters(model) and at < 4:
            step(model, "b", optimizer)
    assert same(end(model, "a", optimizer), alone("a", name))
    if change == "freeze_and_thaw":  # it resumes where it was
        for _ in range(TOTAL - 4):
            step(model, "b", optimizer)
        assert same(end(model, "b", optimizer), alone("b", name))


def test_adapters_that_change_names_keep_training(tmp_path: Path) -> None:
    """Schedule, averages and optimizer follow; file and training state are found by the new name."""
    model = wrapped("a", "b")
    optimizer = attached(model, "adamw", "a", "b")
    for at in range(TOTAL):
        if at == 7:
            for old, new in (("a", "c"), ("b", "a"), ("c", "b")):
                tunerkit.rename(model, old, new)
        for adapter, batches in zip("ab", "ab" if at < 7 else "ba", strict=True):
            tunerkit.activate(model, adapter)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(BATCHES[batches][at]), LABELS).backward()
            optimizer.step()
    assert same(end(model, "b", optimizer), alone("a", "adamw"))
    assert same(end(model, "a", optimizer), alone("b", "adamw"))
    tunerkit.load_state(model, tunerkit.save_state(model, tmp_path, adapter="a"), adapter="a")
    tunerkit.activate(model, "a")
    loaded = tunerkit.load(net(), tunerkit.save(model, tmp_path, adapter="a"), adapter="a")
    assert torch.equal(loaded(BATCHES["a"][0]), model(BATCHES["a"][0]))
