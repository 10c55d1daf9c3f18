"""Adapters that peft made compute the same in tunerkit, what tunerkit writes the same in peft, and both train on."""

import copy
import os
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor, nn

import tunerkit
from plugins.peft.tests import peft_adapters
from plugins.peft.tests.peft_models import CASES, Case
from tunerkit.plugin import Factors, factors_of

# 8 models: 32 adapters, or 208.
EXAMPLES = 26 if os.environ.get("TUNERKIT_LONG") else 4


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs are equal, relative to the largest value."""
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


def factors(model: nn.Module) -> dict[str, Factors]:
    """The products of the model's only adapter."""
    return factors_of(tunerkit.tuner(model))


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_an_adapter_of_peft_comes_in_goes_out_and_trains(name: str, data: st.DataObject) -> None:
    """Logits equal peft's in each direction; a second import of ours is exact; training moves loss and adapter."""
    case = CASES[name]
    drawn = data.draw(peft_adapters.adapters(case))
    with TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        source = Path(folder, "source")
        peft_adapters.save(case, drawn, source)
        model = tunerkit.load(case.build(), source)
        ours = case.output(model)
        assert close(ours, case.output(peft_adapters.loaded(case, source)))
        goes_out(case, model, ours, Path(folder))
        if set(drawn.config.target_modules or ()) <= set(case.linear):
            tunerkit.export(model, Path(folder, "adalora"), form="adalora")
            assert close(case.output(peft_adapters.loaded(case, Path(folder, "adalora"))), ours)
            back = tunerkit.load(case.build(), Path(folder, "adalora"))
            assert tunerkit.tuner(back).method == "adalora"
            assert close(case.output(back), ours)
    trains(case, model)


def goes_out(case: Case, model: nn.Module, ours: Tensor, folder: Path) -> None:
    """Export in both forms of LoRA, and import again."""
    expected = factors(model)
    for form in ("uniform", "compact"):
        written = tunerkit.export(model, folder / form, form=form)
        assert close(case.output(peft_adapters.loaded(case, written)), ours)
        back = tunerkit.load(case.build(), written)
        found = factors(back)
        assert found.keys() == expected.keys()
        for path, product in expected.items():
            if form == "uniform":
                assert torch.equal(found[path].q, product.q)
                assert torch.equal(found[path].p, product.p)
            else:
                assert close(found[path].p @ found[path].q, product.p @ product.q) or product.rank == 0
        assert close(case.output(back), ours)


def trains(case: Case, model: nn.Module) -> None:
    """Train three steps through `attach`."""
    tuner = tunerkit.tuner(model)
    tunerkit.thaw(model, tuner.name)
    trained: Any = [p for p in model.parameters() if p.requires_grad]
    before = [copy.deepcopy(p.detach()) for p in tuner.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)  # whose steps do not depend on how small the scale is
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tunerkit.attach(model, optimizer, total_steps=30)
        losses = []
        for _ in range(3):
            loss = case.output(model).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert len(set(losses)) > 1
    after = list(tuner.parameters())
    assert any(not torch.equal(old, new.detach()) for old, new in zip(before, after, strict=False))
