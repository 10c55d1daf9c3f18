"""AdaLoRA in compiled models."""

import os
from typing import Any

import pytest
import torch

import tunerkit

pytest.importorskip("transformers", reason="most of the models are transformers'")
from tests.support import compiling

TOTAL, FINAL = 14, 10
# Allocations after steps 4, 6, 8 and 10, where the distribution is final.
SETTINGS = {"target_rank": 2, "init_rank": 4, "exact_svd": True, "t_init": 2, "t_final": TOTAL - FINAL, "delta_t": 2}

LONG = pytest.mark.skipif(os.environ.get("TUNERKIT_LONG") != "1", reason="linear layers as in bert; TUNERKIT_LONG=1")


@pytest.mark.parametrize(
    ("name", "backend"), [pytest.param(*model, marks=LONG if model[0] == "llama" else ()) for model in compiling.MODELS]
)
def test_masks_change_without_recompiling(name: str, backend: str) -> None:
    """One graph without a break is compiled once until ranks are final, then at most once more."""
    training = compiling.check_trains_in_one_graph(name, "adalora", SETTINGS, backend=backend, steps=TOTAL)
    assert training.compilations[:FINAL] == [1] * FINAL
    assert training.compilations[TOTAL - 1] <= 2
    assert [change.step for change in training.tuner.history] == [4, 6, 8, FINAL]
    assert sum(training.tuner.ranks().values()) == 2 * len(training.tuner.targets)


@pytest.mark.parametrize("whole", [False, True], ids=["the optimizer's step", "the whole training step"])
@compiling.fresh()
def test_a_compiled_step_allocates_as_an_eager_one(whole: bool) -> None:
    """Importance, masks and shrinking happen outside the graph, at the same steps and with the same ranks."""
    tuners = []
    for compiled in (False, True):
        model = compiling.wrapped("tiny", "adalora", SETTINGS)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        tunerkit.attach(model, optimizer, total_steps=TOTAL)

        def update(optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()

        def training(model: Any = model, update: Any = update) -> None:
            compiling.logits(model).square().mean().backward()
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
    """Code compiled before wrapping is not reused after it, even if the base was frozen already."""
    training = compiling.check_adapts_what_was_compiled("bert", "adalora", SETTINGS, backend="eager", steps=TOTAL)
    assert sum(training.tuner.ranks().values()) == 2 * len(training.tuner.targets)
