"""Several AdaLoRA adapters in one model, each with a separate allocator and step count."""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
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
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def add(model: nn.Module, name: str, **changes: Any) -> None:
    config = {**CONFIGS[name], "targets": ["0", "2"], "train_modules": ["4"], **changes}
    tunerkit.wrap(model, "adalora", config, adapter=name, seed=ord(name))
    tunerkit.activate(model, [])


def wrapped(*names: str, **changes: Any) -> nn.Module:
    model = net()
    for name in names:
        add(model, name, **changes)
    return model


def parameters(model: nn.Module, *names: str) -> list[nn.Parameter]:
    return [p for name in names for p in tunerkit.tuner(model, name).parameters()]


def attached(model: nn.Module, make: Make, *names: str) -> torch.optim.Optimizer:
    """One optimizer that contains and drives the named adapters."""
    optimizer = make(parameters(model, *names))
    for name in names:
        tunerkit.attach(model, optimizer, total_steps=TOTAL, adapter=name)
    return optimizer


def step(model: nn.Module, name: str, optimizer: torch.optim.Optimizer) -> None:
    """One step of one adapter on its next batch."""
    x = BATCHES[name][tunerkit.tuner(model, name).steps]
    tunerkit.activate(model, name)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), LABELS).backward()
    optimizer.step()


def end(model: nn.Module, name: str, optimizer: torch.optim.Optimizer) -> list[Any]:
    """The complete result of one adapter's training: weights, masks, averages, optimizer state, count, history."""
    tuner = tunerkit.tuner(model, name)
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
def alone(name: str, make: Make, steps: int = TOTAL) -> list[Any]:
    model = wrapped(name)
    optimizer = attached(model, make, name)
    for _ in range(steps):
        step(model, name, optimizer)
    return end(model, name, optimizer)


@each_optimizer
@pytest.mark.parametrize("shared", [True, False], ids=["one optimizer", "one each"])
@pytest.mark.parametrize("steps", [5, TOTAL], ids=["averages", "the end"])
def test_adapters_trained_in_turn_end_as_each_alone(make: Make, shared: bool, steps: int) -> None:
    """On alternating batches, one active at a time, each ends bit-identically as in a separate model."""
    model = wrapped("a", "b")
    both = attached(model, make, "a", "b") if shared else None
    optimizers = {name: both or attached(model, make, name) for name in CONFIGS}
    for _ in range(steps):
        for name, optimizer in optimizers.items():
            step(model, name, optimizer)
    for name, optimizer in optimizers.items():
        expected = alone(name, make, steps)
        assert same(end(model, name, optimizer), expected)
        assert not same(end(model, name, optimizer), alone(name, make, steps - 1))
    one, other = tunerkit.adapters(model).values()
    assert one.history != other.history


@given(turns=st.lists(st.sampled_from(["a", "b"]), max_size=2 * TOTAL), shared=st.booleans())
@settings(max_examples=15, deadline=None)
def test_the_turns_may_come_in_any_order(turns: list[str], shared: bool) -> None:
    """In any order of the two adapters' steps, each has its own count, budget and result."""
    make = OPTIMIZERS["adamw"]
    model = wrapped("a", "b")
    both = attached(model, make, "a", "b") if shared else None
    optimizers = {name: both or attached(model, make, name) for name in CONFIGS}
    counts = {name: min(turns.count(name), TOTAL) for name in CONFIGS}
    for name in turns:
        if tunerkit.tuner(model, name).steps < TOTAL:
            step(model, name, optimizers[name])
    for name, count in counts.items():
        assert tunerkit.tuner(model, name).steps == count
        assert same(end(model, name, optimizers[name]), alone(name, make, count))


@pytest.mark.parametrize("together", [True, False])
def test_adapters_active_together_count_and_allocate_apart(together: bool) -> None:
    """Each step counts for both; masks follow each schedule, and the merged output is that of both."""
    model = wrapped("a", "b", train_modules=())
    optimizer = attached(model, OPTIMIZERS["adamw"], "a", "b")
    names = ("a", "b") if together else ("b",)
    tunerkit.activate(model, names)
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


def add_and_load(model: nn.Module, optimizer: torch.optim.Optimizer, at: int) -> None:
    if at == 4:
        tunerkit.activate(model, [])
        tunerkit.wrap(model, "adalora", {**CONFIGS["b"], "targets": ["0"]}, adapter="new", seed=1)
        optimizer.add_param_group({"params": parameters(model, "new")})
        tunerkit.attach(model, optimizer, total_steps=TOTAL, adapter="new")
        optimizer.zero_grad()
        model(BATCHES["b"][0]).sum().backward()
        optimizer.step()


CHANGES = {f.__name__: f for f in (freeze_and_thaw, delete, rename, add_and_load)}


@each_optimizer
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_is_done_to_one_in_the_middle_of_training_leaves_the_other_alone(make: Make, change: Any) -> None:
    """One is frozen, deleted or renamed, or a third is trained. The other ends bit-identically as if alone."""
    model = wrapped("a", "b")
    optimizer = attached(model, make, "a", "b")
    for at in range(TOTAL):
        step(model, "a", optimizer)
        optimizer.zero_grad()
        change(model, optimizer, at)
        if "b" in tunerkit.adapters(model) and at < 4:
            step(model, "b", optimizer)
            optimizer.zero_grad()
    assert same(end(model, "a", optimizer), alone("a", make))


@each_optimizer
def test_a_frozen_adapter_resumes_where_it_was(make: Make) -> None:
    """Frozen after five steps while another one trains, then unfrozen: it ends as if it had not paused."""
    model = wrapped("a", "b")
    optimizer = attached(model, make, "a", "b")
    for at in range(TOTAL):
        if at == 5:
            tunerkit.freeze(model, "b")
        if at < 5:
            step(model, "b", optimizer)
        step(model, "a", optimizer)
    assert tunerkit.tuner(model, "b").steps == 5
    tunerkit.thaw(model, "b")
    for _ in range(TOTAL - 5):
        step(model, "b", optimizer)
    assert same(end(model, "b", optimizer), alone("b", make))
    assert same(end(model, "a", optimizer), alone("a", make))


def test_a_renamed_adapter_keeps_training(tmp_path: Path) -> None:
    """Its schedule, averages and optimizer follow it; its file and training state are found by the new name."""
    make = OPTIMIZERS["adamw"]
    model = wrapped("a", "b")
    optimizer = attached(model, make, "a", "b")
    for at in range(TOTAL):
        if at == 7:
            tunerkit.rename(model, "a", "c")
            tunerkit.rename(model, "b", "a")
            tunerkit.rename(model, "c", "b")  # they have changed names
        for name in CONFIGS:
            batches_of = name if at < 7 else {"a": "b", "b": "a"}[name]
            tunerkit.activate(model, name)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(BATCHES[batches_of][at]), LABELS).backward()
            optimizer.step()
    assert same(end(model, "b", optimizer), alone("a", make))
    assert same(end(model, "a", optimizer), alone("b", make))
    tunerkit.save_state(model, tmp_path, adapter="a")
    tunerkit.load_state(model, tmp_path, adapter="a")
    tunerkit.activate(model, "a")
    loaded = tunerkit.load(net(), tunerkit.save(model, tmp_path, adapter="a"), adapter="a")
    assert torch.equal(loaded(BATCHES["a"][0]), model(BATCHES["a"][0]))
